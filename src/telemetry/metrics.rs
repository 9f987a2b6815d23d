//! Counters and histograms in the Prometheus text format (version 0.0.4), a fixed set:
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>.
//!
//! Labels are functions that are deployed (they go with `remove`) and words from the code, so
//! their number is bounded.

use crate::model::FunctionName;
use crate::model::function::FunctionLoad;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Upper bounds of the histogram, in milliseconds: from a parked start to the longest timeouts.
const BUCKETS_MS: [u64; 11] = [1, 5, 10, 25, 50, 100, 250, 1_000, 5_000, 30_000, 300_000];

/// Functions that are counted apart; the runtime can't deploy more
/// (`model::function::FUNCTIONS_MAX`). A call for one more is not counted: it can only be a bug.
const FUNCTIONS_MAX: usize = crate::model::function::FUNCTIONS_MAX as usize;

/// Different ways, reasons and targets; all are words in the code.
const WORDS_MAX: usize = 64;

/// Codes of one function that are counted apart: it answers as it likes. Beyond them, by their class.
const CODES_MAX: usize = 16;

/// A handle; cheap to clone.
#[derive(Clone, Default)]
pub struct Metrics {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    functions: BTreeMap<FunctionName, PerFunction>,
    accepted: BTreeMap<&'static str, u64>,
    refused: BTreeMap<&'static str, u64>,
    delivered: BTreeMap<&'static str, u64>,
}

#[derive(Default)]
struct PerFunction {
    succeeded: u64,
    failed: u64,
    lost: u64,
    started_parked: u64,
    started_created: u64,
    times: Times,
    /// By what OpenFaaS calls a code.
    codes: BTreeMap<u16, Times>,
}

#[derive(Default)]
struct Times {
    /// Not cumulative; the last is above every bound.
    buckets: [u64; BUCKETS_MS.len() + 1],
    took: Duration,
}

impl Times {
    fn add(&mut self, took: Duration) {
        let bucket = BUCKETS_MS.iter().position(|bound| took <= Duration::from_millis(*bound));
        self.buckets[bucket.unwrap_or(BUCKETS_MS.len())] += 1;
        self.took = self.took.saturating_add(took);
    }

    fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// How an invocation ended, for the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Succeeded,
    Failed,
    Lost,
}

/// Values that are read when somebody asks, not counted along the way.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    pub inbox_depth: u64,
    pub outbox_depth: u64,
    pub dead_events: u64,
    pub dead_deliveries: u64,
    pub expired: u64,
    pub dropped_full: u64,
    pub dropped_age: u64,
    /// New events find no room.
    pub full: bool,
    pub database_bytes: u64,
    pub memory_reserved_bytes: u64,
    pub instances: u64,
    /// Those with anything to tell.
    pub functions: Vec<(FunctionName, FunctionLoad)>,
    /// Of every function that is deployed, as OpenFaaS counts them.
    pub replicas: Vec<(FunctionName, u64)>,
    /// `(link name, up)`
    pub links: Vec<(String, bool)>,
}

impl Metrics {
    /// One attempt starts, in an instance that waited for it or in one created for it.
    pub fn started(&self, function: &FunctionName, parked: bool) {
        let mut inner = self.lock();
        if !inner.functions.contains_key(function) && inner.functions.len() >= FUNCTIONS_MAX {
            return;
        }
        let counts = inner.functions.entry(function.clone()).or_default();
        *(if parked { &mut counts.started_parked } else { &mut counts.started_created }) += 1;
    }

    /// One attempt has ended, with an HTTP status or what stands for one. Lost ones don't go into
    /// the histogram: how long they ran says nothing of the function.
    pub fn invocation(&self, function: &FunctionName, ended: Ended, code: u16, took: Duration) {
        let mut inner = self.lock();
        if !inner.functions.contains_key(function) && inner.functions.len() >= FUNCTIONS_MAX {
            return;
        }
        let counts = inner.functions.entry(function.clone()).or_default();
        match ended {
            Ended::Succeeded => counts.succeeded += 1,
            Ended::Failed => counts.failed += 1,
            Ended::Lost => {
                counts.lost += 1;
                return;
            }
        }
        counts.times.add(took);
        let code = match counts.codes.contains_key(&code) || counts.codes.len() < CODES_MAX {
            true => code,
            // As RFC 9110 §15 has unknown ones understood.
            false => code / 100 * 100,
        };
        counts.codes.entry(code).or_default().add(took);
    }

    /// Succeeded and failed since start.
    pub fn counts(&self, function: &FunctionName) -> (u64, u64) {
        self.lock().functions.get(function).map_or((0, 0), |counts| (counts.succeeded, counts.failed))
    }

    pub fn event_accepted(&self, way: &'static str) {
        count(&mut self.lock().accepted, way, 1);
    }

    /// Dropped or refused, with a reason from a fixed set.
    pub fn event_refused(&self, reason: &'static str) {
        count(&mut self.lock().refused, reason, 1);
    }

    pub fn delivered(&self, target: &'static str, n: u64) {
        count(&mut self.lock().delivered, target, n);
    }

    /// The function is gone: its series end.
    pub fn remove(&self, function: &FunctionName) {
        self.lock().functions.remove(function);
    }

    pub fn render(&self, gauges: &Gauges) -> String {
        let inner = self.lock();
        let mut page = Page { text: String::with_capacity(4096 + inner.functions.len() * 1400) };
        page.functions(&inner.functions);
        page.gateway(&inner.functions, &gauges.replicas);
        page.words("events_accepted_total", "Events committed.", "way", &inner.accepted);
        page.words("events_refused_total", "Events dropped or refused.", "reason", &inner.refused);
        page.words("deliveries_total", "Deliveries acknowledged by the broker.", "target", &inner.delivered);
        page.head("events_expired_total", "counter", "Events dropped by `expires` at their turn.");
        page.value("events_expired_total", &[], gauges.expired);
        page.head("buffer_dropped_total", "counter", "Entries dropped by `when_full` or `max_age`.");
        page.value("buffer_dropped_total", &[("reason", "full")], gauges.dropped_full);
        page.value("buffer_dropped_total", &[("reason", "age")], gauges.dropped_age);
        for (name, help, value) in [
            ("inbox_depth", "Invocations that are not finished.", gauges.inbox_depth),
            ("outbox_depth", "Deliveries that are owed.", gauges.outbox_depth),
            ("dead_events", "Invocations in the dead letters.", gauges.dead_events),
            ("dead_deliveries", "Deliveries that were refused for good.", gauges.dead_deliveries),
            ("database_bytes", "Bytes in use in the database.", gauges.database_bytes),
            (
                "memory_reserved_bytes",
                "Memory reserved by the limits of running instances and by parked ones.",
                gauges.memory_reserved_bytes,
            ),
            ("instances", "Instances that run.", gauges.instances),
            ("buffer_full", "1: new events find no room.", gauges.full.into()),
        ] {
            page.head(name, "gauge", help);
            page.value(name, &[], value);
        }
        if !gauges.functions.is_empty() {
            page.head("function_instances", "gauge", "Instances of a function, parked and running.");
            for (name, load) in &gauges.functions {
                for (state, n) in [("parked", load.parked), ("running", load.running)] {
                    page.value("function_instances", &[("function", name.as_str()), ("state", state)], n);
                }
            }
            page.head("calls_waiting", "gauge", "Synchronous calls that wait for an instance.");
            for (name, load) in &gauges.functions {
                page.value("calls_waiting", &[("function", name.as_str())], load.waiting);
            }
        }
        if !gauges.links.is_empty() {
            page.head("link_up", "gauge", "1 while the link is up.");
            for (name, up) in &gauges.links {
                page.value("link_up", &[("link", name)], u8::from(*up));
            }
        }
        page.text
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn count(counts: &mut BTreeMap<&'static str, u64>, word: &'static str, n: u64) {
    if counts.contains_key(word) || counts.len() < WORDS_MAX {
        *counts.entry(word).or_default() += n;
    }
}

struct Page {
    text: String,
}

impl Page {
    fn functions(&mut self, functions: &BTreeMap<FunctionName, PerFunction>) {
        if functions.is_empty() {
            return;
        }
        self.head("invocations_total", "counter", "Attempts that ended.");
        for (name, counts) in functions {
            for (result, n) in
                [("succeeded", counts.succeeded), ("failed", counts.failed), ("lost", counts.lost)]
            {
                self.value("invocations_total", &[("function", name.as_str()), ("result", result)], n);
            }
        }
        self.head("starts_total", "counter", "Attempts begun, by where their instance came from.");
        for (name, counts) in functions {
            for (from, n) in [("parked", counts.started_parked), ("created", counts.started_created)] {
                self.value("starts_total", &[("function", name.as_str()), ("instance", from)], n);
            }
        }
        self.head("invocation_seconds", "histogram", "How long attempts took.");
        for (name, counts) in functions {
            self.times("neap_invocation_seconds", &[("function", name.as_str())], &counts.times);
        }
    }

    /// OpenFaaS's own names, for the dashboards and alerts that there are. Its label names the
    /// namespace too.
    fn gateway(&mut self, functions: &BTreeMap<FunctionName, PerFunction>, replicas: &[(FunctionName, u64)]) {
        let label = |name: &FunctionName| format!("{name}.openfaas-fn");
        if !functions.is_empty() {
            self.full_head("gateway_function_invocation_total", "counter", "Attempts that ended, by code.");
            for (name, counts) in functions {
                for (code, times) in &counts.codes {
                    let labels = [("function_name", &*label(name)), ("code", &*code.to_string())];
                    self.full_value("gateway_function_invocation_total", &labels, times.count());
                }
            }
            self.full_head("gateway_function_invocation_started", "counter", "Attempts begun.");
            for (name, counts) in functions {
                let n = counts.started_parked + counts.started_created;
                self.full_value(
                    "gateway_function_invocation_started",
                    &[("function_name", &*label(name))],
                    n,
                );
            }
            self.full_head("gateway_functions_seconds", "histogram", "How long attempts took, by code.");
            for (name, counts) in functions {
                for (code, times) in &counts.codes {
                    let labels = [("function_name", &*label(name)), ("code", &*code.to_string())];
                    self.times("gateway_functions_seconds", &labels, times);
                }
            }
        }
        if !replicas.is_empty() {
            self.full_head(
                "gateway_service_count",
                "gauge",
                "Instances; one where the next call starts one.",
            );
            for (name, n) in replicas {
                self.full_value("gateway_service_count", &[("function_name", &*label(name))], n);
            }
        }
    }

    fn times(&mut self, name: &str, labels: &[(&str, &str)], times: &Times) {
        let mut sum = 0;
        let bounds = BUCKETS_MS.iter().map(|ms| (*ms as f64 / 1000.0).to_string());
        for (bound, n) in bounds.chain(["+Inf".to_owned()]).zip(times.buckets) {
            sum += n;
            let labels = [labels, &[("le", &*bound)]].concat();
            self.full_value(&format!("{name}_bucket"), &labels, sum);
        }
        self.full_value(&format!("{name}_sum"), labels, times.took.as_secs_f64());
        self.full_value(&format!("{name}_count"), labels, sum);
    }

    fn words(&mut self, name: &str, help: &str, label: &str, counts: &BTreeMap<&'static str, u64>) {
        if !counts.is_empty() {
            self.head(name, "counter", help);
            for (word, n) in counts {
                self.value(name, &[(label, word)], *n);
            }
        }
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.full_head(&format!("neap_{name}"), kind, help);
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.full_value(&format!("neap_{name}"), labels, value);
    }

    fn full_head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn full_value(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.text.push_str(name);
        for (n, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.text, "{}{label}=\"", if n == 0 { '{' } else { ',' });
            for c in text.chars() {
                match c {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    c => self.text.push(c),
                }
            }
            self.text.push('"');
        }
        let _ = writeln!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_prometheus_text() {
        let metrics = Metrics::default();
        let f = FunctionName::parse("f").expect("a good name");
        metrics.started(&f, true);
        metrics.invocation(&f, Ended::Succeeded, 200, Duration::from_millis(7));
        metrics.invocation(&f, Ended::Failed, 503, Duration::from_secs(600));
        metrics.invocation(&f, Ended::Lost, 500, Duration::ZERO);
        metrics.event_accepted("mqtt");
        metrics.event_accepted("mqtt");
        metrics.delivered("uplink", 3);

        let links = vec![("a\"\\\nb".to_owned(), true)];
        let functions = vec![(f.clone(), FunctionLoad { parked: 2, running: 1, waiting: 3 })];
        let text = metrics.render(&Gauges {
            inbox_depth: 4,
            links,
            functions,
            replicas: vec![(f.clone(), 3)],
            ..Gauges::default()
        });

        for line in [
            "# TYPE neap_invocations_total counter",
            "neap_invocations_total{function=\"f\",result=\"succeeded\"} 1",
            "neap_invocations_total{function=\"f\",result=\"lost\"} 1",
            "neap_invocation_seconds_bucket{function=\"f\",le=\"0.005\"} 0",
            "neap_invocation_seconds_bucket{function=\"f\",le=\"0.01\"} 1",
            "neap_invocation_seconds_bucket{function=\"f\",le=\"300\"} 1",
            "neap_invocation_seconds_bucket{function=\"f\",le=\"+Inf\"} 2",
            "neap_invocation_seconds_sum{function=\"f\"} 600.007",
            "neap_invocation_seconds_count{function=\"f\"} 2",
            "neap_events_accepted_total{way=\"mqtt\"} 2",
            "neap_deliveries_total{target=\"uplink\"} 3",
            "neap_inbox_depth 4",
            "# TYPE gateway_function_invocation_total counter",
            "gateway_function_invocation_total{function_name=\"f.openfaas-fn\",code=\"200\"} 1",
            "gateway_function_invocation_started{function_name=\"f.openfaas-fn\"} 1",
            "gateway_functions_seconds_bucket{function_name=\"f.openfaas-fn\",code=\"503\",le=\"300\"} 0",
            "gateway_functions_seconds_sum{function_name=\"f.openfaas-fn\",code=\"503\"} 600",
            "gateway_service_count{function_name=\"f.openfaas-fn\"} 3",
            "neap_starts_total{function=\"f\",instance=\"parked\"} 1",
            "neap_function_instances{function=\"f\",state=\"parked\"} 2",
            "neap_calls_waiting{function=\"f\"} 3",
            "neap_link_up{link=\"a\\\"\\\\\\nb\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("neap_events_refused_total"));
        assert_eq!(metrics.counts(&f), (1, 1));
    }

    #[test]
    fn function_that_answers_with_every_status_fills_no_memory() {
        let metrics = Metrics::default();
        let f = FunctionName::parse("f").expect("a good name");

        (100..1000).for_each(|code| metrics.invocation(&f, Ended::Failed, code, Duration::ZERO));

        let text = metrics.render(&Gauges::default());
        let series = text.lines().filter(|line| line.starts_with("gateway_function_invocation_total{"));
        let counts: Vec<u64> = series.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        assert!(counts.len() <= CODES_MAX + 10, "{}", counts.len());
        assert_eq!(counts.iter().sum::<u64>(), 900);
    }

    #[test]
    fn series_of_a_removed_function_end() {
        let metrics = Metrics::default();
        let f = FunctionName::parse("f").expect("a good name");
        metrics.invocation(&f, Ended::Succeeded, 200, Duration::ZERO);

        metrics.remove(&f);

        assert!(!metrics.render(&Gauges::default()).contains("function"));
        assert_eq!(metrics.counts(&f), (0, 0));
    }
}
