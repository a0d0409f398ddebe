//! `addcow man`: the man pages of both programs as files.
//!
//! Not here: what is on them (`cli::manual`).

use std::fs;
use std::io;
use std::path::PathBuf;

use clap::Args;

use crate::cli::output::print;
use crate::cli::{Outcome, daemon, manual};

/// The command line of `addcow man`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The folder to make them in, as man1/addcow.1 and so on; `man -M DIR addcow` shows them
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// A page could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write '{}'", path.display())]
struct PageError {
    /// Its file.
    path: PathBuf,
    /// What the host said.
    source: io::Error,
}

/// Writes the pages and prints their names. Pages that are there are replaced.
pub fn run(arguments: &Arguments) -> Outcome {
    let mut paths = Vec::new();
    for page in manual::pages(super::command(), daemon::command())? {
        let folder = arguments.folder.join(format!("man{}", page.section));
        let path = folder.join(format!("{}.{}", page.name, page.section));
        fs::create_dir_all(&folder)
            .and_then(|()| fs::write(&path, page.text))
            .map_err(|source| PageError { path: path.clone(), source })?;
        paths.push(path);
    }
    print(|out| {
        for path in &paths {
            writeln!(out, "{}", path.display())?;
        }
        Ok(())
    })?;
    Ok(0)
}
