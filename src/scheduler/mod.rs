//! Which invocation runs when. `plan`, `budget`, `gates` (`rate` and `breaker`) and `settle`
//! decide and are pure; `driver` asks the store, starts instances and tells the store how they
//! ended. `pool` (with `arrivals`) decides how many instances wait ahead of their events,
//! `parking` holds them.

pub mod arrivals;
pub mod breaker;
pub mod budget;
pub mod driver;
pub mod gates;
pub mod parking;
pub mod plan;
pub mod pool;
pub mod pressure;
pub mod rate;
pub mod settle;
