//! The QEMU tools that tests hold our files against: those of this machine, and version 10 where
//! `scripts/test` has unpacked it.
//!
//! Promises: every command ends within [`TIMEOUT_S`] seconds; where no tool is found a test is
//! skipped with a line that is seen, and fails instead if `ADDCOW_NEED_QEMU` is set.
//!
//! Part of each test file that names it, so that those need nothing else of this folder.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::io::{Write as _, stderr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// How long a command may take, in seconds: none needs more than a few.
const TIMEOUT_S: &str = "60";

/// One version of the tools.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// Where the tools are; empty: in PATH.
    folder: PathBuf,
    /// Where their libraries are, if not where the machine's are.
    libraries: Option<String>,
}

impl Qemu {
    /// The machine's own version.
    fn system() -> Self {
        Self { folder: PathBuf::new(), libraries: None }
    }

    /// The version that scripts/lib/qemu10.sh unpacks, wherever that is.
    fn unpacked() -> Option<Self> {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
        let cache = std::env::var_os("ADDCOW_CACHE_DIR").map_or(target, PathBuf::from);
        let root = cache.join("qemu-10/root");
        let lib = |folder: &str| root.join(folder).display().to_string();
        let libraries = [lib("usr/lib/x86_64-linux-gnu"), lib("lib/x86_64-linux-gnu")].join(":");
        let found =
            cache.join("qemu-10/complete").exists() && root.join("usr/bin/qemu-io").exists();
        found.then(|| Self { folder: root.join("usr/bin"), libraries: Some(libraries) })
    }

    /// All versions there are, the newest first, for a test that will go through all of them.
    pub fn all(test: &str) -> Vec<Self> {
        let system = Some(Self::system()).filter(Self::works);
        let found: Vec<Self> = Self::unpacked().into_iter().chain(system).collect();
        if found.is_empty() {
            assert!(std::env::var_os("ADDCOW_NEED_QEMU").is_none(), "{test}: no qemu-img");
            // Not eprintln, which the harness captures.
            stderr().write_all(format!("SKIPPED {test}: no qemu-img\n").as_bytes()).unwrap();
        }
        found
    }

    /// Whether both tools can be run.
    fn works(&self) -> bool {
        ["qemu-img", "qemu-io"].into_iter().all(|tool| {
            self.command(tool, Path::new("."))
                .arg("--version")
                .output()
                .is_ok_and(|o| o.status.success())
        })
    }

    /// A tool, to be run in `folder`.
    pub fn command(&self, tool: &str, folder: &Path) -> Command {
        let mut command = Command::new("timeout");
        command.args(["-k", "5", TIMEOUT_S]).arg(self.folder.join(tool));
        if let Some(libraries) = &self.libraries {
            // For the tool, not for timeout: those libraries need not suit the machine's programs.
            command = Command::new("timeout");
            command.args(["-k", "5", TIMEOUT_S, "env"]);
            command.arg(format!("LD_LIBRARY_PATH={libraries}")).arg(self.folder.join(tool));
        }
        command.current_dir(folder).stdin(Stdio::null()).env("LC_ALL", "C");
        command
    }

    /// Runs a tool with arguments that have no blanks in them, and returns what it printed.
    pub fn run(&self, folder: &Path, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let tool = words.next().expect("a tool");
        self.command(tool, folder).args(words).output().expect("timeout is there")
    }

    /// The same for a tool that must succeed; returns its standard output.
    pub fn ok(&self, folder: &Path, line: &str) -> String {
        let output = self.run(folder, line);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{line}: {}\n{out}{err}", output.status);
        out
    }

    /// Runs commands of qemu-io on a disk; all must succeed.
    pub fn io(&self, folder: &Path, options: &str, disk: &str, commands: &[String]) {
        let mut io = self.command("qemu-io", folder);
        io.args(options.split_whitespace());
        for command in commands {
            io.args(["-c", command]);
        }
        let output = io.arg(disk).output().expect("timeout is there");
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        // Its status says nothing about failed commands.
        let failed = ["failed", "rror", "invalid", "usage:"].iter().any(|word| text.contains(word));
        assert!(output.status.success() && !failed, "{commands:?}\n{text}");
    }
}
