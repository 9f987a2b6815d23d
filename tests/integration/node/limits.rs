//! Limits hold, and each way to end is told apart.

use super::{SOON, alone, function, possible};
use crate::support::wait_until;
use std::time::{Duration, Instant};

#[test]
fn each_way_to_end_is_told_apart() {
    if !possible() {
        return;
    }
    let node = alone("ends");
    node.deploy(&function("exit", "exit 7", ""));
    // pid 1 of a PID namespace ignores what it sends to itself; this one the kernel sends.
    node.deploy(&function("signal", "ulimit -t 1; while :; do :; done", ""));
    node.deploy(&function("memory", "tail /dev/zero", ""));
    node.deploy(&(function("time", "trap '' TERM; sleep 60", "") + "timeout = \"1s\"\n"));
    node.deploy(&(function("flood", "yes", "") + "payload = \"64KiB\"\n"));
    node.deploy(&function("fine", "cat", ""));

    let began = Instant::now();
    let say = |name: &str| {
        let answer = node.post(&format!("/function/{name}"), "x");
        (answer.status, answer.text().to_lowercase())
    };
    let ends = ["exit", "signal", "memory", "time", "flood"].map(say);

    assert!(ends[0].0 == 502 && ends[0].1.contains("code 7"), "{ends:#?}");
    assert!(ends[1].0 == 502 && ends[1].1.contains("signal 9"), "{ends:#?}");
    assert!(ends[2].0 == 502 && ends[2].1.contains("memory"), "{ends:#?}");
    assert!(ends[3].0 == 504 && ends[3].1.contains("timed out"), "{ends:#?}");
    assert!(ends[4].0 == 502 && ends[4].1.contains("payload"), "{ends:#?}");
    assert!(began.elapsed() < Duration::from_secs(30), "none of them ran on");
    assert_eq!(say("fine"), (200, "x".to_owned()));
}

#[test]
fn forks_end_at_the_pids_limit_and_the_node_is_unharmed() {
    if !possible() {
        return;
    }
    let node = alone("forks");
    let bomb = "f() { f | f & }; f; sleep 1; cat /proc/[0-9]*/stat 2>/dev/null | wc -l";
    node.deploy(&(function("bomb", bomb, "") + "pids = 12\ntimeout = \"10s\"\n"));

    let answer = node.post("/function/bomb", "x");

    // However it ends, it never had more processes than its limit.
    if answer.status == 200 {
        let seen: u32 = answer.text().trim().parse().expect("wc prints a number");
        assert!(seen <= 12, "{seen} processes");
    }
    node.deploy(&function("fine", "cat", ""));
    assert_eq!(node.post("/function/fine", "y").text(), "y");
    wait_until(SOON, "its processes are gone", || node.status()["instances"] == 0);
}

#[test]
fn function_starts_with_nothing() {
    if !possible() {
        return;
    }
    let node = alone("nothing");
    let probe = "grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t' | tr '\\n' ' '; \
                 touch /x 2>/dev/null && echo wrote-root; touch /tmp/x && echo tmp; \
                 echo interfaces $(grep : /proc/net/dev | cut -d: -f1); awk '{ print \"uid\", ($1 == 0 && $2 > 0) }' /proc/self/uid_map";
    node.deploy(&function("probe", probe, ""));

    let said = node.post("/function/probe", "").text();

    assert!(said.contains("CapEff:0000000000000000"), "{said}");
    assert!(said.contains("NoNewPrivs:1") && said.contains("Seccomp:2"), "{said}");
    assert!(said.contains("tmp") && !said.contains("wrote-root"), "{said}");
    assert!(said.contains("interfaces lo\n") && said.contains("uid 1"), "{said}");
}
