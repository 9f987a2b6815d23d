//! The HTTP layer on a real listener, with raw sockets on one side and a scheduler made of a
//! few lines on the other: hostile requests, who may ask for what, and what each answer says.

use neap::channels::{CallError, Command, DeployError, Deployed, Invoke, Response};
use neap::config;
use neap::image::ImageStore;
use neap::ingress::http::{self, Api, Facts, Listeners};
use neap::ingress::routes::{Deployment, Routes};
use neap::model::function::{Handler, HttpTrigger, Limits, Platform, Retry, Scale, ScaleMin, Trigger};
use neap::model::{
    Digest, EventId, Failure, FunctionName, Lane, Manifest, Reference, Revision, SystemClock, UnixMs,
};
use neap::net::http::{Body, Client, Endpoint, Request};
use neap::secrets::Secrets;
use neap::store::{self, Store};
use neap::telemetry::logs::FunctionLogs;
use neap::watch::{Wake, Watch};
use smol::channel::Receiver;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PAYLOAD_BYTES: u64 = 1 << 20;
/// Two fill the room that outputs share.
const LARGE_OUTPUT_BYTES: usize = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn function_answers_over_tcp() {
    let node = Node::start();

    let answer = node.ask(b"POST /function/echo/a%20b?x=1 HTTP/1.1\r\nHost: n\r\nX-Call-Id: mine\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello");

    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.body, b"hello");
    assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
    assert_eq!(answer.header("x-call-id"), Some("mine"));
    assert_eq!(answer.header("x-duration-seconds"), Some("0.001500"));
    assert!(answer.header("x-start-time").is_some());
    let event = node.seen.recv_blocking().expect("the call reached the scheduler");
    assert_eq!(event.subject.as_deref(), Some("/a b"));
    let request = event.http.expect("it came over HTTP");
    assert_eq!((request.method.as_str(), request.query.as_str()), ("POST", "x=1"));
}

#[test]
fn every_outcome_has_its_status() {
    let node = Node::start();
    let status = |target: &str| {
        let answer = node.get(target);
        assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{target}");
        answer.status
    };

    assert_eq!(status("/function/nobody"), 404);
    assert_eq!(status("/function/Bad_Name"), 404);
    assert_eq!(status("/function/fail"), 502);
    assert_eq!(status("/function/late"), 504);
    assert_eq!(status("/function/full"), 503);
    assert_eq!(status("/async-function/echo"), 405);
    assert_eq!(status("/nothing/here"), 404);
    assert_eq!(status("/events"), 405);
    assert_eq!(status("/2015-03-31/functions/echo/invocations"), 405);
    assert_eq!(status("/2015-03-31/functions/"), 404);
    assert_eq!(status("/async-function/"), 404);
    assert_eq!(node.get("/function/full").header("retry-after"), Some("7"), "whole seconds, not too early");
    assert_eq!(node.get("/function/fail").header("x-neap-failure"), Some("exit"));
    let post = node.ask(
        b"POST /async-function/nobody HTTP/1.1\r\nHost: n\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    );
    assert_eq!(post.status, 404);
    let callback = node.ask(b"POST /async-function/echo HTTP/1.1\r\nHost: n\r\nX-Callback-Url: nowhere\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    assert_eq!(callback.status, 400);
}

#[test]
fn trigger_paths_take_their_methods_and_no_others() {
    let node = Node::start();

    let put =
        node.ask(b"PUT /meter/read HTTP/1.1\r\nHost: n\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}");
    let delete = node.ask(b"DELETE /meter/read HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n");

    assert_eq!((put.status, put.header("content-type")), (200, Some("application/json")));
    assert_eq!((delete.status, delete.header("allow")), (405, Some("POST, PUT")));
    assert_eq!(node.get("/meter/read/more").status, 404);
}

#[test]
fn hostile_requests_are_refused_and_the_server_lives() {
    let node = Node::start();
    let large_header = format!("GET /healthz HTTP/1.1\r\nHost: n\r\nX: {}\r\n\r\n", "a".repeat(17_000));
    let many_headers = format!("GET /healthz HTTP/1.1\r\nHost: n\r\n{}\r\n", "X: y\r\n".repeat(101));
    let no_end = "a".repeat(64 * 1024);
    let long_url = format!("GET /{} HTTP/1.1\r\nHost: n\r\n\r\n", "u".repeat(9_000));
    let post = |rest: &str| format!("POST /function/echo HTTP/1.1\r\nHost: n\r\n{rest}");
    let table: Vec<(&str, Vec<u8>, u16)> = vec![
        ("garbage", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n".to_vec(), 400),
        ("non-ASCII header", "GET /healthz HTTP/1.1\r\nHost: n\r\nX: \u{e9}\r\n\r\n".into(), 400),
        ("non-UTF-8 header", b"GET /healthz HTTP/1.1\r\nHost: n\r\nX: \xff\r\n\r\n".to_vec(), 400),
        ("non-UTF-8 path", b"GET /function/echo/\xff HTTP/1.1\r\nHost: n\r\n\r\n".to_vec(), 400),
        (
            "non-UTF-8 path, encoded",
            b"GET /function/echo/%ff HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n".to_vec(),
            400,
        ),
        (
            "NUL in the path",
            b"GET /function/echo/%00 HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n".to_vec(),
            400,
        ),
        ("dots", b"GET /function/echo/%2e./../v1/status HTTP/1.1\r\nHost: n\r\n\r\n".to_vec(), 400),
        ("no host", b"GET /healthz HTTP/1.1\r\n\r\n".to_vec(), 400),
        ("two hosts", b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".to_vec(), 400),
        ("unknown method", b"BREW /healthz HTTP/1.1\r\nHost: n\r\n\r\n".to_vec(), 501),
        ("large header", large_header.into(), 431),
        ("many headers", many_headers.into(), 431),
        ("line without end", no_end.into(), 431),
        ("long URL", long_url.into(), 414),
        ("differing lengths", post("Content-Length: 1\r\nContent-Length: 2\r\n\r\nab").into(), 400),
        ("signed length", post("Content-Length: +5\r\n\r\nhello").into(), 400),
        ("unknown coding", post("Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n").into(), 400),
        ("two codings", post("Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n").into(), 501),
        ("signed chunk", post("Transfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n").into(), 400),
        ("huge chunk", post("Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n").into(), 400),
        ("bad end of a chunk", post("Transfer-Encoding: chunked\r\n\r\n3\r\nabcXX0\r\n\r\n").into(), 400),
        ("announced too large", post("Content-Length: 1048577\r\n\r\n").into(), 413),
    ];

    for (name, bytes, status) in table {
        let answer = node.ask(&bytes);
        assert_eq!(answer.status, status, "{name}: {answer:?}");
        assert!(answer.closed, "{name}: the connection goes on");
    }

    assert_eq!(node.get("/healthz").status, 200);
}

#[test]
fn nothing_behind_a_refused_request_is_taken_for_a_request() {
    let node = Node::start();

    // a body that a lenient server would take for a second request
    let smuggled = node.ask(b"POST /function/echo HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\nGET /function/echo HTTP/1.1\r\nHost: n\r\n\r\n");

    assert_eq!(smuggled.status, 501);
    assert_eq!(smuggled.rest, b"", "a second answer came");
    assert!(node.seen.is_empty(), "a function was invoked");

    // RFC 9112 section 6.3: chunked wins over a length beside it, and the connection ends
    let both = node.ask(b"POST /function/echo HTTP/1.1\r\nHost: n\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /function/echo HTTP/1.1\r\nHost: n\r\n\r\n");
    assert_eq!((both.status, both.body.len(), both.header("content-type")), (200, 0, None));
    assert_eq!(both.rest, b"", "a second answer came");
    assert_eq!(node.seen.len(), 1);
}

#[test]
fn body_too_large_is_refused_before_it_is_whole() {
    let node = Node::start();
    let mut socket = node.connect();
    socket
        .write_all(b"POST /function/echo HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n")
        .expect("sent");

    // 4 MiB, four times what the function takes; the server stops reading on the way
    let chunk = [b"10000\r\n".as_slice(), &[b'x'; 0x10000], b"\r\n"].concat();
    for _ in 0..64 {
        if socket.write_all(&chunk).is_err() {
            break;
        }
    }

    let answer = Answer::read(&mut socket);
    assert_eq!(answer.status, 413, "{answer:?}");
    assert!(node.seen.is_empty());
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let node = Node::start();
    let one = |text: &str| {
        format!("POST /function/echo HTTP/1.1\r\nHost: n\r\nContent-Length: {}\r\n\r\n{text}", text.len())
    };
    let mut socket = node.connect();

    socket.write_all([one("first"), one("second"), one("third")].concat().as_bytes()).expect("sent");

    let mut read = Vec::new();
    for expected in ["first", "second", "third"] {
        let answer = Answer::read_one(&mut socket, &mut read);
        assert_eq!((answer.status, answer.body.as_slice()), (200, expected.as_bytes()));
    }
}

#[test]
fn chunked_bodies_with_extensions_are_understood() {
    let node = Node::start();

    let answer = node.ask(b"POST /function/echo HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3;a=1\r\nabc\r\n2\r\nde\r\n0\r\nX: trailer\r\n\r\n");

    assert_eq!((answer.status, answer.body.as_slice()), (200, b"abcde".as_slice()));
}

#[test]
fn expectations_are_met_and_head_has_no_body() {
    let node = Node::start();
    let mut socket = node.connect();

    socket
        .write_all(
            b"POST /function/echo HTTP/1.1\r\nHost: n\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n",
        )
        .expect("sent");
    let mut read = Vec::new();
    let go_on = Answer::head(&mut socket, &mut read);
    assert!(go_on.starts_with("HTTP/1.1 100 "), "{go_on}");
    socket.write_all(b"ok").expect("sent");
    assert_eq!(Answer::read_one(&mut socket, &mut read).body, b"ok");

    let head = node.ask(b"HEAD /healthz HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n");
    assert_eq!((head.status, head.header("content-length"), head.rest.len()), (200, Some("3"), 0));
    assert_eq!(node.ask(b"GET /healthz HTTP/1.0\r\n\r\n").status, 200);
}

#[test]
fn client_that_leaves_ends_its_call() {
    let node = Node::start();
    let mut socket = node.connect();
    socket.write_all(b"GET /function/slow HTTP/1.1\r\nHost: n\r\n\r\n").expect("sent");
    node.seen.recv_blocking().expect("the call reached the scheduler");

    drop(socket);

    node.left.recv_blocking().expect("the reply's receiver is dropped");
}

#[test]
fn outputs_that_nobody_reads_are_bounded() {
    let node = Node::start();
    let ask = || {
        let mut socket = node.connect();
        socket.write_all(b"GET /function/large HTTP/1.1\r\nHost: n\r\n\r\n").expect("sent");
        let mut read = Vec::new();
        let head = Answer::head(&mut socket, &mut read);
        (socket, read, head)
    };
    let unread = [ask(), ask()];
    assert!(unread.iter().all(|(_, _, head)| head.starts_with("HTTP/1.1 200")), "two of 16 MiB have room");

    let refused = node.get("/function/large");

    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert!(refused.header("x-call-id").is_some());
    let small = node.ask(
        b"POST /function/echo HTTP/1.1\r\nHost: n\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
    );
    assert_eq!(
        (small.status, small.body.as_slice()),
        (200, b"hello".as_slice()),
        "small outputs always pass"
    );
    let [gone, (mut socket, read, _)] = unread;
    drop(gone);
    let mut rest = vec![0; LARGE_OUTPUT_BYTES - read.len()];
    socket.read_exact(&mut rest).expect("who reads late gets it all");
    assert!(read.iter().chain(&rest).all(|byte| *byte == b'x'));
    let again = node.get("/function/large");
    assert_eq!((again.status, again.body.len()), (200, LARGE_OUTPUT_BYTES), "the room is given back");
}

#[test]
fn stop_lets_running_calls_finish_and_drops_idle_connections() {
    let node = Node::start();
    let mut idle = node.connect();
    let mut kept = node.connect();
    kept.write_all(b"GET /healthz HTTP/1.1\r\nHost: n\r\n\r\n").expect("sent");
    assert_eq!(Answer::read_one(&mut kept, &mut Vec::new()).status, 200);
    let mut running = node.connect();
    running.write_all(b"GET /function/gate HTTP/1.1\r\nHost: n\r\n\r\n").expect("sent");
    node.seen.recv_blocking().expect("the call reached the scheduler");

    node.stop.set(true);
    let mut scrap = [0; 16];
    assert_eq!(idle.read(&mut scrap).expect("closed, not reset"), 0);
    assert_eq!(kept.read(&mut scrap).expect("closed, not reset"), 0);
    node.gate.set(true);

    let answer = Answer::read(&mut running);
    assert_eq!((answer.status, answer.body.as_slice()), (200, b"done".as_slice()));
    assert!(answer.closed);
    node.join();
}

#[test]
fn control_over_tcp_asks_for_the_token() {
    let open = Node::start();
    let guarded = Node::start_with(|config, dir| {
        let file = dir.join("token");
        std::fs::write(&file, "s3cret\n").expect("a token file");
        config.http.token_file = Some(file);
    });
    let with = |header: &str| {
        let text = format!(
            "POST /v1/functions?file=f.toml HTTP/1.1\r\nHost: n\r\n{header}Content-Length: 4\r\nConnection: close\r\n\r\ngood"
        );
        guarded.ask(text.as_bytes())
    };

    assert_eq!(open.get("/v1/status").status, 403);
    assert_eq!(open.get("/v1/no/such/thing").status, 403);
    assert_eq!(open.get("/system/functions").status, 403);
    assert_eq!(guarded.get("/v1/status").status, 401);
    assert!(guarded.get("/v1/status").header("www-authenticate").is_some());
    assert_eq!(with("").status, 401);
    assert_eq!(with("Authorization: Bearer wrong\r\n").status, 401);
    assert_eq!(with("Authorization: Basic cm9vdDpzM2NyZXQ=\r\n").status, 401, "root:s3cret");
    assert_eq!(with("Authorization: Bearer s3cret\r\n").status, 200);
    assert_eq!(with("Authorization: Basic YWRtaW46czNjcmV0\r\n").status, 200, "admin:s3cret");
    let page = "Origin: http://other.example\r\nAuthorization: Basic YWRtaW46czNjcmV0\r\n";
    assert_eq!(with(page).status, 403, "a page of another site has the operator's browser ask");
    let own = "Origin: http://n\r\nAuthorization: Basic YWRtaW46czNjcmV0\r\n";
    assert_eq!(with(own).status, 200);
    assert_eq!(guarded.get("/function/echo").status, 200, "functions are open unless asked for");
}

#[test]
fn functions_and_triggers_ask_for_the_token_when_told_to() {
    let token = |config: &mut config::Config, dir: &std::path::Path| {
        let file = dir.join("token");
        std::fs::write(&file, "s3cret").expect("a token file");
        config.http.token_file = Some(file);
    };
    let some = Node::start_with(token);
    let all = Node::start_with(|config, dir| {
        token(config, dir);
        config.http.auth_functions = true;
    });
    let known = b"GET /locked HTTP/1.1\r\nHost: n\r\nAuthorization: Bearer s3cret\r\nX-Other: 1\r\nConnection: close\r\n\r\n";

    assert_eq!(some.get("/locked").status, 401);
    assert_eq!(some.get("/function/locked").status, 401, "no way round the trigger");
    assert_eq!(some.ask(known).status, 200);
    let headers = some.seen.recv_blocking().expect("the call").http.expect("over HTTP").headers;
    assert!(headers.iter().any(|(name, _)| name == "x-other"));
    assert!(headers.iter().all(|(name, _)| name != "authorization"), "the token reached a function");
    assert_eq!(all.get("/function/echo").status, 401);
    assert_eq!(all.get("/meter/read").status, 405, "what is no function says so");
}

#[test]
fn unix_socket_needs_no_token() {
    let node = Node::start();
    smol::block_on(async {
        let client = Client::new(Endpoint::Unix(node.socket.clone()), None);

        let request = Request::new("POST", "/v1/functions?file=f.toml").body(Body::Bytes(b"good".to_vec()));
        let mut answer = client.send(request).await.expect("an answer");
        assert_eq!(answer.status, 200);
        let deployed: Deployed =
            serde_json::from_slice(&answer.bytes(1 << 16).await.expect("a body")).expect("JSON");
        assert_eq!((deployed.name.as_str(), deployed.revision), ("f.toml", 1));

        let bad = Request::new("POST", "/v1/functions").body(Body::Bytes(b"bad".to_vec()));
        let mut answer = client.send(bad).await.expect("an answer");
        let problem: neap::model::api::Problem =
            serde_json::from_slice(&answer.bytes(1 << 16).await.expect("a body")).expect("JSON");
        assert_eq!((answer.status, problem.errors.len()), (400, 2));

        let unknown = client.send(Request::new("GET", "/v1/events?limt=1")).await.expect("an answer");
        assert_eq!(unknown.status, 400);
        let not_allowed = client.send(Request::new("DELETE", "/v1/status")).await.expect("an answer");
        assert_eq!((not_allowed.status, not_allowed.header("allow")), (405, Some("GET, HEAD")));
    });
}

#[test]
fn missing_image_is_not_found_by_run_and_at_odds_with_a_manifest() {
    let node = Node::start();
    smol::block_on(async {
        let client = Client::new(Endpoint::Unix(node.socket.clone()), None);
        let run = br#"{"image":"gone:1","command":null,"env":{},"data":""}"#.to_vec();
        for (target, body, status) in [("/v1/run", run, 404), ("/v1/functions", b"no image".to_vec(), 409)] {
            let request = Request::new("POST", target).body(Body::Bytes(body));
            let mut answer = client.send(request).await.expect("an answer");
            let problem: neap::model::api::Problem =
                serde_json::from_slice(&answer.bytes(1 << 16).await.expect("a body")).expect("JSON");

            assert_eq!(answer.status, status, "{target}");
            let detail = problem.detail.expect("what is missing");
            assert!(detail.contains("`gone:1`") && detail.contains("neap image import"), "{detail}");
        }
    });
}

#[test]
fn client_streams_and_says_who_is_not_there() {
    let node = Node::start();
    smol::block_on(async {
        let endpoint = Endpoint::Tcp { host: "127.0.0.1".into(), port: node.address.port() };
        let stream = smol::io::Cursor::new(vec![b'x'; 300_000]);
        let request = Request::new("POST", "/function/echo").body(Body::Stream(Box::pin(stream)));

        let mut answer = Client::new(endpoint, None).send(request).await.expect("an answer");

        assert_eq!(answer.bytes(1 << 20).await.expect("a body").len(), 300_000);
        let nobody = Client::new(Endpoint::Unix("/nonexistent/neap.sock".into()), None);
        let error = nobody.send(Request::new("GET", "/")).await.map(|_| ()).expect_err("nobody is there");
        assert!(matches!(error, neap::net::http::ClientError::Connect { .. }), "{error}");
    });
}

#[test]
fn connections_beyond_the_cap_wait_their_turn() {
    let node = Node::start();
    let held: Vec<TcpStream> = (0..128).map(|_| node.connect()).collect();
    let mut waiting = node.connect();
    waiting
        .write_all(b"GET /healthz HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")
        .expect("in the backlog");
    let client = Client::new(Endpoint::Unix(node.socket.clone()), None);
    let status = smol::block_on(client.send(Request::new("GET", "/healthz"))).expect("an answer").status;
    assert_eq!(status, 200, "the operator is not locked out");

    drop(held);

    assert_eq!(Answer::read(&mut waiting).status, 200);
}

#[test]
fn async_call_is_answered_once_its_event_is_committed() {
    let node = Node::start();

    let answer = node.ask(b"POST /async-function/echo/a HTTP/1.1\r\nHost: n\r\nX-Call-Id: mine\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello");

    assert_eq!((answer.status, answer.header("x-call-id")), (202, Some("mine")));
    let rows = smol::block_on(node.store.event("mine".into())).expect("the store answers");
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].function.as_str(), rows[0].event.data.as_slice()), ("echo", b"hello".as_slice()));
    assert_eq!(rows[0].event.subject.as_deref(), Some("/a"));
}

#[test]
fn async_call_of_a_function_removed_meanwhile_is_not_promised() {
    let node = Node::start();
    let echo = FunctionName::parse("echo").expect("a name");
    smol::block_on(node.store.remove(echo)).expect("it was there");

    let call =
        b"POST /async-function/echo HTTP/1.1\r\nHost: n\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

    assert_eq!(node.ask(call).status, 404);
}

#[test]
fn redriven_delivery_wakes_the_links() {
    let node = Node::start();
    let client = Client::new(Endpoint::Unix(node.socket.clone()), None);
    let woken = node.outbox.listen();

    let redrive = Request::new("POST", "/v1/deliveries/redrive?all=1");
    assert_eq!(smol::block_on(client.send(redrive)).expect("an answer").status, 200);

    assert!(smol::block_on(smol::future::poll_once(woken)).is_some());
}

#[test]
fn operator_sees_queues_functions_and_status() {
    let node = Node::start();
    let call = b"POST /async-function/echo HTTP/1.1\r\nHost: n\r\nX-Call-Id: mine\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi";
    assert_eq!(node.ask(call).status, 202);
    let client = Client::new(Endpoint::Unix(node.socket.clone()), None);
    let get = |target: &str| -> (u16, serde_json::Value) {
        smol::block_on(async {
            let mut answer = client.send(Request::new("GET", target)).await.expect("an answer");
            let body = answer.bytes(1 << 20).await.expect("a body");
            (answer.status, serde_json::from_slice(&body).expect("JSON"))
        })
    };

    assert_eq!(get("/v1/status").1["inbox"]["depth"], 1);
    assert_eq!(get("/v1/events").1[0]["id"], "mine");
    assert_eq!(get("/v1/events/mine").1[0]["data_base64"], "aGk=");
    assert_eq!(get("/v1/events/none").0, 404);
    assert_eq!(get("/v1/deliveries/1").0, 404);
    assert_eq!(get("/v1/functions/locked").1["triggers"][0], "http /locked");
    assert_eq!(get("/v1/functions/none").0, 404);
    assert_eq!(get("/v1/images").1, serde_json::json!([]));
    assert_eq!(get("/v1/images/none").0, 404);
    let metrics = node.get("/metrics");
    assert_eq!(metrics.status, 200);
    assert!(metrics.header("content-type").is_some_and(|kind| kind.starts_with("text/plain; version=0.0.4")));
}

#[test]
fn logs_are_followed_until_the_node_stops() {
    let node = Node::start();
    let (name, event) = (FunctionName::parse("echo").expect("a name"), EventId::from_random([1; 16]));
    node.logs.append(&name, &event, UnixMs(1), "kept");
    smol::block_on(async {
        let client = Client::new(Endpoint::Unix(node.socket.clone()), None);
        let target = "/v1/functions/echo/logs?follow=1";
        let mut answer = client.send(Request::new("GET", target)).await.expect("an answer");
        let text = |line: Option<Vec<u8>>| -> serde_json::Value {
            serde_json::from_slice(&line.expect("a line")).expect("JSON")
        };

        assert_eq!(text(answer.line(1 << 16).await.expect("a line"))["text"], "kept");
        node.logs.append(&name, &event, UnixMs(2), "new");
        assert_eq!(text(answer.line(1 << 16).await.expect("a line"))["text"], "new");

        node.stop.set(true);
        assert_eq!(answer.line(1 << 16).await.expect("the end"), None);
    });
}

#[test]
fn client_certificate_opens_the_control_api() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    make_certificates(dir.path());
    let at = |name: &str| dir.path().join(name);
    let node = Node::start_with(|config, _| {
        config.http.tls = Some(config::ServerTls {
            cert: at("server.pem"),
            key: at("server.key"),
            client_ca: Some(at("ca.pem")),
        });
    });
    let ask = |cert: Option<PathBuf>, key: Option<PathBuf>| {
        let tls = config::ClientTls { ca: Some(at("ca.pem")), cert, key, alpn: Vec::new() };
        let connector = neap::net::tls::client::connector(&tls).expect("good certificates");
        let endpoint = Endpoint::Tls { host: "127.0.0.1".into(), port: node.address.port(), connector };
        smol::block_on(Client::new(endpoint, None).send(Request::new("GET", "/v1/functions")))
    };

    let known = ask(Some(at("client.pem")), Some(at("client.key"))).expect("an answer");
    assert_eq!(known.status, 200);
    assert!(ask(None, None).is_err(), "a client without a certificate was let in");
    assert!(node.ask(b"GET / HTTP/1.1\r\nHost: n\r\n\r\n").status != 200, "plain HTTP on a TLS port");
}

/// A CA, and a server's and a client's certificate that it signed.
fn make_certificates(dir: &std::path::Path) {
    let openssl = |args: &[&str]| {
        let output = std::process::Command::new("openssl").args(args).current_dir(dir).output();
        let output = output.expect("openssl is installed");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    let ca = ["-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem"];
    openssl(&[["req", "-x509"].as_slice(), &key, &ca].concat());
    for (name, san) in [("server", "subjectAltName=IP:127.0.0.1"), ("client", "subjectAltName=DNS:client")] {
        let (keyout, out, subject) = (format!("{name}.key"), format!("{name}.pem"), format!("/CN={name}"));
        let own = ["-subj", &subject, "-addext", san, "-addext", "basicConstraints=critical,CA:FALSE"];
        let signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", &keyout, "-out", &out];
        openssl(&[["req", "-x509"].as_slice(), &key, &own, &signed].concat());
    }
}

/// A node that is nothing but its HTTP layer. Its functions: `echo` returns its data, `fail`
/// exits with 3, `late` times out, `full` finds no capacity, `slow` never ends, `gate` ends
/// when `gate` is set, `locked` asks for the token.
struct Node {
    address: SocketAddr,
    socket: PathBuf,
    stop: Watch<bool>,
    gate: Watch<bool>,
    outbox: Wake,
    /// Events that reached the scheduler.
    seen: Receiver<neap::model::Event>,
    /// One for each `slow` call whose caller left.
    left: Receiver<()>,
    store: Store,
    logs: FunctionLogs,
    thread: Option<std::thread::JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Node {
    fn start() -> Self {
        Self::start_with(|_, _| {})
    }

    fn start_with(change: impl FnOnce(&mut config::Config, &std::path::Path)) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut config = node_config(dir.path());
        change(&mut config, dir.path());
        let listeners = Listeners::bind(&config).expect("free sockets");
        let address = listeners.address();
        let (stop, gate) = (Watch::new(false), Watch::new(false));
        let (invoke, calls) = smol::channel::bounded(64);
        let (commands, orders) = smol::channel::bounded(8);
        let (saw, seen) = smol::channel::unbounded();
        let (leave, left) = smol::channel::unbounded();
        let store = open_store(dir.path());
        let logs = FunctionLogs::open(dir.path()).expect("a folder for logs");
        let outbox = Wake::new();
        let api = Api {
            node: config.node.id.clone(),
            http: config.http.clone(),
            store: store.clone(),
            images: ImageStore::open(dir.path(), "/nonexistent/neap".into()).expect("an image store"),
            secrets: Secrets::open(dir.path()).expect("a folder for secrets"),
            logs: logs.clone(),
            metrics: Default::default(),
            routes: Watch::new(routes()),
            invoke,
            commands,
            wake: Wake::new(),
            outbox: outbox.clone(),
            clock: Arc::new(SystemClock::new()),
            facts: Arc::new(Facts::default),
            usage: Arc::new(Default::default),
        };
        let (stop_there, gate_there) = (stop.clone(), gate.clone());
        let thread = std::thread::spawn(move || {
            let executor = smol::Executor::new();
            smol::block_on(executor.run(async {
                let scheduler = async {
                    while let Ok(call) = calls.recv().await {
                        let _ = saw.send(call.event.clone()).await;
                        executor.spawn(run(call, gate_there.clone(), leave.clone())).detach();
                    }
                };
                executor.spawn(deploy(orders)).detach();
                let serve = http::serve(Arc::new(api), listeners, stop_there);
                smol::future::or(serve, async {
                    scheduler.await;
                    std::future::pending().await
                })
                .await;
            }));
        });
        Self {
            address,
            socket: config.node.run_dir.join("neap.sock"),
            stop,
            gate,
            outbox,
            seen,
            left,
            store,
            logs,
            thread: Some(thread),
            _dir: dir,
        }
    }

    fn connect(&self) -> TcpStream {
        let socket = TcpStream::connect(self.address).expect("the node listens");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        socket.set_write_timeout(Some(PATIENCE)).expect("a socket");
        socket
    }

    fn ask(&self, bytes: &[u8]) -> Answer {
        let mut socket = self.connect();
        let _ = socket.write_all(bytes); // a refusal may come while we still send
        Answer::read(&mut socket)
    }

    fn get(&self, target: &str) -> Answer {
        self.ask(format!("GET {target} HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n").as_bytes())
    }

    fn join(mut self) {
        let start = Instant::now();
        self.thread.take().expect("not yet joined").join().expect("the server ended well");
        assert!(start.elapsed() < PATIENCE);
        assert!(!self.socket.exists(), "the socket's file stays");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.gate.set(true);
        self.stop.set(true);
    }
}

async fn run(call: Invoke, gate: Watch<bool>, left: smol::channel::Sender<()>) {
    let done = |output: Vec<u8>| Ok(Response::Output { output, took: Duration::from_micros(1500) });
    let failed = |failure| Err(CallError::Failed { failure, output: Vec::new() });
    let answer = match call.function.as_str() {
        "fail" => failed(Failure::Exit(3)),
        "late" => failed(Failure::TimedOut { limit_ms: 100 }),
        "full" => {
            Err(CallError::NoCapacity { why: "all memory is reserved", wait: Duration::from_millis(6_200) })
        }
        "large" => done(vec![b'x'; LARGE_OUTPUT_BYTES]),
        "slow" => {
            call.reply.closed().await;
            let _ = left.send(()).await;
            return;
        }
        "gate" => {
            gate.changed(0).await;
            done(b"done".to_vec())
        }
        _ => done(call.event.data),
    };
    let _ = call.reply.send(answer).await;
}

async fn deploy(orders: Receiver<Command>) {
    while let Ok(order) = orders.recv().await {
        match order {
            Command::Deploy { file, manifest, reply } => {
                let answer = match manifest.as_str() {
                    "good" => Ok(Deployed {
                        name: file,
                        revision: 1,
                        image: "i".into(),
                        changed: true,
                        warnings: vec![],
                    }),
                    "no image" => Err(DeployError::NoImage("gone:1".into())),
                    _ => Err(DeployError::Invalid(vec!["f:1: one".into(), "f:2: two".into()])),
                };
                let _ = reply.send(answer).await;
            }
            Command::Run { run, reply } => {
                let _ = reply.send(Err(DeployError::NoImage(run.image))).await;
            }
            _ => {}
        }
    }
}

fn routes() -> Routes {
    let http = |path: &str, methods: &[&str], token| {
        let methods = methods.iter().map(|m| (*m).to_owned()).collect();
        vec![Trigger::Http(HttpTrigger { path: path.to_owned(), methods, token })]
    };
    let mut routes = Routes::default();
    for name in ["echo", "fail", "late", "full", "slow", "large", "gate", "locked"] {
        let triggers = match name {
            "echo" => http("/meter/read", &["POST", "PUT"], false),
            "locked" => http("/locked", &[], true),
            _ => Vec::new(),
        };
        let deployment = deployment(name, triggers);
        routes.functions.insert(deployment.revision.name().clone(), deployment);
    }
    routes
}

fn deployment(name: &str, triggers: Vec<Trigger>) -> Deployment {
    let manifest = Manifest {
        name: FunctionName::parse(name).expect("a good name"),
        image: Reference::parse("image:1").expect("a good reference"),
        pull: neap::model::function::Pull::Missing,
        rollback: neap::model::function::Rollback::Off,
        handler: Handler::Stdio,
        platform: Platform::None,
        serving: neap::config::defaults::serving(),
        priority: Lane::Normal,
        command: None,
        env: Default::default(),
        limits: Limits {
            memory_bytes: 64 << 20,
            cpu_millis: 500,
            pids: 64,
            timeout: Duration::from_secs(30),
            payload_bytes: PAYLOAD_BYTES,
            disk_bytes: 16 << 20,
        },
        scale: Scale { min: ScaleMin::Fixed(0), max: 4, copies: 1 },
        retry: Retry {
            attempts: 5,
            backoff: Duration::from_secs(1),
            backoff_max: Duration::from_secs(300),
            codes: None,
        },
        permissions: Default::default(),
        rate: None,
        triggers,
        outputs: Vec::new(),
        marks: Default::default(),
    };
    let image = Digest::from_sha256(&[7; 32]);
    let revision = Arc::new(Revision { number: 1, manifest, image, uid_base: 1_879_048_192 });
    Deployment { revision, paused: false, file: None, created: UnixMs(0), unusable: None }
}

fn node_config(dir: &std::path::Path) -> config::Config {
    config::Config {
        node: config::Node {
            id: "gw-test".into(),
            data_dir: dir.join("data"),
            run_dir: dir.join("run"),
            functions_dir: dir.join("functions.d"),
            cgroup: "neap-http-test".into(),
            memory: config::MemoryShare::Percent(75),
            user_namespaces: config::UserNamespaces::Prefer,
            limits: config::LimitsWanted::Prefer,
            egress_range: config::defaults::EGRESS_RANGE,
            mounts: Vec::new(),
        },
        http: config::Http {
            listen: "127.0.0.1:0".parse().expect("an address"),
            token_file: None,
            auth_functions: false,
            tls: None,
        },
        mqtt: None,
        uplink: None,
        forwards: Vec::new(),
        buffer: config::Buffer { bytes_max: 64 << 20, ..config::defaults::buffer() },
        images: config::defaults::images(),
        trust: config::defaults::trust(),
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// What came after the body.
    rest: Vec<u8>,
    /// The server closed the connection.
    closed: bool,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// One answer, and all that comes until the server closes.
    fn read(socket: &mut TcpStream) -> Self {
        let mut read = Vec::new();
        let mut answer = Self::read_one(socket, &mut read);
        let ended = socket.read_to_end(&mut read);
        answer.closed = ended.is_ok();
        answer.rest = read;
        answer
    }

    /// One answer; `read` holds what was read beyond it.
    fn read_one(socket: &mut TcpStream, read: &mut Vec<u8>) -> Self {
        let head = Self::head(socket, read);
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
        let pair = |line: &str| line.split_once(": ").map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned()));
        let mut answer = Self {
            status: status.unwrap_or(0),
            headers: lines.filter_map(pair).collect(),
            body: Vec::new(),
            rest: Vec::new(),
            closed: false,
        };
        let length: usize = answer.header("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
        let mut piece = [0; 4096];
        while read.len() < length {
            match socket.read(&mut piece) {
                Ok(amount @ 1..) => read.extend_from_slice(&piece[..amount]),
                _ => break, // an answer to HEAD
            }
        }
        answer.body = read.drain(..length.min(read.len())).collect();
        answer
    }

    fn head(socket: &mut TcpStream, read: &mut Vec<u8>) -> String {
        let mut piece = [0; 4096];
        loop {
            if let Some(end) = read.windows(4).position(|w| w == b"\r\n\r\n") {
                let head: Vec<u8> = read.drain(..end + 4).collect();
                return String::from_utf8_lossy(&head).into_owned();
            }
            match socket.read(&mut piece) {
                Ok(amount @ 1..) => read.extend_from_slice(&piece[..amount]),
                _ => return String::new(),
            }
        }
    }
}

fn open_store(dir: &std::path::Path) -> Store {
    let path = dir.join("neap.db");
    let clock = Arc::new(SystemClock::new());
    let options = store::Options {
        path,
        buffer: config::Buffer { bytes_max: 64 << 20, ..config::defaults::buffer() },
        clock,
    };
    let store = Store::open(options).expect("a new database").0;
    // what is not deployed there gets no invocations
    for name in routes().functions.into_keys() {
        let deploy = store.deploy(name, String::new(), "image".into(), None);
        smol::block_on(deploy).expect("a new function");
    }
    store
}
