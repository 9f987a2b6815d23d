//! Volumes of functions, on the daemon's side: files in `data_dir/volumes/FUNCTION`, each an ext4
//! file system of the size that its manifest allows, so that the kernel keeps the limit whatever
//! the function does. The launcher mounts them (mounted_volumes.rs).
//!
//! All of a volume's room is taken when it is made: a disk that fills up later is not the
//! function's trouble, and a volume that has no room is refused at deploy. A volume only grows: a
//! revision that asks for less, as after a rollback, has what is there. `mkfs.ext4` makes them; a
//! file that was not made to the end has another name and is no volume.

use super::wire::VolumeOrder;
use rustix::fs::FallocateFlags;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// In the order in which they are tried: Debian's, and where other systems keep it.
const MKFS: [&str; 4] = ["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4", "/usr/bin/mkfs.ext4", "/bin/mkfs.ext4"];

/// What a volume leaves of the disk: the database must go on, whatever functions ask for.
const LEFT_BYTES_MIN: u64 = 16 << 20;

pub fn mkfs() -> Option<&'static str> {
    MKFS.into_iter().find(|path| Path::new(path).exists())
}

/// Makes those that are not there and lets those grow that are too small; the files that were made.
/// On an error none that was made is left. Blocks.
pub fn provide(volumes: &[VolumeOrder]) -> Result<Vec<PathBuf>, String> {
    let mut made = Vec::new();
    let done = volumes.iter().try_for_each(|volume| {
        let told = |why: String| format!("volume `{}`: {why}", volume.name);
        match fs::metadata(&volume.file) {
            Ok(meta) if meta.len() >= volume.bytes => Ok(()),
            Ok(_) => grow(volume).map_err(|err| told(format!("grow it: {err}"))),
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                make(volume).map_err(told)?;
                made.push(volume.file.clone());
                Ok(())
            }
            Err(err) => Err(told(err.to_string())),
        }
    });
    if done.is_err() {
        remove(&made);
    }
    done.map(|()| made)
}

/// Of files in which nothing is yet: half made, or for a revision that was refused then.
pub fn remove(files: &[PathBuf]) {
    for file in files {
        let _ = fs::remove_file(file);
        if let Some(dir) = file.parent() {
            let _ = fs::remove_dir(dir); // empty: the function has no other
        }
    }
}

fn grow(volume: &VolumeOrder) -> io::Result<()> {
    let file = File::options().write(true).open(&volume.file)?;
    allocate(&file, volume.bytes)?;
    file.sync_all()
}

fn make(volume: &VolumeOrder) -> Result<(), String> {
    let Some(mkfs) = mkfs() else {
        return Err("mkfs.ext4 makes it, and is not on this node; install e2fsprogs".to_owned());
    };
    let dir = volume.file.parent().unwrap_or(Path::new("/"));
    let new = volume.file.with_extension("new");
    let made = || -> Result<(), String> {
        let step = |doing: &'static str| move |err: io::Error| format!("{doing}: {err}");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(step("make its directory"))?;
        let _ = fs::remove_file(&new);
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .map_err(step("make its file"))?;
        allocate(&file, volume.bytes).map_err(step("take its room on the disk"))?;
        // No reserve for a root that isn't there, ids as the function sees them, and no holes.
        let output = Command::new(mkfs)
            .args(["-q", "-F", "-m", "0", "-E", "root_owner=0:0,nodiscard,lazy_itable_init=0"])
            .arg(&new)
            .stdin(Stdio::null())
            .env_clear()
            .output()
            .map_err(step("run mkfs.ext4"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("mkfs.ext4: {}", said.lines().last().unwrap_or("failed").trim()));
        }
        // mkfs.ext4 zeroes by making holes, where it can.
        allocate(&file, volume.bytes).map_err(step("take its room on the disk"))?;
        file.sync_all()
            .and_then(|()| fs::rename(&new, &volume.file))
            .and_then(|()| File::open(dir)?.sync_all())
            .map_err(step("write it"))
    };
    let done = made();
    if done.is_err() {
        remove(std::slice::from_ref(&new));
    }
    done
}

/// All of the room, now. Some file systems (NFS, ZFS) can't promise: there it is taken as it is used.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    let before = file.metadata()?.len();
    let disk = rustix::fs::fstatvfs(file)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if bytes > before && free < (bytes - before).saturating_add(LEFT_BYTES_MIN) {
        let text = format!("{free} bytes are free, {LEFT_BYTES_MIN} must stay so for the database");
        return Err(io::Error::new(io::ErrorKind::StorageFull, text));
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes),
        Err(err) => {
            // What it got before the disk was full: ext4 has made the file that much longer.
            let _ = file.set_len(before);
            Err(err.into())
        }
        Ok(()) => Ok(()),
    }
}
