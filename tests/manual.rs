//! Is the manual complete, and do shells and man(1) understand what is made of it?
//!
//! The definitions of the command lines are the measure: every verb and option that `--help` shows
//! must be on the man pages and in `docs`, and every verb needs an example there. groff and bash
//! read what the programs make.

#[path = "common/shell.rs"]
mod shell;

use std::fs;
use std::path::Path;
use std::process::Command as Process;

use addcow::cli::manual::{Page, pages};
use addcow::cli::{daemon, tool};
use clap::{Arg, Command};
use shell::{command, have};

/// The sections that every page has, in this order; some have more.
const SECTIONS: [&str; 8] =
    ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "FILES", "EXAMPLES", "SEE ALSO"];

/// The longest line of an example, with its indentation: `--help` must not break it.
const MAX_EXAMPLE: usize = 80;

/// The definition of the tool with everything filled in, and those of its verbs in help.
fn tool_and_verbs() -> (Command, Vec<Command>) {
    let mut tool = tool::command();
    tool.build();
    let verbs = tool.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned().collect();
    (tool, verbs)
}

/// The ways to write an option: `-f`, `--format`; the name of what is no option.
fn names(argument: &Arg) -> Vec<String> {
    let short = argument.get_short().map(|short| format!("-{short}"));
    let long = argument.get_long().map(|long| format!("--{long}"));
    let mut names: Vec<String> = short.into_iter().chain(long).collect();
    if names.is_empty() {
        let values = argument.get_value_names().expect("has a name");
        names.extend(values.iter().map(ToString::to_string));
    }
    names
}

/// The arguments that help shows.
fn arguments(command: &Command) -> Vec<&Arg> {
    command.get_arguments().filter(|argument| !argument.is_hide_set()).collect()
}

/// A page's text with the escapes taken out.
fn plain(page: &Page) -> String {
    let text = String::from_utf8(page.text.clone()).unwrap();
    text.replace("\\-", "-").replace("\\fB", "").replace("\\fI", "").replace("\\fR", "")
}

#[test]
fn every_verb_and_every_option_has_its_place_on_a_page() {
    let (tool, verbs) = tool_and_verbs();
    let pages = pages(tool.clone(), daemon::command()).unwrap();
    let mut commands = vec![("addcow".to_owned(), tool)];
    commands.extend(verbs.into_iter().map(|verb| (format!("addcow-{}", verb.get_name()), verb)));
    commands.push(("addcowd".to_owned(), daemon::command()));
    assert_eq!(commands.len(), pages.len());
    let mut complaints = Vec::new();
    for (page, (name, command)) in pages.iter().zip(&commands) {
        assert_eq!(page.name, *name);
        let text = plain(page);
        let mut rest = text.as_str();
        for section in SECTIONS {
            let heading = [format!("\n.SH {section}\n"), format!("\n.SH \"{section}\"\n")];
            match heading.iter().find_map(|heading| rest.split_once(heading.as_str())) {
                Some((_, after)) => rest = after,
                None => complaints.push(format!("{name}: no {section}, or out of order")),
            }
        }
        let options = text.split("\n.SH OPTIONS\n").nth(1).unwrap_or_default();
        for argument in arguments(command) {
            let header = names(argument).join(", ");
            let brackets =
                [format!("\n{header}"), format!("\n<{header}>"), format!("\n[{header}]")];
            if !brackets.iter().any(|header| options.contains(header)) {
                complaints.push(format!("{name}: no {header}"));
            }
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn the_pages_in_docs_name_every_option_and_have_an_example_of_every_verb() {
    let read = |name| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let page = read("docs/addcow.md");
    let (_, verbs) = tool_and_verbs();
    let mut complaints = Vec::new();
    for verb in verbs {
        let name = verb.get_name();
        let Some((_, chapter)) = page.split_once(&format!("\n## {name}\n")) else {
            complaints.push(format!("docs/addcow.md: no chapter '## {name}'"));
            continue;
        };
        let chapter = chapter.split("\n## ").next().unwrap();
        let examples = chapter.split("\n### Examples\n").nth(1).unwrap_or_default();
        if !examples.contains(&format!("\n    $ addcow {name} ")) {
            complaints.push(format!("docs/addcow.md: ## {name}: no example below ### Examples"));
        }
        for line in examples.lines().filter(|line| line.starts_with("    $ addcow")) {
            if line.len() > MAX_EXAMPLE {
                complaints.push(format!("docs/addcow.md: ## {name}: use \\ in {line}"));
            }
        }
        // What is said before the first verb goes for all of them.
        let common = page.split("\n## create\n").next().unwrap();
        for option in arguments(&verb).into_iter().filter_map(Arg::get_long) {
            let option = format!("--{option}");
            let is_named = [chapter, common].iter().any(|text| names_option(text, &option));
            if !is_named && option != "--help" {
                complaints.push(format!("docs/addcow.md: ## {name}: nothing about {option}"));
            }
        }
    }
    let page = read("docs/addcowd.md");
    for option in arguments(&daemon::command()).into_iter().filter_map(Arg::get_long) {
        let option = format!("--{option}");
        if !names_option(&page, &option) && !["--help", "--version"].contains(&option.as_str()) {
            complaints.push(format!("docs/addcowd.md: nothing about {option}"));
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// Whether a text names that option, and not only one that starts with the same letters.
fn names_option(text: &str, option: &str) -> bool {
    text.match_indices(option).any(|(at, _)| {
        let next = text[at + option.len()..].chars().next();
        !next.is_some_and(|c| c.is_ascii_alphanumeric() || c == '-')
    })
}

/// Runs a script and returns what it prints. It must print no error.
fn output_of(script: &str, folder: &Path) -> String {
    let output = command("bash", folder).args(["-euc", script]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && error.is_empty(), "{script}\n{error}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn man_shows_every_page_without_a_warning() {
    if !have("groff", "man_shows_every_page_without_a_warning") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let paths = output_of("addcow man share/man", folder.path());
    for path in paths.lines() {
        // All warnings; the width of a terminal; no colours, bold or underlining.
        let options = ["-t", "-man", "-Tascii", "-ww", "-rLL=80n", "-P-cbou"];
        let output = Process::new("groff").args(options).arg(folder.path().join(path)).output();
        let output = output.unwrap();
        let (shown, error) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && error.is_empty(), "{path}: {error}");
        for section in SECTIONS {
            let has = shown.lines().any(|line| line == section);
            assert!(has, "{path}: no {section} in\n{shown}");
        }
    }
    assert!(paths.lines().count() > 5, "{paths}");
    let error = command("addcow", folder.path()).args(["man", "/dev/null"]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&error.stderr),
        "addcow: cannot write '/dev/null/man1/addcow.1': Not a directory\n"
    );
}

#[test]
fn bash_completes_verbs_options_and_values() {
    if !have("bash", "bash_completes_verbs_options_and_values") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // As bash calls it: the program, the word at the cursor, and the word before.
    let complete = |program: &str, words: &[&str]| {
        let (current, before) = (words.last().unwrap(), words[words.len() - 2]);
        let script = format!(
            "addcow completions bash {program} > script; . ./script
            complete -p {program} > /dev/null
            COMP_WORDS=({}); COMP_CWORD={}
            _{program} {program} '{current}' '{before}'
            printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            words.join(" "),
            words.len() - 1
        );
        let printed = output_of(&script, folder.path());
        printed.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(complete("addcow", &["addcow", "cre"]), ["create"]);
    assert_eq!(complete("addcow", &["addcow", "map", "--st"]), ["--start-offset"]);
    assert_eq!(complete("addcow", &["addcow", "info", "--output", "j"]), ["json"]);
    assert_eq!(complete("addcowd", &["addcowd", "--blk"]), ["--blk-file"]);
    assert_eq!(complete("addcowd", &["addcowd", "--cache", "w"]), ["writethrough"]);
    let (_, verbs) = tool_and_verbs();
    let mut expected: Vec<&str> = verbs.iter().map(Command::get_name).collect();
    let mut offered = complete("addcow", &["addcow", "''"]);
    offered.retain(|word| !word.starts_with('-'));
    expected.sort_unstable();
    offered.sort_unstable();
    assert_eq!(offered, expected, "neither less nor what is hidden");
}

#[test]
fn other_shells_have_a_script_that_names_every_verb() {
    let folder = tempfile::tempdir().unwrap();
    let (_, verbs) = tool_and_verbs();
    for shell in ["elvish", "fish", "powershell", "zsh"] {
        let script = output_of(&format!("addcow completions {shell}"), folder.path());
        for verb in &verbs {
            assert!(script.contains(verb.get_name()), "{shell}: no {}", verb.get_name());
        }
        assert!(!script.contains("man pages"), "{shell}: names what is hidden");
    }
}
