//! Small disks: what does not fit is not fetched, what is not needed goes, what changed is seen.

use super::*;
use crate::support::registry::{Fault, run};
use crate::support::{Node, have, privileged, shell_image, wait_for, wait_until};
use neap::image::Goal;
use neap::model::{Digest, UnixMs};
use std::collections::HashSet;
use std::process::{Command, Stdio};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(120);

/// A file system of 64 MiB as the image store's disk, for as long as the test runs: an ext4 on a
/// loop device, without blocks that only root may have; a tmpfs where there are no loop devices.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf) -> Self {
        std::fs::create_dir_all(&at).expect("make a directory");
        let file = at.with_extension("ext4");
        std::fs::File::create(&file).and_then(|new| new.set_len(64 << 20)).expect("a file");
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&file).env("PATH", PATH));
        // The device goes with the mount.
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&at).output();
        let mounted = mounted.expect("run mount");
        if !mounted.status.success() {
            eprintln!("no loop devices, so a tmpfs: {}", String::from_utf8_lossy(&mounted.stderr));
            run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs"]).arg(&at));
        }
        Self(at)
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.0).expect("statvfs");
        stat.f_bavail * stat.f_frsize
    }

    /// To the last block: small files take what a large one leaves.
    fn fill(&self) {
        for (name, bytes) in [("filler", 1 << 20), ("rest", 1)] {
            let mut number = 0;
            while std::fs::write(self.0.join(format!("{name}-{number}")), vec![7; bytes]).is_ok() {
                number += 1;
            }
        }
        assert!(self.free() < 64 << 10, "{} bytes are free", self.free());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Where mkfs.ext4 is, also for who has not root's PATH.
const PATH: &str = "/usr/sbin:/sbin:/usr/bin:/bin";

#[test]
fn image_that_does_not_fit_is_refused_with_figures_before_a_layer_is_fetched() {
    let test = "image_that_does_not_fit_is_refused_with_figures_before_a_layer_is_fetched";
    if !have(test, "docker-registry") || !privileged(test) {
        return;
    }
    let mut site = Site::new("pull-small");
    site.push("large", &[20 * MIB]);
    site.push("small", &[4 * MIB]);
    site.push("kept", &[50_000]);
    let disk = SmallDisk::mount(site.dir.join("disk"));
    site.store = ImageStore::open(&site.dir.join("disk"), NEAP.into()).expect("opens");
    site.images.limits.reserve_bytes = 16 << 20;
    site.configure();

    let refused = site.refused("large:1");
    let bytes = site.proxy.blob_bytes();
    site.pull("small:1").expect("this one fits");
    let kept = Digest::parse(&site.pull("kept:1").expect("this one, too").digest).expect("a digest");

    assert!(refused.contains("not fetched: it needs") && refused.contains("16 MiB are kept"), "{refused}");
    assert!(bytes < 16 * 1024, "{bytes} bytes: no more than the configuration");
    assert!(disk.free() >= 16 << 20);

    // To the last block: pulls are refused, what is here still works and can go, by which room
    // comes back.
    disk.fill();
    site.push("tiny", &[40_000]);
    let full = site.pull("tiny:1").expect_err("refused").to_string();
    assert!(!full.is_empty());
    let image = site.store.find(site.name("small:1").as_str()).expect("still here");
    assert!(image.layers[0].join("file-0").is_file());
    site.store = ImageStore::open(&site.dir.join("disk"), NEAP.into()).expect("opens, full as it is");
    site.configure();
    let needed = HashSet::from([kept]);
    site.store.gc_by_watermark(&needed, UnixMs(i64::MAX / 2)).expect("collects");
    assert_eq!(site.store.list().expect("lists").len(), 1);
    wait_for(Duration::from_secs(60), "the layers are gone", || (disk.free() > 3 << 20).then_some(()));
    site.images.limits.reserve_bytes = 1 << 20;
    site.configure();
    site.pull("tiny:1").expect("and there is room again");
}

#[test]
fn collection_keeps_what_is_needed_and_tells_before_it_acts() {
    if !have("collection_keeps_what_is_needed_and_tells_before_it_acts", "docker-registry") {
        return;
    }
    let site = Site::new("pull-gc");
    site.push("kept", &[MIB]);
    site.push("gone", &[2 * MIB]);
    let kept = Digest::parse(&site.pull("kept:1").expect("pulls").digest).expect("a digest");
    site.pull("gone:1").expect("pulls");
    let needed = HashSet::from([kept]);

    let dry = site.store.gc(&needed, Goal::Unneeded, true).expect("tells");
    assert_eq!((dry.images.len(), site.entries("layers/sha256")), (1, 2));
    let done = site.store.gc(&needed, Goal::Unneeded, false).expect("collects");

    assert_eq!(dry.images, done.images);
    assert!(done.bytes >= 2 * MIB as u64 && done.bytes < 3 * MIB as u64, "{}", done.bytes);
    // The last pull may still be cleaning up after itself; layers go when it has ended.
    let gone = || (site.entries("layers/sha256") == 1).then_some(());
    wait_for(Duration::from_secs(30), "the layer is gone", gone);
    assert!(site.store.find(site.name("kept:1").as_str()).is_ok());
    assert!(site.store.find(site.name("gone:1").as_str()).is_err());
}

#[test]
fn collection_that_was_killed_between_its_steps_is_finished_at_the_next_start() {
    if !have("collection_that_was_killed_between_its_steps_is_finished_at_the_next_start", "docker-registry")
    {
        return;
    }
    let mut site = Site::new("pull-gc-kill");
    site.push("kept", &[MIB]);
    site.push("gone", &[MIB, MIB, MIB]);
    site.pull("kept:1").expect("pulls");
    let gone = site.pull("gone:1").expect("pulls").digest;
    let layers = site.store.find(&gone).expect("here").layers;
    let images = site.images_dir();

    // As far as a kill lets it come: refs.json is written, one layer is on its way out and half
    // removed, one is on its way out, one is in its place.
    let text = std::fs::read(images.join("refs.json")).expect("there");
    let mut refs: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    refs["images"].as_object_mut().expect("a map").remove(&gone);
    refs["references"].as_object_mut().expect("a map").retain(|_, digest| *digest != gone.as_str());
    std::fs::write(images.join("refs.json"), refs.to_string()).expect("written");
    for (number, root) in layers[..2].iter().enumerate() {
        let trash = images.join(format!("staging/trash-{number:016x}"));
        std::fs::rename(root.parent().expect("a layer"), &trash).expect("renamed");
        if number == 0 {
            std::fs::remove_file(trash.join("root/file-0")).expect("there");
        }
    }
    site.store = ImageStore::open(&site.dir.join("data"), NEAP.into()).expect("opens");
    site.configure();

    assert_eq!(site.store.list().expect("lists").len(), 1);
    let settled = || {
        let counts = (site.entries("layers/sha256"), site.entries("manifests"), site.entries("staging"));
        (counts == (1, 1, 0)).then_some(())
    };
    wait_for(Duration::from_secs(30), "what was left is gone", settled);
    site.pull("gone:1").expect("pulls again");
    assert_eq!(site.store.find(&gone).expect("here").layers.len(), 3);
}

#[test]
fn kill_of_the_daemon_in_a_collection_leaves_what_is_needed_and_no_leftovers() {
    let test = "kill_of_the_daemon_in_a_collection_leaves_what_is_needed_and_no_leftovers";
    if !privileged(test) {
        return;
    }
    let mut node = Node::builder("gc-kill").start();
    node.import(shell_image());
    node.deploy("name = \"kept\"\nimage = \"shell:1\"\ncommand = [\"echo\", \"here\"]\n");
    let archive = many_files(node.dir());
    let images = node.dir().join("data/images");
    let refs = || std::fs::read_to_string(images.join("refs.json")).expect("there is always one");
    let trash = || {
        let staging = std::fs::read_dir(images.join("staging")).expect("there").flatten();
        staging.filter(|entry| entry.file_name().to_string_lossy().starts_with("trash-")).count()
    };

    let (mut begun, mut halfway) = (0, 0);
    for round in 0..4 {
        node.neap_ok(&["image", "import", archive.to_str().expect("UTF-8"), "--name", "many:1"]);
        wait_until(LONG, "the import has cleaned up", || trash() == 0);
        let mut gc = node.neap_command(&["image", "gc"]).stdout(Stdio::null()).spawn().expect("run neap");
        // In odd rounds a little later: when its layers are on their way out.
        let killed_at = std::time::Instant::now() + LONG;
        while refs().contains("many:1") || round % 2 == 1 && trash() == 0 {
            if std::time::Instant::now() > killed_at || gc.try_wait().expect("wait for it").is_some() {
                break;
            }
        }
        node.kill();
        let _ = gc.wait();
        begun += usize::from(!refs().contains("many:1"));
        halfway += usize::from(trash() > 0);
        node.start();

        // All of it, or nothing.
        let listed = node.neap_ok(&["image", "ls"]);
        assert_eq!(listed.contains("many:1"), refs().contains("many:1"), "{listed}");
        wait_until(LONG, "the leftovers are gone", || {
            let count = |below: &str| std::fs::read_dir(images.join(below)).expect("there").count();
            let counts = (count("staging"), count("manifests"));
            counts == (0, if refs().contains("many:1") { 2 } else { 1 })
        });
        assert_eq!(node.neap_ok(&["invoke", "kept"]), "here\n");
    }

    eprintln!("killed {begun} times after the first step of a collection, {halfway} times before its last");
    assert!(begun > 0, "no collection was met");
    node.neap_ok(&["image", "import", archive.to_str().expect("UTF-8"), "--name", "many:1"]);
    assert!(node.neap_ok(&["image", "gc"]).contains("removed: 1 image"));
}

/// An image whose layers take a while to remove.
fn many_files(dir: &TestDir) -> PathBuf {
    let layout = dir.join("many");
    let image = format!("{}:1", layout.display());
    run(Command::new("umoci").args(["init", "--layout"]).arg(&layout));
    run(Command::new("umoci").args(["new", "--image", &image]));
    for layer in 0..2 {
        let root = dir.join(format!("many-{layer}"));
        std::fs::create_dir(&root).expect("make a directory");
        for file in 0..1500 {
            std::fs::write(root.join(format!("file-{layer}-{file}")), "").expect("write a file");
        }
        let tar = dir.join(format!("many-{layer}.tar"));
        run(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg("."));
        run(Command::new("umoci").args(["raw", "add-layer", "--image", &image]).arg(&tar));
        std::fs::remove_dir_all(root).expect("there");
    }
    let archive = dir.join("many-archive.tar");
    run(Command::new("tar").arg("-C").arg(&layout).arg("-cf").arg(&archive).arg("."));
    archive
}

#[test]
fn changed_layer_is_found_and_fetched_anew() {
    if !have("changed_layer_is_found_and_fetched_anew", "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-check");
    site.push("app", &[MIB, MIB]);
    let digest = site.pull("app:1").expect("pulls").digest;
    site.images.check_every = Duration::from_secs(1);
    site.images.check_rate = 1 << 30;
    site.configure();
    let check = |hours: i64| smol::block_on(site.store.check_due(UnixMs(hours * 3_600_000))).expect("checks");
    assert_eq!(check(1), []);
    let file = site.store.find(&digest).expect("here").layers[0].join("file-0");
    let good = std::fs::read(&file).expect("there");
    let mut bad = good.clone();
    bad[MIB / 2] ^= 1;
    // As rot does it: size and time stay.
    std::fs::write(&file, &bad).expect("written");

    let damaged = check(2);
    assert_eq!(damaged.len(), 1);
    let waiting = site.store.damaged().expect("known");
    assert!(site.store.is_damaged(&Digest::parse(&digest).expect("a digest"), &waiting));
    let before = site.proxy.blob_bytes();
    let pinned = format!("app@{digest}");
    site.pull(&pinned).expect("pulls the layer anew");

    assert!(site.proxy.blob_bytes() - before < 2 * MIB as u64, "one layer, not both");
    assert!(std::fs::read(&file).expect("there") == good);
    assert!(site.store.damaged().expect("known").is_empty());
    assert_eq!(check(3), []);
}

#[test]
fn kill_in_any_phase_leaves_nothing_that_counts() {
    if !have("kill_in_any_phase_leaves_nothing_that_counts", "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-phases");
    site.push("app", &[3 * MIB, 3 * MIB]);
    site.proxy.faults([Fault::Cut(MIB as u64)]);
    let name = site.name("app:1");

    // Whoever is at work is killed, again and again at other moments, until a pull gets through.
    let mut killed = 0;
    for round in 0_u64..12 {
        let pull = site.store.pull(&name, Patience::Bounded).expect("is taken");
        let driving = async {
            site.store.drive().await;
            unreachable!("it goes on for ever")
        };
        let moment = async {
            // From the moment that a worker is there, which it is not for long once all is here.
            let seen = std::time::Instant::now();
            while workers(&site).is_empty() && seen.elapsed() < Duration::from_secs(10) {
                smol::Timer::after(Duration::from_millis(1)).await;
            }
            smol::Timer::after(Duration::from_millis(20 * round)).await;
            kill_workers(&site)
        };
        killed += smol::block_on(smol::future::or(moment, driving));
        drop(pull);
        wait_for(Duration::from_secs(30), "the leftovers go", || {
            (site.entries("staging") == 0).then_some(())
        });
        // As after a kill of the daemon: what refs.json doesn't reach goes.
        site.store = ImageStore::open(&site.dir.join("data"), NEAP.into()).expect("opens");
        site.configure();
        assert!(site.store.list().expect("lists").len() <= 1);
    }
    site.pull("app:1").expect("pulls");

    assert!(killed > 0, "no worker was met");
    let image = site.store.find(name.as_str()).expect("here");
    let sizes: Vec<u64> = (0..2)
        .map(|at| image.layers[at].join(format!("file-{at}")).metadata().expect("there").len())
        .collect();
    assert_eq!(sizes, [3 * MIB as u64; 2]);
    site.images.check_every = Duration::from_secs(1);
    site.images.check_rate = 1 << 30;
    site.configure();
    assert_eq!(smol::block_on(site.store.check_due(UnixMs(1))).expect("checks"), []);
}

fn kill_workers(site: &Site) -> usize {
    let kill = |pid: &i32| {
        let pid = nix::unistd::Pid::from_raw(*pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).is_ok()
    };
    workers(site).iter().filter(|pid| kill(pid)).count()
}

fn workers(site: &Site) -> Vec<i32> {
    let images = site.images_dir().display().to_string();
    let processes = std::fs::read_dir("/proc").expect("Linux").flatten();
    let ours = processes.filter(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.contains("image-worker") && line.contains(&images)
    });
    ours.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}
