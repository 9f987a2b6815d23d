//! From bytes to packets, with nothing believed: the guard around rumqttc's codec.
//!
//! The guard frames packets itself and hands the codec one whole frame at a time, so every
//! answer of the codec but "here it is" means malformed (alone, the codec answers "more bytes,
//! please" for some frames that it has already consumed, and a loop that believes it swallows
//! messages). What the codec leaves unchecked is checked here: flags, packets that no broker
//! may send, the short forms of DISCONNECT.
//!
//! A PUBLISH is taken apart here, without the codec, which miscounts properties behind two
//! subscription identifiers and can't leave a payload aside: one larger than the limit is read
//! past as it comes (see `Publish::cut`).

use super::{Publish, Received, Version, properties};
use bytes::{Buf, BytesMut};
use rumqttc::mqttbytes::v4;
use rumqttc::v5::mqttbytes::v5;

/// Anything but a PUBLISH is at most this long: a SUBACK for all our filters is far below, and
/// MQTT 5 reason strings and user properties find room. Larger is malformed.
const CONTROL_BYTES_MAX: usize = 64 << 10;

/// What topic and properties of a PUBLISH may take beside the payload's own limit: a topic may
/// take 64 KiB by itself. Larger: the properties are read past, the message counts as cut.
const HEAD_BYTES_MAX: usize = 128 << 10;

/// Head of a payload that is kept when the whole is too large, for a person to recognise it.
const CUT_BYTES: usize = 1024;

/// The largest payload that anybody here wants, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishLimit(pub u64);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed packet from the broker: {0}")]
pub struct Malformed(pub &'static str);

#[derive(Debug)]
pub struct Decoder {
    version: Version,
    limit: PublishLimit,
    /// Bytes of a cut PUBLISH that are still to come and to be thrown away.
    skip: usize,
}

const NO_PACKET: Malformed = Malformed("packet id 0");

fn puback(pkid: u16, reason: u8) -> Result<Received, Malformed> {
    if pkid == 0 { Err(NO_PACKET) } else { Ok(Received::PubAck { pkid, reason }) }
}

/// First byte, and where the body starts and ends.
struct Frame {
    first: u8,
    header: usize,
    body: usize,
}

impl Decoder {
    pub fn new(version: Version, limit: PublishLimit) -> Self {
        Self { version, limit, skip: 0 }
    }

    pub fn set_limit(&mut self, limit: PublishLimit) {
        self.limit = limit;
    }

    /// The next packet, or `None`: more bytes are needed. Bytes of a packet leave `buffer` only
    /// together with the packet (or when they are read past).
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Received>, Malformed> {
        self.skip_some(buffer);
        let Some(frame) = frame(buffer)? else { return Ok(None) };
        let (kind, flags) = (frame.first >> 4, frame.first & 0x0F);
        if kind == 3 {
            return self.publish(buffer, &frame);
        }
        if flags != 0 {
            return Err(Malformed("reserved flags are set"));
        }
        if frame.body > CONTROL_BYTES_MAX {
            return Err(Malformed("an acknowledgement of more than 64 KiB"));
        }
        if buffer.len() < frame.header + frame.body {
            return Ok(None);
        }
        let bytes = buffer.split_to(frame.header + frame.body);
        let body = &bytes[frame.header..];
        // Most of what comes while a backlog drains: no properties, nothing for the codec to check.
        match (kind, self.version, body) {
            (4, _, &[high, low]) => return puback(u16::from_be_bytes([high, low]), 0).map(Some),
            (4, Version::V5, &[high, low, reason @ (0x00 | 0x10)]) => {
                return puback(u16::from_be_bytes([high, low]), reason).map(Some);
            }
            _ => {}
        }
        match kind {
            4 | 9 | 11 => self.acknowledgement(kind, bytes, frame.header).map(Some),
            13 if body.is_empty() => Ok(Some(Received::PingResp)),
            13 => Err(Malformed("PINGRESP with a body")),
            14 if self.version == Version::V5 => {
                // The codec misreads both short forms; the reason code is all we want anyway.
                Ok(Some(Received::Disconnect { reason: body.first().copied().unwrap_or(0) }))
            }
            _ => Err(Malformed("a packet that no broker sends")),
        }
    }

    fn acknowledgement(&self, kind: u8, bytes: BytesMut, header: usize) -> Result<Received, Malformed> {
        let body = bytes[header..].to_vec();
        let [high, low, ..] = body[..] else { return Err(Malformed("no packet id")) };
        let pkid = u16::from_be_bytes([high, low]);
        if pkid == 0 {
            return Err(NO_PACKET);
        }
        // The codec checks the rest; its own enums lose the reason's number, so that is read here.
        match (self.version, whole(self.version, bytes)?) {
            (_, Packet::V5(v5::Packet::PubAck(_))) => {
                Ok(Received::PubAck { pkid, reason: body.get(2).copied().unwrap_or(0) })
            }
            (_, Packet::V4(v4::Packet::PubAck(_))) => Ok(Received::PubAck { pkid, reason: 0 }),
            (_, Packet::V5(v5::Packet::SubAck(ack))) => {
                let codes = body.len().checked_sub(ack.return_codes.len()).map(|at| body[at..].to_vec());
                Ok(Received::SubAck { pkid, codes: codes.ok_or(Malformed("SUBACK"))? })
            }
            (_, Packet::V4(v4::Packet::SubAck(_))) => {
                Ok(Received::SubAck { pkid, codes: body[2..].to_vec() })
            }
            (_, Packet::V5(v5::Packet::UnsubAck(_)) | Packet::V4(v4::Packet::UnsubAck(_))) => {
                Ok(Received::UnsubAck { pkid })
            }
            _ => Err(Malformed(match kind {
                4 => "PUBACK",
                9 => "SUBACK",
                _ => "UNSUBACK",
            })),
        }
    }

    fn publish(&mut self, buffer: &mut BytesMut, frame: &Frame) -> Result<Option<Received>, Malformed> {
        let qos = (frame.first >> 1) & 3;
        if qos > 1 {
            return Err(Malformed("a PUBLISH of QoS 2 or 3, which nobody subscribed to"));
        }
        let Some(head) = head(self.version, qos, buffer, frame)? else { return Ok(None) };
        let payload = frame.body - head.total();
        let fits = payload as u64 <= self.limit.0 && head.total() <= HEAD_BYTES_MAX;
        // Too large: the head of it is kept, the rest is read past.
        let properties = if head.total() <= HEAD_BYTES_MAX { head.properties } else { 0 };
        let kept = match (fits, properties == head.properties) {
            (true, _) => payload,
            (false, true) => payload.min(CUT_BYTES),
            (false, false) => 0,
        };
        let needed = frame.header + head.before_properties + properties + kept;
        if buffer.len() < needed {
            return Ok(None);
        }
        let (topic_and_id, rest) = buffer[frame.header..needed].split_at(head.before_properties);
        let (properties, payload_head) = rest.split_at(properties);
        let mut publish = Publish {
            qos,
            retain: frame.first & 1 == 1,
            payload: payload_head.to_vec(),
            cut: (!fits).then_some(payload as u64),
            ..Publish::default()
        };
        begin(&mut publish, topic_and_id)?;
        if let Some((bytes, _)) = length(properties)? {
            properties::read(&mut publish, &properties[bytes..])?;
        }
        self.skip = frame.header + frame.body;
        self.skip_some(buffer);
        Ok(Some(Received::Publish(publish)))
    }

    fn skip_some(&mut self, buffer: &mut BytesMut) {
        let now = self.skip.min(buffer.len());
        buffer.advance(now);
        self.skip -= now;
    }
}

/// Topic and packet id; their lengths were checked by `head`.
fn begin(publish: &mut Publish, bytes: &[u8]) -> Result<(), Malformed> {
    let (topic, pkid) = bytes.split_at(bytes.len() - 2 * usize::from(publish.qos));
    let topic = std::str::from_utf8(&topic[2..]).map_err(|_| Malformed("a topic that is not UTF-8"))?;
    if topic.is_empty() || topic.contains(['\0', '+', '#']) {
        return Err(Malformed("a topic that is empty or has NUL or wildcards"));
    }
    topic.clone_into(&mut publish.topic);
    if let [high, low] = *pkid {
        publish.pkid = u16::from_be_bytes([high, low]);
        if publish.pkid == 0 {
            return Err(Malformed("packet id 0"));
        }
    }
    Ok(())
}

/// How long the parts of a PUBLISH before its payload are.
struct Head {
    /// Topic and packet id.
    before_properties: usize,
    /// The properties and the length that precedes them.
    properties: usize,
}

impl Head {
    fn total(&self) -> usize {
        self.before_properties + self.properties
    }
}

fn head(version: Version, qos: u8, buffer: &[u8], frame: &Frame) -> Result<Option<Head>, Malformed> {
    let beyond = Malformed("a PUBLISH whose parts are longer than itself");
    let Some(body) = buffer.get(frame.header..) else { return Ok(None) };
    let [high, low, ..] = body[..] else { return if frame.body < 2 { Err(beyond) } else { Ok(None) } };
    let before_properties = 2 + usize::from(u16::from_be_bytes([high, low])) + 2 * usize::from(qos);
    if before_properties > frame.body {
        return Err(beyond);
    }
    if version == Version::V311 {
        return Ok(Some(Head { before_properties, properties: 0 }));
    }
    let rest = body.get(before_properties..).unwrap_or_default();
    // Never past this packet: the next one's bytes are no length of ours.
    let rest = &rest[..rest.len().min(frame.body - before_properties)];
    match length(rest)? {
        Some((bytes, value)) if before_properties + bytes + value <= frame.body => {
            Ok(Some(Head { before_properties, properties: bytes + value }))
        }
        Some(_) => Err(beyond),
        None if rest.len() == frame.body - before_properties => Err(beyond),
        None => Ok(None),
    }
}

#[expect(clippy::large_enum_variant, reason = "taken apart where it is made, never kept")]
enum Packet {
    V4(v4::Packet),
    V5(v5::Packet),
}

/// The codec's reading of exactly one frame: anything but a packet is malformed.
fn whole(version: Version, mut bytes: BytesMut) -> Result<Packet, Malformed> {
    let malformed = Malformed("its parts do not fit together");
    let packet = match version {
        Version::V311 => v4::Packet::read(&mut bytes, usize::MAX).map(Packet::V4).map_err(|_| malformed),
        Version::V5 => v5::Packet::read(&mut bytes, None).map(Packet::V5).map_err(|_| malformed),
    };
    debug_assert!(packet.is_err() || bytes.is_empty(), "one frame is one packet");
    packet
}

fn frame(buffer: &[u8]) -> Result<Option<Frame>, Malformed> {
    let Some((&first, rest)) = buffer.split_first() else { return Ok(None) };
    let Some((bytes, body)) = length(rest)? else { return Ok(None) };
    Ok(Some(Frame { first, header: 1 + bytes, body }))
}

/// A variable byte integer (MQTT 5.0 §1.5.5): its length and value; `None`: not all there.
pub(super) fn length(bytes: &[u8]) -> Result<Option<(usize, usize)>, Malformed> {
    let mut value = 0;
    for (at, byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7F) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(Some((at + 1, value)));
        }
    }
    if bytes.len() >= 4 { Err(Malformed("a length of more than four bytes")) } else { Ok(None) }
}

/// The broker's answer to CONNECT, read before anything else can come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ConnAck {
    pub session_present: bool,
    pub code: u8,
    /// In the layout of 3.1.1, as brokers answer that know no MQTT 5.
    pub old_layout: bool,
    pub properties: Option<v5::ConnAckProperties>,
}

pub(super) fn connack(version: Version, buffer: &mut BytesMut) -> Result<Option<ConnAck>, Malformed> {
    let Some(frame) = frame(buffer)? else { return Ok(None) };
    if frame.first != 0x20 {
        return Err(Malformed("not a CONNACK where one was due; is this an MQTT broker?"));
    }
    if !(2..=CONTROL_BYTES_MAX).contains(&frame.body) {
        return Err(Malformed("a CONNACK of an odd length"));
    }
    if buffer.len() < frame.header + frame.body {
        return Ok(None);
    }
    let bytes = buffer.split_to(frame.header + frame.body);
    let (session, code) = (bytes[frame.header], bytes[frame.header + 1]);
    let old_layout = frame.body == 2;
    let mut ack = ConnAck { session_present: session & 1 == 1, code, old_layout, properties: None };
    // A refusal is understood by its code alone: codes that the codec has no name for included.
    if version == Version::V5 && !old_layout && code == 0 {
        let Packet::V5(v5::Packet::ConnAck(read)) = whole(version, bytes)? else {
            return Err(Malformed("CONNACK"));
        };
        ack.properties = read.properties;
    }
    Ok(Some(ack))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::mqtt::{Encoder, Outgoing};

    const LIMIT: PublishLimit = PublishLimit(1000);

    fn published(version: Version, topic: &str, payload: &[u8]) -> BytesMut {
        let mut out = BytesMut::new();
        let message = Outgoing {
            topic,
            payload,
            content_type: Some("text/plain"),
            user_properties: &[("id", "7".into())],
        };
        Encoder { version, packet_bytes_max: None }.publish(&mut out, 9, &message).expect("it fits");
        out
    }

    /// Feeds `bytes` in pieces of `piece` and returns all packets.
    fn read(
        version: Version,
        bytes: &[u8],
        piece: usize,
    ) -> (Result<Vec<Received>, Malformed>, usize, Decoder) {
        let mut decoder = Decoder::new(version, LIMIT);
        let (mut buffer, mut packets, mut longest) = (BytesMut::new(), Vec::new(), 0);
        for piece in bytes.chunks(piece.max(1)) {
            buffer.extend_from_slice(piece);
            longest = longest.max(buffer.len());
            loop {
                match decoder.next(&mut buffer) {
                    Ok(Some(packet)) => packets.push(packet),
                    Ok(None) => break,
                    Err(error) => return (Err(error), longest, decoder),
                }
            }
        }
        (Ok(packets), longest, decoder)
    }

    fn publishes(packets: &[Received]) -> Vec<&Publish> {
        let publishes =
            packets.iter().filter_map(|p| if let Received::Publish(p) = p { Some(p) } else { None });
        publishes.collect()
    }

    #[test]
    fn any_cut_of_the_stream_gives_the_same_packets() {
        for version in [Version::V311, Version::V5] {
            let mut stream = published(version, "a/b", b"one");
            stream.extend_from_slice(&[0x40, 2, 0, 5, 0xD0, 0]);
            stream.extend_from_slice(&published(version, "c", &[7; 900]));
            for piece in 1..stream.len() {
                let (packets, ..) = read(version, &stream, piece);

                let packets = packets.expect("well-formed");
                assert_eq!(packets.len(), 4, "{version} in pieces of {piece}");
                assert_eq!(packets[1], Received::PubAck { pkid: 5, reason: 0 });
                assert_eq!(packets[2], Received::PingResp);
                let publishes = publishes(&packets);
                assert_eq!(
                    (publishes[0].topic.as_str(), publishes[0].payload.as_slice()),
                    ("a/b", &b"one"[..])
                );
                assert_eq!(publishes[1].payload.len(), 900);
                if version == Version::V5 {
                    assert_eq!(publishes[0].user_properties, [("id".to_owned(), "7".to_owned())]);
                }
            }
        }
    }

    #[test]
    fn oversized_publish_is_read_past_without_being_buffered() {
        for version in [Version::V311, Version::V5] {
            let mut stream = published(version, "big", &[7; 3_000_000]);
            stream.extend_from_slice(&published(version, "next", b"small"));

            let (packets, longest, _) = read(version, &stream, 4096);

            let packets = packets.expect("well-formed");
            let publishes = publishes(&packets);
            assert_eq!(publishes[0].cut, Some(3_000_000));
            assert_eq!((publishes[0].pkid, publishes[0].payload.len()), (9, CUT_BYTES));
            assert_eq!((publishes[1].topic.as_str(), publishes[1].cut), ("next", None));
            assert!(longest < 10_000, "{longest} bytes were buffered");
        }
    }

    #[test]
    fn oversized_properties_are_read_past_too() {
        let mut properties = Vec::new();
        for _ in 0..10 {
            properties.push(("k", "v".repeat(60_000).into()));
        }
        let message = Outgoing { topic: "t", user_properties: &properties, ..Outgoing::default() };
        let mut stream = BytesMut::new();
        let encoder = Encoder { version: Version::V5, packet_bytes_max: None };
        encoder.publish(&mut stream, 9, &message).expect("it fits");
        stream.extend_from_slice(&[0xD0, 0]);

        let (packets, longest, _) = read(Version::V5, &stream, 1024);

        let packets = packets.expect("well-formed");
        assert_eq!(publishes(&packets)[0].cut, Some(0));
        assert_eq!(publishes(&packets)[0].pkid, 9);
        assert_eq!(packets[1], Received::PingResp);
        assert!(longest < 4096, "{longest} bytes were buffered");
    }

    #[test]
    fn what_no_broker_may_send_is_malformed() {
        let v5: &[&[u8]] = &[
            &[0x32, 7, 0, 0, 0, 9, 0, b'x', b'x'],       // an empty topic
            &[0x32, 6, 0, 1, 0xFF, 0, 9, 0],             // not UTF-8
            &[0x32, 6, 0, 1, 0, 0, 9, 0],                // NUL
            &[0x32, 6, 0, 1, b'#', 0, 9, 0],             // a wildcard
            &[0x32, 6, 0, 1, b'a', 0, 0, 0],             // packet id 0
            &[0x34, 6, 0, 1, b'a', 0, 9, 0],             // QoS 2
            &[0x36, 6, 0, 1, b'a', 0, 9, 0],             // QoS 3
            &[0x32, 6, 0, 9, b'a', 0, 9, 0],             // a topic longer than the packet
            &[0x32, 6, 0, 1, b'a', 0, 9, 9],             // properties longer than the packet
            &[0x32, 9, 0, 1, b'a', 0, 9, 3, 0x23, 0, 1], // a topic alias
            &[0x32, 9, 0, 1, b'a', 0, 9, 2, 0x26, 0, 0], // a property over the properties' length
            &[0x32, 0xFF, 0xFF, 0xFF, 0xFF, 1],          // a length of five bytes
            &[0x30, 1, 0],                               // no room for a topic
            &[0x4F, 2, 0, 5],                            // flags
            &[0x40, 1, 5],                               // half a packet id
            &[0x40, 2, 0, 0],                            // packet id 0
            &[0x40, 3, 0, 5, 0x42],                      // an unknown reason
            &[0x90, 2, 0, 5],                            // a SUBACK without codes
            &[0xD0, 1, 0],                               // PINGRESP with a body
            &[0x10, 0],                                  // CONNECT
            &[0xC0, 0],                                  // PINGREQ
            &[0xF0, 0],                                  // AUTH
            &[0x00, 0],                                  // nothing
            &[0x40, 0xFF, 0xFF, 0x7F],                   // an acknowledgement of 2 MB
        ];
        for bytes in v5 {
            assert!(read(Version::V5, bytes, 64).0.is_err(), "{bytes:02X?}");
        }
        // 3.1.1 has no DISCONNECT from the broker, and no reasons
        assert!(read(Version::V311, &[0xE0, 0], 64).0.is_err());
        assert!(read(Version::V311, &[0x90, 3, 0, 5, 3], 64).0.is_err());
    }

    #[test]
    fn short_forms_of_disconnect_are_understood() {
        for (bytes, reason) in
            [(&[0xE0, 0][..], 0), (&[0xE0, 1, 0x8E][..], 0x8E), (&[0xE0, 2, 0x8B, 0][..], 0x8B)]
        {
            let (packets, ..) = read(Version::V5, bytes, 1);

            assert_eq!(packets.as_deref(), Ok(&[Received::Disconnect { reason }][..]));
        }
    }

    #[test]
    fn old_brokers_answer_in_their_own_layout() {
        let mut bytes = BytesMut::from(&[0x20, 2, 0, 1][..]);

        let ack = connack(Version::V5, &mut bytes).expect("well-formed").expect("whole");

        assert!(ack.old_layout);
        assert_eq!(ack.code, 1);
        let mut http = BytesMut::from(&b"HTTP/1.1 400 Bad Request\r\n"[..]);
        assert!(connack(Version::V5, &mut http).is_err());
    }

    /// Random and mutated bytes: no panic, no growth, and no packet that vanishes: after a
    /// refusal the connection ends, so what counts is that `Ok(None)` never eats a whole frame.
    #[test]
    fn no_bytes_panic_or_make_a_packet_vanish() {
        for seed in 0..40_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let version = if random.bool() { Version::V311 } else { Version::V5 };
            let mut bytes = Vec::new();
            if random.u8(0..5) == 0 {
                bytes.extend((0..random.usize(0..64)).map(|_| random.u8(..)));
            } else {
                for _ in 0..random.usize(1..4) {
                    match random.u8(0..6) {
                        0 => bytes.extend([0x40, 2, 0, 5]),
                        1 => bytes.extend([0x90, 4, 0, 5, 0, 1]),
                        2 => bytes.extend([0xB0, 4, 0, 5, 0, 0x11]),
                        3 => bytes.extend([0xE0, 2, 0x8B, 0]),
                        4 => bytes.extend([0xD0, 0]),
                        _ => {
                            let payload = vec![7; random.usize(0..2000)];
                            bytes.extend(published(version, "a/b", &payload));
                        }
                    }
                }
                for _ in 0..random.usize(0..4) {
                    let at = random.usize(0..bytes.len());
                    match random.u8(0..3) {
                        0 => bytes[at] = random.u8(..),
                        1 => bytes.insert(at, random.u8(..)),
                        _ if bytes.len() > 1 => drop(bytes.remove(at)),
                        _ => {}
                    }
                }
            }
            let mut decoder = Decoder::new(version, LIMIT);
            let mut buffer = BytesMut::from(&bytes[..]);
            loop {
                let before = buffer.len();
                let skipping = decoder.skip;
                match decoder.next(&mut buffer) {
                    Ok(Some(_)) => assert!(buffer.len() < before, "seed {seed}"),
                    Ok(None) => {
                        assert_eq!(before - buffer.len(), skipping - decoder.skip, "seed {seed}");
                        let whole = frame(&buffer).ok().flatten();
                        let whole = whole.is_some_and(|f| buffer.len() >= f.header + f.body);
                        assert!(!whole, "seed {seed}: a whole frame is waited for");
                        break;
                    }
                    Err(_) => break,
                }
            }
        }
    }
}
