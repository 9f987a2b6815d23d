//! The address of an MQTT broker, `mqtt://host[:port]` or `mqtts://host[:port]`, or of a receiver
//! of batches, `https://host[:port][/path]`. Nothing else fits into it: credentials in a URL end
//! up in process lists and logs, and MQTT has no path.

use super::defaults::{HTTPS_PORT, MQTT_PORT, MQTTS_PORT};
use super::problem::shown;
use std::net::Ipv6Addr;

/// RFC 1035 §2.3.4
const HOST_BYTES_MAX: usize = 253;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Address {
    /// A name, an IPv4 address, or an IPv6 address without its brackets.
    pub host: String,
    pub port: u16,
    pub tls: bool,
}

/// A path and a query of an uplink; receivers bound what they take at about as much.
const TARGET_BYTES_MAX: usize = 2048;

/// `https://host[:port][/path][?query]`, and what comes behind the port.
pub(super) fn parse_https(url: &str) -> Result<(Address, String), String> {
    let form = "expected https://HOST[:PORT][/PATH]";
    let Some(rest) = url.strip_prefix("https://") else {
        return Err(format!("{} is no receiver's URL; {form}", shown(url)));
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, target) = rest.split_at(end);
    if authority.contains('@') {
        return Err(
            "credentials don't belong in the URL; use `token_file`, or `username` and `password_file`"
                .to_owned(),
        );
    }
    if target.len() > TARGET_BYTES_MAX
        || target.contains('#')
        || !target.bytes().all(|b| b.is_ascii_graphic())
    {
        return Err(format!(
            "a path is at most {TARGET_BYTES_MAX} bytes, without `#`; write odd characters as %XX"
        ));
    }
    let (host, port) =
        split_port(authority).ok_or_else(|| format!("{} is no receiver's URL; {form}", shown(url)))?;
    let port = port_of(port, HTTPS_PORT)?;
    check_host(host)?;
    let address = Address { host: host.trim_matches(['[', ']']).to_owned(), port, tls: true };
    let target = if target.starts_with('/') { target.to_owned() } else { format!("/{target}") };
    Ok((address, target))
}

fn port_of(port: Option<&str>, default: u16) -> Result<u16, String> {
    let Some(digits) = port else { return Ok(default) };
    match digits.parse::<u16>() {
        Ok(port) if port > 0 && digits.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
        _ => Err(format!("{} is no port; expected 1 to 65535", shown(digits))),
    }
}

/// The error is a message for people, with the way out. `uplink`: its other scheme is named.
pub(super) fn parse(url: &str, uplink: bool) -> Result<Address, String> {
    let form = match uplink {
        true => "expected mqtt://HOST[:PORT], mqtts://HOST[:PORT] or https://HOST[:PORT][/PATH]",
        false => "expected mqtt://HOST[:PORT] or mqtts://HOST[:PORT]",
    };
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(format!("{} is no broker's URL; {form}", shown(url)));
    };
    let tls = match scheme {
        "mqtt" => false,
        "mqtts" => true,
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
    let port = port_of(port, if tls { MQTTS_PORT } else { MQTT_PORT })?;
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
    fn receivers_have_a_path() {
        let good = |url: &str| parse_https(url).expect("a good URL");
        assert_eq!(good("https://h"), (address("h", 443, true).expect("an address"), "/".to_owned()));
        assert_eq!(good("https://[::1]:8443/in/x?key=1").0, address("::1", 8443, true).expect("an address"));
        assert_eq!(good("https://[::1]:8443/in/x?key=1").1, "/in/x?key=1");
        assert_eq!(good("https://h?k=%20").1, "/?k=%20");
        for bad in ["https://", "https://h:0/", "https://h/a b", "https://h/#x", "https://a..b/"] {
            assert!(parse_https(bad).is_err(), "{bad}");
        }
        let error = parse_https("https://user:secret@h/in").expect_err("credentials");
        assert!(error.contains("token_file") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn what_is_no_broker_is_refused_with_the_way_out() {
        let refused = |url| parse(url, true).expect_err("it must be refused");
        assert!(refused("mqtt://user:secret@h").contains("password_file"));
        assert!(!refused("mqtt://user:secret@h").contains("secret"));
        assert!(!refused("tcp://user:secret@h").contains("secret"));
        assert!(refused("http://h").contains("https://HOST"));
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
