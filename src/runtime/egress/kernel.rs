//! What a way out asks of the kernel: found out by trying, part by part, so that what is missing
//! can be named. What is vital refuses functions with a way out; without the rest they run.

use super::ruleset::{Batch, FORWARD, Offered, POST_ROUTING, Refuse};
use crate::runtime::netlink::{Message, Socket};
use std::fs;

/// Connections of an instance at once: a server under load and its database. Where the node tracks
/// few for everybody (4096 with 512 MiB of memory), a sixteenth of those.
const CONNECTIONS_MAX: u32 = 512;
const CONNECTIONS_SHARE: u32 = 16;
const CONNECTIONS_MIN: u32 = 32;
/// Where the kernel doesn't say how many it tracks.
const CONNECTIONS_UNKNOWN: u32 = 256;

/// A part of the kernel.
pub struct Part {
    /// As it is built.
    pub option: &'static str,
    /// As it is loaded.
    pub module: &'static str,
    /// What goes without; `None`: no way out.
    pub without: Option<&'static str>,
    chain: (&'static str, u32),
    rule: fn(Message) -> Message,
}

const FILTER: (&str, u32) = ("filter", FORWARD);
const NAT: (&str, u32) = ("nat", POST_ROUTING);

/// Those before it are needed for one to be tried.
const PARTS: [Part; 6] = [
    Part {
        option: "CONFIG_NF_TABLES with CONFIG_NF_TABLES_INET",
        module: "nf_tables",
        without: None,
        chain: FILTER,
        rule: Message::source,
    },
    Part {
        option: "CONFIG_NFT_CT",
        module: "nft_ct",
        without: None,
        chain: FILTER,
        rule: Message::answering,
    },
    Part {
        option: "CONFIG_NFT_NAT",
        module: "nft_chain_nat",
        without: None,
        chain: NAT,
        rule: Message::source,
    },
    Part {
        option: "CONFIG_NFT_MASQ",
        module: "nft_masq",
        without: None,
        chain: NAT,
        rule: Message::masqueraded,
    },
    Part {
        option: "CONFIG_NFT_REJECT_INET",
        module: "nft_reject_inet",
        without: Some("what is refused is not told so, and waits"),
        chain: FILTER,
        rule: Message::rejected,
    },
    Part {
        option: "CONFIG_NFT_CONNLIMIT",
        module: "nft_connlimit",
        without: Some(
            "a function's connections are not limited, and may fill the node's connection tracking",
        ),
        chain: FILTER,
        rule: |rule| rule.source().beyond(1),
    },
];

impl Part {
    /// Leaves nothing behind.
    fn is_there(&self, netfilter: &Socket) -> bool {
        let mut batch = Batch::new("neap_try");
        batch.try_rule(self.chain.0, self.chain.1, self.rule);
        netfilter.ask_together(batch.finish()).is_ok()
    }
}

/// Parts that aren't there. Without the first there are no others.
pub fn lacking(netfilter: &Socket) -> Vec<&'static Part> {
    absent(netfilter, &PARTS)
}

fn absent<'a>(netfilter: &Socket, parts: &'a [Part]) -> Vec<&'a Part> {
    let mut absent: Vec<&Part> = parts.iter().filter(|part| !part.is_there(netfilter)).collect();
    if absent.len() == parts.len() {
        absent.truncate(1);
    }
    absent
}

/// From all that a kernel can offer to the least that will do.
pub fn offers(netfilter: &Socket) -> Vec<Offered> {
    // Loads the tracking, which then says how much of it there is.
    let counts = lacking(netfilter).iter().all(|part| part.option != "CONFIG_NFT_CONNLIMIT");
    let mut offers = Vec::new();
    for refuse in [Refuse::Answer, Refuse::Silently] {
        for persists in [true, false] {
            offers.push(Offered { persists, refuse, connections_max: counts.then(connections_max) });
        }
    }
    offers
}

fn connections_max() -> u32 {
    let tracked = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max");
    let tracked = tracked.ok().and_then(|text| text.trim().parse().ok());
    share(tracked)
}

fn share(tracked: Option<u32>) -> u32 {
    tracked.map_or(CONNECTIONS_UNKNOWN, |tracked| {
        (tracked / CONNECTIONS_SHARE).clamp(CONNECTIONS_MIN, CONNECTIONS_MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::alone;
    use super::*;

    #[test]
    fn what_a_kernel_lacks_is_named_and_trying_leaves_nothing() {
        alone(|| {
            let netfilter = Socket::netfilter().expect("a socket");
            let unknown = |option| Part {
                option,
                module: "none",
                without: None,
                chain: FILTER,
                rule: |rule| rule.expression("neap-none", |data| data),
            };
            let names = |parts: &[Part]| -> Vec<&str> {
                absent(&netfilter, parts).iter().map(|part| part.option).collect()
            };

            assert!(lacking(&netfilter).iter().all(|part| part.without.is_some()), "this one can");
            let [first, ..] = PARTS;
            assert_eq!(names(&[first, unknown("A"), unknown("B")]), ["A", "B"]);
            assert_eq!(names(&[unknown("A"), unknown("B")]), ["A"], "nothing at all");
            let asked = netfilter.ask(super::super::ruleset::table("neap_try"));
            assert_eq!(asked.expect_err("gone").kind(), std::io::ErrorKind::NotFound);
        });
    }

    #[test]
    fn an_instance_has_a_share_of_what_the_node_tracks() {
        assert_eq!([262_144, 65_536, 4096, 256].map(|tracked| share(Some(tracked))), [512, 512, 256, 32]);
        assert_eq!(share(None), 256);
    }
}
