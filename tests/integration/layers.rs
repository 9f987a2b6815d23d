//! The architecture as a test: which module may name which (the table in `src/lib.rs`), which
//! libraries stay behind one module, and that every file says why it exists.
//!
//! It reads tokens, not lines: comments, strings and test code are taken out first, then every
//! path that begins with `crate`, `self` or `super` is resolved, grouped imports included. What
//! a macro builds from pieces is not seen.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What a module may name, by the longest name that fits. A module that is missing here fails
/// the test: it needs a place first.
const MODULES: &[(&str, Layer)] = &[
    ("model", Layer::Data(&[])),
    ("config", Layer::Data(&["model"])),
    ("errors", Layer::Data(&[])),
    ("watch", Layer::Data(&[])),
    ("deadline", Layer::Data(&["watch"])),
    ("backoff", Layer::Decision(&[])),
    ("ingress::routes", Layer::Decision(&[])),
    ("ingress::ticks", Layer::Decision(&[])),
    // Across, but both are pure, and only this way round.
    ("scheduler::plan", Layer::Decision(&["scheduler::budget"])),
    ("scheduler::budget", Layer::Decision(&[])),
    ("scheduler::gates", Layer::Decision(&["scheduler::breaker", "scheduler::rate"])),
    ("scheduler::breaker", Layer::Decision(&["backoff"])),
    ("scheduler::rate", Layer::Decision(&[])),
    ("scheduler::arrivals", Layer::Decision(&[])),
    ("scheduler::pressure", Layer::Decision(&[])),
    ("scheduler::pace", Layer::Decision(&[])),
    // Across: what it learned and when to try again are parts of one decision.
    ("scheduler::pool", Layer::Decision(&["scheduler::arrivals", "backoff"])),
    ("scheduler::warm", Layer::Decision(&["scheduler::arrivals", "scheduler::pool"])),
    ("instance::state", Layer::Decision(&[])),
    ("instance::fleet", Layer::Decision(&["backoff"])),
    ("instance::batch", Layer::Decision(&["backoff"])),
    ("instance::request", Layer::Decision(&[])),
    ("instance::platform", Layer::Decision(&["instance::request"])),
    // Across as well: when to try again is the link's own decision.
    ("sync::link", Layer::Decision(&["backoff"])),
    ("sync::receipt", Layer::Decision(&[])),
    ("sync::turns", Layer::Decision(&[])),
    ("sync::allowance", Layer::Decision(&[])),
    ("sync::envelope", Layer::Decision(&[])),
    ("sync::order", Layer::Decision(&[])),
    ("store", Layer::Adapter),
    ("image", Layer::Adapter),
    ("runtime", Layer::Adapter),
    ("secrets", Layer::Adapter),
    ("telemetry", Layer::Adapter),
    ("net", Layer::Adapter),
    // The types on which drivers meet.
    ("channels", Layer::Channels),
    ("ingress::http", Layer::Driver(&[])),
    ("ingress::cron", Layer::Driver(&[])),
    ("ingress::mqtt", Layer::Driver(&[])),
    // One driver: the loop, and its hands, which report back to it.
    (
        "scheduler::driver",
        Layer::Driver(&[
            "scheduler::calls",
            "scheduler::leases",
            "scheduler::attempt",
            "scheduler::parking",
            "scheduler::keeping",
        ]),
    ),
    ("scheduler::calls", Layer::Driver(&["scheduler::driver", "scheduler::parking", "scheduler::settle"])),
    ("scheduler::leases", Layer::Driver(&["scheduler::driver", "scheduler::settle"])),
    ("scheduler::attempt", Layer::Driver(&["scheduler::driver", "scheduler::parking", "scheduler::settle"])),
    ("scheduler::parking", Layer::Driver(&["scheduler::driver"])),
    ("scheduler::keeping", Layer::Driver(&[])),
    ("scheduler::settle", Layer::Driver(&[])),
    (
        "instance::driver",
        Layer::Driver(&[
            "instance::http",
            "instance::job",
            "instance::lambda",
            "instance::service",
            "instance::stdio",
        ]),
    ),
    ("instance::http", Layer::Driver(&["instance::service", "instance::life"])),
    ("instance::stdio", Layer::Driver(&["instance::lines"])),
    ("instance::job", Layer::Driver(&["instance::stdio"])),
    (
        "instance::lambda",
        Layer::Driver(&["instance::http", "instance::life", "instance::service", "instance::runtime_api"]),
    ),
    // One driver: the instances, and how each lives.
    ("instance::service", Layer::Driver(&["instance::life", "instance::runtime_api"])),
    ("instance::life", Layer::Driver(&["instance::lines", "instance::runtime_api", "instance::service"])),
    ("instance::runtime_api", Layer::Driver(&["instance::extensions"])),
    // Its half that decides; what an invocation is, the other says.
    ("instance::extensions", Layer::Driver(&["instance::runtime_api"])),
    ("instance::lines", Layer::Driver(&[])),
    ("sync::driver", Layer::Driver(&[])),
    ("deploy", Layer::Driver(&[])),
    // Folders whose own file only lists what is in them.
    ("ingress", Layer::Folder),
    ("scheduler", Layer::Folder),
    ("instance", Layer::Folder),
    ("sync", Layer::Folder),
    ("cli", Layer::Wiring),
    ("daemon", Layer::Wiring),
    ("drive", Layer::Wiring),
    // The image layer's worker with its way to the network.
    ("worker", Layer::Wiring),
    ("main", Layer::Wiring),
    // The crate's own root: declarations.
    ("", Layer::Folder),
];

/// The list: modules on the same layer that may be named nevertheless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Data(&'static [&'static str]),
    Decision(&'static [&'static str]),
    Adapter,
    Channels,
    Driver(&'static [&'static str]),
    Folder,
    Wiring,
}

/// Libraries that one module keeps to itself.
const LIBRARIES: &[(&[&str], &[&str])] = &[
    (&["libcontainer", "libcgroups", "oci_spec", "libseccomp"], &["runtime"]),
    (&["rusqlite"], &["store"]),
    (&["hyper", "smol_hyper", "rumqttc", "futures_rustls"], &["net"]),
    (&["anyhow"], &["cli", "daemon", "main"]),
];
/// Only here may code be `unsafe`.
const UNSAFE: &str = "runtime";

/// What a pure module does not name: time, randomness, the world and waiting are arguments.
const IMPURE: &[&str] =
    &["async", "await", "smol", "fastrand", "rustix", "nix", "libc", "ring", "SystemClock"];
const IMPURE_STD: &[&str] = &["fs", "io", "net", "process", "thread", "env", "os"];

#[test]
fn arrows_between_modules_only_point_down() {
    let found = check(&sources());

    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn every_file_says_why_it_exists() {
    let silent: Vec<String> = sources()
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//!"))
        .map(|(path, _)| format!("src/{path} does not open with //!"))
        .collect();

    assert!(silent.is_empty(), "\n{}", silent.join("\n"));
}

/// Every mistake, as `src/FILE:LINE: what`.
fn check(sources: &BTreeMap<String, String>) -> Vec<String> {
    let texts: BTreeMap<&str, String> =
        sources.iter().map(|(path, text)| (path.as_str(), without_comments(text))).collect();
    let test_files: BTreeSet<String> = texts.iter().flat_map(|(path, text)| test_files(path, text)).collect();
    let is_test = |path: &str| test_files.iter().any(|test| path == test || path.starts_with(&folder(test)));
    let mut found = Vec::new();
    for (path, text) in texts.iter().filter(|(path, _)| !is_test(path)) {
        let text = without_tests(text);
        let module = module_of(path);
        let Some((unit, layer)) = unit_of(&module) else {
            found.push(format!(
                "src/{path}:1: `{}` has no layer; give it one in this test",
                module.join("::")
            ));
            continue;
        };
        let tokens = tokens(&text);
        let mut say = |at: usize, what: String| {
            let line = text[..at].matches('\n').count() + 1;
            found.push(format!("src/{path}:{line}: {what}"));
        };
        for (at, target) in crate_paths(&tokens, &module) {
            match unit_of(&target) {
                Some((other, to)) if !may(unit, layer, other, to) => {
                    say(at, format!("`{unit}` names `{other}`: {layer:?} → {to:?}"));
                }
                _ => {}
            }
        }
        libraries(unit, layer, &tokens, &mut say);
    }
    // A group of several names is one mistake.
    found.dedup();
    found
}

fn may(unit: &str, layer: Layer, other: &str, to: Layer) -> bool {
    use Layer::*;
    if unit == other {
        return true;
    }
    match (layer, to) {
        (_, Folder) | (Wiring, _) => true,
        // A folder lists what is in it.
        (Folder, _) => unit.is_empty() || other.starts_with(&format!("{unit}::")),
        (Data(also) | Decision(also) | Driver(also), _) if also.contains(&other) => true,
        (Data(_), _) => false,
        // Waiting is no decision.
        (Decision(_), Data(_)) => !["watch", "deadline"].contains(&other),
        (Adapter, Data(_)) => true,
        (Channels, Data(_) | Adapter) => true,
        (Driver(_), Data(_) | Decision(_) | Adapter | Channels) => true,
        _ => false,
    }
}

fn libraries(unit: &str, layer: Layer, tokens: &[Token<'_>], say: &mut impl FnMut(usize, String)) {
    let top = unit.split("::").next().unwrap_or_default();
    for (index, token) in tokens.iter().enumerate() {
        let before = index.checked_sub(1).map_or("", |before| tokens[before].text);
        let after = tokens.get(index + 1).map_or("", |token| token.text);
        // A name is a library's when a path begins with it: `a::b`, `use a`, not `x.a` or `b::a`.
        let begins = before != "::" && before != "." && (after == "::" || before == "use");
        for (names, owners) in LIBRARIES {
            if begins && names.contains(&token.text) && !owners.contains(&top) {
                say(token.at, format!("`{unit}` names {}, which stays in {}", token.text, owners.join(", ")));
            }
        }
        if token.text == "unsafe" && top != UNSAFE {
            say(token.at, format!("`{unit}` is unsafe, which only {UNSAFE} may be"));
        }
        if let Layer::Decision(_) = layer {
            let keyword = matches!(token.text, "async" | "await" | "SystemClock");
            let std = before == "std" || before == "::" && index >= 2 && tokens[index - 2].text == "std";
            if IMPURE.contains(&token.text) && (keyword || begins) || std && IMPURE_STD.contains(&token.text)
            {
                say(token.at, format!("`{unit}` decides and must stay pure, but names {}", token.text));
            }
            let now = matches!(token.text, "Instant" | "SystemTime") && after == "::";
            if now && tokens.get(index + 2).is_some_and(|token| token.text == "now") {
                say(token.at, format!("`{unit}` decides and must stay pure, but looks at a clock"));
            }
        }
    }
}

/// `scheduler/driver.rs` → [scheduler, driver]; `net/mod.rs` → [net].
fn module_of(path: &str) -> Vec<String> {
    let stem = path.strip_suffix(".rs").unwrap_or(path);
    let mut parts: Vec<String> = stem.split('/').map(str::to_owned).collect();
    if parts.last().is_some_and(|last| last == "mod") || parts == ["lib"] {
        parts.pop();
    }
    parts
}

/// The entry of `MODULES` that a path lies in. An item at the crate's root belongs to none.
fn unit_of(module: &[String]) -> Option<(&'static str, Layer)> {
    let fits = |name: &str| {
        let parts: Vec<&str> = name.split("::").filter(|part| !part.is_empty()).collect();
        parts.len() <= module.len() && parts.iter().zip(module).all(|(part, own)| part == own)
    };
    let found = MODULES.iter().filter(|(name, _)| fits(name)).max_by_key(|(name, _)| name.len())?;
    (!found.0.is_empty() || module.is_empty()).then_some(*found)
}

#[derive(Clone, Copy, Debug)]
struct Token<'t> {
    text: &'t str,
    at: usize,
}

/// Names, `::`, and every other character by itself.
fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let mut end = at + c.len_utf8();
        if c.is_whitespace() {
            continue;
        }
        if c.is_alphanumeric() || c == '_' {
            while let Some((next, c)) = chars.next_if(|(_, c)| c.is_alphanumeric() || *c == '_') {
                end = next + c.len_utf8();
            }
        } else if c == ':' && chars.next_if(|(_, c)| *c == ':').is_some() {
            end += 1;
        }
        tokens.push(Token { text: &text[at..end], at });
    }
    tokens
}

/// Every path from `crate`, `self` or `super`, whole, with its place; groups are opened.
fn crate_paths(tokens: &[Token<'_>], module: &[String]) -> Vec<(usize, Vec<String>)> {
    let mut paths = Vec::new();
    // How deep the inline modules around a token are, for `super`: the braces that they end with.
    let (mut braces, mut inline) = (0, Vec::new());
    for (index, token) in tokens.iter().enumerate() {
        match token.text {
            "{" => {
                braces += 1;
                if index >= 2 && tokens[index - 2].text == "mod" {
                    inline.push((braces, tokens[index - 1].text.to_owned()));
                }
            }
            "}" => {
                inline.retain(|(depth, _)| *depth != braces);
                braces -= 1;
            }
            "crate" | "self" | "super" if tokens.get(index + 1).is_some_and(|next| next.text == "::") => {
                // The middle of a path has been read from its beginning; `pub(in crate::x)` names
                // who may look, not what is looked at.
                let before = index.checked_sub(1).map_or("", |before| tokens[before].text);
                if before == "::" || before == "in" && index >= 2 && tokens[index - 2].text == "(" {
                    continue;
                }
                let mut base = module.to_vec();
                base.extend(inline.iter().map(|(_, name)| name.clone()));
                let start = if token.text == "crate" { Vec::new() } else { base };
                let start = if token.text == "super" { parent(start) } else { start };
                open_path(tokens, index + 2, start, &mut paths);
            }
            _ => {}
        }
    }
    paths
}

fn parent(mut module: Vec<String>) -> Vec<String> {
    module.pop();
    module
}

/// Reads on behind a `::`; returns the index behind the path.
fn open_path(
    tokens: &[Token<'_>],
    mut index: usize,
    mut path: Vec<String>,
    paths: &mut Vec<(usize, Vec<String>)>,
) -> usize {
    loop {
        let Some(token) = tokens.get(index) else { return index };
        match token.text {
            "{" => {
                index += 1;
                while let Some(token) = tokens.get(index).filter(|token| token.text != "}") {
                    index = if token.text == "," {
                        index + 1
                    } else {
                        // An entry takes a token at least, so that this ends.
                        open_path(tokens, index, path.clone(), paths).max(index + 1)
                    };
                }
                return index + 1;
            }
            "super" => path = parent(path),
            "self" => {}
            "*" => {
                paths.push((token.at, path));
                return index + 1;
            }
            name => path.push(name.to_owned()),
        }
        index += 1;
        if tokens.get(index).is_none_or(|next| next.text != "::") {
            paths.push((token.at, path));
            if tokens.get(index).is_some_and(|next| next.text == "as") {
                index += 2;
            }
            return index;
        }
        index += 1;
        // A turbofish is no part of the path's name.
        if tokens.get(index).is_some_and(|next| next.text == "<") {
            paths.push((token.at, path));
            return index;
        }
    }
}

/// The text with comments and the insides of literals blanked, line breaks and places kept.
fn without_comments(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut blank = |from: usize, to: usize| {
        for byte in &mut out[from..to] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
    };
    let mut at = 0;
    while at < bytes.len() {
        let rest = &text[at..];
        let boundary = at == 0 || !(bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
        let end = if rest.starts_with("//") {
            at + rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            at + block_comment(rest)
        } else if let Some(length) = raw_string(rest).filter(|_| boundary) {
            at + length
        } else if rest.starts_with('"') {
            at + quoted(rest, b'"')
        } else if let Some(length) = char_literal(rest) {
            at + length
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
            continue;
        };
        blank(at, end);
        at = end;
    }
    String::from_utf8(out).expect("whole characters were blanked, byte by byte")
}

/// Block comments nest.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        if rest.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

/// `r"…"`, `r#"…"#`, `br"…"`, `cr"…"`: the length, if it is one.
fn raw_string(text: &str) -> Option<usize> {
    let rest =
        text.strip_prefix("br").or_else(|| text.strip_prefix("cr")).or_else(|| text.strip_prefix('r'))?;
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    let inside = rest[hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let length = inside.find(&close).map_or(inside.len(), |end| end + close.len());
    Some(text.len() - inside.len() + length)
}

fn quoted(text: &str, quote: u8) -> usize {
    let bytes = text.as_bytes();
    let mut at = 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

/// `'x'` and `'\n'`, and not the lifetime `'x`.
fn char_literal(text: &str) -> Option<usize> {
    let inside = text.strip_prefix('\'')?;
    if inside.starts_with('\\') {
        return Some(quoted(text, b'\''));
    }
    let length = inside.chars().next()?.len_utf8();
    inside[length..].starts_with('\'').then_some(length + 2)
}

/// Blanks what stands behind `#[cfg(test)]`: the next item, up to its `;` or closing brace.
fn without_tests(text: &str) -> String {
    let mut out = text.to_owned();
    let mut from = 0;
    while let Some(start) = out[from..].find("#[cfg(test)]").map(|start| start + from) {
        let end = item_end(&out, start + "#[cfg(test)]".len());
        let blank: String = out[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        out.replace_range(start..end, &blank);
        from = start + blank.len();
    }
    out
}

fn item_end(text: &str, from: usize) -> usize {
    let mut depth = 0_i32;
    for (at, c) in text[from..].char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => {
                depth -= 1;
                // The item's own braces; or those around it, when it was the last field or arm.
                if depth < 0 || depth == 0 && c == '}' {
                    return from + at + usize::from(depth == 0);
                }
            }
            ';' | ',' if depth == 0 => return from + at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Files that `#[cfg(test)] mod NAME;` brings in: both places where they may be.
fn test_files(path: &str, text: &str) -> Vec<String> {
    let folder = match path.rsplit_once('/') {
        Some((folder, "mod.rs")) => format!("{folder}/"),
        None if path == "lib.rs" || path == "main.rs" => String::new(),
        _ => folder(path),
    };
    let mut files = Vec::new();
    for (start, attribute) in text.match_indices("#[cfg(test)]") {
        let item = &text[start + attribute.len()..item_end(text, start + attribute.len())];
        let words: Vec<&str> = tokens(item).iter().map(|token| token.text).collect();
        if let [.., "mod", name, ";"] = words[..] {
            files.push(format!("{folder}{name}.rs"));
            files.push(format!("{folder}{name}/mod.rs"));
        }
    }
    files
}

/// Where a file's child modules lie: `a/b.rs` and `a/b/mod.rs` → `a/b/`.
fn folder(path: &str) -> String {
    let stem = path.strip_suffix("/mod.rs").or_else(|| path.strip_suffix(".rs")).unwrap_or(path);
    format!("{stem}/")
}

/// Every Rust file below src, by its path from there.
fn sources() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders: Vec<PathBuf> = vec![root.clone()];
    let mut sources = BTreeMap::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("src is readable") {
            let path = entry.expect("an entry of src").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let name = path.strip_prefix(&root).expect("below src").to_string_lossy().into_owned();
                sources.insert(name, fs::read_to_string(&path).expect("a source file is UTF-8"));
            }
        }
    }
    assert!(sources.len() > 50, "src has gone missing");
    sources
}

mod checker {
    //! The checker's own laws: a bad line is caught, a good one is not.

    use super::*;

    fn found_in(path: &str, text: &str) -> Vec<String> {
        check(&BTreeMap::from([(path.to_owned(), text.to_owned())]))
    }

    #[test]
    fn an_arrow_up_or_across_is_caught_with_its_line() {
        let caught = [
            ("model/event.rs", "//! x\nuse crate::config::Config;"),
            ("config/mod.rs", "\nuse crate::store::{Store, entry::Row};"),
            ("store/mod.rs", "\nuse crate::{model::Event, image::Image};"),
            ("store/mod.rs", "\nfn f() { crate::runtime::probe::probe(p) }"),
            ("net/http/mod.rs", "\nuse super::super::store;"),
            ("scheduler/plan.rs", "\nuse crate::store::Leased;"),
            ("scheduler/plan.rs", "\nuse super::driver::Driver;"),
            ("scheduler/budget.rs", "\nuse super::{budget, plan::Plan};"),
            ("sync/link.rs", "\nuse crate::scheduler::plan;"),
            ("ingress/http/auth.rs", "\nuse crate::ingress::mqtt::Arrival;"),
            ("deploy.rs", "\nuse crate::daemon;"),
            ("channels.rs", "\nuse crate::ingress::routes::Routes;"),
            ("backoff.rs", "\nuse crate::watch::Wake;"),
            ("watch.rs", "\nuse crate::model as m;"),
            ("telemetry/metrics.rs", "\npub use crate::channels::*;"),
            ("image/mod.rs", "\nmod inner { use super::super::store::Store; }"),
            ("newcomer.rs", "fn f() {}"),
        ];
        for (path, text) in caught {
            let found = found_in(path, text);
            let line = if path == "newcomer.rs" { 1 } else { 2 };
            assert_eq!(found.len(), 1, "{path} {text:?}: {found:?}");
            assert!(found[0].starts_with(&format!("src/{path}:{line}: ")), "{found:?}");
        }
    }

    #[test]
    fn a_library_outside_its_module_is_caught() {
        let caught = [
            ("net/mod.rs", "use rusqlite::Connection;"),
            ("image/layout.rs", "type T = oci_spec::image::ImageIndex;"),
            ("ingress/http/mod.rs", "use hyper::{Request, body};"),
            ("deploy.rs", "fn f() -> anyhow::Result<()> { Ok(()) }"),
            ("store/mod.rs", "fn f() { unsafe { g() } }"),
            ("sync/driver/mod.rs", "use rumqttc as codec;"),
            ("scheduler/plan.rs", "async fn f() {}"),
            ("scheduler/plan.rs", "use std::fs::File;"),
            ("scheduler/plan.rs", "fn f() { std::time::Instant::now(); }"),
            ("backoff.rs", "fn f() { fastrand::u32(..); }"),
        ];
        for (path, text) in caught {
            assert_eq!(found_in(path, text).len(), 1, "{path} {text:?}: {:?}", found_in(path, text));
        }
    }

    #[test]
    fn good_code_comments_strings_and_tests_pass() {
        let good = [
            (
                "store/mod.rs",
                "//! use crate::image;\n/* crate::net /* crate::net */ crate::net */ use crate::model::Event;",
            ),
            ("store/mod.rs", "const A: &str = \"use crate::image; // \\\" unsafe\"; fn f<'a>(x: &'a str) {}"),
            (
                "store/mod.rs",
                "const A: &str = r#\"\" crate::image \"#; const B: char = '\"'; use crate::watch::Wake;",
            ),
            (
                "store/mod.rs",
                "fn f() {}\n#[cfg(test)]\nmod tests { use crate::image::Image; fn g() { unsafe {} } }",
            ),
            ("store/mod.rs", "#[cfg(test)]\nuse crate::image::Image;\nuse rusqlite::Row;"),
            ("store/mod.rs", "pub(in crate::store) fn f() { self::g(); super::model::h(); }"),
            (
                "sync/link.rs",
                "use crate::backoff::Backoff; use crate::model::Target; use std::time::{Duration, Instant};",
            ),
            (
                "sync/driver/mod.rs",
                "use crate::{channels, net::mqtt, store::Store, sync::{self, link::State}, watch};",
            ),
            ("sync/driver/session.rs", "use super::drain; use crate::sync::driver::subscribe;"),
            ("scheduler/driver.rs", "use super::{budget, plan, parking}; use crate::model::Event as E;"),
            ("ingress/mod.rs", "pub mod http; pub use self::http::Server;"),
            (
                "cli/mod.rs",
                "use crate::{daemon, deploy, store}; fn f() -> anyhow::Result<()> { self.hyper; x.anyhow::<u8>() }",
            ),
            ("runtime/sys.rs", "use libcontainer::x; fn f() { unsafe {} }"),
            ("config/mod.rs", "fn unsafe_looking() { let hyper = 1; let x = hyper + 1; }"),
        ];
        for (path, text) in good {
            let found = found_in(path, text);
            assert!(found.is_empty(), "{path} {text:?}: {found:?}");
        }
    }

    #[test]
    fn a_file_of_tests_may_name_what_it_likes() {
        let sources = BTreeMap::from([
            ("store/mod.rs".to_owned(), "#[cfg(test)]\nmod tests;\n".to_owned()),
            ("store/tests/mod.rs".to_owned(), "use crate::net::http; mod more;".to_owned()),
            ("store/tests/more.rs".to_owned(), "use crate::daemon;".to_owned()),
            ("net/mod.rs".to_owned(), "mod tests;".to_owned()),
            ("net/tests.rs".to_owned(), "use crate::daemon;".to_owned()),
        ]);

        let found = check(&sources);

        assert_eq!(found, ["src/net/tests.rs:1: `net` names `daemon`: Adapter → Wiring"]);
    }
}
