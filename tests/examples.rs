//! Does the manual tell the truth? Every example in `docs/addcow.md` and `docs/addcowd.md` is run.
//!
//! An example is an indented line `$ COMMAND` with, below it, what it prints; `...` stands for any
//! text in a line, or on a line of its own for any lines. A command that fails is followed by a
//! line `[exit N]`. The examples of one `##` section run one after the other in one folder, which a
//! comment `<!-- setup` in front of them fills: a shell script that has the functions of
//! `tests/tool/prelude.sh`. A setup above the first section is for all of them.

#[path = "common/shell.rs"]
mod shell;

use std::fs;
use std::path::Path;

use shell::run_script;

/// One command of the page and what it should print.
#[derive(Debug, Default)]
struct Example {
    /// Number of its line in the page.
    line: usize,
    /// What a reader would type.
    command: String,
    /// The lines below it.
    expected: Vec<String>,
}

/// What stands below one `##` heading.
#[derive(Debug, Default)]
struct Section {
    /// Its heading.
    title: String,
    /// The scripts that fill the folder.
    setup: String,
    /// Its examples, in order.
    examples: Vec<Example>,
}

/// The sections of a page; the first is what stands above all headings.
fn sections(page: &str) -> Vec<Section> {
    let mut sections = vec![Section::default()];
    let mut in_setup = false;
    // Whether the line before was part of an example.
    let mut in_example = false;
    for (number, line) in (1..).zip(page.lines()) {
        let section = sections.last_mut().unwrap();
        if in_setup {
            in_setup = line != "-->";
            if in_setup {
                section.setup.push_str(line);
                section.setup.push('\n');
            }
        } else if line == "<!-- setup" {
            in_setup = true;
        } else if let Some(title) = line.strip_prefix("## ") {
            sections.push(Section { title: title.to_owned(), ..Section::default() });
        } else if let Some(command) = line.strip_prefix("    $ ") {
            let (command, expected) = (command.to_owned(), Vec::new());
            section.examples.push(Example { line: number, command, expected });
            in_example = true;
            continue;
        } else if in_example && let Some(text) = line.strip_prefix("    ") {
            let example = section.examples.last_mut().unwrap();
            match example.command.strip_suffix('\\') {
                Some(start) if example.expected.is_empty() => {
                    example.command = format!("{start}{}", text.trim_start());
                }
                _ => example.expected.push(text.to_owned()),
            }
            continue;
        }
        in_example = false;
    }
    assert!(!in_setup, "a setup without end");
    sections
}

/// Whether `text` is `pattern`, in which `...` stands for anything.
fn line_matches(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once("...") else { return pattern == text };
    let Some(mut tail) = text.strip_prefix(start) else { return false };
    loop {
        if line_matches(rest, tail) {
            return true;
        }
        let mut chars = tail.chars();
        if chars.next().is_none() {
            return false;
        }
        tail = chars.as_str();
    }
}

/// Whether `lines` are `pattern`, in which a line `...` stands for any lines.
fn lines_match(pattern: &[String], lines: &[&str]) -> bool {
    match (pattern.split_first(), lines.split_first()) {
        (None, None) => true,
        (Some((first, rest)), _) if first == "..." => {
            (0..=lines.len()).any(|skipped| lines_match(rest, &lines[skipped..]))
        }
        (Some((first, pattern)), Some((line, lines))) => {
            line_matches(first, line) && lines_match(pattern, lines)
        }
        _ => false,
    }
}

/// Runs the examples of a section; says which of them is wrong.
fn run(section: &Section, setup: &str) -> Vec<String> {
    let parent = tempfile::tempdir().unwrap();
    let work = parent.path().join("work");
    fs::create_dir(&work).unwrap();
    let output = parent.path().join("output");
    let script = format!("{setup}{}", section.setup);
    let (printed, status) = run_script(&script, &work, &output);
    assert_eq!((printed.as_str(), status.as_str()), ("", "exit status: 0"), "{}", section.title);
    let mut complaints = Vec::new();
    for Example { line, command, expected } in &section.examples {
        let (mut printed, status) = run_script(command, &work, &output);
        match status.strip_prefix("exit status: ") {
            Some("0") => {}
            Some(code) => printed.push_str(&format!("[exit {code}]\n")),
            None => printed.push_str(&format!("[{status}]\n")),
        }
        let lines: Vec<&str> = printed.lines().map(str::trim_end).collect();
        if !lines_match(expected, &lines) {
            let page = expected.join("\n");
            complaints.push(format!(
                "line {line}: $ {command}\n--- the page:\n{page}\n--- printed:\n{printed}"
            ));
        }
    }
    complaints
}

/// Runs all examples of a page, of which there must be so many.
fn check_page(name: &str, at_least: usize) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let sections = sections(&fs::read_to_string(path).unwrap());
    let setup = &sections[0].setup;
    assert!(sections[0].examples.is_empty(), "examples above the first section");
    let mut complaints = Vec::new();
    for section in sections.iter().filter(|section| !section.examples.is_empty()) {
        complaints.extend(run(section, setup));
    }
    assert!(complaints.is_empty(), "\n{name}\n{}", complaints.join("\n"));
    let count: usize = sections.iter().map(|section| section.examples.len()).sum();
    assert!(count >= at_least, "{name}: only {count} examples");
}

#[test]
fn the_examples_of_the_tools_manual_print_what_it_shows() {
    check_page("docs/addcow.md", 10);
}

#[test]
fn the_examples_of_the_daemons_manual_print_what_it_shows() {
    check_page("docs/addcowd.md", 1);
}

#[test]
fn three_dots_stand_for_any_text_or_any_lines() {
    let owned = |lines: &[&str]| lines.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert!(line_matches("disk size: ...", "disk size: 4 KiB"));
    assert!(line_matches("a...b...c", "aXbbYc"));
    assert!(!line_matches("a...b", "aXbY"));
    assert!(!line_matches("a", "ab"));
    assert!(lines_match(&owned(&["a", "...", "z"]), &["a", "b", "c", "z"]));
    assert!(lines_match(&owned(&["a", "..."]), &["a"]));
    assert!(!lines_match(&owned(&["a", "...", "z"]), &["a", "z", "b"]));
    assert!(!lines_match(&owned(&["a"]), &[]));
    assert!(!lines_match(&owned(&[]), &["a"]));
}

#[test]
fn a_page_is_split_into_sections_commands_and_what_they_print() {
    let page = [
        "# T\n\n<!-- setup\nall\n-->",
        "## one\ntext\n\n    no example\n\n    $ a \\\n        b\n    printed\n    $ c",
        "\n    no output\n\n<!-- setup\nmine\n-->\n## two\n    $ d\n    x\n",
    ];
    let sections = sections(&page.join("\n"));
    let titles: Vec<&str> = sections.iter().map(|section| section.title.as_str()).collect();
    assert_eq!(titles, ["", "one", "two"]);
    assert_eq!((sections[0].setup.as_str(), sections[1].setup.as_str()), ("all\n", "mine\n"));
    let found: Vec<_> = sections
        .iter()
        .flat_map(|section| &section.examples)
        .map(|example| (example.line, example.command.as_str(), example.expected.join("|")))
        .collect();
    assert_eq!(
        found,
        [(11, "a b", "printed".into()), (14, "c", String::new()), (22, "d", "x".to_owned())]
    );
}
