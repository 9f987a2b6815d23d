//! Who may start now. Pure: the driver feeds it calls, ends and due work, and starts what it
//! says.
//!
//! ```text
//!   call ──▶ waiting (bounded) ──▶ running ──▶ ended
//!   due function ──▶ leasing (slots held while the store is asked) ──▶ running ──▶ ended
//! ```
//!
//! Synchronous calls go first: somebody waits for them. Functions with due events take turns,
//! so that one long queue never starves another when slots or memory are short. Either way a
//! function's `priority` decides first: what is in an earlier lane takes what it needs.
//!
//! A handler that stays up has instances that serve several events, at once and one after the
//! other. Its memory is what its invocations need at `scale.concurrency` each, or what the
//! instances that are there take, whichever is more.
//!
//! Small functions fit where a large one doesn't, again and again, and high lanes go first again
//! and again. A function that was passed over `PASSED_MAX` times for want of memory gets what
//! becomes free: until it has started, others start only where they leave it its room.

use super::budget::Budget;
use crate::model::{FunctionName, Lane};
use std::collections::{BTreeMap, VecDeque};

/// Synchronous calls that may wait for a slot, over all functions: each holds a connection and
/// a body in memory. One more is refused with 503. As many as there may be connections.
pub const WAITING_MAX: usize = 128;

/// And of one function: callers of a slow one must not lock out all others.
pub const WAITING_ONE_MAX: usize = 64;

/// Slots that one function may take of the inbox in one turn: a lease is a commit, larger turns
/// would let one function hold the others back.
pub const LEASE_MAX: u32 = 16;

/// Starts of others that a function without room for it looks on at: a few turns of everybody.
const PASSED_MAX: u32 = 32;

/// What the plan knows of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// `scale.max`
    pub instances_max: u32,
    /// `limits.memory`
    pub memory_bytes: u64,
    /// `priority`
    pub lane: Lane,
    /// False: paused or unusable; events wait, calls are refused.
    pub runnable: bool,
    /// Of a handler that stays up: invocations at once in one instance.
    pub shared_by: Option<u32>,
}

impl Capacity {
    fn invocations_max(&self) -> u32 {
        self.instances_max.saturating_mul(self.shared_by.unwrap_or(1))
    }
}

#[derive(Debug)]
struct Slot {
    capacity: Capacity,
    /// Running or held for a lease.
    taken: u32,
    /// Instances that are there, of a handler that stays up.
    kept: u32,
    /// Reserved for them.
    kept_bytes: u64,
}

impl Slot {
    fn new(capacity: Capacity) -> Self {
        Self { capacity, taken: 0, kept: 0, kept_bytes: 0 }
    }

    /// What instances that stay up take, with so many invocations.
    fn kept_bytes_with(&self, taken: u32) -> u64 {
        let Some(shared_by) = self.capacity.shared_by else { return 0 };
        u64::from(taken.div_ceil(shared_by.max(1)).max(self.kept)) * self.capacity.memory_bytes
    }

    /// What one more invocation would have to reserve.
    fn more_bytes(&self) -> u64 {
        match self.capacity.shared_by {
            None => self.capacity.memory_bytes,
            Some(_) => self.kept_bytes_with(self.taken + 1).saturating_sub(self.kept_bytes),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Unknown,
    NotRunnable,
    /// Its memory limit is more than the node may ever give.
    NeverFits,
    QueueFull,
}

/// A waiting call, numbered by the driver.
pub type Ticket = u64;

#[derive(Debug)]
pub struct Plan {
    budget: Budget,
    slots: BTreeMap<FunctionName, Slot>,
    waiting: VecDeque<(Ticket, FunctionName)>,
    /// Whose turn was last.
    turn: Option<FunctionName>,
    /// Functions that wait for memory alone, and how often they were passed over.
    passed: BTreeMap<FunctionName, u32>,
    /// One instance at a time.
    braked: bool,
}

/// What a start took; to be given back to `ended` as it is, whatever a deploy changed meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Grant {
    pub function: FunctionName,
    memory_bytes: u64,
}

impl Plan {
    pub fn new(budget: Budget) -> Self {
        Self {
            budget,
            slots: BTreeMap::new(),
            waiting: VecDeque::new(),
            turn: None,
            passed: BTreeMap::new(),
            braked: false,
        }
    }

    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    pub fn set_budget(&mut self, bytes: u64) {
        self.budget.set_total(bytes);
    }

    /// Instances that are there or about to be, idle ones of handlers that stay up included.
    pub fn instances(&self) -> u64 {
        let of = |slot: &Slot| match slot.capacity.shared_by {
            None => slot.taken,
            Some(shared_by) => slot.taken.div_ceil(shared_by.max(1)).max(slot.kept),
        };
        self.slots.values().map(|slot| u64::from(of(slot))).sum()
    }

    /// Instances that are there of a function whose handler stays up.
    pub fn kept(&self, function: &FunctionName) -> u32 {
        self.slots.get(function).map_or(0, |slot| slot.kept)
    }

    /// The machine's memory is so short that instances run one at a time.
    pub fn set_braked(&mut self, braked: bool) {
        self.braked = braked;
    }

    /// Invocations that run or are about to.
    pub fn taken(&self) -> u64 {
        self.slots.values().map(|slot| u64::from(slot.taken)).sum()
    }

    /// Functions with instances that run or are about to.
    pub fn running(&self) -> impl Iterator<Item = (&FunctionName, u32)> {
        self.slots.iter().filter(|(_, slot)| slot.taken > 0).map(|(name, slot)| (name, slot.taken))
    }

    /// The function of each call that waits.
    pub fn waiting(&self) -> impl Iterator<Item = &FunctionName> {
        self.waiting.iter().map(|(_, name)| name)
    }

    /// Replaces what is deployed. Running instances of functions that went keep their grants.
    pub fn set_functions(&mut self, functions: impl IntoIterator<Item = (FunctionName, Capacity)>) {
        let mut old = std::mem::take(&mut self.slots);
        for (name, capacity) in functions {
            let slot = old.remove(&name).unwrap_or_else(|| Slot::new(capacity));
            self.slots.insert(name, Slot { capacity, ..slot });
        }
        for (name, slot) in old {
            let capacity = Capacity { runnable: false, ..slot.capacity };
            if slot.taken > 0 || slot.kept > 0 {
                self.slots.insert(name, Slot { capacity, ..slot });
            } else {
                self.budget.release(slot.kept_bytes);
            }
        }
        self.settle_kept();
    }

    /// How many instances there are of each function that keeps some; not named: none. They are
    /// there, so what they take is reserved even beyond the budget.
    pub fn set_kept(&mut self, kept: &BTreeMap<FunctionName, u32>) {
        for (name, slot) in &mut self.slots {
            slot.kept = kept.get(name).copied().unwrap_or(0);
        }
        self.settle_kept();
    }

    fn settle_kept(&mut self) {
        for slot in self.slots.values_mut() {
            let bytes = slot.kept_bytes_with(slot.taken);
            self.budget.release(slot.kept_bytes);
            self.budget.reserve_anyway(bytes);
            slot.kept_bytes = bytes;
        }
    }

    /// Whether somebody waits who would be served if there were more memory: what is idle may
    /// go for it.
    pub fn short_of_memory(&self, due: &[FunctionName]) -> bool {
        let waits = self.waiting.iter().map(|(_, name)| name).chain(due);
        waits
            .filter_map(|name| self.slots.get(name))
            .any(|slot| slot.free() && !self.budget.fits(slot.more_bytes()))
    }

    /// A synchronous call gets in line, or is refused at once.
    pub fn call(&mut self, ticket: Ticket, function: &FunctionName) -> Result<(), Refusal> {
        let slot = self.slots.get(function).ok_or(Refusal::Unknown)?;
        if !slot.capacity.runnable {
            return Err(Refusal::NotRunnable);
        }
        if !self.budget.could_fit(slot.capacity.memory_bytes) {
            return Err(Refusal::NeverFits);
        }
        let own = self.waiting.iter().filter(|(_, name)| name == function).count();
        if self.waiting.len() >= WAITING_MAX || own >= WAITING_ONE_MAX {
            return Err(Refusal::QueueFull);
        }
        self.waiting.push_back((ticket, function.clone()));
        Ok(())
    }

    /// The caller left before its turn.
    pub fn cancel(&mut self, ticket: Ticket) {
        self.waiting.retain(|(other, _)| *other != ticket);
    }

    /// Calls that may start now, by lane and in the order they came; one whose function has no
    /// slot does not hold back those of others.
    pub fn startable(&mut self) -> Vec<(Ticket, Grant)> {
        let mut started = Vec::new();
        let mut waiting = std::mem::take(&mut self.waiting);
        for lane in Lane::ALL {
            waiting.retain(|(ticket, function)| {
                let grant = if self.lane(function) == lane { self.try_take(function) } else { None };
                let stays = grant.is_none();
                started.extend(grant.map(|grant| (*ticket, grant)));
                stays
            });
        }
        self.waiting = waiting;
        started
    }

    /// Calls that wait for functions that can't run any more; they are to be refused.
    pub fn stranded(&mut self) -> Vec<(Ticket, FunctionName)> {
        let slots = &self.slots;
        let runnable = |name: &FunctionName| slots.get(name).is_some_and(|slot| slot.capacity.runnable);
        let (keep, gone) =
            std::mem::take(&mut self.waiting).into_iter().partition(|(_, name)| runnable(name));
        self.waiting = keep;
        Vec::from(gone)
    }

    /// How many due invocations of which function to lease now: one slot each in turn until
    /// slots or memory are used up. The slots are taken; give back those that no event fills.
    pub fn leases(&mut self, due: &[FunctionName]) -> Vec<(FunctionName, Vec<Grant>)> {
        self.leases_within(due, |_| u32::MAX)
    }

    /// The same, no more of each function than `limit` says.
    pub fn leases_within(
        &mut self,
        due: &[FunctionName],
        limit: impl Fn(&FunctionName) -> u32,
    ) -> Vec<(FunctionName, Vec<Grant>)> {
        // Whoever has nothing to run any more, or may not, waits for no memory.
        let waiting = &self.waiting;
        self.passed.retain(|name, _| {
            (due.contains(name) && limit(name) > 0) || waiting.iter().any(|(_, other)| other == name)
        });
        let mut order: Vec<&FunctionName> = due.iter().collect();
        order.sort();
        let after = |turn: &FunctionName| order.iter().position(|name| *name > turn);
        let first = self.turn.as_ref().and_then(after).unwrap_or(0);
        order.rotate_left(first);
        let most = |name: &FunctionName| limit(name).min(LEASE_MAX) as usize;
        let mut wanted: Vec<(FunctionName, usize, Vec<Grant>)> =
            order.iter().map(|name| ((*name).clone(), most(name), Vec::new())).collect();
        for lane in Lane::ALL {
            let mut any = true;
            while any {
                any = false;
                for (name, most, grants) in &mut wanted {
                    if grants.len() >= *most || self.lane(name) != lane {
                        continue;
                    }
                    if let Some(grant) = self.try_take(name) {
                        grants.push(grant);
                        self.turn = Some(name.clone());
                        any = true;
                    }
                }
            }
        }
        wanted.retain(|(.., grants)| !grants.is_empty());
        wanted.into_iter().map(|(name, _, grants)| (name, grants)).collect()
    }

    /// An instance ended, or a held slot was not needed.
    pub fn ended(&mut self, grant: Grant) {
        self.budget.release(grant.memory_bytes);
        if let Some(slot) = self.slots.get_mut(&grant.function) {
            slot.taken = slot.taken.saturating_sub(1);
            let bytes = slot.kept_bytes_with(slot.taken).min(slot.kept_bytes);
            self.budget.release(slot.kept_bytes - bytes);
            slot.kept_bytes = bytes;
        }
    }

    fn lane(&self, function: &FunctionName) -> Lane {
        self.slots.get(function).map_or(Lane::default(), |slot| slot.capacity.lane)
    }

    fn try_take(&mut self, function: &FunctionName) -> Option<Grant> {
        if self.braked && self.taken() > 0 {
            return None;
        }
        let kept = self.kept_for_others(function);
        let slot = self.slots.get_mut(function)?;
        let more_bytes = slot.more_bytes();
        if !slot.free() || !self.budget.could_fit(slot.capacity.memory_bytes) {
            return None;
        }
        if !self.budget.fits(more_bytes.saturating_add(kept)) || !self.budget.try_reserve(more_bytes) {
            self.passed.entry(function.clone()).or_default();
            return None;
        }
        slot.taken += 1;
        let memory_bytes = match slot.capacity.shared_by {
            None => more_bytes,
            Some(_) => {
                slot.kept_bytes += more_bytes;
                0
            }
        };
        self.passed.remove(function);
        self.passed.values_mut().for_each(|times| *times += 1);
        Some(Grant { function: function.clone(), memory_bytes })
    }

    /// What the function that was passed over most often, and too often, is to find free.
    fn kept_for_others(&self, function: &FunctionName) -> u64 {
        let entitled = self
            .passed
            .iter()
            .filter(|(name, times)| **times >= PASSED_MAX && self.slots.get(*name).is_some_and(Slot::free));
        match entitled.max_by_key(|(_, times)| **times) {
            Some((name, _)) if name != function => self.slots[name].capacity.memory_bytes,
            _ => 0,
        }
    }
}

impl Slot {
    fn free(&self) -> bool {
        self.capacity.runnable && self.taken < self.capacity.invocations_max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> FunctionName {
        FunctionName::parse(text).expect("a good name")
    }

    fn plan(budget: u64, functions: &[(&str, u32, u64)]) -> Plan {
        let mut plan = Plan::new(Budget::new(budget));
        plan.set_functions(functions.iter().map(|(n, max, memory)| {
            let lane = Lane::Normal;
            let capacity = Capacity {
                instances_max: *max,
                memory_bytes: *memory,
                lane,
                runnable: true,
                shared_by: None,
            };
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
        let mut plan =
            plan_of_lanes(20, &[("a-low", Lane::Low), ("b", Lane::Normal), ("c-high", Lane::High)]);
        plan.call(1, &name("a-low")).expect("room to wait");
        plan.call(2, &name("c-high")).expect("room to wait");
        plan.call(3, &name("b")).expect("room to wait");

        let calls: Vec<Ticket> = plan.startable().into_iter().map(|(ticket, _)| ticket).collect();
        let mut fresh = plan_of_lanes(20, &[("a-low", Lane::Low), ("b", Lane::Normal)]);
        let leased = fresh.leases(&[name("a-low"), name("b")]);

        assert_eq!(calls, [2, 3]);
        assert_eq!(
            leased.iter().map(|(n, grants)| (n.as_str(), grants.len())).collect::<Vec<_>>(),
            [("b", 2)]
        );
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
}
