//! A plain Flask server as a Knative service, with the CloudEvents SDK for Python in it.

use super::{SOON, Site, possible};
use crate::support::python::python_image;
use crate::support::{Subscriber, have, publish};

/// Answers calls, and events with an event of its own.
const SERVER: &str = r#"
import os
from flask import Flask, Response, request
from cloudevents.http import CloudEvent, from_http, to_binary
app = Flask(__name__)
@app.post("/")
def event():
    e = from_http(request.headers, request.get_data())
    said = {"type": "com.example.sum", "source": "/sums", "id": "of-" + e["id"], "subject": e["type"]}
    headers, body = to_binary(CloudEvent(said, {"sum": sum(e.data)}))
    return Response(body, 200, headers)
@app.get("/hello/<name>")
def hello(name):
    return f"hello {name} from {os.environ['K_SERVICE']}"
app.run(host="0.0.0.0", port=int(os.environ["PORT"]))
"#;

#[test]
fn flask_answers_calls_and_gets_and_sends_events() {
    if !possible() || !have("Flask", "mmdebstrap") {
        return;
    }
    let site = Site::start("flask");
    site.node.import(python_image());
    site.node.deploy(&format!(
        "name = \"sums\"\nimage = \"pytest:1\"\nplatform = \"knative\"\n\
         command = ['/usr/bin/python3', '-c', '''{SERVER}''']\n\
         [[trigger]]\nmqtt = \"in\"\n[[output]]\nto = \"uplink\"\ntopic = \"out\"\n\
         [limits]\nmemory = \"192MiB\"\ncpu = 2\nstart = \"120s\"\n"
    ));
    let cloud = Subscriber::start(site.uplink.port(), "cloud", &["out"]);

    let hello = site.node.get("/function/sums/hello/caf%C3%A9");
    site.local.wait_subscribed("neap-", "in");
    publish(site.local.port(), "in", "[1, 2, 3]");
    // The call's answer goes to the uplink too, before it.
    let message = cloud.wait_for(2, SOON * 4).remove(1);

    assert_eq!((hello.status, hello.text().as_str()), (200, "hello caf\u{e9} from sums"));
    let property = |name: &str| message.user_property(name).map(str::to_owned);
    assert_eq!(property("type").as_deref(), Some("com.example.sum"));
    assert_eq!(property("subject").as_deref(), Some("neap.mqtt.message"));
    assert!(property("id").is_some_and(|id| id.starts_with("of-")));
    assert_eq!(message.text(), r#"{"sum": 6}"#);
}
