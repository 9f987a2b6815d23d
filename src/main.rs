//! One binary: the daemon and the command line, and the two children that the daemon starts
//! from its own image, `launcher` and `image-worker`.

use std::process::ExitCode;

/// The allocator of the static builds' C library keeps what each thread frees for that thread, for
/// ever: events go from one thread to another, and the daemon would grow with each.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    // The children come first: the launcher must reach its loop with a single thread and
    // without having parsed anything it does not need.
    match std::env::args_os().nth(1).as_deref().and_then(|arg| arg.to_str()) {
        Some("launcher") => neap::runtime::launcher::main(),
        Some("image-worker") => neap::worker::main(),
        _ => neap::cli::main(),
    }
}
