//! Outbox → callbacks: the results of asynchronous calls, each POSTed to the URL that its caller
//! gave. `sync::turns` says which go now.
//!
//! 2xx takes one out of the outbox. 408, 425, 429, what is no 4xx, and connections that break are
//! tried again, as the function's `[retry]` says (attempts, backoff; Retry-After is respected); any
//! other 4xx, and one attempt too many, sets it aside among the dead deliveries. A redirect is not
//! followed.
//!
//! What says more of this node than of the receiver counts as no attempt: without a network, or
//! while nothing is reached and the uplink is down as well, results wait for as long as that takes.

use crate::backoff::Backoff;
use crate::config::{ClientTls, defaults};
use crate::errors;
use crate::ingress::routes::Routes;
use crate::model::callback::CallbackUrl;
use crate::model::function::Retry;
use crate::model::{Clock, Delivery, DeliveryId, Target};
use crate::net::http::{Body, Client, ClientError, Endpoint, Request};
use crate::net::tls::client;
use crate::store::{Owed, OwedOrder, Position, Store, StoreError};
use crate::sync::receipt::{Verdict, retry_after, verdict};
use crate::sync::turns::{IN_FLIGHT_MAX, Turns};
use crate::telemetry::metrics::Metrics;
use crate::watch::{Wake, Watch};
use futures_lite::future::or;
use smol::Timer;
use smol::channel::{Receiver, Sender};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// From the connection to the answer's head.
const ANSWER: Duration = Duration::from_secs(30);
/// The outbox is looked at this often without being woken.
const LOOK: Duration = Duration::from_secs(5);
const STORE_REST: Duration = Duration::from_secs(1);
/// Rows of one look, and bytes of their data.
const PAGE: u32 = 32;
const PAGE_BYTES: u64 = 1 << 20;

/// What it is made of. Every field is a handle.
pub struct Callbacks {
    pub store: Store,
    pub routes: Watch<Routes>,
    /// Woken when there may be new deliveries; looked at every 5 s besides.
    pub owed: Wake,
    pub metrics: Metrics,
    pub clock: Arc<dyn Clock>,
    pub executor: Arc<smol::Executor<'static>>,
    /// There is an uplink, and it is not up.
    pub offline: Arc<dyn Fn() -> bool + Send + Sync>,
    /// True: end; what is under way goes again at the next start.
    pub stop: Watch<bool>,
}

/// One that came to its end.
struct Done {
    id: DeliveryId,
    receiver: String,
    /// It failed.
    rest: Option<Duration>,
}

/// What one attempt came to.
enum Outcome {
    Taken,
    Refused(String),
    Again { why: String, wait: Option<Duration>, reached: Reached },
}

/// How far an attempt came that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached {
    /// There was somebody.
    Receiver,
    /// Nobody was there, or nobody could be asked: it may be their end or ours.
    Nobody,
    /// There is no network.
    NoNetwork,
}

impl Reached {
    fn counts(self, offline: bool) -> bool {
        match self {
            Self::Receiver => true,
            Self::Nobody => !offline,
            Self::NoNetwork => false,
        }
    }
}

fn reached(error: &ClientError) -> Reached {
    use std::io::ErrorKind;
    let ClientError::Connect { source, .. } = error else { return Reached::Receiver };
    match source.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Reached::Receiver,
        ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown => Reached::NoNetwork,
        // A name server that gave no answer (EAI_AGAIN, in the words of glibc and of musl) has no
        // kind of its own.
        _ if ["Temporary failure in name resolution", "Try again"]
            .iter()
            .any(|words| source.to_string().ends_with(words)) =>
        {
            Reached::NoNetwork
        }
        _ => Reached::Nobody,
    }
}

impl Callbacks {
    /// Runs until `stop` is true.
    pub async fn run(self) {
        let stopped = async {
            let (mut seen, mut stop) = self.stop.versioned();
            while !*stop {
                (seen, stop) = self.stop.changed(seen).await;
            }
        };
        or(stopped, self.serve()).await;
    }

    /// Ends when the store has stopped.
    async fn serve(&self) {
        let mut turns = Turns::default();
        // Dropped with this: nothing goes on behind a stop.
        let mut under_way: BTreeMap<DeliveryId, smol::Task<()>> = BTreeMap::new();
        let (sender, ended): (Sender<Done>, Receiver<Done>) = smol::channel::bounded(IN_FLIGHT_MAX);
        // Kept until it fires: a wake that comes together with something else is not lost.
        let mut owed = self.owed.listen();
        let mut looked = self.clock.monotonic();
        loop {
            while let Ok(done) = ended.try_recv() {
                under_way.remove(&done.id);
                turns.done(number(done.id), &done.receiver, done.rest, self.clock.monotonic());
            }
            match self.sweep(&mut turns, &mut under_way, &sender).await {
                Ok(()) => {}
                Err(StoreError::Stopped) => return,
                Err(error) => {
                    tracing::warn!(error = errors::chain(&error), "could not read the outbox");
                    turns.broke_off();
                    Timer::after(STORE_REST).await;
                    continue;
                }
            }
            let now = self.clock.monotonic();
            let look_in = LOOK.saturating_sub(now.saturating_sub(looked));
            let due = turns.next_due(now).unwrap_or(look_in).min(look_in);
            let woken = async {
                (&mut owed).await;
                (true, None)
            };
            let look = async {
                Timer::after(due).await;
                (false, None)
            };
            let one = async { (false, ended.recv().await.ok()) };
            let (woken, done) = or(or(one, woken), look).await;
            if woken {
                owed = self.owed.listen();
            }
            let now = self.clock.monotonic();
            if woken || now.saturating_sub(looked) >= LOOK {
                looked = now;
                turns.wake();
            }
            if let Some(done) = done {
                under_way.remove(&done.id);
                turns.done(number(done.id), &done.receiver, done.rest, now);
            }
        }
    }

    async fn sweep(
        &self,
        turns: &mut Turns,
        under_way: &mut BTreeMap<DeliveryId, smol::Task<()>>,
        ended: &Sender<Done>,
    ) -> Result<(), StoreError> {
        let now = self.clock.monotonic();
        let Some(mut sweep) = turns.begin(now) else { return Ok(()) };
        while turns.goes_on(&mut sweep, now) {
            let what = Owed {
                target: Target::Callback,
                after: Position::behind(sweep.after),
                upto: None,
                order: OwedOrder::Arrival,
                limit: PAGE,
                bytes_max: PAGE_BYTES,
            };
            let page = self.store.owed(what).await?;
            if page.is_empty() {
                turns.ended();
                break;
            }
            for delivery in page {
                let receiver = receiver(&delivery);
                let bytes = delivery.body.event.data.len() as u64;
                if turns.next(&mut sweep, (number(delivery.id), bytes), &receiver, now) {
                    let failures = turns.failures(&receiver);
                    let id = delivery.id;
                    let attempt = self.attempt(delivery, receiver, failures, ended.clone());
                    under_way.insert(id, self.executor.spawn(attempt));
                }
            }
        }
        Ok(())
    }

    fn attempt(
        &self,
        delivery: Delivery,
        receiver: String,
        failures: u32,
        ended: Sender<Done>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let (store, metrics, clock) = (self.store.clone(), self.metrics.clone(), self.clock.clone());
        let offline = self.offline.clone();
        let retry = delivery.body.function.as_ref().and_then(|name| {
            self.routes.get().functions.get(name).map(|deployment| deployment.revision.manifest.retry.clone())
        });
        let retry = retry.unwrap_or_else(defaults::retry);
        async move {
            let id = delivery.id;
            let late = async {
                Timer::after(ANSWER).await;
                let why = format!("no answer within {} s", ANSWER.as_secs());
                Outcome::Again { why, wait: None, reached: Reached::Nobody }
            };
            let outcome = or(post(delivery, &*clock), late).await;
            let rest = match outcome {
                Outcome::Taken => {
                    settled(|| store.delivered(vec![id])).await;
                    metrics.delivered(Target::Callback.as_str(), 1);
                    None
                }
                Outcome::Refused(why) => {
                    set_aside(&store, id, &why).await;
                    None
                }
                Outcome::Again { why, wait, reached } => {
                    if reached.counts(offline()) {
                        failed(&store, id, &why, &retry).await;
                    } else {
                        tracing::info!(delivery = %id, error = why, "a callback waits, the node is offline");
                    }
                    let backoff = Backoff { first: retry.backoff, max: retry.backoff_max };
                    let backoff = backoff.delay(failures.saturating_add(1), fastrand::u64(..));
                    Some(backoff.max(wait.unwrap_or_default()))
                }
            };
            let _ = ended.send(Done { id, receiver, rest }).await; // the other end stops first at a stop
        }
    }
}

/// Counts one more attempt; sets it aside when that was the last.
async fn failed(store: &Store, id: DeliveryId, why: &str, retry: &Retry) {
    match store.lone_disconnect(id).await {
        Ok(attempts) if attempts >= retry.attempts => set_aside(store, id, why).await,
        Ok(attempts) => {
            tracing::info!(delivery = %id, attempts, error = why, "a callback failed; it is tried again")
        }
        Err(error) => tracing::warn!(error = errors::chain(&error), "could not count an attempt"),
    }
}

async fn set_aside(store: &Store, id: DeliveryId, why: &str) {
    tracing::warn!(delivery = %id, reason = why, "a callback is set aside; `neap deliveries --dead` shows it");
    settled(|| store.set_aside(id, why.to_owned())).await;
}

/// Until it is done; what is gone already needs no more.
async fn settled<F: Future<Output = Result<(), StoreError>>>(work: impl Fn() -> F) {
    loop {
        match work().await {
            Ok(()) | Err(StoreError::NotFound | StoreError::Stopped) => return,
            Err(error) => {
                tracing::warn!(error = errors::chain(&error), "could not settle a callback");
                Timer::after(STORE_REST).await;
            }
        }
    }
}

async fn post(delivery: Delivery, clock: &dyn Clock) -> Outcome {
    let url = match CallbackUrl::parse(&delivery.body.topic) {
        Ok(url) => url,
        Err(why) => return Outcome::Refused(why),
    };
    let event = delivery.body.event;
    let mut request = Request::new("POST", url.target.clone());
    for (name, value) in event.http.map(|http| http.headers).unwrap_or_default() {
        request = request.header(&name, &value);
    }
    if let Some(kind) = event.content_type.filter(|kind| kind.bytes().all(|b| (b' '..=b'~').contains(&b))) {
        request = request.header("content-type", &kind);
    }
    let endpoint = match endpoint(url).await {
        Ok(endpoint) => endpoint,
        Err(error) => {
            let why = errors::chain(&error);
            return Outcome::Again { why, wait: None, reached: Reached::Receiver };
        }
    };
    match Client::new(endpoint, None).send(request.body(Body::Bytes(event.data))).await {
        Ok(answer) => {
            let why = format!("the receiver answered {}", answer.status);
            match (verdict(answer.status), answer.status) {
                (Verdict::Taken, _) => Outcome::Taken,
                (Verdict::Again, _) => {
                    let wait = answer.header("retry-after");
                    let wait = wait.and_then(|wait| retry_after(wait, clock.wall().0));
                    Outcome::Again { why, wait, reached: Reached::Receiver }
                }
                (Verdict::Denied { .. } | Verdict::Refused, _) => Outcome::Refused(why),
            }
        }
        // It never left this node, and never will.
        Err(error @ ClientError::Request(_)) => Outcome::Refused(errors::chain(&error)),
        Err(error) => Outcome::Again { why: errors::chain(&error), wait: None, reached: reached(&error) },
    }
}

async fn endpoint(url: CallbackUrl) -> Result<Endpoint, client::ClientTlsError> {
    let CallbackUrl { tls, host, port, .. } = url;
    if !tls {
        return Ok(Endpoint::Tcp { host, port });
    }
    let connector = smol::unblock(|| client::connector(&ClientTls::default())).await?;
    Ok(Endpoint::Tls { host, port, connector })
}

/// Scheme, host and port: what answers together fails together.
fn receiver(delivery: &Delivery) -> String {
    delivery.body.topic.splitn(4, '/').take(3).collect::<Vec<_>>().join("/")
}

fn number(id: DeliveryId) -> i64 {
    id.0 >> 3
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn only_what_the_receiver_had_a_part_in_counts_against_it() {
        let connect = |source| ClientError::Connect { endpoint: "e".to_owned(), source };
        let of = |source: io::Error| reached(&connect(source));

        assert_eq!(of(io::ErrorKind::ConnectionRefused.into()), Reached::Receiver);
        assert_eq!(of(io::ErrorKind::TimedOut.into()), Reached::Nobody);
        assert_eq!(of(io::ErrorKind::HostUnreachable.into()), Reached::Nobody);
        assert_eq!(of(io::Error::from_raw_os_error(101)), Reached::NoNetwork, "ENETUNREACH");
        for (words, expected) in [
            (
                "failed to lookup address information: Temporary failure in name resolution",
                Reached::NoNetwork,
            ),
            ("failed to lookup address information: Try again", Reached::NoNetwork),
            ("failed to lookup address information: Name or service not known", Reached::Nobody),
        ] {
            assert_eq!(of(io::Error::other(words)), expected, "{words}");
        }
        assert_eq!(reached(&ClientError::TooLarge(1)), Reached::Receiver);

        let counts = |reached: Reached| [false, true].map(|offline| reached.counts(offline));
        assert_eq!(counts(Reached::Receiver), [true, true]);
        assert_eq!(counts(Reached::Nobody), [true, false]);
        assert_eq!(counts(Reached::NoNetwork), [false, false]);
    }
}
