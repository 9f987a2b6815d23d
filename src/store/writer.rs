//! The writer thread: owns the connection, turns requests that arrive together into one
//! transaction and one fsync, and answers only after the commit returned.
//!
//! Reads of a group go first and are answered at once, so that none waits for an fsync: nothing that
//! the group writes has been answered yet, so none of it can be missed.
//!
//! Each request that writes runs in a savepoint: one that is refused takes nothing of its neighbours' with
//! it. When SQLite drops the whole transaction by itself (disk full), or the commit fails for
//! want of room, the requests run once more, each in a transaction of its own: a large event
//! that does not fit must not keep a delete from making room. Any other failure of the commit
//! is the answer to all of the group. No SQLite error ends the thread.

use super::db::{Db, Mark};
use super::error::StoreError;
use super::full::{self, Told};
use super::line::Line;
use super::{inbox, outbox};
use crate::watch::Watch;
use futures_lite::future::{block_on, or};
use smol::Timer;
use smol::channel::{Receiver, Sender};
use std::time::{Duration, Instant};

/// Requests waiting for the thread; who comes later waits for room. As many as one group, so
/// that the next one fills while this one is being synced.
pub(super) const QUEUE_MAX: usize = 256;

/// Requests in one transaction.
const GROUP_MAX: usize = 256;

/// A group is closed at this much data: bounds the WAL and what a rollback throws away.
const GROUP_BYTES_MAX: u64 = 1 << 20;

/// Work between two groups: a few milliseconds.
const SWEEP_ROWS: u32 = 256;
const SHRINK_PAGES: u32 = 256;

pub(super) enum Message {
    Request(Box<dyn Request>),
    /// Everything before it is done, then the database is closed, then the answer comes.
    Close(Sender<()>),
}

/// A request that can run again after a rollback, and its answer.
pub(super) trait Request: Send {
    fn writes(&self) -> bool;
    fn bytes(&self) -> u64;
    /// Runs it and keeps the result; whether it went well.
    fn run(&mut self, db: &mut Db) -> bool;
    /// It is about to run once more, as if for the first time.
    fn again(&mut self);
    /// Its success did not come true.
    fn fail(&mut self, error: StoreError);
    fn answer(self: Box<Self>);
}

pub(super) struct Call<F, T> {
    pub run: F,
    /// Of arrivals that are stored in their order.
    pub line: Option<Line>,
    /// It was this one that closed the line.
    pub closed: bool,
    pub writes: bool,
    pub bytes: u64,
    pub result: Option<Result<T, StoreError>>,
    pub reply: Sender<Result<T, StoreError>>,
}

impl<F, T> Request for Call<F, T>
where
    F: FnMut(&mut Db) -> Result<T, StoreError> + Send,
    T: Send,
{
    fn writes(&self) -> bool {
        self.writes
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn run(&mut self, db: &mut Db) -> bool {
        if self.line.as_ref().is_some_and(Line::is_closed) {
            self.result = Some(Err(StoreError::Full));
            return false;
        }
        let result = (self.run)(db).map_err(|error| db.classify(error));
        if let (Some(line), Err(error)) = (&self.line, &result) {
            line.refused(error);
            self.closed = line.is_closed();
        }
        let good = result.is_ok();
        self.result = Some(result);
        good
    }

    fn again(&mut self) {
        if let (true, Some(line)) = (std::mem::take(&mut self.closed), &self.line) {
            line.reopen();
        }
    }

    fn fail(&mut self, error: StoreError) {
        if let Some(line) = &self.line {
            line.refused(&error);
        }
        if !matches!(self.result, Some(Err(_))) {
            self.result = Some(Err(error));
        }
    }

    fn answer(self: Box<Self>) {
        if let Some(result) = self.result {
            let _ = self.reply.try_send(result); // whoever asked may have gone
        }
    }
}

/// The thread's body; ends when it is told to close, or when the last handle is gone.
pub(super) fn run(mut db: Db, requests: Receiver<Message>, commit_window: Duration, broken: &Watch<bool>) {
    let mut group: Vec<Box<dyn Request>> = Vec::with_capacity(GROUP_MAX);
    let mut housekeeping = true;
    let mut told = Told::at_start(&db);
    loop {
        if db.is_broken() && !*broken.get() {
            broken.set(true);
        }
        let message = match requests.try_recv() {
            Ok(message) => message,
            Err(_) if housekeeping => {
                housekeeping = keep_house(&mut db);
                continue;
            }
            Err(_) => match requests.recv_blocking() {
                Ok(message) => message,
                Err(_) => return, // every handle is gone, and nobody said close: not a clean stop
            },
        };
        let close = gather(&mut db, &requests, message, &mut group, commit_window);
        work(&mut db, &mut group);
        housekeeping = true;
        if let Some(reply) = close {
            requests.close();
            while requests.try_recv().is_ok() {} // who came after is told that it has stopped
            if let Err(error) = db.close() {
                tracing::error!(error = %error, "database could not be closed cleanly");
            }
            let _ = reply.try_send(());
            return;
        }
        // Sweeping must also come forward under steady load.
        if !db.sweep.is_empty() || !db.unreadable.is_empty() || full::age_is_due(&db) {
            keep_house(&mut db);
        }
        let now = db.monotonic();
        if db.ballast.is_due(now) {
            db.ballast.recover(now);
        }
        full::tell(&db, &mut told, now);
    }
}

/// A group: what is there, and what comes within the window once there is something to write.
/// Returns whom to tell that it has closed.
fn gather(
    db: &mut Db,
    requests: &Receiver<Message>,
    first: Message,
    group: &mut Vec<Box<dyn Request>>,
    commit_window: Duration,
) -> Option<Sender<()>> {
    let (mut bytes, mut requests_taken, mut until, mut next) = (0, 0, None, Some(first));
    while let Some(message) = next.take() {
        match message {
            Message::Close(reply) => return Some(reply),
            Message::Request(request) => {
                bytes += request.bytes();
                if request.writes() {
                    until.get_or_insert_with(|| Instant::now() + commit_window);
                }
                group.push(request);
            }
        }
        requests_taken += 1;
        if requests_taken >= GROUP_MAX || bytes >= GROUP_BYTES_MAX {
            break;
        }
        next = requests.try_recv().ok();
        if let (None, Some(until), false) = (&next, until, commit_window.is_zero()) {
            // Only what is to be written waits: the drain would get a batch a window.
            work_reads(db, group);
            // Reads that never end must not make the writes wait for ever.
            if Instant::now() >= until {
                break;
            }
            next = receive_until(requests, until);
        }
    }
    None
}

fn receive_until(requests: &Receiver<Message>, until: Instant) -> Option<Message> {
    let message = async { requests.recv().await.ok() };
    let late = async {
        Timer::at(until).await;
        None
    };
    // Not smol's: that one would wait for I/O here, in turns with who does it for the daemon.
    block_on(or(message, late))
}

/// Runs them and answers each; none is left.
pub(super) fn work(db: &mut Db, group: &mut Vec<Box<dyn Request>>) {
    work_reads(db, group);
    answer_all(db, group);
}

/// Those that only read; the others are left.
fn work_reads(db: &mut Db, group: &mut Vec<Box<dyn Request>>) {
    answer_all(db, &mut group.extract_if(.., |request| !request.writes()).collect());
}

fn answer_all(db: &mut Db, group: &mut Vec<Box<dyn Request>>) {
    if !group.is_empty() {
        run_group(db, group);
    }
    group.drain(..).for_each(Request::answer);
}

/// All of them read, or all of them write.
pub(super) fn run_group(db: &mut Db, group: &mut [Box<dyn Request>]) {
    let Err(failed) = try_group(db, group) else { return };
    // There is one ballast, so this ends.
    if std::mem::take(&mut db.made_room) {
        group.iter_mut().for_each(|request| request.again());
        return run_group(db, group);
    }
    if group.len() > 1 && failed.each_alone {
        group.iter_mut().for_each(|request| request.again());
        for request in group {
            run_group(db, std::slice::from_mut(request));
        }
    } else {
        tracing::warn!(error = %failed.error, requests = group.len(), "nothing was committed");
        for request in group {
            request.fail(failed.error.again());
        }
    }
}

struct Failed {
    error: StoreError,
    /// Whether each alone may do better.
    each_alone: bool,
}

/// All requests in one transaction. On an error nothing of it is stored.
fn try_group(db: &mut Db, group: &mut [Box<dyn Request>]) -> Result<(), Failed> {
    let all_fail = |error| Failed { error, each_alone: false };
    if !group.iter().any(|request| request.writes()) {
        db.begin(false).map_err(all_fail)?;
        for request in group {
            request.run(db);
        }
        return db.end_read().map_err(|error| {
            db.rollback();
            all_fail(error)
        });
    }
    db.begin(true).map_err(|error| all_fail(db.classify(error)))?;
    for request in group.iter_mut() {
        let mark = db.savepoint().map_err(|error| undo(db, error))?;
        let done = if request.run(db) { db.release() } else { end_refused(db, mark) };
        done.map_err(|error| undo(db, error))?;
    }
    db.commit().map_err(|error| {
        let each_alone = matches!(error, StoreError::Full | StoreError::DiskFull);
        Failed { error, each_alone }
    })
}

fn end_refused(db: &mut Db, mark: Mark) -> Result<(), StoreError> {
    if db.is_spoilt() {
        return Err(StoreError::out_of_memory("roll a request back")); // each runs again alone
    }
    if db.transaction_is_gone() {
        return Err(StoreError::DiskFull); // the only way there is; each request runs again alone
    }
    db.rollback_to(mark)
}

fn undo(db: &mut Db, error: StoreError) -> Failed {
    let error = db.classify(error);
    db.rollback();
    Failed { error, each_alone: true }
}

/// Sweeps or shrinks a little; whether there is more to do.
fn keep_house(db: &mut Db) -> bool {
    try_keep_house(db).unwrap_or_else(|error| {
        let error = db.classify(error);
        db.rollback();
        // Tried again after the next request.
        tracing::debug!(error = %error, "housekeeping of the database failed");
        false
    })
}

fn try_keep_house(db: &mut Db) -> Result<bool, StoreError> {
    let (sweeps, ages) = (!db.sweep.is_empty(), full::age_is_due(db));
    if !db.unreadable.is_empty() {
        db.begin(true)?;
        outbox::drop_unreadable(db)?;
        db.commit()?;
    }
    if !sweeps && !ages && !db.worth_shrinking()? {
        return Ok(false);
    }
    db.begin(true)?;
    if sweeps {
        inbox::sweep(db, SWEEP_ROWS)?;
    } else if ages {
        full::drop_aged(db, SWEEP_ROWS)?;
    } else {
        db.shrink(SHRINK_PAGES)?;
    }
    db.commit()?;
    Ok(true)
}
