//! What runs inside a container just before its command: a working directory below /tmp and the
//! seccomp filter while it is being created, the event's environment and execve when it is
//! started.
//!
//! A parked container needs no knowledge of its event: the environment comes with the start,
//! through a socket that the first process inherited. The same socket says how execve went: it
//! closes by itself when it succeeded, and carries a sentence when it failed. Before that a Lambda
//! function's extensions are started, when the daemon says so (extensions.rs).

use super::seccomp::Filter;
use super::{extensions, sys};
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::errno::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;
use std::rc::Rc;

/// The late environment, encoded. More than attributes and headers of an event ever need; the
/// daemon refuses what is larger, and the kernel limits command and environment to far more.
pub const LATE_ENV_BYTES_MAX: usize = 64 * 1024;

/// A sentence about a failed execve: a path of 4096 bytes and some words.
pub const COMPLAINT_BYTES_MAX: usize = 8 * 1024;

/// What the shell says for "not found": seen only if nobody reads the sentence.
const EXEC_FAILED: i32 = 127;

pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is started first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    Command,
    Extensions,
}

impl First {
    /// The start of a packet: an empty one would be the end of the socket.
    const fn letter(self) -> u8 {
        match self {
            Self::Command => b'=',
            Self::Extensions => b'+',
        }
    }
}

#[derive(Clone)]
pub struct Command {
    pub filter: Rc<Filter>,
    /// A working directory that only this instance has.
    pub make_and_enter: Option<PathBuf>,
    /// Why it couldn't be: told when the command is to be executed, because it is the function's
    /// own doing (below a volume), and no failure of the create.
    pub not_entered: RefCell<Option<String>>,
    /// The late environment's socket, open in the process that will run the command.
    pub late: RawFd,
}

impl Executor for Command {
    /// After mounts, ids and no_new_privs; all that is still to come is allowed by the filter.
    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        if let Some(dir) = &self.make_and_enter {
            // As the function's user: the directory is for it to write to.
            let entered = std::fs::create_dir_all(dir).and_then(|()| std::env::set_current_dir(dir));
            let refused = |err| format!("make the working directory {}: {err}", dir.display());
            *self.not_entered.borrow_mut() = entered.map_err(refused).err();
        }
        // What is ignored outlives execve: 64 calls that no event need wait for.
        sys::default_signals();
        let refused = |err| ExecutorSetEnvsError::Other(format!("load the seccomp filter: {err}"));
        self.filter.load().map_err(refused)
    }

    /// The command was looked up when its root was prepared, and execve has the last word.
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let daemon = sys::borrowed(self.late);
        let why = match (self.late_environment(), self.not_entered.take()) {
            (Ok(_), Some(why)) => why,
            (Ok((first, late)), None) => execute(spec, late, first, daemon),
            (Err(err), _) => format!("read the event's environment: {err}"),
        };
        let _ = rustix::net::send(daemon, why.as_bytes(), SendFlags::NOSIGNAL);
        std::process::exit(EXEC_FAILED)
    }
}

impl Command {
    fn late_environment(&self) -> Result<(First, Vec<CString>), Errno> {
        let socket = sys::borrowed(self.late);
        let wrong = |err: rustix::io::Errno| Errno::from_raw(err.raw_os_error());
        // This is where a parked instance waits: without the buffer, which would be its own memory,
        // and whose full size would be fetched from the kernel while the event waits.
        let look = RecvFlags::PEEK | RecvFlags::TRUNC;
        let (_, length) = rustix::net::recv(socket, &mut [0_u8; 1][..], look).map_err(wrong)?;
        let mut buffer = vec![0; length.min(LATE_ENV_BYTES_MAX)];
        let (got, _) = rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty()).map_err(wrong)?;
        decode_late(&buffer[..got]).ok_or(Errno::ECONNRESET)
    }
}

/// Only returns when the command can't be executed: why.
fn execute(spec: &Spec, late: Vec<CString>, first: First, daemon: BorrowedFd<'_>) -> String {
    let process = spec.process().as_ref();
    let args: Vec<CString> =
        process.and_then(|p| p.args().as_ref()).map_or_else(Vec::new, |args| cstrings(args));
    let base: Vec<CString> =
        process.and_then(|p| p.env().as_ref()).map_or_else(Vec::new, |env| cstrings(env));
    let Some(name) = args.first().and_then(|arg| arg.to_str().ok()) else {
        return "the command is empty".to_owned();
    };
    let env = merged(base, late);
    let path = env.iter().find_map(|var| var.to_str().ok()?.strip_prefix("PATH=").map(str::to_owned));

    // What is blocked outlives execve, and the launcher blocks SIGCHLD.
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();

    if first == First::Extensions
        && let Err(why) = extensions::start_all(&env, daemon)
    {
        return why;
    }

    let mut why = Errno::ENOENT;
    for candidate in candidates(name, path.as_deref().unwrap_or(DEFAULT_PATH)) {
        let Ok(file) = CString::new(candidate) else { continue };
        let Err(errno) = nix::unistd::execve(&file, &args, &env);
        match errno {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => why = errno, // another directory of the PATH may still have it
            _ => {
                why = errno;
                break;
            }
        }
    }
    match why {
        Errno::ENOENT => format!("command `{name}` is not in the image, or its interpreter is not"),
        Errno::EACCES => format!("command `{name}` may not be executed by its user"),
        Errno::ENOEXEC => format!("command `{name}` is not a program for this machine"),
        Errno::E2BIG => format!("command `{name}`: its arguments and environment are too large"),
        other => format!("execute command `{name}`: {}", other.desc()),
    }
}

/// Where `name` may be, as execvp(3) looks.
pub fn candidates<'a>(name: &'a str, path: &'a str) -> Vec<String> {
    if name.contains('/') {
        return vec![name.to_owned()];
    }
    path.split(':').map(|dir| format!("{}/{name}", if dir.is_empty() { "." } else { dir })).collect()
}

/// `base` with `late` added; the later of two with the same name stays.
fn merged(base: Vec<CString>, late: Vec<CString>) -> Vec<CString> {
    fn name(var: &CString) -> &[u8] {
        let bytes = var.as_bytes();
        &bytes[..bytes.iter().position(|b| *b == b'=').unwrap_or(bytes.len())]
    }
    let mut env: Vec<CString> =
        base.into_iter().filter(|var| late.iter().all(|l| name(l) != name(var))).collect();
    env.extend(late);
    env
}

fn cstrings(texts: &[String]) -> Vec<CString> {
    // Texts with NUL were refused when the root was prepared.
    texts.iter().filter_map(|text| CString::new(text.as_str()).ok()).collect()
}

/// One packet: what comes first, then `K=V` and NUL for each variable. An error when a name or value
/// can't be in an environment, with its name.
pub fn encode_late(first: First, env: &[(String, String)]) -> Result<Vec<u8>, String> {
    let mut packet = vec![first.letter()];
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(format!("variable {name:?} can't be in an environment"));
        }
        packet.extend_from_slice(name.as_bytes());
        packet.push(b'=');
        packet.extend_from_slice(value.as_bytes());
        packet.push(0);
    }
    if packet.len() > LATE_ENV_BYTES_MAX {
        let total = packet.len();
        return Err(format!("the event's environment has {total} bytes, {LATE_ENV_BYTES_MAX} at most"));
    }
    Ok(packet)
}

fn decode_late(packet: &[u8]) -> Option<(First, Vec<CString>)> {
    let (letter, variables) = packet.split_first()?;
    let first = [First::Command, First::Extensions].into_iter().find(|first| first.letter() == *letter)?;
    let each = variables.split(|byte| *byte == 0).filter(|var| !var.is_empty());
    Some((first, each.filter_map(|var| CString::new(var).ok()).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn late_environment_survives_the_packet() {
        let variables = pairs(&[("CE_ID", "1"), ("EMPTY", ""), ("EQ", "a=b")]);
        let packet = encode_late(First::Command, &variables).expect("fits");
        let decoded = decode_late(&packet).expect("well formed");
        assert_eq!(decoded, (First::Command, [c"CE_ID=1", c"EMPTY=", c"EQ=a=b"].map(CString::from).into()));
        let empty = encode_late(First::Extensions, &[]).expect("fits");
        assert_eq!(decode_late(&empty), Some((First::Extensions, vec![])));
        assert_eq!((decode_late(b""), decode_late(b"x")), (None, None));
    }

    #[test]
    fn late_environment_is_bounded_and_says_so() {
        let long = "x".repeat(LATE_ENV_BYTES_MAX);
        let err = encode_late(First::Command, &pairs(&[("A", &long)])).expect_err("too large");
        assert!(err.contains("65536 at most"), "{err}");
        for (name, value) in [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "\0")] {
            assert!(encode_late(First::Command, &pairs(&[(name, value)])).is_err());
        }
    }

    #[test]
    fn late_variables_replace_those_of_the_image() {
        let env = merged(cstrings(&["A=1".into(), "B=2".into()]), cstrings(&["B=3".into()]));
        assert_eq!(env, [c"A=1", c"B=3"].map(CString::from));
    }

    #[test]
    fn commands_with_a_slash_are_not_looked_up() {
        assert_eq!(candidates("./run", "/bin"), ["./run"]);
        assert_eq!(candidates("run", "/bin::/usr/bin"), ["/bin/run", "./run", "/usr/bin/run"]);
    }
}
