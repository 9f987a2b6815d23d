//! `[[trigger]]` and `[[output]]` of a manifest: what makes an event for the function, and what
//! its output becomes.

use super::problem::shown;
use super::reader::{Keys, Section};
use super::{Config, defaults};
use crate::model::function::{CronTrigger, HttpTrigger, Missed, MqttTrigger, Output, Retained, Trigger};
use crate::model::{Schedule, Target, TopicFilter, TopicTemplate, zone};
use std::time::Duration;

const TRIGGER: Keys = Keys {
    now: &[
        "mqtt", "qos", "from", "expires", "retained", "http", "methods", "auth", "cron", "zone", "missed",
        "event",
    ],
    later: &[],
};
const OUTPUT: Keys = Keys { now: &["to", "topic", "type"], later: &[] };
/// All of them, for the test that the annotated file names every key.
#[cfg(test)]
pub(super) const KEYS: [Keys; 2] = [TRIGGER, OUTPUT];

/// The kinds of trigger, each with the keys that belong to it alone.
const KINDS: [(&str, &[&str]); 4] = [
    ("mqtt", &["qos", "from", "expires", "retained"]),
    ("http", &["methods", "auth"]),
    ("cron", &["zone", "missed"]),
    ("event", &[]),
];

/// What requests are made with (RFC 9110 §9.3, RFC 5789); CONNECT and TRACE speak to the server
/// itself.
const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
/// Paths of neap's own, with all that is below them.
const PATHS_RESERVED: [&str; 9] = [
    "/function",
    "/async-function",
    "/v1",
    "/system",
    "/healthz",
    "/readyz",
    "/metrics",
    "/events",
    "/2015-03-31",
];
const PATH_BYTES_MAX: usize = 1024;
/// CloudEvents 1.0 asks that attributes stay short; a context of 64 KiB is all that must be taken.
const TYPE_BYTES_MAX: usize = 256;
/// A year: what never grows too old leaves `expires` out.
const EXPIRES_MAX: Duration = Duration::from_secs(366 * 86_400);
const EXPIRES_MIN: Duration = Duration::from_millis(1);

pub(super) fn triggers(root: &Section<'_>, config: &Config) -> Vec<Trigger> {
    let mut triggers: Vec<(Trigger, usize)> = Vec::new();
    for section in root.tables("trigger", TRIGGER) {
        let Some(trigger) = trigger(&section, config) else { continue };
        if let Some((_, line)) = triggers.iter().find(|(other, _)| same(&trigger, other)) {
            section.wrong(format!("the trigger on line {line} takes the same; one of them is enough"));
        }
        triggers.push((trigger, section.line()));
    }
    triggers.into_iter().map(|(trigger, _)| trigger).collect()
}

/// Whether both would take one arrival.
fn same(a: &Trigger, b: &Trigger) -> bool {
    match (a, b) {
        (Trigger::Mqtt(a), Trigger::Mqtt(b)) => a.filter == b.filter && a.from == b.from,
        (Trigger::Http(a), Trigger::Http(b)) => shared_method(a, b).is_some(),
        (Trigger::Cron(a), Trigger::Cron(b)) => a.schedule == b.schedule,
        (Trigger::Event { kind: a }, Trigger::Event { kind: b }) => a == b,
        _ => false,
    }
}

/// A method on which both answer the same path; `""` when both take every method.
pub(super) fn shared_method<'a>(a: &'a HttpTrigger, b: &'a HttpTrigger) -> Option<&'a str> {
    if a.path != b.path {
        return None;
    }
    match (a.methods.first(), b.methods.first()) {
        (None, None) => Some(""),
        (Some(method), None) | (None, Some(method)) => Some(method),
        _ => a.methods.iter().find(|method| b.methods.contains(method)).map(String::as_str),
    }
}

fn trigger(section: &Section<'_>, config: &Config) -> Option<Trigger> {
    let present: Vec<&str> = KINDS.iter().map(|(kind, _)| *kind).filter(|kind| section.has(kind)).collect();
    let kind = match present[..] {
        [kind] => kind,
        [] => {
            section.missing("a trigger needs one of mqtt, http, cron, event");
            return None;
        }
        _ => {
            let kinds = present.join(" and ");
            section.wrong(format!(
                "a trigger has one kind, this one has {kinds}; write one [[trigger]] for each"
            ));
            return None;
        }
    };
    for (other, keys) in KINDS.iter().filter(|(other, _)| *other != kind) {
        for key in keys.iter().filter(|key| section.has(key)) {
            section.bad(key, format!("belongs to {other} triggers; this is one of {kind}"));
        }
    }
    match kind {
        "mqtt" => mqtt(section, config).map(Trigger::Mqtt),
        "http" => http(section, config).map(Trigger::Http),
        "cron" => cron(section).map(|cron| Trigger::Cron(Box::new(cron))),
        _ => section.parsed("event", event_type).map(|kind| Trigger::Event { kind }),
    }
}

fn mqtt(section: &Section<'_>, config: &Config) -> Option<MqttTrigger> {
    let brokers = [("local", Target::Local), ("uplink", Target::Uplink)];
    let retained = [("new", Retained::New), ("each", Retained::Each), ("ignore", Retained::Ignore)];
    let from = section.choice("from", &brokers, &[]).unwrap_or(defaults::TRIGGER_FROM);
    if config.broker(from).is_none() {
        let key = if section.has("from") { "from" } else { "mqtt" };
        let why = match (from, &config.uplink) {
            (Target::Uplink, Some(_)) => "an https:// uplink has no topics; commands need an MQTT one",
            _ => needs_broker(from),
        };
        section.bad(key, why);
    }
    let filter = section.topic("mqtt", TopicFilter::parse);
    let trigger = MqttTrigger {
        qos: qos(section).unwrap_or(defaults::TRIGGER_QOS),
        from,
        expires: section.time("expires", EXPIRES_MIN..=EXPIRES_MAX),
        retained: section.choice("retained", &retained, &[]).unwrap_or(defaults::TRIGGER_RETAINED),
        filter: filter?,
    };
    Some(trigger)
}

fn needs_broker(broker: Target) -> &'static str {
    match broker {
        Target::Local => "the configuration has no [mqtt] broker",
        Target::Uplink => "the configuration has no [uplink]",
        Target::Callback => "callbacks are for the caller to ask for",
    }
}

fn qos(section: &Section<'_>) -> Option<u8> {
    match section.integer("qos", 0..=2)? {
        2 => {
            let why = "2 is not taken: it would end at the broker, while events are run at least once all the \
                       same; use 1, and the event's id to tell repeats";
            section.bad("qos", why);
            None
        }
        qos => Some(qos as u8),
    }
}

fn http(section: &Section<'_>, config: &Config) -> Option<HttpTrigger> {
    let path = section.parsed("http", path);
    let token = section.choice("auth", &[("none", false), ("token", true)], &[]).unwrap_or(false);
    if token && config.http.token_file.is_none() {
        section.bad("auth", "there is no token to ask for; the configuration has no [http] token_file");
    }
    let mut methods: Vec<String> = Vec::new();
    if let Some(listed) = section.strings("methods") {
        if listed.is_empty() {
            section.bad("methods", "is empty; leave it out to take every method");
        }
        for (method, span) in listed {
            if !METHODS.contains(&method) {
                let known = METHODS.join(", ");
                section.bad_at(&span, "methods", format!("{} is not known; allowed: {known}", shown(method)));
            } else if methods.iter().any(|m| m == method) {
                section.bad_at(&span, "methods", format!("{method} is listed twice"));
            } else {
                methods.push(method.to_owned());
            }
        }
    }
    Some(HttpTrigger { path: path?, methods, token })
}

fn cron(section: &Section<'_>) -> Option<CronTrigger> {
    let known = [("skip", Missed::Skip), ("once", Missed::Once)];
    let missed = section.choice("missed", &known, &[]).unwrap_or(defaults::CRON_MISSED);
    let named = |name: &str| zone::by_name(name).map_err(|bad| format!("{}: {bad}", shown(name)));
    // A zone that can't be read has its own line; the schedule is still looked at.
    let name = section.text_if("zone").unwrap_or(defaults::CRON_ZONE);
    let zone = match section.has("zone") {
        true => section.parsed("zone", named),
        false => zone::by_name(name).ok(),
    };
    let text = section.text("cron")?;
    match Schedule::parse(text, name, zone.unwrap_or(jiff::tz::TimeZone::UTC)) {
        Ok(schedule) => Some(CronTrigger { schedule, missed }),
        Err(bad) => {
            section.bad("cron", format!("{}: {bad}", shown(text)));
            None
        }
    }
}

fn path(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err(format!("{} is no path; it begins with /", shown(text)));
    }
    if text.len() > PATH_BYTES_MAX {
        return Err(format!("a path is at most {PATH_BYTES_MAX} bytes"));
    }
    if let Some(bad) =
        text.chars().find(|c| !c.is_ascii_graphic() || matches!(c, '?' | '#' | '{' | '}' | '*'))
    {
        let what = "this path is matched as it is, without patterns; write odd characters as %XX";
        return Err(format!("{} can't be in a path; {what}", shown(&bad.to_string())));
    }
    let below =
        |own: &str| text.strip_prefix(own).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if text == "/" {
        return Err("/ is neap's own; choose a longer path".to_owned());
    }
    match PATHS_RESERVED.iter().find(|own| below(own)) {
        Some(own) => Err(format!("{} is neap's own, with all below {own}; choose another path", shown(text))),
        None => Ok(text.to_owned()),
    }
}

/// CloudEvents 1.0 §3.1.1: a non-empty string; §2.2: no control characters.
fn event_type(text: &str) -> Result<String, String> {
    let good = (1..=TYPE_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control);
    let rule = "1 to 256 bytes without control characters, as in \"com.example.door.opened\"";
    if good { Ok(text.to_owned()) } else { Err(format!("{} is no event type: {rule}", shown(text))) }
}

pub(super) fn outputs(root: &Section<'_>, config: &Config, triggers: &[Trigger]) -> Vec<Output> {
    let mut outputs = Vec::new();
    for section in root.tables("output", OUTPUT) {
        let Some(output) = output(&section, config) else { continue };
        if let Some(filter) = own_loop(&output, triggers) {
            let what = format!("the function's own trigger {filter} would take this again, without end");
            section.bad("topic", what);
        }
        if outputs.contains(&output) {
            section.wrong("the same [[output]] stands above: each output would be sent twice");
        }
        outputs.push(output);
    }
    outputs
}

#[derive(Clone, Copy)]
enum To {
    Broker(Target),
    Event,
}

fn output(section: &Section<'_>, config: &Config) -> Option<Output> {
    if !section.has("to") {
        section.missing("output.to is missing; allowed: \"uplink\", \"local\", \"event\"");
    }
    let places =
        [("uplink", To::Broker(Target::Uplink)), ("local", To::Broker(Target::Local)), ("event", To::Event)];
    let to = section.choice("to", &places, &[])?;
    let (other, name) = match to {
        To::Broker(_) => ("type", "event"),
        To::Event => ("topic", "uplink and local"),
    };
    if section.has(other) {
        section.bad(other, format!("belongs to outputs to {name}"));
    }
    if let To::Broker(broker) = to
        && !config.delivers(broker)
    {
        section.bad("to", needs_broker(broker));
    }
    let topic = || section.topic("topic", TopicTemplate::parse);
    match to {
        To::Broker(Target::Uplink) if !section.has("topic") => Some(Output::Uplink { topic: None }),
        To::Broker(Target::Uplink) => Some(Output::Uplink { topic: Some(topic()?) }),
        // No word for it: `places` has none.
        To::Broker(Target::Callback) => None,
        To::Broker(Target::Local) => {
            if !section.has("topic") {
                section
                    .missing("output.topic is missing; an output to local needs one, as in \"relay/1/set\"");
            }
            Some(Output::Local { topic: topic()? })
        }
        To::Event => {
            if !section.has("type") {
                section.missing(
                    "output.type is missing; an output to event needs one, as in \"com.example.door.opened\"",
                );
            }
            Some(Output::Event { kind: section.parsed("type", event_type)? })
        }
    }
}

/// The function's trigger that takes what this output publishes. Topics with placeholders are
/// known only when they are filled in; they are let through.
fn own_loop<'a>(output: &Output, triggers: &'a [Trigger]) -> Option<&'a TopicFilter> {
    let (target, topic) = match output {
        Output::Uplink { topic: Some(topic) } => (Target::Uplink, topic.as_str()),
        Output::Local { topic } => (Target::Local, topic.as_str()),
        Output::Uplink { topic: None } | Output::Event { .. } => return None,
    };
    let known = topic == "{topic}" || !topic.contains('{');
    triggers.iter().find_map(|trigger| match trigger {
        Trigger::Mqtt(mqtt)
            if known && mqtt.from == target && (topic == "{topic}" || mqtt.filter.matches(topic)) =>
        {
            Some(&mqtt.filter)
        }
        _ => None,
    })
}
