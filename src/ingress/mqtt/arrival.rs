//! One message → the event it is and what it obliges the node to. Pure but for hashing.
//!
//! A message that is a CloudEvent keeps its attributes: binary mode (MQTT 5 user properties),
//! or structured JSON, told by its content type on MQTT 5 and by its looks on 3.1.1, where the
//! binding leaves no other place (CloudEvents MQTT binding 1.0.2 §3.2). Anything less than a
//! whole CloudEvent is an ordinary message.

use crate::ingress::routes::{FORWARD_BYTES_MAX, Routes};
use crate::model::cloudevents::Structured;
use crate::model::event::{CUT_EXTENSION, TYPE_MQTT};
use crate::model::function::Retained;
use crate::model::{Event, EventId, Failure, Lane, NewDelivery, Target, TopicValues, UnixMs};
use crate::net::mqtt::Publish;
use crate::store::{Arrival, DedupKey, NewInvocation, RetainedValue};
use std::collections::BTreeMap;

/// Extension attributes kept of one event, and bytes of each: more is not meant for a function.
const EXTENSIONS_MAX: usize = 32;
const ATTRIBUTE_BYTES_MAX: usize = 4096;

/// Head of the data that is kept when no function may have it.
const DEAD_DATA_BYTES: usize = 1024;

/// What the moment adds to a message.
pub struct Seen {
    pub target: Target,
    pub old_version: bool,
    pub now: UnixMs,
    /// For the event, unless it brings its own.
    pub fresh_id: EventId,
}

#[derive(Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "taken apart where it is made, never kept")]
pub enum Fate {
    Arrival(Arrival),
    /// Nobody wants it (any more): acknowledged, counted with this reason.
    Nobody(&'static str),
}

pub fn arrival(routes: &Routes, seen: Seen, publish: Publish) -> Fate {
    let topic = publish.topic.clone();
    let bytes = publish.cut.unwrap_or(publish.payload.len() as u64);
    let cut = publish.cut.is_some();
    let mut ignored = false;
    let mut hash = None;
    let mut invocations = Vec::new();
    let mut living = false;
    for (name, trigger) in routes.mqtt(seen.target, &topic) {
        let Some(function) = routes.functions.get(name) else { continue };
        if publish.retain && trigger.retained == Retained::Ignore {
            ignored = true;
            continue;
        }
        let limit_bytes = function.revision.manifest.limits.payload_bytes;
        let dead = (cut || bytes > limit_bytes).then_some(Failure::PayloadTooLarge { limit_bytes });
        living |= dead.is_none();
        // Of a cut one the head alone is here: another value may begin the same.
        let once = (publish.retain && trigger.retained == Retained::New && !cut).then(|| {
            let hash = *hash.get_or_insert_with(|| sha256(&publish.payload));
            RetainedValue { topic: topic.clone(), hash }
        });
        let expires = match (trigger.expires, publish.expires) {
            (Some(ours), Some(theirs)) => Some(ours.min(theirs)),
            (ours, theirs) => ours.or(theirs),
        };
        let (function, lane) = (name.clone(), function.revision.manifest.priority);
        invocations.push(NewInvocation { function, lane, expires, once, dead });
    }
    let mut forwards = Vec::new();
    let mut too_large = false;
    if seen.target == Target::Local {
        for forward in routes.forwards(&topic) {
            if cut || bytes > FORWARD_BYTES_MAX {
                too_large = true;
                tracing::warn!(topic, bytes, "not forwarded: larger than a forward may be");
                continue;
            }
            match forward.topic.render(TopicValues { node: &routes.node, function: "", topic: &topic }) {
                Ok(to) => forwards.push(to),
                Err(error) => tracing::warn!(topic, %error, "a forward's topic can't be made"),
            }
        }
    }
    if invocations.is_empty() && forwards.is_empty() {
        return Fate::Nobody(match (too_large, ignored) {
            (true, _) => "payload_too_large",
            (false, true) => "retained",
            (false, false) => "no_route",
        });
    }
    let (retained, from) = (publish.retain, seen.target);
    let (mut event, own_id) = event(&routes.node, seen, publish);
    // A plain publish has nothing to tell a repetition by. The same event on another topic is for
    // others; a retained one comes again because somebody asked.
    let dedup = (own_id && !retained).then(|| {
        let way = format!("{} {topic} {}", from.as_str(), event.source);
        DedupKey::cloud_event(&way, event.id.as_str())
    });
    if !living && forwards.is_empty() {
        keep_head(&mut event, bytes, cut);
    }
    let deliveries = forwards.into_iter().map(|topic| NewDelivery {
        target: Target::Uplink,
        lane: Lane::Normal,
        function: None,
        topic,
        event: event.clone(),
    });
    let deliveries = deliveries.collect();
    Fate::Arrival(Arrival { invocations, deliveries, dedup, ..Arrival::of(event) })
}

/// Keeps the head of what no function may have, and marks it when more was there, so that a
/// redrive never runs on a part. `cut`: only a part was read.
fn keep_head(event: &mut Event, bytes: u64, cut: bool) {
    if cut || event.data.len() > DEAD_DATA_BYTES {
        event.extensions.insert(CUT_EXTENSION.to_owned(), bytes.to_string());
    }
    event.data.truncate(DEAD_DATA_BYTES);
}

/// What is kept of an arrival that the store can never hold: invocations that are dead, with the
/// head of the data. `None`: nothing can be kept of it.
pub fn cut_down(mut arrival: Arrival, why: &Failure) -> Option<Arrival> {
    if arrival.invocations.iter().all(|invocation| invocation.dead.is_some()) {
        return None;
    }
    arrival.deliveries.clear();
    let bytes = arrival.event.data.len() as u64;
    keep_head(&mut arrival.event, bytes, false);
    for invocation in &mut arrival.invocations {
        invocation.dead.get_or_insert_with(|| why.clone());
    }
    Some(arrival)
}

/// The event, and whether its id is its sender's own.
fn event(node: &str, seen: Seen, publish: Publish) -> (Event, bool) {
    let topic = publish.topic;
    let whole = publish.cut.is_none();
    let structured = match &publish.content_type {
        Some(content_type) => is_structured(content_type),
        None => seen.old_version && looks_structured(&publish.payload),
    };
    if whole
        && structured
        && let Some(event) = from_json(&publish.payload, &topic)
    {
        return (event, true);
    }
    let mut event = Event {
        id: seen.fresh_id,
        source: format!("/{node}/mqtt"),
        kind: TYPE_MQTT.to_owned(),
        subject: Some(topic),
        time: Some(seen.now),
        content_type: publish.content_type,
        extensions: BTreeMap::new(),
        http: None,
        data: publish.payload,
    };
    if !seen.now.is_plausible() {
        event.doubt_time();
    }
    let binary = Attributes::read(publish.user_properties);
    let own_id = binary.is_some();
    if let Some(binary) = binary {
        binary.put_into(&mut event);
    }
    (event, own_id)
}

/// The attributes of a CloudEvent, whole.
struct Attributes {
    id: EventId,
    source: String,
    kind: String,
    subject: Option<String>,
    time: Option<UnixMs>,
    extensions: BTreeMap<String, String>,
}

impl Attributes {
    /// `None`: this is no CloudEvent (a required attribute is missing or wrong).
    fn read(properties: impl IntoIterator<Item = (String, String)>) -> Option<Self> {
        let (mut version, mut id, mut source, mut kind) = (None, None, None, None);
        let (mut subject, mut time, mut extensions) = (None, None, BTreeMap::new());
        for (name, value) in properties {
            if value.len() > ATTRIBUTE_BYTES_MAX {
                continue;
            }
            match name.as_str() {
                "specversion" => version = Some(value),
                "id" => id = EventId::parse(&value),
                "source" => source = Some(value),
                "type" => kind = Some(value),
                "subject" => subject = Some(value),
                "time" => time = Some(UnixMs(value.parse::<jiff::Timestamp>().ok()?.as_millisecond())),
                // With a place of their own, or of no meaning to us.
                "datacontenttype" | "dataschema" | "data" | "data_base64" => {}
                _ if is_extension(&name) && extensions.len() < EXTENSIONS_MAX => {
                    extensions.insert(name, value);
                }
                _ => {}
            }
        }
        if version.as_deref() != Some("1.0") {
            return None;
        }
        let source = source.filter(|s| !s.is_empty())?;
        let kind = kind.filter(|k| !k.is_empty())?;
        Some(Self { id: id?, source, kind, subject, time, extensions })
    }

    fn put_into(self, event: &mut Event) {
        event.id = self.id;
        event.source = self.source;
        event.kind = self.kind;
        // An event without a subject keeps the topic as one: topic templates read it from there.
        if self.subject.is_some() {
            event.subject = self.subject;
        }
        event.time = self.time;
        event.extensions = self.extensions;
    }
}

fn is_extension(name: &str) -> bool {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=20).contains(&name.len()) && name.bytes().all(good)
}

fn is_structured(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/cloudevents+json")
}

fn looks_structured(payload: &[u8]) -> bool {
    let has = |needle: &[u8]| payload.windows(needle.len()).any(|window| window == needle);
    payload.trim_ascii_start().starts_with(b"{") && has(b"\"specversion\"")
}

/// `None`: not a whole CloudEvent.
fn from_json(payload: &[u8], topic: &str) -> Option<Event> {
    let members = Structured::parse(payload).ok()?;
    let plain = members.attributes().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    let attributes = Attributes::read(plain)?;
    let mut event = Event {
        id: attributes.id.clone(),
        source: String::new(),
        kind: String::new(),
        subject: Some(topic.to_owned()),
        time: None,
        content_type: members.content_type(),
        extensions: BTreeMap::new(),
        http: None,
        data: members.data().ok()?,
    };
    attributes.put_into(&mut event);
    Some(event)
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Forward, defaults};
    use crate::ingress::routes::Deployment;
    use crate::model::function::{Handler, Manifest, MqttTrigger, Platform, Trigger};
    use crate::model::time::BUILT;
    use crate::model::{Digest, FunctionName, Reference, Revision, TopicFilter, TopicTemplate};
    use std::sync::Arc;

    fn event(node: &str, seen: Seen, publish: Publish) -> Event {
        super::event(node, seen, publish).0
    }

    fn seen(old_version: bool) -> Seen {
        Seen { target: Target::Local, old_version, now: BUILT, fresh_id: EventId::from_random([7; 16]) }
    }

    fn publish(payload: &[u8]) -> Publish {
        Publish { topic: "a/b".to_owned(), qos: 1, pkid: 1, payload: payload.to_vec(), ..Publish::default() }
    }

    fn forwarding() -> Routes {
        let filter = TopicFilter::parse("a/#").expect("a good filter");
        let topic = TopicTemplate::parse("site/{node}/{topic}").expect("a good topic");
        let forwards = vec![Forward { filter, topic }];
        Routes { forwards, node: "gw".to_owned(), ..Routes::default() }
    }

    /// Routes with one function, on `a/#`.
    fn triggered() -> Routes {
        let trigger = MqttTrigger {
            filter: TopicFilter::parse("a/#").expect("a good filter"),
            qos: 1,
            from: Target::Local,
            expires: None,
            retained: Retained::New,
        };
        let manifest = Manifest {
            name: FunctionName::parse("f").expect("a good name"),
            image: Reference::parse("x:1").expect("a good reference"),
            pull: crate::model::function::Pull::Missing,
            rollback: crate::model::function::Rollback::Off,
            handler: Handler::Stdio,
            platform: Platform::None,
            serving: defaults::serving(),
            priority: Lane::Normal,
            command: None,
            env: BTreeMap::new(),
            limits: defaults::limits(),
            scale: defaults::scale(),
            retry: defaults::retry(),
            permissions: Default::default(),
            rate: None,
            triggers: vec![Trigger::Mqtt(trigger)],
            outputs: Vec::new(),
            marks: Default::default(),
        };
        let image = Digest::from_sha256(&[0; 32]);
        let deployment = Deployment {
            revision: Arc::new(Revision { number: 1, manifest, image, uid_base: 0 }),
            paused: false,
            file: None,
            created: UnixMs(0),
            unusable: None,
        };
        let name = deployment.revision.name().clone();
        Routes { functions: BTreeMap::from([(name, deployment)]), ..Routes::default() }
    }

    fn properties(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn message_that_nobody_wants_is_told_why() {
        assert_eq!(arrival(&Routes::default(), seen(false), publish(b"x")), Fate::Nobody("no_route"));
        let cut = Publish { cut: Some(9_000_000), ..publish(b"head") };
        assert_eq!(arrival(&forwarding(), seen(false), cut), Fate::Nobody("payload_too_large"));
    }

    #[test]
    fn forwards_keep_the_message_and_fill_in_the_topic() {
        let Fate::Arrival(arrival) = arrival(&forwarding(), seen(false), publish(b"x")) else {
            panic!("an arrival")
        };

        assert_eq!(arrival.deliveries[0].topic, "site/gw/a/b");
        assert_eq!(arrival.deliveries[0].event, arrival.event);
        assert_eq!(arrival.event.data, b"x");
        assert_eq!(arrival.event.time, Some(BUILT));
    }

    #[test]
    fn less_than_a_whole_cloudevent_is_an_ordinary_message() {
        let whole = [("specversion", "1.0"), ("id", "e"), ("source", "/s"), ("type", "t")];
        for missing in 0..whole.len() {
            let mut some = whole.to_vec();
            some.remove(missing);
            let message = Publish { user_properties: properties(&some), ..publish(b"x") };
            assert_eq!(event("gw", seen(false), message).kind, TYPE_MQTT);
        }
        let mut bad = whole.to_vec();
        bad.push(("time", "yesterday"));
        let message = Publish { user_properties: properties(&bad), ..publish(b"x") };
        assert_eq!(event("gw", seen(false), message).kind, TYPE_MQTT);
        let message = Publish { user_properties: properties(&whole), ..publish(b"x") };
        let good = event("gw", seen(false), message);
        assert_eq!((good.kind.as_str(), good.subject.as_deref()), ("t", Some("a/b")));
    }

    #[test]
    fn structured_events_are_told_by_content_type_or_on_3_1_1_by_their_looks() {
        let json = br#" {"specversion":"1.0","id":"e","source":"/s","type":"t","n":7,"data_base64":"/w=="}"#;
        let old = event("gw", seen(true), publish(json));
        assert_eq!((old.id.as_str(), old.data.as_slice()), ("e", &[0xFF][..]));
        assert_eq!(old.extensions.get("n").map(String::as_str), Some("7"));

        assert_eq!(event("gw", seen(false), publish(json)).kind, TYPE_MQTT);
        assert_eq!(event("gw", seen(true), publish(br#"{"specversion":"1.0"}"#)).kind, TYPE_MQTT);
        let content_type = Some("application/cloudevents+json".to_owned());
        let message = Publish { content_type, ..publish(json) };
        assert_eq!(event("gw", seen(false), message).kind, "t");
    }

    #[test]
    fn retained_values_that_were_cut_are_never_taken_for_the_same() {
        let retained = |cut| Publish { retain: true, cut, ..publish(b"head") };
        let once = |cut| match arrival(&triggered(), seen(false), retained(cut)) {
            Fate::Arrival(arrival) => arrival.invocations[0].once.clone(),
            Fate::Nobody(reason) => panic!("{reason}"),
        };

        assert!(once(None).is_some());
        assert_eq!(once(Some(9_000_000)), None);
    }

    #[test]
    fn too_many_and_too_long_attributes_are_left_out() {
        let mut list = properties(&[("specversion", "1.0"), ("id", "e"), ("source", "/s"), ("type", "t")]);
        list.extend((0..100).map(|n| (format!("x{n}"), "v".to_owned())));
        list.push(("long".to_owned(), "v".repeat(ATTRIBUTE_BYTES_MAX + 1)));
        list.push(("Not-A-Name".to_owned(), "v".to_owned()));

        let message = Publish { user_properties: list, ..publish(b"x") };
        let event = event("gw", seen(false), message);

        assert_eq!(event.extensions.len(), EXTENSIONS_MAX);
        assert!(!event.extensions.contains_key("long") && !event.extensions.contains_key("Not-A-Name"));
    }

    #[test]
    fn a_clock_that_was_never_set_gives_no_time() {
        let seen = Seen { now: UnixMs(5_000), ..seen(false) };

        let event = event("gw", seen, publish(b"x"));

        assert_eq!(event.time, None);
        assert_eq!(event.extensions.get("neapclock").map(String::as_str), Some("uncertain"));
    }
}
