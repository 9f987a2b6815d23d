//! neap.toml → `Config`. One reader for each table; what contradicts what is checked where
//! both sides are known.

use super::problem::{Report, shown};
use super::reader::{Keys, Section, document};
use super::{
    Broker, Buffer, ClientTls, Config, DayWindow, Format, Forward, Http, LimitsWanted, Machine, MemoryShare,
    MqttVersion, Node, Order, Problem, Receiver, Remote, ServerTls, Uplink, UplinkLimits, UserNamespaces,
    WhenFull, defaults, images, manifest, permissions, units, url,
};
use crate::model::reach::Net;
use crate::model::{TopicFilter, TopicTemplate};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

const ROOT: Keys =
    Keys { now: &["node", "http", "mqtt", "uplink", "forward", "buffer", "images", "trust"], later: &[] };
const NODE: Keys = Keys {
    now: &[
        "id",
        "data_dir",
        "run_dir",
        "functions_dir",
        "cgroup",
        "memory",
        "user_namespaces",
        "limits",
        "egress_range",
        "mounts",
    ],
    later: &[],
};
const HTTP: Keys = Keys { now: &["listen", "token_file", "auth_functions", "tls"], later: &[] };
const HTTP_TLS: Keys = Keys { now: &["cert", "key", "client_ca"], later: &[] };
const MQTT: Keys =
    Keys { now: &["url", "version", "client_id", "username", "password_file", "tls"], later: &[] };
const MQTT_TLS: Keys = Keys { now: &["ca", "cert", "key", "alpn"], later: &[] };
const UPLINK: Keys = Keys {
    now: &[
        "url",
        "topic",
        "window",
        "bytes_per_day",
        "format",
        "version",
        "client_id",
        "username",
        "password_file",
        "token_file",
        "tls",
    ],
    later: &[],
};
const FORWARD: Keys = Keys { now: &["mqtt", "topic"], later: &[] };
const BUFFER: Keys = Keys {
    now: &["max_bytes", "max_age", "max_events", "when_full", "order", "live_share", "commit_window"],
    later: &[],
};
/// All of them, for the test that the annotated file names every key.
#[cfg(test)]
pub(super) const KEYS: [Keys; 12] = [
    ROOT,
    NODE,
    HTTP,
    HTTP_TLS,
    MQTT,
    MQTT_TLS,
    UPLINK,
    FORWARD,
    BUFFER,
    images::IMAGES,
    images::TRUST,
    images::RULE,
];

/// Of the range for instances with a way out.
const EGRESS_BITS: std::ops::RangeInclusive<u8> = 8..=30;
/// Directories that functions may mount: each names one that holds theirs.
const MOUNTS_MAX: usize = 64;
const KERNELS: [&str; 3] = ["/proc", "/sys", "/dev"];
/// A node's id is part of topics, client ids and event sources; both must stay short.
const NODE_ID_BYTES_MAX: usize = 128;
/// The socket `run_dir/neap.sock` and its temporary name must fit a Unix address, 108 bytes (unix(7)).
const RUN_DIR_BYTES_MAX: usize = 88;
/// cgroup directories are file names: 255 bytes each, and the instance's own follows.
const CGROUP_BYTES_MAX: usize = 200;
/// Brokers must take 23 bytes (MQTT 3.1.1 §3.1.3.1); those in the field take far more, none
/// takes more than a string's 16-bit length. A bound for messages and memory.
const CLIENT_ID_BYTES_MAX: usize = 256;
/// RFC 7301 §3.1: a protocol's name has an 8-bit length.
const ALPN_BYTES_MAX: usize = 255;
/// Below this SQLite's own pages and its log leave no room for events.
const BUFFER_BYTES_MIN: u64 = 1 << 20;
const BUFFER_BYTES_CEILING: u64 = 1 << 40;
/// Ten years: beyond the life of a gateway's disk.
const BUFFER_AGE_CEILING: Duration = Duration::from_secs(10 * 366 * 24 * 3600);
/// No link of a gateway carries more.
const BYTES_PER_DAY_MAX: u64 = 1 << 50;
/// Every sender waits for it; beyond this, clients give up first.
const COMMIT_WINDOW_MAX: Duration = Duration::from_secs(10);

pub(super) fn read(file: &str, text: &str, machine: &Machine) -> (Config, Vec<Problem>) {
    let report = Report::new(file, text);
    let table = document(&report, text);
    let root = Section::root(&report, &table, ROOT);

    let node = root.table("node", NODE).map_or_else(|| defaults::node(machine), |s| node(&s, machine));
    let default = defaults::config(machine);
    let http = root.table("http", HTTP).map_or(default.http, |s| http(&s));
    let mqtt = root.table("mqtt", MQTT).map(|s| broker(&s, &node.id, false));
    let uplink = root.table("uplink", UPLINK).map(|s| uplink(&s, &node.id));
    let forwards = forwards(&root);
    let buffer = root.table("buffer", BUFFER).map_or(default.buffer, |s| buffer(&s));
    let images = root.table("images", images::IMAGES).map_or(default.images, |s| images::images(&s));
    let trust = root.table("trust", images::TRUST).map_or(default.trust, |s| images::trust(&s));

    let same = |uplink: &Uplink| match (&mqtt, &uplink.remote) {
        (Some(mqtt), Remote::Mqtt(broker)) => same_session(mqtt, broker),
        _ => false,
    };
    if uplink.as_ref().is_some_and(same) {
        let what =
            "uplink.client_id: the same as [mqtt]'s on the same broker: each connection would end the other";
        report.at(&root.span("uplink"), what);
    }
    (Config { node, http, mqtt, uplink, forwards, buffer, images, trust }, report.into_problems())
}

/// One client id at one broker is one session, whoever connects (MQTT 3.1.1 §3.1.4).
fn same_session(a: &Broker, b: &Broker) -> bool {
    a.host.eq_ignore_ascii_case(&b.host) && a.port == b.port && a.client_id == b.client_id
}

fn node(section: &Section<'_>, machine: &Machine) -> Node {
    let default = defaults::node(machine);
    let spaces = [("require", UserNamespaces::Require), ("prefer", UserNamespaces::Prefer)];
    let limits = [("require", LimitsWanted::Require), ("prefer", LimitsWanted::Prefer)];
    let node = Node {
        id: section.parsed("id", node_id).unwrap_or(default.id),
        data_dir: section.path("data_dir").unwrap_or(default.data_dir),
        run_dir: section.path("run_dir").unwrap_or(default.run_dir),
        functions_dir: section.path("functions_dir").unwrap_or(default.functions_dir),
        cgroup: section.parsed("cgroup", cgroup).unwrap_or(default.cgroup),
        memory: section.parsed("memory", memory).unwrap_or(default.memory),
        user_namespaces: section.choice("user_namespaces", &spaces, &[]).unwrap_or(default.user_namespaces),
        limits: section.choice("limits", &limits, &[]).unwrap_or(default.limits),
        egress_range: section.parsed("egress_range", egress_range).unwrap_or(default.egress_range),
        mounts: Vec::new(),
    };
    let node = Node { mounts: mounts(section, &node), ..node };
    if node.run_dir.as_os_str().len() > RUN_DIR_BYTES_MAX {
        let what =
            format!("longer than {RUN_DIR_BYTES_MAX} bytes, which a Unix socket's address has no room for");
        section.bad("run_dir", what);
    }
    if node.run_dir == node.data_dir {
        section.bad("run_dir", "the same as data_dir; what is swept at every start must be apart");
    }
    node
}

/// What functions may mount: nothing that is the node's alone, nor what holds it.
fn mounts(section: &Section<'_>, node: &Node) -> Vec<PathBuf> {
    let mut mounts: Vec<PathBuf> = Vec::new();
    let dirs =
        [("data_dir", &node.data_dir), ("run_dir", &node.run_dir), ("functions_dir", &node.functions_dir)];
    let holds = |dir: &Path, text: &str| dir.starts_with(text) || Path::new(text).starts_with(dir);
    for (text, span) in section.strings("mounts").unwrap_or_default() {
        let told = |what: String| section.bad_at(&span, "mounts", what);
        if let Err(why) = permissions::plain(text) {
            told(why);
        } else if let Some(own) = KERNELS.iter().find(|own| permissions::nested(own, text)) {
            told(format!("{} can't be: {own} is the kernel's", shown(text)));
        } else if let Some((key, dir)) = dirs.iter().find(|(_, dir)| holds(dir, text)) {
            let what = "is the node's alone; name a directory apart from it";
            told(format!("{} can't be: {key}, {}, {what}", shown(text), shown(&dir.to_string_lossy())));
        } else if mounts.iter().any(|other| other == Path::new(text)) {
            told(format!("{} is there twice", shown(text)));
        } else {
            mounts.push(PathBuf::from(text));
        }
    }
    if mounts.len() > MOUNTS_MAX {
        section.bad("mounts", format!("more than {MOUNTS_MAX}"));
    }
    mounts
}

fn node_id(text: &str) -> Result<String, String> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if (1..=NODE_ID_BYTES_MAX).contains(&text.len()) && text.bytes().all(good) {
        Ok(text.to_owned())
    } else {
        let rule = format!("1 to {NODE_ID_BYTES_MAX} of A-Z, a-z, 0-9, `.`, `_` and `-`");
        Err(format!("{} is no node id: {rule}", shown(text)))
    }
}

/// A gateway, and one instance at least; no more than private networks have.
fn egress_range(text: &str) -> Result<Net, String> {
    let net = Net::parse(text).map_err(|why| format!("{} {why}", shown(text)))?;
    if !EGRESS_BITS.contains(&net.bits) {
        let (most, least) = (EGRESS_BITS.start(), EGRESS_BITS.end());
        return Err(format!("{} is none of /{most} to /{least}", shown(text)));
    }
    let reserved = ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"];
    match reserved.iter().find(|other| Net::parse(other).is_ok_and(|other| other.overlaps(net))) {
        Some(other) => Err(format!("{} lies in {other}, where no instance can be", shown(text))),
        None => Ok(net),
    }
}

fn cgroup(text: &str) -> Result<String, String> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"._-@:".contains(&b);
    let part = |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(good);
    if text.len() <= CGROUP_BYTES_MAX && text.split('/').all(part) {
        Ok(text.to_owned())
    } else {
        let rule = "a path below the cgroup root without a leading slash, as in \"neap\"";
        Err(format!("{} is no cgroup: {rule}", shown(text)))
    }
}

fn memory(text: &str) -> Result<MemoryShare, String> {
    if text.ends_with('%') {
        let percent = units::parse_percent(text).map(MemoryShare::Percent);
        return percent.ok_or_else(|| format!("{} is no share; expected 1% to 100%", shown(text)));
    }
    let Some(bytes) = units::parse_size(text) else {
        let forms = format!("a share as in \"75%\", or {}", units::SIZES);
        return Err(format!("{} is no amount of memory; expected {forms}", shown(text)));
    };
    if bytes < manifest::MEMORY_BYTES_MIN {
        let least = units::show_size(manifest::MEMORY_BYTES_MIN);
        return Err(format!("{} is less than the smallest function needs, {least}", units::show_size(bytes)));
    }
    Ok(MemoryShare::Bytes(bytes))
}

fn http(section: &Section<'_>) -> Http {
    let http = Http {
        listen: section.parsed("listen", listen).unwrap_or(defaults::HTTP_LISTEN),
        token_file: section.path("token_file"),
        auth_functions: section.bool("auth_functions").unwrap_or(false),
        tls: section.table("tls", HTTP_TLS).and_then(|tls| server_tls(&tls)),
    };
    // Keys that are there but wrong have their own line: they count as meant.
    let token = section.has("token_file");
    let client_ca = section.table_has("tls", "client_ca");
    if !http.listen.ip().to_canonical().is_loopback() && !token && !client_ca {
        section.bad("listen", "beyond loopback needs token_file, or tls with client_ca");
    }
    if http.auth_functions && !token {
        section.bad("auth_functions", "there is no token to ask for; set token_file");
    }
    http
}

fn listen(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        let way_out = match (text.strip_prefix(':'), text.rsplit_once(':')) {
            (Some(port), _) if port.parse::<u16>().is_ok() => {
                format!("write \"127.0.0.1:{port}\", or \"0.0.0.0:{port}\" for every address")
            }
            (_, Some(("localhost", _))) => "names are not looked up; write 127.0.0.1".to_owned(),
            _ if text.parse::<IpAddr>().is_ok() => "the port is missing".to_owned(),
            _ => "expected an address and a port, as in \"127.0.0.1:8080\" or \"[::1]:8080\"".to_owned(),
        };
        format!("{} is no address to listen on; {way_out}", shown(text))
    })
}

fn server_tls(section: &Section<'_>) -> Option<ServerTls> {
    let (cert, key) = (section.path("cert"), section.path("key"));
    let client_ca = section.path("client_ca");
    for missing in ["cert", "key"].into_iter().filter(|key| !section.has(key)) {
        section.missing(format!("{} is missing: TLS needs cert and key", section.name(missing)));
    }
    Some(ServerTls { cert: cert?, key: key?, client_ca })
}

/// What `[mqtt]` and `[uplink]` have in common.
fn broker(section: &Section<'_>, node: &str, uplink: bool) -> Broker {
    let versions = [("auto", MqttVersion::Auto), ("5", MqttVersion::V5), ("3.1.1", MqttVersion::V311)];
    let address = match section.has("url") {
        true => section.parsed("url", |text| url::parse(text, uplink)),
        false => url::parse(defaults::MQTT_URL, false).ok(),
    };
    if uplink && section.has("token_file") {
        section.bad("token_file", "is for an https:// url; MQTT has username and password_file");
    }
    if uplink && !section.has("url") {
        section.missing("uplink.url is missing, as in \"mqtts://cloud.example:8883\"");
    }
    let tls = section.table("tls", MQTT_TLS).map(|tls| client_tls(&tls));
    if section.has("tls") && address.as_ref().is_some_and(|address| !address.tls) {
        section.bad("tls", "means nothing with an mqtt:// url; write mqtts://");
    }
    if section.has("password_file") && !section.has("username") {
        section.bad("password_file", "needs a username (MQTT 3.1.1 §3.1.2.9)");
    }
    let default_id = if uplink { defaults::UPLINK_CLIENT_ID } else { defaults::MQTT_CLIENT_ID };
    let client_id = section.parsed("client_id", |text| client_id(text, node));
    Broker {
        client_id: client_id.unwrap_or_else(|| default_id.replace("{node}", node)),
        version: section.choice("version", &versions, &[]).unwrap_or(defaults::MQTT_VERSION),
        username: section.parsed("username", username),
        password_file: section.path("password_file"),
        tls: address.as_ref().is_some_and(|a| a.tls).then(|| tls.unwrap_or_default()),
        port: address.as_ref().map_or(defaults::MQTT_PORT, |a| a.port),
        host: address.map(|a| a.host).unwrap_or_default(),
    }
}

fn client_id(text: &str, node: &str) -> Result<String, String> {
    let id = text.replace("{node}", node);
    if id.contains(['{', '}']) {
        Err(format!("{} has an unknown placeholder; known here: {{node}}", shown(text)))
    } else if !(1..=CLIENT_ID_BYTES_MAX).contains(&id.len()) || id.chars().any(char::is_control) {
        let rule = format!("1 to {CLIENT_ID_BYTES_MAX} bytes without control characters");
        Err(format!("{} is no client id: {rule}", shown(text)))
    } else {
        Ok(id)
    }
}

fn username(text: &str) -> Result<String, String> {
    // MQTT 5.0 §1.5.4: a string on the wire has a 16-bit length and no NUL.
    let good = (1..=usize::from(u16::MAX)).contains(&text.len()) && !text.chars().any(char::is_control);
    if good { Ok(text.to_owned()) } else { Err("1 to 65535 bytes without control characters".to_owned()) }
}

fn client_tls(section: &Section<'_>) -> ClientTls {
    for (there, missing) in [("cert", "key"), ("key", "cert")] {
        if section.has(there) && !section.has(missing) {
            section.bad(there, format!("needs {} beside it", section.name(missing)));
        }
    }
    let mut alpn = Vec::new();
    for (name, span) in section.strings("alpn").unwrap_or_default() {
        if (1..=ALPN_BYTES_MAX).contains(&name.len()) {
            alpn.push(name.to_owned());
        } else {
            section.bad_at(&span, "alpn", format!("a protocol's name is 1 to {ALPN_BYTES_MAX} bytes"));
        }
    }
    ClientTls { ca: section.path("ca"), cert: section.path("cert"), key: section.path("key"), alpn }
}

fn uplink(section: &Section<'_>, node: &str) -> Uplink {
    let formats = [("auto", Format::Auto), ("raw", Format::Raw)];
    let https = section.text_if("url").is_some_and(|url| url.starts_with("https://"));
    let format = section.choice("format", &formats, &[]).unwrap_or(Format::Auto);
    if https && format == Format::Raw {
        section.bad("format", "a batch of CloudEvents has no raw form; leave it out");
    }
    Uplink {
        remote: if https {
            Remote::Https(receiver(section))
        } else {
            Remote::Mqtt(broker(section, node, true))
        },
        topic: section.topic("topic", TopicTemplate::parse).unwrap_or_else(defaults::uplink_topic),
        format,
        limits: UplinkLimits {
            window: section.parsed("window", day_window).unwrap_or_default(),
            bytes_per_day: section.size("bytes_per_day", 0..=BYTES_PER_DAY_MAX).unwrap_or_default(),
        },
    }
}

/// An uplink that takes batches by POST.
fn receiver(section: &Section<'_>) -> Receiver {
    for key in ["version", "client_id"].into_iter().filter(|key| section.has(key)) {
        section.bad(key, "is MQTT's; it means nothing with an https:// url");
    }
    let address = section.parsed("url", url::parse_https);
    let (username, password_file) = (section.parsed("username", username), section.path("password_file"));
    let token_file = section.path("token_file");
    if section.has("username") != section.has("password_file") {
        let key = if section.has("username") { "username" } else { "password_file" };
        section.bad(key, "username and password_file go together (RFC 7617)");
    }
    if section.has("token_file") && section.has("username") {
        section.bad("token_file", "there is one Authorization; take token_file or username, not both");
    }
    let tls = section.table("tls", MQTT_TLS).map(|tls| client_tls(&tls)).unwrap_or_default();
    if !tls.alpn.is_empty() {
        section.bad("tls", "alpn means nothing with an https:// url: it speaks HTTP/1.1");
    }
    let (address, target) = address.unwrap_or_default();
    Receiver { host: address.host, port: address.port, target, tls, username, password_file, token_file }
}

pub(super) fn day_window(text: &str) -> Result<Option<DayWindow>, String> {
    if text == "always" {
        return Ok(None);
    }
    let minutes = |text: &str| {
        let (hour, minute) = text.split_once(':')?;
        let digits = |text: &str| text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
        let (hour, minute) =
            (digits(hour) && digits(minute)).then(|| Some((hour.parse().ok()?, minute.parse().ok()?)))??;
        let minutes: (u16, u16) = (hour, minute);
        (minutes.0 < 24 && minutes.1 < 60).then_some(minutes.0 * 60 + minutes.1)
    };
    let window = text.split_once('-').and_then(|(from, until)| Some((minutes(from)?, minutes(until)?)));
    match window {
        Some((from, until)) if from == until => {
            Err(format!("{} is no time at all; write \"always\" for the whole day", shown(text)))
        }
        Some((from, until)) => Ok(Some(DayWindow { from, until })),
        None => Err(format!(
            "{} is no window; expected \"always\" or UTC times as in \"02:00-04:00\"",
            shown(text)
        )),
    }
}

fn forwards(root: &Section<'_>) -> Vec<Forward> {
    let mut forwards: Vec<Forward> = Vec::new();
    for section in root.tables("forward", FORWARD) {
        for (table, why) in [("mqtt", "it takes from"), ("uplink", "it sends to")] {
            if !root.has(table) {
                section.missing(format!("[[forward]] needs [{table}], which {why}"));
            }
        }
        for key in ["mqtt", "topic"].into_iter().filter(|key| !section.has(key)) {
            section.missing(format!("{} is missing", section.name(key)));
        }
        let filter = section.topic("mqtt", TopicFilter::parse);
        let topic = section.topic("topic", TopicTemplate::parse);
        if topic.as_ref().is_some_and(|topic| topic.as_str().contains("{function}")) {
            section.bad("topic", "{function} has no meaning here: no function stands between");
        }
        let (Some(filter), Some(topic)) = (filter, topic) else { continue };
        let forward = Forward { filter, topic };
        if forwards.contains(&forward) {
            section.wrong("the same [[forward]] stands above: each message would be sent twice");
        }
        forwards.push(forward);
    }
    forwards
}

fn buffer(section: &Section<'_>) -> Buffer {
    let age = section.time("max_age", Duration::ZERO..=BUFFER_AGE_CEILING);
    let events = section.integer("max_events", 0..=u32::MAX);
    let when_full = [
        ("reject", WhenFull::Reject),
        ("drop-oldest", WhenFull::DropOldest),
        ("drop-lowest-priority", WhenFull::DropLowestPriority),
    ];
    let when_full = section.choice("when_full", &when_full, &[]);
    let order = section.choice("order", &[("live-first", Order::LiveFirst), ("fifo", Order::Fifo)], &[]);
    let bytes = section.size("max_bytes", BUFFER_BYTES_MIN..=BUFFER_BYTES_CEILING);
    let window = section.time("commit_window", Duration::ZERO..=COMMIT_WINDOW_MAX);
    Buffer {
        bytes_max: bytes.unwrap_or(defaults::BUFFER_BYTES_MAX),
        age_max: age.unwrap_or_default(),
        events_max: events.unwrap_or_default().into(),
        when_full: when_full.unwrap_or(defaults::WHEN_FULL),
        order: order.unwrap_or(defaults::ORDER),
        live_percent: live_percent(section).unwrap_or(defaults::LIVE_PERCENT),
        commit_window: window.unwrap_or(defaults::COMMIT_WINDOW),
    }
}

fn live_percent(section: &Section<'_>) -> Option<u8> {
    let share = section.number("live_share")?;
    if !(0.0..=1.0).contains(&share) {
        section.bad("live_share", format!("{share} is no share; expected 0.0 to 1.0"));
        return None;
    }
    Some((share * 100.0).round() as u8)
}
