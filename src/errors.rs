//! An error chain as one line, joined where it is shown and nowhere else: the command line's
//! stderr, the daemon's last words, the `error` field of a log record.
//!
//! neap's own errors never repeat their cause; some of other crates do (`hyper`, `toml`), so a
//! cause that the text before it already ends with is left out.

use std::error::Error;

/// Deeper chains are cut: a chain that names itself as its cause must not hang the last message.
const DEPTH_MAX: usize = 32;

/// `deploy thermostat.toml: read it: No such file or directory (os error 2)`. Always one line:
/// line breaks inside become `; `.
pub fn chain(error: &dyn Error) -> String {
    let mut line = one_line(&error.to_string());
    let mut cause = error.source();
    for _ in 0..DEPTH_MAX {
        let Some(error) = cause else { break };
        let text = one_line(&error.to_string());
        if !text.is_empty() && !line.ends_with(&text) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Link {
        text: &'static str,
        #[source]
        source: Option<Box<dyn Error>>,
    }

    fn link(text: &'static str, source: Option<Link>) -> Link {
        Link { text, source: source.map(|s| Box::new(s) as Box<dyn Error>) }
    }

    #[test]
    fn causes_are_joined_from_the_outermost_to_the_root() {
        let error = link("deploy a.toml", Some(link("read it", Some(link("no such file", None)))));

        assert_eq!(chain(&error), "deploy a.toml: read it: no such file");
        assert_eq!(chain(&link("alone", None)), "alone");
    }

    #[test]
    fn cause_that_is_already_told_is_not_repeated() {
        let error = link("connect: refused", Some(link("refused", None)));

        assert_eq!(chain(&error), "connect: refused");
    }

    #[test]
    fn result_is_one_line_and_empty_links_leave_no_mark() {
        let error = link("parse\n  line 3\n", Some(link("", Some(link("a\r\nb", None)))));

        assert_eq!(chain(&error), "parse; line 3: a; b");
    }

    #[test]
    fn endless_chain_ends() {
        #[derive(Debug)]
        struct Own;
        impl std::fmt::Display for Own {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("own cause")
            }
        }
        impl Error for Own {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(self)
            }
        }

        assert_eq!(chain(&Own), "own cause");
    }
}
