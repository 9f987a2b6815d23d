//! Links against real brokers: what comes in is committed and acknowledged, what is owed goes
//! out, whatever the broker does meanwhile.

mod gateway;
mod incoming;
mod metered;
mod outgoing;
mod scripted;
