//! What several manifests must not do to each other, though each is good by itself: two
//! functions of one name, two functions that answer one path and method.

use super::Problem;
use super::problem::position;
use super::trigger::shared_method;
use crate::model::Manifest;
use crate::model::function::{HttpTrigger, Trigger};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A manifest with its text, so that problems can name lines.
#[derive(Clone, Copy, Debug)]
pub struct Deployable<'a> {
    pub file: &'a str,
    /// Empty: not known, and problems are said to be on line 1.
    pub text: &'a str,
    pub manifest: &'a Manifest,
}

/// Contradictions between manifests, each said once, of the later one. `Deployable::check` is
/// the same with lines.
pub fn check_together(manifests: &[(String, Manifest)]) -> Vec<Problem> {
    let deployable = |(file, manifest)| Deployable { file, text: "", manifest };
    let all: Vec<_> = manifests.iter().map(|(file, manifest)| deployable((file, manifest))).collect();
    Deployable::check(&all)
}

impl Deployable<'_> {
    pub fn check(all: &[Self]) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (at, this) in all.iter().enumerate() {
            for earlier in &all[..at] {
                this.against(earlier, &mut problems);
            }
        }
        problems
    }

    fn against(&self, earlier: &Self, problems: &mut Vec<Problem>) {
        let name = &self.manifest.name;
        if earlier.manifest.name == *name {
            let message = format!("name: a function `{name}` is also in {}", earlier.file);
            problems.push(self.problem(None, "name", message));
            // The rest would say the same again.
            return;
        }
        for (at, trigger) in self.manifest.triggers.iter().enumerate() {
            let Trigger::Http(http) = trigger else { continue };
            for other in earlier.http_triggers() {
                let Some(method) = shared_method(http, other) else { continue };
                let method = if method.is_empty() { "every method" } else { method };
                let path = &http.path;
                let (who, file) = (&earlier.manifest.name, earlier.file);
                let message =
                    format!("trigger.http: {method} on {path} is already answered by `{who}` in {file}");
                problems.push(self.problem(Some(at), "http", message));
            }
        }
    }

    /// A mistake that shows only on a node, at a key of the manifest.
    pub fn mistake(&self, key: &str, message: String) -> Problem {
        self.problem(None, key, message)
    }

    fn http_triggers(&self) -> impl Iterator<Item = &HttpTrigger> {
        let triggers = self.manifest.triggers.iter();
        triggers.filter_map(|trigger| if let Trigger::Http(http) = trigger { Some(http) } else { None })
    }

    /// A problem at a key of the file, or of its trigger number `trigger`.
    fn problem(&self, trigger: Option<usize>, key: &str, message: String) -> Problem {
        let (table, _) = DeTable::parse_recoverable(self.text);
        let offset = find(table.get_ref(), trigger, key).unwrap_or(0);
        let (line, column) = position(self.text, offset);
        Problem { file: self.file.to_owned(), line, column, message }
    }
}

fn find(root: &DeTable<'_>, trigger: Option<usize>, key: &str) -> Option<usize> {
    let value = |table: &DeTable<'_>, key| table.get(key).map(Spanned::span);
    match trigger {
        None => value(root, key).map(|span| span.start),
        Some(at) => {
            let list = root.get("trigger")?.get_ref().as_array()?;
            let table: &DeValue<'_> = list.get(at)?.get_ref();
            value(table.as_table()?, key).map(|span| span.start)
        }
    }
}
