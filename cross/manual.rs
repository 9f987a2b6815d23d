//! Writes what packages carry of the command line besides the binary: a man page for each
//! command, and completions for bash, zsh and fish. Both come from the definitions that parse it,
//! so they can't differ from it; an example, so that the binary carries none of this.
//!
//!     cargo run --example manual -- DIRECTORY

use clap_complete::Shell;
use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let Some(to) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: manual DIRECTORY");
        std::process::exit(2);
    };
    let man = to.join("man");
    std::fs::create_dir_all(&man)?;
    // Pages of the whole tree: neap.1, neap-image-import.1, …
    clap_mangen::generate_to(neap::cli::command(), &man)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let of_shell = to.join(shell.to_string());
        std::fs::create_dir_all(&of_shell)?;
        clap_complete::generate_to(shell, &mut neap::cli::command(), "neap", of_shell)?;
    }
    Ok(())
}
