//! Sizes and times as people write them: `"64MiB"`, `"250ms"`. A whole number and one unit, so
//! that a value reads the same in every file; what else is refused with the accepted forms.

use std::time::Duration;

/// The forms of a size, for messages.
pub const SIZES: &str = "a whole number and B, KiB, MiB, GiB, kB, MB or GB, as in \"64MiB\"";
/// The forms of a time, for messages.
pub const TIMES: &str = "a whole number and ms, s, m, h or d, as in \"5s\"";

const SIZE_UNITS: [(&str, u64); 8] = [
    ("", 1),
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
];

/// In milliseconds. No unit is no time: 30 of what?
const TIME_UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Bytes; a number alone is bytes too. `None`: not of this form, or beyond 64 bits.
pub fn parse_size(text: &str) -> Option<u64> {
    parse(text, &SIZE_UNITS)
}

/// `None`: not of this form, or beyond 64 bits of milliseconds.
pub fn parse_time(text: &str) -> Option<Duration> {
    parse(text, &TIME_UNITS).map(Duration::from_millis)
}

/// Whole percents from 1 to 100.
pub fn parse_percent(text: &str) -> Option<u8> {
    let digits = text.strip_suffix('%')?;
    let percent = number(digits)?;
    (1..=100).contains(&percent).then_some(percent as u8)
}

/// The largest unit that loses nothing: `64MiB`, `1000B`.
pub fn show_size(bytes: u64) -> String {
    let fits = |unit: u64| bytes >= unit && bytes.is_multiple_of(unit);
    match bytes {
        b if fits(1 << 30) => format!("{}GiB", b >> 30),
        b if fits(1 << 20) => format!("{}MiB", b >> 20),
        b if fits(1 << 10) => format!("{}KiB", b >> 10),
        b => format!("{b}B"),
    }
}

/// The largest unit that loses nothing: `5m`, `1500ms`.
pub fn show_time(time: Duration) -> String {
    let ms = time.as_millis();
    for (name, unit) in TIME_UNITS.into_iter().rev() {
        let unit = u128::from(unit);
        if ms >= unit && ms.is_multiple_of(unit) {
            return format!("{}{name}", ms / unit);
        }
    }
    format!("{ms}ms")
}

fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, name) = text.split_at(split);
    let (_, unit) = units.iter().find(|(known, _)| *known == name)?;
    number(digits)?.checked_mul(*unit)
}

fn number(digits: &str) -> Option<u64> {
    let good = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if good { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(parse_size("64MiB"), Some(64 << 20));
        assert_eq!(parse_size("1GiB"), Some(1 << 30));
        assert_eq!(parse_size("5kB"), Some(5_000));
        assert_eq!(parse_size("4096"), Some(4096));
        assert_eq!(parse_size("0"), Some(0));
        for bad in ["", "MiB", "64M", "64 MiB", "1.5GiB", "-1", "+1", "64mib", "99999999999GiB", "6٣"] {
            assert_eq!(parse_size(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        assert_eq!(parse_time("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(parse_time("5s"), Some(Duration::from_secs(5)));
        assert_eq!(parse_time("2h"), Some(Duration::from_secs(7200)));
        for bad in ["", "5", "s", "1h30m", "5 s", "0.5s", "5min", "999999999999999999d"] {
            assert_eq!(parse_time(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn percents_are_whole_and_at_most_a_hundred() {
        assert_eq!(parse_percent("75%"), Some(75));
        for bad in ["75", "0%", "101%", "%", "7.5%", "300%", "-1%"] {
            assert_eq!(parse_percent(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn shown_values_read_back_as_the_same() {
        for bytes in [0, 1, 1000, 1024, 6 << 20, 3 << 30, (1 << 30) + 1] {
            assert_eq!(parse_size(&show_size(bytes)), Some(bytes));
        }
        for ms in [0, 1, 1500, 60_000, 300_000, 86_400_000] {
            let time = Duration::from_millis(ms);
            assert_eq!(parse_time(&show_time(time)), Some(time));
        }
        assert_eq!(show_time(Duration::from_secs(300)), "5m");
        assert_eq!(show_size(64 << 20), "64MiB");
    }
}
