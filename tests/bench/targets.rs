//! What is measured: the limit, our daemon, and qemu-storage-daemon with its formats.
//!
//! A [`Target`] knows how its disks are made and how they are served. All overlays lie over one
//! `base.img`.
//!
//! Not here: when disks are made anew (`disks`).

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::workload::Backing;

/// What stands between the client and the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: io_uring in the client.
    Limit,
    /// Our daemon on a plain raw image.
    Raw,
    /// Our daemon on an add-cow disk with this cluster size; empty: the image tool's default.
    AddCow(&'static str),
    /// qemu-storage-daemon on a plain raw image.
    QemuRaw,
    /// qemu-storage-daemon on an overlay: the format and its options at creation.
    Qemu(&'static str, &'static str),
}

/// A column of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Name of the column.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
}

/// All targets; the first one is what the others are compared with.
pub const ALL: [Target; 9] = [
    Target { name: "limit", kind: Kind::Limit },
    Target { name: "addcow-raw", kind: Kind::Raw },
    Target { name: "addcow-4k", kind: Kind::AddCow("4K") },
    Target { name: "addcow-64k", kind: Kind::AddCow("64K") },
    Target { name: "qsd-raw", kind: Kind::QemuRaw },
    Target { name: "qsd-qcow2", kind: Kind::Qemu("qcow2", "cluster_size=64k") },
    Target {
        name: "qsd-qcow2-sub4k",
        kind: Kind::Qemu("qcow2", "extended_l2=on,cluster_size=128k"),
    },
    Target { name: "qsd-datafile", kind: Kind::Qemu("qcow2", "cluster_size=64k,data_file=") },
    Target { name: "qsd-qed", kind: Kind::Qemu("qed", "") },
];

/// An add-cow disk as the image tool makes it when nothing is said about clusters.
pub const DEFAULT: Target = Target { name: "addcow-default", kind: Kind::AddCow("") };

/// The programs that make and serve disks.
#[derive(Debug, Clone)]
pub struct Programs {
    /// Our daemon.
    pub addcowd: PathBuf,
    /// More arguments for our daemon.
    pub addcowd_args: Vec<OsString>,
    /// Our image tool.
    pub addcow: PathBuf,
    /// qemu-storage-daemon.
    pub qsd: PathBuf,
    /// qemu-img.
    pub qemu_img: PathBuf,
}

/// A disk that is to be served.
#[derive(Debug, Clone)]
pub struct Served<'a> {
    /// Its main file.
    pub file: &'a Path,
    /// The base of overlays.
    pub base: &'a Path,
    /// Whether only reading is wanted, of a file that others use too.
    pub read_only: bool,
    /// Cache of the backing file.
    pub backing: Backing,
    /// Where to listen.
    pub socket: &'a Path,
    /// Queues.
    pub queues: usize,
}

impl Target {
    /// Whether disks have a base that shows through.
    pub fn is_overlay(&self) -> bool {
        matches!(self.kind, Kind::AddCow(_) | Kind::Qemu(..))
    }

    /// Whether it needs qemu-storage-daemon.
    pub fn needs_qemu(&self) -> bool {
        matches!(self.kind, Kind::QemuRaw | Kind::Qemu(..))
    }

    /// Names of the files that a disk called `stem` consists of, the main one first.
    pub fn files(&self, stem: &str) -> Vec<String> {
        let stem = format!("{stem}-{}", self.name);
        match self.kind {
            Kind::Limit | Kind::Raw | Kind::QemuRaw => vec![format!("{stem}.raw")],
            Kind::AddCow(_) => vec![format!("{stem}.add-cow"), format!("{stem}.raw")],
            Kind::Qemu(format, options) if options.ends_with("data_file=") => {
                vec![format!("{stem}.{format}"), format!("{stem}.raw")]
            }
            Kind::Qemu(format, _) => vec![format!("{stem}.{format}")],
        }
    }

    /// Makes an overlay over `base.img` in `folder`, of the base's size.
    pub fn create(&self, programs: &Programs, folder: &Path, stem: &str) -> io::Result<()> {
        let files = self.files(stem);
        let mut command = match self.kind {
            Kind::AddCow(cluster) => {
                let mut command = Command::new(&programs.addcow);
                command.args(["create", "-q", "-b", "base.img", "-F", "raw"]);
                if !cluster.is_empty() {
                    command.args(["--cluster-size", cluster]);
                }
                command.arg(&files[0]);
                command
            }
            Kind::Qemu(format, options) => {
                let mut command = Command::new(&programs.qemu_img);
                command.args(["create", "-q", "-f", format, "-b", "base.img", "-F", "raw"]);
                let data = files.get(1).filter(|_| options.ends_with('='));
                let options = format!("{options}{}", data.map_or("", |name| name));
                if !options.is_empty() {
                    command.args(["-o", &options]);
                }
                command.arg(&files[0]);
                command
            }
            Kind::Limit | Kind::Raw | Kind::QemuRaw => {
                return Err(io::Error::other("a raw target has no overlay"));
            }
        };
        let output = command.current_dir(folder).output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(io::Error::other(format!("{}: {command:?}: {said}", self.name)))
    }

    /// The command that serves a disk.
    pub fn command(&self, programs: &Programs, disk: &Served<'_>) -> io::Result<Command> {
        match self.kind {
            Kind::Limit => Err(io::Error::other("the limit has no server")),
            Kind::Raw | Kind::AddCow(_) => Ok(self.our_command(programs, disk)),
            Kind::QemuRaw => Ok(qemu_command(programs, disk, None)),
            Kind::Qemu(format, options) => {
                Ok(qemu_command(programs, disk, Some((format, options))))
            }
        }
    }

    /// The command line of our daemon.
    fn our_command(&self, programs: &Programs, disk: &Served<'_>) -> Command {
        let mut command = Command::new(&programs.addcowd);
        command.arg("--blk-file").arg(disk.file).arg("--socket-path").arg(disk.socket);
        command.arg("--num-queues").arg(disk.queues.to_string());
        if self.kind == Kind::Raw {
            command.args(["--format", "raw"]);
            if disk.backing == Backing::Hot {
                command.args(["--cache", "buffered"]);
            }
        } else if disk.backing == Backing::Direct {
            command.args(["--backing-cache", "direct"]);
        }
        if disk.read_only {
            command.arg("--read-only");
        }
        command.args(&programs.addcowd_args);
        command
    }
}

/// The command line of qemu-storage-daemon: one iothread, io_uring, direct.
fn qemu_command(programs: &Programs, disk: &Served<'_>, overlay: Option<(&str, &str)>) -> Command {
    let mut command = Command::new(&programs.qsd);
    command.args(["--object", "iothread,id=thread0"]);
    let hot = disk.backing == Backing::Hot;
    let read_only = if disk.read_only { "on" } else { "off" };
    let file = |name: &str, path: &Path, direct: bool, read_only: &str| {
        let direct = if direct { "on" } else { "off" };
        let path = path.display();
        format!(
            "driver=file,node-name={name},filename={path},aio=io_uring,cache.direct={direct},\
             read-only={read_only}"
        )
    };
    let mut node = |text: String| {
        command.arg("--blockdev").arg(text);
    };
    let served = match overlay {
        None => {
            // The file that is read in a backing-read is the base itself.
            node(file("file0", disk.file, !hot, read_only));
            node(format!("driver=raw,node-name=disk0,file=file0,read-only={read_only}"));
            "disk0"
        }
        Some((format, options)) => {
            node(file("base-file", disk.base, !hot, "on"));
            node("driver=raw,node-name=base0,file=base-file,read-only=on".into());
            node(file("file0", disk.file, true, read_only));
            let mut text = format!(
                "driver={format},node-name=disk0,file=file0,backing=base0,read-only={read_only}"
            );
            if options.ends_with("data_file=") {
                node(file("data0", &disk.file.with_extension("raw"), true, read_only));
                text.push_str(",data-file=data0");
            }
            node(text);
            "disk0"
        }
    };
    let writable = if disk.read_only { "off" } else { "on" };
    let (socket, queues) = (disk.socket.display(), disk.queues);
    command.arg("--export").arg(format!(
        "vhost-user-blk,id=export0,node-name={served},addr.type=unix,addr.path={socket},\
         writable={writable},num-queues={queues},iothread=thread0"
    ));
    command
}
