//! What is sent: a text, a file, stdin, or an OCI layout directory as the tar stream that it
//! would be. Read by a thread of its own, because files and stdin have no readiness to wait for,
//! and handed over in chunks: nothing is held whole, and an answer can come meanwhile.

use super::units::Input;
use crate::net::http::Body;
use futures_lite::Stream;
use smol::channel::{Receiver, Sender};
use smol::io::AsyncRead;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

const CHUNK_BYTES: usize = 64 * 1024;

/// Chunks read ahead of the network: 256 KiB, enough to keep both sides busy.
const CHUNKS_AHEAD: usize = 4;

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("open {}", file.display())]
    Open {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not an OCI layout: it has no {missing}; `skopeo copy … oci:DIR` makes one", dir.display())]
    NotLayout { dir: PathBuf, missing: &'static str },
}

/// A body that is opened now, so that a missing file is an error before anything is sent.
pub fn body(input: Option<Input>) -> Result<Body, SourceError> {
    match input {
        None => Ok(Body::Empty),
        Some(Input::Text(text)) => Ok(Body::Bytes(text.into_bytes())),
        Some(Input::Stdin) => Ok(Body::Stream(copied(io::stdin()))),
        Some(Input::File(file)) => Ok(Body::Stream(copied(open(&file)?))),
    }
}

/// All of it in memory, at most `bytes_max`: for requests that carry data inside JSON.
pub fn read(input: Option<Input>, bytes_max: u64) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = |reader: &mut dyn Read, bytes: &mut Vec<u8>| reader.take(bytes_max + 1).read_to_end(bytes);
    match input {
        None => {}
        Some(Input::Text(text)) => bytes = text.into_bytes(),
        Some(Input::Stdin) => drop(read(&mut io::stdin().lock(), &mut bytes)?),
        Some(Input::File(file)) => drop(read(&mut open(&file)?, &mut bytes)?),
    }
    anyhow::ensure!(
        bytes.len() as u64 <= bytes_max,
        "the data is larger than {}",
        super::text::size(bytes_max)
    );
    Ok(bytes)
}

/// An image: `-`, a directory, or a file; and its size when it is known.
pub fn image(source: &Path) -> Result<(Body, Option<u64>), SourceError> {
    if source == Path::new("-") {
        return Ok((Body::Stream(copied(io::stdin())), None));
    }
    let at = |error| SourceError::Open { file: source.to_owned(), source: error };
    if source.metadata().map_err(at)?.is_dir() {
        let layout = Layout::open(source)?;
        return Ok((Body::Stream(produced(move |into| layout.write_tar(into))), None));
    }
    let file = open(source)?;
    let length = file.metadata().map_err(at)?.len();
    // a FIFO or /dev/fd/N says 0
    Ok((Body::Stream(copied(file)), Some(length).filter(|&bytes| bytes > 0)))
}

fn open(file: &Path) -> Result<File, SourceError> {
    File::open(file).map_err(|source| SourceError::Open { file: file.to_owned(), source })
}

/// An OCI image layout directory (image-spec, image-layout.md).
#[derive(Debug)]
struct Layout {
    dir: PathBuf,
    blobs: Vec<String>,
}

impl Layout {
    fn open(dir: &Path) -> Result<Self, SourceError> {
        for missing in ["oci-layout", "index.json"] {
            if !dir.join(missing).is_file() {
                return Err(SourceError::NotLayout { dir: dir.to_owned(), missing });
            }
        }
        let blobs_dir = dir.join("blobs/sha256");
        let at = |source| SourceError::Open { file: blobs_dir.clone(), source };
        let mut blobs = Vec::new();
        for entry in std::fs::read_dir(&blobs_dir).map_err(at)? {
            let entry = entry.map_err(at)?;
            // Whatever else lies there (`.DS_Store`, a download that was cut off) is no blob.
            if let Some(name) = entry.file_name().to_str()
                && name.len() == 64
                && name.bytes().all(|b| b.is_ascii_hexdigit())
            {
                blobs.push(name.to_owned());
            }
        }
        blobs.sort();
        Ok(Self { dir: dir.to_owned(), blobs })
    }

    /// The two small files first: who reads the stream then knows what the blobs are for.
    fn write_tar(&self, into: &mut dyn Write) -> io::Result<()> {
        let mut tar = tar::Builder::new(into);
        for name in ["oci-layout", "index.json"] {
            self.append(&mut tar, name)?;
        }
        for blob in &self.blobs {
            self.append(&mut tar, &format!("blobs/sha256/{blob}"))?;
        }
        tar.into_inner()?.flush()
    }

    fn append(&self, tar: &mut tar::Builder<&mut dyn Write>, name: &str) -> io::Result<()> {
        let told = |error: io::Error| io::Error::new(error.kind(), format!("read {name}: {error}"));
        let path = self.dir.join(name);
        // A symlink may lead out of the layout; NONBLOCK, because a FIFO would wait for ever.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let mut file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(told)?;
        let metadata = file.metadata().map_err(told)?;
        if !metadata.is_file() {
            return Err(told(io::Error::other("not a regular file")));
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(metadata.len());
        header.set_mode(0o644);
        header.set_cksum();
        // The length is promised in the header: a file that grows is cut, one that shrinks is an
        // error, and the digest decides about both.
        let mut exact = Exact { left: metadata.len(), file: &mut file };
        tar.append_data(&mut header, name, &mut exact)
    }
}

struct Exact<'a> {
    left: u64,
    file: &'a mut File,
}

impl Read for Exact<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let room = into.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if room == 0 {
            return Ok(0);
        }
        let n = self.file.read(&mut into[..room])?;
        if n == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file became shorter while it was read",
            ));
        }
        self.left -= n as u64;
        Ok(n)
    }
}

type Chunk = io::Result<Vec<u8>>;

fn copied(mut from: impl Read + Send + 'static) -> Pin<Box<dyn AsyncRead + Send>> {
    produced(move |into| io::copy(&mut from, into).map(drop))
}

/// What `produce` writes, on a thread of its own. The thread ends when nobody reads any longer.
fn produced(
    produce: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static,
) -> Pin<Box<dyn AsyncRead + Send>> {
    let (sender, receiver) = smol::channel::bounded::<Chunk>(CHUNKS_AHEAD);
    let work = move || {
        let mut into = io::BufWriter::with_capacity(CHUNK_BYTES, Chunks(sender.clone()));
        if let Err(error) = produce(&mut into).and_then(|()| into.flush()) {
            let _ = sender.send_blocking(Err(error));
        }
        let _ = into.into_parts(); // without the flush that dropping would try again
    };
    match std::thread::Builder::new().name("source".into()).spawn(work) {
        Ok(_) => Box::pin(Chunked { receiver: Box::pin(receiver), chunk: Vec::new(), at: 0 }),
        Err(error) => Box::pin(Failing(Some(error))),
    }
}

struct Chunks(Sender<Chunk>);

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.0.send_blocking(Ok(bytes.to_vec())).map_err(gone)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Chunked {
    receiver: Pin<Box<Receiver<Chunk>>>,
    chunk: Vec<u8>,
    at: usize,
}

impl AsyncRead for Chunked {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        while this.at == this.chunk.len() {
            match ready!(this.receiver.as_mut().poll_next(cx)) {
                None => return Poll::Ready(Ok(0)),
                Some(chunk) => (this.chunk, this.at) = (chunk?, 0),
            }
        }
        let n = into.len().min(this.chunk.len() - this.at);
        into[..n].copy_from_slice(&this.chunk[this.at..this.at + n]);
        this.at += n;
        Poll::Ready(Ok(n))
    }
}

struct Failing(Option<io::Error>);

impl AsyncRead for Failing {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut [u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(self.0.take().map_or(Ok(0), Err))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smol::io::AsyncReadExt;
    use std::fs;

    fn collect(body: Body) -> io::Result<Vec<u8>> {
        match body {
            Body::Empty => Ok(Vec::new()),
            Body::Bytes(bytes) => Ok(bytes),
            Body::Stream(mut reader) => smol::block_on(async {
                let mut bytes = Vec::new();
                reader.read_to_end(&mut bytes).await.map(|_| bytes)
            }),
        }
    }

    fn layout() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let blobs = dir.path().join("blobs/sha256");
        fs::create_dir_all(&blobs).expect("make blobs");
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("write");
        fs::write(dir.path().join("index.json"), "{}").expect("write");
        fs::write(blobs.join("b".repeat(64)), vec![7; 200_000]).expect("write");
        fs::write(blobs.join("a".repeat(64)), "config").expect("write");
        fs::write(blobs.join(".partial"), "not a blob").expect("write");
        fs::write(dir.path().join("private-key"), "not of the layout").expect("write");
        dir
    }

    #[test]
    fn directory_becomes_the_tar_that_it_would_be() {
        let dir = layout();

        let (body, size) = image(dir.path()).expect("a layout");
        let bytes = collect(body).expect("read it");

        assert_eq!(size, None);
        let mut archive = tar::Archive::new(&bytes[..]);
        let names: Vec<(String, u64)> = archive
            .entries()
            .expect("a tar")
            .map(|entry| entry.expect("an entry"))
            .map(|entry| (entry.path().expect("a path").display().to_string(), entry.size()))
            .collect();
        let (a, b) = (format!("blobs/sha256/{}", "a".repeat(64)), format!("blobs/sha256/{}", "b".repeat(64)));
        assert_eq!(names, [("oci-layout".into(), 30), ("index.json".into(), 2), (a, 6), (b, 200_000)]);
    }

    #[test]
    fn symlinked_blob_fails_the_import_instead_of_leaving_the_layout() {
        let dir = layout();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("blobs/sha256").join("c".repeat(64)))
            .expect("link");

        let (body, _) = image(dir.path()).expect("a layout");

        let error = collect(body).expect_err("a symlink").to_string();
        assert!(error.contains("cccc"), "{error}");
    }

    #[test]
    fn other_directory_is_refused_by_name_of_what_is_missing() {
        let dir = tempfile::tempdir().expect("a temporary directory");

        let error = image(dir.path()).map(|_| ()).expect_err("no layout").to_string();

        assert!(error.contains("oci-layout"), "{error}");
    }

    #[test]
    fn file_arrives_as_it_is_and_its_size_is_known() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("a.tar");
        let content: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
        fs::write(&file, &content).expect("write");

        let (streamed, size) = image(&file).expect("a file");

        assert_eq!(size, Some(300_000));
        assert_eq!(collect(streamed).expect("read"), content);
        assert_eq!(collect(body(Some(Input::File(file))).expect("open")).expect("read"), content);
    }

    #[test]
    fn missing_file_is_named_before_anything_is_sent() {
        let error = body(Some(Input::File("/nonexistent/x".into()))).map(|_| ()).expect_err("nothing there");

        assert!(error.to_string().contains("/nonexistent/x"));
    }

    #[test]
    fn failure_in_the_middle_is_not_an_end() {
        let reader = produced(|into| {
            into.write_all(b"half")?;
            into.flush()?;
            Err(io::Error::other("disk gone"))
        });

        let error = collect(Body::Stream(reader)).expect_err("it failed");

        assert_eq!(error.to_string(), "disk gone");
    }

    #[test]
    fn data_inside_a_request_has_a_bound() {
        assert_eq!(read(Some(Input::Text("abc".into())), 3).expect("it fits"), b"abc");
        assert!(read(Some(Input::Text("abcd".into())), 3).is_err());
    }
}
