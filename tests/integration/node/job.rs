//! Handler job: copies that run to their end.

use super::{SOON, Site, alone, function, possible};
use crate::support::{Subscriber, publish, wait_until};

/// Fails at its first attempt, but for copy 0.
const FAILS_FIRST: &str = "cat >/dev/null; echo \"copy $CLOUD_RUN_TASK_INDEX of $CLOUD_RUN_TASK_COUNT, \
     attempt $CLOUD_RUN_TASK_ATTEMPT of $CLOUD_RUN_JOB\"; \
     [ $NEAP_COPY_INDEX = 0 ] || [ $NEAP_COPY_ATTEMPT = 1 ]";

fn job(name: &str, script: &str, copies: u32, rest: &str) -> String {
    let more = format!(
        "handler = \"job\"\n{rest}\n[scale]\ncopies = {copies}\nmax = 3\n[retry]\nattempts = 2\nbackoff = \"10ms\""
    );
    function(name, script, &more)
}

#[test]
fn each_copy_knows_its_index_and_is_retried_on_its_own() {
    if !possible() {
        return;
    }
    let site = Site::start("job");
    let rest = "[[trigger]]\nmqtt = \"go\"\n[[output]]\nto = \"uplink\"\ntopic = \"done\"";
    site.node.deploy(&job("batch", FAILS_FIRST, 10, rest));
    let cloud = Subscriber::start(site.uplink.port(), "cloud", &["done"]);

    site.local.wait_subscribed("neap-", "go");
    publish(site.local.port(), "go", "x");
    let message = cloud.wait_for(1, SOON * 4).remove(0);

    let said: serde_json::Value = serde_json::from_slice(&message.payload).expect("JSON");
    let copies = said["copies"].as_array().expect("a list of copies");
    let told: Vec<_> = copies
        .iter()
        .map(|copy| (copy["index"].as_u64(), copy["exit"].as_i64(), copy["attempts"].as_u64()))
        .collect();
    let expected: Vec<_> =
        (0..10).map(|index| (Some(index), Some(0), Some(if index == 0 { 1 } else { 2 }))).collect();
    assert_eq!(told, expected);
    let log = site.node.neap_ok(&["logs", "batch"]);
    assert!(log.contains("[7] copy 7 of 10, attempt 1 of batch"), "{log}");
    assert!(log.contains("[7] neap: exited with code 1 (attempt 1 of 2)"), "{log}");
    wait_until(SOON, "the copies are removed", || site.node.instance_pids().is_empty());
}

#[test]
fn job_whose_copies_fail_is_a_dead_letter_with_each_exit() {
    if !possible() {
        return;
    }
    let node = alone("job-dead");
    node.deploy(&job("batch", "[ $NEAP_COPY_INDEX != 2 ] || exit 3", 3, ""));

    let answer = node.post("/function/batch", "x");
    assert_eq!((answer.status, answer.header("x-neap-failure")), (502, Some("copies")), "{}", answer.text());
    assert_eq!(node.post("/async-function/batch", "x").status, 202);
    wait_until(SOON * 2, "the event is dead", || node.status()["dead_events"] == 1);

    let dead = node.neap_json(&["events", "--state", "dead"]);
    let event = &dead[0];
    assert_eq!(event["last_error"], "1 of 3 copies failed; copy 2: exited with code 3", "{dead}");
    assert_eq!(event["attempts"], 1, "the copies had their own: {dead}");
    let shown = node.neap_json(&["events", "show", event["id"].as_str().expect("an id")]);
    assert!(shown.to_string().contains("exit"), "{shown}");
}

#[test]
fn copies_that_had_ended_do_not_run_again_after_a_kill() {
    if !possible() {
        return;
    }
    let mut node = alone("job-copies");
    node.neap_ok(&["secret", "set", "go", "--data", "not yet"]);
    // Copy 0 ends at once, copy 1 when it is told to.
    let script = "echo \"copy $NEAP_COPY_INDEX runs\"; \
                  [ $NEAP_COPY_INDEX = 0 ] || until grep -q now /run/secrets/go; do sleep 0.1; done";
    node.deploy(&(job("batch", script, 2, "secrets = [\"go\"]") + "timeout = \"1000s\"\n"));
    assert_eq!(node.post("/async-function/batch", "x").status, 202);
    wait_until(SOON * 2, "copy 0 has ended, copy 1 runs", || {
        let log = node.neap_ok(&["logs", "batch"]);
        log.contains("1 of 2 copies have ended") && log.contains("copy 1 runs")
    });

    node.kill();
    node.start();
    wait_until(SOON * 2, "copy 1 runs again", || {
        node.neap_ok(&["logs", "batch"]).matches("copy 1 runs").count() == 2
    });
    node.neap_ok(&["secret", "set", "go", "--data", "now"]);

    wait_until(SOON * 2, "the job is done", || node.status()["inbox"]["depth"] == 0);
    let log = node.neap_ok(&["logs", "batch"]);
    assert_eq!(log.matches("copy 0 runs").count(), 1, "{log}");
    assert!(log.contains("1 of 2 copies ended before the job was cut off"), "{log}");
    assert_eq!(node.status()["dead_events"], 0);
}

#[test]
fn job_survives_a_kill_of_the_daemon_in_the_middle() {
    if !possible() {
        return;
    }
    let rest = "[[output]]\nto = \"event\"\ntype = \"com.example.done\"";
    let sleeps = job("batch", "echo started; sleep 1000", 2, rest) + "timeout = \"1000s\"\n";
    let waits = function("after", "cat", "[[trigger]]\nevent = \"com.example.done\"");
    let mut node = crate::support::Node::builder("job-killed").stopped();
    node.dir().write("functions.d/batch.toml", &sleeps);
    node.start();
    node.import(crate::support::shell_image());
    node.neap_ok(&["reload"]);
    node.deploy(&waits.replace("cat", "cat >&2"));
    assert_eq!(node.post("/async-function/batch", "x").status, 202);
    wait_until(SOON * 2, "both copies run", || {
        node.neap_ok(&["logs", "batch"]).matches("started").count() == 2
    });

    node.kill();
    node.dir().write("functions.d/batch.toml", job("batch", "true", 2, rest));
    node.start();

    wait_until(SOON * 4, "its list has become an event", || {
        node.neap_ok(&["logs", "after"]).contains("\"index\":1")
    });
    wait_until(SOON, "nothing waits", || node.status()["inbox"]["depth"] == 0);
    assert_eq!(node.status()["dead_events"], 0);
}
