//! What strace(1) saw the daemon do, thread by thread, held against the tables of rules.
//!
//! A call counts for the profile that the thread has at that moment: its own once it has entered
//! that, before it that of its spawner, if a spawner has started it, or else none.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use addcow::sandbox::profile::{Profile, Rule};

use crate::common::TIMEOUT;
use crate::common::disk::DAEMON;

/// `SECCOMP_SET_MODE_FILTER`.
const SET_FILTER: u64 = 1;

/// The command that traces the daemon into `file`. The daemon is the process that it starts; the
/// tracer is beside it.
pub fn command(file: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("strace");
    // Numbers for all arguments, but names for what prctl does, since it names threads.
    command.args(["-D", "-f", "-q", "-e", "raw=!prctl", "-e", "signal=none", "-o"]);
    command.arg(file).arg(DAEMON).args(arguments);
    command
}

/// What one thread is known to be.
#[derive(Debug, Clone, Copy)]
struct Thread {
    /// What it says that it is.
    kind: Profile,
    /// How many filters it has installed.
    filters: usize,
}

impl Thread {
    /// The profile that holds for it now.
    fn profile(&self) -> Option<Profile> {
        if self.filters > usize::from(!self.kind.absent_calls().is_empty()) {
            return Some(self.kind);
        }
        Profile::ALL.into_iter().find(|profile| profile.child() == Some(self.kind))
    }
}

/// What the threads are that a trace shows, in the order in which they appear. One that gives
/// itself no name is the main thread. A number may be used again by a later thread.
fn kinds(text: &str) -> Vec<Profile> {
    let mut kinds = Vec::new();
    let mut alive: BTreeMap<&str, usize> = BTreeMap::new();
    for (thread, rest) in lines(text) {
        if rest.starts_with("+++") {
            alive.remove(thread);
            continue;
        }
        let index = *alive.entry(thread).or_insert_with(|| {
            kinds.push(Profile::Main);
            kinds.len() - 1
        });
        // Queues give themselves a second name later.
        if let Some(kind) = kind_of(rest).filter(|_| kinds[index] == Profile::Main) {
            kinds[index] = kind;
        }
    }
    // Nobody else ends before it has said what it is: what such a thread did would not be seen.
    let nameless = kinds.iter().filter(|kind| **kind == Profile::Main).count();
    assert_eq!(nameless, 1, "threads without a name");
    kinds
}

/// The lines of a trace: a thread's number, and what it did.
fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.map(|(thread, rest)| (thread, rest.trim_start()))
}

/// What was seen, of several daemons.
#[derive(Debug, Default)]
pub struct Seen {
    /// Rules that were needed: profile, and the rule's place in the profile's own table.
    needed: BTreeSet<(Profile, usize)>,
    /// Calls that no rule of the thread's profile allows, with the profile.
    pub strange: BTreeMap<String, Profile>,
    /// Calls that were answered as if the kernel did not have them.
    pub absent: BTreeSet<(Profile, &'static str)>,
    /// How many calls of confined threads were looked at.
    pub calls: u64,
}

impl Seen {
    /// Adds what is in `file`, which is complete once the tracer has ended.
    pub fn add(&mut self, file: &Path) {
        let end = Instant::now() + TIMEOUT;
        let text = loop {
            let text = std::fs::read_to_string(file).expect("the tracer's file");
            let first = text.split(' ').next().unwrap_or_default();
            let is_end = |line: &str| line.split(' ').next() == Some(first) && line.contains("+++");
            if text.lines().rev().any(is_end) {
                break text;
            }
            assert!(Instant::now() < end, "the tracer does not end");
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut kinds = kinds(&text).into_iter();
        let mut threads: BTreeMap<&str, Thread> = BTreeMap::new();
        for (thread, rest) in lines(&text) {
            if rest.starts_with("+++") {
                threads.remove(thread);
                continue;
            }
            let state = threads.entry(thread).or_insert_with(|| {
                let kind = kinds.next().expect("as many threads as before");
                Thread { kind, filters: 0 }
            });
            if let Some((name, arguments)) = parse(rest) {
                self.call(*state, name, &arguments, rest);
                let is_filter = name == "seccomp" && arguments.first() == Some(&SET_FILTER);
                state.filters += usize::from(is_filter);
            }
        }
    }

    /// Notes a call.
    fn call(&mut self, thread: Thread, name: &str, arguments: &[u64], line: &str) {
        let Some(profile) = thread.profile() else { return };
        if let Some(absent) = profile.absent_calls().iter().find(|absent| absent.name == name) {
            self.absent.insert((profile, absent.name));
            return;
        }
        self.calls += 1;
        for (index, rule) in profile.own_rules().iter().enumerate() {
            if allows(rule, name, arguments) {
                self.needed.insert((profile, index));
            }
        }
        if !profile.rules().iter().any(|rule| allows(rule, name, arguments)) {
            self.strange.insert(line.to_owned(), profile);
        }
    }

    /// The rules of a profile that were not needed.
    pub fn idle(&self, profile: Profile) -> Vec<&'static Rule> {
        let rules = profile.own_rules().iter().enumerate();
        rules.filter(|(i, _)| !self.needed.contains(&(profile, *i))).map(|(_, rule)| rule).collect()
    }
}

/// What a thread is that gives itself a name.
fn kind_of(line: &str) -> Option<Profile> {
    let name = line.strip_prefix("prctl(PR_SET_NAME, \"")?.split('"').next()?;
    match name {
        "vring_worker" => Some(Profile::Queue),
        "addcowd-broker" => Some(Profile::Broker),
        _ => Profile::ALL.into_iter().find(|profile| profile.name() == name),
    }
}

/// Whether a rule allows a call.
fn allows(rule: &Rule, name: &str, arguments: &[u64]) -> bool {
    rule.name == name
        && rule.checks.iter().all(|check| {
            let argument = arguments.get(usize::from(check.argument)).copied().unwrap_or(0);
            argument & u64::from(check.mask) == u64::from(check.value)
        })
}

/// The name and the arguments of a call; `None` for the second half of one, and for other lines.
fn parse(text: &str) -> Option<(&str, Vec<u64>)> {
    let (name, rest) = text.split_once('(')?;
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return None;
    }
    let end = rest.find([')', '<']).unwrap_or(rest.len());
    Some((name, rest[..end].split(',').map(|word| number(word.trim())).collect()))
}

/// An argument as strace prints it.
fn number(word: &str) -> u64 {
    match word {
        "PR_SET_NAME" => 15,
        "PR_SET_NO_NEW_PRIVS" => 38,
        _ => {
            let hex = word.strip_prefix("0x").map(|digits| u64::from_str_radix(digits, 16));
            hex.and_then(Result::ok).or_else(|| word.parse().ok()).unwrap_or(0)
        }
    }
}
