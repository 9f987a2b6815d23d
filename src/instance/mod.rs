//! Containers serving invocations.
//!
//! `driver` has them all. Handler stdio has a fresh container for each event: `state` says what an
//! ending means, `stdio` moves the bytes. Handler job has several: `batch` decides which copy runs
//! when and what became of all, `job` runs them. Handlers that stay up have instances that serve
//! one event after another: `fleet` decides who serves, is frozen, goes; `http` and `lambda` do
//! it; `request` says how an event looks as HTTP and `platform` what functions of other platforms
//! expect.

pub mod batch;
pub mod driver;
pub mod extensions;
pub mod fleet;
pub mod http;
pub mod job;
pub mod lambda;
pub mod life;
mod lines;
pub mod platform;
pub mod request;
pub mod runtime_api;
pub mod service;
pub mod state;
pub mod stdio;
