//! Which invocation runs when. `plan` and `budget` and `settle` decide and are pure; `driver`
//! asks the store, starts instances and tells the store how they ended.

pub mod budget;
pub mod driver;
pub mod plan;
pub mod settle;
