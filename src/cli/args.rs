//! What can be typed: `neap --help` is written here. A command that a later version will have is
//! already known, so that it is answered with "not in this version" and not with a guess at a typo.

use super::units::{self, Input, Since};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use std::path::PathBuf;

#[derive(Debug, Parser)]
#[command(
    name = "neap",
    version,
    about = "Runs functions from OCI images on an edge gateway, and keeps their events while the site is offline",
    after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 the daemon can't be reached, 4 not found.",
    subcommand_required = true,
    arg_required_else_help = false,
    propagate_version = false,
    disable_help_subcommand = true
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The daemon's Unix socket
    #[arg(
        long,
        global = true,
        env = "NEAP_SOCKET",
        default_value = "/run/neap/neap.sock",
        value_name = "PATH",
        help_heading = "Where the daemon is"
    )]
    pub socket: PathBuf,
    /// A node elsewhere, instead of the socket: https://gw:8443
    #[arg(long, global = true, value_name = "URL", help_heading = "Where the daemon is")]
    pub url: Option<String>,
    /// The file with that node's token
    #[arg(long, global = true, value_name = "FILE", help_heading = "Where the daemon is")]
    pub token_file: Option<PathBuf>,
    /// Certificates (PEM) to trust for it, instead of the system's
    #[arg(long, global = true, value_name = "FILE", help_heading = "Where the daemon is")]
    pub ca: Option<PathBuf>,
    /// Tables for people, or the API's own JSON
    #[arg(long, short, global = true, value_enum, default_value_t = Format::Text, value_name = "FORMAT")]
    pub output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon in the foreground
    Daemon {
        /// [default: /etc/neap/neap.toml, if there is one]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Report every mistake in the configuration and in manifests at once
    Check {
        /// [default: /etc/neap/neap.toml, if there is one]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Function manifests; none: those in functions_dir
        #[arg(value_name = "MANIFEST")]
        manifests: Vec<PathBuf>,
    },
    /// Say what this machine lacks, and what to do
    Doctor {
        /// [default: /etc/neap/neap.toml, if there is one]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Try an image once as a stdio function, nothing deployed
    Run(Run),
    /// Create or update functions from manifests
    Deploy {
        /// Manifests; a directory means every *.toml in it
        #[arg(value_name = "FILE|DIR", required = true)]
        paths: Vec<PathBuf>,
    },
    /// List functions
    Ls,
    /// Show a function
    Show {
        /// The function
        name: String,
    },
    /// Remove a function and the invocations it has left
    Rm {
        /// The function
        name: String,
    },
    /// Let a function's events wait
    Pause {
        /// The function
        name: String,
    },
    /// Let a paused function run again
    Resume {
        /// The function
        name: String,
    },
    /// Go back to a function's revision before this one; works offline
    Rollback {
        /// The function
        name: String,
    },
    /// Call a function
    Invoke(Invoke),
    /// Show what a function wrote to stderr
    Logs(Logs),
    /// Pull, import, list and remove images
    #[command(subcommand)]
    Image(Image),
    /// Set, list and remove secrets, which functions read as files
    #[command(subcommand)]
    Secret(Secret),
    /// List and handle events that have not succeeded yet
    Events(Events),
    /// List and handle what is owed to the brokers
    Deliveries(Deliveries),
    /// The node at a glance: links, queues, disk, memory, functions
    Status,
    /// Have the daemon read its configuration and functions_dir again
    Reload,
    /// Write a completion script to stdout
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Args)]
pub struct Run {
    /// A name or a digest
    pub image: String,
    /// The event's data: TEXT, @FILE, or - for stdin
    #[arg(long, short, value_parser = units::input, value_name = "DATA", allow_hyphen_values = true)]
    pub data: Option<Input>,
    /// Adds to the image's environment
    #[arg(long, short, value_parser = units::key_value, value_name = "K=V")]
    pub env: Vec<(String, String)>,
    /// Replaces the image's entrypoint and command
    #[arg(last = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Invoke {
    /// The function
    pub name: String,
    /// The event's data: TEXT, @FILE, or - for stdin
    #[arg(long, short, value_parser = units::input, value_name = "DATA", allow_hyphen_values = true)]
    pub data: Option<Input>,
    /// The event's id; default: a new one
    #[arg(long, value_parser = units::event_id, value_name = "ID")]
    pub event: Option<String>,
    /// Don't wait: print the event's id once it is committed
    #[arg(long = "async")]
    pub no_wait: bool,
    /// Sent as an HTTP header
    #[arg(long, short = 'H', value_parser = units::header, value_name = "K=V")]
    pub header: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub struct Logs {
    /// The function
    pub name: String,
    /// Go on as lines come, until Ctrl-C
    #[arg(long, short)]
    pub follow: bool,
    /// Only the last N lines
    #[arg(long, value_name = "N")]
    pub tail: Option<u64>,
    /// From then on: 10m, 2h, 3d, or 2026-03-01T09:00:00Z
    #[arg(long, value_parser = units::since, value_name = "T")]
    pub since: Option<Since>,
    /// Of one event only
    #[arg(long, value_name = "ID")]
    pub event: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Image {
    /// Bring an image from an OCI layout (directory or tar), an OCI archive or a docker-save archive
    Import {
        /// A file, an OCI layout directory, or - for stdin; plain, gzip or zstd
        #[arg(value_name = "FILE|DIR|-")]
        source: PathBuf,
        /// What to call it; default: the name inside
        #[arg(long, value_name = "REF")]
        name: Option<String>,
    },
    /// Fetch an image from a registry, from where the last try stopped
    Pull {
        /// The image's name
        reference: String,
    },
    /// List images
    Ls,
    /// Show an image
    Show {
        /// A name or a digest
        reference: String,
    },
    /// Remove an image that no function needs
    Rm {
        /// A name or a digest
        reference: String,
    },
    /// Remove every image that no function needs, now or to go back to
    Gc {
        /// Only tell which
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum Secret {
    /// Make or replace a secret; functions that have it see the change
    Set {
        /// What manifests call it
        name: String,
        /// TEXT, @FILE, or - for stdin, which is the default; a TEXT stays in your shell's history
        #[arg(long, short, value_parser = units::input, value_name = "DATA", allow_hyphen_values = true)]
        data: Option<Input>,
    },
    /// List secrets, without what is in them
    Ls,
    /// Remove a secret that no function needs
    Rm {
        /// The secret
        name: String,
    },
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Events {
    /// ready, running or dead; default: all of them
    #[arg(long, value_enum, value_name = "STATE")]
    pub state: Option<EventState>,
    /// Of one function only
    #[arg(long, value_name = "NAME")]
    pub function: Option<String>,
    /// At most N
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
    #[command(subcommand)]
    pub command: Option<EventsCommand>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EventState {
    Ready,
    Running,
    Dead,
}

impl EventState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Dead => "dead",
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum EventsCommand {
    /// Show an event, its data and how each function fared with it
    Show {
        /// The event's id, as listed
        id: String,
    },
    /// Give dead events their attempts again
    Redrive(EventSelection),
    /// Delete dead events
    Purge {
        #[command(flatten)]
        selection: EventSelection,
        /// Don't ask
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct EventSelection {
    /// Single events
    #[arg(value_name = "ID")]
    pub ids: Vec<String>,
    /// Every dead event
    #[arg(long)]
    pub all: bool,
    /// Every dead event of one function
    #[arg(long, value_name = "NAME")]
    pub function: Option<String>,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Deliveries {
    /// Only those that were refused for good
    #[arg(long)]
    pub dead: bool,
    /// At most N
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
    #[command(subcommand)]
    pub command: Option<DeliveriesCommand>,
}

#[derive(Debug, Subcommand)]
pub enum DeliveriesCommand {
    /// Show a delivery and its data
    Show {
        /// The delivery's number, as listed
        id: i64,
    },
    /// Send dead deliveries again
    Redrive(DeliverySelection),
    /// Delete dead deliveries
    Purge {
        #[command(flatten)]
        selection: DeliverySelection,
        /// Don't ask
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct DeliverySelection {
    /// Single deliveries
    #[arg(value_name = "ID")]
    pub ids: Vec<i64>,
    /// Every dead delivery
    #[arg(long)]
    pub all: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_of_the_manual_is_there() {
        let command = Cli::command();
        let paths = [
            "daemon",
            "check",
            "doctor",
            "run",
            "deploy",
            "ls",
            "show",
            "rm",
            "pause",
            "resume",
            "rollback",
            "invoke",
            "logs",
            "image import",
            "image pull",
            "image ls",
            "image show",
            "image rm",
            "image gc",
            "secret set",
            "secret ls",
            "secret rm",
            "events show",
            "events redrive",
            "events purge",
            "deliveries show",
            "deliveries redrive",
            "deliveries purge",
            "status",
            "reload",
            "completions",
        ];

        for path in paths {
            let mut at = &command;
            for word in path.split(' ') {
                at = at.find_subcommand(word).unwrap_or_else(|| panic!("`neap {path}` is missing"));
            }
        }
    }

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn lines_of_the_manual_are_understood() {
        for line in [
            "neap daemon --config /etc/neap/neap.toml",
            "neap check --config a.toml b.toml c.toml",
            "neap doctor --output json",
            "neap run busybox --data x --env A=B -- sh -c true",
            "neap deploy a.toml functions.d",
            "neap ls --output json",
            "neap --output json ls",
            "neap --url https://gw:8443 --token-file t --ca c show f",
            "neap invoke f --data - --event 1 --async --header A=B --header C=D",
            "neap invoke f --data -5",
            "neap logs f -f --tail 10 --since 10m --event 1",
            "neap image import - --name a:1",
            "neap image pull a:1",
            "neap image gc --dry-run",
            "neap rollback f",
            "neap secret set api-key --data @file",
            "neap secret set api-key -d -",
            "neap events",
            "neap events --state dead --function f",
            "neap events show 1",
            "neap events redrive 1 2 3",
            "neap events redrive --all",
            "neap events purge --function f --yes",
            "neap deliveries --dead",
            "neap deliveries redrive --all",
            "neap deliveries purge 7",
            "neap completions bash",
        ] {
            if let Err(error) = parse(line) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn contradictions_and_omissions_are_usage_errors() {
        for line in [
            "neap",
            "neap nonsense",
            "neap ls --output yaml",
            "neap deploy",
            "neap run busybox --env A",
            "neap invoke f --header =x",
            "neap invoke f --event \u{e9}",
            "neap logs f --since yesterday",
            "neap events --state done",
            "neap events redrive",
            "neap events purge",
            "neap events purge --all 1",
            "neap events purge --yes",
            "neap deliveries purge --all 1",
            "neap deliveries show x",
            "neap completions tcl",
        ] {
            let error = parse(line).map(|_| line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
