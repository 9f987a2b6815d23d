//! Lanes, bounds and what gives way, repetitions, schedules, counts by the day.

use super::*;
use crate::config::WhenFull;
use crate::model::Failure;

fn in_lane(id: &str, name: &str, lane: Lane) -> Arrival {
    let mut arrival = arrival(id, &[name]);
    arrival.invocations[0].lane = lane;
    arrival
}

fn owed_in(id: &str, lane: Lane) -> NewDelivery {
    NewDelivery { lane, ..delivery(id, Target::Uplink) }
}

fn fixture(change: impl FnOnce(&mut Buffer)) -> Fixture {
    let folder = tempfile::tempdir().expect("a folder");
    let clock = TestClock::new();
    let mut buffer = buffer(64 * MIB);
    change(&mut buffer);
    let path = folder.path().join("neap.db");
    let options = Options { path, buffer, clock: Arc::new(clock.clone()) };
    let (store, _) = Store::open(options).expect("opens");
    let fixture = Fixture { folder, clock, store };
    fixture.deploy("f");
    fixture
}

fn ids(deliveries: &[Delivery]) -> Vec<&str> {
    deliveries.iter().map(|delivery| delivery.body.event.id.as_str()).collect()
}

fn waiting(fixture: &Fixture) -> Vec<String> {
    let rows = fixture.invocations();
    rows.iter().map(|row| row.event.id.to_string()).collect()
}

#[test]
fn invocations_are_leased_by_lane_and_in_order_within_one() {
    let fixture = fixture(|_| {});
    for (id, lane) in [
        ("l1", Lane::Low),
        ("n1", Lane::Normal),
        ("h1", Lane::High),
        ("n2", Lane::Normal),
        ("h2", Lane::High),
    ] {
        wait(fixture.store.accept(in_lane(id, "f", lane))).expect("accepts");
    }
    // One that comes back from a retry or a kill is in its lane again.
    let first = fixture.lease("f").expect("leased");
    assert_eq!((first.event.id.as_str(), first.lane), ("h1", Lane::High));
    fixture.settle(first.id, retry(Duration::from_secs(1)));
    fixture.clock.pass(Duration::from_secs(2));
    let _ = fixture.lease("f").expect("leased");
    let (fixture, _) = fixture.kill();

    let leased = wait(fixture.store.lease(vec![(function("f"), 9)])).expect("leases");

    let ids: Vec<_> = leased.iter().map(|leased| leased.event.id.as_str()).collect();
    assert_eq!(ids, ["h1", "h2", "n1", "n2", "l1"]);
}

#[test]
fn outbox_is_read_by_lane_or_by_arrival_and_parted_at_a_place() {
    let fixture = fixture(|_| {});
    let owe = |id, lane| wait(fixture.store.owe(vec![owed_in(id, lane)], vec![])).expect("owes");
    owe("a", Lane::Low);
    owe("b", Lane::Normal);
    wait(fixture.store.owe(vec![delivery("local", Target::Local)], vec![])).expect("owes");
    owe("c", Lane::High);
    let end = wait(fixture.store.outbox_end()).expect("reads");
    owe("d", Lane::Low);
    owe("e", Lane::High);
    let read = |what| wait(fixture.store.owed(what)).expect("reads");
    let lanes = Owed { order: OwedOrder::Lanes, ..all(Target::Uplink) };

    assert_eq!(ids(&read(all(Target::Uplink))), ["a", "b", "c", "d", "e"]);
    assert_eq!(ids(&read(lanes)), ["c", "e", "b", "a", "d"]);
    assert_eq!(ids(&read(Owed { upto: Some(end), ..lanes })), ["c", "b", "a"]);
    let fresh = read(Owed { after: end, ..lanes });
    assert_eq!(ids(&fresh), ["e", "d"]);
    assert!(!end.is_past(fresh[0].id));

    let mut after = Position::default();
    for delivery in read(Owed { limit: 3, ..lanes }) {
        after.pass(delivery.id);
    }
    assert_eq!(ids(&read(Owed { after, ..lanes })), ["a", "d"]);
    after.back_to(fresh[0].id);
    assert_eq!(ids(&read(Owed { after, ..lanes })), ["e", "a", "d"]);
    let listed = wait(fixture.store.deliveries(false, None, 0)).expect("lists");
    assert_eq!(listed.len(), 6);
    let rest =
        wait(fixture.store.deliveries(false, listed[2].as_ref().ok().map(|row| row.id), 2)).expect("lists");
    assert_eq!(rest, listed[3..5]);
}

#[test]
fn redriven_delivery_is_marked_as_replayed() {
    let fixture = fixture(|_| {});
    wait(fixture.store.owe(vec![owed_in("a", Lane::High)], vec![])).expect("owes");
    let id = fixture.owed(Target::Uplink)[0].id;
    wait(fixture.store.set_aside(id, "no".into())).expect("sets aside");

    wait(fixture.store.redrive_deliveries(Some(id))).expect("redrives");

    let again = &fixture.owed(Target::Uplink)[0];
    assert!(again.replayed && again.body.lane == Lane::High && again.id > id);
}

#[test]
fn repetition_is_told_by_its_senders_id_alone() {
    let fixture = fixture(|_| {});
    let keyed = |id: &str, key: Option<&str>| {
        let dedup = key.map(|key| DedupKey::cloud_event("/s", key));
        wait(fixture.store.accept(Arrival { dedup, ..arrival(id, &["f"]) })).expect("accepts").fate
    };
    assert_eq!(keyed("a", Some("1")), Fate::Stored);
    let earlier = EventId::parse("a").expect("an id");
    assert_eq!(keyed("b", Some("1")), Fate::Duplicate(earlier.clone()));
    assert_eq!(keyed("c", Some("2")), Fate::Stored);
    // Without one nothing is dropped, however alike.
    assert_eq!((keyed("d", None), keyed("d", None)), (Fate::Stored, Fate::Stored));
    assert_ne!(DedupKey::cloud_event("a", "bc"), DedupKey::cloud_event("ab", "c"));
    assert_ne!(DedupKey::cloud_event("/f", "k"), DedupKey::idempotency("/f", "k"));

    let (fixture, _) = fixture.kill();
    let dedup = Some(DedupKey::cloud_event("/s", "1"));
    let again = wait(fixture.store.accept(Arrival { dedup, ..arrival("e", &["f"]) })).expect("accepts");
    assert_eq!(again.fate, Fate::Duplicate(earlier));
    assert_eq!(waiting(&fixture), ["a", "c", "d", "d"]);
}

#[test]
fn refused_arrival_may_come_again_under_its_id() {
    let fixture = fixture(|buffer| buffer.events_max = 1);
    fixture.accept("first", "f");
    let again = || Arrival { dedup: Some(DedupKey::cloud_event("/s", "1")), ..arrival("e", &["f"]) };
    assert!(matches!(wait(fixture.store.accept(again())), Err(StoreError::Full)));

    let leased = fixture.lease("f").expect("leased");
    fixture.settle(leased.id, done(vec![]));

    assert_eq!(wait(fixture.store.accept(again())).expect("accepts").fate, Fate::Stored);
}

#[test]
fn senders_ids_are_remembered_over_a_window() {
    let (mut db, _folder) = super::damage::database();
    let key = |n: usize| DedupKey::cloud_event("/s", &n.to_string());
    let id = EventId::parse("e").expect("an id");
    db.begin(true).expect("begins");
    for n in 0..SEEN_MAX + 3 {
        seen::remember(&mut db, &key(n), &id).expect("remembers");
    }
    assert_eq!(seen::find(&db, &key(2)).expect("finds"), None);
    assert_eq!(seen::find(&db, &key(3)).expect("finds"), Some(id));
    assert_eq!(
        db.query_one("SELECT count(*) FROM seen", [], "count", |row| row.get(0)).ok(),
        Some(SEEN_MAX as i64)
    );
    db.rollback();
    assert_eq!(seen::find(&db, &key(3)).expect("finds"), None);
}

#[test]
fn tick_is_stored_with_its_event_or_not_at_all() {
    let fixture = fixture(|buffer| buffer.events_max = 1);
    let tick = |minute: i64| Tick {
        function: function("f"),
        schedule: "UTC * * * * *".into(),
        fired: UnixMs(minute * 60_000),
    };
    let fire =
        |minute| wait(fixture.store.accept(Arrival { tick: Some(tick(minute)), ..arrival("t", &["f"]) }));
    fire(1).expect("accepts");
    assert!(matches!(fire(2), Err(StoreError::Full)));
    assert_eq!(wait(fixture.store.ticks()).expect("reads"), [tick(1)]);

    wait(fixture.store.set_tick(tick(3))).expect("stores");
    let (fixture, _) = fixture.kill();
    assert_eq!(wait(fixture.store.ticks()).expect("reads"), [tick(3)]);

    wait(fixture.store.keep_ticks(function("f"), vec!["UTC @daily".into()])).expect("forgets");
    assert_eq!(wait(fixture.store.ticks()).expect("reads"), []);
    wait(fixture.store.set_tick(tick(4))).expect("stores");
    wait(fixture.store.remove(function("f"))).expect("removes");
    fixture.deploy("f");
    assert_eq!(wait(fixture.store.ticks()).expect("reads"), []);
}

#[test]
fn day_count_survives_clocks_that_lie() {
    let fixture = fixture(|_| {});
    let add = |day, amount| {
        wait(fixture.store.delivered_counting(vec![], Usage::UplinkBytes, day, amount)).expect("counts")
    };
    assert_eq!((add(10, 5), add(10, 7)), (5, 12));
    // Set back: still the same budget. Forward: another day.
    assert_eq!(add(9, 1), 13);
    assert_eq!(add(11, 2), 2);
    // Far ahead, and back again: over after a day of node time.
    assert_eq!(add(90_000, 3), 3);
    fixture.clock.pass(Duration::from_secs(23 * 3600));
    assert_eq!(add(12, 4), 7);
    fixture.clock.pass(Duration::from_secs(3600));
    assert_eq!(wait(fixture.store.usage(Usage::UplinkBytes, 12)).expect("reads"), 0);
    assert_eq!(add(12, 4), 4);
    let (fixture, _) = fixture.kill();
    assert_eq!(wait(fixture.store.usage(Usage::UplinkBytes, 12)).expect("reads"), 4);
}

#[test]
fn number_bound_counts_inbox_and_outbox_together() {
    let fixture = fixture(|buffer| buffer.events_max = 3);
    fixture.accept("a", "f");
    fixture.accept("b", "f");
    wait(fixture.store.owe(vec![delivery("c", Target::Local)], vec![])).expect("owes");
    assert!(matches!(wait(fixture.store.accept(arrival("d", &["f"]))), Err(StoreError::Full)));
    assert!(matches!(
        wait(fixture.store.owe(vec![delivery("d", Target::Local)], vec![])),
        Err(StoreError::Full)
    ));
    assert_eq!(fixture.counts().full, Some("max_events"));

    // What runs may finish: its output takes its place.
    let leased = fixture.lease("f").expect("leased");
    fixture.settle(leased.id, done(vec![delivery("a", Target::Uplink)]));
    assert!(matches!(wait(fixture.store.accept(arrival("d", &["f"]))), Err(StoreError::Full)));

    wait(fixture.store.delivered(vec![fixture.owed(Target::Uplink)[0].id])).expect("deletes");
    fixture.accept("d", "f");
}

#[test]
fn oldest_gives_way_whether_it_waits_to_run_or_to_be_sent() {
    let fixture = fixture(|buffer| {
        buffer.events_max = 4;
        buffer.when_full = WhenFull::DropOldest;
    });
    fixture.accept("running", "f");
    fixture.lease("f").expect("leased");
    for n in 0..2 {
        fixture.clock.pass(Duration::from_secs(1));
        wait(fixture.store.accept(in_lane(&format!("e{n}"), "f", Lane::High))).expect("accepts");
        fixture.clock.pass(Duration::from_secs(1));
        wait(fixture.store.owe(vec![owed_in(&format!("d{n}"), Lane::Low)], vec![])).expect("owes");
    }
    // e0 has gone for d1; now d0, then e1.
    assert_eq!(waiting(&fixture), ["running", "e1"]);
    fixture.accept("e2", "f");
    assert_eq!(ids(&fixture.owed(Target::Uplink)), ["d1"]);
    fixture.accept("e3", "f");
    assert_eq!(waiting(&fixture), ["running", "e2", "e3"]);

    let counts = fixture.counts();
    assert_eq!((counts.dropped_full, counts.full), (3, Some("max_events")));
    let (fixture, _) = fixture.kill();
    assert_eq!(fixture.counts().dropped_full, 3);
}

#[test]
fn lowest_lane_gives_way_and_never_a_higher_one() {
    let fixture = fixture(|buffer| {
        buffer.events_max = 3;
        buffer.when_full = WhenFull::DropLowestPriority;
    });
    let accept = |id: &str, lane| wait(fixture.store.accept(in_lane(id, "f", lane))).expect("accepts").fate;
    accept("n1", Lane::Normal);
    accept("l1", Lane::Low);
    wait(fixture.store.owe(vec![owed_in("l2", Lane::Low)], vec![])).expect("owes");

    assert_eq!(accept("h1", Lane::High), Fate::Stored);
    assert_eq!(waiting(&fixture), ["n1", "h1"]);
    assert_eq!(accept("n2", Lane::Normal), Fate::Stored);
    assert_eq!(fixture.owed(Target::Uplink), []);
    // Of its own lane the oldest, and of none above: then it is what goes.
    assert_eq!(accept("n3", Lane::Normal), Fate::Stored);
    assert_eq!(waiting(&fixture), ["h1", "n2", "n3"]);
    assert_eq!(accept("l3", Lane::Low), Fate::Dropped);
    assert_eq!((accept("h2", Lane::High), accept("h3", Lane::High)), (Fate::Stored, Fate::Stored));
    assert_eq!(accept("n4", Lane::Normal), Fate::Dropped);
    assert_eq!(waiting(&fixture), ["h1", "h2", "h3"]);
    assert_eq!(fixture.counts().dropped_full, 7);
}

#[test]
fn invocation_that_waits_for_a_retry_gives_way_too() {
    let fixture = fixture(|buffer| {
        buffer.events_max = 1;
        buffer.when_full = WhenFull::DropLowestPriority;
    });
    fixture.accept("a", "f");
    let leased = fixture.lease("f").expect("leased");
    // What runs is never dropped.
    assert!(wait(fixture.store.accept(arrival("b", &["f"]))).is_ok_and(|a| a.fate == Fate::Dropped));
    assert!(matches!(wait(fixture.store.accept(in_lane("b", "f", Lane::High))), Err(StoreError::Full)));
    fixture.settle(leased.id, retry(Duration::from_secs(9)));

    fixture.accept("b", "f");

    assert_eq!(waiting(&fixture), ["b"]);
}

#[test]
fn large_arrival_drops_as_much_as_it_takes() {
    let fixture = fixture(|buffer| {
        buffer.bytes_max = 2 * MIB;
        buffer.when_full = WhenFull::DropOldest;
    });
    let small = |n: u32| {
        let mut arrival = arrival(&format!("e{n}"), &["f"]);
        arrival.event.data = vec![7; 1_000];
        wait(fixture.store.accept(arrival)).expect("accepts")
    };
    for n in 0..3_000 {
        small(n);
    }
    assert!(fixture.counts().bytes <= 2 * MIB, "{:?}", fixture.counts());
    let mut large = arrival("large", &["f"]);
    large.event.data = vec![7; 1_500_000];
    wait(fixture.store.accept(large)).expect("accepts");
    let counts = fixture.counts();
    assert!(counts.bytes <= 2 * MIB && counts.ready < 600, "{counts:?}");
    assert_eq!(counts.dropped_full + counts.ready, 3_001);
    assert_eq!(waiting(&fixture).last().map(String::as_str), Some("large"));
}

#[test]
fn an_arrival_larger_than_thousands_of_small_ones_finds_room() {
    let fixture = fixture(|buffer| {
        buffer.bytes_max = 6 * MIB;
        buffer.when_full = WhenFull::DropOldest;
    });
    fixture.deploy("f");
    let small = |n: u32| {
        let mut delivery = delivery(&n.to_string(), Target::Uplink);
        delivery.topic = "t".into();
        (delivery.event.source, delivery.event.subject, delivery.event.data) = ("s".into(), None, vec![]);
        delivery
    };
    let mut n = 0;
    while fixture.counts().dropped_full == 0 {
        let thousand = (n..n + 1000).map(small).collect();
        wait(fixture.store.owe(thousand, vec![])).expect("owes");
        n += 1000;
    }
    let before = fixture.counts().owed_uplink;

    let mut large = arrival("large", &["f"]);
    large.event.data = vec![7; 5 << 20];
    let accepted = wait(fixture.store.accept(large)).expect("finds room");

    assert_eq!(accepted.invocations, 1);
    let counts = fixture.counts();
    assert!(counts.owed_uplink > 0 && before - counts.owed_uplink > 8_192, "{before} {counts:?}");
}

#[test]
fn entries_that_grow_too_old_are_dropped_by_node_time() {
    let fixture = fixture(|buffer| buffer.age_max = Duration::from_secs(60));
    fixture.accept("dead", "f");
    let leased = fixture.lease("f").expect("leased");
    fixture.settle(leased.id, Settlement::Dead { failure: Failure::Exit(1), output: vec![] });
    fixture.accept("running", "f");
    fixture.lease("f").expect("leased");
    fixture.accept("old", "f");
    wait(fixture.store.owe(vec![delivery("old", Target::Local)], vec![])).expect("owes");
    fixture.clock.pass(Duration::from_secs(40));
    // NTP arrives, and takes it back.
    fixture.clock.jump(Duration::from_secs(3_600_000));
    fixture.accept("young", "f");
    fixture.counts();
    assert_eq!(waiting(&fixture), ["dead", "running", "old", "young"]);

    fixture.clock.pass(Duration::from_secs(30));
    fixture.counts();

    // The age is looked at behind an answer.
    while fixture.counts().dropped_age < 2 {
        std::thread::yield_now();
    }
    assert_eq!(waiting(&fixture), ["dead", "running", "young"]);
    assert_eq!(fixture.counts().owed_local, 0);
    // Asked for by a person, however old.
    wait(fixture.store.redrive(InvocationFilter::default())).expect("redrives");
    fixture.clock.pass(Duration::from_secs(2));
    for _ in 0..10 {
        fixture.counts();
    }
    assert_eq!(fixture.lease("f").expect("leased").event.id.as_str(), "dead");
}

#[test]
fn smaller_arrival_never_overtakes_one_that_found_no_room() {
    let fixture = fixture(|buffer| buffer.bytes_max = MIB);
    let line = Line::default();
    let sized = |id: &str, bytes| {
        let mut arrival = arrival(id, &["f"]);
        arrival.event.data = vec![7; bytes];
        arrival
    };
    wait(fixture.store.accept(sized("there", 500_000))).expect("accepts");
    let submit = |arrival| wait(fixture.store.submit(&line, arrival)).expect("stands in line");
    let receipts = [submit(sized("large", 500_000)), submit(sized("small", 10))];
    for receipt in receipts {
        assert!(matches!(wait(receipt.committed()), Err(StoreError::Full)));
    }
    // What can never be stored holds nobody up, and others are in no line.
    fixture.accept("other", "f");
    let leased = fixture.lease("f").expect("leased");
    fixture.settle(leased.id, done(vec![]));
    line.reopen();
    let receipts =
        [submit(sized("huge", 9_000_000)), submit(sized("large", 500_000)), submit(sized("small", 10))];
    let answers: Vec<_> = receipts.into_iter().map(|receipt| wait(receipt.committed())).collect();

    assert!(matches!(answers[0], Err(StoreError::TooLarge { .. })), "{answers:?}");
    assert!(answers[1].is_ok() && answers[2].is_ok(), "{answers:?}");
    assert_eq!(waiting(&fixture), ["other", "large", "small"]);
}

#[test]
fn synchronous_output_finds_no_more_room_than_an_event() {
    let fixture = fixture(|buffer| buffer.bytes_max = MIB);
    let sized = |bytes| NewDelivery {
        event: Event { data: vec![7; bytes], ..event("d") },
        ..delivery("d", Target::Uplink)
    };
    wait(fixture.store.owe(vec![sized(600_000)], vec![])).expect("owes");
    assert!(matches!(wait(fixture.store.owe(vec![sized(600_000)], vec![])), Err(StoreError::Full)));
    assert!(fixture.counts().bytes <= MIB);
}

#[test]
fn ages_do_not_follow_the_wall_clock() {
    let fixture = fixture(|_| {});
    fixture.accept("a", "f");
    wait(fixture.store.owe(vec![delivery("d", Target::Uplink)], vec![])).expect("owes");
    fixture.clock.pass(Duration::from_secs(5));
    for wall in [0, 4_000_000_000_000, -1] {
        fixture.clock.set_wall(UnixMs(wall));
        let counts = fixture.counts();
        let five = Some(Duration::from_secs(5));
        assert_eq!((counts.oldest, counts.oldest_owed), (five, five));
    }
}

#[test]
fn numbers_are_never_given_twice() {
    let mut fixture = fixture(|_| {});
    let mut last = (0, DeliveryId(0));
    for round in 0..4 {
        for n in 0..3 {
            let accepted = fixture.accept(&format!("e{round}{n}"), "f");
            wait(fixture.store.owe(vec![delivery("d", Target::Uplink)], vec![])).expect("owes");
            let id = fixture.owed(Target::Uplink)[0].id;
            assert!(accepted.seq.0 > last.0 && id > last.1, "{accepted:?} {id} {last:?}");
            last = (accepted.seq.0, id);
            // Nothing is left that would show which numbers were given.
            let leased = fixture.lease("f").expect("leased");
            fixture.settle(leased.id, done(vec![]));
            wait(fixture.store.delivered(vec![id])).expect("deletes");
        }
        (fixture, _) = if round % 2 == 0 { fixture.kill() } else { fixture.close() };
    }
}

fn calling(id: &str) -> Arrival {
    let mut arrival = arrival(id, &["f"]);
    let headers = vec![("x-callback-url".to_owned(), "http://h/".to_owned())];
    let (method, path, query) = ("POST".into(), "/".into(), String::new());
    arrival.event.http = Some(crate::model::HttpRequest { method, path, query, headers });
    arrival
}

/// A callback with a result of so many bytes.
fn result(id: &str, bytes: usize) -> NewDelivery {
    let mut result = NewDelivery { lane: Lane::Low, ..delivery(id, Target::Callback) };
    result.event.data = vec![7; bytes];
    result
}

/// Runs one event of `f` to its end.
fn run(fixture: &Fixture, id: &str, deliveries: Vec<NewDelivery>) {
    fixture.accept(id, "f");
    let leased = fixture.lease("f").expect("leased");
    fixture.settle(leased.id, done(deliveries));
}

#[test]
fn callbacks_are_bounded_and_what_goes_beyond_is_refused_or_dropped_alone() {
    let fixture = fixture(|_| {});
    wait(fixture.store.accept(calling("early"))).expect("accepts");
    let early = fixture.lease("f").expect("leased");
    for n in 0..CALLBACKS_MAX {
        run(&fixture, &format!("e{n}"), vec![result("r", 1)]);
    }
    assert_eq!(fixture.counts().owed_callbacks, CALLBACKS_MAX);

    let refused = wait(fixture.store.accept(calling("late")));
    assert!(matches!(refused, Err(StoreError::Full)), "{refused:?}");
    fixture.accept("plain", "f");
    fixture.settle(early.id, done(vec![delivery("ordinary", Target::Uplink), result("r", 1)]));

    let counts = fixture.counts();
    assert_eq!((counts.owed_uplink, counts.owed_callbacks, counts.dropped_full), (1, CALLBACKS_MAX, 1));
    let some: Vec<_> = fixture.owed(Target::Callback).into_iter().take(1).map(|owed| owed.id).collect();
    wait(fixture.store.delivered(some)).expect("removes");
    wait(fixture.store.accept(calling("now"))).expect("there is room again");
}

#[test]
fn bytes_of_callbacks_are_bounded_and_counted_from_what_is_there() {
    let fixture = fixture(|_| {});
    for n in 0..20 {
        run(&fixture, &format!("e{n}"), vec![result(&format!("r{n}"), MIB as usize)]);
    }
    let counts = fixture.counts();
    assert_eq!((counts.owed_callbacks, counts.dropped_full), (8, 12), "an eighth of 64 MiB");

    let (fixture, _) = fixture.kill();
    run(&fixture, "more", vec![result("more", MIB as usize)]);
    assert_eq!(fixture.counts().owed_callbacks, 8);
    let owed = fixture.owed(Target::Callback)[0].id;
    wait(fixture.store.set_aside(owed, "gone".into())).expect("sets aside");
    run(&fixture, "again", vec![result("again", MIB as usize)]);
    assert_eq!(fixture.counts().owed_callbacks, 8);
    wait(fixture.store.redrive_deliveries(Some(owed))).expect("redrives");
    assert_eq!(fixture.counts().owed_callbacks, 9, "a person's word");
    let first = fixture.owed(Target::Callback)[0].id;
    wait(fixture.store.delivered(vec![first])).expect("removes");
    run(&fixture, "full", vec![result("full", MIB as usize)]);
    assert_eq!(fixture.counts().owed_callbacks, 8);
}

#[test]
fn deaths_with_a_callback_do_not_take_the_room_of_outputs() {
    let fixture = fixture(|buffer| buffer.events_max = 2);
    wait(fixture.store.accept(calling("a"))).expect("accepts");
    let leased = fixture.lease("f").expect("leased");
    // Two of the one that ran: one more than there may be, as outputs are let in.
    run(&fixture, "b", vec![delivery("u1", Target::Uplink), delivery("u2", Target::Uplink)]);

    fixture.settle(leased.id, Settlement::Dead { failure: Failure::Exit(1), output: b"half".to_vec() });

    let counts = fixture.counts();
    assert_eq!((counts.dead, counts.owed_uplink), (1, 2));
    assert_eq!((counts.owed_callbacks, counts.dropped_full), (0, 1));
}

#[test]
fn callbacks_give_way_before_anything_else() {
    for when_full in [WhenFull::DropOldest, WhenFull::DropLowestPriority] {
        let fixture = fixture(|buffer| {
            buffer.events_max = 3;
            buffer.when_full = when_full;
        });
        wait(fixture.store.owe(vec![owed_in("old", Lane::Low)], vec![])).expect("owes");
        run(&fixture, "e", vec![result("r", 1)]);
        wait(fixture.store.accept(arrival("x", &["f"]))).expect("accepts");

        wait(fixture.store.owe(vec![owed_in("new", Lane::High)], vec![])).expect("owes");

        assert_eq!(ids(&fixture.owed(Target::Uplink)), ["old", "new"], "{when_full:?}");
        assert_eq!((fixture.counts().owed_callbacks, fixture.counts().dropped_full), (0, 1));
    }
}

#[test]
fn dead_callbacks_go_before_dead_deliveries_of_brokers() {
    let fixture = fixture(|_| {});
    let big = |id: &str, target| {
        let mut one = delivery(id, target);
        one.event.data = vec![7; 3 * MIB as usize];
        if target == Target::Callback { NewDelivery { lane: Lane::Low, ..one } } else { one }
    };
    for (id, target) in [("u1", Target::Uplink), ("c", Target::Callback), ("u2", Target::Uplink)] {
        run(&fixture, id, vec![big(id, target)]);
        let owed = fixture.owed(target)[0].id;
        wait(fixture.store.set_aside(owed, "refused".into())).expect("sets aside");
    }

    let dead = fixture.dead_deliveries();
    let dead: Vec<_> = dead.iter().map(|row| row.body.event.id.as_str()).collect();
    assert_eq!(dead, ["u1", "u2"], "8 MiB of dead may be kept");
}
