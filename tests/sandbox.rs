//! Does the sandbox hold (P6)? Every thread of the real daemon is in it, each call that is not in a
//! thread's table is stopped, no rule of a table is idle, and old kernels are told apart.
//!
//! That a confined daemon still does its work is what all other suites show: it is on by default.

mod common;
#[path = "sandbox/probe.rs"]
mod probe;
#[path = "sandbox/trace.rs"]
mod trace;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use addcow::sandbox::filter::Filters;
use addcow::sandbox::profile::{Profile, RARE, Rule};
use addcow::sandbox::rights::{Landlock, drop_privileges, give_up_paths};
use common::disk::{DAEMON, Daemon, Disk, Shape, TOOL};
use common::guest::{Guest, Setup};
use common::request::{OK, Request};
use common::score::score;
use common::{MIB, SECTOR, TIMEOUT, assert_bytes, pattern};
use probe::{End, Made, call, confined, in_child};
use rustix::process::{Pid, Signal, kill_process};
use vhost::vhost_user::VhostUserFrontend;

/// The lines of a `/proc/.../status` by name.
type Status = BTreeMap<String, String>;

/// Reads a status file; none if its owner has just ended.
fn status(path: &str) -> Option<Status> {
    let text = fs::read_to_string(path).ok()?;
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    Some(lines.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
}

/// The state of every thread of a process.
fn threads(process: u32) -> Vec<Status> {
    let folder = fs::read_dir(format!("/proc/{process}/task")).expect("its threads");
    let paths = folder.map(|entry| entry.expect("a thread").path().join("status"));
    paths.filter_map(|path| status(path.to_str().expect("a plain path"))).collect()
}

/// The broker of a daemon.
fn broker(daemon: &Daemon) -> u32 {
    let parent = daemon.id().to_string();
    let processes = fs::read_dir("/proc").expect("the processes").flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers
        .find(|number: &u32| {
            let status = status(&format!("/proc/{number}/status"));
            status.is_some_and(|status| status.get("PPid") == Some(&parent))
        })
        .expect("a broker")
}

/// Waits until `check` says nothing any more, or fails with what it says.
fn eventually(mut check: impl FnMut() -> Option<String>) {
    let end = Instant::now() + TIMEOUT;
    while let Some(complaint) = check() {
        assert!(Instant::now() < end, "{complaint}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What is wrong with a thread that should be confined.
fn complaint(thread: &Status, filters: &str) -> Option<String> {
    let mut wanted = vec![("Seccomp", "2"), ("NoNewPrivs", "1")];
    wanted.extend(["CapInh", "CapPrm", "CapEff", "CapAmb"].map(|set| (set, "0000000000000000")));
    // Only who was root can empty it; to others it gives nothing.
    if thread["Uid"].starts_with("0\t") {
        wanted.push(("CapBnd", "0000000000000000"));
    }
    let wrong = wanted.iter().find(|(name, value)| thread[*name] != *value);
    let name = &thread["Name"];
    if let Some((field, _)) = wrong {
        return Some(format!("thread '{name}' has {field}: {}", thread[*field]));
    }
    let count = thread.get("Seccomp_filters");
    count
        .is_some_and(|count| count != filters)
        .then(|| format!("thread '{name}' has {count:?} filters, not {filters}"))
}

/// All threads of the daemon and its broker are confined.
fn assert_confined(daemon: &Daemon) {
    eventually(|| {
        threads(daemon.id()).iter().find_map(|thread| {
            // One for the table, one if some calls are absent, and those of the spawner.
            let filters = match thread["Name"].as_str() {
                "signals" => "1",
                "addcowd" | "tables" | "queue-spawner" | "control-spawner" => "2",
                "control" => "3",
                _ => "4",
            };
            complaint(thread, filters)
        })
    });
    let broker = threads(broker(daemon));
    assert_eq!(broker.len(), 1, "threads of the broker");
    assert_eq!(complaint(&broker[0], "1"), None);
}

#[test]
fn every_thread_of_a_serving_daemon_is_confined() {
    let disk = over_qcow2();
    let mut daemon = disk.serve(&["--num-queues", "4"]);
    for _ in 0..2 {
        let mut guest = daemon.guest(Setup::queues(4, 64));
        guest.write(0, &pattern(1, 0, 4096));
        assert_eq!(guest.status(&Request::flush()), OK);
        assert_confined(&daemon);
        let names: BTreeSet<String> =
            threads(daemon.id()).iter().map(|thread| thread["Name"].clone()).collect();
        let spawners = ["queue-spawner", "control-spawner"];
        for name in ["addcowd", "control", "queue-0", "signals", "tables"].iter().chain(&spawners) {
            assert!(names.contains(*name), "no thread '{name}' among {names:?}");
        }
    }
    let files = fs::read_dir(format!("/proc/{}/fd", broker(&daemon))).expect("its files");
    assert_eq!(files.count(), 2, "the broker has its channel and the socket's folder");
    daemon.stop();
}

#[test]
fn without_the_sandbox_the_daemon_says_so() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&["--no-sandbox"]);
    let mut guest = daemon.guest(Setup::default());
    assert_bytes(&guest.read(0, 4096), &disk.initial()[..4096], "the first sectors");
    assert!(daemon.messages().contains("NO SANDBOX"), "{}", daemon.messages());
    assert!(threads(daemon.id()).iter().all(|thread| thread["Seccomp"] == "0"));
    drop(guest);
    daemon.stop();
    assert!(!disk.path("sock").exists(), "the broker removes the socket");
}

#[test]
fn no_other_suite_leaves_the_sandbox() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<_> = ["tests", "scripts"].iter().map(|name| root.join(name)).collect();
    let mut looked_at = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read(&path).expect("a file");
            let leaves = String::from_utf8_lossy(&text).contains("--no-sandbox");
            // The run-time of a sanitizer does what the daemon never does.
            let may = ["tests/sandbox.rs", "scripts/sanitize"].iter().any(|p| path.ends_with(p));
            assert!(may || !leaves, "{}", path.display());
            looked_at += 1;
        }
    }
    assert!(looked_at > 100, "only {looked_at} files");
}

#[test]
fn each_call_that_is_not_in_a_table_is_stopped() {
    let mut count = 0;
    for profile in Profile::ALL {
        let filters = Filters::new(profile).expect("filters");
        let numbers = |rules: Vec<Rule>| rules.iter().map(|rule| rule.number).collect();
        let allowed: BTreeSet<i64> = numbers(profile.rules());
        let absent: BTreeSet<i64> = numbers(profile.absent_calls());
        assert!(allowed.is_disjoint(&absent), "{}", profile.name());
        // All numbers of this kernel, some behind, and those of the x32 interface.
        for number in (0..480).chain([0x4000_0000, 0x4000_0001, 0x4000_0208, -1]) {
            if allowed.contains(&number) {
                continue;
            }
            let made = confined(&filters, number, [0; 6]);
            let expected = match number {
                _ if absent.contains(&number) => Made::Returned(libc::ENOSYS),
                _ => Made::Stopped,
            };
            // Two calls that the kernel itself puts into programs go past filters, and do nothing
            // for anybody else: uretprobe and uprobe of x86.
            let by_kernel = cfg!(target_arch = "x86_64") && [335, 336].contains(&number);
            let is_harmless = by_kernel && made != Made::Returned(0);
            assert!(made == expected || is_harmless, "{}: {number}: {made:?}", profile.name());
            count += 1;
        }
    }
    score("sandbox_forbidden", &[("calls", count), ("stopped", count)]);
}

#[test]
fn long_lists_grow_without_mremap() {
    for profile in [Profile::Main, Profile::Queue, Profile::Tables] {
        let filters = Filters::new(profile).expect("filters");
        // So long that the C library maps memory for it alone, and would move that.
        let mut list = vec![7_u8; 4 << 20];
        let end = in_child(|| {
            filters.install().expect("the filters");
            list.resize(32 << 20, 8);
            let is_right = list[(4 << 20) - 1] == 7 && list[4 << 20] == 8;
            if profile != Profile::Main {
                call(libc::SYS_exit, [u64::from(!is_right), 0, 0, 0, 0, 0]);
            }
            i32::from(!is_right)
        });
        assert_eq!(end, End::Exit(0), "{}", profile.name());
    }
}

/// Calls that are allowed to somebody, with arguments that are not.
fn twisted() -> Vec<(&'static str, i64, [u64; 6])> {
    let thread = 0x003d_0f00;
    let exec = 4;
    vec![
        ("executable memory", libc::SYS_mmap, [0, 4096, 3 | exec, 0x22, u64::MAX, 0]),
        ("executable memory of a file", libc::SYS_mmap, [0, 4096, 1 | exec, 2, 0, 0]),
        ("memory made executable", libc::SYS_mprotect, [0, 4096, 1 | exec, 0, 0, 0]),
        ("a process", libc::SYS_clone, [17, 0, 0, 0, 0, 0]),
        ("a thread of its own process", libc::SYS_clone, [thread & !0x1_0000, 0, 0, 0, 0, 0]),
        ("a user namespace", libc::SYS_clone, [thread | 0x1000_0000, 0, 0, 0, 0, 0]),
        ("a traced child", libc::SYS_clone, [thread | 0x2000, 0, 0, 0, 0, 0]),
        ("an owner of signals", libc::SYS_fcntl, [0, 8, 0, 0, 0, 0]),
        ("another mode of a file", libc::SYS_fcntl, [0, 4, 0, 0, 0, 0]),
        ("a lease", libc::SYS_fcntl, [0, 1024, 0, 0, 0, 0]),
        ("input for a terminal", libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0]),
        ("signals of a socket", libc::SYS_ioctl, [0, 0x8901, 0, 0, 0, 0]),
        ("dumpable", libc::SYS_prctl, [4, 1, 0, 0, 0, 0]),
        ("capabilities", libc::SYS_prctl, [47, 2, 0, 0, 0, 0]),
        ("a tracer", libc::SYS_prctl, [0x5961_6d61, 1, 0, 0, 0, 0]),
        ("another memory layout", libc::SYS_prctl, [35, 1, 0, 0, 0, 0]),
        ("poisoned memory", libc::SYS_madvise, [0, 4096, 100, 0, 0, 0]),
        ("a hole in a mapped file", libc::SYS_madvise, [0, 4096, 9, 0, 0, 0]),
        ("a ring's credentials", libc::SYS_io_uring_register, [0, 9, 0, 0, 0, 0]),
        ("another ring's buffers", libc::SYS_io_uring_register, [0, 30, 0, 0, 0, 0]),
        ("a network socket", libc::SYS_socket, [2, 1, 0, 0, 0, 0]),
        ("a netlink socket", libc::SYS_socket, [16, 3, 0, 0, 0, 0]),
        ("a handler of faults", libc::SYS_rt_sigaction, [11, 0, 0, 8, 0, 0]),
        ("who the peer is", libc::SYS_getsockopt, [0, 1, 17, 0, 0, 0]),
        ("an option of TCP", libc::SYS_getsockopt, [0, 6, 3, 0, 0, 0]),
        ("strict seccomp", libc::SYS_seccomp, [0, 0, 0, 0, 0, 0]),
    ]
}

#[test]
fn allowed_calls_with_other_arguments_are_stopped() {
    for profile in Profile::ALL {
        let filters = Filters::new(profile).expect("filters");
        for (what, number, arguments) in twisted() {
            let made = confined(&filters, number, arguments);
            assert_eq!(made, Made::Stopped, "{}: {what}", profile.name());
        }
    }
}

#[test]
fn tables_are_short_and_have_nothing_that_opens_or_runs_a_file() {
    let mut figures = Vec::new();
    for profile in Profile::ALL {
        let rules = profile.rules();
        let names: BTreeSet<&str> = rules.iter().map(|rule| rule.name).collect();
        figures.push((profile.name(), common::to_u64(names.len())));
        let never = ["open", "creat", "exec", "ptrace", "kill", "process_vm", "setuid", "mount"];
        for name in &names {
            assert!(!never.iter().any(|part| name.starts_with(part)), "{profile:?}: {name}");
        }
        // The broker is there for these.
        if profile != Profile::Broker {
            for name in ["socket", "socketpair", "bind", "listen", "connect", "unlinkat"] {
                assert!(!names.contains(name), "{profile:?}: {name}");
            }
        }
        assert!(names.len() <= 30, "{}: {} names", profile.name(), names.len());
    }
    score("sandbox_calls", &figures);
}

#[test]
fn without_paths_nothing_is_opened_made_removed_or_reached() {
    let folder = tempfile::tempdir().expect("a folder");
    let (kept, given) = (folder.path().join("kept"), folder.path().join("given"));
    fs::create_dir(&given).expect("a folder");
    for path in [kept.clone(), given.join("file")] {
        fs::write(path, b"bytes").expect("a file");
    }
    let tcp = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let port = tcp.local_addr().expect("its address");
    let name = SocketAddr::from_abstract_name(format!("addcow-test-{}", std::process::id()));
    let name = name.expect("a name");
    let _listener = UnixListener::bind_addr(&name).expect("an abstract socket");
    let us = rustix::process::getpid();
    let open_folder = File::open(&given).expect("the folder");
    let end = in_child(|| {
        match give_up_paths(Some(open_folder.as_fd())) {
            Ok(Landlock::Complete) => {}
            // Old kernels confine less; the daemon says so.
            Ok(_) => return 0,
            Err(_) => return 1,
        }
        let refused = [
            File::open(&kept).is_err(),
            File::open(given.join("file")).is_err(),
            File::create(given.join("new")).is_err(),
            fs::read_dir("/").is_err(),
            fs::remove_file(&kept).is_err(),
            fs::rename(given.join("file"), given.join("other")).is_err(),
            fs::create_dir(given.join("folder")).is_err(),
            std::net::TcpStream::connect(port).is_err(),
            TcpListener::bind("127.0.0.1:0").is_err(),
            UnixStream::connect_addr(&name).is_err(),
            UnixListener::bind(folder.path().join("sock")).is_err(),
            kill_process(us, Signal::CONT).is_err(),
        ];
        let first = refused.iter().position(|refused| !refused);
        let removed = fs::remove_file(given.join("file")).is_ok();
        match first {
            Some(index) => 10 + i32::try_from(index).unwrap_or(0),
            None => i32::from(!removed) * 2,
        }
    });
    assert_eq!(end, End::Exit(0), "10 and more: what was not refused, in the order of the test");
    assert!(kept.exists());
}

#[test]
fn without_privileges_root_is_nobody() {
    if !rustix::process::geteuid().is_root() {
        return println!("SKIPPED without_privileges_root_is_nobody: not root");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    fs::write(&path, b"bytes").expect("a file");
    fs::set_permissions(&path, Permissions::from_mode(0o0)).expect("its mode");
    chown(&path, Some(1), Some(1)).expect("its owner");
    let end = in_child(|| {
        if drop_privileges().is_err() {
            return 1;
        }
        let refused = [
            File::open(&path).is_err(),
            chown(&path, Some(0), Some(0)).is_err(),
            rustix::process::chroot("/").is_err(),
            rustix::system::sethostname(b"name").is_err(),
            // Nothing comes back by running a program that is set-user-ID.
            rustix::thread::no_new_privs() == Ok(true),
        ];
        refused
            .iter()
            .position(|refused| !refused)
            .map_or(0, |index| 10 + i32::try_from(index).unwrap_or(0))
    });
    assert_eq!(end, End::Exit(0), "10 and more: what was not refused, in the order of the test");
}

/// A disk whose base is a qcow2 file with the smallest clusters, so that there is much to look up:
/// the first 32 KiB are data, the rest is not there.
#[expect(clippy::big_endian_bytes, reason = "qcow2 is big-endian")]
fn over_qcow2() -> Disk {
    let disk = Disk::small();
    let cluster = 512;
    let entries = 4 * MIB / (64 * cluster);
    let mut header = b"QFI\xfb\0\0\0\x02".to_vec();
    header.extend([0; 12]);
    header.extend(9_u32.to_be_bytes());
    header.extend((4 * MIB).to_be_bytes());
    header.extend([0; 4]);
    header.extend(u32::try_from(entries).expect("few entries").to_be_bytes());
    header.extend((3 * cluster).to_be_bytes());
    header.extend(cluster.to_be_bytes());
    header.extend(1_u32.to_be_bytes());
    header.extend([0; 12]);
    let copied = 1_u64 << 63;
    let tables: Vec<u8> =
        (0..64).flat_map(|index| (copied | ((6 + index) * cluster)).to_be_bytes()).collect();
    let file = File::create(disk.path("base.qcow2")).expect("a file");
    for (at, bytes) in [
        (0, header),
        (1, (2 * cluster).to_be_bytes().to_vec()),
        (2, [0, 1].repeat(70)),
        (3, (copied | (5 * cluster)).to_be_bytes().to_vec()),
        (5, tables),
        (6, pattern(5, 0, 32 << 10)),
    ] {
        file.write_all_at(&bytes, at * cluster).expect("a part of the file");
    }
    for name in ["disk.add-cow", "disk.raw"] {
        fs::remove_file(disk.path(name)).expect("the old disk");
    }
    let create = ["create", "-b", "base.qcow2", "-F", "qcow2", "-i", "disk.raw", "disk.add-cow"];
    let output = Command::new(TOOL).args(create).current_dir(disk.folder()).output();
    let output = output.expect("run the tool");
    assert!(output.status.success(), "{output:?}");
    disk
}

/// The daemon on `disk` with `options`, traced.
fn traced(disk: &Disk, options: &[&str]) -> Daemon {
    let mut arguments = vec!["--blk-file", "disk.add-cow", "--socket-path", "sock"];
    arguments.extend_from_slice(options);
    let command = trace::command(&disk.path("trace"), &arguments);
    Daemon::spawn_by(command, disk.folder(), None)
}

/// Everything that a guest can ask for, and a front end that comes back.
fn an_ordinary_life(disk: &Disk, options: &[&str]) {
    let mut daemon = traced(disk, options);
    let mut guest = Guest::start_recoverable(daemon.connect(), Setup::queues(2, 64));
    guest.read_all();
    guest.write(0, &pattern(1, 0, 8192));
    guest.write(17, &pattern(2, 17, SECTOR));
    guest.read(0, 65536);
    for request in [
        Request::flush(),
        Request::discard(&[(0, 128, 0)]),
        Request::write_zeroes(&[(128, 16, 1)]),
        Request::get_id(20),
    ] {
        assert_eq!(guest.status(&request), OK);
    }
    let extra = guest.mem.extra();
    guest.must("ADD_MEM_REG", |front| front.add_mem_region(&extra).map(drop));
    guest.read(100, 4096);
    guest.must("REM_MEM_REG", |front| front.remove_mem_region(&extra));
    let (_ours, theirs) = UnixStream::pair().expect("a socket pair");
    guest.must("SET_BACKEND_REQ_FD", |front| front.set_backend_request_fd(&theirs));
    // Stands still for a moment, as under a debugger.
    daemon.signal(Signal::STOP);
    daemon.signal(Signal::CONT);
    guest.read(0, 4096);
    guest.reconnect(daemon.connect()).expect("the same region again");
    guest.read(8, 4096);
    drop(guest);
    // The next front end has no region.
    let mut guest = daemon.guest(Setup::queues(2, 64));
    guest.read(16, 4096);
    assert_eq!(guest.status(&Request::flush()), OK);
    drop(guest);
    daemon.stop();
}

/// A base that becomes shorter while it is mapped.
fn a_base_that_is_cut(disk: &Disk) {
    let mut daemon = traced(disk, &["--register-memory"]);
    let mut guest = daemon.guest(Setup::default());
    for sector in [0, 4096, 0, 4096] {
        guest.read(sector, 8 * SECTOR);
    }
    let ours = rustix::thread::capabilities(None).expect("our capabilities").effective;
    if ours.contains(rustix::thread::CapabilitySet::SYS_RESOURCE) {
        let messages = daemon.messages();
        assert!(!messages.contains("not registered"), "the limit was not raised: {messages}");
    }
    let base = File::options().write(true).open(disk.path("base.img")).expect("the base");
    base.set_len(MIB).expect("its length");
    guest.read_fails(4096, 8 * SECTOR);
    guest.write(0, &pattern(3, 0, 4096));
    assert_eq!(guest.status(&Request::flush()), OK);
    drop(guest);
    daemon.stop();
}

/// The rules of a profile that nobody needed, save for those that are rare.
fn idle_rules(seen: &trace::Seen, profile: Profile) -> Vec<String> {
    let rules = seen.idle(profile).into_iter();
    let idle = rules.filter(|rule| !RARE.iter().any(|rare| rare.is(profile, rule)));
    idle.map(|rule| format!("{}: {} {:?}", profile.name(), rule.name, rule.checks)).collect()
}

#[test]
fn no_rule_is_idle_and_nothing_else_is_asked_for() {
    if Command::new("strace").arg("-V").output().is_err() {
        assert!(std::env::var_os("ADDCOW_NEED_STRACE").is_none(), "no strace");
        let what = "SKIPPED no_rule_is_idle_and_nothing_else_is_asked_for: no strace\n";
        return std::io::stderr().write_all(what.as_bytes()).expect("standard error");
    }
    let mut seen = trace::Seen::default();
    let in_memory = || Disk::create(Shape::new(4 * MIB, 64 << 10).in_memory());
    for (disk, options) in [
        (Disk::small(), &["--num-queues", "2"][..]),
        (Disk::small(), &["--no-mapping"]),
        (in_memory(), &[]),
    ] {
        an_ordinary_life(&disk, options);
        seen.add(&disk.path("trace"));
    }
    // The thread that looks tables up has to wake a queue. One that sleeps at once is asleep then,
    // unless a busy host lets it wait for longer than the look-up takes: then once more.
    for _ in 0..5 {
        let disk = over_qcow2();
        an_ordinary_life(&disk, &["--num-queues", "2", "--poll-us", "0"]);
        seen.add(&disk.path("trace"));
        if idle_rules(&seen, Profile::Tables).is_empty() {
            break;
        }
    }
    let disk = in_memory();
    a_base_that_is_cut(&disk);
    seen.add(&disk.path("trace"));
    assert!(seen.calls > 1000, "only {} calls were seen", seen.calls);
    assert!(seen.strange.is_empty(), "not in the tables: {:#?}", seen.strange);
    let idle: Vec<String> =
        Profile::ALL.into_iter().flat_map(|profile| idle_rules(&seen, profile)).collect();
    for profile in Profile::ALL {
        // Seldom: `long_lists_grow_without_mremap` makes it happen.
        let absent = profile.absent_calls().into_iter().filter(|rule| rule.name != "mremap");
        for name in absent.map(|rule| rule.name) {
            let is_asked_for = seen.absent.contains(&(profile, name));
            assert!(is_asked_for, "{} never asks for {name}", profile.name());
        }
    }
    let rules: usize = Profile::ALL.iter().map(|profile| profile.own_rules().len()).sum();
    let figures = [("rules", rules), ("rare", RARE.len()), ("idle", idle.len())];
    score("sandbox_rules", &figures.map(|(key, count)| (key, common::to_u64(count))));
    assert!(idle.is_empty(), "never needed:\n{}", idle.join("\n"));
}

/// Names the calls that a kernel lacks (numbers), for `becomes_a_daemon_on_an_old_kernel`.
const OLD_KERNEL: &str = "ADDCOW_TEST_WITHOUT_CALLS";

/// The daemon's arguments for the same, one in a line.
const OLD_KERNEL_DAEMON: &str = "ADDCOW_TEST_DAEMON";

#[test]
#[ignore = "not a test: what old_kernels_are_told_what_they_lack starts"]
fn becomes_a_daemon_on_an_old_kernel() {
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    };
    let (Ok(calls), Ok(arguments)) = (std::env::var(OLD_KERNEL), std::env::var(OLD_KERNEL_DAEMON))
    else {
        return;
    };
    let missing: Vec<i64> =
        calls.split_whitespace().map(|number| number.parse().expect("a number")).collect();
    for number in missing {
        // Of io_uring_register only the restrictions are missing.
        let (rules, errno) = if number == libc::SYS_io_uring_register {
            let (len, eq) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
            let condition = SeccompCondition::new(1, len, eq, 11).expect("a condition");
            (vec![SeccompRule::new(vec![condition]).expect("a rule")], libc::EINVAL)
        } else {
            (Vec::new(), libc::ENOSYS)
        };
        let table = BTreeMap::from([(number, rules)]);
        let machine = std::env::consts::ARCH.try_into().expect("this machine");
        let errno = SeccompAction::Errno(u32::try_from(errno).expect("an errno"));
        let filter = SeccompFilter::new(table, SeccompAction::Allow, errno, machine);
        let filter: seccompiler::BpfProgram = filter.expect("a filter").try_into().expect("code");
        seccompiler::apply_filter(&filter).expect("the filter");
    }
    panic!("{}", Command::new(DAEMON).args(arguments.lines()).exec());
}

#[test]
fn old_kernels_are_told_what_they_lack() {
    let landlock = libc::SYS_landlock_create_ruleset;
    let cases = [
        (vec![landlock], vec!["no Landlock"]),
        (vec![libc::SYS_seccomp], vec!["no seccomp filters"]),
        (vec![libc::SYS_io_uring_register], vec!["cannot restrict what io_uring may do"]),
        (vec![libc::SYS_close_range], vec![]),
        (
            vec![landlock, libc::SYS_io_uring_register, libc::SYS_seccomp],
            vec!["no Landlock", "cannot restrict what io_uring may do", "no seccomp filters"],
        ),
    ];
    for (missing, said) in cases {
        let disk = Disk::small();
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command.args(["--exact", "becomes_a_daemon_on_an_old_kernel", "--ignored", "--nocapture"]);
        let numbers: Vec<String> = missing.iter().map(i64::to_string).collect();
        command.env(OLD_KERNEL, numbers.join(" "));
        let arguments = ["--blk-file", "disk.add-cow", "--socket-path", "sock"];
        command.env(OLD_KERNEL_DAEMON, arguments.join("\n"));
        let mut daemon = Daemon::spawn_by(command, disk.folder(), None);
        let mut guest = daemon.guest(Setup::default());
        assert_bytes(&guest.read(0, 4096), &disk.initial()[..4096], "the first sectors");
        guest.write(0, &pattern(1, 0, 4096));
        let messages = daemon.messages();
        let warnings = messages.lines().filter(|line| line.contains("warn: sandbox:"));
        assert_eq!(warnings.count(), said.len(), "{missing:?}: {messages}");
        assert!(said.iter().all(|text| messages.contains(text)), "{missing:?}: {messages}");
        // The rest holds.
        for thread in threads(daemon.id()) {
            assert_eq!(thread["NoNewPrivs"], "1");
            assert_eq!(thread["CapPrm"], "0000000000000000");
        }
        drop(guest);
        daemon.stop();
        assert!(!disk.path("sock").exists(), "the socket is removed");
    }
}

#[test]
fn an_unprivileged_user_can_run_it() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        // Then all other tests show it.
        return;
    }
    let disk = Disk::small();
    chown(disk.folder(), Some(NOBODY), Some(NOBODY)).expect("the owner of the folder");
    for name in ["disk.add-cow", "disk.raw", "base.img"] {
        chown(disk.path(name), Some(NOBODY), Some(NOBODY)).expect("the owner of a file");
    }
    // Others may not look into the folder where it was built.
    let program = disk.path("addcowd");
    // Not by ourselves: a child that another test starts meanwhile would hold the file for writing.
    let copied = Command::new("cp").arg(DAEMON).arg(&program).status();
    assert!(copied.expect("run cp").success(), "a copy of the daemon");
    for options in [&[][..], &["--register-memory"]] {
        let mut command = Command::new(&program);
        command.args(["--blk-file", "disk.add-cow", "--socket-path", "sock"]).args(options);
        command.uid(NOBODY).gid(NOBODY);
        let mut daemon = Daemon::spawn_by(command, disk.folder(), None);
        let mut guest = Guest::start_recoverable(daemon.connect(), Setup::default());
        guest.write(0, &pattern(1, 0, 4096));
        assert_bytes(&guest.read(0, 4096), &pattern(1, 0, 4096), "what was written");
        assert_eq!(guest.status(&Request::flush()), OK);
        assert!(threads(daemon.id()).iter().all(|thread| thread["Uid"].starts_with("65534")));
        assert_confined(&daemon);
        drop(guest);
        daemon.stop();
        assert!(!disk.path("sock").exists(), "the socket is removed");
    }
}

#[test]
fn a_socket_that_is_not_ours_any_more_stays() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    daemon.guest(Setup::default()).read(0, 4096);
    fs::remove_file(disk.path("sock")).expect("remove the socket");
    let _other = UnixListener::bind(disk.path("sock")).expect("another socket");
    let status = daemon.terminate(TIMEOUT);
    assert_eq!(status.code(), Some(0));
    assert!(disk.path("sock").exists(), "somebody else's socket was removed");
    assert!(daemon.messages().contains("cannot remove the socket"), "{}", daemon.messages());
}

#[test]
fn broker_and_daemon_end_with_each_other() {
    let disk = Disk::small();
    let mut daemon = disk.serve(&[]);
    let mut guest = daemon.guest(Setup::default());
    let process = broker(&daemon);
    let broker = Pid::from_raw(i32::try_from(process).expect("a process")).expect("a process");
    // What a terminal or a supervisor sends to the whole group is not for it.
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        kill_process(broker, signal).expect("send a signal");
    }
    std::thread::sleep(Duration::from_millis(50));
    guest.write(0, &pattern(1, 0, 4096));
    drop(guest);
    let mut guest = daemon.guest(Setup::default());
    // Without it the front end that is there is served on, and no other.
    kill_process(broker, Signal::KILL).expect("send a signal");
    assert_bytes(&guest.read(0, 4096), &pattern(1, 0, 4096), "what was written");
    guest.write(8, &pattern(2, 8, 4096));
    drop(guest);
    let _next = UnixStream::connect(&daemon.socket).expect("a connection");
    assert_eq!(daemon.wait().code(), Some(1));
    assert!(daemon.messages().contains("broker"), "{}", daemon.messages());
    assert_bytes(&disk.flat_view()[4096..8192], &pattern(2, 8, 4096), "what was written is there");

    let (mut daemon, _stream) = disk.serve_after_kill(&[]);
    let process = self::broker(&daemon);
    daemon.kill();
    eventually(|| {
        let state = status(&format!("/proc/{process}/status"))?;
        // Whoever takes in orphans may not have waited for it yet.
        (!state["State"].starts_with('Z')).then(|| "the broker outlives its daemon".to_owned())
    });
}
