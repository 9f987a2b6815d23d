//! `neap image …`.

use super::Session;
use super::args::Image;
use super::client::{ClientError, below, parse};
use super::output::{ProgressLine, tell};
use super::source;
use super::text::{self, Table};
use super::units::with_query;
use crate::model::Reference;
use crate::model::api::{Collected, ImageDetail, ImageSummary, Progress, PullStatus};
use crate::net::http::Body;
use anyhow::Context;
use std::path::Path;
use std::time::Duration;

const IMAGES: &str = "/v1/images";
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub async fn image(session: &Session, command: Image) -> anyhow::Result<()> {
    match command {
        Image::Import { source, name } => {
            let shown = source.display();
            import(session, &source, name).await.with_context(|| format!("import {shown}"))
        }
        Image::Pull { reference } => {
            pull(session, &reference).await.with_context(|| format!("pull {reference}"))
        }
        Image::Ls => ls(session).await.context("list images"),
        Image::Show { reference } => {
            show(session, &reference).await.with_context(|| format!("show {reference}"))
        }
        Image::Rm { reference } => {
            let path = below(IMAGES, &reference, "");
            let doing = || format!("rm {reference}");
            session.client.bytes("DELETE", &path, Body::Empty).await.with_context(doing)?;
            if session.out.json() {
                return Ok(());
            }
            Ok(session.out.line(&format!("{}: removed", text::escape(&reference)))?)
        }
        Image::Gc { dry_run } => gc(session, dry_run).await.context("collect images"),
    }
}

async fn import(session: &Session, source: &Path, name: Option<String>) -> anyhow::Result<()> {
    if let Some(name) = &name {
        // Told before a hundred megabytes have travelled.
        Reference::parse(name).context("--name")?;
    }
    let (body, size) = source::image(source)?;
    let path = with_query(IMAGES, &[("name", name)]);
    follow(session, &path, body, size).await
}

async fn pull(session: &Session, reference: &str) -> anyhow::Result<()> {
    let name = Reference::parse(reference)?;
    let path = with_query("/v1/pull", &[("name", Some(name.as_str().to_owned()))]);
    follow(session, &path, Body::Empty, None).await
}

/// Asks, and shows the progress that is the answer.
async fn follow(session: &Session, path: &str, body: Body, size: Option<u64>) -> anyhow::Result<()> {
    let mut progress = ProgressLine::new();
    progress.show("connecting");
    let mut lines = session.client.lines("POST", path, body).await?;
    while let Some(line) = lines.next().await? {
        let news: Progress = parse(&line)?;
        let last = matches!(news, Progress::Done(_) | Progress::Error(_));
        if session.out.json() {
            session.out.answer(&line)?;
        }
        if last {
            progress.clear();
            let _ = lines.next().await; // the answer's end: the daemon need not see us hang up
        }
        match news {
            Progress::Read(_)
            | Progress::Unpacking { .. }
            | Progress::Fetching { .. }
            | Progress::Waiting { .. } => progress.show(&progress_text(&news, size)),
            Progress::Warning(warning) => {
                progress.clear();
                tell(&format!("neap: warning: {}", text::escape(&warning)));
            }
            Progress::Done(_) if session.out.json() => return Ok(()),
            Progress::Done(image) => return Ok(session.out.line(&imported_line(&image))?),
            Progress::Error(error) => anyhow::bail!("{error}"),
        }
    }
    Err(ClientError::Truncated.into())
}

fn progress_text(progress: &Progress, size: Option<u64>) -> String {
    match (progress, size) {
        // A compressed file's own bytes are what is counted.
        (Progress::Read(bytes), Some(size)) if *bytes <= size => {
            format!("reading {} of {}", text::size(*bytes), text::size(size))
        }
        (Progress::Read(bytes), _) => format!("reading {}", text::size(*bytes)),
        (Progress::Fetching { of: 0, .. }, _) => "asking the registry".to_owned(),
        (Progress::Fetching { bytes, of }, _) => {
            format!("fetching {} of {} ({} %)", text::size(*bytes), text::size(*of), percent(*bytes, *of))
        }
        (Progress::Waiting { why, ms: 0 }, _) => text::escape(why),
        (Progress::Waiting { why, ms }, _) => {
            format!("again in {}: {}", text::duration(*ms), text::escape(why))
        }
        (Progress::Unpacking { layer, of, digest }, _) => {
            let short: String = text::escape(digest).chars().take(19).collect();
            format!("unpacking layer {layer} of {of} ({short})")
        }
        _ => String::new(),
    }
}

fn percent(bytes: u64, of: u64) -> u64 {
    (u128::from(bytes) * 100 / u128::from(of.max(1))) as u64
}

/// Shows how far the pull of `image` is, when there is one, for as long as it is polled: somebody
/// else's request waits for it, over a bad link for hours.
pub async fn show_pull<T>(session: &Session, image: &Reference) -> T {
    let mut progress = ProgressLine::new();
    let mut told = String::new();
    loop {
        smol::Timer::after(LOOK_EVERY).await;
        let answer = session.client.get(IMAGES).await.ok();
        let images: Vec<ImageSummary> = answer.and_then(|text| parse(&text).ok()).unwrap_or_default();
        let ours =
            |image_there: &ImageSummary| image_there.references.iter().any(|name| name == image.as_str());
        let Some(pull) = images.into_iter().filter(ours).find_map(|image| image.pull) else {
            progress.clear();
            continue;
        };
        progress.show(&format!("pulling {image}: {}", text::escape(&pull_text(&pull))));
        // Without a terminal: what goes wrong, once each.
        if let Some(error) = pull.last_error.filter(|error| !progress.visible() && *error != told) {
            tell(&format!("neap: pulling {image}: {}; it goes on", text::escape(&error)));
            told = error;
        }
    }
}

/// What `ls` says of an image that is on its way.
fn pull_text(pull: &PullStatus) -> String {
    let share = format!("{} %", percent(pull.bytes, pull.of));
    let again = pull.retry_in_ms.map(|ms| format!(", again in {}", text::duration(ms))).unwrap_or_default();
    let why = pull.last_error.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    match pull.of {
        0 => format!("{}{again}{why}", pull.state),
        _ => format!("{} {share}{again}{why}", pull.state),
    }
}

async fn gc(session: &Session, dry_run: bool) -> anyhow::Result<()> {
    let path = with_query("/v1/collect", &[("dry_run", dry_run.then(|| "1".to_owned()))]);
    let answer = session.client.bytes("POST", &path, Body::Empty).await?;
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let collected: Collected = parse(&answer)?;
    let word = if collected.dry_run { "would go" } else { "removed" };
    for image in &collected.images {
        session.out.line(&format!("{word}: {}", imported_line(image)))?;
    }
    let count = text::count(collected.images.len() as u64, "image");
    Ok(session.out.line(&format!("{word}: {count}, {}", text::size(collected.bytes)))?)
}

/// `thermostat:1: linux/arm64, 3.4 MiB (sha256:…)`
fn imported_line(image: &ImageSummary) -> String {
    let names = if image.references.is_empty() { "(no name)".to_owned() } else { names(image) };
    let line = format!("{names}: {}, {} ({})", image.platform, text::size(image.bytes), image.digest);
    text::escape(&line)
}

fn names(image: &ImageSummary) -> String {
    image.references.iter().map(|name| familiar(name)).collect::<Vec<_>>().join(", ")
}

/// As people write it: without `docker.io/library/`.
fn familiar(reference: &str) -> String {
    Reference::parse(reference).map_or_else(|_| reference.to_owned(), |r| r.to_string())
}

async fn ls(session: &Session) -> anyhow::Result<()> {
    let answer = session.client.get(IMAGES).await?;
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let images: Vec<ImageSummary> = parse(&answer)?;
    if images.is_empty() {
        tell("no images; `neap image pull NAME` or `neap image import FILE` brings one");
        return Ok(());
    }
    let mut table = Table::new(&["NAME", "DIGEST", "PLATFORM", "SIZE", "IMPORTED", "USED BY"]);
    for image in &images {
        if let Some(pull) = &image.pull {
            let age = format!("{} ago", text::age(image.imported, session.now));
            let size = text::size(pull.of);
            table.row(vec![names(image), String::new(), pull_text(pull), size, age, String::new()]);
            continue;
        }
        table.row(vec![
            names(image),
            // as `docker images` does; `show` has all of it
            image.digest.chars().take("sha256:".len() + 12).collect(),
            image.platform.clone(),
            text::size(image.bytes),
            format!("{} ago", text::age(image.imported, session.now)),
            image.used_by.join(", "),
        ]);
    }
    Ok(session.out.text(&table.render(session.out.width))?)
}

async fn show(session: &Session, reference: &str) -> anyhow::Result<()> {
    let answer = session.client.get(&below(IMAGES, reference, "")).await?;
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let image: ImageDetail = parse(&answer)?;
    let quoted = |words: &[String]| match words {
        [] => String::new(),
        words => serde_json::to_string(words).unwrap_or_default(),
    };
    let mut pairs = vec![
        ("Names", names(&image.summary)),
        ("Digest", image.summary.digest.clone()),
        ("Platform", image.summary.platform.clone()),
        ("Size", text::size(image.summary.bytes)),
        (
            "Imported",
            format!("{} ago ({})", text::age(image.summary.imported, session.now), image.summary.imported),
        ),
        ("Used by", image.summary.used_by.join(", ")),
        ("Entrypoint", quoted(&image.entrypoint)),
        ("Cmd", quoted(&image.cmd)),
        ("User", image.user.clone()),
        ("Working dir", image.working_dir.clone()),
    ];
    pairs.extend(image.trust.iter().map(|line| ("Trust", line.clone())));
    pairs.extend(image.env.iter().map(|env| ("Env", env.clone())));
    pairs.extend(image.labels.iter().map(|(key, value)| ("Label", format!("{key}={value}"))));
    let mut layers = Table::new(&["LAYER", "SIZE"]);
    for layer in &image.layers {
        layers.row(vec![layer.diff_id.clone(), text::size(layer.bytes)]);
    }
    Ok(session.out.text(&format!("{}\n{}", text::fields(&pairs), layers.render(None)))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::UnixMs;

    #[test]
    fn progress_says_how_far_it_is() {
        let layer = Progress::Unpacking { layer: 2, of: 3, digest: format!("sha256:{}", "a".repeat(64)) };

        assert_eq!(progress_text(&Progress::Read(1 << 20), Some(4 << 20)), "reading 1 MiB of 4 MiB");
        assert_eq!(progress_text(&Progress::Read(1 << 20), None), "reading 1 MiB");
        assert_eq!(progress_text(&Progress::Read(2), Some(1)), "reading 2 B");
        assert_eq!(progress_text(&layer, None), "unpacking layer 2 of 3 (sha256:aaaaaaaaaaaa)");
    }

    #[test]
    fn result_is_one_line_with_familiar_names() {
        let image = ImageSummary {
            references: vec!["docker.io/library/thermostat:1".into()],
            digest: "sha256:ab".into(),
            platform: "linux/arm64".into(),
            bytes: 3 << 20,
            imported: UnixMs(0),
            used_by: Vec::new(),
            pull: None,
        };

        assert_eq!(imported_line(&image), "thermostat:1: linux/arm64, 3 MiB (sha256:ab)");
    }
}
