//! stdout and stderr, and what is different when they are a terminal.

use super::args::Format;
use std::io::{self, IsTerminal, Write};

/// Writing to stdout failed.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The reader has seen enough (`| head`): the command is done, quietly.
    #[error("nobody reads stdout any more")]
    Closed,
    #[error("write to stdout")]
    Write(#[source] io::Error),
}

#[derive(Debug, Clone, Copy)]
pub struct Output {
    pub format: Format,
    /// Whether stdout is a terminal.
    pub terminal: bool,
    /// Characters in a line of that terminal, when it says so.
    pub width: Option<usize>,
}

impl Output {
    pub fn new(format: Format) -> Self {
        let stdout = io::stdout();
        let terminal = stdout.is_terminal();
        let size = terminal.then(|| rustix::termios::tcgetwinsize(&stdout).ok()).flatten();
        let width = size.map(|size| usize::from(size.ws_col)).filter(|&columns| columns > 0);
        Self { format, terminal, width }
    }

    pub fn json(&self) -> bool {
        self.format == Format::Json
    }

    /// Bytes as they are. Flushed: what is printed is seen, line by line in `logs -f`.
    pub fn raw(&self, bytes: &[u8]) -> Result<(), OutputError> {
        let mut stdout = io::stdout().lock();
        let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
        written.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => OutputError::Closed,
            _ => OutputError::Write(error),
        })
    }

    pub fn text(&self, text: &str) -> Result<(), OutputError> {
        self.raw(text.as_bytes())
    }

    pub fn line(&self, line: &str) -> Result<(), OutputError> {
        self.text(&format!("{line}\n"))
    }

    /// The API's JSON, exactly, with a line break behind it.
    pub fn answer(&self, json: &[u8]) -> Result<(), OutputError> {
        let mut line = json.trim_ascii_end().to_vec();
        line.push(b'\n');
        self.raw(&line)
    }
}

/// A line on stderr. That nobody reads it is no reason to fail.
pub fn tell(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// One line on a terminal's stderr that is written over and over; silent when stderr goes to a
/// file or a pipe. Cleared when dropped, so that what follows starts on a clean line.
pub struct ProgressLine {
    terminal: bool,
    width: usize,
    shown: bool,
}

impl ProgressLine {
    pub fn new() -> Self {
        let stderr = io::stderr();
        let terminal = stderr.is_terminal();
        let size = rustix::termios::tcgetwinsize(&stderr).ok().map(|size| usize::from(size.ws_col));
        Self { terminal, width: size.filter(|&columns| columns > 0).unwrap_or(80), shown: false }
    }

    pub fn show(&mut self, text: &str) {
        if self.terminal {
            // a line that wraps can't be written over
            let text: String = text.chars().take(self.width.saturating_sub(1)).collect();
            let _ = write!(io::stderr().lock(), "\r\x1b[K{text}");
            self.shown = true;
        }
    }

    /// Whether anybody sees it.
    pub fn visible(&self) -> bool {
        self.terminal
    }

    pub fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = write!(io::stderr().lock(), "\r\x1b[K");
        }
    }
}

impl Default for ProgressLine {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        self.clear();
    }
}
