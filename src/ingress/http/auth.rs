//! Who may ask for what.
//!
//! | caller | functions | `/v1`, `/system` | `/metrics` |
//! |---|---|---|---|
//! | Unix socket | yes | yes: the file's mode is the guard | yes |
//! | verified client certificate | yes | yes | yes |
//! | token (Bearer, or Basic as `admin`) | yes | yes | yes |
//! | anybody else | unless asked for | no | when listening on loopback |

use super::problem::Refusal;
use crate::net::http::Peer;
use base64::Engine;
use http_types::StatusCode;
use ring::hmac;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tracing::{debug, warn};

/// Longer files are no token but a mistake, such as a key.
const TOKEN_BYTES_MAX: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    Local,
    Certificate,
    Token,
    /// Said nothing that we know.
    Anonymous,
}

impl Caller {
    pub fn is_known(self) -> bool {
        self != Self::Anonymous
    }
}

/// What a browser says of who makes it ask.
pub struct Asking<'a> {
    pub authorization: Option<&'a str>,
    pub host: Option<&'a str>,
    pub origin: Option<&'a str>,
    pub fetch_site: Option<&'a str>,
}

/// Whether a page of another site makes an operator's browser ask: it adds a password that it
/// knows, and a client certificate, by itself. Nothing but a browser says where its page is from
/// (<https://www.w3.org/TR/fetch-metadata/>, RFC 6454).
pub fn is_foreign_page(peer: Peer, asking: &Asking<'_>) -> bool {
    let scheme = asking.authorization.and_then(|value| value.split(' ').next()).unwrap_or("");
    let by_itself =
        scheme.eq_ignore_ascii_case("basic") || matches!(peer, Peer::Tcp { certificate: true, .. });
    let foreign = match (asking.fetch_site, asking.origin) {
        (Some(site), _) => !matches!(site, "same-origin" | "none"),
        (None, Some(origin)) => {
            let host = origin.split_once("://").map(|(_, host)| host);
            host.is_none_or(|host| !asking.host.is_some_and(|ours| ours.eq_ignore_ascii_case(host)))
        }
        (None, None) => false,
    };
    by_itself && foreign
}

/// The token in `[http] token_file`, read again when the file changes.
pub struct Token {
    file: Option<PathBuf>,
    /// Comparing two keyed hashes takes the same time wherever they differ.
    key: hmac::Key,
    read: Mutex<Read>,
}

#[derive(Default)]
struct Read {
    seen: Option<(u64, u64, i64, i64)>,
    /// `None`: nobody gets in by token.
    token: Option<Arc<Known>>,
}

struct Known {
    tag: hmac::Tag,
    /// For signatures, which are made with it.
    secret: Vec<u8>,
}

impl Token {
    pub fn new(file: Option<PathBuf>) -> Self {
        let random = ring::rand::SystemRandom::new();
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &random)
            .expect("the kernel gives random bytes once it is up");
        Self { file, key, read: Mutex::default() }
    }

    /// Whether there is a token to know.
    pub fn is_configured(&self) -> bool {
        self.file.is_some()
    }

    /// `authorization`: the header's value.
    pub fn caller(&self, peer: Peer, authorization: Option<&str>) -> Caller {
        match peer {
            Peer::Unix => Caller::Local,
            Peer::Tcp { certificate: true, .. } => Caller::Certificate,
            Peer::Tcp { .. } if authorization.is_some_and(|value| self.is_ours(value)) => Caller::Token,
            Peer::Tcp { .. } => Caller::Anonymous,
        }
    }

    /// Whether a header's value carries our token: then it is not for a function to see.
    pub fn is_ours(&self, authorization: &str) -> bool {
        let Some(known) = self.read() else { return false };
        let Some((scheme, value)) = authorization.split_once(' ') else { return false };
        let value = value.trim();
        let right = |token: &[u8]| hmac::verify(&self.key, token, known.tag.as_ref()).is_ok();
        if scheme.eq_ignore_ascii_case("bearer") {
            right(value.as_bytes())
        } else if scheme.eq_ignore_ascii_case("basic") {
            let pair = base64::engine::general_purpose::STANDARD.decode(value).unwrap_or_default();
            pair.strip_prefix(b"admin:").is_some_and(right)
        } else {
            false
        }
    }

    /// What requests may be signed with.
    pub fn secret(&self) -> Option<Vec<u8>> {
        self.read().map(|known| known.secret.clone())
    }

    fn read(&self) -> Option<Arc<Known>> {
        let file = self.file.as_ref()?;
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = std::fs::metadata(file).ok().map(|f| (f.ino(), f.size(), f.mtime(), f.mtime_nsec()));
        if seen != read.seen || seen.is_none() {
            let missing = read.seen.is_some() && seen.is_none();
            read.seen = seen;
            read.token = match seen {
                Some((_, size, ..)) if size <= TOKEN_BYTES_MAX => match std::fs::read(file) {
                    Ok(text) => {
                        let token = text.trim_ascii();
                        if token.is_empty() {
                            warn!(file = %file.display(), "token file is empty: nobody gets in by token");
                        }
                        (!token.is_empty()).then(|| {
                            Arc::new(Known { tag: hmac::sign(&self.key, token), secret: token.to_vec() })
                        })
                    }
                    Err(error) => {
                        warn!(file = %file.display(), %error, "token file can't be read");
                        None
                    }
                },
                Some(_) => {
                    warn!(file = %file.display(), "token file is larger than 4 KiB: nobody gets in by token");
                    None
                }
                None => {
                    if missing {
                        warn!(file = %file.display(), "token file is gone: nobody gets in by token");
                    }
                    None
                }
            };
        }
        read.token.clone()
    }

    /// What an anonymous caller is told.
    pub fn refusal(&self, peer: Peer) -> Refusal {
        debug!(?peer, "request without valid credentials");
        if self.is_configured() {
            Refusal::new(StatusCode::Unauthorized, "this asks for the token of [http] token_file")
                .with("www-authenticate", "Bearer realm=\"neap\"")
                .with("www-authenticate", "Basic realm=\"neap\", charset=\"UTF-8\"")
        } else {
            Refusal::new(
                StatusCode::Forbidden,
                "without [http] token_file this answers on the Unix socket alone",
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{IpAddr, Ipv4Addr, SocketAddr};

    const TCP: Peer = Peer::Tcp {
        address: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 1),
        certificate: false,
    };

    fn token_file(text: &str) -> (tempfile::TempDir, PathBuf, Token) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("token");
        std::fs::write(&path, text).expect("a token file");
        let token = Token::new(Some(path.clone()));
        (dir, path, token)
    }

    #[test]
    fn token_is_taken_as_bearer_and_as_faas_cli_sends_it() {
        let (_dir, _, token) = token_file("s3cret\n");
        let basic = |pair: &str| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair));

        for good in ["Bearer s3cret", "bearer s3cret", &basic("admin:s3cret")] {
            assert_eq!(token.caller(TCP, Some(good)), Caller::Token, "{good}");
        }
        let user = basic("root:s3cret");
        for bad in ["Bearer s3cre", "Bearer s3cret2", "Bearer ", "Bearer", "s3cret", "Basic !", &user] {
            assert_eq!(token.caller(TCP, Some(bad)), Caller::Anonymous, "{bad}");
        }
        assert_eq!(token.caller(TCP, None), Caller::Anonymous);
    }

    #[test]
    fn pages_of_other_sites_are_told_by_what_browsers_say() {
        let foreign = |authorization, origin, fetch_site| {
            let asking =
                Asking { authorization: Some(authorization), host: Some("gw:8080"), origin, fetch_site };
            is_foreign_page(TCP, &asking)
        };

        assert!(foreign("Basic x", Some("http://evil.example"), None));
        assert!(foreign("basic x", Some("null"), None));
        assert!(foreign("Basic x", None, Some("cross-site")));
        assert!(
            foreign("Basic x", Some("http://gw:8080"), Some("same-site")),
            "another port is another page"
        );
        assert!(!foreign("Basic x", Some("http://gw:8080"), None));
        assert!(!foreign("Basic x", Some("http://gw:8080"), Some("same-origin")));
        assert!(!foreign("Basic x", None, None), "faas-cli is no browser");
        assert!(!foreign("Bearer x", Some("http://evil.example"), None), "no browser adds that by itself");
    }

    #[test]
    fn empty_or_missing_token_file_lets_nobody_in() {
        let (_dir, path, token) = token_file(" \n");

        assert_eq!(token.caller(TCP, Some("Bearer ")), Caller::Anonymous);
        std::fs::remove_file(path).expect("the file is there");
        assert_eq!(token.caller(TCP, Some("Bearer ")), Caller::Anonymous);
        assert_eq!(Token::new(None).caller(TCP, Some("Bearer x")), Caller::Anonymous);
    }

    #[test]
    fn changed_token_file_is_read_again() {
        let (_dir, path, token) = token_file("old");
        assert_eq!(token.caller(TCP, Some("Bearer old")), Caller::Token);

        std::fs::write(path, "newer").expect("the file is writable");

        assert_eq!(token.caller(TCP, Some("Bearer old")), Caller::Anonymous);
        assert_eq!(token.caller(TCP, Some("Bearer newer")), Caller::Token);
    }
}
