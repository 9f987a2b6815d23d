//! What a manifest permits a function beyond the nothing that it starts with.

use serde::{Deserialize, Serialize};
use std::fmt;

/// `[-._a-zA-Z0-9]`, not beginning with a dot; a file's name.
pub const SECRET_NAME_BYTES_MAX: usize = 63;
/// A private key with its certificate chain is a quarter of it. What is larger belongs in an image
/// or a volume: a function's secrets lie in memory.
pub const SECRET_BYTES_MAX: u64 = 64 * 1024;
/// For one function.
pub const SECRETS_MAX: usize = 16;
/// Below data_dir.
pub const SECRETS_DIR: &str = "secrets";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permissions {
    /// Files that the node keeps and the function may read.
    pub secrets: Vec<SecretName>,
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
    fn names_of_secrets_are_names_of_files_in_one_directory() {
        for good in ["a", "api-key", "tls.crt", "A_1", "-x", &"x".repeat(63)] {
            assert!(SecretName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".hidden", "a/b", "a b", "ä", "a\0", "a\n", &"x".repeat(64)] {
            assert!(SecretName::parse(bad).is_err(), "{bad:?}");
        }
    }
}
