//! A tar stream, entry by entry: POSIX ustar and pax, GNU and its three sparse formats.
//!
//! Why not the `tar` crate, whose builder the tests use: it splits pax records at newlines, so a
//! name or a capability that holds one is lost; it reads extension headers of any size into
//! memory; and it takes a pax sparse file's map for the file's data. A gateway can't refuse what
//! a colleague's `tar` wrote, nor trust it.
//!
//! Promises: no panic and bounded memory for any input; a name is bytes, as it was written;
//! sizes, ids and times that don't fit are refused, never wrapped.
//!
//! Formats: POSIX.1-2024 pax, "ustar Interchange Format"; GNU tar manual, appendix "Tar
//! Internals" (Basic Tar Format, Storing Sparse Files).

mod header;

use header::{Extension, global_record, gnu_segments, header_path, number, parse_pax, parse_time, until_nul};
use std::collections::BTreeMap;
use std::io::{self, Read};

const BLOCK: usize = 512;
/// What may stand before one entry: pax headers and long names. The longest in the field are xattrs (64 KiB each) and sparse
/// maps; beyond this the archive is refused.
const EXTENSION_BYTES_MAX: u64 = 1024 * 1024;
/// Pieces of one sparse file: a map of 1 MiB.
const SEGMENTS_MAX: usize = 65_536;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
    /// A type that is in no standard, or one that stands for no file (volume label, multi-volume).
    Unknown(u8),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Of hard links and symlinks.
    pub link: Vec<u8>,
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Mtime,
    /// What the file measures once it is unpacked, holes included.
    pub size: u64,
    /// The pieces of a sparse file, ascending; `None`: all of it is data.
    pub segments: Option<Vec<Segment>>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mtime {
    pub seconds: i64,
    pub nanoseconds: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub offset: u64,
    pub bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("{0}")]
    Malformed(String),
    #[error("read the tar stream")]
    Read(#[source] io::Error),
}

fn malformed(what: impl Into<String>) -> TarError {
    TarError::Malformed(what.into())
}

pub struct TarReader<R> {
    inner: R,
    /// Of the current entry: data not read yet, and the zeros up to the next block.
    data_left: u64,
    padding_left: u64,
    ended: bool,
}

impl<R: Read> TarReader<R> {
    pub fn new(inner: R) -> Self {
        Self { inner, data_left: 0, padding_left: 0, ended: false }
    }

    /// What is behind the end.
    pub fn into_inner(self) -> R {
        self.inner
    }

    /// The next file, after its extension headers were taken in; skips what was left unread of
    /// the one before. `None` at the end marker, or where the stream ends between two entries.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        if self.ended {
            return Ok(None);
        }
        let mut extension = Extension::default();
        let mut extension_bytes = 0_u64;
        loop {
            self.skip_rest()?;
            let Some(header) = self.header()? else {
                self.ended = true;
                if extension.seen {
                    return Err(malformed("an extended header at the end describes no file"));
                }
                return Ok(None);
            };
            let size = number(&header[124..136], "size")?;
            let size = u64::try_from(size).map_err(|_| malformed("a negative size"))?;
            if matches!(header[156], b'L' | b'K' | b'x' | b'X' | b'g') {
                extension_bytes = extension_bytes.saturating_add(size);
                if extension_bytes > EXTENSION_BYTES_MAX {
                    let max = EXTENSION_BYTES_MAX;
                    return Err(malformed(format!(
                        "extended headers of {extension_bytes} bytes; at most {max}"
                    )));
                }
            }
            match header[156] {
                b'L' => extension.long_name = Some(until_nul(&self.extension(size)?).to_vec()),
                b'K' => extension.long_link = Some(until_nul(&self.extension(size)?).to_vec()),
                b'x' | b'X' => {
                    let records = self.extension(size)?;
                    parse_pax(&records, |key, value| extension.record(key, value))?;
                }
                b'g' => {
                    let records = self.extension(size)?;
                    parse_pax(&records, global_record)?;
                    continue;
                }
                _ => return self.entry(&header, size, extension).map(Some),
            }
            extension.seen = true;
        }
    }

    /// Reads from the current entry's data as it is stored (a sparse file's pieces end to end).
    /// Fails when the stream ends before the data does.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer.len().min(usize::try_from(self.data_left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let got = read_some(&mut self.inner, &mut buffer[..want])?;
        if got == 0 {
            return Err(truncated());
        }
        self.data_left -= got as u64;
        Ok(got)
    }

    fn entry(&mut self, header: &[u8; BLOCK], size: u64, extension: Extension) -> Result<Entry, TarError> {
        let kind = match header[156] {
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => Kind::Unknown(other),
        };
        let size = extension.number("size")?.unwrap_or(size);
        // As in Go's archive/tar, which docker reads layers with: the other kinds carry no data,
        // whatever their size says.
        self.set_data(if matches!(kind, Kind::File | Kind::Unknown(_)) { size } else { 0 });

        let path = match (extension.get("GNU.sparse.name"), extension.get("path"), &extension.long_name) {
            (Some(name), _, _) | (None, Some(name), _) => name.to_vec(),
            (None, None, Some(name)) => name.clone(),
            (None, None, None) => header_path(header),
        };
        let link = match (extension.get("linkpath"), &extension.long_link) {
            (Some(link), _) => link.to_vec(),
            (None, Some(link)) => link.clone(),
            (None, None) => until_nul(&header[157..257]).to_vec(),
        };
        let kind = match kind {
            // Before ustar a directory was a file whose name ends in a slash.
            Kind::File if header[156] == 0 && path.ends_with(b"/") => Kind::Directory,
            kind => kind,
        };
        let id = |key: &str, field: &[u8]| -> Result<u32, TarError> {
            let id = match extension.number(key)? {
                Some(id) => i64::try_from(id).unwrap_or(i64::MAX),
                None => number(field, key)?,
            };
            // 4,294,967,295 is chown's "leave as it is".
            u32::try_from(id)
                .ok()
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| malformed(format!("{key} {id} is not an id")))
        };
        let (uid, gid) = (id("uid", &header[108..116])?, id("gid", &header[116..124])?);
        let mode = number(&header[100..108], "mode")?;
        let mtime = match extension.get("mtime") {
            Some(text) => parse_time(text)?,
            None => Mtime { seconds: number(&header[136..148], "mtime")?, nanoseconds: 0 },
        };

        let (size, segments) = match kind {
            Kind::File => self.sparse(header, size, &extension)?,
            _ => (0, None),
        };
        let xattrs = extension
            .pax
            .into_iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value)))
            .collect();
        Ok(Entry { path, kind, link, mode: (mode & 0o7777) as u32, uid, gid, mtime, size, segments, xattrs })
    }

    /// The logical size and the pieces of a file in one of the sparse formats.
    fn sparse(
        &mut self,
        header: &[u8; BLOCK],
        stored: u64,
        extension: &Extension,
    ) -> Result<(u64, Option<Vec<Segment>>), TarError> {
        let (real, segments) = if header[156] == b'S' {
            let real = u64::try_from(number(&header[483..495], "real size")?);
            let real = real.map_err(|_| malformed("a negative size"))?;
            let mut segments = Vec::new();
            let mut more = gnu_segments(&header[386..482], header[482], &mut segments)?;
            // The blocks that go on with the map stand before the data and are not counted in it.
            let (data, padding) = (self.data_left, self.padding_left);
            while more {
                let mut block = [0; BLOCK];
                self.inner.read_exact(&mut block).map_err(TarError::Read)?;
                more = gnu_segments(&block[..504], block[504], &mut segments)?;
            }
            (self.data_left, self.padding_left) = (data, padding);
            (real, segments)
        } else if let Some(major) = extension.get("GNU.sparse.major") {
            if major != b"1" || extension.get("GNU.sparse.minor") != Some(b"0") {
                return Err(malformed("a sparse file in a format that is not known"));
            }
            let real = extension.number("GNU.sparse.realsize")?;
            (real.ok_or_else(|| malformed("a sparse file without its size"))?, self.sparse_1_0()?)
        } else if let Some(size) = extension.number("GNU.sparse.size")? {
            (size, extension.segments_0()?)
        } else {
            return Ok((stored, None));
        };

        let mut end = 0_u64;
        let mut data = 0_u64;
        for segment in &segments {
            let stop = segment.offset.checked_add(segment.bytes);
            match stop {
                Some(stop) if segment.offset >= end && stop <= real => end = stop,
                _ => return Err(malformed("a sparse file's pieces overlap or lie beyond its end")),
            }
            data += segment.bytes; // below `end`, so it can't overflow
        }
        if data != self.data_left {
            return Err(malformed("a sparse file's map and its data differ in size"));
        }
        Ok((real, Some(segments)))
    }

    /// Sparse format 1.0: the map stands in the data, as decimal numbers on lines of their own,
    /// filled up to a block.
    fn sparse_1_0(&mut self) -> Result<Vec<Segment>, TarError> {
        let mut block = [0_u8; BLOCK];
        let mut at = BLOCK;
        let mut next = |reader: &mut Self| -> Result<u64, TarError> {
            let mut value = 0_u64;
            for digits in 0..=20 {
                if at == BLOCK {
                    let mut filled = 0;
                    while filled < BLOCK {
                        match reader.read_data(&mut block[filled..]).map_err(TarError::Read)? {
                            0 => return Err(malformed("a sparse file's map is cut short")),
                            got => filled += got,
                        }
                    }
                    at = 0;
                }
                let byte = block[at];
                at += 1;
                match byte {
                    b'0'..=b'9' => {
                        let shifted =
                            value.checked_mul(10).and_then(|v| v.checked_add(u64::from(byte - b'0')));
                        value =
                            shifted.ok_or_else(|| malformed("a sparse file's map has a number too large"))?;
                    }
                    b'\n' if digits > 0 => return Ok(value),
                    _ => break,
                }
            }
            Err(malformed("a sparse file's map is not made of numbers"))
        };
        let count = next(self)?;
        if count > SEGMENTS_MAX as u64 {
            return Err(malformed(format!("a sparse file of more than {SEGMENTS_MAX} pieces")));
        }
        let mut segments = Vec::new();
        for _ in 0..count {
            segments.push(Segment { offset: next(self)?, bytes: next(self)? });
        }
        Ok(segments)
    }

    /// A header block whose checksum is right; `None` at the end.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0_u8; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match read_some(&mut self.inner, &mut block[filled..]).map_err(TarError::Read)? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(TarError::Read(truncated())),
                got => filled += got,
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let wrong = || malformed("a header's checksum is wrong: not a tar archive, or a damaged one");
        let stated = number(&block[148..156], "checksum").map_err(|_| wrong())?;
        let field = |index: usize| (148..156).contains(&index);
        let bytes = || block.iter().enumerate().map(|(i, b)| if field(i) { b' ' } else { *b });
        let unsigned: i64 = bytes().map(i64::from).sum();
        // Some old tars summed signed characters; GNU tar and Go take both.
        let signed: i64 = bytes().map(|b| i64::from(b as i8)).sum();
        if stated != unsigned && stated != signed {
            return Err(wrong());
        }
        Ok(Some(block))
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        self.set_data(size);
        let mut data = vec![0; size as usize];
        let mut filled = 0;
        while filled < data.len() {
            filled += self.read_data(&mut data[filled..]).map_err(TarError::Read)?;
        }
        Ok(data)
    }

    fn set_data(&mut self, size: u64) {
        self.data_left = size;
        self.padding_left = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let mut scratch = [0_u8; 8192];
        while self.data_left > 0 {
            self.read_data(&mut scratch).map_err(TarError::Read)?;
        }
        while self.padding_left > 0 {
            let want = self.padding_left as usize; // below one block
            match read_some(&mut self.inner, &mut scratch[..want]).map_err(TarError::Read)? {
                // Some writers leave the last padding out.
                0 => break,
                got => self.padding_left -= got as u64,
            }
        }
        self.padding_left = 0;
        Ok(())
    }
}

fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it ends too early: the archive is truncated")
}

fn read_some(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
