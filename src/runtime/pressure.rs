//! Memory pressure, as the kernel's pressure stall information tells it: how much of the last
//! seconds somebody waited for memory. It rises before anything is killed, so it is what to
//! brake on when memory could be kept for later (instances ahead of their events).
//!
//! Read where the shortage would be ours: in the cgroup that was delegated to neap, which may
//! have a limit of its own, else for the whole machine. A function that works at its own limit
//! counts in both, because it makes tasks wait too.
//!
//! Kernels without CONFIG_PSI, or with `psi=0`, have none: `None`, and nothing is braked.
//! <https://docs.kernel.org/accounting/psi.html>

use super::unified;
use std::fs;
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pressure {
    /// At least one task waited for memory.
    pub some: Stall,
    /// All that could have run waited.
    pub full: Stall,
}

/// Shares of the time that was spent waiting, in percent, and the whole of it since boot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stall {
    pub avg10_percent: f32,
    pub avg60_percent: f32,
    pub total_us: u64,
}

impl Pressure {
    /// A file of pressure stall information: a line `some`, a line `full`. `None` when it is
    /// anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let stall = |kind: &str| text.lines().find_map(|line| Stall::parse(line.strip_prefix(kind)?));
        Some(Self { some: stall("some ")?, full: stall("full ")? })
    }
}

impl Stall {
    /// `avg10=0.00 avg60=0.00 avg300=0.00 total=0`
    fn parse(fields: &str) -> Option<Self> {
        let field = |name: &str| {
            fields.split_ascii_whitespace().find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
        };
        let percent = |name: &str| field(name)?.parse().ok().filter(|share| (0.0..=100.0).contains(share));
        Some(Self {
            avg10_percent: percent("avg10")?,
            avg60_percent: percent("avg60")?,
            total_us: field("total")?.parse().ok()?,
        })
    }
}

/// The pressure on memory now: two small files of the kernel's, read at once.
pub fn memory() -> Option<Pressure> {
    let delegated = unified::delegated().map(|base| PathBuf::from(unified::ROOT).join(base));
    let files = delegated.map(|base| base.join("memory.pressure"));
    let files = files.into_iter().chain([PathBuf::from("/proc/pressure/memory")]);
    files.filter_map(|file| fs::read_to_string(file).ok()).find_map(|text| Pressure::parse(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALM: &str = "\
some avg10=0.00 avg60=0.12 avg300=0.29 total=8371951
full avg10=0.00 avg60=0.08 avg300=0.21 total=6152134
";

    #[test]
    fn pressure_is_read_as_the_kernel_writes_it() {
        let found = Pressure::parse(CALM).expect("both lines are there");

        assert_eq!(found.some, Stall { avg10_percent: 0.0, avg60_percent: 0.12, total_us: 8_371_951 });
        assert_eq!(found.full, Stall { avg10_percent: 0.0, avg60_percent: 0.08, total_us: 6_152_134 });
    }

    #[test]
    fn what_is_no_pressure_is_none() {
        assert_eq!(Pressure::parse(""), None);
        assert_eq!(Pressure::parse("some avg10=1.00 avg60=1.00 avg300=1.00 total=1\n"), None);
        assert_eq!(Pressure::parse(&CALM.replace("0.12", "NaN")), None);
        assert_eq!(Pressure::parse(&CALM.replace("0.12", "-1")), None);
        assert_eq!(Pressure::parse(&CALM.replace("total=", "total=-")), None);
        for end in 0..CALM.len() {
            let _ = Pressure::parse(&CALM[..end]);
        }
    }

    #[test]
    fn a_kernel_that_has_it_is_read() {
        let has_it = fs::read_to_string("/proc/pressure/memory").is_ok();

        assert_eq!(memory().is_some(), has_it);
    }
}
