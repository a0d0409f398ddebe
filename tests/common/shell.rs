//! Shell commands that find the freshly built `addcow` and `addcowd`.
//!
//! Promises: words that do not depend on the machine's language or time zone, and an end: a command
//! that takes too long is killed with all its children.
//!
//! Part of each test file that names it, so that those need nothing else of this folder.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::fs::{self, File};
use std::io::{Write, stderr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a command may take: none needs more than a few seconds.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The folder of the golden files.
pub fn golden_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tool")
}

/// A command that finds our programs and no environment that would change their words.
pub fn command(program: &str, folder: &Path) -> Command {
    let addcow = Path::new(env!("CARGO_BIN_EXE_addcow")).parent().unwrap();
    let path = format!("{}:{}", addcow.display(), std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(program);
    command.env("PATH", path).env("LC_ALL", "C").env("TZ", "UTC").env_remove("RUST_BACKTRACE");
    command.env_remove("COLUMNS");
    command.current_dir(folder).stdin(Stdio::null()).process_group(0);
    command
}

/// Waits for a child and ends it, with all its children, when it takes too long.
pub fn wait(mut child: Child) -> String {
    let start = Instant::now();
    loop {
        match child.try_wait().unwrap() {
            Some(status) => return status.to_string(),
            None if start.elapsed() < TIMEOUT => std::thread::sleep(Duration::from_millis(5)),
            None => {
                let group = rustix::process::Pid::from_child(&child);
                rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
                child.wait().unwrap();
                return format!("hung for {TIMEOUT:?} and was killed");
            }
        }
    }
}

/// Runs a script in `folder` after `tests/tool/prelude.sh`. Returns what it printed, errors where
/// they came, and how it ended. `output` is a file for that, outside `folder`.
pub fn run_script(script: &str, folder: &Path, output: &Path) -> (String, String) {
    let file = File::create(output).unwrap();
    let prelude = golden_folder().join("prelude.sh");
    let script = format!(". {}; {script}", prelude.display());
    let child = command("sh", folder)
        .args(["-eu", "-c", &script])
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap();
    let status = wait(child);
    (String::from_utf8_lossy(&fs::read(output).unwrap()).into_owned(), status)
}

/// Whether a program is there. If not, says which test is skipped, past the capture of the test
/// harness, so that it is seen.
pub fn have(program: &str, test: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        // Not eprintln, which the harness captures.
        stderr().write_all(format!("SKIPPED {test}: no {program}\n").as_bytes()).unwrap();
    }
    found
}
