//! Hard links: within the layer, and to a file of a layer below, which is copied up first.

use super::attributes::{attributes_of, copy_xattrs, create, own, times};
use super::{Entry, Unpacker};
use crate::image::ImageError;
use crate::image::limits::{io, os, refuse, show};
use crate::image::place::Place;
use crate::image::tree::{self, Found};
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;

impl Unpacker<'_> {
    pub(super) fn hard_link(
        &mut self,
        place: &Place,
        parent: &Place,
        name: &[u8],
        entry: &Entry,
    ) -> Result<(), ImageError> {
        let shown = show(&entry.link);
        let target = Place::parse(&entry.link)
            .map_err(|why| refuse(format!("is a hard link to outside: its target `{shown}` {why}")))?;
        if target == *place {
            return Err(refuse("is a hard link to itself"));
        }
        let missing = || refuse(format!("is a hard link to `{shown}`, which is not there"));
        let Some((target_parent, target_name)) = target.split() else {
            return Err(refuse("is a hard link to a directory"));
        };
        if self.left_out.contains(&target) {
            self.warn_of(format!("`{}` left out: a hard link to a device node", show(&entry.path)));
            self.left_out.insert(place.clone());
            return Ok(());
        }
        // What is replaced may be, or hold, the target.
        let directory = self.clear(place, parent, name)?;
        if self.lstat(&target)?.is_none() {
            self.copy_up(&target, &target_parent, target_name, missing)?;
        }
        let from = self.open(&target_parent)?;
        match tree::look(&*from, target_name).map_err(os("look at the target"))? {
            None => return Err(missing()),
            Some(stat) if tree::kind(&stat) == FileType::Directory => {
                return Err(refuse(format!("is a hard link to `{shown}`, a directory")));
            }
            Some(_) => {}
        }
        fs::linkat(&*from, target_name, &*directory, name, AtFlags::empty()).map_err(os("make the hard link"))
    }

    /// What this layer has at a place, so far; what is not reached through real directories is
    /// left to `open` to name.
    pub(super) fn lstat(&self, place: &Place) -> Result<Option<fs::Stat>, ImageError> {
        let Some((parent, name)) = place.split() else { return Ok(None) };
        match tree::open_place(&self.root, &parent) {
            Ok(directory) => tree::look(&directory, name).map_err(os("look at the target")),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(os("look for the target")(errno)),
        }
    }

    /// A hard link joins this layer and one below: the file is copied into this one first, which
    /// is what happens when a container links a lower file on an overlay (and so what containerd
    /// and docker, who unpack onto the mounted overlay, end up with).
    fn copy_up(
        &mut self,
        target: &Place,
        parent: &Place,
        name: &[u8],
        missing: impl Fn() -> ImageError,
    ) -> Result<(), ImageError> {
        if self.hides(target) {
            return Err(missing());
        }
        let Found::Other(from, stat) = self.below.look(target)? else { return Err(missing()) };
        self.leans = true;
        let to = self.open(parent)?;
        let attributes = attributes_of(&stat);
        match tree::kind(&stat) {
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source =
                    fs::openat(&from, name, flags, Mode::empty()).map_err(os("open the target below"))?;
                let mut source = File::from(source);
                let size = source.metadata().map_err(io("look at the target below"))?.len();
                self.budget.take_unpacked(size)?;
                self.budget.take_disk(size)?;
                self.bytes += size;
                let mut file = create(&to, name)?;
                self.note_written(&file, None)?;
                std::io::copy(&mut source, &mut file).map_err(io("copy the target from below"))?;
                own(&file, attributes.uid, attributes.gid)?;
                fs::fchmod(&file, Mode::from_raw_mode(attributes.mode)).map_err(os("set the mode"))?;
                copy_xattrs(&source, &file)?;
                fs::futimens(&file, &times(attributes.mtime)).map_err(os("set the time"))
            }
            FileType::Symlink => {
                let link = fs::readlinkat(&from, name, Vec::new()).map_err(os("read the symlink below"))?;
                self.symlink(&to, name, link.as_bytes(), attributes)
            }
            _ => Err(missing()),
        }
    }
}
