//! A plain Node server as a Knative service.

use super::{SOON, alone, possible};
use crate::support::python::{NODE, node_image};
use crate::support::{have, http, wait_until};

/// Answers in two pieces, events with an event, and ends when it is asked to.
const SERVER: &str = r#"
const http = require("node:http");
const server = http.createServer((request, response) => {
  let size = 0;
  request.on("data", piece => { size += piece.length; });
  request.on("end", () => {
    const kind = request.headers["ce-type"];
    if (kind) {
      console.log(`event ${kind} of ${size}`);
      response.writeHead(204).end();
      return;
    }
    response.setHeader("x-service", process.env.K_SERVICE);
    response.write(`${request.method} ${request.url} `);
    setImmediate(() => response.end(`${size} ${request.headers.traceparent ? "traced" : ""}`));
  });
});
server.listen(process.env.PORT, "0.0.0.0");
process.on("SIGTERM", () => { console.log("asked to end"); server.close(() => process.exit(0)); });
"#;

#[test]
fn node_server_answers_calls_gets_events_and_ends_when_asked() {
    if !possible() || !have("Node", "mmdebstrap") {
        return;
    }
    let node = alone("nodejs");
    node.import(node_image());
    let manifest = |rest: &str| {
        format!(
            "name = \"web\"\nimage = \"node:1\"\nplatform = \"knative\"\n\
             command = [\"{NODE}\", \"-e\", \'\'\'{SERVER}\'\'\']\n{rest}\n\
             [[trigger]]\nevent = \"com.example.made\"\n\
             [limits]\nmemory = \"256MiB\"\ncpu = 2\nstart = \"120s\"\n"
        )
    };
    node.deploy(&manifest(""));

    let large = vec![b'x'; 3 << 20];
    let answer = http::post(node.port(), "/function/web/a%20b?c=d", &large).expect("an answer");
    assert_eq!((answer.status, answer.header("x-service")), (200, Some("web")), "{}", answer.text());
    assert_eq!(answer.text(), "POST /a%20b?c=d 3145728 traced");
    let headers = [
        ("ce-specversion", "1.0"),
        ("ce-id", "1"),
        ("ce-source", "/test"),
        ("ce-type", "com.example.made"),
        ("content-type", "text/plain"),
    ];
    let accepted = http::request(node.port(), "POST", "/events", &headers, b"21.5").expect("an answer");
    assert_eq!(accepted.status, 202, "{}", accepted.text());
    let logs = || node.neap_ok(&["logs", "web"]);
    wait_until(SOON * 2, "the event has come", || logs().contains("event com.example.made of 4"));

    node.deploy(&manifest("env = { NEXT = \"1\" }"));

    wait_until(SOON * 2, "the old instance was asked to end", || logs().contains("asked to end"));
}
