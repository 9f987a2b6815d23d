//! The pool in a world of its own: a clock that is moved, instances that take a while to be
//! made, events that come by a script.

use super::*;
use proptest::prelude::*;

const ROOMY: Bounds = Bounds { room_bytes: 1 << 40, parked_max: PARKED_MAX, busy: false, give_way: false };

fn name(text: &str) -> FunctionName {
    FunctionName::parse(text).expect("a good name")
}

fn wanted(min: ScaleMin) -> Wanted {
    Wanted { revision: 1, min, max: 8, runnable: true }
}

fn pool(functions: &[(&str, ScaleMin)]) -> Pool {
    let mut pool = Pool::default();
    pool.set_functions(functions.iter().map(|(n, min)| (name(n), wanted(*min))));
    pool
}

fn ready(pool: &Pool, of: &str) -> u32 {
    pool.ready().find(|(name, _)| name.as_str() == of).map_or(0, |(_, count)| count)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Looks and makes until nothing more is asked for.
fn fill(pool: &mut Pool, now: Duration, bounds: Bounds) -> u32 {
    let mut made = 0;
    loop {
        let look = pool.look(now, bounds);
        let Some(Step::Make { function, revision }) = look.steps.last() else { return made };
        assert!(pool.made(function, *revision));
        made += 1;
        assert!(made <= 2 * PARKED_MAX, "it never has enough");
    }
}

/// One function's life: what its events found, and what waiting for them cost.
struct World {
    pool: Pool,
    bounds: Bounds,
    making: Option<Duration>,
    now: Duration,
    hits: u32,
    misses: u32,
    waited: Duration,
}

impl World {
    const MAKING: Duration = Duration::from_millis(40);

    fn new(min: ScaleMin) -> Self {
        let pool = pool(&[("f", min)]);
        let (hits, misses, waited) = (0, 0, Duration::ZERO);
        Self { pool, bounds: ROOMY, making: None, now: Duration::ZERO, hits, misses, waited }
    }

    /// Nothing arrives until then.
    fn pass_until(&mut self, then: Duration) {
        loop {
            let look = self.pool.look(self.now, self.bounds);
            for step in look.steps {
                if let Step::Make { .. } = step {
                    assert!(self.making.is_none(), "one at a time");
                    self.making = Some(self.now + Self::MAKING);
                }
            }
            let next = [self.making, look.again].into_iter().flatten().min().unwrap_or(then).min(then);
            assert!(next > self.now || next == then, "it asks to look again at once");
            self.waited += (next - self.now) * ready(&self.pool, "f");
            self.now = next;
            if self.making.is_some_and(|at| at <= self.now) {
                self.making = None;
                assert!(self.pool.made(&name("f"), 1));
            } else if self.now == then {
                return;
            }
        }
    }

    fn event(&mut self, at: Duration) {
        self.pass_until(at);
        self.pool.arrived(&name("f"), self.now);
        match self.pool.take(&name("f"), 1) {
            Source::Ready => self.hits += 1,
            Source::Making | Source::Cold => self.misses += 1,
        }
        // It ends at once, and what it claimed is taken from what is made.
        if self.making.take().is_some() {
            assert!(self.pool.made(&name("f"), 1));
        }
    }
}

#[test]
fn a_number_is_kept_ready_and_replaced() {
    let mut world = World::new(ScaleMin::Fixed(3));
    world.pass_until(ms(1000));
    assert_eq!(ready(&world.pool, "f"), 3);

    for n in 0..10 {
        world.event(ms(2000 + n * 1000));
    }
    world.pass_until(ms(60_000));

    assert_eq!((world.hits, world.misses), (10, 0));
    assert_eq!(ready(&world.pool, "f"), 3);
}

#[test]
fn a_periodic_sensor_finds_its_instance_and_costs_little_between() {
    let mut random = fastrand::Rng::with_seed(11);
    let mut world = World::new(ScaleMin::Auto);
    // Every minute, give or take a second.
    let mut at = Duration::ZERO;
    for n in 0u64..220 {
        at = ms(1000 + n * 60_000 + random.u64(0..2000));
        world.event(at);
        if n == 19 {
            (world.hits, world.misses, world.waited) = (0, 0, Duration::ZERO);
        }
    }

    let share = world.waited.as_secs_f64() / (200.0 * 60.0);
    assert!(world.hits >= 195, "{} of 200", world.hits);
    assert!(share < 0.1, "an instance waits for {:.0} % of the time", share * 100.0);
    world.pass_until(at + ms(3_600_000));
    assert_eq!(ready(&world.pool, "f"), 0, "it fell silent");
}

#[test]
fn bursts_find_as_many_as_they_need_but_never_more_than_may_run() {
    for (size, expected) in [(5, 5), (20, 8)] {
        let mut world = World::new(ScaleMin::Auto);
        for n in 0..12 {
            if n == 6 {
                (world.hits, world.misses) = (0, 0);
            }
            world.pass_until(ms(n * 300_000));
            assert!(ready(&world.pool, "f") <= 8);
            for _ in 0..size {
                world.event(ms(n * 300_000));
            }
        }

        assert!(world.hits >= 6 * expected, "{} of {} found one", world.hits, 6 * size);
    }
}

#[test]
fn arrivals_without_a_rhythm_find_one_most_of_the_time() {
    let mut random = fastrand::Rng::with_seed(5);
    let mut world = World::new(ScaleMin::Auto);
    let mut at = 0.0;
    for _ in 0..300 {
        // A Poisson process: one in 20 s on average.
        at += -20.0 * (1.0 - random.f64()).ln();
        world.event(Duration::from_secs_f64(at));
    }

    assert!(world.hits >= 260, "{} of 300", world.hits);
}

#[test]
fn silence_costs_nothing_and_wakes_nobody() {
    let mut world = World::new(ScaleMin::Auto);
    for n in 0..30 {
        world.event(ms(n * 700));
    }
    world.pass_until(ms(600_000));

    assert_eq!(ready(&world.pool, "f"), 0);
    assert_eq!(world.pool.look(world.now, ROOMY), Look::default());
}

#[test]
fn a_replacement_waits_for_a_quiet_moment_but_not_for_long() {
    let mut pool = pool(&[("f", ScaleMin::Fixed(1))]);
    let busy = Bounds { busy: true, ..ROOMY };

    let first = pool.look(ms(100), busy);
    let late = pool.look(first.again.expect("a time to look again"), busy);

    assert_eq!(first.steps, []);
    assert_eq!(first.again, Some(ms(100) + HOLD));
    assert!(matches!(late.steps[..], [Step::Make { .. }]));
}

#[test]
fn an_event_takes_the_one_that_is_being_made() {
    let mut pool = pool(&[("f", ScaleMin::Fixed(1))]);
    pool.look(ms(0), ROOMY);

    assert_eq!(pool.take(&name("f"), 1), Source::Making);
    assert_eq!(pool.take(&name("f"), 1), Source::Cold, "it is promised");
    assert!(pool.made(&name("f"), 1));
    pool.claim_ends(&name("f"), 1, true);

    assert_eq!(ready(&pool, "f"), 0);
    assert_eq!(fill(&mut pool, ms(1), ROOMY), 1);
}

#[test]
fn another_revision_begins_with_none_of_its_own() {
    let mut pool = pool(&[("f", ScaleMin::Fixed(2))]);
    fill(&mut pool, ms(0), ROOMY);
    assert_eq!(pool.take(&name("f"), 1), Source::Ready);
    pool.look(ms(0), ROOMY);

    pool.set_functions([(name("f"), Wanted { revision: 2, ..wanted(ScaleMin::Fixed(2)) })]);

    assert_eq!(pool.take(&name("f"), 2), Source::Cold);
    assert!(!pool.made(&name("f"), 1), "the old one's comes late");
    assert_eq!(fill(&mut pool, ms(0), ROOMY), 2);
    assert_eq!(pool.take(&name("f"), 1), Source::Cold, "an event of the old one");
    assert_eq!(pool.reserved_bytes(), 2 * PARKED_BYTES);
}

#[test]
fn paused_and_removed_functions_keep_none() {
    let mut pool = pool(&[("f", ScaleMin::Fixed(2)), ("g", ScaleMin::Fixed(1))]);
    fill(&mut pool, ms(0), ROOMY);

    pool.set_functions([(name("f"), Wanted { runnable: false, ..wanted(ScaleMin::Fixed(2)) })]);

    assert_eq!(pool.look(ms(0), ROOMY).steps, [Step::Drop { function: name("f"), count: 2 }]);
    assert_eq!(pool.reserved_bytes(), 0);
}

#[test]
fn starts_and_short_memory_go_before_the_pool() {
    let mut pool = pool(&[("f", ScaleMin::Fixed(4))]);
    fill(&mut pool, ms(0), ROOMY);

    let less = pool.look(ms(1), Bounds { room_bytes: 3 * PARKED_BYTES - 1, ..ROOMY });
    let none = pool.look(ms(2), Bounds { give_way: true, ..ROOMY });

    assert_eq!(less.steps, [Step::Drop { function: name("f"), count: 2 }]);
    assert_eq!(none.steps, [Step::Drop { function: name("f"), count: 2 }]);
    assert_eq!(fill(&mut pool, ms(3), ROOMY), 4);
}

#[test]
fn short_room_is_shared_in_turns_and_numbers_go_first() {
    let mut pool = pool(&[("a", ScaleMin::Fixed(4)), ("b", ScaleMin::Auto), ("c", ScaleMin::Fixed(4))]);
    pool.arrived(&name("b"), ms(0));

    fill(&mut pool, ms(0), Bounds { room_bytes: 5 * PARKED_BYTES, ..ROOMY });

    assert_eq!(["a", "b", "c"].map(|n| ready(&pool, n)), [3, 0, 2]);
}

#[test]
fn few_descriptors_are_not_all_taken() {
    let mut pool = pool(&[("f", ScaleMin::Fixed(8))]);

    let made = fill(&mut pool, ms(0), Bounds { parked_max: parked_max(64), ..ROOMY });

    assert_eq!(made, 4);
    assert_eq!(parked_max(1 << 20), PARKED_MAX);
}

#[test]
fn what_can_not_be_made_is_tried_ever_more_rarely() {
    let mut pool = pool(&[("f", ScaleMin::Fixed(1))]);
    let mut now = ms(0);
    let mut tries = 0;
    while now < Duration::from_secs(600) {
        let look = pool.look(now, ROOMY);
        for step in look.steps {
            let Step::Make { function, revision } = step else { panic!("nothing to drop") };
            tries += 1;
            // Half of the time it is made and dies at once.
            if tries % 2 == 0 {
                pool.failed(&function, revision, now, u64::MAX);
            } else {
                assert!(pool.made(&function, revision));
                pool.died(&function, revision, now, u64::MAX);
            }
        }
        now = pool.look(now, ROOMY).again.expect("it is tried again");
    }

    assert!((10..=14).contains(&tries), "{tries}");
}

#[test]
fn a_launcher_that_dies_with_all_is_one_trouble() {
    let mut pool = pool(&[("f", ScaleMin::Fixed(8))]);
    fill(&mut pool, ms(0), ROOMY);

    for _ in 0..8 {
        pool.died(&name("f"), 1, ms(1000), u64::MAX);
    }

    assert_eq!(pool.look(ms(1000), ROOMY).again, Some(ms(1200)));
    assert_eq!(fill(&mut pool, ms(1200), ROOMY), 8);
}

proptest! {
    /// Whatever happens in whatever order: never more than fits, and what is counted is there.
    #[test]
    fn the_pool_stays_within_its_room(steps in prop::collection::vec((0u8..8, 0usize..3, 0u64..12), 1..300)) {
        let functions = [("a", ScaleMin::Fixed(3)), ("b", ScaleMin::Auto), ("c", ScaleMin::Fixed(5))];
        let mut pool = pool(&functions);
        let mut making: Vec<(FunctionName, u32)> = Vec::new();
        let mut claims = [0u32; 3];
        let mut ready = [0u32; 3];
        let mut now = ms(0);
        let index = |n: &FunctionName| functions.iter().position(|(m, _)| *m == n.as_str()).expect("one of them");
        for (step, which, amount) in steps {
            let f = name(functions[which].0);
            match step {
                0 => now += ms(amount * 100),
                1 => {
                    pool.arrived(&f, now);
                    match pool.take(&f, 1) {
                        Source::Ready => ready[which] -= 1,
                        Source::Making => claims[which] += 1,
                        Source::Cold => {}
                    }
                }
                2 => if let Some((n, revision)) = making.pop() {
                    prop_assert!(pool.made(&n, revision));
                    let at = index(&n);
                    ready[at] += 1;
                    if claims[at] > 0 {
                        claims[at] -= 1;
                        ready[at] -= 1;
                        pool.claim_ends(&n, revision, true);
                    }
                },
                3 => if let Some((n, revision)) = making.pop() {
                    let at = index(&n);
                    pool.failed(&n, revision, now, amount);
                    for _ in 0..claims[at] { pool.claim_ends(&n, revision, false); }
                    claims[at] = 0;
                },
                4 => if ready[which] > 0 {
                    ready[which] -= 1;
                    pool.died(&f, 1, now, amount);
                },
                _ => {
                    let room_bytes = amount * PARKED_BYTES;
                    let bounds = Bounds { room_bytes, busy: step == 5, give_way: step == 6 && amount == 0, ..ROOMY };
                    let look = pool.look(now, bounds);
                    for step in look.steps {
                        match step {
                            Step::Make { function, revision } => making.push((function, revision)),
                            Step::Drop { function, count } => ready[index(&function)] -= count,
                        }
                    }
                    let held = u64::from(ready.iter().sum::<u32>());
                    prop_assert!(held * PARKED_BYTES <= room_bytes);
                    let at_most = room_bytes.max(making.len() as u64 * PARKED_BYTES);
                    prop_assert!(pool.reserved_bytes() <= at_most, "what is being made can't be taken back, all else is");
                }
            }
            prop_assert!(making.len() <= MAKING_MAX as usize);
            for (at, (n, _)) in functions.iter().enumerate() {
                prop_assert_eq!(self::ready(&pool, n), ready[at]);
            }
        }
    }
}
