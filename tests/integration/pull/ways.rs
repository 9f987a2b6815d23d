//! Ways to a registry: over TLS with a private CA, with passwords and tokens, through indexes, at
//! certain hours.

use super::*;
use crate::support::have;
use crate::support::registry::{Fault, run};
use crate::support::tls::Certificates;
use neap::config::DayWindow;
use neap::model::api::Progress;
use serde_json::json;
use std::process::Command;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

#[test]
fn registry_with_a_private_ca_is_trusted_when_the_configuration_names_it() {
    let test = "registry_with_a_private_ca_is_trusted_when_the_configuration_names_it";
    if !have(test, "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-tls");
    let (certificates, others) = (Certificates::new(), Certificates::new());
    let registry = Registry::over_tls(&certificates);
    registry.push(&random_image(site.dir.path(), "app", &[MIB]), "app:1");
    let pull = |site: &Site| site.pull_from(&registry.host(), "app:1");

    for ca in [None, Some(others.ca.clone())] {
        site.images.ca = ca;
        site.configure();
        let refused = pull(&site).expect_err("refused").to_string();
        assert!(refused.contains("certificate"), "{refused}");
    }
    site.images.ca = Some(certificates.ca.clone());
    site.configure();

    let pulled = pull(&site).expect("pulls");
    assert!(site.store.find(&pulled.digest).is_ok());
}

#[test]
fn password_is_taken_from_dockers_config_and_a_wrong_one_told_from_none() {
    let test = "password_is_taken_from_dockers_config_and_a_wrong_one_told_from_none";
    if !have(test, "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-basic");
    let registry = Registry::with_password();
    registry.push(&random_image(site.dir.path(), "app", &[MIB]), "app:1");
    site.images.insecure = vec![registry.host()];
    site.configure();
    let login = |site: &mut Site, auth: &str| {
        let auths = json!({"auths": {registry.host(): {"auth": auth}}}).to_string();
        site.images.docker_config = Some(site.dir.write("config.json", auths));
        site.configure();
        site.pull_from(&registry.host(), "app:1")
    };

    let nobody = site.pull_from(&registry.host(), "app:1").expect_err("refused").to_string();
    let wrong = login(&mut site, "Z3c6d3Jvbmc=").expect_err("refused").to_string(); // gw:wrong
    login(&mut site, "Z3c6c2VjcmV0").expect("pulls"); // gw:secret

    assert!(nobody.contains("wants a password") && nobody.contains("docker_config"), "{nobody}");
    assert!(wrong.contains("refuses our password"), "{wrong}");
    assert!(!wrong.contains("wrong") && !wrong.contains("Z3c6"), "no secret in a message: {wrong}");
}

#[test]
fn each_mirror_is_asked_with_its_own_password_and_with_no_other() {
    let test = "each_mirror_is_asked_with_its_own_password_and_with_no_other";
    if !have(test, "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-each");
    site.push("app", &[MIB]);
    let (first, second) = (Proxy::start(site.registry.port()), Proxy::start(site.registry.port()));
    first.want_tokens("one", "right");
    second.want_tokens("two", "p2");
    site.proxy.want_tokens("own", "p3");
    let login = |user: &str, password: &str| json!({"username": user, "password": password});
    let auths = json!({"auths": {first.host(): login("one", "wrong"), second.host(): login("two", "p2"),
        site.proxy.host(): login("own", "p3")}});
    site.images.docker_config = Some(site.dir.write("config.json", auths.to_string()));
    site.images.mirrors = vec![first.host(), second.host()];
    site.images.insecure.extend([first.host(), second.host()]);
    site.configure();

    site.pull("app:1").expect("pulls from the second");

    // one:wrong, two:p2
    for (mirror, own) in [(&first, "Basic b25lOndyb25n"), (&second, "Basic dHdvOnAy")] {
        let asked = mirror.asked();
        let given = asked.iter().filter_map(|asked| asked.headers.get("authorization"));
        let given: std::collections::BTreeSet<&str> = given.map(String::as_str).collect();
        assert!(given.contains(own), "{given:?}");
        assert!(given.iter().all(|given| [own, "Bearer let-me-in"].contains(given)), "{given:?}");
    }
    assert!(second.blob_bytes() > MIB as u64);
    assert!(site.proxy.asked().is_empty());
}

#[test]
fn pull_takes_no_more_of_the_link_than_it_may() {
    if !have("pull_takes_no_more_of_the_link_than_it_may", "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-paced");
    site.push("app", &[MIB]);
    site.images.bandwidth = Some(MIB as u64);
    site.configure();

    let begun = std::time::Instant::now();
    site.pull("app:1").expect("pulls");

    assert!(begun.elapsed() >= std::time::Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[test]
fn identity_token_is_changed_for_one_that_opens_this_repository() {
    if !have("identity_token_is_changed_for_one_that_opens_this_repository", "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-identity");
    site.push("app", &[MIB]);
    site.proxy.want_tokens("nobody", "has-this");
    site.proxy.know_identity("refresh-me");
    let auths = json!({"auths": {site.proxy.host(): {"identitytoken": "refresh-me"}}}).to_string();
    site.images.docker_config = Some(site.dir.write("config.json", auths));
    site.configure();

    site.pull("app:1").expect("pulls");

    let asked = site.proxy.asked();
    assert_eq!(asked.iter().filter(|asked| asked.path == "/token").count(), 1);
    assert!(asked.iter().all(|asked| !asked.path.contains("refresh-me")), "it is in no address");
}

#[test]
fn whoever_a_registry_redirects_to_may_not_ask_for_its_password() {
    if !have("whoever_a_registry_redirects_to_may_not_ask_for_its_password", "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-phish");
    site.push("app", &[MIB]);
    let storage = Proxy::start(site.registry.port());
    storage.want_tokens("anybody", "at-all");
    site.proxy.want_tokens("gw", "secret");
    site.proxy.always(Some(Fault::Redirect(format!("http://{}", storage.host()))));
    let auths = json!({"auths": {site.proxy.host(): {"username": "gw", "password": "secret"}}}).to_string();
    site.images.docker_config = Some(site.dir.write("config.json", auths));
    site.images.insecure.push(storage.host());
    site.configure();

    let refused = site.refused("app:1");

    assert!(refused.contains(&format!("leads to {}, which refuses us", storage.host())), "{refused}");
    for asked in storage.asked() {
        assert!(!asked.headers.contains_key("authorization") && !asked.path.contains("token"), "{asked:?}");
    }
}

#[test]
fn index_in_an_index_leads_to_the_image_for_this_machine() {
    if !have("index_in_an_index_leads_to_the_image_for_this_machine", "docker-registry") {
        return;
    }
    let site = Site::new("pull-index");
    site.push("app", &[MIB]);
    let layout = std::fs::read(site.dir.join("app/index.json")).expect("a layout");
    let layout: serde_json::Value = serde_json::from_slice(&layout).expect("JSON");
    let (digest, size) = (&layout["manifests"][0]["digest"], &layout["manifests"][0]["size"]);
    let here = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    // The same manifest for the other machine: what counts is which entry is chosen.
    let entry = |architecture: &str| {
        json!({"mediaType": MANIFEST, "digest": digest, "size": size,
            "platform": {"os": "linux", "architecture": architecture}})
    };
    let put = |reference: &str, manifests: serde_json::Value| {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).to_string();
        let sum = site.dir.write("index", &index);
        let sum = run(Command::new("sha256sum").arg(sum))[..64].to_owned();
        let reference = if reference.is_empty() { format!("sha256:{sum}") } else { reference.to_owned() };
        site.registry.put_manifest("app", &reference, INDEX, &index);
        json!({"mediaType": INDEX, "digest": format!("sha256:{sum}"), "size": index.len()})
    };
    let inner = put("", json!([entry("s390x"), entry(here)]));
    let outer = put("many", json!([inner]));
    put("foreign", json!([entry("s390x")]));

    let pulled = site.pull("app:many").expect("pulls");
    let outer = outer["digest"].as_str().expect("a digest");
    let pinned = site.pull(&format!("app@{outer}")).expect("pulls by the index's digest");
    let foreign = site.refused("app:foreign");

    assert_eq!(Some(pulled.digest.as_str()), digest.as_str());
    assert_eq!(pinned.digest, pulled.digest);
    assert!(foreign.contains("s390x") && foreign.contains(here), "{foreign}");
}

#[test]
fn nothing_is_asked_outside_of_the_window() {
    if !have("nothing_is_asked_outside_of_the_window", "docker-registry") {
        return;
    }
    let mut site = Site::new("pull-window");
    site.push("app", &[MIB]);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let minute = |later: u64| ((now.as_secs() / 60 + later) % 1440) as u16;
    site.images.window = Some(DayWindow { from: minute(120), until: minute(180) });
    site.configure();

    let mut pull = site.store.pull(&site.name("app:1"), Patience::Bounded).expect("is taken");
    let waits = async {
        loop {
            if let Progress::Waiting { why, ms } = pull.next().await
                && why.contains("window")
            {
                return ms;
            }
        }
    };
    let driving = async {
        site.store.drive().await;
        unreachable!("it goes on for ever")
    };
    let ms = smol::block_on(smol::future::or(waits, driving));
    drop(pull);

    assert!((118 * 60_000..=120 * 60_000).contains(&ms), "{ms}");
    assert!(site.proxy.asked().is_empty());
    site.images.window = Some(DayWindow { from: minute(1380), until: minute(120) });
    site.configure();
    site.pull("app:1").expect("pulls within it");
}
