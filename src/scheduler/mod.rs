//! Which invocation runs when. `plan` and `budget` and `settle` decide and are pure; `driver`
//! asks the store, starts instances and tells the store how they ended. `pool` (with `arrivals`)
//! decides how many instances wait ahead of their events, `parking` holds them.

pub mod arrivals;
pub mod budget;
pub mod driver;
pub mod parking;
pub mod plan;
pub mod pool;
pub mod pressure;
pub mod settle;
