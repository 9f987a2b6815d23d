//! What a worker gives up before it touches a byte from outside.
//!
//! All of them: every descriptor but the three standard ones, memory beyond 512 MiB, core files,
//! new privileges. They die with the daemon, and before anybody else where memory runs out. Who unpacks sees nothing outside the image
//! directory and keeps the capabilities that unpacking takes. Who fetches needs names and
//! certificates of the system, so it sees that, and keeps no capability at all.

use super::ImageError;
use super::limits::{MIB, io, os};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet as Set, CapabilitySets, set_capabilities, set_no_new_privs};
use std::path::{Path, PathBuf};

/// zstd windows take up to 128 MiB, twice that while the buffer grows; the rest is small.
const ADDRESS_SPACE_BYTES: u64 = 512 * MIB;

pub fn fetcher() -> Result<(), ImageError> {
    common()?;
    keep(Set::empty())
}

/// The image directory, as it is called from now on.
pub fn unpacker(images: &Path) -> Result<PathBuf, ImageError> {
    common()?;
    std::env::set_current_dir(images).map_err(io("enter the image directory"))?;
    let directory = match rustix::process::chroot(".") {
        Ok(()) => PathBuf::from("/"),
        // In a container that may not: the paths are the same ones by another name.
        Err(rustix::io::Errno::PERM) => images.to_owned(),
        Err(errno) => return Err(os("enter the image directory")(errno)),
    };
    // SYS_ADMIN is what trusted.overlay.opaque takes.
    let needed = Set::CHOWN
        | Set::DAC_OVERRIDE
        | Set::FOWNER
        | Set::FSETID
        | Set::MKNOD
        | Set::SETFCAP
        | Set::SYS_ADMIN;
    keep(needed)?;
    Ok(directory)
}

fn common() -> Result<(), ImageError> {
    // When the daemon died before this call, standard input ends early and the import fails.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .map_err(|e| io("bind to the daemon")(e.into()))?;
    close_inherited();
    let limit = Rlimit { current: Some(ADDRESS_SPACE_BYTES), maximum: Some(ADDRESS_SPACE_BYTES) };
    rustix::process::setrlimit(Resource::As, limit).map_err(os("limit the memory"))?;
    // Where that is more than the machine has, this process ends and no other. Not being able to
    // say so is no reason to stop.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let no_core = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, no_core).map_err(os("forbid core files"))?;
    rustix::process::umask(rustix::fs::Mode::empty());
    Ok(())
}

/// Rust opens everything close-on-exec; this is for what the daemon's parent left open.
fn close_inherited() {
    let Ok(listing) = std::fs::read_dir("/proc/self/fd") else { return };
    let open: Vec<i32> = listing.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        let _ = nix::unistd::close(fd); // one of them was the listing's own
    }
}

fn keep(needed: Set) -> Result<(), ImageError> {
    let had = rustix::thread::capabilities(None).map_err(os("read the capabilities"))?;
    let kept = had.permitted & needed;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: Set::empty() };
    set_capabilities(None, sets).map_err(os("drop capabilities"))?;
    set_no_new_privs(true).map_err(os("forbid new privileges"))
}
