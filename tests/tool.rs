//! What does the tool say and do? Golden files, and qemu-img as a second opinion.
//!
//! Each `tests/tool/NAME.cmd` is a shell script. It runs in an empty folder, after `prelude.sh`,
//! with the freshly built `addcow` first in PATH; what it prints, and its exit code, must be what
//! `NAME.out` holds. `ADDCOW_BLESS=1 cargo test --test tool` rewrites those files: read the
//! difference before you commit it.

#[path = "common/shell.rs"]
mod shell;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use regex_lite::Regex;
use serde_json::Value;
use shell::{command, golden_folder, have, run_script, wait};

/// What a case prints, and how it ends.
fn run_case(case: &Path) -> String {
    let parent = tempfile::tempdir().unwrap();
    let work = parent.path().join("work");
    fs::create_dir(&work).unwrap();
    let script = format!(". {}", case.display());
    let (printed, status) = run_script(&script, &work, &parent.path().join("output"));
    // Where the case ran is another place every time.
    let printed = printed.replace(&*parent.path().to_string_lossy(), "TMP");
    // And so is who had the disk in use.
    let pid = Regex::new(r"PID \d+").unwrap();
    let printed = pid.replace_all(&printed, "PID N");
    format!("{printed}# ended with {status}\n")
}

/// The first line that differs, with its number.
fn first_difference(expected: &str, found: &str) -> String {
    let mut lines = (1..).zip(expected.lines().map(Some).chain(std::iter::repeat(None)));
    let found = found.lines().map(Some).chain([None]);
    for found in found {
        let (number, expected) = lines.next().unwrap();
        if expected != found {
            return format!("line {number}:\n  expected {expected:?}\n  found    {found:?}");
        }
    }
    "the end is missing".to_owned()
}

#[test]
fn golden_files() {
    let bless = std::env::var_os("ADDCOW_BLESS").is_some();
    let mut cases: Vec<PathBuf> =
        fs::read_dir(golden_folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|path| path.extension().is_some_and(|extension| extension == "cmd"));
    cases.sort();
    assert!(!cases.is_empty());
    let mut failures = Vec::new();
    for case in cases {
        let found = run_case(&case);
        let golden = case.with_extension("out");
        if bless {
            fs::write(&golden, &found).unwrap();
            continue;
        }
        let expected = fs::read_to_string(&golden).unwrap_or_default();
        if expected != found {
            let difference = first_difference(&expected, &found);
            failures.push(format!("{}: {difference}\n", golden.display()));
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.concat());
}

/// Runs a command that must succeed, and returns what it printed.
fn run(folder: &Path, line: &str) -> String {
    let output = folder.join("../stdout");
    let file = File::create(&output).unwrap();
    let child = command("sh", folder).args(["-euc", line]).stdout(file).spawn().unwrap();
    let status = wait(child);
    assert_eq!(status, "exit status: 0", "{line}");
    fs::read_to_string(output).unwrap()
}

/// The pieces of a map as (start, length, depth, present, zero, data), neighbours of one kind
/// merged: qemu-img splits where the place in the qcow2 file jumps.
fn pieces(map: &str) -> Vec<(u64, u64, [u64; 4])> {
    let entries: Vec<Value> = serde_json::from_str(map).unwrap();
    let mut pieces: Vec<(u64, u64, [u64; 4])> = Vec::new();
    for entry in entries {
        let flag = |key: &str| u64::from(entry[key].as_bool().unwrap());
        let kind = [entry["depth"].as_u64().unwrap(), flag("present"), flag("zero"), flag("data")];
        let (start, length) = (entry["start"].as_u64().unwrap(), entry["length"].as_u64().unwrap());
        match pieces.last_mut() {
            Some(last) if last.2 == kind => {
                assert_eq!(last.0 + last.1, start, "a gap or an overlap");
                last.1 += length;
            }
            _ => pieces.push((start, length, kind)),
        }
    }
    pieces
}

/// The same disk twice, as qcow2 overlay and as add-cow: both tools must map it alike.
#[test]
fn map_agrees_with_qemu_img() {
    if !have("qemu-img", "map_agrees_with_qemu_img") || !have("qemu-io", "map_agrees_with_qemu_img")
    {
        return;
    }
    let parent = tempfile::tempdir().unwrap();
    let work = parent.path().join("work");
    fs::create_dir(&work).unwrap();
    let lines = "truncate -s 1000k base.img
        qemu-io -f raw -c 'write 0 192k' -c 'write 320k 64k' -c 'write 832k 64k' base.img >/dev/null
        qemu-img create -q -f qcow2 -b base.img -F raw -o cluster_size=65536 disk.qcow2 2M
        addcow create -q -b base.img -F raw --cluster-size 64k disk.add-cow 2M
        for cluster in 1 2 4 12 14 16 20 31; do
            offset=$((cluster * 65536))
            qemu-io -c \"write $offset 64k\" disk.qcow2 >/dev/null
            qemu-io -f raw -c \"write $offset 64k\" disk.raw >/dev/null
        done
        # Clusters 1 2 4, 12 14, 16 20, 31.
        printf '\\026\\120\\021\\200' |
            dd of=disk.add-cow bs=1 seek=65536 conv=notrunc status=none";
    run(&work, lines);
    for range in ["", "--start-offset 100k --max-length 700k", "--start-offset 1500k"] {
        let theirs = run(&work, &format!("qemu-img map --output=json {range} disk.qcow2"));
        let ours = run(&work, &format!("addcow map --output=json {range} disk.add-cow"));
        assert_eq!(pieces(&ours), pieces(&theirs), "{range}");
    }
    assert!(pieces(&run(&work, "addcow map --output=json disk.add-cow")).len() > 10);
}
