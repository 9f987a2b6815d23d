//! Links, ingress and store of a node, without the rest of it: what arrives is looked up in
//! the store, what is owed is put there.

use crate::support::{TestDir, wait_for, wait_until};
use neap::channels::IncomingChannels;
use neap::config::{Broker, ClientTls, Format, Forward, MqttVersion, Order as SendOrder, UplinkLimits};
use neap::ingress::mqtt::Ingress;
use neap::ingress::routes::{Deployment, Routes};
use neap::model::api::LinkStatus;
use neap::model::function::{
    Handler, Limits, Manifest, MqttTrigger, Platform, Retained, Retry, Revision, Scale, ScaleMin, Trigger,
};
use neap::model::{
    Clock, Digest, Event, EventId, FunctionName, Lane, NewDelivery, Reference, SystemClock, Target,
    TopicFilter, TopicTemplate, UnixMs,
};
use neap::store::{self, InvocationFilter, InvocationRow, Store};
use neap::sync::driver::{Endpoint, Link, status_off};
use neap::telemetry::metrics::Metrics;
use neap::watch::{Wake, Watch};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub const SOON: Duration = Duration::from_secs(20);

/// Finding the delivery that a broker hangs up on takes half a dozen connections, each after a
/// wait that doubles: 3 to 13 s by jitter alone.
const DRAINED: Duration = Duration::from_secs(90);

/// Stops with its drop, as a daemon would.
pub struct Gateway {
    pub store: Store,
    pub routes: Watch<Routes>,
    pub local: Watch<LinkStatus>,
    pub uplink: Watch<LinkStatus>,
    owed: Wake,
    stop: Watch<bool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Where a gateway's links go and what it is subscribed to.
#[derive(Default)]
pub struct Setup {
    pub local: Option<Broker>,
    pub uplink: Option<Broker>,
    pub raw: bool,
    pub bytes_max: Option<u64>,
    pub functions: Vec<Manifest>,
    pub forwards: Vec<(&'static str, &'static str)>,
    pub ahead: Ahead,
    pub order: Order,
    pub limits: UplinkLimits,
}

/// In which order the uplink sends; `fifo` unless a test is about another.
#[derive(Default)]
pub enum Order {
    #[default]
    Fifo,
    LiveFirst,
}

/// How far the links' clock is ahead of the machine's: waits end when the test says so.
#[derive(Clone, Default)]
pub struct Ahead {
    monotonic_ms: Arc<AtomicU64>,
    /// What the wall clock shows, standing still; 0: the machine's own.
    wall_ms: Arc<AtomicU64>,
}

impl Ahead {
    pub fn advance(&self, by: Duration) {
        self.monotonic_ms.fetch_add(by.as_millis() as u64, Ordering::SeqCst);
    }

    /// The wall clock stands at this hour of this day.
    pub fn set_wall(&self, day: u64, hour: u64) {
        self.wall_ms.store((day * 24 + hour) * 3_600_000, Ordering::SeqCst);
    }
}

struct MovedClock(SystemClock, Ahead);

impl Clock for MovedClock {
    fn wall(&self) -> UnixMs {
        match self.1.wall_ms.load(Ordering::SeqCst) {
            0 => self.0.wall(),
            wall_ms => UnixMs(wall_ms as i64),
        }
    }

    fn monotonic(&self) -> Duration {
        self.0.monotonic() + Duration::from_millis(self.1.monotonic_ms.load(Ordering::SeqCst))
    }
}

impl Gateway {
    pub fn start(dir: &TestDir, setup: Setup) -> Self {
        let clock = Arc::new(MovedClock(SystemClock::new(), setup.ahead.clone()));
        let options = store::Options {
            path: dir.join("neap.db"),
            buffer: neap::config::Buffer {
                bytes_max: setup.bytes_max.unwrap_or(256 << 20),
                ..neap::config::defaults::buffer()
            },
            clock: clock.clone(),
        };
        let (store, _) = Store::open(options).expect("open the store");
        let routes = Watch::new(routes(&setup.functions, &setup.forwards));
        smol::block_on(async {
            for function in &setup.functions {
                let deployed = store.deploy(function.name.clone(), String::new(), String::new(), None);
                deployed.await.expect("deploy");
            }
        });
        let (stop, owed) = (Watch::new(false), Wake::new());
        let executor = Arc::new(smol::Executor::new());
        let mut tasks = Vec::new();
        let mut watches = Vec::new();
        for (target, broker) in [(Target::Local, setup.local), (Target::Uplink, setup.uplink)] {
            let channels = IncomingChannels::new();
            let format = if setup.raw { Format::Raw } else { Format::Auto };
            let status = Watch::new(status_off(target, &*clock));
            watches.push(status.clone());
            let link = Link {
                target,
                endpoint: Watch::new(broker.map(|broker| Endpoint {
                    broker,
                    format,
                    order: match setup.order {
                        Order::Fifo => SendOrder::Fifo,
                        Order::LiveFirst => SendOrder::LiveFirst,
                    },
                    live_percent: 80,
                    limits: setup.limits,
                })),
                store: store.clone(),
                routes: routes.clone(),
                owed: owed.clone(),
                incoming: channels.incoming.0,
                acks: channels.acks.1,
                room: channels.room,
                status,
                metrics: Metrics::default(),
                clock: clock.clone(),
                stop: stop.clone(),
            };
            let ingress = Ingress {
                target,
                incoming: channels.incoming.1,
                acks: channels.acks.0,
                store: store.clone(),
                routes: routes.clone(),
                due: Wake::new(),
                owed: owed.clone(),
                metrics: Metrics::default(),
                clock: clock.clone(),
            };
            tasks.push(executor.spawn(link.run()));
            tasks.push(executor.spawn(ingress.run()));
        }
        let closing = store.clone();
        let thread = std::thread::spawn(move || {
            smol::block_on(executor.run(async {
                for task in tasks {
                    task.await;
                }
                closing.close().await;
            }));
        });
        let uplink = watches.pop().expect("two links");
        let local = watches.pop().expect("two links");
        Self { store, routes, local, uplink, owed, stop, thread: Some(thread) }
    }

    pub fn deploy(&self, functions: &[Manifest]) {
        self.routes.set(routes(functions, &[]));
    }

    #[track_caller]
    pub fn wait_up(&self, target: Target) {
        let status = if target == Target::Local { &self.local } else { &self.uplink };
        wait_until(SOON, "the link is up", || status.get().state == "up");
    }

    /// The events that arrived, oldest first, data included.
    pub fn events(&self) -> Vec<InvocationRow> {
        smol::block_on(async {
            let filter = InvocationFilter { limit: 10_000, ..InvocationFilter::default() };
            let rows = self.store.invocations(filter).await.expect("list events");
            let mut rows = rows.into_iter().collect::<Result<Vec<_>, _>>().expect("none is damaged");
            rows.sort_by_key(|row| row.id);
            for row in &mut rows {
                let found = self.store.event(row.event.id.as_str().to_owned()).await.expect("an event");
                row.event.data.clone_from(&found[0].event.data);
            }
            rows
        })
    }

    pub fn arrived(&self) -> usize {
        let filter = InvocationFilter { limit: 10_000, ..InvocationFilter::default() };
        smol::block_on(self.store.invocations(filter)).expect("list events").len()
    }

    #[track_caller]
    pub fn wait_events(&self, count: usize) -> Vec<InvocationRow> {
        wait_until(SOON, &format!("{count} events"), || self.arrived() >= count);
        self.events()
    }

    pub fn owe(&self, target: Target, topic: &str, data: &[u8], content_type: Option<&str>) {
        let delivery = NewDelivery {
            target,
            lane: Lane::Normal,
            function: Some(FunctionName::parse("f").expect("a good name")),
            topic: topic.to_owned(),
            event: Event {
                id: EventId::from_random(fastrand::u128(..).to_ne_bytes()),
                source: "/gw/function/f".to_owned(),
                kind: "neap.function.output".to_owned(),
                subject: Some("a/b".to_owned()),
                time: Some(UnixMs(0)),
                content_type: content_type.map(str::to_owned),
                extensions: [("seq".to_owned(), "7".to_owned())].into(),
                http: None,
                data: data.to_vec(),
            },
        };
        smol::block_on(self.store.owe(vec![delivery], Vec::new())).expect("owe a delivery");
        self.owed.wake();
    }

    /// The outbox is looked at now, not after its period.
    pub fn look(&self) {
        self.owed.wake();
    }

    pub fn owed(&self, target: Target) -> u64 {
        let counts = smol::block_on(self.store.counts()).expect("count");
        if target == Target::Local { counts.owed_local } else { counts.owed_uplink }
    }

    #[track_caller]
    pub fn wait_drained(&self, target: Target) {
        wait_until(DRAINED, "the outbox is empty", || self.owed(target) == 0);
    }

    /// Topic and reason of the first dead delivery.
    #[track_caller]
    pub fn wait_dead_delivery(&self) -> (String, String) {
        wait_for(SOON, "a dead delivery", || {
            let rows = smol::block_on(self.store.deliveries(true, None, 10)).expect("list deliveries");
            let row = rows.into_iter().next()?.expect("it is not damaged");
            Some((row.body.topic, row.dead.unwrap_or_default()))
        })
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.stop.set(true);
        if std::thread::panicking() {
            return; // what the test found may be that they stand still
        }
        // The links end, and with them the channels of the ingresses.
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok(), "the links panicked");
        }
    }
}

pub fn broker(port: u16, client_id: &str) -> Broker {
    Broker {
        host: "127.0.0.1".to_owned(),
        port,
        tls: None,
        version: MqttVersion::Auto,
        client_id: client_id.to_owned(),
        username: None,
        password_file: None,
    }
}

pub fn tls(ca: &std::path::Path) -> ClientTls {
    ClientTls { ca: Some(ca.to_owned()), ..ClientTls::default() }
}

/// A function with one MQTT trigger on the local broker.
pub fn function(name: &str, filter: &str) -> Manifest {
    function_with(name, filter, |_| {})
}

pub fn function_with(name: &str, filter: &str, change: impl FnOnce(&mut MqttTrigger)) -> Manifest {
    let mut trigger = MqttTrigger {
        filter: TopicFilter::parse(filter).expect("a good filter"),
        qos: 1,
        from: Target::Local,
        expires: None,
        retained: Retained::New,
    };
    change(&mut trigger);
    Manifest {
        name: FunctionName::parse(name).expect("a good name"),
        image: Reference::parse("f:1").expect("a good reference"),
        pull: neap::model::function::Pull::Missing,
        rollback: neap::model::function::Rollback::Off,
        handler: Handler::Stdio,
        platform: Platform::None,
        serving: neap::config::defaults::serving(),
        priority: Lane::Normal,
        command: None,
        env: Default::default(),
        limits: Limits {
            memory_bytes: 64 << 20,
            cpu_millis: 500,
            pids: 64,
            timeout: Duration::from_secs(30),
            payload_bytes: 100_000,
            disk_bytes: 16 << 20,
        },
        scale: Scale { min: ScaleMin::Fixed(0), max: 1, copies: 1 },
        retry: Retry {
            attempts: 1,
            backoff: Duration::from_secs(1),
            backoff_max: Duration::from_secs(1),
            codes: None,
        },
        permissions: Default::default(),
        rate: None,
        triggers: vec![Trigger::Mqtt(trigger)],
        outputs: Vec::new(),
        marks: Default::default(),
    }
}

fn routes(functions: &[Manifest], forwards: &[(&str, &str)]) -> Routes {
    let deployment = |manifest: &Manifest| Deployment {
        revision: Arc::new(Revision {
            number: 1,
            manifest: manifest.clone(),
            image: Digest::parse(&format!("sha256:{}", "0".repeat(64))).expect("a good digest"),
            uid_base: 0,
        }),
        paused: false,
        file: None,
        created: UnixMs(0),
        unusable: None,
    };
    Routes {
        functions: functions.iter().map(|m| (m.name.clone(), deployment(m))).collect(),
        forwards: forwards
            .iter()
            .map(|(filter, topic)| Forward {
                filter: TopicFilter::parse(filter).expect("a good filter"),
                topic: TopicTemplate::parse(topic).expect("a good topic"),
            })
            .collect(),
        node: "gw".to_owned(),
        uplink_topic: None,
    }
}
