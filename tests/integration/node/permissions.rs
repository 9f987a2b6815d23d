//! What a manifest permits reaches the function, and what it doesn't permit doesn't.

use super::{SOON, alone, function, possible};
use crate::support::wait_until;
use std::path::Path;
use std::process::Output;

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_secret_that_is_not_set_is_refused_by_deploy_and_check_with_the_way_out() {
    if !possible() {
        return;
    }
    let node = alone("unset");
    let manifest = function("reader", "cat /run/secrets/api-key", "secrets = [\"api-key\"]");
    let file = node.dir().write("reader.toml", &manifest);
    let (file, config) = (file.display().to_string(), node.config_file().display().to_string());
    let deploy = || node.neap(&["deploy", &file]);
    let check = || node.neap(&["check", "--config", &config, &file]);

    for refused in [deploy(), check()] {
        let told = stderr(&refused);
        assert_eq!(refused.status.code(), Some(1), "{told}");
        let expected = "reader.toml:4: secrets: no secret named `api-key`; `neap secret set api-key";
        assert!(told.contains(expected), "{told}");
    }

    node.neap_ok(&["secret", "set", "api-key", "--data", "open sesame"]);
    for accepted in [check(), deploy()] {
        assert!(accepted.status.success(), "{}", stderr(&accepted));
    }
    assert_eq!(node.post("/function/reader", "").text(), "open sesame");
}

#[test]
fn a_secret_is_read_where_the_platform_has_it_and_nowhere_else() {
    if !possible() {
        return;
    }
    let node = alone("places");
    node.neap_ok(&["secret", "set", "ours", "--data", "one"]);
    node.neap_ok(&["secret", "set", "other", "--data", "two"]);

    let look = "ls /run/secrets; cat /run/secrets/ours; echo; stat -c '%a %u' /run/secrets/ours; \
                for f in /run/secrets/ours /run/secrets/more; do (echo x > $f) 2>/dev/null && echo wrote $f; done; \
                env | grep -c one; ls /var/openfaas/secrets 2>/dev/null; true";
    node.deploy(&function("stdio", look, "secrets = [\"ours\"]"));
    let serve = "exec httpd -f -p $PORT -h /var/openfaas/secrets";
    node.deploy(&function("faas", serve, "secrets = [\"ours\"]\nplatform = \"openfaas\"\nready = \"/ours\""));
    node.deploy(&function("none", "ls /run/secrets 2>/dev/null; echo none", ""));

    assert_eq!(node.post("/function/stdio", "").text(), "ours\none\n444 0\n0\n");
    assert_eq!(node.get("/function/faas/ours").text(), "one");
    assert_eq!(node.get("/function/faas/other").status, 404);
    assert_eq!(node.post("/function/none", "").text(), "none\n");
}

#[test]
fn a_changed_secret_reaches_what_is_parked_and_survives_a_restart() {
    if !possible() {
        return;
    }
    let mut node = alone("rotate");
    node.neap_ok(&["secret", "set", "key", "--data", "first"]);
    let parked = function("parked", "cat /run/secrets/key", "secrets = [\"key\"]\n[scale]\nmin = 1");
    node.deploy(&parked);
    node.wait_parked("parked", 1);
    let read = |node: &crate::support::Node| node.post("/function/parked", "").text();

    node.neap_ok(&["secret", "set", "key", "--data", "second"]);
    // The launcher is told, not asked: before the next create at the latest.
    wait_until(SOON, "the new secret is read", || read(&node) == "second");

    node.kill();
    node.start();
    assert_eq!(read(&node), "second");
    assert!(node.kill_launcher(usize::MAX), "there is a launcher");
    wait_until(SOON, "another launcher runs it", || read(&node) == "second");
}

#[test]
fn a_function_whose_secret_is_gone_waits_for_it_and_runs_when_it_is_set_again() {
    if !possible() {
        return;
    }
    let mut node = alone("gone");
    node.neap_ok(&["secret", "set", "key", "--data", "first"]);
    node.deploy(&function("reader", "cat /run/secrets/key", "secrets = [\"key\"]"));
    let refused = node.neap(&["secret", "rm", "key"]);
    assert!(stderr(&refused).contains("needed by: reader"), "{}", stderr(&refused));

    node.stop();
    std::fs::remove_file(node.dir().join("data/secrets/key")).expect("it was there");
    node.start();
    let state = node.function("reader")["state"].as_str().unwrap_or_default().to_owned();
    assert!(state.contains("secret `key` is not set on this node"), "{state}");

    node.neap_ok(&["secret", "set", "key", "--data", "second"]);
    assert_eq!(node.post("/function/reader", "").text(), "second");
}

#[test]
fn a_secret_is_told_to_nobody_but_its_functions() {
    if !possible() {
        return;
    }
    let mut node = alone("quiet");
    let value = "xyzzy-5f3a";
    let file = node.dir().write("value", value);
    node.neap_ok(&["secret", "set", "key", "--data", &format!("@{}", file.display())]);
    std::fs::remove_file(file).expect("it was there");
    node.deploy(&function("reader", "wc -c < /run/secrets/key", "secrets = [\"key\"]"));

    assert_eq!(node.post("/function/reader", "").text(), "10\n");
    let listed = node.neap_json(&["secret", "ls"]);
    assert_eq!((&listed[0]["bytes"], &listed[0]["used_by"][0]), (&10.into(), &"reader".into()), "{listed}");
    let told = [node.neap_ok(&["secret", "ls"]), node.neap_ok(&["show", "reader"]), listed.to_string()];
    for text in &told {
        assert!(!text.contains(value), "{text}");
    }
    for bad in [["secret", "set", "../key", "--data", value], ["secret", "set", "key", "--data", ""]] {
        let refused = node.neap(&bad);
        assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));
        assert!(!stderr(&refused).contains(value), "{}", stderr(&refused));
    }

    node.stop();
    let found = holding(node.dir().path(), value.as_bytes());
    assert_eq!(found, ["data/secrets/key"], "files with the secret in them");
}

#[test]
fn a_writable_root_is_fresh_for_each_event_and_bounded_with_tmp_by_limits_disk() {
    if !possible() {
        return;
    }
    let node = alone("writable");
    let change = "for f in /mark /etc/mark /bin/mark /tmp/mark; do [ -e $f ] && echo $f is there; echo x > $f || exit 1; done; \
                  rm /bin/cat && mv /etc /elsewhere && echo changed";
    let more = "[allow]\nwritable = true";
    node.deploy(&(function("fresh", change, more) + "disk = \"1MiB\"\n"));
    node.deploy(&(function("parked", change, &format!("{more}\n[scale]\nmin = 1")) + "disk = \"1MiB\"\n"));
    // Half for the root, and no more than the other half for /tmp.
    let fill = "head -c 600000 /dev/zero > /fill && echo half; head -c 600000 /dev/zero 2>/dev/null > /tmp/fill || echo full";
    node.deploy(&(function("fill", fill, more) + "disk = \"1MiB\"\n"));
    node.deploy(&function("plain", "touch /mark 2>/dev/null || echo read-only", ""));

    for name in ["fresh", "fresh", "parked", "parked", "parked"] {
        assert_eq!(node.post(&format!("/function/{name}"), "").text(), "changed\n", "{name}");
    }
    assert_eq!(node.post("/function/fill", "").text(), "half\nfull\n");
    assert_eq!(node.post("/function/plain", "").text(), "read-only\n");
}

#[test]
fn a_function_on_the_nodes_network_reaches_it_and_others_do_not() {
    if !possible() {
        return;
    }
    let node = alone("hostnet");
    let ask = format!(
        "wget -q -O- http://127.0.0.1:{}/healthz >/dev/null 2>&1 && echo reached || echo not",
        node.port()
    );
    node.deploy(&function("host", &ask, "[allow]\nnetwork = \"host\""));
    node.deploy(&function("none", &ask, ""));
    let busy = function("low", "nc -l -p 80 </dev/null 2>&1 | head -1", "[allow]\nnetwork = \"host\"");
    node.deploy(&busy.replace("nc -l", "timeout 1 nc -l"));

    assert_eq!(node.post("/function/host", "").text(), "reached\n");
    assert_eq!(node.post("/function/none", "").text(), "not\n");
    // No capability there: the namespace is the node's, not the function's. (Containers in which
    // tests run may let everybody listen on low ports.)
    let privileged = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    if privileged.is_ok_and(|first| first.trim().parse::<u32>().is_ok_and(|first| first > 80)) {
        assert!(node.post("/function/low", "").text().contains("ermission denied"));
    }
}

#[test]
fn a_device_is_the_functions_by_its_name_and_refused_by_its_number() {
    if !possible() {
        return;
    }
    // 240 is for experiments: it has no driver, so that opening it says who let it through.
    let Some(port) = MadeDevice::new(240, 7, 'c') else { return };
    let (disk, memory) = (MadeDevice::new(240, 7, 'b'), MadeDevice::new(1, 1, 'c'));
    let node = alone("devices");
    let name = port.link();
    let look = format!("stat -c '%t:%T %u %a' {name}; cat {name}; ls /dev | tr '\\n' ' '");
    let allow = |name: &str| format!("[allow]\ndevices = [\"{name}\"]");
    node.deploy(&function("serial", &format!("({look}) 2>&1"), &allow(&name)));

    let said = node.post("/function/serial", "").text();

    assert!(said.starts_with("f0:7 0 660\n"), "{said}");
    assert!(said.contains("No such device or address"), "the kernel looked for its driver: {said}");
    let others: Vec<&str> = said.lines().last().unwrap_or_default().split(' ').collect();
    assert!(!others.iter().any(|other| other.starts_with("neap-test") && !name.ends_with(other)), "{said}");
    for forbidden in [disk, memory].iter().flatten() {
        let file = node.dir().write("bad.toml", function("bad", "true", &allow(&forbidden.link())));
        let refused = node.neap(&["deploy", file.to_str().expect("UTF-8")]);
        assert!(stderr(&refused).contains("which no function gets"), "{}", stderr(&refused));
    }

    drop(port);
    let said = node.post("/function/serial", "");
    assert!(said.status == 502 && said.text().contains("is not there; is it plugged in?"), "{}", said.text());
}

/// Whether this machine has what volumes are made of; a container often has no loop devices.
#[track_caller]
fn volumes_possible() -> bool {
    let dir = crate::support::TestDir::new("doctor");
    let config = dir.write("neap.toml", format!("[node]\ndata_dir = \"{}\"\n", dir.path().display()));
    let doctor = std::process::Command::new(env!("CARGO_BIN_EXE_neap"))
        .args(["doctor", "--output", "json", "--config"])
        .arg(config)
        .output()
        .expect("run neap");
    let findings: serde_json::Value = serde_json::from_slice(&doctor.stdout).expect("doctor writes JSON");
    let volumes = findings.as_array().into_iter().flatten().find(|finding| finding["name"] == "volumes");
    let volumes = volumes.unwrap_or_else(|| panic!("doctor says nothing of volumes: {findings}"));
    if volumes["level"] != "ok" {
        eprintln!("no volumes on this machine: {volumes}");
    }
    volumes["level"] == "ok"
}

/// A manifest's `[[volume]]` of so many MiB at /state.
fn volume(mib: u32) -> String {
    format!("[[volume]]\nname = \"state\"\npath = \"/state\"\nmax = \"{mib}MiB\"\n")
}

#[test]
fn a_volume_survives_instances_revisions_kills_and_removal() {
    if !possible() || !volumes_possible() {
        return;
    }
    let mut node = alone("volume");
    let count = "ls -A /state | wc -l; echo x > /state/$(ls /state | wc -l)";
    let deploy = |node: &crate::support::Node, more: &str| {
        node.deploy(&function("count", &format!("{count} {more}"), &volume(4)));
    };
    let next = |node: &crate::support::Node| node.post("/function/count", "").text();
    deploy(&node, "");

    assert_eq!([next(&node), next(&node)], ["0\n", "1\n"], "empty, then as the last one left it");
    deploy(&node, "# another revision");
    assert_eq!(next(&node), "2\n");
    assert!(node.kill_launcher(usize::MAX), "there is a launcher");
    wait_until(SOON, "another launcher runs it", || {
        let answer = node.post("/function/count", "");
        answer.status == 200 && answer.text() == "3\n"
    });
    node.kill();
    node.start();
    wait_until(SOON, "the killed one's mount is gone", || next(&node) == "4\n");
    let removed = node.neap(&["rm", "count"]);
    assert!(stderr(&removed).contains("its volumes stay"), "{}", stderr(&removed));
    deploy(&node, "");
    assert_eq!(next(&node), "5\n");
}

#[test]
fn a_volume_holds_what_its_manifest_says_grows_with_it_and_is_still_there_after_a_rollback() {
    if !possible() || !volumes_possible() {
        return;
    }
    let node = alone("grows");
    // How many MiB fit; all of it is written, and stays.
    let fill = "rm -f /state/fill; head -c 64m /dev/zero > /state/fill 2>/dev/null; stat -c %s /state/fill; \
                touch /state/kept";
    let deploy = |mib: u32| node.deploy(&function("fill", fill, &volume(mib)));
    let bytes = || node.post("/function/fill", "").text().trim().parse::<u64>().expect("a number");

    deploy(4);
    let small = bytes();
    assert!((1 << 20..4 << 20).contains(&small), "{small} bytes in 4 MiB");
    let status = std::fs::read_to_string("/proc/self/status").expect("of this process");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("capabilities");
    let effective = u64::from_str_radix(effective.trim(), 16).expect("hexadecimal");
    // What the kernel asks of who enlarges an ext4 in use; many a container's root lacks it.
    if effective & 1 << 24 == 0 {
        let larger = node.dir().write("larger.toml", function("fill", fill, &volume(16)));
        let refused = node.neap(&["deploy", larger.to_str().expect("UTF-8")]);
        assert!(stderr(&refused).contains("no CAP_SYS_RESOURCE"), "{}", stderr(&refused));
        assert!(bytes() < 4 << 20, "what ran before goes on");
        return;
    }
    deploy(16);
    let large = bytes();
    assert!((small + (8 << 20)..16 << 20).contains(&large), "{large} bytes in 16 MiB");
    node.neap_ok(&["rollback", "fill"]);
    assert!(bytes() > small + (8 << 20), "what has grown never shrinks");
}

#[test]
fn a_volume_belongs_to_the_functions_user_and_no_symlink_leads_a_mount_out_of_it() {
    if !possible() || !volumes_possible() {
        return;
    }
    let node = alone("owned");
    let other = "[[volume]]\nname = \"other\"\npath = \"/var/other\"\nmax = \"4MiB\"\n";
    // What the first leaves behind must not change where the second is mounted.
    let script = "stat -c '%u %a' /state; [ -L /state/link ] && echo again || ln -s /etc /state/link; \
                  (mknod /state/null c 1 3 || echo no devices) 2>/dev/null; \
                  grep -c ' /state .*nosuid,nodev' /proc/self/mountinfo; ls -A /var/other";
    let more = format!("{}{other}[allow]\nwritable = true\n", volume(4));
    node.deploy(&function("owned", script, &more));

    assert_eq!(node.post("/function/owned", "").text(), "0 755\nno devices\n1\n");
    assert_eq!(node.post("/function/owned", "").text(), "0 755\nagain\nno devices\n1\n");
    let inside =
        function("inside", "true", &format!("{}{}", volume(4), other.replace("/var/other", "/state/link")));
    let refused = node.neap(&["deploy", node.dir().write("inside.toml", inside).to_str().expect("UTF-8")]);
    assert!(stderr(&refused).contains("can't both be"), "{}", stderr(&refused));
    // /var/run is a link to /run in no image of ours, but /bin is a directory of it.
    let secrets = function("over", "true", &volume(4).replace("/state", "/bin/busybox"));
    let refused = node.neap(&["deploy", node.dir().write("over.toml", secrets).to_str().expect("UTF-8")]);
    assert!(stderr(&refused).contains("is not a directory in the image"), "{}", stderr(&refused));
}

/// Files below a directory that hold these bytes.
fn holding(root: &Path, bytes: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).expect("a directory").flatten() {
            let (path, kind) = (entry.path(), entry.file_type().expect("a type"));
            if kind.is_dir() {
                dirs.push(path);
            } else if kind.is_file()
                && std::fs::read(&path).expect("readable").windows(bytes.len()).any(|part| part == bytes)
            {
                found.push(path.strip_prefix(root).expect("below it").display().to_string());
            }
        }
    }
    found.sort();
    found
}

/// A node in /dev under a name that is a link, as udev's are; both are removed with it.
struct MadeDevice(std::path::PathBuf);

impl MadeDevice {
    /// `None`: this machine lets nobody make any.
    fn new(major: u32, minor: u32, kind: char) -> Option<Self> {
        let path = std::path::PathBuf::from(format!("/dev/neap-test-{:08x}", fastrand::u32(..)));
        let is_for_use = major == 240 && kind == 'c';
        let drivers = std::fs::read_to_string("/proc/devices").unwrap_or_default();
        if is_for_use && drivers.lines().any(|line| line.trim().starts_with("240 ")) {
            eprintln!("the number for experiments is in use on this machine");
            return None;
        }
        let (major, minor) = (major.to_string(), minor.to_string());
        let made = std::process::Command::new("mknod")
            .args([path.as_os_str(), kind.to_string().as_ref(), major.as_ref(), minor.as_ref()])
            .status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("no device can be made on this machine");
            return None;
        }
        let device = Self(path);
        // What confines this machine may let a device be made and not be used. Without a driver
        // opening it ends in ENXIO.
        let opened = std::fs::File::open(&device.0).err().and_then(|error| error.raw_os_error());
        if is_for_use && opened != Some(6) {
            eprintln!("no device without a driver can be used on this machine: {opened:?}");
            return None;
        }
        std::os::unix::fs::symlink(&device.0, device.link()).expect("a link in /dev");
        Some(device)
    }

    fn link(&self) -> String {
        format!("{}-link", self.0.display())
    }
}

impl Drop for MadeDevice {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.link());
        let _ = std::fs::remove_file(&self.0);
    }
}
