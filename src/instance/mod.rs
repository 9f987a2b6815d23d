//! One container serving invocations: `state` says what an ending means, `driver` moves the
//! bytes. Handler stdio: one fresh container for each event.

pub mod driver;
pub mod state;
