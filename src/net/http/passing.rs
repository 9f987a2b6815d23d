//! Messages on their way through: a request that goes on to a function as it came, an answer
//! that goes back to the caller as the function gave it.
//!
//! Between the two connections nothing is copied and nothing piles up: a piece is read from one
//! when the other asks for it, trailers included. So a body may be as long as it likes and take
//! as long as its call may; memory holds a piece of it.

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{HeaderName, HeaderValue};
use smol::channel::Sender;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

/// A header line; names are lower case, values bytes as they came.
pub type Line = (String, Vec<u8>);

/// A request as it goes to a function.
#[derive(Debug)]
pub struct Passing {
    pub method: String,
    /// Path and query, percent-encoded.
    pub target: String,
    pub headers: Vec<Line>,
    pub body: Streamed,
}

/// A function's answer: its head is here, its body is on its way.
#[derive(Debug)]
pub struct Returned {
    pub status: u16,
    pub headers: Vec<Line>,
    pub body: Streamed,
}

impl Returned {
    /// Of the first line of that name, if it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }
}

pub fn header<'a>(headers: &'a [Line], name: &str) -> Option<&'a str> {
    let (_, value) = headers.iter().find(|(n, _)| n == name)?;
    std::str::from_utf8(value).ok()
}

/// How a watched body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    Whole,
    /// Its sender broke off.
    Broken,
    /// Its reader let it go before its end.
    Left,
}

/// A body, from memory or from a connection.
pub struct Streamed {
    /// Comes before what is left of the source.
    ahead: Bytes,
    source: Source,
    watcher: Option<Sender<Finish>>,
    trailed: Option<Sender<Vec<Line>>>,
}

enum Source {
    Whole(Bytes),
    Incoming(Incoming),
}

/// A part of a body.
#[derive(Debug)]
pub enum Piece {
    Data(Bytes),
    Trailers(Vec<Line>),
}

#[derive(Debug, thiserror::Error)]
pub enum WholeError {
    #[error("the body is larger than {0} bytes")]
    TooLarge(u64),
    #[error("the body broke off")]
    Broken(#[source] hyper::Error),
}

impl From<Vec<u8>> for Streamed {
    fn from(bytes: Vec<u8>) -> Self {
        Self { ahead: Bytes::new(), source: Source::Whole(Bytes::from(bytes)), watcher: None, trailed: None }
    }
}

impl std::fmt::Debug for Streamed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Streamed").field("length", &self.length()).finish_non_exhaustive()
    }
}

impl Streamed {
    pub(super) fn incoming(body: Incoming) -> Self {
        Self { ahead: Bytes::new(), source: Source::Incoming(body), watcher: None, trailed: None }
    }

    /// Tells `watcher` once how the body ended, be it by being dropped.
    pub fn watched(mut self, watcher: Sender<Finish>) -> Self {
        self.watcher = Some(watcher);
        self
    }

    /// Tells `trailed` of its trailers as they pass.
    pub fn trailed(mut self, trailed: Sender<Vec<Line>>) -> Self {
        self.trailed = Some(trailed);
        self
    }

    /// What is left of it, if that is known.
    pub fn length(&self) -> Option<u64> {
        self.size_hint().exact()
    }

    /// All of it in memory; more than `bytes_max` is refused as soon as it is known. What came
    /// until then is left in `into`.
    pub async fn whole(self, bytes_max: u64, into: &mut Vec<u8>) -> Result<(), WholeError> {
        self.whole_with_trailers(bytes_max, into, &mut Vec::new()).await
    }

    pub async fn whole_with_trailers(
        mut self,
        bytes_max: u64,
        into: &mut Vec<u8>,
        trailers: &mut Vec<Line>,
    ) -> Result<(), WholeError> {
        if self.size_hint().lower() > bytes_max {
            return Err(WholeError::TooLarge(bytes_max));
        }
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut self).poll_frame(cx)).await {
            let piece = match frame.map_err(WholeError::Broken)?.into_data() {
                Ok(piece) => piece,
                Err(frame) => {
                    trailers.extend(frame.into_trailers().map(|map| lines(&map)).unwrap_or_default());
                    continue;
                }
            };
            if (into.len() + piece.len()) as u64 > bytes_max {
                return Err(WholeError::TooLarge(bytes_max));
            }
            into.extend_from_slice(&piece);
        }
        Ok(())
    }

    /// What was read of it too far, given back.
    pub fn give_back(&mut self, data: Vec<u8>) {
        self.ahead = [data.as_slice(), &self.ahead].concat().into();
    }

    /// The next part of it, as it comes; `None` at its end.
    pub async fn piece(&mut self) -> Option<Result<Piece, WholeError>> {
        let frame = poll_fn(|cx| Pin::new(&mut *self).poll_frame(cx)).await?;
        Some(match frame.map_err(WholeError::Broken).map(Frame::into_data) {
            Ok(Ok(data)) => Ok(Piece::Data(data)),
            Ok(Err(frame)) => {
                Ok(Piece::Trailers(frame.into_trailers().map(|map| lines(&map)).unwrap_or_default()))
            }
            Err(error) => Err(error),
        })
    }

    fn finish(&mut self, how: Finish) {
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.try_send(how); // nobody has to care
        }
    }
}

impl Body for Streamed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let frame = match &mut this.source {
            _ if !this.ahead.is_empty() => Some(Ok(Frame::data(std::mem::take(&mut this.ahead)))),
            Source::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                (!bytes.is_empty()).then(|| Ok(Frame::data(bytes)))
            }
            Source::Incoming(body) => ready!(Pin::new(body).poll_frame(cx)),
        };
        if let Some(Ok(frame)) = &frame
            && let (Some(map), Some(trailed)) = (frame.trailers_ref(), &this.trailed)
        {
            let _ = trailed.try_send(lines(map)); // nobody has to care
        }
        match &frame {
            None => this.finish(Finish::Whole),
            Some(Err(_)) => this.finish(Finish::Broken),
            // hyper doesn't ask again once it knows that it has everything.
            Some(Ok(_)) if this.is_end_stream() => this.finish(Finish::Whole),
            Some(Ok(_)) => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let source_ended = match &self.source {
            Source::Whole(bytes) => bytes.is_empty(),
            Source::Incoming(body) => body.is_end_stream(),
        };
        self.ahead.is_empty() && source_ended
    }

    fn size_hint(&self) -> SizeHint {
        let ahead = self.ahead.len() as u64;
        let rest = match &self.source {
            Source::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Incoming(body) => body.size_hint(),
        };
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + ahead);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + ahead);
        }
        hint
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        let how = if self.is_end_stream() { Finish::Whole } else { Finish::Left };
        self.finish(how);
    }
}

/// A request's body, shared by its two possible readers: the application's, and a function that
/// it is passed on to.
#[derive(Clone, Debug)]
pub(super) struct Shared(Arc<Mutex<Option<Incoming>>>);

impl Shared {
    pub(super) fn new(body: Incoming) -> Self {
        Self(Arc::new(Mutex::new(Some(body))))
    }

    /// `None` once it was taken.
    pub(super) fn poll_frame(
        &self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn take(&self) -> Option<Incoming> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Takes the body of a request, to pass it on as it comes.
pub fn take_body(request: &http_types::Request) -> Streamed {
    let shared = request.ext().get::<Shared>();
    shared.and_then(Shared::take).map_or_else(|| Vec::new().into(), Streamed::incoming)
}

/// In a response's extensions: what it says instead, as a function said it.
pub(super) struct Passed(Mutex<Option<Returned>>);

/// The response that passes a function's answer on. Headers that are set on it come on top.
pub fn passed(answer: Returned) -> http_types::Response {
    let status = http_types::StatusCode::try_from(answer.status);
    let mut response = http_types::Response::new(status.unwrap_or(http_types::StatusCode::Ok));
    response.ext_mut().insert(Passed(Mutex::new(Some(answer))));
    response
}

impl Passed {
    pub(super) fn take(&self) -> Option<Returned> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Bad names and values are left out rather than sent split.
pub(super) fn append(map: &mut hyper::HeaderMap, lines: Vec<Line>) {
    for (name, value) in lines {
        let name = HeaderName::from_bytes(name.as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(&value)) {
            map.append(name, value);
        }
    }
}

pub(super) fn lines(map: &hyper::HeaderMap) -> Vec<Line> {
    map.iter().map(|(name, value)| (name.as_str().to_owned(), value.as_bytes().to_vec())).collect()
}

pub(super) fn broken(error: hyper::Error) -> io::Error {
    io::Error::other(error)
}
