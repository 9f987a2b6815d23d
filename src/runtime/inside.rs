//! What the daemon itself does to an instance that stays up, past the launcher: sockets in its
//! network namespace, and its freezer.
//!
//! A socket belongs to the namespace it was made in, for ever and on every thread. So the
//! calling thread enters for the one system call and comes back (10 µs for both ways), and the
//! socket is then used like any other. There is no veth and no proxy inside.
//!
//! The freezer's file is opened once and written to: 0.09 ms, where libcontainer's pause, which
//! looks all cgroups up again, takes 0.9 ms.

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType};
use smol::Async;
use std::fs::File;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Connections that may wait to be accepted: an instance has few clients in there.
const BACKLOG: i32 = 64;

/// An instance's namespaces and freezer; outlives it harmlessly.
pub struct Inside {
    process: OwnedFd,
    freezer: Option<Freezer>,
    /// The most memory it has had.
    peak: Option<PathBuf>,
}

/// Where a cgroup is frozen, and by which words.
pub struct Freezer {
    path: PathBuf,
    freeze: &'static [u8],
    thaw: &'static [u8],
    open: Mutex<Option<File>>,
}

impl Freezer {
    pub fn v1(path: PathBuf) -> Self {
        Self { path, freeze: b"FROZEN", thaw: b"THAWED", open: Mutex::new(None) }
    }

    pub fn v2(path: PathBuf) -> Self {
        Self { path, freeze: b"1", thaw: b"0", open: Mutex::new(None) }
    }

    fn write(&self, word: &[u8]) -> io::Result<()> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match &mut *open {
            Some(file) => file,
            closed => closed.insert(File::options().write(true).open(&self.path)?),
        };
        file.write_all(word)
    }
}

impl Inside {
    pub fn new(process: OwnedFd, freezer: Option<Freezer>, peak: Option<PathBuf>) -> Self {
        Self { process, freezer, peak }
    }

    /// `None` where the kernel doesn't tell.
    pub fn memory_peak_bytes(&self) -> Option<u64> {
        std::fs::read_to_string(self.peak.as_ref()?).ok()?.trim().parse().ok()
    }

    /// To a port on the instance's own loopback.
    pub async fn connect(&self, port: u16) -> io::Result<Async<TcpStream>> {
        let socket = self.socket(SocketFlags::NONBLOCK)?;
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        let connected = match rustix::net::connect(&socket, &address) {
            Ok(()) => true,
            Err(rustix::io::Errno::INPROGRESS) => false,
            Err(error) => return Err(error.into()),
        };
        let _ = sockopt::set_tcp_nodelay(&socket, true); // a slower socket is one all the same
        let stream = Async::new(TcpStream::from(socket))?;
        if !connected {
            // On a loopback the other side's kernel has answered before `connect` was through,
            // which says "in progress" all the same: a look spares the reactor's turn.
            if !is_settled(&stream)? {
                stream.writable().await?;
            }
            sockopt::socket_error(&stream)??;
        }
        Ok(stream)
    }

    /// What its questions for names come to: datagrams and connections, on port 53.
    pub fn name_sockets(&self, at: Ipv4Addr) -> io::Result<(Async<UdpSocket>, Async<TcpListener>)> {
        let make = |kind| {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            self.visit(|| rustix::net::socket_with(AddressFamily::INET, kind, flags, None))
        };
        let address = SocketAddrV4::new(at, 53);
        let datagrams = make(SocketType::DGRAM)??;
        rustix::net::bind(&datagrams, &address)?;
        let connections = make(SocketType::STREAM)??;
        rustix::net::bind(&connections, &address)?;
        rustix::net::listen(&connections, BACKLOG)?;
        Ok((Async::new(UdpSocket::from(datagrams))?, Async::new(TcpListener::from(connections))?))
    }

    /// On a port of the instance's own loopback, before it is started or after.
    pub fn listen(&self, port: u16) -> io::Result<Async<TcpListener>> {
        let socket = self.socket(SocketFlags::NONBLOCK)?;
        rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))?;
        rustix::net::listen(&socket, BACKLOG)?;
        Async::new(TcpListener::from(socket))
    }

    /// Lets the instance listen below port 1024 without a capability, as Docker does.
    pub fn allow_low_ports(&self) -> io::Result<()> {
        self.visit(|| std::fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"))?
    }

    /// No process of the instance runs until `thaw`. False: this machine has no freezer.
    pub fn freeze(&self) -> io::Result<bool> {
        self.freezer.as_ref().map_or(Ok(false), |freezer| freezer.write(freezer.freeze).map(|()| true))
    }

    pub fn thaw(&self) -> io::Result<()> {
        self.freezer.as_ref().map_or(Ok(()), |freezer| freezer.write(freezer.thaw))
    }

    fn socket(&self, flags: SocketFlags) -> io::Result<OwnedFd> {
        let make = || {
            rustix::net::socket_with(
                AddressFamily::INET,
                SocketType::STREAM,
                flags | SocketFlags::CLOEXEC,
                None,
            )
        };
        Ok(self.visit(make)??)
    }

    /// Runs `work`, which waits for nothing, on this thread in the instance's network namespace.
    fn visit<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        let home = home()?;
        rustix::thread::move_into_thread_name_spaces(self.process.as_fd(), ThreadNameSpaceType::NETWORK)?;
        let done = work();
        // Every later socket of this thread would be the function's: better no daemon.
        rustix::thread::move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("root may always return to a namespace that it holds open");
        Ok(done)
    }
}

/// Whether a connection is made, or refused, by now.
fn is_settled(stream: &Async<TcpStream>) -> io::Result<bool> {
    let mut look = [PollFd::new(stream, PollFlags::OUT)];
    Ok(rustix::event::poll(&mut look, Some(&Timespec::default()))? > 0)
}

/// The daemon's own network namespace, which all its threads share.
fn home() -> io::Result<&'static File> {
    static HOME: OnceLock<File> = OnceLock::new();
    if HOME.get().is_none() {
        let _ = HOME.set(File::open("/proc/self/ns/net")?); // another thread's is the same
    }
    HOME.get().ok_or_else(|| io::ErrorKind::NotFound.into())
}
