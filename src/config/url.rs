//! The address of an MQTT broker: `mqtt://host[:port]` or `mqtts://host[:port]`. Nothing else
//! fits into it: credentials in a URL end up in process lists and logs, and MQTT has no path.

use super::defaults::{MQTT_PORT, MQTTS_PORT};
use super::problem::shown;
use std::net::Ipv6Addr;

/// RFC 1035 §2.3.4
const HOST_BYTES_MAX: usize = 253;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// A name, an IPv4 address, or an IPv6 address without its brackets.
    pub host: String,
    pub port: u16,
    pub tls: bool,
}

/// The error is a message for people, with the way out. `uplink`: schemes that the uplink will
/// know are refused by name.
pub(super) fn parse(url: &str, uplink: bool) -> Result<Address, String> {
    let form = "expected mqtt://HOST[:PORT] or mqtts://HOST[:PORT]";
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(format!("{} is no broker's URL; {form}", shown(url)));
    };
    let tls = match scheme {
        "mqtt" => false,
        "mqtts" => true,
        "https" if uplink => return Err("not in this version: an https:// uplink".to_owned()),
        "tcp" => return Err(format!("unknown scheme tcp://; write mqtt://{}", shown_bare(rest))),
        "ssl" | "tls" => return Err(format!("unknown scheme; write mqtts://{}", shown_bare(rest))),
        _ => return Err(format!("unknown scheme {}; {form}", shown(scheme))),
    };
    if rest.contains('@') {
        return Err("credentials don't belong in the URL; use `username` and `password_file`".to_owned());
    }
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if rest.contains(['/', '?', '#']) {
        return Err(format!("a broker's URL ends after the port; {form}"));
    }
    let (host, port) =
        split_port(rest).ok_or_else(|| format!("{} is no broker's URL; {form}", shown(url)))?;
    let port = match port {
        None if tls => MQTTS_PORT,
        None => MQTT_PORT,
        Some(digits) => match digits.parse::<u16>() {
            Ok(port) if port > 0 && digits.bytes().all(|b| b.is_ascii_digit()) => port,
            _ => return Err(format!("{} is no port; expected 1 to 65535", shown(digits))),
        },
    };
    check_host(host)?;
    Ok(Address { host: host.trim_matches(['[', ']']).to_owned(), port, tls })
}

/// The host with its brackets, and what follows the colon; `None` when brackets or colons don't fit.
fn split_port(rest: &str) -> Option<(&str, Option<&str>)> {
    if rest.starts_with('[') {
        let end = rest.find(']')? + 1;
        return match &rest[end..] {
            "" => Some((rest, None)),
            after => after.strip_prefix(':').map(|port| (&rest[..end], Some(port))),
        };
    }
    match rest.split_once(':') {
        Some((host, port)) => Some((host, Some(port))),
        None => Some((rest, None)),
    }
}

fn check_host(host: &str) -> Result<(), String> {
    if let Some(inside) = host.strip_prefix('[') {
        let address = inside.strip_suffix(']').unwrap_or(inside);
        return match address.parse::<Ipv6Addr>() {
            Ok(_) => Ok(()),
            Err(_) => Err(format!("{} is no IPv6 address", shown(address))),
        };
    }
    let label = |label: &str| {
        let good = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        (1..=63).contains(&label.len()) && label.bytes().all(good)
    };
    // One trailing dot makes a name absolute (RFC 1034 §3.1).
    let name = host.strip_suffix('.').unwrap_or(host);
    if name.len() <= HOST_BYTES_MAX && name.split('.').all(label) {
        Ok(())
    } else if host.is_empty() {
        Err("the URL has no host".to_owned())
    } else {
        Err(format!("{} is no host name or address; an IPv6 address stands in brackets", shown(host)))
    }
}

/// For a suggestion that is no quotation.
fn shown_bare(rest: &str) -> String {
    if rest.contains('@') { "HOST:PORT".to_owned() } else { rest.chars().take(80).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: &str, port: u16, tls: bool) -> Result<Address, String> {
        Ok(Address { host: host.to_owned(), port, tls })
    }

    #[test]
    fn brokers_are_named_by_host_and_port() {
        assert_eq!(parse("mqtt://127.0.0.1:1883", false), address("127.0.0.1", 1883, false));
        assert_eq!(parse("mqtt://broker.lan", false), address("broker.lan", 1883, false));
        assert_eq!(parse("mqtts://cloud.example", true), address("cloud.example", 8883, true));
        assert_eq!(parse("mqtts://[fe80::1]:8884/", true), address("fe80::1", 8884, true));
        assert_eq!(parse("mqtt://[::1]", false), address("::1", 1883, false));
    }

    #[test]
    fn what_is_no_broker_is_refused_with_the_way_out() {
        let refused = |url| parse(url, true).expect_err("it must be refused");
        assert!(refused("mqtt://user:secret@h").contains("password_file"));
        assert!(!refused("mqtt://user:secret@h").contains("secret"));
        assert!(!refused("tcp://user:secret@h").contains("secret"));
        assert!(refused("https://h/in").contains("not in this version"));
        assert!(refused("tcp://h:1").contains("mqtt://h:1"));
        let bad = [
            "",
            "broker:1883",
            "http://h",
            "mqtt://",
            "mqtt://h:0",
            "mqtt://h:65536",
            "mqtt://h:+1",
            "mqtt://h:",
            "mqtt://h/topic",
            "mqtt://::1",
            "mqtt://[::1",
            "mqtt://[::1]x",
            "mqtt://[h]:1",
            "mqtt://a b",
            "mqtt://a..b",
        ];
        for url in bad {
            assert!(!refused(url).is_empty(), "{url:?}");
        }
    }
}
