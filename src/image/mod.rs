//! Images: from an archive to verified, unpacked layers on disk, and which are there.
//!
//! Bytes from outside are handled in a child process, `neap image-worker`.

pub mod worker;

use crate::model::api::{ImageDetail, ImageSummary, Progress};
use crate::model::{Digest, Reference};
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("no image `{0}` on this node")]
    NotFound(String),
    /// What the worker found wrong, for people: names the entry and the way out.
    #[error("{0}")]
    Refused(String),
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: std::io::Error,
    },
}

/// What the runtime needs of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Of the manifest for this machine's platform.
    pub digest: Digest,
    /// Unpacked layer directories, lowest first.
    pub layers: Vec<PathBuf>,
    pub config: ImageConfig,
}

/// OCI image-spec config.md, the parts that a container needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `K=V`
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group`, `uid:gid`; empty: root.
    pub user: String,
    /// Empty: `/`.
    pub working_dir: String,
    pub stop_signal: Option<String>,
    pub labels: std::collections::BTreeMap<String, String>,
}

/// The images below `data_dir/images`; a handle, cheap to clone.
#[derive(Clone)]
pub struct ImageStore {}

#[allow(unused_variables)]
impl ImageStore {
    /// Opens or creates; sweeps what a killed import left. `exe`: the neap binary, started as
    /// `neap image-worker`.
    pub fn open(data_dir: &std::path::Path, exe: PathBuf) -> Result<Self, ImageError> {
        todo!()
    }

    /// Feeds `archive` (a tar stream: OCI layout, OCI archive or docker-save, plain, gzip or zstd)
    /// to a worker child; progress goes to `progress` as it comes. `name` replaces the names
    /// that the archive carries. Cancelled by dropping: the child is killed and leaves nothing.
    pub async fn import(
        &self,
        archive: impl smol::io::AsyncRead + Unpin + Send,
        name: Option<Reference>,
        progress: smol::channel::Sender<Progress>,
    ) -> Result<ImageSummary, ImageError> {
        let archive = archive;
        todo!()
    }

    /// By reference, or by digest (`sha256:…`, also its first 12 or more hex digits).
    pub fn find(&self, name: &str) -> Result<Image, ImageError> {
        todo!()
    }

    pub fn list(&self) -> Result<Vec<ImageSummary>, ImageError> {
        todo!()
    }

    pub fn show(&self, name: &str) -> Result<ImageDetail, ImageError> {
        todo!()
    }

    /// Removes a reference, or an image by digest with all its references; layers that nothing
    /// else needs go too, but never those of an image in `in_use`.
    pub fn remove(&self, name: &str, in_use: &std::collections::HashSet<Digest>) -> Result<(), ImageError> {
        todo!()
    }
}
