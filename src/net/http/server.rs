//! Accepts connections and serves them, until told to stop.

use super::bridge::{self, Peer};
use super::listen::Listeners;
use super::socket::Socket;
use super::watched::{Limits, Phase, Phases, Watched};
use crate::watch::Watch;
use hyper::service::service_fn;
use smol::future::FutureExt;
use smol::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use smol::lock::Semaphore;
use smol::net::{TcpStream, unix::UnixStream};
use smol::{Executor, Timer};
use smol_hyper::rt::FuturesIo;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tracing::{debug, info, warn};

/// About 20 KiB each at most: a cap keeps HTTP near 3 MB.
const TCP_CONNECTIONS_MAX: usize = 128;
const UNIX_CONNECTIONS_MAX: usize = 32;
const HEAD_BYTES_MAX: usize = 16 * 1024;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// After an accept that failed, for example with EMFILE: the loop must neither end nor spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A refused body is read on for this long, so that the client sees the refusal instead of a
/// reset connection.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 256 * 1024;

/// What answers requests.
pub trait App: Send + Sync + 'static {
    /// Dropped when the client leaves.
    fn respond(
        &self,
        request: http_types::Request,
    ) -> Pin<Box<dyn Future<Output = http_types::Response> + Send + '_>>;
}

/// Serves until `stop` holds true, then lets running requests finish for `grace`; what is left
/// then is dropped. Idle connections are dropped at once. Dropping the future drops everything.
pub async fn serve(listeners: Listeners, app: Arc<dyn App>, stop: Watch<bool>, grace: Duration) {
    // Connections are tasks of an executor that belongs to this future: no task outlives it.
    let connections = Executor::new();
    let tcp_places = Arc::new(Semaphore::new(TCP_CONNECTIONS_MAX));
    let unix_places = Arc::new(Semaphore::new(UNIX_CONNECTIONS_MAX));

    let accept_tcp = accept_loop(
        &tcp_places,
        || async {
            // Waited for first: this is polled whenever any connection has something to do, and
            // accepting is a system call each time.
            listeners.tcp.readable().await?;
            listeners.tcp.accept().await
        },
        |(socket, address), place| {
            let (app, stop, tls) =
                (app.clone(), stop.clone(), listeners.tls.as_ref().map(|tls| tls.current()));
            let task = async move {
                let _place = place;
                let _ = socket.get_ref().set_nodelay(true);
                let socket = TcpStream::from(socket);
                let closing = socket.clone();
                let socket = Socket::new(socket);
                match tls {
                    None => {
                        let peer = Peer::Tcp { address, certificate: false };
                        serve_connection(socket, peer, app, &stop, Limits::SERVER).await;
                    }
                    Some(tls) => {
                        let handshake = async { tls.accept(socket).await };
                        let limit = async {
                            Timer::after(HANDSHAKE_LIMIT).await;
                            Err(io::ErrorKind::TimedOut.into())
                        };
                        match handshake.or(limit).or(stopped(&stop)).await {
                            Ok((socket, certificate)) => {
                                let peer = Peer::Tcp { address, certificate };
                                serve_connection(socket, peer, app, &stop, Limits::SERVER).await;
                            }
                            Err(error) => debug!(%address, %error, "TLS handshake failed"),
                        }
                    }
                }
                linger(closing, &stop, |socket| socket.shutdown(Shutdown::Write)).await;
            };
            connections.spawn(task).detach();
        },
    );
    let accept_unix = accept_loop(
        &unix_places,
        || async {
            listeners.unix.readable().await?;
            listeners.unix.accept().await
        },
        |(socket, _), place| {
            let (app, stop) = (app.clone(), stop.clone());
            let task = async move {
                let _place = place;
                let socket = UnixStream::from(socket);
                let closing = socket.clone();
                serve_connection(Socket::new(socket), Peer::Unix, app, &stop, Limits::SERVER).await;
                linger(closing, &stop, |socket| socket.shutdown(Shutdown::Write)).await;
            };
            connections.spawn(task).detach();
        },
    );

    let serving = async {
        smol::future::zip(accept_tcp, accept_unix)
            .or(async {
                wait(&stop).await;
                ((), ())
            })
            .await;
        let finished = async {
            // Every place free: nobody is served any more.
            for _ in 0..TCP_CONNECTIONS_MAX {
                tcp_places.acquire_arc().await.forget();
            }
            for _ in 0..UNIX_CONNECTIONS_MAX {
                unix_places.acquire_arc().await.forget();
            }
            true
        };
        let out_of_time = async {
            Timer::after(grace).await;
            false
        };
        if finished.or(out_of_time).await {
            info!("every HTTP request was answered");
        } else {
            warn!(grace_ms = grace.as_millis() as u64, "HTTP requests were abandoned");
        }
    };
    connections.run(serving).await;
}

async fn accept_loop<S, F>(
    places: &Arc<Semaphore>,
    accept: impl Fn() -> F,
    serve: impl Fn(S, smol::lock::SemaphoreGuardArc),
) where
    F: Future<Output = io::Result<S>>,
{
    let mut failing = false;
    loop {
        let place = places.acquire_arc().await;
        match accept().await {
            Ok(socket) => {
                failing = false;
                serve(socket, place);
            }
            Err(error) => {
                if !failing {
                    warn!(%error, "accept failed; trying again");
                }
                failing = true;
                Timer::after(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(
    socket: impl AsyncRead + AsyncWrite + Unpin,
    peer: Peer,
    app: Arc<dyn App>,
    stop: &Watch<bool>,
    limits: Limits,
) {
    let phases = Phases::new();
    let service = {
        let phases = phases.clone();
        service_fn(move |request| {
            let (app, busy) = (app.clone(), phases.busy());
            async move {
                let response = match bridge::request(request, peer) {
                    Ok(request) => app.respond(request).await,
                    Err(refusal) => refusal.response(),
                };
                Ok::<_, Infallible>(bridge::response(response, busy))
            }
        })
    };
    let mut wire = hyper::server::conn::http1::Builder::new();
    // The clocks are in `Watched`.
    wire.header_read_timeout(None).max_buf_size(HEAD_BYTES_MAX).max_header_size(HEAD_BYTES_MAX);
    let socket = FuturesIo::new(Watched::new(socket, phases.clone()));
    let mut connection = std::pin::pin!(wire.serve_connection(socket, service));
    let told_to_stop = async {
        wait(stop).await;
        None
    };
    let served = async {
        let ended = match async { Some(connection.as_mut().await) }.or(told_to_stop).await {
            Some(ended) => ended,
            // hyper would wait for the first request of a connection that has sent none.
            None if matches!(phases.get(), Phase::Fresh | Phase::Head) => return,
            None => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            debug!(?peer, %error, "connection ended");
        }
    };
    let overdue = async {
        let why = phases.overdue(limits).await;
        debug!(?peer, why, "connection dropped");
    };
    served.or(overdue).await;
}

/// Closes our half and reads on for a moment: closing a socket with unread bytes resets the
/// connection, and the reset overtakes the answer (RFC 9112 §9.6).
async fn linger<S, T>(mut socket: S, stop: &Watch<bool>, shutdown: impl Fn(&S) -> io::Result<T>)
where
    S: AsyncRead + Unpin,
{
    if shutdown(&socket).is_err() {
        return;
    }
    let drain = async {
        let mut scrap = [0; 4096];
        let mut left = LINGER_BYTES_MAX;
        while let Ok(amount @ 1..) = socket.read(&mut scrap).await {
            left = left.saturating_sub(amount);
            if left == 0 {
                break;
            }
        }
    };
    let limit = async {
        Timer::after(LINGER).await;
    };
    drain.or(limit).or(wait(stop)).await;
}

async fn wait(stop: &Watch<bool>) {
    let (mut version, mut stopping) = stop.versioned();
    while !*stopping {
        (version, stopping) = stop.changed(version).await;
    }
}

async fn stopped<T>(stop: &Watch<bool>) -> io::Result<T> {
    wait(stop).await;
    Err(io::Error::other("neap is stopping"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use smol::io::AsyncWriteExt;
    use std::time::Instant;

    const SHORT: Duration = Duration::from_millis(100);
    const LONG: Duration = Duration::from_secs(60);

    /// Says `ok`; for `/large` more than any socket buffers, for `/slow` after `SHORT` twice.
    struct Ok200;

    impl App for Ok200 {
        fn respond(
            &self,
            request: http_types::Request,
        ) -> Pin<Box<dyn Future<Output = http_types::Response> + Send + '_>> {
            Box::pin(async move {
                let mut response = http_types::Response::new(200);
                match request.url().path() {
                    "/large" => response.set_body(vec![b'x'; 8 << 20]),
                    "/slow" => {
                        Timer::after(SHORT * 2).await;
                        response.set_body("ok");
                    }
                    _ => response.set_body("ok"),
                }
                response
            })
        }
    }

    /// Runs a client against one connection; returns when the server has closed it.
    fn against<C: Future<Output = ()>>(limits: Limits, client: impl FnOnce(UnixStream) -> C) {
        let start = Instant::now();
        smol::block_on(async {
            let (ours, theirs) = UnixStream::pair().expect("a socket pair");
            let stop = Watch::new(false);
            let server = serve_connection(ours, Peer::Unix, Arc::new(Ok200), &stop, limits);
            smol::future::zip(server, client(theirs)).await;
        });
        assert!(start.elapsed() < LONG / 2, "the limit was not kept");
    }

    async fn rest(mut socket: UnixStream) -> String {
        let mut text = String::new();
        let _ = socket.read_to_string(&mut text).await;
        text
    }

    const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: n\r\n\r\n";
    const PATIENT: Limits =
        Limits { fresh: LONG, head: LONG, idle: LONG, write: LONG, tick: Duration::from_millis(5) };

    #[test]
    fn connection_that_says_nothing_is_closed() {
        against(Limits { fresh: SHORT, ..PATIENT }, |socket| async { assert_eq!(rest(socket).await, "") });
    }

    #[test]
    fn dripping_head_is_closed() {
        against(Limits { head: SHORT, ..PATIENT }, |mut socket| async move {
            for byte in GET.iter().cycle() {
                Timer::after(SHORT / 4).await;
                if *byte == b'\r' || socket.write_all(&[*byte]).await.is_err() {
                    break;
                }
            }
            assert_eq!(rest(socket).await, "");
        });
    }

    #[test]
    fn idle_connection_is_kept_longer_than_a_head_may_take() {
        against(Limits { head: SHORT, idle: SHORT * 6, ..PATIENT }, |mut socket| async move {
            socket.write_all(GET).await.expect("sent");
            Timer::after(SHORT * 3).await;
            socket.write_all(GET).await.expect("still open");
            assert_eq!(rest(socket).await.matches("200 OK").count(), 2);
        });
    }

    #[test]
    fn running_request_is_on_no_clock() {
        let all_short = Limits { fresh: SHORT, head: SHORT, idle: SHORT, write: SHORT, ..PATIENT };
        against(all_short, |mut socket| async move {
            socket.write_all(b"GET /slow HTTP/1.1\r\nHost: n\r\n\r\n").await.expect("sent");
            assert!(rest(socket).await.contains("200 OK"));
        });
    }

    #[test]
    fn client_that_does_not_read_is_left() {
        against(Limits { write: SHORT, ..PATIENT }, |mut socket| async move {
            socket.write_all(b"GET /large HTTP/1.1\r\nHost: n\r\n\r\n").await.expect("sent");
            Timer::after(SHORT * 4).await;
            assert!(rest(socket).await.len() < 8 << 20);
        });
    }
}
