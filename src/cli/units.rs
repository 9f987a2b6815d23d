//! The small languages of the command line: `K=V`, `TEXT|@FILE|-`, `10m`. Pure.

use crate::model::{EventId, UnixMs};
use std::path::PathBuf;
use std::time::Duration;

/// Where data comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    Text(String),
    File(PathBuf),
    Stdin,
}

/// `-` is stdin, `@FILE` a file, anything else the data itself.
pub fn input(text: &str) -> Result<Input, String> {
    match (text, text.strip_prefix('@')) {
        ("-", _) => Ok(Input::Stdin),
        (_, Some("")) => Err("the file's name is missing behind `@`".into()),
        (_, Some("-")) => Ok(Input::Stdin),
        (_, Some(file)) => Ok(Input::File(file.into())),
        (_, None) => Ok(Input::Text(text.into())),
    }
}

/// `K=V`; the value may be empty and hold further `=`.
pub fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some(("", _)) => Err("the name in front of `=` is missing".into()),
        Some((key, value)) if !key.contains('\0') && !value.contains('\0') => Ok((key.into(), value.into())),
        Some(_) => Err("holds a NUL byte".into()),
        None => Err("expected K=V".into()),
    }
}

/// `K=V`, or `K: V` as curl takes it, whichever separator comes first; fit to be a header.
pub fn header(text: &str) -> Result<(String, String), String> {
    let at = text.find(['=', ':']).ok_or("expected K=V")?;
    let (name, value) = (&text[..at], text[at + 1..].trim());
    // RFC 9110 §5.6.2: a token
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if name.is_empty() || !name.bytes().all(token) {
        return Err("a header's name is letters, digits and -".into());
    }
    if value.chars().any(|c| c.is_control() && c != '\t') {
        return Err("a header's value has no control characters".into());
    }
    Ok((name.into(), value.into()))
}

/// A moment, as somebody types it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    Ago(Duration),
    At(UnixMs),
}

impl Since {
    pub fn moment(self, now: UnixMs) -> UnixMs {
        match self {
            Self::At(at) => at,
            Self::Ago(ago) => {
                UnixMs(now.0.saturating_sub(i64::try_from(ago.as_millis()).unwrap_or(i64::MAX)))
            }
        }
    }
}

/// RFC 3339, or a time ago: `90s`, `10m`, `1h30m`, `3d`.
pub fn since(text: &str) -> Result<Since, String> {
    if let Some(ago) = ago(text) {
        return Ok(Since::Ago(ago));
    }
    let at: jiff::Timestamp = text
        .parse()
        .map_err(|_| "expected a time ago (90s, 10m, 2h, 3d) or RFC 3339 (2026-03-01T09:00:00Z)")?;
    Ok(Since::At(UnixMs(at.as_millisecond())))
}

fn ago(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..unit_at].parse().ok()?;
        let unit_end = rest[unit_at..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |n| unit_at + n);
        let unit_ms = match &rest[unit_at..unit_end] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            "w" => 604_800_000,
            _ => return None,
        };
        total = total.checked_add(Duration::from_millis(number.checked_mul(unit_ms)?))?;
        rest = &rest[unit_end..];
    }
    (!text.is_empty()).then_some(total)
}

/// An event's id that can travel in a header. The daemon would ignore one that can't.
pub fn event_id(text: &str) -> Result<String, String> {
    let good = EventId::parse(text).is_some() && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    let trimmed = text.trim().len() == text.len(); // a header's value is trimmed on its way
    let bounds = || format!("an event's id is 1 to {} printable ASCII characters", EventId::BYTES_MAX);
    if good && trimmed { Ok(text.into()) } else { Err(bounds()) }
}

/// The id in an `X-Call-Id` of an answer, which is percent-encoded (CloudEvents HTTP binding
/// §3.1.3.2). What isn't is left as it is.
pub fn percent_decode(text: &str) -> String {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digit = |at: usize| after.get(at).and_then(|&b| char::from(b).to_digit(16));
        let decoded;
        (decoded, rest) = match (byte, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => ((high * 16 + low) as u8, &after[2..]),
            _ => (byte, after),
        };
        plain.push(decoded);
    }
    String::from_utf8(plain).unwrap_or_else(|_| text.to_owned())
}

/// For one path segment or query value: everything but RFC 3986's unreserved characters is escaped.
pub fn percent_encode(text: &str) -> String {
    use std::fmt::Write;
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(byte as char);
        } else {
            let _ = write!(encoded, "%{byte:02X}"); // writing to a String cannot fail
        }
    }
    encoded
}

/// `/v1/events` and its parameters; those that are `None` are left out.
pub fn with_query(path: &str, parameters: &[(&str, Option<String>)]) -> String {
    let mut full = path.to_owned();
    let mut separator = '?';
    for (name, value) in parameters {
        if let Some(value) = value {
            full.push(separator);
            full.extend([name, "=", &percent_encode(value)]);
            separator = '&';
        }
    }
    full
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_text_unless_it_says_file_or_stdin() {
        assert_eq!(input("21.5"), Ok(Input::Text("21.5".into())));
        assert_eq!(input(""), Ok(Input::Text(String::new())));
        assert_eq!(input("-"), Ok(Input::Stdin));
        assert_eq!(input("@-"), Ok(Input::Stdin));
        assert_eq!(input("-1"), Ok(Input::Text("-1".into())));
        assert_eq!(input("@reading.json"), Ok(Input::File("reading.json".into())));
        assert!(input("@").is_err());
    }

    #[test]
    fn value_keeps_further_equals_signs() {
        assert_eq!(key_value("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(key_value("A="), Ok(("A".into(), String::new())));
        assert!(key_value("A").is_err());
        assert!(key_value("=b").is_err());
        assert!(key_value("A=\0").is_err());
    }

    #[test]
    fn header_that_would_break_the_request_is_refused() {
        assert_eq!(
            header("Content-Type=text/plain; a=b"),
            Ok(("Content-Type".into(), "text/plain; a=b".into()))
        );
        assert_eq!(header("X-A: b:c"), Ok(("X-A".into(), "b:c".into())));
        for bad in ["X", "=x", "X A=b", "X=a\r\nY: b", "X=\0", "\u{e9}=x"] {
            assert!(header(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn since_is_a_time_ago_or_a_moment() {
        let now = UnixMs(1_000_000_000_000);
        let moment = |text: &str| since(text).map(|s| s.moment(now).0);

        assert_eq!(moment("10m"), Ok(now.0 - 600_000));
        assert_eq!(moment("1h30m"), Ok(now.0 - 5_400_000));
        assert_eq!(moment("2d"), Ok(now.0 - 172_800_000));
        assert_eq!(moment("1970-01-01T00:00:01Z"), Ok(1_000));
        assert_eq!(moment("1970-01-01T01:00:00+01:00"), Ok(0));
        for bad in ["", "10", "m", "10x", "1h-2m", "yesterday", "99999999999999999999s", "2026-03-01"] {
            assert!(since(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn moment_before_all_time_does_not_wrap() {
        assert_eq!(Since::Ago(Duration::MAX).moment(UnixMs(-5)), UnixMs(i64::MIN));
    }

    #[test]
    fn event_id_that_would_change_on_its_way_is_refused() {
        assert_eq!(event_id("sensor-1/17 a"), Ok("sensor-1/17 a".into()));
        for bad in ["", " a", "a\n", "\u{e9}", &"x".repeat(257)] {
            assert!(event_id(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn encoded_id_comes_back_as_it_was() {
        for text in ["plain", "a b", "100%", "%41", "gr\u{fc}n"] {
            assert_eq!(percent_decode(&percent_encode(text)), text);
        }
        for odd in ["%", "%4", "%zz", "a%ff"] {
            assert_eq!(percent_decode(odd), odd);
        }
    }

    #[test]
    fn references_and_ids_stay_one_segment() {
        assert_eq!(percent_encode("ghcr.io/a/b:1@sha256:f"), "ghcr.io%2Fa%2Fb%3A1%40sha256%3Af");
        assert_eq!(percent_encode("a b?&#%\u{e9}"), "a%20b%3F%26%23%25%C3%A9");
        assert_eq!(with_query("/v1/x", &[("a", None), ("b", Some("1&2".into()))]), "/v1/x?b=1%262");
        assert_eq!(with_query("/v1/x", &[]), "/v1/x");
    }
}
