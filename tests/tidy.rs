//! The house rules, held by a test: which module may use which, where `unsafe` may live, how long
//! files and functions may be, and that `docs/architecture.md` names functions that exist.
//!
//! Reads the sources as text. What it cannot see (macros that build paths) does not occur.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Which modules of the crate each one may use. The order is that of the layers.
const MAY_USE: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("sync", &[]),
    ("executor", &["sync"]),
    ("log_limit", &[]),
    ("helper", &["executor"]),
    ("sandbox", &["helper"]),
    ("seeded", &[]),
    ("format", &["units"]),
    ("storage", &["units"]),
    ("image", &["units", "format", "storage", "executor", "helper", "sync", "seeded"]),
    ("jobs", &["units", "format", "storage", "image", "executor", "seeded"]),
    ("virtio", &["units", "storage", "image", "log_limit"]),
    ("vhost_user", &["executor", "sandbox", "storage", "image", "virtio", "log_limit", "sync"]),
    (
        "cli",
        &[
            "units",
            "executor",
            "sandbox",
            "format",
            "storage",
            "image",
            "jobs",
            "virtio",
            "vhost_user",
        ],
    ),
    ("bin", &["cli"]),
];

/// The files with `unsafe`; each says at its top what for.
const UNSAFE_FILES: &[&str] = &[
    "src/sandbox/filter.rs",
    "src/sandbox/fork.rs",
    "src/storage/buffer.rs",
    "src/storage/fault_guard.rs",
    "src/storage/mapping.rs",
    "src/storage/restricted_ring.rs",
    "src/storage/uring.rs",
    "src/vhost_user/bell.rs",
    "src/vhost_user/exit_event.rs",
    "src/virtio/guest_memory.rs",
    "tests/sandbox/probe.rs",
    "tests/bench/lane.rs",
    "tests/bench/memory.rs",
    "tests/allocations.rs",
    "tests/blkio.rs",
];

/// Longest source file in lines.
const MAX_FILE: usize = 700;

/// Longest function in lines, signature included.
const MAX_FUNCTION: usize = 70;

/// Longest line in columns.
const MAX_COLUMNS: usize = 100;

/// The files below `folder` with this ending.
fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == ending) {
                found.push(path.strip_prefix(root).unwrap().to_owned());
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no .{ending} files in {folder}");
    found
}

/// The text of a file of the project.
fn read(path: &Path) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The top-level module that a source file belongs to.
fn module_of(path: &Path) -> String {
    let name = path.components().nth(1).unwrap().as_os_str().to_str().unwrap();
    name.trim_end_matches(".rs").to_owned()
}

/// The code of a file up to its tests, without comments.
fn code(text: &str) -> String {
    let end = text.find("#[cfg(test)]").unwrap_or(text.len());
    let lines = text[..end].lines().map(|line| match line.find("//") {
        Some(start) if !line[..start].contains('"') => &line[..start],
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Fails with every complaint at once.
fn report(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn modules_use_only_what_is_below_them() {
    let table: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let mut complaints = Vec::new();
    for path in files("src", "rs") {
        let module = module_of(&path);
        if module == "lib" {
            continue;
        }
        let Some(allowed) = table.get(module.as_str()) else {
            complaints.push(format!("{}: module {module} is not in the table", path.display()));
            continue;
        };
        let code = code(&read(&path));
        for prefix in ["crate::", "addcow::"] {
            for (at, _) in code.match_indices(prefix) {
                let rest = &code[at + prefix.len()..];
                let used: String =
                    rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let is_module = table.contains_key(used.as_str());
                if is_module && used != module && !allowed.contains(&used.as_str()) {
                    complaints.push(format!("{}: {module} uses {used}", path.display()));
                }
                if used.is_empty() {
                    complaints.push(format!("{}: import modules one by one", path.display()));
                }
            }
        }
    }
    report(&complaints);
}

#[test]
fn unsafe_lives_in_few_files_that_say_why() {
    let mut complaints = Vec::new();
    for path in files("src", "rs").into_iter().chain(files("tests", "rs")) {
        let text = read(&path);
        let has = text.lines().map(str::trim_start).filter(|l| !l.starts_with("//")).any(|line| {
            ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|word| line.contains(word))
        });
        let name = path.to_str().unwrap();
        let listed = UNSAFE_FILES.contains(&name);
        if has != listed && name != "tests/tidy.rs" {
            complaints.push(format!("{name}: unsafe: {has}, listed: {listed}"));
        }
        if listed && !(text.contains("unsafe_code,") && text.contains("reason =")) {
            complaints.push(format!("{name}: no #![expect(unsafe_code, reason = ...)]"));
        }
    }
    report(&complaints);
}

#[test]
fn guest_memory_never_becomes_a_slice() {
    let mut complaints = Vec::new();
    for path in files("src", "rs") {
        let code = code(&read(&path));
        // What would make a reference to memory that a guest writes while we look at it.
        for word in ["from_raw_parts", "get_slice", "as_volatile_slice", "get_host_address"] {
            if code.contains(word) {
                complaints.push(format!("{}: {word}", path.display()));
            }
        }
    }
    report(&complaints);
}

#[test]
fn files_and_functions_fit() {
    let mut complaints = Vec::new();
    for path in files("src", "rs").into_iter().chain(files("tests", "rs")) {
        let text = read(&path);
        let name = path.display();
        if text.lines().count() > MAX_FILE {
            complaints.push(format!("{name}: {} lines", text.lines().count()));
        }
        if !text.starts_with("//!") {
            complaints.push(format!("{name}: no header that says what it is"));
        }
        for (number, line) in (1..).zip(text.lines()) {
            if line.chars().count() > MAX_COLUMNS {
                complaints.push(format!("{name}:{number}: longer than {MAX_COLUMNS} columns"));
            }
            if !line.is_ascii() {
                complaints.push(format!("{name}:{number}: not ASCII"));
            }
        }
        long_functions(&text, &mut |line, function, length| {
            complaints.push(format!("{name}:{line}: {function} has {length} lines"));
        });
    }
    report(&complaints);
}

/// Calls `found` with line, name and length of every function that is too long.
fn long_functions(text: &str, found: &mut impl FnMut(usize, &str, usize)) {
    let mut open: Option<(usize, String, String)> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let indent: String = line.chars().take_while(|c| *c == ' ').collect();
        let word = line.split("fn ").nth(1).filter(|_| !line.trim_start().starts_with("//"));
        match (&open, word) {
            (None, Some(rest)) if line.trim_end().ends_with(['{', '(', '>', ',']) => {
                let name = rest.split(['(', '<']).next().unwrap_or_default();
                open = Some((number, name.to_owned(), indent));
            }
            (Some((start, name, indent)), _) if line.starts_with(&format!("{indent}}}")) => {
                let length = number - start + 1;
                if length > MAX_FUNCTION {
                    found(*start, name, length);
                }
                open = None;
            }
            _ => {}
        }
    }
}

#[test]
fn nothing_unfinished_is_left_and_only_the_command_line_prints() {
    let mut complaints = Vec::new();
    for path in files("src", "rs") {
        let code = code(&read(&path));
        let prints = ["println!", "eprintln!", "print!("].iter().any(|word| code.contains(word));
        if prints && module_of(&path) != "cli" {
            complaints.push(format!("{}: prints", path.display()));
        }
        for word in ["todo!", "unimplemented!", "dbg!", "TODO", "FIXME"] {
            if code.contains(word) {
                complaints.push(format!("{}: {word}", path.display()));
            }
        }
    }
    report(&complaints);
}

#[test]
fn every_source_file_is_part_of_the_crate() {
    let mut complaints = Vec::new();
    for path in files("src", "rs") {
        let stem = path.file_stem().unwrap().to_str().unwrap();
        if ["lib", "mod"].contains(&stem) || module_of(&path) == "bin" {
            continue;
        }
        let parent = path.parent().unwrap();
        let owner =
            if parent == Path::new("src") { "src/lib.rs".into() } else { parent.join("mod.rs") };
        let declared = read(&owner).lines().any(|line| {
            let line = line.trim();
            line.ends_with(&format!("mod {stem};"))
        });
        if !declared {
            complaints.push(format!("{}: not declared in {}", path.display(), owner.display()));
        }
    }
    report(&complaints);
}

#[test]
fn the_paths_in_the_architecture_page_exist() {
    let page = read(Path::new("docs/architecture.md"));
    let mut checked = 0;
    let mut complaints = Vec::new();
    // Lines like "1 vhost_user/queue.rs     Worker::take    what it does".
    for line in page.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, file, function, ..] = words[..] else { continue };
        if !file.ends_with(".rs") || line.starts_with('|') {
            continue;
        }
        checked += 1;
        let path = Path::new("src").join(file);
        let name = function.rsplit("::").next().unwrap();
        let exists = Path::new(env!("CARGO_MANIFEST_DIR")).join(&path).exists();
        if !exists || !read(&path).contains(&format!("fn {name}")) {
            complaints.push(format!("{file}: no function {name}"));
        }
    }
    assert!(checked >= 12, "only {checked} steps found in docs/architecture.md");
    report(&complaints);
}
