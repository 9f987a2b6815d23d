//! Handler http from the outside: a server in a container, reached through the node.

use super::{SOON, alone, possible};
use crate::support::{Node, http, wait_until};

/// busybox's httpd with one CGI program, `/cgi-bin/f`, which runs `script`.
fn served(name: &str, script: &str, rest: &str) -> String {
    let start = "mkdir -p /tmp/www/cgi-bin && cp /tmp/f /tmp/www/cgi-bin/f";
    format!(
        "name = \"{name}\"\nimage = \"shell:1\"\nhandler = \"http\"\n\
         command = ['/bin/sh', '-c', '''printf '%s\\n' '#!/bin/sh' \"$SCRIPT\" >/tmp/f; chmod 755 /tmp/f; \
         {start}; echo \"listening on $PORT\"; exec httpd -f -p $PORT -h /tmp/www''']\n\
         env = {{ SCRIPT = '''{script}''' }}\n{rest}\n"
    )
}

const ECHO: &str = "printf 'Content-Type: text/plain\\r\\n\\r\\n'; cat";

/// v1: the word in the freezer of the node's only instance; v2: its digit.
fn frozen(node: &Node) -> Option<bool> {
    let states = node.instance_files("freezer.state", "cgroup.freeze");
    let text = states.first().map(|file| std::fs::read_to_string(file).unwrap_or_default())?;
    Some(matches!(text.trim(), "FROZEN" | "1"))
}

#[test]
fn server_is_started_by_the_first_call_frozen_when_idle_and_removed_after_its_time() {
    if !possible() {
        return;
    }
    let node = alone("http-life");
    node.deploy(&served("echo", ECHO, "[scale]\nidle = \"3s\"\n"));
    assert_eq!(node.status()["instances"], 0, "nothing runs before the first call");

    let first = node.post("/function/echo/cgi-bin/f?x=1", "21 degrees");
    wait_until(SOON, "the idle instance is frozen", || frozen(&node) == Some(true));
    let second = node.post("/function/echo/cgi-bin/f", "22 degrees");

    assert_eq!((first.status, first.text().as_str()), (200, "21 degrees"));
    assert_eq!((second.status, second.text().as_str()), (200, "22 degrees"));
    assert_eq!(first.header("content-type"), Some("text/plain"));
    assert!(first.header("x-call-id").is_some());
    let log = node.neap_ok(&["logs", "echo"]);
    assert_eq!(log.matches("listening on 8080").count(), 1, "one instance served both: {log}");
    wait_until(SOON, "the idle instance is removed", || node.status()["instances"] == 0);
    assert_eq!(node.post("/function/echo/cgi-bin/f", "again").text(), "again", "and comes again");
}

#[test]
fn functions_own_status_and_headers_reach_the_caller() {
    if !possible() {
        return;
    }
    let node = alone("http-status");
    node.deploy(&served(
        "echo",
        "printf 'Status: 418 Teapot\\r\\nX-Made-Of: %s\\r\\n\\r\\nno coffee' \"$HTTP_X_ASKED\"",
        "",
    ));

    let answer =
        http::request(node.port(), "GET", "/function/echo/cgi-bin/f", &[("X-Asked", "porcelain")], b"")
            .expect("an answer");
    let missing = node.get("/function/echo/nothing");

    assert_eq!((answer.status, answer.text().as_str()), (418, "no coffee"));
    assert_eq!(answer.header("x-made-of"), Some("porcelain"));
    assert_eq!(missing.status, 404);
}
