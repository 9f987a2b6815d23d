//! Outbox → broker: one link for each broker, a pure state machine and its driver.

pub mod allowance;
pub mod driver;
pub mod envelope;
pub mod link;
pub mod order;
pub mod receipt;
pub mod turns;
