//! `/v1/status`: the node at a glance.

use super::{Query, functions, json};
use crate::ingress::http::Request;
use crate::ingress::http::problem::Refusal;
use crate::model::api::{QueueStatus, Status};
use crate::model::permissions::Network;
use crate::runtime::Runtime;
use std::time::Duration;
use tide::Response;

/// GET /v1/status
pub async fn status(request: Request) -> Result<Response, Refusal> {
    Query::of(&request, &[])?;
    let shared = request.state();
    let counts = shared.api.store.counts().await?;
    let functions = functions::summaries(shared).await?;
    let facts = (shared.api.facts)();
    let mut warnings = facts.warnings;
    let routes = shared.api.routes.get();
    let mut networks =
        routes.functions.values().map(|deployed| deployed.revision.manifest.permissions.allow.network);
    if networks.any(|network| network == Network::Egress) {
        // Asks the kernel for other firewalls' rules, which may be thousands.
        warnings.extend(smol::unblock(Runtime::hindrances).await);
    }
    let age = |age: Option<Duration>| age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
    json(&Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        node: shared.api.node.clone(),
        uptime_ms: u64::try_from(shared.api.clock.monotonic().as_millis()).unwrap_or(u64::MAX),
        links: facts.links,
        inbox: QueueStatus { depth: counts.ready + counts.running, age_ms: age(counts.oldest) },
        outbox: QueueStatus {
            depth: counts.owed_uplink + counts.owed_local + counts.owed_callbacks,
            age_ms: age(counts.oldest_owed),
        },
        dead_events: counts.dead,
        dead_deliveries: counts.dead_deliveries,
        expired: counts.expired,
        dropped_full: counts.dropped_full,
        dropped_age: counts.dropped_age,
        full: counts.full.map(str::to_owned),
        database_bytes: counts.bytes,
        database_bytes_max: counts.bytes_max,
        disk_free_bytes: facts.disk_free_bytes,
        memory_reserved_bytes: facts.memory_reserved_bytes,
        memory_budget_bytes: facts.memory_budget_bytes,
        instances: facts.instances,
        parked: facts.parked,
        functions,
        warnings,
    })
}
