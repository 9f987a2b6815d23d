//! Containers serving invocations.
//!
//! Handler stdio has a fresh container for each event: `state` says what an ending means,
//! `driver` moves the bytes. Handlers that stay up have instances that serve one event after
//! another: `fleet` decides who serves, is frozen, goes; `http` and
//! `lambda` do it; `request` says how an
//! event looks as HTTP and `platform` what functions of other platforms expect.

pub mod driver;
pub mod fleet;
pub mod http;
pub mod lambda;
mod lines;
pub mod platform;
pub mod request;
pub mod runtime_api;
pub mod service;
pub mod state;
