//! Everything that needs real parts: brokers, containers, the binary itself. One linked binary,
//! because linking costs more than the tests.

mod cli;
mod clients;
mod crash;
mod engine;
mod http;
mod images;
mod kill;
mod layers;
mod mqtt;
mod node;
mod pull;
mod runtime;
mod scheduler;
mod simulation;
mod support;
