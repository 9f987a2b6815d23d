//! Lambda's external extensions: what an image has in /opt/extensions runs beside its command.

use super::{SOON, alone, possible};
use crate::support::python::extended_lambda_image;
use crate::support::rust::web_adapter;
use crate::support::{Node, have, http, wait_until};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// With AWS's runtime client for Python, and an extension whose conduct `spy` says.
fn function(name: &str, spy: &str, limits: &str, scale: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"pyextended:1\"\nplatform = \"lambda\"\nenv = {{ SPY = \"{spy}\" }}\n\
         command = ['/usr/bin/python3', '-m', 'awslambdaric', 'app.handler']\n[retry]\nattempts = 1\n\
         [limits]\ncpu = 2\n{limits}\n[scale]\nmax = 1\n{scale}\n"
    )
}

fn failure(answer: &http::Response) -> Option<String> {
    answer.header("x-neap-failure").map(str::to_owned)
}

#[test]
fn extension_runs_before_the_runtime_is_told_of_events_and_of_the_end() {
    if !possible() || !have("extensions", "mmdebstrap") {
        return;
    }
    let node = alone("extension");
    node.import(extended_lambda_image());
    node.deploy(&function("f", "", "start = \"120s\"", "idle = \"1s\""));

    let answer = node.post("/function/f", "{}").json();

    assert_eq!(answer["spied"], true, "the runtime came second: {answer}");
    let id = answer["id"].as_str().expect("a request id");
    let mut log = String::new();
    wait_until(SOON * 2, "the extension is told of the event and of the end", || {
        log = node.neap_ok(&["logs", "f"]);
        log.contains(&format!("spy: done with {id}")) && log.contains("spy: SHUTDOWN for spindown")
    });
    assert!(log.contains("spy: registered with f for app.handler"), "{log}");
    assert!(log.contains("spy: the first process is closed to me"), "{log}");
    assert!(log.contains("spy: has no _HANDLER"), "{log}");
    // Its stdin, stdout and stderr, and the directory that it reads; no socket of neap's.
    let open = "spy: 3 of 3 open files are pipes";
    assert!(log.contains(open), "{log}");
    assert!(!log.contains("Extension.Crash"), "its end was no crash: {log}");
    wait_until(SOON, "nothing of the instance is left", || node.instance_pids().is_empty());
}

#[test]
fn event_ends_when_its_extensions_are_through_with_it() {
    if !possible() || !have("extensions", "mmdebstrap") {
        return;
    }
    let node = alone("extension-slow");
    node.import(extended_lambda_image());
    node.deploy(&function("slow", "slow", "start = \"120s\"\ntimeout = \"60s\"", ""));
    node.deploy(&function("stuck", "stuck", "start = \"120s\"\ntimeout = \"10s\"", ""));

    let ids = [(); 2].map(|()| node.post("/function/slow", "{}").json()["id"].as_str().map(str::to_owned));
    let [Some(first), Some(second)] = ids else { panic!("{ids:?}") };

    let log = node.neap_ok(&["logs", "slow", "--tail", "1000"]);
    let at = |line: String| log.find(&line).unwrap_or_else(|| panic!("no {line} in {log}"));
    assert!(at(format!("spy: done with {first}")) < at(format!("START RequestId: {second}")), "{log}");

    // One that never comes to its end takes its instance with it, but not the answer.
    let pid = |answer: http::Response| (answer.status, answer.text());
    assert_eq!(pid(node.post("/function/stuck", r#"{"do": "pid"}"#)).0, 200);
    wait_until(SOON, "the log says what was waited for", || {
        let line = "Task timed out after 10.00 seconds: extension `spy` asks for no next event";
        node.neap_ok(&["logs", "stuck"]).contains(line)
    });
    assert_eq!(pid(node.post("/function/stuck", r#"{"do": "pid"}"#)).0, 200);
}

#[test]
fn extension_that_does_not_register_ends_or_crashes_is_a_failure_with_its_name() {
    if !possible() || !have("extensions", "mmdebstrap") {
        return;
    }
    let node = alone("extension-fails");
    node.import(extended_lambda_image());
    node.deploy(&function("silent", "silent", "start = \"6s\"", ""));
    node.deploy(&function("exit", "exit", "start = \"120s\"", ""));
    node.deploy(&function("crash", "crash", "start = \"120s\"\ntimeout = \"100s\"", ""));
    node.deploy(&function("f", "", "start = \"120s\"", ""));

    let silent = node.post("/function/silent", "{}");
    assert_eq!((silent.status, failure(&silent).as_deref()), (502, Some("start")), "{}", silent.text());
    let text = silent.text();
    assert!(text.contains("was not ready after 6s: extension `spy` has not registered"), "{text}");

    let ended = node.post("/function/exit", "{}");
    assert_eq!((ended.status, failure(&ended).as_deref()), (502, Some("start")), "{}", ended.text());
    assert!(ended.text().contains("Extension.Crash: extension `spy` has ended"), "{}", ended.text());
    wait_until(SOON, "the log tells of the init that failed", || {
        node.neap_ok(&["logs", "exit"]).contains("Status: error\tError Type: Extension.Crash")
    });

    // In the middle of an event that takes much longer.
    let crashed = node.post("/function/crash", r#"{"do": "sleep", "seconds": 1000}"#);
    assert_eq!((crashed.status, failure(&crashed).as_deref()), (502, Some("answer")), "{}", crashed.text());
    assert!(crashed.text().contains("Extension.Crash: extension `spy` has ended"), "{}", crashed.text());
    wait_until(SOON, "the instance went with it", || {
        node.neap_ok(&["logs", "crash"]).contains("Extension.Crash: extension `spy` has ended")
    });
    assert_eq!(node.post("/function/crash", "{}").status, 200, "another has taken its place");

    // A runtime that ends takes its extensions with it, and is the one to be named.
    let exited = node.post("/function/f", r#"{"do": "exit"}"#);
    assert_eq!((exited.status, failure(&exited).as_deref()), (502, Some("exit")), "{}", exited.text());
}

/// A node with an image of a shell, `extended:1`, that has these in /opt/extensions.
fn node_with(name: &str, extensions: &[(&str, &[u8], u32)]) -> Node {
    let node = alone(name);
    for (name, program, mode) in extensions {
        let file = node.dir().write(&format!("image/opt/extensions/{name}"), program);
        std::fs::set_permissions(&file, PermissionsExt::from_mode(*mode)).expect("its mode");
    }
    node.dir().write("image/opt/extensions/lib/part.sh", "a directory is no extension");
    node.dir().write("image/www/index.html", "from the web");
    let archive = node.dir().join("extended.tar");
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/shell/build.sh");
    let mut build = std::process::Command::new(build);
    let built = build.arg(&archive).arg(node.dir().join("image")).output().expect("build an image");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    node.neap_ok(&["image", "import", archive.to_str().expect("UTF-8"), "--name", "extended:1"]);
    node
}

const SHELL: &str = "image = \"extended:1\"\ncommand = [\"/bin/sh\", \"-c\", \"echo it began; sleep 1000\"]\n\
                     [retry]\nattempts = 1\n";

#[test]
fn extension_that_can_not_be_started_is_a_failure_with_its_name() {
    if !possible() {
        return;
    }
    let node = node_with("extension-mode", &[("spy", b"#!/bin/sh\nsleep 1000\n", 0o644)]);
    node.deploy(&format!("name = \"f\"\nplatform = \"lambda\"\n{SHELL}"));
    node.deploy(&format!("name = \"job\"\nhandler = \"stdio\"\n{}", SHELL.replace("; sleep 1000", "")));

    let answer = node.post("/function/f", "{}");

    assert_eq!((answer.status, failure(&answer).as_deref()), (502, Some("start")), "{}", answer.text());
    let text = answer.text();
    assert!(
        text.contains("Extension.LaunchError: extension `spy` can't be started: Permission denied"),
        "{text}"
    );
    assert!(!node.neap_ok(&["logs", "f"]).contains("it began"), "its command was executed");
    // Whoever can do without them says so.
    node.deploy(&format!(
        "name = \"alone\"\nplatform = \"lambda\"\nextensions = false\n{SHELL}[limits]\nstart = \"2s\"\n"
    ));
    let alone = node.post("/function/alone", "").text();
    assert!(alone.contains("was not ready after 2s; its last lines: it began"), "{alone}");
    // They are Lambda's alone.
    assert_eq!(node.post("/function/job", "").text(), "it began\n");
}

#[test]
fn eleven_extensions_are_too_many() {
    if !possible() {
        return;
    }
    let names: Vec<String> = (0..11).map(|n| format!("spy{n}")).collect();
    let program = b"#!/bin/sh\nsleep 1000\n".as_slice();
    let extensions: Vec<_> = names.iter().map(|name| (name.as_str(), program, 0o755)).collect();
    let node = node_with("extension-many", &extensions);
    node.deploy(&format!("name = \"f\"\nplatform = \"lambda\"\n{SHELL}"));

    let answer = node.post("/function/f", "{}");

    assert_eq!((answer.status, failure(&answer).as_deref()), (502, Some("start")), "{}", answer.text());
    let text = answer.text();
    assert!(text.contains("/opt/extensions has more than 10 files, which is the most"), "{text}");
}

#[test]
fn web_server_runs_behind_the_web_adapter_of_aws() {
    if !possible() {
        return;
    }
    let adapter = std::fs::read(web_adapter()).expect("read the adapter");
    let node = node_with("web-adapter", &[("lambda-adapter", &adapter, 0o755)]);
    node.deploy(
        "name = \"web\"\nimage = \"extended:1\"\nplatform = \"lambda\"\nfunction_url = true\n\
         command = [\"/bin/httpd\", \"-f\", \"-p\", \"8080\", \"-h\", \"/www\"]\n\
         [limits]\ncpu = 2\nstart = \"60s\"\n[retry]\nattempts = 1\n",
    );

    let page = node.get("/function/web/index.html");
    let none = node.get("/function/web/none");

    assert_eq!((page.status, page.text().as_str()), (200, "from the web"));
    assert_eq!(page.header("content-type"), Some("text/html"));
    assert_eq!(none.status, 404);
}
