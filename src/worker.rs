//! `neap image-worker`: gives the image layer's worker its way to registries, over `net`.
//!
//! A process of its own that does one thing, so everything here blocks. A connection whose answer
//! was read to its end waits for the next request to the same place: over a link with seconds for
//! a round trip, a handshake for each layer would cost more than some layers.

use crate::config::ClientTls;
use crate::image::registry::{Answer, Request, Transport};
use crate::net::http::{self, Body, Client, ClientError, Endpoint, Resting};
use crate::net::tls::client::connector;
use bytes::Bytes;
use smol::future::FutureExt;
use std::cell::{OnceCell, RefCell};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

/// Over a link that loses most packets and takes seconds for a round trip, a TLS handshake takes
/// most of a minute.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// For the head of an answer, and between two pieces of its body. Going on from there on a new
/// connection costs little.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Places whose connections are kept: a registry, a mirror, their token service, blob storage.
const RESTING_MAX: usize = 4;

pub fn main() -> ExitCode {
    let wire =
        |ca: Option<&Path>| Wire { ca: ca.map(Path::to_owned), tls: OnceCell::new(), resting: Rc::default() };
    crate::image::worker::main(|ca| Ok(Box::new(wire(ca))))
}

/// Over TLS, to a host and port.
type Secure = Box<dyn Fn(String, u16) -> Endpoint>;

struct Wire {
    ca: Option<PathBuf>,
    /// Made when it is first needed: reading the system's roots takes a moment.
    tls: OnceCell<Secure>,
    resting: Rc<RefCell<Resters>>,
}

/// Whom a connection leads to: what is said over one is for nobody else.
#[derive(Clone, PartialEq, Eq)]
struct Place {
    tls: bool,
    host: String,
    port: u16,
}

/// Connections that wait, the longest unused first.
type Resters = Vec<(Place, Resting)>;

impl Wire {
    fn secure(&self) -> io::Result<&Secure> {
        if let Some(secure) = self.tls.get() {
            return Ok(secure);
        }
        let trust = ClientTls { ca: self.ca.clone(), ..ClientTls::default() };
        let connector = connector(&trust).map_err(io::Error::other)?;
        let secure = move |host, port| Endpoint::Tls { host, port, connector: connector.clone() };
        Ok(self.tls.get_or_init(|| Box::new(secure)))
    }

    fn take(&self, place: &Place) -> Option<Resting> {
        let mut resting = self.resting.borrow_mut();
        let at = resting.iter().rposition(|(of, _)| of == place)?;
        Some(resting.remove(at).1)
    }
}

impl Transport for Wire {
    fn send(&self, request: &Request) -> io::Result<Box<dyn Answer>> {
        let (host, port) = (request.url.host.clone(), request.url.port);
        let place = Place { tls: request.url.tls, host: host.clone(), port };
        let endpoint = match request.url.tls {
            true => self.secure()?(host, port),
            false => Endpoint::Tcp { host, port },
        };
        let client = Client::new(endpoint, None).connect_within(CONNECT_LIMIT);
        let sent = || {
            let mut sent = http::Request::new(request.method, request.url.target.clone());
            for (name, value) in &request.headers {
                sent = sent.header(name, value);
            }
            if request.body.is_empty() { sent } else { sent.body(Body::Bytes(request.body.clone())) }
        };
        let limit = CONNECT_LIMIT + SILENCE_MAX;
        let response = smol::block_on(
            async {
                if let Some(line) = self.take(&place)
                    // It may have been closed while it rested: then a new one tells.
                    && let Ok(response) = client.send_over(line, sent()).or(stale()).await
                {
                    return Ok(response);
                }
                client.send(sent()).await.map_err(failed)
            }
            .or(silence(limit)),
        )?;
        Ok(Box::new(Received { response: Some(response), place, resting: self.resting.clone() }))
    }
}

/// A link that went down while a connection rested says so by silence alone.
async fn stale<T>() -> Result<T, ClientError> {
    smol::Timer::after(SILENCE_MAX).await;
    Err(ClientError::Read(io::ErrorKind::TimedOut.into()))
}

struct Received {
    response: Option<http::Response>,
    place: Place,
    resting: Rc<RefCell<Resters>>,
}

impl Received {
    fn response(&self) -> &http::Response {
        self.response.as_ref().expect("taken when it is dropped")
    }
}

impl Answer for Received {
    fn status(&self) -> u16 {
        self.response().status
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.response().header(name)
    }

    fn piece(&mut self) -> io::Result<Option<Bytes>> {
        let response = self.response.as_mut().expect("taken when it is dropped");
        smol::block_on(async { response.piece().await.map_err(failed) }.or(silence(SILENCE_MAX)))
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        let Some(line) = self.response.take().and_then(http::Response::rest) else { return };
        let mut resting = self.resting.borrow_mut();
        if resting.len() >= RESTING_MAX {
            resting.remove(0);
        }
        resting.push((self.place.clone(), line));
    }
}

fn failed(error: ClientError) -> io::Error {
    match error {
        // The place is named by whoever asked.
        ClientError::Connect { source, .. } | ClientError::Read(source) => source,
        other => io::Error::other(other),
    }
}

async fn silence<T>(limit: Duration) -> io::Result<T> {
    smol::Timer::after(limit).await;
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("silent for {} s", limit.as_secs())))
}
