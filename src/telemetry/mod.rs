//! What the node says of itself: tracing to stderr, metrics, the functions' logs.

pub mod logs;
pub mod metrics;
pub mod trace;
