//! A function as OpenFaaS describes it → a manifest, and a deployed function → OpenFaaS's
//! description (faas-provider types/function_deployment.go, function_status.go). Pure.
//!
//! | OpenFaaS | manifest |
//! |---|---|
//! | `service`, `image`, `secrets`, `labels`, `annotations` | the same |
//! | `envVars`, `envProcess` | `env`, its `fprocess` |
//! | `limits.memory`, `limits.cpu` | `[limits]` |
//! | `exec_timeout`, `max_inflight` in envVars | `limits.timeout`, `scale.concurrency` |
//! | labels `com.openfaas.scale.min`, `.max`, `.zero-duration` | `scale.min`, `max`, `idle` |
//! | annotations `com.openfaas.retry.attempts`, `.min_wait`, `.max_wait`, `.codes` | `[retry]` |
//! | annotations `com.openfaas.ready.http.path`, `com.openfaas.health.http.path` | `ready` |
//! | `readOnlyRootFilesystem`, false unless it is said | `allow.writable`, the other way round |
//! | annotation `neap.platform` | `platform`, else openfaas |
//!
//! `requests` is no part of it: what is reserved is the limit. `constraints` are refused, there is
//! one node.

use crate::config::units;
use crate::model::UnixMs;
use crate::model::function::Manifest;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// OpenFaaS's own default; there is no other here.
pub const NAMESPACE: &str = "openfaas-fn";

/// The body of POST and PUT `/system/functions`. Fields that are not here mean nothing to a node.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct FunctionDeployment {
    pub service: String,
    pub image: String,
    pub namespace: Option<String>,
    pub env_process: Option<String>,
    pub env_vars: Option<BTreeMap<String, String>>,
    pub constraints: Option<Vec<String>>,
    pub secrets: Option<Vec<String>>,
    pub labels: Option<BTreeMap<String, String>>,
    pub annotations: Option<BTreeMap<String, String>>,
    pub limits: Option<Resources>,
    pub read_only_root_filesystem: Option<bool>,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct Resources {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
}

/// What GET says of a function.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FunctionStatus {
    pub name: String,
    pub image: String,
    pub namespace: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_process: Option<String>,
    pub env_vars: BTreeMap<String, String>,
    pub secrets: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub limits: Resources,
    pub read_only_root_filesystem: bool,
    /// Attempts that ended since the daemon's start.
    pub invocation_count: u64,
    pub replicas: u64,
    pub available_replicas: u64,
    pub created_at: String,
    /// Only where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<FunctionUsage>,
}

/// Of all of a function's instances together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FunctionUsage {
    /// Thousandths of a CPU.
    pub cpu: f64,
    pub total_memory_bytes: f64,
}

/// The manifest's text; every mistake that it would not show.
pub fn manifest(asked: FunctionDeployment) -> Result<String, Vec<String>> {
    let mut wrong = Vec::new();
    let mut root = toml::Table::new();
    let labels = asked.labels.unwrap_or_default();
    let annotations = asked.annotations.unwrap_or_default();
    let mut env = asked.env_vars.unwrap_or_default();
    if !in_namespace(asked.namespace.as_deref()) {
        wrong.push(format!("namespace: there is one here, {NAMESPACE}"));
    }
    if asked.constraints.is_some_and(|all| !all.is_empty()) {
        wrong.push("constraints: there is one node here; leave them out".to_owned());
    }

    let mut limits = toml::Table::new();
    let wanted = asked.limits.unwrap_or_default();
    if let Some(text) = wanted.memory.filter(|text| !text.is_empty()) {
        match memory_bytes(&text) {
            Some(bytes) => put(&mut limits, "memory", units::show_size(bytes)),
            None => {
                wrong.push(format!("limits.memory: {text:?} is no quantity; expected one like \"128Mi\""))
            }
        }
    }
    if let Some(text) = wanted.cpu.filter(|text| !text.is_empty()) {
        match cpus(&text) {
            Some(cpus) => put(&mut limits, "cpu", cpus),
            None => wrong.push(format!("limits.cpu: {text:?} is no quantity; expected one like \"500m\"")),
        }
    }
    let mut scale = toml::Table::new();
    let mut retry = toml::Table::new();
    let mut time = |table: &mut toml::Table, key: &str, name: &str, text: Option<&String>| {
        let Some(text) = text.filter(|text| !text.is_empty()) else { return };
        match go_duration(text) {
            Some(time) => put(table, key, format!("{}ms", time.as_millis())),
            None => wrong.push(format!("{name}: {text:?} is no duration; expected one like \"30s\"")),
        }
    };
    time(&mut limits, "timeout", "exec_timeout", env.get("exec_timeout"));
    let of = |map: &'_ BTreeMap<String, String>, name: &str| map.get(name).cloned();
    time(&mut scale, "idle", ZERO_DURATION, of(&labels, ZERO_DURATION).as_ref());
    time(&mut retry, "backoff", MIN_WAIT, of(&annotations, MIN_WAIT).as_ref());
    time(&mut retry, "backoff_max", MAX_WAIT, of(&annotations, MAX_WAIT).as_ref());
    let mut count = |table: &mut toml::Table, key: &str, name: &str, text: Option<&String>| match text
        .map(|text| text.trim().parse::<u32>())
    {
        None => {}
        Some(Ok(count)) => put(table, key, i64::from(count)),
        Some(Err(_)) => wrong.push(format!("{name}: expected a whole number")),
    };
    // 0 means without a bound: what is there at once is for scale.max.
    let inflight = env.get("max_inflight").filter(|text| text.trim() != "0");
    count(&mut scale, "concurrency", "max_inflight", inflight);
    count(&mut scale, "min", SCALE_MIN, labels.get(SCALE_MIN));
    count(&mut scale, "max", SCALE_MAX, labels.get(SCALE_MAX));
    // 0 switches them off, which is one attempt.
    let attempts = annotations.get(ATTEMPTS).map(|text| if text.trim() == "0" { "1" } else { text.as_str() });
    count(&mut retry, "attempts", ATTEMPTS, attempts.map(str::to_owned).as_ref());
    if let Some(text) = annotations.get(CODES).filter(|text| !text.trim().is_empty()) {
        let codes = text.split(',').map(|code| code.trim().parse::<u16>().map(i64::from));
        match codes.collect::<Result<Vec<_>, _>>() {
            Ok(codes) => put(&mut retry, "codes", codes),
            Err(_) => {
                wrong.push(format!("{CODES}: {text:?} is no list of statuses; expected one like \"429,503\""))
            }
        }
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }

    put(&mut root, "name", asked.service);
    put(&mut root, "image", asked.image);
    put(&mut root, "platform", of(&annotations, PLATFORM).unwrap_or_else(|| "openfaas".to_owned()));
    if let Some(path) = [READY_PATH, HEALTH_PATH].iter().find_map(|name| of(&annotations, name)) {
        put(&mut root, "ready", path);
    }
    if let Some(process) = asked.env_process.filter(|process| !process.is_empty()) {
        env.entry("fprocess".to_owned()).or_insert(process);
    }
    let secrets: Vec<toml::Value> = asked.secrets.unwrap_or_default().into_iter().map(Into::into).collect();
    if !secrets.is_empty() {
        put(&mut root, "secrets", secrets);
    }
    let mut allow = toml::Table::new();
    if !asked.read_only_root_filesystem.unwrap_or(false) {
        put(&mut allow, "writable", true);
    }
    let strings = |map: BTreeMap<String, String>| -> toml::Table {
        map.into_iter().map(|(name, value)| (name, value.into())).collect()
    };
    let tables = [
        ("env", strings(env)),
        ("labels", strings(labels)),
        ("annotations", strings(annotations)),
        ("allow", allow),
        ("limits", limits),
        ("scale", scale),
        ("retry", retry),
    ];
    for (key, table) in tables.into_iter().filter(|(_, table)| !table.is_empty()) {
        put(&mut root, key, table);
    }
    Ok(root.to_string())
}

const SCALE_MIN: &str = "com.openfaas.scale.min";
const SCALE_MAX: &str = "com.openfaas.scale.max";
const ZERO_DURATION: &str = "com.openfaas.scale.zero-duration";
const ATTEMPTS: &str = "com.openfaas.retry.attempts";
const MIN_WAIT: &str = "com.openfaas.retry.min_wait";
const MAX_WAIT: &str = "com.openfaas.retry.max_wait";
const CODES: &str = "com.openfaas.retry.codes";
const READY_PATH: &str = "com.openfaas.ready.http.path";
const HEALTH_PATH: &str = "com.openfaas.health.http.path";
const PLATFORM: &str = "neap.platform";

pub fn in_namespace(namespace: Option<&str>) -> bool {
    namespace.is_none_or(|namespace| namespace.is_empty() || namespace == NAMESPACE)
}

/// What a deployed function looks like; who runs it fills in the rest.
pub fn status(manifest: &Manifest, created: UnixMs) -> FunctionStatus {
    let mut env = manifest.env.clone();
    let memory = match manifest.limits.memory_bytes {
        bytes if bytes.is_multiple_of(1 << 20) => format!("{}Mi", bytes >> 20),
        bytes => bytes.to_string(),
    };
    FunctionStatus {
        name: manifest.name.to_string(),
        image: manifest.image.to_string(),
        namespace: NAMESPACE,
        env_process: env.remove("fprocess"),
        env_vars: env,
        secrets: manifest.permissions.secrets.iter().map(ToString::to_string).collect(),
        labels: manifest.marks.labels.clone(),
        annotations: manifest.marks.annotations.clone(),
        limits: Resources { memory: Some(memory), cpu: Some(format!("{}m", manifest.limits.cpu_millis)) },
        read_only_root_filesystem: !manifest.permissions.allow.writable,
        invocation_count: 0,
        replicas: 0,
        available_replicas: 0,
        created_at: created.rfc3339(),
        usage: None,
    }
}

fn put(table: &mut toml::Table, key: &str, value: impl Into<toml::Value>) {
    table.insert(key.to_owned(), value.into());
}

/// A quantity as Kubernetes has them, of bytes.
fn memory_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = match unit {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        // Not "128m": to Kubernetes that is an eighth of a byte.
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

fn cpus(text: &str) -> Option<f64> {
    let text = text.trim();
    let cpus = match text.strip_suffix('m') {
        Some(millis) => f64::from(millis.parse::<u32>().ok()?) / 1000.0,
        None => text.parse::<f64>().ok()?,
    };
    cpus.is_finite().then_some(cpus)
}

/// As Go writes them, `1m30s`, from a millisecond up; a number alone is seconds.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if let Ok(seconds) = rest.parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        rest = &rest[end..];
        sum = sum.checked_add(Duration::try_from_secs_f64(number * unit).ok()?)?;
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Config, Machine};
    use crate::model::function::{Handler, Platform};

    fn parsed(json: serde_json::Value) -> Result<Manifest, String> {
        let asked: FunctionDeployment = serde_json::from_value(json).expect("a deployment");
        let text = manifest(asked).map_err(|wrong| wrong.join("\n"))?;
        let machine = Machine { machine_id: Some("0".repeat(32)), hostname: String::new() };
        config::manifest::parse("f", &text, &Config::defaults(&machine))
            .map_err(|problems| problems.iter().map(|problem| format!("{problem}\n")).collect())
    }

    #[test]
    fn deployment_becomes_a_manifest_and_is_described_as_it_was_asked_for() {
        let asked = serde_json::json!({
            "service": "figlet", "image": "ghcr.io/openfaas/figlet:latest", "network": "", "namespace": "",
            "envProcess": "figlet -f \"big\"", "envVars": { "exec_timeout": "1m30s", "A": "b\u{7f}\n\"" },
            "constraints": null, "secrets": ["api-key"], "labels": { "com.openfaas.scale.max": "7", "team": "x" },
            "annotations": { "com.openfaas.retry.attempts": "3", "com.openfaas.retry.min_wait": "250ms",
                             "com.openfaas.retry.codes": "429, 503" },
            "limits": { "memory": "128Mi", "cpu": "500m" }, "requests": { "memory": "20Mi" },
            "readOnlyRootFilesystem": true,
        });

        let manifest = parsed(asked).expect("a good deployment");

        assert_eq!((manifest.platform, manifest.handler), (Platform::Openfaas, Handler::Http));
        assert_eq!((manifest.limits.memory_bytes, manifest.limits.cpu_millis), (128 << 20, 500));
        assert_eq!(manifest.limits.timeout, Duration::from_secs(90));
        assert_eq!((manifest.scale.max, manifest.retry.attempts), (7, 3));
        assert_eq!(manifest.retry.backoff, Duration::from_millis(250));
        assert_eq!(manifest.retry.codes, Some(vec![429, 503]));
        let status = status(&manifest, UnixMs(0));
        assert_eq!(status.env_process.as_deref(), Some("figlet -f \"big\""));
        assert_eq!(status.env_vars.get("A").map(String::as_str), Some("b\u{7f}\n\""));
        assert_eq!(status.labels.get("team").map(String::as_str), Some("x"));
        assert_eq!(status.secrets, ["api-key"]);
        assert_eq!(status.limits, Resources { memory: Some("128Mi".into()), cpu: Some("500m".into()) });
        assert!(status.read_only_root_filesystem && !manifest.permissions.allow.writable);
    }

    #[test]
    fn a_root_is_writable_unless_the_deployment_says_otherwise() {
        let with = |said: serde_json::Value| {
            let mut asked = serde_json::json!({ "service": "f", "image": "f:1" });
            asked["readOnlyRootFilesystem"] = said;
            let manifest = parsed(asked).expect("a good deployment");
            let shown = status(&manifest, UnixMs(0)).read_only_root_filesystem;
            assert_eq!(shown, !manifest.permissions.allow.writable);
            shown
        };

        assert!(with(true.into()));
        assert!(!with(false.into()));
        assert!(!with(serde_json::Value::Null), "as Go has what is left out");
    }

    #[test]
    fn what_a_node_can_not_do_is_refused_by_name() {
        let with = |key: &str, value: serde_json::Value| {
            let mut asked = serde_json::json!({ "service": "f", "image": "f:1" });
            asked[key] = value;
            parsed(asked).map(|_| ()).expect_err(key)
        };

        assert!(with("namespace", "other".into()).contains("openfaas-fn"));
        assert!(with("constraints", serde_json::json!(["node.role == manager"])).contains("constraints"));
        assert!(with("limits", serde_json::json!({ "memory": "128m" })).contains("128Mi"));
        assert!(with("limits", serde_json::json!({ "cpu": "a lot" })).contains("500m"));
        assert!(with("service", "Bad_Name".into()).contains("name"));
        assert!(with("envVars", serde_json::json!({ "exec_timeout": "soon" })).contains("exec_timeout"));
        let codes = serde_json::json!({ "com.openfaas.retry.codes": "500, later" });
        assert!(with("annotations", codes).contains("429,503"));
    }

    #[test]
    fn durations_are_gos() {
        for (text, ms) in [("30s", 30_000), ("1m30s", 90_000), ("250ms", 250), ("1.5s", 1500), ("5", 5000)] {
            assert_eq!(go_duration(text), Some(Duration::from_millis(ms)), "{text}");
        }
        for bad in ["s", "1", "-1s", "1d", "1s2", "99999999999999999999h"] {
            assert!(bad == "1" || go_duration(bad).is_none(), "{bad}");
        }
    }
}
