//! (to be written)
use super::Problem;
use crate::model::Manifest;

/// A manifest with its text, so that problems can name lines.
pub struct Deployable<'a> {
    pub file: &'a str,
    /// Empty: unknown, problems are said to be on line 1.
    pub text: &'a str,
    pub manifest: &'a Manifest,
}

/// Contradictions between manifests that are good each by itself; the files are their names in
/// messages. `Deployable::check` is the same with line numbers.
pub fn check_together(_manifests: &[(String, Manifest)]) -> Vec<Problem> {
    todo!()
}
