//! An instance's line to the node: a veth pair of its own, and nothing between instances.
//!
//! ```text
//! node     vethneap1upa807   10.213.4.1/32 · route 10.213.4.9/32 · forwarding
//!                 │
//! instance      eth0         10.213.4.9/32 · default via 10.213.4.1
//! ```
//!
//! No bridge: on one, an instance that makes its own frames could pass for another, and what goes
//! from port to port is no business of the rules for routing. Here whatever leaves an instance is
//! routed by the node, and a source that isn't the line's is dropped (ruleset.rs).
//!
//! Both ends know each other's hardware address from the start, and the node's answers no question
//! for it: what an instance that makes its own frames claims by ARP would fill the one table that the
//! node has for all its neighbours.
//!
//! The instance's end is made in its own network namespace: moving one there takes 15 ms. Both
//! ends go with the namespace, so that a line needs no cleaning up.

use crate::model::reach::Net;
use crate::runtime::netlink::{CREATE, EXCLUSIVE, Message, Socket, attributes, text};
use rustix::net::netdevice::name_to_index;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};

// linux/rtnetlink.h, linux/if_link.h
const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const GET_ROUTE: u16 = 26;
const NEW_NEIGHBOUR: u16 = 28;
const PERMANENT: u16 = 0x80;

const MAIN_TABLE: u8 = 254;
const UNICAST: u8 = 1;
const UNREACHABLE: u8 = 7;
const LINK_SCOPE: u8 = 253;
const ONLINK: u32 = 4;
/// Whose a route is; no other program's (linux/rtnetlink.h, /etc/iproute2/rt_protos).
const PROTOCOL: u8 = 0x6e;

/// A route as wide as this is a default one: VPNs have two halves of everything.
const DEFAULT_BITS: u8 = 7;

/// Where interfaces are noted (`note`): a table of routes, and the first number beyond 0.0.0.0/8.
const NOTES_TABLE: u32 = u32::from_be_bytes(*b"neap");
const NOTED_MAX: u32 = 1 << 24;

/// As docker's, and what programs expect.
const INSIDE: &str = "eth0";

/// An end of a line, as its hardware address says it.
const NODES_END: u8 = 1;
const INSTANCES_END: u8 = 2;

/// What an instance gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The node's end.
    pub name: String,
    pub address: Ipv4Addr,
    pub gateway: Ipv4Addr,
}

impl Line {
    /// Makes the line to a process that has a network namespace of its own, which the caller
    /// enters on the way and doesn't leave again.
    pub fn attach(&self, pid: i32) -> Result<(), String> {
        let step = |doing: &'static str| move |err: io::Error| format!("{doing}: {err}");
        let theirs = File::open(format!("/proc/{pid}/ns/net")).map_err(step("open its network"))?;
        let node = Socket::route(0).map_err(step("open rtnetlink"))?;
        self.make(&node, &theirs).map_err(step("make a veth pair"))?;
        self.set_up_here(&node).map_err(step("set the node's end of its line up"))?;
        move_into_link_name_space(theirs.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|err| format!("enter its network: {err}"))?;
        self.set_up_inside().map_err(step("set its end of its line up"))
    }

    fn make(&self, node: &Socket, theirs: &File) -> io::Result<()> {
        let pair = || {
            let pair = Message::new(NEW_LINK, CREATE | EXCLUSIVE, &link(0, 0, 0)).text(3, &self.name);
            pair.attribute(1, &self.hardware(NODES_END)).nested(18, |info| {
                info.text(1, "veth").nested(2, |data| {
                    data.nested(1, |peer| {
                        let namespace = theirs.as_raw_fd() as u32;
                        peer.fixed(&link(0, 0, 0))
                            .text(3, INSIDE)
                            .attribute(1, &self.hardware(INSTANCES_END))
                            .attribute(28, &namespace.to_ne_bytes())
                    })
                })
            })
        };
        match node.ask(pair()) {
            // The kernel takes its time to end a namespace: the last one with this address's.
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
                let _ = delete(node, &self.name);
                node.ask(pair())
            }
            done => done,
        }
    }

    fn set_up_here(&self, node: &Socket) -> io::Result<()> {
        let index = name_to_index(node, &self.name)?;
        let set = |what: &str, value: &str| {
            fs::write(format!("/proc/sys/net/{}/conf/{}/{}", &what[..4], self.name, &what[5..]), value)
        };
        let _ = set("ipv6 disable_ipv6", "1"); // a kernel without has nothing to turn off
        set("ipv4 forwarding", "1")?;
        set("ipv4 arp_ignore", "8")?;
        set_up(node, index)?;
        node.ask(neighbour(index, self.address, self.hardware(INSTANCES_END)))?;
        node.ask(address(index, self.gateway))?;
        let route = Message::new(NEW_ROUTE, CREATE, &route(32, LINK_SCOPE, UNICAST, 0));
        node.ask(route.attribute(1, &self.address.octets()).attribute(4, &index.to_ne_bytes()))
    }

    /// Locally administered. One that was given is left alone by udev, which otherwise sets its own.
    fn hardware(&self, end: u8) -> [u8; 6] {
        let [a, b, c, d] = self.address.octets();
        [0x02, end, a, b, c, d]
    }

    fn set_up_inside(&self) -> io::Result<()> {
        let inside = Socket::route(0)?;
        let index = name_to_index(&inside, INSIDE)?;
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{INSIDE}/disable_ipv6"), "1");
        inside.ask(address(index, self.address))?;
        set_up(&inside, index)?;
        inside.ask(neighbour(index, self.gateway, self.hardware(NODES_END)))?;
        let route = Message::new(NEW_ROUTE, CREATE, &route(0, 0, UNICAST, ONLINK));
        inside.ask(route.attribute(5, &self.gateway.octets()).attribute(4, &index.to_ne_bytes()))
    }
}

/// `struct ifinfomsg`.
fn link(index: u32, flags: u32, change: u32) -> Vec<u8> {
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), change.to_ne_bytes()].concat()
}

fn set_up(socket: &Socket, index: u32) -> io::Result<()> {
    let up = libc::IFF_UP as u32;
    socket.ask(Message::new(NEW_LINK, 0, &link(index, up, up)))
}

/// `struct ifaddrmsg`: an address with no network around it.
fn address(index: u32, address: Ipv4Addr) -> Message {
    let [a, b, c, d] = index.to_ne_bytes();
    let fixed = [libc::AF_INET as u8, 32, 0, 0, a, b, c, d];
    Message::new(NEW_ADDRESS, CREATE, &fixed).attribute(2, &address.octets()).attribute(1, &address.octets())
}

/// `struct ndmsg`: one that never changes.
fn neighbour(index: u32, address: Ipv4Addr, hardware: [u8; 6]) -> Message {
    let state = [PERMANENT.to_ne_bytes(), [0; 2]].concat();
    let fixed = [[libc::AF_INET as u8, 0, 0, 0], index.to_ne_bytes()].concat();
    let message = Message::new(NEW_NEIGHBOUR, CREATE, &[fixed, state].concat());
    message.attribute(1, &address.octets()).attribute(2, &hardware)
}

/// `struct rtmsg`, in the main table.
fn route(bits: u8, scope: u8, kind: u8, flags: u32) -> Vec<u8> {
    let [a, b, c, d] = flags.to_ne_bytes();
    vec![libc::AF_INET as u8, bits, 0, 0, MAIN_TABLE, PROTOCOL, scope, kind, a, b, c, d]
}

pub fn delete(node: &Socket, name: &str) -> io::Result<()> {
    node.ask(Message::new(DELETE_LINK, 0, &link(0, 0, 0)).text(3, name))
}

/// Whether the kernel has veth.
pub fn try_pair(node: &Socket) -> io::Result<()> {
    let veth = Message::new(NEW_LINK, CREATE | EXCLUSIVE, &link(0, 0, 0)).text(3, "vethneap.try");
    node.ask(veth.nested(18, |info| info.text(1, "veth")))
}

/// An interface of the node's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// `bridge`, `veth`; empty for a device.
    pub kind: String,
    /// The bridge that it is a port of.
    pub master: Option<u32>,
}

impl Link {
    pub fn is_bridge(&self) -> bool {
        self.kind == "bridge"
    }
}

pub fn links(node: &Socket) -> io::Result<Vec<Link>> {
    let mut links = Vec::new();
    node.list(Message::new(GET_LINK, 0, &link(0, 0, 0)), |_, body| {
        let index = body.get(4..8).and_then(|bytes| bytes.try_into().ok());
        let mut link = Link { index: index.map_or(0, u32::from_ne_bytes), ..Link::default() };
        for (kind, value) in attributes(body.get(16..).unwrap_or_default()) {
            match kind {
                3 => link.name = text(value),
                10 => link.master = value.try_into().ok().map(u32::from_ne_bytes),
                18 => {
                    let kind = attributes(value).find(|(kind, _)| *kind == 1);
                    link.kind = kind.map(|(_, value)| text(value)).unwrap_or_default();
                }
                _ => {}
            }
        }
        links.push(link);
    })?;
    Ok(links)
}

/// Bridges with nothing of the outside world on them: other containers' and virtual machines'.
pub fn fenced(links: &[Link]) -> Vec<String> {
    let is_virtual = |link: &&Link| ["veth", "tun", "dummy"].contains(&link.kind.as_str());
    let bridges = links.iter().filter(|link| link.is_bridge());
    let fenced = bridges.filter(|bridge| {
        let mut ports = links.iter().filter(|link| link.master == Some(bridge.index));
        ports.all(|port| is_virtual(&port))
    });
    fenced.map(|bridge| bridge.name.clone()).collect()
}

/// A route of the node's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub net: Net,
    pub device: u32,
    /// The part that a neap set aside, or its note: whose (`Owner`).
    pub owner: Option<u32>,
}

impl Route {
    /// The interface that a neap noted.
    pub fn noted(&self) -> Option<u32> {
        let number = u32::from(self.net.address);
        (self.owner.is_some() && self.net.bits == 32 && number < NOTED_MAX).then_some(number)
    }
}

/// All but default ones.
pub fn routes(node: &Socket) -> io::Result<Vec<Route>> {
    let mut routes = Vec::new();
    let mut all = route(0, 0, 0, 0);
    all[4] = 0;
    node.list(Message::new(GET_ROUTE, 0, &all), |_, body| {
        let Some(fixed) = body.first_chunk::<12>() else { return };
        let mut found =
            Route { net: Net { address: Ipv4Addr::UNSPECIFIED, bits: fixed[1] }, device: 0, owner: None };
        let mut priority = 0;
        for (kind, value) in attributes(&body[12..]) {
            let Ok(value) = <[u8; 4]>::try_from(value) else { continue };
            match kind {
                1 => found.net.address = Ipv4Addr::from(value),
                4 => found.device = u32::from_ne_bytes(value),
                6 => priority = u32::from_ne_bytes(value),
                _ => {}
            }
        }
        if fixed[5] == PROTOCOL && fixed[7] == UNREACHABLE {
            found.owner = Some(priority);
        }
        if found.net.bits > DEFAULT_BITS {
            routes.push(found);
        }
    })?;
    Ok(routes)
}

/// Sets a part of the range aside: other nodes on this machine see that it is taken, and packets
/// to an instance that is gone don't leave by the default route.
pub fn reserve(node: &Socket, net: Net, owner: u32) -> io::Result<()> {
    node.ask(reservation(NEW_ROUTE, CREATE | EXCLUSIVE, net, owner))
}

pub fn give_back(node: &Socket, net: Net, owner: u32) -> io::Result<()> {
    gone(node.ask(reservation(DELETE_ROUTE, 0, net, owner)))
}

/// Who stops a node and who notices that its launcher is gone sweep at the same time.
fn gone(deleted: io::Result<()>) -> io::Result<()> {
    match deleted {
        Err(err) if err.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        done => done,
    }
}

/// Notes an interface where whoever sweeps after a kill finds it: as an unreachable route, in a
/// table that no rule leads to, to its number in 0.0.0.0/8. Unlike a file it goes when the machine
/// or the network namespace does, and `nft flush ruleset` doesn't concern it.
pub fn note(node: &Socket, index: u32, owner: u32) -> io::Result<()> {
    if index >= NOTED_MAX {
        return Err(io::Error::other(format!(
            "interface number {index} is too large to note that it was turned on; set net.ipv4.ip_forward = 1, and neap \
             notes nothing"
        )));
    }
    match node.ask(annotation(NEW_ROUTE, CREATE, index, owner)) {
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        done => done,
    }
}

pub fn strike(node: &Socket, index: u32, owner: u32) -> io::Result<()> {
    gone(node.ask(annotation(DELETE_ROUTE, 0, index, owner)))
}

fn annotation(kind: u16, flags: u16, index: u32, owner: u32) -> Message {
    let net = Net { address: Ipv4Addr::from(index), bits: 32 };
    reservation(kind, flags, net, owner).attribute(15, &NOTES_TABLE.to_ne_bytes())
}

fn reservation(kind: u16, flags: u16, net: Net, owner: u32) -> Message {
    Message::new(kind, flags, &route(net.bits, 0, UNREACHABLE, 0))
        .attribute(1, &net.address.octets())
        .attribute(6, &owner.to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bridges_of_containers_are_fenced_and_those_of_the_site_are_not() {
        let link = |index, name: &str, kind: &str, master| Link {
            index,
            name: name.to_owned(),
            kind: kind.to_owned(),
            master,
        };
        let links = [
            link(1, "lo", "", None),
            link(2, "eth0", "", Some(5)),
            link(3, "docker0", "bridge", None),
            link(4, "virbr0", "bridge", None),
            link(5, "br-lan", "bridge", None),
            link(6, "vethab", "veth", Some(4)),
            link(7, "vnet0", "tun", Some(4)),
            link(8, "vethcd", "veth", Some(5)),
            link(9, "eth1.100", "vlan", Some(10)),
            link(10, "br-vlan", "bridge", None),
        ];

        assert_eq!(fenced(&links), ["docker0", "virbr0"]);
    }
}
