//! How things look: aligned tables, sizes and ages for people, and text from outside made
//! harmless. Pure; no colours at all, so `NO_COLOR` has nothing to switch off.

use crate::model::UnixMs;
use std::fmt::Write;

/// Columns by two spaces, a header line, no borders. Made for `cut`, `awk` and eyes.
pub struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    /// A cell for each column. Cells are escaped here: topics and errors come from outside, and
    /// a line break would tear the table apart in a pipe, too. An empty cell is shown as `-`, so
    /// that a column stays countable.
    pub fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.header.len(), "a cell for each column");
        let shown = |cell: String| if cell.is_empty() { "-".to_owned() } else { escape(&cell) };
        self.rows.push(cells.into_iter().map(shown).collect());
    }

    /// On a terminal `width` cuts the last column, so that a row stays a line; at least 8
    /// characters of it are left.
    pub fn render(&self, width: Option<usize>) -> String {
        let header: Vec<String> = self.header.iter().map(|&h| h.to_owned()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&header).chain(&self.rows).collect();
        let columns = header.len();
        let widths: Vec<usize> = (0..columns)
            .map(|c| lines.iter().map(|line| line[c].chars().count()).max().unwrap_or(0))
            .collect();
        let before_last: usize = widths.iter().take(columns.saturating_sub(1)).map(|w| w + 2).sum();
        let last_max = width.map(|width| width.saturating_sub(before_last).max(8));
        let mut out = String::new();
        for line in lines {
            for (column, cell) in line.iter().enumerate() {
                if column + 1 < columns {
                    let _ = write!(out, "{cell:<w$}  ", w = widths[column]);
                } else {
                    out.push_str(&cut(cell, last_max.unwrap_or(usize::MAX)));
                }
            }
            out.push('\n');
        }
        out
    }
}

/// `Name:  value`, values aligned.
pub fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.chars().count() + 1).max().unwrap_or(0);
    let mut out = String::new();
    for (name, value) in pairs {
        let value = if value.is_empty() { "-".to_owned() } else { escape(value) };
        let _ = writeln!(out, "{:<width$}  {value}", format!("{name}:"));
    }
    out
}

fn cut(text: &str, characters_max: usize) -> String {
    if text.chars().count() <= characters_max {
        return text.to_owned();
    }
    text.chars().take(characters_max.saturating_sub(1)).chain(['…']).collect()
}

/// Text from outside, unable to move the cursor, recolour the screen or reorder what is read:
/// control characters and Unicode's invisible direction marks become `\n`, `\x1b`, `\u{202e}`.
pub fn escape(text: &str) -> String {
    if !text.contains(dangerous) {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if dangerous(c) && (c as u32) < 0x100 => drop(write!(out, "\\x{:02x}", c as u32)),
            c if dangerous(c) => drop(write!(out, "\\u{{{:x}}}", c as u32)),
            c => out.push(c),
        }
    }
    out
}

/// `escape`, except that lines stay lines.
pub fn escape_lines(text: &str) -> String {
    text.lines().map(escape).collect::<Vec<_>>().join("\n")
}

/// `1 event`, `2 events`.
pub fn count(n: u64, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

fn dangerous(c: char) -> bool {
    let reorders =
        matches!(c, '\u{200e}' | '\u{200f}' | '\u{61c}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || reorders || matches!(c, '\u{2028}' | '\u{2029}')
}

/// `512 B`, `1.5 KiB`, `64 MiB`: three digits at most behind each other say enough.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 999.95 would be shown as 1000.0; the next unit is shorter
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let text = format!("{value:.1}");
    format!("{} {}", text.strip_suffix(".0").unwrap_or(&text), UNITS[unit])
}

/// `0s`, `45s`, `3m`, `2h`, `5d`: one unit, rounded down, as `kubectl` and `docker` show ages.
pub fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7_199 => format!("{}m", seconds / 60),
        7_200..=172_799 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// How long ago. A moment in the future (the clock was set back) is `0s`.
pub fn age(then: UnixMs, now: UnixMs) -> String {
    duration(u64::try_from(now.0.saturating_sub(then.0)).unwrap_or(0))
}

/// Data for people: as text when it is text, else as a hexdump's first column would.
pub fn data(bytes: &[u8], terminal: bool) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if terminal => escape_lines(text),
        Ok(text) => text.trim_end_matches('\n').to_owned(),
        Err(_) => hexdump(bytes),
    }
}

/// Sixteen bytes a line; enough to recognise a format by.
const HEX_BYTES_MAX: usize = 256;

fn hexdump(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (line, chunk) in bytes[..bytes.len().min(HEX_BYTES_MAX)].chunks(16).enumerate() {
        let hex: Vec<String> = chunk.iter().map(|b| format!("{b:02x}")).collect();
        let shown = |b: &u8| if (0x20..0x7f).contains(b) { *b as char } else { '.' };
        let text: String = chunk.iter().map(shown).collect();
        let _ = writeln!(out, "{:08x}  {:<47}  {text}", line * 16, hex.join(" "));
    }
    if bytes.len() > HEX_BYTES_MAX {
        let _ = writeln!(out, "… {} in all", size(bytes.len() as u64));
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_empty_cells_are_countable() {
        let mut table = Table::new(&["NAME", "STATE", "IMAGE"]);
        table.row(vec!["thermostat".into(), "ready".into(), "thermostat:1".into()]);
        table.row(vec!["x".into(), String::new(), "é:1".into()]);

        assert_eq!(
            table.render(None),
            "NAME        STATE  IMAGE\nthermostat  ready  thermostat:1\nx           -      é:1\n"
        );
    }

    #[test]
    fn only_the_last_column_is_cut_and_only_on_a_terminal() {
        let mut table = Table::new(&["ID", "ERROR"]);
        table.row(vec!["0123456789".into(), "could not start: no such file".into()]);

        assert!(table.render(None).contains("could not start: no such file"));
        let narrow = table.render(Some(24));
        assert!(narrow.lines().all(|line| line.chars().count() <= 24), "{narrow}");
        assert!(narrow.contains("0123456789  could not s…"), "{narrow}");
        assert!(table.render(Some(5)).contains("0123456789  could n…"));
    }

    #[test]
    fn text_from_outside_cannot_steer_the_terminal() {
        assert_eq!(escape("a\x1b[31m\r\n\tb\u{7f}\u{9b}"), "a\\x1b[31m\\r\\n\\tb\\x7f\\x9b");
        assert_eq!(escape("\u{202e}gpj.exe\u{2028}"), "\\u{202e}gpj.exe\\u{2028}");
        assert_eq!(escape("grüße 温度"), "grüße 温度");

        let mut table = Table::new(&["TOPIC"]);
        table.row(vec!["a\nb\x1b[2J".into()]);
        assert_eq!(table.render(None).lines().count(), 2);
    }

    #[test]
    fn counts_agree_with_their_noun() {
        assert_eq!(
            [0, 1, 2].map(|n| count(n, "event")),
            ["0 events", "1 event", "2 events"].map(str::to_owned)
        );
    }

    #[test]
    fn sizes_are_for_people() {
        let shown: Vec<String> =
            [0, 1023, 1024, 1536, 64 << 20, 1_048_575, u64::MAX].into_iter().map(size).collect();

        assert_eq!(shown, ["0 B", "1023 B", "1 KiB", "1.5 KiB", "64 MiB", "1 MiB", "16 EiB"]);
    }

    #[test]
    fn ages_have_one_unit_and_never_go_below_zero() {
        let shown: Vec<String> =
            [0, 999, 119_000, 180_000, 7_200_000, 172_800_000].into_iter().map(duration).collect();

        assert_eq!(shown, ["0s", "0s", "119s", "3m", "2h", "2d"]);
        assert_eq!(age(UnixMs(10_000), UnixMs(5_000)), "0s");
        assert_eq!(age(UnixMs(i64::MIN), UnixMs(i64::MAX)), duration(i64::MAX as u64));
    }

    #[test]
    fn data_is_shown_as_text_or_as_bytes_in_hex() {
        assert_eq!(data(b"21.5", true), "21.5");
        assert_eq!(data(b"a\x1b[0m\nb", true), "a\\x1b[0m\nb");
        assert_eq!(data(b"a\x1b[0m", false), "a\x1b[0m");
        assert!(data(&[0xff, 0x41], true).starts_with("00000000  ff 41 "));
        assert!(data(&[0xff; 5000], true).lines().count() <= 17);
    }

    #[test]
    fn fields_are_aligned() {
        assert_eq!(
            fields(&[("Name", "x".into()), ("Revision", String::new())]),
            "Name:      x\nRevision:  -\n"
        );
    }
}
