//! Handler lambda, with AWS's own runtime client for Python in the container.

use super::{SOON, Site, possible};
use crate::support::python::lambda_image;
use crate::support::{Node, Subscriber, have, http, publish, wait_until};

fn lambda_possible() -> bool {
    possible() && have("Lambda functions", "mmdebstrap")
}

/// `app.handler` in an image that says by its command what it is.
fn function(name: &str, head: &str, rest: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"pylambda:1\"\nplatform = \"lambda\"\n{head}\n\
         command = ['/usr/bin/python3', '-m', 'awslambdaric', 'app.handler']\n{rest}\n\
         [limits]\ncpu = 2\nstart = \"120s\"\n"
    )
}

fn node(name: &str) -> Node {
    let node = Node::builder(name).start();
    node.import(lambda_image());
    node
}

#[test]
fn runtime_client_gets_events_and_answers() {
    if !lambda_possible() {
        return;
    }
    let node = node("lambda");
    node.deploy(&function("f", "", ""));

    let answer = node.post("/function/f/door", r#"{"celsius": 21.5}"#);
    let said = answer.json();

    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(said["event"]["celsius"], 21.5);
    assert_eq!((said["name"].as_str(), said["memory"].as_str()), (Some("f"), Some("128")));
    assert_eq!((said["left"].as_bool(), said["subject"].as_str()), (Some(true), Some("/door")));
    assert_eq!(said["handler"], "app.handler");
    let id = said["id"].as_str().expect("a request id");
    wait_until(SOON, "the log has Lambda's lines", || {
        let log = node.neap_ok(&["logs", "f"]);
        ["START", "END", "REPORT"].iter().all(|word| log.contains(&format!("{word} RequestId: {id}")))
            && log.contains("Max Memory Used: ")
    });
    // Text that is no JSON is a JSON string; the instance is the same.
    assert_eq!(node.post("/function/f", "21 degrees").json()["event"], "21 degrees");
    let pid = node.post("/function/f", r#"{"do": "pid"}"#).text();
    assert_eq!(node.post("/function/f", r#"{"do": "pid"}"#).text(), pid);
    assert!(node.neap_ok(&["show", "f"]).contains("lambda"));

    let invoke = |context: &str| {
        let headers =
            [("x-amz-client-context", context), ("x-amzn-trace-id", "Root=1-5759e988-bd862e3fe1be46a9")];
        let path = "/2015-03-31/functions/f/invocations";
        http::request(node.port(), "POST", path, &headers, b"{}").expect("an answer")
    };
    // {"custom":{"subject":"given"}}
    let answer = invoke("eyJjdXN0b20iOnsic3ViamVjdCI6ImdpdmVuIn19");
    let said = answer.json();
    assert_eq!(said["subject"], "given", "{}", answer.text());
    assert_eq!(said["id"].as_str(), answer.header("x-amzn-requestid"));
    assert_eq!(said["trace"], "Root=1-5759e988-bd862e3fe1be46a9");
    assert_eq!(invoke("bm8gSlNPTg==").status, 400);
}

#[test]
fn failures_of_lambda_functions_are_told_apart() {
    if !lambda_possible() {
        return;
    }
    let node = node("lambda-fails");
    let rest = "[retry]\nattempts = 1\n[scale]\nmax = 1\n";
    node.deploy(&function("f", "", rest).replace("cpu = 2", "cpu = 2\ntimeout = \"4s\"\npayload = \"6MiB\""));
    node.deploy(&function("broken", "env = { FAIL_INIT = \"1\" }", rest));
    let ask = |body: &str| node.post("/function/f", body);
    let failure = |answer: &http::Response| answer.header("x-neap-failure").map(str::to_owned);

    let raised = ask(r#"{"do": "fail"}"#);
    assert_eq!((raised.status, failure(&raised).as_deref()), (502, Some("answer")));
    assert!(raised.text().contains("ValueError: bad reading"), "{}", raised.text());

    let exited = ask(r#"{"do": "exit"}"#);
    assert_eq!((exited.status, failure(&exited).as_deref()), (502, Some("exit")), "{}", exited.text());

    let late = ask(r#"{"do": "sleep", "seconds": 1000}"#);
    assert_eq!((late.status, failure(&late).as_deref()), (504, Some("timed_out")));

    let most = ask(r#"{"do": "large", "bytes": 6000000}"#);
    assert_eq!((most.status, most.body.len()), (200, 6_000_002));
    let large = ask(r#"{"do": "large", "bytes": 7000000}"#);
    assert_eq!((large.status, failure(&large).as_deref()), (502, Some("output_too_large")));

    // A gigabyte for an answer: refused where the limit is, whatever the runtime goes on sending.
    let before = node.daemon_memory_kib();
    let flood = ask(r#"{"do": "flood", "bytes": 1073741824}"#);
    assert_eq!(
        (flood.status, failure(&flood).as_deref()),
        (502, Some("output_too_large")),
        "{}",
        flood.text()
    );
    let grown = node.daemon_memory_kib().saturating_sub(before);
    assert!(grown < 32 << 10, "the daemon grew by {grown} KiB");

    let init = node.post("/function/broken", "{}");
    assert_eq!((init.status, failure(&init).as_deref()), (502, Some("start")));
    assert!(init.text().contains("no such sensor"), "{}", init.text());

    assert_eq!(ask("{}").status, 200, "after all of it");
    wait_until(SOON, "the log tells of the init that failed", || {
        let log = node.neap_ok(&["logs", "broken"]);
        log.contains("INIT_REPORT Init Duration: ") && log.contains("Status: error\tError Type: ")
    });
    let log = node.neap_ok(&["logs", "f"]);
    for line in ["Task timed out after 4.00 seconds", "Runtime.ExitError", "Function.ResponseSizeTooLarge"] {
        assert!(log.contains(line), "{line} in {log}");
    }
}

#[test]
fn messages_go_through_a_lambda_function_to_the_uplink() {
    if !lambda_possible() {
        return;
    }
    let site = Site::start("lambda-mqtt");
    site.node.import(lambda_image());
    let rest = "[[trigger]]\nmqtt = \"sensors/#\"\n[[output]]\nto = \"uplink\"\ntopic = \"out\"\n";
    site.node.deploy(&function("f", "", rest));
    let cloud = Subscriber::start(site.uplink.port(), "cloud", &["out"]);

    site.local.wait_subscribed("neap-", "sensors/#");
    publish(site.local.port(), "sensors/caf\u{e9}", r#"{"celsius": 21.5}"#);
    let message = cloud.wait_for(1, SOON * 4).remove(0);

    let said: serde_json::Value = serde_json::from_slice(&message.payload).expect("JSON");
    assert_eq!(said["event"]["celsius"], 21.5);
    assert_eq!(said["subject"], "sensors/caf\u{e9}");
}
