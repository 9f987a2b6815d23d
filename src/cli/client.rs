//! The command line's end of the daemon's HTTP: where it is, who we are, and what its answers
//! mean. An answer that isn't 2xx is an error with the daemon's own words (RFC 9457).

use super::args::Global;
use super::output::tell;
use super::units::percent_encode;
use crate::config::ClientTls;
use crate::model::api::Problem;
use crate::net::http;
use crate::net::tls::client::{ClientTlsError, connector};
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};

pub use crate::net::http::{Body, Request, Response};

/// An answer that is read whole: the largest is an event with its data in base64, once for each
/// function (payloads are at most a few MiB).
const ANSWER_BYTES_MAX: usize = 256 * 1024 * 1024;

/// A line of a streamed answer: a log line is bounded by the daemon to far less.
const LINE_BYTES_MAX: usize = 1024 * 1024;

/// What is read of the reason for a refusal, and how much of one that isn't a problem document,
/// for example a proxy's page, is shown.
const REASON_BYTES_MAX: usize = 64 * 1024;
const FOREIGN_TEXT_MAX: usize = 300;

pub struct Client {
    http: http::Client,
    /// `https://gw:8443`, or the socket's path: for messages.
    place: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Exit code 3.
    #[error("can't reach the daemon at {place}: {hint}")]
    Unreachable { place: String, hint: String },
    /// The daemon said no.
    #[error("{}", headline(.0))]
    Refused(Problem),
    #[error(transparent)]
    Http(#[from] http::ClientError),
    #[error("the daemon's answer is not what this neap expects; are both of the same version?")]
    Shape(#[source] serde_json::Error),
    #[error("the daemon's answer ended early; `journalctl -u neap` may say why")]
    Truncated,
}

#[derive(Debug, thiserror::Error)]
pub enum BadAddress {
    #[error("--url is https://HOST[:PORT] or http://HOST[:PORT], got `{0}`")]
    Url(String),
    #[error("--token-file and --ca go with --url; the socket needs neither")]
    WithoutUrl,
    #[error("--ca goes with https://, got `{0}`")]
    CaWithoutTls(String),
    #[error("trust --ca")]
    Tls(#[source] ClientTlsError),
    #[error("read token file {}", file.display())]
    Token {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("token file {} holds no token, or more than one word", .0.display())]
    TokenText(PathBuf),
}

impl BadAddress {
    /// Whether the command line itself is at fault.
    pub fn usage(&self) -> bool {
        matches!(self, Self::Url(_) | Self::WithoutUrl | Self::CaWithoutTls(_))
    }
}

impl Client {
    pub fn new(global: &Global) -> Result<Self, BadAddress> {
        let Some(url) = &global.url else {
            if global.token_file.is_some() || global.ca.is_some() {
                return Err(BadAddress::WithoutUrl);
            }
            let place = global.socket.display().to_string();
            return Ok(Self {
                http: http::Client::new(http::Endpoint::Unix(global.socket.clone()), None),
                place,
            });
        };
        let Address { tls, host, port } = parse_url(url)?;
        let endpoint = match (tls, &global.ca) {
            (false, Some(_)) => return Err(BadAddress::CaWithoutTls(url.clone())),
            (false, None) => http::Endpoint::Tcp { host, port },
            (true, ca) => {
                let trust = ClientTls { ca: ca.clone(), ..ClientTls::default() };
                let connector = connector(&trust).map_err(BadAddress::Tls)?;
                http::Endpoint::Tls { host, port, connector }
            }
        };
        let token = global.token_file.as_deref().map(read_token).transpose()?;
        if let (http::Endpoint::Tcp { host, .. }, Some(_)) = (&endpoint, &token)
            && !loopback(host)
        {
            tell("neap: warning: over http:// the token can be read on its way; https:// keeps it secret");
        }
        Ok(Self { http: http::Client::new(endpoint, token), place: url.trim_end_matches('/').to_owned() })
    }

    /// Sends; any answer is fine.
    pub async fn send(&self, request: Request) -> Result<Response, ClientError> {
        self.http.send(request).await.map_err(|error| match error {
            http::ClientError::Connect { source, .. } => self.unreachable(&source),
            other => ClientError::Http(other),
        })
    }

    /// Sends; an answer other than 2xx is an error.
    pub async fn ask(&self, method: &str, path: &str, body: Body) -> Result<Response, ClientError> {
        accepted(self.send(Request::new(method, path).body(body)).await?).await
    }

    /// Sends, and reads the whole answer.
    pub async fn bytes(&self, method: &str, path: &str, body: Body) -> Result<Vec<u8>, ClientError> {
        Ok(self.ask(method, path, body).await?.bytes(ANSWER_BYTES_MAX).await?)
    }

    pub async fn get(&self, path: &str) -> Result<Vec<u8>, ClientError> {
        self.bytes("GET", path, Body::Empty).await
    }

    /// An answer that is a stream of lines.
    pub async fn lines(&self, method: &str, path: &str, body: Body) -> Result<Lines, ClientError> {
        Ok(Lines(self.ask(method, path, body).await?))
    }

    fn unreachable(&self, error: &io::Error) -> ClientError {
        let unix = matches!(self.http.endpoint(), http::Endpoint::Unix(_));
        ClientError::Unreachable { place: self.place.clone(), hint: hint(unix, error) }
    }
}

/// Why nobody answers, and what to do about it.
fn hint(unix: bool, error: &io::Error) -> String {
    let known = match (unix, error.kind()) {
        (true, io::ErrorKind::NotFound) => {
            "there is no such socket; is the daemon running? (`systemctl status neap`)"
        }
        (true, io::ErrorKind::ConnectionRefused) => {
            "nobody listens there any more; is the daemon running? (`systemctl status neap`)"
        }
        (true, io::ErrorKind::PermissionDenied) => {
            "permission denied; it is for root and the group neap (`sudo usermod -aG neap $USER`, then log \
             in again)"
        }
        (false, io::ErrorKind::ConnectionRefused) => {
            "connection refused; does `[http] listen` name that address and port?"
        }
        (_, io::ErrorKind::TimedOut) => "it did not answer in time",
        // what rustls says of a certificate that it doesn't trust
        (false, io::ErrorKind::InvalidData) => {
            return format!("{}; --ca FILE says whom to trust", crate::errors::chain(error));
        }
        _ => return crate::errors::chain(error),
    };
    known.to_owned()
}

/// Parses what was read whole.
pub fn parse<T: DeserializeOwned>(answer: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(answer).map_err(ClientError::Shape)
}

/// `/v1/functions/{name}`: `below("/v1/functions", name, "/pause")`.
pub fn below(collection: &str, name: &str, rest: &str) -> String {
    format!("{collection}/{}{rest}", percent_encode(name))
}

/// The answer if it is a 2xx, else the reason that it gives.
pub async fn accepted(mut response: Response) -> Result<Response, ClientError> {
    if (200..300).contains(&response.status) {
        return Ok(response);
    }
    let mut body = Vec::new();
    // What came before the connection broke may still be the reason.
    while let Ok(Some(piece)) = response.piece().await {
        body.extend_from_slice(&piece);
        if body.len() >= REASON_BYTES_MAX {
            break;
        }
    }
    Err(ClientError::Refused(problem(response.status, &body)))
}

fn problem(status: u16, body: &[u8]) -> Problem {
    let mut problem = match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => problem,
        Err(_) => {
            let text = String::from_utf8_lossy(body);
            let text: String = text.trim().chars().take(FOREIGN_TEXT_MAX).collect();
            let detail = if text.is_empty() { None } else { Some(text) };
            Problem { title: format!("the daemon answered {status}"), status, detail, errors: Vec::new() }
        }
    };
    problem.status = status; // the one on the wire counts
    if status == 401 && problem.errors.is_empty() {
        problem.errors.push("give the node's token with --token-file".into());
    }
    problem
}

/// Title and detail, unless one already says the other. A title that is only the status in
/// words (RFC 9457 §4.2.1) is for programs: the detail is what a person wants.
fn headline(problem: &Problem) -> String {
    let one_line = |text: &str| text.lines().collect::<Vec<_>>().join("; ");
    let title = one_line(&problem.title);
    match problem.detail.as_deref().map(str::trim) {
        None | Some("") => title,
        // The mistakes follow, a line each.
        Some(detail) if !problem.errors.is_empty() && detail == problem.errors.join("\n") => title,
        Some(detail) if title.is_empty() || detail.starts_with(&title) => one_line(detail),
        Some(detail) if is_status(problem.status, &title) => one_line(detail),
        Some(detail) => format!("{title}: {}", one_line(detail)),
    }
}

fn is_status(status: u16, title: &str) -> bool {
    http_types::StatusCode::try_from(status).is_ok_and(|s| s.canonical_reason().eq_ignore_ascii_case(title))
}

/// NDJSON, line by line as it comes.
pub struct Lines(Response);

impl Lines {
    /// The next line that isn't empty (an empty one keeps a quiet connection open); `None` at
    /// the end.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, ClientError> {
        loop {
            match self.0.line(LINE_BYTES_MAX).await? {
                Some(line) if line.iter().all(u8::is_ascii_whitespace) => {}
                line => return Ok(line),
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Address {
    tls: bool,
    host: String,
    port: u16,
}

fn parse_url(text: &str) -> Result<Address, BadAddress> {
    let bad = || BadAddress::Url(text.to_owned());
    let url = http_types::Url::parse(text).map_err(|_| bad())?;
    let tls = match url.scheme() {
        "https" => true,
        "http" => false,
        _ => return Err(bad()),
    };
    let extra = !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some();
    if extra || !url.username().is_empty() || url.password().is_some() {
        return Err(bad());
    }
    let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(bad)?.to_owned();
    Ok(Address { tls, host, port: url.port_or_known_default().ok_or_else(bad)? })
}

fn loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

fn read_token(file: &Path) -> Result<String, BadAddress> {
    let text = std::fs::read_to_string(file)
        .map_err(|source| BadAddress::Token { file: file.to_owned(), source })?;
    let token = text.trim();
    if token.is_empty() || token.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(BadAddress::TokenText(file.to_owned()));
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_scheme_host_and_port_only() {
        let parts = |text: &str| parse_url(text).ok().map(|a| (a.tls, a.host, a.port));
        assert_eq!(parts("https://gw:8443"), Some((true, "gw".into(), 8443)));
        assert_eq!(parts("https://gw/"), Some((true, "gw".into(), 443)));
        assert_eq!(parts("http://127.0.0.1:8080"), Some((false, "127.0.0.1".into(), 8080)));
        assert_eq!(parts("https://[::1]:8443"), Some((true, "[::1]".into(), 8443)));
        for bad in
            ["gw:8443", "gw", "", "ftp://gw", "https://", "https://gw/x", "https://a:b@gw", "https://gw/?x"]
        {
            assert_eq!(parts(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn hint_tells_a_stopped_daemon_from_a_locked_door() {
        let told = |unix, kind: io::ErrorKind| hint(unix, &kind.into());

        assert!(told(true, io::ErrorKind::NotFound).contains("systemctl status neap"));
        assert!(told(true, io::ErrorKind::ConnectionRefused).contains("systemctl status neap"));
        assert!(told(true, io::ErrorKind::PermissionDenied).contains("group neap"));
        assert!(told(false, io::ErrorKind::ConnectionRefused).contains("[http] listen"));
        assert!(told(false, io::ErrorKind::InvalidData).contains("--ca"));
    }

    #[test]
    fn only_loopback_may_carry_a_token_in_the_clear_unsaid() {
        assert!(loopback("localhost") && loopback("127.0.0.2") && loopback("[::1]"));
        assert!(!loopback("gw") && !loopback("10.0.0.1") && !loopback("[fe80::1]"));
    }

    #[test]
    fn problem_document_is_unpacked() {
        let body = br#"{"title":"manifest refused","status":1,"detail":"two mistakes","errors":["a:1: x","a:2: y"]}"#;

        let problem = problem(400, body);

        assert_eq!(problem.status, 400);
        assert_eq!(headline(&problem), "manifest refused: two mistakes");
        assert_eq!(problem.errors.len(), 2);
    }

    #[test]
    fn headline_says_nothing_twice() {
        let told = |title: &str, detail: &str, errors: &[&str]| {
            let errors = errors.iter().map(|&e| e.to_owned()).collect();
            headline(&Problem { title: title.into(), status: 400, detail: Some(detail.into()), errors })
        };
        assert_eq!(told("not found", "not found", &[]), "not found");
        assert_eq!(told("not found", "not found: f", &[]), "not found: f");
        assert_eq!(told("invalid", "a\nb", &["a", "b"]), "invalid");
        assert_eq!(told("invalid", "a\nb", &[]), "invalid: a; b");
        assert_eq!(told("", "why", &[]), "why");
        assert_eq!(told("Bad Request", "the manifest has 2 mistakes", &[]), "the manifest has 2 mistakes");
    }

    #[test]
    fn answer_of_somebody_else_is_shown_but_cut() {
        let page = "<html>".to_owned() + &"x".repeat(10_000);

        let problem = problem(502, page.as_bytes());

        assert!(headline(&problem).starts_with("the daemon answered 502: <html>xxx"));
        assert!(headline(&problem).len() < 400);
        assert_eq!(
            headline(&super::problem(500, b"\xff\xfe")).chars().count(),
            "the daemon answered 500: ??".len()
        );
    }

    #[test]
    fn token_is_one_word() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("token");
        let read = |text: &str| {
            std::fs::write(&file, text).expect("write the token");
            read_token(&file).ok()
        };
        assert_eq!(read("secret\n").as_deref(), Some("secret"));
        assert_eq!(read("\n"), None);
        assert_eq!(read("two words"), None);
        assert!(matches!(read_token(&dir.path().join("none")), Err(BadAddress::Token { .. })));
    }
}
