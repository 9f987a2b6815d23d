//! POST after POST over one connection that is kept: what an uplink without MQTT speaks.
//!
//! A handshake for each batch would cost a metered link more than the batch. A kept connection
//! that the server closed meanwhile is noticed before its next use or by it; then the request
//! goes once more on a new one, which a receiver must bear (deliveries come at least once).

use super::client::{Body, Client, ClientError, Connection, Endpoint, Outgoing, Patient};
use http_body_util::BodyExt;
use hyper::client::conn::http1::SendRequest;
use smol_hyper::rt::FuturesIo;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

/// Of an answer's text: enough to tell a person what is wrong. One that is longer ends the
/// connection, it would have to be read to its end.
const ANSWER_BYTES_MAX: usize = 16 << 10;

pub struct Poster {
    client: Client,
    target: String,
    headers: Vec<(String, String)>,
    kept: Option<Kept>,
}

struct Kept {
    sender: SendRequest<Outgoing>,
    connection: Connection,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub retry_after: Option<String>,
    /// The head of its body.
    pub text: String,
}

impl Poster {
    /// `headers` go with every request.
    pub fn new(endpoint: Endpoint, target: String, headers: Vec<(String, String)>) -> Self {
        Self { client: Client::new(endpoint, None), target, headers, kept: None }
    }

    /// The time for an answer; without one in time the connection is given up.
    pub async fn post(&mut self, body: Vec<u8>, limit: Duration) -> Result<Option<Answer>, ClientError> {
        let late = async {
            smol::Timer::after(limit).await;
            Ok(None)
        };
        let answer = smol::future::or(async { self.exchange(body).await.map(Some) }, late).await;
        if !matches!(answer, Ok(Some(_))) {
            self.kept = None;
        }
        answer
    }

    async fn exchange(&mut self, body: Vec<u8>) -> Result<Answer, ClientError> {
        if let Some(kept) = self.usable().await {
            let again = body.clone();
            match self.talk(kept, body).await {
                Ok(answer) => return Ok(answer),
                // It was closed while it rested.
                Err(_) => {
                    let fresh = self.open().await?;
                    return self.talk(fresh, again).await;
                }
            }
        }
        let fresh = self.open().await?;
        self.talk(fresh, body).await
    }

    /// The kept connection, if it still stands.
    async fn usable(&mut self) -> Option<Kept> {
        let mut kept = self.kept.take()?;
        let over = poll_fn(|cx| Poll::Ready(kept.connection.as_mut().poll(cx).is_ready())).await;
        (!over && kept.sender.is_ready()).then_some(kept)
    }

    async fn open(&mut self) -> Result<Kept, ClientError> {
        let socket = self.client.connect().await?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(FuturesIo::new(Patient::new(socket)))
                .await
                .map_err(|source| self.wire(source))?;
        let connection = Box::pin(async move {
            let _ = connection.await; // the answer tells what went wrong
        });
        Ok(Kept { sender, connection })
    }

    async fn talk(&mut self, kept: Kept, body: Vec<u8>) -> Result<Answer, ClientError> {
        let Kept { mut sender, mut connection } = kept;
        let host = match self.client.endpoint() {
            Endpoint::Unix(_) => "localhost".to_owned(),
            Endpoint::Tcp { host, port } | Endpoint::Tls { host, port, .. } if host.contains(':') => {
                format!("[{host}]:{port}")
            }
            Endpoint::Tcp { host, port } | Endpoint::Tls { host, port, .. } => format!("{host}:{port}"),
        };
        let mut builder = hyper::Request::builder().method("POST").uri(&self.target);
        builder = builder.header("host", host).header("user-agent", "neap");
        for (name, value) in &self.headers {
            builder = builder.header(name, value);
        }
        let request = builder
            .body(Outgoing::new(Body::Bytes(body)))
            .map_err(|error| ClientError::Request(error.to_string()))?;

        let mut over = false;
        let exchange = async {
            let (head, mut body) = sender.send_request(request).await?.into_parts();
            let mut text = Vec::new();
            while let Some(frame) = body.frame().await {
                if let Ok(data) = frame?.into_data() {
                    text.extend_from_slice(&data);
                }
                if text.len() > ANSWER_BYTES_MAX {
                    text.truncate(ANSWER_BYTES_MAX);
                    return Ok((head, text, false));
                }
            }
            Ok((head, text, true))
        };
        let (head, text, whole) = {
            let mut exchange = pin!(exchange);
            let driven = poll_fn(|cx| {
                over = over || connection.as_mut().poll(cx).is_ready();
                exchange.as_mut().poll(cx)
            });
            driven.await.map_err(|source| self.wire(source))?
        };
        if whole && !over {
            self.kept = Some(Kept { sender, connection });
        }
        let retry_after = head.headers.get("retry-after").and_then(|value| value.to_str().ok());
        Ok(Answer {
            status: head.status.as_u16(),
            retry_after: retry_after.map(str::to_owned),
            text: String::from_utf8_lossy(&text).into_owned(),
        })
    }

    fn wire(&self, source: hyper::Error) -> ClientError {
        ClientError::Wire { endpoint: self.client.endpoint().to_string(), source }
    }
}
