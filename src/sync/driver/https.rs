//! Outbox → a receiver of batches: CloudEvents in JSON by POST, gzip, one request at a time, taken
//! out of the outbox when it is answered 2xx.
//!
//! The outbox, its order and its promises are those of MQTT; `receipt` says what an answer means.
//! One request at a time keeps the order, and bounds what a crash sends again to one batch.
//!
//! There is no connection that says that the link is up: it is what the last request came to.
//! Nothing is sent only to find out.

use super::outbox::Outbox;
use crate::backoff::Backoff;
use crate::config::{Order, Receiver, UplinkLimits};
use crate::errors;
use crate::model::api::LinkStatus;
use crate::model::{Clock, Delivery, DeliveryId, Target};
use crate::net::http::{ClientError, Endpoint, Poster};
use crate::net::tls::client;
use crate::store::{Store, StoreError, Usage};
use crate::sync::allowance::{self, Allowance, SPENT};
use crate::sync::envelope::structured_with_topic;
use crate::sync::receipt::{Found, Search, Verdict, retry_after, verdict};
use crate::telemetry::metrics::Metrics;
use crate::watch::{Wake, Watch};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_lite::future::or;
use smol::Timer;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Events of one request, and the bytes of their data; one larger delivery goes alone.
const BATCH_MAX: usize = 256;
const BATCH_BYTES: usize = 256 << 10;
/// From the request's first byte to the answer's last: a quarter of a megabyte takes a while on a
/// link that costs.
const ANSWER: Duration = Duration::from_secs(60);
/// The outbox is looked at this often without being woken.
const LOOK: Duration = Duration::from_secs(5);
/// As with a broker: most broken links are servers that restart.
const BACKOFF: Backoff = Backoff { first: Duration::from_millis(200), max: Duration::from_secs(30) };
const STORE_REST: Duration = Duration::from_secs(1);
/// Connections that may end without an answer while a delivery is alone in one.
const LONE_DISCONNECTS_MAX: u32 = 3;
/// A password or token file is a line.
const SECRET_BYTES_MAX: u64 = 65_535;

/// A receiver and how to send to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostTo {
    pub receiver: Receiver,
    pub order: Order,
    pub live_percent: u8,
    pub limits: UplinkLimits,
}

/// What the link is made of. Every field is a handle.
pub struct Post {
    /// `None`: the link is off. A new value takes effect before the next request.
    pub endpoint: Watch<Option<PostTo>>,
    pub store: Store,
    /// Woken when there may be new deliveries; looked at every 5 s besides.
    pub owed: Wake,
    pub status: Watch<LinkStatus>,
    pub metrics: Metrics,
    pub clock: Arc<dyn Clock>,
    /// True: end after the request that is under way, or at once.
    pub stop: Watch<bool>,
}

/// One delivery in the form that it is sent in.
struct Row {
    id: DeliveryId,
    json: Vec<u8>,
}

/// Why a round of requests came to its end early.
enum Trouble {
    /// After this wait at least.
    Later { why: String, wait: Option<Duration> },
    /// The store has stopped.
    Stopped,
}

#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Tls(#[from] client::ClientTlsError),
    #[error("read {}", path.display())]
    Secret {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl Post {
    /// Runs until `stop` is true.
    pub async fn run(self) {
        let (mut version, mut endpoint) = self.endpoint.versioned();
        loop {
            let changed = async { Some(self.endpoint.changed(version).await) };
            let serve = async {
                match &*endpoint {
                    Some(to) => self.serve(to).await,
                    None => self.report("off", None, None, None),
                }
                std::future::pending().await
            };
            match or(or(self.stopped(), changed), serve).await {
                Some((seen, new)) => (version, endpoint) = (seen, new),
                None => return,
            }
        }
    }

    async fn stopped<T>(&self) -> Option<T> {
        let (mut seen, mut stop) = self.stop.versioned();
        while !*stop {
            (seen, stop) = self.stop.changed(seen).await;
        }
        None
    }

    /// Ends when the store has stopped.
    async fn serve(&self, to: &PostTo) {
        let (mut failures, mut probe, mut said) = (0, false, None);
        self.report("connecting", Some(to), None, None);
        loop {
            let begun = Outbox::begin(&self.store, Target::Uplink, to.order, to.live_percent).await;
            let Some(mut outbox) = begun else { return };
            let trouble = match poster(to).await {
                Ok(mut poster) => self.drain(to, &mut poster, &mut outbox, (&mut failures, &mut probe)).await,
                Err(error) => Trouble::Later { why: errors::chain(&error), wait: None },
            };
            let Trouble::Later { why, wait } = trouble else { return };
            let backoff = BACKOFF.delay(failures, fastrand::u64(..));
            failures = failures.saturating_add(1);
            let wait = wait.unwrap_or_default().max(backoff);
            // A site may be offline for days: each cause is a warning once.
            if said.as_ref() == Some(&why) {
                tracing::debug!(link = "uplink", error = why, "could not deliver");
            } else {
                tracing::warn!(link = "uplink", error = why, "could not deliver; will keep trying");
            }
            self.report("waiting", Some(to), Some(why.clone()), Some(wait));
            said = Some(why);
            Timer::after(wait).await;
            self.report("connecting", Some(to), said.clone(), None);
        }
    }

    /// Sends until something stands in the way.
    async fn drain(
        &self,
        to: &PostTo,
        poster: &mut Poster,
        outbox: &mut Outbox,
        (failures, probe): (&mut u32, &mut bool),
    ) -> Trouble {
        loop {
            let owed = self.owed.listen();
            let batch = match self.gather(to, outbox, *probe).await {
                Ok(batch) => batch,
                Err(StoreError::Stopped) => return Trouble::Stopped,
                Err(error) => {
                    tracing::warn!(error = errors::chain(&error), "could not read the outbox");
                    Timer::after(STORE_REST).await;
                    continue;
                }
            };
            if batch.is_empty() {
                let look = async {
                    Timer::after(LOOK).await;
                };
                or(owed, look).await;
                continue;
            }
            if let Err(trouble) = self.send(to, poster, batch, (failures, probe)).await {
                return trouble;
            }
        }
    }

    async fn gather(&self, to: &PostTo, outbox: &mut Outbox, probe: bool) -> Result<Vec<Row>, StoreError> {
        let most = if probe { 1 } else { BATCH_MAX };
        let allowance = self.allowance(to).await?;
        let (mut rows, mut bytes, mut cost) = (Vec::new(), 0, 0);
        outbox.look_again();
        while rows.len() < most {
            let backlog = allowance.backlog_may_go(self.clock.wall());
            let Some(next) = outbox.peek(&self.store, most, backlog).await? else { break };
            let (size, next_cost) = (next.body.event.data.len(), allowance::cost(&next.body));
            if !rows.is_empty() && bytes + size > BATCH_BYTES {
                break;
            }
            if !allowance.may_send(cost, next_cost) {
                if rows.is_empty() && self.status.get().last_error.as_deref() != Some(SPENT) {
                    self.report("up", Some(to), Some(SPENT.to_owned()), None);
                }
                break;
            }
            let Some(delivery) = outbox.take() else { break };
            (bytes, cost) = (bytes + size, cost + next_cost);
            rows.push(row(delivery));
        }
        Ok(rows)
    }

    async fn allowance(&self, to: &PostTo) -> Result<Allowance, StoreError> {
        let limits = to.limits;
        let spent = match limits.bytes_per_day {
            0 => 0,
            _ => self.store.usage(Usage::UplinkBytes, allowance::day(self.clock.wall())).await?,
        };
        Ok(Allowance { limits, spent })
    }

    /// One batch and what its search needs; when it returns, none of it is owed any more.
    async fn send(
        &self,
        to: &PostTo,
        poster: &mut Poster,
        batch: Vec<Row>,
        (failures, probe): (&mut u32, &mut bool),
    ) -> Result<(), Trouble> {
        let mut search = Search::new(batch);
        let mut why = String::new();
        while let Some(group) = search.next_group() {
            let body = body(&group);
            let bytes = body.len() as u64;
            let answer = match poster.post(body, ANSWER).await {
                Ok(Some(answer)) => answer,
                other => {
                    self.settled(to, Vec::new(), bytes).await?;
                    return Err(self.unanswered(other.err(), &group, probe).await);
                }
            };
            let wait = answer.retry_after.as_deref();
            let wait = wait.and_then(|value| retry_after(value, self.clock.wall().0));
            let text: String = answer.text.chars().filter(|c| !c.is_control()).take(200).collect();
            let said = format!("the receiver answered {} {text}", answer.status).trim_end().to_owned();
            let found = match verdict(answer.status) {
                Verdict::Again => {
                    self.settled(to, Vec::new(), bytes).await?;
                    return Err(Trouble::Later { why: said, wait });
                }
                Verdict::Taken => search.taken(group),
                Verdict::Refused => search.refused(group),
                Verdict::Denied { perhaps_event } => search.denied(group, perhaps_event),
            };
            let mut taken = Vec::new();
            match found {
                Found::Taken(group) => {
                    (*failures, *probe) = (0, false);
                    self.report("up", Some(to), None, None);
                    taken = group;
                }
                Found::Refused(group) => self.give_up(group, &said).await?,
                Found::Split => {}
                Found::Denied => {
                    self.settled(to, Vec::new(), bytes).await?;
                    return Err(Trouble::Later { why: said, wait });
                }
            }
            self.settled(to, taken, bytes).await?;
            self.give_up(search.shown(), &why).await?;
            why = said;
        }
        if search.undecided() {
            return Err(Trouble::Later { why, wait: None });
        }
        Ok(())
    }

    /// The connection ended, or the answer took too long.
    async fn unanswered(&self, error: Option<ClientError>, group: &[Row], probe: &mut bool) -> Trouble {
        let Some(error) = error else {
            let why = format!("no answer within {} s", ANSWER.as_secs());
            return Trouble::Later { why, wait: None };
        };
        let why = errors::chain(&error);
        // A receiver that dies of something in the batch looks like this; a network that is gone
        // doesn't let a connection be made.
        if matches!(error, ClientError::Wire { .. } | ClientError::Read(_)) {
            *probe = true;
            if let [row] = group {
                let count = self.store.lone_disconnect(row.id).await;
                if count.is_ok_and(|count| count >= LONE_DISCONNECTS_MAX) {
                    let why = format!("connections ended while it was alone in one: {why}");
                    let row = Row { id: row.id, json: Vec::new() };
                    if self.give_up(vec![row], &why).await.is_err() {
                        return Trouble::Stopped;
                    }
                }
            }
        }
        Trouble::Later { why, wait: None }
    }

    /// Takes what was acknowledged out of the outbox, and counts what was sent.
    async fn settled(&self, to: &PostTo, taken: Vec<Row>, bytes: u64) -> Result<(), Trouble> {
        let ids: Vec<DeliveryId> = taken.iter().map(|row| row.id).collect();
        let counts = to.limits.bytes_per_day > 0;
        if ids.is_empty() && !counts {
            return Ok(());
        }
        loop {
            let done = if counts {
                let today = allowance::day(self.clock.wall());
                let counted = self.store.delivered_counting(ids.clone(), Usage::UplinkBytes, today, bytes);
                counted.await.map(drop)
            } else {
                self.store.delivered(ids.clone()).await
            };
            match done {
                Ok(()) => break,
                Err(StoreError::Stopped) => return Err(Trouble::Stopped),
                Err(error) => {
                    tracing::warn!(error = errors::chain(&error), "could not delete deliveries");
                    Timer::after(STORE_REST).await;
                }
            }
        }
        self.metrics.delivered(Target::Uplink.as_str(), ids.len() as u64);
        Ok(())
    }

    async fn give_up(&self, rows: Vec<Row>, why: &str) -> Result<(), Trouble> {
        for row in rows {
            tracing::warn!(delivery = %row.id, reason = why, "a delivery is set aside; `neap deliveries --dead` shows it");
            match self.store.set_aside(row.id, why.to_owned()).await {
                Err(StoreError::Stopped) => return Err(Trouble::Stopped),
                Ok(()) | Err(StoreError::NotFound) => {}
                // It stays owed and comes up again.
                Err(error) => {
                    tracing::warn!(error = errors::chain(&error), "could not set a delivery aside");
                }
            }
        }
        Ok(())
    }

    fn report(&self, state: &str, to: Option<&PostTo>, last_error: Option<String>, wait: Option<Duration>) {
        let before = self.status.get();
        let down = |state: &str| matches!(state, "waiting" | "connecting");
        let same = before.state == state || (down(&before.state) && down(state));
        let url = to.map(|to| {
            let host = &to.receiver.host;
            let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
            // Its query may hold a key.
            let path = to.receiver.target.split('?').next().unwrap_or_default();
            format!("https://{open}{host}{close}:{}{path}", to.receiver.port)
        });
        let status = LinkStatus {
            name: "uplink".to_owned(),
            url: url.unwrap_or_default(),
            state: state.to_owned(),
            since: if same { before.since } else { self.clock.wall() },
            last_error,
            retry_in_ms: wait.map(|wait| wait.as_millis() as u64),
        };
        if *before != status {
            self.status.set(status);
        }
    }
}

/// Reads certificates and credentials, which may be new.
async fn poster(to: &PostTo) -> Result<Poster, OpenError> {
    let receiver = to.receiver.clone();
    smol::unblock(move || {
        let connector = client::connector(&receiver.tls)?;
        let mut headers = vec![
            ("content-type".to_owned(), "application/cloudevents-batch+json; charset=utf-8".to_owned()),
            ("content-encoding".to_owned(), "gzip".to_owned()),
        ];
        let secret =
            |path: &Path| secret(path).map_err(|source| OpenError::Secret { path: path.to_owned(), source });
        if let Some(path) = &receiver.token_file {
            headers.push(("authorization".to_owned(), format!("Bearer {}", secret(path)?)));
        } else if let (Some(name), Some(path)) = (&receiver.username, &receiver.password_file) {
            let pair = STANDARD.encode(format!("{name}:{}", secret(path)?));
            headers.push(("authorization".to_owned(), format!("Basic {pair}")));
        }
        let endpoint = Endpoint::Tls { host: receiver.host, port: receiver.port, connector };
        Ok(Poster::new(endpoint, receiver.target, headers))
    })
    .await
}

/// The file's first line.
fn secret(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(SECRET_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

fn row(delivery: Delivery) -> Row {
    Row { id: delivery.id, json: structured_with_topic(&delivery.body.event, &delivery.body.topic) }
}

fn body(group: &[Row]) -> Vec<u8> {
    // Most of what compression gains, for a third of its time on a small CPU.
    let mut gzip = GzEncoder::new(Vec::new(), Compression::new(4));
    let mut write = |bytes: &[u8]| gzip.write_all(bytes).expect("memory takes what is written");
    for (at, row) in group.iter().enumerate() {
        write(if at == 0 { b"[" } else { b"," });
        write(&row.json);
    }
    write(b"]");
    gzip.finish().expect("memory takes what is written")
}
