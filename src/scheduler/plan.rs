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
mod tests;
