//! How many started instances each function whose handler stays up is to have, requests or not:
//! `scale.min`, a number or `"auto"`. Pure.
//!
//! With `"auto"` the number follows what was served at once: `arrivals` learns when the next requests
//! are due and how many of them come together, `scale.concurrency` of which share an instance. What
//! is idle beyond that goes after `scale.idle` as always, so a function that falls silent has none.
//!
//! A started instance takes its whole memory limit. So none is asked for where that has no room, and
//! none while memory is short or the daemon stops. Of a number what is there stays then, and goes when
//! somebody needs its memory; `"auto"` asks for nothing, which makes its idle ones the first to go.
//! Where room is short, numbers go first, and functions get one each in turns.

use super::arrivals::{Arrivals, Demand};
use super::pool::Bounds;
use crate::model::FunctionName;
use crate::model::function::ScaleMin;
use std::collections::BTreeMap;
use std::time::Duration;

/// What a function asks for, and has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// `scale.min`
    pub min: ScaleMin,
    /// `scale.max`
    pub max: u32,
    /// `scale.concurrency`
    pub concurrency: u32,
    /// `limits.memory`
    pub memory_bytes: u64,
    /// False: paused or unusable.
    pub runnable: bool,
    /// Instances that are there, whatever for: their memory is reserved.
    pub there: u32,
}

/// How requests of functions with `"auto"` have come; of no others.
#[derive(Debug, Default)]
pub struct Warm {
    arrivals: BTreeMap<FunctionName, Arrivals>,
}

/// What to have now, in the wishes' order, and when to look again though nothing happens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    pub counts: Vec<u32>,
    pub again: Option<Duration>,
}

impl Warm {
    /// Whose rhythm is to be learned; that of others is forgotten.
    pub fn set_functions(&mut self, names: impl Iterator<Item = FunctionName>) {
        let mut old = std::mem::take(&mut self.arrivals);
        self.arrivals = names
            .map(|name| {
                let known = old.remove(&name).unwrap_or_else(Arrivals::shared);
                (name, known)
            })
            .collect();
    }

    /// Whether a function's requests are of interest.
    pub fn learns(&self, name: &FunctionName) -> bool {
        self.arrivals.contains_key(name)
    }

    /// A request has come, and so many are served or wait now, it included.
    pub fn arrived(&mut self, name: &FunctionName, at_once: u32, now: Duration) {
        if let Some(arrivals) = self.arrivals.get_mut(name) {
            arrivals.arrived_among(at_once, now);
        }
    }

    pub fn look(&self, now: Duration, wishes: &[(&FunctionName, Wish)], bounds: Bounds) -> Look {
        let mut again: Option<Duration> = None;
        let wanted = wishes.iter().map(|(name, wish)| match wish.min {
            _ if !wish.runnable => 0,
            ScaleMin::Fixed(count) => count,
            ScaleMin::Auto if bounds.give_way => 0,
            ScaleMin::Auto => {
                let known = self.arrivals.get(*name);
                let Demand { want, until, .. } = known.map(|known| known.demand(now)).unwrap_or_default();
                again = again.into_iter().chain(until).min();
                want.div_ceil(wish.concurrency.max(1)).min(wish.max)
            }
        });
        let wanted: Vec<u32> = wanted.collect();
        // What is there has its room already.
        let mut counts: Vec<u32> =
            wishes.iter().zip(&wanted).map(|((_, wish), wanted)| wish.there.min(*wanted)).collect();
        let mut room_bytes = if bounds.give_way { 0 } else { bounds.room_bytes };
        for auto in [false, true] {
            let mut any = true;
            while any {
                any = false;
                for (((_, wish), wanted), count) in wishes.iter().zip(&wanted).zip(&mut counts) {
                    let wishes = (wish.min == ScaleMin::Auto) == auto && *count < *wanted;
                    if wishes && wish.memory_bytes <= room_bytes {
                        (*count, room_bytes, any) = (*count + 1, room_bytes - wish.memory_bytes, true);
                    }
                }
            }
        }
        Look { counts, again }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MEMORY: u64 = 64 << 20;
    const ROOMY: Bounds = Bounds { room_bytes: 100 * MEMORY, parked_max: 0, busy: false, give_way: false };
    const AUTO: Wish =
        Wish { min: ScaleMin::Auto, max: 8, concurrency: 1, memory_bytes: MEMORY, runnable: true, there: 0 };

    fn name(text: &str) -> FunctionName {
        FunctionName::parse(text).expect("a name")
    }

    fn secs(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn fixed(count: u32) -> Wish {
        Wish { min: ScaleMin::Fixed(count), ..AUTO }
    }

    /// One function, its instances and its requests, through time: what is asked for is started
    /// after `START`, what is idle and not asked for goes after `scale.idle`.
    struct World {
        name: FunctionName,
        warm: Warm,
        wish: Wish,
        /// Since when each is idle; it may lie ahead.
        instances: Vec<Duration>,
        now: Duration,
        cold: u32,
        instance_seconds: f64,
    }

    const START: Duration = Duration::from_secs(2);
    const IDLE: Duration = Duration::from_secs(60);

    impl World {
        fn new(concurrency: u32) -> Self {
            let name = name("f");
            let mut warm = Warm::default();
            warm.set_functions([name.clone()].into_iter());
            let wish = Wish { concurrency, ..AUTO };
            Self { name, warm, wish, instances: Vec::new(), now: secs(0.0), cold: 0, instance_seconds: 0.0 }
        }

        fn asked(&self) -> u32 {
            let wish = Wish { there: self.instances.len() as u32, ..self.wish };
            self.warm.look(self.now, &[(&self.name, wish)], ROOMY).counts[0]
        }

        /// Time goes on in steps of 100 ms.
        fn pass(&mut self, span: Duration) {
            let end = self.now + span;
            while self.now < end {
                self.now += Duration::from_millis(100);
                let asked = self.asked() as usize;
                while self.instances.len() < asked {
                    self.instances.push(self.now + START);
                }
                self.instances.sort_unstable();
                while self.instances.len() > asked && self.instances[0] + IDLE <= self.now {
                    self.instances.remove(0);
                }
                self.instance_seconds += 0.1 * self.instances.len() as f64;
            }
        }

        /// So many requests at once, each of which takes so long.
        fn requests(&mut self, count: u32, took: Duration) {
            for at_once in 1..=count {
                self.warm.arrived(&self.name, at_once, self.now);
            }
            let needed = count.div_ceil(self.wish.concurrency) as usize;
            self.instances.sort_unstable();
            for at in 0..needed.min(self.wish.max as usize) {
                match self.instances.get_mut(at) {
                    Some(idle) if *idle <= self.now => *idle = self.now + took,
                    Some(idle) => (*idle, self.cold) = (self.now + took, self.cold + 1),
                    None => {
                        self.cold += 1;
                        self.instances.push(self.now + START + took);
                    }
                }
            }
        }
    }

    #[test]
    fn a_request_every_five_minutes_finds_an_instance_that_is_not_there_in_between() {
        let mut world = World::new(1);
        for _ in 0..10 {
            world.requests(1, secs(0.2));
            world.pass(secs(300.0));
        }
        (world.cold, world.instance_seconds) = (0, 0.0);

        for _ in 0..20 {
            world.requests(1, secs(0.2));
            world.pass(secs(300.0));
        }

        assert_eq!(world.cold, 0);
        let share = world.instance_seconds / (20.0 * 300.0);
        assert!(share < 0.4, "{share}: a minute of scale.idle, and what the start takes");
    }

    #[test]
    fn what_is_served_at_once_counts_and_not_how_much_comes_in_a_second() {
        let mut world = World::new(1);
        for _ in 0..600 {
            world.requests(1, secs(0.01));
            world.pass(secs(0.1));
        }
        assert_eq!(world.asked(), 1, "ten in a second, one after the other");

        for _ in 0..60 {
            world.requests(5, secs(0.5));
            world.pass(secs(1.0));
        }
        assert_eq!(world.asked(), 5, "five at once");
        world.wish.concurrency = 2;
        assert_eq!(world.asked(), 3, "two share one");
        world.wish.max = 2;
        assert_eq!(world.asked(), 2);
    }

    #[test]
    fn a_function_that_falls_silent_has_none() {
        let mut world = World::new(1);
        for _ in 0..100 {
            world.requests(3, secs(0.2));
            world.pass(secs(1.0));
        }
        assert_eq!(world.instances.len(), 3);

        world.pass(secs(3600.0));

        assert_eq!((world.asked(), world.instances.len()), (0, 0));
        let again = world.warm.look(world.now, &[(&world.name, world.wish)], ROOMY).again;
        assert_eq!(again, None, "nothing to wake up for");
    }

    #[test]
    fn busier_hours_are_followed_up_and_down() {
        let mut world = World::new(1);
        for (each_s, at_once, expected) in [(10.0, 1, 1), (2.0, 6, 6), (10.0, 1, 1)] {
            for _ in 0..40 {
                world.requests(at_once, secs(0.5));
                world.pass(secs(each_s));
            }
            world.cold = 0;
            world.requests(at_once, secs(0.5));
            assert_eq!(world.cold, 0);
            assert_eq!(world.asked(), expected);
            world.pass(secs(each_s));
        }
    }

    #[test]
    fn numbers_go_first_and_the_rest_is_shared_in_turns() {
        let mut warm = Warm::default();
        let names = ["a", "b", "c", "d"].map(name);
        warm.set_functions(names.iter().cloned());
        for at_once in 1..=4 {
            warm.arrived(&names[0], at_once, secs(1.0));
            warm.arrived(&names[2], at_once, secs(1.0));
        }
        let wishes = [AUTO, fixed(2), AUTO, Wish { runnable: false, ..fixed(2) }];
        let wishes: Vec<_> = names.iter().zip(wishes).collect();
        let with = |room: u64, give_way| {
            let bounds = Bounds { room_bytes: room * MEMORY, give_way, ..ROOMY };
            warm.look(secs(2.0), &wishes, bounds).counts
        };

        assert_eq!(with(100, false), [4, 2, 4, 0]);
        assert_eq!(with(5, false), [2, 2, 1, 0]);
        assert_eq!(with(1, false), [0, 1, 0, 0]);
        assert_eq!(with(100, true), [0, 0, 0, 0]);
    }

    #[test]
    fn short_memory_shrinks_auto_first_and_lets_a_number_keep_what_is_there() {
        let mut warm = Warm::default();
        let (auto, number) = (name("auto"), name("number"));
        warm.set_functions([auto.clone()].into_iter());
        (1..=3).for_each(|at_once| warm.arrived(&auto, at_once, secs(1.0)));
        let wishes = [(&auto, Wish { there: 3, ..AUTO }), (&number, Wish { there: 2, ..fixed(4) })];

        let calm = warm.look(secs(2.0), &wishes, ROOMY);
        let short = warm.look(secs(2.0), &wishes, Bounds { give_way: true, ..ROOMY });

        assert_eq!(calm.counts, [3, 4]);
        assert_eq!(short.counts, [0, 2]);
    }

    proptest! {
        #[test]
        fn nothing_is_asked_for_beyond_the_room(
            asks in prop::collection::vec((0u32..6, 0u32..4, any::<bool>(), 1u64..4), 1..6),
            room in 0u64..20,
        ) {
            let names: Vec<FunctionName> = (0..asks.len()).map(|n| name(&format!("f{n}"))).collect();
            let mut warm = Warm::default();
            warm.set_functions(names.iter().cloned());
            let mut wishes = Vec::new();
            for (name, (count, there, auto, memory)) in names.iter().zip(&asks) {
                (1..=*count).for_each(|at_once| warm.arrived(name, at_once, secs(1.0)));
                let min = if *auto { ScaleMin::Auto } else { ScaleMin::Fixed(*count) };
                wishes.push((name, Wish { min, there: *there, memory_bytes: *memory, ..AUTO }));
            }

            let look = warm.look(secs(1.5), &wishes, Bounds { room_bytes: room, ..ROOMY });

            let more = wishes.iter().zip(&look.counts);
            let more: u64 =
                more.map(|((_, wish), count)| u64::from(count.saturating_sub(wish.there)) * wish.memory_bytes).sum();
            prop_assert!(more <= room);
            for (count, (asked, ..)) in look.counts.iter().zip(&asks) {
                prop_assert!(count <= asked);
            }
        }
    }
}
