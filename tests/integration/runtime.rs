//! Real containers, as root: what a function is shut in, what its limits do, and that nothing is
//! left of a launcher or daemon that was killed.

use neap::config::{LimitsWanted, UserNamespaces};
use neap::model::api::Level;
use neap::model::function::{Limits, UID_BASE_FIRST};
use neap::model::permissions::Volume;
use neap::runtime::{Exit, Root, Running, Runtime, RuntimeError, Settings, probe};
use smol::future::FutureExt;
use smol::io::{AsyncReadExt, AsyncWriteExt};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1024 * 1024;

#[test]
fn input_output_log_and_exit_code_go_through() {
    run(async |node| {
        let running =
            node.started(node.root("echo.1", &["sh", "-c", "cat; echo to the log >&2; exit 7"])).await;

        let outcome = finish(running, b"reading 42").await;

        assert_eq!(outcome.stdout, "reading 42");
        assert_eq!(outcome.stderr, "to the log\n");
        assert_eq!(outcome.exit, Exit::Code(7));
    });
}

#[test]
fn function_is_shut_in() {
    run(async |node| {
        let facts = node
            .lines(
                "cat /proc/self/uid_map | tr -s ' '
                 grep -E '^(NoNewPrivs|CapEff|CapPrm|CapBnd|CapAmb|Seccomp|Groups|SigBlk|SigIgn):' /proc/self/status | tr '\\t' ' '
                 touch /x 2>/dev/null || echo root is read-only
                 touch /bin/x 2>/dev/null || echo bin is read-only
                 touch /tmp/x && echo tmp is writable
                 stat -c '%a %u' /tmp / /bin/busybox
                 hostname
                 echo pid $$
                 echo mounts $(cut -d' ' -f5 /proc/self/mountinfo | sort)
                 echo interfaces $(tail -n +3 /proc/net/dev | cut -d: -f1)
                 ip addr show lo | grep -o 'LOOPBACK,UP'
                 echo masked $(head -c 100 /proc/keys | wc -c)
                 (echo 1 > /proc/sys/kernel/panic) 2>/dev/null || echo sysctls are read-only
                 echo descriptors $(ls /proc/self/fd | wc -l)
                 cat /proc/self/cgroup | head -1 | cut -d: -f3
                 cat /etc/hosts | head -1 | tr '\\t' ' '
                 umask
                 echo first victim $(cat /proc/1/oom_score_adj)
                 ulimit -n; ulimit -c",
            )
            .await;

        let expected = [
            &*format!(" 0 {UID_BASE_FIRST} 65536"),
            "CapPrm: 0000000000000000",
            "CapEff: 0000000000000000",
            "CapBnd: 0000000000000000",
            "CapAmb: 0000000000000000",
            "NoNewPrivs: 1",
            "Seccomp: 2",
            "root is read-only",
            "bin is read-only",
            "tmp is writable",
            "1777 0",
            "755 0",
            "hostname-shell",
            "pid 1",
            "interfaces lo",
            "LOOPBACK,UP",
            "masked 0",
            "sysctls are read-only",
            "descriptors 4", // and ls's own
            "/",
            "127.0.0.1 localhost hostname-shell",
            "0022",
            "SigBlk: 0000000000000000",
            "SigIgn: 0000000000000000",
            "first victim 300",
            "1024",
        ];
        for fact in expected {
            assert!(facts.contains(&fact.to_owned()), "{fact:?} is not among {facts:#?}");
        }
        let groups = facts.iter().find_map(|line| line.strip_prefix("Groups:")).expect("groups");
        assert_eq!(groups.trim(), "", "groups of whoever started the daemon");
        let mounts = facts.iter().find_map(|line| line.strip_prefix("mounts ")).expect("mounts");
        let outside = mounts
            .split(' ')
            .find(|at| !["/", "/tmp"].contains(at) && !at.starts_with("/proc") && !at.starts_with("/dev"));
        assert_eq!(outside, None, "{mounts}");
    });
}

#[test]
fn capabilities_that_are_named_are_all_there_are_whoever_the_user_is() {
    run(async |node| {
        let permissions = neap::model::Permissions {
            allow: neap::model::permissions::Allow {
                capabilities: ["CHOWN", "NET_RAW"]
                    .map(|name| neap::model::permissions::Capability::parse(name).expect("known"))
                    .to_vec(),
                ..Default::default()
            },
            ..Default::default()
        };
        let script = "grep ^Cap /proc/self/status | tr '\\t' ' '; touch /tmp/x && chown 7 /tmp/x && stat -c %u /tmp/x; \
                      chmod 777 /tmp/x 2>/dev/null || echo no FOWNER; mount -t tmpfs x /tmp 2>/dev/null || echo no mount";
        for user in ["", "app"] {
            let root = Root {
                user: user.to_owned(),
                permissions: permissions.clone(),
                ..node.root("caps.1", &["sh", "-c", script])
            };
            let outcome = node.once(root).await;

            let sets = ["Inh", "Prm", "Eff", "Bnd", "Amb"].map(|set| format!("Cap{set}: 0000000000002001\n"));
            assert_eq!(
                outcome.stdout,
                sets.concat() + "7\nno FOWNER\nno mount\n",
                "user {user:?}: {}",
                outcome.stderr
            );
        }
    });
}

#[test]
fn calls_beyond_dockers_profile_are_refused() {
    run(async |node| {
        compile(&node.layer("base").join("bin/calls"), CALLS);

        let outcome = node.once(node.root("calls.1", &["/bin/calls"])).await;

        assert_eq!(outcome.stdout, "", "calls that were not answered as they should be");
        assert_eq!(outcome.exit, Exit::Code(0));
    });
}

#[test]
fn signals_and_codes_are_told_apart() {
    run(async |node| {
        // A pid 1 can't be killed by its own signals: the kernel drops those without a handler.
        let mut running = node.started(node.root("sleep.1", &["sleep", "1000"])).await;
        running.signal(libc_sigterm());
        running.signal(9);
        assert_eq!(running.wait().await, Exit::Signal(9));
        assert_eq!(running.wait().await, Exit::Signal(9), "asked twice");
        running.signal(9); // it has ended: nothing

        let handler = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done";
        let mut running = node.started(node.root("trap.1", &["sh", "-c", handler])).await;
        let mut ready = [0; 6];
        running.stdout.as_mut().expect("stdout").read_exact(&mut ready).await.expect("it is ready");
        running.signal(libc_sigterm());
        assert_eq!(running.wait().await, Exit::Code(3));
    });
}

#[test]
fn environment_of_the_event_comes_with_the_start() {
    run(async |node| {
        node.runtime.prepare(node.root("env.1", &["env"])).await.expect("prepared");
        let parked = node.runtime.create("env.1").await.expect("created");

        let late = [("CE_ID", "a b=c"), ("COLOUR", "red"), ("EMPTY", "")];
        let late = late.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let outcome = finish(parked.start(late).await.expect("started"), b"").await;

        let env: BTreeSet<&str> = outcome.stdout.lines().collect();
        let expected = BTreeSet::from([
            "CE_ID=a b=c",
            "COLOUR=red",
            "EMPTY=",
            "HOME=/root",
            "HOSTNAME=env",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ]);
        assert_eq!(env, expected);
    });
}

#[test]
fn environment_beyond_its_bound_is_an_error_that_says_so() {
    run(async |node| {
        node.runtime.prepare(node.root("env.1", &["env"])).await.expect("prepared");

        let start = async |bytes: usize| {
            let parked = node.runtime.create("env.1").await.expect("created");
            parked.start(vec![("BIG".to_owned(), "x".repeat(bytes))]).await
        };

        let big = start(60_000).await.expect("large is fine");
        assert!(finish(big, b"").await.stdout.contains(&"x".repeat(60_000)));
        let err = start(70_000).await.err().expect("refused");
        assert!(matches!(&err, RuntimeError::Unusable(why) if why.contains("65536 at most")), "{err}");
    });
}

#[test]
fn user_groups_and_home_are_the_images() {
    run(async |node| {
        let id = async |user: &str| {
            let root = Root {
                user: user.to_owned(),
                ..node.root("id.1", &["sh", "-c", "id; echo $HOME; touch /tmp/mine && stat -c %u /tmp/mine"])
            };
            node.once(root).await.stdout
        };

        assert_eq!(id("app").await, "uid=1000(app) gid=1001(app) groups=29(audio)\n/home/app\n1000\n");
        assert_eq!(id("1000:29").await, "uid=1000(app) gid=29(audio)\n/home/app\n1000\n");
        assert_eq!(id("4321").await, "uid=4321 gid=0(root)\n/\n4321\n");
    });
}

#[test]
fn working_directory_is_the_images_or_is_made() {
    run(async |node| {
        fs::create_dir_all(node.layer("base").join("srv/data")).expect("a directory");
        fs::set_permissions(node.layer("base").join("srv"), fs::Permissions::from_mode(0o750))
            .expect("its mode");
        std::os::unix::fs::symlink("/srv", node.layer("base").join("link")).expect("a symlink");
        std::os::unix::fs::symlink("/nowhere", node.layer("base").join("dangling")).expect("a symlink");
        let pwd = async |dir: &str| {
            let root = Root {
                working_dir: dir.to_owned(),
                ..node.root("pwd.1", &["sh", "-c", "pwd; stat -c %a /srv"])
            };
            node.runtime.prepare(root).await?;
            let running = node.runtime.create("pwd.1").await?.start(vec![]).await?;
            Ok::<_, RuntimeError>(finish(running, b"").await.stdout)
        };

        assert_eq!(pwd("").await.expect("the root"), "/\n750\n");
        assert_eq!(pwd("/srv/data").await.expect("it is there"), "/srv/data\n750\n");
        assert_eq!(pwd("/srv/new/deep").await.expect("it is made"), "/srv/new/deep\n750\n");
        // a shell says where the directory really is
        assert_eq!(pwd("/link/new").await.expect("made behind the symlink"), "/srv/new\n750\n");
        for bad in ["relative", "/dangling/x", "/bin/busybox", "/bin/busybox/x", "/none/../x"] {
            assert!(matches!(pwd(bad).await, Err(RuntimeError::Unusable(_))), "{bad}");
        }
    });
}

#[test]
fn working_directory_below_tmp_is_made_in_each_instance() {
    run(async |node| {
        let base = node.layer("base");
        fs::create_dir_all(base.join("tmp/kept")).expect("a directory");
        fs::write(base.join("tmp/kept/main"), "").expect("written");
        fs::create_dir_all(base.join("tmp/empty")).expect("a directory");
        std::os::unix::fs::symlink("/tmp/empty", base.join("link")).expect("a symlink");
        let pwd = async |dir: &str, user: &str| {
            let script = "pwd; touch here; stat -c '%u %a' .; ls /tmp";
            let root = Root {
                working_dir: dir.to_owned(),
                user: user.to_owned(),
                ..node.root("pwd.1", &["sh", "-c", script])
            };
            node.runtime.prepare(root).await?;
            let running = node.runtime.create("pwd.1").await?.start(vec![]).await?;
            Ok::<_, RuntimeError>(finish(running, b"").await.stdout)
        };

        assert_eq!(pwd("/tmp/app", "").await.expect("made"), "/tmp/app\n0 755\napp\n");
        // The next instance finds nothing of the last one's.
        assert_eq!(pwd("/tmp/./a/b/", "app").await.expect("made"), "/tmp/a/b\n1000 755\na\n");
        assert_eq!(pwd("/link", "").await.expect("made"), "/tmp/empty\n0 755\nempty\n");
        assert_eq!(pwd("/link/deep", "").await.expect("made"), "/tmp/empty/deep\n0 755\nempty\n");
        assert_eq!(pwd("/tmp", "").await.expect("a mount point itself"), "/tmp\n0 1777\nhere\n");
        assert_eq!(pwd("/dev/shm", "").await.expect("a mount point itself"), "/dev/shm\n0 1777\n");
        let long = format!("/tmp/{}", "x".repeat(256));
        for bad in ["/tmp/kept", "/dev/foo", "/dev/shm/x", "/proc/1", "/proc/new", &long] {
            let err = pwd(bad, "").await.expect_err(bad);
            assert!(matches!(&err, RuntimeError::Unusable(why) if why.contains(bad)), "{err}");
        }
    });
}

#[test]
fn working_directory_that_its_function_spoiled_is_the_functions_failure() {
    run(async |node| {
        if fs::File::open("/dev/loop0").is_err() {
            eprintln!("no volumes on this machine: no loop devices");
            return;
        }
        let spoil = "pwd; cd /; rmdir /state/work; echo x > /state/work";
        let mut root =
            Root { working_dir: "/state/work".to_owned(), ..node.root("spoil.1", &["sh", "-c", spoil]) };
        let state = Volume { name: "state".to_owned(), path: "/state".to_owned(), max_bytes: 4 * MIB };
        root.permissions.volumes.push(state);

        assert_eq!(node.once(root).await.stdout, "/state/work\n");

        let parked = node.runtime.create("spoil.1").await.expect("made all the same");
        let err = parked.start(vec![]).await.map(|_| ()).expect_err("spoiled");
        let named =
            matches!(&err, RuntimeError::Unusable(why) if why.contains("working directory /state/work"));
        assert!(named, "{err}");
    });
}

#[test]
fn revision_that_can_not_be_prepared_is_forgotten() {
    run(async |node| {
        let forgotten = async |key: &str| match node.runtime.create(key).await.err().expect("refused") {
            RuntimeError::Launcher(why) => why == format!("revision {key} was not prepared"),
            other => panic!("{key}: {other}"),
        };
        let good = node.root("both.1", &["true"]);

        assert!(node.runtime.prepare(node.root("bad.1", &["nope"])).await.is_err());
        assert!(forgotten("bad.1").await);
        assert!(node.runtime.prepare(node.root("bad.1", &["nope"])).await.is_err(), "asked again");
        assert!(forgotten("bad.1").await);

        // What worked is not what is asked for now.
        node.runtime.prepare(good.clone()).await.expect("prepared");
        assert!(node.runtime.prepare(node.root("both.1", &["nope"])).await.is_err());
        assert!(forgotten("both.1").await);
        assert_eq!(node.once(good).await.exit, Exit::Code(0));
    });
}

#[test]
fn what_can_not_run_is_named_before_it_is_started() {
    run(async |node| {
        let base = node.layer("base");
        let write = |name: &str, text: &[u8], mode: u32| {
            fs::write(base.join(name), text).expect("written");
            fs::set_permissions(base.join(name), fs::Permissions::from_mode(mode)).expect("its mode");
        };
        write("script", b"#!/no/such/interpreter\n", 0o755);
        write("private", b"#!/bin/sh\nid -u\n", 0o700);
        write("garbage", b"neither script nor program", 0o755);
        let refusal = async |command: &str, user: &str| {
            let root = Root { user: user.to_owned(), ..node.root("bad.1", &[command]) };
            match node.runtime.prepare(root).await {
                Err(RuntimeError::Unusable(why)) => why,
                Err(other) => panic!("{command}: {other}"),
                Ok(()) => match node.runtime.create("bad.1").await.expect("created").start(vec![]).await {
                    Err(RuntimeError::Unusable(why)) => why,
                    Err(other) => panic!("{command}: {other}"),
                    Ok(running) => finish(running, b"").await.stdout,
                },
            }
        };

        assert_eq!(refusal("/nope", "").await, "command `/nope` is not in the image");
        assert_eq!(refusal("nope", "").await, "command `nope` is not in the image");
        assert_eq!(refusal("/etc/passwd", "").await, "command `/etc/passwd` may not be executed by user 0");
        assert_eq!(refusal("/etc", "").await, "command `/etc` may not be executed by user 0");
        assert_eq!(refusal("/private", "app").await, "command `/private` may not be executed by user 1000");
        assert_eq!(refusal("/private", "").await, "0\n");
        let script =
            "command `/script` needs the interpreter `/no/such/interpreter`, which is not in the image";
        assert_eq!(refusal("/script", "").await, script);
        assert_eq!(refusal("/garbage", "").await, "command `/garbage` is not a program for this machine");
        assert_eq!(refusal("id", "nobody").await, "user `nobody` is not in the image's /etc/passwd");
        assert_eq!(refusal("", "").await, "neither the image nor the manifest names a command");
        assert_eq!(node.shell("echo still well").await.stdout, "still well\n");
    });
}

#[test]
fn layers_become_one_root() {
    run(async |node| {
        let (base, upper) = (node.layer("base"), node.layer("upper"));
        fs::create_dir_all(base.join("opt/lower")).expect("a directory");
        fs::write(base.join("opt/lower/hidden"), "").expect("written");
        fs::write(base.join("gone"), "").expect("written");
        fs::write(base.join("both"), "base").expect("written");
        std::os::unix::fs::symlink("/etc", base.join("tmp")).expect("an image's trick");
        fs::create_dir_all(upper.join("opt/lower")).expect("a directory");
        fs::write(upper.join("both"), "upper").expect("written");
        let done =
            Command::new("mknod").arg(upper.join("gone")).args(["c", "0", "0"]).status().expect("mknod runs");
        assert!(done.success());
        rustix::fs::setxattr(
            upper.join("opt/lower"),
            "trusted.overlay.opaque",
            b"y",
            rustix::fs::XattrFlags::empty(),
        )
        .expect("root marks a directory as opaque");

        let script = "cat /both; echo; ls /gone 2>&1; echo hidden $(ls /opt/lower); touch /tmp/x; ls -ld /tmp | cut -c1-10; ls /etc";
        let root = Root { layers: vec![base.clone(), upper], ..node.root("two.1", &["sh", "-c", script]) };
        let lines: Vec<_> = node.once(root).await.stdout.lines().map(str::to_owned).collect();

        assert_eq!(lines[0], "upper");
        assert_eq!(lines[1], "ls: /gone: No such file or directory");
        assert_eq!(lines[2], "hidden");
        assert_eq!(lines[3], "drwxrwxrwt", "neap's /tmp, not what the image's symlink points at");
        assert_eq!(lines[4..], ["group", "hostname", "hosts", "passwd"]);
        assert!(!base.join("etc/x").exists());
    });
}

#[test]
fn many_layers_become_one_root() {
    run(async |node| {
        let mut layers = vec![node.layer("base")];
        for n in 1..127 {
            let layer = node.layer(&format!("a-layer-with-a-name-as-long-as-a-digest-would-make-it-{n:064}"));
            fs::write(layer.join(format!("file{n}")), "").expect("written");
            layers.push(layer);
        }

        let root = Root { layers, ..node.root("deep.1", &["sh", "-c", "ls / | grep -c file"]) };

        assert_eq!(node.once(root).await.stdout, "126\n");
    });
}

#[test]
fn memory_beyond_the_limit_is_told_apart() {
    run(async |node| {
        // The limit is reached by pid 1, then by a child of it.
        let direct = node.root("eat.1", &["head", "-c", "100000000", "/dev/zero"]);
        let eat = Root { command: ["sort", "/dev/zero"].map(str::to_owned).to_vec(), ..direct };
        assert_eq!(node.once(eat).await.exit, Exit::OutOfMemory);

        let child = node.shell("sort /dev/zero; exit 5").await;
        assert_eq!(child.exit, Exit::OutOfMemory);

        // A file in /tmp is memory too, and bounded before that.
        let full =
            node.shell("dd if=/dev/zero of=/tmp/x bs=1M count=10 2>&1 | tail -1; stat -c %s /tmp/x").await;
        assert_eq!(full.stdout.lines().last(), Some(&*(4 * MIB).to_string()));
        assert_eq!(full.exit, Exit::Code(0));
    });
}

#[test]
fn function_that_forks_without_end_is_contained() {
    run(async |node| {
        let mut root = node.root("bomb.1", &["sh", "-c", "b() { b | b & }; b; sleep 1000"]);
        root.limits.pids = 20;
        let mut running = node.started(root).await;

        let file = node.limit_file("pids", "pids.events");
        until("the limit of processes is reached", || {
            fs::read_to_string(&file).is_ok_and(|text| !text.trim_end().ends_with(" 0"))
        })
        .await;
        let processes = fs::read_to_string(node.limit_file("pids", "pids.current")).expect("a count");
        assert!(processes.trim().parse::<u32>().expect("a number") <= 20);
        running.signal(9);
        assert_eq!(running.wait().await, Exit::Signal(9));

        node.until_empty().await;
    });
}

#[test]
fn limits_are_what_the_manifest_says() {
    run(async |node| {
        let mut root = node.root("limits.1", &["sleep", "1000"]);
        root.limits.cpu_millis = 250;
        root.limits.pids = 9;
        root.limits.memory_bytes = 32 * MIB;
        let _running = node.started(root).await;

        let read = |controller: &str, file: &str| {
            fs::read_to_string(node.limit_file(controller, file)).expect(file).trim().to_owned()
        };
        if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            assert_eq!(read("", "memory.max"), (32 * MIB).to_string());
            assert_eq!(read("", "cpu.max"), "25000 100000");
            assert_eq!(read("", "memory.oom.group"), "1");
        } else {
            assert_eq!(read("memory", "memory.limit_in_bytes"), (32 * MIB).to_string());
            assert_eq!(read("cpu", "cpu.cfs_quota_us"), "25000");
            assert_eq!(read("cpu", "cpu.cfs_period_us"), "100000");
        }
        assert_eq!(read("pids", "pids.max"), "9");
        assert_eq!(node.runtime.warnings(), Vec::<String>::new());
    });
}

#[test]
fn dropped_instances_are_killed_and_removed() {
    run(async |node| {
        node.runtime.prepare(node.root("sleep.1", &["sleep", "1000"])).await.expect("prepared");

        let parked = node.runtime.create("sleep.1").await.expect("created");
        let running =
            node.runtime.create("sleep.1").await.expect("created").start(vec![]).await.expect("started");
        // A caller that lost interest half-way: the instance comes into being and goes.
        let abandoned = node.runtime.create("sleep.1");
        let soon = async {
            smol::Timer::after(Duration::from_millis(2)).await;
            Err(RuntimeError::Lost)
        };
        let _ = abandoned.or(soon).await;
        assert_ne!(node.processes(), 0);
        drop((parked, running));

        node.until_empty().await;
    });
}

#[test]
fn parked_instance_keeps_nobodys_pipes_open() {
    run(async |node| {
        node.runtime.prepare(node.root("true.1", &["true"])).await.expect("prepared");
        let first = node.runtime.create("true.1").await.expect("created");
        let second = node.runtime.create("true.1").await.expect("created");

        let outcome = finish(first.start(vec![]).await.expect("started"), b"").await;

        assert_eq!(outcome.exit, Exit::Code(0)); // and its output ended, though another is parked
        drop(second);
    });
}

#[test]
fn instance_that_died_while_parked_is_not_started() {
    run(async |node| {
        node.runtime.prepare(node.root("true.1", &["true"])).await.expect("prepared");
        let parked = node.runtime.create("true.1").await.expect("created");
        for pid in node.pids() {
            // The first takes the others along.
            let pid = nix::unistd::Pid::from_raw(pid as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        node.until_empty().await;

        let err = parked.start(vec![]).await.err().expect("an error");

        assert!(matches!(err, RuntimeError::Launcher(_)), "{err}");
    });
}

#[test]
fn released_revision_goes_on_in_its_instances() {
    run(async |node| {
        let root = node.root("old.1", &["sh", "-c", "read x; cat /etc/hostname"]);
        let running = node.started(root).await;

        node.runtime.release("old.1").await;

        assert!(matches!(node.runtime.create("old.1").await, Err(RuntimeError::Launcher(_))));
        assert_eq!(finish(running, b"go\n").await.stdout, "old\n");
    });
}

#[test]
fn instances_start_side_by_side() {
    run(async |node| {
        let root = node.root("many.1", &["sh", "-c", "cat; exit 4"]);
        node.runtime.prepare(root).await.expect("prepared");
        let executor = smol::LocalExecutor::new();
        let one = async |n: u32| {
            let running =
                node.runtime.create("many.1").await.expect("created").start(vec![]).await.expect("started");
            let outcome = finish(running, n.to_string().as_bytes()).await;
            assert_eq!((outcome.stdout, outcome.exit), (n.to_string(), Exit::Code(4)));
        };

        let tasks: Vec<_> = (0..24).map(|n| executor.spawn(one(n))).collect();
        let all = async {
            for task in tasks {
                task.await;
            }
        };
        executor.run(all).await;
    });
}

/// Each create has a process of its own; this one is stopped on its way.
#[test]
fn one_slow_create_delays_nobody() {
    run(async |node| {
        loop {
            let (slow, maker) = node.with_a_maker_caught(libc_sigstop()).await;
            let mut slow = std::pin::pin!(slow);

            // The others, from create to exit.
            assert_eq!(node.shell("echo first").await.stdout, "first\n");
            assert_eq!(node.shell("echo second").await.stdout, "second\n");

            let answered = smol::future::poll_once(slow.as_mut()).await;
            signal(maker, nix::sys::signal::Signal::SIGCONT);
            // One that was stopped right after its answer is no slow one: another.
            if answered.is_none() {
                drop(slow.await.expect("created after all"));
                break;
            }
        }
        node.until_empty().await;
    });
}

#[test]
fn create_whose_process_is_killed_is_an_error_and_leaves_nothing() {
    run(async |node| {
        let err = loop {
            // One that was killed right after its answer has made an instance.
            if let Err(err) = node.with_a_maker_caught(9).await.0.await {
                break err;
            }
        };

        assert!(matches!(&err, RuntimeError::Launcher(why) if why.contains("ended early")), "{err}");
        node.until_empty().await;
        let launcher = node.launcher().expect("the launcher lives on");
        until("state is removed", || node.belongings(launcher)[2] == 0).await;
        assert_eq!(node.shell("echo works").await.stdout, "works\n");
    });
}

#[test]
fn killed_launcher_loses_its_instances_and_is_replaced() {
    run(async |node| {
        node.runtime.prepare(node.root("sleep.1", &["sleep", "1000"])).await.expect("prepared");
        for _ in 0..2 {
            let mut running =
                node.runtime.create("sleep.1").await.expect("created").start(vec![]).await.expect("started");
            let parked = node.runtime.create("sleep.1").await.expect("created");
            let launcher = node.launcher().expect("a launcher");

            kill(launcher);

            assert_eq!(running.wait().await, Exit::Lost);
            assert!(matches!(parked.start(vec![]).await, Err(RuntimeError::Lost)));
            // Waits for the new launcher, which prepares the root by itself.
            let again = node.runtime.create("sleep.1").await.expect("created");
            assert_ne!(node.launcher(), Some(launcher));
            // Its maker may have a moment left.
            until("none of the old instances is alive", || node.processes() == 1).await;
            drop(again);
            node.until_empty().await;
        }
        assert_eq!(node.shell("echo works").await.stdout, "works\n");
    });
}

/// Not a test: what `killed_daemon_leaves_nothing_alive` starts and kills.
#[test]
fn daemon_to_be_killed() {
    let Some(dir) = std::env::var_os("NEAP_TEST_DAEMON_DIR").map(PathBuf::from) else { return };
    let cgroup = std::env::var("NEAP_TEST_DAEMON_CGROUP").expect("both are set");
    let runtime = Runtime::start(Node::settings(&dir, &cgroup)).expect("the launcher starts");
    let node = Node { runtime, dir: dir.clone(), cgroup, _temporary: None };
    smol::block_on(
        async {
            let _running = node.started(node.root("sleep.1", &["sleep", "1000"])).await;
            let _parked = node.runtime.create("sleep.1").await.expect("created");
            fs::write(dir.join("ready"), "").expect("written");
            smol::future::pending::<()>().await;
        }
        .or(async { node.runtime.drive().await }),
    );
}

#[test]
fn killed_daemon_leaves_nothing_alive_and_its_cgroups_are_swept() {
    let node = Node::start();
    let other = tempfile::tempdir().expect("a temporary directory");
    let other = other.path();
    busybox(&other.join("data/base"));
    let mut daemon = Command::new(std::env::current_exe().expect("this test binary"))
        .args(["--exact", "runtime::daemon_to_be_killed", "--nocapture", "--test-threads=1"])
        .env("NEAP_TEST_DAEMON_DIR", other)
        .env("NEAP_TEST_DAEMON_CGROUP", &node.cgroup)
        .spawn()
        .expect("a daemon");
    let ready = other.join("ready");
    smol::block_on(until("the daemon is ready", || ready.exists()));
    let launcher = launcher_of(other).expect("its launcher");

    daemon.kill().expect("killed");
    daemon.wait().expect("reaped");

    smol::block_on(until("nothing is alive", || {
        pids_below(&node.cgroup).is_empty() && !Path::new(&format!("/proc/{launcher}")).exists()
    }));
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.contains(&*other.to_string_lossy()), "a mount is left");
    let left = cgroups_below(&node.cgroup);
    assert!(
        left.iter().any(|path| path.to_string_lossy().contains("sleep.1.")),
        "nothing to sweep: {left:?}"
    );

    // Another daemon with the same parent leaves them alone, the next of this one sweeps them.
    smol::block_on(node.runtime.stop());
    let restarted = Runtime::start(Node::settings(&node.dir, &node.cgroup)).expect("starts");
    let kept = cgroups_below(&node.cgroup);
    assert!(
        left.iter()
            .filter(|path| path.to_string_lossy().contains("sleep.1."))
            .all(|path| kept.contains(path))
    );
    let next = Runtime::start(Node::settings(other, &node.cgroup)).expect("starts");
    let left = cgroups_below(&node.cgroup);
    assert!(!left.iter().any(|path| path.to_string_lossy().contains("sleep.1.")), "{left:?}");
    smol::block_on(next.stop());
    smol::block_on(restarted.stop());
    assert_eq!(cgroups_below(&node.cgroup), Vec::<PathBuf>::new());
}

#[test]
fn launcher_is_started_again_from_a_binary_that_was_replaced() {
    let node = Node::start();
    smol::block_on(node.runtime.stop());
    let exe = node.dir.join("neap");
    // Not by this process: what another test forks meanwhile would have it open for writing for a moment,
    // and what is can't be executed.
    let copied = std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_neap")).arg(&exe).status();
    assert!(copied.expect("cp runs").success());
    let settings = Settings { exe: exe.clone(), ..Node::settings(&node.dir, &node.cgroup) };
    let node = Node { runtime: Runtime::start(settings).expect("starts"), ..node };
    run_on(&node, async |node| {
        fs::remove_file(&exe).expect("removed");
        fs::write(&exe, "something else").expect("written");
        let launcher = node.launcher().expect("a launcher");

        kill(launcher);
        until("the launcher is gone", || node.launcher() != Some(launcher)).await;

        assert_eq!(node.shell("echo works").await.stdout, "works\n");
        let launcher = node.launcher().expect("another launcher");
        let mounts = fs::read_to_string(format!("/proc/{launcher}/mountinfo")).expect("its mounts");
        assert!(mounts.contains(" /neap ro"), "its binary can be written: {mounts}");
        assert!(mounts.lines().count() < 16, "a long table slows every create: {mounts}");
    });
}

#[test]
fn two_daemons_do_not_touch_each_other() {
    run(async |node| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(dir.path().join("data")).expect("a data directory");
        let running = node.started(node.root("cat.1", &["cat"])).await;

        // The other comes, with the same parent cgroup, and goes.
        let other = Runtime::start(Node::settings(dir.path(), &node.cgroup)).expect("the other starts");
        other.stop().await;

        assert_eq!(finish(running, b"still here").await.stdout, "still here");
    });
}

#[test]
fn two_hundred_instances_leave_nothing_behind() {
    run(async |node| {
        node.runtime.prepare(node.root("true.1", &["true"])).await.expect("prepared");
        let cycle = async || {
            let begun = Instant::now();
            let parked = node.runtime.create("true.1").await.expect("created");
            let created = Instant::now();
            let mut running = parked.start(vec![]).await.expect("started");
            let started = Instant::now();
            assert_eq!(running.wait().await, Exit::Code(0));
            [created - begun, started - created, started.elapsed()]
        };
        cycle().await;
        node.until_empty().await;
        let launcher = node.launcher().expect("a launcher");
        // State directories go later than the cgroups, in quiet moments: not one may be counted.
        until("the first one's state is removed", || node.belongings(launcher)[2] == 0).await;
        let before = node.belongings(launcher);

        let mut times = Vec::new();
        for _ in 0..200 {
            times.push(cycle().await);
        }

        node.until_empty().await;
        until("state is removed", || node.belongings(launcher) == before).await;
        assert_eq!(node.launcher(), Some(launcher), "the same launcher did it all");
        let figures = |phase: usize| {
            let mut all: Vec<_> = times.iter().map(|times| times[phase]).collect();
            all.sort();
            format!("{:?} / {:?}", all[0], all[all.len() / 2])
        };
        println!("least / median: create {}, start {}, exit {}", figures(0), figures(1), figures(2));
    });
}

/// Not by itself: other tests of this process open and close descriptors meanwhile.
#[test]
fn instances_leave_the_daemon_no_descriptors() {
    const ALONE: &str = "NEAP_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = "runtime::instances_leave_the_daemon_no_descriptors";
        let alone = Command::new(std::env::current_exe().expect("this test binary"))
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(ALONE, "1")
            .output()
            .expect("it runs");
        let said = [alone.stdout, alone.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(alone.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    run(async |node| {
        node.runtime.prepare(node.root("true.1", &["true"])).await.expect("prepared");
        let cycle = async || {
            let parked = node.runtime.create("true.1").await.expect("created");
            let mut running = parked.start(vec![]).await.expect("started");
            assert_eq!(running.wait().await, Exit::Code(0));
            drop(node.runtime.create("true.1").await.expect("created"));
            assert!(node.runtime.create("none.1").await.is_err());
        };
        cycle().await;
        node.until_empty().await;
        let before = own_descriptors();

        for _ in 0..100 {
            cycle().await;
        }

        node.until_empty().await;
        until("descriptors are closed", || own_descriptors() == before).await;
    });
}

#[test]
fn user_namespaces_are_required_or_done_without() {
    // ramfs knows no id-mapped mounts.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data = dir.path().join("data");
    fs::create_dir_all(&data).expect("a directory");
    let _ramfs = Ramfs::mount(&data);
    busybox(&data.join("base"));
    let cgroup = format!("neap-test-{}-ramfs", std::process::id());
    let settings = Node::settings(dir.path(), &cgroup);

    let refused = Runtime::start(settings.clone()).err().expect("refused");
    let text = refused.to_string();
    assert!(text.contains("id-mapped") && text.contains("user_namespaces = \"prefer\""), "{text}");

    let prefer = Settings { user_namespaces: UserNamespaces::Prefer, ..settings };
    let runtime = Runtime::start(prefer).expect("starts without");
    assert!(runtime.warnings().iter().any(|line| line.contains("no user namespaces")));
    let node = Node { runtime, dir: dir.path().to_owned(), cgroup, _temporary: None };
    run_on(&node, async |node| {
        let facts = node
            .lines("tr -s ' ' < /proc/self/uid_map; grep CapEff /proc/self/status; touch /tmp/x && echo ok")
            .await;
        assert_eq!(facts[0], " 0 0 4294967295");
        assert!(facts[1].ends_with("\t0000000000000000"), "{facts:?}");
        assert_eq!(facts[2], "ok");
    });
}

#[test]
fn doctor_finds_this_machine_well() {
    let dir = tempfile::tempdir().expect("a temporary directory");

    let findings = probe::probe(
        dir.path(),
        LimitsWanted::Require,
        UserNamespaces::Require,
        neap::config::defaults::EGRESS_RANGE,
    );

    assert!(findings.len() >= 5);
    let bad: Vec<_> = findings.iter().filter(|finding| finding.level == Level::Failing).collect();
    assert!(bad.is_empty(), "{bad:#?}");
}

/// Tries what must be refused; prints what was answered otherwise.
const CALLS: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void expect(const char *what, long got, int wanted) {
    int err = got < 0 ? errno : 0;
    if (err != wanted) printf("%s: %s instead of %s\n", what, strerror(err), strerror(wanted));
}

int main(void) {
    expect("mount", mount("none", "/tmp", "tmpfs", 0, 0), EPERM);
    expect("umount", umount2("/tmp", 0), EPERM);
    expect("unshare", unshare(CLONE_NEWUSER), EPERM);
    expect("unshare net", unshare(CLONE_NEWNET), EPERM);
    expect("setns", setns(0, 0), EPERM);
    expect("keyctl", syscall(SYS_keyctl, 0, 0, 0, 0, 0), EPERM);
    expect("add_key", syscall(SYS_add_key, "user", "x", "x", 1, -3), EPERM);
    expect("bpf", syscall(SYS_bpf, 0, 0, 0), EPERM);
    expect("perf_event_open", syscall(SYS_perf_event_open, 0, 0, 0, 0, 0), EPERM);
    expect("io_uring_setup", syscall(SYS_io_uring_setup, 1, 0), EPERM);
    expect("userfaultfd", syscall(SYS_userfaultfd, 0), EPERM);
    expect("AF_VSOCK", socket(40, SOCK_STREAM, 0), EPERM);
    expect("AF_ALG", socket(38, SOCK_SEQPACKET, 0), EPERM);
    expect("personality", personality(ADDR_NO_RANDOMIZE), EPERM);
    expect("clone of a user namespace", syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0), EPERM);
    expect("clone of a network namespace", syscall(SYS_clone, CLONE_NEWNET | SIGCHLD, 0, 0, 0, 0), EPERM);
    expect("clone3", syscall(SYS_clone3, 0, 0), ENOSYS);
    expect("a call of the future", syscall(1000, 0), ENOSYS);
    expect("open_by_handle_at", syscall(SYS_open_by_handle_at, 0, 0, 0), EPERM);
    expect("reboot", syscall(SYS_reboot, 0, 0, 0, 0), EPERM);
    expect("fsopen", syscall(SYS_fsopen, "tmpfs", 0), EPERM);
    expect("kexec_load", syscall(SYS_kexec_load, 0, 0, 0, 0), EPERM);

    /* and what must work */
    expect("AF_INET", socket(AF_INET, SOCK_STREAM, 0), 0);
    expect("AF_UNIX", socket(AF_UNIX, SOCK_STREAM, 0), 0);
    expect("AF_NETLINK", socket(AF_NETLINK, SOCK_RAW, 0), 0);
    expect("personality, asked", personality(0xffffffff), 0);
    pid_t child = fork();
    if (child == 0) _exit(0);
    expect("fork", child, 0);
    expect("wait", waitpid(child, 0, 0), 0);
    return 0;
}
"#;

struct Outcome {
    stdout: String,
    stderr: String,
    exit: Exit,
}

/// A runtime with a data directory and a cgroup of its own, and a busybox image.
struct Node {
    runtime: Runtime,
    dir: PathBuf,
    cgroup: String,
    _temporary: Option<tempfile::TempDir>,
}

impl Node {
    fn settings(dir: &Path, cgroup: &str) -> Settings {
        Settings {
            exe: PathBuf::from(env!("CARGO_BIN_EXE_neap")),
            run_dir: dir.join("run"),
            data_dir: dir.join("data"),
            cgroup: cgroup.to_owned(),
            user_namespaces: UserNamespaces::Require,
            limits: LimitsWanted::Require,
            egress_range: neap::config::defaults::EGRESS_RANGE,
        }
    }

    fn start() -> Self {
        static NODES: AtomicU32 = AtomicU32::new(0);
        assert!(is_root(), "containers need root: run the tests as root");
        let temporary = tempfile::tempdir().expect("a temporary directory");
        let dir = temporary.path().to_owned();
        let cgroup = format!("neap-test-{}-{}", std::process::id(), NODES.fetch_add(1, Ordering::Relaxed));
        busybox(&dir.join("data/base"));
        let runtime = Runtime::start(Self::settings(&dir, &cgroup)).expect("the launcher starts");
        Self { runtime, dir, cgroup, _temporary: Some(temporary) }
    }

    fn layer(&self, name: &str) -> PathBuf {
        let layer = self.dir.join("data").join(name);
        fs::create_dir_all(&layer).expect("a layer's directory");
        layer
    }

    fn root(&self, key: &str, command: &[&str]) -> Root {
        Root {
            key: key.to_owned(),
            layers: vec![self.layer("base")],
            uid_base: UID_BASE_FIRST,
            command: command.iter().map(|arg| arg.to_string()).collect(),
            env: vec!["COLOUR=blue".to_owned()],
            user: String::new(),
            working_dir: String::new(),
            limits: Limits {
                memory_bytes: 64 * MIB,
                cpu_millis: 1000,
                pids: 64,
                timeout: Duration::from_secs(30),
                payload_bytes: MIB,
                disk_bytes: 4 * MIB,
            },
            permissions: Default::default(),
            secret_dirs: Vec::new(),
        }
    }

    async fn started(&self, root: Root) -> Running {
        let key = root.key.clone();
        self.runtime.prepare(root).await.expect("prepared");
        let parked = self.runtime.create(&key).await.expect("created");
        parked.start(vec![]).await.expect("started")
    }

    async fn once(&self, root: Root) -> Outcome {
        finish(self.started(root).await, b"").await
    }

    async fn shell(&self, script: &str) -> Outcome {
        self.once(self.root("hostname-shell.1", &["sh", "-c", script])).await
    }

    async fn lines(&self, script: &str) -> Vec<String> {
        let outcome = self.shell(script).await;
        assert_eq!(outcome.stderr, "");
        outcome.stdout.lines().map(str::to_owned).collect()
    }

    /// A file of the only instance.
    fn limit_file(&self, controller: &str, file: &str) -> PathBuf {
        // v2 has one hierarchy, without a directory for each controller.
        let v1 = Path::new("/sys/fs/cgroup").join(controller);
        let root = if v1.join("cgroup.procs").exists() { v1 } else { PathBuf::from("/sys/fs/cgroup") };
        let of = |path: &PathBuf| path.starts_with(&root) && path.join(file).exists();
        let deepest =
            cgroups_below(&self.cgroup).into_iter().filter(of).max_by_key(|path| path.components().count());
        deepest.expect("an instance's cgroup").join(file)
    }

    fn pids(&self) -> BTreeSet<u32> {
        pids_below(&self.cgroup)
    }

    /// A create that was on its way when its process got `signal`, and that process.
    async fn with_a_maker_caught(
        &self,
        signal: i32,
    ) -> (impl Future<Output = Result<neap::runtime::Parked, RuntimeError>>, u32) {
        self.runtime.prepare(self.root("caught.1", &["true"])).await.expect("prepared");
        let launcher = self.launcher().expect("a launcher");
        // Most are caught at once; each that wasn't has been created.
        for _ in 0..200 {
            let hunting = std::thread::spawn(move || caught(launcher, signal));
            let runtime = self.runtime.clone();
            let mut create = Box::pin(async move { runtime.create("caught.1").await });
            let mut created = None;
            let maker = loop {
                if created.is_none() {
                    created = smol::future::poll_once(create.as_mut()).await;
                }
                if hunting.is_finished() {
                    break hunting.join().expect("the hunt goes well");
                }
                smol::Timer::after(Duration::from_millis(1)).await;
            };
            match (maker, created) {
                (Some(maker), None) => return (create, maker),
                (Some(maker), Some(_)) => self::signal(maker, nix::sys::signal::Signal::SIGCONT),
                (None, created) => drop(created),
            }
        }
        panic!("no create was ever caught");
    }

    fn processes(&self) -> usize {
        self.pids().len()
    }

    /// Until no instance has a cgroup any more.
    async fn until_empty(&self) {
        until("instances are removed", || {
            cgroups_below(&self.cgroup).iter().all(|path| !path.to_string_lossy().contains(".1."))
        })
        .await;
    }

    fn launcher(&self) -> Option<u32> {
        launcher_of(&self.dir)
    }

    /// What could leak: descriptors here and there, mounts, files of the launcher's state.
    fn belongings(&self, launcher: u32) -> [usize; 3] {
        let count = |dir: String| fs::read_dir(dir).map_or(0, Iterator::count);
        let mounts =
            fs::read_to_string(format!("/proc/{launcher}/mountinfo")).map_or(0, |text| text.lines().count());
        [
            count(format!("/proc/{launcher}/fd")),
            mounts,
            count(format!("/proc/{launcher}/root/state/containers")),
        ]
    }
}

async fn finish(mut running: Running, input: &[u8]) -> Outcome {
    let mut stdin = running.stdin.take().expect("stdin");
    let mut out = running.stdout.take().expect("stdout");
    let mut err = running.stderr.take().expect("stderr");
    let _ = stdin.write_all(input).await;
    drop(stdin);
    let (mut stdout, mut stderr) = (String::new(), String::new());
    let (a, b) = smol::future::zip(out.read_to_string(&mut stdout), err.read_to_string(&mut stderr)).await;
    a.expect("stdout is text");
    b.expect("stderr is text");
    Outcome { stdout, stderr, exit: running.wait().await }
}

/// Runs a test on a node of its own, with the client driven beside it, and takes all down.
fn run(test: impl AsyncFnOnce(&Node)) {
    let node = Node::start();
    run_on(&node, test);
}

fn run_on(node: &Node, test: impl AsyncFnOnce(&Node)) {
    let driving = async {
        node.runtime.drive().await;
        panic!("the runtime ended by itself");
    };
    let limited = async {
        smol::Timer::after(Duration::from_secs(60)).await;
        panic!("the test takes longer than a minute");
    };
    smol::block_on(test(node).or(driving).or(limited));
    smol::block_on(node.runtime.stop());
    assert_eq!(cgroups_below(&node.cgroup), Vec::<PathBuf>::new(), "cgroups are left");
    assert_eq!(node.launcher(), None, "a launcher is left");
    assert!(!node.dir.join("run/launcher").exists(), "a run file is left");
}

/// Waits for a state; the state is the test, the time only bounds it.
async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !reached() {
        assert!(begun.elapsed() < Duration::from_secs(20), "not reached: {what}");
        smol::Timer::after(Duration::from_millis(5)).await;
    }
}

/// What this process has open, by kind: sockets, pipes, pidfds and the rest.
fn own_descriptors() -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd").expect("descriptors").flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        // `socket:[123]`: the number differs
        let kind = target.to_string_lossy().split('[').next().unwrap_or_default().to_owned();
        *kinds.entry(kind).or_default() += 1;
    }
    kinds
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it is there to be killed");
}

fn libc_sigterm() -> i32 {
    15
}

fn libc_sigstop() -> i32 {
    19
}

fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal); // it may have ended
}

/// Sends `signal` to the next process that the launcher forks for a create; which one it was.
fn caught(launcher: u32, signal: i32) -> Option<u32> {
    let signal = nix::sys::signal::Signal::try_from(signal).expect("a signal");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children"));
        for child in children.unwrap_or_default().split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
            // A container's first process has a third number, in its own namespace.
            let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            let is_maker = numbers.is_some_and(|numbers| numbers.split_whitespace().count() == 2);
            if is_maker && nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), signal).is_ok() {
                return u32::try_from(child).ok();
            }
        }
    }
    None
}

/// The launcher process of a node, told by its arguments.
fn launcher_of(dir: &Path) -> Option<u32> {
    let state = dir.join("run/launcher").to_string_lossy().into_owned();
    fs::read_dir("/proc").expect("processes").flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        (line.contains("launcher serve ") && line.contains(&state)).then_some(pid)
    })
}

/// All cgroups at and below a parent, in every hierarchy.
fn cgroups_below(cgroup: &str) -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = vec![PathBuf::from("/sys/fs/cgroup")];
    roots.extend(fs::read_dir("/sys/fs/cgroup").expect("cgroups").flatten().map(|entry| entry.path()));
    let mut found: Vec<PathBuf> =
        roots.iter().map(|root| root.join(cgroup)).filter(|path| path.is_dir()).collect();
    let mut next = 0;
    while next < found.len() {
        if let Ok(children) = fs::read_dir(&found[next]) {
            found.extend(children.flatten().map(|child| child.path()).filter(|path| path.is_dir()));
        }
        next += 1;
    }
    found
}

fn pids_below(cgroup: &str) -> BTreeSet<u32> {
    let read = |path: PathBuf| fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    cgroups_below(cgroup)
        .into_iter()
        .flat_map(|path| read(path).lines().filter_map(|line| line.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

/// An unpacked layer: busybox, its commands, and the files that programs look for.
fn busybox(root: &Path) {
    for dir in ["bin", "etc", "home/app"] {
        fs::create_dir_all(root.join(dir)).expect("a directory");
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))
        .expect("the Debian package busybox-static is installed");
    fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755)).expect("its mode");
    let names = "sh cat echo id ls sleep true stat hostname touch head tail env grep tr cut sort wc ip dd";
    for name in names.split(' ') {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).expect("a symlink");
    }
    let passwd = "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n";
    fs::write(root.join("etc/passwd"), passwd).expect("written");
    fs::write(root.join("etc/group"), "root:x:0:\napp:x:1001:\naudio:x:29:app\n").expect("written");
}

fn compile(to: &Path, source: &str) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("program.c");
    fs::write(&file, source).expect("written");
    let done = Command::new("gcc").args(["-static", "-O1", "-o"]).arg(to).arg(&file).status();
    assert!(done.expect("gcc is installed").success());
}

struct Ramfs(PathBuf);

impl Ramfs {
    fn mount(at: &Path) -> Self {
        let done = Command::new("mount").args(["-t", "ramfs", "ramfs"]).arg(at).status().expect("mount runs");
        assert!(done.success());
        Self(at.to_owned())
    }
}

impl Drop for Ramfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
