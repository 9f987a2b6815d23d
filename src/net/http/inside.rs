//! A small server for what runs inside an instance and asks neap: requests as they come, each
//! answered by one function. Everything comes from the function itself, so the bounds are tight
//! and there is nothing to authenticate.

use super::fair::Fair;
use super::passing::{Line, Returned, Streamed, append, lines};
use super::socket::Socket;
use hyper::body::Incoming;
use hyper::service::service_fn;
use smol::lock::Semaphore;
use smol::{Async, Executor, Timer};
use smol_hyper::rt::FuturesIo;
use std::convert::Infallible;
use std::future::Future;
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// The runtime's connection, some extensions', and a few that are being closed.
const CONNECTIONS_MAX: usize = 16;
const HEAD_BYTES_MAX: usize = 32 * 1024;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A request from inside.
#[derive(Debug)]
pub struct Asked {
    pub method: String,
    /// Without the query.
    pub path: String,
    pub headers: Vec<Line>,
    pub body: Streamed,
}

pub type Told = Pin<Box<dyn Future<Output = Returned> + Send>>;

/// Serves until it is dropped.
pub async fn serve_inside(listener: Async<TcpListener>, answer: Arc<dyn Fn(Asked) -> Told + Send + Sync>) {
    let connections = Executor::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let accept = async {
        loop {
            let place = places.acquire_arc().await;
            let accepted = async {
                // Polled whenever any connection has something to do: accepting is a system call.
                listener.readable().await?;
                listener.accept().await
            };
            let Ok((socket, _)) = accepted.await else {
                Timer::after(ACCEPT_PAUSE).await;
                continue;
            };
            let _ = socket.get_ref().set_nodelay(true);
            let answer = answer.clone();
            let serve = async move {
                let _place = place;
                let service = service_fn(move |request: hyper::Request<Incoming>| {
                    let told = answer(asked(request));
                    async move { Ok::<_, Infallible>(response(told.await)) }
                });
                let mut wire = hyper::server::conn::http1::Builder::new();
                wire.header_read_timeout(None).max_buf_size(HEAD_BYTES_MAX).max_header_size(HEAD_BYTES_MAX);
                let _ = wire.serve_connection(FuturesIo::new(Fair::new(Socket::new(socket))), service).await; // its own business
            };
            connections.spawn(serve).detach();
        }
    };
    connections.run(accept).await
}

fn asked(request: hyper::Request<Incoming>) -> Asked {
    let (head, body) = request.into_parts();
    Asked {
        method: head.method.as_str().to_owned(),
        path: head.uri.path().to_owned(),
        headers: lines(&head.headers),
        body: Streamed::incoming(body),
    }
}

fn response(answer: Returned) -> hyper::Response<Streamed> {
    let mut response = hyper::Response::new(answer.body);
    *response.status_mut() =
        hyper::StatusCode::from_u16(answer.status).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    append(response.headers_mut(), answer.headers);
    response
}
