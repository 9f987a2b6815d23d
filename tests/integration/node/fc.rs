//! Platform fc: a custom container of Alibaba Cloud's Function Compute.

use super::{SOON, Site, possible};
use crate::support::python::python_image;
use crate::support::{Subscriber, have, publish, wait_until};

/// A server as Alibaba Cloud's documents have it: /initialize and /invoke for events, any path for
/// calls over HTTP.
const SERVER: &str = r#"
import http.server, json, os
initialized = 0
class H(http.server.BaseHTTPRequestHandler):
    def answer(self, status, said, headers={}):
        body = json.dumps(said).encode()
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers(); self.wfile.write(body)
    def do_POST(self):
        global initialized
        data = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path = self.headers["x-fc-control-path"]
        if path == "/initialize":
            assert self.path == path
            if os.environ.get("BROKEN"): return self.answer(500, "no such sensor")
            initialized += 1
            return self.answer(200, "")
        seen = {name: self.headers.get("x-fc-" + name) for name in ["function-name", "function-memory", "access-key-id"]}
        said = {"path": self.path, "control": path, "type": self.headers["Content-Type"], "data": data,
                "initialized": initialized, "id": bool(self.headers["x-fc-request-id"]), **seen}
        print("asked for", data, flush=True)
        if data == "fail": return self.answer(200, said, {"x-fc-status": "404"})
        self.answer(200, said, {"x-fc-status": "200"})
    def do_GET(self): self.answer(200, [self.path, self.headers["x-fc-control-path"]])
http.server.ThreadingHTTPServer(("0.0.0.0", 9000), H).serve_forever()
"#;

fn function(name: &str, env: &str, rest: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"pytest:1\"\nplatform = \"fc\"\nenv = {{ {env} }}\n\
         command = ['/usr/bin/python3', '-c', '''\n{SERVER}''']\n{rest}\n\
         [limits]\nmemory = \"128MiB\"\ncpu = 2\nstart = \"120s\"\n"
    )
}

#[test]
fn custom_container_is_initialized_once_and_invoked_with_events_and_calls() {
    if !possible() || !have("a custom container in Python", "mmdebstrap") {
        return;
    }
    let site = Site::start("fc");
    let node = &site.node;
    node.import(python_image());
    let rest = "[retry]\nattempts = 2\nbackoff = \"10ms\"\n[scale]\nmax = 1\n\
                [[trigger]]\nmqtt = \"in\"\n[[output]]\nto = \"uplink\"\ntopic = \"out\"";
    node.deploy(&function("f", "", rest));
    node.deploy(&function("broken", "BROKEN = \"1\"", "[retry]\nattempts = 1"));
    let cloud = Subscriber::start(site.uplink.port(), "cloud", &["out"]);

    site.local.wait_subscribed("neap-", "in");
    publish(site.local.port(), "in", "21.5");
    let message = cloud.wait_for(1, SOON * 4).remove(0);
    publish(site.local.port(), "in", "fail");
    wait_until(SOON, "an event that failed twice is set aside", || {
        node.neap_json(&["events", "--state", "dead"]).as_array().is_some_and(|dead| dead.len() == 1)
    });
    let page = node.get("/function/f/a/b?c=d");
    let broken = node.post("/function/broken", "");

    let said: serde_json::Value = serde_json::from_slice(&message.payload).expect("JSON");
    let expected = serde_json::json!({
        "path": "/invoke", "control": "/invoke", "type": "application/octet-stream", "data": "21.5",
        "initialized": 1, "id": true, "function-name": "f", "function-memory": "128", "access-key-id": null,
    });
    assert_eq!(said, expected);
    let log = node.neap_ok(&["logs", "f"]);
    assert_eq!(log.matches("asked for fail").count(), 2, "{log}");
    assert_eq!((page.status, page.json()), (200, serde_json::json!(["/a/b?c=d", "/http-invoke"])));
    assert_eq!((broken.status, broken.header("x-neap-failure")), (502, Some("start")), "{}", broken.text());
    assert!(broken.text().contains("initialize") && broken.text().contains("500"), "{}", broken.text());
}
