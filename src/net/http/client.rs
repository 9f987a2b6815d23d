//! A small HTTP client over the Unix socket, TCP or TLS. The command line talks to the daemon
//! with it, the image worker to registries.
//!
//! Bodies stream both ways. The connection runs inside the response, so that nothing needs to
//! be spawned: whoever reads the body drives it, and dropping the response closes it. Who has
//! read a body to its end may keep the connection for the next request (`Response::rest`).

use futures_rustls::TlsConnector;
use futures_rustls::pki_types::ServerName;
use hyper::body::{Body as _, Bytes, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::SendRequest;
use smol::future::FutureExt;
use smol::io::{AsyncRead, AsyncWrite};
use smol::net::{TcpStream, unix::UnixStream};
use smol_hyper::rt::FuturesIo;
use std::future::{Future, poll_fn};
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// To connect and, with TLS, to shake hands. An answer may take as long as a function does.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const PIECE_BYTES: usize = 64 * 1024;

/// Where the server is.
#[derive(Clone)]
pub enum Endpoint {
    Unix(PathBuf),
    Tcp {
        host: String,
        port: u16,
    },
    /// `connector`: from `net::tls::client`.
    Tls {
        host: String,
        port: u16,
        connector: TlsConnector,
    },
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp { host, port } => write!(f, "http://{host}:{port}"),
            Self::Tls { host, port, .. } => write!(f, "https://{host}:{port}"),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there: the command line's exit code 3.
    #[error("connect to {endpoint}")]
    Connect {
        endpoint: String,
        #[source]
        source: io::Error,
    },
    #[error("bad request: {0}")]
    Request(String),
    #[error("talk to {endpoint}")]
    Wire {
        endpoint: String,
        #[source]
        source: hyper::Error,
    },
    #[error("read the answer")]
    Read(#[source] io::Error),
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

#[derive(Clone)]
pub struct Client {
    endpoint: Endpoint,
    /// Sent as `Authorization: Bearer …`.
    token: Option<String>,
    connect_limit: Duration,
}

pub struct Request {
    /// Upper case.
    pub method: String,
    /// Path and query, percent-encoded, beginning with `/`.
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Body,
}

impl Request {
    pub fn new(method: &str, target: impl Into<String>) -> Self {
        Self { method: method.to_owned(), target: target.into(), headers: Vec::new(), body: Body::Empty }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn body(mut self, body: Body) -> Self {
        self.body = body;
        self
    }
}

pub enum Body {
    Empty,
    Bytes(Vec<u8>),
    /// Sent chunked, as it comes.
    Stream(Pin<Box<dyn AsyncRead + Send>>),
}

/// Status and headers are here; the body is read from it.
pub struct Response {
    pub status: u16,
    /// Lower-case names.
    pub headers: Vec<(String, String)>,
    wire: Wire,
    sender: SendRequest<Outgoing>,
    /// Read but not yet asked for.
    rest: Bytes,
}

/// A connection between two requests.
pub struct Resting {
    sender: SendRequest<Outgoing>,
    connection: Connection,
}

impl Client {
    pub fn new(endpoint: Endpoint, token: Option<String>) -> Self {
        Self { endpoint, token, connect_limit: CONNECT_LIMIT }
    }

    /// For links on which a handshake takes longer than it does elsewhere.
    pub fn connect_within(mut self, limit: Duration) -> Self {
        self.connect_limit = limit;
        self
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Over a connection of its own. Returns when the answer's head has arrived.
    pub async fn send(&self, request: Request) -> Result<Response, ClientError> {
        let socket = self.connect().await?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(FuturesIo::new(Patient::new(socket)))
                .await
                .map_err(|source| self.wire(source))?;
        let connection: Connection = Box::pin(async move {
            let _ = connection.await; // the response or its body tells what went wrong
        });
        self.send_over(Resting { sender, connection }, request).await
    }

    /// The same over one that has rested. The server may have closed it meanwhile: then this
    /// fails, and whoever asks for what may be asked twice sends again over a new one.
    pub async fn send_over(&self, line: Resting, request: Request) -> Result<Response, ClientError> {
        let host = match &self.endpoint {
            Endpoint::Unix(_) => "localhost".to_owned(),
            // Addresses that are signed are signed without the scheme's own port (RFC 9110 §4.2.3).
            Endpoint::Tcp { host, port: 80 } | Endpoint::Tls { host, port: 443, .. } => literal(host),
            Endpoint::Tcp { host, port } | Endpoint::Tls { host, port, .. } => {
                format!("{}:{port}", literal(host))
            }
        };
        let mut builder = hyper::Request::builder().method(request.method.as_str()).uri(&request.target);
        builder = builder.header("host", host).header("user-agent", "neap");
        if let Some(token) = &self.token {
            builder = builder.header("authorization", format!("Bearer {token}"));
        }
        for (name, value) in &request.headers {
            builder = builder.header(name, value);
        }
        let body = Outgoing::new(request.body);
        let request = builder.body(body).map_err(|error| ClientError::Request(error.to_string()))?;

        let Resting { mut sender, mut connection } = line;
        let mut over = false;
        let answer = {
            let mut answer = std::pin::pin!(sender.send_request(request));
            poll_fn(|cx| {
                over = over || connection.as_mut().poll(cx).is_ready();
                answer.as_mut().poll(cx)
            })
            .await
        };
        let (head, body) = answer.map_err(|source| self.wire(source))?.into_parts();
        let text =
            |value: &hyper::header::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        let headers = head.headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value)));
        Ok(Response {
            status: head.status.as_u16(),
            headers: headers.collect(),
            wire: Wire { connection: (!over).then_some(connection), body, ended: false },
            sender,
            rest: Bytes::new(),
        })
    }

    fn wire(&self, source: hyper::Error) -> ClientError {
        ClientError::Wire { endpoint: self.endpoint.to_string(), source }
    }

    pub(super) async fn connect(&self) -> Result<Pin<Box<dyn Socket>>, ClientError> {
        let connect = async {
            match &self.endpoint {
                Endpoint::Unix(path) => {
                    Ok(Box::pin(UnixStream::connect(path).await?) as Pin<Box<dyn Socket>>)
                }
                Endpoint::Tcp { host, port } => {
                    let socket = TcpStream::connect((bare(host), *port)).await?;
                    socket.set_nodelay(true)?;
                    Ok(Box::pin(socket) as Pin<Box<dyn Socket>>)
                }
                Endpoint::Tls { host, port, connector } => {
                    let name = ServerName::try_from(bare(host).to_owned()).map_err(io::Error::other)?;
                    let socket = TcpStream::connect((bare(host), *port)).await?;
                    socket.set_nodelay(true)?;
                    let socket = connector.connect(name, socket).await?;
                    Ok(Box::pin(socket) as Pin<Box<dyn Socket>>)
                }
            }
        };
        let limit = async {
            smol::Timer::after(self.connect_limit).await;
            Err(io::ErrorKind::TimedOut.into())
        };
        let endpoint = self.endpoint.to_string();
        connect.or(limit).await.map_err(|source| ClientError::Connect { endpoint, source })
    }
}

/// Whether it can be asked for: a path and a query.
pub fn is_target(target: &str) -> bool {
    target.starts_with('/') && hyper::Uri::try_from(target).is_ok()
}

/// An IPv6 address with the brackets it has in `Host` (RFC 9110 §7.2).
fn literal(host: &str) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() }
}

/// An IPv6 address without the brackets it has in a URL.
fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

impl Response {
    /// By its lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The next piece of the body; `None` at its end.
    pub async fn piece(&mut self) -> Result<Option<Bytes>, ClientError> {
        if !self.rest.is_empty() {
            return Ok(Some(std::mem::take(&mut self.rest)));
        }
        poll_fn(|cx| self.wire.poll_piece(cx)).await.map_err(ClientError::Read)
    }

    /// The next line without its end; `None` when there are no more. `bytes_max`: of one line.
    pub async fn line(&mut self, bytes_max: usize) -> Result<Option<Vec<u8>>, ClientError> {
        let mut line = Vec::new();
        while let Some(mut piece) = self.piece().await? {
            let end = piece.iter().position(|byte| *byte == b'\n');
            line.extend_from_slice(&piece[..end.unwrap_or(piece.len())]);
            if line.len() > bytes_max {
                return Err(ClientError::TooLarge(bytes_max));
            }
            if let Some(end) = end {
                self.rest = piece.split_off(end + 1);
                return Ok(Some(line));
            }
        }
        Ok((!line.is_empty()).then_some(line))
    }

    /// The connection, for another request: if the body was read to its end and the server lets it
    /// stand.
    pub fn rest(self) -> Option<Resting> {
        let Self { wire: Wire { connection, body, ended }, sender, rest, .. } = self;
        if !rest.is_empty() || !(ended || body.is_end_stream()) {
            return None;
        }
        let mut connection = connection?;
        // It notes the answer's end, and whether more may follow.
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let over = connection.as_mut().poll(&mut cx).is_ready();
        (!over && sender.is_ready()).then_some(Resting { sender, connection })
    }

    /// The whole body, or what is left of it.
    pub async fn bytes(&mut self, bytes_max: usize) -> Result<Vec<u8>, ClientError> {
        let mut all = Vec::new();
        while let Some(piece) = self.piece().await? {
            if all.len() + piece.len() > bytes_max {
                return Err(ClientError::TooLarge(bytes_max));
            }
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }
}

pub(super) trait Socket: AsyncRead + AsyncWrite + Send {}
impl<S: AsyncRead + AsyncWrite + Send> Socket for S {}

/// Keeps reading when the server has stopped to: one that refuses a large body answers and
/// closes, and hyper would give up at its next write, before having read why.
pub(super) struct Patient {
    socket: Pin<Box<dyn Socket>>,
    /// Writing failed. The reader ends the connection: by the answer, or by its absence.
    deaf: bool,
}

impl Patient {
    pub fn new(socket: Pin<Box<dyn Socket>>) -> Self {
        Self { socket, deaf: false }
    }

    fn listen_on<T>(&mut self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        use io::ErrorKind::{BrokenPipe, ConnectionReset};
        match written {
            Poll::Ready(Err(error)) if matches!(error.kind(), BrokenPipe | ConnectionReset) => {
                self.deaf = true;
                Poll::Pending
            }
            other => other,
        }
    }
}

impl AsyncRead for Patient {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        self.socket.as_mut().poll_read(cx, into)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.deaf {
            return Poll::Pending;
        }
        let written = self.socket.as_mut().poll_write(cx, bytes);
        self.listen_on(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.deaf {
            return Poll::Pending;
        }
        let flushed = self.socket.as_mut().poll_flush(cx);
        self.listen_on(flushed)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.as_mut().poll_close(cx)
    }
}

pub(super) type Connection = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Wire {
    connection: Option<Connection>,
    body: Incoming,
    /// The body was read to its end.
    ended: bool,
}

impl Wire {
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        loop {
            if let Some(connection) = &mut self.connection
                && connection.as_mut().poll(cx).is_ready()
            {
                self.connection = None;
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => {
                    self.ended = true;
                    return Poll::Ready(Ok(None));
                }
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if !data.is_empty() => return Poll::Ready(Ok(Some(data))),
                    _ => {} // trailers
                },
            }
        }
    }
}

pub(super) struct Outgoing {
    body: Body,
    /// Room to read a stream into; made at its first read.
    piece: Vec<u8>,
}

impl Outgoing {
    pub fn new(body: Body) -> Self {
        Self { body, piece: Vec::new() }
    }
}

impl hyper::body::Body for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = self.get_mut();
        match &mut this.body {
            Body::Empty => Poll::Ready(None),
            Body::Bytes(bytes) => {
                let bytes = Bytes::from(std::mem::take(bytes));
                this.body = Body::Empty;
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Body::Stream(stream) => {
                this.piece.resize(PIECE_BYTES, 0);
                let amount = ready!(stream.as_mut().poll_read(cx, &mut this.piece))?;
                let piece = Bytes::copy_from_slice(&this.piece[..amount]);
                Poll::Ready((amount > 0).then(|| Ok(Frame::data(piece))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(&self.body, Body::Empty) || matches!(&self.body, Body::Bytes(b) if b.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            Body::Empty => SizeHint::with_exact(0),
            Body::Bytes(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Body::Stream(_) => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_brackets_in_host() {
        for (host, told) in [("::1", "[::1]"), ("[::1]", "[::1]"), ("h.example", "h.example")] {
            assert_eq!(literal(host), told);
        }
    }

    #[test]
    fn targets_are_what_can_be_asked_for() {
        assert!(is_target("/a/b%20c?x=1") && is_target("/"));
        assert!(!is_target("/a<b>") && !is_target("a") && !is_target("/?x=<"));
    }
}
