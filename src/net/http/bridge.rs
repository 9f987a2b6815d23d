//! hyper ↔ http_types, the types that tide speaks: requests are checked here once, so that
//! nothing behind this file meets a header it would panic on or a length with two meanings.
//!
//! http_types holds header values as ASCII and panics when outside text that isn't is inserted
//! (http-types issue 519), so values cross by `HeaderValue::from_bytes` alone.

use super::passing::{self, Passed, Shared, Streamed};
use super::read_filled;
use super::watched::Busy;
use crate::model::api::Problem;
use http_types::headers::{HeaderName, HeaderValue};
use http_types::{Method, StatusCode, Url};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header;
use smol::io::{AsyncBufRead, AsyncRead};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::str::FromStr;
use std::task::{Context, Poll, ready};

/// Longest request target: what proxies and browsers agree on (RFC 9110 §4.1 asks for 8000).
const TARGET_BYTES_MAX: usize = 8 * 1024;
/// A response leaves in pieces of this size, so that a large one is not copied whole.
const PIECE_BYTES: usize = 64 * 1024;

/// Who sent a request: an extension of every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Through the Unix socket, whose file mode is the guard.
    Unix,
    Tcp {
        address: SocketAddr,
        /// A client certificate was verified.
        certificate: bool,
    },
}

/// The request target as it was sent, still percent-encoded: an extension of every request.
/// (The URL that tide routes by is normalised.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Begins with `/`.
    pub path: String,
    /// Without the `?`; empty when there is none.
    pub query: String,
}

/// Why a request goes no further.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    status: StatusCode,
    detail: &'static str,
}

impl Refusal {
    pub(super) fn response(&self) -> http_types::Response {
        let mut response = problem(self.status, Some(self.detail.to_owned()), Vec::new());
        // Whatever is behind a request that we did not understand is not understood either.
        response.insert_header("connection", "close");
        response
    }
}

/// An `application/problem+json` answer (RFC 9457).
pub fn problem(status: StatusCode, detail: Option<String>, errors: Vec<String>) -> http_types::Response {
    let title = status.canonical_reason().to_lowercase();
    let problem = Problem { title, status: status.into(), detail, errors };
    let mut response = http_types::Response::new(status);
    response.set_body(serde_json::to_vec(&problem).expect("strings and numbers always serialise"));
    response.insert_header("content-type", "application/problem+json");
    response
}

pub(super) fn request(request: hyper::Request<Incoming>, peer: Peer) -> Result<http_types::Request, Refusal> {
    let (head, body) = request.into_parts();
    check_framing(&head.headers)?;
    if head.version == hyper::Version::HTTP_11 && head.headers.get_all(header::HOST).iter().count() != 1 {
        return refuse(StatusCode::BadRequest, "an HTTP/1.1 request has one Host header");
    }
    let Ok(method) = Method::from_str(head.method.as_str()) else {
        return refuse(StatusCode::NotImplemented, "unknown method");
    };
    let target = head.uri.path_and_query().map(|t| t.as_str()).unwrap_or("");
    let (url, target) = parse_target(target)?;

    let mut request = http_types::Request::new(method, url);
    for (name, value) in &head.headers {
        let name = HeaderName::from_bytes(name.as_str().as_bytes().to_vec());
        let value = HeaderValue::from_bytes(value.as_bytes().to_vec());
        let (Ok(name), Ok(value)) = (name, value) else {
            return refuse(
                StatusCode::BadRequest,
                "a header holds bytes that are not ASCII; percent-encode them",
            );
        };
        request.append_header(name, value);
    }
    let length = body.size_hint().exact();
    if length != Some(0) {
        let length = length.and_then(|length| usize::try_from(length).ok());
        // `set_body` would add a content type of its own.
        let given = request.header("content-type").is_some();
        let body = Shared::new(body);
        request.ext_mut().insert(body.clone());
        request.set_body(http_types::Body::from_reader(Frames { body, piece: Bytes::new() }, length));
        if !given {
            request.remove_header("content-type");
        }
    }
    request.ext_mut().insert(peer);
    request.ext_mut().insert(target);
    Ok(request)
}

/// hyper decodes `gzip, chunked` as if it were chunked alone; a proxy in front might not (RFC
/// 9112 §6.1). A Content-Length beside chunked never gets here: hyper ignores it, as §6.3 has
/// it, and closes the connection after the answer.
fn check_framing(headers: &hyper::HeaderMap) -> Result<(), Refusal> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let Some(coding) = codings.next() else { return Ok(()) };
    if codings.next().is_some() || !coding.as_bytes().eq_ignore_ascii_case(b"chunked") {
        return refuse(StatusCode::NotImplemented, "no transfer coding but chunked is known");
    }
    Ok(())
}

fn parse_target(target: &str) -> Result<(Url, Target), Refusal> {
    if target.len() > TARGET_BYTES_MAX {
        return refuse(StatusCode::UriTooLong, "the URL is longer than 8 KiB");
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    // A URL parser resolves `..`, also as %2e%2e, and takes `\` for `/`: the path that was
    // routed and the path that a function sees would be two.
    let dots = |segment: &str| {
        let plain = segment.replace("%2e", ".").replace("%2E", ".");
        plain == "." || plain == ".."
    };
    if !path.starts_with('/') || path.contains('\\') || path.split('/').any(dots) {
        return refuse(
            StatusCode::BadRequest,
            "the path begins with / and has no . or .. between slashes and no backslash",
        );
    }
    let Ok(url) = Url::parse(&format!("http://neap{target}")) else {
        return refuse(StatusCode::BadRequest, "the URL can't be parsed");
    };
    Ok((url, Target { path: path.to_owned(), query: query.to_owned() }))
}

fn refuse<T>(status: StatusCode, detail: &'static str) -> Result<T, Refusal> {
    Err(Refusal { status, detail })
}

pub(super) fn response(mut response: http_types::Response, busy: Busy) -> hyper::Response<Pieces> {
    let mut headers = hyper::HeaderMap::new();
    for (name, values) in response.iter() {
        for value in values {
            let name = header::HeaderName::from_bytes(name.as_str().as_bytes());
            let value = header::HeaderValue::from_bytes(value.as_str().as_bytes());
            // Only our own code makes these; a bad one is left out rather than sent split.
            if let (Ok(name), Ok(value)) = (name, value) {
                headers.append(name, value);
            }
        }
    }
    if let Some(answer) = response.ext().get::<Passed>().and_then(Passed::take) {
        passing::append(&mut headers, answer.headers);
        let source = Source::Passed(answer.body);
        let mut passed = hyper::Response::new(Pieces { source, _busy: busy });
        *passed.status_mut() =
            hyper::StatusCode::from_u16(answer.status).unwrap_or(hyper::StatusCode::BAD_GATEWAY);
        *passed.headers_mut() = headers;
        return passed;
    }
    let status = hyper::StatusCode::from_u16(response.status().into());
    let remaining = response.len();
    // Last: taking the body sets a content type where there was none.
    let body = response.take_body().into_reader();
    let source = Source::Own { body, remaining };
    let mut answer = hyper::Response::new(Pieces { source, _busy: busy });
    *answer.status_mut() = status.unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    *answer.headers_mut() = headers;
    answer
}

/// A request's body as http_types wants it: a reader.
struct Frames {
    body: Shared,
    piece: Bytes,
}

impl AsyncBufRead for Frames {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        while this.piece.is_empty() {
            match ready!(this.body.poll_frame(cx)) {
                None => break,
                // Trailers have no place in an event.
                Some(Ok(frame)) => this.piece = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => return Poll::Ready(Err(passing::broken(error))),
            }
        }
        Poll::Ready(Ok(&this.piece))
    }

    fn consume(self: Pin<&mut Self>, amount: usize) {
        let piece = &mut self.get_mut().piece;
        let _ = piece.split_to(amount.min(piece.len()));
    }
}

impl AsyncRead for Frames {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        read_filled(self, cx, buffer)
    }
}

/// A response's body as hyper wants it: frames.
pub(super) struct Pieces {
    source: Source,
    /// The request counts as running until its answer has been handed over.
    _busy: Busy,
}

enum Source {
    Own {
        body: Box<dyn AsyncBufRead + Unpin + Send + Sync>,
        /// `None`: as long as it is, chunked.
        remaining: Option<usize>,
    },
    /// A function's, with its trailers.
    Passed(Streamed),
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let (body, remaining) = match &mut self.get_mut().source {
            Source::Own { body, remaining } => (body, remaining),
            Source::Passed(body) => return Pin::new(body).poll_frame(cx).map_err(passing::broken),
        };
        let most = remaining.unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        if most == 0 {
            return Poll::Ready(None);
        }
        let found = ready!(Pin::new(&mut *body).poll_fill_buf(cx))?;
        let piece = Bytes::copy_from_slice(&found[..found.len().min(most)]);
        Pin::new(body).consume(piece.len());
        if let Some(remaining) = remaining {
            if piece.is_empty() {
                return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())));
            }
            *remaining -= piece.len();
        }
        Poll::Ready((!piece.is_empty()).then(|| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Own { remaining, .. } => *remaining == Some(0),
            Source::Passed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Own { remaining, .. } => {
                remaining.map(|length| SizeHint::with_exact(length as u64)).unwrap_or_default()
            }
            Source::Passed(body) => body.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<T>(result: Result<T, Refusal>) -> Option<u16> {
        result.err().map(|refusal| refusal.status.into())
    }

    #[test]
    fn target_with_two_meanings_is_refused() {
        for bad in ["", "*", "a", "/a/../b", "/a/%2e%2E/b", "/./", "/a\\b", "/.."] {
            assert_eq!(refused(parse_target(bad)), Some(400), "{bad:?}");
        }
        assert_eq!(refused(parse_target(&format!("/{}", "a".repeat(TARGET_BYTES_MAX)))), Some(414));

        let (url, target) = parse_target("/a//b/...?x=../y?z").expect("a good target");

        assert_eq!((url.path(), url.query()), ("/a//b/...", Some("x=../y?z")));
        assert_eq!(target, Target { path: "/a//b/...".into(), query: "x=../y?z".into() });
    }

    #[test]
    fn framing_with_two_meanings_is_refused() {
        let headers = |lines: &[(&str, &str)]| {
            let parse = |(name, value): &(&str, &str)| {
                let name = header::HeaderName::from_bytes(name.as_bytes()).expect("a good name");
                (name, header::HeaderValue::from_str(value).expect("a good value"))
            };
            let mut map = hyper::HeaderMap::new();
            for (name, value) in lines.iter().map(parse) {
                map.append(name, value);
            }
            map
        };

        let te = "transfer-encoding";
        assert_eq!(refused(check_framing(&headers(&[(te, "chunked")]))), None);
        assert_eq!(refused(check_framing(&headers(&[("content-length", "3")]))), None);
        assert_eq!(refused(check_framing(&headers(&[(te, "gzip, chunked")]))), Some(501));
        assert_eq!(refused(check_framing(&headers(&[(te, "gzip"), (te, "chunked")]))), Some(501));
    }
}
