//! Other firewalls on the node. One that drops what is forwarded (docker's, ufw's, firewalld's)
//! drops what instances send, too, and nobody tells them: an accept of ours is none of theirs. It
//! isn't for neap to change what somebody else has decided, but to say it.
//!
//! Seen are chains of nf_tables, iptables' own among them, and the iptables of before
//! (`iptables-legacy`). One drops by its policy, or by a last rule that applies to everything; one
//! whose table has a rule about lines has been told what to do with them.

use super::ruleset::{FORWARD, LINES};
use crate::runtime::netlink::{Message, Socket, attributes, text};
use crate::runtime::sys;
use std::collections::HashMap;
use std::fs;
use std::io;

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const NFTABLES: u16 = 10;
const GET_CHAIN: u16 = 4;
const GET_RULE: u16 = 7;
const INET: u8 = libc::NFPROTO_INET as u8;
const IPV4: u8 = libc::NFPROTO_IPV4 as u8;
const DROP: u32 = 0;

/// A chain that drops what instances send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hindrance {
    /// `ip filter FORWARD`
    pub chain: String,
    pub advice: String,
}

struct Chain {
    family: u8,
    table: String,
    name: String,
    drops: bool,
}

/// What drops instances' packets in this network namespace. What can't be read hinders nobody.
pub fn hindrances() -> Vec<Hindrance> {
    let mut found = in_nf_tables().unwrap_or_default();
    // Asking the kernel for a table makes it.
    let tables = fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
    let has_filter = tables.lines().any(|table| table == "filter");
    if has_filter && sys::legacy_iptables().is_ok_and(|(entries, policy)| legacy_drops(&entries, policy)) {
        found.push(Hindrance {
            chain: "FORWARD of iptables-legacy".to_owned(),
            advice: by_iptables("iptables-legacy", "FORWARD"),
        });
    }
    found
}

fn in_nf_tables() -> io::Result<Vec<Hindrance>> {
    let netfilter = Socket::netfilter()?;
    let mut chains = Vec::new();
    let all = Message::new(NFTABLES << 8 | GET_CHAIN, 0, &[0; 4]);
    netfilter.list(all, |_, body| chains.extend(forwarding_chain(body)))?;
    chains.retain(|chain| [INET, IPV4].contains(&chain.family) && !chain.table.starts_with("neap_"));
    let mut found = Vec::new();
    for mut chain in chains {
        let Told { knows_lines, has_docker, lasts } = rules(&netfilter, &chain)?;
        chain.drops |= lasts.get(&chain.name) == Some(&true);
        if chain.drops && !knows_lines {
            found.push(chain.hindrance(has_docker));
        }
    }
    Ok(found)
}

/// A chain that sees what is forwarded.
fn forwarding_chain(body: &[u8]) -> Option<Chain> {
    let mut chain = Chain { family: *body.first()?, table: String::new(), name: String::new(), drops: false };
    let mut hook = None;
    for (kind, value) in attributes(body.get(4..)?) {
        match kind {
            1 => chain.table = text(value),
            3 => chain.name = text(value),
            4 => hook = attributes(value).find(|(kind, _)| *kind == 1).and_then(|(_, value)| number(value)),
            5 => chain.drops = number(value) == Some(DROP),
            _ => {}
        }
    }
    (hook == Some(FORWARD)).then_some(chain)
}

/// What a table's rules tell.
#[derive(Default)]
struct Told {
    knows_lines: bool,
    has_docker: bool,
    /// Whether each chain's last rule refuses everything.
    lasts: HashMap<String, bool>,
}

fn rules(netfilter: &Socket, chain: &Chain) -> io::Result<Told> {
    let mut told = Told::default();
    let of_table = Message::new(NFTABLES << 8 | GET_RULE, 0, &[chain.family, 0, 0, 0]).text(1, &chain.table);
    netfilter.list(of_table, |_, body| {
        let body = body.get(4..).unwrap_or_default();
        let mut at = String::new();
        for (kind, value) in attributes(body) {
            match kind {
                2 => at = text(value),
                4 => {
                    told.knows_lines |= names_lines(value);
                    told.lasts.insert(at.clone(), refuses_all(value));
                }
                _ => {}
            }
        }
        told.has_docker |= at == DOCKER;
    })?;
    Ok(told)
}

/// Whether a rule's first expression that decides is a refusal.
fn refuses_all(expressions: &[u8]) -> bool {
    for (_, expression) in attributes(expressions) {
        let mut name = String::new();
        let mut data: &[u8] = &[];
        for (kind, value) in attributes(expression) {
            match kind {
                1 => name = text(value),
                2 => data = value,
                _ => {}
            }
        }
        match name.as_str() {
            "counter" | "log" => {}
            "reject" => return true,
            "immediate" => return verdict(data) == Some(DROP),
            _ => return false,
        }
    }
    false
}

/// Whether a table's entries say nothing of lines, and the policy at `policy` is to drop: a
/// `struct ipt_entry`, whose target at its offset is a `struct xt_standard_target`.
fn legacy_drops(entries: &[u8], policy: usize) -> bool {
    const TARGET_OFFSET: usize = 88;
    const VERDICT: usize = 32;
    const DROPPED: i32 = -1;
    let verdict = || {
        let entry = entries.get(policy..)?;
        let target = u16::from_ne_bytes(entry.get(TARGET_OFFSET..TARGET_OFFSET + 2)?.try_into().ok()?);
        let at = target as usize + VERDICT;
        Some(i32::from_ne_bytes(entry.get(at..at + 4)?.try_into().ok()?))
    };
    verdict() == Some(DROPPED) && !names_lines(entries)
}

fn names_lines(bytes: &[u8]) -> bool {
    bytes.windows(LINES.len()).any(|part| part == LINES.as_bytes())
}

fn verdict(immediate: &[u8]) -> Option<u32> {
    let inner = |bytes, kind| attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value);
    number(inner(inner(inner(immediate, 2)?, 2)?, 1)?)
}

fn number(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

/// Where docker leaves room for others' rules.
const DOCKER: &str = "DOCKER-USER";

impl Chain {
    fn hindrance(&self, has_docker: bool) -> Hindrance {
        let Self { table, name, .. } = self;
        let family = if self.family == INET { "inet" } else { "ip" };
        let advice = match (family, table.as_str(), name.as_str()) {
            ("ip", "filter", "FORWARD") => by_iptables("iptables", if has_docker { DOCKER } else { name }),
            _ => {
                let insert = format!("nft insert rule {family} {table} {name}");
                format!(
                    "let it pass what comes from and goes to functions, in its own configuration or by \
                     `{insert} iifname \"{LINES}*\" accept` and `{insert} oifname \"{LINES}*\" accept`"
                )
            }
        };
        Hindrance { chain: format!("{family} {table} {name}"), advice }
    }
}

fn by_iptables(program: &str, chain: &str) -> String {
    format!(
        "let it pass what comes from and goes to functions: `{program} -I {chain} -i {LINES}+ -j ACCEPT` and \
         `{program} -I {chain} -o {LINES}+ -j ACCEPT`, at every boot"
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::alone;
    use super::*;
    use std::process::Command;

    #[test]
    fn iptables_of_before_are_asked_too() {
        alone(|| {
            let run = |line: &str| {
                let line = format!("PATH=$PATH:/usr/sbin:/sbin; {line}");
                Command::new("sh").args(["-c", &line]).status().is_ok_and(|status| status.success())
            };
            assert_eq!(hindrances(), []);
            if !run("iptables-legacy -P FORWARD DROP") {
                eprintln!("skipped: no iptables-legacy, or none in this kernel");
                return;
            }
            let [found] = <[Hindrance; 1]>::try_from(hindrances()).expect("one");
            assert_eq!(found.chain, "FORWARD of iptables-legacy");

            for command in found.advice.split('`').filter(|part| part.starts_with("iptables-legacy")) {
                assert!(run(command), "{command}");
            }
            assert_eq!(hindrances(), []);
            assert!(run("iptables-legacy -F; iptables-legacy -P FORWARD ACCEPT"));
            assert_eq!(hindrances(), []);
        });
    }

    #[test]
    fn broken_entries_hinder_nobody() {
        assert!(!legacy_drops(&[], 0) && !legacy_drops(&[0xff; 100], 0) && !legacy_drops(&[0; 200], 1 << 40));
    }

    #[test]
    fn who_drops_what_is_forwarded_is_told_until_it_lets_lines_pass() {
        alone(|| {
            let nft = |rules: &str| {
                let line = "PATH=$PATH:/usr/sbin:/sbin; exec nft \"$1\"";
                let done = Command::new("sh").args(["-c", line, "-", rules]).status();
                done.is_ok_and(|status| status.success())
            };
            if !nft("list tables") {
                eprintln!("skipped: no nft");
                return;
            }
            let chains = || hindrances().into_iter().map(|found| found.chain).collect::<Vec<_>>();
            assert_eq!(chains(), Vec::<String>::new());

            for rules in [
                "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }",
                "add chain ip filter DOCKER-USER; add rule ip filter DOCKER-USER counter return",
                "add table inet fire; add chain inet fire onward { type filter hook forward priority 10; }",
                "add rule inet fire onward ct state established accept; add rule inet fire onward counter reject",
                "add table inet plain; add chain inet plain onward { type filter hook forward priority 20; }",
                "add rule inet plain onward iifname eth9 drop; add rule inet plain onward tcp dport 1 drop",
                "add table inet inward; add chain inet inward in { type filter hook input priority 0; policy drop; }",
                "add table ip6 six; add chain ip6 six onward { type filter hook forward priority 0; policy drop; }",
            ] {
                assert!(nft(rules), "{rules}");
            }
            assert_eq!(chains(), ["ip filter FORWARD", "inet fire onward"]);
            let advices: Vec<String> = hindrances().into_iter().map(|found| found.advice).collect();
            assert!(advices[0].contains("iptables -I DOCKER-USER -i vethneap+ -j ACCEPT"), "{advices:?}");

            // What is advised for the other, word for word.
            for rule in advices[1].split('`').filter_map(|part| part.strip_prefix("nft ")) {
                assert!(nft(rule), "{rule}");
            }
            assert_eq!(chains(), ["ip filter FORWARD"]);
        });
    }
}
