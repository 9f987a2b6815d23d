//! The command line. Everything but `daemon`, `check`, `doctor` and `completions` is a question
//! to the daemon: its answer is printed for people, or as it is with `--output json`.
//!
//! stdout holds what was asked for and nothing else; what went wrong is one line on stderr,
//! joined from the chain of causes. Exit codes: 0 done, 1 failed, 2 usage, 3 the daemon can't be
//! reached, 4 not found; `neap run` exits with the function's own.
//!
//! A command runs on the main thread under `block_on`; no SIGINT handler, so that Ctrl-C just
//! ends it. SIGPIPE is ignored by Rust's runtime: `neap logs -f x | head` ends by the write
//! error, quietly.

mod args;
pub mod check;
mod client;
pub mod doctor;
mod fault;
mod functions;
mod images;
mod invoke;
mod output;
mod queues;
mod secrets;
mod source;
mod status;
mod text;
mod units;

use crate::model::{Clock, SystemClock, UnixMs};
use args::{Cli, Command, Format};
use clap::{CommandFactory, Parser};
use client::Client;
use fault::Fault;
use output::Output;
use std::process::ExitCode;

/// What every command that asks the daemon has at hand.
struct Session {
    client: Client,
    out: Output,
    /// When the command began; ages are counted from it.
    now: UnixMs,
}

/// The command line's definition, for those who write its manual.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The process's whole life.
pub fn main() -> ExitCode {
    let Cli { global, command } = Cli::parse(); // exits with 2 by itself
    let json = global.output == Format::Json;
    match command {
        Command::Daemon { config } => return crate::daemon::run(config),
        Command::Check { config, manifests } => return check::run(config.as_deref(), &manifests),
        Command::Doctor { config } => return doctor::run(config.as_deref(), json),
        _ => {}
    }
    let out = Output::new(global.output);
    let done = match command {
        Command::Completions { shell } => completions(shell, out).map(|()| 0),
        command => Client::new(&global).map_err(Into::into).and_then(|client| {
            let session = Session { client, out, now: SystemClock::new().wall() };
            smol::block_on(dispatch(&session, command))
        }),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            fault::report(&error);
            ExitCode::from(Fault::of(&error).exit_code())
        }
    }
}

/// To the command; the exit code.
async fn dispatch(session: &Session, command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Run(run) => return invoke::run(session, run).await,
        Command::Deploy { paths } => functions::deploy(session, &paths).await,
        Command::Ls => functions::ls(session).await,
        Command::Show { name } => functions::show(session, &name).await,
        Command::Rm { name } => functions::rm(session, &name).await,
        Command::Pause { name } => functions::pause(session, &name, true).await,
        Command::Resume { name } => functions::pause(session, &name, false).await,
        Command::Rollback { name } => functions::rollback(session, &name).await,
        Command::Invoke(invoke) => invoke::invoke(session, invoke).await,
        Command::Logs(logs) => invoke::logs(session, logs).await,
        Command::Image(image) => images::image(session, image).await,
        Command::Secret(secret) => secrets::secret(session, secret).await,
        Command::Events(events) => queues::events(session, events).await,
        Command::Deliveries(deliveries) => queues::deliveries(session, deliveries).await,
        Command::Status => status::status(session).await,
        Command::Reload => status::reload(session).await,
        Command::Daemon { .. }
        | Command::Check { .. }
        | Command::Doctor { .. }
        | Command::Completions { .. } => unreachable!("handled without a daemon in main"),
    }
    .map(|()| 0)
}

fn completions(shell: clap_complete::Shell, out: Output) -> anyhow::Result<()> {
    // Into memory first: the generator panics where it can't write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "neap", &mut script);
    Ok(out.raw(&script)?)
}
