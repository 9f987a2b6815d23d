//! What follows from an outcome: done with its deliveries and events, another attempt, or a
//! dead letter. Pure.

use crate::backoff::Backoff;
use crate::ingress::routes::Routes;
use crate::model::callback;
use crate::model::event::{CAUSE_EXTENSION, CHAIN_EXTENSION, CHAIN_MAX, TYPE_OUTPUT, guess_content_type};
use crate::model::function::Output;
use crate::model::{Event, EventId, Failure, NewDelivery, Outcome, Revision, Target, TopicTemplate};
use crate::model::{TopicValues, UnixMs};
use crate::store::{Arrival, Leased, NewInvocation, Settlement};
use std::time::Duration;

/// Wait after an attempt that was lost: the launcher is being started again, and a node that
/// keeps losing attempts must not spin.
const LOST_BACKOFF: Backoff = Backoff { first: Duration::from_millis(200), max: Duration::from_secs(60) };

/// The head of a failed attempt's output that a dead letter keeps.
pub const OUTPUT_KEPT_BYTES: usize = 4096;

/// What a decision may look at besides the outcome.
pub struct Context<'a> {
    pub routes: &'a Routes,
    pub revision: &'a Revision,
    pub now: UnixMs,
    /// False: the function fails whatever it is given, and a failure counts against no event.
    pub counted: bool,
    /// For jitter.
    pub random: u64,
}

/// How the lease of `leased` ends.
pub fn settle(leased: &Leased, outcome: Outcome, context: &Context<'_>) -> Settlement {
    let (failure, output, asked) = match outcome {
        Outcome::Succeeded { output, content_type, event, took } => {
            let callback = callback::url(&leased.event).and_then(|_| {
                let kind = content_type.clone().or_else(|| Some(guess_content_type(&output).to_owned()));
                let content_type = kind.filter(|_| !output.is_empty());
                let ended = callback::Ended { status: 200, body: output.clone(), content_type, took };
                callback::delivery(&leased.event, context.revision.name(), ended)
            });
            match effects(
                &leased.event,
                output,
                Said { content_type: content_type.as_deref(), event: event.as_deref() },
                context,
            ) {
                Ok((mut deliveries, events)) => {
                    deliveries.extend(callback);
                    return Settlement::Done { deliveries, events };
                }
                Err(failure) => (failure, Vec::new(), None),
            }
        }
        Outcome::Failed { failure, output, retry_after, .. } => (failure, output, retry_after),
        Outcome::Lost => {
            let delay = LOST_BACKOFF.delay(leased.lost + 1, context.random);
            return Settlement::Retry { delay, counted: false, error: "the attempt was lost".to_owned() };
        }
    };
    let retry = &context.revision.manifest.retry;
    if retry.is_worth(&failure) && !context.counted {
        // Behind those that have not tried yet, so that the next probe is another event.
        let backoff = Backoff { first: retry.backoff, max: retry.backoff_max };
        let delay = backoff.delay(leased.attempts, context.random).max(asked.unwrap_or_default());
        return Settlement::Defer { delay, error: failure.to_string() };
    }
    let attempts = match &failure {
        // Each copy has had its own.
        Failure::Copies { .. } => 1,
        _ => retry.attempts,
    };
    if retry.is_worth(&failure) && leased.attempts + 1 < attempts {
        let backoff = Backoff { first: retry.backoff, max: retry.backoff_max };
        let delay = backoff.delay(leased.attempts + 1, context.random).max(asked.unwrap_or_default());
        return Settlement::Retry { delay, counted: true, error: failure.to_string() };
    }
    let mut output = output;
    output.truncate(OUTPUT_KEPT_BYTES);
    Settlement::Dead { failure, output }
}

/// What becomes of a success whose output the store can never hold, `why` in its own words: a
/// dead letter with the head of the output.
pub fn output_refused(settlement: Settlement, why: String) -> Settlement {
    let Settlement::Done { deliveries, events } = settlement else { return settlement };
    let events = deliveries.into_iter().map(|d| d.event).chain(events.into_iter().map(|a| a.event));
    let mut output = events.map(|event| event.data).next().unwrap_or_default();
    output.truncate(OUTPUT_KEPT_BYTES);
    Settlement::Dead { failure: Failure::Refused(format!("the output: {why}")), output }
}

/// What the function said of its output.
#[derive(Clone, Copy, Default)]
pub struct Said<'a> {
    pub content_type: Option<&'a str>,
    /// It answered with an event of its own: these are the attributes of what it becomes.
    pub event: Option<&'a Event>,
}

/// What a successful output becomes: deliveries and events, by the manifest's `[[output]]`s. An
/// empty output becomes nothing, unless it is an event. Fails for good where no topic can be made of the event.
pub fn effects(
    cause: &Event,
    output: Vec<u8>,
    said: Said<'_>,
    context: &Context<'_>,
) -> Result<(Vec<NewDelivery>, Vec<Arrival>), Failure> {
    let (mut deliveries, mut events) = (Vec::new(), Vec::new());
    if output.is_empty() && said.event.is_none() {
        return Ok((deliveries, events));
    }
    let function = context.revision.name();
    for (index, rule) in context.revision.manifest.outputs.iter().enumerate() {
        let event = output_event(cause, rule, index, &output, said, context);
        let deliver = |target, template: &TopicTemplate, event| {
            let topic = cause.subject.as_deref().unwrap_or("");
            let values = TopicValues { node: &context.routes.node, function: function.as_str(), topic };
            let topic = template.render(values).map_err(|bad| {
                Failure::Refused(format!("output topic `{}` for this event: {bad}", template.as_str()))
            })?;
            let lane = context.revision.manifest.priority;
            Ok(NewDelivery { target, lane, function: Some(function.clone()), topic, event })
        };
        match rule {
            Output::Uplink { topic } => {
                let template = topic.as_ref().or(context.routes.uplink_topic.as_ref());
                let template =
                    template.ok_or_else(|| Failure::Refused("no [uplink] configured".to_owned()))?;
                deliveries.push(deliver(Target::Uplink, template, event)?);
            }
            Output::Local { topic } => deliveries.push(deliver(Target::Local, topic, event)?),
            Output::Event { kind } => {
                let too_long = event.chain() > CHAIN_MAX;
                let dead =
                    too_long.then(|| Failure::Refused(format!("a chain of more than {CHAIN_MAX} functions")));
                // An event of the function's own goes where its type is waited for.
                let kind = said.event.map_or(kind, |event| &event.kind);
                let invocations = context.routes.event(kind).map(|name| NewInvocation {
                    function: name.clone(),
                    lane: context.routes.lane(name),
                    expires: None,
                    once: None,
                    dead: dead.clone(),
                });
                let invocations: Vec<_> = invocations.collect();
                if !invocations.is_empty() {
                    events.push(Arrival { invocations, ..Arrival::of(event) });
                }
            }
        }
    }
    Ok((deliveries, events))
}

fn output_event(
    cause: &Event,
    rule: &Output,
    index: usize,
    data: &[u8],
    said: Said<'_>,
    context: &Context<'_>,
) -> Event {
    let function = context.revision.name();
    let mut extensions = said.event.map_or_else(Default::default, |event| event.extensions.clone());
    extensions.insert(CAUSE_EXTENSION.to_owned(), cause.id.to_string());
    if let Output::Event { .. } = rule {
        extensions.insert(CHAIN_EXTENSION.to_owned(), cause.chain().saturating_add(1).to_string());
    }
    let kind = match rule {
        Output::Event { kind } => kind.as_str(),
        Output::Uplink { .. } | Output::Local { .. } => TYPE_OUTPUT,
    };
    let content_type = said.content_type.unwrap_or_else(|| guess_content_type(data));
    if let Some(event) = said.event {
        return Event {
            extensions,
            content_type: (!data.is_empty()).then(|| content_type.to_owned()),
            time: event.time.or(Some(context.now)),
            data: data.to_vec(),
            ..event.clone()
        };
    }
    let mut event = Event {
        id: output_id(cause, function.as_str(), index),
        source: format!("/{}/function/{function}", context.routes.node),
        kind: kind.to_owned(),
        subject: cause.subject.clone(),
        time: Some(context.now),
        content_type: Some(content_type.to_owned()),
        extensions,
        http: None,
        data: data.to_vec(),
    };
    if !context.now.is_plausible() {
        event.doubt_time();
    }
    event
}

/// The same for every attempt of the same invocation: a function that ran, but whose outcome was
/// not committed before a power cut, runs again, and the receiver can still tell.
fn output_id(cause: &Event, function: &str, index: usize) -> EventId {
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    for part in [cause.source.as_str(), cause.id.as_str(), function] {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.update(&(index as u64).to_le_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&hash.finish().as_ref()[..16]);
    EventId::from_random(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::defaults;
    use crate::ingress::routes::Deployment;
    use crate::model::function::{Handler, Manifest, Platform, Trigger};
    use crate::model::{Digest, FunctionName, InvocationId, Lane, Reference};
    use std::collections::BTreeMap;
    use std::sync::Arc;

    fn revision(name: &str, outputs: Vec<Output>, triggers: Vec<Trigger>) -> Revision {
        let manifest = Manifest {
            name: FunctionName::parse(name).expect("a good name"),
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
            triggers,
            outputs,
            marks: Default::default(),
        };
        Revision { number: 1, manifest, image: Digest::from_sha256(&[0; 32]), uid_base: 0 }
    }

    fn routes(revisions: Vec<Revision>) -> Routes {
        let deployments = revisions.into_iter().map(|revision| {
            let name = revision.name().clone();
            let deployment = Deployment {
                revision: Arc::new(revision),
                paused: false,
                file: None,
                created: UnixMs(0),
                unusable: None,
            };
            (name, deployment)
        });
        Routes {
            functions: deployments.collect(),
            forwards: Vec::new(),
            node: "gw".into(),
            uplink_topic: TopicTemplate::parse("neap/{node}/{function}").ok(),
        }
    }

    fn lease(attempts: u32) -> Leased {
        let event = Event {
            id: EventId::from_random([7; 16]),
            source: "/gw/mqtt".into(),
            kind: "neap.mqtt.message".into(),
            subject: Some("sensors/7/temperature".into()),
            time: None,
            content_type: None,
            extensions: BTreeMap::new(),
            http: None,
            data: b"1".to_vec(),
        };
        let function = FunctionName::parse("f").expect("a good name");
        Leased { id: InvocationId(1), function, lane: Lane::Normal, event, attempts, lost: 0 }
    }

    fn succeeded(output: &[u8]) -> Outcome {
        Outcome::Succeeded { output: output.to_vec(), content_type: None, event: None, took: Duration::ZERO }
    }

    fn failed(failure: Failure) -> Outcome {
        Outcome::failed(failure, vec![b'x'; 2 * OUTPUT_KEPT_BYTES], Duration::ZERO)
    }

    fn decide(revision: &Revision, routes: &Routes, attempts: u32, outcome: Outcome) -> Settlement {
        let context = Context { routes, revision, now: UnixMs(5), counted: true, random: 0 };
        settle(&lease(attempts), outcome, &context)
    }

    #[test]
    fn output_becomes_a_delivery_with_the_same_id_at_every_attempt() {
        let local = TopicTemplate::parse("relay/{topic.1}/set").expect("a good template");
        let revision =
            revision("f", vec![Output::Uplink { topic: None }, Output::Local { topic: local }], vec![]);
        let routes = routes(vec![revision.clone()]);

        let first = decide(&revision, &routes, 0, succeeded(b"{\"a\":1}"));
        let again = decide(&revision, &routes, 3, succeeded(b"{\"a\":1}"));

        let Settlement::Done { deliveries, events } = &first else { panic!("{first:?}") };
        assert_eq!(first, again);
        assert!(events.is_empty());
        let topics: Vec<_> = deliveries.iter().map(|d| d.topic.as_str()).collect();
        assert_eq!(topics, ["neap/gw/f", "relay/7/set"]);
        assert_ne!(deliveries[0].event.id, deliveries[1].event.id);
        assert_eq!(deliveries[0].event.content_type.as_deref(), Some("application/json"));
        assert_eq!(deliveries[0].event.source, "/gw/function/f");
    }

    #[test]
    fn answer_that_is_an_event_keeps_its_attributes() {
        let kind = "sum".to_owned();
        let outputs = vec![Output::Uplink { topic: None }, Output::Event { kind: "other".to_owned() }];
        let revision = revision("f", outputs, vec![Trigger::Event { kind: kind.clone() }]);
        let routes = routes(vec![revision.clone()]);
        let mut own = lease(0).event;
        own.extensions.insert("site".to_owned(), "north".to_owned());
        let own = Event { kind, source: "/f".into(), data: Vec::new(), ..own };
        let outcome = Outcome::Succeeded {
            output: b"{}".to_vec(),
            content_type: Some("text/csv".to_owned()),
            event: Some(Box::new(own.clone())),
            took: Duration::ZERO,
        };

        let Settlement::Done { deliveries, events } = decide(&revision, &routes, 0, outcome) else {
            panic!("it succeeded")
        };

        let event = &deliveries[0].event;
        assert_eq!((&event.id, &event.source, &event.kind), (&own.id, &own.source, &own.kind));
        assert_eq!(
            (event.data.as_slice(), event.content_type.as_deref()),
            (b"{}".as_slice(), Some("text/csv"))
        );
        assert_eq!(event.extensions.get("site").map(String::as_str), Some("north"));
        assert_eq!(events.len(), 1, "it goes where its own type is waited for");
        assert_eq!(events[0].event.chain(), 1);
    }

    #[test]
    fn empty_output_becomes_nothing() {
        let revision = revision("f", vec![Output::Uplink { topic: None }], vec![]);
        let routes = routes(vec![revision.clone()]);

        let done = Settlement::Done { deliveries: vec![], events: vec![] };
        assert_eq!(decide(&revision, &routes, 0, succeeded(b"")), done);
    }

    #[test]
    fn chains_of_functions_are_cut_at_their_bound() {
        let kind = "loop".to_owned();
        let revision =
            revision("f", vec![Output::Event { kind: kind.clone() }], vec![Trigger::Event { kind }]);
        let routes = routes(vec![revision.clone()]);

        let mut event = lease(0).event;
        let mut length = 0;
        loop {
            let context =
                Context { routes: &routes, revision: &revision, now: UnixMs(0), counted: true, random: 0 };
            let (_, mut events) =
                effects(&event, b"x".to_vec(), Said::default(), &context).expect("no topic to fail");
            let next = events.remove(0);
            if next.invocations[0].dead.is_some() {
                break;
            }
            event = next.event;
            length += 1;
            assert!(length <= CHAIN_MAX, "the chain goes on");
        }

        assert_eq!(length, CHAIN_MAX);
    }

    #[test]
    fn a_chain_that_a_sender_says_is_long_ends_as_one() {
        let kind = "loop".to_owned();
        let revision =
            revision("f", vec![Output::Event { kind: kind.clone() }], vec![Trigger::Event { kind }]);
        let routes = routes(vec![revision.clone()]);
        let context =
            Context { routes: &routes, revision: &revision, now: UnixMs(0), counted: true, random: 0 };

        for said in ["17", "4294967295", "99999999999999999999", "-1", "x"] {
            let mut event = lease(0).event;
            event.extensions.insert(CHAIN_EXTENSION.to_owned(), said.to_owned());
            let (_, events) =
                effects(&event, b"x".to_vec(), Said::default(), &context).expect("no topic to fail");
            let ends = events[0].invocations[0].dead.is_some();
            assert_eq!(ends, said.parse::<u32>().is_ok(), "{said}");
        }
    }

    #[test]
    fn failures_are_retried_until_the_attempts_are_used_up() {
        let revision = revision("f", vec![], vec![]);
        let routes = routes(vec![revision.clone()]);
        let last = revision.manifest.retry.attempts - 1;

        let early = decide(&revision, &routes, last - 1, failed(Failure::Exit(1)));
        let late = decide(&revision, &routes, last, failed(Failure::Exit(1)));
        let hopeless = decide(&revision, &routes, 0, failed(Failure::PayloadTooLarge { limit_bytes: 1 }));

        assert!(matches!(early, Settlement::Retry { counted: true, .. }), "{early:?}");
        let Settlement::Dead { failure: Failure::Exit(1), output } = &late else { panic!("{late:?}") };
        assert_eq!(output.len(), OUTPUT_KEPT_BYTES);
        assert!(matches!(hopeless, Settlement::Dead { .. }), "{hopeless:?}");
    }

    #[test]
    fn what_fails_while_the_breaker_is_open_waits_and_keeps_its_attempts() {
        let revision = revision("f", vec![], vec![]);
        let routes = routes(vec![revision.clone()]);
        let context =
            Context { routes: &routes, revision: &revision, now: UnixMs(5), counted: false, random: 0 };

        let last = lease(revision.manifest.retry.attempts - 1);
        let waits = settle(&last, failed(Failure::Exit(1)), &context);
        let hopeless = settle(&last, failed(Failure::Refused("no".into())), &context);

        assert!(matches!(waits, Settlement::Defer { .. }), "{waits:?}");
        assert!(matches!(hopeless, Settlement::Dead { .. }), "{hopeless:?}");
    }

    #[test]
    fn function_that_asks_for_time_gets_it() {
        let revision = revision("f", vec![], vec![]);
        let routes = routes(vec![revision.clone()]);
        let busy = |seconds| Outcome::Failed {
            failure: Failure::Status(503),
            output: Vec::new(),
            took: Duration::ZERO,
            retry_after: Some(Duration::from_secs(seconds)),
        };

        let long = decide(&revision, &routes, 0, busy(3600));
        let short = decide(&revision, &routes, 0, busy(0));
        let refused = decide(&revision, &routes, 0, failed(Failure::Status(400)));

        let Settlement::Retry { delay, .. } = long else { panic!("{long:?}") };
        assert_eq!(delay, Duration::from_secs(3600));
        let Settlement::Retry { delay, .. } = short else { panic!("{short:?}") };
        assert!(delay > Duration::ZERO, "its own backoff still holds");
        assert!(matches!(refused, Settlement::Dead { .. }), "the same request stays wrong: {refused:?}");
    }

    #[test]
    fn statuses_of_its_own_are_tried_again_instead_of_the_usual() {
        let mut revision = revision("f", vec![], vec![]);
        revision.manifest.retry.codes = Some(vec![400]);
        let routes = routes(vec![revision.clone()]);

        let own = decide(&revision, &routes, 0, failed(Failure::Status(400)));
        let usual = decide(&revision, &routes, 0, failed(Failure::Status(503)));
        let no_status = decide(&revision, &routes, 0, failed(Failure::Exit(1)));

        assert!(matches!(own, Settlement::Retry { counted: true, .. }), "{own:?}");
        assert!(matches!(usual, Settlement::Dead { .. }), "{usual:?}");
        assert!(matches!(no_status, Settlement::Retry { .. }), "{no_status:?}");
    }

    #[test]
    fn lost_attempts_are_not_the_functions_fault() {
        let revision = revision("f", vec![], vec![]);
        let routes = routes(vec![revision.clone()]);

        let lost = decide(&revision, &routes, 99, Outcome::Lost);

        assert!(matches!(lost, Settlement::Retry { counted: false, .. }), "{lost:?}");
    }

    #[test]
    fn topic_that_can_not_be_published_to_is_a_dead_letter_not_a_loss() {
        let topic = TopicTemplate::parse("{topic}").expect("a good template");
        let revision = revision("f", vec![Output::Local { topic }], vec![]);
        let routes = routes(vec![revision.clone()]);
        let mut lease = lease(0);
        lease.event.subject = Some("a/+/b".into());

        let context =
            Context { routes: &routes, revision: &revision, now: UnixMs(0), counted: true, random: 0 };
        let settlement = settle(&lease, succeeded(b"x"), &context);

        assert!(
            matches!(settlement, Settlement::Dead { failure: Failure::Refused(_), .. }),
            "{settlement:?}"
        );
    }

    #[test]
    fn output_that_can_never_be_stored_becomes_a_dead_letter_with_its_head() {
        let delivery = NewDelivery {
            target: Target::Uplink,
            lane: Lane::Normal,
            function: None,
            topic: "t".into(),
            event: Event { data: vec![7; OUTPUT_KEPT_BYTES + 1], ..lease(0).event },
        };
        let done = Settlement::Done { deliveries: vec![delivery], events: Vec::new() };

        let Settlement::Dead { failure, output } = output_refused(done, "9 bytes of 8".into()) else {
            panic!("a dead letter")
        };

        assert_eq!(failure, Failure::Refused("the output: 9 bytes of 8".into()));
        assert_eq!(output, vec![7; OUTPUT_KEPT_BYTES]);
    }
}
