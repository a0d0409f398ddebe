//! From a table of rules to a seccomp filter, and onto the calling thread.
//!
//! A filter cannot be taken off again, and everything that the thread starts later has it, too.
//! What is not allowed ends the whole process: a program that does what it never does is no longer
//! ours.
//!
//! Not here: what is allowed (`profile`).

#![expect(unsafe_code, reason = "seccomp(2), which no crate wraps with the flag that we want")]

use std::collections::BTreeMap;
use std::io;

use rustix::thread::set_no_new_privs;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::profile::{Profile, Rule};

/// The filters of a profile, in the order in which they are installed.
#[derive(Debug)]
pub struct Filters(Vec<BpfProgram>);

impl Filters {
    /// Makes the filters of a profile.
    ///
    /// # Errors
    /// `Unsupported` on a machine that nobody has written a table for.
    pub fn new(profile: Profile) -> io::Result<Self> {
        let mut rules = table(&profile.rules())?;
        let mut programs = Vec::new();
        let absent: BTreeMap<_, _> =
            profile.absent_calls().iter().map(|rule| (rule.number, Vec::new())).collect();
        if !absent.is_empty() {
            rules.extend(absent.clone());
            let errno = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
            programs.push(compile(absent, SeccompAction::Allow, errno)?);
        }
        programs.push(compile(rules, SeccompAction::KillProcess, SeccompAction::Allow)?);
        Ok(Self(programs))
    }

    /// Installs them for the calling thread and everything that it will start.
    ///
    /// # Errors
    /// What the host said; `Unsupported` if it has no seccomp filters.
    pub fn install(&self) -> io::Result<()> {
        set_no_new_privs(true)?;
        self.0.iter().try_for_each(|program| {
            let result = match install(program, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW) {
                // Before Linux 4.17 there is no such flag.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => install(program, 0),
                result => result,
            };
            result.map_err(|error| match error.raw_os_error() {
                Some(libc::ENOSYS | libc::EINVAL) => io::ErrorKind::Unsupported.into(),
                _ => error,
            })
        })
    }
}

/// Installs one filter. `flags` is 0, or says that the processor may go on speculating: before
/// Linux 5.16 a filter turns some of that off for the thread, which costs time and is meant for
/// programs that run somebody else's code.
fn install(program: &BpfProgram, flags: libc::c_ulong) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let code = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the kernel copies `len` instructions from `program`, which has that many of them in
    // the layout of seccomp(2), and writes nothing.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const code)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The rules by number. One without checks makes the others on the same call meaningless.
fn table(rules: &[Rule]) -> io::Result<BTreeMap<i64, Vec<SeccompRule>>> {
    let mut table: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules {
        let conditions: Result<Vec<_>, _> = rule
            .checks
            .iter()
            .map(|check| {
                let compare = SeccompCmpOp::MaskedEq(check.mask.into());
                let len = SeccompCmpArgLen::Dword;
                SeccompCondition::new(check.argument, len, compare, check.value.into())
            })
            .collect();
        let always = table.get(&rule.number).is_some_and(Vec::is_empty);
        let conditions = conditions.map_err(io::Error::other)?;
        if conditions.is_empty() {
            table.insert(rule.number, Vec::new());
        } else if !always {
            let condition = SeccompRule::new(conditions).map_err(io::Error::other)?;
            table.entry(rule.number).or_default().push(condition);
        }
    }
    Ok(table)
}

/// A filter that does one thing with the calls in the table and another with all others.
fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> io::Result<BpfProgram> {
    let machine = TargetArch::try_from(std::env::consts::ARCH);
    let machine = machine.map_err(|_| io::Error::from(io::ErrorKind::Unsupported))?;
    let filter = SeccompFilter::new(rules, others, these, machine).map_err(io::Error::other)?;
    filter.try_into().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_makes_a_filter() {
        for profile in Profile::ALL {
            let filters = Filters::new(profile).unwrap();
            let expected = if profile.absent_calls().is_empty() { 1 } else { 2 };
            assert_eq!(filters.0.len(), expected, "{profile:?}");
        }
    }

    #[test]
    fn a_rule_without_checks_wins() {
        let rules = Profile::Main.rules();
        let table = table(&rules).unwrap();
        assert!(table[&libc::SYS_close].is_empty());
        assert!(!table[&libc::SYS_mmap].is_empty());
        assert!(table[&libc::SYS_fcntl].len() > 1);
    }
}
