//! Instances ahead of their events: each serves one and is replaced, they go when they should,
//! and what there is no room for waits or is refused, never lost.

use super::{SOON, alone, function, possible};
use crate::support::{Node, holds_within, http, shell_image, wait_until};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Says so when an event before it used the same instance.
const FRESH: &str =
    "[ -e /tmp/used ] && printf \"used before: \"; touch /tmp/used; printf \"$CE_SUBJECT \"; cat";

#[test]
fn each_event_gets_a_parked_instance_that_no_other_has_seen() {
    if !possible() {
        return;
    }
    let node = alone("parked");
    node.deploy(&function("warm", FRESH, "[scale]\nmin = 2"));

    let mut seen = BTreeSet::new();
    for number in 0..6 {
        node.wait_parked("warm", 2);
        seen.extend(node.instance_pids());
        let answer = node.post("/function/warm", number.to_string());
        assert_eq!((answer.status, answer.text()), (200, format!("/ {number}")));
    }
    node.wait_parked("warm", 2);

    assert_eq!(metric(&node, "neap_starts_total{function=\"warm\",instance=\"parked\"}"), 6);
    assert_eq!(metric(&node, "neap_starts_total{function=\"warm\",instance=\"created\"}"), 0);
    assert_eq!(metric(&node, "neap_function_instances{function=\"warm\",state=\"parked\"}"), 2);
    assert!(seen.len() >= 7, "each was replaced by another: {seen:?}");
    let status = node.status();
    assert_eq!((&status["parked"], &status["instances"]), (&2.into(), &0.into()), "{status}");
}

#[test]
fn events_of_the_inbox_find_parked_instances_too() {
    if !possible() {
        return;
    }
    let node = alone("inbox");
    node.deploy(&function("warm", "cat >/dev/null", "[scale]\nmin = 1"));
    node.wait_parked("warm", 1);

    assert_eq!(node.post("/async-function/warm", "x").status, 202);

    wait_until(SOON, "it has run", || node.function("warm")["succeeded"] == 1);
    assert_eq!(metric(&node, "neap_starts_total{function=\"warm\",instance=\"parked\"}"), 1);
}

#[test]
fn more_events_than_parked_instances_all_run_and_none_shares_one() {
    if !possible() {
        return;
    }
    let node = alone("burst");
    node.deploy(&function("warm", FRESH, "[scale]\nmin = 2\nmax = 4"));
    node.wait_parked("warm", 2);

    let port = node.port();
    let answers: Vec<_> = in_parallel(24, |n| http::post(port, "/function/warm", n.to_string()));

    for (n, answer) in answers.iter().enumerate() {
        assert_eq!((answer.status, answer.text()), (200, format!("/ {n}")));
    }
    node.wait_parked("warm", 2);
}

#[test]
fn auto_keeps_one_once_events_come() {
    if !possible() {
        return;
    }
    let node = alone("auto");
    node.deploy(&function("sometimes", "cat", "[scale]\nmin = \"auto\""));
    assert_eq!(node.function("sometimes")["parked"], 0, "nobody has called it yet");

    assert_eq!(node.post("/function/sometimes", "x").text(), "x");
    node.wait_parked("sometimes", 1);
    assert_eq!(node.post("/function/sometimes", "y").text(), "y");

    assert_eq!(metric(&node, "neap_starts_total{function=\"sometimes\",instance=\"created\"}"), 1);
    assert_eq!(metric(&node, "neap_starts_total{function=\"sometimes\",instance=\"parked\"}"), 1);
}

#[test]
fn a_parked_instance_that_is_killed_is_replaced_and_no_event_fails() {
    if !possible() {
        return;
    }
    let node = alone("killed-parked");
    node.deploy(&function("warm", "cat", "[scale]\nmin = 2"));
    node.wait_parked("warm", 2);

    let before = node.instance_pids();
    before.iter().for_each(|pid| kill(*pid));
    // Killed while it is being started, it would have been the function's process.
    wait_until(SOON, "they are dead", || before.iter().all(|pid| dead(*pid)));
    let at_once = node.post("/function/warm", "x");
    wait_until(SOON, "others are there", || {
        let now = node.instance_pids();
        now.len() == 2 && now.is_disjoint(&before)
    });

    assert_eq!((at_once.status, at_once.text()), (200, "x".to_owned()));
    node.wait_parked("warm", 2);
}

#[test]
fn instances_that_keep_dying_are_not_made_without_end() {
    if !possible() {
        return;
    }
    let node = alone("dying");
    node.deploy(&function("warm", "cat", "[scale]\nmin = 1"));
    node.wait_parked("warm", 1);

    let mut killed = BTreeSet::new();
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        for (instance, pid) in node.instance_processes() {
            // v1 has a directory for it in each hierarchy.
            killed.insert(instance.file_name().expect("a name").to_owned());
            kill(pid);
        }
        std::thread::sleep(Duration::from_millis(5));
    }

    // The pauses are 0.1 s at least, then twice as long each time; a slow machine makes fewer.
    assert!((2..=8).contains(&killed.len()), "{} in 3 s", killed.len());
    assert_eq!(node.post("/function/warm", "x").text(), "x", "events are not held up by it");
}

#[test]
fn a_killed_launcher_is_followed_by_new_parked_instances() {
    if !possible() {
        return;
    }
    let node = alone("launcher-parked");
    node.deploy(&function("warm", "cat", "[scale]\nmin = 3"));
    node.wait_parked("warm", 3);
    let before = node.instance_pids();

    assert!(node.kill_launcher(0), "there is a launcher");
    wait_until(SOON, "new ones are there", || {
        let now = node.instance_pids();
        now.len() == 3 && now.is_disjoint(&before)
    });
    node.wait_parked("warm", 3);

    assert_eq!(node.post("/function/warm", "x").text(), "x");
}

#[test]
fn a_killed_daemon_leaves_no_parked_instances() {
    if !possible() {
        return;
    }
    let mut node = alone("daemon-parked");
    node.deploy(&function("warm", "cat", "[scale]\nmin = 4"));
    node.wait_parked("warm", 4);

    node.kill();
    let processes_end = || !node.leftovers().iter().any(|line| line.starts_with("process"));
    assert!(holds_within(SOON, processes_end), "{:#?}", node.leftovers());
    node.start();
    node.wait_parked("warm", 4);
    // A maker that is on its way out still stands in its instance's cgroup for a moment.
    wait_until(SOON, "four processes, one for each", || node.instance_pids().len() == 4);
    node.stop();

    assert!(holds_within(SOON, || node.leftovers().is_empty()), "{:#?}", node.leftovers());
}

#[test]
fn another_revision_pause_and_removal_let_parked_instances_go() {
    if !possible() {
        return;
    }
    let node = alone("drain");
    node.deploy(&function("warm", "printf one", "[scale]\nmin = 2"));
    node.wait_parked("warm", 2);
    let first = node.instance_pids();

    node.deploy(&function("warm", "printf two", "[scale]\nmin = 2"));
    assert_eq!(node.post("/function/warm", "").text(), "two");
    wait_until(SOON, "only the second's are there", || {
        let now = node.instance_pids();
        now.len() == 2 && now.is_disjoint(&first)
    });
    node.neap_ok(&["pause", "warm"]);
    wait_until(SOON, "paused: none", || node.instance_pids().is_empty());
    assert_eq!(node.function("warm")["parked"], 0);
    node.neap_ok(&["resume", "warm"]);
    node.wait_parked("warm", 2);
    node.neap_ok(&["rm", "warm"]);
    wait_until(SOON, "removed: none", || node.instance_pids().is_empty());

    wait_until(SOON, "nothing is reserved", || node.status()["memory_reserved_bytes"] == 0);
}

#[test]
fn calls_succeed_while_revisions_change() {
    if !possible() {
        return;
    }
    let node = alone("revisions");
    let deploy = |n: usize| node.deploy(&function("warm", &format!("printf {n}"), "[scale]\nmin = 2"));
    deploy(0);

    let done = AtomicBool::new(false);
    let port = node.port();
    let answers = std::thread::scope(|scope| {
        let caller = || {
            let mut answers = Vec::new();
            while !done.load(Ordering::Relaxed) {
                answers.push(http::post(port, "/function/warm", "").expect("an answer"));
            }
            answers
        };
        let callers: Vec<_> = (0..3).map(|_| scope.spawn(caller)).collect();
        (1..=10).for_each(deploy);
        done.store(true, Ordering::Relaxed);
        callers.into_iter().flat_map(|caller| caller.join().expect("no panic")).collect::<Vec<_>>()
    });

    let failed: Vec<_> = answers.iter().filter(|answer| answer.status != 200).collect();
    assert!(failed.is_empty(), "{} of {}: {failed:?}", failed.len(), answers.len());
    assert_eq!(node.post("/function/warm", "").text(), "10");
    node.wait_parked("warm", 2);
    wait_until(SOON, "the old ones are gone", || node.instance_pids().len() == 2);
}

#[test]
fn running_functions_take_the_room_of_parked_ones_and_give_it_back() {
    if !possible() {
        return;
    }
    let node = Node::builder("room").node_line("memory = \"40MiB\"").start();
    node.import(shell_image());
    let sized = |name: &str, script: &str, scale: &str, memory: &str| {
        function(name, script, scale).replace("memory = \"16MiB\"", &format!("memory = \"{memory}\""))
    };
    node.deploy(&sized("warm", "cat", "[scale]\nmin = 6\nmax = 6", "6MiB"));
    node.deploy(&sized("big", "cat; sleep 2", "", "32MiB"));
    node.wait_parked("warm", 6);

    assert_eq!(node.post("/async-function/big", "x").status, 202);
    wait_until(SOON, "the big one runs", || node.status()["instances"] == 1);
    let mut fewest = u64::MAX;
    wait_until(SOON, "it has ended", || {
        let status = node.status();
        let (reserved, budget) = (&status["memory_reserved_bytes"], &status["memory_budget_bytes"]);
        assert!(reserved.as_u64() <= budget.as_u64(), "{status}");
        fewest = fewest.min(status["parked"].as_u64().expect("a number"));
        status["inbox"]["depth"] == 0
    });

    assert!(fewest <= 4, "8 MiB were left for parked ones of 2 MiB, there were {fewest}");
    node.wait_parked("warm", 6);
}

#[test]
fn what_has_no_room_is_refused_or_waits_and_nothing_is_lost() {
    if !possible() {
        return;
    }
    let node = Node::builder("refused").node_line("memory = \"20MiB\"").start();
    node.import(shell_image());
    node.deploy(&function("slow", "sleep $(cat)", "[scale]\nmin = 1\nmax = 4"));

    // One fits: 16 of 20 MiB. It runs for longer than callers wait.
    let port = node.port();
    let events = 10;
    let answers = in_parallel(90 + events, |n| match n {
        n if n < events => http::post(port, "/async-function/slow", "0"),
        _ => http::post(port, "/function/slow", "15"),
    });

    let count = |status: u16| answers.iter().filter(|answer| answer.status == status).count();
    assert_eq!(count(202), events, "events are taken in whatever runs");
    assert_eq!(count(200) + count(503) + count(202), answers.len());
    assert!(count(503) >= 80, "{} refused", count(503));
    let refused = answers.iter().filter(|answer| answer.status == 503);
    assert!(refused.clone().all(|answer| answer.header("retry-after").is_some()));
    let in_vain = refused.clone().filter(|answer| answer.text().contains("busy"));
    let told: Vec<u64> = in_vain.filter_map(|answer| answer.header("retry-after")?.parse().ok()).collect();
    assert!(told.iter().all(|&wait| wait >= 10), "they waited ten seconds for nothing: {told:?}");
    let reasons: BTreeSet<String> = refused.map(|answer| answer.text()).collect();
    assert!(reasons.iter().any(|why| why.contains("too many calls are waiting")), "{reasons:?}");
    wait_until(Duration::from_secs(120), "the events have run", || node.status()["inbox"]["depth"] == 0);
    let f = node.function("slow");
    assert_eq!((&f["dead"], &f["failed"], &f["waiting"]), (&0.into(), &0.into(), &0.into()), "{f}");
    assert_eq!(f["succeeded"].as_u64(), Some((events + count(200)) as u64), "{f}");
}

#[test]
fn more_instances_than_the_node_could_run_are_refused_with_figures() {
    if !possible() {
        return;
    }
    for memory in ["40MiB", "1%"] {
        let node = Node::builder("figures").node_line(&format!("memory = \"{memory}\"")).start();
        node.import(shell_image());
        let manifest = function("warm", "cat", "[scale]\nmin = 900\nmax = 1000");
        let file = node.dir().write("warm.toml", manifest);
        let file = file.to_str().expect("UTF-8");

        let refused = node.neap(&["deploy", file]);
        let config = node.config_file();
        let check = node.neap(&["check", "--config", config.to_str().expect("UTF-8"), file]);

        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success());
        assert!(said.contains("900 instances of 16MiB") && said.contains("ever run at once"), "{said}");
        assert!(said.contains("warm.toml:"), "{said}");
        // Another machine may run it: only a size is known here.
        assert_eq!(check.status.success(), memory == "1%", "{check:?}");
    }
}

/// 500 calls; `NEAP_TEST_CALLS=2000` for more.
#[test]
fn calls_leave_no_process_descriptor_mount_or_cgroup_behind() {
    if !possible() {
        return;
    }
    let calls = std::env::var("NEAP_TEST_CALLS").ok().and_then(|text| text.parse().ok()).unwrap_or(500);
    let node = alone("leaks");
    node.deploy(&function("warm", "cat", "[scale]\nmin = 3"));
    node.deploy(&function("cold", "cat; exit 3", ""));
    let round = |from: usize, to: usize| {
        let port = node.port();
        in_parallel(4, |worker| {
            for n in (from..to).filter(|n| n % 4 == worker) {
                let name = if n % 8 == 7 { "cold" } else { "warm" };
                let answer = http::post(port, &format!("/function/{name}"), n.to_string())?;
                assert_eq!(answer.status, if name == "cold" { 502 } else { 200 }, "{}", answer.text());
            }
            Ok(())
        });
    };
    // Everything has been used once.
    round(0, 16);
    node.wait_parked("warm", 3);
    let before = settled(&node);

    round(16, 16 + calls);
    node.wait_parked("warm", 3);

    let mut after = BTreeMap::new();
    let same = holds_within(SOON, || {
        after = belongings(&node);
        after == before
    });
    assert!(same, "before: {before:?}\nafter:  {after:?}");
}

/// Waits until two counts in a row are the same.
fn settled(node: &Node) -> BTreeMap<String, usize> {
    let mut last = BTreeMap::new();
    wait_until(SOON, "the node is quiet", || {
        let now = belongings(node);
        std::mem::replace(&mut last, now.clone()) == now
    });
    last
}

/// What could leak, counted.
fn belongings(node: &Node) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    let (launchers, instances) = (node.launcher_pids(), node.instance_pids());
    let entries = |path: &str| std::fs::read_dir(path).map_or(0, |dir| dir.count());
    let daemon = node.daemon_pid();
    counts.insert("processes of instances".to_owned(), instances.len());
    counts.insert("descriptors of the daemon".to_owned(), entries(&format!("/proc/{daemon}/fd")));
    for (n, pid) in launchers.iter().enumerate() {
        counts.insert(format!("descriptors of launcher {n}"), entries(&format!("/proc/{pid}/fd")));
        let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        counts.insert(format!("mounts of launcher {n}"), mounts.lines().count());
        let containers = format!("/proc/{pid}/root/state/containers");
        counts.insert(format!("state of launcher {n}"), entries(&containers));
    }
    let cgroups = node.leftovers().iter().filter(|line| line.starts_with("cgroup")).count();
    counts.insert("cgroups' parents".to_owned(), cgroups);
    counts.insert("cgroups".to_owned(), node.cgroup_count());
    counts
}

fn in_parallel<T: Send>(count: usize, work: impl Fn(usize) -> std::io::Result<T> + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count).map(|n| scope.spawn(move || work(n))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic").expect("an answer")).collect()
    })
}

fn metric(node: &Node, series: &str) -> u64 {
    let page = node.get("/metrics").text();
    let line = page.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok());
    line.unwrap_or_else(|| panic!("{series} is not in\n{page}"))
}

/// Gone, or a zombie: all it had open is closed.
fn dead(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.is_empty() || status.contains("State:\tZ")
}

fn kill(pid: i32) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
}
