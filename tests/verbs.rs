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
use shell::{command, have, run_script, wait};

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

/// What the verbs that replace a disk call to change files.
const CHANGES: [&str; 7] =
    ["pwritev", "ftruncate", "fsync", "fdatasync", "rename", "renameat2", "unlink"];

/// A script that makes an old disk of 192 KiB over a longer base, and sets functions that find out
/// whether it is the old one, or a new one of 1 MiB.
const OLD_DISK: &str = "fill_clusters ../base.img 0 16
    addcow create -q -b base.img -F raw --cluster-size 64k ../other.add-cow 1M
    addcow create -q -b ../base.img -F raw --cluster-size 64k disk.add-cow 192k
    fill_clusters disk.raw 0 1
    poke disk.add-cow 65536 '\\001'
    cp disk.add-cow disk.raw ..";

/// Whether the disk is the old one.
const IS_OLD: &str = "cmp disk.add-cow ../disk.add-cow && cmp disk.raw ../disk.raw";

/// Kills a verb at, and lets fail, each call that changes a file.
#[test]
fn a_disk_is_replaced_whole_wherever_the_tool_is_killed_or_fails() {
    let test = "a_disk_is_replaced_whole_wherever_the_tool_is_killed_or_fails";
    let (_parent, work) = folders();
    if !have("strace", test) {
        return;
    }
    let traced = run_script("strace -qq true", &work, &work.join("../output"));
    if traced.1 != "exit status: 0" {
        let note = format!("SKIPPED {test}: no ptrace\n");
        std::io::stderr().write_all(note.as_bytes()).unwrap();
        return;
    }
    run(&work, OLD_DISK);
    let new = "! cmp -s disk.add-cow ../disk.add-cow && addcow check -q disk.add-cow &&
        test $(stat -c %s disk.raw) = 1048576";
    let (mut killed, mut failed) = (0, 0);
    for verb in [
        "create -q -b ../base.img -F raw disk.add-cow 1M",
        "snapshot -q ../other.add-cow disk.add-cow",
    ] {
        for (call, fault) in
            CHANGES.iter().flat_map(|call| [(call, "signal=KILL"), (call, "error=EIO")])
        {
            for when in 1.. {
                let inject = format!("-e inject={call}:{fault}:when={when}");
                let script = format!(
                    "rm -rf .disk.* disk.*; cp ../disk.add-cow ../disk.raw .
                    strace -f -qq -o ../trace -e trace={call} {inject} addcow {verb} --force \
                        2> ../error && status=0 || status=$?
                    if test -e disk.add-cow; then
                        ({IS_OLD}) > ../old 2>&1 || ({new}) || exit 9
                    fi
                    test $status = 0 || test $status -gt 100 || ({IS_OLD}) || exit 9
                    test $(grep -c '{call}(' ../trace) -ge {when} || status=done
                    echo $status"
                );
                match run(&work, &script).trim() {
                    "done" => break,
                    "0" => {}
                    "1" => failed += 1,
                    _ => killed += 1,
                }
            }
        }
    }
    println!("{killed} killed, {failed} failed");
    assert!(killed >= 20 && failed >= 10, "{killed} killed, {failed} failed");
}

/// As nobody if this is root, whom no permission stops.
#[test]
fn what_cannot_be_opened_is_not_replaced() {
    let (_parent, work) = folders();
    let is_root = rustix::process::geteuid().is_root();
    if is_root && !have("setpriv", "what_cannot_be_opened_is_not_replaced") {
        return;
    }
    let who = if is_root { "setpriv --reuid 65534 --regid 65534 --clear-groups" } else { "" };
    run(
        &work,
        "fill_clusters base.img 0 4
        addcow create -q -b base.img -F raw disk.add-cow
        addcow export -q disk.add-cow disk.qcow2
        addcow create -q old.add-cow 1M
        chmod 0 old.add-cow
        test $(id -u) != 0 || chown -R 65534 ..
        # Others may not look into the folder where it was built.
        cp $(command -v addcow) ../addcow",
    );
    for (verb, role) in [
        ("create -b base.img -F raw -i new.raw old.add-cow", "add-cow file"),
        ("snapshot -i new.raw disk.add-cow old.add-cow", "add-cow file"),
        ("convert disk.add-cow old.add-cow", "disk"),
        ("convert -O add-cow disk.add-cow old.add-cow", "add-cow file"),
        ("convert -O add-cow -o image_file=old.add-cow disk.add-cow new.add-cow", "raw image"),
        ("export disk.add-cow old.add-cow", "disk"),
        ("adopt disk.qcow2 old.add-cow", "add-cow file"),
    ] {
        let said = run(&work, &format!("refused {who} ../addcow {verb} --force"));
        let expected = format!("addcow: cannot open {role} 'old.add-cow': Permission denied");
        assert!(said.contains(&expected) && said.ends_with("[exit 1]\n"), "{verb}: {said}");
        assert_eq!(said.lines().count(), 3, "{verb}: {said}");
    }
}

#[test]
fn what_replaces_a_file_takes_over_its_permissions() {
    let (_parent, work) = folders();
    let script = "umask 022
        fill_clusters base.img 0 4
        addcow create -q -b base.img -F raw disk.add-cow
        addcow export -q disk.add-cow disk.qcow2
        addcow create -q new.add-cow 256k
        touch out
        for mode in 600 666 440; do
            chmod $mode new.add-cow new.raw out
            for verb in \
                'create -q -b base.img -F raw new.add-cow 256k' \
                'create -q -b base.img -F raw -i longer.raw new.add-cow 256k' \
                'snapshot -q disk.add-cow new.add-cow' \
                'convert -q -O add-cow disk.add-cow new.add-cow' \
                'convert -q disk.add-cow out' \
                'export -q disk.add-cow out' \
                'adopt -q disk.qcow2 new.add-cow'
            do
                truncate -s 64k longer.raw
                addcow $verb --force
                stat -c '%a' new.add-cow new.raw out | sort -u | tr '\\n' ' '
            done
            echo
        done
        addcow create -q fresh.add-cow 256k
        stat -c '%a' fresh.add-cow longer.raw";
    let line = |mode| format!("{mode} ").repeat(7) + "\n";
    assert_eq!(run(&work, script), line(600) + &line(666) + &line(440) + "644\n644\n");
}
