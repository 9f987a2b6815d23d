//! Directories of the node in functions: what its configuration lets them mount, and no more.

use super::{SOON, alone, function, possible};
use crate::support::{Node, TestDir, wait_until};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Output;

/// A node that lets functions mount what is in `code`.
fn node(name: &str, code: &TestDir) -> Node {
    let node = Node::builder(name).node_line(&format!("mounts = [\"{}\"]", code.path().display())).start();
    node.import(crate::support::shell_image());
    node
}

/// A manifest's `[[volume]]`, at /code.
fn volume(from: impl std::fmt::Display) -> String {
    format!("[retry]\nattempts = 1\n[[volume]]\nfrom = \"{from}\"\npath = \"/code\"\n")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn try_deploy(node: &Node, manifest: &str) -> (bool, String) {
    let file = node.dir().write("tried.toml", manifest);
    let output = node.neap(&["deploy", file.to_str().expect("UTF-8")]);
    (output.status.success(), said(&output))
}

#[test]
fn directory_of_the_node_can_be_read_and_nothing_else() {
    if !possible() {
        return;
    }
    let code = TestDir::new("node-volume");
    let run = code.write("hello/run.sh", "#!/bin/sh\necho it runs\n");
    std::fs::set_permissions(&run, PermissionsExt::from_mode(0o4755)).expect("its mode");
    let own = code.write("hello/own", "root's own\n");
    std::fs::set_permissions(&own, PermissionsExt::from_mode(0o600)).expect("its mode");
    symlink("/etc/passwd", code.join("hello/passwd")).expect("made");
    symlink("../secret", code.join("hello/up")).expect("made");
    code.write("secret", "another's\n");
    let node = node("node-volume", &code);
    let look = "cat /code/own; /code/run.sh; stat -c '%u %a' /code/own; grep -c root:/:/bin/sh /code/passwd; \
                cat /code/up || echo no way up; (touch /code/new || touch /code/own) 2>&1 | grep -c Read-only; \
                grep -c ' /code ro,nosuid,nodev' /proc/self/mountinfo; ls /code/.. | grep -c secret; true";
    node.deploy(&function("look", look, &volume(code.join("hello").display())));

    let answer = node.post("/function/look", "");

    let expected = "root's own\nit runs\n0 600\n1\nno way up\n2\n1\n0\n";
    assert_eq!((answer.status, answer.text().as_str()), (200, expected));
    assert!(!code.join("hello/new").exists());
    assert!(node.neap_ok(&["show", "look"]).contains("look"));
}

#[test]
fn what_is_in_a_directory_is_looked_up_for_each_instance() {
    if !possible() {
        return;
    }
    let code = TestDir::new("node-volume-changes");
    let outside = TestDir::new("node-volume-outside");
    outside.write("hello/text", "outside\n");
    code.write("hello/text", "one\n");
    let node = node("node-volume-changes", &code);
    node.deploy(&function("look", "cat /code/text", &volume(code.join("hello").display())));
    let look = || {
        let answer = node.post("/function/look", "");
        (answer.status, answer.text())
    };
    assert_eq!(look(), (200, "one\n".to_owned()));

    code.write("hello/text", "two\n");
    assert_eq!(look(), (200, "two\n".to_owned()));
    // As those do who put a new version in an old one's place.
    code.write("next/text", "three\n");
    std::fs::rename(code.join("hello"), code.join("before")).expect("renamed");
    std::fs::rename(code.join("next"), code.join("hello")).expect("renamed");
    assert_eq!(look(), (200, "three\n".to_owned()));
    std::fs::rename(code.join("hello"), code.join("v3")).expect("renamed");
    symlink("v3", code.join("hello")).expect("made");
    assert_eq!(look(), (200, "three\n".to_owned()), "a symlink within");

    for (to, why) in [
        (outside.join("hello"), "a symlink leads out of"),
        ("/etc".into(), "a symlink leads out of"),
        ("nowhere".into(), "there is no such directory on this node"),
        ("v3/text".into(), "it is no directory"),
    ] {
        std::fs::remove_file(code.join("hello")).expect("removed");
        symlink(&to, code.join("hello")).expect("made");
        let (status, text) = look();
        assert_eq!(status, 502, "{text}");
        assert!(text.contains("volume.from `") && text.contains(why), "{}: {text}", to.display());
    }
    std::fs::remove_file(code.join("hello")).expect("removed");
    std::fs::rename(code.join("before"), code.join("hello")).expect("renamed");
    assert_eq!(look(), (200, "two\n".to_owned()), "it is back");
}

#[test]
fn what_a_node_does_not_let_functions_mount_is_refused_at_deploy() {
    if !possible() {
        return;
    }
    let code = TestDir::new("node-volume-refused");
    code.write("hello/text", "");
    symlink("/etc", code.join("out")).expect("made");
    let node = node("node-volume-refused", &code);
    let mounts = code.path().display();
    for (from, why) in [
        ("/etc".to_owned(), "is in none of the directories that functions may mount: "),
        (format!("{mounts}/../.."), "is no plain absolute path below /"),
        (format!("{mounts}x"), "is in none of the directories that functions may mount: "),
        (format!("{mounts}/none"), "there is no such directory on this node"),
        (format!("{mounts}/hello/text"), "it is no directory"),
        (format!("{mounts}/out"), "a symlink leads out of"),
        (format!("{mounts}/out/ssl"), "a symlink leads out of"),
    ] {
        let (deployed, text) = try_deploy(&node, &function("bad", "true", &volume(&from)));
        assert!(!deployed && text.contains(why) && text.contains("tried.toml:"), "{from}: {text}");
    }
    let over = volume(format!("{mounts}/hello")).replace("/code", "/bin/busybox");
    let (deployed, text) = try_deploy(&node, &function("bad", "true", &over));
    assert!(!deployed && text.contains("is not a directory in the image"), "{text}");

    let other = alone("node-volume-none");
    let (deployed, text) = try_deploy(&other, &function("bad", "true", &volume(mounts)));
    assert!(!deployed && text.contains("this node lets functions mount none of its directories"), "{text}");
}

#[test]
fn directory_that_is_no_longer_let_out_keeps_its_functions_waiting() {
    if !possible() {
        return;
    }
    let code = TestDir::new("node-volume-withdrawn");
    code.write("text", "there\n");
    let mut node = node("node-volume-withdrawn", &code);
    node.deploy(&function("look", "cat /code/text", &volume(code.path().display())));
    assert_eq!(node.post("/function/look", "").text(), "there\n");

    let config = std::fs::read_to_string(node.config_file()).expect("its configuration");
    let without: String =
        config.lines().filter(|line| !line.starts_with("mounts")).map(|l| format!("{l}\n")).collect();
    assert_ne!(config, without);
    std::fs::write(node.config_file(), &without).expect("written");
    node.restart();

    let answer = node.post("/function/look", "");
    assert!(
        answer.status >= 500 && !answer.text().contains("there\n"),
        "{} {}",
        answer.status,
        answer.text()
    );
    let shown = node.neap_ok(&["show", "look"]);
    assert!(shown.contains("node.mounts no longer names what its volume.from is in"), "{shown}");

    std::fs::write(node.config_file(), &config).expect("written");
    node.restart();
    wait_until(SOON, "it runs again", || node.post("/function/look", "").text() == "there\n");
}

#[test]
fn every_handler_has_directories_of_the_node() {
    if !possible() {
        return;
    }
    let code = TestDir::new("node-volume-handlers");
    code.write("index.html", "from the node\n");
    code.write("run.sh", "#!/bin/sh\nexec cat /code/index.html\n");
    std::fs::set_permissions(code.join("run.sh"), PermissionsExt::from_mode(0o755)).expect("its mode");
    let node = node("node-volume-handlers", &code);
    let volume = volume(code.path().display());
    // The command itself is in there, and so is the directory that it starts in.
    node.deploy(&format!(
        "name = \"parked\"\nimage = \"shell:1\"\ncommand = [\"/code/run.sh\"]\n{volume}[scale]\nmin = 1\n"
    ));
    node.deploy(&function("job", "cat /code/index.html", &format!("handler = \"job\"\n{volume}")));
    let serve = "exec httpd -f -p 8080 -h /code";
    node.deploy(&function("web", serve, &format!("handler = \"http\"\nport = 8080\n{volume}")));
    node.wait_parked("parked", 1);

    assert_eq!(node.post("/function/parked", "").text(), "from the node\n");
    assert_eq!(node.get("/function/web/index.html").text(), "from the node\n");
    let job = node.post("/function/job", "");
    assert_eq!(job.status, 200, "{}", job.text());
    wait_until(SOON, "the job has read it", || {
        node.neap_ok(&["logs", "job"]).contains("from the node") || job.text().contains("from the node")
    });
}
