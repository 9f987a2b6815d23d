//! A function's manifest → `Manifest`. Triggers and outputs are read in `trigger`; what several
//! manifests must not do to each other is in `together`.

use super::problem::{Report, shown};
use super::reader::{Keys, Section, document};
use super::{Config, MemoryShare, Problem, defaults, permissions, trigger, units};
use crate::model::function::{
    Handler, Limits, Marks, Platform, Pull, Rate, Retry, Rollback, Scale, ScaleMin, Serving,
};
use crate::model::{FunctionName, Lane, Manifest, Reference};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

const ROOT: Keys = Keys {
    now: &[
        "name",
        "image",
        "pull",
        "handler",
        "platform",
        "port",
        "ready",
        "command",
        "env",
        "secrets",
        "priority",
        "rollback",
        "labels",
        "function_url",
        "extensions",
        "annotations",
        "allow",
        "limits",
        "scale",
        "retry",
        "rate",
        "trigger",
        "output",
        "volume",
    ],
    later: &[],
};
const LIMITS: Keys =
    Keys { now: &["memory", "cpu", "pids", "timeout", "payload", "disk", "start"], later: &[] };
const SCALE: Keys = Keys { now: &["min", "max", "idle", "concurrency", "copies"], later: &[] };
const RETRY: Keys = Keys { now: &["attempts", "backoff", "backoff_max", "codes"], later: &[] };
const RATE: Keys = Keys { now: &["per_second", "burst"], later: &[] };
/// All of them, for the test that the annotated file names every key.
#[cfg(test)]
pub(super) const KEYS: [Keys; 7] =
    [ROOT, permissions::ALLOW, permissions::VOLUME, LIMITS, SCALE, RETRY, RATE];

/// Below this the container's own set-up, which is charged to it, is killed before the function
/// is reached, at random.
pub const MEMORY_BYTES_MIN: u64 = 6 << 20;
/// No gateway has more; a bound against a slip of the unit.
const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// The kernel takes quotas from 1 ms up (`min_cfs_quota_period`), of a period of 100 ms.
const CPU_MILLIS_MIN: u32 = 10;
const CPU_MILLIS_MAX: u32 = 1_024_000;
/// 2^15: where the kernel's own ids end by default on small machines (proc(5), pid_max).
const PIDS_MAX: u32 = 32_768;
/// A day: what runs longer is no reaction to an event, and would hold its lease all that time.
const TIMEOUT_MAX: Duration = Duration::from_secs(86_400);
const TIMEOUT_MIN: Duration = Duration::from_millis(1);
/// An event is held in memory whole, once for each instance that it feeds.
const PAYLOAD_BYTES_MAX: u64 = 64 << 20;
/// A page. To tmpfs, a size of zero means no limit (tmpfs(5)).
const DISK_BYTES_MIN: u64 = 4096;
const SCALE_MAX: u32 = 1000;
/// A job's outcome lists them all.
const COPIES_MAX: u32 = 1000;
const ATTEMPTS_MAX: u32 = 1000;
/// Statuses that are no success.
const HTTP_FAILURES: RangeInclusive<u32> = 300..=599;
/// An event that waits longer than a month is a dead letter.
const BACKOFF_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Of starts in a second: from one in a thousand seconds to more than any gateway can.
const PER_SECOND_MILLIS_MAX: f64 = 1_000_000_000.0;
const BURST_MAX: u32 = 1_000_000;
const BACKOFF_MIN: Duration = Duration::from_millis(1);
/// execve(2): one string is at most 128 KiB (MAX_ARG_STRLEN) …
const STRING_BYTES_MAX: usize = 128 * 1024 - 1;
/// … and all of them must fit a quarter of the stack; the event's attributes come on top.
const STRINGS_BYTES_MAX: usize = 1024 * 1024;
const START_MIN: Duration = Duration::from_millis(100);
/// What waits for an instance waits so long; nobody does longer.
const START_MAX: Duration = Duration::from_secs(600);
/// Below, every event would find an instance on its way out.
const IDLE_MIN: Duration = Duration::from_millis(100);
/// A month.
const IDLE_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Knative's and Cloud Run's own bound.
const CONCURRENCY_MAX: u32 = 1000;
/// Labels, and annotations; the manifest's size bounds what they hold.
const MARKS_MAX: usize = 100;
const READY_BYTES_MAX: usize = 1024;
/// What neap sets for each event.
const ENV_RESERVED: [&str; 2] = ["CE_", "Http_"];

/// Reads a manifest; `file` is its name in messages. `config` says which parts of the node are
/// there to be used. Without a look at the image: a platform that it doesn't name is none.
pub fn parse(file: &str, text: &str, config: &Config) -> Result<Manifest, Vec<Problem>> {
    parse_for(file, text, config, Platform::None)
}

/// The same, where the image looks as if it were made for `guess`.
pub fn parse_for(file: &str, text: &str, config: &Config, guess: Platform) -> Result<Manifest, Vec<Problem>> {
    let report = Report::new(file, text);
    let table = document(&report, text);
    let root = Section::root(&report, &table, ROOT);

    for key in ["name", "image"].into_iter().filter(|key| !root.has(key)) {
        root.missing(format!("{key} is missing; a function needs name and image"));
    }
    let name = root.parsed("name", FunctionName::parse);
    let image = root.parsed("image", Reference::parse);
    let (handler, platform) = kind(&root, guess);
    let pulls = [("missing", Pull::Missing), ("never", Pull::Never), ("always", Pull::Always)];
    let pull = root.choice("pull", &pulls, &[]).unwrap_or(defaults::PULL);
    let rollbacks = [("auto", Rollback::Auto), ("off", Rollback::Off)];
    let rollback = root.choice("rollback", &rollbacks, &[]).unwrap_or(defaults::ROLLBACK);
    let lanes = Lane::ALL.map(|lane| (lane.as_str(), lane));
    let priority = root.choice("priority", &lanes, &[]).unwrap_or_default();
    let command = command(&root);
    let env = env(&root);
    let permissions = permissions::permissions(&root, handler, &config.node.mounts);
    let (limits_table, scale_table) = (root.table("limits", LIMITS), root.table("scale", SCALE));
    let limits =
        limits_table.as_ref().map_or_else(|| defaults::limits_of(handler), |s| limits(s, handler, config));
    let serving = serving(&root, limits_table.as_ref(), scale_table.as_ref());
    if serving.concurrency > 1
        && (matches!(handler, Handler::Lambda | Handler::Job)
            || handler == Handler::Stdio && root.has("handler"))
    {
        let word = handler.word();
        root.bad("scale", format!("concurrency: handler {word:?} has one event in an instance at a time"));
    }
    if serving.function_url && handler != Handler::Lambda {
        root.bad("function_url", format!("only handler \"lambda\" has one, not {:?}", handler.word()));
    }
    if !serving.extensions && handler != Handler::Lambda {
        root.bad("extensions", format!("only handler \"lambda\" has some, not {:?}", handler.word()));
    }
    let scale =
        scale_table.as_ref().map_or_else(defaults::scale, |s| scale(s, handler, limits.memory_bytes, config));
    let retry = root.table("retry", RETRY).map_or_else(defaults::retry, |s| retry(&s, handler));
    let rate = root.table("rate", RATE).and_then(|s| rate(&s));
    let triggers = trigger::triggers(&root, config);
    let marks = Marks { labels: marks(&root, "labels"), annotations: marks(&root, "annotations") };
    let outputs = trigger::outputs(&root, config, &triggers);

    let manifest = |name, image| Manifest {
        name,
        image,
        pull,
        rollback,
        handler,
        platform,
        serving,
        priority,
        command,
        env,
        permissions,
        limits,
        scale,
        retry,
        rate,
        triggers,
        outputs,
        marks,
    };
    match (name, image) {
        (Some(name), Some(image)) => report.finish(manifest(name, image)),
        // Missing or bad, which is reported.
        _ => Err(report.into_problems()),
    }
}

/// What the function is: as it says, else as its platform's are, else as the image looks.
fn kind(root: &Section<'_>, guess: Platform) -> (Handler, Platform) {
    let handlers = [Handler::Stdio, Handler::Http, Handler::Lambda, Handler::Job]
        .map(|handler| (handler.word(), handler));
    let said = root.choice("handler", &handlers, &[]);
    let platforms = [
        Platform::None,
        Platform::Knative,
        Platform::Openfaas,
        Platform::Lambda,
        Platform::Fc,
        Platform::Fission,
        Platform::Azure,
    ]
    .map(|platform| (platform.word(), platform));
    let platform = root.choice("platform", &platforms, &[]);
    if let (Some(handler), Some(platform)) = (said, platform)
        && !platform.has(handler)
    {
        let (its, handler) = (platform.handler().word(), handler.word());
        root.bad("handler", format!("{handler:?} is not what functions of this platform are: {its:?}"));
    }
    // A handler that no guess fits is a word against the guess.
    let fits = |guess: &Platform| said.is_none_or(|handler| guess.has(handler));
    let platform = platform.unwrap_or(match said {
        // It is all there is to this handler.
        Some(Handler::Lambda) => Platform::Lambda,
        _ => Some(guess).filter(fits).unwrap_or(Platform::None),
    });
    let handler = said.unwrap_or(platform.handler());
    if let Some(said @ (Handler::Stdio | Handler::Lambda | Handler::Job)) = said {
        for key in ["port", "ready"].into_iter().filter(|key| root.has(key)) {
            root.bad(key, format!("handler {:?} listens on no port", said.word()));
        }
    }
    (handler, platform)
}

fn serving(root: &Section<'_>, limits: Option<&Section<'_>>, scale: Option<&Section<'_>>) -> Serving {
    let default = defaults::serving();
    let ready = root.text("ready").map(str::to_owned);
    if let Some(path) = &ready
        && !(path.starts_with('/')
            && path.len() <= READY_BYTES_MAX
            && path.bytes().all(|b| b.is_ascii_graphic()))
    {
        root.bad("ready", format!("{} is no path: it begins with / and has no spaces", shown(path)));
    }
    Serving {
        port: root.integer("port", 1..=u32::from(u16::MAX)).and_then(|port| u16::try_from(port).ok()),
        ready,
        start: limits.and_then(|s| s.time("start", START_MIN..=START_MAX)).unwrap_or(default.start),
        idle: scale.and_then(|s| s.time("idle", IDLE_MIN..=IDLE_MAX)).unwrap_or(default.idle),
        function_url: root.bool("function_url").unwrap_or(default.function_url),
        extensions: root.bool("extensions").unwrap_or(default.extensions),
        concurrency: scale
            .and_then(|s| s.integer("concurrency", 1..=CONCURRENCY_MAX))
            .unwrap_or(default.concurrency),
    }
}

fn command(root: &Section<'_>) -> Option<Vec<String>> {
    let words = root.strings("command")?;
    if words.is_empty() {
        root.bad("command", "is empty; leave it out to run what the image says");
    }
    for (word, span) in &words {
        if word.contains('\0') || word.len() > STRING_BYTES_MAX {
            root.bad_at(
                span,
                "command",
                format!("an argument has no NUL and at most {STRING_BYTES_MAX} bytes"),
            );
        }
    }
    if let Some(("", span)) = words.first() {
        root.bad_at(span, "command", "the program's name is empty");
    }
    Some(words.into_iter().map(|(word, _)| word.to_owned()).collect())
}

fn env(root: &Section<'_>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let mut bytes = 0;
    for (name, value, span) in root.entries("env") {
        bytes += name.len() + value.len() + 2;
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            root.bad_at(&span, "env", format!("{}: a name has no `=`, neither has a NUL", shown(name)));
        } else if name.len() + value.len() + 1 > STRING_BYTES_MAX {
            root.bad_at(&span, "env", format!("{}: more than {STRING_BYTES_MAX} bytes", shown(name)));
        } else if let Some(prefix) = ENV_RESERVED.iter().find(|prefix| name.starts_with(**prefix)) {
            let what =
                format!("{}: names that begin with {prefix} are set by neap for each event", shown(name));
            root.bad_at(&span, "env", what);
        }
        env.insert(name.to_owned(), value.to_owned());
    }
    if bytes > STRINGS_BYTES_MAX {
        root.bad("env", format!("more than {} in all", units::show_size(STRINGS_BYTES_MAX as u64)));
    }
    env
}

fn marks(root: &Section<'_>, key: &str) -> BTreeMap<String, String> {
    let marks: BTreeMap<String, String> =
        root.entries(key).into_iter().map(|(name, value, _)| (name.to_owned(), value.to_owned())).collect();
    if marks.len() > MARKS_MAX {
        root.bad(key, format!("more than {MARKS_MAX}"));
    }
    marks
}

fn limits(section: &Section<'_>, handler: Handler, config: &Config) -> Limits {
    let default = defaults::limits_of(handler);
    let memory = section.size("memory", MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX);
    let memory_bytes = memory.unwrap_or(default.memory_bytes);
    if let (Some(memory), MemoryShare::Bytes(node)) = (memory, config.node.memory)
        && memory > node
    {
        let node = units::show_size(node);
        section.bad("memory", format!("more than [node] memory, {node}: it could never run"));
    }
    let disk = section.size("disk", DISK_BYTES_MIN..=MEMORY_BYTES_MAX);
    if disk.is_some_and(|disk| disk > memory_bytes) && (memory.is_some() || !section.has("memory")) {
        let memory = units::show_size(memory_bytes);
        section
            .bad("disk", format!("more than limits.memory, {memory}, which it is part of: /tmp is memory"));
    }
    Limits {
        memory_bytes,
        cpu_millis: cpu(section).unwrap_or(default.cpu_millis),
        pids: section.integer("pids", 1..=PIDS_MAX).unwrap_or(default.pids),
        timeout: section.time("timeout", TIMEOUT_MIN..=TIMEOUT_MAX).unwrap_or(default.timeout),
        payload_bytes: section.size("payload", 1..=PAYLOAD_BYTES_MAX).unwrap_or(default.payload_bytes),
        // Part of the memory: a smaller limit takes the default down with it.
        disk_bytes: disk.unwrap_or(default.disk_bytes.min(memory_bytes)),
    }
}

fn cpu(section: &Section<'_>) -> Option<u32> {
    let cpu = section.number("cpu")?;
    let millis = (cpu * 1000.0).round();
    // NaN is in no range.
    if (f64::from(CPU_MILLIS_MIN)..=f64::from(CPU_MILLIS_MAX)).contains(&millis) {
        return Some(millis as u32);
    }
    let (least, most) = (f64::from(CPU_MILLIS_MIN) / 1000.0, CPU_MILLIS_MAX / 1000);
    section.bad("cpu", format!("{cpu} is out of range; expected {least} to {most} CPUs, as in 0.5"));
    None
}

fn scale(section: &Section<'_>, handler: Handler, memory_bytes: u64, config: &Config) -> Scale {
    let max = section.integer("max", 1..=SCALE_MAX).unwrap_or(defaults::SCALE_MAX);
    let min = match section.integer_or_auto("min", 0..=SCALE_MAX) {
        Some(None) => ScaleMin::Auto,
        Some(Some(count)) => ScaleMin::Fixed(count),
        None => defaults::SCALE_MIN,
    };
    if let ScaleMin::Fixed(count) = min {
        if count > max {
            section.bad("min", format!("more than scale.max, {max}: so many never run at once"));
        } else if let MemoryShare::Bytes(node) = config.node.memory
            && let Some(why) = never_all_started(count, memory_bytes, node)
        {
            section.bad("min", why);
        }
    }
    let copies = section.integer("copies", 1..=COPIES_MAX).unwrap_or(defaults::SCALE_COPIES);
    if section.has("copies") && handler != Handler::Job {
        section.bad("copies", format!("handler {:?} has none, only \"job\" has", handler.word()));
    }
    if handler == Handler::Job && min != ScaleMin::Fixed(0) {
        section
            .bad("min", "handler \"job\" has no instances kept ready: its copies are made for their event");
    }
    Scale { min, max, copies }
}

/// Why so many instances kept ready make no sense on a node that may reserve `node_bytes`: each
/// needs its limit from its start on.
pub fn never_all_started(count: u32, memory_bytes: u64, node_bytes: u64) -> Option<String> {
    let all = u64::from(count).saturating_mul(memory_bytes);
    // A single one that does not fit is limits.memory's own mistake.
    (count > 1 && all > node_bytes && memory_bytes <= node_bytes).then(|| {
        let fit = node_bytes / memory_bytes;
        let [memory, all, node] = [memory_bytes, all, node_bytes].map(units::show_size);
        format!(
            "{count} instances of {memory} (limits.memory) need {all} when they are started, [node] memory is {node}: at most {fit} of them ever run at once"
        )
    })
}

fn retry(section: &Section<'_>, handler: Handler) -> Retry {
    let default = defaults::retry();
    let backoff = section.time("backoff", BACKOFF_MIN..=BACKOFF_MAX).unwrap_or(default.backoff);
    let backoff_max = section.time("backoff_max", BACKOFF_MIN..=BACKOFF_MAX);
    if backoff_max.is_some_and(|most| most < backoff) {
        let least = units::show_time(backoff);
        section.bad("backoff_max", format!("less than retry.backoff, {least}, where it begins"));
    }
    let codes = section.integers("codes", HTTP_FAILURES);
    if section.has("codes") && handler != Handler::Http {
        section.bad(
            "codes",
            format!("handler {:?} answers with no HTTP status, only \"http\" does", handler.word()),
        );
    }
    let codes = codes.map(|codes| codes.into_iter().filter_map(|code| u16::try_from(code).ok()).collect());
    Retry {
        attempts: section.integer("attempts", 1..=ATTEMPTS_MAX).unwrap_or(default.attempts),
        backoff,
        // A longer first wait takes the default up with it.
        backoff_max: backoff_max.unwrap_or(default.backoff_max.max(backoff)),
        codes,
    }
}

fn rate(section: &Section<'_>) -> Option<Rate> {
    if !section.has("per_second") {
        section.missing("rate.per_second is missing, as in `per_second = 50`");
    }
    let burst = section.integer("burst", 1..=BURST_MAX);
    let per_second = section.number("per_second")?;
    let millis = (per_second * 1000.0).round();
    if !(1.0..=PER_SECOND_MILLIS_MAX).contains(&millis) {
        section.bad("per_second", format!("{per_second} is out of range; expected 0.001 to 1000000"));
        return None;
    }
    let millis = millis as u32;
    // Without one a second's worth may come at once.
    Some(Rate { per_second_millis: millis, burst: burst.unwrap_or(millis.div_ceil(1000)) })
}
