//! What each kind of thread may ask of the kernel: the tables, and nothing else.
//!
//! A rule names a system call and perhaps values that some of its arguments must have. What is not
//! in a thread's table ends the process, save for a few calls that are answered as if the kernel
//! did not have them. `tests/sandbox.rs` holds both sides of it: every rule here is needed by that
//! kind of thread, and everything that it does is here.
//!
//! A thread is born with the rules of the one that starts it, and gives up what it does not need as
//! the first thing that it does. So a spawner has the rules of the threads that it starts besides
//! its own.
//!
//! Not here: how a table becomes a filter (`filter`).

/// A kind of thread, by what it may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Profile {
    /// The main thread: accepts, passes messages on, flushes.
    Main,
    /// Starts the queues' threads, and does nothing else.
    QueueSpawner,
    /// Starts the control thread of each connection, and does nothing else.
    ControlSpawner,
    /// The framework's thread of a connection, which handles its messages.
    Control,
    /// A queue's thread.
    Queue,
    /// The thread that reads the tables of qcow2 files.
    Tables,
    /// The thread that waits for signals.
    Signals,
    /// The process that makes sockets for us (`broker`).
    Broker,
}

impl Profile {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Main,
        Self::QueueSpawner,
        Self::ControlSpawner,
        Self::Control,
        Self::Queue,
        Self::Tables,
        Self::Signals,
        Self::Broker,
    ];

    /// What the threads are that it starts; `None` if it starts none.
    #[must_use]
    pub fn child(self) -> Option<Self> {
        match self {
            Self::QueueSpawner => Some(Self::Queue),
            Self::ControlSpawner => Some(Self::Control),
            _ => None,
        }
    }

    /// Its name: one word, at most 15 bytes, as for threads.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::QueueSpawner => "queue-spawner",
            Self::ControlSpawner => "control-spawner",
            Self::Control => "control",
            Self::Queue => "queue",
            Self::Tables => "tables",
            Self::Signals => "signals",
            Self::Broker => "broker",
        }
    }

    /// What it needs for itself.
    #[must_use]
    pub fn own_rules(self) -> &'static [Rule] {
        match self {
            Self::Main => MAIN,
            Self::QueueSpawner => QUEUE_SPAWNER,
            Self::ControlSpawner => CONTROL_SPAWNER,
            Self::Control => CONTROL,
            Self::Queue => QUEUE,
            Self::Tables => TABLES,
            Self::Signals => SIGNALS,
            Self::Broker => BROKER,
        }
    }

    /// What it is told that this kernel does not have (ENOSYS), for a spawner also what those are
    /// told whom it starts.
    #[must_use]
    pub fn absent_calls(self) -> Vec<Rule> {
        let of = |profile| match profile {
            Self::QueueSpawner | Self::ControlSpawner => ABSENT_FOR_SPAWNERS,
            Self::Main | Self::Queue | Self::Tables => ABSENT_FOR_LISTS,
            Self::Control | Self::Signals | Self::Broker => &[],
        };
        let inherited = self.child().map_or(&[][..], of);
        of(self).iter().chain(inherited).copied().collect()
    }

    /// What it may do: for a spawner also what those need whom it starts.
    #[must_use]
    pub fn rules(self) -> Vec<Rule> {
        let inherited = self.child().map_or(&[][..], Self::own_rules);
        self.own_rules().iter().chain(inherited).copied().collect()
    }
}

/// A system call that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Its name.
    pub name: &'static str,
    /// Its number on this machine.
    pub number: i64,
    /// Allowed only if all of these hold.
    pub checks: &'static [Check],
}

/// What an argument must be: `argument & mask == value`. The lower 32 bits, which is all that the
/// kernel looks at in the arguments that are checked here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// Which argument, from 0.
    pub argument: u8,
    /// The bits that count.
    pub mask: u32,
    /// What they must be.
    pub value: u32,
}

/// A rule for a system call of the `libc` crate.
macro_rules! call {
    ($name:ident: $number:ident $(, $argument:literal & $mask:expr => $value:expr)*) => {
        Rule {
            name: stringify!($name),
            number: libc::$number,
            checks: &[$(Check { argument: $argument, mask: $mask, value: $value }),*],
        }
    };
}

/// A rule for what happens on some hosts, or seldom: no test can make it happen here.
#[derive(Debug, Clone, Copy)]
pub struct Rare {
    /// Whose it is.
    pub profile: Profile,
    /// The call.
    pub name: &'static str,
    /// The value of the first argument that is checked, if only that one is rare.
    pub value: Option<u32>,
    /// When it happens.
    pub when: &'static str,
}

impl Rare {
    /// Whether a rule of `profile` is this one.
    #[must_use]
    pub fn is(&self, profile: Profile, rule: &Rule) -> bool {
        let value = rule.checks.first().map(|check| check.value);
        self.profile == profile
            && self.name == rule.name
            && (self.value.is_none() || self.value == value)
    }
}

/// A rare rule, whatever its arguments.
const fn rare(profile: Profile, name: &'static str, when: &'static str) -> Rare {
    Rare { profile, name, value: None, when }
}

/// An advice on memory that is rarely given.
const fn rare_advice(profile: Profile, advice: u32, when: &'static str) -> Rare {
    Rare { profile, name: "madvise", value: Some(advice), when }
}

/// No clock without a call.
const NO_VDSO: &str = "the kernel's clock cannot be read without a call";

/// More memory.
const MEMORY: &str = "the memory of the process is used up";

/// Huge pages for lists.
const HUGE: &str = "glibc asks for huge pages: it was told to, or takes that for better";

/// No huge pages for stacks.
const NOT_HUGE: &str = "glibc was told to have no huge pages in stacks";

/// Guarded stacks.
const GUARD: &str = "a C library of 2025 guards the stacks of threads with it";

/// The end of the tables thread.
const CLOSED: &str = "the disk is closed before the process has ended";

/// All of them.
pub const RARE: &[Rare] = &[
    rare(Profile::Main, "sched_yield", "a ring stops while another marks clusters"),
    rare(Profile::Main, "shutdown", "another process connects to the private socket"),
    rare(Profile::Main, "clock_gettime", NO_VDSO),
    rare(Profile::Main, "brk", MEMORY),
    rare_advice(Profile::Main, MADV_HUGEPAGE, HUGE),
    rare(Profile::QueueSpawner, "brk", MEMORY),
    rare_advice(Profile::QueueSpawner, MADV_GUARD_INSTALL, GUARD),
    rare_advice(Profile::QueueSpawner, MADV_GUARD_REMOVE, GUARD),
    rare_advice(Profile::QueueSpawner, MADV_NOHUGEPAGE, NOT_HUGE),
    rare(Profile::ControlSpawner, "brk", MEMORY),
    rare_advice(Profile::ControlSpawner, MADV_GUARD_INSTALL, GUARD),
    rare_advice(Profile::ControlSpawner, MADV_GUARD_REMOVE, GUARD),
    rare_advice(Profile::ControlSpawner, MADV_NOHUGEPAGE, NOT_HUGE),
    rare(Profile::Control, "clock_gettime", NO_VDSO),
    rare(Profile::Control, "rt_sigreturn", "a front end cuts a ring and then says where it lies"),
    rare(Profile::Control, "brk", MEMORY),
    rare_advice(Profile::Control, MADV_HUGEPAGE, HUGE),
    rare(Profile::Queue, "clock_gettime", NO_VDSO),
    rare(Profile::Queue, "sched_yield", "a flush meets a write that is about to mark its clusters"),
    rare(Profile::Queue, "brk", MEMORY),
    rare_advice(Profile::Queue, MADV_HUGEPAGE, HUGE),
    #[cfg(debug_assertions)]
    rare(Profile::Queue, "fcntl", "a queue is the last to use a descriptor of the front end's"),
    rare(Profile::Tables, "mmap", "a large compressed cluster is inflated"),
    rare(Profile::Tables, "close", "a queue has gone before it was woken"),
    #[cfg(debug_assertions)]
    rare(Profile::Tables, "fcntl", "a queue has gone before it was woken"),
    rare(Profile::Tables, "brk", MEMORY),
    rare_advice(Profile::Tables, MADV_HUGEPAGE, HUGE),
    rare(Profile::Tables, "munmap", CLOSED),
    rare_advice(Profile::Tables, MADV_DONTNEED, CLOSED),
    rare(Profile::Tables, "rt_sigprocmask", CLOSED),
    rare(Profile::Tables, "sigaltstack", CLOSED),
    rare(Profile::Tables, "exit", CLOSED),
    rare(Profile::Signals, "futex", "two threads write to the log at once"),
    rare(Profile::Signals, "brk", MEMORY),
    rare(Profile::Signals, "mmap", MEMORY),
    rare_advice(Profile::Signals, MADV_HUGEPAGE, HUGE),
];

/// All bits of an argument.
const ALL: u32 = u32::MAX;

/// A flag or command of the `libc` crate, which are signed there.
const fn bits(value: i32) -> u32 {
    value.cast_unsigned()
}

/// `PROT_EXEC`: memory whose bytes may be run.
const EXECUTABLE: u32 = bits(libc::PROT_EXEC);

/// What `pthread_create` asks of clone(2): a thread of this process, and nothing that would make it
/// anything else. musl sets `CLONE_DETACHED` as well, which does nothing.
const THREAD_FLAGS: u32 = bits(
    libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_SETTLS
        | libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_CLEARTID,
);

/// `io_uring_register` operations: before a ring is enabled, and files of the disk afterwards.
mod register {
    /// Memory, with `--register-memory`.
    pub const BUFFERS: u32 = 0;
    /// What is told of completions: the driver's call.
    pub const EVENTFD: u32 = 4;
    /// Nothing is.
    pub const NO_EVENTFD: u32 = 5;
    /// A file of the disk.
    pub const FILES_UPDATE: u32 = 6;
    /// What the ring may do.
    pub const RESTRICTIONS: u32 = 11;
    /// The ring may be used.
    pub const ENABLE_RINGS: u32 = 12;
    /// Room for files.
    pub const FILES2: u32 = 13;
}

/// Make a socket (not) wait.
const FIONBIO: u32 = 0x5421;

/// Level of options of any socket.
const SOL_SOCKET: u32 = bits(libc::SOL_SOCKET);

/// Which family a socket is of.
const SO_DOMAIN: u32 = bits(libc::SO_DOMAIN);

/// Which type a socket has.
const SO_TYPE: u32 = bits(libc::SO_TYPE);

/// `F_ADD_SEALS`.
const F_ADD_SEALS: u32 = bits(libc::F_ADD_SEALS);

/// `F_GET_SEALS`.
const F_GET_SEALS: u32 = bits(libc::F_GET_SEALS);

/// Gives pages back.
const MADV_DONTNEED: u32 = bits(libc::MADV_DONTNEED);

/// Asks for huge pages.
const MADV_HUGEPAGE: u32 = bits(libc::MADV_HUGEPAGE);

/// Asks for none.
const MADV_NOHUGEPAGE: u32 = bits(libc::MADV_NOHUGEPAGE);

/// Makes pages of a stack raise a fault, as glibc 2.42 does it.
const MADV_GUARD_INSTALL: u32 = 102;

/// Makes them usable again.
const MADV_GUARD_REMOVE: u32 = 103;

/// `SECCOMP_SET_MODE_FILTER`: one more filter, which can only take rights away.
const SECCOMP_FILTER: u32 = 1;

/// Waiting for several descriptors, as the C library does it on this machine.
#[cfg(all(target_arch = "x86_64", not(target_env = "musl")))]
const EPOLL_WAIT: Rule = call!(epoll_wait: SYS_epoll_wait);
/// Waiting for several descriptors, as the C library does it on this machine.
#[cfg(not(all(target_arch = "x86_64", not(target_env = "musl"))))]
const EPOLL_WAIT: Rule = call!(epoll_pwait: SYS_epoll_pwait);

/// Without optimisation the standard library looks whether a descriptor is open before it closes
/// it.
#[cfg(debug_assertions)]
const CLOSE_CHECK: Rule = call!(fcntl: SYS_fcntl, 1 & ALL => bits(libc::F_GETFD));

/// What starting a thread asks for and can do without, as on older kernels. The flags of clone3 are
/// in memory, where no filter sees them: the C library takes clone then. A list of robust mutexes
/// is for who has some. Which processors a thread may use is asked beside where its stack is.
const ABSENT_FOR_SPAWNERS: &[Rule] = &[
    call!(clone3: SYS_clone3),
    call!(set_robust_list: SYS_set_robust_list),
    call!(sched_getaffinity: SYS_sched_getaffinity),
];

/// What growing a long list asks for: memory of its own that is moved. The C library copies then.
const ABSENT_FOR_LISTS: &[Rule] = &[call!(mremap: SYS_mremap)];

/// The main thread.
const MAIN: &[Rule] = &[
    // Front ends.
    call!(accept4: SYS_accept4),
    call!(ppoll: SYS_ppoll),
    call!(recvmsg: SYS_recvmsg),
    call!(sendmsg: SYS_sendmsg),
    call!(ioctl: SYS_ioctl, 1 & ALL => FIONBIO),
    call!(shutdown: SYS_shutdown),
    call!(close: SYS_close),
    call!(write: SYS_write),
    // What a connection consists of.
    call!(epoll_ctl: SYS_epoll_ctl),
    call!(eventfd2: SYS_eventfd2),
    call!(fcntl: SYS_fcntl, 1 & ALL => bits(libc::F_DUPFD_CLOEXEC)),
    #[cfg(debug_assertions)]
    CLOSE_CHECK,
    // What outlives us (vhost_user/recovery.rs).
    call!(memfd_create: SYS_memfd_create),
    call!(ftruncate: SYS_ftruncate),
    call!(fcntl: SYS_fcntl, 1 & ALL => F_ADD_SEALS),
    call!(fcntl: SYS_fcntl, 1 & ALL => F_GET_SEALS),
    call!(fstat: SYS_fstat),
    call!(fstatfs: SYS_fstatfs),
    call!(lseek: SYS_lseek),
    call!(getrandom: SYS_getrandom),
    // The disk, between connections and at the end.
    call!(preadv: SYS_preadv),
    call!(pwritev: SYS_pwritev),
    call!(fdatasync: SYS_fdatasync),
    call!(fcntl: SYS_fcntl, 1 & ALL => bits(libc::F_OFD_SETLK)),
    // Its mappings.
    call!(fcntl: SYS_fcntl, 1 & ALL => bits(libc::F_GETFL)),
    call!(mincore: SYS_mincore),
    // Memory, other threads, and the end.
    call!(brk: SYS_brk),
    call!(mmap: SYS_mmap, 2 & EXECUTABLE => 0),
    call!(munmap: SYS_munmap),
    call!(madvise: SYS_madvise, 2 & ALL => MADV_HUGEPAGE),
    call!(futex: SYS_futex),
    call!(sched_yield: SYS_sched_yield),
    call!(clock_gettime: SYS_clock_gettime),
    call!(sigaltstack: SYS_sigaltstack),
    call!(exit_group: SYS_exit_group),
];

/// What it takes to start a thread, and what that thread does before it has a profile of its own.
macro_rules! spawner {
    ($($rule:expr),* $(,)?) => {
        &[
            call!(futex: SYS_futex),
            call!(brk: SYS_brk),
            call!(mmap: SYS_mmap, 2 & EXECUTABLE => 0),
            call!(mprotect: SYS_mprotect, 2 & EXECUTABLE => 0),
            call!(madvise: SYS_madvise, 2 & ALL => MADV_GUARD_INSTALL),
            call!(madvise: SYS_madvise, 2 & ALL => MADV_GUARD_REMOVE),
            call!(madvise: SYS_madvise, 2 & ALL => MADV_NOHUGEPAGE),
            call!(clone: SYS_clone, 0 & (ALL ^ bits(libc::CLONE_DETACHED)) => THREAD_FLAGS),
            call!(rt_sigprocmask: SYS_rt_sigprocmask),
            call!(rseq: SYS_rseq),
            call!(sigaltstack: SYS_sigaltstack),
            call!(gettid: SYS_gettid),
            call!(prctl: SYS_prctl, 0 & ALL => bits(libc::PR_SET_NAME)),
            call!(prctl: SYS_prctl, 0 & ALL => bits(libc::PR_SET_NO_NEW_PRIVS)),
            call!(seccomp: SYS_seccomp, 0 & ALL => SECCOMP_FILTER),
            $($rule),*
        ]
    };
}

/// Who starts the queues' threads: it also makes what they wait on.
const QUEUE_SPAWNER: &[Rule] = spawner![
    call!(epoll_create1: SYS_epoll_create1),
    call!(epoll_ctl: SYS_epoll_ctl),
    call!(eventfd2: SYS_eventfd2),
    call!(fcntl: SYS_fcntl, 1 & ALL => bits(libc::F_DUPFD_CLOEXEC)),
];

/// Who starts the control thread: it also accepts our own connection to it.
const CONTROL_SPAWNER: &[Rule] = spawner![
    call!(accept4: SYS_accept4),
    call!(fcntl: SYS_fcntl, 1 & ALL => bits(libc::F_DUPFD_CLOEXEC)),
    call!(close: SYS_close),
    #[cfg(debug_assertions)]
    CLOSE_CHECK,
];

/// The framework's thread of a connection.
const CONTROL: &[Rule] = &[
    call!(recvmsg: SYS_recvmsg),
    call!(sendmsg: SYS_sendmsg),
    call!(shutdown: SYS_shutdown),
    call!(getsockopt: SYS_getsockopt, 1 & ALL => SOL_SOCKET, 2 & ALL => SO_DOMAIN),
    call!(getsockopt: SYS_getsockopt, 1 & ALL => SOL_SOCKET, 2 & ALL => SO_TYPE),
    call!(write: SYS_write),
    call!(close: SYS_close),
    call!(epoll_ctl: SYS_epoll_ctl),
    call!(eventfd2: SYS_eventfd2),
    call!(fcntl: SYS_fcntl, 1 & ALL => bits(libc::F_DUPFD_CLOEXEC)),
    #[cfg(debug_assertions)]
    CLOSE_CHECK,
    // Guest memory, and its pages that go missing (storage/fault_guard.rs).
    call!(fstat: SYS_fstat),
    call!(fstatfs: SYS_fstatfs),
    call!(brk: SYS_brk),
    call!(mmap: SYS_mmap, 2 & EXECUTABLE => 0),
    call!(munmap: SYS_munmap),
    call!(madvise: SYS_madvise, 2 & ALL => MADV_DONTNEED),
    call!(madvise: SYS_madvise, 2 & ALL => MADV_HUGEPAGE),
    call!(futex: SYS_futex),
    call!(clock_gettime: SYS_clock_gettime),
    call!(rt_sigreturn: SYS_rt_sigreturn),
    call!(rt_sigprocmask: SYS_rt_sigprocmask),
    call!(sigaltstack: SYS_sigaltstack),
    call!(exit: SYS_exit),
];

/// A queue's thread.
const QUEUE: &[Rule] = &[
    EPOLL_WAIT,
    call!(io_uring_setup: SYS_io_uring_setup),
    call!(io_uring_enter: SYS_io_uring_enter),
    call!(io_uring_register: SYS_io_uring_register, 1 & ALL => register::BUFFERS),
    call!(io_uring_register: SYS_io_uring_register, 1 & ALL => register::EVENTFD),
    call!(io_uring_register: SYS_io_uring_register, 1 & ALL => register::NO_EVENTFD),
    call!(io_uring_register: SYS_io_uring_register, 1 & ALL => register::FILES_UPDATE),
    call!(io_uring_register: SYS_io_uring_register, 1 & ALL => register::RESTRICTIONS),
    call!(io_uring_register: SYS_io_uring_register, 1 & ALL => register::ENABLE_RINGS),
    call!(io_uring_register: SYS_io_uring_register, 1 & ALL => register::FILES2),
    call!(read: SYS_read),
    call!(write: SYS_write),
    call!(close: SYS_close),
    #[cfg(debug_assertions)]
    CLOSE_CHECK,
    call!(getrandom: SYS_getrandom),
    call!(brk: SYS_brk),
    call!(mmap: SYS_mmap, 2 & EXECUTABLE => 0),
    call!(munmap: SYS_munmap),
    call!(mincore: SYS_mincore),
    call!(madvise: SYS_madvise, 2 & ALL => MADV_DONTNEED),
    call!(madvise: SYS_madvise, 2 & ALL => MADV_HUGEPAGE),
    call!(madvise: SYS_madvise, 2 & ALL => bits(libc::MADV_POPULATE_READ)),
    call!(prctl: SYS_prctl, 0 & ALL => bits(libc::PR_SET_NAME)),
    call!(futex: SYS_futex),
    call!(sched_yield: SYS_sched_yield),
    call!(clock_gettime: SYS_clock_gettime),
    // A page of a mapped file that is gone (storage/fault_guard.rs).
    call!(rt_sigreturn: SYS_rt_sigreturn),
    call!(rt_sigprocmask: SYS_rt_sigprocmask),
    call!(sigaltstack: SYS_sigaltstack),
    call!(exit: SYS_exit),
];

/// The thread that reads the tables of qcow2 files.
const TABLES: &[Rule] = &[
    call!(futex: SYS_futex),
    call!(preadv: SYS_preadv),
    call!(write: SYS_write),
    call!(close: SYS_close),
    #[cfg(debug_assertions)]
    CLOSE_CHECK,
    call!(getrandom: SYS_getrandom),
    call!(brk: SYS_brk),
    call!(mmap: SYS_mmap, 2 & EXECUTABLE => 0),
    call!(munmap: SYS_munmap),
    call!(madvise: SYS_madvise, 2 & ALL => MADV_DONTNEED),
    call!(madvise: SYS_madvise, 2 & ALL => MADV_HUGEPAGE),
    call!(rt_sigprocmask: SYS_rt_sigprocmask),
    call!(sigaltstack: SYS_sigaltstack),
    call!(exit: SYS_exit),
];

/// The thread that waits for signals.
const SIGNALS: &[Rule] = &[
    call!(rt_sigtimedwait: SYS_rt_sigtimedwait),
    call!(write: SYS_write),
    call!(futex: SYS_futex),
    call!(brk: SYS_brk),
    call!(mmap: SYS_mmap, 2 & EXECUTABLE => 0),
    call!(madvise: SYS_madvise, 2 & ALL => MADV_HUGEPAGE),
];

/// The process that makes sockets.
const BROKER: &[Rule] = &[
    call!(recvmsg: SYS_recvmsg),
    call!(sendmsg: SYS_sendmsg),
    call!(socket: SYS_socket, 0 & ALL => bits(libc::AF_UNIX)),
    call!(bind: SYS_bind),
    call!(listen: SYS_listen),
    call!(connect: SYS_connect),
    call!(close: SYS_close),
    #[cfg(debug_assertions)]
    CLOSE_CHECK,
    call!(newfstatat: SYS_newfstatat),
    call!(unlinkat: SYS_unlinkat),
    call!(exit_group: SYS_exit_group),
];
