//! The little Markdown in which the manual's pages are written, as a list of blocks.
//!
//! Headings, paragraphs, items of a list, tables, indented code, comments; inside a text `code`,
//! **bold** and links. What else there is in Markdown is plain text here.
//!
//! Not here: how the blocks look in the end (`groff`), and which belong to which page.

/// A piece of a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Block {
    /// A heading of that level, 1 to 6.
    Heading(usize, String),
    /// Text.
    Paragraph(String),
    /// One item of a list.
    Item(String),
    /// Rows of cells; the first row is the heading.
    Table(Vec<Vec<String>>),
    /// Lines to be left as they are.
    Code(Vec<String>),
}

/// A piece of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Span {
    /// As it is.
    Plain(String),
    /// `code` or **bold**: what is to be typed, or matters.
    Strong(String),
}

/// The blocks of a page.
pub fn blocks(page: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut in_comment = false;
    // Whether the line before is one that this line may carry on.
    let mut is_open = false;
    for line in page.lines() {
        if in_comment || line.starts_with("<!--") {
            in_comment = !line.ends_with("-->");
            is_open = false;
            continue;
        }
        if line.trim().is_empty() {
            is_open = false;
            continue;
        }
        let carried_on = is_open && carry_on(blocks.last_mut(), line);
        if !carried_on {
            blocks.push(block_from(line));
        }
        is_open = !matches!(blocks.last(), Some(Block::Heading(..)));
    }
    blocks
}

/// Adds a line to the block before it, if it belongs there.
fn carry_on(block: Option<&mut Block>, line: &str) -> bool {
    match block {
        Some(Block::Paragraph(text)) if item(line).is_none() => {
            text.push(' ');
            text.push_str(line.trim());
        }
        Some(Block::Item(text)) if line.starts_with(' ') => {
            text.push(' ');
            text.push_str(line.trim());
        }
        Some(Block::Table(rows)) if line.starts_with('|') => {
            let is_rule = line.chars().all(|c| "|-: ".contains(c));
            if !is_rule {
                rows.push(cells(line));
            }
        }
        Some(Block::Code(lines)) => match line.strip_prefix(CODE_INDENT) {
            Some(code) => lines.push(code.to_owned()),
            None => return false,
        },
        _ => return false,
    }
    true
}

/// What indented code starts with.
const CODE_INDENT: &str = "    ";

/// The block that a line starts.
fn block_from(line: &str) -> Block {
    let level = line.chars().take_while(|&c| c == '#').count();
    if let Some(heading) = line.trim_start_matches('#').strip_prefix(' ').filter(|_| level > 0) {
        Block::Heading(level, heading.to_owned())
    } else if let Some(code) = line.strip_prefix(CODE_INDENT) {
        Block::Code(vec![code.to_owned()])
    } else if line.starts_with('|') {
        Block::Table(vec![cells(line)])
    } else if let Some(text) = item(line) {
        Block::Item(text.to_owned())
    } else {
        Block::Paragraph(line.trim().to_owned())
    }
}

/// The text of a line that starts an item of a list.
fn item(line: &str) -> Option<&str> {
    let numbered = line.split_once(". ").filter(|(number, _)| number.parse::<u8>().is_ok());
    line.strip_prefix("* ").or_else(|| line.strip_prefix("- ")).or(numbered.map(|(_, text)| text))
}

/// The cells of a row of a table. A `\|` is no border.
fn cells(line: &str) -> Vec<String> {
    let inner = line.trim().trim_start_matches('|').trim_end_matches('|');
    let inner = inner.replace("\\|", "\u{0}");
    inner.split('|').map(|cell| cell.trim().replace('\u{0}', "|")).collect()
}

/// The spans of a text.
pub fn spans(text: &str) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut plain = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if let Some((strong, after)) = quoted(rest, "`").or_else(|| quoted(rest, "**")) {
            if !plain.is_empty() {
                spans.push(Span::Plain(std::mem::take(&mut plain)));
            }
            // Code in bold is code.
            spans.push(Span::Strong(strong.replace('`', "")));
            rest = after;
        } else if let Some((label, after)) = link(rest) {
            plain.push_str(label);
            rest = after;
        } else {
            plain.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    if !plain.is_empty() {
        spans.push(Span::Plain(plain));
    }
    spans
}

/// What is between two `marks` at the beginning of `text`, and what is behind them.
fn quoted<'a>(text: &'a str, marks: &str) -> Option<(&'a str, &'a str)> {
    text.strip_prefix(marks)?.split_once(marks)
}

/// The label of a link at the beginning of `text`, and what is behind the link.
fn link(text: &str) -> Option<(&str, &str)> {
    let (label, rest) = text.strip_prefix('[')?.split_once("](")?;
    let (_, after) = rest.split_once(')')?;
    (!label.contains('[')).then_some((label, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_cut_into_blocks() {
        let page = [
            "# Title\n\n<!-- one -->\n<!-- two\nlines -->\nA text\nof two lines.\n* item",
            "  goes on\n* next\n\n| a | b |\n| --- | ---: |\n| `x\\|y` | z |\n",
            "    $ code\n      more\n\n    other\n### Sub\n1. first\n",
        ]
        .join("\n");
        let cell = |cells: &[&str]| cells.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            blocks(&page),
            [
                Block::Heading(1, "Title".into()),
                Block::Paragraph("A text of two lines.".into()),
                Block::Item("item goes on".into()),
                Block::Item("next".into()),
                Block::Table(vec![cell(&["a", "b"]), cell(&["`x|y`", "z"])]),
                Block::Code(vec!["$ code".into(), "  more".into()]),
                Block::Code(vec!["other".into()]),
                Block::Heading(3, "Sub".into()),
                Block::Item("first".into()),
            ]
        );
    }

    #[test]
    fn a_text_is_cut_into_spans_and_links_are_their_labels() {
        let plain = |text: &str| Span::Plain(text.into());
        let strong = |text: &str| Span::Strong(text.into());
        assert_eq!(
            spans("a `b*` **c `d`**, [page](x.md) [1] 2 * 3 `"),
            [plain("a "), strong("b*"), plain(" "), strong("c d"), plain(", page [1] 2 * 3 `")]
        );
        assert_eq!(spans(""), []);
    }
}
