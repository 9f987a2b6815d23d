//! The scheduler's loop with instances that a test holds in its hand: what it does while one is
//! being made, when none can be made, and when memory is short.

use crate::support::{TestDir, wait_until};
use neap::channels::{
    CallError, EndFuture, Instances, Invoke, Kept, LogLine, ParkFuture, Parked, Response, RunFuture, Stock,
};
use neap::config::{Buffer, Config, Machine, defaults, manifest};
use neap::ingress::routes::{Deployment, Routes};
use neap::model::{Digest, Event, EventId, FunctionName, Lane, Outcome, Revision, SystemClock, UnixMs};
use neap::scheduler::driver::{Load, Scheduler, Stop};
use neap::scheduler::pressure::Pressure;
use neap::store::{Arrival, NewInvocation, Options, Store};
use neap::telemetry::{logs::FunctionLogs, metrics::Metrics};
use neap::watch::{Wake, Watch};
use smol::channel::{Receiver, Sender};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(30);

#[test]
fn an_event_takes_the_instance_that_is_being_made() {
    let world = World::start("[scale]\nmin = 1");
    wait_until(SOON, "one is being made", || world.hands.making() == 1);

    let answer = world.call();
    wait_until(SOON, "the call runs", || world.load().instances == 1);
    world.hands.make(Ok(()));

    assert!(answer.recv_blocking().expect("an answer").is_ok());
    assert_eq!((world.hands.warm(), world.hands.cold()), (1, 0));
}

#[test]
fn an_event_that_waited_for_one_that_can_not_be_made_gets_its_own() {
    let world = World::start("[scale]\nmin = 1");
    wait_until(SOON, "one is being made", || world.hands.making() == 1);

    let answer = world.call();
    wait_until(SOON, "the call runs", || world.load().instances == 1);
    world.hands.make(Err("no space left".to_owned()));

    assert!(answer.recv_blocking().expect("an answer").is_ok());
    assert_eq!((world.hands.warm(), world.hands.cold()), (0, 1));
}

#[test]
fn an_event_does_not_wait_for_an_instance_of_an_older_revision() {
    let world = World::start("[scale]\nmin = 1");
    wait_until(SOON, "one is being made", || world.hands.making() == 1);
    let answer = world.call();
    wait_until(SOON, "the call runs", || world.load().instances == 1);

    world.routes.set(routes(2, "[scale]\nmin = 0"));

    assert!(answer.recv_blocking().expect("an answer").is_ok());
    assert_eq!(world.hands.cold(), 1);
    world.hands.make(Ok(()));
    wait_until(SOON, "what was made is dropped", || world.hands.alive() == 0);
    assert_eq!(world.load().parked, 0);
}

#[test]
fn what_a_deploy_made_before_its_switch_is_ready_with_it() {
    let world = World::start("[scale]\nmin = 0");
    let name = FunctionName::parse("f").expect("a good name");
    world.stock.put(name.clone(), 2, vec![world.hands.waiting(), world.hands.waiting()]);

    world.routes.set(routes(2, "[scale]\nmin = 2"));
    wait_until(SOON, "both are ready", || world.load().parked == 2);
    assert_eq!(world.hands.making(), 0, "none is made again");
    assert!(world.call().recv_blocking().expect("an answer").is_ok());

    assert_eq!((world.hands.warm(), world.hands.cold()), (1, 0));
    // For a revision that never came: dropped with the next.
    world.hands.let_all_be_made();
    world.stock.put(name, 3, vec![world.hands.waiting()]);
    world.routes.set(routes(4, "[scale]\nmin = 0"));
    wait_until(SOON, "nothing is left", || world.hands.alive() == 0);
    assert_eq!(world.load().parked, 0);
}

#[test]
fn short_memory_empties_the_pool_and_starts_go_on() {
    let world = World::start("[scale]\nmin = 3");
    world.hands.let_all_be_made();
    wait_until(SOON, "three are parked", || world.load().parked == 3);

    world.set_pressure(Pressure::Short);
    wait_until(SOON, "none is", || world.load().parked == 0 && world.hands.alive() == 0);
    assert!(world.call().recv_blocking().expect("an answer").is_ok());
    assert_eq!(world.hands.cold(), 1);
    world.set_pressure(Pressure::Calm);

    wait_until(SOON, "three again", || world.load().parked == 3);
}

#[test]
fn very_short_memory_runs_one_at_a_time_and_refuses_nobody() {
    let world = World::start("[scale]\nmax = 4");
    world.set_pressure(Pressure::Severe);
    world.hands.hold_runs();

    let answers: Vec<_> = (0..4).map(|_| world.call()).collect();
    for n in 1..=4 {
        wait_until(SOON, "one runs", || world.hands.running() == 1);
        wait_until(SOON, "the others wait", || {
            world.load().functions.values().map(|load| load.waiting).sum::<u32>() == 4 - n
        });
        assert_eq!(world.hands.running(), 1);
        world.hands.let_one_end();
    }

    assert!(answers.iter().all(|answer| answer.recv_blocking().expect("an answer").is_ok()));
}

#[test]
fn a_stop_lets_parked_instances_go() {
    let world = World::start("[scale]\nmin = 2");
    world.hands.let_all_be_made();
    wait_until(SOON, "two are parked", || world.load().parked == 2);

    world.stop.set(Stop::Drain);

    wait_until(SOON, "none is", || world.hands.alive() == 0);
}

#[test]
fn instance_that_was_there_before_its_function_is_counted() {
    let kept = [(FunctionName::parse("f").expect("a good name"), 1)].into();

    let world = World::start_with("handler = \"http\"", kept);

    wait_until(SOON, "it is counted", || world.load().instances == 1 && world.load().reserved_bytes > 0);
}

#[test]
fn old_revision_keeps_no_instances_beyond_its_last_call() {
    let scale = "handler = \"http\"\n[scale]\nmin = 1";
    let world = World::start(scale);
    world.hands.hold_runs();
    let answer = world.call();
    wait_until(SOON, "it runs", || world.hands.running() == 1);

    world.routes.set(routes(2, scale));

    wait_until(SOON, "the new one keeps its own", || world.hands.keeps() == [(1, 1), (1, 0), (2, 1)]);
    assert_eq!(world.hands.running(), 1);
    world.hands.let_one_end();
    assert!(answer.recv_blocking().expect("an answer").is_ok());
}

#[test]
fn an_event_is_not_missed_when_something_else_comes_with_it() {
    let world = World::start("");
    let name = FunctionName::parse("f").expect("a good name");
    smol::block_on(world.store.deploy(name, String::new(), "i".into(), None)).expect("a new function");
    let begun = Instant::now();

    for n in 1..=20 {
        world.commit();
        world.stop.set(Stop::Run); // no reason to look
        world.inbox.wake();
        wait_until(SOON, "it runs", || world.hands.cold() == n);
    }

    // The scheduler looks by itself every five seconds.
    assert!(begun.elapsed() < Duration::from_secs(60), "only the clock found them");
}

/// Both ends.
type Channel<T> = (Sender<T>, Receiver<T>);

/// Makes and runs instances when the test says so.
struct Hands {
    made: Channel<Result<(), String>>,
    ends: (Sender<()>, Receiver<()>),
    hold_runs: AtomicUsize,
    counts: Arc<Counts>,
    kept: Watch<Kept>,
    /// What was to be kept, by revision.
    keeps: Mutex<Vec<(u32, u32)>>,
}

#[derive(Default)]
struct Counts {
    making: AtomicUsize,
    alive: AtomicUsize,
    running: AtomicUsize,
    warm: AtomicUsize,
    cold: AtomicUsize,
}

struct Waiting {
    hands: Arc<Hands>,
    used: bool,
}

impl Hands {
    fn new(kept: Kept) -> Arc<Self> {
        let (made, ends) = (smol::channel::unbounded(), smol::channel::unbounded());
        let (kept, keeps) = (Watch::new(kept), Mutex::default());
        Arc::new(Self { made, ends, hold_runs: AtomicUsize::new(0), counts: Arc::default(), kept, keeps })
    }

    fn keeps(&self) -> Vec<(u32, u32)> {
        self.keeps.lock().expect("nobody panics").clone()
    }

    fn make(&self, result: Result<(), String>) {
        self.made.0.try_send(result).expect("unbounded");
    }

    /// As a deploy makes one before its switch.
    fn waiting(self: &Arc<Self>) -> Box<dyn Parked> {
        self.counts.alive.fetch_add(1, Ordering::SeqCst);
        Box::new(Waiting { hands: self.clone(), used: false })
    }

    fn let_all_be_made(&self) {
        (0..1000).for_each(|_| self.make(Ok(())));
    }

    fn hold_runs(&self) {
        self.hold_runs.store(1, Ordering::SeqCst);
    }

    fn let_one_end(&self) {
        let before = self.running();
        self.ends.0.try_send(()).expect("unbounded");
        wait_until(SOON, "it has ended", || self.ends.1.is_empty() && before > 0);
    }

    fn making(&self) -> usize {
        self.counts.making.load(Ordering::SeqCst)
    }

    fn alive(&self) -> usize {
        self.counts.alive.load(Ordering::SeqCst)
    }

    fn running(&self) -> usize {
        self.counts.running.load(Ordering::SeqCst)
    }

    fn warm(&self) -> usize {
        self.counts.warm.load(Ordering::SeqCst)
    }

    fn cold(&self) -> usize {
        self.counts.cold.load(Ordering::SeqCst)
    }

    async fn execute(&self) -> Outcome {
        self.counts.running.fetch_add(1, Ordering::SeqCst);
        if self.hold_runs.load(Ordering::SeqCst) == 1 {
            let _ = self.ends.1.recv().await;
        }
        self.counts.running.fetch_sub(1, Ordering::SeqCst);
        Outcome::Succeeded { output: Vec::new(), content_type: None, event: None, took: Duration::ZERO }
    }
}

struct Node(Arc<Hands>);

impl Instances for Node {
    fn run<'a>(&'a self, _: &'a Revision, _: &'a Event, _: &'a LogLine) -> RunFuture<'a> {
        self.0.counts.cold.fetch_add(1, Ordering::SeqCst);
        Box::pin(self.0.execute())
    }

    fn park<'a>(&'a self, _: &'a Revision) -> ParkFuture<'a> {
        Box::pin(async {
            self.0.counts.making.fetch_add(1, Ordering::SeqCst);
            let made = self.0.made.1.recv().await.expect("the test lives");
            self.0.counts.making.fetch_sub(1, Ordering::SeqCst);
            made?;
            self.0.counts.alive.fetch_add(1, Ordering::SeqCst);
            Ok(Box::new(Waiting { hands: self.0.clone(), used: false }) as Box<dyn Parked>)
        })
    }

    fn kept(&self) -> Watch<Kept> {
        self.0.kept.clone()
    }

    fn keep(&self, revision: &Revision, count: u32) {
        self.0.keeps.lock().expect("nobody panics").push((revision.number, count));
    }

    fn retire(&self, _: &Revision) {}
}

impl Parked for Waiting {
    fn run<'a>(mut self: Box<Self>, _: &'a Revision, _: &'a Event, _: &'a LogLine) -> RunFuture<'a> {
        Box::pin(async move {
            self.used = true;
            self.hands.counts.warm.fetch_add(1, Ordering::SeqCst);
            self.hands.execute().await
        })
    }

    fn ended(&self) -> EndFuture {
        Box::pin(std::future::pending())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.hands.counts.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

struct World {
    hands: Arc<Hands>,
    store: Store,
    calls: Sender<Invoke>,
    routes: Watch<Routes>,
    load: Watch<Load>,
    pressure: Watch<Pressure>,
    stock: Stock,
    stop: Watch<Stop>,
    inbox: Wake,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    _dir: TestDir,
}

impl World {
    fn start(scale: &str) -> Self {
        Self::start_with(scale, Kept::new())
    }

    fn start_with(scale: &str, kept: Kept) -> Self {
        let dir = TestDir::new("scheduler");
        let hands = Hands::new(kept);
        let (calls, receiver) = smol::channel::bounded(64);
        let clock = Arc::new(SystemClock::new());
        let (store, _) = Store::open(Options {
            path: dir.join("neap.db"),
            buffer: Buffer { bytes_max: 16 << 20, ..defaults::buffer() },
            clock: clock.clone(),
        })
        .expect("open a store");
        let executor = Arc::new(smol::Executor::new());
        let world = Self {
            hands: hands.clone(),
            store: store.clone(),
            calls,
            routes: Watch::new(routes(1, scale)),
            load: Watch::new(Load::default()),
            pressure: Watch::new(Pressure::Calm),
            stock: Stock::default(),
            stop: Watch::new(Stop::Run),
            inbox: Wake::new(),
            thread: Mutex::default(),
            _dir: dir,
        };
        let scheduler = Scheduler {
            store: store.clone(),
            instances: Arc::new(Node(hands)),
            routes: world.routes.clone(),
            calls: receiver,
            inbox: world.inbox.clone(),
            outbox: Wake::new(),
            logs: FunctionLogs::open(&world._dir.join("run")).expect("open the logs"),
            metrics: Metrics::default(),
            clock,
            executor: executor.clone(),
            budget_bytes: 1 << 30,
            parked_max: 100,
            pressure: world.pressure.clone(),
            load: world.load.clone(),
            gates: Arc::default(),
            trials: Default::default(),
            stock: world.stock.clone(),
            stop: world.stop.clone(),
        };
        let run = move || {
            smol::block_on(executor.run(async {
                scheduler.run().await;
                store.close().await;
            }));
        };
        *world.thread.lock().expect("nobody panics") = Some(std::thread::spawn(run));
        world
    }

    fn call(&self) -> Receiver<Result<Response, CallError>> {
        let (reply, answer) = neap::channels::reply();
        let event = event(1);
        let function = FunctionName::parse("f").expect("a good name");
        self.calls
            .send_blocking(Invoke { function, event, passing: None, reply })
            .expect("the scheduler runs");
        answer
    }

    /// An event for the function, on disk; nobody is told.
    fn commit(&self) {
        let function = FunctionName::parse("f").expect("a good name");
        let invocation =
            NewInvocation { function, lane: Lane::Normal, expires: None, once: None, dead: None };
        let event = event(fastrand::u8(..));
        let arrival = Arrival { invocations: vec![invocation], ..Arrival::of(event) };
        smol::block_on(self.store.accept(arrival)).expect("room for it");
    }

    fn load(&self) -> Load {
        (*self.load.get()).clone()
    }

    fn set_pressure(&self, pressure: Pressure) {
        self.pressure.set(pressure);
        self.inbox.wake();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.set(Stop::Abandon);
        self.hands.ends.0.close();
        if let Some(thread) = self.thread.lock().expect("nobody panics").take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the scheduler panicked");
        }
    }
}

fn event(id: u8) -> Event {
    Event {
        id: EventId::from_random([id; 16]),
        source: "/test".to_owned(),
        kind: "test".to_owned(),
        subject: None,
        time: None,
        content_type: None,
        extensions: BTreeMap::new(),
        http: None,
        data: Vec::new(),
    }
}

fn routes(revision: u32, scale: &str) -> Routes {
    let text = format!("name = \"f\"\nimage = \"i\"\n{scale}\n");
    let config = Config::defaults(&Machine::default());
    let manifest = manifest::parse("f.toml", &text, &config).expect("a good manifest");
    let name = manifest.name.clone();
    let image = Digest::from_sha256(&[0; 32]);
    let deployment = Deployment {
        revision: Arc::new(Revision { number: revision, manifest, image, uid_base: 0 }),
        paused: false,
        file: None,
        created: UnixMs(0),
        unusable: None,
    };
    Routes { functions: [(name, deployment)].into(), node: "test".to_owned(), ..Routes::default() }
}
