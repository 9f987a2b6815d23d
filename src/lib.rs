//! neap: a serverless runtime for edge gateways.

pub mod backoff;
pub mod channels;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod deploy;
pub mod errors;
pub mod image;
pub mod ingress;
pub mod instance;
pub mod model;
pub mod net;
pub mod runtime;
pub mod scheduler;
pub mod store;
pub mod sync;
pub mod telemetry;
pub mod watch;
