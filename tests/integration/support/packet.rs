//! As much of MQTT's wire (3.1.1 and 5) as a test's broker needs, shared with nothing of neap.
//! It trusts its peer: a packet it can't read ends the connection.

use serde_json::{Map, Value, json};
use std::io::{Error, ErrorKind, Read, Result};

pub const CONNECT: u8 = 1;
pub const CONNACK: u8 = 2;
pub const PUBLISH: u8 = 3;
pub const PUBACK: u8 = 4;
pub const SUBSCRIBE: u8 = 8;
pub const SUBACK: u8 = 9;
pub const UNSUBSCRIBE: u8 = 10;
pub const UNSUBACK: u8 = 11;
pub const PINGREQ: u8 = 12;
pub const PINGRESP: u8 = 13;
pub const DISCONNECT: u8 = 14;

/// A control packet as it stands on the wire, without its remaining length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub kind: u8,
    pub flags: u8,
    pub body: Vec<u8>,
}

impl Packet {
    pub fn new(kind: u8, flags: u8, body: Vec<u8>) -> Self {
        Self { kind, flags, body }
    }

    /// `None` at a clean end of the stream.
    pub fn read(stream: &mut impl Read) -> Result<Option<Self>> {
        let mut first = [0];
        if stream.read(&mut first)? == 0 {
            return Ok(None);
        }
        let length = variable(|| {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            Ok(byte[0])
        })?;
        let mut body = vec![0; length];
        stream.read_exact(&mut body)?;
        Ok(Some(Self { kind: first[0] >> 4, flags: first[0] & 0x0f, body }))
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.kind << 4 | self.flags];
        let mut rest = self.body.len();
        loop {
            let low = u8::try_from(rest % 128).expect("below 128");
            rest /= 128;
            bytes.push(if rest > 0 { low | 0x80 } else { low });
            if rest == 0 {
                break;
            }
        }
        bytes.extend_from_slice(&self.body);
        bytes
    }

    /// The quality of service of a PUBLISH.
    pub fn qos(&self) -> u8 {
        self.flags >> 1 & 3
    }
}

pub fn puback(packet_id: u16, reason: u8) -> Packet {
    let mut body = packet_id.to_be_bytes().to_vec();
    // Success has the short form, the only one that 3.1.1 knows.
    if reason != 0 {
        body.extend_from_slice(&[reason, 0]);
    }
    Packet::new(PUBACK, 0, body)
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connect {
    /// 4: 3.1.1; 5: 5.
    pub level: u8,
    pub clean: bool,
    pub client_id: String,
}

impl Connect {
    pub fn parse(body: &[u8]) -> Result<Self> {
        let mut cursor = Cursor(body);
        cursor.string()?;
        let level = cursor.byte()?;
        let flags = cursor.byte()?;
        cursor.u16()?;
        if level == 5 {
            cursor.properties()?;
        }
        Ok(Self { level, clean: flags & 2 != 0, client_id: cursor.string()? })
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Publish {
    pub topic: String,
    /// At QoS 1.
    pub packet_id: Option<u16>,
    pub properties: Value,
    pub payload: Vec<u8>,
}

impl Publish {
    pub fn parse(packet: &Packet, level: u8) -> Result<Self> {
        let mut cursor = Cursor(&packet.body);
        let topic = cursor.string()?;
        let packet_id = if packet.qos() > 0 { Some(cursor.u16()?) } else { None };
        let properties = if level == 5 { cursor.properties()? } else { json!({}) };
        Ok(Self { topic, packet_id, properties, payload: cursor.0.to_vec() })
    }
}

/// The packet id and the number of filters of a SUBSCRIBE or UNSUBSCRIBE.
pub fn filters(packet: &Packet, level: u8) -> Result<(u16, Vec<String>)> {
    let mut cursor = Cursor(&packet.body);
    let packet_id = cursor.u16()?;
    if level == 5 {
        cursor.properties()?;
    }
    let mut filters = Vec::new();
    while !cursor.0.is_empty() {
        filters.push(cursor.string()?);
        if packet.kind == SUBSCRIBE {
            cursor.byte()?;
        }
    }
    Ok((packet_id, filters))
}

struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.take(2)?.try_into().expect("two bytes")))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.take(4)?.try_into().expect("four bytes")))
    }

    fn string(&mut self) -> Result<String> {
        let length = self.u16()?;
        String::from_utf8(self.take(length.into())?.to_vec()).map_err(|_| malformed())
    }

    /// MQTT 5 section 2.2.2.2, named as `mosquitto_sub -F %j` names them.
    fn properties(&mut self) -> Result<Value> {
        let length = variable(|| self.byte())?;
        let mut own = Cursor(self.take(length)?);
        let mut found = Map::new();
        while !own.0.is_empty() {
            let (name, value) = match own.byte()? {
                0x01 => ("payload-format-indicator", json!(own.byte()?)),
                0x02 => ("message-expiry-interval", json!(own.u32()?)),
                0x03 => ("content-type", json!(own.string()?)),
                0x08 => ("response-topic", json!(own.string()?)),
                0x09 => {
                    let length = own.u16()?;
                    ("correlation-data", json!(own.take(length.into())?))
                }
                0x0b => ("subscription-identifier", json!(variable(|| own.byte())?)),
                0x11 => ("session-expiry-interval", json!(own.u32()?)),
                0x21 => ("receive-maximum", json!(own.u16()?)),
                0x22 => ("topic-alias-maximum", json!(own.u16()?)),
                0x23 => ("topic-alias", json!(own.u16()?)),
                0x17 => ("request-problem-information", json!(own.byte()?)),
                0x19 => ("request-response-information", json!(own.byte()?)),
                0x27 => ("maximum-packet-size", json!(own.u32()?)),
                0x26 => {
                    let (key, value) = (own.string()?, own.string()?);
                    let users = found.entry("user-properties").or_insert_with(|| json!({}));
                    users[key] = json!(value);
                    continue;
                }
                _ => return Err(malformed()),
            };
            found.insert(name.to_owned(), value);
        }
        Ok(found.into())
    }
}

fn variable(mut byte: impl FnMut() -> Result<u8>) -> Result<usize> {
    let mut value = 0;
    for shift in [0, 7, 14, 21] {
        let next = byte()?;
        value |= usize::from(next & 0x7f) << shift;
        if next & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(malformed())
}

fn malformed() -> Error {
    Error::new(ErrorKind::InvalidData, "malformed MQTT packet")
}
