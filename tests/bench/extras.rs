//! What a disk costs besides requests: starting, memory, and being there.
//!
//! The disks are sparse and large; they are never written.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::disks::Disks;
use super::drive::Times;
use super::lane::{Connection, Lane, Op};
use super::memory::Memory;
use super::record::Spread;
use super::server::Server;
use super::targets::{Served, Target};
use super::workload::{Backing, Workload};

/// How often a start is repeated.
const STARTS: usize = 5;

/// How long a server is watched doing nothing.
const REST: Duration = Duration::from_secs(2);

/// Daemons in the fleet.
const FLEET: usize = 200;

/// How long the first request may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// From starting the server to its first completed request.
#[derive(Debug, Clone, Serialize)]
pub struct StartUp {
    /// Name of the target.
    pub target: String,
    /// Size of the disk in GiB.
    pub size_gib: u64,
    /// Length of the main file in KiB: header and bitmap of an add-cow disk.
    pub metadata_kib: u64,
    /// Milliseconds: smallest, median, largest of the starts.
    pub ms: [f64; 3],
    /// PSS in KiB after that first request, when the client has gone.
    pub pss_kib: u64,
}

/// A server with nothing to do.
#[derive(Debug, Clone, Serialize)]
pub struct Rest {
    /// Name of the target.
    pub target: String,
    /// Processor time in microseconds in the watched seconds, nobody connected.
    pub alone_us: f64,
    /// The same with a client connected that has sent requests before.
    pub connected_us: f64,
    /// PSS in KiB before anybody connected.
    pub pss_kib: u64,
}

/// Many daemons over one base.
#[derive(Debug, Clone, Serialize)]
pub struct Fleet {
    /// How many.
    pub daemons: usize,
    /// Sum of their PSS in KiB, nobody connected.
    pub pss_kib: u64,
    /// Seconds until the last one listened.
    pub seconds: f64,
}

/// The overlay `file` over `base`, to be served at `socket` with one queue.
fn overlay<'a>(file: &'a Path, base: &'a Path, socket: &'a Path) -> Served<'a> {
    Served { file, base, read_only: false, backing: Backing::Default, socket, queues: 1 }
}

/// Starts servers on a sparse overlay of `gib` GiB.
pub fn start_up(disks: &Disks, target: &Target, gib: u64) -> io::Result<StartUp> {
    let folder = disks.subfolder("start-up")?;
    let base = folder.path().join("base.img");
    File::create(&base)?.set_len(gib << 30)?;
    target.create(disks.programs(), folder.path(), "large")?;
    let file = folder.path().join(target.files("large").swap_remove(0));
    let socket = disks.socket();
    let mut times = Vec::new();
    let mut pss_kib = 0;
    for _ in 0..STARTS {
        let memories = [Memory::new(4096)?];
        let command = target.command(disks.programs(), &overlay(&file, &base, &socket))?;
        let begin = Instant::now();
        let server = Server::spawn(command, &socket)?;
        let mut connection = Connection::open(&socket, &memories, 4096)
            .map_err(|error| server.failure(&error.to_string()))?;
        read_first_block(&mut connection.lanes[0])?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
        drop(connection);
        std::thread::sleep(Duration::from_millis(20));
        pss_kib = server.pss_kib()?;
        server.stop()?;
    }
    let spread = Spread::of(times).ok_or_else(|| io::Error::other("no start was measured"))?;
    Ok(StartUp {
        target: target.name.into(),
        size_gib: gib,
        metadata_kib: file.metadata()?.len() / 1024,
        ms: [spread.min, spread.median, spread.max],
        pss_kib,
    })
}

/// Sends one read and waits for it.
fn read_first_block(lane: &mut impl Lane) -> io::Result<()> {
    lane.begin()?;
    lane.push(Op::Read(0), 0)?;
    lane.submit()?;
    let begin = Instant::now();
    let mut done = Vec::new();
    while done.is_empty() && begin.elapsed() < PATIENCE {
        lane.reap(&mut done)?;
        std::hint::spin_loop();
    }
    match done[..] {
        [(0, 0)] => Ok(()),
        _ => Err(io::Error::other(format!("the first request: {done:?}"))),
    }
}

/// Watches a server of `target`, which has overlays, doing nothing.
pub fn rest(disks: &mut Disks, target: &Target) -> io::Result<Rest> {
    let workload = Workload::all().into_iter().find(|w| w.name == "backing-read");
    let workload = workload.ok_or_else(|| io::Error::other("no workload backing-read"))?;
    // Makes the disk if it is not there yet.
    let moment = Duration::from_millis(20);
    disks.run(target, &workload, Times { warm_up: moment, measured: moment })?;
    let (file, base) = (disks.path(&target.files("untouched")[0]), disks.path("base.img"));
    let socket = disks.socket();
    let command = target.command(disks.programs(), &overlay(&file, &base, &socket))?;
    let mut server = Server::spawn(command, &socket)?;
    server.settle()?;
    let pss_kib = server.pss_kib()?;
    let watch = || -> io::Result<f64> {
        let begin = server.time()?;
        std::thread::sleep(REST);
        Ok((server.time()? - begin) as f64 / 1e3)
    };
    let alone_us = watch()?;
    let memories = [Memory::new(4096)?];
    let mut connection = Connection::open(&socket, &memories, 4096)?;
    for _ in 0..100 {
        read_first_block(&mut connection.lanes[0])?;
    }
    // Whatever polling follows the last request may end.
    std::thread::sleep(Duration::from_millis(100));
    let connected_us = watch()?;
    drop(connection);
    server.stop()?;
    Ok(Rest { target: target.name.into(), alone_us, connected_us, pss_kib })
}

/// Starts many daemons on overlays over one base.
pub fn fleet(disks: &Disks, target: &Target) -> io::Result<Fleet> {
    let folder = disks.subfolder("fleet")?;
    let base = folder.path().join("base.img");
    File::create(&base)?.set_len(disks.size)?;
    let mut servers = Vec::new();
    let mut names = Vec::new();
    for number in 0..FLEET {
        let stem = format!("disk{number}");
        target.create(disks.programs(), folder.path(), &stem)?;
        names.push(folder.path().join(target.files(&stem).swap_remove(0)));
    }
    let begin = Instant::now();
    for (number, file) in names.iter().enumerate() {
        let socket = disks.socket().with_extension(number.to_string());
        let command = target.command(disks.programs(), &overlay(file, &base, &socket))?;
        servers.push(Server::spawn(command, &socket)?);
    }
    for server in &mut servers {
        server.settle()?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    let pss_kib = servers.iter().map(Server::pss_kib).sum::<io::Result<u64>>()?;
    servers.into_iter().try_for_each(Server::stop)?;
    Ok(Fleet { daemons: FLEET, pss_kib, seconds })
}
