//! Counters and histograms in the Prometheus text format (version 0.0.4), a fixed set.

use crate::model::FunctionName;
use std::time::Duration;

/// A handle; cheap to clone.
#[derive(Clone, Default)]
pub struct Metrics {}

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
    pub database_bytes: u64,
    pub memory_reserved_bytes: u64,
    pub instances: u64,
    /// `(link name, up)`
    pub links: Vec<(String, bool)>,
}

#[allow(unused_variables)]
impl Metrics {
    pub fn invocation(&self, function: &FunctionName, ended: Ended, took: Duration) {
        todo!()
    }

    /// Succeeded and failed since start.
    pub fn counts(&self, function: &FunctionName) -> (u64, u64) {
        todo!()
    }

    pub fn event_accepted(&self, way: &'static str) {
        todo!()
    }

    /// Dropped or refused, with a reason from a fixed set.
    pub fn event_refused(&self, reason: &'static str) {
        todo!()
    }

    pub fn delivered(&self, target: &'static str, count: u64) {
        todo!()
    }

    pub fn remove(&self, function: &FunctionName) {
        todo!()
    }

    pub fn render(&self, gauges: &Gauges) -> String {
        todo!()
    }
}
