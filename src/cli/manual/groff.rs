//! Blocks of the manual as input of man(1).
//!
//! Relies on the `roff` crate to escape text. Uses only macros that every version of man knows, and
//! tbl(1) for tables of more than two columns, for which [`PREPROCESSOR`] must be the first line.
//!
//! Not here: the order of a page's sections.

use clap_mangen::roff::{Inline, Roff, bold, roman};

use super::markdown::{Block, Span, spans};

/// Columns that a table may take: a line of a terminal less the indentation of a page.
const TABLE_WIDTH: usize = 80 - 8;

/// The least columns for the first cells of a table.
const MIN_FIRST_WIDTH: usize = 16;

/// Blank columns that tbl(1) puts between two cells.
const GAP: usize = 3;

/// Says that a page is to go through tbl(1).
pub const PREPROCESSOR: &str = "'\\\" t\n";

/// Appends blocks to a page.
pub fn write(roff: &mut Roff, blocks: &[Block]) {
    for block in blocks {
        match block {
            Block::Heading(_, text) => {
                roff.control("SS", [text.as_str()]);
            }
            Block::Paragraph(text) => {
                roff.control("PP", []);
                roff.text(inlines(text));
            }
            Block::Item(text) => {
                roff.control("IP", ["\\(bu", "2"]);
                roff.text(inlines(text));
            }
            Block::Table(rows) => write_table(roff, rows),
            Block::Code(lines) => {
                roff.control("PP", []);
                roff.control("RS", ["4"]);
                roff.control("nf", []);
                for line in lines {
                    roff.text([roman(line)]);
                }
                roff.control("fi", []);
                roff.control("RE", []);
            }
        }
    }
}

/// Whether [`write`] makes of these blocks what tbl(1) has to see.
pub fn needs_preprocessor(blocks: &[Block]) -> bool {
    blocks.iter().any(|block| matches!(block, Block::Table(rows) if columns(rows) > 2))
}

/// How many columns a table has.
fn columns(rows: &[Vec<String>]) -> usize {
    rows.first().map_or(0, Vec::len)
}

/// Appends a table: one of two columns as a list of words with their meanings, without its heading.
fn write_table(roff: &mut Roff, rows: &[Vec<String>]) {
    let Some((heading, body)) = rows.split_first() else { return };
    if heading.len() > 2 {
        write_wide_table(roff, rows);
        return;
    }
    for row in body {
        roff.control("TP", []);
        for cell in row {
            roff.text(inlines(cell));
        }
    }
}

/// Appends a table for tbl(1), whose first column may take several lines in a row.
fn write_wide_table(roff: &mut Roff, rows: &[Vec<String>]) {
    let len = |row: &Vec<String>, column: usize| row.get(column).map_or(0, String::len);
    let widest = |column| rows.iter().map(|row| GAP + len(row, column)).max().unwrap_or(0);
    let others: usize = (1..columns(rows)).map(widest).sum();
    let first = TABLE_WIDTH.saturating_sub(others).max(MIN_FIRST_WIDTH);
    roff.control("TS", []);
    roff.text([roman(format!("lw({first}n){}.", " l".repeat(columns(rows).saturating_sub(1))))]);
    for row in rows {
        let Some((first, others)) = row.split_first() else { continue };
        roff.text([roman("T{")]);
        roff.text(inlines(first));
        let mut line = vec![roman("T}")];
        for cell in others {
            line.push(roman("\t"));
            line.extend(inlines(cell));
        }
        roff.text(line);
    }
    roff.control("TE", []);
}

/// A text with its strong words.
fn inlines(text: &str) -> Vec<Inline> {
    let inline = |span| match span {
        Span::Plain(text) => roman(text),
        Span::Strong(text) => bold(text),
    };
    spans(text).into_iter().map(inline).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What [`write`] makes of blocks.
    fn written(blocks: &[Block]) -> String {
        let mut roff = Roff::new();
        write(&mut roff, blocks);
        roff.to_roff()
    }

    #[test]
    fn blocks_become_macros_and_text_is_escaped() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let found = written(&[
            Block::Paragraph(".Use `-b` \\n".into()),
            Block::Item("one".into()),
            Block::Table(vec![row(["code", "meaning"]), row(["0", "fine"])]),
            Block::Code(vec!["$ ls -l".into(), "  .x".into()]),
        ]);
        assert_eq!(
            found,
            ".PP\n\\&.Use \\fB\\-b\\fR \\\\n\n.IP \\(bu 2\none\n.TP\n0\nfine\n\
             .PP\n.RS 4\n.nf\n$ ls \\-l\n  .x\n.fi\n.RE\n"
        );
    }

    #[test]
    fn a_table_of_three_columns_is_for_tbl() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let table = Block::Table(vec![row(["a", "b", "c"]), row(["`1`", "2", "3"])]);
        assert!(needs_preprocessor(std::slice::from_ref(&table)));
        assert_eq!(
            written(&[table]),
            ".TS\nlw(64n) l l.\nT{\na\nT}\tb\tc\nT{\n\\fB1\\fR\nT}\t2\t3\n.TE\n"
        );
    }
}
