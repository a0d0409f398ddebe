//! What a process gives up besides system calls: capabilities, new privileges, paths.
//!
//! All of it holds for the calling thread and what it starts later, and cannot be undone.
//!
//! Not here: system calls (`profile`, `filter`).

use std::io;
use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, PathBeneath,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// The newest Landlock whose rights are asked for; older kernels give what they have.
const NEWEST: ABI = ABI::V9;

/// The oldest Landlock that has all that we count on: files, TCP, abstract sockets, signals.
const COMPLETE: ABI = ABI::V6;

/// Memory of the rings of all queues, in bytes, with room to spare: before Linux 5.12 it counts as
/// pinned, and the limit on that was 64 KiB for who has no CAP_IPC_LOCK.
const RINGS_MEMORY: u64 = 8 << 20;

/// How much of Landlock the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landlock {
    /// All that we count on.
    Complete,
    /// Some of it.
    Partial,
    /// None, or it is switched off.
    Missing,
}

/// Gives up all capabilities, and the way to get some by running a program.
///
/// # Errors
/// What the host said.
pub fn drop_privileges() -> io::Result<()> {
    set_no_new_privs(true)?;
    // Only who has CAP_SETPCAP can take something out of the bounding set. Nobody else needs it:
    // without new privileges the set bounds nothing.
    let all = (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit));
    for capability in all {
        if remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
    // Kernels before 4.3 have none to clear.
    let _ = clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    Ok(set_capabilities(None, none)?)
}

/// Gives up every path, TCP, abstract sockets and signals of others. `removable`: a folder in which
/// files may still be removed.
///
/// # Errors
/// What the host said.
pub fn give_up_paths(removable: Option<BorrowedFd<'_>>) -> io::Result<Landlock> {
    let restrict = || -> Result<_, RulesetError> {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?;
        if let Some(folder) = removable {
            rules = rules.add_rule(PathBeneath::new(folder, AccessFs::RemoveFile))?;
        }
        rules.restrict_self()
    };
    let status = restrict().map_err(io::Error::other)?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) => Landlock::Missing,
        (_, LandlockStatus::Available { effective_abi, .. }) if effective_abi < COMPLETE => {
            Landlock::Partial
        }
        _ => Landlock::Complete,
    })
}

/// Raises the limit on memory that may be pinned: later nobody can. `all`: guest memory will be
/// pinned, whatever there is of it.
pub fn raise_pinned_memory(all: bool) {
    let limit = getrlimit(Resource::Memlock);
    let wanted = (!all).then_some(RINGS_MEMORY);
    // None is no limit, which is more than any.
    let is_enough = |limit: Option<u64>| limit.is_none_or(|has| wanted.is_some_and(|w| w <= has));
    if is_enough(limit.current) {
        return;
    }
    let maximum = if is_enough(limit.maximum) { limit.maximum } else { wanted };
    let raised = setrlimit(Resource::Memlock, Rlimit { current: wanted, maximum });
    let as_far_as_we_may =
        || setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, maximum: limit.maximum });
    if let Err(error) = raised.or_else(|_| as_far_as_we_may()) {
        log::debug!("the limit on pinned memory stays as it is: {error}");
    }
}
