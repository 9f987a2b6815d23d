//! TLS for the listener: our certificate, and the CA of the clients' when one is set, which
//! makes a client certificate a must.
//!
//! Files are read again when they change, so that a renewed certificate needs no restart. A
//! file that turns bad keeps the old one in use and is logged.

use crate::config::ServerTls;
use futures_rustls::TlsAcceptor;
use futures_rustls::pki_types::pem::PemObject;
use futures_rustls::pki_types::{CertificateDer, PrivateKeyDer};
use futures_rustls::rustls::server::{ServerSessionMemoryCache, WebPkiClientVerifier};
use futures_rustls::rustls::{RootCertStore, ServerConfig, crypto};
use futures_rustls::server::TlsStream;
use smol::io::{AsyncRead, AsyncWrite};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tracing::{info, warn};

/// Sessions that may be resumed without a full handshake; a few hundred bytes each.
const SESSIONS_MAX: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read certificate or key {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: futures_rustls::pki_types::pem::Error,
    },
    #[error("{} holds no certificate", .0.display())]
    Empty(PathBuf),
    #[error("use the certificates of [http] tls")]
    Unusable(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Makes TLS sessions from the files as they are now.
pub struct Acceptor {
    files: ServerTls,
    state: Mutex<State>,
}

struct State {
    seen: Vec<Seen>,
    current: Session,
}

/// One connection's worth of `Acceptor`.
#[derive(Clone)]
pub struct Session {
    acceptor: TlsAcceptor,
    certificates: bool,
}

impl Acceptor {
    pub fn load(files: ServerTls) -> Result<Self, TlsError> {
        let seen = look(&files);
        let current = Session::new(&files)?;
        Ok(Self { files, state: Mutex::new(State { seen, current }) })
    }

    pub fn current(&self) -> Session {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = look(&self.files);
        if seen != state.seen {
            match Session::new(&self.files) {
                Ok(session) => {
                    state.current = session;
                    info!("certificates were read again");
                }
                // Remembered as seen all the same: said once, not for every connection.
                Err(error) => {
                    let error = &error as &(dyn std::error::Error + 'static);
                    warn!(error, "certificates changed but can't be used; the old ones stay");
                }
            }
            state.seen = seen;
        }
        state.current.clone()
    }
}

impl Session {
    fn new(files: &ServerTls) -> Result<Self, TlsError> {
        let chain = certificates(&files.cert)?;
        let key = PrivateKeyDer::from_pem_file(&files.key)
            .map_err(|source| TlsError::Read { path: files.key.clone(), source })?;
        let unusable = |error: Box<dyn std::error::Error + Send + Sync>| TlsError::Unusable(error);
        let provider = Arc::new(crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_details(provider.clone(), Arc::new(super::Latest))
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(error.into()))?;
        let builder = match &files.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for root in certificates(path)? {
                    roots.add(root).map_err(|error| unusable(error.into()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().map_err(|error| unusable(error.into()))?)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| unusable(error.into()))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        config.session_storage = ServerSessionMemoryCache::new(SESSIONS_MAX);
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)), certificates: files.client_ca.is_some() })
    }

    /// The session, and whether a client certificate was verified.
    pub async fn accept<S>(&self, socket: S) -> io::Result<(TlsStream<S>, bool)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = self.acceptor.accept(socket).await?;
        let given = stream.get_ref().1.peer_certificates().is_some_and(|chain| !chain.is_empty());
        Ok((stream, self.certificates && given))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = |source| TlsError::Read { path: path.to_owned(), source };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(read)?.collect();
    let chain = chain.map_err(read)?;
    if chain.is_empty() { Err(TlsError::Empty(path.to_owned())) } else { Ok(chain) }
}

/// Inode, size, modification time: what changes when a file is replaced or rewritten.
type Seen = Option<(u64, u64, i64, i64)>;

fn look(files: &ServerTls) -> Vec<Seen> {
    let paths = [Some(&files.cert), Some(&files.key), files.client_ca.as_ref()];
    let look = |path: &PathBuf| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.ino(), found.size(), found.mtime(), found.mtime_nsec()))
    };
    paths.into_iter().flatten().map(look).collect()
}
