//! Bytes on sockets: the HTTP wire (hyper on smol), the MQTT wire (rumqttc's codec on smol), TLS.

pub mod http;
pub mod mqtt;
pub mod tls;
