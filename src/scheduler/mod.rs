//! Which invocation runs when. `plan`, `budget`, `gates` (`rate` and `breaker`) and `settle`
//! decide and are pure, as is `pace` (when a refused caller should come again); `driver` is the loop
//! that acts: `calls` answers those who wait, `leases` takes events from the store and tells it how
//! they ended, `attempt` runs either. `pool` (with `arrivals`) decides how many instances wait ahead
//! of their events, `parking` holds them; `warm` decides how many of those that stay up are started
//! ahead, and `keeping` has them so.

pub mod arrivals;
mod attempt;
pub mod breaker;
pub mod budget;
mod calls;
pub mod driver;
pub mod gates;
pub mod keeping;
mod leases;
pub mod pace;
pub mod parking;
pub mod plan;
pub mod pool;
pub mod pressure;
pub mod rate;
pub mod settle;
pub mod warm;
