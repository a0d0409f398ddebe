//! May the programs be given away with everything that is linked into them, and is each dependency
//! one that somebody decided on?
//!
//! Asks cargo what the programs and their tests are made of. The rules are those of `.deny.toml`,
//! which `cargo deny` reads too (scripts/dependencies); this needs no tool that a machine may lack.
//! Not here: known vulnerabilities, whose list is not on this machine.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The only place where packages may come from.
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// A file of the project.
fn read(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).expect("a file of ours")
}

/// What cargo says about every package on this platform, with every feature.
fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--all-features"])
        .args(["--filter-platform", &platform])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The licences that are allowed.
fn allowed() -> BTreeSet<String> {
    let rules = read(".deny.toml");
    let (_, list) = rules.split_once("\n[licenses]\n").expect("a section");
    let (_, list) = list.split_once("\nallow = [").expect("a list");
    let (list, _) = list.split_once(']').expect("its end");
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The words of a licence expression; older ones have `/` for `OR`.
fn words(expression: &str) -> Vec<String> {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    spaced.split_whitespace().map(str::to_owned).collect()
}

/// Whether an expression can be satisfied with these licences. `OR` binds less than `AND`; a
/// licence WITH an exception asks for no more than without it.
fn is_allowed(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let words = words(expression);
    let mut rest = &words[..];
    let result = either(&mut rest, allowed);
    assert!(rest.is_empty(), "'{expression}' is not understood");
    result
}

/// `A OR B OR ...`
fn either(rest: &mut &[String], allowed: &BTreeSet<String>) -> bool {
    let mut result = both(rest, allowed);
    while rest.first().is_some_and(|word| word == "OR") {
        *rest = &rest[1..];
        // Both sides are read in any case.
        result |= both(rest, allowed);
    }
    result
}

/// `A AND B AND ...`
fn both(rest: &mut &[String], allowed: &BTreeSet<String>) -> bool {
    let mut result = one(rest, allowed);
    while rest.first().is_some_and(|word| word == "AND") {
        *rest = &rest[1..];
        result &= one(rest, allowed);
    }
    result
}

/// A licence, perhaps with an exception, or an expression in parentheses.
fn one(rest: &mut &[String], allowed: &BTreeSet<String>) -> bool {
    let (word, after) = rest.split_first().expect("a licence");
    *rest = after;
    if word == "(" {
        let result = either(rest, allowed);
        assert_eq!(rest.first().map(String::as_str), Some(")"));
        *rest = &rest[1..];
        return result;
    }
    if rest.first().is_some_and(|word| word == "WITH") {
        *rest = &rest[2..];
    }
    allowed.contains(word)
}

#[test]
fn licence_expressions_are_understood() {
    let allowed: BTreeSet<String> = ["MIT", "BSD-3-Clause"].map(str::to_owned).into();
    let rows = [
        ("MIT", true),
        ("GPL-3.0-only", false),
        ("GPL-3.0-only OR MIT", true),
        ("Apache-2.0/MIT", true),
        ("MIT AND GPL-3.0-only", false),
        ("MIT AND BSD-3-Clause", true),
        ("GPL-2.0-only AND MIT OR BSD-3-Clause", true),
        ("GPL-2.0-only AND (MIT OR BSD-3-Clause)", false),
        ("(MIT OR Apache-2.0) AND BSD-3-Clause", true),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", false),
        ("Apache-2.0 WITH LLVM-exception OR Apache-2.0", false),
        ("MIT WITH any-exception", true),
    ];
    for (expression, expected) in rows {
        assert_eq!(is_allowed(expression, &allowed), expected, "{expression}");
    }
}

#[test]
fn every_package_comes_from_one_place_under_a_licence_that_goes_with_ours() {
    let (metadata, allowed) = (metadata(), allowed());
    assert!(allowed.contains("Apache-2.0") && !allowed.iter().any(|name| name.contains("GPL")));
    let resolved = metadata["resolve"]["nodes"].as_array().expect("nodes");
    let used: BTreeSet<&str> = resolved.iter().filter_map(|node| node["id"].as_str()).collect();
    let mut complaints = Vec::new();
    let mut checked = 0;
    for package in metadata["packages"].as_array().expect("packages") {
        let name = package["name"].as_str().expect("a name");
        if !package["id"].as_str().is_some_and(|id| used.contains(id)) {
            continue;
        }
        checked += 1;
        match package["license"].as_str() {
            Some(licence) if is_allowed(licence, &allowed) => {}
            licence => complaints.push(format!("{name}: licence {licence:?}")),
        }
        let source = package["source"].as_str();
        if name != env!("CARGO_PKG_NAME") && source != Some(CRATES_IO) {
            complaints.push(format!("{name}: from {source:?}"));
        }
    }
    assert!(checked > 50, "only {checked} packages");
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn every_direct_dependency_has_its_reason_in_the_decisions() {
    let page = read("docs/decisions/0005-dependencies.md");
    // "| a, b (tests) | for | licence |"
    let rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" |"));
    let named: BTreeSet<&str> = rows
        .flat_map(|(names, _)| names.split(", "))
        .map(|name| name.split(" (").next().expect("a name"))
        .collect();
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let ours = packages.iter().find(|package| package["name"] == env!("CARGO_PKG_NAME"));
    let direct = ours.expect("ourselves")["dependencies"].as_array().expect("dependencies");
    let direct: BTreeSet<&str> = direct.iter().filter_map(|one| one["name"].as_str()).collect();
    assert!(direct.len() > 20);
    let missing: Vec<_> = direct.difference(&named).collect();
    let left_over: Vec<_> = named.difference(&direct).filter(|name| **name != "crate").collect();
    assert!(missing.is_empty(), "docs/decisions/0005-dependencies.md has no row for {missing:?}");
    assert!(left_over.is_empty(), "docs/decisions/0005-dependencies.md has rows for {left_over:?}");
}
