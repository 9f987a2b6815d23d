//! Function logs: per function, bounded, in `run_dir` (a tmpfs), off the flash.

use crate::model::api::LogLine;
use crate::model::{EventId, FunctionName, UnixMs};
use std::path::Path;

/// Kept for each function, the newest.
pub const LOG_BYTES_MAX: u64 = 1 << 20;

/// A handle; cheap to clone.
#[derive(Clone)]
pub struct FunctionLogs {}

#[derive(Clone, Debug, Default)]
pub struct LogQuery {
    /// The last N lines; `None`: all.
    pub tail: Option<usize>,
    pub since: Option<UnixMs>,
    pub event: Option<EventId>,
}

#[allow(unused_variables)]
impl FunctionLogs {
    pub fn open(run_dir: &Path) -> std::io::Result<Self> {
        todo!()
    }

    /// Appends complete lines (longer than 8 KiB are cut, marked). Never blocks a caller for
    /// a reader; a failing disk is counted, not raised.
    pub fn append(&self, function: &FunctionName, event: &EventId, time: UnixMs, text: &str) {
        todo!()
    }

    pub fn read(&self, function: &FunctionName, query: &LogQuery) -> std::io::Result<Vec<LogLine>> {
        todo!()
    }

    /// New lines of this function from now on; a follower that is too slow misses lines and is told.
    pub fn follow(&self, function: &FunctionName) -> smol::channel::Receiver<LogLine> {
        todo!()
    }

    pub fn remove(&self, function: &FunctionName) {
        todo!()
    }
}
