//! Where a function with a way out may go: hosts, networks, names, with or without a port, as
//! `allow.to` lists them. IPv4 alone, as the way out is.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;

/// Of one function.
pub const REACHES_MAX: usize = 64;

/// RFC 1035 §2.3.4: of a whole name, and of one part.
const NAME_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;

/// `HOST`, `HOST:PORT`, `HOST:PORT/udp`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reach {
    pub host: Host,
    /// `None`: everything there.
    pub port: Option<Port>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    Net(Net),
    /// In lower case, `redis.site` or, for every name below it, `*.site`.
    Name(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    pub protocol: Protocol,
    pub number: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// An address with the number of bits that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Net {
    pub address: Ipv4Addr,
    pub bits: u8,
}

impl Reach {
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.contains(['[', ']']) || text.matches(':').count() > 1 {
            return Err("is an IPv6 address; functions have IPv4 alone".to_owned());
        }
        let (host, port) = match text.split_once(':') {
            Some((host, port)) => (host, Some(Port::parse(port)?)),
            None => (text, None),
        };
        Ok(Self { host: Host::parse(host)?, port })
    }

    /// Whether this is by name, and the name is this one. `name`: in lower case, without the
    /// root's dot.
    pub fn names(&self, name: &str) -> bool {
        match &self.host {
            Host::Net(_) => false,
            Host::Name(pattern) => match pattern.strip_prefix('*') {
                Some(parent) => name.len() > parent.len() && name.ends_with(parent),
                None => name == pattern,
            },
        }
    }
}

impl Host {
    fn parse(text: &str) -> Result<Self, String> {
        // What ends in a number is meant as an address (RFC 3696 §2: no top level domain is one).
        let last = text.rsplit('.').next().unwrap_or_default();
        if text.contains('/') || !last.is_empty() && last.bytes().all(|byte| byte.is_ascii_digit()) {
            return Ok(Self::Net(Net::parse(text)?));
        }
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let plain = name.strip_prefix("*.").unwrap_or(&name);
        let good = |label: &str| {
            (1..=LABEL_BYTES_MAX).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        if name.len() > NAME_BYTES_MAX || !plain.split('.').all(good) {
            return Err("has no host: an address, a network as 192.168.1.0/24, or a name".to_owned());
        }
        Ok(Self::Name(name))
    }
}

impl Port {
    fn parse(text: &str) -> Result<Self, String> {
        let (number, protocol) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((number, "udp")) => (number, Protocol::Udp),
            Some(_) => return Err("has another protocol than tcp and udp".to_owned()),
        };
        match number.parse() {
            Ok(number) if number > 0 => Ok(Self { protocol, number }),
            _ => Err("has no port from 1 to 65535 behind its colon".to_owned()),
        }
    }
}

impl Net {
    pub fn parse(text: &str) -> Result<Self, String> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, bits.parse::<u8>().ok().filter(|bits| *bits <= 32)),
            None => (text, Some(32)),
        };
        let address: Ipv4Addr = address.parse().map_err(|_| "is no IPv4 address".to_owned())?;
        let bits = bits.ok_or("has no number of bits from 0 to 32 behind its slash")?;
        let net = Self { address, bits };
        if net.first() != address {
            return Err(format!("has bits beyond its network: {}/{bits} is meant", net.first()));
        }
        Ok(net)
    }

    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0))
    }

    fn first(self) -> Ipv4Addr {
        self.address & self.mask()
    }

    /// Whether they have an address in common.
    pub fn overlaps(self, other: Self) -> bool {
        let mask = if self.bits < other.bits { self.mask() } else { other.mask() };
        self.address & mask == other.address & mask
    }

    /// Its parts of so many bits; itself when it is smaller than that.
    pub fn parts(self, bits: u8) -> impl Iterator<Item = Self> {
        let bits = bits.max(self.bits);
        let count = 1_u32.checked_shl(u32::from(bits - self.bits)).unwrap_or(u32::MAX);
        let first = u32::from(self.address);
        (0..count).map(move |n| {
            let offset = n.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            Self { address: Ipv4Addr::from(first | offset), bits }
        })
    }

    /// Its nth address, from 0.
    pub fn nth(self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.address).saturating_add(n))
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bits {
            32 => self.address.fmt(f),
            bits => write!(f, "{}/{bits}", self.address),
        }
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Net(net) => net.fmt(f)?,
            Host::Name(name) => f.write_str(name)?,
        }
        match self.port {
            None => Ok(()),
            Some(Port { protocol: Protocol::Tcp, number }) => write!(f, ":{number}"),
            Some(Port { protocol: Protocol::Udp, number }) => write!(f, ":{number}/udp"),
        }
    }
}

impl TryFrom<String> for Reach {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl From<Reach> for String {
    fn from(reach: Reach) -> Self {
        reach.to_string()
    }
}

impl TryFrom<String> for Net {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl From<Net> for String {
    fn from(net: Net) -> Self {
        net.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_networks_and_names_are_read_and_shown_alike() {
        for text in [
            "10.0.0.5",
            "10.0.0.5:6379",
            "10.0.0.5:53/udp",
            "192.168.1.0/24",
            "192.168.1.0/24:502",
            "redis.site:6379",
            "*.example.com",
            "broker",
            "0.0.0.0/0:443",
        ] {
            assert_eq!(Reach::parse(text).map(|reach| reach.to_string()), Ok(text.to_owned()));
        }
        assert_eq!(Reach::parse("Redis.Site.:6379/tcp").map(|r| r.to_string()), Ok("redis.site:6379".into()));
        for (bad, why) in [
            ("", "no host"),
            ("10.0.0", "no IPv4 address"),
            ("10.0.0.256", "no IPv4 address"),
            ("10.0.0.5/24", "10.0.0.0/24 is meant"),
            ("10.0.0.0/33", "from 0 to 32"),
            ("host:0", "1 to 65535"),
            ("host:65536", "1 to 65535"),
            ("host:80/sctp", "tcp and udp"),
            ("fd00::1", "IPv4 alone"),
            ("[::1]:80", "IPv4 alone"),
            ("a b", "no host"),
            ("*", "no host"),
            ("a.*.b", "no host"),
            ("a..b", "no host"),
            ("http://host", "tcp and udp"),
        ] {
            let told = Reach::parse(bad).expect_err(bad);
            assert!(told.contains(why), "{bad}: {told}");
        }
    }

    #[test]
    fn a_name_is_that_name_and_a_star_is_every_name_below() {
        let names = |reach: &str, name: &str| Reach::parse(reach).expect("good").names(name);

        assert!(names("redis.site", "redis.site") && names("redis.site:6379", "redis.site"));
        assert!(!names("redis.site", "a.redis.site") && !names("redis.site", "xredis.site"));
        assert!(names("*.site", "redis.site") && names("*.site", "a.b.site"));
        assert!(!names("*.site", "site") && !names("*.site", ".site") && !names("*.site", "website"));
        assert!(!names("10.0.0.5", "10.0.0.5"));
    }

    #[test]
    fn networks_overlap_when_they_share_an_address_and_come_apart_into_parts() {
        let net = |text: &str| Net::parse(text).expect("a good network");

        assert!(net("10.0.0.0/8").overlaps(net("10.213.4.0/22")));
        assert!(net("10.213.4.0/22").overlaps(net("10.213.5.7")));
        assert!(!net("10.213.4.0/22").overlaps(net("10.213.8.0/22")));
        assert!(net("0.0.0.0/0").overlaps(net("10.0.0.1")));
        let parts: Vec<String> = net("10.213.0.0/16").parts(22).map(|net| net.to_string()).collect();
        assert_eq!(
            (parts.len(), parts[1].as_str(), parts[63].as_str()),
            (64, "10.213.4.0/22", "10.213.252.0/22")
        );
        assert_eq!(net("10.1.2.0/24").parts(22).collect::<Vec<_>>(), [net("10.1.2.0/24")]);
        assert_eq!(net("10.1.2.0/24").nth(255), Ipv4Addr::new(10, 1, 2, 255));
    }
}
