//! What a manifest permits a function beyond the nothing that it starts with.

use super::reach::{Host, Reach};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// `[-._a-zA-Z0-9]`, not beginning with a dot; a file's name.
pub const SECRET_NAME_BYTES_MAX: usize = 63;
/// A private key with its certificate chain is a quarter of it. What is larger belongs in an image
/// or a volume: a function's secrets lie in memory.
pub const SECRET_BYTES_MAX: u64 = 64 * 1024;
/// For one function.
pub const SECRETS_MAX: usize = 16;
/// Ports and buses of one function.
pub const DEVICES_MAX: usize = 16;
/// Below data_dir.
pub const SECRETS_DIR: &str = "secrets";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permissions {
    /// Files that the node keeps and the function may read.
    pub secrets: Vec<SecretName>,
    pub allow: Allow,
    /// Directories that survive instances and revisions.
    #[serde(rename = "volume")]
    pub volumes: Vec<Volume>,
    /// Directories of the node, to be read.
    pub node_volumes: Vec<NodeVolume>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// `[a-z0-9]([-a-z0-9]*[a-z0-9])?`, among the function's own.
    pub name: String,
    /// Where the function has it: absolute, plain.
    pub path: String,
    pub max_bytes: u64,
}

/// A directory that the node has, and that its configuration lets functions mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeVolume {
    /// One of `node.mounts`.
    pub within: PathBuf,
    /// From there: plain names, or none.
    pub below: PathBuf,
    /// Where the function has it: absolute, plain.
    pub path: String,
}

impl NodeVolume {
    pub fn from(&self) -> PathBuf {
        self.within.join(&self.below)
    }
}

/// Of one function, of both kinds.
pub const VOLUMES_MAX: usize = 8;
/// Below data_dir, a directory for each function.
pub const VOLUMES_DIR: &str = "volumes";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allow {
    pub network: Network,
    /// With a way out, where to; empty: everywhere.
    pub to: Vec<Reach>,
    /// Paths below /dev.
    pub devices: Vec<String>,
    /// A root that it can write, fresh for each instance.
    pub writable: bool,
    pub capabilities: Vec<Capability>,
}

impl Allow {
    /// Whether names are any good to the function: it may go everywhere, or where a name leads.
    pub fn asks_for_names(&self) -> bool {
        self.network == Network::Egress
            && (self.to.is_empty() || self.to.iter().any(|reach| matches!(reach.host, Host::Name(_))))
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Its own loopback.
    #[default]
    None,
    /// Its own loopback and a way out, through the node.
    Egress,
    /// The node's.
    Host,
}

/// Of capabilities(7), within the function's user namespace; `NET_RAW`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Capability(String);

/// Docker's default set, without those that give nothing in a user namespace (MKNOD, AUDIT_WRITE)
/// and the one whose system call the seccomp filter refuses (SYS_CHROOT).
pub const CAPABILITIES: [&str; 11] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
];

/// The others of Docker's default set, and why they are none of ours.
const POINTLESS: [(&str, &str); 3] = [
    ("MKNOD", "makes no devices in a user namespace; name them in allow.devices"),
    ("AUDIT_WRITE", "gives nothing in a user namespace"),
    ("SYS_CHROOT", "is of no use: the seccomp filter refuses chroot"),
];

impl Capability {
    /// With or without `CAP_`, as docker takes them.
    pub fn parse(text: &str) -> Result<Self, String> {
        let name = text.strip_prefix("CAP_").unwrap_or(text);
        if CAPABILITIES.contains(&name) {
            return Ok(Self(name.to_owned()));
        }
        let shown: String = text.chars().take(40).collect();
        Err(match POINTLESS.iter().find(|(other, _)| *other == name) {
            Some((_, why)) => format!("{shown:?} {why}"),
            None => {
                format!("{shown:?} is not among those that a function can have: {}", CAPABILITIES.join(", "))
            }
        })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a secret is called: by `neap secret`, in manifests, as a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretName(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no secret's name: letters, digits and `-._`, at most {SECRET_NAME_BYTES_MAX}, not beginning with a dot"
)]
pub struct BadSecretName(String);

impl SecretName {
    pub fn parse(text: &str) -> Result<Self, BadSecretName> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        let is_good = (1..=SECRET_NAME_BYTES_MAX).contains(&text.len())
            && text.bytes().all(good)
            && !text.starts_with('.');
        if is_good {
            Ok(Self(text.to_owned()))
        } else {
            // Somebody may have typed the secret itself in its name's place: not all of it.
            Err(BadSecretName(text.chars().take(16).collect()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_dockers_without_those_that_give_nothing() {
        for good in ["NET_RAW", "CAP_NET_RAW"] {
            assert_eq!(Capability::parse(good).map(|c| c.as_str().to_owned()), Ok("NET_RAW".to_owned()));
        }
        for (bad, why) in [
            ("SYS_ADMIN", "is not among those"),
            ("net_raw", "is not among those"),
            ("ALL", "is not among those"),
            ("CAP_MKNOD", "allow.devices"),
            ("", "is not among those"),
        ] {
            let told = Capability::parse(bad).expect_err(bad);
            assert!(told.contains(why), "{told}");
        }
    }

    #[test]
    fn names_of_secrets_are_names_of_files_in_one_directory() {
        for good in ["a", "api-key", "tls.crt", "A_1", "-x", &"x".repeat(63)] {
            assert!(SecretName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".hidden", "a/b", "a b", "ä", "a\0", "a\n", &"x".repeat(64)] {
            assert!(SecretName::parse(bad).is_err(), "{bad:?}");
        }
    }
}
