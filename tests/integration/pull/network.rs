//! What links do to a pull, and what it costs.

use super::*;
use crate::support::registry::{Fault, Passage};
use crate::support::{have, wait_for};
use std::time::Duration;

#[test]
fn image_is_pulled_and_its_layers_are_never_fetched_twice() {
    if !have("image_is_pulled_and_its_layers_are_never_fetched_twice", "docker-registry") {
        return;
    }
    let site = Site::new("pull-simple");
    site.push("app", &[MIB, 2 * MIB]);

    let first = site.pull("app:1").expect("pulls");
    let bytes = site.proxy.blob_bytes();
    let again = site.pull("app:1").expect("pulls again");

    assert_eq!(first.digest, again.digest);
    assert_eq!(site.store.find(site.name("app:1").as_str()).expect("found").layers.len(), 2);
    assert!(bytes > 3 * MIB as u64, "{bytes}");
    assert!(site.proxy.blob_bytes() - bytes < 4096, "only its configuration came again");
    assert_eq!(site.entries("blobs"), 0);
    let pinned = site.name("app:1").at(&neap::model::Digest::parse(&first.digest).expect("a digest"));
    assert_eq!(
        site.pull(&pinned.as_str()[site.proxy.host().len() + 1..]).expect("pulls").digest,
        first.digest
    );
}

#[test]
fn broken_layer_goes_on_where_it_stopped() {
    if !have("broken_layer_goes_on_where_it_stopped", "docker-registry") {
        return;
    }
    let site = Site::new("pull-cuts");
    site.push("app", &[8 * MIB]);
    site.proxy.faults((0..10).map(|_| Fault::Cut(MIB as u64 / 2)));

    site.pull("app:1").expect("pulls");

    let bytes = site.proxy.blob_bytes();
    // The proxy may have sent what was in flight when a connection was cut; nothing was asked twice.
    let ranges: Vec<String> = ranges(&site);
    assert_eq!(ranges.len(), 10, "{ranges:?}");
    assert!(bytes < 8 * MIB as u64 * 102 / 100, "{bytes} bytes on the wire");
}

#[test]
fn stalled_connection_is_given_up_and_taken_up_again() {
    if !have("stalled_connection_is_given_up_and_taken_up_again", "docker-registry") {
        return;
    }
    let site = Site::new("pull-stall");
    site.push("app", &[2 * MIB]);
    site.proxy.faults([Fault::Stall(MIB as u64)]);

    site.pull("app:1").expect("pulls");

    assert_eq!(ranges(&site), [format!("bytes={}-", MIB)]);
}

#[test]
fn busy_registry_is_waited_for() {
    if !have("busy_registry_is_waited_for", "docker-registry") {
        return;
    }
    let site = Site::new("pull-busy");
    site.push("app", &[MIB]);
    site.proxy.faults([Fault::Status(503, None), Fault::Status(429, Some(1)), Fault::Cut(1000)]);

    site.pull("app:1").expect("pulls");

    assert_eq!(ranges(&site), ["bytes=1000-"]);
}

#[test]
fn server_without_ranges_and_one_that_lies_about_them_damage_nothing() {
    if !have("server_without_ranges_and_one_that_lies_about_them_damage_nothing", "docker-registry") {
        return;
    }
    let site = Site::new("pull-ranges");
    site.push("app", &[2 * MIB]);
    site.proxy.faults([Fault::Cut(MIB as u64), Fault::LieRange, Fault::Whole]);

    site.pull("app:1").expect("pulls");

    // Once more for the lie, a byte of which was not used, and whole where there are no ranges.
    assert_eq!(ranges(&site).len(), 2);
}

#[test]
fn swapped_byte_costs_one_more_fetch_and_two_are_refused() {
    if !have("swapped_byte_costs_one_more_fetch_and_two_are_refused", "docker-registry") {
        return;
    }
    let site = Site::new("pull-swap");
    site.push("good", &[MIB]);
    site.push("bad", &[MIB]);

    site.proxy.faults([Fault::Swap(1000)]);
    site.pull("good:1").expect("the second time it is right");
    site.proxy.always(Some(Fault::Swap(1000)));
    let refused = site.refused("bad:1");

    assert!(refused.contains("damaged twice"), "{refused}");
    assert!(site.store.find(site.name("bad:1").as_str()).is_err());
    assert_eq!(site.entries("layers/sha256"), 1);
}

#[test]
fn tokens_are_fetched_with_dockers_password_and_not_shown_to_blob_storage() {
    if !have("tokens_are_fetched_with_dockers_password_and_not_shown_to_blob_storage", "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-token");
    site.push("app", &[MIB]);
    let storage = Proxy::start(site.registry.port());
    site.proxy.want_tokens("gw", "secret");
    site.proxy.faults([Fault::Redirect(format!("http://{}", storage.host()))]);

    let nobody = site.refused("app:1");
    let auths = format!(
        "{{\"auths\": {{\"{}\": {{\"username\": \"gw\", \"password\": \"secret\"}}}}}}",
        site.proxy.host()
    );
    site.images.docker_config = Some(site.dir.write("config.json", auths));
    site.configure();
    let elsewhere = site.refused("app:1");
    site.images.insecure.push(storage.host());
    site.configure();
    site.proxy.faults([Fault::Redirect(format!("http://{}", storage.host()))]);
    site.pull("app:1").expect("pulls");

    assert!(nobody.contains("401") || nobody.contains("password"), "{nobody}");
    assert!(elsewhere.contains("not encrypted"), "{elsewhere}");
    let asked = storage.asked();
    assert_eq!(asked.len(), 1);
    assert!(!asked[0].headers.contains_key("authorization"), "{asked:?}");
    assert!(
        site.proxy
            .asked()
            .iter()
            .any(|a| a.headers.get("authorization").is_some_and(|v| v == "Bearer let-me-in"))
    );
}

#[test]
fn connection_serves_one_request_after_the_other() {
    if !have("connection_serves_one_request_after_the_other", "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-kept");
    site.push("app", &[MIB, MIB, MIB]);
    let passage = Passage::to(site.registry.port());
    site.images.insecure.push(passage.host());
    site.configure();

    site.pull_from(&passage.host(), "app:1").expect("pulls");

    assert_eq!(passage.accepted(), 1, "manifest, configuration and three layers");
}

#[test]
fn mirrors_are_asked_in_order_before_the_registry() {
    if !have("mirrors_are_asked_in_order_before_the_registry", "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-mirror");
    site.push("app", &[MIB]);
    let empty = Registry::start();
    let (first, second) = (Proxy::start(empty.port()), Proxy::start(site.registry.port()));
    site.images.mirrors = vec![first.host(), second.host()];
    site.images.insecure.extend([first.host(), second.host()]);
    site.configure();

    site.pull("app:1").expect("pulls");

    assert_eq!(first.asked().iter().filter(|asked| asked.path.contains("/manifests/")).count(), 1);
    assert!(second.blob_bytes() > MIB as u64);
    assert!(site.proxy.asked().is_empty());
    assert!(second.asked()[0].path.ends_with(&format!("?ns={}", site.proxy.host())));
}

#[test]
fn what_nobody_has_is_refused_by_name() {
    if !have("what_nobody_has_is_refused_by_name", "docker-registry") {
        return;
    }
    let site = Site::new("pull-missing");

    let missing = site.refused("nothing:1");
    let plain = site.pull_from(&site.registry.host(), "x:1").expect_err("refused").to_string();

    assert!(missing.contains("no such image"), "{missing}");
    assert!(
        plain.contains("tls")
            || plain.contains("TLS")
            || plain.contains("corrupt")
            || plain.contains("again"),
        "{plain}"
    );
}

#[test]
fn pulls_of_one_image_join_and_one_that_nobody_waits_for_stops() {
    if !have("pulls_of_one_image_join_and_one_that_nobody_waits_for_stops", "docker-registry") {
        return;
    }
    let site = Site::new("pull-join");
    site.push("app", &[4 * MIB]);
    site.proxy.faults([Fault::Stall(2 * MIB as u64)]);
    let name = site.name("app:1");

    // Begun, and left by everybody in the middle.
    let left = async {
        let one = site.store.pull(&name, Patience::Bounded).expect("is taken");
        let two = site.store.pull(&name, Patience::Bounded).expect("is taken");
        assert_eq!(site.store.pulling().len(), 1);
        while here(&site) < 2 * MIB as u64 {
            smol::Timer::after(Duration::from_millis(10)).await;
        }
        drop(two);
        assert_eq!(site.store.pulling()[0].pull.as_ref().expect("a pull").state, "fetching");
        drop(one);
    };
    smol::block_on(smol::future::or(left, site.store.drive()));
    assert!(site.store.pulling().is_empty());
    wait_for(Duration::from_secs(30), "the worker's leftovers go", || {
        (site.entries("staging") == 0).then_some(())
    });
    site.pull("app:1").expect("pulls");

    assert!(site.proxy.blob_bytes() < 4 * MIB as u64 * 102 / 100, "{}", site.proxy.blob_bytes());
}

#[test]
fn layer_is_unpacked_while_the_next_one_comes() {
    if !have("layer_is_unpacked_while_the_next_one_comes", "docker-registry") {
        return;
    }
    let site = Site::new("pull-ahead");
    site.push("app", &[2 * MIB, 2 * MIB]);
    site.proxy.faults([Fault::Cut(u64::MAX), Fault::Stall(MIB as u64)]);
    let name = site.name("app:1");
    let unpacked = || {
        let staging = std::fs::read_dir(site.images_dir().join("staging")).expect("there").flatten();
        let layers = staging.flat_map(|work| std::fs::read_dir(work.path()).into_iter().flatten().flatten());
        layers.into_iter().any(|layer| layer.path().join("layer.json").exists())
    };

    let pull = site.store.pull(&name, Patience::Bounded).expect("is taken");
    let first = async {
        // And what the stalled one has sent is on the disk: the proxy counts what leaves it.
        while !unpacked() || here(&site) < 3 * MIB as u64 {
            smol::Timer::after(Duration::from_millis(10)).await;
        }
    };
    smol::block_on(smol::future::or(first, site.store.drive()));

    let state = site.store.pulling()[0].pull.clone().expect("a pull");
    assert_eq!(state.state, "fetching", "the second layer has stalled");
    assert!(site.store.find(name.as_str()).is_err() && site.entries("layers/sha256") == 0);
    drop(pull);
    site.pull("app:1").expect("pulls");
    assert!(site.proxy.blob_bytes() < 4 * MIB as u64 * 102 / 100, "{}", site.proxy.blob_bytes());
}

#[test]
fn killed_worker_loses_not_a_byte() {
    if !have("killed_worker_loses_not_a_byte", "docker-registry") {
        return;
    }
    let site = Site::new("pull-kill");
    site.push("app", &[6 * MIB, 6 * MIB]);
    // Each connection brings 2 MiB and then nothing: time to kill whoever waits.
    site.proxy.always(Some(Fault::Stall(2 * MIB as u64)));

    for round in 1..=3 {
        let name = site.name("app:1");
        let pull = site.store.pull(&name, Patience::Bounded).expect("is taken");
        let enough = async {
            while here(&site) < round * 2 * MIB as u64 {
                smol::Timer::after(Duration::from_millis(10)).await;
            }
            worker_pid(&site)
        };
        let driving = async {
            site.store.drive().await;
            unreachable!("it goes on for ever")
        };
        let pid = smol::block_on(smol::future::or(enough, driving));
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        drop(pull);
    }
    site.proxy.always(None);
    site.pull("app:1").expect("pulls");

    assert!(site.proxy.blob_bytes() < 12 * MIB as u64 * 102 / 100, "{}", site.proxy.blob_bytes());
}

fn worker_pid(site: &Site) -> i32 {
    let images = site.images_dir().display().to_string();
    wait_for(Duration::from_secs(30), "a worker", || {
        std::fs::read_dir("/proc").expect("Linux").flatten().find_map(|entry| {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            let ours = line.contains("image-worker") && line.contains(&images);
            if ours { entry.file_name().to_str()?.parse().ok() } else { None }
        })
    })
}

/// Bytes of layers that have arrived on the disk.
fn here(site: &Site) -> u64 {
    let blobs = std::fs::read_dir(site.images_dir().join("blobs")).expect("there").flatten();
    let layers = blobs.filter(|entry| !entry.file_name().to_string_lossy().ends_with(".sync"));
    let sizes = layers.filter_map(|entry| Some(entry.metadata().ok()?.len()));
    sizes.filter(|bytes| *bytes > 16 * 1024).sum()
}

/// The Range headers of requests for blobs.
fn ranges(site: &Site) -> Vec<String> {
    site.proxy.asked().iter().filter_map(|asked| asked.headers.get("range").cloned()).collect()
}
