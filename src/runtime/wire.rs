//! What daemon and launcher say to each other: JSON messages with descriptors beside them, over
//! a pair of sequenced-packet sockets, one message a packet.
//!
//! Both ends are the same binary (the daemon starts the launcher from the file it was started
//! from itself), so the shapes carry no version.

use crate::config::UserNamespaces;
use crate::model::Permissions;
use crate::model::permissions::{VOLUMES_DIR, VOLUMES_MAX, Volume};
use crate::model::reach::Net;
use crate::runtime::egress::Found;
use crate::runtime::extensions::EXTENSIONS_MAX;
use crate::runtime::{Exit, Root};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A packet must fit the socket's buffer, 208 KiB where nobody changed it. Commands and
/// environments of real images take a few KiB. Larger: refused before it is sent.
pub const MESSAGE_BYTES_MAX: usize = 128 * 1024;

/// Descriptors in one message: three pipes, the late environment's socket and a mount of each of the
/// node's directories, or a pidfd of each extension.
pub const DESCRIPTORS_MAX: usize = 4 + VOLUMES_MAX;
const _: () = assert!(EXTENSIONS_MAX <= DESCRIPTORS_MAX);

/// The argument of `neap launcher`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Orders {
    /// An empty directory that the launcher mounts its private tmpfs on.
    pub state_dir: PathBuf,
    /// Where layers are; user namespaces are tried there.
    pub data_dir: PathBuf,
    /// The parent of all instances, from the cgroup root, made by the daemon.
    pub cgroup: String,
    pub user_namespaces: Wanted,
    /// Where instances with a way out get their addresses from.
    pub egress_range: Net,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wanted {
    Require,
    Prefer,
}

impl From<UserNamespaces> for Wanted {
    fn from(setting: UserNamespaces) -> Self {
        match setting {
            UserNamespaces::Require => Self::Require,
            UserNamespaces::Prefer => Self::Prefer,
        }
    }
}

/// From the daemon. `request` comes back in the answer.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    Prepare {
        request: u64,
        root: Box<RootOrder>,
    },
    Release {
        key: String,
    },
    /// Secrets changed.
    RefreshSecrets,
    /// Names of a revision's `allow.to` lead there.
    Admit {
        request: u64,
        key: String,
        found: Vec<Found>,
    },
    /// With four descriptors: stdin, stdout, stderr, late environment. And a detached mount of each
    /// directory of the node.
    Create {
        request: u64,
        key: String,
        id: String,
    },
}

/// From the launcher.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// First, once.
    Ready {
        warnings: Vec<String>,
    },
    /// Instead of `Ready`: it can't work here, and ends.
    Unable {
        why: String,
    },
    Done {
        request: u64,
    },
    /// With one descriptor: the instance's pidfd.
    Created {
        request: u64,
    },
    Refused {
        request: u64,
        refusal: Refusal,
    },
    /// With one descriptor, which the rules of ways out belong to. A killed launcher's own is closed
    /// before its instances end; whoever holds this keeps them their rules until they have.
    Ruled,
    Exited {
        id: String,
        exit: ExitReport,
    },
}

/// From a maker to its launcher.
#[derive(Debug, Serialize, Deserialize)]
pub enum Made {
    /// The container's first process, as the launcher's PID namespace counts.
    Built {
        id: String,
        pid: i32,
    },
    Failed {
        id: String,
        why: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The image or manifest's fault.
    Unusable(String),
    /// The machine's, as it is now: a deploy is told, an event tries again.
    NoWayOut(String),
    /// The launcher's or the machine's.
    Failed(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReport {
    Code(i32),
    Signal(i32),
    OutOfMemory,
}

impl From<ExitReport> for Exit {
    fn from(report: ExitReport) -> Self {
        match report {
            ExitReport::Code(code) => Self::Code(code),
            ExitReport::Signal(signal) => Self::Signal(signal),
            ExitReport::OutOfMemory => Self::OutOfMemory,
        }
    }
}

/// `Root`, as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootOrder {
    pub key: String,
    pub layers: Vec<PathBuf>,
    pub uid_base: u32,
    pub command: Vec<String>,
    pub env: Vec<String>,
    pub user: String,
    pub working_dir: String,
    pub limits: LimitsOrder,
    pub permissions: Permissions,
    pub secret_dirs: Vec<String>,
    pub volumes: Vec<VolumeOrder>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeOrder {
    pub name: String,
    /// The file that it is in.
    pub file: PathBuf,
    /// Where the function has it.
    pub path: String,
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitsOrder {
    pub memory_bytes: u64,
    pub cpu_millis: u32,
    pub pids: u32,
    pub disk_bytes: u64,
}

impl RootOrder {
    pub fn new(root: &Root, data_dir: &Path) -> Self {
        // The key is the function's name, a dot, and the revision's number.
        let function = root.key.rsplit_once('.').map_or(root.key.as_str(), |(name, _)| name);
        let dir = data_dir.join(VOLUMES_DIR).join(function);
        let volume = |volume: &Volume| VolumeOrder {
            name: volume.name.clone(),
            file: dir.join(format!("{}.ext4", volume.name)),
            path: volume.path.clone(),
            bytes: volume.max_bytes,
        };
        Self {
            key: root.key.clone(),
            layers: root.layers.clone(),
            uid_base: root.uid_base,
            command: root.command.clone(),
            env: root.env.clone(),
            user: root.user.clone(),
            working_dir: root.working_dir.clone(),
            limits: LimitsOrder {
                memory_bytes: root.limits.memory_bytes,
                cpu_millis: root.limits.cpu_millis,
                pids: root.limits.pids,
                disk_bytes: root.limits.disk_bytes,
            },
            permissions: root.permissions.clone(),
            secret_dirs: root.secret_dirs.clone(),
            volumes: root.permissions.volumes.iter().map(volume).collect(),
        }
    }
}

/// A message's bytes; an error when it is larger than a packet may be.
pub fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MESSAGE_BYTES_MAX {
        let text = format!("{} bytes, {MESSAGE_BYTES_MAX} at most", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(bytes)
}

/// Sends one packet, whole or not at all.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
        assert!(fits, "a message carries {DESCRIPTORS_MAX} descriptors at most");
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one packet into `buffer`; `None` when the other end is gone.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Option<(&[u8], Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut *buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet was cut short"));
    }
    if got.bytes == 0 {
        return Ok(None);
    }
    Ok(Some((&buffer[..got.bytes], descriptors)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("a socket pair")
    }

    #[test]
    fn largest_message_arrives_whole_with_its_descriptors() {
        let (ours, theirs) = pair();
        let padding =
            MESSAGE_BYTES_MAX - encode(&Request::Release { key: String::new() }).expect("small").len();
        let bytes = encode(&Request::Release { key: "x".repeat(padding) }).expect("just fits");
        assert_eq!(bytes.len(), MESSAGE_BYTES_MAX);

        send(&ours, &bytes, &[ours.as_fd(), theirs.as_fd()]).expect("sent");

        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        let (got, descriptors) = receive(&theirs, &mut buffer).expect("received").expect("not the end");
        assert_eq!(got, bytes);
        assert_eq!(descriptors.len(), 2);
    }

    #[test]
    fn message_beyond_the_bound_is_refused_before_it_is_sent() {
        let huge = Request::Release { key: "x".repeat(MESSAGE_BYTES_MAX) };
        assert_eq!(encode(&huge).map_err(|err| err.kind()), Err(io::ErrorKind::InvalidInput));
    }

    #[test]
    fn end_of_the_other_side_is_told() {
        let (ours, theirs) = pair();
        drop(ours);
        assert!(receive(&theirs, &mut [0; 8]).expect("no error").is_none());
    }
}
