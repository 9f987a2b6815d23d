//! Deploys that pull, revisions that go back, archives that come on a stick: the daemon whole.

use super::MIB;
use crate::support::registry::{Fault, Proxy, Registry, random_image, run};
use crate::support::{Node, have, privileged, shell_image, wait_for, wait_until};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(120);

fn node(name: &str, proxy: &Proxy) -> Node {
    Node::builder(name).config(&format!("[images]\ninsecure = [\"{}\"]\n", proxy.host())).start()
}

/// The shell image with a function.sh of its own, pushed as `app:1`.
fn push_shell(registry: &Registry, dir: &Path, script: &str) {
    let extra = dir.join(format!("extra-{:08x}", fastrand::u32(..)));
    std::fs::create_dir_all(&extra).expect("make a directory");
    let function = extra.join("function.sh");
    std::fs::write(&function, format!("#!/bin/sh\n{script}\n")).expect("write");
    run(Command::new("chmod").arg("755").arg(&function));
    let archive = extra.with_extension("tar");
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/shell/build.sh");
    run(Command::new(build).arg(&archive).arg(&extra));
    registry.push(&format!("oci-archive:{}", archive.display()), "app:1");
}

fn manifest(proxy: &Proxy, rest: &str) -> String {
    format!("name = \"app\"\nimage = \"{}/app:1\"\nretry = {{ attempts = 1 }}\n{rest}", proxy.host())
}

#[test]
fn deploy_pulls_what_is_missing_and_functions_dir_needs_no_network_at_boot() {
    let test = "deploy_pulls_what_is_missing_and_functions_dir_needs_no_network_at_boot";
    if !have(test, "docker-registry") || !privileged(test) {
        return;
    }
    let registry = Registry::start();
    let proxy = Proxy::start(registry.port());
    let mut node = node("pull-deploy", &proxy);
    push_shell(&registry, node.dir().path(), "echo one");

    node.deploy(&manifest(&proxy, "pull = \"missing\""));
    assert_eq!(node.neap_ok(&["invoke", "app"]), "one\n");
    push_shell(&registry, node.dir().path(), "echo two");
    node.deploy(&manifest(&proxy, "pull = \"missing\""));
    assert_eq!(node.neap_ok(&["invoke", "app"]), "one\n", "the name is on the node");
    node.deploy(&manifest(&proxy, "pull = \"always\""));
    assert_eq!(node.neap_ok(&["invoke", "app"]), "two\n");

    // A file whose image is nowhere yet: the node starts, and deploys it when it comes.
    let other = manifest(&proxy, "").replace("\"app\"", "\"late\"").replace("/app:1", "/late:1");
    node.stop();
    node.dir().write("functions.d/late.toml", other);
    node.start();
    assert_eq!(node.neap_ok(&["invoke", "app"]), "two\n");
    let source = random_image(node.dir().path(), "big", &[MIB]);
    registry.push(&source, "unrelated:1");
    let pulled = node.neap(&["image", "pull", &format!("{}/unrelated:1", proxy.host())]);
    assert!(pulled.status.success(), "{}", String::from_utf8_lossy(&pulled.stderr));
    assert!(node.neap_ok(&["image", "ls"]).contains("unrelated:1"));

    // A registry that is gone holds nothing up: what is here runs, and the registry is asked again.
    drop(registry);
    let again = manifest(&proxy, "pull = \"always\"").replace("\"app\"", "\"again\"");
    node.dir().write("functions.d/again.toml", again);
    let _ = node.neap(&["reload"]); // the late one's image is still missing
    assert_eq!(node.neap_ok(&["invoke", "again"]), "two\n");
    let app = format!("{}/app:1", proxy.host());
    wait_until(LONG, "its image is asked for", || {
        let images = node.neap_json(&["image", "ls"]);
        images.as_array().expect("a list").iter().any(|i| i["references"][0] == *app && i["pull"].is_object())
    });
}

#[test]
fn progress_of_a_pull_is_listed_and_goes_on_after_the_daemon_was_killed() {
    let test = "progress_of_a_pull_is_listed_and_goes_on_after_the_daemon_was_killed";
    if !have(test, "docker-registry") || !privileged(test) {
        return;
    }
    let registry = Registry::start();
    let proxy = Proxy::start(registry.port());
    let mut node = node("pull-listed", &proxy);
    registry.push(&random_image(node.dir().path(), "big", &[8 * MIB]), "big:1");
    proxy.faults([Fault::Stall(6 * MIB as u64)]);
    proxy.always(Some(Fault::Stall(0)));
    let name = format!("{}/big:1", proxy.host());

    let mut pulling = node.neap_command(&["image", "pull", &name]).spawn().expect("run neap");
    wait_until(LONG, "the listing shows how far it is", || {
        let images = node.neap_json(&["image", "ls"]);
        images[0]["pull"]["state"] == "fetching" && images[0]["pull"]["bytes"].as_u64() > Some(5 * MIB as u64)
    });
    assert!(node.neap_ok(&["image", "ls"]).contains("fetching"));
    node.kill();
    let _ = pulling.wait();
    proxy.always(None);
    node.start();
    node.neap_ok(&["image", "pull", &name]);

    assert!(proxy.blob_bytes() < 8 * MIB as u64 * 102 / 100, "{} bytes on the wire", proxy.blob_bytes());
    assert!(node.neap_ok(&["image", "gc", "--dry-run"]).contains("would go: 1 image"));
    assert!(node.neap_ok(&["image", "gc"]).contains("removed: 1 image"));
}

#[test]
fn revision_that_fails_its_first_events_goes_back_and_says_why() {
    let test = "revision_that_fails_its_first_events_goes_back_and_says_why";
    if !have(test, "docker-registry") || !privileged(test) {
        return;
    }
    let registry = Registry::start();
    let proxy = Proxy::start(registry.port());
    let mut node = node("rollback-auto", &proxy);
    push_shell(&registry, node.dir().path(), "echo good");
    node.deploy(&manifest(&proxy, "pull = \"always\""));
    assert_eq!(node.neap_ok(&["invoke", "app"]), "good\n");
    push_shell(&registry, node.dir().path(), "echo broken >&2; exit 7");
    node.deploy(&manifest(&proxy, "pull = \"always\""));

    for _ in 0..3 {
        assert!(!node.neap(&["invoke", "app"]).status.success());
    }
    wait_until(LONG, "the old revision is back", || node.neap_json(&["show", "app"])["revision"] == 3);
    // What a rollback needs stays, whatever is collected; and it works without the registry.
    drop(registry);
    node.neap_ok(&["image", "gc"]);
    assert_eq!(node.neap_ok(&["invoke", "app"]), "good\n");
    let shown = node.neap_json(&["show", "app"]);
    let why = shown["rolled_back"].as_str().expect("a reason").to_owned();
    assert!(why.contains("from revision 2") && why.contains("exited with code 7"), "{why}");
    assert!(node.neap_ok(&["show", "app"]).contains("exited with code 7"));
    node.restart();
    assert_eq!(node.neap_ok(&["invoke", "app"]), "good\n");
    node.neap_ok(&["rollback", "app"]);
    assert!(!node.neap(&["invoke", "app"]).status.success(), "the one before is the broken one");
    node.neap_ok(&["rollback", "app"]);
    assert_eq!(node.neap_ok(&["invoke", "app"]), "good\n");
    let missing = node.neap(&["rollback", "nobody"]);
    assert_eq!(missing.status.code(), Some(4));
}

#[test]
fn file_that_was_rolled_back_is_not_deployed_again_until_it_changes() {
    let test = "file_that_was_rolled_back_is_not_deployed_again_until_it_changes";
    if !privileged(test) {
        return;
    }
    let mut node = Node::builder("rollback-file").start();
    node.import(shell_image());
    let text = |command: &str| {
        format!(
            "name = \"f\"\nimage = \"shell:1\"\nretry = {{ attempts = 1 }}\ncommand = [\"sh\", \"-c\", \"{command}\"]\n"
        )
    };
    let write = |text: String| node.dir().write("functions.d/f.toml", text);
    write(text("echo good"));
    node.neap_ok(&["reload"]);
    assert_eq!(node.neap_ok(&["invoke", "f"]), "good\n");
    write(text("exit 1"));
    node.neap_ok(&["reload"]);
    for _ in 0..3 {
        assert!(!node.neap(&["invoke", "f"]).status.success());
    }
    wait_until(LONG, "the old revision is back", || node.neap_json(&["show", "f"])["revision"] == 3);

    let reloaded = node.neap(&["reload"]);
    let said =
        format!("{}{}", String::from_utf8_lossy(&reloaded.stdout), String::from_utf8_lossy(&reloaded.stderr));
    assert!(said.contains("was rolled back"), "{said}");
    node.restart();
    assert_eq!(node.neap_ok(&["invoke", "f"]), "good\n");
    node.dir().write("functions.d/f.toml", text("echo better"));
    node.neap_ok(&["reload"]);
    assert_eq!(node.neap_ok(&["invoke", "f"]), "better\n");
}

#[test]
fn archives_on_a_stick_are_imported_once_with_a_result_beside_them() {
    let test = "archives_on_a_stick_are_imported_once_with_a_result_beside_them";
    if !privileged(test) {
        return;
    }
    let stick = crate::support::TestDir::new("stick");
    let config = format!("[images]\nimport_dir = \"{}\"\n", stick.path().display());
    let function = "name = \"f\"\nimage = \"shell:1\"\npull = \"never\"\ncommand = [\"echo\", \"here\"]\n";
    let mut node = Node::builder("usb").config(&config).function("f.toml", function).start();
    std::fs::copy(shell_image(), stick.join("shell.tar")).expect("copies");
    stick.write("broken.tar", "no archive");
    stick.write("notes.txt", "nothing to do with it");

    let result = |name: &str| -> serde_json::Value {
        let path = stick.join(format!("{name}.result"));
        wait_for(LONG, "a result file", || {
            std::fs::read(&path).ok().and_then(|t| serde_json::from_slice(&t).ok())
        })
    };
    assert_eq!(result("shell.tar")["ok"], true);
    assert!(result("broken.tar")["error"].as_str().is_some_and(|error| !error.is_empty()));
    assert!(!stick.join("notes.txt.result").exists());
    // Nobody asked again: what waited for the image runs.
    let waited = wait_for(LONG, "the function that waited", || {
        let output = node.neap(&["reload"]);
        let output = output.status.success().then(|| node.neap(&["invoke", "f"]))?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    });
    assert_eq!(waited, "here\n");
    let before = std::fs::metadata(stick.join("shell.tar.result")).and_then(|m| m.modified()).expect("there");
    node.restart();
    stick.write("again.tar", "another");
    result("again.tar");
    let after = std::fs::metadata(stick.join("shell.tar.result")).and_then(|m| m.modified()).expect("there");
    assert_eq!(before, after, "a restart imports nothing again");

    // The stick goes on to another node, whose word is added.
    node.stop();
    let next = Node::builder("usb-next").config(&config).start();
    wait_until(LONG, "the next node has said what became of it", || {
        result("shell.tar")["node"] == "usb-next" && result("broken.tar")["node"] == "usb-next"
    });
    assert!(next.neap_ok(&["image", "ls"]).contains("shell:1"));
    assert_eq!(result("shell.tar")["others"][0]["node"], "usb");
    assert_eq!(result("shell.tar")["others"][0]["ok"], true);
}
