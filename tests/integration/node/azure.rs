//! Platform azure: a custom handler behind the envelope of Azure's host.

use super::{SOON, Site, possible};
use crate::support::python::python_image;
use crate::support::{Subscriber, have, http, publish};

/// A custom handler as Azure's documents have it: one server, a path for each function.
const HANDLER: &str = r#"
import http.server, json, os
class H(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers(); self.wfile.write(body)
    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/api/"):
            return self.answer(200, b"proxied " + self.path.encode() + b" " + data)
        asked = json.loads(data)
        said = asked["Data"]
        if self.path == "/order":
            req = said["req"]
            if req["Body"] == "garbage": return self.answer(200, b"<html>")
            if req["Body"] == "refuse":
                return self.answer(200, json.dumps({"Outputs": {"res": {"statusCode": 409, "body": "no"}}}).encode())
            body = {"name": req["Query"]["name"], "body": req["Body"], "method": req["Method"], "in": asked["Metadata"]["sys"]["MethodName"]}
            res = {"statusCode": 201, "headers": {"X-Made": "yes"}, "body": body}
            return self.answer(200, json.dumps({"Outputs": {"res": res}, "Logs": ["order of " + body["name"]], "ReturnValue": None}).encode())
        celsius = json.loads(said["reading"])["celsius"]
        self.answer(200, json.dumps({"Outputs": {"queue": {"fahrenheit": celsius * 1.8 + 32}}, "Logs": [], "ReturnValue": None}).encode())
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["FUNCTIONS_CUSTOMHANDLER_PORT"])), H).serve_forever()
"#;

fn handler(name: &str, env: &str, rest: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"pytest:1\"\nplatform = \"azure\"\nenv = {{ {env} }}\n\
         command = ['/usr/bin/python3', '-c', '''\n{HANDLER}''']\n{rest}\n\
         [limits]\nmemory = \"128MiB\"\ncpu = 2\n"
    )
}

#[test]
fn custom_handler_gets_calls_and_events_in_azures_envelope() {
    if !possible() || !have("a custom handler in Python", "mmdebstrap") {
        return;
    }
    let site = Site::start("azure");
    let node = &site.node;
    node.import(python_image());
    node.deploy(&handler("order", "", "[retry]\nattempts = 1"));
    let proxying = "AzureFunctionsJobHost__customHandler__enableProxyingHttpRequest = \"true\"";
    node.deploy(&handler("proxied", proxying, ""));
    let trigger = "[[trigger]]\nmqtt = \"sensors/#\"\n[[output]]\nto = \"uplink\"\ntopic = \"out\"";
    node.deploy(&handler("readings", "FUNCTIONS_BINDING = \"reading\"", trigger));
    let cloud = Subscriber::start(site.uplink.port(), "cloud", &["out"]);

    let made = node.post("/function/order?name=J%C3%BCrgen", "21");
    let refused = node.post("/function/order", "refuse");
    let garbage = node.post("/function/order", "garbage");
    let proxied = node.post("/function/proxied/a?b=c", "as it came");
    site.local.wait_subscribed("neap-", "sensors/#");
    publish(site.local.port(), "sensors/hall", r#"{"celsius": 20}"#);
    let message = cloud.wait_for(1, SOON * 2).remove(0);

    assert_eq!((made.status, made.header("x-made")), (201, Some("yes")), "{}", made.text());
    let expected =
        serde_json::json!({ "name": "J\u{fc}rgen", "body": "21", "method": "POST", "in": "order" });
    assert_eq!(made.json(), expected);
    assert!(node.neap_ok(&["logs", "order"]).contains("order of J\u{fc}rgen"));
    assert_eq!((refused.status, refused.text().as_str()), (409, "no"));
    assert_eq!(
        (garbage.status, garbage.header("x-neap-failure")),
        (502, Some("answer")),
        "{}",
        garbage.text()
    );
    assert!(garbage.text().contains("Outputs, Logs, ReturnValue"), "{}", garbage.text());
    assert_eq!(proxied.text(), "proxied /api/proxied/a?b=c as it came");
    assert_eq!(message.text(), r#"{"fahrenheit":68.0}"#);
    let asked = http::post(node.port(), "/function/order", vec![b'x'; 2 << 20]).expect("an answer");
    assert_eq!(asked.status, 413, "an envelope is made in memory, within limits.payload");
}
