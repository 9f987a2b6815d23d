//! (to be written)

/// The child's whole life.
pub fn main() -> std::process::ExitCode {
    todo!()
}
