//! The rules of a way out, as nf_tables takes them: a batch at a time, all of it or nothing.
//!
//! ```text
//! table inet neap_2f81c0          of the launcher's socket: nobody else's to flush while that is open
//!   set placed                    each line with its instance's address
//!   set counted                   instances that have connections, each with how many
//!   map outward, inward           an instance's address → its revision's chain
//!   set fenced                    bridges of containers
//!   chain prerouting              from a line: its own address alone, and nothing of DHCP
//!                                 from elsewhere: no instance's address
//!   chain input                   from an instance to the node: inward, else refused
//!   chain forward                 from an instance: never to another's line; outward, else refused
//!                                 both: no more connections than an instance may have
//!                                 to an instance: answers alone
//!   chain postrouting             from instances: masqueraded
//!   chain out_1, in_1             one revision's `allow.to`; what it doesn't accept comes back and is refused
//!   set host_1, port_1            what its names were found to be
//!   set opened, bridged           while forwarding is on for instances alone (forwarding.rs)
//!   chain guard                   from those interfaces to instances, nowhere else
//! table inet neap_2f81c0_guard    the same two sets and chain, for when the launcher is gone
//! ```
//!
//! Who an instance is, is decided once, before routing and before connections are tracked, by line
//! and address together. The kernel's own check of sources (rp_filter) wouldn't do: it is the
//! laxer of what the interface and the machine have, and systemd makes it lax.
//!
//! What is here can't let through what other tables drop: an accept ends a table, a drop all.

use super::expressions::{EQUAL, META_IN_NAME, META_OUT_NAME, NOT_EQUAL, protocol};
use crate::model::reach::{Host, Net, Port, Protocol, Reach};
use crate::runtime::netlink::{CREATE, Message, attributes, text};
use std::net::Ipv4Addr;

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h, linux/netfilter.h
const NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const DELETE_SET: u16 = 11;
const NEW_ELEMENT: u16 = 12;
const DELETE_ELEMENT: u16 = 14;
const INET: u8 = 1;
const APPEND: u16 = 0x800;

/// NFT_TABLE_F_OWNER (Linux 5.12).
const OWNED: u32 = 2;
/// NFT_TABLE_F_PERSIST (Linux 6.9): when its owner is gone the table stays, as nobody's.
const PERSISTENT: u32 = 4;
const PRE_ROUTING: u32 = 0;
const LOCAL_IN: u32 = 1;
pub const FORWARD: u32 = 2;
pub const POST_ROUTING: u32 = 4;
/// Before connections are tracked.
const RAW_PRIORITY: i32 = -300;
const FILTER_PRIORITY: i32 = 0;
const SOURCE_NAT_PRIORITY: i32 = 100;

const DROP: i32 = 0;
const ACCEPT: i32 = 1;
const JUMP: i32 = -3;
const RETURN: i32 = -5;

const NAME_BYTES: usize = 16;
/// What nft(8) calls the types of keys; the kernel keeps them for it.
const TYPE_ADDRESS: u32 = 7;
const TYPE_NAME: u32 = 41;
/// ifname . ipv4_addr and ifname . ifname.
const TYPE_NAME_AND_ADDRESS: u32 = 41 << 6 | 7;
const TYPE_NAMES: u32 = 41 << 6 | 41;
/// ipv4_addr . inet_proto . inet_service, six bits each.
const TYPE_ADDRESS_AND_PORT: u32 = 7 << 12 | 12 << 6 | 13;

const SET_IS_MAP: u32 = 8;
/// Rules add to it (NFT_SET_EVAL).
const SET_IS_DYNAMIC: u32 = 32;
const VERDICT_TYPE: u32 = 0xffff_ff00;

/// A DHCP client of the node's that took a line for a network would be told by an instance where
/// the node's packets go.
const DHCP: [u16; 2] = [67, 68];

/// Every line of any node on this machine begins so. As other veth interfaces of containers do,
/// which systemd-networkd and others therefore leave alone: `neap…` they would ask for DHCP.
pub const LINES: &str = "vethneap";

/// What a name leads to.
pub type Found = (Ipv4Addr, Option<Port>);

/// A batch in the making.
pub struct Batch {
    table: String,
    messages: Vec<Message>,
    sets: u32,
}

/// A rule's expressions.
type Expressions = fn(Message) -> Message;

impl Batch {
    pub fn new(table: &str) -> Self {
        let begin = Message::new(BATCH_BEGIN, 0, &[0, 0, 0, NFTABLES as u8]);
        Self { table: table.to_owned(), messages: vec![begin], sets: 0 }
    }

    pub fn finish(mut self) -> Vec<Message> {
        self.messages.push(Message::new(BATCH_END, 0, &[0, 0, 0, NFTABLES as u8]));
        self.messages
    }

    fn push(&mut self, kind: u16, flags: u16, fill: impl FnOnce(Message, &str) -> Message) {
        let message = Message::new(NFTABLES << 8 | kind, flags, &[INET, 0, 0, 0]);
        self.messages.push(fill(message, &self.table));
    }

    fn table(&mut self, flags: u32) {
        self.push(NEW_TABLE, CREATE, |m, table| m.text(1, table).number(2, flags));
    }

    /// One that is nobody's. Made when it isn't there, so that this can't fail for that.
    pub fn delete_left_table(&mut self) {
        self.table(0);
        self.delete_table();
    }

    pub fn delete_table(&mut self) {
        self.push(DELETE_TABLE, 0, |m, table| m.text(1, table));
    }

    fn chain(&mut self, name: &str) {
        self.push(NEW_CHAIN, CREATE, |m, table| m.text(1, table).text(3, name));
    }

    fn base_chain(&mut self, name: &str, kind: &str, hook: u32, priority: i32) {
        self.push(NEW_CHAIN, CREATE, |m, table| {
            m.text(1, table)
                .text(3, name)
                .nested(4, |hooked| hooked.number(1, hook).number(2, priority as u32))
                .number(5, ACCEPT as u32)
                .text(7, kind)
        });
    }

    fn set(&mut self, name: &str, kind: u32, bytes: u32, elements_max: u32) {
        self.set_with(0, name, kind, bytes, elements_max);
    }

    fn set_with(&mut self, flags: u32, name: &str, kind: u32, bytes: u32, elements_max: u32) {
        self.sets += 1;
        let id = self.sets;
        self.push(NEW_SET, CREATE, |m, table| {
            m.text(1, table)
                .text(2, name)
                .number(3, flags)
                .number(4, kind)
                .number(5, bytes)
                .nested(9, |described| described.number(1, elements_max))
                .number(10, id)
        });
    }

    fn verdict_map(&mut self, name: &str, elements_max: u32) {
        self.sets += 1;
        let id = self.sets;
        self.push(NEW_SET, CREATE, |m, table| {
            m.text(1, table)
                .text(2, name)
                .number(3, SET_IS_MAP)
                .number(4, TYPE_ADDRESS)
                .number(5, 4)
                .number(6, VERDICT_TYPE)
                .nested(9, |described| described.number(1, elements_max))
                .number(10, id)
        });
    }

    fn rule(&mut self, chain: &str, fill: impl FnOnce(Message) -> Message) {
        self.push(NEW_RULE, CREATE | APPEND, |m, table| m.text(1, table).text(2, chain).nested(4, fill));
    }

    fn element(&mut self, kind: u16, set: &str, fill: impl FnOnce(Message) -> Message) {
        let flags = if kind == NEW_ELEMENT { CREATE } else { 0 };
        self.push(kind, flags, |m, table| {
            m.text(1, table).text(2, set).nested(3, |elements| elements.nested(1, fill))
        });
    }

    /// The node's own table, as long as nothing has a way out yet.
    pub fn begin(&mut self, lines: &str, range: Net, addresses_max: u32, offered: Offered) {
        let refuse = offered.refuse.expressions();
        self.table(if offered.persists { OWNED | PERSISTENT } else { OWNED });
        self.verdict_map("outward", addresses_max);
        self.verdict_map("inward", addresses_max);
        self.set("placed", TYPE_NAME_AND_ADDRESS, NAME_BYTES as u32 + 4, addresses_max);
        self.set("fenced", TYPE_NAME, NAME_BYTES as u32, FENCED_MAX);
        self.base_chain("prerouting", "filter", PRE_ROUTING, RAW_PRIORITY);
        self.rule("prerouting", |m| m.from(lines).family(NOT_EQUAL).verdict(DROP));
        self.rule("prerouting", |m| m.from(lines).placed_nowhere("placed").verdict(DROP));
        // A line that somebody gave another name, which the rules below wouldn't know.
        self.rule("prerouting", |m| {
            let elsewhere = m.ipv4().source().within(range).meta(META_IN_NAME).compare(NOT_EQUAL, b"lo\0");
            elsewhere.compare(NOT_EQUAL, lines.as_bytes()).verdict(DROP)
        });
        for number in DHCP {
            let port = Port { protocol: Protocol::Udp, number };
            self.rule("prerouting", |m| m.from(lines).at_port(port).verdict(DROP));
        }
        self.guard_chain();
        if offered.connections_max.is_some() {
            self.set_with(SET_IS_DYNAMIC, "counted", TYPE_ADDRESS, 4, addresses_max);
        }
        self.base_chain("input", "filter", LOCAL_IN, FILTER_PRIORITY);
        self.bound("input", lines, offered);
        self.rule("input", |m| m.from(lines).ipv4().source().decided_by("inward"));
        self.rule("input", |m| refuse(m.from(lines)));
        self.base_chain("forward", "filter", FORWARD, FILTER_PRIORITY);
        self.bound("forward", lines, offered);
        self.rule("forward", |m| refuse(m.from(lines).to(LINES, EQUAL)));
        self.rule("forward", |m| m.from(lines).ipv4().source().decided_by("outward"));
        self.rule("forward", |m| refuse(m.from(lines)));
        self.rule("forward", |m| m.to(lines, EQUAL).answering().verdict(ACCEPT));
        self.rule("forward", |m| m.to(lines, EQUAL).verdict(DROP));
        self.base_chain("postrouting", "nat", POST_ROUTING, SOURCE_NAT_PRIORITY);
        self.rule("postrouting", |m| m.to(LINES, NOT_EQUAL).ipv4().source().within(range).masqueraded());
    }

    /// A connection too many is refused. Looked at once for each, by its first packet.
    fn bound(&mut self, chain: &str, lines: &str, offered: Offered) {
        let refuse = offered.refuse.expressions();
        if let Some(max) = offered.connections_max {
            self.rule(chain, |m| refuse(m.from(lines).ipv4().beginning().source().beyond(max)));
        }
    }

    /// One rule in a table that is gone when the batch is done: what it takes, the kernel has.
    pub fn try_rule(&mut self, kind: &str, hook: u32, fill: impl FnOnce(Message) -> Message) {
        self.table(0);
        self.set_with(SET_IS_DYNAMIC, "counted", TYPE_ADDRESS, 4, 1);
        self.base_chain("try", kind, hook, FILTER_PRIORITY);
        self.rule("try", fill);
        self.delete_table();
    }

    /// A revision's chains. `to` is empty: everywhere, outwards.
    pub fn policy(&mut self, number: u64, to: &[Reach]) {
        let (out, inside) = (format!("out_{number}"), format!("in_{number}"));
        self.chain(&out);
        let is_named = |reach: &&Reach| matches!(reach.host, Host::Net(net) if net.bits == 32);
        if to.iter().any(|reach| is_named(&reach)) {
            self.chain(&inside);
        }
        // The node itself, containers beside it and link-local hosts: by their own address alone.
        for reach in to.iter().filter(is_named) {
            self.accept(&out, reach);
            self.accept(&inside, reach);
        }
        for special in ["169.254.0.0/16", "224.0.0.0/3"] {
            if let Ok(net) = Net::parse(special) {
                self.rule(&out, |m| m.destination().within(net).verdict(RETURN));
            }
        }
        self.rule(&out, |m| m.meta(META_OUT_NAME).found_in("fenced").verdict(RETURN));
        if to.is_empty() {
            self.rule(&out, |m| m.verdict(ACCEPT));
        }
        for reach in to.iter().filter(|reach| !is_named(reach)) {
            self.accept(&out, reach);
        }
        if to.iter().any(|reach| matches!(reach.host, Host::Name(_))) {
            let (hosts, ports) = (format!("host_{number}"), format!("port_{number}"));
            self.set(&hosts, TYPE_ADDRESS, 4, FOUND_MAX);
            self.set(&ports, TYPE_ADDRESS_AND_PORT, 12, FOUND_MAX);
            self.rule(&out, |m| m.destination().found_in(&hosts).verdict(ACCEPT));
            self.rule(&out, |m| m.destination().and_port().found_in(&ports).verdict(ACCEPT));
        }
    }

    fn accept(&mut self, chain: &str, reach: &Reach) {
        let Host::Net(net) = reach.host else { return };
        let there = |m: Message| m.destination().within(net);
        match reach.port {
            None => self.rule(chain, |m| there(m).verdict(ACCEPT)),
            Some(port) => self.rule(chain, |m| there(m).at_port(port).verdict(ACCEPT)),
        }
    }

    /// After the last instance of the revision has gone.
    pub fn delete_policy(&mut self, number: u64, to: &[Reach]) {
        let mut chains = vec![format!("out_{number}")];
        if leads_inward(to) {
            chains.push(format!("in_{number}"));
        }
        for chain in &chains {
            self.push(DELETE_CHAIN, 0, |m, table| m.text(1, table).text(3, chain));
        }
        if to.iter().any(|reach| matches!(reach.host, Host::Name(_))) {
            for set in [format!("host_{number}"), format!("port_{number}")] {
                self.push(DELETE_SET, 0, |m, table| m.text(1, table).text(2, &set));
            }
        }
    }

    /// A line's address is its revision's from now on.
    pub fn assign(&mut self, line: &str, address: Ipv4Addr, number: u64, inward: bool) {
        self.element(NEW_ELEMENT, "placed", placed(line, address));
        let entry = |chain: String| {
            move |m: Message| {
                let verdict =
                    |data: Message| data.nested(2, |verdict| verdict.number(1, JUMP as u32).text(2, &chain));
                m.nested(1, |key| key.attribute(1, &address.octets())).nested(2, verdict)
            }
        };
        self.element(NEW_ELEMENT, "outward", entry(format!("out_{number}")));
        if inward {
            self.element(NEW_ELEMENT, "inward", entry(format!("in_{number}")));
        }
    }

    pub fn withdraw(&mut self, line: &str, address: Ipv4Addr, inward: bool) {
        self.element(DELETE_ELEMENT, "placed", placed(line, address));
        for map in ["outward", "inward"].into_iter().take(if inward { 2 } else { 1 }) {
            self.element(DELETE_ELEMENT, map, |m| m.nested(1, |key| key.attribute(1, &address.octets())));
        }
    }

    /// What a revision's names lead to, or no longer do.
    pub fn found(&mut self, number: u64, (address, port): Found, is_new: bool) {
        let kind = if is_new { NEW_ELEMENT } else { DELETE_ELEMENT };
        let mut key = address.octets().to_vec();
        let set = match port {
            None => format!("host_{number}"),
            Some(port) => {
                key.extend([protocol(port.protocol), 0, 0, 0]);
                key.extend(port.number.to_be_bytes());
                key.extend([0, 0]);
                format!("port_{number}")
            }
        };
        self.element(kind, &set, |m| m.nested(1, |data| data.attribute(1, &key)));
    }

    /// An interface's name, into a set or out of it.
    pub fn interface(&mut self, set: &str, name: &str, is_new: bool) {
        let kind = if is_new { NEW_ELEMENT } else { DELETE_ELEMENT };
        self.element(kind, set, |m| m.nested(1, |data| data.attribute(1, &padded(name))));
    }

    /// An interface that forwarding was turned on for, or no longer is.
    pub fn opened(&mut self, name: &str, is_bridge: bool, is_new: bool) {
        self.interface("opened", name, is_new);
        if is_bridge {
            let kind = if is_new { NEW_ELEMENT } else { DELETE_ELEMENT };
            let key = [padded(name), padded(name)].concat();
            self.element(kind, "bridged", |m| m.nested(1, |data| data.attribute(1, &key)));
        }
    }

    /// The guard's own table. Not owned: it has to outlive whoever turned forwarding on.
    pub fn guard(&mut self) {
        self.table(0);
        self.guard_chain();
    }

    /// What an opened interface brings goes to instances alone. IPv6 is none of its business, and
    /// what a bridge passes from port to port isn't routed, though br_netfilter shows it here.
    fn guard_chain(&mut self) {
        self.set("opened", TYPE_NAME, NAME_BYTES as u32, OPENED_MAX);
        self.set("bridged", TYPE_NAMES, 2 * NAME_BYTES as u32, OPENED_MAX);
        self.base_chain("guard", "filter", FORWARD, FILTER_PRIORITY);
        self.rule("guard", |m| m.ipv4().in_and_out_found_in("bridged").verdict(ACCEPT));
        self.rule("guard", |m| {
            m.ipv4().meta(META_IN_NAME).found_in("opened").to(LINES, NOT_EQUAL).verdict(DROP)
        });
    }
}

fn placed(line: &str, address: Ipv4Addr) -> impl FnOnce(Message) -> Message {
    let key = [padded(line).as_slice(), &address.octets()].concat();
    move |m| m.nested(1, |data| data.attribute(1, &key))
}

/// Interfaces that containers hang on, and those of the node; neither has more.
const FENCED_MAX: u32 = 1024;
pub const OPENED_MAX: u32 = 1024;
/// Addresses that a revision's names were found to have, with their ports. Beyond, the oldest
/// are forgotten.
pub const FOUND_MAX: u32 = 512;

/// Whether something of it is an address that the node itself may have.
pub fn leads_inward(to: &[Reach]) -> bool {
    to.iter().any(|reach| matches!(reach.host, Host::Net(net) if net.bits == 32))
}

/// What not every kernel offers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Offered {
    /// The rules stay for as long as what they are for, whoever is killed.
    pub persists: bool,
    pub refuse: Refuse,
    /// Of an instance at once; `None`: they can't be counted.
    pub connections_max: Option<u32>,
}

/// How a function is told that it may not.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Refuse {
    /// At once, by ICMP: connecting fails instead of waiting.
    Answer,
    /// Where the kernel has no reject.
    Silently,
}

impl Refuse {
    fn expressions(self) -> Expressions {
        match self {
            Self::Answer => Message::rejected,
            Self::Silently => |m| m.verdict(DROP),
        }
    }
}

/// Asks for a table: not found, where there is none.
pub fn table(name: &str) -> Message {
    Message::new(NFTABLES << 8 | GET_TABLE, 0, &[INET, 0, 0, 0]).text(1, name)
}

/// Whether a message that the kernel sends of its own accord says that a table is no more.
pub fn says_deleted(kind: u16, body: &[u8], name: &str) -> bool {
    let named = |(kind, value): (u16, &[u8])| kind == 1 && text(value) == name;
    kind == NFTABLES << 8 | DELETE_TABLE && attributes(body.get(4..).unwrap_or_default()).any(named)
}

fn padded(name: &str) -> [u8; NAME_BYTES] {
    let mut bytes = [0; NAME_BYTES];
    let length = name.len().min(NAME_BYTES - 1);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}
