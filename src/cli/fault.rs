//! From an error to an exit code and to what is said about it.

use super::client::{BadAddress, ClientError};
use super::output::{OutputError, tell};
use super::text::escape;
use crate::errors;
use crate::model::api::Problem;

/// What an error means for the exit code. As an error of its own it ends a command whose reason
/// is said elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("failed")]
    Failed,
    #[error("usage")]
    Usage,
    #[error("the daemon can't be reached")]
    Unreachable,
    #[error("not found")]
    NotFound,
    /// Failed, and everything was already said on stderr.
    #[error("failed, as told")]
    Told,
    /// Not found, and said already.
    #[error("not found, as told")]
    NotFoundTold,
    /// Whoever read stdout has seen enough.
    #[error("nobody reads any more")]
    Quiet,
}

impl Fault {
    pub fn of(error: &anyhow::Error) -> Self {
        if let Some(fault) = error.downcast_ref::<Self>() {
            return *fault;
        }
        if let Some(OutputError::Closed) = error.downcast_ref::<OutputError>() {
            return Self::Quiet;
        }
        if error.downcast_ref::<BadAddress>().is_some_and(BadAddress::usage) {
            return Self::Usage;
        }
        match error.downcast_ref::<ClientError>() {
            Some(ClientError::Unreachable { .. }) => Self::Unreachable,
            Some(ClientError::Refused(problem)) if problem.status == 404 => Self::NotFound,
            _ => Self::Failed,
        }
    }

    /// `neap --help` lists them.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Quiet => 0,
            Self::Failed | Self::Told => 1,
            Self::Usage => 2,
            Self::Unreachable => 3,
            Self::NotFound | Self::NotFoundTold => 4,
        }
    }
}

/// One line on stderr, and one for each of a problem's mistakes.
pub fn report(error: &anyhow::Error) {
    if matches!(Fault::of(error), Fault::Told | Fault::NotFoundTold | Fault::Quiet) {
        return;
    }
    for line in lines(error) {
        tell(&line);
    }
}

fn lines(error: &anyhow::Error) -> Vec<String> {
    let mut lines = vec![format!("neap: {}", escape(&errors::chain(error.as_ref())))];
    if let Some(ClientError::Refused(Problem { errors, .. })) = error.downcast_ref() {
        lines.extend(errors.iter().map(|line| format!("  {}", escape(line))));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    fn refused(status: u16, errors: &[&str]) -> anyhow::Error {
        let errors = errors.iter().map(|&line| line.to_owned()).collect();
        let problem = Problem { title: "manifest refused".into(), status, detail: None, errors };
        Err::<(), _>(ClientError::Refused(problem)).context("deploy a.toml").expect_err("an error")
    }

    #[test]
    fn exit_code_is_found_behind_what_was_being_done() {
        let unreachable = ClientError::Unreachable { place: "/x".into(), hint: "why".into() };
        let code = |error: anyhow::Error| Fault::of(&error).exit_code();

        assert_eq!(code(refused(400, &[])), 1);
        assert_eq!(code(refused(404, &[])), 4);
        assert_eq!(code(anyhow::Error::from(unreachable).context("list functions")), 3);
        assert_eq!(code(anyhow::Error::from(BadAddress::WithoutUrl)), 2);
        assert_eq!(code(anyhow::Error::from(OutputError::Closed).context("x")), 0);
        assert_eq!(code(Fault::NotFound.into()), 4);
        assert_eq!(code(anyhow::anyhow!("anything else")), 1);
    }

    #[test]
    fn every_mistake_of_a_problem_has_its_line() {
        assert_eq!(
            lines(&refused(400, &["a.toml:1: unknown key", "a.toml:2: bad \x1bunit"])),
            ["neap: deploy a.toml: manifest refused", "  a.toml:1: unknown key", "  a.toml:2: bad \\x1bunit"]
        );
    }
}
