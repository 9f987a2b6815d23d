//! `neap doctor`: what this machine lacks to keep neap's promises, and what to do about it: the
//! kernel, the disk and how it is mounted, the clock, the database, the files that the
//! configuration names. It changes nothing that lasts and asks nothing of a running daemon; no
//! broker is called, since a link that is down is no illness.
//!
//! Each check is a function from what was found to a `Finding`; `run` finds and prints.

mod mounts;

use super::args::Format;
use super::check::Checked;
use super::output::Output;
use super::text;
use crate::config::{Broker, Config};
use crate::model::api::{Finding, Level};
use crate::model::{Clock, SystemClock, UnixMs};
use mounts::Mount;
use rustix::fs::{Mode, OFlags};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// 2026-01-01: a clock before that has not been set since the machine was switched on.
const CLOCK_MIN: UnixMs = UnixMs(1_767_225_600_000);
/// Below this the database can't even take back what was delivered (SQLite needs room to delete).
const FREE_BYTES_MIN: u64 = 32 << 20;
/// An unpacked image is hundreds to thousands of files.
const FREE_INODES_MIN: u64 = 10_000;
/// Beyond this one commit at a time is slow, and `[buffer] commit_window` helps.
const SYNC_SLOW: Duration = Duration::from_millis(100);
/// SQLite's file format §1.3
const DATABASE_HEADER: &[u8; 16] = b"SQLite format 3\0";

/// 0 when nothing fails, else 1; warnings are no failure.
pub fn run(config: Option<&Path>, json: bool) -> ExitCode {
    let findings = examine(config);
    let out = Output::new(if json { Format::Json } else { Format::Text });
    let printed = if json {
        let answer = serde_json::to_vec_pretty(&findings).expect("findings are plain strings");
        out.answer(&answer)
    } else {
        out.text(&render(&findings))
    };
    let failing = findings.iter().any(|finding| finding.level == Level::Failing);
    // Nobody reading further (`| head`) changes nothing about the machine's health.
    let _ = printed;
    if failing { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn examine(named: Option<&Path>) -> Vec<Finding> {
    let mut checked = Checked::configuration(named);
    let mistakes = checked.mistakes.len();
    let mut findings = vec![configuration(&checked.good, &checked.mistakes)];
    checked.functions_dir();
    findings.push(functions(&checked.config.node.functions_dir, &checked.mistakes[mistakes..]));

    let config = &checked.config;
    let data_dir = &config.node.data_dir;
    if rustix::process::geteuid().is_root() {
        // A data_dir that is still to be made will be on the file system of what is there.
        findings.extend(crate::runtime::probe::probe(
            &existing(data_dir),
            config.node.limits,
            config.node.user_namespaces,
            config.node.egress_range,
        ));
    } else {
        let advice = "the kernel was not asked; run `sudo neap doctor`";
        findings.push(finding("user", Level::Warning, "not root", advice));
    }
    findings.push(data_dir_finding(data_dir));
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    findings.push(file_system(Mount::of(&existing(data_dir), &mountinfo)));
    findings.push(disk(data_dir, config.buffer.bytes_max));
    findings.push(run_dir(Mount::of(&existing(&config.node.run_dir), &mountinfo)));
    findings.push(clock(SystemClock::new().wall()));
    findings.push(database(&data_dir.join("neap.db")));
    findings.extend(named_files(config).into_iter().map(|(key, path, file)| named_file(&key, &path, file)));
    findings
}

fn finding(name: &str, level: Level, found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { name: name.to_owned(), level, found: found.into(), advice: advice.into() }
}

fn render(findings: &[Finding]) -> String {
    let mut out = String::new();
    let width = findings.iter().map(|finding| finding.name.chars().count()).max().unwrap_or(0);
    for Finding { name, level, found, advice } in findings {
        let level = word(*level);
        out += &format!("{level:<7}  {:<width$}  {}\n", text::escape(name), text::escape(found));
        if !advice.is_empty() {
            out += &format!("{:<7}  {:<width$}  → {}\n", "", "", text::escape(advice));
        }
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (ok, warning, failing) = (count(Level::Ok), count(Level::Warning), count(Level::Failing));
    out + &format!("{ok} ok, {warning} warning, {failing} failing\n")
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Ok => "ok",
        Level::Warning => "warning",
        Level::Failing => "failing",
    }
}

/// The path itself, or what there is of it, symlinks resolved.
fn existing(path: &Path) -> PathBuf {
    let found = path.ancestors().find_map(|ancestor| ancestor.canonicalize().ok());
    found.unwrap_or_else(|| PathBuf::from("/"))
}

fn configuration(good: &[String], mistakes: &[String]) -> Finding {
    let name = "configuration";
    match (mistakes, good) {
        ([], [good, ..]) => finding(name, Level::Ok, good, ""),
        ([], []) => finding(name, Level::Ok, "", ""),
        ([first, ..], _) => {
            finding(name, Level::Failing, counted(first, mistakes.len()), "`neap check` lists every mistake")
        }
    }
}

fn functions(dir: &Path, mistakes: &[String]) -> Finding {
    match mistakes {
        [] => finding("functions_dir", Level::Ok, dir.display().to_string(), ""),
        [first, ..] => {
            let advice = "functions with mistakes stay as they were; `neap check` lists every mistake";
            finding("functions_dir", Level::Failing, counted(first, mistakes.len()), advice)
        }
    }
}

fn counted(first: &str, all: usize) -> String {
    if all == 1 { first.to_owned() } else { format!("{first} (and {} more)", all - 1) }
}

fn data_dir_finding(dir: &Path) -> Finding {
    let (name, shown) = ("data_dir", dir.display());
    match fs::metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            finding(name, Level::Ok, format!("{shown} is not there yet; the daemon makes it"), "")
        }
        Err(error) => finding(name, Level::Failing, format!("{shown}: {error}"), "make it readable for root"),
        Ok(meta) if !meta.is_dir() => {
            finding(name, Level::Failing, format!("{shown} is no directory"), "move what is there away")
        }
        Ok(meta) if meta.mode() & 0o002 != 0 => {
            let advice = format!("everybody may write there; chmod 0700 {shown}");
            finding(name, Level::Failing, format!("{shown} has mode {:04o}", meta.mode() & 0o7777), advice)
        }
        Ok(_) => match synced_write(dir) {
            Err(error) => {
                let advice = "neap needs to write there; see who owns it and how it is mounted";
                finding(name, Level::Failing, format!("write to {shown}: {error}"), advice)
            }
            Ok(took) if took > SYNC_SLOW => {
                let advice = "a slow disk; [buffer] commit_window lets events share a commit";
                finding(
                    name,
                    Level::Warning,
                    format!("{shown}: a commit takes {} ms", took.as_millis()),
                    advice,
                )
            }
            Ok(took) => {
                let took = took.as_secs_f64() * 1000.0;
                finding(name, Level::Ok, format!("{shown}: a commit takes {took:.1} ms"), "")
            }
        },
    }
}

/// A page written and synced, in a file without a name: it is gone whatever happens.
fn synced_write(dir: &Path) -> io::Result<Duration> {
    let file = rustix::fs::open(dir, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR);
    let mut file = match file {
        Ok(file) => File::from(file),
        // Not every file system has nameless files: then being allowed to write is all we learn.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            rustix::fs::access(dir, rustix::fs::Access::WRITE_OK)?;
            return Ok(Duration::ZERO);
        }
        Err(error) => return Err(error.into()),
    };
    let start = Instant::now();
    file.write_all(&[0; 4096])?;
    file.sync_data()?;
    Ok(start.elapsed())
}

fn file_system(mount: Option<Mount>) -> Finding {
    let name = "file system";
    match mount {
        Some(mount) => {
            let (level, advice) = mount.durable();
            finding(name, level, mount.shown(), advice)
        }
        None => finding(name, Level::Warning, "unknown: /proc/self/mountinfo doesn't say", "mount /proc"),
    }
}

fn disk(data_dir: &Path, buffer_bytes: u64) -> Finding {
    match rustix::fs::statvfs(existing(data_dir)) {
        Ok(stat) => {
            let database = fs::metadata(data_dir.join("neap.db")).map_or(0, |meta| meta.len());
            // btrfs and others count no inodes: 0 of 0.
            let inodes = if stat.f_files == 0 { u64::MAX } else { stat.f_favail };
            room(stat.f_bavail.saturating_mul(stat.f_frsize), inodes, buffer_bytes.saturating_sub(database))
        }
        Err(error) => {
            finding("disk", Level::Failing, format!("free space is unknown: {error}"), "check data_dir")
        }
    }
}

/// `buffer_left`: what the database may still grow.
fn room(free: u64, inodes: u64, buffer_left: u64) -> Finding {
    let found = format!("{} free", text::size(free));
    if free < FREE_BYTES_MIN {
        let advice = "make room now: without it not even delivered events can be removed";
        finding("disk", Level::Failing, found, advice)
    } else if free < buffer_left {
        let advice = format!(
            "less than [buffer] max_bytes may still take ({}); make room, or lower it",
            text::size(buffer_left)
        );
        finding("disk", Level::Warning, found, advice)
    } else if inodes < FREE_INODES_MIN {
        let advice = "few inodes are left, and each file of an image takes one";
        finding("disk", Level::Warning, format!("{found}, {inodes} inodes"), advice)
    } else {
        finding("disk", Level::Ok, found, "")
    }
}

fn run_dir(mount: Option<Mount>) -> Finding {
    match mount {
        Some(mount) if mount.in_memory() => finding("run_dir", Level::Ok, mount.shown(), ""),
        Some(mount) => {
            let advice = "function logs are written there; a tmpfs spares the flash";
            finding("run_dir", Level::Warning, mount.shown(), advice)
        }
        None => {
            finding("run_dir", Level::Warning, "unknown: /proc/self/mountinfo doesn't say", "mount /proc")
        }
    }
}

fn clock(now: UnixMs) -> Finding {
    if now >= CLOCK_MIN {
        return finding("clock", Level::Ok, now.rfc3339(), "");
    }
    let advice = "the clock was never set: events carry wrong times and TLS certificates seem not yet \
                  valid; start NTP or set it";
    finding("clock", Level::Warning, now.rfc3339(), advice)
}

fn database(path: &Path) -> Finding {
    let (name, shown) = ("database", path.display());
    let mut header = Vec::new();
    let read = File::open(path).and_then(|file| file.take(16).read_to_end(&mut header));
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            finding(name, Level::Ok, format!("{shown} is not there yet; the daemon makes it"), "")
        }
        Err(error) => finding(name, Level::Failing, format!("{shown}: {error}"), "make it readable for root"),
        // SQLite makes an empty file into a database.
        Ok(0) => finding(name, Level::Ok, format!("{shown} is empty"), ""),
        Ok(_) if header == DATABASE_HEADER => finding(name, Level::Ok, shown.to_string(), ""),
        Ok(_) => {
            let advice = "stop neap, keep the file aside with its -wal and -shm for repair, and start anew";
            finding(name, Level::Failing, format!("{shown} is no SQLite database"), advice)
        }
    }
}

/// What a file that the configuration names is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Named {
    /// Nobody else may read it.
    Secret,
    Certificate,
}

/// Files that the configuration names and that are not there, one line for each; for `check`,
/// which may be run on another machine and warns of them alone.
pub(super) fn missing_files(config: &Config) -> Vec<String> {
    let missing = named_files(config).into_iter().filter(|(_, path, _)| !path.is_file());
    missing.map(|(key, path, _)| format!("{key}: {} is not there on this machine", path.display())).collect()
}

fn named_files(config: &Config) -> Vec<(String, PathBuf, Named)> {
    let mut files = Vec::new();
    let mut add = |key: &str, path: &Option<PathBuf>, named| {
        files.extend(path.iter().map(|path| (key.to_owned(), path.clone(), named)));
    };
    add("http.token_file", &config.http.token_file, Named::Secret);
    if let Some(tls) = &config.http.tls {
        add("http.tls.cert", &Some(tls.cert.clone()), Named::Certificate);
        add("http.tls.key", &Some(tls.key.clone()), Named::Secret);
        add("http.tls.client_ca", &tls.client_ca, Named::Certificate);
    }
    let uplink = config.broker(crate::model::Target::Uplink);
    let brokers: [(&str, Option<&Broker>); 2] = [("mqtt", config.mqtt.as_ref()), ("uplink", uplink)];
    for (section, broker) in brokers {
        let Some(broker) = broker else { continue };
        add(&format!("{section}.password_file"), &broker.password_file, Named::Secret);
        let Some(tls) = &broker.tls else { continue };
        add(&format!("{section}.tls.ca"), &tls.ca, Named::Certificate);
        add(&format!("{section}.tls.cert"), &tls.cert, Named::Certificate);
        add(&format!("{section}.tls.key"), &tls.key, Named::Secret);
    }
    if let Some(crate::config::Remote::Https(receiver)) = config.uplink.as_ref().map(|uplink| &uplink.remote)
    {
        add("uplink.password_file", &receiver.password_file, Named::Secret);
        add("uplink.token_file", &receiver.token_file, Named::Secret);
        add("uplink.tls.ca", &receiver.tls.ca, Named::Certificate);
        add("uplink.tls.cert", &receiver.tls.cert, Named::Certificate);
        add("uplink.tls.key", &receiver.tls.key, Named::Secret);
    }
    files
}

fn named_file(key: &str, path: &Path, named: Named) -> Finding {
    let shown = path.display();
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) => {
            return finding(
                key,
                Level::Failing,
                format!("{shown}: {error}"),
                "put it there, or drop the key",
            );
        }
    };
    let mode = meta.mode() & 0o7777;
    let found = format!("{shown}, mode {mode:04o}");
    if !meta.is_file() {
        finding(key, Level::Failing, format!("{shown} is no file"), "name a file")
    } else if meta.len() == 0 {
        finding(key, Level::Failing, format!("{shown} is empty"), "put its content there, or drop the key")
    } else if mode & 0o002 != 0 {
        finding(key, Level::Failing, found, format!("everybody may change it; chmod 0640 {shown}"))
    } else if named == Named::Secret && mode & 0o004 != 0 {
        finding(key, Level::Warning, found, format!("everybody may read it; chmod 0640 {shown}"))
    } else {
        finding(key, Level::Ok, found, "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn file_with(dir: &tempfile::TempDir, mode: u32, content: &[u8]) -> PathBuf {
        let path = dir.path().join(format!("{mode:o}-{}", content.len()));
        fs::write(&path, content).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a mode");
        path
    }

    #[test]
    fn secrets_are_for_their_owner() {
        let dir = tempfile::tempdir().expect("a directory");
        let level = |mode, named| named_file("k", &file_with(&dir, mode, b"x"), named).level;

        assert_eq!(level(0o600, Named::Secret), Level::Ok);
        assert_eq!(level(0o640, Named::Secret), Level::Ok);
        assert_eq!(level(0o644, Named::Secret), Level::Warning);
        assert_eq!(level(0o644, Named::Certificate), Level::Ok);
        assert_eq!(level(0o666, Named::Certificate), Level::Failing);
        assert_eq!(named_file("k", &file_with(&dir, 0o600, b""), Named::Secret).level, Level::Failing);
        assert_eq!(named_file("k", dir.path(), Named::Secret).level, Level::Failing);
        assert_eq!(named_file("k", &dir.path().join("none"), Named::Secret).level, Level::Failing);
    }

    #[test]
    fn a_database_is_known_by_its_header() {
        let dir = tempfile::tempdir().expect("a directory");
        let level = |content: &[u8]| database(&file_with(&dir, 0o600, content)).level;

        assert_eq!(database(&dir.path().join("none")).level, Level::Ok);
        assert_eq!(level(b""), Level::Ok);
        assert_eq!(level(b"SQLite format 3\0 and more"), Level::Ok);
        assert_eq!(level(b"SQLite format"), Level::Failing);
        assert_eq!(level(b"{}                            "), Level::Failing);
    }

    #[test]
    fn a_disk_needs_room_for_the_whole_buffer() {
        assert_eq!(room(10 << 30, 1 << 20, 256 << 20).level, Level::Ok);
        assert_eq!(room(100 << 20, 1 << 20, 256 << 20).level, Level::Warning);
        assert_eq!(room(1 << 20, 1 << 20, 0).level, Level::Failing);
        assert_eq!(room(10 << 30, 5, 0).level, Level::Warning);
    }

    #[test]
    fn a_clock_before_this_year_was_never_set() {
        assert_eq!(clock(UnixMs(0)).level, Level::Warning);
        assert_eq!(clock(CLOCK_MIN).found, "2026-01-01T00:00:00.000Z");
        assert_eq!(clock(CLOCK_MIN).level, Level::Ok);
    }

    #[test]
    fn a_data_dir_is_written_to_and_nothing_stays() {
        let dir = tempfile::tempdir().expect("a directory");

        assert_ne!(data_dir_finding(dir.path()).level, Level::Failing);
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 0);

        let inside = dir.path().join("data");
        assert_eq!(data_dir_finding(&inside).level, Level::Ok);
        assert_eq!(existing(&inside), dir.path().canonicalize().expect("it is there"));
        fs::write(&inside, "").expect("a file");
        assert_eq!(data_dir_finding(&inside).level, Level::Failing);
    }

    #[test]
    fn findings_are_printed_with_what_to_do() {
        let findings = [
            finding("clock", Level::Ok, "2026", ""),
            finding("disk", Level::Failing, "1 MiB free", "make room"),
        ];

        let expected = "ok       clock  2026\nfailing  disk   1 MiB free\n                → make room\n1 ok, 0 warning, 1 failing\n";
        assert_eq!(render(&findings), expected);
    }
}
