//! Reading TOML by hand, a table at a time: every value that isn't what it should be is
//! reported where it stands and read on, so that one run shows all mistakes. serde would stop
//! at the first.

use super::problem::{Report, shown};
use super::units::{self, SIZES, TIMES};
use crate::model::topic::BadTopic;
use std::fmt::Display;
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;
use std::time::Duration;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The longest neap.toml or manifest that is read: a hundred times what people write by hand. A
/// longer one is refused unread.
pub const TEXT_BYTES_MAX: usize = 256 * 1024;

/// What a table may hold. `later`: known to the documentation and not built yet, so refused by
/// name instead of as a typing mistake.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    pub now: &'static [&'static str],
    pub later: &'static [&'static str],
}

/// The parsed text; what was wrong with its syntax is already reported.
pub(super) fn document<'a>(report: &Report<'_>, text: &'a str) -> DeTable<'a> {
    if text.len() > TEXT_BYTES_MAX {
        let limit = units::show_size(TEXT_BYTES_MAX as u64);
        report.syntax(&(0..0), format!("the file is larger than {limit}"));
        return DeTable::new();
    }
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let span = error.span().unwrap_or(text.len()..text.len());
        let what = match text.get(span.clone()) {
            Some(key) if error.message() == "duplicate key" => {
                format!("duplicate key `{}`", key.escape_debug())
            }
            _ => format!("not TOML: {}", error.message()),
        };
        report.syntax(&span, what);
    }
    table.into_inner()
}

/// A table of the file while it is read.
pub(super) struct Section<'a> {
    report: &'a Report<'a>,
    /// Dotted, empty at the top: `limits`, `mqtt.tls`, `trigger`.
    path: String,
    table: &'a DeTable<'a>,
    span: Range<usize>,
    keys: Keys,
}

impl<'a> Section<'a> {
    /// The top of a file.
    pub fn root(report: &'a Report<'a>, table: &'a DeTable<'a>, keys: Keys) -> Self {
        Self::new(report, String::new(), table, 0..0, keys)
    }

    /// Reports the keys that don't belong here at once; the readers below look only at those
    /// that do.
    fn new(
        report: &'a Report<'a>,
        path: String,
        table: &'a DeTable<'a>,
        span: Range<usize>,
        keys: Keys,
    ) -> Self {
        let section = Self { report, path, table, span, keys };
        for (key, _) in table.iter() {
            let (name, span) = (key.get_ref().as_ref(), key.span());
            if keys.later.contains(&name) {
                report.at(&span, format!("not in this version: {}", section.name(name)));
            } else if !keys.now.contains(&name) {
                report.at(&span, section.unknown(name));
            }
        }
        section
    }

    fn unknown(&self, key: &str) -> String {
        let place = if self.path.is_empty() { String::new() } else { format!(" in [{}]", self.path) };
        let guess = nearest(key, self.keys.now.iter().chain(self.keys.later).copied())
            .map(|near| format!("did you mean `{near}`? "))
            .unwrap_or_default();
        let allowed = self.keys.now.join(", ");
        format!("unknown key {}{place}; {guess}allowed: {allowed}", shown(key))
    }

    /// How messages call a key: `limits.memory`.
    pub fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub fn has(&self, key: &str) -> bool {
        self.table.iter().any(|(k, _)| k.get_ref() == key)
    }

    /// Where a key's value stands; the table itself when the key isn't there.
    pub fn span(&self, key: &str) -> Range<usize> {
        self.get(key).map_or(self.span.clone(), Spanned::span)
    }

    /// Where the table begins.
    pub fn line(&self) -> usize {
        self.report.line(&self.span)
    }

    /// A mistake in a key's value.
    pub fn bad(&self, key: &str, what: impl Display) {
        self.report.at(&self.span(key), format!("{}: {what}", self.name(key)));
    }

    /// A mistake of the whole table.
    pub fn wrong(&self, what: impl Into<String>) {
        self.report.at(&self.span, what);
    }

    /// A mistake somewhere in a key's table, told as it is.
    pub fn wrong_in(&self, key: &str, what: impl Into<String>) {
        self.report.at(&self.span(key), what);
    }

    /// Something that the table lacks.
    pub fn missing(&self, what: impl Into<String>) {
        self.report.missing(&self.span, what);
    }

    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.text_of(key, "a string")
    }

    /// The same, without a report when it is something else.
    pub fn text_if(&self, key: &str) -> Option<&'a str> {
        self.get(key)?.get_ref().as_str()
    }

    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)?.get_ref() {
            DeValue::Boolean(value) => Some(*value),
            other => self.expected(key, "true or false", other),
        }
    }

    pub fn integer(&self, key: &str, range: RangeInclusive<u32>) -> Option<u32> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        match self.get(key)?.get_ref() {
            DeValue::Integer(digits) => {
                let value = i64::from_str_radix(digits.as_str(), digits.radix()).ok();
                let good = value.and_then(|v| u32::try_from(v).ok()).filter(|v| range.contains(v));
                if good.is_none() {
                    self.bad(key, format!("{digits} is out of range; expected {expected}"));
                }
                good
            }
            other => self.expected(key, &expected, other),
        }
    }

    /// A whole number, or `"auto"`: `Some(None)`.
    pub fn integer_or_auto(&self, key: &str, range: RangeInclusive<u32>) -> Option<Option<u32>> {
        match self.get(key)?.get_ref() {
            DeValue::Integer(_) => self.integer(key, range).map(Some),
            DeValue::String(text) if text.as_ref() == "auto" => Some(None),
            DeValue::String(text) => {
                self.bad(key, format!("{} is not known; expected a whole number or \"auto\"", shown(text)));
                None
            }
            other => self.expected(key, "a whole number or \"auto\"", other),
        }
    }

    /// A list of whole numbers.
    pub fn integers(&self, key: &str, range: RangeInclusive<u32>) -> Option<Vec<u32>> {
        let expected = format!("whole numbers from {} to {}", range.start(), range.end());
        let items = match self.get(key)?.get_ref() {
            DeValue::Array(items) => items,
            other => return self.expected(key, &format!("a list of {expected}"), other),
        };
        let mut numbers = Vec::with_capacity(items.len());
        for item in items {
            let number = match item.get_ref() {
                DeValue::Integer(digits) => u32::from_str_radix(digits.as_str(), digits.radix()).ok(),
                _ => None,
            };
            match number.filter(|number| range.contains(number)) {
                Some(number) => numbers.push(number),
                None => self.report.at(&item.span(), format!("{}: expected {expected}", self.name(key))),
            }
        }
        Some(numbers)
    }

    /// A number, with or without a fraction, as it is.
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.get(key)?.get_ref() {
            DeValue::Integer(digits) => {
                i64::from_str_radix(digits.as_str(), digits.radix()).ok().map(|v| v as f64)
            }
            DeValue::Float(digits) => digits.as_str().parse().ok(),
            other => return self.expected(key, "a number", other),
        }
        .or_else(|| {
            self.bad(key, "the number is out of range");
            None
        })
    }

    pub fn size(&self, key: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let text = self.text_of(key, &format!("a size in quotes: {SIZES}"))?;
        let Some(bytes) = units::parse_size(text) else {
            self.bad(key, format!("{} is no size; expected {SIZES}", shown(text)));
            return None;
        };
        self.within(key, bytes, range, units::show_size)
    }

    pub fn time(&self, key: &str, range: RangeInclusive<Duration>) -> Option<Duration> {
        let text = self.text_of(key, &format!("a time in quotes: {TIMES}"))?;
        let Some(time) = units::parse_time(text) else {
            self.bad(key, format!("{} is no time; expected {TIMES}", shown(text)));
            return None;
        };
        self.within(key, time, range, units::show_time)
    }

    /// One of a few words. `later`: words of a later version.
    pub fn choice<T: Copy>(&self, key: &str, words: &[(&str, T)], later: &[&str]) -> Option<T> {
        let known: Vec<String> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
        let known = known.join(", ");
        let text = self.text_of(key, &format!("one of {known}"))?;
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        if later.contains(&text) {
            let name = self.name(key);
            self.report.at(&self.span(key), format!("not in this version: {name} = {text:?}; now: {known}"));
        } else {
            let guess = nearest(text, words.iter().map(|(word, _)| *word));
            let guess = guess.map(|near| format!("did you mean {near:?}? ")).unwrap_or_default();
            self.bad(key, format!("{} is not known; {guess}allowed: {known}", shown(text)));
        }
        None
    }

    /// Absolute: a daemon has no directory that its files could be relative to.
    pub fn path(&self, key: &str) -> Option<PathBuf> {
        let text = self.text_of(key, "an absolute path")?;
        if text.contains('\0') {
            self.bad(key, "a path has no NUL");
        } else if !text.starts_with('/') {
            self.bad(key, format!("{} is relative; write the whole path, from /", shown(text)));
        } else {
            return Some(PathBuf::from(text));
        }
        None
    }

    /// Whatever `parse` makes of the text; its error is the message.
    pub fn parsed<T, E: Display>(&self, key: &str, parse: impl FnOnce(&'a str) -> Result<T, E>) -> Option<T> {
        let text = self.text(key)?;
        parse(text).map_err(|error| self.bad(key, error)).ok()
    }

    /// A topic filter or template. Its rules don't repeat it, so the message begins with it.
    pub fn topic<T>(&self, key: &str, parse: impl FnOnce(&'a str) -> Result<T, BadTopic>) -> Option<T> {
        self.parsed(key, |text| parse(text).map_err(|bad| format!("{}: {bad}", shown(text))))
    }

    /// A list of strings, each with its place. What isn't a string is reported and left out.
    pub fn strings(&self, key: &str) -> Option<Vec<(&'a str, Range<usize>)>> {
        let items = match self.get(key)?.get_ref() {
            DeValue::Array(items) => items,
            other => return self.expected(key, "a list of strings, as in [\"a\", \"b\"]", other),
        };
        let mut strings = Vec::with_capacity(items.len());
        for item in items {
            match item.get_ref() {
                DeValue::String(text) => strings.push((text.as_ref(), item.span())),
                other => {
                    let what = format!("{}: expected strings, got {}", self.name(key), kind(other));
                    self.report.at(&item.span(), what);
                }
            }
        }
        Some(strings)
    }

    /// Reports at a place inside a key's value.
    pub fn bad_at(&self, span: &Range<usize>, key: &str, what: impl Display) {
        self.report.at(span, format!("{}: {what}", self.name(key)));
    }

    /// Names and strings of a free table such as `env`.
    pub fn entries(&self, key: &str) -> Vec<(&'a str, &'a str, Range<usize>)> {
        let table = match self.get(key).map(Spanned::get_ref) {
            None => return Vec::new(),
            Some(DeValue::Table(table)) => table,
            Some(other) => {
                self.expected::<()>(key, "a table, as in { NAME = \"value\" }", other);
                return Vec::new();
            }
        };
        let mut entries = Vec::new();
        for (name, value) in table.iter() {
            match value.get_ref() {
                DeValue::String(text) => entries.push((name.get_ref().as_ref(), text.as_ref(), name.span())),
                other => {
                    let name = self.name(key) + "." + name.get_ref();
                    let what = format!("{name}: expected a string in quotes, got {}", kind(other));
                    self.report.at(&value.span(), what);
                }
            }
        }
        entries
    }

    /// A table: `[key]` or `key = { … }`.
    pub fn table(&self, key: &str, keys: Keys) -> Option<Section<'a>> {
        let value = self.get(key)?;
        match value.get_ref() {
            DeValue::Table(table) => {
                Some(Section::new(self.report, self.name(key), table, value.span(), keys))
            }
            DeValue::Array(_) => {
                let name = self.name(key);
                self.bad(key, format!("there is one of these; write [{name}] with single brackets"));
                None
            }
            other => self.expected(key, &format!("a table, [{}]", self.name(key)), other),
        }
    }

    /// Whether the table `key` has `inner`, right or wrong.
    pub fn table_has(&self, key: &str, inner: &str) -> bool {
        let table = self.get(key).and_then(|value| value.get_ref().as_table());
        table.is_some_and(|table| table.iter().any(|(k, _)| k.get_ref() == inner))
    }

    /// A list of tables: `[[key]]`.
    pub fn tables(&self, key: &str, keys: Keys) -> Vec<Section<'a>> {
        let name = self.name(key);
        let items = match self.get(key).map(Spanned::get_ref) {
            None => return Vec::new(),
            Some(DeValue::Array(items)) => items,
            Some(DeValue::Table(_)) => {
                self.bad(key, format!("there may be several; write [[{name}]] with double brackets"));
                return Vec::new();
            }
            Some(other) => {
                self.expected::<()>(key, &format!("tables, [[{name}]]"), other);
                return Vec::new();
            }
        };
        let mut sections = Vec::with_capacity(items.len());
        for item in items {
            match item.get_ref() {
                DeValue::Table(table) => {
                    sections.push(Section::new(self.report, name.clone(), table, item.span(), keys));
                }
                other => {
                    let what = format!("{name}: expected tables, [[{name}]], got {}", kind(other));
                    self.report.at(&item.span(), what);
                }
            }
        }
        sections
    }

    fn get(&self, key: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        debug_assert!(self.keys.now.contains(&key) || self.keys.later.contains(&key), "unlisted key {key}");
        self.table.iter().find(|(k, _)| k.get_ref() == key).map(|(_, value)| value)
    }

    fn text_of(&self, key: &str, expected: &str) -> Option<&'a str> {
        match self.get(key)?.get_ref() {
            DeValue::String(text) => Some(text.as_ref()),
            other => self.expected(key, expected, other),
        }
    }

    fn expected<T>(&self, key: &str, expected: &str, got: &DeValue<'_>) -> Option<T> {
        self.bad(key, format!("expected {expected}, got {}", kind(got)));
        None
    }

    fn within<T: PartialOrd + Copy>(
        &self,
        key: &str,
        value: T,
        range: RangeInclusive<T>,
        show: impl Fn(T) -> String,
    ) -> Option<T> {
        if range.contains(&value) {
            return Some(value);
        }
        let (got, least, most) = (show(value), show(*range.start()), show(*range.end()));
        self.bad(key, format!("{got} is out of range; expected {least} to {most}"));
        None
    }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// The word that was probably meant: at most two edits away, and fewer than half its letters.
fn nearest<'w>(typed: &str, words: impl Iterator<Item = &'w str>) -> Option<&'w str> {
    // Long garbage is no typing mistake, and its distance would cost time.
    if typed.len() > 40 {
        return None;
    }
    let near = words.map(|word| (distance(typed, word), word)).min_by_key(|(edits, _)| *edits)?;
    (near.0 <= 2 && near.0 * 2 < near.1.chars().count()).then_some(near.1)
}

/// Edits between two words: a letter more, less, other, or two swapped (Damerau's distance,
/// restricted to adjacent letters).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let other = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j] + 1).min(row[j - 1] + 1).min(rows[i - 1][j - 1] + other);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typing_mistake_finds_the_word_that_was_meant() {
        let words = ["memory", "cpu", "pids", "timeout", "payload", "disk"];
        let near = |typed| nearest(typed, words.into_iter());

        assert_eq!(near("memroy"), Some("memory"));
        assert_eq!(near("time_out"), Some("timeout"));
        assert_eq!(near("CPU"), None);
        assert_eq!(near("cpus"), Some("cpu"));
        assert_eq!(near("network"), None);
        assert_eq!(near(&"m".repeat(1000)), None);
    }

    #[test]
    fn a_file_too_long_is_refused_unread() {
        let text = "a".repeat(TEXT_BYTES_MAX + 1);
        let report = Report::new("f", &text);

        document(&report, &text);

        let problems = report.finish(()).expect_err("it is too long");
        assert_eq!(problems[0].to_string(), "f:1: the file is larger than 256KiB");
    }
}
