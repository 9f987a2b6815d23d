//! How images are named: a digest is the content, a reference is what people call it.

use serde::{Deserialize, Serialize};
use std::fmt;

/// `sha256:` and 64 lower-case hex digits; no other algorithm is taken (OCI image-spec,
/// descriptor.md, registers sha512 too, which no registry in the field uses).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Digest(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a digest of the form sha256:<64 hex digits>: {0:?}")]
pub struct BadDigest(pub String);

impl Digest {
    pub fn parse(text: &str) -> Result<Self, BadDigest> {
        let good = text.strip_prefix("sha256:").is_some_and(|hex| {
            hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        });
        if good { Ok(Self(text.to_owned())) } else { Err(BadDigest(text.chars().take(100).collect())) }
    }

    pub fn from_sha256(hash: &[u8]) -> Self {
        use fmt::Write;
        let mut text = String::from("sha256:");
        for byte in hash {
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 hex digits, for file names.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    /// The first 12 hex digits, for people.
    pub fn short(&self) -> &str {
        &self.hex()[..12]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// An image reference normalised as docker does: `busybox` is
/// `docker.io/library/busybox:latest`; `name@sha256:…` pins a digest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Reference(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an image reference such as thermostat:1 or registry.example:5000/team/thermostat:1: {0:?}")]
pub struct BadReference(pub String);

impl Reference {
    /// Grammar: distribution/reference (lower-case path components, tag of 128, optional digest).
    pub fn parse(text: &str) -> Result<Self, BadReference> {
        let bad = || BadReference(text.chars().take(200).collect());
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(Digest::parse(digest).map_err(|_| bad())?)),
            None => (text, None),
        };
        let (path, tag) = match name.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (name, None),
        };
        if let Some(tag) = tag {
            let first = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
            let rest = |b: u8| first(b) || b == b'.' || b == b'-';
            let good = (1..=128).contains(&tag.len()) && first(tag.as_bytes()[0]) && tag.bytes().all(rest);
            if !good {
                return Err(bad());
            }
        }
        let (host, path) = match path.split_once('/') {
            Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
            _ => ("docker.io", path),
        };
        let (host_name, port_good) = match host.rsplit_once(':') {
            Some((name, port)) if !port.ends_with(']') => (name, port.parse::<u16>().is_ok()),
            _ => (host, true),
        };
        let host_letter = |b: u8| b.is_ascii_alphanumeric() || b".-:[]".contains(&b);
        let host_good = port_good && !host_name.is_empty() && host_name.bytes().all(host_letter);
        let part_good = |part: &str| {
            let edge = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
            let bytes = part.as_bytes();
            !bytes.is_empty()
                && edge(&bytes[0])
                && edge(&bytes[bytes.len() - 1])
                && bytes.iter().all(|b| edge(b) || b"._-".contains(b))
        };
        if !host_good || text.len() > 512 || !path.split('/').all(part_good) {
            return Err(bad());
        }
        let library = if host == "docker.io" && !path.contains('/') { "library/" } else { "" };
        let mut full = format!("{host}/{library}{path}");
        match (tag, &digest) {
            (Some(tag), _) => full.extend([":", tag]),
            (None, None) => full.push_str(":latest"),
            (None, Some(_)) => {}
        }
        if let Some(digest) = digest {
            full.extend(["@", digest.as_str()]);
        }
        Ok(Self(full))
    }

    /// The full form.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The pinned digest, if the reference names one.
    pub fn digest(&self) -> Option<Digest> {
        self.0.split_once('@').and_then(|(_, digest)| Digest::parse(digest).ok())
    }

    /// Registry and path, without tag and digest: what a signature speaks of.
    pub fn repository(&self) -> &str {
        let name = self.0.split_once('@').map_or(self.0.as_str(), |(name, _)| name);
        match name.rsplit_once(':') {
            Some((repository, tag)) if !tag.contains('/') => repository,
            _ => name,
        }
    }

    /// The registry's host, with its port if it names one.
    pub fn registry(&self) -> &str {
        self.0.split_once('/').map_or("", |(host, _)| host)
    }

    /// What the registry calls it.
    pub fn path(&self) -> &str {
        self.repository().split_once('/').map_or("", |(_, path)| path)
    }

    /// `None`: the digest alone says which.
    pub fn tag(&self) -> Option<&str> {
        let name = self.0.split_once('@').map_or(self.0.as_str(), |(name, _)| name);
        name[self.repository().len()..].strip_prefix(':')
    }

    /// The same repository at one digest.
    pub fn at(&self, digest: &Digest) -> Self {
        Self(format!("{}@{digest}", self.repository()))
    }

    /// As people write it: without `docker.io/library/`.
    pub fn familiar(&self) -> &str {
        let short = self.0.strip_prefix("docker.io/").unwrap_or(&self.0);
        short.strip_prefix("library/").unwrap_or(short)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.familiar())
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_normalised_as_docker_does() {
        let full = |text: &str| Reference::parse(text).map(|r| r.as_str().to_owned());
        assert_eq!(full("busybox").as_deref(), Ok("docker.io/library/busybox:latest"));
        assert_eq!(full("a/b:1").as_deref(), Ok("docker.io/a/b:1"));
        assert_eq!(full("localhost:5000/x").as_deref(), Ok("localhost:5000/x:latest"));
        let pinned = format!("x@sha256:{}", "a".repeat(64));
        assert_eq!(full(&pinned), Ok(format!("docker.io/library/{pinned}")));
        for bad in ["", "UPPER", "a b", "x:", "x:/y", "x@sha256:1", "/x", "x//y", "x:\u{e9}"] {
            assert!(full(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn parts_of_a_reference_are_told_apart() {
        let parts = |text: &str| {
            let r = Reference::parse(text).expect("a reference");
            (r.registry().to_owned(), r.path().to_owned(), r.tag().map(str::to_owned))
        };
        assert_eq!(parts("busybox"), ("docker.io".into(), "library/busybox".into(), Some("latest".into())));
        assert_eq!(parts("[::1]:5000/a/b:c"), ("[::1]:5000".into(), "a/b".into(), Some("c".into())));
        let pinned = format!("h:1/x@sha256:{}", "a".repeat(64));
        assert_eq!(parts(&pinned), ("h:1".into(), "x".into(), None));
        let both = Reference::parse(&format!("h:1/x:2@sha256:{}", "a".repeat(64))).expect("a reference");
        assert_eq!((both.repository(), both.tag()), ("h:1/x", Some("2")));
    }

    #[test]
    fn familiar_form_leaves_dockers_defaults_out() {
        let shown = |text: &str| Reference::parse(text).map(|r| r.to_string());
        assert_eq!(shown("thermostat:1").as_deref(), Ok("thermostat:1"));
        assert_eq!(shown("ghcr.io/a/b:1").as_deref(), Ok("ghcr.io/a/b:1"));
    }
}
