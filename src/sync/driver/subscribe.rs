//! Keeps what the broker has us subscribed to the same as what the routes want.
//!
//! A persistent session keeps its subscriptions over reconnects and over our restarts, filters
//! that nobody wants any more included, and the broker can't be asked for a list. So the list
//! is kept in the store: written before anything is asked (both old and new filters), and again
//! when the broker has answered.
//!
//! Retained messages must not come again with every CONNACK. MQTT 5: all filters are asked for
//! each time, for brokers that keep a session without its subscriptions, and retain handling 1
//! has retained messages sent for new ones only. 3.1.1 knows no such thing: with the session
//! present only what is new or changed is asked for.
//!
//! On MQTT 5 each filter has an identifier, which comes back with every message for it: that is
//! how `ingress::mqtt` tells a copy for another filter from a second message.

use super::session::{Session, SessionEnd};
use crate::ingress::routes::Subscription;
use crate::net::mqtt::{Received, SubscribeFilter, Version, reason_text, subscription_identifier};
use futures_lite::future::or;
use smol::Timer;
use std::collections::BTreeMap;
use std::time::Duration;

/// For a SUBACK or UNSUBACK.
const ANSWER: Duration = Duration::from_secs(20);
/// Filters in one packet, and their bytes: small enough for any broker's packet limit that a
/// gateway will meet.
pub(super) const BATCH: usize = 32;
const BATCH_BYTES: usize = 4 << 10;

/// Filter → QoS.
type Filters = BTreeMap<String, u8>;

#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    subscribe: Vec<SubscribeFilter>,
    unsubscribe: Vec<String>,
}

/// `confirm`: ask for everything, known or not.
fn plan(held: &Filters, wanted: &Filters, confirm: bool) -> Plan {
    let subscribe = wanted.iter().filter(|(filter, qos)| confirm || held.get(*filter) != Some(qos));
    let subscribe = subscribe.map(|(filter, qos)| SubscribeFilter { filter: filter.clone(), qos: *qos });
    let unsubscribe = held.keys().filter(|filter| !wanted.contains_key(*filter)).cloned();
    Plan { subscribe: subscribe.collect(), unsubscribe: unsubscribe.collect() }
}

impl Session<'_> {
    pub(super) async fn subscribe(&self) -> SessionEnd {
        match self.subscriptions().await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn subscriptions(&self) -> Result<std::convert::Infallible, SessionEnd> {
        let stored = self.stored().await?;
        let mut held = if self.greeting.session_present { stored.clone() } else { Filters::new() };
        let mut recorded = stored;
        let mut confirm = self.greeting.version == Version::V5;
        loop {
            let (version, routes) = self.link.routes.versioned();
            self.set_limit(routes.payload_bytes_max(self.link.target));
            let wanted = self.possible(routes.subscriptions(self.link.target));
            let plan = plan(&held, &wanted, confirm);
            if plan != Plan::default() {
                let mut both = held.clone();
                both.extend(wanted.iter().map(|(filter, qos)| (filter.clone(), *qos)));
                self.record(&both, &mut recorded).await?;
                // First the new, then the old: in between messages may come twice, but none is missed.
                for batch in batches(&plan.subscribe, |f| f.filter.len()) {
                    self.ask_for(batch, &mut held).await?;
                }
                for batch in batches(&plan.unsubscribe, String::len) {
                    self.ask_off(batch, &mut held).await?;
                }
            }
            self.record(&held, &mut recorded).await?;
            confirm = false;
            self.link.routes.changed(version).await;
        }
    }

    /// Without what this broker has said that it can't do.
    fn possible(&self, wanted: Vec<Subscription>) -> Filters {
        let able = |wanted: &Subscription| {
            let filter = wanted.filter.as_str();
            let missing = if wanted.filter.is_shared() && !self.greeting.shared_available {
                "shared subscriptions"
            } else if filter.contains(['+', '#']) && !self.greeting.wildcard_available {
                "wildcard subscriptions"
            } else {
                return true;
            };
            tracing::error!(filter, missing, "the broker can't serve this filter");
            self.link.complain(format!("the broker has no {missing}, which `{filter}` needs"));
            false
        };
        let wanted = wanted.into_iter().filter(able);
        wanted.map(|s| (s.filter.as_str().to_owned(), s.qos)).collect()
    }

    /// With identifiers one packet for each filter, all sent before the first answer is awaited:
    /// on a link with seconds of round trip, a filter at a time takes minutes.
    async fn ask_for(&self, filters: &[SubscribeFilter], held: &mut Filters) -> Result<(), SessionEnd> {
        let packets: Vec<&[SubscribeFilter]> = match self.greeting.identifiers_available {
            true => filters.chunks(1).collect(),
            false => vec![filters],
        };
        let mut asked = BTreeMap::new();
        for packet in packets {
            let identifier =
                self.greeting.identifiers_available.then(|| subscription_identifier(&packet[0].filter));
            let pkid = self.send(|shared| {
                let pkid = shared.pkid();
                let encoded = self.encoder.subscribe(&mut shared.out, pkid, packet, identifier);
                encoded.map(|()| pkid).map_err(|error| SessionEnd::lost(format!("subscribe: {error}")))
            })?;
            asked.insert(pkid, packet);
        }
        while !asked.is_empty() {
            let Received::SubAck { pkid, codes } = self.answer().await? else {
                return Err(SessionEnd::lost("the broker answered SUBSCRIBE with something else"));
            };
            let Some(filters) = asked.remove(&pkid).filter(|filters| filters.len() == codes.len()) else {
                return Err(SessionEnd::lost("the broker acknowledges what nobody asked"));
            };
            for (filter, code) in filters.iter().zip(codes) {
                if code >= 0x80 {
                    // Asked again with the next connection or deploy; others must not suffer.
                    let reason = reason_text(code);
                    tracing::error!(filter = filter.filter, reason, "the broker refused a filter");
                    self.link
                        .complain(format!("the broker refused the filter `{}`: {reason}", filter.filter));
                    held.remove(&filter.filter);
                } else {
                    held.insert(filter.filter.clone(), filter.qos);
                }
            }
        }
        Ok(())
    }

    async fn ask_off(&self, filters: &[String], held: &mut Filters) -> Result<(), SessionEnd> {
        let pkid = self.send(|shared| {
            let pkid = shared.pkid();
            let encoded = self.encoder.unsubscribe(&mut shared.out, pkid, filters);
            encoded.map(|()| pkid).map_err(|error| SessionEnd::lost(format!("unsubscribe: {error}")))
        })?;
        match self.answer().await? {
            Received::UnsubAck { pkid: answered } if answered == pkid => {}
            _ => return Err(SessionEnd::lost("the broker answered UNSUBSCRIBE with something else")),
        }
        for filter in filters {
            held.remove(filter);
        }
        Ok(())
    }

    async fn answer(&self) -> Result<Received, SessionEnd> {
        let answer = async { self.subscribed.1.recv().await.ok() };
        let late = async {
            Timer::after(ANSWER).await;
            None
        };
        let late_text = || SessionEnd::lost(format!("no answer to SUBSCRIBE for {} s", ANSWER.as_secs()));
        or(answer, late).await.ok_or_else(late_text)
    }

    /// The session that the list is about: another broker or client id has another one.
    fn identity(&self) -> String {
        let broker = &self.to.broker;
        format!("@{}@{}:{}", broker.client_id, broker.host, broker.port)
    }

    async fn stored(&self) -> Result<Filters, SessionEnd> {
        let lines = self.link.store.subscribed(self.link.target).await;
        let lines = lines.map_err(|error| SessionEnd::lost(crate::errors::chain(&error)))?;
        let mut lines = lines.into_iter();
        if lines.next() != Some(self.identity()) {
            return Ok(Filters::new());
        }
        let filters = lines.filter_map(|line| {
            let (qos, filter) = line.split_once(' ')?;
            Some((filter.to_owned(), qos.parse().ok()?))
        });
        Ok(filters.collect())
    }

    async fn record(&self, held: &Filters, recorded: &mut Filters) -> Result<(), SessionEnd> {
        if held == recorded {
            return Ok(());
        }
        let lines = std::iter::once(self.identity());
        let lines = lines.chain(held.iter().map(|(filter, qos)| format!("{qos} {filter}")));
        let stored = self.link.store.set_subscribed(self.link.target, lines.collect()).await;
        stored.map_err(|error| SessionEnd::lost(crate::errors::chain(&error)))?;
        held.clone_into(recorded);
        Ok(())
    }
}

/// Runs of at most `BATCH` items and about `BATCH_BYTES`.
fn batches<T>(all: &[T], bytes: impl Fn(&T) -> usize) -> Vec<&[T]> {
    let mut batches = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (at, item) in all.iter().enumerate() {
        let len = bytes(item);
        if at > start && (at - start >= BATCH || size + len > BATCH_BYTES) {
            batches.push(&all[start..at]);
            (start, size) = (at, 0);
        }
        size += len;
    }
    if start < all.len() {
        batches.push(&all[start..]);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(list: &[(&str, u8)]) -> Filters {
        list.iter().map(|(filter, qos)| ((*filter).to_owned(), *qos)).collect()
    }

    #[test]
    fn known_filters_are_not_asked_again_unless_to_confirm() {
        let held = filters(&[("a", 1), ("b", 0), ("c", 1)]);
        let wanted = filters(&[("a", 1), ("b", 1), ("d", 0)]);

        let told = plan(&held, &wanted, false);
        let asked: Vec<_> = told.subscribe.iter().map(|f| (f.filter.as_str(), f.qos)).collect();
        assert_eq!(asked, [("b", 1), ("d", 0)]);
        assert_eq!(told.unsubscribe, ["c"]);

        assert_eq!(plan(&held, &wanted, true).subscribe.len(), 3);
        assert_eq!(plan(&wanted, &wanted, false), Plan::default());
    }

    #[test]
    fn batches_hold_everything_once_and_stay_small() {
        let all: Vec<String> = (0..500).map(|n| "x".repeat(n % 300)).collect();

        let batches = batches(&all, String::len);

        assert_eq!(batches.concat(), all);
        for batch in batches {
            let bytes: usize = batch.iter().map(String::len).sum();
            assert!(batch.len() <= BATCH && (bytes <= BATCH_BYTES || batch.len() == 1));
        }
    }
}
