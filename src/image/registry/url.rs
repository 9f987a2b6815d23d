//! `http://` and `https://` addresses as registries hand them out: where a token is had, where a
//! redirect leads. Pure; what is odd is refused.

use std::fmt;

/// The longest in the field are signed URLs of blob storage, about 2,000 bytes.
const URL_BYTES_MAX: usize = 16 * 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    pub tls: bool,
    /// An IPv6 address has its brackets.
    pub host: String,
    pub port: u16,
    /// Path and query, from `/`.
    pub target: String,
}

impl Url {
    pub fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let tls = match scheme {
            _ if scheme.eq_ignore_ascii_case("https") => true,
            _ if scheme.eq_ignore_ascii_case("http") => false,
            _ => return None,
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(end);
        let target = target.split('#').next().unwrap_or("");
        let target = if target.starts_with('/') { target.to_owned() } else { format!("/{target}") };
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
            _ => (authority, if tls { 443 } else { 80 }),
        };
        let url = Self { tls, host: host.to_ascii_lowercase(), port, target };
        url.good().then_some(url)
    }

    /// `host`: `HOST[:PORT]`, as references have it.
    pub fn of(tls: bool, host: &str, target: String) -> Option<Self> {
        Self::parse(&format!("{}://{host}{target}", if tls { "https" } else { "http" }))
    }

    /// Where a `Location` leads from here.
    pub fn join(&self, location: &str) -> Option<Self> {
        let joined = if location.contains("://") && !location.starts_with('/') {
            return Self::parse(location);
        } else if let Some(rest) = location.strip_prefix("//") {
            return Self::parse(&format!("{}://{rest}", if self.tls { "https" } else { "http" }));
        } else if location.starts_with('/') {
            Self { target: location.split('#').next()?.to_owned(), ..self.clone() }
        } else {
            let path = self.target.split('?').next().unwrap_or("/");
            let directory = &path[..=path.rfind('/')?];
            Self { target: format!("{directory}{}", location.split('#').next()?), ..self.clone() }
        };
        joined.good().then_some(joined)
    }

    /// Whether what is secret for one is for the other, too.
    pub fn same_origin(&self, other: &Self) -> bool {
        (self.tls, &self.host, self.port) == (other.tls, &other.host, other.port)
    }

    /// `HOST[:PORT]`, the port when it is not the scheme's own.
    pub fn authority(&self) -> String {
        match (self.tls, self.port) {
            (true, 443) | (false, 80) => self.host.clone(),
            _ => format!("{}:{}", self.host, self.port),
        }
    }

    fn good(&self) -> bool {
        let host = |b: u8| b.is_ascii_alphanumeric() || b"._-:[]".contains(&b);
        let visible = |b: u8| (0x21..0x7f).contains(&b);
        !self.host.is_empty()
            && self.port > 0
            && self.host.bytes().all(host)
            && self.target.len() <= URL_BYTES_MAX
            && self.target.bytes().all(visible)
    }
}

/// For messages: what follows the `?` may be a signature that is as good as a password.
impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        let path = self.target.split('?').next().unwrap_or("/");
        write!(f, "{scheme}://{}{path}", self.authority())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).expect(text)
    }

    #[test]
    fn addresses_are_taken_apart_and_odd_ones_refused() {
        assert_eq!(url("https://H.example/v2/?a=b#c").target, "/v2/?a=b");
        assert_eq!(url("http://[::1]:5000/x").host, "[::1]");
        assert_eq!(url("https://h?x").target, "/?x");
        assert_eq!((url("https://h").port, url("http://h").port), (443, 80));
        for bad in [
            "h",
            "ftp://h",
            "https://",
            "https://u:p@h/",
            "https://h:0/",
            "https://h:x/",
            "https://h/\r\nX: y",
            "https://h/é",
        ] {
            assert_eq!(Url::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn redirects_are_absolute_or_relative() {
        let from = url("https://h:5000/v2/a/blobs/x?y=z");

        assert_eq!(from.join("https://s.example/b?sig=1"), Some(url("https://s.example/b?sig=1")));
        assert_eq!(from.join("/b"), Some(url("https://h:5000/b")));
        assert_eq!(from.join("b"), Some(url("https://h:5000/v2/a/blobs/b")));
        assert_eq!(from.join("//o/b"), Some(url("https://o/b")));
        assert!(!from.same_origin(&url("https://h/")) && !from.same_origin(&url("http://h:5000/")));
        assert_eq!(url("https://s/b?sig=1").to_string(), "https://s/b");
    }
}
