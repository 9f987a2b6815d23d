//! functions_dir: every `*.toml` in it is a function that belongs to its file.

use super::switch::Source;
use super::{Ahead, Deployer, Why};
use crate::channels::{DeployError, Deployed, Reloaded};
use crate::config::{self, TEXT_BYTES_MAX};
use crate::model::function::Pull;
use crate::model::{FunctionName, Reference};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

/// Functions whose code is waited for together; their manifests are in memory meanwhile.
const FILES_AT_ONCE: usize = 16;

impl Deployer {
    /// Deploys what changed in functions_dir and removes what went, the latter at a reload alone.
    /// Images that are missing are noted, and asked for by whoever called.
    pub(super) async fn reconcile_files(self: &Arc<Self>, why: Why) -> Reloaded {
        let mut lacking = BTreeMap::new();
        let mut result = Reloaded::default();
        let config = self.config.get();
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
        let ahead = if why == Why::Boot { Ahead::Parked } else { Ahead::Ready };
        let mut failed = false;
        let mut told = |shown: &str, deployed| match deployed {
            Ok(Deployed { changed: false, .. }) => {}
            Ok(deployed) => result.deployed.push(deployed),
            Err(error) => {
                failed = true;
                match error {
                    DeployError::Invalid(lines) => result.problems.extend(lines),
                    error => result.problems.push(format!("{shown}: {}", crate::errors::chain(&error))),
                }
            }
        };
        let mut under_way: VecDeque<(String, smol::Task<_>)> = VecDeque::new();
        for file in &files {
            if under_way.len() == FILES_AT_ONCE
                && let Some((shown, deploying)) = under_way.pop_front()
            {
                told(&shown, deploying.await);
            }
            let shown = file.display().to_string();
            let text = read_manifest(file);
            if let Ok(text) = &text {
                lacking.extend(self.lacked_by(&shown, text, why));
            }
            let (this, name, file) = (self.clone(), shown.clone(), file.clone());
            let deploy = async move {
                let text = text.map_err(|error| DeployError::Invalid(vec![format!("{name}: {error}")]))?;
                let source = Source { file: &name, text: &text, owner: Some(&file), pinned: None };
                this.deploy(source, ahead).await
            };
            under_way.push_back((shown, self.executor.spawn(deploy)));
        }
        for (shown, deploying) in under_way {
            told(&shown, deploying.await);
        }
        let functions = self.routes.get();
        let gone = functions
            .functions
            .iter()
            .filter(|(_, deployment)| deployment.file.as_ref().is_some_and(|file| !files.contains(file)));
        for name in gone.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            // Perhaps it only moved, to a file with a mistake.
            let kept = match (why, failed) {
                (Why::Boot, _) => Some("a boot removes nothing".to_owned()),
                // Said by the reload that comes.
                (Why::Image, _) => continue,
                (Why::Reload, true) => Some("another file has mistakes".to_owned()),
                (Why::Reload, false) => self.events_waiting(&name).await,
            };
            if let Some(why) = kept {
                let problem = format!("function `{name}`: its file is gone, but it stays for now: {why}");
                result.problems.push(format!("{problem}; reload again later, or `neap rm {name}`"));
                continue;
            }
            match self.remove(&name).await {
                Ok(_) => result.removed.push(name.to_string()),
                Err(error) => {
                    result.problems.push(format!("remove `{name}`: {}", crate::errors::chain(&error)))
                }
            }
        }
        let mut asked = self.waiting.files.lock().unwrap_or_else(PoisonError::into_inner);
        // What a reload asked for is still on its way.
        asked.retain(|_, lacks| why == Why::Image && !*lacks);
        asked.extend(lacking);
        drop(asked);
        result
    }

    /// The image that a registry is to be asked for: one that is missing, and at a reload the one
    /// of a manifest that always asks. The file is deployed with what is here meanwhile.
    fn lacked_by(&self, shown: &str, text: &str, why: Why) -> Option<(Reference, bool)> {
        let manifest = config::manifest::parse(shown, text, &self.config.get()).ok()?;
        let missing = self.images.find(manifest.image.as_str()).is_err();
        let asks = match manifest.pull {
            Pull::Never => false,
            Pull::Always => missing || why == Why::Reload,
            Pull::Missing => missing,
        };
        asks.then_some((manifest.image, missing))
    }

    /// Why a function's events forbid to remove it unasked: they were acknowledged.
    async fn events_waiting(&self, name: &FunctionName) -> Option<String> {
        let counts = match self.store.counts().await {
            Ok(counts) => counts,
            Err(error) => return Some(crate::errors::chain(&error)),
        };
        let counts = counts.per_function.iter().find(|counts| counts.function == *name)?;
        let waiting = counts.ready + counts.running;
        (waiting > 0).then(|| format!("{waiting} events wait for it"))
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
