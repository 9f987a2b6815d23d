//! One layer: from a tar stream to a directory that overlayfs can take as a lower layer.
//!
//! Whiteouts (OCI image-spec layer.md) become what overlayfs has for them: `.wh.NAME` a character
//! device 0:0, `.wh..wh..opq` the xattr `trusted.overlay.opaque`. A whiteout hides what is below
//! this layer and never what is in it, in whichever order the two come: so they are kept until the
//! layer's own content is known. (umoci writes `dir` as a file and `dir/.wh.child` beside it.)
//!
//! Refused, with the entry's name: what would be written outside the root or through a symlink,
//! hard links to outside, `trusted.*` and `user.overlay.*` xattrs, types that no standard knows.
//! Left out, with a warning: device nodes. Otherwise as docker does: a later entry replaces an
//! earlier one of the same name, a directory keeps what it holds.
//!
//! Most layers are the same wherever they are used. Two things lean on the layers below: a
//! directory that the layer uses without an entry of its own (its owner and mode are those it has
//! below), and a hard link to a file below (which is copied up, as overlayfs would). Such a layer
//! says so in `Unpacked::leans`, and the store keeps it per chain of layers.

mod attributes;
mod hide;
mod link;

use super::ImageError;
use super::behind::Behind;
use super::check::Written;
use super::limits::{Budget, io, os, refuse, show};
use super::place::Place;
use super::tarball::{Entry, Kind, TarReader};
use super::tree::{self, Below};
use attributes::{
    Attributes, IMPLIED, Rule, create, own, set_fifo_attributes, set_own_attributes, times, xattr_rule,
};
use flate2::Crc;
use rustix::fs::{self, FileType, Mode, XattrFlags};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

/// Warnings beyond these are counted, not shown.
const WARNINGS_MAX: u64 = 20;
const COPY_BYTES: usize = 128 * 1024;

#[derive(Debug)]
pub struct Unpacked {
    /// Of the files, holes included.
    pub bytes: u64,
    /// The result depends on the layers below.
    pub leans: bool,
    /// For the layer's seal.
    pub written: Written,
}

/// Unpacks into `root`, an empty directory. On an error what is there is to be thrown away.
pub fn unpack(
    tar: &mut TarReader<impl Read>,
    root: OwnedFd,
    below: &Below,
    budget: &mut Budget,
    warn: &mut dyn FnMut(String),
) -> Result<Unpacked, ImageError> {
    let mut unpacker = Unpacker {
        root,
        below,
        budget,
        warn,
        warnings: 0,
        warned_xattrs: BTreeSet::new(),
        parent: None,
        directories: BTreeMap::new(),
        opaque: BTreeSet::new(),
        whiteouts: BTreeSet::new(),
        left_out: BTreeSet::new(),
        buffer: vec![0; COPY_BYTES],
        written: Written::default(),
        bytes: 0,
        leans: false,
    };
    loop {
        let entry = match tar.next_entry() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(super::tarball::TarError::Read(source)) => return Err(io("read the layer")(source)),
            Err(error) => return Err(refuse(format!("the layer's tar: {error}"))),
        };
        let name = show(&entry.path);
        unpacker.entry(entry, tar).map_err(|error| match error {
            ImageError::Refused(text) => refuse(format!("entry `{name}` {text}")),
            ImageError::Io { doing, source } => io(format!("entry `{name}`: {doing}"))(source),
            other => other,
        })?;
    }
    unpacker.finish()
}

struct Unpacker<'a> {
    root: OwnedFd,
    below: &'a Below,
    budget: &'a mut Budget,
    warn: &'a mut dyn FnMut(String),
    warnings: u64,
    warned_xattrs: BTreeSet<Vec<u8>>,
    /// The directory that was opened last: entries come sorted, mostly.
    parent: Option<(Place, Rc<OwnedFd>)>,
    /// Every directory of the layer; `None`: implied by what it holds, no entry so far.
    directories: BTreeMap<Place, Option<Attributes>>,
    /// Directories that hide what is below in them, places that hide what is below there: as the
    /// entries say; `hide` decides at the end what comes of it.
    opaque: BTreeSet<Place>,
    whiteouts: BTreeSet<Place>,
    /// Device nodes.
    left_out: BTreeSet<Place>,
    buffer: Vec<u8>,
    written: Written,
    bytes: u64,
    leans: bool,
}

impl Unpacker<'_> {
    fn entry(&mut self, entry: Entry, tar: &mut TarReader<impl Read>) -> Result<(), ImageError> {
        self.budget.take_entry()?;
        self.budget.take_disk(4096)?; // an inode and a block, however small the file
        let place = Place::parse(&entry.path).map_err(refuse)?;
        let attributes = Attributes { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime };
        let Some((parent, name)) = place.split() else {
            if entry.kind != Kind::Directory {
                return Err(refuse("stands for the root and is no directory"));
            }
            let root = tree::open_directory(&self.root, b".").map_err(os("open the root"))?;
            self.set_xattrs(&root, &entry)?;
            self.directories.insert(place, Some(attributes));
            return Ok(());
        };
        if parent.components().any(|part| part.starts_with(b".wh.")) {
            return Err(refuse("lies below a whiteout's name"));
        }
        if name == b".wh..wh..opq" {
            self.opaque.insert(parent);
            return Ok(());
        }
        if name.starts_with(b".wh..wh.") {
            self.warn_of(format!("`{}` left out: AUFS keeps its own books there", show(&entry.path)));
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            if hidden.is_empty() || hidden == b"." || hidden == b".." {
                return Err(refuse("is a whiteout of nothing"));
            }
            self.whiteouts.insert(parent.join(hidden));
            return Ok(());
        }

        match entry.kind {
            Kind::Directory => self.directory(&place, &parent, name, &entry, attributes),
            Kind::File => {
                let directory = self.clear(&place, &parent, name)?;
                self.file(&directory, name, &entry, tar)
            }
            Kind::Symlink => {
                let directory = self.clear(&place, &parent, name)?;
                self.symlink(&directory, name, &entry.link, attributes)?;
                self.warn_of_xattrs(&entry);
                Ok(())
            }
            Kind::HardLink => self.hard_link(&place, &parent, name, &entry),
            Kind::Fifo => {
                let directory = self.clear(&place, &parent, name)?;
                fs::mknodat(&*directory, name, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
                    .map_err(os("make the fifo"))?;
                self.warn_of_xattrs(&entry);
                set_fifo_attributes(&directory, name, attributes)
            }
            Kind::CharDevice | Kind::BlockDevice => {
                self.warn_of(format!("`{}` left out: a device node", show(&entry.path)));
                self.left_out.insert(place);
                Ok(())
            }
            Kind::Unknown(kind) => Err(refuse(format!(
                "is of type `{}`, which neap does not know",
                char::from(kind).escape_default()
            ))),
        }
    }

    /// Opens a directory of this layer, making what is missing on the way.
    fn open(&mut self, place: &Place) -> Result<Rc<OwnedFd>, ImageError> {
        match self.reach(place)? {
            Reached::Directory(directory) => Ok(directory),
            Reached::Blocked(at, FileType::Symlink) => {
                Err(refuse(format!("would be written through the symlink `{}`", show(at.as_bytes()))))
            }
            Reached::Blocked(at, _) => {
                Err(refuse(format!("lies below `{}`, which is no directory", show(at.as_bytes()))))
            }
        }
    }

    fn reach(&mut self, place: &Place) -> Result<Reached, ImageError> {
        if let Some((cached, directory)) = &self.parent
            && cached == place
        {
            return Ok(Reached::Directory(directory.clone()));
        }
        let mut directory = tree::open_directory(&self.root, b".").map_err(os("open the root"))?;
        let mut at = Place::default();
        for name in place.components() {
            at = at.join(name);
            directory = match tree::open_directory(&directory, name) {
                Ok(next) => next,
                Err(Errno::NOENT) => self.imply(&directory, &at, name)?,
                Err(Errno::NOTDIR) => {
                    let stat = tree::look(&directory, name).map_err(os("look what is there"))?;
                    let kind = stat.map_or(FileType::Unknown, |stat| tree::kind(&stat));
                    return Ok(Reached::Blocked(at, kind));
                }
                Err(errno) => return Err(os(format!("open `{}`", show(at.as_bytes())))(errno)),
            };
        }
        let directory = Rc::new(directory);
        self.parent = Some((place.clone(), directory.clone()));
        Ok(Reached::Directory(directory))
    }

    /// A directory that has no entry, so far.
    fn imply(&mut self, parent: &OwnedFd, place: &Place, name: &[u8]) -> Result<OwnedFd, ImageError> {
        self.budget.take_entry()?;
        fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)).map_err(os("make a directory"))?;
        self.directories.insert(place.clone(), None);
        tree::open_directory(parent, name).map_err(os("open a directory"))
    }

    /// The parent, with nothing at `name` any more.
    fn clear(&mut self, place: &Place, parent: &Place, name: &[u8]) -> Result<Rc<OwnedFd>, ImageError> {
        let directory = self.open(parent)?;
        match tree::look(&*directory, name).map_err(os("look what is there"))? {
            None => {}
            Some(stat) => {
                let replacing = os("replace an earlier entry of this name");
                tree::remove(directory.as_fd(), name).map_err(replacing)?;
                self.forget(place, tree::kind(&stat) == FileType::Directory);
            }
        }
        self.left_out.remove(place);
        Ok(directory)
    }

    fn forget(&mut self, place: &Place, with_children: bool) {
        self.directories.remove(place);
        if with_children {
            self.parent = None;
            let below = place.below();
            self.directories.retain(|p, _| !below.contains(p));
            self.left_out.retain(|p| !below.contains(p));
        }
    }

    fn directory(
        &mut self,
        place: &Place,
        parent: &Place,
        name: &[u8],
        entry: &Entry,
        attributes: Attributes,
    ) -> Result<(), ImageError> {
        let there = self.open(parent)?;
        let stat = tree::look(&*there, name).map_err(os("look what is there"))?;
        if !stat.is_some_and(|stat| tree::kind(&stat) == FileType::Directory) {
            self.clear(place, parent, name)?;
            fs::mkdirat(&*there, name, Mode::from_raw_mode(0o700)).map_err(os("make the directory"))?;
            // In place of a file of this layer: a new directory, not more of one below.
            if stat.is_some() {
                self.opaque.insert(place.clone());
            }
        }
        let directory = tree::open_directory(&*there, name).map_err(os("open the directory"))?;
        self.set_xattrs(&directory, entry)?;
        self.directories.insert(place.clone(), Some(attributes));
        Ok(())
    }

    fn file(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        entry: &Entry,
        tar: &mut TarReader<impl Read>,
    ) -> Result<(), ImageError> {
        self.budget.take_unpacked(entry.size)?;
        self.bytes += entry.size;
        let mut file = create(directory, name)?;
        let mut sum = Crc::new();
        match &entry.segments {
            None => self.copy(tar, &mut file, 0, entry.size, &mut sum)?,
            Some(segments) => {
                for segment in segments {
                    file.seek(SeekFrom::Start(segment.offset)).map_err(io("seek"))?;
                    self.copy(tar, &mut file, segment.offset, segment.bytes, &mut sum)?;
                }
                file.set_len(entry.size).map_err(io("set the size of a sparse file"))?;
            }
        }
        // The holes of a sparse one are not in it.
        self.note_written(&file, entry.segments.is_none().then_some(sum))?;
        // chown takes setuid bits and capabilities away, so it comes first.
        let Attributes { mode, uid, gid, mtime } =
            Attributes { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime };
        own(&file, uid, gid)?;
        fs::fchmod(&file, Mode::from_raw_mode(mode)).map_err(os("set the mode"))?;
        self.set_xattrs(&file, entry)?;
        fs::futimens(&file, &times(mtime)).map_err(os("set the time"))
    }

    fn note_written(&mut self, file: &File, sum: Option<Crc>) -> Result<(), ImageError> {
        let stat = fs::fstat(file).map_err(os("look at the file"))?;
        self.written.note(stat.st_ino, sum);
        Ok(())
    }

    fn copy(
        &mut self,
        tar: &mut TarReader<impl Read>,
        to: &mut File,
        from: u64,
        bytes: u64,
        sum: &mut Crc,
    ) -> Result<(), ImageError> {
        let mut behind = Behind::from_offset(from);
        let mut left = bytes;
        while left > 0 {
            let want = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let got = tar.read_data(&mut self.buffer[..want]).map_err(io("read the layer"))?;
            if got == 0 {
                return Err(refuse("has less data than its header says"));
            }
            self.budget.take_disk(got as u64)?;
            to.write_all(&self.buffer[..got]).map_err(io("write the file"))?;
            sum.update(&self.buffer[..got]);
            left -= got as u64;
            behind.grown(&*to, from + (bytes - left));
        }
        behind.ended(&*to, from + bytes);
        Ok(())
    }

    fn symlink(&mut self, at: &OwnedFd, name: &[u8], link: &[u8], a: Attributes) -> Result<(), ImageError> {
        if link.is_empty() || link.len() > 4095 || link.contains(&0) {
            return Err(refuse("is a symlink to a name that can't be"));
        }
        fs::symlinkat(link, at, name).map_err(os("make the symlink"))?;
        set_own_attributes(at, name, a)
    }

    fn set_xattrs(&mut self, file: &impl AsFd, entry: &Entry) -> Result<(), ImageError> {
        for (name, value) in &entry.xattrs {
            match xattr_rule(name) {
                Rule::Refuse => {
                    return Err(refuse(format!(
                        "has the xattr `{}`, which is not an image's to set",
                        show(name)
                    )));
                }
                Rule::LeaveOut => self.warn_of_xattr(name),
                Rule::Keep => match fs::fsetxattr(file, &name[..], value, XattrFlags::empty()) {
                    Ok(()) => {}
                    Err(Errno::OPNOTSUPP) => self.warn_of_xattr(name),
                    Err(errno) => return Err(os(format!("set the xattr `{}`", show(name)))(errno)),
                },
            }
        }
        Ok(())
    }

    /// Symlinks and fifos can't have the kinds that are kept.
    fn warn_of_xattrs(&mut self, entry: &Entry) {
        for name in entry.xattrs.keys() {
            self.warn_of_xattr(name);
        }
    }

    /// Once for each xattr, not for each file that has it.
    fn warn_of_xattr(&mut self, name: &[u8]) {
        if self.warned_xattrs.len() < 100 && self.warned_xattrs.insert(name.to_vec()) {
            self.warn_of(format!("xattr `{}` left out", show(name)));
        }
    }

    fn warn_of(&mut self, text: String) {
        self.warnings += 1;
        if self.warnings <= WARNINGS_MAX {
            (self.warn)(text);
        }
    }

    fn finish(mut self) -> Result<Unpacked, ImageError> {
        self.parent = None;
        self.hide()?;
        self.directories.entry(Place::default()).or_insert(Some(IMPLIED));
        for (place, attributes) in std::mem::take(&mut self.directories).iter().rev() {
            let directory = tree::open_place(&self.root, place).map_err(os("open a directory"))?;
            let attributes = match attributes {
                Some(attributes) => *attributes,
                None => self.attributes_below(place, &directory)?,
            };
            own(&directory, attributes.uid, attributes.gid)?;
            fs::fchmod(&directory, Mode::from_raw_mode(attributes.mode))
                .map_err(os("set a directory's mode"))?;
            fs::futimens(&directory, &times(attributes.mtime)).map_err(os("set a directory's time"))?;
        }
        if self.warnings > WARNINGS_MAX {
            (self.warn)(format!("and {} more", self.warnings - WARNINGS_MAX));
        }
        Ok(Unpacked { bytes: self.bytes, leans: self.leans, written: self.written })
    }
}

enum Reached {
    Directory(Rc<OwnedFd>),
    /// By something of this layer that is no directory.
    Blocked(Place, FileType),
}
