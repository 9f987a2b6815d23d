//! Which invocation runs when. `plan`, `budget`, `gates` (`rate` and `breaker`) and `settle` decide and are pure; `driver`
//! asks the store, starts instances and tells the store how they ended.

pub mod breaker;
pub mod budget;
pub mod driver;
pub mod gates;
pub mod plan;
pub mod rate;
pub mod settle;
