//! `scale.min` of handlers that stay up: instances that are started ahead of any event.

use super::{SOON, alone, possible};
use crate::support::{Node, wait_until};

/// A server that says when it has started.
fn server(name: &str, says: &str, rest: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"shell:1\"\nhandler = \"http\"\n\
         command = ['/bin/sh', '-c', '''echo \"started {says}\"; mkdir /tmp/www; echo {says} >/tmp/www/index.html; \
         exec httpd -f -p $PORT -h /tmp/www''']\n{rest}\n"
    )
}

fn starts(node: &Node, function: &str, says: &str) -> usize {
    node.neap_ok(&["logs", function]).matches(&format!("started {says}")).count()
}

#[test]
fn instances_are_started_before_the_first_call_and_stay_when_idle() {
    if !possible() {
        return;
    }
    let node = alone("kept");
    node.deploy(&server("web", "one", "[scale]\nmin = 2\nmax = 3\nidle = \"200ms\""));

    wait_until(SOON * 2, "two are there", || {
        node.status()["instances"] == 2 && starts(&node, "web", "one") == 2
    });
    let first = node.get("/function/web/index.html");

    assert_eq!((first.status, first.text().trim()), (200, "one"));
    assert_eq!(starts(&node, "web", "one"), 2, "no call has started another");
    node.neap_ok(&["pause", "web"]);
    wait_until(SOON * 2, "a paused function keeps none", || node.status()["instances"] == 0);
    node.neap_ok(&["resume", "web"]);
    wait_until(SOON * 2, "they are back", || node.status()["instances"] == 2);
}

#[test]
fn auto_keeps_an_instance_once_requests_come() {
    if !possible() {
        return;
    }
    let node = alone("kept-auto");
    let scale = |min: &str| format!("[scale]\nmin = {min}\nmax = 3\nidle = \"200ms\"");
    node.deploy(&server("web", "one", &scale("\"auto\"")));
    node.deploy(&server("other", "two", &scale("0")));
    assert_eq!(starts(&node, "web", "one"), 0, "nobody has called it yet");

    assert_eq!(node.get("/function/web/index.html").text().trim(), "one");
    assert_eq!(node.get("/function/other/index.html").text().trim(), "two");

    wait_until(SOON, "one of them is removed", || node.status()["instances"] == 1);
    assert_eq!(node.get("/function/web/index.html").text().trim(), "one");
    assert_eq!(starts(&node, "web", "one"), 1, "the one that more requests are expected of has stayed");
}

#[test]
fn new_revision_is_ready_before_calls_reach_it_and_a_deaf_one_is_refused() {
    if !possible() {
        return;
    }
    let node = alone("kept-deploy");
    let scale = "[scale]\nmin = 1\nmax = 1";
    node.deploy(&server("web", "one", scale));
    node.deploy(&server("web", "two", scale));
    assert_eq!(starts(&node, "web", "two"), 1, "it had started when the deploy was answered");
    assert_eq!(node.get("/function/web/index.html").text().trim(), "two");

    let deaf = format!(
        "name = \"web\"\nimage = \"shell:1\"\nhandler = \"http\"\n\
         command = ['/bin/sh', '-c', 'echo no database; exit 3']\n{scale}\n"
    );
    let file = node.dir().write("deaf.toml", deaf);
    let refused = node.neap(&["deploy", file.to_str().expect("the path is UTF-8")]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();

    assert!(!refused.status.success());
    assert!(said.contains("no instance gets ready") && said.contains("no database"), "{said}");
    assert_eq!(node.get("/function/web/index.html").text().trim(), "two", "what ran goes on");
}

#[test]
fn boot_waits_for_no_function_to_get_ready() {
    if !possible() {
        return;
    }
    let mut node = alone("kept-boot");
    node.stop();
    // It says that it has started and never listens; `start` is beyond what a node's test waits for.
    let deaf = "name = \"deaf\"\nimage = \"shell:1\"\nhandler = \"http\"\n\
                command = ['/bin/sh', '-c', 'echo started deaf; exec sleep 3600']\n\
                [scale]\nmin = 1\n[limits]\nstart = \"600s\"\n";
    node.dir().write("functions.d/deaf.toml", deaf);

    node.start();

    wait_until(SOON * 2, "it is started all the same", || starts(&node, "deaf", "deaf") == 1);
}

#[test]
fn deploy_does_not_wait_for_an_instance_that_has_no_room() {
    if !possible() {
        return;
    }
    let node = Node::builder("kept-room").node_line("memory = \"40MiB\"").start();
    node.import(crate::support::shell_image());
    let rest = "[scale]\nmin = 1\nmax = 1\n[limits]\nmemory = \"24MiB\"";
    node.deploy(&server("web", "one", rest));
    wait_until(SOON * 2, "it is there", || node.status()["instances"] == 1);

    // Were it tried, it would be refused.
    let broken =
        "name = \"web\"\nimage = \"shell:1\"\nhandler = \"http\"\ncommand = ['/bin/sh', '-c', 'exit 3']\n";
    node.deploy(&format!("{broken}{rest}\n"));

    assert_eq!(node.get("/function/web/index.html").status, 502);
}

#[test]
fn replaced_instance_ends_gently_after_its_last_call() {
    if !possible() {
        return;
    }
    let node = alone("kept-gentle");
    let slow = "name = \"web\"\nimage = \"shell:1\"\nhandler = \"http\"\n\
                command = ['/bin/sh', '-c', '''mkdir -p /tmp/www/cgi-bin; echo \"*.sh:/bin/sh\" >/tmp/httpd.conf; \
                printf \"echo begun >&2; sleep 4; echo Content-Type: text/plain; echo; echo done\" \
                >/tmp/www/cgi-bin/slow.sh; chmod +x /tmp/www/cgi-bin/slow.sh; trap \"echo asked to end; exit 0\" TERM; \
                httpd -f -p $PORT -h /tmp/www -c /tmp/httpd.conf & wait''']\n";
    node.deploy(slow);
    let port = node.port();
    let caller = std::thread::spawn(move || crate::support::http::get(port, "/function/web/cgi-bin/slow.sh"));
    let logs = || node.neap_ok(&["logs", "web"]);
    wait_until(SOON * 2, "the call is under way", || logs().contains("begun"));

    node.deploy(&server("web", "two", ""));

    let answer = caller.join().expect("no panic").expect("an answer");
    assert_eq!((answer.status, answer.text().trim()), (200, "done"));
    wait_until(SOON * 2, "it was asked to end", || logs().contains("asked to end"));
}

#[test]
fn function_that_is_waited_for_holds_up_no_other() {
    if !possible() {
        return;
    }
    let node = alone("kept-beside");
    node.neap_ok(&["secret", "set", "gate", "--data", "closed"]);
    let path = "[[trigger]]\nhttp = \"/door\"\n[scale]\nmin = 1";
    // Listens when it is let.
    let late = "name = \"late\"\nimage = \"shell:1\"\nhandler = \"http\"\nsecrets = [\"gate\"]\n\
                command = ['/bin/sh', '-c', '''echo started late; until grep -q open /run/secrets/gate; do sleep 0.1; \
                done; exec httpd -f -p $PORT''']\n[limits]\nstart = \"600s\"\n";
    let file = node.dir().write("late.toml", format!("{late}{path}\n"));
    let mut deploy = node.neap_command(&["deploy", file.to_str().expect("the path is UTF-8")]);
    let mut deploying = deploy.stderr(std::process::Stdio::piped()).spawn().expect("run neap");
    let runs = |pid: &i32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains("started late")
    };
    wait_until(SOON, "its code runs", || node.instance_pids().iter().any(runs));

    node.deploy(&server("web", "one", path));

    assert!(deploying.try_wait().expect("wait for neap").is_none(), "the first is not answered yet");
    assert_eq!(node.get("/function/web/index.html").text().trim(), "one");
    node.neap_ok(&["secret", "set", "gate", "--data", "open"]);
    let refused = deploying.wait_with_output().expect("wait for neap");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("/door"), "the path has gone to another: {said}");
    wait_until(SOON, "what was made of it goes", || node.status()["instances"] == 1);
    node.deploy(&late.replace("600s", "599s"));
    let (web, late) = (node.function("web"), node.function("late"));
    assert_eq!((&web["revision"], &late["revision"]), (&1.into(), &1.into()));
}
