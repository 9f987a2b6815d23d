//! Clients made for other platforms, against a running node: AWS's SDK and OpenFaaS's gateway API.

mod callback;
mod gateway;
mod lambda;

use crate::support::{Node, have, privileged};
use std::time::Duration;

/// Long enough for a test machine that compiles beside this.
const SOON: Duration = Duration::from_secs(60);

/// Whether this machine can run a node at all.
#[track_caller]
fn possible() -> bool {
    let test = std::thread::current().name().unwrap_or("a client's test").to_owned();
    privileged(&test) && have(&test, "umoci")
}

/// A function in shell: `rest` is more of its manifest.
fn function(name: &str, script: &str, rest: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"shell:1\"\ncommand = ['/bin/sh', '-c', '''{script}''']\n{rest}\n\
         [limits]\nmemory = \"16MiB\"\n"
    )
}

/// A node without brokers, the shell image imported.
fn alone(builder: crate::support::node::Builder) -> Node {
    let node = builder.start();
    node.import(crate::support::shell_image());
    node
}
