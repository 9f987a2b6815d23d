//! The node's memory budget: limits are reserved, not hopes. An instance may start only while
//! the sum of all running instances' `limits.memory` stays within `[node] memory`.

/// Bytes that may be reserved and are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    total_bytes: u64,
    reserved_bytes: u64,
}

impl Budget {
    pub fn new(total_bytes: u64) -> Self {
        Self { total_bytes, reserved_bytes: 0 }
    }

    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    pub fn reserved_bytes(&self) -> u64 {
        self.reserved_bytes
    }

    /// Whether it fits now.
    pub fn fits(&self, bytes: u64) -> bool {
        self.reserved_bytes.checked_add(bytes).is_some_and(|sum| sum <= self.total_bytes)
    }

    /// False when it does not fit now.
    pub fn try_reserve(&mut self, bytes: u64) -> bool {
        let fits = self.fits(bytes);
        if fits {
            self.reserved_bytes += bytes;
        }
        fits
    }

    /// For what is there already.
    pub fn reserve_anyway(&mut self, bytes: u64) {
        self.reserved_bytes = self.reserved_bytes.saturating_add(bytes);
    }

    /// Gives back what `try_reserve` took.
    pub fn release(&mut self, bytes: u64) {
        debug_assert!(bytes <= self.reserved_bytes, "more released than was reserved");
        self.reserved_bytes = self.reserved_bytes.saturating_sub(bytes);
    }

    /// A smaller total only holds new instances back; what runs goes on.
    pub fn set_total(&mut self, bytes: u64) {
        self.total_bytes = bytes;
    }

    /// Whether it would ever fit, with nothing else running.
    pub fn could_fit(&self, bytes: u64) -> bool {
        bytes <= self.total_bytes
    }
}
