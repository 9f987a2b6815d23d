//! A rule's expressions, in the order in which the kernel evaluates them: each loads something into
//! registers, or looks at what is there and ends the rule unless it is so, or decides.

use crate::model::reach::{Net, Port, Protocol};
use crate::runtime::netlink::Message;

// linux/netfilter/nf_tables.h
const VERDICT: u32 = 0;
/// The first of sixteen registers of four bytes.
const REGISTER: u32 = 8;
pub const EQUAL: u32 = 0;
pub const NOT_EQUAL: u32 = 1;

pub const META_IN_NAME: u32 = 6;
pub const META_OUT_NAME: u32 = 7;
const META_FAMILY: u32 = 15;
const META_PROTOCOL: u32 = 16;

/// Of a lookup: what isn't in the set.
const INVERTED: u32 = 1;

impl Message {
    /// nf_tables wants numbers in the network's order.
    pub fn number(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_be_bytes())
    }

    pub fn expression(self, name: &str, fill: impl FnOnce(Self) -> Self) -> Self {
        self.nested(1, |expression| expression.text(1, name).nested(2, fill))
    }

    pub fn meta(self, key: u32) -> Self {
        self.expression("meta", |data| data.number(1, REGISTER).number(2, key))
    }

    pub fn compare(self, operation: u32, value: &[u8]) -> Self {
        self.expression("cmp", |data| {
            data.number(1, REGISTER).number(2, operation).nested(3, |to| to.attribute(1, value))
        })
    }

    /// Into the interfaces whose name begins so.
    pub fn from(self, prefix: &str) -> Self {
        self.meta(META_IN_NAME).compare(EQUAL, prefix.as_bytes())
    }

    pub fn to(self, prefix: &str, operation: u32) -> Self {
        self.meta(META_OUT_NAME).compare(operation, prefix.as_bytes())
    }

    pub fn ipv4(self) -> Self {
        self.family(EQUAL)
    }

    /// IPv4, or anything else.
    pub fn family(self, operation: u32) -> Self {
        self.meta(META_FAMILY).compare(operation, &[libc::NFPROTO_IPV4 as u8])
    }

    /// From an interface and a source that aren't in the set together. A name fills four registers.
    pub fn placed_nowhere(self, set: &str) -> Self {
        self.meta(META_IN_NAME)
            .payload(REGISTER + 4, 1, 12, 4)
            .expression("lookup", |data| data.text(1, set).number(2, REGISTER).number(5, INVERTED))
    }

    pub fn in_and_out_found_in(self, set: &str) -> Self {
        self.meta(META_IN_NAME)
            .expression("meta", |data| data.number(1, REGISTER + 4).number(2, META_OUT_NAME))
            .found_in(set)
    }

    pub fn payload(self, register: u32, base: u32, offset: u32, length: u32) -> Self {
        self.expression("payload", |data| {
            data.number(1, register).number(2, base).number(3, offset).number(4, length)
        })
    }

    /// RFC 791 §3.1.
    pub fn source(self) -> Self {
        self.payload(REGISTER, 1, 12, 4)
    }

    pub fn destination(self) -> Self {
        self.payload(REGISTER, 1, 16, 4)
    }

    /// Behind the address: protocol and port, for a set that knows all three.
    pub fn and_port(self) -> Self {
        self.expression("meta", |data| data.number(1, REGISTER + 1).number(2, META_PROTOCOL)).payload(
            REGISTER + 2,
            2,
            2,
            2,
        )
    }

    pub fn within(self, net: Net) -> Self {
        if net.bits == 32 {
            return self.compare(EQUAL, &net.address.octets());
        }
        self.masked(net.mask().octets()).compare(EQUAL, &net.address.octets())
    }

    /// Of the four bytes that were loaded, those bits.
    fn masked(self, bits: [u8; 4]) -> Self {
        self.expression("bitwise", |data| {
            data.number(1, REGISTER)
                .number(2, REGISTER)
                .number(3, 4)
                .nested(4, |mask| mask.attribute(1, &bits))
                .nested(5, |flip| flip.attribute(1, &[0; 4]))
        })
    }

    pub fn at_port(self, port: Port) -> Self {
        self.meta(META_PROTOCOL)
            .compare(EQUAL, &[protocol(port.protocol)])
            .payload(REGISTER, 2, 2, 2)
            .compare(EQUAL, &port.number.to_be_bytes())
    }

    /// Of a connection that was let out (NF_CT_STATE_BIT of established and related).
    pub fn answering(self) -> Self {
        self.connection(0, 6).compare(NOT_EQUAL, &[0; 4])
    }

    /// The first packet of a connection (not IPS_CONFIRMED). Not its state: packets that nobody has
    /// answered are new each, and some kernels count one connection for each of them.
    pub fn beginning(self) -> Self {
        self.connection(2, 8).compare(EQUAL, &[0; 4])
    }

    pub fn connection(self, key: u32, bits: u32) -> Self {
        self.expression("ct", |data| data.number(1, REGISTER).number(2, key)).masked(bits.to_ne_bytes())
    }

    /// Whether the source, which was loaded, has more connections than that (NFT_CONNLIMIT_F_INV).
    pub fn beyond(self, max: u32) -> Self {
        self.expression("dynset", |data| {
            data.text(1, "counted").number(3, 0).number(4, REGISTER).nested(7, |count| {
                count.text(1, "connlimit").nested(2, |limit| limit.number(1, max).number(2, 1))
            })
        })
    }

    pub fn masqueraded(self) -> Self {
        self.expression("masq", |data| data)
    }

    /// NFT_REJECT_ICMPX_UNREACH, NFT_REJECT_ICMPX_ADMIN_PROHIBITED
    pub fn rejected(self) -> Self {
        self.expression("reject", |data| data.number(1, 2).attribute(2, &[3]))
    }

    pub fn found_in(self, set: &str) -> Self {
        self.expression("lookup", |data| data.text(1, set).number(2, REGISTER))
    }

    /// A map's verdict for the source's address.
    pub fn decided_by(self, map: &str) -> Self {
        self.expression("lookup", |data| data.text(1, map).number(2, REGISTER).number(3, VERDICT))
    }

    pub fn verdict(self, code: i32) -> Self {
        self.expression("immediate", |data| {
            let verdict = |value: Self| value.nested(2, |verdict| verdict.number(1, code as u32));
            data.number(1, VERDICT).nested(2, verdict)
        })
    }
}

pub fn protocol(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    }
}
