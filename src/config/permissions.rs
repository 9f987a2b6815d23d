//! What a manifest permits: `secrets` and `[allow]`.

use super::problem::shown;
use super::reader::{Keys, Section};
use crate::model::function::Handler;
use crate::model::permissions::{
    Allow, Capability, DEVICES_MAX, Network, Permissions, SECRETS_MAX, SecretName,
};
use toml::de::DeValue;

pub(super) const ALLOW: Keys =
    Keys { now: &["network", "to", "devices", "writable", "capabilities"], later: &[] };

/// As a path below /dev: longer than any that udev makes.
const DEVICE_BYTES_MAX: usize = 255;
/// What every function has there.
const DEVICES_OF_ALL: [&str; 6] = ["null", "zero", "full", "tty", "random", "urandom"];
/// What neap or libcontainer puts there.
const TAKEN: [&str; 8] = ["shm", "fd", "stdin", "stdout", "stderr", "core", "ptmx", "pts"];

pub(super) fn permissions(root: &Section<'_>, handler: Handler) -> Permissions {
    Permissions { secrets: secrets(root), allow: allow(root, handler) }
}

fn secrets(root: &Section<'_>) -> Vec<SecretName> {
    let mut secrets = Vec::new();
    for (text, span) in root.strings("secrets").unwrap_or_default() {
        match SecretName::parse(text) {
            Ok(name) if secrets.contains(&name) => {
                root.bad_at(&span, "secrets", format!("{} is there twice", shown(text)));
            }
            Ok(name) => secrets.push(name),
            Err(bad) => root.bad_at(&span, "secrets", bad),
        }
    }
    if secrets.len() > SECRETS_MAX {
        root.bad("secrets", format!("more than {SECRETS_MAX}"));
    }
    secrets
}

fn allow(root: &Section<'_>, handler: Handler) -> Allow {
    let Some(section) = root.table("allow", ALLOW) else { return Allow::default() };
    let networks = [("none", Network::None), ("host", Network::Host)];
    let network = section.choice("network", &networks, &["egress"]).unwrap_or_default();
    section.only("to", "[]", |value: &DeValue<'_>| value.as_array().is_some_and(|list| list.is_empty()));
    if network == Network::Host && handler.stays_up() {
        // Its port would be the node's, one for all its instances and revisions.
        let word = handler.word();
        section.wrong_in(
            "network",
            format!("not in this version: allow.network = \"host\" with handler {word:?}"),
        );
    }
    let capabilities = capabilities(&section);
    if network == Network::Host
        && let Some(useless) = capabilities.iter().find(|c| c.as_str().starts_with("NET_"))
    {
        let useless = useless.as_str();
        section.bad(
            "capabilities",
            format!("{useless:?} is good for a network of the function's own: with network = \"host\" it gives nothing"),
        );
    }
    Allow {
        network,
        devices: devices(&section),
        writable: section.bool("writable").unwrap_or(false),
        capabilities,
    }
}

fn capabilities(section: &Section<'_>) -> Vec<Capability> {
    let mut capabilities = Vec::new();
    for (text, span) in section.strings("capabilities").unwrap_or_default() {
        match Capability::parse(text) {
            Ok(one) if capabilities.contains(&one) => {
                section.bad_at(&span, "capabilities", format!("{} is there twice", shown(text)));
            }
            Ok(one) => capabilities.push(one),
            Err(bad) => section.bad_at(&span, "capabilities", bad),
        }
    }
    capabilities
}

fn devices(section: &Section<'_>) -> Vec<String> {
    let mut devices: Vec<String> = Vec::new();
    for (text, span) in section.strings("devices").unwrap_or_default() {
        match device(text, &devices) {
            Ok(()) => devices.push(text.to_owned()),
            Err(why) => section.bad_at(&span, "devices", format!("{} {why}", shown(text))),
        }
    }
    if devices.len() > DEVICES_MAX {
        section.bad("devices", format!("more than {DEVICES_MAX}"));
    }
    devices
}

fn device(text: &str, before: &[String]) -> Result<(), String> {
    let below = text.strip_prefix("/dev/").filter(|below| !below.is_empty());
    let Some(below) = below else { return Err("is no path below /dev".to_owned()) };
    let mut parts = below.split('/');
    if parts.any(|part| matches!(part, "" | "." | "..")) || text.contains('\0') {
        return Err("is no plain path: without `.`, `..`, `//` and NUL".to_owned());
    }
    if text.len() > DEVICE_BYTES_MAX {
        return Err(format!("has more than {DEVICE_BYTES_MAX} bytes"));
    }
    let first = below.split('/').next().unwrap_or_default();
    if DEVICES_OF_ALL.contains(&below) {
        return Err("is there for every function".to_owned());
    }
    if DEVICES_OF_ALL.contains(&first) || TAKEN.contains(&first) {
        return Err(format!("can't be: /dev/{first} is each function's own"));
    }
    let within =
        |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    match before.iter().find(|other| within(text, other) || within(other, text)) {
        Some(other) if other == text => Err("is there twice".to_owned()),
        Some(other) => Err(format!("and {} can't both be", shown(other))),
        None => Ok(()),
    }
}
