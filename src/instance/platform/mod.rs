//! What functions of other platforms expect: a port, an environment, when they are ready, how a
//! request to them looks. One small file for each platform; pure.
//!
//! Another platform is a file with a `CONTRACT`, a word in `model::function::Platform` and in
//! `config::manifest`, and a line in `contract` and `guess`.

mod azure;
mod fc;
mod fission;
mod knative;
pub mod lambda;
mod openfaas;

use super::request::Head;
use crate::model::function::Platform;
use crate::model::{Event, Manifest, Revision};
use std::collections::BTreeMap;

/// What a platform's functions agree on.
pub struct Contract {
    /// Where they listen when nothing else is said.
    port: u16,
    ready: Ready<'static>,
    /// Beside `PORT`, which all get.
    environment: fn(&Revision, u16) -> Vec<(String, String)>,
    /// The last touch on a request.
    request: fn(&Revision, &Event, &mut Head),
    /// A request of neap's own between ready and the first.
    first: fn(&Revision) -> Option<First>,
}

/// When an instance is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready<'a> {
    /// Its port takes a connection.
    Connects,
    /// This path answers 200.
    Answers(&'a str),
    /// The same, or 404: a server that doesn't know the path is up all the same.
    AnswersOrLacks(&'a str),
}

/// A POST that an instance gets once, before anything else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct First {
    pub head: Head,
    pub body: Vec<u8>,
    /// 404 and 405 are good too: it has nothing to do.
    pub may_lack: bool,
}

/// How a platform that speaks in envelopes tells of an event, and what its answer means.
pub struct Wrap {
    pub request: fn(&Revision, &Event, Head, &[u8]) -> Message,
    /// Why it is no good answer, for people.
    pub answer: fn(&[u8]) -> Result<Unwrapped, String>,
}

/// A request, whole.
pub type Message = (Head, Vec<u8>);

/// What was in an answer's envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unwrapped {
    pub status: u16,
    pub headers: Vec<(String, Vec<u8>)>,
    pub body: Vec<u8>,
    /// Lines for the function's log.
    pub logs: Vec<String>,
}

/// A server on a port, nothing more.
const PLAIN: Contract = Contract {
    port: 8080,
    ready: Ready::Connects,
    environment: |_, _| Vec::new(),
    request: |_, _, _| {},
    first: |_| None,
};

/// Directories in which a function finds its secrets, a file each: everybody's, Docker's, and its
/// platform's own.
pub fn secret_dirs(platform: Platform) -> impl Iterator<Item = &'static str> {
    let own = (platform == Platform::Openfaas).then_some("/var/openfaas/secrets");
    std::iter::once("/run/secrets").chain(own)
}

fn contract(platform: Platform) -> &'static Contract {
    match platform {
        Platform::Knative => &knative::CONTRACT,
        Platform::Openfaas => &openfaas::CONTRACT,
        Platform::Fc => &fc::CONTRACT,
        Platform::Fission => &fission::CONTRACT,
        Platform::Azure => &azure::CONTRACT,
        Platform::Lambda => &lambda::CONTRACT,
        Platform::None => &PLAIN,
    }
}

/// Where the function listens.
pub fn port(manifest: &Manifest) -> u16 {
    manifest.serving.port.unwrap_or(contract(manifest.platform).port)
}

pub fn ready(manifest: &Manifest) -> Ready<'_> {
    match &manifest.serving.ready {
        Some(path) => Ready::Answers(path),
        None => contract(manifest.platform).ready,
    }
}

/// Whether an answer says that its instance has as many requests as it takes.
pub fn is_full(revision: &Revision, status: u16) -> bool {
    revision.manifest.platform == Platform::Openfaas && status == 429
}

/// The status that an answer comes to, where its platform has another word for failure.
pub fn judged<'a>(revision: &Revision, status: u16, header: impl Fn(&str) -> Option<&'a str>) -> u16 {
    match revision.manifest.platform {
        Platform::Fc => fc::judged(status, header(fc::STATUS)),
        _ => status,
    }
}

/// An instance's own variables, on top of the image's and the manifest's.
pub fn environment(revision: &Revision) -> Vec<(String, String)> {
    let port = port(&revision.manifest);
    let mut env = vec![("PORT".to_owned(), port.to_string())];
    env.extend((contract(revision.manifest.platform).environment)(revision, port));
    // What the manifest says is said on purpose.
    env.retain(|(name, _)| name == "PORT" || !revision.manifest.env.contains_key(name));
    env
}

pub fn request(revision: &Revision, event: &Event, head: &mut Head) {
    (contract(revision.manifest.platform).request)(revision, event, head);
}

/// `None`: the request goes as it is, and so does its answer.
pub fn wrap(revision: &Revision, event: &Event) -> Option<Wrap> {
    match revision.manifest.platform {
        Platform::Azure => azure::wrap(revision, event),
        _ => None,
    }
}

pub fn first(revision: &Revision) -> Option<First> {
    (contract(revision.manifest.platform).first)(revision)
}

/// The parts of an image's configuration that may tell what it was made for.
pub struct Looks<'a> {
    pub entrypoint: &'a [String],
    pub cmd: &'a [String],
    /// `K=V`
    pub env: &'a [String],
    pub labels: &'a BTreeMap<String, String>,
}

impl Looks<'_> {
    fn has_variable(&self, name: &str) -> bool {
        self.env.iter().any(|var| var.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')))
    }

    /// Whether a program of this name is executed, or is an argument (`tini -- fwatchdog`).
    fn runs(&self, program: &str) -> bool {
        let words = self.entrypoint.iter().chain(self.cmd).flat_map(|word| word.split_whitespace());
        let mut names = words.map(|word| word.rsplit('/').next().unwrap_or(word));
        names.any(|name| name == program)
    }
}

/// The platform that an image was made for, where its configuration tells.
pub fn guess(image: &Looks<'_>) -> Platform {
    match () {
        () if openfaas::looks_like(image) => Platform::Openfaas,
        () if lambda::looks_like(image) => Platform::Lambda,
        () if azure::looks_like(image) => Platform::Azure,
        () if knative::looks_like(image) => Platform::Knative,
        () => Platform::None,
    }
}

fn var(name: &str, value: impl Into<String>) -> (String, String) {
    (name.to_owned(), value.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(entrypoint: &[&str], env: &[&str]) -> Platform {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let (entrypoint, env, labels) = (owned(entrypoint), owned(env), BTreeMap::new());
        guess(&Looks { entrypoint: &entrypoint, cmd: &[], env: &env, labels: &labels })
    }

    #[test]
    fn platform_is_guessed_where_the_image_tells() {
        assert_eq!(of(&["fwatchdog"], &[]), Platform::Openfaas);
        assert_eq!(of(&["/sbin/tini", "--", "/usr/bin/fwatchdog"], &[]), Platform::Openfaas);
        assert_eq!(of(&["/app"], &["fprocess=cat"]), Platform::Openfaas);
        assert_eq!(of(&["functions-framework", "--target=hello"], &[]), Platform::Knative);
        assert_eq!(of(&["python3", "main.py"], &["FUNCTION_TARGET=hello"]), Platform::Knative);
        assert_eq!(of(&["/bin/sh", "-c", "exec functions-framework"], &[]), Platform::Knative);
        assert_eq!(of(&["/lambda-entrypoint.sh"], &[]), Platform::Lambda);
        assert_eq!(of(&["python3", "-m", "awslambdaric"], &[]), Platform::Lambda);
        assert_eq!(of(&["/app"], &["FUNCTIONS_CUSTOMHANDLER_PORT=8080"]), Platform::Azure);
        assert_eq!(of(&["/app"], &["PATH=/bin", "XFUNCTION_TARGET=1"]), Platform::None);
    }
}
