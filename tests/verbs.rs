//! What becomes of a disk when a verb cannot do its work, or is interrupted, on real files?
//!
//! Not here: power cuts (`crash_verbs.rs`), what is printed (`tool.rs`).

#[path = "common/shell.rs"]
mod shell;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use shell::{command, run_script, wait};

/// A folder for a script to run in, which must end well. Returns what it printed.
fn run(folder: &Path, script: &str) -> String {
    let (printed, status) = run_script(script, folder, &folder.join("../output"));
    assert_eq!(status, "exit status: 0", "{script}\n{printed}");
    printed
}

/// A new folder below a new folder, where a script may write beside it too.
fn folders() -> (tempfile::TempDir, std::path::PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let work = parent.path().join("work");
    fs::create_dir(&work).unwrap();
    (parent, work)
}

#[test]
fn verbs_on_a_read_only_file_system_say_so_and_change_nothing() {
    let mount = "mount --bind . . && mount -o remount,bind,ro .";
    let can = Command::new("unshare").args(["-m", "true"]).output();
    if !can.is_ok_and(|output| output.status.success()) {
        let note = b"SKIPPED verbs_on_a_read_only_file_system: cannot unshare\n";
        std::io::stderr().write_all(note).unwrap();
        return;
    }
    let (_parent, work) = folders();
    run(
        &work,
        "fill_clusters base.img 0 4
        addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow
        addcow create -q whole.add-cow 1M
        state > ../before",
    );
    let verbs = [
        "resize disk.add-cow 1M",
        "resize --shrink disk.add-cow 64k",
        "resize -f raw disk.raw 1M",
        "rebase -b '' disk.add-cow",
        "rebase -u -b base.img -F raw disk.add-cow",
        "reset disk.add-cow",
        "detach whole.add-cow",
        "snapshot disk.add-cow new.add-cow",
        "check -r leaks disk.add-cow",
    ];
    for verb in verbs {
        let script = format!(
            "unshare -m sh -c \"{mount}; cd \\\"$PWD\\\"; addcow {verb}\" 2> ../error && exit 9
            cat ../error; state > ../after; cmp ../before ../after"
        );
        let printed = run(&work, &script);
        assert_eq!(printed.lines().count(), 1, "addcow {verb}: {printed}");
        assert!(printed.contains("Read-only file system"), "addcow {verb}: {printed}");
    }
    for verb in ["info disk.add-cow", "map disk.add-cow", "check disk.add-cow"] {
        run(&work, &format!("unshare -m sh -c \"{mount}; cd \\\"$PWD\\\"; addcow {verb}\""));
    }
}

/// A rebase that has much to copy, ended by a signal while it is at it.
#[test]
fn interrupted_rebase_leaves_what_the_disk_showed_and_can_be_run_again() {
    let (_parent, work) = folders();
    run(
        &work,
        "fill_clusters base.img 0 2000
        truncate -s 125M base.img
        addcow create -q -b base.img -F raw disk.add-cow",
    );
    let mut rebase = command("addcow", &work)
        .args(["rebase", "-p", "-b", "", "disk.add-cow"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // As soon as it says that it has begun.
    let mut first = [0; 8];
    rebase.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    kill_process(Pid::from_child(&rebase), Signal::INT).unwrap();
    let mut rest = String::new();
    rebase.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    assert_ne!(wait(rebase), "exit status: 0", "it had come to its end: {rest}");
    let same = "addcow check -q disk.add-cow
        addcow info disk.add-cow | grep -q 'backing file: base.img'";
    run(&work, same);
    run(&work, "addcow rebase -b '' disk.add-cow; cmp disk.raw base.img");
}
