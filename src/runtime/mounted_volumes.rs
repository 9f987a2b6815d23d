//! Volumes of functions, on the launcher's side: loop device, ext4, id map, one mount for all
//! revisions and instances of the function.
//!
//! ```text
//! data_dir/volumes/FUNCTION/NAME.ext4 ─ loop device ─ ext4 ─ id-mapped mount ─ a clone in each instance
//! ```
//!
//! The file is locked (flock) through the very descriptor that the loop device keeps: whoever
//! else would mount it, another launcher for example while the last one's containers are still
//! dying, waits until the kernel has let go of it. Two mounts of one ext4 would destroy it. The
//! loop device goes by itself with the last mount (LO_FLAGS_AUTOCLEAR), also after SIGKILL.

use super::sys;
use super::wire::VolumeOrder;
use nix::mount::MntFlags;
use rustix::fs::FlockOperation;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

/// A killed container's mounts go a moment after it; the launcher serves nobody meanwhile.
const BUSY_MAX: Duration = Duration::from_secs(2);
const BUSY_PAUSE: Duration = Duration::from_millis(10);

const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;

/// Mounted here; kept by the roots that have it.
pub struct MountedVolume {
    pub dir: PathBuf,
    /// By its name: a descriptor would be inherited by whatever is made meanwhile, and keep the
    /// device for as long as that waits for its event.
    device: PathBuf,
}

impl Drop for MountedVolume {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.dir, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.dir);
    }
}

pub struct Volumes {
    /// Where they are mounted.
    dir: PathBuf,
    mounted: HashMap<PathBuf, Weak<MountedVolume>>,
    made: u64,
}

impl Volumes {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, mounted: HashMap::new(), made: 0 }
    }

    /// `owner`: host ids of the function's user, whose a new volume is.
    pub fn mount(
        &mut self,
        order: &VolumeOrder,
        id_map: Option<BorrowedFd<'_>>,
        owner: (u32, u32),
    ) -> io::Result<Rc<MountedVolume>> {
        self.mounted.retain(|_, volume| volume.strong_count() > 0);
        if let Some(volume) = self.mounted.get(&order.file).and_then(Weak::upgrade) {
            volume.grow(order.bytes)?;
            return Ok(volume);
        }
        // The device goes when nobody has it open: not before it is mounted.
        let (_open, device) = attach(&order.file)?;
        self.made += 1;
        let dir = self.dir.join(self.made.to_string());
        fs::create_dir_all(&dir)?;
        let attributes = sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NODEV;
        let mounted = sys::detached_file_system("ext4", &device, attributes, id_map)
            .and_then(|tree| sys::attach(tree, &dir));
        if let Err(err) = mounted {
            let _ = fs::remove_dir(&dir);
            return Err(err);
        }
        let volume = Rc::new(MountedVolume { dir, device });
        volume.grow(order.bytes)?;
        volume.give_to(owner)?;
        self.mounted.insert(order.file.clone(), Rc::downgrade(&volume));
        Ok(volume)
    }
}

impl MountedVolume {
    /// To all that its file has, when it has less than is wanted.
    fn grow(&self, bytes_wanted: u64) -> io::Result<()> {
        let mut device = File::options().read(true).write(true).open(&self.device)?;
        let mut superblock = [0; SUPERBLOCK_BYTES];
        device.seek(SeekFrom::Start(SUPERBLOCK_AT))?;
        device.read_exact(&mut superblock)?;
        let size = Size::read(&superblock);
        if size.blocks * size.block_bytes >= bytes_wanted / size.block_bytes * size.block_bytes {
            return Ok(());
        }
        sys::refresh_loop(&device)?;
        let blocks = device.seek(SeekFrom::End(0))? / size.block_bytes;
        sys::grow_ext4(File::open(&self.dir)?, blocks).map_err(|err| match err.kind() {
            io::ErrorKind::PermissionDenied => {
                let text = "it can't grow while it is in use: neap has no CAP_SYS_RESOURCE here; leave max as it was";
                io::Error::new(err.kind(), text)
            }
            _ => err,
        })
    }

    /// A new one, which is root's, to the function's user; and without the directory for what a
    /// check finds, because programs ask for an empty one.
    fn give_to(&self, (uid, gid): (u32, u32)) -> io::Result<()> {
        let found = self.dir.join("lost+found");
        if !found.is_dir() {
            return Ok(());
        }
        // In this order: cut off in between, the next mount sees that it is to be done again.
        std::os::unix::fs::chown(&self.dir, Some(uid), Some(gid))?;
        let _ = fs::remove_dir(found); // a function's own of that name may hold something
        Ok(())
    }
}

/// What an ext4 says of itself (Documentation/filesystems/ext4/super.rst).
struct Size {
    blocks: u64,
    block_bytes: u64,
}

impl Size {
    fn read(superblock: &[u8; SUPERBLOCK_BYTES]) -> Self {
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| superblock[at + n]));
        let has_64_bits = number(0x60) & 0x80 != 0;
        let high = if has_64_bits { u64::from(number(0x150)) << 32 } else { 0 };
        // 64 KiB is the largest there is: the kernel has mounted it.
        Self { blocks: u64::from(number(0x4)) | high, block_bytes: 1024 << number(0x18).min(6) }
    }
}

/// A loop device of this file; it is the device's own file that is locked.
fn attach(file: &Path) -> io::Result<(File, PathBuf)> {
    let begun = Instant::now();
    let backing = File::options().read(true).write(true).open(file)?;
    loop {
        match rustix::fs::flock(&backing, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < BUSY_MAX => {
                std::thread::sleep(BUSY_PAUSE);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, "it is still in use"));
            }
            Err(err) => return Err(err.into()),
        }
    }
    loop {
        let number = sys::free_loop()?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = File::options().read(true).write(true).open(&path)?;
        match sys::configure_loop(&device, &backing) {
            Ok(()) => return Ok((device, path)),
            // Somebody else was faster with this one.
            Err(err) if err.raw_os_error() == Some(libc::EBUSY) && begun.elapsed() < BUSY_MAX => {}
            Err(err) => return Err(err),
        }
    }
}
