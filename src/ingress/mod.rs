//! The outside world → events: HTTP, MQTT, cron, and which function an arrival is for.

pub mod cron;
pub mod http;
pub mod mqtt;
pub mod routes;
pub mod ticks;
