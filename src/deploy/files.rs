//! functions_dir: every `*.toml` in it is a function that belongs to its file.

use super::Deployer;
use crate::channels::{DeployError, Reloaded};
use crate::config::{Config, TEXT_BYTES_MAX};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

impl Deployer {
    /// Deploys what changed in functions_dir and removes what went.
    pub(super) async fn reconcile_files(&self, config: &Config) -> Reloaded {
        let mut result = Reloaded::default();
        let dir = &config.node.functions_dir;
        let files = match manifest_files(dir) {
            Ok(files) => files,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let owned = self.routes.get().functions.values().any(|function| function.file.is_some());
                if owned {
                    result
                        .problems
                        .push(format!("{}: {error}; its functions stay as they are", dir.display()));
                }
                return result;
            }
            Err(error) => {
                result.problems.push(format!("{}: {error}; its functions stay as they are", dir.display()));
                return result;
            }
        };
        let mut owned_now = BTreeSet::new();
        for file in &files {
            let shown = file.display().to_string();
            let text = match read_manifest(file) {
                Ok(text) => text,
                Err(error) => {
                    result.problems.push(format!("{shown}: {error}"));
                    continue;
                }
            };
            match self.deploy(&shown, &text, Some(file)).await {
                Ok(deployed) => {
                    owned_now.insert(deployed.name.clone());
                    if deployed.changed {
                        result.deployed.push(deployed);
                    }
                }
                Err(DeployError::Invalid(lines)) => result.problems.extend(lines),
                Err(error) => {
                    result.problems.push(format!("{shown}: {}", crate::errors::chain(&error)));
                }
            }
        }
        let functions = self.routes.get();
        let gone = functions.functions.iter().filter(|(name, deployment)| {
            let file_gone = deployment.file.as_ref().is_some_and(|file| !files.contains(file));
            file_gone && !owned_now.contains(name.as_str())
        });
        for name in gone.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            match self.remove(&name).await {
                Ok(_) => result.removed.push(name.to_string()),
                Err(error) => {
                    result.problems.push(format!("remove `{name}`: {}", crate::errors::chain(&error)))
                }
            }
        }
        result
    }
}

/// Every `*.toml` in `dir`, sorted by name.
pub fn manifest_files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if path.extension().is_some_and(|end| end == "toml") && !hidden {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read_manifest(file: &Path) -> std::io::Result<String> {
    let bytes = std::fs::metadata(file)?.len();
    if bytes > TEXT_BYTES_MAX as u64 {
        let text = format!("{bytes} bytes are more than a manifest may have ({TEXT_BYTES_MAX})");
        return Err(std::io::Error::other(text));
    }
    std::fs::read_to_string(file)
}
