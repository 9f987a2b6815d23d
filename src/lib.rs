//! neap: a serverless runtime for edge gateways.
//!
//! This page is the project's map: how an event travels, which processes there are, which module
//! may use which, and what must stay true. Each module's own head says the rest.
//!
//! # The way of an event
//!
//! ```text
//! devices ── MQTT ──▶ sync ──▶ ingress::mqtt ─┐
//! clock ─────────────────────▶ ingress::cron ─┤
//! clients ── HTTP ───────────▶ ingress::http ─┼─▶ store::inbox ──▶ scheduler ──▶ instance ──▶ runtime ──▶ launcher ──▶ container
//!                              (routes match)       (committed)        ▲   (plan)                (client)     (its own process,
//!                                                                 retry│                                       libcontainer)
//!                                                                      └── Outcome ──┘
//!                                                 one transaction: finish the invocation, add its deliveries
//!                                                                            │
//! uplink, local broker ◀── MQTT, HTTPS ── sync ◀──────── store::outbox ◀────────────┘
//! ```
//!
//! Where `scale.min` says so, instances are made ahead of their events and only started by them
//! ([`scheduler::pool`] decides how many; [`scheduler::warm`] of those that stay up).
//!
//! A synchronous HTTP call skips the inbox (ingress ▶ scheduler ▶ instance ▶ response); nothing
//! else does, save `[[forward]]`, which is committed straight to the outbox.
//!
//! # Processes
//!
//! - `neap daemon`: one `smol::Executor`, driven by the thread that waits for I/O ([`drive`]); one
//!   store thread that owns SQLite. Nothing is spawned on a global executor.
//! - `neap launcher`: single-threaded, pid 1 of its own PID namespace, the parent of every
//!   container. It forks a short-lived maker for each create; they alone call libcontainer. When
//!   it dies, every container and mount goes with it; the daemon retries what was lost and starts
//!   another. When the daemon dies, it dies.
//! - `neap image-worker`: a short-lived child that fetches from registries, reads archives,
//!   verifies and unpacks. Untrusted bytes and their memory stay out of the daemon.
//!
//! # Layers: arrows only point down
//!
//! | layer | modules | may use |
//! |---|---|---|
//! | 4 wiring | [`cli`], [`daemon`], [`drive`], [`worker`] | everything below |
//! | 3 drivers | [`ingress`]`::{http, mqtt, cron}`, [`scheduler`]`::{driver, calls, leases, parking, keeping, settle}`, [`instance`]`::{driver, stdio, job, service, life, http, lambda, runtime_api, extensions}`, [`sync`]`::driver`, [`deploy`] | 0 to 2, [`channels`], [`deadline`], never each other |
//! | 2 adapters | [`store`], [`image`], [`runtime`], [`secrets`], [`telemetry`], [`net`] | 0, [`watch`], never each other |
//! | 1 decisions, pure | [`scheduler`]`::{plan, budget, gates, pace, pool, arrivals, warm, pressure}`, [`instance`]`::{state, batch, fleet, request, platform}`, [`sync`]`::{link, order, allowance, receipt, turns}`, [`ingress`]`::{routes, ticks}`, [`backoff`] | 0 |
//! | 0 data | [`model`], [`config`], [`errors`] | nothing of neap |
//!
//! A test reads the `use crate::` lines and fails on an arrow that points up.
//!
//! # What must stay true
//!
//! 1. Only [`runtime`] names libcontainer and holds `unsafe`, only [`store`] names rusqlite,
//!    only [`net`] names hyper and rumqttc's codec.
//! 2. The launcher never has a second thread.
//! 3. An event is acknowledged to its sender only after its commit returned. Finishing an
//!    invocation and adding its deliveries is one transaction.
//! 4. A restart takes no input: everything is derived from the database, the image store and
//!    the cgroup tree. Loops are level-triggered: woken by a signal and by a period, they do
//!    the same either way.
//! 5. Nothing on the boot path waits for the network or for a clock that is right: order comes
//!    from sequence numbers, durations from the monotonic clock.
//! 6. Every queue, cache, body, header, log and connection count has a bound, and the bound
//!    says what happens when it is full.
//! 7. A function starts with nothing: no capability, no network but its own loopback, a
//!    read-only root, no new privileges, a seccomp filter, its own user namespace, limits on
//!    memory, CPU and processes. The manifest adds.
//! 8. Bytes from outside never panic the daemon.

pub mod backoff;
pub mod channels;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod deadline;
pub mod deploy;
pub mod drive;
pub mod errors;
pub mod image;
pub mod ingress;
pub mod instance;
pub mod model;
pub mod net;
pub mod runtime;
pub mod scheduler;
pub mod secrets;
pub mod store;
pub mod sync;
pub mod telemetry;
pub mod watch;
pub mod worker;
