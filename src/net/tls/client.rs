//! The client's side of TLS: rustls with ring, the system's roots or one CA file, and a client
//! certificate when the broker asks for one.
//!
//! Files are read at every connect, so a renewed certificate needs no restart, and every error
//! names its file.

use crate::config::ClientTls;
use futures_rustls::TlsConnector;
use futures_rustls::pki_types::pem::PemObject;
use futures_rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use futures_rustls::rustls::crypto::ring;
use futures_rustls::rustls::{ClientConfig, RootCertStore};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// No certificate or key file is larger; one that is was not meant.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ClientTlsError {
    #[error("{key}: read {}", path.display())]
    Read {
        key: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{key}: {} holds no {what} in PEM form", path.display())]
    Empty { key: &'static str, path: PathBuf, what: &'static str },
    #[error("{key}: {} is not a usable {what}", path.display())]
    Bad {
        key: &'static str,
        path: PathBuf,
        what: &'static str,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(
        "the system has no usable root certificates; install ca-certificates or name a CA file in `tls.ca`"
    )]
    NoSystemRoots,
    #[error("a client certificate needs both `tls.cert` and `tls.key`")]
    HalfAnIdentity,
    #[error("`{0}` is neither a host name nor an address")]
    BadHost(String),
    #[error("configure TLS")]
    Rustls(#[from] futures_rustls::rustls::Error),
}

/// Reads the files and makes a connector; blocks for as long as that takes (the system's roots
/// are some 140 certificates).
pub fn connector(tls: &ClientTls) -> Result<TlsConnector, ClientTlsError> {
    let roots = match &tls.ca {
        Some(path) => roots_from(path)?,
        None => system_roots()?,
    };
    let builder =
        ClientConfig::builder_with_details(Arc::new(ring::default_provider()), Arc::new(super::Latest))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
    let mut config = match (&tls.cert, &tls.key) {
        (Some(cert), Some(key_path)) => {
            let chain = certificates("tls.cert", cert)?;
            let key = PrivateKeyDer::from_pem_slice(&read("tls.key", key_path)?).map_err(|_| {
                ClientTlsError::Empty { key: "tls.key", path: key_path.clone(), what: "private key" }
            })?;
            builder.with_client_auth_cert(chain, key).map_err(|source| ClientTlsError::Bad {
                key: "tls.key",
                path: key_path.clone(),
                what: "key for the client certificate",
                source: source.into(),
            })?
        }
        (None, None) => builder.with_no_client_auth(),
        _ => return Err(ClientTlsError::HalfAnIdentity),
    };
    config.alpn_protocols = tls.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// The name that the server's certificate must be for.
pub fn server_name(host: &str) -> Result<ServerName<'static>, ClientTlsError> {
    ServerName::try_from(host.to_owned()).map_err(|_| ClientTlsError::BadHost(host.to_owned()))
}

fn roots_from(path: &Path) -> Result<RootCertStore, ClientTlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("tls.ca", path)? {
        roots.add(certificate).map_err(|source| ClientTlsError::Bad {
            key: "tls.ca",
            path: path.to_owned(),
            what: "CA certificate",
            source: source.into(),
        })?;
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore, ClientTlsError> {
    let mut roots = RootCertStore::empty();
    // One odd certificate among the system's must not cost us all the others.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() { Err(ClientTlsError::NoSystemRoots) } else { Ok(roots) }
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, ClientTlsError> {
    let text = read(key, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|source| ClientTlsError::Bad {
        key,
        path: path.to_owned(),
        what: "certificate file",
        source: source.to_string().into(),
    })?;
    if found.is_empty() {
        return Err(ClientTlsError::Empty { key, path: path.to_owned(), what: "certificate" });
    }
    Ok(found)
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, ClientTlsError> {
    use std::io::Read;
    let read = || {
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|source| ClientTlsError::Read { key, path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let empty = folder.path().join("empty.pem");
        std::fs::write(&empty, "nothing here").expect("write a file");
        let missing = folder.path().join("missing.pem");

        for (path, what) in [(&empty, "holds no certificate"), (&missing, "read ")] {
            let tls = ClientTls { ca: Some(path.clone()), ..ClientTls::default() };

            let error = connector(&tls).err().expect("refused").to_string();

            assert!(error.starts_with("tls.ca: "), "{error}");
            assert!(error.contains(what) && error.contains(&*path.to_string_lossy()), "{error}");
        }
    }

    #[test]
    fn half_an_identity_is_refused() {
        let tls = ClientTls { cert: Some("c.pem".into()), ..ClientTls::default() };

        let error = connector(&tls).err();

        assert!(matches!(error, Some(ClientTlsError::HalfAnIdentity | ClientTlsError::NoSystemRoots)));
    }
}
