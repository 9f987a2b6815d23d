//! `neap deploy`, `ls`, `show`, `rm`, `pause`, `resume`, `rollback`.

use super::Session;
use super::client::{ClientError, below, parse};
use super::fault::Fault;
use super::images::show_pull;
use super::output::tell;
use super::text::{self, Table};
use super::units::with_query;
use crate::channels::{Deployed, Removed};
use crate::model::Reference;
use crate::model::api::{FunctionDetail, FunctionSummary};
use crate::net::http::Body;
use anyhow::Context;
use futures_lite::future;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

const FUNCTIONS: &str = "/v1/functions";

/// A manifest is a page of text; what is larger was given by mistake.
const MANIFEST_BYTES_MAX: u64 = crate::config::TEXT_BYTES_MAX as u64;

/// Every file is tried, and every problem told: one bad manifest says nothing about the next.
pub async fn deploy(session: &Session, paths: &[PathBuf]) -> anyhow::Result<()> {
    let mut failed = false;
    for file in manifests(paths)? {
        let shown = file.display();
        match deploy_file(session, &file).await.with_context(|| format!("deploy {shown}")) {
            Ok(()) => {}
            // Nobody there, nobody listens: true for every other file, too.
            Err(error) if !matches!(Fault::of(&error), Fault::Failed | Fault::NotFound) => return Err(error),
            Err(error) => {
                super::fault::report(&error);
                failed = true;
            }
        }
    }
    if failed { Err(Fault::Told.into()) } else { Ok(()) }
}

async fn deploy_file(session: &Session, file: &Path) -> anyhow::Result<()> {
    let length = file.metadata()?.len();
    anyhow::ensure!(length <= MANIFEST_BYTES_MAX, "larger than {}", text::size(MANIFEST_BYTES_MAX));
    let manifest = std::fs::read(file)?;
    let path = with_query(FUNCTIONS, &[("file", Some(file.display().to_string()))]);
    let image = image_of(&manifest);
    let deploying = session.client.bytes("POST", &path, Body::Bytes(manifest));
    let answer = match &image {
        Some(image) => future::or(deploying, show_pull(session, image)).await?,
        None => deploying.await?,
    };
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let deployed: Deployed = parse(&answer)?;
    for warning in &deployed.warnings {
        tell(&format!("warning: {}: {}", text::escape(&deployed.name), text::escape(warning)));
    }
    Ok(session.out.line(&deployed_line(&deployed))?)
}

/// What the daemon may have to pull; a mistake in the manifest is the daemon's to tell.
fn image_of(manifest: &[u8]) -> Option<Reference> {
    let (manifest, _) = DeTable::parse_recoverable(std::str::from_utf8(manifest).ok()?);
    match manifest.get_ref().get("image")?.get_ref() {
        DeValue::String(image) => Reference::parse(image).ok(),
        _ => None,
    }
}

/// `thermostat: revision 3 (sha256:4f53cda18c2b…)`, or `… revision 3, unchanged`.
pub fn deployed_line(deployed: &Deployed) -> String {
    let name = text::escape(&deployed.name);
    match deployed.changed {
        true => format!("{name}: revision {} ({})", deployed.revision, text::escape(&deployed.image)),
        false => format!("{name}: unchanged, revision {}", deployed.revision),
    }
}

/// Files as they are named; of a directory every `*.toml` directly in it, sorted.
fn manifests(paths: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let doing = || format!("deploy {}", path.display());
        let mut found = Vec::new();
        for entry in std::fs::read_dir(path).with_context(doing)? {
            let file = entry.with_context(doing)?.path();
            if file.extension().is_some_and(|e| e == "toml") && file.is_file() {
                found.push(file);
            }
        }
        anyhow::ensure!(!found.is_empty(), "deploy {}: no *.toml in it", path.display());
        found.sort();
        files.append(&mut found);
    }
    Ok(files)
}

pub async fn ls(session: &Session) -> anyhow::Result<()> {
    let answer = session.client.get(FUNCTIONS).await.context("list functions")?;
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let functions: Vec<FunctionSummary> = parse(&answer)?;
    if functions.is_empty() {
        tell("no functions; `neap deploy FILE` brings one");
        return Ok(());
    }
    Ok(session.out.text(&table(&functions).render(session.out.width))?)
}

/// Also the lower half of `neap status`.
pub fn table(functions: &[FunctionSummary]) -> Table {
    let mut table = Table::new(&[
        "NAME", "REVISION", "STATE", "QUEUED", "RUNNING", "OK", "FAILED", "DEAD", "IMAGE", "TRIGGERS",
    ]);
    for f in functions {
        table.row(vec![
            f.name.clone(),
            f.revision.to_string(),
            f.state.clone(),
            f.queued.to_string(),
            f.running.to_string(),
            f.succeeded.to_string(),
            f.failed.to_string(),
            f.dead.to_string(),
            f.image.clone(),
            f.triggers.join(", "),
        ]);
    }
    table
}

pub async fn show(session: &Session, name: &str) -> anyhow::Result<()> {
    let doing = || format!("show {name}");
    let answer = session.client.get(&below(FUNCTIONS, name, "")).await.with_context(doing)?;
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let function: FunctionDetail = parse(&answer)?;
    let f = &function.summary;
    let platform = function.manifest["platform"].as_str().unwrap_or_default().to_owned();
    let mut shown = text::fields(&[
        ("Name", f.name.clone()),
        ("Revision", f.revision.to_string()),
        ("State", f.state.clone()),
        ("Image", f.image.clone()),
        ("Digest", function.image_digest.clone()),
        ("Handler", f.handler.clone()),
        ("Platform", platform),
        (
            "Before it",
            function.previous.as_ref().map_or_else(String::new, |before| {
                format!("revision {} ({})", before.revision, before.image_digest)
            }),
        ),
        ("Rolled back", function.rolled_back.clone().unwrap_or_default()),
        ("Deployed", format!("{} ago ({})", text::age(function.created, session.now), function.created)),
        ("File", function.file.clone().unwrap_or_default()),
        ("Triggers", f.triggers.join(", ")),
        ("Queued", f.queued.to_string()),
        ("Waiting", text::count(f.waiting, "call")),
        ("Running", f.running.to_string()),
        ("Parked", f.parked.to_string()),
        ("Succeeded", f.succeeded.to_string()),
        ("Failed", f.failed.to_string()),
        ("Dead", f.dead.to_string()),
        ("User ids", format!("{} to {}", function.uid_base, u64::from(function.uid_base) + 65_535)),
    ]);
    shown.push_str("\nManifest, defaults filled in:\n");
    // JSON escapes most of what a terminal must not see, but not all of it.
    let manifest = serde_json::to_string_pretty(&function.manifest).map_err(ClientError::Shape)?;
    shown.push_str(&text::escape_lines(&manifest));
    Ok(session.out.line(&shown)?)
}

pub async fn rm(session: &Session, name: &str) -> anyhow::Result<()> {
    let path = below(FUNCTIONS, name, "");
    let answer =
        session.client.bytes("DELETE", &path, Body::Empty).await.with_context(|| format!("rm {name}"))?;
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let removed: Removed = parse(&answer)?;
    let went = match removed.invocations {
        0 => String::new(),
        n => format!(", and the {} it had left", text::count(n, "invocation")),
    };
    session.out.line(&format!("{}: removed{went}", text::escape(name)))?;
    if let Some(volumes) = removed.volumes {
        let volumes = text::escape(&volumes.display().to_string());
        tell(&format!(
            "its volumes stay, for a function of this name: {volumes}; delete that directory to be rid of them"
        ));
    }
    Ok(())
}

pub async fn pause(session: &Session, name: &str, paused: bool) -> anyhow::Result<()> {
    let (doing, done) = if paused { ("pause", "paused") } else { ("resume", "runs again") };
    let path = below(FUNCTIONS, name, &format!("/{doing}"));
    session.client.bytes("POST", &path, Body::Empty).await.with_context(|| format!("{doing} {name}"))?;
    if session.out.json() {
        return Ok(());
    }
    Ok(session.out.line(&format!("{}: {done}", text::escape(name)))?)
}

pub async fn rollback(session: &Session, name: &str) -> anyhow::Result<()> {
    let path = below(FUNCTIONS, name, "/rollback");
    let doing = || format!("rollback {name}");
    let answer = session.client.bytes("POST", &path, Body::Empty).await.with_context(doing)?;
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let deployed: Deployed = parse(&answer)?;
    Ok(session.out.line(&deployed_line(&deployed))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_means_its_manifests_in_order() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for name in ["b.toml", "a.toml", "README.md", "c.toml.bak"] {
            std::fs::write(dir.path().join(name), "").expect("write");
        }
        std::fs::create_dir(dir.path().join("d.toml")).expect("make a directory");

        let found = manifests(&["x.toml".into(), dir.path().to_owned()]).expect("files");

        let names: Vec<_> = found.iter().filter_map(|f| f.file_name()?.to_str()).collect();
        assert_eq!(names, ["x.toml", "a.toml", "b.toml"]);
    }

    #[test]
    fn directory_without_manifests_is_an_error() {
        let dir = tempfile::tempdir().expect("a temporary directory");

        assert!(manifests(&[dir.path().to_owned()]).is_err());
    }

    #[test]
    fn image_of_a_manifest_is_known_by_its_whole_name() {
        let image = |text: &str| image_of(text.as_bytes()).map(|image| image.as_str().to_owned());

        assert_eq!(image("name = \"a\"\nimage = \"b:1\"").as_deref(), Some("docker.io/library/b:1"));
        for nothing in ["", "image = 3", "image = \"a b\"", "[image]", "name = "] {
            assert_eq!(image(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn deploy_says_what_became_of_it() {
        let deployed = |changed| Deployed {
            name: "t".into(),
            revision: 3,
            image: "sha256:ab".into(),
            changed,
            warnings: Vec::new(),
        };

        assert_eq!(deployed_line(&deployed(true)), "t: revision 3 (sha256:ab)");
        assert_eq!(deployed_line(&deployed(false)), "t: unchanged, revision 3");
    }
}
