//! Time zones by their names in the IANA database: the system's where it has any, for those get
//! updated, else the ones that were built in (cross/built.rs), for a gateway's system often has none.

use flate2::read::DeflateDecoder;
use jiff::tz::TimeZone;
use std::io::Read;

static BUILT_IN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/zones"));

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no time zone of that name; expected one as in \"Europe/Berlin\" or \"UTC\"")]
pub struct BadZone;

/// By its name, in any case.
pub fn by_name(name: &str) -> Result<TimeZone, BadZone> {
    // `TZ` strings and offsets are no names.
    let good = |b: u8| b.is_ascii_alphanumeric() || b"/_+-".contains(&b);
    if name.is_empty() || name.len() > 64 || !name.bytes().all(good) {
        return Err(BadZone);
    }
    TimeZone::get(name).ok().or_else(|| built_in(name)).ok_or(BadZone)
}

fn built_in(wanted: &str) -> Option<TimeZone> {
    let mut zones = DeflateDecoder::new(BUILT_IN);
    while let Some((name, data)) = next(&mut zones) {
        if name.eq_ignore_ascii_case(wanted.as_bytes()) {
            return TimeZone::tzif(std::str::from_utf8(&name).ok()?, &data).ok();
        }
    }
    None
}

/// The next zone of those built in: its name and its TZif data.
fn next(zones: &mut impl Read) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut name_bytes = [0];
    zones.read_exact(&mut name_bytes).ok()?;
    let mut name = vec![0; usize::from(name_bytes[0])];
    zones.read_exact(&mut name).ok()?;
    let mut data_bytes = [0; 2];
    zones.read_exact(&mut data_bytes).ok()?;
    let mut data = vec![0; usize::from(u16::from_be_bytes(data_bytes))];
    zones.read_exact(&mut data).ok()?;
    Some((name, data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;

    #[test]
    fn zones_have_names() {
        for good in ["America/Argentina/Buenos_Aires", "europe/berlin", "UTC", "Etc/GMT+5"] {
            assert!(by_name(good).is_ok(), "{good:?}");
        }
        for bad in ["", "Mars/Olympus", "CET-1CEST", "../../etc/passwd", "/etc/localtime"] {
            assert!(by_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn every_zone_is_built_in_and_none_else() {
        let mut zones = DeflateDecoder::new(BUILT_IN);
        let mut count = 0;
        while let Some((name, _)) = next(&mut zones) {
            let name = String::from_utf8(name).expect("a name in ASCII");
            let zone = built_in(&name).unwrap_or_else(|| panic!("{name} is built in"));
            assert_eq!(zone.iana_name(), Some(name.as_str()));
            count += 1;
        }
        assert_eq!(zones.read(&mut [0]).expect("readable to its end"), 0);
        assert!(count > 500, "only {count} zones");
        assert!(built_in("Mars/Olympus").is_none());
    }

    #[test]
    fn those_built_in_know_when_clocks_change() {
        let berlin = built_in("Europe/Berlin").expect("built in");
        let offset = |text: &str| berlin.to_offset(text.parse::<Timestamp>().expect("a time")).seconds();

        assert_eq!(offset("2026-03-29T00:59:59Z"), 3600);
        assert_eq!(offset("2026-03-29T01:00:00Z"), 7200);
        assert_eq!(offset("2026-10-25T01:00:00Z"), 3600);
        assert_eq!(offset("1945-05-24T00:00:00Z"), 10_800);
    }
}
