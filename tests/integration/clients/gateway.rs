//! OpenFaaS's gateway API: the requests that faas-cli makes, and faas-cli itself where it is.

use super::{SOON, possible};
use crate::support::http::{self, Response};
use crate::support::{Node, TestDir, wait_until};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// busybox's httpd in the place of a watchdog: port 8080, `/_/health`, `fprocess` for each request.
const WATCHDOG: &str = "#!/bin/sh
mkdir -p /tmp/www/_ /tmp/www/cgi-bin
echo ok >/tmp/www/_/health
{ echo '#!/bin/sh'; echo \"printf 'Content-Type: text/plain\\\\r\\\\n\\\\r\\\\n'\"; echo \"$fprocess\"; } >/tmp/www/cgi-bin/index.cgi
chmod 755 /tmp/www/cgi-bin/index.cgi
echo \"watching: $fprocess\"
exec httpd -f -p 8080 -h /tmp/www
";

/// A node that knows faas-cli's password, `s3cret`, and has the image `watchdog:1`.
struct Gateway {
    node: Node,
    dir: TestDir,
}

impl Gateway {
    fn start(name: &str) -> Self {
        let dir = TestDir::new(name);
        let token = dir.write("token", "s3cret\n");
        let node = Node::builder(name).http_line(&format!("token_file = \"{}\"", token.display())).start();
        let script = dir.write("image/function.sh", WATCHDOG);
        std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).expect("its mode");
        let archive = dir.join("watchdog.tar");
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/shell/build.sh");
        let built =
            Command::new(build).arg(&archive).arg(dir.join("image")).output().expect("build an image");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let archive = archive.to_str().expect("the path is UTF-8");
        node.neap_ok(&["image", "import", archive, "--name", "watchdog:1"]);
        Self { node, dir }
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Response {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        // admin:s3cret
        let headers = [
            ("authorization", "Basic YWRtaW46czNjcmV0"),
            ("content-type", "application/json"),
            ("user-agent", "faas-cli/0.17.0"),
        ];
        http::request(self.node.port(), method, path, &headers, body.as_bytes()).expect("an answer")
    }

    fn get(&self, path: &str) -> Value {
        let answer = self.ask("GET", path, &Value::Null);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        answer.json()
    }
}

fn echo() -> Value {
    json!({
        "service": "echo", "image": "watchdog:1", "namespace": "", "envProcess": "cat",
        "envVars": { "GREETING": "hello" }, "constraints": [], "secrets": [],
        "labels": { "team": "heating" }, "annotations": { "com.openfaas.retry.attempts": "2" },
        "limits": { "memory": "32Mi", "cpu": "800m" }, "requests": null, "readOnlyRootFilesystem": false,
    })
}

#[test]
fn functions_are_deployed_described_invoked_scaled_and_removed_as_faas_cli_does() {
    if !possible() {
        return;
    }
    let gateway = Gateway::start("faas");

    assert_eq!(
        gateway.ask("PUT", "/system/functions", &echo()).status,
        404,
        "PUT comes first, and makes none"
    );
    let deployed = gateway.ask("POST", "/system/functions", &echo());
    assert_eq!(deployed.status, 202, "{}", deployed.text());

    let list = gateway.get("/system/functions");
    let [listed] = &list.as_array().expect("a list")[..] else { panic!("{list}") };
    let mut one = gateway.get("/system/function/echo?usage=1");
    let usage = one.as_object_mut().and_then(|one| one.remove("usage")).expect("it was asked for");
    assert!(usage["cpu"].is_number() && usage["totalMemoryBytes"].is_number(), "{usage}");
    assert_eq!(&one, listed);
    for (key, value) in [
        ("name", json!("echo")),
        ("image", json!("watchdog:1")),
        ("namespace", json!("openfaas-fn")),
        ("envProcess", json!("cat")),
        ("envVars", json!({ "GREETING": "hello" })),
        ("labels", json!({ "team": "heating" })),
        ("annotations", json!({ "com.openfaas.retry.attempts": "2" })),
        ("limits", json!({ "memory": "32Mi", "cpu": "800m" })),
        ("replicas", json!(1)),
        ("availableReplicas", json!(1)),
        ("invocationCount", json!(0)),
    ] {
        assert_eq!(one[key], value, "{key} of {one}");
    }
    let answer = gateway.node.post("/function/echo.openfaas-fn", "21 degrees");
    assert_eq!((answer.status, answer.text().as_str()), (200, "21 degrees"));
    assert_eq!(gateway.node.post("/function/echo", "again").text(), "again");
    // Counted when it has ended, which its answer need not wait for.
    wait_until(SOON, "both are counted", || gateway.get("/system/function/echo")["invocationCount"] == 2);

    let logs = gateway.ask(
        "GET",
        "/system/logs?name=echo&follow=false&tail=-1&since=2020-01-01T00:00:00Z",
        &Value::Null,
    );
    assert_eq!(logs.header("content-type"), Some("application/x-ndjson"));
    let line: Value = serde_json::from_str(logs.text().lines().next().expect("a line")).expect("JSON");
    assert_eq!((&line["name"], &line["text"]), (&json!("echo"), &json!("watching: cat")));
    assert!(line["timestamp"].as_str().is_some_and(|time| time.ends_with('Z')), "{line}");
    assert_eq!(gateway.ask("GET", "/system/logs?name=echo&tail=x", &Value::Null).status, 422);
    assert_eq!(gateway.ask("GET", "/system/logs?name=nobody", &Value::Null).status, 404);

    let mut changed = echo();
    changed["envProcess"] = json!("echo $GREETING; cat");
    assert_eq!(gateway.ask("PUT", "/system/functions", &changed).status, 202);
    assert_eq!(gateway.node.post("/function/echo", "21").text(), "hello\n21");
    for (read_only, said) in [(false, "writable"), (true, "read-only")] {
        let mut root = echo();
        root["envProcess"] = json!("touch /mark 2>/dev/null && echo writable || echo read-only");
        root["readOnlyRootFilesystem"] = json!(read_only);
        assert_eq!(gateway.ask("PUT", "/system/functions", &root).status, 202);
        assert_eq!(gateway.node.post("/function/echo", "").text(), format!("{said}\n"));
        assert_eq!(gateway.get("/system/function/echo")["readOnlyRootFilesystem"], read_only);
    }
    assert_eq!(gateway.ask("PUT", "/system/functions", &changed).status, 202);

    // The manifest outlives the daemon, as any does.
    let mut gateway = gateway;
    gateway.node.restart();
    assert_eq!(gateway.get("/system/function/echo")["labels"]["team"], "heating");
    assert_eq!(gateway.node.post("/function/echo", "22").text(), "hello\n22");

    let removing = json!({ "functionName": "echo", "namespace": "" });
    assert_eq!(gateway.ask("DELETE", "/system/functions", &removing).status, 202);
    assert_eq!(gateway.ask("DELETE", "/system/functions", &removing).status, 404);
    assert_eq!(gateway.get("/system/functions"), json!([]));
}

#[test]
fn metrics_have_openfaas_names_too() {
    if !possible() {
        return;
    }
    let gateway = Gateway::start("faas-metrics");
    assert_eq!(gateway.ask("POST", "/system/functions", &echo()).status, 202);
    for body in ["one", "two"] {
        assert_eq!(gateway.node.post("/function/echo", body).text(), body);
    }
    assert_eq!(gateway.node.get("/function/echo/nothing-here").status, 404);

    let of = |name: &str, more: &str, value: &str| {
        format!("gateway_{name}{{function_name=\"echo.openfaas-fn\"{more}}} {value}")
    };
    let expected = [
        of("function_invocation_total", ",code=\"200\"", "2"),
        of("function_invocation_total", ",code=\"404\"", "1"),
        of("function_invocation_started", "", "3"),
        of("functions_seconds_count", ",code=\"200\"", "2"),
        of("service_count", "", "1"),
    ];
    // Counted when it has ended, which its answer need not wait for.
    let metrics = || {
        let headers = [("authorization", "Basic YWRtaW46czNjcmV0")];
        http::request(gateway.node.port(), "GET", "/metrics", &headers, b"").expect("an answer").text()
    };
    let told = |metrics: &str| expected.iter().all(|line| metrics.lines().any(|other| other == line));
    let mut last = String::new();
    let holds = crate::support::holds_within(SOON, || {
        last = metrics();
        told(&last)
    });
    assert!(holds, "{expected:#?} in {last}");
}

#[test]
fn scaling_keeps_the_image_that_runs() {
    if !possible() {
        return;
    }
    let gateway = Gateway::start("faas-scale");
    let mut stdio = echo();
    stdio["annotations"] = json!({ "neap.platform": "none" });
    assert_eq!(gateway.ask("POST", "/system/functions", &stdio).status, 202);
    let before = gateway.node.function("echo");
    // The name means another image from now on.
    let archive = crate::support::shell_image().to_str().expect("the path is UTF-8");
    gateway.node.neap_ok(&["image", "import", archive, "--name", "watchdog:1"]);

    let scaled =
        gateway.ask("POST", "/system/scale-function/echo", &json!({ "serviceName": "echo", "replicas": 2 }));

    assert_eq!(scaled.status, 202, "{}", scaled.text());
    let after = gateway.node.function("echo");
    assert_eq!(after["manifest"]["scale"]["min"], 2);
    assert_eq!(after["image_digest"], before["image_digest"]);
    wait_until(SOON, "two are kept ready", || gateway.get("/system/function/echo")["replicas"] == 2);
    let nobody = gateway.ask("POST", "/system/scale-function/nobody", &json!({ "replicas": 1 }));
    assert_eq!(nobody.status, 404);
}

#[test]
fn what_a_node_refuses_is_said_in_plain_words() {
    if !possible() {
        return;
    }
    let gateway = Gateway::start("faas-refuses");
    let file = "name = \"owned\"\nimage = \"watchdog:1\"\n";
    let path = gateway.node.dir().write("functions.d/owned.toml", file);
    gateway.node.neap_ok(&["reload"]);
    let with = |key: &str, value: Value| {
        let mut asked = echo();
        asked[key] = value;
        let answer = gateway.ask("POST", "/system/functions", &asked);
        assert!(answer.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")));
        (answer.status, answer.text())
    };

    let (status, text) = with("image", json!("Not An Image"));
    assert_eq!((status, text.contains("Not An Image")), (400, true), "{text}");
    let (status, text) = with("limits", json!({ "memory": "128m" }));
    assert_eq!((status, text.contains("128Mi")), (400, true), "{text}");
    let (status, text) = with("secrets", json!(["not-there"]));
    assert!(status >= 400 && text.contains("not-there"), "{status} {text}");
    let (status, text) = with("service", json!("owned"));
    assert_eq!((status, text.contains(path.to_str().expect("UTF-8"))), (409, true), "{text}");
    assert_eq!(gateway.get("/system/functions").as_array().map(Vec::len), Some(1), "nothing was deployed");
    let removing = json!({ "functionName": "owned" });
    assert_eq!(gateway.ask("DELETE", "/system/functions", &removing).status, 409);

    assert_eq!(gateway.get("/system/namespaces"), json!(["openfaas-fn"]));
    assert_eq!(gateway.ask("GET", "/system/functions?namespace=other", &Value::Null).status, 404);
    assert_eq!(gateway.ask("POST", "/system/namespace/other", &json!({ "name": "other" })).status, 501);
    let info = gateway.get("/system/info");
    assert_eq!(info["provider"]["provider"], "neap");
    assert_eq!(gateway.node.get("/system/functions").status, 401);
}

#[test]
fn secrets_go_in_by_the_gateway_and_never_out() {
    if !possible() {
        return;
    }
    let gateway = Gateway::start("faas-secrets");
    let value = |value: &str| json!({ "name": "api-key", "namespace": "", "value": value });

    assert_eq!(gateway.ask("PUT", "/system/secrets", &value("x")).status, 404);
    assert_eq!(gateway.ask("POST", "/system/secrets", &value("first")).status, 201);
    assert_eq!(gateway.ask("POST", "/system/secrets", &value("second")).status, 409);
    assert_eq!(gateway.get("/system/secrets"), json!([{ "name": "api-key", "namespace": "openfaas-fn" }]));
    let mut reader = echo();
    reader["secrets"] = json!(["api-key"]);
    reader["envProcess"] = json!("cat /var/openfaas/secrets/api-key");
    assert_eq!(gateway.ask("POST", "/system/functions", &reader).status, 202);
    assert_eq!(gateway.node.post("/function/echo", "").text(), "first");
    let raw = json!({ "name": "api-key", "rawValue": "c2Vjb25k" });
    assert_eq!(gateway.ask("PUT", "/system/secrets", &raw).status, 202);
    assert_eq!(gateway.node.post("/function/echo", "").text(), "second");

    let removing = json!({ "name": "api-key", "namespace": "" });
    assert_eq!(gateway.ask("DELETE", "/system/secrets", &removing).status, 409, "a function needs it");
    let function = json!({ "functionName": "echo" });
    assert_eq!(gateway.ask("DELETE", "/system/functions", &function).status, 202);
    assert_eq!(gateway.ask("DELETE", "/system/secrets", &removing).status, 202);
    assert_eq!(gateway.ask("DELETE", "/system/secrets", &removing).status, 404);
    let garbage =
        gateway.ask("POST", "/system/secrets", &json!({ "name": "x", "value": 5, "rawValue": "hush" }));
    assert_eq!((garbage.status, garbage.text().contains("hush")), (400, false));
}

#[test]
fn faas_cli_itself_deploys_lists_invokes_and_removes() {
    if !possible() || Command::new("faas-cli").arg("version").output().is_err() {
        // In no package registry: whoever has it checks it.
        return;
    }
    let gateway = Gateway::start("faas-cli");
    let url = format!("http://127.0.0.1:{}", gateway.node.port());
    let cli = |arguments: &[&str], stdin: &str| {
        let input = gateway.dir.write("stdin", stdin);
        let output = Command::new("faas-cli")
            .args(arguments)
            .env("OPENFAAS_URL", &url)
            .env("HOME", gateway.dir.path())
            .current_dir(gateway.dir.path())
            .stdin(std::fs::File::open(input).expect("its stdin"))
            .output()
            .expect("run faas-cli");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    };
    let good = |arguments: &[&str], stdin: &str| {
        let (success, text) = cli(arguments, stdin);
        assert!(success, "faas-cli {}: {text}", arguments.join(" "));
        text
    };

    good(&["login", "--username", "admin", "--password-stdin"], "s3cret");
    good(&["secret", "create", "api-key", "--trim=false"], "hush");
    assert!(good(&["secret", "list"], "").contains("api-key"));
    good(
        &[
            "deploy",
            "--image",
            "watchdog:1",
            "--name",
            "echo",
            "--fprocess",
            "cat",
            "--secret",
            "api-key",
            "--label",
            "team=x",
        ],
        "",
    );
    assert!(good(&["list"], "").contains("echo"));
    let described = good(&["describe", "echo"], "");
    assert!(described.contains("Ready") && described.contains("team"), "{described}");
    assert_eq!(good(&["invoke", "echo"], "21 degrees"), "21 degrees");
    good(&["invoke", "echo", "--async"], "later");
    assert!(good(&["logs", "echo", "--tail=false"], "").contains("watching: cat"));
    assert!(good(&["namespaces"], "").contains("openfaas-fn"));
    assert!(good(&["version", "--warn-update=false"], "").contains("neap"));
    good(&["remove", "echo"], "");
    good(&["secret", "remove", "api-key"], "");
    assert!(!good(&["list"], "").contains("echo"));
}
