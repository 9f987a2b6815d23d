//! What a layer hides of those below, as overlayfs has it; decided when all of it is unpacked.

use super::attributes::{Attributes, IMPLIED, attributes_of, copy_xattrs};
use super::{Reached, Unpacker};
use crate::image::ImageError;
use crate::image::limits::{os, refuse, show};
use crate::image::place::Place;
use crate::image::tree::{self, Found};
use rustix::fs::{self, FileType, Mode, XattrFlags};
use std::os::fd::OwnedFd;

impl Unpacker<'_> {
    /// Puts overlayfs's marks for what the layer hides of those below.
    pub(super) fn hide(&mut self) -> Result<(), ImageError> {
        // overlayfs never asks whether the root of a layer is opaque: each name is hidden by itself.
        if self.opaque.remove(&Place::default()) {
            self.leans = true;
            self.whiteouts.extend(self.below.root_names()?.iter().map(|name| Place::default().join(name)));
        }
        let mut absent = Vec::new();
        for place in &self.whiteouts {
            match self.lstat(place)? {
                None => absent.push(place.clone()),
                Some(stat) if tree::kind(&stat) == FileType::Directory => {
                    self.opaque.insert(place.clone());
                }
                // A file of this layer hides what is below by itself.
                Some(_) => {}
            }
        }
        // In order, so that what is above comes first. Below a file, a whiteout or an opaque
        // directory nothing is left to hide (and overlayfs would list the device).
        for place in absent {
            let Some((parent, name)) = place.split() else { continue };
            if self.is_in_opaque(&place) {
                continue;
            }
            if let Reached::Directory(directory) = self.reach(&parent)? {
                fs::mknodat(&*directory, name, FileType::CharacterDevice, Mode::empty(), 0)
                    .map_err(os("make a whiteout (this needs root)"))?;
            }
        }
        for place in self.opaque.clone() {
            if self.is_in_opaque(&place) && self.lstat(&place)?.is_none() {
                continue;
            }
            if let Reached::Directory(directory) = self.reach(&place)? {
                let shown = show(place.as_bytes());
                fs::fsetxattr(&*directory, tree::OPAQUE, b"y", XattrFlags::empty())
                    .map_err(os(format!("make `{shown}` opaque (trusted xattrs need root)")))?;
            }
        }
        Ok(())
    }

    fn is_in_opaque(&self, place: &Place) -> bool {
        place.ancestors().any(|above| self.opaque.contains(&above))
    }

    /// Whether this layer hides what those below have at `place`.
    pub(super) fn hides(&self, place: &Place) -> bool {
        let whiteout = |place: &Place| self.whiteouts.contains(place);
        self.is_in_opaque(place) || whiteout(place) || place.ancestors().any(|above| whiteout(&above))
    }

    /// A directory without an entry is the one below, when there is one.
    pub(super) fn attributes_below(
        &mut self,
        place: &Place,
        directory: &OwnedFd,
    ) -> Result<Attributes, ImageError> {
        self.leans = true;
        if self.hides(place) {
            return Ok(IMPLIED);
        }
        match self.below.look(place)? {
            Found::Directory(from, stat) => {
                copy_xattrs(&from, directory)?;
                Ok(attributes_of(&stat))
            }
            Found::Other(_, stat) if tree::kind(&stat) == FileType::Symlink => {
                let shown = show(place.as_bytes());
                Err(refuse(format!(
                    "entries below `{shown}` would be written through a symlink of a layer below"
                )))
            }
            Found::Other(..) | Found::Blocked | Found::Nothing => Ok(IMPLIED),
        }
    }
}
