//! TCP, TLS, CONNECT and CONNACK; then packets both ways.
//!
//! Reader and Writer may be dropped at any await without losing a byte: a read appends to the
//! buffer in the same poll in which the socket gave the bytes, and a write takes them from the
//! buffer in the same poll in which the socket took them.

use super::decode::{self, Decoder, Malformed, PublishLimit};
use super::encode::{Connect, EncodeError, Encoder};
use super::{Greeting, Received, Version, reason_text};
use crate::config::Broker;
use crate::net::tls::client::{self, ClientTlsError};
use bytes::{Buf, BytesMut};
use futures_lite::future::poll_fn;
use futures_lite::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// For name resolution, TCP, TLS and CONNACK together: a satellite link takes its time, a
/// black hole must not.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Our keep-alive wish: short enough to notice a dead link, long enough to be cheap on a
/// metered one.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// How long the broker keeps our session after the connection ended (MQTT 5; 3.1.1 keeps it
/// until the broker forgets): longer than the outages people report, not for ever, so that a
/// gateway that was taken away doesn't fill a broker. A broker may grant less.
const SESSION_EXPIRY: Duration = Duration::from_secs(30 * 24 * 3600);

/// Read at once when no large packet is awaited.
const READ_BYTES: usize = 8 << 10;
/// Read at once in the middle of a large packet.
const READ_BYTES_LARGE: usize = 64 << 10;

/// A password file is a line.
const PASSWORD_BYTES_MAX: u64 = 65_535;

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub version: Version,
    pub publish_limit: PublishLimit,
    /// QoS 1 messages that the broker may send before we have acknowledged them (MQTT 5).
    /// Brokers overrun it, so no memory depends on it.
    pub receive_max: u16,
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("connect to {host}:{port}")]
    Tcp {
        host: String,
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error("TLS with {host}:{port}")]
    Tls {
        host: String,
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    TlsFiles(#[from] ClientTlsError),
    #[error("read the password file {}", path.display())]
    Password {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the broker speaks no MQTT {0}")]
    UnsupportedVersion(Version),
    /// Brokers of 3.1.1 alone may close on a CONNECT of MQTT 5 without a word.
    #[error("the broker closed the connection without an answer to CONNECT")]
    ClosedOnConnect,
    #[error("the broker refused the connection: {text} (code {code})")]
    Refused { code: u8, text: &'static str },
    #[error("the broker takes QoS 0 only, which cannot be relied on")]
    QosZeroOnly,
    #[error("no answer within {} s", CONNECT_TIMEOUT.as_secs())]
    TimedOut,
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("write CONNECT")]
    Encode(#[from] EncodeError),
    #[error("wait for CONNACK")]
    Io(#[source] io::Error),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

type Wire = Pin<Box<dyn Stream>>;

pub struct Connection {
    pub greeting: Greeting,
    pub reader: Reader,
    pub writer: Writer,
}

pub struct Reader {
    wire: ReadHalf<Wire>,
    buffer: BytesMut,
    decoder: Decoder,
}

/// Why there are no more packets.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("the broker closed the connection")]
    Closed,
    #[error("read from the broker")]
    Io(#[source] io::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl Reader {
    /// A packet that is already here; reads nothing.
    pub fn buffered(&mut self) -> Result<Option<Received>, ReadError> {
        Ok(self.decoder.next(&mut self.buffer)?)
    }

    /// Waits for bytes, any number of them; look for packets with `buffered` afterwards.
    pub async fn fill(&mut self) -> Result<(), ReadError> {
        match fill(&mut self.wire, &mut self.buffer).await {
            Ok(0) => Err(ReadError::Closed),
            Ok(_) => Ok(()),
            // rustls says so when a peer hangs up without close_notify; most brokers do.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ReadError::Closed),
            Err(error) => Err(ReadError::Io(error)),
        }
    }

    pub fn set_limit(&mut self, limit: PublishLimit) {
        self.decoder.set_limit(limit);
    }
}

pub struct Writer {
    wire: WriteHalf<Wire>,
}

impl Writer {
    /// Writes and flushes all of `bytes`, taking what was written out of it as it goes.
    pub async fn write(&mut self, bytes: &mut BytesMut) -> io::Result<()> {
        while !bytes.is_empty() {
            poll_fn(|cx| {
                let written = ready!(Pin::new(&mut self.wire).poll_write(cx, bytes))?;
                if written == 0 {
                    return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero)));
                }
                bytes.advance(written);
                Poll::Ready(Ok(()))
            })
            .await?;
        }
        poll_fn(|cx| Pin::new(&mut self.wire).poll_flush(cx)).await
    }

    /// Ends the sending side (with TLS: close_notify).
    pub async fn close(&mut self) -> io::Result<()> {
        poll_fn(|cx| Pin::new(&mut self.wire).poll_close(cx)).await
    }
}

/// One attempt, from name to greeting, within `CONNECT_TIMEOUT`.
pub async fn connect(broker: &Broker, options: &Options) -> Result<Connection, ConnectError> {
    let timeout = async {
        smol::Timer::after(CONNECT_TIMEOUT).await;
        Err(ConnectError::TimedOut)
    };
    futures_lite::future::or(attempt(broker, options), timeout).await
}

async fn attempt(broker: &Broker, options: &Options) -> Result<Connection, ConnectError> {
    // Files first: what is wrong with them is worth more to a person than a refused connection.
    let password = match &broker.password_file {
        Some(path) => {
            Some(password(path).map_err(|source| ConnectError::Password { path: path.clone(), source })?)
        }
        None => None,
    };
    let mut wire = wire(broker).await?;

    let encoder = Encoder { version: options.version, packet_bytes_max: None };
    let login = match (&broker.username, &password) {
        (None, None) => None,
        (username, password) => {
            Some((username.as_deref().unwrap_or_default(), password.as_deref().unwrap_or_default()))
        }
    };
    let mut out = BytesMut::new();
    let packet = Connect {
        client_id: &broker.client_id,
        keep_alive_s: KEEP_ALIVE.as_secs() as u16,
        session_expiry_s: SESSION_EXPIRY.as_secs() as u32,
        receive_max: options.receive_max,
        login,
    };
    encoder.connect(&mut out, &packet)?;
    let mut buffer = BytesMut::new();
    let ack = {
        use futures_lite::AsyncWriteExt;
        let closed = |error: io::Error| match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => {
                ConnectError::ClosedOnConnect
            }
            _ => ConnectError::Io(error),
        };
        wire.write_all(&out).await.map_err(closed)?;
        wire.flush().await.map_err(closed)?;
        loop {
            if let Some(ack) = decode::connack(options.version, &mut buffer)? {
                break ack;
            }
            if fill(&mut wire, &mut buffer).await.map_err(closed)? == 0 {
                return Err(ConnectError::ClosedOnConnect);
            }
        }
    };
    let greeting = greeting(options.version, &ack)?;
    let decoder = Decoder::new(options.version, options.publish_limit);
    let (reader, writer) = futures_lite::io::split(wire);
    Ok(Connection {
        greeting,
        reader: Reader { wire: reader, buffer, decoder },
        writer: Writer { wire: writer },
    })
}

async fn wire(broker: &Broker) -> Result<Wire, ConnectError> {
    let (host, port) = (broker.host.clone(), broker.port);
    let tls = match &broker.tls {
        Some(tls) => {
            let tls = tls.clone();
            // Parsing the system's roots takes milliseconds that the executor's thread can't spare.
            let connector = smol::unblock(move || client::connector(&tls)).await?;
            Some((connector, client::server_name(&host)?))
        }
        None => None,
    };
    let tcp = smol::net::TcpStream::connect((host.as_str(), port)).await;
    let tcp = tcp.map_err(|source| ConnectError::Tcp { host: host.clone(), port, source })?;
    // PUBACKs are 4 bytes: waiting for more to send with them would cost a round trip each.
    let _ = tcp.set_nodelay(true);
    match tls {
        None => Ok(Box::pin(tcp)),
        Some((connector, name)) => {
            let tls = connector.connect(name, tcp).await;
            let tls = tls.map_err(|source| ConnectError::Tls { host, port, source })?;
            Ok(Box::pin(tls))
        }
    }
}

fn greeting(version: Version, ack: &decode::ConnAck) -> Result<Greeting, ConnectError> {
    match (version, ack.code) {
        (_, 0) => {}
        // 3.1.1 §3.2.2.3 code 1; MQTT 5 reason 0x84
        (_, 1 | 0x84) => return Err(ConnectError::UnsupportedVersion(version)),
        (_, code @ 2..=5) => {
            let text = match code {
                2 => "the client id is not allowed",
                3 => "server unavailable",
                4 => "bad user name or password",
                _ => "not authorized",
            };
            return Err(ConnectError::Refused { code, text });
        }
        (_, code) => return Err(ConnectError::Refused { code, text: reason_text(code) }),
    }
    if version == Version::V5 && ack.old_layout {
        return Err(ConnectError::UnsupportedVersion(version));
    }
    let given = ack.properties.as_ref();
    if given.and_then(|p| p.max_qos) == Some(0) {
        return Err(ConnectError::QosZeroOnly);
    }
    let keep_alive = given.and_then(|p| p.server_keep_alive);
    Ok(Greeting {
        version,
        session_present: ack.session_present,
        // Zero is a protocol error; one is the least that works.
        receive_max: given.and_then(|p| p.receive_max).unwrap_or(u16::MAX).max(1),
        packet_bytes_max: given.and_then(|p| p.max_packet_size),
        keep_alive: keep_alive.map_or(KEEP_ALIVE, |s| Duration::from_secs(s.into())),
        shared_available: given.and_then(|p| p.shared_subscription_available) != Some(0),
        wildcard_available: given.and_then(|p| p.wildcard_subscription_available) != Some(0),
        identifiers_available: version == Version::V5
            && given.and_then(|p| p.subscription_identifiers_available) != Some(0),
    })
}

/// The file's first line; editors end it with a newline that is no part of the password.
fn password(path: &std::path::Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(PASSWORD_BYTES_MAX + 2).read_to_string(&mut text)?;
    let line = text.strip_suffix('\n').unwrap_or(&text);
    let line = line.strip_suffix('\r').unwrap_or(line);
    Ok(line.to_owned())
}

/// Appends what the wire has; the buffer is zeroed a read at a time and cut back in the same
/// poll, so that a dropped read leaves nothing behind.
async fn fill(wire: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut) -> io::Result<usize> {
    poll_fn(|cx: &mut Context<'_>| {
        let start = buffer.len();
        let want = if start > READ_BYTES { READ_BYTES_LARGE } else { READ_BYTES };
        buffer.resize(start + want, 0);
        let read = Pin::new(&mut *wire).poll_read(cx, &mut buffer[start..]);
        let got = match &read {
            Poll::Ready(Ok(bytes)) => *bytes,
            _ => 0,
        };
        buffer.truncate(start + got);
        read
    })
    .await
}
