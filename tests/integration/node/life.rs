//! Start and stop, with and without a warning.

use super::{SOON, alone, function, possible};
use crate::support::{Node, free_port, holds_within, shell_image, wait_until};
use nix::sys::signal::Signal;

#[test]
fn node_boots_without_network_and_brokers() {
    if !possible() {
        return;
    }
    let nobody = || format!("mqtt://127.0.0.1:{}", free_port());
    let node = Node::builder("dark").mqtt(&nobody()).uplink(&nobody()).start();
    node.import(shell_image());
    node.deploy(&function("echo", "cat", ""));

    assert_eq!(node.post("/function/echo", "alive").text(), "alive");
    assert_eq!(node.get("/healthz").status, 200);
    assert_ne!(node.link_state("uplink"), "up");
}

#[test]
fn functions_and_images_survive_a_restart() {
    if !possible() {
        return;
    }
    let mut node = alone("again");
    node.deploy(&function("echo", "cat", ""));

    node.restart();

    assert_eq!(node.post("/function/echo", "still here").text(), "still here");
}

#[test]
fn killed_daemon_takes_its_containers_along_and_leaves_nothing_after_a_restart() {
    if !possible() {
        return;
    }
    let mut node = alone("killed");
    node.deploy(&function("slow", "cat; sleep 5", ""));
    assert_eq!(node.post("/async-function/slow", "x").status, 202);
    wait_until(SOON, "its container runs", || node.status()["instances"] == 1);

    node.kill();
    let processes_end = || !node.leftovers().iter().any(|line| line.starts_with("process"));
    assert!(holds_within(SOON, processes_end), "{:#?}", node.leftovers());
    node.start();

    // The committed event runs again; the lost attempt is not the function's.
    wait_until(SOON, "the inbox is empty", || node.status()["inbox"]["depth"] == 0);
    assert_eq!(node.status()["dead_events"], 0);
    node.stop();
    assert!(holds_within(SOON, || node.leftovers().is_empty()), "{:#?}", node.leftovers());
}

#[test]
fn killed_launcher_is_replaced_and_its_invocations_run_again() {
    if !possible() {
        return;
    }
    let node = alone("launcher");
    node.deploy(&function("slow", "cat; sleep 2", ""));

    // Each of its processes is tried: the one outside its PID namespace, and pid 1 inside.
    for choice in 0..node.launcher_pids().len() {
        assert_eq!(node.post("/async-function/slow", "x").status, 202);
        wait_until(SOON, "its container runs", || node.status()["instances"] == 1);
        let before = node.launcher_pids();
        assert!(node.kill_launcher(choice), "there is a launcher to kill");

        wait_until(SOON, "the inbox is empty", || node.status()["inbox"]["depth"] == 0);
        let status = node.status();
        assert_eq!(status["dead_events"], 0, "{status}");
        let after = node.launcher_pids();
        assert!(!after.is_empty() && after.iter().all(|pid| !before.contains(pid)), "{before:?} {after:?}");
    }
}

#[test]
fn sigterm_lets_a_running_invocation_finish() {
    if !possible() {
        return;
    }
    let mut node = alone("drain");
    node.deploy(&function("slow", "sleep 2; cat", ""));
    let port = node.port();
    let call = std::thread::spawn(move || crate::support::http::post(port, "/function/slow", "done"));
    wait_until(SOON, "its container runs", || node.status()["instances"] == 1);

    assert!(node.stop().success());

    let answer = call.join().expect("the caller does not panic").expect("an answer");
    assert_eq!((answer.status, answer.text().as_str()), (200, "done"));
}

#[test]
fn second_daemon_on_the_same_data_is_refused() {
    if !possible() {
        return;
    }
    let node = alone("lock");

    let config = node.config_file();
    let second = node.neap(&["daemon", "--config", config.to_str().expect("the path is UTF-8")]);

    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("data"), "{said}");
    assert_eq!(node.get("/healthz").status, 200, "the first goes on");
}

#[test]
fn reload_takes_up_what_changed_in_functions_dir() {
    if !possible() {
        return;
    }
    let node = alone("reload");
    let dir = node.dir().join("functions.d");
    std::fs::write(dir.join("echo.toml"), function("echo", "cat", "")).expect("write a manifest");

    node.neap_ok(&["reload"]);
    wait_until(SOON, "the function is there", || node.post("/function/echo", "x").status == 200);
    let refused = node.neap(&["rm", "echo"]);
    std::fs::remove_file(dir.join("echo.toml")).expect("remove a manifest");
    node.signal(Signal::SIGHUP);

    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("echo.toml"), "its file is named");
    wait_until(SOON, "the function is gone", || node.post("/function/echo", "x").status == 404);
}

#[test]
fn function_whose_file_went_keeps_its_acknowledged_events() {
    if !possible() {
        return;
    }
    let mut node = alone("moved");
    let dir = node.dir().join("functions.d");
    std::fs::write(dir.join("h.toml"), function("h", "cat", "")).expect("write a manifest");
    node.neap_ok(&["reload"]);
    node.neap_ok(&["pause", "h"]);
    assert_eq!(node.post("/async-function/h", "x").status, 202);

    // Renamed, with a mistake in the new file; then gone altogether; then gone at a boot.
    std::fs::rename(dir.join("h.toml"), dir.join("hh.toml")).expect("rename it");
    std::fs::write(dir.join("hh.toml"), "nonsense = 1").expect("write a mistake");
    let mistake = node.neap(&["reload"]);
    std::fs::remove_file(dir.join("hh.toml")).expect("remove it");
    let gone = node.neap(&["reload"]);
    node.restart();

    assert_eq!((mistake.status.code(), gone.status.code()), (Some(1), Some(1)));
    assert_eq!(node.status()["inbox"]["depth"], 1);
    node.neap_ok(&["resume", "h"]);
    wait_until(SOON, "its event has run", || node.status()["inbox"]["depth"] == 0);
    assert_eq!(node.status()["dead_events"], 0);
    node.neap_ok(&["reload"]);
    assert_eq!(node.post("/function/h", "x").status, 404);
}

#[test]
fn event_waits_while_the_configuration_lacks_what_its_function_needs() {
    if !possible() {
        return;
    }
    let uplink = format!("mqtt://127.0.0.1:{}", free_port());
    let mut node = Node::builder("misfit").uplink(&uplink).start();
    node.import(shell_image());
    node.deploy(&function("g", "cat", "output = [{ to = \"uplink\" }]"));
    let whole = std::fs::read_to_string(node.config_file()).expect("read the configuration");
    let without = whole.split("[uplink]").next().expect("what stands before it");

    std::fs::write(node.config_file(), without).expect("write the configuration");
    node.restart();
    assert_eq!(node.post("/async-function/g", "x").status, 202);
    assert_eq!(node.status()["inbox"]["depth"], 1);
    std::fs::write(node.config_file(), &whole).expect("write the configuration");
    node.neap_ok(&["reload"]);

    wait_until(SOON, "its output is owed", || node.status()["outbox"]["depth"] == 1);
}

#[test]
fn running_invocation_finishes_on_its_revision() {
    if !possible() {
        return;
    }
    let node = alone("revision");
    node.deploy(&function("echo", "sleep 2; echo old", ""));
    let port = node.port();
    let call = std::thread::spawn(move || crate::support::http::post(port, "/function/echo", ""));
    wait_until(SOON, "its container runs", || node.status()["instances"] == 1);

    node.deploy(&function("echo", "echo new", ""));
    let new = node.post("/function/echo", "");

    let old = call.join().expect("the caller does not panic").expect("an answer");
    assert_eq!((old.text().trim_end(), new.text().trim_end()), ("old", "new"));
}
