//! A function's network: its own loopback, up. libcontainer leaves it down. (A way out, where
//! its manifest has one, is egress/lines.rs.)
//!
//! The maker enters the new namespace for two system calls (0.1 ms) and never comes back: it ends
//! right after.

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Sets `lo` up in the network namespace of a process. The caller stays there.
pub fn bring_loopback_up(pid: i32) -> io::Result<()> {
    let theirs = File::open(format!("/proc/{pid}/ns/net"))?;
    move_into_link_name_space(theirs.as_fd(), Some(LinkNameSpaceType::Network))?;
    set_up(&socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn set_up(socket: &OwnedFd) -> io::Result<()> {
    // SAFETY: all zeroes is a valid ifreq; it is filled in below.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which outlives the call. No crate in use has it.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &request) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
