//! What the worker that fetches tells the one that unpacks, by way of the daemon: which layers
//! come, how far each has come, and when one is whole and verified.
//!
//! ```text
//! fetch ── Came, a line each ──▶ daemon ── the same lines ──▶ unpack
//!   └────── blobs/HEX.part, which grows ──────────────────────▶┘
//! ```
//!
//! So a layer is unpacked while it comes. Its bytes are not verified yet, and so nothing that
//! comes of them counts: a layer gets its name only when its blob was whole, its diff id is right,
//! and the daemon has said that all of the image is here. What a damaged blob makes the unpacker
//! say is forgotten when it comes anew.

use super::ImageError;
use super::fetch::Fetched;
use super::limits::{io, refuse};
use crate::model::Digest;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// The longest names the layers of an image.
const LINE_BYTES_MAX: u64 = 1024 * 1024;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Came {
    /// The first: documents are here, and these layers come.
    Chosen(Box<Fetched>),
    /// So much of a layer can be read.
    Bytes { layer: Digest, bytes: u64 },
    /// All of it, and its digest is right.
    Whole { layer: Digest, bytes: u64 },
    /// It was damaged and comes again from its beginning.
    Anew { layer: Digest },
    /// The last, the daemon's own word: all is here, and until the image is known nothing is
    /// collected.
    All,
}

#[derive(Clone, Copy, Debug, Default)]
struct Layer {
    bytes: u64,
    whole: bool,
    /// How often it came anew.
    anew: u32,
}

/// The unpacker's end.
pub struct Feed<R> {
    lines: R,
    blobs: PathBuf,
    layers: BTreeMap<Digest, Layer>,
    all: bool,
}

impl<R: BufRead> Feed<R> {
    pub fn new(lines: R, blobs: PathBuf) -> Self {
        Self { lines, blobs, layers: BTreeMap::new(), all: false }
    }

    /// Waits for the documents.
    pub fn chosen(&mut self) -> Result<Fetched, ImageError> {
        match self.line().map_err(stopped)? {
            Came::Chosen(fetched) => {
                self.layers = fetched.layers.iter().map(|layer| (layer.clone(), Layer::default())).collect();
                Ok(*fetched)
            }
            other => Err(refuse(format!("the fetching began with {other:?}"))),
        }
    }

    /// From its beginning, as it comes; `None`: it does not.
    pub fn follow(&mut self, layer: &Digest) -> Result<Option<Following<'_, R>>, ImageError> {
        let Some(known) = self.layers.get(layer) else { return Ok(None) };
        let anew = known.anew;
        // Nothing has a name before a byte of it is here.
        while self.layer(layer).bytes == 0 && !self.layer(layer).whole {
            self.take().map_err(stopped)?;
        }
        let file = self.open(layer).map_err(io(format!("open what came of layer {layer}")))?;
        Ok(Some(Following { feed: self, file, layer: layer.clone(), anew, at: 0 }))
    }

    /// Whether the layer that could not be unpacked came anew: once it is whole, that was its own
    /// fault.
    pub fn comes_anew(&mut self, layer: &Digest, anew: u32) -> Result<bool, ImageError> {
        loop {
            let now = self.layer(layer);
            if now.anew != anew {
                return Ok(true);
            }
            if now.whole {
                return Ok(false);
            }
            self.take().map_err(stopped)?;
        }
    }

    pub fn anew(&self, layer: &Digest) -> u32 {
        self.layer(layer).anew
    }

    /// Waits until everything is here.
    pub fn finish(&mut self) -> Result<(), ImageError> {
        while !self.all {
            self.take().map_err(stopped)?;
        }
        Ok(())
    }

    fn layer(&self, layer: &Digest) -> Layer {
        self.layers.get(layer).copied().unwrap_or_default()
    }

    /// It loses the end of its name when it is whole, at a moment nobody tells.
    fn open(&self, layer: &Digest) -> std::io::Result<File> {
        let (whole, part) = (self.blobs.join(layer.hex()), self.blobs.join(format!("{}.part", layer.hex())));
        File::open(&part).or_else(|_| File::open(&whole)).or_else(|_| File::open(&part))
    }

    /// The next line.
    fn take(&mut self) -> std::io::Result<()> {
        let came = self.line()?;
        let layer = match &came {
            Came::Bytes { layer, .. } | Came::Whole { layer, .. } | Came::Anew { layer } => layer,
            Came::All => {
                self.all = true;
                return Ok(());
            }
            Came::Chosen(_) => return Err(std::io::Error::other("the fetching began twice")),
        };
        let Some(known) = self.layers.get_mut(layer) else {
            return Err(std::io::Error::other(format!("layer {layer} came, which nobody chose")));
        };
        *known = match came {
            Came::Whole { bytes, .. } => Layer { bytes, whole: true, ..*known },
            Came::Bytes { bytes, .. } => Layer { bytes: known.bytes.max(bytes), ..*known },
            _ => Layer { bytes: 0, whole: false, anew: known.anew + 1 },
        };
        Ok(())
    }

    fn line(&mut self) -> std::io::Result<Came> {
        let mut line = Vec::new();
        (&mut self.lines).take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
        if !line.ends_with(b"\n") {
            return Err(std::io::Error::other("the fetching stopped"));
        }
        serde_json::from_slice(&line).map_err(|error| std::io::Error::other(error.to_string()))
    }
}

/// It is no fault of the image's: who fetched says why.
fn stopped(source: std::io::Error) -> ImageError {
    io("wait for the layers")(source)
}

/// A blob that may still grow, read from its beginning.
pub struct Following<'a, R> {
    feed: &'a mut Feed<R>,
    file: File,
    layer: Digest,
    anew: u32,
    at: u64,
}

impl<R: BufRead> Read for Following<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            let known = self.feed.layer(&self.layer);
            if known.anew != self.anew {
                return Err(std::io::Error::other("it was damaged and comes anew"));
            }
            let left = usize::try_from(known.bytes.saturating_sub(self.at)).unwrap_or(usize::MAX);
            if left > 0 && !buffer.is_empty() {
                let want = left.min(buffer.len());
                let got = self.file.read_at(&mut buffer[..want], self.at)?;
                self.at += got as u64;
                if got > 0 {
                    return Ok(got);
                }
                // It was emptied: the line that says so is on its way.
                if known.whole {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
            } else if known.whole || buffer.is_empty() {
                return Ok(0);
            }
            self.feed.take()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::{Descriptor, digest_of};
    use super::super::trust::Decision;
    use super::*;
    use crate::model::{Reference, UnixMs};

    fn lines(layer: &Digest, came: &[Came]) -> Vec<u8> {
        let decision =
            Decision { reference: Reference::parse("a:1").expect("a name"), at: UnixMs(0), signed: None };
        let top = Descriptor::new("", layer.clone(), 1);
        let fetched = Fetched { top, documents: Vec::new(), layers: vec![layer.clone()], decision };
        let all = std::iter::once(Came::Chosen(Box::new(fetched))).chain(came.iter().cloned());
        all.flat_map(|came| [serde_json::to_vec(&came).expect("serialises"), b"\n".to_vec()].concat())
            .collect()
    }

    fn feed(
        dir: &std::path::Path,
        layer: &Digest,
        content: &[u8],
        came: &[Came],
    ) -> Feed<std::io::Cursor<Vec<u8>>> {
        std::fs::write(dir.join(format!("{}.part", layer.hex())), content).expect("written");
        let mut feed = Feed::new(std::io::Cursor::new(lines(layer, came)), dir.to_owned());
        feed.chosen().expect("the documents come first");
        feed
    }

    #[test]
    fn layer_is_read_as_far_as_it_came_and_ends_where_it_is_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let layer = digest_of(b"half whole");
        let (bytes, whole) =
            (Came::Bytes { layer: layer.clone(), bytes: 4 }, Came::Whole { layer: layer.clone(), bytes: 10 });
        let mut feed = feed(dir.path(), &layer, b"half whole", &[bytes, whole, Came::All]);

        let mut following = feed.follow(&layer).expect("opens").expect("comes");
        let mut first = [0; 64];
        assert_eq!(following.read(&mut first).expect("reads"), 4);
        let mut rest = String::new();
        following.read_to_string(&mut rest).expect("reads");

        assert_eq!(rest, " whole");
        feed.finish().expect("all is here");
        assert!(feed.follow(&digest_of(b"another")).expect("no error").is_none());
    }

    #[test]
    fn what_stops_in_the_middle_is_never_taken_for_an_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let layer = digest_of(b"half whole");
        let mut feed = feed(dir.path(), &layer, b"half", &[Came::Bytes { layer: layer.clone(), bytes: 4 }]);

        let mut all = Vec::new();
        let end = feed.follow(&layer).expect("opens").expect("comes").read_to_end(&mut all);

        assert!(end.is_err());
        assert!(feed.finish().is_err());
    }

    #[test]
    fn damaged_layer_is_judged_only_once_it_is_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let layer = digest_of(b"good");
        let came = [
            Came::Bytes { layer: layer.clone(), bytes: 3 },
            Came::Anew { layer: layer.clone() },
            Came::Whole { layer: layer.clone(), bytes: 4 },
            Came::All,
        ];
        let mut feed = feed(dir.path(), &layer, b"good", &came);

        let mut all = Vec::new();
        let damaged = feed.follow(&layer).expect("opens").expect("comes").read_to_end(&mut all);

        assert!(damaged.is_err());
        assert!(feed.comes_anew(&layer, 0).expect("goes on"));
        let mut text = String::new();
        feed.follow(&layer).expect("opens").expect("comes").read_to_string(&mut text).expect("reads");
        assert_eq!(text, "good");
        assert!(!feed.comes_anew(&layer, 1).expect("is whole"));
    }
}
