//! `neap check`: every mistake in the configuration and the manifests at once, before anything
//! is deployed. Nothing is asked of the daemon; it may be another machine that will run this.
//!
//! Mistakes go to stderr as `file:line: message`, what is good to stdout. Certificates and
//! credentials that are not there are warned of, no more: this may not be the gateway.

use super::output::{Output, OutputError, tell};
use super::{args::Format, text};
use crate::config::{Config, Deployable, Machine, MemoryShare, Problem, TEXT_BYTES_MAX, defaults, manifest};
use crate::deploy::{manifest_files, missing_secrets};
use crate::model::Manifest;
use crate::scheduler::parking;
use crate::scheduler::pool::PARKED_MAX;
use crate::secrets::Secrets;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// `config`: neap.toml, which must be there when it is named. Without manifests (files, or
/// directories of them) those in functions_dir are meant.
pub fn run(config: Option<&Path>, manifests: &[PathBuf]) -> ExitCode {
    let mut checked = Checked::configuration(config);
    if manifests.is_empty() {
        checked.functions_dir();
    } else {
        checked.manifests(manifests);
    }
    for mistake in &checked.mistakes {
        tell(&text::escape(mistake));
    }
    for missing in super::doctor::missing_files(&checked.config) {
        tell(&text::escape(&format!("warning: {missing}")));
    }
    let out = Output::new(Format::Text);
    for line in &checked.good {
        if let Err(OutputError::Write(_)) = out.line(&text::escape(line)) {
            return ExitCode::FAILURE;
        }
    }
    if checked.mistakes.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What was looked at so far.
pub(super) struct Checked {
    /// As far as it can be read.
    pub config: Config,
    pub mistakes: Vec<String>,
    pub good: Vec<String>,
}

impl Checked {
    pub fn configuration(named: Option<&Path>) -> Self {
        let machine = Machine::read();
        let path = named.unwrap_or(Path::new(defaults::CONFIG_FILE));
        let file = path.display().to_string();
        let mut checked = Self { config: Config::defaults(&machine), mistakes: Vec::new(), good: Vec::new() };
        match read_text(path) {
            Ok(text) => {
                let (config, problems) = Config::read(&file, &text, &machine);
                checked.config = config;
                if problems.is_empty() {
                    checked.good.push(format!("{file}: ok"));
                }
                checked.mistakes.extend(problems.iter().map(ToString::to_string));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => {
                checked.good.push(format!("{file}: not there, the defaults hold"));
            }
            Err(error) => checked.mistakes.push(format!("{file}: {error}")),
        }
        checked
    }

    /// What the daemon would deploy by itself.
    pub fn functions_dir(&mut self) {
        let dir = self.config.node.functions_dir.clone();
        match manifest_files(&dir) {
            Ok(files) => self.files(&files),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.good.push(format!("{}: not there, no functions", dir.display()));
            }
            Err(error) => self.mistakes.push(format!("{}: {error}", dir.display())),
        }
    }

    fn manifests(&mut self, paths: &[PathBuf]) {
        let mut files = Vec::new();
        for path in paths.iter().filter(|path| !path.is_dir()) {
            files.push(path.clone());
        }
        for dir in paths.iter().filter(|path| path.is_dir()) {
            match manifest_files(dir) {
                Ok(found) => files.extend(found),
                Err(error) => self.mistakes.push(format!("{}: {error}", dir.display())),
            }
        }
        // A file named twice, also through its directory, is no contradiction.
        files.sort();
        files.dedup();
        self.files(&files);
    }

    fn files(&mut self, paths: &[PathBuf]) {
        let mut read: Vec<(String, String, Manifest)> = Vec::new();
        for path in paths {
            let file = path.display().to_string();
            let text = match read_text(path) {
                Ok(text) => text,
                Err(error) => {
                    self.mistakes.push(format!("{file}: {error}"));
                    continue;
                }
            };
            match manifest::parse(&file, &text, &self.config) {
                Ok(manifest) => read.push((file, text, manifest)),
                Err(problems) => self.mistakes.extend(problems.iter().map(ToString::to_string)),
            }
        }
        let all: Vec<Deployable<'_>> =
            read.iter().map(|(file, text, manifest)| Deployable { file, text, manifest }).collect();
        let problems = Deployable::check(&all);
        let problems = [problems, self.missing_secrets(&all)].concat();
        for (file, _, manifest) in &read {
            if problems.iter().all(|problem| problem.file != *file) {
                self.good.push(format!("{file}: ok, function `{}`", manifest.name));
            }
        }
        self.mistakes.extend(problems.iter().map(ToString::to_string));
        if let MemoryShare::Bytes(bytes) = self.config.node.memory {
            let asked = read.iter().map(|(.., manifest)| manifest.scale.min);
            self.good
                .extend(parking::without_room(asked, bytes, PARKED_MAX).map(|what| format!("note: {what}")));
        }
    }
}

impl Checked {
    /// Where there is no data_dir this is not the gateway, and nobody can tell.
    fn missing_secrets(&mut self, all: &[Deployable<'_>]) -> Vec<Problem> {
        let wanted = all.iter().any(|one| !one.manifest.permissions.secrets.is_empty());
        let data_dir = &self.config.node.data_dir;
        if !wanted || !data_dir.is_dir() {
            return Vec::new();
        }
        let secrets = Secrets::below(data_dir);
        if let Err(error) = secrets.list() {
            let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<io::Error>());
            if cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied) {
                self.good.push("note: secrets are not looked at: they are for root to see".to_owned());
                return Vec::new();
            }
        }
        all.iter().flat_map(|one| missing_secrets(&secrets, one.file, one.text, one.manifest)).collect()
    }
}

/// A file's text, bounded: of a longer one enough is read that the parser refuses it.
fn read_text(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(TEXT_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    // The cut may go through a character; the parser says that the file is too long.
    if bytes.len() > TEXT_BYTES_MAX {
        return Ok(String::from_utf8_lossy(&bytes).into_owned());
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..good].iter().filter(|byte| **byte == b'\n').count() + 1;
        io::Error::new(io::ErrorKind::InvalidData, format!("line {line} is not UTF-8"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn mistakes_of_configuration_and_manifests_are_found_in_one_run() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        let write = |name: &str, text: &[u8]| fs::write(path(name), text).expect("a file");
        let functions = path("functions.d");
        fs::create_dir(&functions).expect("a directory");
        let config = format!("[node]\nfunctions_dir = \"{}\"\nidd = \"x\"\n[mqtt]\n", functions.display());
        write("neap.toml", config.as_bytes());
        write("functions.d/a.toml", b"name = \"a\"\nimage = \"i\"\n[[trigger]]\nmqtt = \"t\"\n");
        write("functions.d/b.toml", b"name = \"b\"\nimage = \"i\"\n[[output]]\nto = \"uplink\"\n");
        write("functions.d/c.toml", b"name = \"a\"\nimage = \"i\"\n");
        write("functions.d/d.toml", b"name = \"d\"\n# \xff\n");
        write("functions.d/e.txt", b"no manifest");

        let mut checked = Checked::configuration(Some(&path("neap.toml")));
        checked.functions_dir();

        let short = |line: &String| line.replace(&format!("{}/", dir.path().display()), "");
        let mistakes: Vec<String> = checked.mistakes.iter().map(short).collect();
        let good: Vec<String> = checked.good.iter().map(short).collect();
        assert_eq!(mistakes.len(), 4, "{mistakes:#?}");
        assert!(mistakes[0].starts_with("neap.toml:3: unknown key \"idd\""), "{mistakes:#?}");
        assert!(mistakes[1].starts_with("functions.d/b.toml:4: output.to"), "{mistakes:#?}");
        assert_eq!(mistakes[2], "functions.d/d.toml: line 2 is not UTF-8");
        assert!(mistakes[3].starts_with("functions.d/c.toml:1: name: a function `a`"), "{mistakes:#?}");
        assert_eq!(good, ["functions.d/a.toml: ok, function `a`"]);
    }

    #[test]
    fn more_parked_instances_than_the_node_has_room_for_are_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("a file");
        write("neap.toml", "[node]\nmemory = \"64MiB\"\n");
        let function = |name| {
            format!(
                "name = \"{name}\"\nimage = \"i\"\nlimits.memory = \"6MiB\"\nscale = {{ min = 10, max = 10 }}\n"
            )
        };
        for name in ["a", "b", "c", "d"] {
            write(&format!("{name}.toml"), &function(name));
        }
        let mut checked = Checked::configuration(Some(&dir.path().join("neap.toml")));

        checked.manifests(&[dir.path().to_owned()]);

        // neap.toml is no manifest.
        let note = checked.good.last().cloned().unwrap_or_default();
        assert!(
            note.starts_with("note: scale.min asks for 40 parked instances in all, 32 have room"),
            "{note}"
        );
    }

    #[test]
    fn a_file_named_twice_does_not_contradict_itself() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("a.toml");
        fs::write(&file, "name = \"a\"\nimage = \"i\"\n").expect("a file");
        let mut checked = Checked::configuration(None);
        checked.mistakes.clear();

        checked.manifests(&[file.clone(), dir.path().to_owned(), file]);

        assert_eq!(checked.mistakes, [] as [&str; 0]);
    }

    #[test]
    fn a_named_configuration_must_be_there() {
        let checked = Checked::configuration(Some(Path::new("/nonexistent/neap.toml")));

        assert_eq!(checked.mistakes.len(), 1);
        assert!(checked.mistakes[0].starts_with("/nonexistent/neap.toml: "));
    }
}
