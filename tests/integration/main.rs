//! Everything that needs real parts: brokers, containers, the binary itself. One linked binary,
//! because linking costs more than the tests.

mod cli;
mod http;
mod images;
mod kill;
mod layers;
mod mqtt;
mod node;
mod runtime;
mod scheduler;
mod support;
