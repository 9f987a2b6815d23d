//! Figures, not laws: `cargo test --lib store::tests::measure -- --ignored --nocapture`.

use super::*;
use std::time::Instant;

/// Accepts `each` events of 1 KiB by each of `callers`; events per second.
fn rate(fixture: &Fixture, callers: usize, each: usize) -> f64 {
    let start = Instant::now();
    let executor = smol::LocalExecutor::new();
    wait(executor.run(async {
        let tasks: Vec<_> = (0..callers)
            .map(|caller| {
                let store = fixture.store.clone();
                executor.spawn(async move {
                    for n in 0..each {
                        let mut arrival = arrival(&format!("c{caller}n{n}"), &["f"]);
                        arrival.event.data = vec![7; 1024];
                        store.accept(arrival).await.expect("accepts");
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
    }));
    (callers * each) as f64 / start.elapsed().as_secs_f64()
}

fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = run();
    println!("{what}: {:?}", start.elapsed());
    result
}

/// The best of many: what it costs when nobody else wants the processor.
fn best<T>(what: &str, mut run: impl FnMut() -> T) {
    let times = (0..100).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed()
    });
    println!("{what}: {:?}", times.min().unwrap_or_default());
}

fn status(key: &str) -> String {
    let status = std::fs::read_to_string("/proc/self/status").expect("reads");
    let line = status.lines().find(|line| line.starts_with(key)).unwrap_or("");
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn written() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").expect("reads");
    let line = io.lines().find(|line| line.starts_with("write_bytes")).expect("a counter");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
#[ignore = "a measurement"]
fn accepts_per_second() {
    for (callers, each) in [(1, 3_000), (8, 2_000), (64, 500)] {
        let fixture = Fixture::with(1 << 30);
        fixture.deploy("f");
        let before = written();
        let rate = rate(&fixture, callers, each);
        let bytes = (written() - before) / (callers * each) as u64;
        println!("{callers} callers: {rate:.0} accepts/s, {bytes} bytes to disk each; {}", status("VmRSS"));
    }
}

#[test]
#[ignore = "a measurement"]
fn way_of_small_events_from_accept_to_delete() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    let (before, start) = (written(), Instant::now());
    let events = 20_000;
    let executor = smol::LocalExecutor::new();
    wait(executor.run(async {
        let tasks: Vec<_> = (0..64)
            .map(|caller| {
                let store = fixture.store.clone();
                executor.spawn(async move {
                    for n in 0..events / 64 {
                        let mut arrival = arrival(&format!("c{caller}n{n}"), &["f"]);
                        arrival.event.data = vec![7; 256];
                        store.accept(arrival).await.expect("accepts");
                        let leased = store.lease(vec![(function("f"), 1)]).await.expect("leases");
                        for leased in leased {
                            let body = NewDelivery { event: leased.event, ..delivery("d", Target::Uplink) };
                            store.settle(leased.id, done(vec![body])).await.expect("settles");
                        }
                        let owed = store.owed(Owed { limit: 1, ..all(Target::Uplink) }).await.expect("reads");
                        store.delivered(owed.iter().map(|d| d.id).collect()).await.expect("deletes");
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
    }));
    let bytes = (written() - before) / events;
    println!("{:.0} events/s, {bytes} bytes to disk each", events as f64 / start.elapsed().as_secs_f64());
}

#[test]
#[ignore = "a measurement; takes minutes"]
fn million_waiting_events() {
    let fixture = Fixture::with(8 << 30);
    fixture.deploy("f");
    println!("empty: {}", status("VmRSS"));
    for tenth in 1..=10 {
        let rate = rate(&fixture, 250, 400);
        println!("{tenth}00,000: {rate:.0} accepts/s; {}", status("VmRSS"));
    }
    best("counts", || fixture.counts());
    best("due", || wait(fixture.store.due()).expect("reads"));
    let leased = timed("lease", || fixture.lease("f")).expect("leased");
    timed("settle", || fixture.settle(leased.id, done(vec![delivery("d", Target::Uplink)])));
    timed("search an id that is nowhere", || wait(fixture.store.event("nowhere".into())).expect("reads"));
    println!("after: {}", status("VmRSS"));
    let Fixture { folder, clock, store } = fixture;
    drop(store);
    let path = folder.path().join("neap.db");
    let (store, _) = timed("open after a kill", || open_with(&path, &clock, 8 << 30));
    let fixture = Fixture { folder, clock, store };
    for n in 0..1000 {
        let deliveries = (0..1000).map(|m| delivery(&format!("d{n}m{m}"), Target::Local)).collect();
        wait(fixture.store.owe(deliveries, vec![])).expect("owes");
    }
    wait(fixture.store.owe(vec![delivery("u", Target::Uplink)], vec![])).expect("owes");
    let behind = timed("owed behind a million", || wait(fixture.store.owed(all(Target::Uplink))));
    assert_eq!(behind.expect("reads").len(), 2);
    best("counts", || fixture.counts());
    let gone = timed("remove the function", || wait(fixture.store.remove(function("f"))));
    println!("{gone:?} gone, and out of sight");
    timed("next request while it is swept", || wait(fixture.store.due()).expect("reads"));
    timed("swept", || while fixture.counts().oldest.is_some() {});
    timed("close", || wait(fixture.store.close()));
}
