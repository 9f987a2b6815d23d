//! The laws of configuration, whole files at a time; units and URLs have theirs beside them.

use super::*;
use crate::model::function::{
    Handler, HttpTrigger, Limits, Missed, MqttTrigger, Output, Platform, Rate, Retained, Retry, Scale,
    ScaleMin, Trigger,
};
use crate::model::{Lane, Manifest};
use proptest::prelude::*;
use std::fs;
use std::path::Path;

fn machine() -> Machine {
    Machine { machine_id: Some("0123456789abcdef0123456789abcdef".to_owned()), hostname: "gw".to_owned() }
}

fn config(text: &str) -> Config {
    Config::parse("neap.toml", text, &machine()).unwrap_or_else(|problems| panic!("{}", lines(&problems)))
}

/// A node with every part that manifests may need.
fn full() -> Config {
    config("[http]\ntoken_file = \"/t\"\n[mqtt]\n[uplink]\nurl = \"mqtt://cloud\"")
}

fn manifest(text: &str) -> Manifest {
    manifest::parse("f.toml", text, &full()).unwrap_or_else(|problems| panic!("{}", lines(&problems)))
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("{problem}\n")).collect()
}

/// What is wrong with a neap.toml, a line each.
fn refused(text: &str) -> String {
    lines(&Config::parse("neap.toml", text, &machine()).expect_err("it must be refused"))
}

/// What is wrong with a manifest that begins with a good name and image (lines 1 and 2).
fn refused_manifest(rest: &str) -> String {
    let text = format!("name = \"f\"\nimage = \"i:1\"\n{rest}");
    lines(&manifest::parse("f.toml", &text, &full()).expect_err("it must be refused"))
}

fn assert_lists(found: &str, expected: &[&str]) {
    let found: Vec<&str> = found.lines().collect();
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (line, start) in found.iter().zip(expected) {
        assert!(line.starts_with(start), "expected {start:?}, found {line:?}");
    }
}

#[test]
fn an_empty_file_means_the_defaults() {
    let expected = Config {
        node: Node {
            id: "neap-01234567".to_owned(),
            data_dir: "/var/lib/neap".into(),
            run_dir: "/run/neap".into(),
            functions_dir: "/etc/neap/functions.d".into(),
            cgroup: "neap".to_owned(),
            memory: MemoryShare::Percent(75),
            user_namespaces: UserNamespaces::Require,
            limits: LimitsWanted::Require,
            egress_range: crate::model::reach::Net::parse("10.213.0.0/16").expect("a network"),
            mounts: vec![],
        },
        http: Http {
            listen: "127.0.0.1:8080".parse().expect("a good address"),
            token_file: None,
            auth_functions: false,
            tls: None,
        },
        mqtt: None,
        uplink: None,
        forwards: vec![],
        buffer: Buffer {
            bytes_max: 256 << 20,
            age_max: Duration::ZERO,
            events_max: 0,
            when_full: WhenFull::Reject,
            order: Order::LiveFirst,
            live_percent: 80,
            commit_window: Duration::ZERO,
        },
        images: defaults::images(),
        trust: defaults::trust(),
    };
    assert_eq!(Config::defaults(&machine()), expected);
    let found = config("");
    assert_eq!(found, expected);
    assert_eq!((found.images.gc_high, found.images.limits.reserve_bytes), (85, 64 << 20));
    assert!(found.trust.others && found.trust.rules.is_empty());
    assert_eq!(config("[node]\n[http]\n[buffer]"), expected);
}

#[test]
fn brokers_have_defaults_that_can_live_side_by_side() {
    let found = config("[mqtt]\n[uplink]\nurl = \"mqtts://cloud\"");

    let local = Broker {
        host: "127.0.0.1".to_owned(),
        port: 1883,
        tls: None,
        version: MqttVersion::Auto,
        client_id: "neap-neap-01234567".to_owned(),
        username: None,
        password_file: None,
    };
    let uplink = found.uplink.expect("it is there");
    assert_eq!(found.mqtt, Some(local.clone()));
    let Remote::Mqtt(broker) = &uplink.remote else { panic!("{uplink:?}") };
    assert_eq!(broker.client_id, "neap-neap-01234567-uplink");
    assert_eq!(broker.tls, Some(ClientTls::default()));
    assert_eq!((broker.port, uplink.format), (8883, Format::Auto));
    assert_eq!(uplink.topic.as_str(), "neap/{node}/{function}");
}

#[test]
fn a_manifest_of_two_lines_means_the_defaults() {
    let found = manifest("name = \"f\"\nimage = \"i\"");

    let expected = Manifest {
        name: found.name.clone(),
        image: found.image.clone(),
        pull: crate::model::function::Pull::Missing,
        rollback: crate::model::function::Rollback::Auto,
        handler: Handler::Stdio,
        platform: Platform::None,
        serving: defaults::serving(),
        priority: Lane::Normal,
        command: None,
        env: Default::default(),
        limits: Limits {
            memory_bytes: 64 << 20,
            cpu_millis: 500,
            pids: 64,
            timeout: Duration::from_secs(30),
            payload_bytes: 1 << 20,
            disk_bytes: 16 << 20,
        },
        scale: Scale { min: ScaleMin::Fixed(0), max: 4, copies: 1 },
        retry: Retry {
            attempts: 5,
            backoff: Duration::from_secs(1),
            backoff_max: Duration::from_secs(300),
            codes: None,
        },
        permissions: Default::default(),
        rate: None,
        triggers: vec![],
        outputs: vec![],
        marks: Default::default(),
    };
    assert_eq!(found, expected);
    assert_eq!(found.image.as_str(), "docker.io/library/i:latest");
}

#[test]
fn triggers_have_defaults() {
    let found = manifest(
        "name = \"f\"\nimage = \"i\"\n[[trigger]]\nmqtt = \"a/#\"\n[[trigger]]\nhttp = \"/x\"\n[[trigger]]\nevent = \"t\"",
    );

    let mqtt = MqttTrigger {
        filter: TopicFilter::parse("a/#").expect("a good filter"),
        qos: 1,
        from: Target::Local,
        expires: None,
        retained: Retained::New,
    };
    let http = HttpTrigger { path: "/x".to_owned(), methods: vec![], token: false };
    let event = Trigger::Event { kind: "t".to_owned() };
    assert_eq!(found.triggers, [Trigger::Mqtt(mqtt), Trigger::Http(http), event]);
}

#[test]
fn defaults_give_way_to_what_they_depend_on() {
    let found = manifest(
        "name = \"f\"\nimage = \"i\"\nlimits.memory = \"8MiB\"\nretry.backoff = \"10m\"\noutput = [{ to = \"uplink\" }]",
    );

    assert_eq!(found.limits.disk_bytes, 8 << 20);
    assert_eq!(found.retry.backoff_max, Duration::from_secs(600));
    assert_eq!(found.outputs, [Output::Uplink { topic: None }]);
}

#[test]
fn handler_follows_the_platform_and_the_platform_the_image() {
    let of = |text: &str, guess| {
        let text = format!("name = \"f\"\nimage = \"i\"\n{text}");
        let found = manifest::parse_for("f.toml", &text, &full(), guess).expect("a good manifest");
        (found.handler, found.platform)
    };
    let (knative, none) = (Platform::Knative, Platform::None);

    assert_eq!(of("", none), (Handler::Stdio, none));
    assert_eq!(of("", knative), (Handler::Http, knative));
    assert_eq!(of("handler = \"http\"", knative), (Handler::Http, knative));
    assert_eq!(of("handler = \"stdio\"", knative), (Handler::Stdio, none), "a word against the guess");
    assert_eq!(of("platform = \"none\"", knative), (Handler::Stdio, none));
    assert_eq!(of("platform = \"openfaas\"", none), (Handler::Http, Platform::Openfaas));
    assert_eq!(of("handler = \"lambda\"", none), (Handler::Lambda, Platform::Lambda));
    assert_eq!(of("", Platform::Lambda), (Handler::Lambda, Platform::Lambda));
}

#[test]
fn ten_mistakes_give_ten_lines() {
    let text = r#"name = "Thermostat"
image = "UPPER CASE"
handler = "stdoi"
port = 80800
[limits]
memroy = "64MiB"
timeout = "0s"
cpu = "half"
[[trigger]]
mqtt = "sensors/#/temperature"
qos = 2
[[trigger]]
http = "/v1/mine"
methods = ["post"]
"#;
    let problems = manifest::parse("f.toml", text, &full()).expect_err("it must be refused");

    let found = lines(&problems);
    assert_lists(
        &found,
        &[
            "f.toml:1: name: a function's name is 1 to 63 of a-z, 0-9 and -",
            "f.toml:2: image: not an image reference such as thermostat:1",
            "f.toml:3: handler: \"stdoi\" is not known; did you mean \"stdio\"? allowed: \"stdio\"",
            "f.toml:4: port: 80800 is out of range",
            "f.toml:6: unknown key \"memroy\" in [limits]; did you mean `memory`? allowed: memory, cpu, pids",
            "f.toml:7: limits.timeout: 0ms is out of range; expected 1ms to 1d",
            "f.toml:8: limits.cpu: expected a number, got a string",
            "f.toml:10: trigger.mqtt: \"sensors/#/temperature\": `#` stands alone in the last level",
            "f.toml:11: trigger.qos: 2 is not taken",
            "f.toml:13: trigger.http: \"/v1/mine\" is neap's own",
            "f.toml:14: trigger.methods: \"post\" is not known; allowed: GET, HEAD, POST",
        ],
    );
    assert_eq!((problems[4].line, problems[4].column), (6, 1));
    assert_eq!((problems[5].line, problems[5].column), (7, 11));
}

#[test]
fn mistakes_of_syntax_and_of_meaning_are_reported_together() {
    let text = "name = \"f\"\nimage = \n[limits]\nmemory = 64MiB\npids = 0\npids = 5\n";

    let found = lines(&manifest::parse("f.toml", text, &full()).expect_err("it must be refused"));

    assert_lists(
        &found,
        &[
            "f.toml:2: not TOML:",
            "f.toml:4: not TOML:",
            "f.toml:5: limits.pids: 0 is out of range; expected a whole number from 1 to 32768",
            "f.toml:6: duplicate key `pids`",
        ],
    );
}

#[test]
fn limits_of_memory_and_processes_are_required_unless_told_otherwise() {
    let text = "[node]\nlimits = \"some\"\n";
    assert_lists(
        &refused(text),
        &["neap.toml:2: node.limits: \"some\" is not known; allowed: \"require\", \"prefer\""],
    );
    assert_eq!(defaults::LIMITS, LimitsWanted::Require);
}

#[test]
fn every_bad_key_of_neap_toml_is_named_with_the_way_out() {
    let text = r#"nodes = 1
[node]
id = "gw/1"
data_dir = "var/lib/neap"
run_dir = 7
cgroup = "/neap"
memory = "110%"
user_namespaces = "off"
[http]
listen = ":8080"
auth_functions = true
tls = { client_ca = "/ca" }
[mqtt]
url = "mqtt://me:secret@host"
password_file = "/p"
client_id = "{host}"
[uplink]
url = "mqtt://cloud"
tls = { cert = "/c" }
window = "2-4"
bytes_per_day = "5 MB"
format = "xml"
[[forward]]
mqtt = "a+"
[buffer]
max_bytes = 5
live_share = 1.5
order = "lifo"
when_full = "drop"
max_age = "1 hour"
max_events = -7
commit_window = "1m"
"#;
    let expected = [
        "1: unknown key \"nodes\"; did you mean `node`? allowed: node, http, mqtt",
        "3: node.id: \"gw/1\" is no node id",
        "4: node.data_dir: \"var/lib/neap\" is relative",
        "5: node.run_dir: expected an absolute path, got a whole number",
        "6: node.cgroup: \"/neap\" is no cgroup",
        "7: node.memory: \"110%\" is no share",
        "8: node.user_namespaces: \"off\" is not known; allowed: \"require\", \"prefer\"",
        "10: http.listen: \":8080\" is no address to listen on; write \"127.0.0.1:8080\", or",
        "11: http.auth_functions: there is no token",
        "12: http.tls.cert is missing",
        "12: http.tls.key is missing",
        "14: mqtt.url: credentials don't belong in the URL",
        "15: mqtt.password_file: needs a username",
        "16: mqtt.client_id: \"{host}\" has an unknown placeholder",
        "19: uplink.tls: means nothing with an mqtt:// url",
        "19: uplink.tls.cert: needs uplink.tls.key beside it",
        "20: uplink.window: \"2-4\" is no window; expected \"always\" or UTC times as in \"02:00-04:00\"",
        "21: uplink.bytes_per_day: \"5 MB\" is no size",
        "22: uplink.format: \"xml\" is not known; allowed: \"auto\", \"raw\"",
        "23: forward.topic is missing",
        "24: forward.mqtt: \"a+\": `+` fills a whole level",
        "26: buffer.max_bytes: expected a size in quotes",
        "27: buffer.live_share: 1.5 is no share; expected 0.0 to 1.0",
        "28: buffer.order: \"lifo\" is not known;",
        "29: buffer.when_full: \"drop\" is not known;",
        "30: buffer.max_age: \"1 hour\" is no time;",
        "31: buffer.max_events: ",
        "32: buffer.commit_window: 1m is out of range; expected 0ms to 10s",
    ];
    let expected: Vec<String> = expected.iter().map(|line| format!("neap.toml:{line}")).collect();
    assert_lists(&refused(text), &expected.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn nothing_listens_beyond_loopback_without_a_key() {
    for listen in ["0.0.0.0:1", "[::]:1", "192.168.1.2:1", "[::ffff:10.0.0.1]:1"] {
        let found = refused(&format!("[http]\nlisten = \"{listen}\""));
        assert!(found.contains("needs token_file, or tls with client_ca"), "{found}");
    }
    for listen in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
        config(&format!("[http]\nlisten = \"{listen}\""));
    }
    config("[http]\nlisten = \"0.0.0.0:1\"\ntoken_file = \"/t\"");
    config("[http]\nlisten = \"0.0.0.0:1\"\ntls = { cert = \"/c\", key = \"/k\", client_ca = \"/a\" }");
    let found = refused("[http]\nlisten = \"0.0.0.0:1\"\ntls = { cert = \"/c\", key = \"/k\" }");
    assert!(found.contains("needs token_file"), "{found}");
}

#[test]
fn one_session_is_never_shared_by_both_links() {
    let found = refused("[mqtt]\nclient_id = \"x\"\n[uplink]\nurl = \"mqtt://127.0.0.1\"\nclient_id = \"x\"");
    assert_lists(&found, &["neap.toml:3: uplink.client_id: the same as [mqtt]'s on the same broker"]);
    config("[mqtt]\n[uplink]\nurl = \"mqtt://127.0.0.1\"");
}

#[test]
fn forwards_need_both_brokers() {
    let found = refused("[[forward]]\nmqtt = \"a\"\ntopic = \"{function}\"");
    assert_lists(
        &found,
        &[
            "neap.toml:1: [[forward]] needs [mqtt]",
            "neap.toml:1: [[forward]] needs [uplink]",
            "neap.toml:3: forward.topic: {function} has no meaning",
        ],
    );
}

#[test]
fn the_range_of_a_way_out_is_one_that_instances_can_have() {
    for (range, why) in [
        ("169.254.0.0/20", "lies in 169.254.0.0/16, where no instance can be"),
        ("10.0.0.0/7", "is none of /8 to /30"),
        ("10.0.0.0/31", "is none of /8 to /30"),
        ("10.0.0.1/24", "10.0.0.0/24 is meant"),
        ("fd00::/64", "is no IPv4 address"),
    ] {
        let found = refused(&format!("[node]\negress_range = \"{range}\"\n"));
        assert!(found.contains(why), "{range}: {found}");
    }
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    let later = [(
        "handler = \"http\"\n[allow]\nnetwork = \"host\"",
        "not in this version: allow.network = \"host\" with handler \"http\"",
    )];
    for (text, expected) in later {
        let found = refused_manifest(text);
        assert!(found.lines().count() == 1 && found.contains(expected), "{text}: {found}");
    }
    let now = "name = \"f\"\nimage = \"i\"\npull = \"never\"\nsecrets = []\n[allow]\nnetwork = \"none\"\ndevices = []\n[scale]\nmin = 0";
    manifest(now);
}

#[test]
fn statuses_that_are_tried_again_are_an_http_functions() {
    let head = "name = \"f\"\nimage = \"i\"\n";
    let found = manifest(&format!("{head}handler = \"http\"\n[retry]\ncodes = [429, 503]"));
    assert_eq!(found.retry.codes, Some(vec![429, 503]));
    for (text, wrong) in [
        ("[retry]\ncodes = [500]", "retry.codes: handler \"stdio\" answers with no HTTP status"),
        ("handler = \"http\"\n[retry]\ncodes = [200]", "retry.codes: expected whole numbers from 300 to 599"),
        ("handler = \"http\"\n[retry]\ncodes = \"500\"", "retry.codes: expected a list of whole numbers"),
    ] {
        let said = refused_manifest(text);
        assert!(said.contains(wrong), "{text}: {said}");
    }
}

#[test]
fn jobs_have_copies_and_nothing_that_waits_for_events() {
    let found = manifest(
        "name = \"f\"\nimage = \"i\"\nhandler = \"job\"\nplatform = \"knative\"\n[scale]\ncopies = 10",
    );
    assert_eq!((found.handler, found.platform, found.scale.copies), (Handler::Job, Platform::Knative, 10));
    assert_eq!(found.instances_each(1 << 40), 4, "scale.max at once");
    assert_eq!(found.instances_each(3 * found.limits.memory_bytes), 3, "as many as there is memory for");
    assert_eq!(found.instances_each(1), 1);

    for (text, expected) in [
        ("[scale]\ncopies = 2", "scale.copies: handler \"stdio\" has none"),
        ("handler = \"job\"\n[scale]\nmin = 1", "scale.min: handler \"job\" has no instances kept ready"),
        ("handler = \"job\"\n[scale]\nconcurrency = 2", "one event in an instance at a time"),
        ("handler = \"job\"\n[scale]\ncopies = 0", "scale.copies"),
        ("handler = \"job\"\nport = 80", "listens on no port"),
        ("handler = \"job\"\nplatform = \"openfaas\"", "is not what functions of this platform are"),
    ] {
        let found = refused_manifest(text);
        assert!(found.contains(expected), "{text}: {found}");
    }
}

#[test]
fn what_a_manifest_may_permit_is_bounded_and_each_mistake_is_told() {
    let good = manifest(
        "name = \"f\"\nimage = \"i\"\nsecrets = [\"api-key\"]\n[allow]\nwritable = true\nnetwork = \"host\"\n\
         devices = [\"/dev/ttyUSB0\", \"/dev/serial/by-id/usb-x\"]\ncapabilities = [\"CHOWN\", \"CAP_KILL\"]",
    );
    let allow = &good.permissions.allow;
    assert_eq!(allow.devices, ["/dev/ttyUSB0", "/dev/serial/by-id/usb-x"]);
    assert_eq!(allow.capabilities.iter().map(|c| c.as_str()).collect::<Vec<_>>(), ["CHOWN", "KILL"]);
    assert!(allow.writable && allow.network == crate::model::permissions::Network::Host);

    let out = manifest(
        "name = \"f\"\nimage = \"i\"\nhandler = \"http\"\n[allow]\nnetwork = \"egress\"\n\
         to = [\"10.0.0.5:6379\", \"*.Site:502\", \"192.168.1.0/24\"]",
    );
    let to: Vec<String> = out.permissions.allow.to.iter().map(ToString::to_string).collect();
    assert_eq!(to, ["10.0.0.5:6379", "*.site:502", "192.168.1.0/24"]);
    assert!(out.permissions.allow.asks_for_names());

    let bad = [
        ("[allow]\nto = [\"a:1\"]", "allow.to: narrows network = \"egress\""),
        ("[allow]\nnetwork = \"egress\"\nto = [\"a:1\", \"A:1\"]", "\"A:1\" is there twice"),
        ("[allow]\nnetwork = \"egress\"\nto = [\"fd00::1\"]", "functions have IPv4 alone"),
        ("secrets = [\"a\", \"a\"]", "secrets: \"a\" is there twice"),
        ("secrets = [\"a/b\"]", "is no secret's name"),
        ("[allow]\ndevices = [\"ttyUSB0\"]", "allow.devices: \"ttyUSB0\" is no path below /dev"),
        ("[allow]\ndevices = [\"/dev/\"]", "is no path below /dev"),
        ("[allow]\ndevices = [\"/dev/../etc/shadow\"]", "is no plain path"),
        ("[allow]\ndevices = [\"/dev/null\"]", "is there for every function"),
        ("[allow]\ndevices = [\"/dev/shm/x\"]", "is each function's own"),
        ("[allow]\ndevices = [\"/dev/a\", \"/dev/a/b\"]", "can't both be"),
        ("[allow]\ncapabilities = [\"SYS_ADMIN\"]", "is not among those that a function can have: CHOWN"),
        ("[allow]\ncapabilities = [\"CHOWN\", \"CAP_CHOWN\"]", "is there twice"),
        (
            "[allow]\nnetwork = \"host\"\ncapabilities = [\"NET_RAW\"]",
            "with network = \"host\" it gives nothing",
        ),
        ("[[volume]]\nname = \"s\"\npath = \"/s\"", "volume.max is missing"),
        ("[[volume]]\nname = \"s\"\npath = \"/s\"\nmax = \"1MiB\"", "volume.max"),
        ("[[volume]]\nname = \"s\"\npath = \"/\"\nmax = \"4MiB\"", "is no plain absolute path below /"),
        ("[[volume]]\nname = \"s\"\npath = \"s\"\nmax = \"4MiB\"", "is no plain absolute path below /"),
        ("[[volume]]\nname = \"s\"\npath = \"/a/../b\"\nmax = \"4MiB\"", "is no plain absolute path below /"),
        ("[[volume]]\nname = \"s\"\npath = \"/tmp/x\"\nmax = \"4MiB\"", "/tmp is each instance's own"),
        ("[[volume]]\nname = \"s\"\npath = \"/run\"\nmax = \"4MiB\"", "/run/secrets is each instance's own"),
        (
            "[[volume]]\nname = \"a\"\npath = \"/s\"\nmax = \"4MiB\"\n[[volume]]\nname = \"b\"\npath = \"/s/t\"\nmax = \"4MiB\"",
            "can't both be",
        ),
        ("[allow]\nwritable = 1", "allow.writable: expected true or false"),
    ];
    for (text, expected) in bad {
        let found = refused_manifest(text);
        assert!(found.lines().count() == 1 && found.contains(expected), "{text}: {found}");
    }
}

#[test]
fn directories_of_the_node_are_mounted_from_where_it_says_alone() {
    let node = config("[node]\nmounts = [\"/srv/code\", \"/srv/code/team\", \"/media/usb\"]\n");
    let parse = |volume: &str| {
        let text = format!("name = \"f\"\nimage = \"i:1\"\n{volume}");
        manifest::parse("f.toml", &text, &node).map(|manifest| manifest.permissions.node_volumes)
    };
    let from = |from: &str| parse(&format!("[[volume]]\nfrom = \"{from}\"\npath = \"/userfunc\""));
    let split = |from_: &str| {
        let found = from(from_).unwrap_or_else(|problems| panic!("{}", lines(&problems))).remove(0);
        (
            found.within.display().to_string(),
            found.below.display().to_string(),
            found.from() == Path::new(from_),
        )
    };

    assert_eq!(split("/srv/code/hello"), ("/srv/code".to_owned(), "hello".to_owned(), true));
    assert_eq!(split("/srv/code/team/a/b"), ("/srv/code/team".to_owned(), "a/b".to_owned(), true));
    assert_eq!(from("/media/usb").expect("the directory itself")[0].below, Path::new(""));
    for bad in
        ["/etc", "/", "/srv", "/srv/codex", "/srv/code/../../etc", "/srv/code/./x", "srv/code", "/srv/code/"]
    {
        let found = lines(&from(bad).expect_err(bad));
        assert!(found.lines().count() == 1 && found.contains("f.toml:4: volume.from: "), "{bad}: {found}");
    }
    assert!(
        lines(&from("/etc").expect_err("not named"))
            .contains("/srv/code, /srv/code/team, /media/usb (node.mounts")
    );
    let more = |more: &str| {
        let text = format!("[[volume]]\nfrom = \"/srv/code/a\"\npath = \"/a\"\n{more}");
        lines(&parse(&text).expect_err(more))
    };
    assert!(more("name = \"a\"").contains("volume.name: does not go with from"));
    assert!(more("max = \"4MiB\"").contains("volume.max: does not go with from"));
    let twice = more("[[volume]]\nfrom = \"/srv/code/b\"\npath = \"/a/b\"");
    assert!(twice.contains("volume.path: \"/a/b\" and \"/a\" can't both be"), "{twice}");
    let both = more("[[volume]]\nname = \"s\"\nmax = \"4MiB\"\npath = \"/a\"");
    assert!(both.contains("can't both be"), "{both}");
    let nowhere = lines(&parse("[[volume]]\nfrom = \"/srv/code/a\"").expect_err("no path"));
    assert!(nowhere.contains("volume.path is missing"), "{nowhere}");
    // None unless the node says so.
    let none = refused_manifest("[[volume]]\nfrom = \"/srv/code\"\npath = \"/userfunc\"");
    assert!(none.contains("this node lets functions mount none of its directories"), "{none}");
}

#[test]
fn extensions_are_started_unless_a_manifest_says_otherwise() {
    let extensions = |text: &str| {
        manifest(&format!("name = \"f\"\nimage = \"i\"\nhandler = \"lambda\"\n{text}")).serving.extensions
    };
    assert!(extensions("") && !extensions("extensions = false"));
    assert!(refused_manifest("extensions = false").contains("extensions: only handler \"lambda\" has some"));
}

#[test]
fn what_is_the_nodes_alone_is_nothing_to_mount() {
    let refused = |dir: &str| refused(&format!("[node]\ndata_dir = \"/data/neap/\"\nmounts = [\"{dir}\"]\n"));
    for (dir, why) in [
        ("/", "is no plain absolute path below /"),
        ("code", "is no plain absolute path below /"),
        ("/srv/../etc", "is no plain absolute path below /"),
        ("/proc/1", "/proc is the kernel's"),
        ("/dev/shm", "/dev is the kernel's"),
        ("/data", "data_dir, \"/data/neap/\", is the node's alone"),
        ("/data/neap", "is the node's alone"),
        ("/data/neap/secrets", "is the node's alone"),
        ("/run", "run_dir, \"/run/neap\", is the node's alone"),
        ("/etc", "functions_dir, \"/etc/neap/functions.d\", is the node's alone"),
        ("/a\", \"/a", "\"/a\" is there twice"),
    ] {
        let found = refused(dir);
        assert!(
            found.lines().count() == 1 && found.contains("node.mounts: ") && found.contains(why),
            "{found}"
        );
    }
}

#[test]
fn rates_and_schedules_have_defaults() {
    let found = manifest(
        "name = \"f\"\nimage = \"i\"\n[rate]\nper_second = 2.5\n[[trigger]]\ncron = \"*/5 * * * *\"\n\
         [[trigger]]\ncron = \"0 30 2 * * *\"\nzone = \"Europe/Berlin\"\nmissed = \"once\"",
    );

    assert_eq!(found.rate, Some(Rate { per_second_millis: 2500, burst: 3 }));
    let crons = found.triggers.iter().map(|trigger| match trigger {
        Trigger::Cron(cron) => (cron.schedule.key(), cron.missed),
        other => panic!("{other:?}"),
    });
    let crons: Vec<_> = crons.collect();
    let expected = [
        ("*/5 * * * * UTC".to_owned(), Missed::Skip),
        ("0 30 2 * * * Europe/Berlin".to_owned(), Missed::Once),
    ];
    assert_eq!(crons, expected);
}

#[test]
fn an_uplink_may_be_a_receiver_of_batches() {
    let found = config(
        "[uplink]\nurl = \"https://cloud.example/in\"\ntoken_file = \"/t\"\nwindow = \"22:00-04:30\"\n\
         bytes_per_day = \"5MB\"",
    );

    let uplink = found.uplink.clone().expect("an uplink");
    let Remote::Https(receiver) = &uplink.remote else { panic!("{uplink:?}") };
    assert_eq!(
        (receiver.host.as_str(), receiver.port, receiver.target.as_str()),
        ("cloud.example", 443, "/in")
    );
    let window = Some(DayWindow { from: 22 * 60, until: 4 * 60 + 30 });
    assert_eq!(uplink.limits, UplinkLimits { window, bytes_per_day: 5_000_000 });
    assert!(found.broker(Target::Uplink).is_none() && found.delivers(Target::Uplink));
    let bad = [
        ("format = \"raw\"", "uplink.format: a batch of CloudEvents has no raw form"),
        ("client_id = \"x\"", "uplink.client_id: is MQTT's"),
        ("username = \"x\"", "username and password_file go together"),
        ("token_file = \"/t\"\nusername = \"x\"\npassword_file = \"/p\"", "take token_file or username"),
        ("window = \"03:00-03:00\"", "is no time at all"),
        ("window = \"24:00-03:00\"", "is no window"),
        ("window = \"3:00-4:00\"", "is no window"),
    ];
    for (line, expected) in bad {
        let found = refused(&format!("[uplink]\nurl = \"https://h\"\n{line}"));
        assert!(found.lines().count() == 1 && found.contains(expected), "{line}: {found}");
    }
    let found = refused("[uplink]\nurl = \"mqtt://h\"\ntoken_file = \"/t\"");
    assert!(found.contains("is for an https:// url"), "{found}");
}

#[test]
fn contradictions_are_refused() {
    let bad = [
        ("port = 0", "expected a whole number from 1 to 65535"),
        ("handler = \"stdio\"\nport = 80", "port: handler \"stdio\" listens on no port"),
        ("handler = \"stdio\"\n[scale]\nconcurrency = 2", "concurrency: handler \"stdio\" has one event"),
        ("handler = \"stdio\"\nplatform = \"knative\"", "handler: \"stdio\" is not what functions of this"),
        ("ready = \"healthz\"", "ready: \"healthz\" is no path"),
        ("[[trigger]]", "a trigger needs one of mqtt, http, cron, event"),
        ("[[trigger]]\ncron = \"* * *\"", "trigger.cron: \"* * *\": a schedule has 5 fields"),
        ("[[trigger]]\ncron = \"0 0 31 2 *\"", "there is no such time, ever"),
        ("[[trigger]]\ncron = \"61 * * * *\"", "trigger.cron: \"61 * * * *\""),
        ("[[trigger]]\ncron = \"* * * * *\"\nzone = \"Berlin\"", "trigger.zone: \"Berlin\": no time zone"),
        ("[[trigger]]\ncron = \"* * * * *\"\nmissed = \"all\"", "allowed: \"skip\", \"once\""),
        ("[[trigger]]\nevent = \"t\"\nzone = \"UTC\"", "trigger.zone: belongs to cron triggers"),
        (
            "[[trigger]]\ncron = \"* * * * *\"\n[[trigger]]\ncron = \"* * * * *\"",
            "the trigger on line 3 takes the same",
        ),
        ("[rate]\nburst = 1", "rate.per_second is missing"),
        ("[rate]\nper_second = 0", "rate.per_second: 0 is out of range"),
        ("[rate]\nper_second = nan", "rate.per_second: NaN is out of range"),
        ("[rate]\nper_second = 1\nburst = 0", "rate.burst: 0 is out of range"),
        ("[[trigger]]\nmqtt = \"a\"\nhttp = \"/a\"", "this one has mqtt and http"),
        ("[[trigger]]\nhttp = \"/a\"\nqos = 1", "trigger.qos: belongs to mqtt triggers; this is one of http"),
        ("[trigger]\nhttp = \"/a\"", "write [[trigger]] with double brackets"),
        ("[[limits]]\npids = 1", "write [limits] with single brackets"),
        ("[[trigger]]\nmqtt = \"a\"\n[[trigger]]\nmqtt = \"a\"", "the trigger on line 3 takes the same"),
        ("[[trigger]]\nhttp = \"/a\"\nmethods = []", "leave it out to take every method"),
        ("[[trigger]]\nhttp = \"/a\"\nmethods = [\"GET\", \"GET\"]", "listed twice"),
        ("[limits]\nmemory = \"5MiB\"", "expected 6MiB to"),
        ("[limits]\nmemory = \"8MiB\"\ndisk = \"9MiB\"", "limits.disk: more than limits.memory, 8MiB"),
        ("[limits]\ndisk = \"65MiB\"", "limits.disk: more than limits.memory, 64MiB"),
        ("[limits]\ndisk = \"0\"", "expected 4KiB to"),
        ("[limits]\ncpu = nan", "limits.cpu: NaN is out of range"),
        ("[limits]\ncpu = 0", "expected 0.01 to 1024 CPUs"),
        ("[limits]\npids = 99999999999999999999", "out of range"),
        ("[retry]\nattempts = 0", "expected a whole number from 1"),
        ("[retry]\nbackoff = \"10s\"\nbackoff_max = \"5s\"", "less than retry.backoff, 10s"),
        ("[scale]\nmax = 0", "expected a whole number from 1"),
        ("[scale]\nmin = 5", "scale.min: more than scale.max, 4"),
        ("[scale]\nmin = \"always\"", "expected a whole number or \"auto\""),
        ("[scale]\nmin = true", "expected a whole number or \"auto\", got true or false"),
        ("command = []", "command: is empty"),
        ("command = [\"\"]", "the program's name is empty"),
        ("command = [\"a\\u0000\"]", "no NUL"),
        ("env = { CE_ID = \"x\" }", "set by neap for each event"),
        ("env = { \"a=b\" = \"x\" }", "a name has no `=`"),
        ("env = { A = 1 }", "env.A: expected a string in quotes, got a whole number"),
        ("[[output]]\ntopic = \"a\"", "output.to is missing"),
        ("[[output]]\nto = \"local\"", "output.topic is missing"),
        ("[[output]]\nto = \"event\"", "output.type is missing"),
        ("[[output]]\nto = \"event\"\ntype = \"t\"\ntopic = \"a\"", "belongs to outputs to uplink and local"),
        ("[[output]]\nto = \"uplink\"\ntopic = \"a/{oops}\"", "unknown placeholder {oops}"),
        ("[[output]]\nto = \"uplink\"\n[[output]]\nto = \"uplink\"", "the same [[output]] stands above"),
        ("[[trigger]]\nmqtt = \"a/#\"\n[[output]]\nto = \"local\"\ntopic = \"a/b\"", "without end"),
    ];
    for (text, expected) in bad {
        let found = refused_manifest(text);
        assert!(found.lines().count() == 1 && found.contains(expected), "{text}: {found}");
    }
}

#[test]
fn parts_that_the_node_lacks_are_refused() {
    let text = r#"name = "f"
image = "i"
[[trigger]]
mqtt = "a"
[[trigger]]
mqtt = "b"
from = "uplink"
[[trigger]]
http = "/f"
auth = "token"
[[output]]
to = "uplink"
[[output]]
to = "local"
topic = "c"
"#;
    let bare = Config::defaults(&machine());
    let found = lines(&manifest::parse("f.toml", text, &bare).expect_err("it must be refused"));

    assert_lists(
        &found,
        &[
            "f.toml:4: trigger.mqtt: the configuration has no [mqtt] broker",
            "f.toml:7: trigger.from: the configuration has no [uplink]",
            "f.toml:10: trigger.auth: there is no token to ask for",
            "f.toml:12: output.to: the configuration has no [uplink]",
            "f.toml:14: output.to: the configuration has no [mqtt] broker",
        ],
    );
}

#[test]
fn neaps_own_paths_are_never_a_functions() {
    let own = [
        "/",
        "/function",
        "/function/x",
        "/async-function/x",
        "/v1/status",
        "/system/functions",
        "/healthz",
        "/readyz",
        "/metrics",
        "/events",
        "/2015-03-31/functions",
    ];
    for path in own {
        let found = refused_manifest(&format!("[[trigger]]\nhttp = \"{path}\""));
        assert!(found.contains("neap's own"), "{found}");
    }
    for path in ["x", "/a b", "/a?b", "/{a}", "/é"] {
        assert!(!refused_manifest(&format!("[[trigger]]\nhttp = \"{path}\"")).is_empty());
    }
    for path in ["/functions", "/v1beta", "/a/v1", "/a%20b"] {
        manifest(&format!("name = \"f\"\nimage = \"i\"\n[[trigger]]\nhttp = \"{path}\""));
    }
}

#[test]
fn manifests_do_not_take_each_others_names_and_paths() {
    let texts = [
        ("a.toml", "name = \"a\"\nimage = \"i\"\n[[trigger]]\nhttp = \"/x\"\nmethods = [\"GET\", \"PUT\"]"),
        (
            "b.toml",
            "name = \"b\"\nimage = \"i\"\n[[trigger]]\nhttp = \"/y\"\n[[trigger]]\nhttp = \"/x\"\nmethods = [\"PUT\"]",
        ),
        ("c.toml", "image = \"i\"\n\nname = \"a\""),
        ("d.toml", "name = \"d\"\nimage = \"i\"\n[[trigger]]\nhttp = \"/x\"\nmethods = [\"POST\"]"),
    ];
    let manifests: Vec<Manifest> = texts.iter().map(|(_, text)| manifest(text)).collect();
    let deployables: Vec<Deployable<'_>> = texts
        .iter()
        .zip(&manifests)
        .map(|((file, text), manifest)| Deployable { file, text, manifest })
        .collect();

    let found = lines(&Deployable::check(&deployables));

    assert_lists(
        &found,
        &[
            "b.toml:6: trigger.http: PUT on /x is already answered by `a` in a.toml",
            "c.toml:3: name: a function `a` is also in a.toml",
        ],
    );
    let named: Vec<(String, Manifest)> =
        texts.iter().map(|(file, _)| (*file).to_owned()).zip(manifests.clone()).collect();
    assert_eq!(check_together(&named).len(), 2);
}

#[test]
fn every_file_in_configs_loads() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let full = load(&configs.join("neap.toml"));
    load(&configs.join("minimal.toml"));
    load(&configs.join("gateway.toml"));
    let mut manifests = Vec::new();
    for entry in fs::read_dir(configs.join("functions.d")).expect("configs/functions.d is there") {
        let path = entry.expect("a readable entry").path();
        let (name, text) = (path.display().to_string(), read(&path));
        let manifest = manifest::parse(&name, &text, &full).unwrap_or_else(|p| panic!("{}", lines(&p)));
        manifests.push((name, manifest));
    }

    assert!(manifests.len() >= 2);
    assert_eq!(check_together(&manifests), []);
    let known = ["functions.d", "gateway.toml", "minimal.toml", "neap.service", "neap.toml"];
    let mut names: Vec<String> = fs::read_dir(&configs)
        .expect("configs is there")
        .map(|entry| entry.expect("a readable entry").file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".toml"))
        .collect();
    names.retain(|name| !known.contains(&name.as_str()));
    assert_eq!(names, [] as [&str; 0], "a file that no test loads");
}

#[test]
fn what_the_annotated_files_call_a_default_is_the_default() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let text = read(&configs.join("neap.toml"));
    let manifest_text = read(&configs.join("functions.d/thermostat.toml"));
    let machine = Machine { machine_id: Some("0".repeat(32)), hostname: String::new() };

    let parse =
        |text: &str| Config::parse("neap.toml", text, &machine).unwrap_or_else(|p| panic!("{}", lines(&p)));
    assert_eq!(parse(&uncomment(&text, "#")), parse(&text));
    assert_eq!(manifest(&uncomment(&manifest_text, "#")), manifest(&manifest_text));
    // Examples must be right too, though their table of credentials changes what they mean.
    let examples = uncomment(&text, "# ").replace("mqtt://127.0.0.1:1883", "mqtts://127.0.0.1");
    assert!(parse(&examples).mqtt.is_some_and(|broker| broker.tls.is_some()));
}

#[test]
fn the_annotated_files_name_every_key() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let named = |path: &str, keys: &[&str]| {
        let text = read(&configs.join(path));
        for key in keys {
            let forms = [format!("{key} ="), format!("[{key}]"), format!(".{key}]")];
            assert!(forms.iter().any(|form| text.contains(form.as_str())), "{path} says nothing of {key}");
        }
    };
    for keys in file::KEYS {
        named("neap.toml", keys.now);
    }
    for keys in manifest::KEYS.iter().chain(&trigger::KEYS) {
        named("functions.d/thermostat.toml", keys.now);
    }
}

fn load(path: &Path) -> Config {
    let name = path.display().to_string();
    Config::parse(&name, &read(path), &machine()).unwrap_or_else(|problems| panic!("{}", lines(&problems)))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Takes `mark` off the lines where a key follows it.
fn uncomment(text: &str, mark: &str) -> String {
    let key = |line: &str| {
        let name = line.split(" = ").next().unwrap_or_default();
        line.contains(" = ") && !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
    };
    text.lines()
        .map(|line| match line.strip_prefix(mark) {
            Some(rest) if key(rest) => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect()
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}|[\\[\\]{}a-z=\"'.,# \n0-9]{0,300}") {
        let _ = Config::parse("f", &text, &machine());
        let _ = manifest::parse("f", &text, &Config::defaults(&machine()));
    }

    #[test]
    fn damaged_good_files_never_panic(
        which in 0..4_usize,
        cuts in proptest::collection::vec((any::<prop::sample::Index>(), 0..12_usize, "\\PC{0,4}|[\\[\\]{}=\"'.,# \n0-9-]{0,4}"), 1..8),
    ) {
        let mut text: Vec<char> = [
            include_str!("../../configs/neap.toml"),
            include_str!("../../configs/gateway.toml"),
            include_str!("../../configs/functions.d/thermostat.toml"),
            include_str!("../../configs/functions.d/echo.toml"),
        ][which].chars().collect();
        for (at, length, with) in cuts {
            let at = at.index(text.len() + 1);
            let end = (at + length).min(text.len());
            text.splice(at..end, with.chars());
        }
        let text: String = text.into_iter().collect();

        let found = match which {
            0 | 1 => Config::parse("f", &text, &machine()).map(drop),
            _ => manifest::parse("f", &text, &full()).map(drop),
        };

        let lines = text.lines().count() + 1;
        for problem in found.err().into_iter().flatten() {
            prop_assert!((1..=lines).contains(&problem.line) && problem.column >= 1, "{problem}");
        }
    }
}
