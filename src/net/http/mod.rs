//! The HTTP wire: hyper's HTTP/1.1 codec on smol, a server that any application of
//! `http_types` requests can sit behind, a small client for the command line, and the
//! connections (`upstream`) over which calls are passed on to functions.
//!
//! hyper is the wire because it frames strictly (RFC 9112 §6 and §11: one meaning for a body's
//! length, or a refusal); tide, which the application is written in, sees only requests that
//! `bridge` has checked. Nothing outside `net` names hyper.
//!
//! | bound | value | beyond it |
//! |---|---|---|
//! | request line and header lines | 16 KiB, 100 lines | 431, closed |
//! | request target | 8 KiB | 414 |
//! | TCP connections | 128 | the kernel's backlog (1024) holds the rest |
//! | Unix connections | 32, so that devices can't lock the operator out | the same |
//! | a request's head, once begun | 10 s | closed |
//! | a connection without a request | 10 s new, 75 s kept alive | closed |
//! | TLS handshake | 5 s | closed |
//! | a response that the client does not read | 60 s | closed |
//!
//! What a body may hold and how long it may take is the application's to say: it knows whose
//! body it is.

mod bridge;
mod client;
mod fair;
mod inside;
mod listen;
mod passing;
mod poster;
mod produced;
mod server;
mod socket;
mod upstream;
mod watched;

pub use bridge::{Peer, Target, problem};
pub use client::{Body, Client, ClientError, Endpoint, Request, Response, Resting, is_target};
pub use inside::{Asked, Told, serve_inside};
pub use listen::{BindError, Listeners, SOCKET_NAME};
pub use passing::{Finish, Line, Passing, Piece, Returned, Streamed, WholeError, header, passed, take_body};
pub use poster::{Answer, Poster};
pub use produced::produced;
pub use server::{App, serve};
pub use upstream::{Upstream, UpstreamError};

use smol::io::AsyncBufRead;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// `poll_read` of a reader that is made by filling and consuming a buffer of its own.
fn read_filled(
    mut reader: Pin<&mut impl AsyncBufRead>,
    cx: &mut Context<'_>,
    buffer: &mut [u8],
) -> Poll<std::io::Result<usize>> {
    let piece = ready!(reader.as_mut().poll_fill_buf(cx))?;
    let amount = piece.len().min(buffer.len());
    buffer[..amount].copy_from_slice(&piece[..amount]);
    reader.consume(amount);
    Poll::Ready(Ok(amount))
}
