//! An image's root to look into, before anything of it runs: its accounts, its working
//! directory, whether its command can be executed. Everything in it is someone else's: symlinks
//! lead nowhere outside, files are read within bounds, FIFOs don't block.

use super::executor::{DEFAULT_PATH, candidates};
use super::user::User;
use super::wire::Refusal;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// /etc/passwd and /etc/group of an image are read up to here, and refused beyond.
const ACCOUNTS_BYTES_MAX: u64 = 1024 * 1024;

/// The mounted layers of an image.
pub struct ImageRoot {
    root: OwnedFd,
    pub prefix: PathBuf,
    /// What ids of the image are shifted by, seen from the launcher.
    uid_base: u32,
}

impl ImageRoot {
    pub fn open(at: &Path, uid_base: u32) -> io::Result<Self> {
        let root = rustix::fs::open(at, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { root, prefix: at.to_owned(), uid_base })
    }

    fn find(&self, path: &str, flags: OFlags, resolve: ResolveFlags) -> io::Result<OwnedFd> {
        let relative = path.trim_start_matches('/');
        let relative = if relative.is_empty() { "." } else { relative };
        let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(rustix::fs::openat2(&self.root, relative, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    /// A small text file; empty when there is none.
    pub fn read_small(&self, path: &str) -> Result<String, Refusal> {
        // NONBLOCK: an image's FIFO must not stop the launcher.
        let file = match self.find(path, OFlags::RDONLY | OFlags::NONBLOCK, ResolveFlags::empty()) {
            Ok(file) => fs::File::from(file),
            Err(_) => return Ok(String::new()),
        };
        let mut bytes = Vec::new();
        let read = file.take(ACCOUNTS_BYTES_MAX + 1).read_to_end(&mut bytes);
        match read {
            Ok(n) if n as u64 > ACCOUNTS_BYTES_MAX => Err(Refusal::Unusable(format!(
                "the image's {path} is larger than {ACCOUNTS_BYTES_MAX} bytes"
            ))),
            Ok(_) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(_) => Ok(String::new()), // a directory
        }
    }

    /// Where a path really leads, inside the image, and what is there.
    pub fn real(&self, path: &str) -> io::Result<(PathBuf, fs::Metadata)> {
        let found = self.find(path, OFlags::PATH, ResolveFlags::empty())?;
        let real = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
        let inside = real.strip_prefix(&self.prefix).map_err(io::Error::other)?;
        Ok((Path::new("/").join(inside), fs::File::from(found).metadata()?))
    }

    /// Whether a directory has no entries. `real` is where a path really leads.
    pub fn is_empty(&self, real: &Path) -> io::Result<bool> {
        let mut entries = fs::read_dir(self.prefix.join(real.strip_prefix("/").unwrap_or(real)))?;
        Ok(entries.next().is_none())
    }

    /// Refuses a command that execve would refuse, before anything is started for it.
    pub fn check_command(
        &self,
        name: &str,
        env: &[String],
        working_dir: &str,
        user: &User,
    ) -> Result<(), Refusal> {
        let path = env.iter().rev().find_map(|var| var.strip_prefix("PATH="));
        let mut denied = false;
        for candidate in candidates(name, path.unwrap_or(DEFAULT_PATH)) {
            let absolute = Path::new(working_dir).join(&candidate);
            let Ok((_, meta)) = self.real(&absolute.to_string_lossy()) else { continue };
            if !meta.is_file() || !self.may_execute(&meta, user) {
                denied = true;
                continue;
            }
            return self.check_interpreter(name, &absolute.to_string_lossy());
        }
        Err(Refusal::Unusable(if denied {
            format!("command `{name}` may not be executed by user {}", user.uid)
        } else {
            format!("command `{name}` is not in the image")
        }))
    }

    /// Without capabilities even uid 0 needs a bit that is meant for it.
    fn may_execute(&self, meta: &fs::Metadata, user: &User) -> bool {
        let inside = |id: u32| id.checked_sub(self.uid_base);
        let bit = if inside(meta.uid()) == Some(user.uid) {
            0o100
        } else if inside(meta.gid()).is_some_and(|gid| gid == user.gid || user.groups.contains(&gid)) {
            0o010
        } else {
            0o001
        };
        meta.mode() & bit != 0
    }

    fn check_interpreter(&self, name: &str, path: &str) -> Result<(), Refusal> {
        let Ok(file) = self.find(path, OFlags::RDONLY | OFlags::NONBLOCK, ResolveFlags::empty()) else {
            return Ok(()); // not readable, which execve does not need
        };
        let mut head = Vec::new();
        let _ = fs::File::from(file).take(4096).read_to_end(&mut head);
        match interpreter(&head) {
            Some(needed) if self.real(&needed).is_err() => Err(Refusal::Unusable(format!(
                "command `{name}` needs the interpreter `{needed}`, which is not in the image"
            ))),
            _ => Ok(()),
        }
    }
}

/// What the kernel would load to run a program that begins with `head`: the `#!` line's, or an
/// ELF file's PT_INTERP (elf(5)).
fn interpreter(head: &[u8]) -> Option<String> {
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|b| *b == b'\n').next()?;
        let line = String::from_utf8_lossy(line);
        return line.split_whitespace().next().map(str::to_owned);
    }
    let is_elf64_le = head.starts_with(b"\x7fELF\x02\x01");
    if !is_elf64_le {
        return None; // 32-bit and foreign programs: execve will tell
    }
    let number = |at: usize, bytes: usize| -> Option<usize> {
        let field = head.get(at..at.checked_add(bytes)?)?;
        let mut value = [0_u8; 8];
        value[..bytes].copy_from_slice(field);
        usize::try_from(u64::from_le_bytes(value)).ok()
    };
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    (0..count).find_map(|n| {
        let entry = table.checked_add(n.checked_mul(size)?)?;
        const PT_INTERP: usize = 3;
        if number(entry, 4)? != PT_INTERP {
            return None;
        }
        let (offset, length) = (number(entry.checked_add(8)?, 8)?, number(entry.checked_add(32)?, 8)?);
        let text = head.get(offset..offset.checked_add(length)?)?;
        let text = text.split(|b| *b == 0).next()?;
        (!text.is_empty()).then(|| String::from_utf8_lossy(text).into_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpreters_are_found_as_the_kernel_finds_them() {
        assert_eq!(interpreter(b"#!/bin/sh -e\necho").as_deref(), Some("/bin/sh"));
        assert_eq!(interpreter(b"#! /usr/bin/env python3").as_deref(), Some("/usr/bin/env"));
        assert_eq!(interpreter(b"#!\n"), None);
        assert_eq!(interpreter(b"plain text"), None);
        assert_eq!(interpreter(b""), None);
    }

    #[test]
    fn broken_programs_have_no_interpreter_and_do_no_harm() {
        let mut elf = vec![0_u8; 200];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[32..40].copy_from_slice(&64_u64.to_le_bytes());
        elf[54..56].copy_from_slice(&56_u16.to_le_bytes());
        elf[56..58].copy_from_slice(&1_u16.to_le_bytes());
        elf[64..68].copy_from_slice(&3_u32.to_le_bytes());
        elf[72..80].copy_from_slice(&150_u64.to_le_bytes());
        elf[96..104].copy_from_slice(&8_u64.to_le_bytes());
        elf[150..158].copy_from_slice(b"/lib/ld\0");
        assert_eq!(interpreter(&elf).as_deref(), Some("/lib/ld"));

        for at in [32, 72, 96] {
            let mut broken = elf.clone();
            broken[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
            assert_eq!(interpreter(&broken), None);
        }
        for length in 0..elf.len() {
            let _ = interpreter(&elf[..length]);
        }
    }
}
