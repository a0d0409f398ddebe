//! The files of one folder, and sessions on them.
//!
//! The base is written once. Every overlay target gets one disk that is fully allocated (written
//! through the target itself) and one that is untouched, made when they are first wanted; fresh
//! disks are made for one run. The raw targets share one file.
//!
//! Everything lies in a folder of its own, which is removed at the end.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Advice, Mode, OFlags, fadvise, fsync, open};
use tempfile::TempDir;

use super::content::write_base;
use super::drive::{Run, Seen, Times};
use super::lane::{Connection, UringLane};
use super::memory::{Memory, process_time};
use super::server::Server;
use super::targets::{ALL, Kind, Programs, Served, Target};
use super::workload::{Backing, State, Workload};

/// The disks of one folder.
#[derive(Debug)]
pub struct Disks {
    /// The folder.
    folder: TempDir,
    /// A short folder for sockets, whose paths may have 107 bytes only.
    sockets: TempDir,
    /// The programs.
    programs: Programs,
    /// Size of every disk in bytes.
    pub size: u64,
    /// The processors of the servers, when client and servers are kept apart.
    pin: Option<Pinning>,
    /// Disks that have been made, by the name of the main file.
    made: HashSet<String>,
    /// The number of the last run.
    generation: u64,
}

/// Which processors belong to whom.
#[derive(Debug, Clone, Copy)]
pub struct Pinning {
    /// The client's.
    pub client: rustix::thread::CpuSet,
    /// The servers'.
    pub servers: rustix::thread::CpuSet,
}

impl Pinning {
    /// The first half of the processors, rounded up, for the client; the rest for the servers.
    pub fn of_this_machine() -> io::Result<Self> {
        let all = rustix::thread::sched_getaffinity(None)?;
        let count = all.count();
        if count < 2 {
            return Err(io::Error::other("--pin needs two processors"));
        }
        let (mut client, mut servers) =
            (rustix::thread::CpuSet::new(), rustix::thread::CpuSet::new());
        let ours = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu));
        for (number, cpu) in (0u32..).zip(ours) {
            let set = if number < count.div_ceil(2) { &mut client } else { &mut servers };
            set.set(cpu);
        }
        Ok(Self { client, servers })
    }
}

/// One run's figures.
#[derive(Debug)]
pub struct Figures {
    /// What each thread saw.
    pub seen: Vec<Seen>,
    /// The server's PSS before anybody connected and after they had gone, in KiB.
    pub pss_kib: Option<(u64, u64)>,
    /// Processor time of the server over the measured time, in nanoseconds; the limit's is that
    /// of the client.
    pub server_ns: u64,
    /// Processor time of the client over the whole run, checks included, in nanoseconds.
    pub client_ns: u64,
}

impl Disks {
    /// Makes a folder below `parent` with a base of `size` bytes.
    pub fn new(parent: &Path, programs: Programs, size: u64) -> io::Result<Self> {
        std::fs::create_dir_all(parent)?;
        let folder = tempfile::Builder::new().prefix("addcow-bench-").tempdir_in(parent)?;
        let sockets = tempfile::Builder::new().prefix("addcow-bench-").tempdir()?;
        let made = HashSet::new();
        let disks = Self { folder, sockets, programs, size, pin: None, made, generation: 0 };
        disks.write_raw("base.img")?;
        Ok(disks)
    }

    /// The path of file `name`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The socket that servers listen on.
    pub fn socket(&self) -> PathBuf {
        self.sockets.path().join("s")
    }

    /// Keeps this thread, and what it starts, apart from the servers.
    pub fn pin(&mut self, pinning: Pinning) -> io::Result<()> {
        self.pin = Some(pinning);
        self.set_processors(|pinning| &pinning.client)
    }

    /// A new folder beside the disks, removed when it goes out of scope.
    pub fn subfolder(&self, name: &str) -> io::Result<TempDir> {
        tempfile::Builder::new().prefix(name).tempdir_in(self.folder.path())
    }

    /// The programs.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// A file with the base's content, on the disk and not in the page cache.
    fn write_raw(&self, name: &str) -> io::Result<()> {
        let file = File::create(self.path(name))?;
        write_base(&file, self.size)?;
        fsync(&file)?;
        Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
    }

    /// Measures `workload` on `target`.
    pub fn run(
        &mut self,
        target: &Target,
        workload: &Workload,
        times: Times,
    ) -> io::Result<Figures> {
        let file = self.prepare(target, workload.state)?;
        if workload.backing == Backing::Hot {
            // All of the base into the page cache.
            io::copy(&mut File::open(self.path("base.img"))?, &mut io::sink())?;
        } else if workload.state == State::Untouched {
            fadvise(&File::open(self.path("base.img"))?, 0, None, Advice::DontNeed)?;
        }
        let figures = self.measure(target, workload, times, &self.path(&file));
        if workload.state == State::Fresh {
            self.remove(target, "fresh")?;
        }
        self.generation += 1;
        figures
    }

    /// Makes the disk that `state` asks for; returns the name of its main file.
    pub fn prepare(&mut self, target: &Target, state: State) -> io::Result<String> {
        let stem = match state {
            State::Untouched if !target.is_overlay() => return Ok("base.img".into()),
            State::Allocated if !target.is_overlay() => {
                self.make_raw()?;
                return Ok("disk.raw".into());
            }
            State::Fresh => {
                self.remove(target, "fresh")?;
                "fresh"
            }
            State::Allocated => "allocated",
            State::Untouched => "untouched",
        };
        let main = target.files(stem).swap_remove(0);
        if state != State::Fresh && !self.made.insert(main.clone()) {
            return Ok(main);
        }
        if target.is_overlay() {
            target.create(&self.programs, self.folder.path(), stem)?;
        } else {
            File::create(self.path(&main))?.set_len(self.size)?;
        }
        if state == State::Allocated {
            self.fill(target, &self.path(&main))?;
        }
        Ok(main)
    }

    /// Makes the file that the raw targets share, in the way in which overlays are filled: other
    /// ways of writing leave another layout on a disk.
    fn make_raw(&mut self) -> io::Result<()> {
        if !self.made.insert("disk.raw".into()) {
            return Ok(());
        }
        let path = self.path("disk.raw");
        File::create(&path)?.set_len(self.size)?;
        self.fill(&ALL[0], &path)
    }

    /// Writes all of a new disk.
    fn fill(&mut self, target: &Target, file: &Path) -> io::Result<()> {
        let hour = Duration::from_secs(3600);
        let times = Times { warm_up: Duration::ZERO, measured: hour };
        self.measure(target, &Workload::fill(), times, file)?;
        self.generation += 1;
        Ok(())
    }

    /// Removes the files of a disk, if they exist.
    fn remove(&self, target: &Target, stem: &str) -> io::Result<()> {
        for name in target.files(stem) {
            match std::fs::remove_file(self.path(&name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Serves `file` and sends the workload's requests.
    fn measure(
        &self,
        target: &Target,
        workload: &Workload,
        times: Times,
        file: &Path,
    ) -> io::Result<Figures> {
        let len = workload.block * workload.depth;
        let memories: Vec<Memory> =
            (0..workload.queues).map(|_| Memory::new(len)).collect::<io::Result<_>>()?;
        let result = if target.kind == Kind::Limit {
            self.measure_limit(workload, times, file, &memories)
        } else {
            self.measure_server(target, workload, times, file, &memories)
        };
        let context =
            |error| io::Error::other(format!("{} {}: {error}", target.name, workload.name));
        result.map_err(context)
    }

    /// io_uring on the file itself.
    fn measure_limit(
        &self,
        workload: &Workload,
        times: Times,
        file: &Path,
        memories: &[Memory],
    ) -> io::Result<Figures> {
        let mut flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        if workload.backing != Backing::Hot {
            flags |= OFlags::DIRECT;
        }
        let file = File::from(open(file, flags, Mode::empty())?);
        let block = workload.block;
        let mut lanes: Vec<UringLane<'_>> = memories
            .iter()
            .map(|memory| UringLane::new(&file, memory, block))
            .collect::<io::Result<_>>()?;
        let client = || process_time(std::process::id());
        let run = self.run_of(workload, times, &client);
        let begin = client()?;
        let seen = run.go(&mut lanes, memories, self.plans(workload))?;
        let client_ns = client()? - begin;
        Ok(Figures { server_ns: seen[0].probed, seen, pss_kib: None, client_ns })
    }

    /// A server on the file.
    fn measure_server(
        &self,
        target: &Target,
        workload: &Workload,
        times: Times,
        file: &Path,
        memories: &[Memory],
    ) -> io::Result<Figures> {
        let mut server = self.serve(target, workload, file)?;
        server.settle()?;
        let idle = server.pss_kib()?;
        let mut connection = Connection::open(&server.socket, memories, workload.block)
            .map_err(|error| server.failure(&error.to_string()))?;
        let probe = || server.time();
        let run = self.run_of(workload, times, &probe);
        let begin = process_time(std::process::id())?;
        let seen = run.go(&mut connection.lanes, memories, self.plans(workload))?;
        let client_ns = process_time(std::process::id())? - begin;
        drop(connection);
        // The memory of the client is unmapped when the server has noticed.
        std::thread::sleep(Duration::from_millis(20));
        let after = server.pss_kib()?;
        server.stop()?;
        Ok(Figures { server_ns: seen[0].probed, seen, pss_kib: Some((idle, after)), client_ns })
    }

    /// Starts the server of `target` on `file`.
    fn serve(&self, target: &Target, workload: &Workload, file: &Path) -> io::Result<Server> {
        let socket = self.socket();
        let base = self.path("base.img");
        let served = Served {
            file,
            base: &base,
            read_only: workload.state == State::Untouched && !target.is_overlay(),
            backing: workload.backing,
            socket: &socket,
            queues: workload.queues,
        };
        let command = target.command(&self.programs, &served)?;
        // A process inherits the processors of the thread that starts it.
        self.set_processors(|pinning| &pinning.servers)?;
        let server = Server::spawn(command, &socket);
        self.set_processors(|pinning| &pinning.client)?;
        server
    }

    /// Restricts this thread, and what it starts, to some processors, if that is wanted.
    fn set_processors(
        &self,
        choose: impl Fn(&Pinning) -> &rustix::thread::CpuSet,
    ) -> io::Result<()> {
        match &self.pin {
            Some(pinning) => Ok(rustix::thread::sched_setaffinity(None, choose(pinning))?),
            None => Ok(()),
        }
    }

    /// The parameters of a run.
    fn run_of<'a>(
        &self,
        workload: &'a Workload,
        times: Times,
        probe: &'a (dyn Fn() -> io::Result<u64> + Sync),
    ) -> Run<'a> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let crowded = processors < 2 * workload.queues;
        Run { workload, times, generation: self.generation + 1, probe, crowded }
    }

    /// The requests of each queue. They are the same for all targets of a round only where the
    /// order is fixed; elsewhere the seed differs from run to run.
    fn plans(&self, workload: &Workload) -> Vec<super::workload::Plan> {
        let seeds = (0u64..).map(|queue| self.generation << 8 | queue);
        seeds.take(workload.queues).map(|seed| workload.plan(self.size, seed)).collect()
    }
}
