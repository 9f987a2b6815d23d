//! The command line.

/// The process's whole life.
pub fn main() -> std::process::ExitCode {
    todo!()
}
