//! A kept-alive connection to a function, on which one request follows another.
//!
//! What comes from a function is bytes from outside: hyper reads it strictly, its head is
//! bounded, its body is passed on or collected by whoever asked.

use super::fair::Fair;
use super::passing::{Passing, Returned, Streamed, append, lines};
use super::socket::Socket;
use hyper::client::conn::http1::{self, SendRequest};
use smol::Async;
use smol::io::{AsyncRead, AsyncWrite};
use smol_hyper::rt::FuturesIo;
use std::net::TcpStream;

/// A function's status line and headers, more than servers send; larger is no answer.
const HEAD_BYTES_MAX: usize = 64 * 1024;
const HEADERS_MAX: usize = 200;

pub struct Upstream {
    sender: SendRequest<Streamed>,
    /// Moves the connection's bytes; dropping it closes the connection.
    _driver: smol::Task<()>,
}

#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// Nothing of the request was sent: it may go another way.
    #[error("the connection was closed before the request was sent")]
    Unsent(Box<Passing>),
    #[error("{}", describe(.0))]
    Wire(#[source] hyper::Error),
    #[error("the request can't be sent: {0}")]
    Request(String),
}

fn describe(error: &hyper::Error) -> &'static str {
    match () {
        () if error.is_parse_too_large() => "its headers are too large",
        () if error.is_parse() => "its answer is no HTTP",
        () if error.is_incomplete_message() => "it closed the connection before it had answered",
        () if error.is_closed() || error.is_canceled() => "its connection was closed",
        () if error.is_user() => "the request's body broke off",
        () => "its connection broke",
    }
}

impl Upstream {
    pub async fn open(
        socket: Async<TcpStream>,
        executor: &smol::Executor<'static>,
    ) -> Result<Self, UpstreamError> {
        Self::over(Socket::new(socket), executor).await
    }

    pub(super) async fn over<S>(socket: S, executor: &smol::Executor<'static>) -> Result<Self, UpstreamError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut wire = http1::Builder::new();
        wire.max_header_size(HEAD_BYTES_MAX).max_buf_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX);
        let (sender, connection) =
            wire.handshake(FuturesIo::new(Fair::new(socket))).await.map_err(UpstreamError::Wire)?;
        let driver = executor.spawn(async move {
            let _ = connection.await; // the answer or its body tells what went wrong
        });
        Ok(Self { sender, _driver: driver })
    }

    /// Whether another request may follow, as far as is known.
    pub fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    /// Waits until another request may be sent. False: the connection has ended.
    pub async fn ready(&mut self) -> bool {
        self.sender.ready().await.is_ok()
    }

    /// Returns when the answer's head has arrived.
    pub async fn send(&mut self, passing: Passing) -> Result<Returned, UpstreamError> {
        let Passing { method, target, headers, body } = passing;
        let mut request = hyper::Request::builder().method(method.as_str()).uri(target.as_str());
        if let Some(map) = request.headers_mut() {
            append(map, headers);
        }
        let request = request.body(body).map_err(|error| UpstreamError::Request(error.to_string()))?;
        match self.sender.try_send_request(request).await {
            Ok(answer) => {
                let (head, body) = answer.into_parts();
                Ok(Returned {
                    status: head.status.as_u16(),
                    headers: lines(&head.headers),
                    body: Streamed::incoming(body),
                })
            }
            Err(mut refused) => match refused.take_message() {
                Some(unsent) => {
                    let (head, body) = unsent.into_parts();
                    let headers = lines(&head.headers);
                    Err(UpstreamError::Unsent(Box::new(Passing { method, target, headers, body })))
                }
                None => Err(UpstreamError::Wire(refused.into_error())),
            },
        }
    }
}
