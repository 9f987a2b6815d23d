//! Three lanes of priority: what a function's `priority` says of its events and deliveries.
//! Order is kept within a lane, never between two.

use serde::{Deserialize, Serialize};

/// In order: what is in an earlier lane goes first, and is dropped last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    High,
    #[default]
    Normal,
    Low,
}

impl Lane {
    pub const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Normal => "normal",
            Self::Low => "low",
        }
    }
}
