//! Whose images are taken: `[trust]` names repositories and the keys that must have signed them.
//!
//! Verified without a network, with the keys alone: no transparency log, no certificate. The
//! signature is cosign's "simple signing" one: JSON that names a repository and a digest, signed.
//! Both must be the image's: a signature for another name is an attacker's way to pass one
//! image off as another.
//!
//! A decision is made before layers are fetched or unpacked and recorded with the image; a deploy
//! looks it up again, so that an image can't be brought in under a name that nobody guards.

mod cosign;
mod key;

pub use cosign::{Signature, is_signature, signatures, tag};
pub use key::Key;

use super::ImageError;
use super::limits::refuse;
use crate::config::images::{Requirement, Trust};
use crate::model::{Digest, Reference, UnixMs};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// `[trust]` with its keys read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Trusted {
    rules: Trust,
    keys: BTreeMap<PathBuf, String>,
}

/// What was found when an image came in under a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    pub reference: Reference,
    pub at: UnixMs,
    /// `None`: no rule asked for a signature.
    pub signed: Option<Signed>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// The key's file when it was verified.
    pub key: PathBuf,
    /// SHA-256 of the key itself.
    pub fingerprint: Digest,
    /// What the signature is on: the image's manifest or the index that led to it.
    pub digest: Digest,
}

impl std::fmt::Display for Decision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.signed {
            None => write!(f, "{}: no rule asked for a signature ({})", self.reference, self.at),
            Some(Signed { key, digest, .. }) => {
                let key = key.display();
                write!(f, "{}: signed by {key}, verified on {digest} ({})", self.reference, self.at)
            }
        }
    }
}

impl Trusted {
    /// Reads every key that the rules name. One that can't be read refuses what needs it.
    pub fn read(rules: &Trust) -> Self {
        let paths = rules.rules.iter().flat_map(|rule| &rule.keys);
        let text = |path: &PathBuf| Some((path.clone(), key::read(path)?));
        Self { rules: rules.clone(), keys: paths.filter_map(text).collect() }
    }

    /// Nothing is asked of any image.
    pub fn everything() -> Self {
        Self { rules: crate::config::defaults::trust(), keys: BTreeMap::new() }
    }

    /// Whether signatures are needed at all; they are not fetched for nothing.
    pub fn asks(&self, reference: &Reference) -> bool {
        matches!(self.rules.requirement(reference), Requirement::Signature(_))
    }

    /// `digests`: of the image and of the indexes that led to it.
    pub fn judge(
        &self,
        reference: &Reference,
        digests: &[Digest],
        signatures: &[Signature],
        at: UnixMs,
    ) -> Result<Decision, ImageError> {
        let keys = match self.rules.requirement(reference) {
            Requirement::Nothing => return Ok(Decision { reference: reference.clone(), at, signed: None }),
            Requirement::Refused => return Err(unnamed(reference)),
            Requirement::Signature(keys) => keys,
        };
        let (usable, unusable) = self.usable(keys);
        let mut why: Vec<String> = unusable;
        for signature in signatures {
            match signature.verify(reference, digests, &usable) {
                Ok((key, digest)) => {
                    let (key, fingerprint) = (key.path.clone(), key.fingerprint());
                    let signed = Some(Signed { key, fingerprint, digest });
                    return Ok(Decision { reference: reference.clone(), at, signed });
                }
                Err(text) => why.push(text),
            }
        }
        if signatures.is_empty() {
            why.push("it has no signature".to_owned());
        }
        why.dedup();
        Err(refuse(format!("{}: {}", expected(reference, keys), why.join("; "))))
    }

    /// Whether the image that was taken under `decisions` may be deployed as `reference`.
    pub fn recall(&self, reference: &Reference, decisions: &[Decision]) -> Result<(), ImageError> {
        let keys = match self.rules.requirement(reference) {
            Requirement::Nothing => return Ok(()),
            Requirement::Refused => return Err(unnamed(reference)),
            Requirement::Signature(keys) => keys,
        };
        let (usable, unusable) = self.usable(keys);
        let good = |decision: &Decision| {
            let signed = decision.signed.as_ref();
            decision.reference.repository() == reference.repository()
                && signed.is_some_and(|s| usable.iter().any(|key| key.fingerprint() == s.fingerprint))
        };
        if decisions.iter().any(good) {
            return Ok(());
        }
        let mut text = expected(reference, keys);
        text.push_str(": it came here without one; pull or import it again with its signature");
        for why in unusable {
            text.push_str(&format!("; {why}"));
        }
        Err(refuse(text))
    }

    fn usable(&self, paths: &[PathBuf]) -> (Vec<Key>, Vec<String>) {
        let (mut usable, mut unusable) = (Vec::new(), Vec::new());
        for path in paths {
            match self.keys.get(path).map(|text| Key::parse(path, text)) {
                Some(Ok(key)) => usable.push(key),
                Some(Err(text)) => unusable.push(text),
                None => unusable.push(format!("key {} can't be read", path.display())),
            }
        }
        (usable, unusable)
    }
}

fn expected(reference: &Reference, keys: &[PathBuf]) -> String {
    let shown = |path: &Path| path.display().to_string();
    let keys: Vec<String> = keys.iter().map(|key| shown(key)).collect();
    format!("image `{reference}` needs a cosign signature by {}", keys.join(" or "))
}

fn unnamed(reference: &Reference) -> ImageError {
    refuse(format!("no rule in [trust] names image `{reference}`, and the default is to refuse"))
}
