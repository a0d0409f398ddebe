//! The picture of a disk for people: one row of characters for the whole of it, and what they mean.
//!
//! Each character stands for the same number of bytes and says where those are. The smallest piece
//! of what the disk itself holds is seen. Memory is a few numbers for each character.
//!
//! Not here: where the bytes are (`image::map`), and who wants to see it (`map`).

use std::io::{self, IsTerminal, Write};

use rustix::termios::tcgetwinsize;

use crate::cli::output::{human_size, percent};
use crate::units::ByteRange;

/// The most characters of a row, and how many there are where no terminal has a width.
const MAX_COLUMNS: u16 = 80;

/// Where the bytes of a piece are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the disk's own file.
    Own,
    /// In a file below it.
    Backing,
    /// Nowhere, they read zeros: nobody has them, or a file has a hole there.
    Nowhere,
}

/// The characters of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Characters {
    /// All bytes are in the disk's own file.
    own: char,
    /// Some of them are.
    partly: char,
    /// None of them, but some are in a file below.
    backing: char,
    /// All of them read zeros.
    zeros: char,
}

impl Characters {
    /// For every terminal.
    pub const ASCII: Self = Self { own: '#', partly: '+', backing: '-', zeros: '.' };

    /// Full block, lower half block, light shade, middle dot.
    pub const BLOCKS: Self =
        Self { own: '\u{2588}', partly: '\u{2584}', backing: '\u{2591}', zeros: '\u{b7}' };

    /// Those that the user's terminal shows, as far as the environment tells.
    #[must_use]
    pub fn of_locale() -> Self {
        // In this order, and an empty one is as good as none: locale(7).
        let variables = ["LC_ALL", "LC_CTYPE", "LANG"];
        let mut values = variables.iter().filter_map(std::env::var_os);
        let locale = values.find(|value| !value.is_empty()).unwrap_or_default();
        let locale = locale.to_string_lossy().to_uppercase();
        if locale.contains("UTF-8") || locale.contains("UTF8") { Self::BLOCKS } else { Self::ASCII }
    }
}

/// What one character stands for, in bytes; the rest of them read zeros.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Cell {
    /// In the disk's own file.
    own: u64,
    /// In a file below it.
    backing: u64,
}

/// A picture in the making.
#[derive(Debug)]
pub struct Picture {
    /// What it shows.
    range: ByteRange,
    /// One for each character; none for an empty range.
    cells: Vec<Cell>,
}

impl Picture {
    /// A picture of `range`, as wide as the terminal is if standard output is one.
    #[must_use]
    pub fn for_output(range: ByteRange) -> Self {
        Self::new(range, columns_of_output())
    }

    /// A picture of `range` in at most so many characters.
    fn new(range: ByteRange, columns: u16) -> Self {
        // A character stands for a byte at least.
        let cells = range.len().min(u64::from(columns.max(1)));
        Self { range, cells: (0..cells).map(|_| Cell::default()).collect() }
    }

    /// Where the cell of that number starts. The last one's end is that of the cell behind it.
    fn start_of(&self, cell: usize) -> u64 {
        let part = u128::from(self.range.len()) * cell as u128 / self.cells.len().max(1) as u128;
        // At most the length of the range, which is a u64.
        self.range.start() + u64::try_from(part).unwrap_or(self.range.len())
    }

    /// Adds a piece of the range. Every byte may be in one piece only.
    pub fn add(&mut self, piece: ByteRange, place: Place) {
        let piece = piece.intersect(self.range);
        if piece.is_empty() || place == Place::Nowhere {
            return;
        }
        let offset = u128::from(piece.start() - self.range.start());
        let first = offset * self.cells.len() as u128 / u128::from(self.range.len());
        let mut cell = usize::try_from(first).unwrap_or(0);
        while cell < self.cells.len() && self.start_of(cell) < piece.end() {
            let on_cell = ByteRange::between(self.start_of(cell), self.start_of(cell + 1));
            let len = on_cell.intersect(piece).len();
            match place {
                Place::Own => self.cells[cell].own += len,
                Place::Backing => self.cells[cell].backing += len,
                Place::Nowhere => {}
            }
            cell += 1;
        }
    }

    /// Writes the row and the legend. Nothing for an empty range.
    ///
    /// # Errors
    /// What the writer said.
    pub fn write(&self, out: &mut dyn Write, characters: Characters) -> io::Result<()> {
        if self.cells.is_empty() {
            return Ok(());
        }
        let Characters { own, partly, backing, zeros } = characters;
        let row: String = (0..self.cells.len())
            .map(|number| match self.cells[number] {
                Cell { own: 0, backing: 0 } => zeros,
                Cell { own: 0, .. } => backing,
                Cell { own: len, .. }
                    if self.start_of(number) + len == self.start_of(number + 1) =>
                {
                    own
                }
                _ => partly,
            })
            .collect();
        writeln!(out, "{row}")?;
        let total = self.range.len();
        let in_own: u64 = self.cells.iter().map(|cell| cell.own).sum();
        let in_backing: u64 = self.cells.iter().map(|cell| cell.backing).sum();
        let share = |len| percent(len, total);
        let nowhere = total - in_own - in_backing;
        writeln!(
            out,
            "{own} allocated {}  {partly} partly  {backing} backing {}  {zeros} zeros {}  (of {})",
            share(in_own),
            share(in_backing),
            share(nowhere),
            human_size(total)
        )
    }
}

/// How wide a row may be.
fn columns_of_output() -> u16 {
    let out = io::stdout();
    let size = if out.is_terminal() { tcgetwinsize(&out).ok() } else { None };
    // A terminal that does not know its width says 0.
    size.map(|size| size.ws_col)
        .filter(|&columns| columns > 0)
        .unwrap_or(MAX_COLUMNS)
        .min(MAX_COLUMNS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The picture of pieces (start, end, place).
    fn drawn(range: (u64, u64), columns: u16, pieces: &[(u64, u64, Place)]) -> String {
        let mut picture = Picture::new(ByteRange::between(range.0, range.1), columns);
        for &(start, end, place) in pieces {
            picture.add(ByteRange::between(start, end), place);
        }
        let mut out = Vec::new();
        picture.write(&mut out, Characters::ASCII).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn each_character_says_where_its_bytes_are() {
        let (own, backing) = (Place::Own, Place::Backing);
        let text = drawn(
            (0, 1000),
            10,
            &[
                (0, 200, own),
                (200, 230, backing),
                (230, 231, own),
                (300, 301, backing),
                (301, 500, Place::Nowhere),
                (699, 701, own),
                (900, 1000, own),
            ],
        );
        assert_eq!(
            text,
            "##+-..++.#\n\
             # allocated 30.30%  + partly  - backing 3.10%  . zeros 66.60%  (of 0.977 KiB)\n"
        );
    }

    #[test]
    fn every_byte_is_in_one_cell_however_they_are_cut() {
        for (start, end, columns) in
            [(0, 1, 80), (7, 86, 80), (0, 1001, 7), (3, u64::MAX, 79), (0, u64::MAX, 80)]
        {
            let range = ByteRange::between(start, end);
            let mut picture = Picture::new(range, columns);
            let middle = start + (end - start) / 3;
            picture.add(ByteRange::between(start, middle), Place::Own);
            picture.add(ByteRange::between(middle, end), Place::Backing);
            let sum = |of: fn(&Cell) -> u64| picture.cells.iter().map(of).sum::<u64>();
            assert_eq!((sum(|c| c.own), sum(|c| c.backing)), (middle - start, end - middle));
            assert_eq!(picture.start_of(picture.cells.len()), end);
        }
    }

    #[test]
    fn a_range_may_be_empty_or_tiny_and_pieces_may_reach_over_it() {
        assert_eq!(drawn((5, 5), 10, &[(0, 10, Place::Own)]), "");
        assert!(
            drawn((5, 8), 10, &[(0, 6, Place::Own), (6, 10, Place::Backing)]).starts_with("#--\n")
        );
    }
}
