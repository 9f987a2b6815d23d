//! Who may start: scenes, and every mix of calls and ends within the bounds.

use super::*;
use proptest::prelude::*;

fn name(text: &str) -> FunctionName {
    FunctionName::parse(text).expect("a good name")
}

fn plan(budget: u64, functions: &[(&str, u32, u64)]) -> Plan {
    let mut plan = Plan::new(Budget::new(budget));
    plan.set_functions(functions.iter().map(|(n, max, memory)| {
        let lane = Lane::Normal;
        let capacity =
            Capacity { instances_max: *max, memory_bytes: *memory, lane, runnable: true, shared_by: None };
        (name(n), capacity)
    }));
    plan
}

fn plan_of_lanes(budget: u64, functions: &[(&str, Lane)]) -> Plan {
    let mut plan = Plan::new(Budget::new(budget));
    plan.set_functions(functions.iter().map(|(n, lane)| {
        (
            name(n),
            Capacity { instances_max: 9, memory_bytes: 10, lane: *lane, runnable: true, shared_by: None },
        )
    }));
    plan
}

#[test]
fn an_earlier_lane_goes_first() {
    let mut plan = plan_of_lanes(20, &[("a-low", Lane::Low), ("b", Lane::Normal), ("c-high", Lane::High)]);
    plan.call(1, &name("a-low")).expect("room to wait");
    plan.call(2, &name("c-high")).expect("room to wait");
    plan.call(3, &name("b")).expect("room to wait");

    let calls: Vec<Ticket> = plan.startable().into_iter().map(|(ticket, _)| ticket).collect();
    let mut fresh = plan_of_lanes(20, &[("a-low", Lane::Low), ("b", Lane::Normal)]);
    let leased = fresh.leases(&[name("a-low"), name("b")]);

    assert_eq!(calls, [2, 3]);
    assert_eq!(leased.iter().map(|(n, grants)| (n.as_str(), grants.len())).collect::<Vec<_>>(), [("b", 2)]);
}

#[test]
fn the_low_lane_is_last_but_not_never() {
    let mut plan = plan_of_lanes(20, &[("high", Lane::High), ("low", Lane::Low)]);
    let mut running = VecDeque::new();

    let low = (0..10 * PASSED_MAX).filter(|_| {
        turn(&mut plan, &mut running, &[name("high"), name("low")]);
        running.back().is_some_and(|grant| grant.function == name("low"))
    });

    assert!((1..=20).contains(&low.count()));
}

#[test]
fn calls_go_before_due_events() {
    let mut plan = plan(100, &[("f", 1, 10)]);

    plan.call(1, &name("f")).expect("room to wait");
    let started = plan.startable();

    assert_eq!(started.len(), 1);
    assert!(plan.leases(&[name("f")]).is_empty());
}

#[test]
fn a_call_without_a_slot_does_not_hold_back_another_function() {
    let mut plan = plan(100, &[("busy", 1, 10), ("free", 1, 10)]);
    plan.call(1, &name("busy")).expect("room to wait");
    let _running = plan.startable();

    plan.call(2, &name("busy")).expect("room to wait");
    plan.call(3, &name("free")).expect("room to wait");
    let started = plan.startable();

    assert_eq!(started.iter().map(|(ticket, _)| *ticket).collect::<Vec<_>>(), [3]);
}

#[test]
fn callers_of_one_function_do_not_lock_out_those_of_another() {
    let mut plan = plan(100, &[("slow", 1, 10), ("other", 1, 10)]);

    let refused = (0..200).filter(|n| plan.call(*n, &name("slow")).is_err()).count();

    assert_eq!(refused, 200 - WAITING_ONE_MAX);
    assert_eq!(plan.call(200, &name("other")), Ok(()));
}

#[test]
fn functions_take_turns_when_memory_is_short() {
    let mut plan = plan(10, &[("a", 4, 10), ("b", 4, 10)]);
    let due = [name("a"), name("b")];

    let mut order = Vec::new();
    for _ in 0..4 {
        for (name, grants) in plan.leases(&due) {
            order.push(name.to_string());
            grants.into_iter().for_each(|grant| plan.ended(grant));
        }
    }

    assert_eq!(order, ["a", "b", "a", "b"]);
}

/// One instance ends, then due events are leased.
fn turn(plan: &mut Plan, running: &mut VecDeque<Grant>, due: &[FunctionName]) {
    if let Some(grant) = running.pop_front() {
        plan.ended(grant);
    }
    running.extend(plan.leases(due).into_iter().flat_map(|(_, grants)| grants));
}

#[test]
fn a_large_function_is_not_starved_by_small_ones() {
    let mut plan = plan(100, &[("big", 1, 70), ("small", 5, 20)]);
    let mut running = VecDeque::new();
    turn(&mut plan, &mut running, &[name("small")]);
    assert_eq!(running.len(), 5, "the small ones were first");

    let due = [name("big"), name("small")];
    let turns = (0..1000).find(|_| {
        turn(&mut plan, &mut running, &due);
        running.iter().any(|grant| grant.function == name("big"))
    });

    // Passed over, then those that ran have ended.
    assert!(turns.is_some_and(|turns| turns <= PASSED_MAX as usize + 5), "{turns:?}");
    let after = (0..10).filter(|_| {
        turn(&mut plan, &mut running, &due);
        running.iter().any(|grant| grant.function == name("small"))
    });
    assert_eq!(after.count(), 10, "and it starves nobody");
}

#[test]
fn room_kept_for_a_large_function_is_free_again_when_it_has_nothing_to_run() {
    let mut plan = plan(100, &[("big", 1, 70), ("small", 5, 20)]);
    let mut running = VecDeque::new();
    turn(&mut plan, &mut running, &[name("small")]);
    while running.len() == 5 {
        turn(&mut plan, &mut running, &[name("big"), name("small")]);
    }
    assert_eq!(running.len(), 4, "the place that became free is kept");

    running.extend(plan.leases(&[name("small")]).into_iter().flat_map(|(_, grants)| grants));

    assert_eq!(running.len(), 5);
}

#[test]
fn a_braked_plan_starts_one_at_a_time() {
    let mut plan = plan(100, &[("a", 4, 10), ("b", 4, 10)]);
    plan.set_braked(true);
    plan.call(1, &name("a")).expect("room to wait");
    plan.call(2, &name("b")).expect("room to wait");

    let mut started = plan.startable();
    assert_eq!(started.len(), 1);
    assert!(plan.leases(&[name("b")]).is_empty());
    plan.ended(started.remove(0).1);

    assert_eq!(plan.startable().len(), 1);
}

#[test]
fn what_can_never_fit_is_refused_at_once() {
    let mut plan = plan(10, &[("big", 1, 11)]);

    assert_eq!(plan.call(1, &name("big")), Err(Refusal::NeverFits));
    assert_eq!(plan.call(2, &name("other")), Err(Refusal::Unknown));
}

#[test]
fn a_function_that_went_keeps_its_running_instances_counted() {
    let mut plan = plan(20, &[("a", 2, 10)]);
    let granted = plan.leases(&[name("a")]).remove(0).1;
    assert_eq!(granted.len(), 2);

    plan.set_functions([]);
    assert_eq!(plan.taken(), 2);
    granted.into_iter().for_each(|grant| plan.ended(grant));

    assert_eq!(plan.taken(), 0);
    assert_eq!(plan.budget().reserved_bytes(), 0);
}

/// A function that stays up: two instances of 10 bytes, three invocations in each.
fn staying(budget: u64) -> Plan {
    let mut plan = Plan::new(Budget::new(budget));
    let capacity = Capacity {
        instances_max: 2,
        memory_bytes: 10,
        lane: Lane::Normal,
        runnable: true,
        shared_by: Some(3),
    };
    plan.set_functions([(name("s"), capacity)]);
    plan
}

#[test]
fn invocations_share_the_memory_of_their_instance() {
    let mut plan = staying(15);

    let grants = plan.leases(&[name("s")]).remove(0).1;

    assert_eq!(grants.len(), 3, "a second instance does not fit");
    assert_eq!(plan.budget().reserved_bytes(), 10);
    assert!(plan.short_of_memory(&[name("s")]));
    grants.into_iter().for_each(|grant| plan.ended(grant));
    assert_eq!(plan.budget().reserved_bytes(), 0);
}

#[test]
fn idle_instances_keep_their_memory_until_they_are_gone() {
    let mut plan = staying(100);
    let kept = |count| BTreeMap::from([(name("s"), count)]);
    let grants = plan.leases(&[name("s")]).remove(0).1;
    plan.set_kept(&kept(2));
    grants.into_iter().for_each(|grant| plan.ended(grant));
    assert_eq!(plan.budget().reserved_bytes(), 20);

    plan.set_functions([]);
    assert_eq!(plan.budget().reserved_bytes(), 20, "they are still there");
    plan.set_kept(&BTreeMap::new());

    assert_eq!(plan.budget().reserved_bytes(), 0);
}

proptest! {
    /// Whatever happens in whatever order: never more instances than `scale.max`, never more
    /// memory than the budget, and all of it comes back.
    #[test]
    fn limits_hold_under_any_order(steps in prop::collection::vec((0u8..4, 0usize..3), 1..200)) {
        let functions = [("a", 2, 30), ("b", 3, 20), ("c", 1, 70)];
        let mut plan = plan(100, &functions);
        let mut running: Vec<Grant> = Vec::new();
        for (ticket, (step, which)) in steps.into_iter().enumerate() {
            let function = name(functions[which].0);
            match step {
                0 => { let _ = plan.call(ticket as u64, &function); }
                1 => running.extend(plan.startable().into_iter().map(|(_, grant)| grant)),
                2 => running.extend(plan.leases(&[function]).into_iter().flat_map(|(_, grants)| grants)),
                _ => if !running.is_empty() { let grant = running.remove(which % running.len()); plan.ended(grant); },
            }
            for (n, max, _) in functions {
                let count = running.iter().filter(|grant| grant.function.as_str() == n).count();
                prop_assert!(count <= max as usize);
            }
            let bytes: u64 = running.iter().map(|grant| grant.memory_bytes).sum();
            prop_assert!(bytes <= 100);
            prop_assert_eq!(bytes, plan.budget().reserved_bytes());
        }
    }
}
