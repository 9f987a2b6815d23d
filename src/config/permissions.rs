//! What a manifest permits: `secrets`.

use super::problem::shown;
use super::reader::Section;
use crate::model::permissions::{Permissions, SECRETS_MAX, SecretName};

pub(super) fn permissions(root: &Section<'_>) -> Permissions {
    Permissions { secrets: secrets(root) }
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
