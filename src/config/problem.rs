//! One mistake in a file, where it stands and what would be right; and the collector that
//! gathers all of one file, so that an operator fixes them in one round.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

/// Shown as `file:line: message`, which editors and terminals make clickable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub file: String,
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.message)
    }
}

impl std::error::Error for Problem {}

/// A file with more mistakes than this is the wrong file; the rest is counted, not listed.
const PROBLEMS_MAX: usize = 100;
/// How much of a bad value a message repeats, in characters.
const SHOWN_CHARS_MAX: usize = 80;

/// Collects the problems of one file. Interior mutability, because readers of nested tables
/// report to the same one.
pub(super) struct Report<'a> {
    file: &'a str,
    text: &'a str,
    found: RefCell<Vec<Found>>,
    /// The text had syntax errors: what seems to be missing may only have been unreadable.
    damaged: Cell<bool>,
}

struct Found {
    line: usize,
    column: usize,
    message: String,
    syntax: bool,
}

impl<'a> Report<'a> {
    pub fn new(file: &'a str, text: &'a str) -> Self {
        Self { file, text, found: RefCell::default(), damaged: Cell::new(false) }
    }

    /// A mistake at this place.
    pub fn at(&self, span: &Range<usize>, message: impl Into<String>) {
        self.add(span, message.into(), false);
    }

    /// A mistake of syntax: the only one reported on its line.
    pub fn syntax(&self, span: &Range<usize>, message: impl Into<String>) {
        self.damaged.set(true);
        self.add(span, message.into(), true);
    }

    /// Something that should be in the table at this place and isn't.
    pub fn missing(&self, span: &Range<usize>, message: impl Into<String>) {
        if !self.damaged.get() {
            self.at(span, message);
        }
    }

    fn add(&self, span: &Range<usize>, message: String, syntax: bool) {
        let (line, column) = position(self.text, span.start);
        self.found.borrow_mut().push(Found { line, column, message, syntax });
    }

    pub fn line(&self, span: &Range<usize>) -> usize {
        position(self.text, span.start).0
    }

    /// `value` when nothing was reported, else every mistake.
    pub fn finish<T>(self, value: T) -> Result<T, Vec<Problem>> {
        let problems = self.into_problems();
        if problems.is_empty() { Ok(value) } else { Err(problems) }
    }

    /// In the order of the file.
    pub fn into_problems(self) -> Vec<Problem> {
        let mut found = self.found.into_inner();
        // What the parser made of a broken line is a guess: its further mistakes are noise.
        let broken: HashSet<usize> = found.iter().filter(|f| f.syntax).map(|f| f.line).collect();
        found.retain(|f| f.syntax || !broken.contains(&f.line));
        found.sort_by_key(|f| (f.line, f.column));
        let left_out = found.len().saturating_sub(PROBLEMS_MAX);
        found.truncate(PROBLEMS_MAX);
        let file = || self.file.to_owned();
        let problem = |f: Found| Problem { file: file(), line: f.line, column: f.column, message: f.message };
        let mut problems: Vec<Problem> = found.into_iter().map(problem).collect();
        if left_out > 0
            && let Some(last) = problems.last().cloned()
        {
            problems.push(Problem { message: format!("and {left_out} more mistakes"), ..last });
        }
        problems
    }
}

/// Line and column of a byte offset, both from 1. An offset beyond the end means the end.
pub(super) fn position(text: &str, offset: usize) -> (usize, usize) {
    let mut end = offset.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let before = &text[..end];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// A value from the file, quoted, escaped and cut, for messages.
pub(super) fn shown(value: &str) -> String {
    if value.chars().count() > SHOWN_CHARS_MAX {
        let head: String = value.chars().take(SHOWN_CHARS_MAX).collect();
        format!("{head:?}…")
    } else {
        format!("{value:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_lines_and_characters_from_one() {
        let text = "a\nbé = 1\n";

        assert_eq!(position(text, 0), (1, 1));
        assert_eq!(position(text, 2), (2, 1));
        assert_eq!(position(text, 5), (2, 3));
        assert_eq!(position(text, 4), (2, 2)); // inside é
        assert_eq!(position(text, 999), (3, 1));
    }

    #[test]
    fn problems_come_in_the_order_of_the_file_and_are_bounded() {
        let text = "x\n".repeat(200);
        let report = Report::new("f", &text);
        for offset in (0..200).rev() {
            report.at(&(offset * 2..offset * 2), "bad");
        }

        let problems = report.finish(()).expect_err("problems were reported");

        assert_eq!(problems.len(), PROBLEMS_MAX + 1);
        assert!(problems.iter().take(PROBLEMS_MAX).map(|p| p.line).eq(1..=PROBLEMS_MAX));
        assert_eq!(problems[PROBLEMS_MAX].to_string(), "f:100: and 100 more mistakes");
    }
}
