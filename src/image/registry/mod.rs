//! A registry's HTTP API, as far as pulling goes (OCI distribution-spec, "Pull"): manifests and
//! blobs by GET, redirects, and the three ways to say who we are.
//!
//! Written here, on hyper, rather than taken from a client crate: oci-client brings 23 more crates,
//! a second TLS library and a second async runtime, and keeps nothing of a blob on disk, so that
//! all of what resuming takes would stand here just the same. The wire itself is `Transport`,
//! given by the wiring: the image layer names no HTTP library.
//!
//! What a registry must not get away with: `http://` where the configuration doesn't name it, a
//! redirect that carries our credentials to another host or has that host ask for them, answers
//! without end.

mod auth;
mod range;
mod url;

pub use auth::{Credential, DockerConfig};
pub use range::{Body, judge};
pub use url::Url;

use super::limits::show;
use auth::Challenge;
use bytes::Bytes;
use serde::Deserialize;
use std::cell::RefCell;
use std::io;
use std::time::{Duration, Instant};

/// From a registry to its blob storage is one; a few more are proxies'.
const REDIRECTS_MAX: usize = 5;
/// A token answer; Azure's tokens are 2 KiB.
const TOKEN_BYTES_MAX: usize = 64 * 1024;
/// What a registry says of an error, for people.
const REASON_BYTES_MAX: usize = 4 * 1024;
/// A document has a few thousand bytes: this is seconds for each of them.
const DOCUMENT_WITHIN: Duration = Duration::from_secs(600);
/// Docker Hub's registry answers under another name than its images have.
const HUB: (&str, &str) = ("docker.io", "registry-1.docker.io");

/// The way to a registry. Blocking: whoever pulls is a process of its own.
pub trait Transport {
    /// Returns when the answer's head is there. An error is the network's, and may pass.
    fn send(&self, request: &Request) -> io::Result<Box<dyn Answer>>;
}

pub struct Request {
    pub method: &'static str,
    pub url: Url,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

pub trait Answer {
    fn status(&self) -> u16;
    /// By its lower-case name.
    fn header(&self, name: &str) -> Option<&str>;
    /// The next piece of the body; `None` at its end. A body that breaks off, or stalls for too
    /// long, is an error.
    fn piece(&mut self) -> io::Result<Option<Bytes>>;
}

/// Why there is no answer to use.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// Another try may end differently: the network, a server that is busy.
    #[error("{text}")]
    Passing { text: String, after: Option<Duration> },
    #[error("{0}")]
    Missing(String),
    #[error("{0}")]
    Refused(String),
}

/// One repository at one registry or mirror.
pub struct Registry<'a> {
    transport: &'a dyn Transport,
    base: Url,
    insecure: &'a [String],
    /// What the image's own registry is called, for a mirror of several.
    namespace: Option<String>,
    path: String,
    credential: Option<Credential>,
    authorization: RefCell<Option<String>>,
}

impl<'a> Registry<'a> {
    /// `host`: of the registry or mirror; `own`: the registry in the image's name.
    pub fn new(
        transport: &'a dyn Transport,
        insecure: &'a [String],
        host: &str,
        own: &str,
        path: &str,
        credential: Option<Credential>,
    ) -> Result<Self, Trouble> {
        let tls = !insecure.iter().any(|name| name == host);
        let address = if host == HUB.0 { HUB.1 } else { host };
        let base = Url::of(tls, address, "/v2/".to_owned());
        let base = base.ok_or_else(|| Trouble::Refused(format!("`{host}` is no registry's address")))?;
        let namespace = (host != own).then(|| own.to_owned());
        let authorization = RefCell::new(None);
        Ok(Self { transport, base, insecure, namespace, path: path.to_owned(), credential, authorization })
    }

    pub fn name(&self) -> String {
        self.base.authority()
    }

    /// `kind`: `manifests` or `blobs`.
    pub fn get(
        &self,
        kind: &str,
        reference: &str,
        headers: &[(&'static str, String)],
    ) -> Result<Box<dyn Answer>, Trouble> {
        let mut url = self.base.clone();
        url.target = format!("/v2/{}/{kind}/{reference}", self.path);
        if let Some(namespace) = &self.namespace {
            url.target.push_str(&format!("?ns={namespace}"));
        }
        let (mut answer, mut from) = self.follow(url.clone(), headers)?;
        // Only the registry itself may ask who we are: whoever it redirects to would name a token
        // service of its own, and be sent our password.
        if answer.status() == 401 && from.same_origin(&self.base) {
            let challenge = answer.header("www-authenticate").and_then(Challenge::parse);
            end(&mut *answer);
            self.authenticate(challenge)?;
            (answer, from) = self.follow(url, headers)?;
        }
        match answer.status() {
            200 | 206 => Ok(answer),
            401 | 403 if !from.same_origin(&self.base) => {
                let (name, place) = (self.name(), from.authority());
                Err(Trouble::Refused(format!("{name} leads to {place}, which refuses us")))
            }
            status => Err(self.trouble(status, &mut *answer)),
        }
    }

    /// Sends, and goes where redirects lead; the answer, and whose it is.
    fn follow(
        &self,
        first: Url,
        headers: &[(&'static str, String)],
    ) -> Result<(Box<dyn Answer>, Url), Trouble> {
        let mut url = first;
        for _ in 0..=REDIRECTS_MAX {
            let mut sent: Vec<(&'static str, String)> = headers.to_vec();
            // Blob storage refuses foreign credentials, and has no business with them.
            if url.same_origin(&self.base)
                && let Some(authorization) = &*self.authorization.borrow()
            {
                sent.push(("authorization", authorization.clone()));
            }
            let mut answer = self.send("GET", url.clone(), sent, Vec::new())?;
            if !matches!(answer.status(), 301 | 302 | 303 | 307 | 308) {
                return Ok((answer, url));
            }
            let location = answer.header("location").unwrap_or("");
            let next = url.join(location);
            url = next.ok_or_else(|| {
                let text = format!("{} redirects to nowhere: `{}`", self.name(), show(location.as_bytes()));
                Trouble::Refused(text)
            })?;
            end(&mut *answer);
        }
        Err(Trouble::Refused(format!("{} redirects more than {REDIRECTS_MAX} times", self.name())))
    }

    fn send(
        &self,
        method: &'static str,
        url: Url,
        headers: Vec<(&'static str, String)>,
        body: Vec<u8>,
    ) -> Result<Box<dyn Answer>, Trouble> {
        if !url.tls && !self.insecure.contains(&url.authority()) {
            let text = format!("{} leads to {url}, which is not encrypted", self.name());
            return Err(Trouble::Refused(format!(
                "{text}; name its host in [images] insecure if that is meant"
            )));
        }
        let place = url.authority();
        let request = Request { method, url, headers, body };
        self.transport.send(&request).map_err(|error| {
            let text = format!("{place}: {}", chain(&error));
            match error.kind() {
                // Not TLS at all, or a certificate that we don't trust: waiting helps nothing.
                io::ErrorKind::InvalidData => Trouble::Refused(text),
                _ => Trouble::Passing { text, after: None },
            }
        })
    }

    fn authenticate(&self, challenge: Option<Challenge>) -> Result<(), Trouble> {
        let name = self.name();
        let authorization = match (challenge, &self.credential) {
            (None, _) => {
                return Err(Trouble::Refused(format!(
                    "{name} wants to know who we are, in a way that neap doesn't know"
                )));
            }
            (Some(_), Some(Credential::Registry(token))) => format!("Bearer {token}"),
            (Some(Challenge::Basic), Some(credential)) => match credential.basic() {
                Some(basic) => basic,
                None => {
                    return Err(Trouble::Refused(format!(
                        "{name} wants a password, and there is only a token"
                    )));
                }
            },
            (Some(Challenge::Basic), None) => {
                let text = format!("{name} wants a password; put one into docker's config.json");
                return Err(Trouble::Refused(format!("{text} and name that file in [images] docker_config")));
            }
            (Some(Challenge::Bearer { realm, service, scope }), _) => {
                format!("Bearer {}", self.token(&realm, service, scope)?)
            }
        };
        self.authorization.replace(Some(authorization));
        Ok(())
    }

    /// distribution's "Token Authentication" and, with an identity token, its OAuth2 form.
    fn token(&self, realm: &Url, service: Option<String>, scope: Option<String>) -> Result<String, Trouble> {
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.path));
        let mut pairs = vec![("scope", scope)];
        pairs.extend(service.map(|service| ("service", service)));
        let mut url = realm.clone();
        let mut answer = if let Some(Credential::Identity(token)) = &self.credential {
            pairs.push(("grant_type", "refresh_token".to_owned()));
            pairs.push(("client_id", "neap".to_owned()));
            pairs.push(("refresh_token", token.clone()));
            let form = ("content-type", "application/x-www-form-urlencoded".to_owned());
            self.send("POST", url, vec![form], encode(&pairs).into_bytes())?
        } else {
            let separator = if url.target.contains('?') { '&' } else { '?' };
            url.target = format!("{}{separator}{}", url.target, encode(&pairs));
            let basic = self.credential.as_ref().and_then(Credential::basic);
            self.send(
                "GET",
                url,
                basic.map(|basic| ("authorization", basic)).into_iter().collect(),
                Vec::new(),
            )?
        };
        if answer.status() != 200 {
            return Err(self.trouble(answer.status(), &mut *answer));
        }
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let text = read(&mut *answer, TOKEN_BYTES_MAX).map_err(|error| self.passing(&error))?;
        let token: Option<Token> = serde_json::from_slice(&text).ok();
        let token = token
            .and_then(|t| t.token.or(t.access_token))
            .filter(|token| !token.is_empty() && token.bytes().all(|b| (0x21..0x7f).contains(&b)));
        token.ok_or_else(|| Trouble::Refused(format!("{realm} gave no token")))
    }

    /// An error while the body came.
    pub fn passing(&self, error: &io::Error) -> Trouble {
        Trouble::Passing { text: format!("{}: {}", self.name(), chain(error)), after: None }
    }

    fn trouble(&self, status: u16, answer: &mut dyn Answer) -> Trouble {
        let after = answer.header("retry-after").and_then(|text| text.trim().parse().ok());
        let after = after.map(Duration::from_secs);
        let reason = reason(&read(answer, REASON_BYTES_MAX).unwrap_or_default());
        let name = self.name();
        match status {
            404 => Trouble::Missing(format!("{name} has no such image{reason}")),
            401 if self.credential.is_none() => {
                let text = format!("{name} shows this image to nobody without a password, or has none such");
                Trouble::Refused(format!("{text}{reason}"))
            }
            401 | 403 => Trouble::Refused(format!("{name} refuses our password or token{reason}")),
            408 | 425 | 429 | 500.. => {
                Trouble::Passing { text: format!("{name} answers {status}{reason}"), after }
            }
            _ => Trouble::Refused(format!("{name} answers {status}{reason}")),
        }
    }
}

/// Reads what is left of an answer that says nothing more, so that its connection can be used
/// again. One that goes on is given up.
fn end(answer: &mut dyn Answer) {
    let length: Option<usize> = answer.header("content-length").and_then(|text| text.parse().ok());
    if length.is_some_and(|length| length <= REASON_BYTES_MAX) {
        let _ = read(answer, REASON_BYTES_MAX);
    }
}

/// A body of at most `bytes_max`.
pub fn read(answer: &mut dyn Answer, bytes_max: usize) -> io::Result<Vec<u8>> {
    let started = Instant::now();
    let mut all = Vec::new();
    while let Some(piece) = answer.piece()? {
        // Each piece may take its time, but not thousands of them.
        if started.elapsed() > DOCUMENT_WITHIN {
            let text = format!("the answer is not here after {} s", DOCUMENT_WITHIN.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        if all.len() + piece.len() > bytes_max {
            let text = format!("the answer is larger than {bytes_max} bytes");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        all.extend_from_slice(&piece);
    }
    Ok(all)
}

/// ` (manifest unknown)`: the first of distribution-spec's errors.
fn reason(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        message: String,
    }
    let errors: Option<Errors> = serde_json::from_slice(body).ok();
    let first = errors.and_then(|e| e.errors.into_iter().next()).map(|one| one.message);
    first
        .filter(|text| !text.is_empty())
        .map(|text| format!(" ({})", show(text.as_bytes())))
        .unwrap_or_default()
}

/// application/x-www-form-urlencoded, which is good for a query, too.
fn encode(pairs: &[(&str, String)]) -> String {
    let mut text = String::new();
    for (name, value) in pairs {
        if !text.is_empty() {
            text.push('&');
        }
        text.push_str(name);
        text.push('=');
        for byte in value.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => text.push(byte.into()),
                _ => text.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    text
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    crate::errors::chain(error)
}
