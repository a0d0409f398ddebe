//! Does the tool do what qemu-img does on the same data?
//!
//! Both run on the same images of every format that both read; bytes, words, exit codes and JSON
//! are compared. Every version of qemu-img that there is takes part. Chains in depth are in
//! `backing_chain.rs`; what only we have is in the golden files (`tool.rs`).
#![expect(clippy::big_endian_bytes, reason = "the tables of qcow2 are big-endian")]

#[path = "common/qemu.rs"]
mod qemu;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use fastrand::Rng;
use qemu::Qemu;
use serde_json::Value;
use tempfile::TempDir;

/// The image tool under test.
const TOOL: &str = env!("CARGO_BIN_EXE_addcow");

/// A folder of images, and QEMU's tools.
struct Lab {
    /// The tools.
    qemu: Qemu,
    /// The folder.
    dir: TempDir,
    /// Where choices come from.
    rng: Rng,
}

/// What a command said: exit code, standard output, standard error.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    /// The exit code.
    code: Option<i32>,
    /// Standard output.
    out: String,
    /// Standard error.
    errors: String,
}

/// What a command said.
fn said(output: &Output) -> Said {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said { code: output.status.code(), out: text(&output.stdout), errors: text(&output.stderr) }
}

/// The images that both tools read: name and format.
const IMAGES: [(&str, &str); 8] = [
    ("base.img", "raw"),
    ("odd.img", "raw"),
    ("plain.qcow2", "qcow2"),
    ("old.qcow2", "qcow2"),
    ("packed.qcow2", "qcow2"),
    ("short.qcow2", "qcow2"),
    ("top.qcow2", "qcow2"),
    ("disk.qed", "qed"),
];

impl Lab {
    /// The images of [`IMAGES`], for each version of QEMU's tools.
    fn all(test: &str) -> Vec<Self> {
        let labs = Qemu::all(test).into_iter().zip(1..).map(|(qemu, seed)| {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let mut lab = Self { qemu, dir, rng: Rng::with_seed(seed) };
            lab.make();
            lab
        });
        labs.collect()
    }

    /// The path of a file.
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes the images.
    fn make(&mut self) {
        self.raw("base.img", 3 << 20);
        self.raw("odd.img", (2 << 20) + 12_345);
        let images = [
            ("plain.qcow2", "-f qcow2", 3 << 20),
            ("old.qcow2", "-f qcow2 -o compat=0.10,cluster_size=4096", 3 << 20),
            ("packed.qcow2", "-f qcow2", 0),
            ("short.qcow2", "-f qcow2 -b odd.img -F raw -o cluster_size=4096", 3 << 20),
            ("top.qcow2", "-f qcow2 -b short.qcow2 -F qcow2", 5 << 20),
            ("disk.qed", "-f qed -b base.img -F raw", 4 << 20),
        ];
        for (name, options, size) in images {
            if name == "packed.qcow2" {
                self.ok("qemu-img convert -c -f raw -O qcow2 base.img packed.qcow2");
                continue;
            }
            self.ok(&format!("qemu-img create -q {options} {name} {size}"));
            let format = if name.ends_with("qed") { "qed" } else { "qcow2" };
            self.scribble(name, format, size);
        }
    }

    /// Makes a raw image with data, holes, and zeros that are stored.
    fn raw(&mut self, name: &str, len: u64) {
        let file = File::create(self.path(name)).expect("a raw image");
        file.set_len(len).expect("its length");
        for number in 0..8 {
            let start = self.rng.u64(0..len - 4096);
            let count = usize::try_from(self.rng.u64(1..len / 16).min(len - start)).expect("small");
            let mut bytes = vec![0; count];
            if number > 1 {
                bytes.fill_with(|| self.rng.u8(..));
            }
            file.write_all_at(&bytes, start).expect("its content");
        }
    }

    /// Writes at random places of a disk of `size` bytes, some of it zeros.
    fn scribble(&mut self, name: &str, format: &str, size: u64) {
        let mut commands = Vec::new();
        for _ in 0..20 {
            let start = self.rng.u64(0..size / 512) * 512;
            let len = (self.rng.u64(1..200) * 512).min(size - start);
            let what = match self.rng.u32(0..6) {
                0 => "-z".to_owned(),
                _ => format!("-P {}", self.rng.u32(1..256)),
            };
            commands.push(format!("write {what} {start} {len}"));
        }
        self.qemu.io(self.dir.path(), &format!("-f {format}"), name, &commands);
    }

    /// Runs a QEMU tool, which must succeed.
    fn ok(&self, line: &str) -> String {
        self.qemu.ok(self.dir.path(), line)
    }

    /// What qemu-img says.
    fn theirs(&self, line: &str) -> Said {
        said(&self.qemu.run(self.dir.path(), &format!("qemu-img {line}")))
    }

    /// What our tool says.
    fn ours(&self, line: &str) -> Said {
        let mut command = Command::new(TOOL);
        command.args(line.split_whitespace()).current_dir(self.dir.path()).env("LC_ALL", "C");
        said(&command.output().expect("run the tool"))
    }

    /// What our tool prints; it must succeed.
    fn ours_ok(&self, line: &str) -> String {
        let said = self.ours(line);
        assert_eq!(said.code, Some(0), "{line}: {said:?}");
        said.out
    }

    /// The content of a file.
    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect("a file")
    }

    /// Fails unless two files are equal.
    fn same(&self, one: &str, other: &str, what: &str) {
        let (one, other) = (self.bytes(one), self.bytes(other));
        assert_eq!(one.len(), other.len(), "{what}: length");
        let different = one.iter().zip(&other).position(|(a, b)| a != b);
        assert_eq!(different, None, "{what}: first byte that differs");
    }
}

#[test]
fn converted_disks_have_the_same_bytes() {
    for lab in Lab::all("converted_disks_have_the_same_bytes") {
        for (name, format) in IMAGES {
            lab.ok(&format!("qemu-img convert -f {format} -O raw {name} theirs.img"));
            for options in ["", "-S 0", "-S 64k"] {
                lab.ours_ok(&format!("convert --force {options} -f {format} {name} ours.img"));
                lab.same("ours.img", "theirs.img", &format!("{name} {options}"));
            }
            lab.ours_ok(&format!("convert --force -f {format} -O add-cow {name} new.add-cow"));
            lab.same("new.raw", "theirs.img", name);
            for backing in ["base.img -F raw", "plain.qcow2 -F qcow2", "disk.qed -F qed"] {
                lab.ours_ok(&format!(
                    "convert --force -f {format} -O add-cow -B {backing} {name} over.add-cow"
                ));
                // There and back again, for their eyes.
                lab.ours_ok("convert --force over.add-cow again.img");
                lab.same("again.img", "theirs.img", &format!("{name} over {backing}"));
            }
            let said = lab.theirs("compare -f raw -F raw ours.img again.img");
            assert_eq!((said.code, &*said.out), (Some(0), "Images are identical.\n"), "{name}");
        }
    }
}

/// Both compare two images, with all kinds of options; words and exit codes must agree.
fn compare(lab: &Lab, one: (&str, &str), other: (&str, &str), options: &[&str]) {
    for option in options {
        let ((one, format), (other, other_format)) = (one, other);
        let line = format!("compare {option} -f {format} -F {other_format} {one} {other}");
        let (ours, theirs) = (lab.ours(&line), lab.theirs(&line));
        assert_eq!((ours.code, &ours.out), (theirs.code, &theirs.out), "{line}\n{ours:?}");
        assert_eq!(ours.errors.is_empty(), theirs.errors.is_empty(), "{line}\n{theirs:?}");
    }
}

#[test]
fn comparisons_have_the_same_words_and_exit_codes() {
    for mut lab in Lab::all("comparisons_have_the_same_words_and_exit_codes") {
        for (name, format) in IMAGES {
            lab.ok(&format!("qemu-img convert -f {format} -O raw {name} same.img"));
            compare(&lab, (name, format), ("same.img", "raw"), &["", "-q"]);
            compare(&lab, ("same.img", "raw"), (name, format), &["", "-q"]);
            // A byte, at another place each time; and another length.
            let len = fs::metadata(lab.path("same.img")).expect("metadata").len();
            let file = File::options().write(true).open(lab.path("same.img")).expect("a file");
            for _ in 0..5 {
                file.write_all_at(&[lab.rng.u8(..)], lab.rng.u64(0..len)).expect("a byte");
                compare(&lab, (name, format), ("same.img", "raw"), &["", "-q"]);
            }
            file.set_len(len + 70_000).expect("another length");
            compare(&lab, (name, format), ("same.img", "raw"), &["", "-s"]);
            lab.ok(&format!("qemu-img convert -f {format} -O raw {name} same.img"));
            let file = File::options().write(true).open(lab.path("same.img")).expect("a file");
            file.set_len(len + 70_000).expect("another length");
            compare(&lab, (name, format), ("same.img", "raw"), &["", "-q", "-s"]);
            file.write_all_at(b"x", len + 66_000).expect("a byte");
            compare(&lab, (name, format), ("same.img", "raw"), &["", "-q"]);
            compare(&lab, ("same.img", "raw"), (name, format), &["", "-q"]);
        }
        // What is stored and what is a hole.
        let raw = |name| (name, "raw");
        fs::copy(lab.path("base.img"), lab.path("same.img")).expect("a copy");
        assert!(
            Command::new("cp")
                .args(["--sparse=always"])
                .arg(lab.path("base.img"))
                .arg(lab.path("sparse.img"))
                .status()
                .is_ok_and(|status| status.success())
        );
        compare(&lab, raw("same.img"), raw("same.img"), &["-s"]);
        compare(&lab, raw("base.img"), raw("sparse.img"), &["", "-s"]);
        // What cannot be opened.
        compare(&lab, raw("nothing.img"), raw("base.img"), &["", "-q"]);
        compare(&lab, raw("base.img"), raw("nothing.img"), &[""]);
        compare(&lab, ("base.img", "qcow2"), raw("base.img"), &[""]);
    }
}

/// What is in a JSON object, by key.
fn object(text: &str) -> BTreeMap<String, Value> {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn raw_images_are_measured_alike() {
    for lab in Lab::all("raw_images_are_measured_alike") {
        let mut lines: Vec<String> = ["0", "1", "512", "1000", "6G", "1.5T"]
            .iter()
            .map(|size| format!("--size {size}"))
            .collect();
        lines.extend(IMAGES.iter().map(|(name, format)| format!("-f {format} {name}")));
        for line in lines {
            let line = format!("measure -O raw {line}");
            let (ours, theirs) = (lab.ours_ok(&line), lab.theirs(&line));
            assert_eq!(ours, theirs.out, "{line}");
            let line = format!("{line} --output=json");
            let (ours, mut theirs) = (object(&lab.ours_ok(&line)), object(&lab.theirs(&line).out));
            // Persistent bitmaps, which nobody here has.
            theirs.remove("bitmaps");
            assert_eq!(ours, theirs, "{line}");
        }
    }
}

#[test]
fn a_measured_add_cow_disk_is_as_long_as_foretold() {
    for lab in Lab::all("a_measured_add_cow_disk_is_as_long_as_foretold") {
        for (name, format) in IMAGES {
            for options in ["", "-o cluster_size=64k", "-o cluster_size=2M"] {
                let line = format!("{options} -f {format} -O add-cow {name}");
                let measured = object(&lab.ours_ok(&format!("measure --output=json {line}")));
                lab.ours_ok(&format!("convert --force {line} new.add-cow"));
                let len = |name| fs::metadata(lab.path(name)).expect("metadata").len();
                let found = Value::from(len("new.add-cow") + len("new.raw"));
                assert_eq!(measured["required"], found, "{line}");
                assert_eq!(measured["fully-allocated"], found, "{line}");
            }
        }
    }
}

/// The entries of a map, neighbours of one kind merged: the tools split them in other places. Only
/// we look for holes inside the clusters of the first `formatted` layers, those that are not raw;
/// here they count as the data that the tables say they are. `keys`: what tells one kind from
/// another.
fn pieces(map: &str, formatted: u64, keys: &[&str]) -> Vec<(u64, u64, Vec<Value>)> {
    let entries: Vec<Value> = serde_json::from_str(map).expect("JSON");
    let mut pieces: Vec<(u64, u64, Vec<Value>)> = Vec::new();
    for mut entry in entries {
        let in_tables = entry["depth"].as_u64().is_some_and(|depth| depth < formatted);
        if in_tables && entry["present"] == true && entry.get("offset").is_some() {
            (entry["zero"], entry["data"]) = (false.into(), true.into());
        }
        let kind: Vec<Value> = keys.iter().filter_map(|key| entry.get(*key).cloned()).collect();
        let (start, len) = (entry["start"].as_u64(), entry["length"].as_u64());
        let (start, len) = (start.expect("a number"), len.expect("a number"));
        // Where a raw file ends inside a sector they count all of that.
        let end = (start + len).next_multiple_of(512);
        let start = start.next_multiple_of(512);
        match pieces.last_mut() {
            Some((_, last_end, last)) if *last == kind && *last_end == start => *last_end = end,
            _ => pieces.push((start, end, kind)),
        }
    }
    pieces
}

#[test]
fn images_are_mapped_alike() {
    for lab in Lab::all("images_are_mapped_alike") {
        for (name, format) in IMAGES {
            let line = format!("map --output=json -f {format} {name}");
            let (ours, theirs) = (lab.ours_ok(&line), lab.ok(&format!("qemu-img {line}")));
            let formatted = match name {
                "base.img" | "odd.img" => 0,
                "top.qcow2" => 2,
                _ => 1,
            };
            let mut keys = vec!["depth", "present", "zero", "data"];
            // Version 7 does not tell what is compressed.
            if theirs.contains("\"compressed\"") {
                keys.push("compressed");
            }
            let ours = pieces(&ours, formatted, &keys);
            let mut theirs = pieces(&theirs, 0, &keys);
            if name == "odd.img" {
                // They round up to sectors, and show zeros behind the end; we round down.
                theirs.last_mut().expect("a piece").1 -= 512;
            }
            assert_eq!(ours, theirs, "{line}");
        }
    }
}

#[test]
fn info_has_the_same_keys_and_values() {
    let keys = [
        "virtual-size",
        "filename",
        "format",
        "actual-size",
        "cluster-size",
        "backing-filename",
        "full-backing-filename",
        "backing-filename-format",
        "dirty-flag",
        "compressed",
        "encrypted",
    ];
    for lab in Lab::all("info_has_the_same_keys_and_values") {
        for (name, format) in IMAGES {
            let line = format!("info --output=json -f {format} {name}");
            let (ours, theirs) = (object(&lab.ours_ok(&line)), object(&lab.theirs(&line).out));
            for key in keys {
                let mut expected = theirs.get(key).cloned();
                if name == "odd.img" && key == "virtual-size" {
                    // They round up, and show zeros behind the end; we count whole sectors.
                    expected = expected.and_then(|size| Some((size.as_u64()? - 512).into()));
                }
                assert_eq!(ours.get(key), expected.as_ref(), "{line}: {key}");
            }
        }
    }
}

#[test]
fn checks_have_the_same_exit_codes() {
    for lab in Lab::all("checks_have_the_same_exit_codes") {
        let codes = |ours: &str, theirs: &str, expected: i32| {
            let (ours, theirs) = (lab.ours(ours), lab.theirs(theirs));
            assert_eq!((ours.code, theirs.code), (Some(expected), Some(expected)), "{ours:?}");
        };
        let poke = |name: &str, offset: u64, bytes: &[u8]| {
            let file = File::options().write(true).open(lab.path(name)).expect("a file");
            file.write_all_at(bytes, offset).expect("bytes");
        };
        lab.ours_ok("create -q -b base.img -F raw --cluster-size 64k disk.add-cow 1M");
        lab.ok("qemu-img create -q -f qcow2 disk.qcow2 1M");
        codes("check disk.add-cow", "check -f qcow2 disk.qcow2", 0);
        codes("check nothing.add-cow", "check -f qcow2 nothing.qcow2", 1);
        codes("check base.img", "check -f raw base.img", 63);
        codes("check -f raw base.img", "check -f raw base.img", 63);
        // A bit behind the end; a cluster that nobody refers to.
        poke("disk.add-cow", 65_536 + 2, &[1]);
        let refcounts = lab.bytes("disk.qcow2");
        let table = u64::from_be_bytes(refcounts[48..56].try_into().expect("8 bytes"));
        let table = usize::try_from(table).expect("small");
        let block = u64::from_be_bytes(refcounts[table..table + 8].try_into().expect("8 bytes"));
        poke("disk.qcow2", block + 2 * 20, &[0, 1]);
        let qcow2 = File::options().write(true).open(lab.path("disk.qcow2")).expect("a file");
        qcow2.set_len(21 << 16).expect("a length with cluster 20");
        codes("check disk.add-cow", "check -f qcow2 disk.qcow2", 3);
        codes("check -r leaks disk.add-cow", "check -r leaks -f qcow2 disk.qcow2", 0);
        codes("check disk.add-cow", "check -f qcow2 disk.qcow2", 0);
        // A file that ends inside its bitmap; a table entry that leads nowhere.
        let side = File::options().write(true).open(lab.path("disk.add-cow")).expect("a file");
        side.set_len(65_537).expect("a length");
        let l1 = u64::from_be_bytes(refcounts[40..48].try_into().expect("8 bytes"));
        poke("disk.qcow2", l1, &[0x80, 0, 0, 0, 0, 0, 1, 0]);
        codes("check disk.add-cow", "check -f qcow2 disk.qcow2", 2);
    }
}
