//! From packets to bytes. Everything that goes out is measured first: the codec writes strings
//! longer than 65,535 bytes whole behind a length that was cut to 16 bits, and the broker
//! would read the rest of such a string as packets.

use super::Version;
use bytes::{BufMut, BytesMut};
use rumqttc::mqttbytes::v4;
use rumqttc::v5::mqttbytes::v5;
use std::borrow::Cow;

const STRING_BYTES_MAX: usize = 65_535;
/// MQTT's own limit for a packet's remaining length (MQTT 5.0 §2.1.4).
const PACKET_BYTES_MAX: usize = 268_435_455;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    #[error("{what} is longer than 65535 bytes, which MQTT cannot carry")]
    StringTooLong { what: &'static str },
    #[error("the packet would be {bytes} bytes; the broker takes at most {bytes_max}")]
    PacketTooLarge { bytes: usize, bytes_max: usize },
}

/// A QoS 1 message to publish.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outgoing<'a> {
    pub topic: &'a str,
    pub payload: &'a [u8],
    /// MQTT 5 only, left out on 3.1.1.
    pub content_type: Option<&'a str>,
    /// MQTT 5 only, left out on 3.1.1.
    pub user_properties: &'a [(&'a str, Cow<'a, str>)],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscribeFilter {
    pub filter: String,
    /// 0 or 1.
    pub qos: u8,
}

#[derive(Clone, Copy, Debug)]
pub struct Encoder {
    pub version: Version,
    /// The broker's Maximum Packet Size.
    pub packet_bytes_max: Option<u32>,
}

pub(super) struct Connect<'a> {
    pub client_id: &'a str,
    pub keep_alive_s: u16,
    pub session_expiry_s: u32,
    pub receive_max: u16,
    pub login: Option<(&'a str, &'a str)>,
}

impl Encoder {
    /// `pkid` is not 0. Without the codec, whose packets own their strings: a backlog is sent as fast
    /// as this is (MQTT 5.0 §3.3, 3.1.1 §3.3).
    pub fn publish(&self, out: &mut BytesMut, pkid: u16, message: &Outgoing<'_>) -> Result<(), EncodeError> {
        fits("the topic", message.topic)?;
        let properties = match self.version {
            Version::V311 => None,
            Version::V5 => Some(properties_bytes(message)?),
        };
        let properties_all = properties.map_or(0, |bytes| varint_bytes(bytes) + bytes);
        let body = 2 + message.topic.len() + 2 + properties_all + message.payload.len();
        self.room(1 + varint_bytes(body) + body)?;

        out.reserve(1 + varint_bytes(body) + body);
        out.put_u8(0x30 | 1 << 1); // PUBLISH, QoS 1
        put_varint(out, body);
        put_string(out, message.topic);
        out.put_u16(pkid);
        if let Some(bytes) = properties {
            put_varint(out, bytes);
            for (name, value) in message.user_properties {
                out.put_u8(0x26);
                put_string(out, name);
                put_string(out, value);
            }
            if let Some(content_type) = message.content_type {
                out.put_u8(0x03);
                put_string(out, content_type);
            }
        }
        out.extend_from_slice(message.payload);
        Ok(())
    }

    /// `identifier` is MQTT 5 only. Retained messages are sent for subscriptions that are new to the broker, on MQTT 5 for
    /// them only (retain handling 1); 3.1.1 sends them with every SUBSCRIBE.
    pub fn subscribe(
        &self,
        out: &mut BytesMut,
        pkid: u16,
        filters: &[SubscribeFilter],
        identifier: Option<u32>,
    ) -> Result<(), EncodeError> {
        for filter in filters {
            fits("a topic filter", &filter.filter)?;
        }
        match self.version {
            Version::V311 => {
                let mut packet = v4::Subscribe::new_many(filters.iter().map(|f| {
                    let qos = if f.qos == 0 {
                        rumqttc::mqttbytes::QoS::AtMostOnce
                    } else {
                        rumqttc::mqttbytes::QoS::AtLeastOnce
                    };
                    v4::SubscribeFilter::new(f.filter.clone(), qos)
                }));
                packet.pkid = pkid;
                self.room(packet.size())?;
                write(packet.write(out))
            }
            Version::V5 => {
                let filters = filters.iter().map(|f| {
                    let qos = if f.qos == 0 {
                        rumqttc::v5::mqttbytes::QoS::AtMostOnce
                    } else {
                        rumqttc::v5::mqttbytes::QoS::AtLeastOnce
                    };
                    let mut filter = v5::Filter::new(f.filter.clone(), qos);
                    filter.retain_forward_rule = v5::RetainForwardRule::OnNewSubscribe;
                    filter
                });
                let properties = identifier
                    .map(|id| v5::SubscribeProperties { id: Some(id as usize), user_properties: Vec::new() });
                let mut packet = v5::Subscribe::new_many(filters, properties);
                packet.pkid = pkid;
                self.room(packet.size())?;
                write(packet.write(out))
            }
        }
    }

    pub fn unsubscribe(&self, out: &mut BytesMut, pkid: u16, filters: &[String]) -> Result<(), EncodeError> {
        for filter in filters {
            fits("a topic filter", filter)?;
        }
        match self.version {
            Version::V311 => {
                let packet = v4::Unsubscribe { pkid, topics: filters.to_vec() };
                self.room(packet.size())?;
                write(packet.write(out))
            }
            Version::V5 => {
                let packet = v5::Unsubscribe { pkid, filters: filters.to_vec(), properties: None };
                self.room(packet.size())?;
                write(packet.write(out))
            }
        }
    }

    pub fn puback(&self, out: &mut BytesMut, pkid: u16) {
        let [high, low] = pkid.to_be_bytes();
        out.extend_from_slice(&[0x40, 2, high, low]);
    }

    pub fn ping(&self, out: &mut BytesMut) {
        out.extend_from_slice(&[0xC0, 0]);
    }

    /// A clean leave; the session stays. The short form is the same in both versions.
    pub fn disconnect(&self, out: &mut BytesMut) {
        out.extend_from_slice(&[0xE0, 0]);
    }

    pub(super) fn connect(&self, out: &mut BytesMut, connect: &Connect<'_>) -> Result<(), EncodeError> {
        fits("the client id", connect.client_id)?;
        if let Some((username, password)) = connect.login {
            fits("the user name", username)?;
            fits("the password", password)?;
        }
        match self.version {
            Version::V311 => {
                let mut packet = v4::Connect::new(connect.client_id);
                packet.keep_alive = connect.keep_alive_s;
                packet.clean_session = false;
                if let Some((username, password)) = connect.login {
                    packet.set_login(username, password);
                }
                write(packet.write(out))
            }
            Version::V5 => {
                let mut properties = v5::ConnectProperties::new();
                properties.session_expiry_interval = Some(connect.session_expiry_s);
                properties.receive_maximum = Some(connect.receive_max);
                let packet = v5::Connect {
                    keep_alive: connect.keep_alive_s,
                    client_id: connect.client_id.to_owned(),
                    clean_start: false,
                    properties: Some(properties),
                };
                let login = connect.login.map(|(username, password)| v5::Login::new(username, password));
                write(packet.write(&None, &login, out))
            }
        }
    }

    fn room(&self, bytes: usize) -> Result<(), EncodeError> {
        let bytes_max = self.packet_bytes_max.map_or(PACKET_BYTES_MAX, |max| max as usize);
        let bytes_max = bytes_max.min(PACKET_BYTES_MAX);
        if bytes > bytes_max { Err(EncodeError::PacketTooLarge { bytes, bytes_max }) } else { Ok(()) }
    }
}

/// Of a PUBLISH, without their own length.
fn properties_bytes(message: &Outgoing<'_>) -> Result<usize, EncodeError> {
    let mut bytes = 0;
    if let Some(content_type) = message.content_type {
        fits("the content type", content_type)?;
        bytes += 1 + 2 + content_type.len();
    }
    for (name, value) in message.user_properties {
        fits("an attribute", name)?;
        fits("an attribute", value)?;
        bytes += 1 + 2 + name.len() + 2 + value.len();
    }
    Ok(bytes)
}

/// MQTT 5.0 §1.5.5. `room` has refused what is longer than four bytes can say.
fn varint_bytes(value: usize) -> usize {
    match value {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}

fn put_varint(out: &mut BytesMut, mut value: usize) {
    loop {
        let more = value > 0x7F;
        out.put_u8((value & 0x7F) as u8 | u8::from(more) << 7);
        value >>= 7;
        if !more {
            return;
        }
    }
}

/// `fits` has been asked.
fn put_string(out: &mut BytesMut, text: &str) {
    out.put_u16(text.len() as u16);
    out.extend_from_slice(text.as_bytes());
}

fn fits(what: &'static str, text: &str) -> Result<(), EncodeError> {
    if text.len() > STRING_BYTES_MAX { Err(EncodeError::StringTooLong { what }) } else { Ok(()) }
}

/// The codec's own errors are for packets that `room`, `fits` and a packet id exclude.
fn write<E: std::fmt::Debug>(result: Result<usize, E>) -> Result<(), EncodeError> {
    debug_assert!(result.is_ok(), "measured before: {result:?}");
    match result {
        Ok(_) => Ok(()),
        Err(_) => Err(EncodeError::PacketTooLarge { bytes: PACKET_BYTES_MAX, bytes_max: PACKET_BYTES_MAX }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_that_mqtt_cannot_carry_never_reach_the_wire() {
        let long = "x".repeat(70_000);
        for version in [Version::V311, Version::V5] {
            let encoder = Encoder { version, packet_bytes_max: None };
            let mut out = BytesMut::new();

            let message = Outgoing { topic: &long, ..Outgoing::default() };
            assert!(encoder.publish(&mut out, 1, &message).is_err());
            let filter = SubscribeFilter { filter: long.clone(), qos: 1 };
            assert!(encoder.subscribe(&mut out, 1, &[filter], None).is_err());
            assert!(encoder.unsubscribe(&mut out, 1, std::slice::from_ref(&long)).is_err());
            let connect = Connect {
                client_id: &long,
                keep_alive_s: 30,
                session_expiry_s: 60,
                receive_max: 10,
                login: None,
            };
            assert!(encoder.connect(&mut out, &connect).is_err());

            assert!(out.is_empty());
        }
        let encoder = Encoder { version: Version::V5, packet_bytes_max: None };
        for attribute in [("name", Cow::from(&long)), (&long, "value".into())] {
            let message = Outgoing { topic: "t", user_properties: &[attribute], ..Outgoing::default() };
            assert!(encoder.publish(&mut BytesMut::new(), 1, &message).is_err());
        }
        let message = Outgoing { topic: "t", content_type: Some(&long), ..Outgoing::default() };
        assert!(encoder.publish(&mut BytesMut::new(), 1, &message).is_err());
    }

    #[test]
    fn packet_larger_than_the_broker_takes_is_refused_before_it_is_written() {
        for version in [Version::V311, Version::V5] {
            let encoder = Encoder { version, packet_bytes_max: Some(100) };
            let mut out = BytesMut::new();
            let message = Outgoing { topic: "t", payload: &[0; 100], ..Outgoing::default() };

            let error = encoder.publish(&mut out, 1, &message);

            assert!(matches!(error, Err(EncodeError::PacketTooLarge { bytes_max: 100, .. })), "{error:?}");
            assert!(out.is_empty());
        }
    }

    /// As the codec would write it, for every length of a length.
    fn agrees(topic: &str, payload: &[u8], content_type: Option<&str>, attributes: &[(String, String)]) {
        let properties: Vec<(&str, Cow<'_, str>)> =
            attributes.iter().map(|(name, value)| (name.as_str(), value.into())).collect();
        let message = Outgoing { topic, payload, content_type, user_properties: &properties };
        for version in [Version::V311, Version::V5] {
            let (mut ours, mut codecs) = (BytesMut::new(), BytesMut::new());
            let encoder = Encoder { version, packet_bytes_max: None };
            encoder.publish(&mut ours, 777, &message).expect("it fits");
            match version {
                Version::V311 => {
                    let qos = rumqttc::mqttbytes::QoS::AtLeastOnce;
                    let mut packet = v4::Publish::new(topic, qos, payload);
                    packet.pkid = 777;
                    packet.write(&mut codecs).expect("it fits");
                }
                Version::V5 => {
                    let properties = v5::PublishProperties {
                        content_type: content_type.map(str::to_owned),
                        user_properties: attributes.to_vec(),
                        ..v5::PublishProperties::default()
                    };
                    let qos = rumqttc::v5::mqttbytes::QoS::AtLeastOnce;
                    let mut packet = v5::Publish::new(topic, qos, payload.to_vec(), Some(properties));
                    packet.pkid = 777;
                    packet.write(&mut codecs).expect("it fits");
                }
            }
            assert_eq!(ours, codecs, "{version:?}");
        }
    }

    #[test]
    fn publishes_are_what_the_codec_would_write() {
        for bytes in [0, 1, 100, 119, 120, 121, 127, 128, 16_370, 16_383, 16_384, 2_097_140, 2_097_152] {
            agrees("a/b", &vec![7; bytes], None, &[]);
        }
        for bytes in [0, 1, 100, 120, 121, 122, 127, 128, 16_370, 16_380, 16_384, 65_535] {
            let attribute = ("id".to_owned(), "v".repeat(bytes));
            agrees("grün/\u{1F30A}", b"x", Some("text/plain"), &[attribute.clone(), attribute]);
        }
    }
}
