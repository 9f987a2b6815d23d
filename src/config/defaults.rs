//! Every default, each with its reason. Nowhere else does a value stand for a key that is
//! left out.

use super::images::{ImageLimits, Images, Trust};
use super::{
    Buffer, Config, Http, LimitsWanted, Machine, MemoryShare, MqttVersion, Node, Order, UserNamespaces,
    WhenFull,
};
use crate::model::function::{
    Handler, Limits, Missed, Pull, Retained, Retry, Rollback, Scale, ScaleMin, Serving,
};
use crate::model::reach::Net;
use crate::model::{Target, TopicTemplate};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Where packages put configuration (FHS 3.0 §3.7).
pub const CONFIG_FILE: &str = "/etc/neap/neap.toml";
/// State that outlives a boot (FHS 3.0 §5.8): database and images.
pub const DATA_DIR: &str = "/var/lib/neap";
/// Memory-backed on every current distribution: sockets and function logs stay off the flash.
pub const RUN_DIR: &str = "/run/neap";
pub const FUNCTIONS_DIR: &str = "/etc/neap/functions.d";
pub const CGROUP: &str = "neap";
/// Leaves a quarter to the system, the broker and neap itself.
pub const NODE_MEMORY: MemoryShare = MemoryShare::Percent(75);
/// A function that breaks out of its container as root is no root of the host.
pub const USER_NAMESPACES: UserNamespaces = UserNamespaces::Require;
/// A function that grows or forks without end is killed, not the machine.
pub const LIMITS: LimitsWanted = LimitsWanted::Require;

/// Private (RFC 1918), and none that docker, podman, libvirt, home routers and VPNs take by themselves.
pub const EGRESS_RANGE: Net = Net { address: Ipv4Addr::new(10, 213, 0, 0), bits: 16 };

/// Loopback: nothing is offered to a network that nobody asked for.
pub const HTTP_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// IANA's ports for MQTT and MQTT over TLS.
pub const MQTT_PORT: u16 = 1883;
pub const MQTTS_PORT: u16 = 8883;
pub const HTTPS_PORT: u16 = 443;
/// The broker on the gateway itself.
pub const MQTT_URL: &str = "mqtt://127.0.0.1:1883";
pub const MQTT_VERSION: MqttVersion = MqttVersion::Auto;
/// Named after the node: a session outlives restarts, and no two nodes share one.
pub const MQTT_CLIENT_ID: &str = "neap-{node}";
/// Other than `[mqtt]`'s, so that both may be the same broker.
pub const UPLINK_CLIENT_ID: &str = "neap-{node}-uplink";
pub const UPLINK_TOPIC: &str = "neap/{node}/{function}";

/// Days of small readings, and little beside the smallest eMMC in the field (4 GB).
pub const BUFFER_BYTES_MAX: u64 = 256 * MIB;
/// Commit at once: an acknowledgement waits for nothing but the disk.
/// Nothing is lost that its operator has not said may be.
pub const WHEN_FULL: WhenFull = WhenFull::Reject;
/// An alarm must not wait behind a backlog of days.
pub const ORDER: Order = Order::LiveFirst;
/// The backlog still moves while the site speaks without pause.
pub const LIVE_PERCENT: u8 = 80;
pub const COMMIT_WINDOW: Duration = Duration::ZERO;

/// A small interpreter fits, and a board of 512 MB runs a handful at once.
pub const LIMIT_MEMORY_BYTES: u64 = 64 * MIB;
/// Half a CPU: one busy function leaves a single-core board usable.
pub const LIMIT_CPU_MILLIS: u32 = 500;
/// A shell with pipes, and no fork bomb.
pub const LIMIT_PIDS: u32 = 64;
/// As long as HTTP clients wait.
pub const LIMIT_TIMEOUT: Duration = Duration::from_secs(30);
/// Far above a sensor's reading, small enough to be held in memory a few times.
pub const LIMIT_PAYLOAD_BYTES: u64 = MIB;
/// A quarter of the default memory, which it is part of.
pub const LIMIT_DISK_BYTES: u64 = 16 * MIB;
/// A function that nobody calls costs nothing.
pub const SCALE_MIN: ScaleMin = ScaleMin::Fixed(0);
/// A burst uses the cores that a gateway has, no more.
pub const SCALE_MAX: u32 = 4;
/// A job is one program unless it says otherwise.
pub const SCALE_COPIES: u32 = 1;
/// An interpreter with its modules on half a slow core.
pub const SERVING_START: Duration = Duration::from_secs(30);
/// Long enough for a device that reports each minute, short enough to give memory back.
pub const SCALE_IDLE: Duration = Duration::from_secs(60);
/// What is written for one request at a time stays right.
pub const SCALE_CONCURRENCY: u32 = 1;
/// With the backoff below, a fault of a quarter of a minute (1 + 2 + 4 + 8 s) is outlived.
pub const RETRY_ATTEMPTS: u32 = 5;
pub const RETRY_BACKOFF: Duration = Duration::from_secs(1);
pub const RETRY_BACKOFF_MAX: Duration = Duration::from_secs(5 * 60);

/// For the database: its own default is larger, but grows into it over days; this is what a burst
/// and SQLite's log take at once.
pub const IMAGES_RESERVE_BYTES: u64 = 64 * MIB;
/// Twice the largest image of a machine-learning runtime; a bound against hostile archives.
pub const IMAGES_BYTES_MAX: u64 = 8192 * MIB;
/// A Debian image has 10,000, a large Python one 60,000.
pub const IMAGES_FILES_MAX: u64 = 500_000;
/// kubelet's own watermarks; below them nothing is ever removed unasked.
pub const IMAGES_GC_HIGH: u8 = 85;
pub const IMAGES_GC_LOW: u8 = 80;
/// Bit rot is slow, and reading costs little: each layer once a month …
pub const IMAGES_CHECK_EVERY: Duration = Duration::from_secs(30 * 86_400);
/// … at a rate that an SD card (20 MB/s) hardly notices.
pub const IMAGES_CHECK_RATE: u64 = 2 * MIB;
/// A registry is asked when an image is missing, and at no other time.
pub const PULL: Pull = Pull::Missing;

/// Nobody may be near who would see that a new revision fails.
pub const ROLLBACK: Rollback = Rollback::Auto;

/// At least once, which Promise 1 speaks of.
pub const TRIGGER_QOS: u8 = 1;
pub const TRIGGER_FROM: Target = Target::Local;
/// A reconnect brings every retained message again; a value already seen is no event.
pub const TRIGGER_RETAINED: Retained = Retained::New;
/// The one zone whose clocks never change.
pub const CRON_ZONE: &str = "UTC";
/// A burst of what the node slept through is not what a schedule means.
pub const CRON_MISSED: Missed = Missed::Skip;

/// What an empty neap.toml means.
pub fn config(machine: &Machine) -> Config {
    Config {
        node: node(machine),
        http: Http { listen: HTTP_LISTEN, token_file: None, auth_functions: false, tls: None },
        mqtt: None,
        uplink: None,
        forwards: Vec::new(),
        buffer: buffer(),
        images: images(),
        trust: trust(),
    }
}

pub fn buffer() -> Buffer {
    Buffer {
        bytes_max: BUFFER_BYTES_MAX,
        age_max: Duration::ZERO,
        events_max: 0,
        when_full: WHEN_FULL,
        order: ORDER,
        live_percent: LIVE_PERCENT,
        commit_window: COMMIT_WINDOW,
    }
}

pub fn images() -> Images {
    Images {
        mirrors: Vec::new(),
        insecure: Vec::new(),
        docker_config: None,
        ca: None,
        bandwidth: None,
        window: None,
        limits: ImageLimits {
            reserve_bytes: IMAGES_RESERVE_BYTES,
            bytes: IMAGES_BYTES_MAX,
            files: IMAGES_FILES_MAX,
        },
        gc_high: IMAGES_GC_HIGH,
        gc_low: IMAGES_GC_LOW,
        keep_age: Duration::ZERO,
        import_dir: None,
        check_every: IMAGES_CHECK_EVERY,
        check_rate: IMAGES_CHECK_RATE,
    }
}

/// Every image is taken: who imports or deploys is known, and names what he means.
pub fn trust() -> Trust {
    Trust { others: true, rules: Vec::new() }
}

pub fn node(machine: &Machine) -> Node {
    Node {
        id: machine.node_id(),
        data_dir: PathBuf::from(DATA_DIR),
        run_dir: PathBuf::from(RUN_DIR),
        functions_dir: PathBuf::from(FUNCTIONS_DIR),
        cgroup: CGROUP.to_owned(),
        memory: NODE_MEMORY,
        user_namespaces: USER_NAMESPACES,
        limits: LIMITS,
        egress_range: EGRESS_RANGE,
        mounts: Vec::new(),
    }
}

/// Of functions made for AWS Lambda: its own least memory, and its most for a payload.
pub const LAMBDA_MEMORY_BYTES: u64 = 128 * MIB;
pub const LAMBDA_PAYLOAD_BYTES: u64 = 6 * MIB;

pub fn limits_of(handler: Handler) -> Limits {
    match handler {
        Handler::Stdio | Handler::Http | Handler::Job => limits(),
        Handler::Lambda => {
            Limits { memory_bytes: LAMBDA_MEMORY_BYTES, payload_bytes: LAMBDA_PAYLOAD_BYTES, ..limits() }
        }
    }
}

/// Also those of `neap run`, which has no manifest.
pub fn limits() -> Limits {
    Limits {
        memory_bytes: LIMIT_MEMORY_BYTES,
        cpu_millis: LIMIT_CPU_MILLIS,
        pids: LIMIT_PIDS,
        timeout: LIMIT_TIMEOUT,
        payload_bytes: LIMIT_PAYLOAD_BYTES,
        disk_bytes: LIMIT_DISK_BYTES,
    }
}

pub fn scale() -> Scale {
    Scale { min: SCALE_MIN, max: SCALE_MAX, copies: SCALE_COPIES }
}

pub fn serving() -> Serving {
    Serving {
        port: None,
        ready: None,
        start: SERVING_START,
        idle: SCALE_IDLE,
        concurrency: SCALE_CONCURRENCY,
        function_url: false,
        extensions: true,
    }
}

pub fn retry() -> Retry {
    Retry { attempts: RETRY_ATTEMPTS, backoff: RETRY_BACKOFF, backoff_max: RETRY_BACKOFF_MAX, codes: None }
}

pub fn uplink_topic() -> TopicTemplate {
    TopicTemplate::parse(UPLINK_TOPIC).expect("the default topic is a good template: a test parses it")
}
