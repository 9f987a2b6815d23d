//! Function logs: per function, bounded, in `run_dir` (a tmpfs), off the flash.
//!
//! One JSON object a line, in two files: `<function>.log` is written until it is half of
//! `LOG_BYTES_MAX`, then takes the place of `<function>.log.1`. A function's name has no dot
//! and no slash, so neither file can be another's.
//!
//! Appending is one write without fsync. What can't be written is counted, not raised: a full
//! tmpfs must not stop functions.

use crate::model::api::LogLine;
use crate::model::{EventId, FunctionName, UnixMs};
use smol::channel::{Receiver, Sender, TrySendError};
use std::collections::{HashMap, VecDeque};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Kept for each function, the newest.
pub const LOG_BYTES_MAX: u64 = 1 << 20;

/// A longer line is cut here.
pub const LINE_BYTES_MAX: usize = 8 * 1024;
const CUT_MARK: &str = " … (cut)";

/// Lines that a follower may be behind; what comes then it misses.
const FOLLOWER_LINES_MAX: usize = 256;

/// Followers of one function; one more takes the place of the oldest, whose stream ends.
const FOLLOWERS_MAX: usize = 16;

/// Files kept open; of a gateway's hundred functions few write at a time.
const OPEN_MAX: usize = 32;

/// A handle; cheap to clone.
#[derive(Clone)]
pub struct FunctionLogs {
    inner: Arc<Inner>,
}

struct Inner {
    folder: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    open: HashMap<FunctionName, Open>,
    /// Functions in `open`, the longest open first.
    order: VecDeque<FunctionName>,
    followers: HashMap<FunctionName, Vec<Follower>>,
    unwritten: u64,
}

struct Open {
    file: File,
    bytes: u64,
}

struct Follower {
    lines: Sender<LogLine>,
    missed: u64,
}

#[derive(Clone, Debug, Default)]
pub struct LogQuery {
    /// The last N lines; `None`: all.
    pub tail: Option<usize>,
    pub since: Option<UnixMs>,
    /// Its id, or the beginning of it, as listings show it.
    pub event: Option<EventId>,
}

impl FunctionLogs {
    /// Takes over what an earlier daemon wrote.
    pub fn open(run_dir: &Path) -> io::Result<Self> {
        let folder = run_dir.join("logs");
        DirBuilder::new().recursive(true).mode(0o750).create(&folder)?;
        Ok(Self { inner: Arc::new(Inner { folder, state: Mutex::default() }) })
    }

    /// Appends complete lines (longer than 8 KiB are cut, marked). Never blocks a caller for
    /// a reader; a failing disk is counted, not raised.
    pub fn append(&self, function: &FunctionName, event: &EventId, time: UnixMs, text: &str) {
        let lines: Vec<LogLine> = text
            .strip_suffix('\n')
            .unwrap_or(text)
            .split('\n')
            .map(|line| LogLine { time, event: event.clone(), text: cut(line) })
            .collect();
        let mut state = self.lock();
        if let Err(error) = self.write(&mut state, function, &lines) {
            if state.unwritten == 0 {
                tracing::warn!(%function, %error, "function log could not be written");
            }
            state.unwritten += lines.len() as u64;
            state.close(function);
        }
        if let Some(followers) = state.followers.get_mut(function) {
            followers.retain_mut(|follower| lines.iter().all(|line| follower.tell(line)));
            if followers.is_empty() {
                state.followers.remove(function);
            }
        }
    }

    /// Lines that could not be written since start.
    pub fn unwritten(&self) -> u64 {
        self.lock().unwritten
    }

    pub fn read(&self, function: &FunctionName, query: &LogQuery) -> io::Result<Vec<LogLine>> {
        let files = {
            // Both at one moment, so that a turn between them hides nothing.
            let _state = self.lock();
            [self.older(function), self.newer(function)].map(|path| match File::open(path) {
                Ok(file) => Ok(Some(file)),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            })
        };
        let mut found = VecDeque::new();
        for file in files {
            let Some(file) = file? else { continue };
            for line in BufReader::new(file).split(b'\n') {
                // A line that a kill or a full disk left unfinished is left out.
                let Ok(line) = serde_json::from_slice::<LogLine>(&line?) else { continue };
                if query.since.is_some_and(|since| line.time < since)
                    || query
                        .event
                        .as_ref()
                        .is_some_and(|event| !line.event.as_str().starts_with(event.as_str()))
                {
                    continue;
                }
                found.push_back(line);
                if query.tail.is_some_and(|tail| found.len() > tail) {
                    found.pop_front();
                }
            }
        }
        Ok(found.into())
    }

    /// New lines of this function from now on; a follower that is too slow misses lines and is told.
    pub fn follow(&self, function: &FunctionName) -> Receiver<LogLine> {
        let (lines, receiver) = smol::channel::bounded(FOLLOWER_LINES_MAX);
        let mut state = self.lock();
        let followers = state.followers.entry(function.clone()).or_default();
        followers.retain(|follower| !follower.lines.is_closed());
        if followers.len() >= FOLLOWERS_MAX {
            followers.remove(0);
        }
        followers.push(Follower { lines, missed: 0 });
        receiver
    }

    /// The function is gone: its log goes, and its followers' streams end.
    pub fn remove(&self, function: &FunctionName) {
        let mut state = self.lock();
        state.close(function);
        state.followers.remove(function);
        for path in [self.newer(function), self.older(function)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "function log could not be removed");
                }
                _ => {}
            }
        }
    }

    fn write(&self, state: &mut State, function: &FunctionName, lines: &[LogLine]) -> io::Result<()> {
        let mut text = Vec::new();
        for line in lines {
            let start = text.len();
            serde_json::to_writer(&mut text, line)?;
            text.push(b'\n');
            let bytes = (text.len() - start) as u64;
            if self.opened(state, function)?.bytes + (start as u64) + bytes > LOG_BYTES_MAX / 2 {
                // Turn: what belongs to the full half goes there first.
                self.flush(state, function, &text[..start])?;
                text.drain(..start);
                state.close(function);
                fs::rename(self.newer(function), self.older(function))?;
            }
        }
        self.flush(state, function, &text)
    }

    fn flush(&self, state: &mut State, function: &FunctionName, text: &[u8]) -> io::Result<()> {
        let open = self.opened(state, function)?;
        open.file.write_all(text)?;
        open.bytes += text.len() as u64;
        Ok(())
    }

    fn opened<'a>(&self, state: &'a mut State, function: &FunctionName) -> io::Result<&'a mut Open> {
        if !state.open.contains_key(function) {
            if state.open.len() >= OPEN_MAX
                && let Some(oldest) = state.order.front().cloned()
            {
                state.close(&oldest);
            }
            let file = OpenOptions::new().append(true).create(true).mode(0o640).open(self.newer(function))?;
            let bytes = file.metadata()?.len();
            state.open.insert(function.clone(), Open { file, bytes });
            state.order.push_back(function.clone());
        }
        Ok(state.open.get_mut(function).expect("it was opened just above"))
    }

    fn newer(&self, function: &FunctionName) -> PathBuf {
        self.inner.folder.join(format!("{function}.log"))
    }

    fn older(&self, function: &FunctionName) -> PathBuf {
        self.inner.folder.join(format!("{function}.log.1"))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn close(&mut self, function: &FunctionName) {
        self.open.remove(function);
        self.order.retain(|open| open != function);
    }
}

impl Follower {
    /// False when it has gone.
    fn tell(&mut self, line: &LogLine) -> bool {
        if self.missed > 0 {
            let text = format!("({} lines missed: the reader was too slow)", self.missed);
            match self.lines.try_send(LogLine { text, ..line.clone() }) {
                Ok(()) => self.missed = 0,
                Err(TrySendError::Full(_)) => {
                    self.missed += 1;
                    return true;
                }
                Err(TrySendError::Closed(_)) => return false,
            }
        }
        match self.lines.try_send(line.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                self.missed += 1;
                true
            }
            Err(TrySendError::Closed(_)) => false,
        }
    }
}

fn cut(line: &str) -> String {
    if line.len() <= LINE_BYTES_MAX {
        return line.to_owned();
    }
    let mut end = LINE_BYTES_MAX - CUT_MARK.len();
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{CUT_MARK}", &line[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_as_they_were_appended() {
        let (_folder, logs) = logs();
        let f = function("f");

        logs.append(&f, &event("a"), UnixMs(1), "one\ntwo\n");
        logs.append(&f, &event("b"), UnixMs(2), "tab\t\"quote\" \u{1b}[31m ü");
        logs.append(&function("g"), &event("a"), UnixMs(3), "not f's");

        let texts = |query: &LogQuery| -> Vec<String> {
            logs.read(&f, query).expect("reads").into_iter().map(|line| line.text).collect()
        };
        let all = ["one", "two", "tab\t\"quote\" \u{1b}[31m ü"];
        assert_eq!(texts(&LogQuery::default()), all);
        assert_eq!(texts(&LogQuery { tail: Some(2), ..LogQuery::default() }), all[1..]);
        assert_eq!(texts(&LogQuery { tail: Some(0), ..LogQuery::default() }), [""; 0]);
        assert_eq!(texts(&LogQuery { since: Some(UnixMs(2)), ..LogQuery::default() }), all[2..]);
        assert_eq!(texts(&LogQuery { event: Some(event("a")), ..LogQuery::default() }), all[..2]);
    }

    #[test]
    fn log_stays_within_its_bound_and_keeps_the_newest() {
        let (folder, logs) = logs();
        let f = function("f");
        let line = "x".repeat(1000);

        for n in 0..3000 {
            logs.append(&f, &event("a"), UnixMs(n), &line);
            assert!(bytes_in(folder.path()) <= LOG_BYTES_MAX);
        }

        let lines = logs.read(&f, &LogQuery::default()).expect("reads");
        assert!(lines.len() as u64 * 1000 > LOG_BYTES_MAX * 2 / 5, "{} lines", lines.len());
        let times: Vec<i64> = lines.iter().map(|line| line.time.0).collect();
        let first = 3000 - lines.len() as i64;
        assert_eq!(times, (first..3000).collect::<Vec<_>>());
    }

    #[test]
    fn one_append_of_many_lines_stays_within_the_bound() {
        let (folder, logs) = logs();
        let text = ["y".repeat(100).as_str()].repeat(30_000).join("\n");

        logs.append(&function("f"), &event("a"), UnixMs(0), &text);

        assert!(bytes_in(folder.path()) <= LOG_BYTES_MAX);
        assert!(!logs.read(&function("f"), &LogQuery::default()).expect("reads").is_empty());
    }

    #[test]
    fn long_line_is_cut_at_a_character() {
        let (_folder, logs) = logs();
        let f = function("f");

        logs.append(&f, &event("a"), UnixMs(0), &"ü".repeat(LINE_BYTES_MAX));

        let line = logs.read(&f, &LogQuery::default()).expect("reads").remove(0).text;
        assert!(line.len() <= LINE_BYTES_MAX && line.ends_with(CUT_MARK));
    }

    #[test]
    fn log_of_an_earlier_daemon_is_continued() {
        let (folder, logs) = logs();
        let f = function("f");
        logs.append(&f, &event("a"), UnixMs(0), "before");
        drop(logs);
        let unfinished = b"{\"time\":";
        let path = folder.path().join("logs/f.log");
        OpenOptions::new().append(true).open(path).and_then(|mut f| f.write_all(unfinished)).expect("writes");

        let logs = FunctionLogs::open(folder.path()).expect("opens");
        logs.append(&f, &event("a"), UnixMs(0), "glued to the unfinished one");
        logs.append(&f, &event("a"), UnixMs(0), "after");

        let lines = logs.read(&f, &LogQuery::default()).expect("reads");
        let texts: Vec<_> = lines.iter().map(|line| line.text.as_str()).collect();
        assert_eq!(texts, ["before", "after"]);
    }

    #[test]
    fn slow_follower_misses_lines_and_is_told() {
        let (_folder, logs) = logs();
        let f = function("f");
        let follower = logs.follow(&f);

        for n in 0..FOLLOWER_LINES_MAX + 10 {
            logs.append(&f, &event("a"), UnixMs(n as i64), "line");
        }
        for _ in 0..FOLLOWER_LINES_MAX {
            assert_eq!(follower.try_recv().expect("a line").text, "line");
        }
        logs.append(&f, &event("a"), UnixMs(0), "last");

        assert!(follower.try_recv().expect("a line").text.contains("10 lines missed"));
        assert_eq!(follower.try_recv().expect("a line").text, "last");
    }

    #[test]
    fn removed_log_is_gone_and_its_followers_are_told() {
        let (folder, logs) = logs();
        let f = function("f");
        let follower = logs.follow(&f);
        logs.append(&f, &event("a"), UnixMs(0), "line");

        logs.remove(&f);

        assert_eq!(bytes_in(folder.path()), 0);
        assert!(follower.try_recv().is_ok() && follower.is_closed());
        logs.append(&f, &event("a"), UnixMs(0), "a new one");
        assert_eq!(logs.read(&f, &LogQuery::default()).expect("reads").len(), 1);
    }

    #[test]
    fn more_functions_than_open_files_still_log() {
        let (_folder, logs) = logs();
        for round in 0..2 {
            for n in 0..OPEN_MAX + 5 {
                logs.append(&function(&format!("f{n}")), &event("a"), UnixMs(round), "line");
            }
        }

        assert_eq!(logs.read(&function("f0"), &LogQuery::default()).expect("reads").len(), 2);
        assert_eq!(logs.unwritten(), 0);
    }

    #[test]
    fn failing_disk_is_counted() {
        let (folder, logs) = logs();
        fs::remove_dir_all(folder.path().join("logs")).expect("removes");

        logs.append(&function("f"), &event("a"), UnixMs(0), "one\ntwo");

        assert_eq!(logs.unwritten(), 2);
    }

    fn logs() -> (tempfile::TempDir, FunctionLogs) {
        let folder = tempfile::tempdir().expect("a folder");
        let logs = FunctionLogs::open(folder.path()).expect("opens");
        (folder, logs)
    }

    fn function(name: &str) -> FunctionName {
        FunctionName::parse(name).expect("a good name")
    }

    fn event(id: &str) -> EventId {
        EventId::parse(id).expect("a good id")
    }

    fn bytes_in(folder: &Path) -> u64 {
        let files = fs::read_dir(folder.join("logs")).expect("lists");
        files.map(|file| file.and_then(|file| file.metadata()).expect("stats").len()).sum()
    }
}
