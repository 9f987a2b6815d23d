//! The event engine from the outside: ways in beside MQTT and HTTP, what holds functions back,
//! and the uplink that is no broker.

mod clocks;
mod damage;
mod held;
mod https;
mod ways_in;

use crate::support::{Node, have, privileged, shell_image};
use std::time::Duration;

/// Long enough for a test machine that compiles beside this.
const SOON: Duration = Duration::from_secs(40);

#[track_caller]
fn possible() -> bool {
    let test = std::thread::current().name().unwrap_or("an engine's test").to_owned();
    privileged(&test) && have(&test, "umoci")
}

fn function(name: &str, script: &str, rest: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"shell:1\"\ncommand = ['/bin/sh', '-c', '''{script}''']\n\
         limits = {{ memory = \"16MiB\" }}\n{rest}\n"
    )
}

fn alone(name: &str) -> Node {
    let node = Node::builder(name).start();
    node.import(shell_image());
    node
}

/// Lines of a function's log.
fn log(node: &Node, name: &str) -> Vec<String> {
    node.neap_ok(&["logs", name, "--tail", "1000"]).lines().map(str::to_owned).collect()
}
