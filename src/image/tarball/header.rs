//! What tar headers say: numbers, names, pax records, sparse maps. Pure; what doesn't fit is
//! refused, never wrapped.

use super::{BLOCK, Mtime, SEGMENTS_MAX, Segment, TarError, malformed};
use std::collections::BTreeMap;

/// What stands before an entry and is about it.
#[derive(Default)]
pub(super) struct Extension {
    pub seen: bool,
    pub long_name: Option<Vec<u8>>,
    pub long_link: Option<Vec<u8>>,
    pub pax: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Sparse format 0.0 repeats its keys, in order; 0.1 has a list. Both end up here.
    pub map: Vec<u64>,
}

impl Extension {
    pub fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        if key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes" {
            if self.map.len() >= 2 * SEGMENTS_MAX {
                return Err(malformed(format!("a sparse file of more than {SEGMENTS_MAX} pieces")));
            }
            if (key == b"GNU.sparse.offset") != self.map.len().is_multiple_of(2) {
                return Err(malformed("a sparse file's map is out of order"));
            }
            self.map.push(decimal(value).ok_or_else(|| malformed("a sparse file's map has a bad number"))?);
        } else if value.is_empty() && !key.starts_with(b"SCHILY.xattr.") {
            self.pax.remove(key); // pax: an empty value takes a record back
        } else {
            self.pax.insert(key.to_vec(), value.to_vec());
        }
        Ok(())
    }

    pub fn get(&self, key: &str) -> Option<&[u8]> {
        self.pax.get(key.as_bytes()).map(Vec::as_slice)
    }

    pub fn number(&self, key: &str) -> Result<Option<u64>, TarError> {
        let Some(text) = self.get(key) else { return Ok(None) };
        decimal(text)
            .map(Some)
            .ok_or_else(|| malformed(format!("the extended header's {key} is not a number")))
    }

    pub fn segments_0(&self) -> Result<Vec<Segment>, TarError> {
        let bad = || malformed("a sparse file's map has a bad number");
        let map = match self.get("GNU.sparse.map") {
            Some(b"") | None => self.map.clone(),
            Some(list) => {
                list.split(|b| *b == b',').map(|n| decimal(n).ok_or_else(bad)).collect::<Result<_, _>>()?
            }
        };
        if !map.len().is_multiple_of(2) || map.len() > 2 * SEGMENTS_MAX {
            return Err(malformed("a sparse file's map is incomplete or too long"));
        }
        Ok(map.chunks_exact(2).map(|pair| Segment { offset: pair[0], bytes: pair[1] }).collect())
    }
}

/// A header for all entries that follow. docker reads over them (git leaves a comment in one);
/// so does neap, but not where one would rename or resize what follows.
pub(super) fn global_record(key: &[u8], _: &[u8]) -> Result<(), TarError> {
    match key {
        b"path" | b"linkpath" | b"size" => {
            Err(malformed("a global extended header that renames or resizes files"))
        }
        key if key.starts_with(b"GNU.sparse.") => {
            Err(malformed("a global extended header about sparse files"))
        }
        _ => Ok(()),
    }
}

/// pax records: `LENGTH KEY=VALUE\n`, the length counting all of it. The value may hold anything.
pub(super) fn parse_pax(
    mut records: &[u8],
    mut each: impl FnMut(&[u8], &[u8]) -> Result<(), TarError>,
) -> Result<(), TarError> {
    let bad = || malformed("an extended header is malformed");
    while !records.is_empty() && records[0] != 0 {
        let space = records.iter().take(20).position(|b| *b == b' ').ok_or_else(bad)?;
        let length = decimal(&records[..space]).and_then(|n| usize::try_from(n).ok()).ok_or_else(bad)?;
        if length > records.len() || length < space + 3 || records[length - 1] != b'\n' {
            return Err(bad());
        }
        let record = &records[space + 1..length - 1];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
        each(&record[..equals], &record[equals + 1..])?;
        records = &records[length..];
    }
    Ok(())
}

pub(super) fn header_path(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(&header[..100]);
    // GNU's magic is `ustar `; it uses the place of the prefix for other things.
    let prefix = match (&header[257..263] == b"ustar\0", &header[508..512] == b"tar\0") {
        (true, false) => until_nul(&header[345..500]),
        (true, true) => until_nul(&header[345..476]), // Schilling's star
        (false, _) => &[],
    };
    if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
}

/// Up to 4 (header) or 21 (extension) pairs of a GNU sparse map; whether a block of more follows.
pub(super) fn gnu_segments(pairs: &[u8], more: u8, segments: &mut Vec<Segment>) -> Result<bool, TarError> {
    for pair in pairs.chunks_exact(24) {
        if pair[0] == 0 {
            break;
        }
        if segments.len() >= SEGMENTS_MAX {
            return Err(malformed(format!("a sparse file of more than {SEGMENTS_MAX} pieces")));
        }
        let field = |bytes: &[u8]| {
            u64::try_from(number(bytes, "sparse map")?)
                .map_err(|_| malformed("a negative place in a sparse map"))
        };
        segments.push(Segment { offset: field(&pair[..12])?, bytes: field(&pair[12..])? });
    }
    // Each further block must bring something, or a stream of empty ones would go on for ever.
    if more != 0 && pairs[0] == 0 {
        return Err(malformed("a sparse map that goes on with nothing"));
    }
    Ok(more != 0)
}

/// A numeric field: octal between blanks, or GNU's base-256 when the first bit is set.
pub(super) fn number(field: &[u8], what: &str) -> Result<i64, TarError> {
    let bad = || malformed(format!("a header's {what} is not a number"));
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let mut value: i128 = if negative { -1 } else { 0 };
        for (index, byte) in field.iter().enumerate() {
            let byte = if index == 0 { byte & 0x7f | if negative { 0x80 } else { 0 } } else { *byte };
            value = value << 8 | i128::from(byte);
            // i128 has room for the 12 bytes of the longest field.
        }
        return i64::try_from(value).map_err(|_| bad());
    }
    let blank = |b: &u8| *b == b' ' || *b == 0;
    let start = field.iter().position(|b| !blank(b)).unwrap_or(field.len());
    let digits = &field[start..];
    let digits = &digits[..digits.iter().position(blank).unwrap_or(digits.len())];
    digits.iter().try_fold(0_i64, |value, b| match b {
        b'0'..=b'7' => value.checked_mul(8).map(|v| v + i64::from(b - b'0')).ok_or_else(bad),
        _ => Err(bad()),
    })
}

/// pax times: seconds with an optional fraction, possibly negative.
pub(super) fn parse_time(text: &[u8]) -> Result<Mtime, TarError> {
    let bad = || malformed("the extended header's mtime is not a time");
    let (negative, digits) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let dot = digits.iter().position(|b| *b == b'.').unwrap_or(digits.len());
    let whole = decimal(&digits[..dot]).and_then(|s| i64::try_from(s).ok()).ok_or_else(bad)?;
    let mut nanoseconds = 0_u32;
    let fraction = digits.get(dot + 1..).unwrap_or(&[]);
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    for place in 0..9 {
        nanoseconds = nanoseconds * 10 + u32::from(fraction.get(place).map_or(0, |b| b - b'0'));
    }
    Ok(match (negative, nanoseconds) {
        (false, nanoseconds) => Mtime { seconds: whole, nanoseconds },
        (true, 0) => Mtime { seconds: -whole, nanoseconds: 0 },
        (true, nanoseconds) => Mtime { seconds: -whole - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    let good = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    if good { std::str::from_utf8(text).ok()?.parse().ok() } else { None }
}

pub(super) fn until_nul(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len())]
}
