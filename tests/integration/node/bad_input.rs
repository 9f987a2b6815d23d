//! Bad input gets a clear error, and the daemon goes on.

use super::{SOON, Site, alone, function, possible};
use crate::support::{Node, http, publish, publish_with, shell_image, wait_until};
use std::net::TcpListener;

#[test]
fn bad_requests_are_answered_with_a_reason() {
    if !possible() {
        return;
    }
    let node = alone("requests");
    node.deploy(&(function("small", "cat", "") + "payload = \"1KiB\"\n"));

    let unknown = node.post("/function/nobody", "x");
    let large = node.post("/function/small", vec![b'x'; 4096]);

    assert_eq!(unknown.status, 404);
    assert!(unknown.header("content-type").is_some_and(|kind| kind.starts_with("application/problem+json")));
    assert_eq!(large.status, 413);
    let output = node.neap(&["invoke", "nobody", "--data", "x"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nobody"));
}

#[test]
fn every_mistake_of_a_manifest_is_a_line() {
    if !possible() {
        return;
    }
    let node = alone("manifest");
    let file = node.dir().write(
        "bad.toml",
        "name = \"Bad Name\"\nimage = \"shell:1\"\nhandel = \"stdio\"\npriority = \"urgent\"\n\
         [limits]\nmemory = \"64 bananas\"\ntimeout = \"soon\"\n[[trigger]]\nmqtt = \"a/#/b\"\n",
    );

    let output = node.neap(&["deploy", file.to_str().expect("the path is UTF-8")]);

    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for mistake in ["Bad Name", "handel", "urgent", "bananas", "soon", "stands alone"] {
        assert!(said.contains(mistake), "`{mistake}` is missing in:\n{said}");
    }
    assert_eq!(node.get("/healthz").status, 200);
}

#[test]
fn command_that_is_not_in_the_image_is_refused_by_name() {
    if !possible() {
        return;
    }
    let node = alone("command");
    let manifest = "name = \"lost\"\nimage = \"shell:1\"\ncommand = [\"/no/such\"]\n";
    let file = node.dir().write("lost.toml", manifest);

    let output = node.neap(&["deploy", file.to_str().expect("the path is UTF-8")]);

    // Proven to start at deploy, or told at the first call: never silence.
    let mut said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        said = node.post("/function/lost", "x").text();
    }
    assert!(said.contains("/no/such"), "{said}");
}

#[test]
fn port_in_use_and_unusable_data_dir_are_named() {
    if !possible() {
        return;
    }
    let mut busy = Node::builder("busy").stopped();
    let _taken = TcpListener::bind(("127.0.0.1", busy.port())).expect("take the port");
    busy.spawn();
    assert_eq!(busy.wait(SOON).code(), Some(1));
    assert!(busy.stderr().contains(&busy.port().to_string()), "{}", busy.stderr());

    let mut file = Node::builder("file").stopped();
    std::fs::write(file.dir().join("data"), "in the way").expect("write a file");
    file.spawn();
    assert_eq!(file.wait(SOON).code(), Some(1));
    assert!(file.stderr().contains("/data"), "{}", file.stderr());
}

#[test]
fn oversized_message_is_set_aside_and_the_next_one_runs() {
    if !possible() {
        return;
    }
    let site = Site::start("oversized");
    site.node.deploy(
        &(function("small", "cat", "") + "payload = \"1KiB\"\n[[trigger]]\nmqtt = \"in\"\n[[output]]\nto = \"local\"\ntopic = \"out\"\n"),
    );
    let out = crate::support::Subscriber::start(site.local.port(), "out", &["out"]);
    site.local.wait_subscribed("neap-", "in");

    publish(site.local.port(), "in", vec![b'x'; 100_000]);
    publish_with(site.local.port(), "in", "fits", &["-V", "311"]);

    assert_eq!(out.wait_for(1, SOON)[0].text(), "fits");
    wait_until(SOON, "the oversized one is dead", || site.node.status()["dead_events"] == 1);

    // What is kept of it is a head for people: another chance does not run the function on that.
    site.node.neap_ok(&["events", "redrive", "--all"]);
    publish(site.local.port(), "in", "after");
    assert_eq!(out.wait_for(2, SOON)[1].text(), "after");
    wait_until(SOON, "it is dead again", || {
        site.node.status()["dead_events"] == 1 && site.node.status()["inbox"]["depth"] == 0
    });
    assert_eq!(out.wait_for(2, SOON).len(), 2);
}

#[test]
fn truncated_archive_leaves_no_image() {
    if !possible() {
        return;
    }
    let node = Node::builder("truncated").start();
    let whole = std::fs::read(shell_image()).expect("read the archive");
    let half = node.dir().write("half.tar", &whole[..whole.len() / 2]);

    let output = node.neap(&["image", "import", half.to_str().expect("the path is UTF-8")]);

    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(node.neap_json(&["image", "ls"]).as_array().map(Vec::len), Some(0));
    node.import(shell_image());
    assert_eq!(http::get(node.port(), "/healthz").expect("an answer").status, 200);
}
