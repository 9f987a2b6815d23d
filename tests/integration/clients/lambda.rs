//! The Lambda Invoke API, spoken by AWS's SDK for Python.

use super::{SOON, alone, function, possible};
use crate::support::python::lambda_image;
use crate::support::receiver::{python_path, script};
use crate::support::{Node, TestDir, have, http, skip, wait_until};
use serde_json::{Value, json};
use std::io::Write;
use std::process::Stdio;

const SECRET: &str = "s3cret";

#[track_caller]
fn sdk_possible() -> bool {
    possible()
        && have("the SDK", "python3")
        && (python_path().join("boto3").is_dir() || skip("AWS's SDK", "tests/deps.sh was not run"))
}

/// What came of each call.
fn invoke(node: &Node, secret: &str, calls: &Value) -> Vec<Value> {
    let url = format!("http://127.0.0.1:{}", node.port());
    let mut child = script("invoke.py")
        .args([&url, secret])
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("AWS_CONFIG_FILE", "/nonexistent")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run the SDK");
    child.stdin.take().expect("piped").write_all(calls.to_string().as_bytes()).expect("sent");
    let output = child.wait_with_output().expect("the SDK ends");
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// A node that asks everybody for its token, and where that is.
fn guarded(name: &str) -> (Node, TestDir) {
    let dir = TestDir::new(name);
    let token = dir.write("token", SECRET);
    let builder = Node::builder(name).http_line("auth_functions = true");
    (alone(builder.http_line(&format!("token_file = \"{}\"", token.display()))), dir)
}

#[test]
fn sdk_invokes_functions_in_all_ways() {
    if !sdk_possible() {
        return;
    }
    let (node, _token) = guarded("sdk-invokes");
    let retry = "[retry]\nattempts = 1\n";
    node.deploy(&function("echo", "echo \"working on $CE_ID\" >&2; cat", ""));
    node.deploy(&function("fail", "echo '[\"half\"]'; echo broken >&2; exit 3", retry));
    node.deploy(&function("later", "cat >&2", ""));
    let arn = "arn:aws:lambda:eu-central-1:000000000000:function:echo";
    let large = format!("\"{}\"", "x".repeat(200_000));

    let answers = invoke(
        &node,
        SECRET,
        &json!([
            { "name": "echo", "payload": "{\"a\": 1}", "log": "Tail" },
            { "name": arn, "payload": "[2]", "qualifier": "1" },
            { "name": "echo", "payload": "{}", "type": "DryRun", "qualifier": "$LATEST" },
            { "name": "later", "payload": "{\"event\": true}", "type": "Event" },
            { "name": "fail", "payload": "{}", "log": "Tail" },
            { "name": "nobody", "payload": "{}" },
            { "name": "nobody", "payload": "{}", "type": "Event" },
            { "name": "echo", "payload": "{}", "qualifier": "2" },
            { "name": "echo", "payload": "no json" },
            { "name": "echo", "payload": large, "stream": true, "log": "Tail" },
            { "name": "fail", "payload": "{}", "stream": true },
            { "name": "nobody", "payload": "{}", "stream": true },
        ]),
    );

    let [echo, by_arn, dry, event, failed, unknown, unknown_event, version, garbage, stream, ..] =
        &answers[..]
    else {
        panic!("{answers:?}")
    };
    assert_eq!(
        (&echo["status"], &echo["payload"], &echo["version"]),
        (&json!(200), &json!("{\"a\": 1}"), &json!("$LATEST"))
    );
    assert_eq!(echo["error"], Value::Null);
    let id = echo["id"].as_str().expect("a request id");
    assert_eq!(echo["log"], format!("working on {id}\n"), "its own lines and no others");
    assert_eq!((&by_arn["payload"], &by_arn["version"]), (&json!("[2]"), &json!("1")));
    assert_eq!(dry["status"], 204);
    assert_eq!((&event["status"], &event["payload"]), (&json!(202), &json!("")));
    assert_eq!((&failed["status"], &failed["error"]), (&json!(200), &json!("Unhandled")));
    let told: Value = serde_json::from_str(failed["payload"].as_str().expect("text")).expect("JSON");
    assert_eq!(told["errorType"], "Runtime.ExitError");
    assert!(told["errorMessage"].as_str().is_some_and(|text| text.ends_with("exit status 3")), "{told}");
    assert_eq!(failed["log"], "broken\n");
    for missing in [unknown, unknown_event, version, &answers[11]] {
        assert_eq!(
            (&missing["status"], &missing["code"]),
            (&json!(404), &json!("ResourceNotFoundException"))
        );
    }
    assert_eq!(
        (&garbage["status"], &garbage["code"]),
        (&json!(400), &json!("InvalidRequestContentException"))
    );
    assert_eq!((&stream["status"], &stream["payload"]), (&json!(200), &json!(large)));
    assert!(stream["chunks"].as_u64().is_some_and(|chunks| chunks > 1), "it came in pieces");
    assert!(stream["log"].as_str().is_some_and(|log| log.starts_with("working on ")), "{}", stream["log"]);
    assert_eq!(answers[10]["error"], "Unhandled");
    assert!(answers[10]["details"].as_str().is_some_and(|text| text.contains("exit status 3")));
    wait_until(SOON, "the event ran", || node.neap_ok(&["logs", "later"]).contains("{\"event\": true}"));

    let wrong = invoke(
        &node,
        "wrong",
        &json!([{ "name": "echo", "payload": "{}" }, { "name": "nobody", "payload": "{}" }]),
    );
    for denied in &wrong {
        let denied = (&denied["status"], &denied["code"]);
        assert_eq!(denied, (&json!(403), &json!("InvalidSignatureException")), "whatever is deployed");
    }
    let path = "/2015-03-31/functions/echo/invocations";
    let unsigned = http::post(node.port(), path, "{}").expect("an answer");
    assert_eq!(unsigned.header("x-amzn-errortype"), Some("MissingAuthenticationTokenException"));
    let bearer = [("authorization", "Bearer s3cret")];
    let bearer = http::request(node.port(), "POST", path, &bearer, b"{}").expect("an answer");
    assert_eq!((bearer.status, bearer.text().as_str()), (200, "{}"));
}

#[test]
fn sdk_is_told_how_a_lambda_function_failed() {
    if !sdk_possible() || !have("Lambda functions", "mmdebstrap") {
        return;
    }
    let node = Node::builder("sdk-lambda").start();
    node.import(lambda_image());
    node.deploy(
        "name = \"f\"\nimage = \"pylambda:1\"\nplatform = \"lambda\"\n\
         command = ['/usr/bin/python3', '-m', 'awslambdaric', 'app.handler']\n\
         [retry]\nattempts = 1\n[limits]\ncpu = 2\nstart = \"120s\"\ntimeout = \"20s\"\n",
    );

    let answers = invoke(
        &node,
        "any",
        &json!([
            { "name": "f", "payload": "{\"do\": \"print\"}", "log": "Tail" },
            { "name": "f", "payload": "{\"do\": \"fail\"}" },
            { "name": "f", "payload": "{\"do\": \"exit\"}" },
        ]),
    );

    let [good, raised, exited] = &answers[..] else { panic!("{answers:?}") };
    let payload = |answer: &Value| -> Value {
        serde_json::from_str(answer["payload"].as_str().expect("text")).expect("JSON")
    };
    assert_eq!((&good["error"], &payload(good)["event"]["do"]), (&Value::Null, &json!("print")));
    let log = good["log"].as_str().expect("text");
    assert!(
        ["START RequestId", "END RequestId", "REPORT RequestId"].iter().all(|line| log.contains(line)),
        "{log}"
    );
    assert_eq!((&raised["status"], &raised["error"]), (&json!(200), &json!("Unhandled")));
    let told = payload(raised);
    assert_eq!((&told["errorType"], &told["errorMessage"]), (&json!("ValueError"), &json!("bad reading")));
    assert!(told["stackTrace"].is_array(), "as the runtime reported it: {told}");
    assert_eq!(
        (&exited["error"], &payload(exited)["errorType"]),
        (&json!("Unhandled"), &json!("Runtime.ExitError"))
    );
}

/// A web function: what it was asked, as an HTTP answer of its own.
const WEB: &str = "
import base64, json
def handler(event, context):
    if event['rawPath'] == '/plain':
        return {'path': event['rawPath']}
    body = event.get('body', '')
    if event['isBase64Encoded']:
        body = base64.b64decode(body).decode()
    told = {'method': event['requestContext']['http']['method'], 'query': event.get('queryStringParameters'), 'body': body}
    return {'statusCode': 201, 'headers': {'X-Made-By': 'web', 'Content-Type': 'application/vnd.x+json'},
            'cookies': ['a=1', 'b=2'], 'body': base64.b64encode(json.dumps(told).encode()).decode(), 'isBase64Encoded': True}
";

/// Puts it where the runtime client looks, which takes its place.
const START: &str = "
import os
os.chdir('/tmp')
open('web.py', 'w').write(os.environ['WEB'])
os.execv('/usr/bin/python3', ['python3', '-m', 'awslambdaric', 'web.handler'])
";

#[test]
fn web_function_is_called_as_by_its_function_url() {
    if !possible() || !have("Lambda functions", "mmdebstrap") {
        return;
    }
    let node = Node::builder("function-url").start();
    node.import(lambda_image());
    node.deploy(&format!(
        "name = \"web\"\nimage = \"pylambda:1\"\nplatform = \"lambda\"\nfunction_url = true\n\
         command = ['/usr/bin/python3', '-c', \"\"\"{START}\"\"\"]\n\
         env = {{ WEB = \"\"\"{WEB}\"\"\" }}\n[limits]\ncpu = 2\nstart = \"120s\"\n"
    ));

    let headers = [("content-type", "application/x-www-form-urlencoded")];
    let answer = http::request(node.port(), "PUT", "/function/web/a/b?x=1&x=2", &headers, b"celsius=21.5");
    let answer = answer.expect("an answer");
    let plain = node.get("/function/web/plain");

    assert_eq!(answer.status, 201, "{}", answer.text());
    let kind = Some("application/vnd.x+json");
    assert_eq!((answer.header("x-made-by"), answer.header("content-type")), (Some("web"), kind));
    let cookies: Vec<&str> = answer
        .headers
        .iter()
        .filter(|(name, _)| name == "set-cookie")
        .map(|(_, value)| value.as_str())
        .collect();
    assert_eq!(cookies, ["a=1", "b=2"]);
    let told = answer.json();
    assert_eq!((&told["method"], &told["query"]["x"]), (&json!("PUT"), &json!("1,2")));
    assert_eq!(told["body"], "celsius=21.5");
    assert_eq!((plain.status, plain.json()), (200, json!({ "path": "/plain" })));
}
