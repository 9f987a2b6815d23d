//! What the machine says of itself, for the default node id. The one place below the adapters
//! that reads files: two small ones, once, at start. Tests pass a `Machine` of their own.

use std::fs;

/// The longest default made of a host name: host names end at 64 bytes on Linux (sethostname(2)).
const HOSTNAME_BYTES_MAX: usize = 64;
/// Of the 32 hex digits in /etc/machine-id: enough to tell gateways apart, and the whole id is
/// not to be shown on a network (machine-id(5)).
const MACHINE_ID_DIGITS: usize = 8;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// `/etc/machine-id`, when it holds one.
    pub machine_id: Option<String>,
    pub hostname: String,
}

impl Machine {
    pub fn read() -> Self {
        let line = |path| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        Self {
            machine_id: line("/etc/machine-id"),
            hostname: line("/proc/sys/kernel/hostname").unwrap_or_default(),
        }
    }

    /// `neap-` and the start of the machine id; without one, the host name. Cloned images carry
    /// the same host name, and two nodes of one id take over each other's MQTT session.
    pub(super) fn node_id(&self) -> String {
        // An image that has not booted yet holds `uninitialized` or nothing (machine-id(5)).
        let hex = |id: &&String| id.len() >= MACHINE_ID_DIGITS && id.bytes().all(|b| b.is_ascii_hexdigit());
        if let Some(id) = self.machine_id.as_ref().filter(hex) {
            return format!("neap-{}", id[..MACHINE_ID_DIGITS].to_ascii_lowercase());
        }
        let keep = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
        let host: String = self.hostname.chars().take(HOSTNAME_BYTES_MAX).map(keep).collect();
        if host.is_empty() { "neap-node".to_owned() } else { format!("neap-{host}") }
    }
}

#[cfg(test)]
mod tests {
    use super::Machine;

    fn node_id(machine_id: Option<&str>, hostname: &str) -> String {
        Machine { machine_id: machine_id.map(str::to_owned), hostname: hostname.to_owned() }.node_id()
    }

    #[test]
    fn node_id_is_the_start_of_the_machine_id_else_the_host_name() {
        assert_eq!(node_id(Some("4C1bd0aeffff00001111222233334444"), "gw"), "neap-4c1bd0ae");
        assert_eq!(node_id(Some("uninitialized"), "gw"), "neap-gw");
        assert_eq!(node_id(Some("abc"), "gw.site/7 é"), "neap-gw.site-7--");
        assert_eq!(node_id(None, ""), "neap-node");
    }
}
