//! What follows from an outcome: done with its deliveries and events, another attempt, or a
//! dead letter. Pure.

use crate::backoff::Backoff;
use crate::ingress::routes::Routes;
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
    /// For jitter.
    pub random: u64,
}

/// How the lease of `leased` ends.
pub fn settle(leased: &Leased, outcome: Outcome, context: &Context<'_>) -> Settlement {
    let (failure, output) = match outcome {
        Outcome::Succeeded { output, .. } => match effects(&leased.event, output, context) {
            Ok((deliveries, events)) => return Settlement::Done { deliveries, events },
            Err(failure) => (failure, Vec::new()),
        },
        Outcome::Failed { failure, output, .. } => (failure, output),
        Outcome::Lost => {
            let delay = LOST_BACKOFF.delay(leased.lost, context.random);
            return Settlement::Retry { delay, counted: false, error: "the attempt was lost".to_owned() };
        }
    };
    let retry = &context.revision.manifest.retry;
    if failure.retryable() && leased.attempts + 1 < retry.attempts {
        let backoff = Backoff { first: retry.backoff, max: retry.backoff_max };
        let delay = backoff.delay(leased.attempts, context.random);
        return Settlement::Retry { delay, counted: true, error: failure.to_string() };
    }
    let mut output = output;
    output.truncate(OUTPUT_KEPT_BYTES);
    Settlement::Dead { failure, output }
}

/// What a successful output becomes: deliveries and events, by the manifest's `[[output]]`s. An
/// empty output becomes nothing. Fails for good where no topic can be made of the event.
pub fn effects(
    cause: &Event,
    output: Vec<u8>,
    context: &Context<'_>,
) -> Result<(Vec<NewDelivery>, Vec<Arrival>), Failure> {
    let (mut deliveries, mut events) = (Vec::new(), Vec::new());
    if output.is_empty() {
        return Ok((deliveries, events));
    }
    let function = context.revision.name();
    for (index, rule) in context.revision.manifest.outputs.iter().enumerate() {
        let event = output_event(cause, rule, index, &output, context);
        let deliver = |target, template: &TopicTemplate, event| {
            let topic = cause.subject.as_deref().unwrap_or("");
            let values = TopicValues { node: &context.routes.node, function: function.as_str(), topic };
            let topic = template.render(values).map_err(|bad| {
                Failure::Refused(format!("output topic `{}` for this event: {bad}", template.as_str()))
            })?;
            Ok(NewDelivery { target, function: Some(function.clone()), topic, event })
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
                let invocations = context.routes.event(kind).map(|name| NewInvocation {
                    function: name.clone(),
                    expires: None,
                    once: None,
                    dead: dead.clone(),
                });
                let invocations: Vec<_> = invocations.collect();
                if !invocations.is_empty() {
                    events.push(Arrival { event, invocations, deliveries: Vec::new() });
                }
            }
        }
    }
    Ok((deliveries, events))
}

fn output_event(cause: &Event, rule: &Output, index: usize, data: &[u8], context: &Context<'_>) -> Event {
    let function = context.revision.name();
    let mut extensions = std::collections::BTreeMap::new();
    extensions.insert(CAUSE_EXTENSION.to_owned(), cause.id.to_string());
    if let Output::Event { .. } = rule {
        extensions.insert(CHAIN_EXTENSION.to_owned(), (cause.chain() + 1).to_string());
    }
    let kind = match rule {
        Output::Event { kind } => kind.as_str(),
        Output::Uplink { .. } | Output::Local { .. } => TYPE_OUTPUT,
    };
    Event {
        id: output_id(cause, function.as_str(), index),
        source: format!("/{}/function/{function}", context.routes.node),
        kind: kind.to_owned(),
        subject: cause.subject.clone(),
        time: Some(context.now),
        content_type: Some(guess_content_type(data).to_owned()),
        extensions,
        http: None,
        data: data.to_vec(),
    }
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
