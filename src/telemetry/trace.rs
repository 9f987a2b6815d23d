//! The daemon's own log: one line an event on stderr, for journald, syslog or a person.

use std::io::IsTerminal;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// Names the level: `debug`, or by module, `info,neap::sync=debug`.
pub const VARIABLE: &str = "NEAP_LOG";

/// To be called once. Under journald lines carry no time of their own: it stamps them.
pub fn init() {
    let named = std::env::var(VARIABLE).ok();
    let parsed = named.as_deref().map(str::parse::<Targets>);
    let targets = match &parsed {
        Some(Ok(targets)) => targets.clone(),
        // libcontainer and the protocol crates speak to their developers below this.
        Some(Err(_)) | None => {
            Targets::new().with_default(LevelFilter::WARN).with_target("neap", LevelFilter::INFO)
        }
    };
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let lines = if journal { lines.without_time().boxed() } else { lines.boxed() };
    // Already set: a test process starts several nodes.
    let _ = tracing_subscriber::registry().with(lines.with_filter(targets)).try_init();
    if let Some(Err(error)) = parsed {
        tracing::warn!(variable = VARIABLE, %error, "not understood, using the default level");
    }
}
