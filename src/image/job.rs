//! What the daemon tells its worker, in a file in the staging directory: standard input is the
//! archive's, and a command line is everybody's to read.

use super::ImageError;
use super::store::put_json;
use super::trust::Trusted;
use crate::config::images::{ImageLimits, Images};
use crate::model::Reference;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// What to call the image; an import may leave that to the archive.
    pub name: Option<Reference>,
    pub trust: Trusted,
    pub limits: ImageLimits,
    /// Of a pull.
    pub source: Source,
    /// Of a pull: its layers are unpacked while they come.
    pub ahead: bool,
}

/// Where a pull asks. Passwords are not in here: the worker reads their file itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Source {
    pub mirrors: Vec<String>,
    pub insecure: Vec<String>,
    pub docker_config: Option<PathBuf>,
    pub ca: Option<PathBuf>,
    pub bandwidth: Option<u64>,
}

impl Source {
    pub fn of(images: &Images) -> Self {
        Self {
            mirrors: images.mirrors.clone(),
            insecure: images.insecure.clone(),
            docker_config: images.docker_config.clone(),
            ca: images.ca.clone(),
            bandwidth: images.bandwidth,
        }
    }
}

impl Job {
    const FILE: &str = "job.json";

    pub fn write(&self, staging: &Path) -> Result<(), ImageError> {
        put_json(&staging.join(Self::FILE), self)
    }

    pub fn read(staging: &Path) -> Result<Self, ImageError> {
        super::store::read_json(&staging.join(Self::FILE))
    }
}
