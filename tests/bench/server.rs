//! Starting, watching and ending the servers.
//!
//! A [`Server`] is a process with a listening socket. It is killed when it goes out of scope, and
//! what it said is shown when it fails.
//!
//! Not here: what is served (`disks`).

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::memory::process_time;

/// How long a server may take to begin or to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a server that is up is left alone before its memory is measured.
const SETTLE: Duration = Duration::from_millis(20);

/// A running server.
#[derive(Debug)]
pub struct Server {
    /// The process.
    child: Child,
    /// Its socket.
    pub socket: PathBuf,
    /// Where its messages go.
    log: PathBuf,
}

impl Server {
    /// Starts `command`, which listens on `socket`; messages go to a file beside it. Does not wait.
    pub fn spawn(mut command: Command, socket: &Path) -> io::Result<Self> {
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let log = socket.with_extension("log");
        let messages = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(messages.try_clone()?).stderr(messages);
        let child = command.spawn().map_err(|error| {
            let program = command.get_program().to_string_lossy();
            io::Error::other(format!("{program}: {error}"))
        })?;
        Ok(Self { child, socket: socket.to_owned(), log })
    }

    /// Waits for the socket, and a moment longer, so that the server is at rest.
    pub fn settle(&mut self) -> io::Result<()> {
        let begin = Instant::now();
        while !self.socket.exists() {
            if self.child.try_wait()?.is_some() || begin.elapsed() > PATIENCE {
                return Err(self.failure("does not listen"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(SETTLE);
        Ok(())
    }

    /// Process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Processor time used so far in nanoseconds.
    pub fn time(&self) -> io::Result<u64> {
        process_time(self.pid())
    }

    /// The process's share of the memory that it has mapped (PSS) in KiB.
    pub fn pss_kib(&self) -> io::Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let number = line.and_then(|rest| rest.split_whitespace().next());
        number.and_then(|n| n.parse().ok()).ok_or_else(|| io::Error::other("no Pss in smaps"))
    }

    /// Ends the server as an operator would.
    pub fn stop(mut self) -> io::Result<()> {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other("an odd process number"))?;
        kill_process(pid, Signal::TERM)?;
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(self.failure(&format!("ended with {status}"))),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        Err(self.failure("does not end"))
    }

    /// An error with what the server said.
    pub fn failure(&self, what: &str) -> io::Error {
        let said = std::fs::read_to_string(&self.log).unwrap_or_default();
        io::Error::other(format!("the server {what}; it said: {}", said.trim_end()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail when it has ended already, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
