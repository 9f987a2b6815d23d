//! One TLS stack (rustls with ring) for HTTP and MQTT.

pub mod client;
pub mod server;
