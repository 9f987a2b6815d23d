//! What a function writes, as lines of its log.

use crate::channels::LogTo;
use futures_lite::future;
use smol::io::{AsyncRead, AsyncReadExt};

/// What a function may write to stderr for one event before the rest is thrown away: its log
/// keeps 1 MiB in all, so more would only push out what others wrote.
pub const STDERR_BYTES_MAX: usize = 256 * 1024;

/// What a line costs besides its text: its time and its event's id.
const LINE_COST_BYTES: usize = 100;

/// A line of the log is cut here: a function that never ends its line must not fill memory.
const LINE_BYTES_MAX: usize = 8 * 1024;

/// Hands complete lines on, a chunk's at once; reads to the end whatever is thrown away, so that
/// the function never blocks on its log.
///
/// `bytes_max`: what is kept of one event; without it, a function that stays up pushes out its
/// own older lines.
pub async fn read_lines(mut from: impl AsyncRead + Unpin, bytes_max: Option<usize>, log: &LogTo<'_>) {
    let mut chunk = vec![0; 4 * 1024];
    let mut begun = Vec::new();
    let mut room = bytes_max.unwrap_or(usize::MAX);
    loop {
        let read = match from.read(&mut chunk).await {
            Ok(0) | Err(_) => break,
            Ok(n) => &chunk[..n],
        };
        if room == 0 {
            continue;
        }
        begun.extend_from_slice(read);
        let complete = match begun.iter().rposition(|byte| *byte == b'\n') {
            Some(at) => at + 1,
            None if begun.len() >= LINE_BYTES_MAX => begun.len(),
            None => 0,
        };
        if complete > 0 {
            let lines = String::from_utf8_lossy(&begun[..complete]);
            log(lines.strip_suffix('\n').unwrap_or(&lines));
            begun.drain(..complete);
        }
        let lines = read.iter().filter(|byte| **byte == b'\n').count();
        if bytes_max.is_some() {
            room = room.saturating_sub(read.len() + lines * LINE_COST_BYTES);
        }
        if room == 0 {
            begun.clear();
            let most = bytes_max.unwrap_or_default();
            log(&format!("neap: more than {most} bytes for one event, the rest is left out"));
        }
        // A function that writes without end must not keep the executor from the brokers.
        future::yield_now().await;
    }
    if !begun.is_empty() {
        log(&String::from_utf8_lossy(&begun));
    }
}
