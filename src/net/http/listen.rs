//! The sockets that the server listens on: one TCP address, and the Unix socket below `run_dir`.

use crate::config::Config;
use crate::net::tls::server::{Acceptor, TlsError};
use smol::Async;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Below `[node] run_dir`.
pub const SOCKET_NAME: &str = "neap.sock";
/// Whose members may use the Unix socket, besides root.
const SOCKET_GROUP: &str = "neap";
/// What the kernel holds while all connections are taken; std's 128 is short for a fleet of
/// devices that reconnect at once after a power cut.
const BACKLOG: i32 = 1024;

/// Bound, not yet accepting. Dropping it removes the Unix socket's file.
pub struct Listeners {
    pub(super) tcp: Async<TcpListener>,
    pub(super) tls: Option<Acceptor>,
    pub(super) unix: Async<UnixListener>,
    _file: SocketFile,
    address: SocketAddr,
}

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error(
        "listen on {0}: another program has this address (`ss -ltnp` names it); stop it or change [http] listen"
    )]
    Taken(SocketAddr),
    #[error("listen on {address} ([http] listen)")]
    Tcp {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("listen on {}: another neap answers there; stop it or change [node] run_dir", .0.display())]
    Running(PathBuf),
    #[error("listen on {} ([node] run_dir)", path.display())]
    Unix {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl Listeners {
    /// Takes the addresses early, so that a taken port is an error of the start. Clients that
    /// connect wait in the backlog until `serve`.
    pub fn bind(config: &Config) -> Result<Self, BindError> {
        let tls = config.http.tls.clone().map(Acceptor::load).transpose()?;
        let tcp = bind_tcp(config.http.listen)?;
        let path = config.node.run_dir.join(SOCKET_NAME);
        let (unix, file) = bind_unix(&path)?;
        let address = tcp.get_ref().local_addr();
        let address = address.map_err(|source| BindError::Tcp { address: config.http.listen, source })?;
        Ok(Self { tcp, tls, unix, _file: file, address })
    }

    /// Where TCP clients reach the node (with the port that was found when `listen` said 0).
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn bind_tcp(address: SocketAddr) -> Result<Async<TcpListener>, BindError> {
    let bind = || {
        let listener = TcpListener::bind(address)?;
        // std has listened already; a second listen only changes the backlog (listen(2)).
        rustix::net::listen(&listener, BACKLOG)?;
        Async::new(listener)
    };
    bind().map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => BindError::Taken(address),
        _ => BindError::Tcp { address, source },
    })
}

/// The socket is made under another name and renamed into place, so that it is never there
/// with the wrong mode, and so that the file of a killed daemon is replaced.
fn bind_unix(path: &Path) -> Result<(Async<UnixListener>, SocketFile), BindError> {
    if UnixStream::connect(path).is_ok() {
        return Err(BindError::Running(path.to_owned()));
    }
    let bind = || {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let fresh = path.with_extension("sock.new");
        match std::fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&fresh)?;
        rustix::net::listen(&listener, BACKLOG)?;
        // Without the group only root is let in.
        let group = nix::unistd::Group::from_name(SOCKET_GROUP).ok().flatten();
        let owned = group.is_some_and(|group| chown(&fresh, None, Some(group.gid.as_raw())).is_ok());
        let mode = if owned { 0o660 } else { 0o600 };
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(mode))?;
        std::fs::rename(&fresh, path)?;
        let file = SocketFile { path: path.to_owned(), inode: std::fs::metadata(path)?.ino() };
        Ok((Async::new(listener)?, file))
    };
    bind().map_err(|source| BindError::Unix { path: path.to_owned(), source })
}

/// Removes its file when dropped, unless another daemon has put its own in place.
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_of_a_dead_daemon_is_replaced_and_of_a_living_one_is_not() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join(SOCKET_NAME);
        drop(UnixListener::bind(&path).expect("a first socket")); // its file stays, as after SIGKILL

        let (listener, file) = bind_unix(&path).expect("the stale file is replaced");

        assert!(matches!(bind_unix(&path), Err(BindError::Running(_))));
        let mode = std::fs::metadata(&path).expect("the socket's file").mode();
        assert_eq!(mode & 0o007, 0, "others are let in");
        drop((listener, file));
        assert!(!path.exists());
    }

    #[test]
    fn taken_port_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = taken.local_addr().expect("an address");

        let error = bind_tcp(address).expect_err("the port is taken").to_string();

        assert!(error.contains(&address.to_string()) && error.contains("[http] listen"), "{error}");
    }
}
