//! A running node from the outside: the daemon with real containers between real brokers, and
//! nothing of neap linked in. What one part does by itself is tested beside that part.

mod azure;
mod bad_input;
mod egress;
mod extensions;
mod fc;
mod fission;
mod flask;
mod http_function;
mod job;
mod kept;
mod lambda;
mod lambda_rust;
mod life;
mod limits;
mod node_volumes;
mod nodejs;
mod offline;
mod openfaas;
mod permissions;
mod pool;
mod way;

use crate::support::{Mosquitto, Node, have, privileged};
use std::time::Duration;

/// Long enough for a test machine that compiles beside this.
const SOON: Duration = Duration::from_secs(30);

/// Whether this machine can run a node at all.
#[track_caller]
fn possible() -> bool {
    let test = std::thread::current().name().unwrap_or("a node's test").to_owned();
    privileged(&test)
        && ["mosquitto", "mosquitto_pub", "mosquitto_sub", "umoci"].iter().all(|program| have(&test, program))
}

/// A function in shell: `rest` is more of its manifest.
fn function(name: &str, script: &str, rest: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"shell:1\"\ncommand = ['/bin/sh', '-c', '''{script}''']\n{rest}\n\
         [limits]\nmemory = \"16MiB\"\n"
    )
}

/// A node between two open brokers, the shell image imported.
struct Site {
    // Dropped in this order: the node first, while its brokers still answer.
    node: Node,
    local: Mosquitto,
    uplink: Mosquitto,
}

impl Site {
    fn start(name: &str) -> Self {
        Self::start_with(Node::builder(name))
    }

    fn start_with(builder: crate::support::node::Builder) -> Self {
        let local = Mosquitto::builder().persistent().start();
        let uplink = Mosquitto::builder().persistent().start();
        let node = builder.mqtt(&local.url()).uplink(&uplink.url()).start();
        node.import(crate::support::shell_image());
        node.wait_link("mqtt", "up");
        node.wait_link("uplink", "up");
        Self { node, local, uplink }
    }
}

/// A node without brokers, the shell image imported.
fn alone(name: &str) -> Node {
    let node = Node::builder(name).start();
    node.import(crate::support::shell_image());
    node
}
