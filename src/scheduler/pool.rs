//! How many instances wait ahead of their events: when to make the next, when to let one go.
//! Pure: the driver tells what happened and does what `look` says.
//!
//! ```text
//!             making ──▶ ready ──▶ taken by an event
//!   failed ◀────┘          └─────▶ died (killed from outside), or dropped: not wanted any more
//!     └─── backoff ◀────────┘
//! ```
//!
//! `scale.min` is a number, kept whatever happens, or `"auto"`: `arrivals` says when.
//!
//! **What a parked one reserves.** An instance that was never started runs no code but neap's:
//! it sleeps in one system call, and its limit is what it may take once it is started, which
//! nobody does without reserving that limit. So it reserves what it costs, `PARKED_BYTES`, and
//! not its limit; with limits reserved, a node of 512 MiB could keep six functions ready. Starts
//! go first: the pool has what the limits of running instances leave, and gives way at once.
//!
//! **Replacing must not delay the event that made it necessary**: the launcher that creates the
//! next one also reports the end of this one. So it waits until nothing runs, but only for
//! `HOLD`; and instances are made one at a time, so that an event that finds none waits for one
//! at most.

use super::arrivals::{Arrivals, Demand};
use crate::backoff::Backoff;
use crate::model::FunctionName;
use crate::model::function::ScaleMin;
use std::collections::BTreeMap;
use std::time::Duration;

/// Reserved for a parked instance: what it really takes. See the module's head.
pub const PARKED_BYTES: u64 = 2 << 20;

/// Parked instances of all functions: each is a process. No more are made; functions get theirs
/// in turns. Fewer where the daemon may not open enough files, see `parked_max`.
pub const PARKED_MAX: u32 = 1000;

/// Descriptors of the daemon for each: three pipes, a socket, a pidfd, and the two sockets that
/// questions for names come to where it has a way out.
const DESCRIPTORS: u64 = 7;

/// As many as leave half of the descriptors to running instances and connections.
pub fn parked_max(open_files_max: u64) -> u32 {
    u32::try_from(open_files_max / 2 / DESCRIPTORS).unwrap_or(u32::MAX).min(PARKED_MAX)
}

/// Instances being made for the pool at once.
const MAKING_MAX: u32 = 1;

/// How long a missing one may wait for a moment in which nothing runs.
const HOLD: Duration = Duration::from_millis(25);

/// After one could not be made, or died. Doubles as long as that goes on.
const TROUBLE: Backoff = Backoff { first: Duration::from_millis(200), max: Duration::from_secs(300) };

/// Trouble that is so long ago has nothing to do with the next.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// What a function asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Parked instances belong to one revision.
    pub revision: u32,
    /// `scale.min`
    pub min: ScaleMin,
    /// `scale.max`: no more are of use at once.
    pub max: u32,
    /// False: paused or unusable.
    pub runnable: bool,
}

#[derive(Debug, Default)]
pub struct Pool {
    functions: BTreeMap<FunctionName, Function>,
    /// Being made, those for revisions that are gone included.
    making: u32,
}

#[derive(Debug)]
struct Function {
    wanted: Wanted,
    ready: u32,
    making: u32,
    /// Of those being made, how many an event already waits for.
    claimed: u32,
    arrivals: Arrivals,
    short_since: Option<Duration>,
    failures: u32,
    /// Nothing is made before.
    retry_at: Duration,
}

/// Where an event's instance comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Ready,
    /// One is being made for the pool: the event takes it as soon as it is there.
    Making,
    /// There is none: it is created for the event.
    Cold,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Make { function: FunctionName, revision: u32 },
    Drop { function: FunctionName, count: u32 },
}

/// What to do now, and when to look again though nothing happens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    pub steps: Vec<Step>,
    pub again: Option<Duration>,
}

/// What bounds the pool at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// What running instances leave of the node's memory budget.
    pub room_bytes: u64,
    /// See the function of that name.
    pub parked_max: u32,
    /// An instance runs just now.
    pub busy: bool,
    /// Memory is short, or the daemon stops: nothing is kept.
    pub give_way: bool,
}

impl Pool {
    /// Replaces what is deployed. What was ready for another revision is no longer counted; the
    /// driver drops it.
    pub fn set_functions(&mut self, functions: impl IntoIterator<Item = (FunctionName, Wanted)>) {
        let mut old = std::mem::take(&mut self.functions);
        for (name, wanted) in functions {
            let function = match old.remove(&name) {
                Some(function) if function.wanted.revision == wanted.revision => {
                    Function { wanted, ..function }
                }
                // Its events keep their rhythm whatever revision serves them.
                Some(function) => Function { arrivals: function.arrivals, ..Function::new(wanted) },
                None => Function::new(wanted),
            };
            self.functions.insert(name, function);
        }
    }

    /// An event or call has come to its turn, or to the queue.
    pub fn arrived(&mut self, name: &FunctionName, now: Duration) {
        if let Some(function) = self.functions.get_mut(name)
            && function.wanted.min == ScaleMin::Auto
        {
            function.arrivals.arrived(now);
        }
    }

    /// An event starts now.
    pub fn take(&mut self, name: &FunctionName, revision: u32) -> Source {
        let Some(function) = self.current(name, revision) else { return Source::Cold };
        if function.ready > 0 {
            function.ready -= 1;
            Source::Ready
        } else if function.making > function.claimed {
            function.claimed += 1;
            Source::Making
        } else {
            Source::Cold
        }
    }

    /// One that a deploy made before its switch is about to be `made`. False: it is not wanted.
    pub fn expect(&mut self, name: &FunctionName, revision: u32) -> bool {
        let Some(function) = self.current(name, revision) else { return false };
        function.making += 1;
        self.making += 1;
        true
    }

    /// One is there. False: for a revision that is gone; it is to be dropped.
    #[must_use]
    pub fn made(&mut self, name: &FunctionName, revision: u32) -> bool {
        self.making = self.making.saturating_sub(1);
        let Some(function) = self.current(name, revision) else { return false };
        function.making = function.making.saturating_sub(1);
        function.ready += 1;
        true
    }

    /// An event that waited for one being made takes a ready one, or has gone, or finds that
    /// there will be none.
    pub fn claim_ends(&mut self, name: &FunctionName, revision: u32, took_one: bool) {
        let Some(function) = self.current(name, revision) else { return };
        function.claimed = function.claimed.saturating_sub(1);
        if took_one {
            function.ready = function.ready.saturating_sub(1);
        }
    }

    pub fn failed(&mut self, name: &FunctionName, revision: u32, now: Duration, random: u64) {
        self.making = self.making.saturating_sub(1);
        let Some(function) = self.current(name, revision) else { return };
        function.making = function.making.saturating_sub(1);
        function.trouble(now, random);
    }

    /// A ready one is gone though nobody took it.
    pub fn died(&mut self, name: &FunctionName, revision: u32, now: Duration, random: u64) {
        let Some(function) = self.current(name, revision) else { return };
        function.ready = function.ready.saturating_sub(1);
        function.trouble(now, random);
    }

    /// Functions with ready ones.
    pub fn ready(&self) -> impl Iterator<Item = (&FunctionName, u32)> {
        self.functions.iter().filter(|(_, function)| function.ready > 0).map(|(name, f)| (name, f.ready))
    }

    /// What ready ones and those being made reserve.
    pub fn reserved_bytes(&self) -> u64 {
        let ready: u64 = self.functions.values().map(|function| u64::from(function.ready)).sum();
        (ready + u64::from(self.making)) * PARKED_BYTES
    }

    /// What to do now. Steps are taken as done: dropped ones are counted no longer, one to be
    /// made counts as being made.
    pub fn look(&mut self, now: Duration, bounds: Bounds) -> Look {
        let mut look = Look::default();
        let demands: Vec<Demand> =
            self.functions.values().map(|function| function.demand(now, bounds)).collect();
        let allowed = self.allot(&demands, bounds);
        let mut again =
            |at: Duration| look.again = Some(look.again.map_or(at, |first: Duration| first.min(at)));
        let mut next: Option<(u32, &FunctionName)> = None;
        for (((name, function), demand), allowed) in self.functions.iter_mut().zip(&demands).zip(allowed) {
            demand.until.into_iter().for_each(&mut again);
            let have = function.have();
            if have > allowed && function.ready > 0 {
                let count = (have - allowed).min(function.ready);
                function.ready -= count;
                look.steps.push(Step::Drop { function: name.clone(), count });
            }
            if have >= demand.want.min(allowed) {
                function.short_since = None;
                continue;
            }
            let since = *function.short_since.get_or_insert(now);
            let due = if bounds.busy { since + HOLD } else { since }.max(function.retry_at);
            if due > now {
                again(due);
            } else if next.is_none_or(|(fewest, _)| have < fewest) {
                next = Some((have, name));
            }
        }
        // More than one short of one look: the end of the first making is the next look.
        if self.making < MAKING_MAX
            && let Some((_, name)) = next
        {
            let name = name.clone();
            if let Some(function) = self.functions.get_mut(&name) {
                self.making += 1;
                function.making += 1;
                let revision = function.wanted.revision;
                look.steps.push(Step::Make { function: name, revision });
            }
        }
        look
    }

    /// How many each may have, in the functions' order. Where room is short, numbers asked for
    /// by hand go before `"auto"`, and functions get one each in turns.
    fn allot(&self, demands: &[Demand], bounds: Bounds) -> Vec<u32> {
        let room = u32::try_from(bounds.room_bytes / PARKED_BYTES).unwrap_or(u32::MAX).min(bounds.parked_max);
        // Those being made can't be taken back: they have their room.
        let mut left = room.saturating_sub(self.making);
        let mut allowed: Vec<u32> = self.functions.values().map(Function::coming).collect();
        let all = demands.iter().zip(&allowed).map(|(demand, coming)| demand.keep.max(*coming));
        if all.clone().map(u64::from).sum::<u64>() <= u64::from(left) {
            return all.collect();
        }
        for auto in [false, true] {
            let mut any = true;
            while any && left > 0 {
                any = false;
                for ((function, demand), allowed) in self.functions.values().zip(demands).zip(&mut allowed) {
                    let wishes = (function.wanted.min == ScaleMin::Auto) == auto && *allowed < demand.keep;
                    if wishes && left > 0 {
                        (*allowed, left, any) = (*allowed + 1, left - 1, true);
                    }
                }
            }
        }
        allowed
    }

    fn current(&mut self, name: &FunctionName, revision: u32) -> Option<&mut Function> {
        self.functions.get_mut(name).filter(|function| function.wanted.revision == revision)
    }
}

impl Function {
    fn new(wanted: Wanted) -> Self {
        Self {
            wanted,
            ready: 0,
            making: 0,
            claimed: 0,
            arrivals: Arrivals::default(),
            short_since: None,
            failures: 0,
            retry_at: Duration::ZERO,
        }
    }

    /// Being made, and not promised to an event.
    fn coming(&self) -> u32 {
        self.making.saturating_sub(self.claimed)
    }

    /// Ready, or soon.
    fn have(&self) -> u32 {
        self.ready + self.coming()
    }

    fn demand(&self, now: Duration, bounds: Bounds) -> Demand {
        if !self.wanted.runnable || bounds.give_way {
            return Demand::default();
        }
        match self.wanted.min {
            ScaleMin::Fixed(count) => Demand { want: count, keep: count, until: None },
            ScaleMin::Auto => {
                let demand = self.arrivals.demand(now);
                let [want, keep] = [demand.want, demand.keep].map(|count| count.min(self.wanted.max));
                // What there is may stay; what there isn't takes no room.
                Demand { want, keep: want.max(keep.min(self.have())), until: demand.until }
            }
        }
    }

    /// A launcher that dies takes all of them at once: that is one trouble.
    fn trouble(&mut self, now: Duration, random: u64) {
        if now < self.retry_at {
            return;
        }
        if now - self.retry_at > FORGOTTEN {
            self.failures = 0;
        }
        self.retry_at = now + TROUBLE.delay(self.failures, random);
        self.failures = self.failures.saturating_add(1);
    }
}

#[cfg(test)]
mod tests;
