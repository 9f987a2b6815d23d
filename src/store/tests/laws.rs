//! One law each.

use super::*;
use crate::model::{CopyProgress, Failure, HttpRequest};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn invocations_are_leased_oldest_first_and_once() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    for id in ["a", "b", "c"] {
        fixture.accept(id, "f");
    }

    let two = wait(fixture.store.lease(vec![(function("f"), 2)])).expect("leases");
    let rest = wait(fixture.store.lease(vec![(function("f"), 5)])).expect("leases");

    let ids: Vec<_> = two.iter().chain(&rest).map(|leased| leased.event.id.as_str()).collect();
    assert_eq!(ids, ["a", "b", "c"]);
    assert_eq!(fixture.lease("f"), None);
}

#[test]
fn copies_outlive_a_kill_and_go_with_their_invocation() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.accept("a", "f");
    let copy = |index| CopyProgress { index, attempts: 1, ended: Some(Ok(())) };
    let leased = fixture.lease("f").expect("leased");
    wait(fixture.store.copy_ended(leased.id, 7, copy(0))).expect("remembers");
    wait(fixture.store.copy_ended(leased.id, 6, copy(1))).expect("remembers");

    let (fixture, _) = fixture.kill();

    let known = |fixture: &Fixture| wait(fixture.store.copies(leased.id, 7)).expect("reads");
    assert_eq!(known(&fixture), [copy(0)], "those of another revision are others");
    let late = wait(fixture.store.copy_ended(leased.id, 7, copy(2)));
    assert!(matches!(late, Err(StoreError::NotFound)), "it is not leased");
    let again = fixture.lease("f").expect("leased again");
    fixture.settle(again.id, Settlement::Done { deliveries: Vec::new(), events: Vec::new() });
    assert_eq!(known(&fixture), []);
}

#[test]
fn events_come_back_as_they_went_in() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    let mut arrival = arrival("a", &["f"]);
    arrival.event.extensions.insert("traceparent".into(), "00-1-2-01".into());
    arrival.event.http = Some(HttpRequest {
        method: "POST".into(),
        path: "/x".into(),
        query: "a=b".into(),
        headers: vec![("x-a".into(), "1".into()), ("x-a".into(), "2".into())],
    });
    arrival.event.time = None;
    arrival.event.data = vec![0, 255, 10];
    let delivery = NewDelivery { event: arrival.event.clone(), ..delivery("a", Target::Uplink) };
    arrival.deliveries.push(delivery.clone());

    wait(fixture.store.accept(arrival.clone())).expect("accepts");

    assert_eq!(fixture.lease("f").expect("leased").event, arrival.event);
    assert_eq!(fixture.owed(Target::Uplink)[0].body, delivery);
}

#[test]
fn finished_invocation_is_never_leased_again() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.accept("a", "f");
    let leased = fixture.lease("f").expect("leased");

    fixture.settle(leased.id, done(vec![delivery("d", Target::Uplink)]));
    let again = wait(fixture.store.settle(leased.id, done(vec![delivery("d", Target::Uplink)])));
    let (fixture, recovered) = fixture.kill();

    assert!(matches!(again, Err(StoreError::NotFound)));
    assert_eq!(recovered, Recovered { leases: 0, clean: false, ..Recovered::default() });
    assert_eq!(fixture.lease("f"), None);
    assert_eq!(fixture.owed(Target::Uplink).len(), 1);
}

#[test]
fn waiting_invocation_does_not_block_later_ones_and_comes_back_in_its_place() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.accept("a", "f");
    fixture.accept("b", "f");
    fixture.accept("c", "f");
    let a = fixture.lease("f").expect("leased");

    fixture.settle(a.id, retry(SECOND));

    assert_eq!(fixture.lease("f").expect("leased").event.id.as_str(), "b");
    assert_eq!(wait(fixture.store.due()).expect("reads"), (vec![function("f")], Some(SECOND)));
    fixture.clock.pass(SECOND);
    let a = fixture.lease("f").expect("leased");
    assert_eq!((a.event.id.as_str(), a.attempts, a.lost), ("a", 1, 0));
    assert_eq!(wait(fixture.store.due()).expect("reads"), (vec![function("f")], None));
}

#[test]
fn delays_do_not_follow_the_wall_clock() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.accept("a", "f");
    let a = fixture.lease("f").expect("leased");
    fixture.settle(a.id, retry(60 * SECOND));

    fixture.clock.jump(Duration::from_secs(1 << 30));
    assert_eq!(fixture.lease("f"), None);
    fixture.clock.set_wall(UnixMs(17));
    fixture.clock.pass(59 * SECOND);
    assert_eq!(fixture.lease("f"), None);
    fixture.clock.pass(SECOND);

    assert!(fixture.lease("f").is_some());
}

#[test]
fn node_time_goes_on_after_a_restart() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.accept("a", "f");
    let a = fixture.lease("f").expect("leased");
    fixture.settle(a.id, retry(60 * SECOND));
    fixture.clock.pass(40 * SECOND);

    let (fixture, _) = fixture.close();
    fixture.clock.pass(19 * SECOND);
    assert_eq!(fixture.lease("f"), None);
    fixture.clock.pass(SECOND);

    assert!(fixture.lease("f").is_some());
}

#[test]
fn lease_of_a_killed_daemon_is_ready_again_with_a_loss_counted() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.accept("a", "f");
    fixture.lease("f").expect("leased");

    let (fixture, recovered) = fixture.kill();

    assert_eq!(recovered, Recovered { leases: 1, clean: false, ..Recovered::default() });
    let a = fixture.lease("f").expect("leased");
    assert_eq!((a.attempts, a.lost), (0, 1));
}

#[test]
fn clean_stop_loses_no_attempt() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.accept("a", "f");
    fixture.accept("b", "f");
    let a = fixture.lease("f").expect("leased");
    fixture.lease("f").expect("leased");
    fixture.settle(a.id, Settlement::Release);

    let (fixture, recovered) = fixture.close();

    assert_eq!(recovered, Recovered { leases: 0, clean: true, ..Recovered::default() });
    assert_eq!(fixture.lease("f").expect("leased").lost, 0);
    assert_eq!(fixture.lease("f").expect("leased").lost, 0);
    assert_eq!(fixture.counts().running, 2);
}

#[test]
fn invocation_lost_too_often_dies() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.accept("killed", "f");
    fixture.accept("lost", "f");
    let mut fixture = fixture;
    for _ in 0..LOST_MAX {
        assert_eq!(fixture.lease("f").expect("leased").event.id.as_str(), "killed");
        fixture = fixture.kill().0;
    }
    for _ in 0..LOST_MAX {
        let lost = fixture.lease("f").expect("leased");
        let error = String::new();
        fixture.settle(lost.id, Settlement::Retry { delay: Duration::ZERO, counted: false, error });
    }

    let dead = fixture.invocations();

    assert_eq!(dead.len(), 2);
    for row in dead {
        assert_eq!((row.state, row.attempts, row.lost), (InvocationState::Dead, 0, LOST_MAX));
        assert!(row.last_error.expect("an error").contains("20 attempts"));
    }
}

#[test]
fn dead_invocation_keeps_its_last_words_and_can_be_redriven() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.accept("a", "f");
    let a = fixture.lease("f").expect("leased");
    fixture.settle(a.id, retry(Duration::ZERO));
    let a = fixture.lease("f").expect("leased");
    fixture.settle(a.id, Settlement::Dead { failure: Failure::Exit(7), output: vec![b'x'; 5000] });

    let rows = wait(fixture.store.event("a".into())).expect("finds");
    let all = InvocationFilter::default();
    let redriven = wait(fixture.store.redrive(all.clone())).expect("redrives");

    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].last_error.as_deref(), Some("exited with code 7"));
    assert_eq!((rows[0].last_output.len(), rows[0].attempts), (OUTPUT_BYTES_MAX, 2));
    assert_eq!(rows[0].event, event("a"));
    assert_eq!(redriven, 1);
    let a = fixture.lease("f").expect("leased");
    assert_eq!((a.attempts, a.lost), (0, 0));
    assert_eq!(fixture.counts().dead, 0);
}

#[test]
fn event_is_stored_once_and_goes_with_its_last_invocation() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.deploy("g");
    wait(fixture.store.accept(arrival("a", &["f", "g"]))).expect("accepts");
    let events = || rows(&fixture, "events");

    assert_eq!(events(), 1);
    let f = fixture.lease("f").expect("leased");
    fixture.settle(f.id, done(vec![]));
    assert_eq!(events(), 1);
    let g = fixture.lease("g").expect("leased");
    fixture.settle(g.id, Settlement::Dead { failure: Failure::Exit(1), output: vec![] });
    assert_eq!(events(), 1);
    wait(fixture.store.purge(InvocationFilter::default())).expect("purges");
    assert_eq!(events(), 0);
}

#[test]
fn expired_invocation_is_dropped_at_its_turn_and_counted() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    let mut old = arrival("old", &["f"]);
    old.invocations[0].expires = Some(5 * SECOND);
    wait(fixture.store.accept(old)).expect("accepts");
    fixture.accept("new", "f");

    fixture.clock.pass(6 * SECOND);

    assert_eq!(fixture.lease("f").expect("leased").event.id.as_str(), "new");
    let counts = fixture.counts();
    assert_eq!((counts.expired, counts.ready, counts.running), (1, 0, 1));
    let (fixture, _) = fixture.kill();
    assert_eq!(fixture.counts().expired, 1);
}

#[test]
fn downtime_counts_for_expiry_when_the_wall_clock_is_plausible() {
    for (wall, expected) in [(None, false), (Some(UnixMs(99)), true)] {
        let fixture = Fixture::new();
        fixture.deploy("f");
        let mut arrival = arrival("a", &["f"]);
        arrival.invocations[0].expires = Some(300 * SECOND);
        wait(fixture.store.accept(arrival)).expect("accepts");

        fixture.clock.jump(Duration::from_secs(3 * 24 * 3600)); // no uptime passes
        if let Some(wall) = wall {
            fixture.clock.set_wall(wall);
        }
        let (fixture, _) = fixture.kill();

        assert_eq!(fixture.lease("f").is_some(), expected);
    }
}

#[test]
fn fresh_event_does_not_expire_by_a_step_of_the_wall_clock() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    let expiring = |id: &str| {
        let mut arrival = arrival(id, &["f"]);
        arrival.invocations[0].expires = Some(300 * SECOND);
        wait(fixture.store.accept(arrival)).expect("accepts");
    };
    expiring("a");
    expiring("b");
    let three_days = Duration::from_secs(3 * 24 * 3600);

    fixture.clock.jump(three_days);
    assert_eq!(fixture.lease("f").expect("leased").event.id.as_str(), "a");

    // Neither after a restart: the step was within a run, no time without power.
    let (fixture, _) = fixture.close();
    assert_eq!(fixture.lease("f").expect("leased").event.id.as_str(), "a");
    assert_eq!(fixture.lease("f").expect("leased").event.id.as_str(), "b");
    assert_eq!(fixture.counts().expired, 0);
}

#[test]
fn downtimes_add_up_for_expiry() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    let mut arrival = arrival("a", &["f"]);
    arrival.invocations[0].expires = Some(300 * SECOND);
    wait(fixture.store.accept(arrival)).expect("accepts");

    let mut fixture = fixture;
    for _ in 0..2 {
        let Fixture { folder, clock, store } = fixture;
        wait(store.close());
        drop(store);
        clock.jump(151 * SECOND);
        let (store, _) = open_at(&folder.path().join("neap.db"), &clock);
        fixture = Fixture { folder, clock, store };
    }

    assert_eq!(fixture.lease("f"), None);
    assert_eq!(fixture.counts().expired, 1);
}

#[test]
fn retained_value_is_an_event_once_per_function() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.deploy("g");
    let retained = |name: &str, hash: u8| {
        let mut arrival = arrival("a", &[name]);
        arrival.invocations[0].once = Some(RetainedValue { topic: "t".into(), hash: [hash; 32] });
        wait(fixture.store.accept(arrival)).expect("accepts").invocations
    };

    assert_eq!([retained("f", 1), retained("f", 1), retained("g", 1)], [1, 0, 1]);
    assert_eq!([retained("f", 2), retained("f", 1), retained("f", 1)], [1, 1, 0]);
    assert_eq!(rows(&fixture, "retained"), 2);
    assert_eq!(rows(&fixture, "events"), 4);
}

#[test]
fn born_dead_invocation_never_runs() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    let mut arrival = arrival("a", &["f"]);
    arrival.invocations[0].dead = Some(Failure::Refused("PUBLISH of 9 MiB".into()));

    wait(fixture.store.accept(arrival)).expect("accepts");

    assert_eq!(fixture.lease("f"), None);
    let rows = wait(fixture.store.event("a".into())).expect("finds");
    assert_eq!((rows[0].attempts, rows[0].last_error.as_deref()), (0, Some("refused: PUBLISH of 9 MiB")));
}

#[test]
fn event_is_found_by_id_or_by_number() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.accept("a", "f");
    let seq = fixture.accept("b", "f").seq;

    let by_number = wait(fixture.store.event(seq.to_string())).expect("finds");

    assert_eq!(by_number[0].event, event("b"));
    assert_eq!(wait(fixture.store.event("b".into())).expect("finds"), by_number);
    assert_eq!(wait(fixture.store.event("c".into())).expect("finds"), []);
}

#[test]
fn deliveries_are_owed_in_order_until_acknowledged() {
    let fixture = Fixture::new();
    let deliveries = ["a", "b", "c"].map(|id| delivery(id, Target::Uplink));
    wait(fixture.store.owe(deliveries.to_vec(), vec![])).expect("owes");
    wait(fixture.store.owe(vec![delivery("l", Target::Local)], vec![])).expect("owes");

    let owed = fixture.owed(Target::Uplink);
    let bodies: Vec<_> = owed.iter().map(|delivery| delivery.body.clone()).collect();
    assert_eq!(bodies, deliveries);
    let mut after = Position::default();
    after.pass(owed[0].id);
    let what = Owed { after, limit: 1, ..all(Target::Uplink) };
    assert_eq!(wait(fixture.store.owed(what)).expect("reads"), owed[1..2]);
    let what = Owed { bytes_max: 1, ..all(Target::Uplink) };
    let small = wait(fixture.store.owed(what)).expect("reads");
    assert_eq!(small, owed[..1]);

    wait(fixture.store.delivered(vec![owed[0].id, owed[2].id])).expect("deletes");
    let (fixture, _) = fixture.kill();
    assert_eq!(fixture.owed(Target::Uplink), owed[1..2]);
    let counts = fixture.counts();
    assert_eq!((counts.owed_uplink, counts.owed_local), (1, 1));
}

#[test]
fn delivery_refused_for_good_is_set_aside_and_can_be_redriven_to_the_end() {
    let fixture = Fixture::new();
    let deliveries = ["a", "b"].map(|id| delivery(id, Target::Uplink)).to_vec();
    wait(fixture.store.owe(deliveries, vec![])).expect("owes");
    let a = fixture.owed(Target::Uplink)[0].clone();
    assert_eq!(wait(fixture.store.lone_disconnect(a.id)).expect("counts"), 1);
    assert_eq!(wait(fixture.store.lone_disconnect(a.id)).expect("counts"), 2);

    wait(fixture.store.set_aside(a.id, "not authorized".into())).expect("sets aside");

    assert_eq!(fixture.owed(Target::Uplink).len(), 1);
    let dead = fixture.dead_deliveries();
    assert_eq!((dead[0].id, dead[0].dead.as_deref()), (a.id, Some("not authorized")));
    assert_eq!(wait(fixture.store.delivery(a.id)).expect("reads").body, a.body);
    assert_eq!(fixture.counts().dead_deliveries, 1);
    assert!(matches!(wait(fixture.store.set_aside(a.id, "again".into())), Err(StoreError::NotFound)));

    assert_eq!(wait(fixture.store.redrive_deliveries(None)).expect("redrives"), 1);
    let owed = fixture.owed(Target::Uplink);
    assert_eq!((owed.len(), owed[1].body.clone(), owed[1].lone_disconnects), (2, a.body, 0));
    assert_eq!(fixture.counts().dead_deliveries, 0);
}

#[test]
fn deploying_the_same_again_makes_no_revision() {
    let fixture = Fixture::new();
    let deploy = |manifest: &str, image: &str| {
        wait(fixture.store.deploy(function("f"), manifest.into(), image.into(), None)).expect("deploys")
    };

    let numbers = [deploy("m", "i"), deploy("m", "i"), deploy("m2", "i"), deploy("m2", "i2")]
        .map(|function| function.revision.number);

    assert_eq!(numbers, [1, 1, 2, 3]);
    assert_eq!(rows(&fixture, "revisions"), 2);
    assert_eq!(wait(fixture.store.functions()).expect("lists")[0].revision.manifest, "m2");
}

#[test]
fn recreated_function_keeps_number_and_range_but_not_its_past() {
    let fixture = Fixture::new();
    let first = fixture.deploy("f");
    let other = fixture.deploy("g");
    fixture.accept("a", "f");
    fixture.accept("b", "f");
    let leased = fixture.lease("f").expect("leased");
    wait(fixture.store.set_paused(function("f"), true)).expect("pauses");

    assert_eq!(wait(fixture.store.remove(function("f"))).expect("removes"), 2);
    let settled = wait(fixture.store.settle(leased.id, done(vec![])));
    let next = fixture.store.next_revision(function("f"), "manifest".into(), "image".into());
    let next = wait(next).expect("reads");
    let again = fixture.deploy("f");

    assert!(matches!(settled, Err(StoreError::NotFound)));
    assert_eq!((again.revision.number, again.uid_base, again.paused), (2, first.uid_base, false));
    assert_eq!(next, (2, first.uid_base));
    assert_ne!(other.uid_base, first.uid_base);
    assert_eq!(fixture.lease("f"), None);
    assert_eq!(fixture.counts().ready, 0);
    let (fixture, recovered) = fixture.close();
    assert_eq!(recovered.leases, 0);
    assert_eq!(fixture.lease("f"), None);
}

#[test]
fn functions_that_are_about_to_be_deployed_have_ranges_of_their_own() {
    let fixture = Fixture::new();
    let next = |name| fixture.store.next_revision(function(name), "manifest".into(), "image".into());

    let (first, second) = (wait(next("a")).expect("reserves"), wait(next("b")).expect("reserves"));

    assert_eq!((first.0, second.0), (1, 1));
    assert_ne!(first.1, second.1);
    assert_eq!(wait(next("a")).expect("reads"), first, "asking again changes nothing");
    assert!(wait(fixture.store.functions()).expect("reads").is_empty(), "none is deployed");
    let (b, a) = (fixture.deploy("b"), fixture.deploy("a"));
    assert_eq!((a.revision.number, a.uid_base), first);
    assert_eq!((b.revision.number, b.uid_base), second);
}

#[test]
fn removed_functions_leave_no_rows_behind() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.deploy("g");
    for n in 0..1000 {
        wait(fixture.store.accept(arrival(&format!("e{n}"), &["f", "g"]))).expect("accepts");
    }

    wait(fixture.store.remove(function("f"))).expect("removes");
    wait(fixture.store.remove(function("g"))).expect("removes");
    while fixture.counts().oldest.is_some() {} // swept between requests

    assert_eq!(rows(&fixture, "invocations") + rows(&fixture, "events"), 0);
}

#[test]
fn arrival_for_an_unknown_function_leaves_nothing() {
    let fixture = Fixture::new();

    let accepted = fixture.accept("a", "nobody");

    assert_eq!(accepted.invocations, 0);
    assert_eq!(rows(&fixture, "events"), 0);
}

#[test]
fn closed_store_answers_stopped() {
    let fixture = Fixture::new();
    wait(fixture.store.close());
    wait(fixture.store.close());

    assert!(matches!(wait(fixture.store.counts()), Err(StoreError::Stopped)));
}

#[test]
fn done_commits_deliveries_and_follow_up_events_together() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    fixture.deploy("g");
    fixture.accept("a", "f");
    let a = fixture.lease("f").expect("leased");

    let events = vec![arrival("follow-up", &["g"])];
    let deliveries = vec![delivery("d", Target::Uplink)];
    fixture.settle(a.id, Settlement::Done { deliveries, events });
    let (fixture, _) = fixture.kill();

    assert_eq!(fixture.lease("g").expect("leased").event, event("follow-up"));
    assert_eq!(fixture.owed(Target::Uplink).len(), 1);
    assert_eq!(fixture.lease("f"), None);
}

#[test]
fn id_ranges_are_reused_only_when_all_are_taken_and_numbers_never() {
    use crate::model::function::{FUNCTIONS_MAX, UID_BASE_FIRST, UID_RANGE};
    let (mut db, _folder) = database();
    let deploy = |db: &mut Db, name: &str| functions::deploy(db, &function(name), "m", "i", None);
    db.begin(true).expect("begins");
    for n in 0..FUNCTIONS_MAX {
        let deployed = deploy(&mut db, &format!("f{n}")).expect("deploys");
        assert_eq!(deployed.uid_base, UID_BASE_FIRST + n * UID_RANGE);
    }

    let one_more = deploy(&mut db, "one-more");
    functions::deploy(&mut db, &function("f7"), "m2", "i", None).expect("deploys");
    functions::remove(&mut db, &function("f7")).expect("removes");
    functions::remove(&mut db, &function("f8")).expect("removes");
    let back = deploy(&mut db, "f8").expect("deploys");
    let new = deploy(&mut db, "new").expect("deploys");

    assert!(matches!(one_more, Err(StoreError::TooManyFunctions(FUNCTIONS_MAX))));
    assert_eq!((back.uid_base, back.revision.number), (UID_BASE_FIRST + 8 * UID_RANGE, 2));
    assert_eq!((new.uid_base, new.revision.number), (UID_BASE_FIRST + 7 * UID_RANGE, 3));
    functions::remove(&mut db, &function("new")).expect("removes");
    assert_eq!(deploy(&mut db, "f7").expect("deploys").revision.number, 4);
}

#[test]
fn memory_for_retained_values_and_dead_ones_is_bounded() {
    let (mut db, _folder) = database();
    db.begin(true).expect("begins");
    functions::deploy(&mut db, &function("f"), "m", "i", None).expect("deploys");
    for n in 0..DEAD_MAX.max(RETAINED_MAX as u64) + 5 {
        let mut arrival = arrival(&format!("e{n}"), &["f"]);
        arrival.invocations[0].once = Some(RetainedValue { topic: format!("t{n}"), hash: [1; 32] });
        arrival.invocations[0].dead = Some(Failure::Refused("too large".into()));
        arrival.deliveries = vec![delivery("d", Target::Uplink)];
        inbox::accept(&mut db, &arrival).expect("accepts");
        let id = outbox::head(&db, Target::Uplink, Lane::Normal).expect("reads").expect("owed").id;
        outbox::set_aside(&mut db, id, "refused").expect("sets aside");
    }

    let counts = status::counts(&mut db).expect("counts");

    assert_eq!((counts.dead, counts.dead_deliveries, counts.dead_dropped), (DEAD_MAX, DEAD_MAX, 10));
    let remembered = "SELECT count(*) FROM retained";
    assert_eq!(db.query_one(remembered, [], "count", |row| row.get(0)).ok(), Some(RETAINED_MAX));
}

fn database() -> (Db, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("neap.db");
    let clock = Arc::new(TestClock::new());
    let (db, _) = Db::open(&Options { path, buffer: buffer(256 * MIB), clock }).expect("opens");
    (db, folder)
}

/// Rows in a table, as another process sees them.
fn rows(fixture: &Fixture, table: &str) -> i64 {
    let conn = rusqlite::Connection::open(fixture.path()).expect("opens");
    conn.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).expect("counts")
}
