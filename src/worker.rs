//! `neap image-worker`: gives the image layer's worker its way to registries, over `net`.
//!
//! A process of its own that does one thing, so everything here blocks. A connection for each
//! request: a pull makes half a dozen, the layers among them long.

use crate::config::ClientTls;
use crate::image::registry::{Answer, Request, Transport};
use crate::net::http::{self, Body, Client, ClientError, Endpoint};
use crate::net::tls::client::connector;
use bytes::Bytes;
use smol::future::FutureExt;
use std::cell::OnceCell;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Over a link that loses most packets and takes seconds for a round trip, a TLS handshake takes
/// most of a minute.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// For the head of an answer, and between two pieces of its body. Going on from there on a new
/// connection costs little.
const SILENCE_MAX: Duration = Duration::from_secs(30);

pub fn main() -> ExitCode {
    crate::image::worker::main(|ca| Ok(Box::new(Wire { ca: ca.map(Path::to_owned), tls: OnceCell::new() })))
}

/// Over TLS, to a host and port.
type Secure = Box<dyn Fn(String, u16) -> Endpoint>;

struct Wire {
    ca: Option<PathBuf>,
    /// Made when it is first needed: reading the system's roots takes a moment.
    tls: OnceCell<Secure>,
}

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
}

impl Transport for Wire {
    fn send(&self, request: &Request) -> io::Result<Box<dyn Answer>> {
        let (host, port) = (request.url.host.clone(), request.url.port);
        let endpoint = match request.url.tls {
            true => self.secure()?(host, port),
            false => Endpoint::Tcp { host, port },
        };
        let client = Client::new(endpoint, None).connect_within(CONNECT_LIMIT);
        let mut sent = http::Request::new(request.method, request.url.target.clone());
        for (name, value) in &request.headers {
            sent = sent.header(name, value);
        }
        if !request.body.is_empty() {
            sent = sent.body(Body::Bytes(request.body.clone()));
        }
        let limit = CONNECT_LIMIT + SILENCE_MAX;
        let response = smol::block_on(async { client.send(sent).await.map_err(failed) }.or(silence(limit)))?;
        Ok(Box::new(Received(response)))
    }
}

struct Received(http::Response);

impl Answer for Received {
    fn status(&self) -> u16 {
        self.0.status
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.0.header(name)
    }

    fn piece(&mut self) -> io::Result<Option<Bytes>> {
        smol::block_on(async { self.0.piece().await.map_err(failed) }.or(silence(SILENCE_MAX)))
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
