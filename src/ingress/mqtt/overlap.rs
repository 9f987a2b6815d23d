//! Filters overlap (`a/#` and `a/+`), and MQTT 5 lets a broker send a message once for each that
//! matches (§3.3.4); mosquitto does. One copy is enough: it goes to every function that wants
//! it. The others are told by their subscription identifiers: the same message again, right
//! behind, for a filter that has not had it yet.
//!
//! Giving each copy to the functions of its own filter would be simpler and would lose events:
//! mosquitto 2.0.11, restarted, queues one copy under one identifier, whoever else matches.
//! Here an error can only be a message too many: two equal messages in a row are two, because
//! the second comes for a filter that has had it.

use crate::net::mqtt::Publish;
use std::hash::{BuildHasher, RandomState};

#[derive(Debug, Default)]
pub struct Overlap {
    hasher: RandomState,
    last: Option<Last>,
}

#[derive(Debug)]
struct Last {
    /// What the other copies must have in common with this one.
    context: (u64, u64),
    hash: u64,
    filters: Vec<u32>,
}

impl Overlap {
    /// Whether this is one more copy of the message before it. `connection` and `routes` number
    /// the connection and the version of the routes: neither changes between copies.
    pub fn is_copy(&mut self, connection: u64, routes: u64, publish: &Publish) -> bool {
        let filters = &publish.subscriptions;
        if filters.is_empty() {
            self.last = None;
            return false;
        }
        let p = publish;
        let hash = self
            .hasher
            .hash_one(((&p.topic, &p.payload, p.cut, p.retain), (&p.content_type, &p.user_properties)));
        let context = (connection, routes);
        if let Some(last) = &mut self.last
            && (last.context, last.hash) == (context, hash)
            && !filters.iter().any(|filter| last.filters.contains(filter))
        {
            last.filters.extend(filters);
            return true;
        }
        self.last = Some(Last { context, hash, filters: filters.clone() });
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(payload: &str, filters: &[u32]) -> Publish {
        Publish {
            topic: "a/b".to_owned(),
            payload: payload.as_bytes().to_vec(),
            subscriptions: filters.to_vec(),
            ..Publish::default()
        }
    }

    fn taken(messages: &[(&str, &[u32])]) -> usize {
        let mut overlap = Overlap::default();
        messages
            .iter()
            .filter(|(payload, filters)| !overlap.is_copy(1, 1, &publish(payload, filters)))
            .count()
    }

    #[test]
    fn copies_for_other_filters_are_told_from_equal_messages() {
        assert_eq!(taken(&[("x", &[1]), ("x", &[2]), ("x", &[3])]), 1);
        assert_eq!(taken(&[("x", &[1]), ("x", &[2]), ("x", &[1]), ("x", &[2])]), 2);
        assert_eq!(taken(&[("x", &[1]), ("x", &[1]), ("x", &[1])]), 3);
        assert_eq!(taken(&[("x", &[1, 2]), ("x", &[1, 2])]), 2);
        assert_eq!(taken(&[("x", &[1]), ("y", &[2])]), 2);
        assert_eq!(taken(&[("x", &[]), ("x", &[])]), 2);
    }

    #[test]
    fn another_connection_or_other_routes_begin_anew() {
        let mut overlap = Overlap::default();
        assert!(!overlap.is_copy(1, 1, &publish("x", &[1])));

        assert!(!overlap.is_copy(2, 1, &publish("x", &[2])));
        assert!(!overlap.is_copy(2, 2, &publish("x", &[3])));
    }
}
