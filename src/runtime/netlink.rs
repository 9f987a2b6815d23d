//! netlink(7) as far as a way out needs it: messages, attributes, answers. Links, addresses and
//! routes are asked of rtnetlink, rules of nf_tables, with no tool that a gateway might lack.
//!
//! The kernel does what a message asks while it is sent, so that its answer is there when
//! sending returns, and nothing here waits.

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, socket_with};
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
/// To `NEW…`: make it, and make it only when it isn't there yet.
pub const CREATE: u16 = 0x400;
pub const EXCLUSIVE: u16 = 0x200;

const ERROR: u16 = 2;
const DONE: u16 = 3;
const NESTED: u16 = 1 << 15;

const HEADER_BYTES: usize = 16;
/// Of dumps the kernel fills as much as it is given, up to 32 KiB.
const BUFFER_BYTES: usize = 32 * 1024;

/// One message, its header in front.
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(REQUEST | flags).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self { bytes }.padded()
    }

    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (4 + value.len()) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.padded()
    }

    /// A text with its NUL.
    pub fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// An attribute of attributes.
    pub fn nested(self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let at = self.bytes.len();
        let mut filled = fill(self.attribute(kind | NESTED, &[]));
        let length = (filled.bytes.len() - at) as u16;
        filled.bytes[at..at + 2].copy_from_slice(&length.to_ne_bytes());
        filled
    }

    /// What stands between attributes: a header that an attribute begins with.
    pub fn fixed(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self.padded()
    }

    /// Netlink counts in words of four bytes.
    fn padded(mut self) -> Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    fn finish(&mut self, sequence: u32, flags: u16) {
        let length = self.bytes.len() as u32;
        let flags = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]) | flags;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }
}

/// In the network namespace in which it was made.
pub struct Socket {
    socket: OwnedFd,
    sequence: Cell<u32>,
}

impl Socket {
    /// Links, addresses, routes. `groups`: the changes that it tells of, a bit each.
    pub fn route(groups: u32) -> io::Result<Self> {
        Self::new(None, groups)
    }

    pub fn netfilter() -> io::Result<Self> {
        Self::new(Some(netlink::NETFILTER), 0)
    }

    /// Tells of every change of nf_tables (NFNLGRP_NFTABLES).
    pub fn netfilter_changes() -> io::Result<Self> {
        Self::new(Some(netlink::NETFILTER), 1 << 6)
    }

    fn new(protocol: Option<rustix::net::Protocol>, groups: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
        rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, groups))?;
        Ok(Self { socket, sequence: Cell::new(0) })
    }

    /// One change, done when this returns.
    pub fn ask(&self, mut message: Message) -> io::Result<()> {
        message.finish(self.next(), ACK);
        rustix::net::send(&self.socket, &message.bytes, SendFlags::empty())?;
        self.answers(|_, _| {})
    }

    /// Several, which are done all or none: what nf_tables calls a batch.
    pub fn ask_together(&self, messages: Vec<Message>) -> io::Result<()> {
        let mut bytes = Vec::new();
        for mut message in messages {
            message.finish(self.next(), 0);
            bytes.extend_from_slice(&message.bytes);
        }
        rustix::net::send(&self.socket, &bytes, SendFlags::empty())?;
        self.answers(|_, _| {})
    }

    /// Everything of a kind: `each` gets a message's kind and what follows its header.
    pub fn list(&self, mut message: Message, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        message.finish(self.next(), DUMP);
        rustix::net::send(&self.socket, &message.bytes, SendFlags::empty())?;
        self.answers(&mut each)
    }

    /// What it was told of changes; whether it was of any. More at once than it could be told of is
    /// an error, and a change all the same.
    pub fn told(&self, mut each: impl FnMut(u16, &[u8])) -> io::Result<bool> {
        let mut any = false;
        self.answers(|kind, body| {
            any = true;
            each(kind, body);
        })?;
        Ok(any)
    }

    /// Reads what is there; the first error that is told.
    fn answers(&self, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut done = Ok(());
        loop {
            let length = match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => length,
                Err(rustix::io::Errno::AGAIN) => return done,
                Err(rustix::io::Errno::INTR) => continue,
                Err(err) => return Err(err.into()),
            };
            for (kind, body) in messages(&buffer[..length]) {
                match kind {
                    ERROR => {
                        let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                        if code != 0 && done.is_ok() {
                            done = Err(io::Error::from_raw_os_error(code.saturating_neg()));
                        }
                    }
                    DONE => {}
                    _ => each(kind, body),
                }
            }
        }
    }

    fn next(&self) -> u32 {
        self.sequence.set(self.sequence.get().wrapping_add(1));
        self.sequence.get()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Kind and body of each message in a packet.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let message = bytes.get(..length).filter(|message| message.len() >= HEADER_BYTES)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([message[4], message[5]]), &message[HEADER_BYTES..]))
    })
}

/// Kind and value of each attribute.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let head = bytes.first_chunk::<4>()?;
        let length = u16::from_ne_bytes([head[0], head[1]]) as usize;
        let kind = u16::from_ne_bytes([head[2], head[3]]) & 0x3fff; // without the two flags
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// An attribute's text, without its NULs.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_nest() {
        let mut message = Message::new(16, CREATE, &[1, 2, 3, 4]).text(3, "lo").nested(18, |inside| {
            inside.text(1, "veth").nested(2, |inner| inner.fixed(&[9; 4]).attribute(7, &[5]))
        });
        message.finish(42, ACK);

        assert_eq!(message.bytes.len() % 4, 0);
        let (kind, body) = messages(&message.bytes).next().expect("one message");
        assert_eq!((kind, &body[..4]), (16, [1, 2, 3, 4].as_slice()));
        let top: Vec<_> = attributes(&body[4..]).collect();
        assert_eq!((top.len(), top[0].0, text(top[0].1).as_str(), top[1].0), (2, 3, "lo", 18));
        let inside: Vec<_> = attributes(top[1].1).collect();
        assert_eq!((text(inside[0].1).as_str(), inside[1].0), ("veth", 2));
        assert_eq!(attributes(&inside[1].1[4..]).collect::<Vec<_>>(), [(7, [5].as_slice())]);
    }

    #[test]
    fn what_is_cut_short_or_lies_about_its_length_ends_the_reading() {
        let mut message = Message::new(16, 0, &[]).text(3, "eth0");
        message.finish(1, 0);
        for length in 0..message.bytes.len() {
            assert_eq!(messages(&message.bytes[..length]).count(), 0, "{length}");
        }
        for lie in [0_u16, 1, 3, 200] {
            let mut bytes = [0; 8];
            bytes[..2].copy_from_slice(&lie.to_ne_bytes());
            assert!(attributes(&bytes).count() <= 1, "{lie}");
        }
        assert_eq!(messages(&[0; 64]).count(), 0);
    }

    #[test]
    fn links_are_listed_and_errors_told() {
        let socket = Socket::route(0).expect("a socket");
        let mut names = Vec::new();

        let all = Message::new(18, 0, &[0; 16]);
        let listed = socket.list(all, |_, body| {
            let body = body.get(16..).unwrap_or_default();
            names.extend(attributes(body).find(|(kind, _)| *kind == 3).map(|(_, value)| text(value)));
        });

        listed.expect("listed");
        assert!(names.iter().any(|name| name == "lo"), "{names:?}");
        let unknown = Message::new(18, 0, &[0; 16]).text(3, "no-such-link");
        assert_eq!(socket.ask(unknown).map_err(|err| err.raw_os_error()), Err(Some(libc::ENODEV)));
    }
}
