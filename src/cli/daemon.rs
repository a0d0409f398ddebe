//! `addcowd`: arguments, socket, signals.
//!
//! Follows the conventions for back-end programs in QEMU's vhost-user text ("Backend program
//! conventions"): fail early with one line, never daemonize, end on SIGTERM.

use std::error::Error;
use std::ffi::OsString;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use clap::{Command, CommandFactory, Parser, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use rustix::net::sockopt::socket_acceptconn;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::image::open::{self, OpenImage, OpenOptions};
use crate::sandbox::Sandbox;
use crate::sandbox::broker::SocketIdentity;
use crate::sandbox::profile::Profile;
use crate::sandbox::rights::raise_pinned_memory;
use crate::storage::fault_guard;
use crate::storage::host_file::CacheMode;
use crate::storage::lock::Locking;
use crate::vhost_user::backend::MAX_QUEUES;
use crate::vhost_user::export::{Endpoint, Export, StopHandle, Tuning};
use crate::virtio::config::DeviceConfig;

use super::names::NameArguments;
use super::{Outcome, failed};

/// The program's name in messages.
const PROGRAM: &str = "addcowd";

/// What `--print-capabilities` prints (QEMU's `vhost-user.json`).
const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

/// The longest serial: GET_ID has room for no more (VIRTIO 1.3, 5.2.6).
const MAX_SERIAL_LEN: usize = 20;

/// Format of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// An add-cow file.
    AddCow,
    /// A plain raw image.
    Raw,
}

/// Cache mode of the raw image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Cache {
    /// Past the host's page cache where the file system can.
    Direct,
    /// Through the host's page cache.
    Buffered,
    /// As direct, and every write is durable before it completes.
    Writethrough,
}

/// Cache mode of the backing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BackingCache {
    /// Through the host's page cache, which all guests on this backing file share.
    Buffered,
    /// Past the host's page cache where the file system can.
    Direct,
}

/// Serves a copy-on-write disk to a virtual machine (vhost-user-blk back end).
#[derive(Debug, Parser)]
#[command(name = PROGRAM, version, max_term_width = 80)]
struct Arguments {
    /// The disk: an add-cow file, or a raw image with --format raw.
    #[arg(long, short = 'b', value_name = "DISK")]
    blk_file: PathBuf,
    /// Listen on this Unix socket; a stale one is replaced, one in use is not.
    #[arg(
        long,
        short = 's',
        value_name = "PATH",
        required_unless_present = "fd",
        conflicts_with = "fd"
    )]
    socket_path: Option<PathBuf>,
    /// Use this inherited socket, listening or connected.
    #[arg(long, short = 'f', value_name = "N")]
    fd: Option<RawFd>,
    /// Print a JSON description of this program, and ignore everything else.
    #[arg(long, short = 'c')]
    print_capabilities: bool,
    /// Refuse every write.
    #[arg(long, short = 'r')]
    read_only: bool,
    /// Format of the disk; never guessed.
    #[arg(long, value_name = "FMT", value_enum, default_value = "add-cow")]
    format: Format,
    /// Request queues, 1 to 64. QEMU uses one per virtual CPU unless told otherwise, and refuses a
    /// back end that has fewer.
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    num_queues: u16,
    /// Size of the queues that the front end makes, a power of two from 4 to 1024; sets how many
    /// segments a request may have (N - 2). Larger and smaller queues work too.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = parse_queue_size)]
    queue_size: u16,
    /// The longest that a queue stays awake for the next request, in microseconds, 0 to 1000. It
    /// adapts: a driver whose requests come further apart costs nothing.
    #[arg(long, value_name = "N", default_value_t = 50,
          value_parser = clap::value_parser!(u64).range(0..=1000))]
    poll_us: u64,
    /// Register guest memory with io_uring. Saves processor time on fast storage; pins all of the
    /// guest's memory, so that ballooning and free page reporting give nothing back.
    #[arg(long)]
    register_memory: bool,
    /// Move all data with io_uring. By default what is in memory already, on tmpfs or in the page
    /// cache of the backing file, is copied from a mapping of the file, without a system call.
    #[arg(long)]
    no_mapping: bool,
    /// Serial number of the disk, at most 20 bytes of ASCII; the guest sees it in /dev/disk/by-id.
    #[arg(long, value_name = "S", default_value = "", hide_default_value = true,
          value_parser = parse_serial)]
    serial: String,
    /// Cache mode of the raw image.
    #[arg(long, value_name = "MODE", value_enum, default_value = "direct")]
    cache: Cache,
    /// Cache mode of the backing file.
    #[arg(long, value_name = "MODE", value_enum, default_value = "buffered")]
    backing_cache: BackingCache,
    /// Where names inside the disk's files may lead.
    #[command(flatten)]
    names: NameArguments,
    /// Give up no rights after the disk and the socket are open. For debugging only: a guest that
    /// breaks into this process can then do whatever its user can.
    #[arg(long)]
    no_sandbox: bool,
}

/// Checks a serial.
fn parse_serial(text: &str) -> Result<String, String> {
    if text.len() > MAX_SERIAL_LEN {
        Err(format!("{} bytes long, at most {MAX_SERIAL_LEN} fit", text.len()))
    } else if !text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
        Err("not printable ASCII".into())
    } else {
        Ok(text.into())
    }
}

/// Checks a queue size.
fn parse_queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if (4..=1024).contains(&size) && size.is_power_of_two() => Ok(size),
        _ => Err("not a power of two from 4 to 1024".into()),
    }
}

/// The definition of the command line.
#[must_use]
pub fn command() -> Command {
    Arguments::command()
}

/// Runs the daemon with these arguments, the program's name first.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    // "print-capabilities ... the back-end program must ignore other options" (QEMU's text).
    if arguments.iter().skip(1).any(|a| a == "--print-capabilities" || a == "-c") {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("ADDCOW_LOG", "info"))
        .format(|out, record| {
            use io::Write as _;
            writeln!(
                out,
                "{PROGRAM}: {}: {}",
                record.level().as_str().to_lowercase(),
                record.args()
            )
        })
        .init();
    super::run(command(), arguments, |arguments: Arguments| serve(&arguments))
}

/// Opens the disk and serves it until told to stop.
fn serve(arguments: &Arguments) -> Outcome {
    // First of all: the broker must not inherit anything.
    let sandbox = Sandbox::start(arguments.socket_path.as_deref(), !arguments.no_sandbox)
        .map_err(failed("cannot start the broker process"))?;
    arguments.names.install()?;
    let image = open_image(arguments)?;
    // From here on they wait for the thread that takes them: nothing half-done is left behind.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block().map_err(io::Error::from).map_err(failed("cannot block signals"))?;
    let socket = match (&arguments.fd, &arguments.socket_path) {
        (Some(fd), _) => Socket::inherited(*fd)?,
        (None, Some(path)) => Socket::bind(path)?,
        (None, None) => return Err("neither --socket-path nor --fd given".into()),
    };
    let result = serve_on(arguments, &sandbox, signals, image, socket.endpoint);
    if let Some((path, identity)) = socket.created
        && let Err(error) = sandbox.remove_socket(identity)
    {
        log::warn!("{}: cannot remove the socket: {error}", path.display());
    }
    result
}

/// Serves the disk on a socket.
fn serve_on(
    arguments: &Arguments,
    sandbox: &Sandbox,
    signals: SigSet,
    image: OpenImage,
    endpoint: Endpoint,
) -> Outcome {
    let stop = StopHandle::new().map_err(failed("cannot make an eventfd"))?;
    let config = DeviceConfig {
        num_queues: arguments.num_queues,
        queue_size: arguments.queue_size,
        serial: arguments.serial.clone().into_bytes(),
    };
    let writeback = arguments.cache != Cache::Writethrough;
    let tuning = Tuning {
        poll_limit: Duration::from_micros(arguments.poll_us),
        register_memory: arguments.register_memory,
    };
    let export = Export::new(image, config, writeback, tuning, stop.clone())?;
    let export = export.in_sandbox(sandbox.clone());
    confine(sandbox, signals, stop, &export, arguments)?;
    if !arguments.no_mapping {
        // With the rights that the queues have, or the host would show more than it shows them.
        export.image().map_files();
    }
    log::info!(
        "{}: serving {} bytes",
        arguments.blk_file.display(),
        export.image().state.virtual_size()
    );
    export.serve(endpoint)?;
    Ok(0)
}

/// Opens the disk as the arguments say.
fn open_image(arguments: &Arguments) -> Result<OpenImage, crate::image::OpenError> {
    let options = OpenOptions {
        writable: !arguments.read_only,
        cache: match arguments.cache {
            Cache::Direct | Cache::Writethrough => CacheMode::Direct,
            Cache::Buffered => CacheMode::Buffered,
        },
        backing_cache: match arguments.backing_cache {
            BackingCache::Direct => CacheMode::Direct,
            BackingCache::Buffered => CacheMode::Buffered,
        },
        locking: Locking::On,
    };
    match arguments.format {
        Format::AddCow => open::add_cow(&arguments.blk_file, options),
        Format::Raw => open::raw(&arguments.blk_file, options),
    }
}

/// Gives up what serving does not need, and starts the thread for signals: the last one that the
/// main thread may start.
fn confine(
    sandbox: &Sandbox,
    signals: SigSet,
    stop: StopHandle,
    export: &Export,
    arguments: &Arguments,
) -> Outcome {
    if arguments.no_sandbox {
        log::warn!(
            "NO SANDBOX: a guest that breaks into this process can do whatever its user can"
        );
    }
    raise_pinned_memory(arguments.register_memory);
    if sandbox.is_confined() {
        // A backtrace would read files, which ends a confined process.
        std::panic::set_hook(Box::new(|panic| log::error!("internal error: {panic}")));
    }
    const ENTER: &str = "cannot enter the sandbox";
    fault_guard::prepare().map_err(failed(ENTER))?;
    for missing in sandbox.confine().map_err(failed(ENTER))? {
        log::warn!("sandbox: {missing}");
    }
    let late = sandbox.clone();
    let enter = move || {
        signals.thread_block()?;
        late.enter_late(Profile::Tables)
    };
    export.image().on_tables_thread(enter).map_err(failed(ENTER))?;
    stop_on_signals(signals, stop, sandbox.clone())
        .map_err(failed("cannot start the thread for signals"))?;
    sandbox.enter(Profile::Main).map_err(failed(ENTER))?;
    Ok(0)
}

/// Lets the signals, which are blocked, stop the export. Returns once the thread for them is
/// confined.
fn stop_on_signals(signals: SigSet, stop: StopHandle, sandbox: Sandbox) -> io::Result<()> {
    let (sender, entered) = sync_channel(1);
    let work = move || {
        let result = sandbox.enter(Profile::Signals);
        let is_confined = result.is_ok();
        // Who waits for it is there.
        let _ = sender.send(result);
        if !is_confined {
            return;
        }
        loop {
            match signals.wait() {
                Ok(signal) => log::info!("{signal}: finishing requests and flushing"),
                Err(nix::Error::EINTR) => continue,
                Err(error) => log::error!("cannot wait for signals: {error}"),
            }
            stop.stop();
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(work)?;
    entered.recv().map_err(io::Error::other)?
}

/// The socket that front ends use.
#[derive(Debug)]
struct Socket {
    /// What to serve.
    endpoint: Endpoint,
    /// The path that we created and have to remove, and what was created.
    created: Option<(PathBuf, SocketIdentity)>,
}

impl Socket {
    /// Binds a listener to `path`.
    fn bind(path: &Path) -> Result<Self, Box<dyn Error>> {
        let bind = || -> Result<_, Box<dyn Error>> {
            let listener = match UnixListener::bind(path) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    remove_stale(path)?;
                    UnixListener::bind(path)?
                }
                other => other?,
            };
            Ok((listener, rustix::fs::lstat(path).map_err(io::Error::from)?))
        };
        let action = format!("cannot listen on '{}'", path.display());
        let (listener, stat) = bind().map_err(failed(action))?;
        let identity = SocketIdentity { device: stat.st_dev, inode: stat.st_ino };
        let created = Some((path.to_owned(), identity));
        Ok(Self { endpoint: Endpoint::Listening(listener), created })
    }

    /// Takes an inherited socket. The conventions leave open whether it listens or is connected.
    fn inherited(fd: RawFd) -> Result<Self, Box<dyn Error>> {
        let take = || -> io::Result<_> {
            let socket = duplicate(fd)?;
            if socket_acceptconn(&socket)? {
                return Ok(Endpoint::Listening(UnixListener::from(socket)));
            }
            let stream = UnixStream::from(socket);
            stream.peer_addr()?;
            stream.set_nonblocking(false)?;
            Ok(Endpoint::Connected(stream))
        };
        let endpoint = take().map_err(failed(format!("cannot use file descriptor {fd}")))?;
        Ok(Self { endpoint, created: None })
    }
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(path: &Path) -> Result<(), Box<dyn Error>> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err("the path exists and is not a socket".into());
    }
    match UnixStream::connect(path) {
        Ok(_) => Err("the socket is in use by another process".into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Ok(std::fs::remove_file(path)?)
        }
        Err(error) => Err(error.into()),
    }
}

/// A descriptor of our own for the inherited `fd`. Going through the process's own pidfd lets the
/// kernel check that `fd` is open, where taking the bare number would be a promise of ours.
fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    let us: Pid = getpid();
    let process = pidfd_open(us, PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, fd, PidfdGetfdFlags::empty())?)
}
