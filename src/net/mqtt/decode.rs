//! From bytes to packets, with nothing believed: the guard around rumqttc's codec.
//!
//! The guard frames packets itself and hands the codec one whole frame at a time, so every
//! answer of the codec but "here it is" means malformed (alone, the codec answers "more bytes,
//! please" for some frames that it has already consumed, and a loop that believes it swallows
//! messages). What the codec leaves unchecked is checked here: flags, empty and non-UTF-8
//! topics, NUL, properties that run over their length, packets that no broker may send, the
//! short forms of DISCONNECT.
//!
//! A PUBLISH larger than the limit is read past as it comes: see `Publish::cut`.

use super::{Publish, Received, Version};
use bytes::{Buf, BytesMut};
use rumqttc::mqttbytes::v4;
use rumqttc::v5::mqttbytes::v5;
use std::time::Duration;

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
        if self.skip > 0 {
            let now = self.skip.min(buffer.len());
            buffer.advance(now);
            self.skip -= now;
        }
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
            return Err(Malformed("packet id 0"));
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
        if fits {
            if buffer.len() < frame.header + frame.body {
                return Ok(None);
            }
            let bytes = buffer.split_to(frame.header + frame.body);
            return publish(self.version, bytes, payload).map(|p| Some(Received::Publish(p)));
        }
        // Too large: what is kept is rewritten as a small packet of its own, the rest is read past.
        let keep_properties = head.total() <= HEAD_BYTES_MAX;
        let kept_head = if keep_properties { head.total() } else { head.before_properties };
        let kept_payload = if keep_properties { payload.min(CUT_BYTES) } else { 0 };
        if buffer.len() < frame.header + kept_head + kept_payload {
            return Ok(None);
        }
        let mut bytes = BytesMut::with_capacity(8 + kept_head + kept_payload);
        let no_properties = usize::from(!keep_properties && self.version == Version::V5);
        bytes.extend_from_slice(&[frame.first]);
        put_length(&mut bytes, kept_head + no_properties + kept_payload);
        bytes.extend_from_slice(&buffer[frame.header..frame.header + kept_head]);
        if no_properties == 1 {
            bytes.extend_from_slice(&[0]);
        } else {
            let at = frame.header + head.total();
            bytes.extend_from_slice(&buffer[at..at + kept_payload]);
        }
        let mut cut = publish(self.version, bytes, kept_payload)?;
        cut.cut = Some(payload as u64);
        self.skip = frame.header + frame.body;
        let now = self.skip.min(buffer.len());
        buffer.advance(now);
        self.skip -= now;
        Ok(Some(Received::Publish(cut)))
    }
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

/// A PUBLISH whose frame is whole; `payload_bytes` is where our own framing saw the payload.
fn publish(version: Version, bytes: BytesMut, payload_bytes: usize) -> Result<Publish, Malformed> {
    let publish = match whole(version, bytes)? {
        Packet::V4(v4::Packet::Publish(p)) => Publish {
            topic: p.topic,
            qos: p.qos as u8,
            pkid: p.pkid,
            retain: p.retain,
            payload: p.payload.to_vec(),
            ..Publish::default()
        },
        Packet::V5(v5::Packet::Publish(p)) => {
            let properties = p.properties.unwrap_or_default();
            if properties.topic_alias.is_some() {
                return Err(Malformed("a topic alias, though we allow none"));
            }
            Publish {
                topic: String::from_utf8(p.topic.to_vec()).map_err(|_| Malformed("a topic that is not UTF-8"))?,
                qos: p.qos as u8,
                pkid: p.pkid,
                retain: p.retain,
                payload: p.payload.to_vec(),
                cut: None,
                content_type: properties.content_type,
                expires: properties.message_expiry_interval.map(|s| Duration::from_secs(s.into())),
                user_properties: properties.user_properties,
            }
        }
        _ => return Err(Malformed("PUBLISH")),
    };
    if publish.payload.len() != payload_bytes {
        return Err(Malformed("properties that run over their length"));
    }
    if publish.topic.is_empty() || publish.topic.contains(['\0', '+', '#']) {
        return Err(Malformed("a topic that is empty or has NUL or wildcards"));
    }
    Ok(publish)
}

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

fn put_length(buffer: &mut BytesMut, mut value: usize) {
    loop {
        let low = (value & 0x7F) as u8;
        value >>= 7;
        buffer.extend_from_slice(&[if value > 0 { low | 0x80 } else { low }]);
        if value == 0 {
            return;
        }
    }
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
