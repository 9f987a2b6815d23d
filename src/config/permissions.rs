//! What a manifest permits: `secrets`, `[allow]` and `[[volume]]`.

use super::problem::shown;
use super::reader::{Keys, Section};
use crate::model::FunctionName;
use crate::model::function::Handler;
use crate::model::permissions::{
    Allow, Capability, DEVICES_MAX, Network, NodeVolume, Permissions, SECRETS_MAX, SecretName, VOLUMES_MAX,
    Volume,
};
use crate::model::reach::{REACHES_MAX, Reach};
use std::path::{Path, PathBuf};

pub(super) const ALLOW: Keys =
    Keys { now: &["network", "to", "devices", "writable", "capabilities"], later: &[] };

pub(super) const VOLUME: Keys = Keys { now: &["name", "path", "max", "from"], later: &[] };

/// Below, ext4 has no journal, and a power cut could spoil it.
const VOLUME_BYTES_MIN: u64 = 4 << 20;
/// No gateway has more; a bound against a slip of the unit.
const VOLUME_BYTES_MAX: u64 = 1 << 40;
/// Of a path, as the kernel takes them with its end.
const PATH_BYTES_MAX: usize = 255;
/// What is each instance's own, or neap's.
const OWN: [&str; 5] = ["/proc", "/dev", "/tmp", "/run/secrets", "/var/openfaas/secrets"];

/// As a path below /dev: longer than any that udev makes.
const DEVICE_BYTES_MAX: usize = 255;
/// What every function has there.
const DEVICES_OF_ALL: [&str; 6] = ["null", "zero", "full", "tty", "random", "urandom"];
/// What neap or libcontainer puts there.
const TAKEN: [&str; 8] = ["shm", "fd", "stdin", "stdout", "stderr", "core", "ptmx", "pts"];

/// `mounts`: what the node lets functions mount of its own.
pub(super) fn permissions(root: &Section<'_>, handler: Handler, mounts: &[PathBuf]) -> Permissions {
    let (volumes, node_volumes) = volumes(root, mounts);
    Permissions { secrets: secrets(root), allow: allow(root, handler), volumes, node_volumes }
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
    let networks = [("none", Network::None), ("egress", Network::Egress), ("host", Network::Host)];
    let network = section.choice("network", &networks, &[]).unwrap_or_default();
    let to = to(&section);
    if network != Network::Egress && !to.is_empty() {
        section.bad("to", "narrows network = \"egress\", and is good for nothing without it");
    }
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
        to,
        devices: devices(&section),
        writable: section.bool("writable").unwrap_or(false),
        capabilities,
    }
}

fn to(section: &Section<'_>) -> Vec<Reach> {
    let mut to = Vec::new();
    for (text, span) in section.strings("to").unwrap_or_default() {
        match Reach::parse(text) {
            Ok(reach) if to.contains(&reach) => {
                section.bad_at(&span, "to", format!("{} is there twice", shown(text)));
            }
            Ok(reach) => to.push(reach),
            Err(why) => section.bad_at(&span, "to", format!("{} {why}", shown(text))),
        }
    }
    if to.len() > REACHES_MAX {
        section.bad("to", format!("more than {REACHES_MAX}"));
    }
    to
}

fn volumes(root: &Section<'_>, mounts: &[PathBuf]) -> (Vec<Volume>, Vec<NodeVolume>) {
    let mut volumes: Vec<Volume> = Vec::new();
    let mut node_volumes: Vec<NodeVolume> = Vec::new();
    let sections = root.tables("volume", VOLUME);
    if let Some(one_more) = sections.get(VOLUMES_MAX) {
        one_more.wrong(format!("more than {VOLUMES_MAX} volumes"));
    }
    for section in sections {
        let is_nodes = section.has("from");
        let keys: &[&str] = if is_nodes { &["path"] } else { &["name", "path", "max"] };
        for key in keys.iter().filter(|key| !section.has(key)) {
            section.missing(format!("{} is missing", section.name(key)));
        }
        let path = section.parsed("path", volume_path);
        if let Some(path) = &path {
            // One inside another would be mounted where the function could have put a symlink.
            let others = volumes.iter().map(|other| &other.path);
            let mut others = others.chain(node_volumes.iter().map(|other| &other.path));
            if let Some(other) = others.find(|other| nested(other, path)) {
                section.bad("path", format!("{} and {} can't both be", shown(path), shown(other)));
            }
        }
        if is_nodes {
            for key in ["name", "max"].into_iter().filter(|key| section.has(key)) {
                section.bad(key, "does not go with from: a directory of the node has its own name and size");
            }
            let from = section.parsed("from", |text| of_the_node(text, mounts));
            if let (Some((within, below)), Some(path)) = (from, path) {
                node_volumes.push(NodeVolume { within, below, path });
            }
            continue;
        }
        let name = section.parsed("name", FunctionName::parse);
        let max_bytes = section.size("max", VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX);
        let (Some(name), Some(path), Some(max_bytes)) = (name, path, max_bytes) else { continue };
        let volume = Volume { name: name.to_string(), path, max_bytes };
        if volumes.iter().any(|other| other.name == volume.name) {
            section.bad("name", format!("{} is there twice", shown(&volume.name)));
        }
        volumes.push(volume);
    }
    (volumes, node_volumes)
}

/// Which of the directories that functions may mount it is in, and where. The longest: what is
/// above it may be somebody else's to change.
fn of_the_node(text: &str, mounts: &[PathBuf]) -> Result<(PathBuf, PathBuf), String> {
    plain(text)?;
    let within = mounts.iter().filter(|within| Path::new(text).starts_with(within));
    if let Some(within) = within.max_by_key(|within| within.as_os_str().len()) {
        let below = Path::new(text).strip_prefix(within).unwrap_or(Path::new(""));
        return Ok((within.clone(), below.to_owned()));
    }
    let shown = shown(text);
    if mounts.is_empty() {
        let what = "can't be mounted: this node lets functions mount none of its directories";
        return Err(format!("{shown} {what}; name it, or one above it, in node.mounts of neap.toml"));
    }
    let mounts: Vec<_> = mounts.iter().map(|within| within.display().to_string()).collect();
    let mounts = mounts.join(", ");
    Err(format!(
        "{shown} is in none of the directories that functions may mount: {mounts} (node.mounts in neap.toml)"
    ))
}

/// What a name leads to can't be told by it otherwise.
pub(super) fn plain(text: &str) -> Result<(), String> {
    let parts = text.strip_prefix('/').unwrap_or_default().split('/');
    if !text.starts_with('/')
        || text.contains('\0')
        || parts.into_iter().any(|part| matches!(part, "" | "." | ".."))
    {
        return Err(format!("{} is no plain absolute path below /", shown(text)));
    }
    if text.len() > PATH_BYTES_MAX {
        return Err(format!("{} has more than {PATH_BYTES_MAX} bytes", shown(text)));
    }
    Ok(())
}

fn volume_path(text: &str) -> Result<String, String> {
    plain(text)?;
    match OWN.iter().find(|own| nested(own, text)) {
        Some(own) => Err(format!("{} can't be: {own} is each instance's own", shown(text))),
        None => Ok(text.to_owned()),
    }
}

/// Whether one of two paths is the other or above it.
pub(super) fn nested(a: &str, b: &str) -> bool {
    let within =
        |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    within(a, b) || within(b, a)
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
    match before.iter().find(|other| nested(text, other)) {
        Some(other) if other == text => Err("is there twice".to_owned()),
        Some(other) => Err(format!("and {} can't both be", shown(other))),
        None => Ok(()),
    }
}
