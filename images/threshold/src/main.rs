//! A threshold alarm: reads one sensor reading, answers when it is too high.
//!
//! Standard input: `{"celsius": 31.5}`, other keys are ignored. THRESHOLD: degrees, 30 unless it
//! is set. Above it, standard output gets
//! `{"alarm":true,"celsius":31.5,"threshold":30,"sensor":"sensors/kiln/temperature"}`, the sensor
//! being the event's subject (CE_SUBJECT); at or below it, nothing. A reading that is not
//! understood is told on standard error, with exit code 2.

use std::io::{Read, Write};
use std::process::ExitCode;

/// Readings have tens of bytes; a megabyte of them is a mistake.
const READING_BYTES_MAX: u64 = 64 * 1024;
/// How deep arrays and objects may lie in each other.
const DEPTH_MAX: u32 = 32;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("threshold: {error}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<(), String> {
    let threshold = match std::env::var("THRESHOLD") {
        Ok(text) => number(text.trim()).ok_or_else(|| format!("THRESHOLD is not a number: {text:?}"))?,
        Err(_) => 30.0,
    };
    let mut reading = Vec::new();
    let taken = std::io::stdin().take(READING_BYTES_MAX + 1).read_to_end(&mut reading);
    taken.map_err(|error| format!("read the reading: {error}"))?;
    if reading.len() as u64 > READING_BYTES_MAX {
        return Err(format!("the reading is longer than {READING_BYTES_MAX} bytes"));
    }
    let celsius = celsius(&reading).map_err(|why| {
        let start: String = String::from_utf8_lossy(&reading).chars().take(80).collect();
        format!("{why}; expected a reading such as {{\"celsius\": 31.5}}, got {start:?}")
    })?;

    if celsius > threshold {
        let sensor = quoted(&std::env::var("CE_SUBJECT").unwrap_or_default());
        let alarm =
            format!(r#"{{"alarm":true,"celsius":{celsius},"threshold":{threshold},"sensor":{sensor}}}"#);
        let mut out = std::io::stdout();
        let written = writeln!(out, "{alarm}").and_then(|()| out.flush());
        written.map_err(|error| format!("write the alarm: {error}"))?;
    }
    Ok(())
}

/// The number under `celsius` at the top of a JSON object.
fn celsius(text: &[u8]) -> Result<f64, &'static str> {
    let mut json = Json { text, at: 0 };
    let mut found = None;
    json.expect(b'{')?;
    if !json.take(b'}') {
        loop {
            let key = json.string()?;
            json.expect(b':')?;
            if key == b"celsius" {
                found = Some(json.number()?);
            } else {
                json.skip(0)?;
            }
            if json.take(b'}') {
                break;
            }
            json.expect(b',')?;
        }
    }
    json.blank();
    if json.at < text.len() {
        return Err("something follows the JSON object");
    }
    found.ok_or("there is no \"celsius\"")
}

/// As much of JSON (RFC 8259) as a reading takes.
struct Json<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Json<'a> {
    fn blank(&mut self) {
        while matches!(self.text.get(self.at), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> bool {
        self.blank();
        let there = self.text.get(self.at) == Some(&byte);
        self.at += usize::from(there);
        there
    }

    fn expect(&mut self, byte: u8) -> Result<(), &'static str> {
        if self.take(byte) { Ok(()) } else { Err("not a JSON object") }
    }

    /// The raw characters between the quotes, escapes as they are.
    fn string(&mut self) -> Result<&'a [u8], &'static str> {
        self.expect(b'"')?;
        let start = self.at;
        loop {
            match self.text.get(self.at) {
                Some(b'"') => break,
                Some(b'\\') => self.at += 2,
                Some(byte) if *byte >= b' ' => self.at += 1,
                _ => return Err("a string has no end"),
            }
        }
        self.at += 1;
        Ok(&self.text[start..self.at - 1])
    }

    fn word(&mut self) -> &'a [u8] {
        self.blank();
        let rest = &self.text[self.at..];
        let plain = |b: &u8| b.is_ascii_alphanumeric() || b"+-.".contains(b);
        let end = rest.iter().position(|b| !plain(b)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn number(&mut self) -> Result<f64, &'static str> {
        let word = self.word();
        std::str::from_utf8(word).ok().and_then(number).ok_or("\"celsius\" is not a number")
    }

    fn skip(&mut self, depth: u32) -> Result<(), &'static str> {
        if depth > DEPTH_MAX {
            return Err("it is nested too deeply");
        }
        self.blank();
        match self.text.get(self.at) {
            Some(b'"') => self.string().map(drop),
            Some(open @ (b'{' | b'[')) => {
                let close = if *open == b'{' { b'}' } else { b']' };
                self.at += 1;
                if self.take(close) {
                    return Ok(());
                }
                loop {
                    if close == b'}' {
                        self.string()?;
                        self.expect(b':')?;
                    }
                    self.skip(depth + 1)?;
                    if self.take(close) {
                        return Ok(());
                    }
                    self.expect(b',')?;
                }
            }
            _ => match self.word() {
                b"true" | b"false" | b"null" => Ok(()),
                word if std::str::from_utf8(word).ok().and_then(number).is_some() => Ok(()),
                _ => Err("not JSON"),
            },
        }
    }
}

/// A JSON number: Rust's own parser also takes `inf`, `nan`, `1.` and `+1`.
fn number(text: &str) -> Option<f64> {
    let digits = text.strip_prefix('-').unwrap_or(text).as_bytes();
    let good =
        digits.first().is_some_and(u8::is_ascii_digit) && digits.last().is_some_and(u8::is_ascii_digit);
    if good { text.parse().ok().filter(|number: &f64| number.is_finite()) } else { None }
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for char in text.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            control if (control as u32) < 0x20 => out.push_str(&format!("\\u{:04x}", control as u32)),
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_are_understood_or_refused() {
        let good = [
            (r#"{"celsius": 31.5}"#, 31.5),
            (r#" {"unit":"\"C","at":[1,{"x":null}],"celsius":-4e1} "#, -40.0),
        ];
        for (text, celsius_is) in good {
            assert_eq!(celsius(text.as_bytes()), Ok(celsius_is), "{text}");
        }
        let deep = "[".repeat(100_000);
        for bad in [
            "",
            "{",
            "{}",
            "31.5",
            r#"{"celsius":"hot"}"#,
            r#"{"celsius":1} x"#,
            r#"{"celsius":nan}"#,
            r#"{"a\"#,
        ] {
            assert!(celsius(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(celsius(format!(r#"{{"a":{deep}"#).as_bytes()).is_err());
    }

    #[test]
    fn names_are_quoted_for_json() {
        assert_eq!(quoted("a\"b\\c\n"), r#""a\"b\\c\u000a""#);
    }
}
