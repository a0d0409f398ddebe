//! The manual of both programs, out of two places: what an option is called and does is in the
//! definitions of the command lines, all other prose in `docs/addcow.md` and `docs/addcowd.md`.
//!
//! Makes the man pages (one for each program and one for each verb), and the examples that a verb's
//! `--help` ends with. What this expects of a page in `docs`: a chapter (`## VERB`) for each verb;
//! `Exit status`, `Environment`, `Files` and `Examples` as headings below a chapter, or as chapters
//! for the whole program. Tables of options are left out: the definitions have them.
//!
//! Not here: whether the examples are true (`tests/examples.rs`).

mod groff;
mod markdown;

use std::io;

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use self::markdown::{Block, Span, blocks, spans};

/// The prose about `addcow`.
const TOOL: &str = include_str!("../../../docs/addcow.md");

/// The prose about `addcowd`.
const DAEMON: &str = include_str!("../../../docs/addcowd.md");

/// The name of the manual, in the middle of each page's first line.
const MANUAL: &str = "addcow manual";

/// Section of the manual for commands of everybody.
const COMMANDS: &str = "1";

/// Section of the manual for daemons.
const DAEMONS: &str = "8";

/// Headings that have their own place in a man page, in the order of those places.
const STANDARD_HEADINGS: [&str; 4] = ["Exit status", "Environment", "Files", "Examples"];

/// The heading of what the definitions of the command line say better.
const OPTIONS: &str = "Options";

/// A man page.
#[derive(Debug)]
pub struct Page {
    /// Its name, as `addcow-create`.
    pub name: String,
    /// The section of the manual that it belongs to.
    pub section: &'static str,
    /// Its text, for man(1).
    pub text: Vec<u8>,
}

/// What stands below a heading. What is above the first one has an empty heading.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    /// The heading.
    heading: String,
    /// The text below it, with the headings of lower levels.
    blocks: Vec<Block>,
}

/// The man pages for these two programs.
///
/// # Errors
/// None but those of a writer into memory.
pub fn pages(mut tool: Command, daemon: Command) -> io::Result<Vec<Page>> {
    tool.build();
    let visible = |verb: &&Command| !verb.is_hide_set();
    let verbs: Vec<Command> = tool.get_subcommands().filter(visible).cloned().collect();
    let is_verb = |part: &Part| verbs.iter().any(|verb| verb.get_name() == part.heading);
    let (chapters, common): (Vec<Part>, _) = parts(&blocks(TOOL), 2).into_iter().partition(is_verb);
    let page_of = |verb: &Command| (format!("{}-{}", tool.get_name(), verb.get_name()), COMMANDS);
    let (tool_page, daemon_page) =
        (("addcow".to_owned(), COMMANDS), ("addcowd".to_owned(), DAEMONS));
    let qemu = ("qemu-img".to_owned(), COMMANDS);

    let mut see_also: Vec<_> = verbs.iter().map(page_of).collect();
    see_also.extend([daemon_page.clone(), qemu.clone()]);
    let mut pages = vec![page(tool.clone(), tool_page.clone(), &common, &[], &see_also)?];
    for verb in &verbs {
        let chapter = chapters.iter().find(|chapter| chapter.heading == verb.get_name());
        let parts = chapter.map_or_else(Vec::new, |chapter| parts(&chapter.blocks, 3));
        let see_also = [tool_page.clone(), daemon_page.clone(), qemu.clone()];
        pages.push(page(verb.clone(), page_of(verb), &parts, &common, &see_also)?);
    }
    let parts = parts(&blocks(DAEMON), 2);
    pages.push(page(daemon, daemon_page, &parts, &[], &[tool_page, qemu])?);
    Ok(pages)
}

/// One page: what `parts` say about `command`, and for what they do not say, `common`.
fn page(
    command: Command,
    (name, section): (String, &'static str),
    parts: &[Part],
    common: &[Part],
    see_also: &[(String, &str)],
) -> io::Result<Page> {
    let has_verbs = command.has_subcommands();
    let man = Man::new(command.subcommand_help_heading("VERBS"));
    let mut text = Vec::new();
    if parts.iter().any(|part| groff::needs_preprocessor(&part.blocks)) {
        text.extend_from_slice(groff::PREPROCESSOR.as_bytes());
    }
    title(&name.to_uppercase(), section).to_writer(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    description(parts).to_writer(&mut text)?;
    if has_verbs {
        man.render_subcommands_section(&mut text)?;
    }
    man.render_options_section(&mut text)?;
    let mut roff = Roff::new();
    for heading in STANDARD_HEADINGS {
        let of = |parts: &[Part]| parts.iter().find(|part| part.heading == heading).cloned();
        // Examples of the whole tool are no examples of a verb.
        let part = of(parts).or_else(|| of(common).filter(|_| heading != "Examples"));
        if let Some(part) = part {
            roff.control("SH", [heading.to_uppercase().as_str()]);
            groff::write(&mut roff, &part.blocks);
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    let mut line = Vec::new();
    for (name, section) in see_also {
        if !line.is_empty() {
            line.push(roman(", "));
        }
        line.extend([bold(name), roman(format!("({section})"))]);
    }
    roff.text(line);
    roff.to_writer(&mut text)?;
    Ok(Page { name, section, text })
}

/// The first line. Not the one of `clap_mangen`, which loses an empty date, so that what follows is
/// taken for it; and a real one would make every build another one.
fn title(name: &str, section: &str) -> Roff {
    let version = concat!("addcow ", env!("CARGO_PKG_VERSION"));
    let mut roff = Roff::new();
    roff.control("TH", [name, section, "\"\"", version, MANUAL]);
    roff
}

/// The section DESCRIPTION: all parts that have no place of their own.
fn description(parts: &[Part]) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["DESCRIPTION"]);
    for Part { heading, blocks } in parts {
        if STANDARD_HEADINGS.contains(&heading.as_str()) || heading == OPTIONS {
            continue;
        }
        if !heading.is_empty() {
            roff.control("SS", [heading.as_str()]);
        }
        let mut blocks = blocks.clone();
        blocks.retain(|block| !is_table_of_options(block));
        groff::write(&mut roff, &blocks);
    }
    roff
}

/// Whether a block says what the definitions of the options say.
fn is_table_of_options(block: &Block) -> bool {
    let Block::Table(rows) = block else { return false };
    rows.first().and_then(|heading| heading.first()).is_some_and(|cell| cell == "option")
}

/// Cuts a page, or a chapter, at its headings of that level. The heading of the page is dropped.
fn parts(blocks: &[Block], level: usize) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut part = Part { heading: String::new(), blocks: Vec::new() };
    for block in blocks {
        match block {
            Block::Heading(1, _) => {}
            Block::Heading(found, text) if *found == level => {
                let next = Part { heading: text.clone(), blocks: Vec::new() };
                parts.push(std::mem::replace(&mut part, next));
            }
            _ => part.blocks.push(block.clone()),
        }
    }
    parts.push(part);
    parts
}

/// The examples of a verb for the end of its help, without what they print; empty if there are
/// none.
#[must_use]
pub fn examples(verb: &str) -> String {
    let chapters = parts(&blocks(TOOL), 2);
    let chapter = chapters.iter().find(|chapter| chapter.heading == verb);
    let parts = chapter.map_or_else(Vec::new, |chapter| parts(&chapter.blocks, 3));
    let mut text = String::new();
    for block in parts.iter().filter(|part| part.heading == "Examples").flat_map(|p| &p.blocks) {
        match block {
            Block::Paragraph(words) => {
                text.push_str("\n  ");
                text.extend(spans(words).into_iter().map(|(Span::Plain(t) | Span::Strong(t))| t));
                text.push('\n');
            }
            Block::Code(lines) => {
                for line in commands(lines) {
                    text.push_str("      ");
                    text.push_str(line);
                    text.push('\n');
                }
            }
            _ => {}
        }
    }
    if text.is_empty() { text } else { format!("Examples:\n{}", text.trim_end()) }
}

/// The lines that a reader of an example would type, of commands of ours. A command may go on
/// behind a `\`.
fn commands(lines: &[String]) -> impl Iterator<Item = &str> {
    let mut goes_on = false;
    lines.iter().filter_map(move |line| {
        let first = line.strip_prefix("$ ").filter(|line| line.starts_with("addcow "));
        let line = first.or(goes_on.then_some(line.as_str()));
        goes_on = line.is_some_and(|line| line.ends_with('\\'));
        line
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_cut_at_its_headings() {
        let part = |heading: &str, texts: &[&str]| Part {
            heading: heading.to_owned(),
            blocks: texts.iter().map(|text| Block::Paragraph(text.to_string())).collect(),
        };
        let chapters =
            parts(&blocks("# T\n\na\n\n## One\n\nb\n\n### Sub\n\nc\n\n## Two\n\nd\n"), 2);
        assert_eq!(chapters[0], part("", &["a"]));
        assert_eq!(chapters[2], part("Two", &["d"]));
        assert_eq!(parts(&chapters[1].blocks, 3), [part("", &["b"]), part("Sub", &["c"])]);
    }

    #[test]
    fn help_shows_the_commands_of_the_examples_and_not_what_they_print() {
        let text = examples("check");
        assert!(text.starts_with("Examples:\n"), "{text}");
        assert!(text.contains("\n      addcow check -r leaks "), "{text}");
        assert!(!text.contains("No errors were found"), "{text}");
        assert_eq!(examples("frobnicate"), "");
        let lines = ["$ addcow a \\", "  b", "printed", "$ ls", "$ addcow c"].map(str::to_owned);
        assert_eq!(commands(&lines).collect::<Vec<_>>(), ["addcow a \\", "  b", "addcow c"]);
    }
}
