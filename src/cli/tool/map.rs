//! `addcow map`: where the bytes of a disk are.
//!
//! JSON covers the whole disk without a gap, one entry a line; words name only what has data in a
//! file, as qemu-img does. Entries are written as they are found: memory does not grow with them.
//!
//! Not here: finding them (`image::map`).

use std::error::Error;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};

use clap::Args;
use serde::Serialize;

use super::DiskArguments;
use super::picture::{Characters, Picture, Place};
use crate::cli::output::{Output, print, printable};
use crate::cli::{Outcome, size};
use crate::image::chain::{ChainOptions, OpenChain, PieceContent};
use crate::image::map::{Piece, visit};
use crate::units::{ByteRange, SECTOR_SIZE};

/// The command line of `addcow map`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Which disk, and how to show the result.
    #[command(flatten)]
    disk: DiskArguments,
    /// The first byte to show
    #[arg(short, long, value_name = "SIZE")]
    start_offset: Option<OsString>,
    /// How many bytes to show at most
    #[arg(short = 'l', long, value_name = "SIZE")]
    max_length: Option<OsString>,
    /// Show a row of characters for the whole disk instead of a table. A terminal gets both
    #[arg(long)]
    picture: bool,
}

/// A piece of the disk; the keys are those of qemu-img.
#[derive(Debug, Serialize)]
struct Entry {
    /// Its first byte.
    start: u64,
    /// Its length in bytes.
    length: u64,
    /// How many files down the chain its bytes are.
    depth: usize,
    /// Whether a file of the chain has them.
    present: bool,
    /// Whether they read as zeros without being stored.
    zero: bool,
    /// Whether they are stored.
    data: bool,
    /// Whether they are stored compressed.
    compressed: bool,
    /// Where in that file they are, if one has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

/// Shows where the bytes of a disk are.
pub fn run(arguments: &Arguments) -> Outcome {
    let range = range_of(arguments)?;
    let path = &arguments.disk.disk;
    let options = ChainOptions { locking: arguments.disk.locking(), ..ChainOptions::BUFFERED };
    let chain = OpenChain::open(path, arguments.disk.format, options)?;
    // What a guest sees: an image's last part of a sector is not on the disk.
    let size = chain.virtual_size();
    let range = range.intersect(ByteRange::between(0, size - size % SECTOR_SIZE));
    print(|out| match arguments.disk.output {
        Output::Json if arguments.picture => {
            Err("--picture is for people: it does not go with --output json".into())
        }
        Output::Json => write_json(out, &chain, range),
        Output::Human => write_human(out, &chain, range, arguments.picture),
    })?;
    Ok(0)
}

/// The range asked for.
fn range_of(arguments: &Arguments) -> Result<ByteRange, size::SizeError> {
    let bytes = |text: &Option<OsString>, default| {
        text.as_ref().map_or(Ok(default), |text| size::parse(&text.to_string_lossy()))
    };
    let start = bytes(&arguments.start_offset, 0)?;
    let len = bytes(&arguments.max_length, u64::MAX)?;
    Ok(ByteRange::between(start, start.saturating_add(len)))
}

/// The entry for a piece.
fn entry(piece: Piece) -> Entry {
    let Piece { place, hole } = piece;
    Entry {
        start: place.range.start(),
        length: place.range.len(),
        depth: place.depth,
        present: place.present,
        zero: hole || place.content == PieceContent::Zero,
        data: !hole && place.content != PieceContent::Zero,
        compressed: place.content == PieceContent::Compressed,
        offset: match place.content {
            PieceContent::Data { offset, .. } => Some(offset),
            PieceContent::Compressed | PieceContent::Zero => None,
        },
    }
}

/// Writes all entries as a JSON array, one a line.
fn write_json(
    out: &mut dyn Write,
    chain: &OpenChain,
    range: ByteRange,
) -> Result<(), Box<dyn Error>> {
    let mut separator = "[";
    visit(chain, range, |piece| {
        write!(out, "{separator}")?;
        separator = ",\n";
        serde_json::to_writer(&mut *out, &entry(piece)).map_err(io::Error::from)?;
        Ok::<(), Box<dyn Error>>(())
    })?;
    // Nothing in the range: the bracket is still to come.
    write!(out, "{}", if separator == "[" { "[]\n" } else { "]\n" })?;
    Ok(())
}

/// Writes the entries that have data in a file as a table, unless `only_picture`; below it a
/// picture for a terminal, or if it is all that is wanted.
fn write_human(
    out: &mut dyn Write,
    chain: &OpenChain,
    range: ByteRange,
    only_picture: bool,
) -> Result<(), Box<dyn Error>> {
    let has_picture = only_picture || io::stdout().is_terminal();
    let mut picture = has_picture.then(|| Picture::for_output(range));
    if !only_picture {
        writeln!(out, "{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to")?;
    }
    visit(chain, range, |piece| {
        if let Some(picture) = &mut picture {
            picture.add(piece.place.range, place_of(piece));
        }
        if only_picture {
            return Ok(());
        }
        write_row(out, chain, piece).map_err(Box::<dyn Error>::from)
    })?;
    if let Some(picture) = picture {
        if !only_picture {
            writeln!(out)?;
        }
        picture.write(out, Characters::of_locale())?;
    }
    Ok(())
}

/// What the picture shows for a piece.
fn place_of(piece: Piece) -> Place {
    match piece.place.content {
        _ if piece.hole => Place::Nowhere,
        PieceContent::Zero => Place::Nowhere,
        _ if piece.place.depth == 0 => Place::Own,
        _ => Place::Backing,
    }
}

/// Writes the row of the table for a piece, if it has data in a file.
fn write_row(out: &mut dyn Write, chain: &OpenChain, piece: Piece) -> io::Result<()> {
    let layer = &chain.layers()[piece.place.depth];
    let (file, place) = match piece.place.content {
        PieceContent::Data { file, offset } if !piece.hole => {
            (layer.files().nth(file), hex(offset))
        }
        PieceContent::Compressed => (Some(layer.own_file()), "compressed".to_owned()),
        PieceContent::Data { .. } | PieceContent::Zero => (None, String::new()),
    };
    let Some(file) = file else { return Ok(()) };
    let (start, len) = (hex(piece.place.range.start()), hex(piece.place.range.len()));
    let name = printable(&file.path().display().to_string());
    writeln!(out, "{start:<16}{len:<16}{place:<16}{name}")
}

/// A number in hexadecimal; 0 as just that, as the table of qemu-img has it.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}
