//! `addcow create`: from its command line to a new disk.
//!
//! Options can be given in qemu-img's way (`-b`, `-F`) or by the names of the format's first
//! implementation (`-o backing_file=...`), each of them once.
//!
//! Not here: which disks can be made (`image::create`).

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum, ValueHint};

use crate::cli::output::{print, printable};
use crate::cli::{Outcome, size};
use crate::format::{FileName, FileReference, FileRole};
use crate::image::OpenError;
use crate::image::create::{CreateOptions, Created, add_cow};
use crate::image::open::RAW_FORMAT;
use crate::units::ClusterSize;

/// The command line of `addcow create`.
#[derive(Debug, Args)]
#[command(override_usage = "addcow create [OPTIONS] <DISK> [SIZE]")]
pub struct Arguments {
    /// Format of the new disk; there is no other
    #[arg(short, long, value_name = "FMT", default_value = "add-cow", hide_possible_values = true)]
    format: Format,
    /// File that the guest sees where it has written nothing; relative to the folder of DISK
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    backing: Option<OsString>,
    /// Format of the backing file; needed with -b, since formats are never probed
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<OsString>,
    /// File with the guest's own bytes; relative to the folder of DISK [default: DISK with the
    /// extension .raw]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    image: Option<OsString>,
    /// Format of the image file [default: raw]
    #[arg(long, value_name = "FMT")]
    image_format: Option<OsString>,
    /// Size of a cluster, 4K to 2M [default: 4K, more above 1T]
    #[arg(long, value_name = "SIZE")]
    cluster_size: Option<OsString>,
    /// More options, as key=value,...; `-o help` lists them
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<OsString>,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Replace an existing DISK, and use the image file without -i even if it exists
    #[arg(long)]
    force: bool,
    /// The add-cow file to make
    #[arg(value_name = "DISK", required_unless_present = "options")]
    disk: Option<PathBuf>,
    /// Size of the disk [default: that of the image file, else of the backing file]
    #[arg(value_name = "SIZE", allow_negative_numbers = true)]
    size: Option<OsString>,
}

/// What can be created.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// An add-cow disk.
    AddCow,
}

/// A key of `-o`, and what `-o help` says about it.
struct Key {
    /// The key.
    name: &'static str,
    /// Its meaning.
    help: &'static str,
}

/// The keys of `-o`; their order is that of the fields of [`Values`].
const KEYS: [Key; 6] = [
    Key { name: "size", help: "size of the disk" },
    Key { name: "backing_file", help: "name of the backing file" },
    Key { name: "backing_fmt", help: "format of the backing file (raw)" },
    Key { name: "image_file", help: "name of the image file" },
    Key { name: "image_fmt", help: "format of the image file (raw)" },
    Key { name: "cluster_size", help: "size of a cluster, 4K to 2M" },
];

/// Whether a verb takes a key.
#[derive(Debug, Clone, Copy)]
pub(super) enum Use {
    /// It does, and this is the other way to say the same.
    SameAs(&'static str),
    /// It does, with `-O add-cow`, and there is no other way to say it.
    OfAddCow,
    /// It does not, and this is why.
    Not(&'static str),
}

/// What a verb does with each of [`KEYS`].
pub(super) type Uses = [Use; KEYS.len()];

/// `create` takes them all.
const USES: Uses = [
    Use::SameAs("SIZE"),
    Use::SameAs("-b"),
    Use::SameAs("-F"),
    Use::SameAs("-i"),
    Use::SameAs("--image-format"),
    Use::SameAs("--cluster-size"),
];

/// The values of [`KEYS`], from wherever they were given.
pub(super) type Values = [Option<OsString>; KEYS.len()];

/// What was given with `-o`: where in [`KEYS`] the key is, and the value.
pub(super) type Given = Vec<(usize, OsString)>;

/// Makes a disk.
pub fn run(arguments: Arguments) -> Outcome {
    let Format::AddCow = arguments.format;
    let Some(given) = split_options(&arguments.options, &USES)? else {
        print(|out| Ok(out.write_all(options_help(&USES).as_bytes())?))?;
        return Ok(0);
    };
    let disk = arguments.disk.ok_or("no DISK given (see addcow create --help)")?;
    let values: Values = [
        arguments.size,
        arguments.backing,
        arguments.backing_format,
        arguments.image,
        arguments.image_format,
        arguments.cluster_size,
    ];
    let options = create_options(disk, merge(values, given, &USES)?, arguments.force)?;
    let created = add_cow(&options).map_err(with_advice)?;
    if !arguments.quiet {
        print(|out| Ok(writeln!(out, "{}", printable(&summary(&options.path, &created)))?))?;
    }
    Ok(0)
}

/// The error, and the option that helps if there is one.
pub(super) fn with_advice(error: OpenError) -> Box<dyn Error> {
    match &error {
        OpenError::Exists { role: crate::image::FileRole::Raw, .. } => {
            format!("{error} (-i NAME uses an existing one)").into()
        }
        OpenError::Exists { role: crate::image::FileRole::Side, .. } => {
            format!("{error} (--force replaces it)").into()
        }
        _ => error.into(),
    }
}

/// What the image module wants to know.
pub(super) fn create_options(
    disk: PathBuf,
    values: Values,
    force: bool,
) -> Result<CreateOptions, Box<dyn Error>> {
    let [size, backing_file, backing_fmt, image_file, image_fmt, cluster_size] = values;
    let reuse_image = image_file.is_some() || force;
    let backing = backing_reference(backing_file, backing_fmt)?;
    Ok(CreateOptions {
        image: image_reference(&disk, image_file, image_fmt)?,
        path: disk,
        size: size.as_deref().map(parse_size).transpose()?,
        cluster_size: cluster_size.as_deref().map(parse_cluster_size).transpose()?,
        backing,
        reuse_image,
        force,
    })
}

/// The backing file as the header stores it, from its name and its format, if it was given.
pub(super) fn backing_reference(
    name: Option<OsString>,
    format: Option<OsString>,
) -> Result<Option<FileReference>, Box<dyn Error>> {
    match (name, format) {
        (Some(name), Some(format)) => reference(FileRole::Backing, &name, &format).map(Some),
        (None, None) => Ok(None),
        (Some(name), None) => Err(format!(
            "backing file '{}' needs its format (-F raw): formats are never probed",
            name.display()
        )
        .into()),
        (None, Some(_)) => Err("a backing format (-F) needs a backing file (-b)".into()),
    }
}

/// The image file of `disk` as the header stores it; by default the one beside it, in format raw.
pub(super) fn image_reference(
    disk: &Path,
    name: Option<OsString>,
    format: Option<OsString>,
) -> Result<FileReference, Box<dyn Error>> {
    let name = name.map_or_else(|| default_image_name(disk), Ok)?;
    reference(FileRole::Image, &name, &format.unwrap_or_else(|| RAW_FORMAT.into()))
}

/// The name of the image beside the add-cow file `disk`.
fn default_image_name(disk: &Path) -> Result<OsString, Box<dyn Error>> {
    let raw = disk.with_extension(RAW_FORMAT);
    let name = raw.file_name().ok_or_else(|| format!("'{}' names no file", disk.display()))?;
    let mut result = OsString::new();
    if name.as_bytes().contains(&b':') {
        // docs/format.md, "Names": else it would be taken for a protocol.
        result.push("./");
    }
    result.push(name);
    Ok(result)
}

/// A name and a format as the header stores them.
fn reference(
    role: FileRole,
    name: &OsStr,
    format: &OsStr,
) -> Result<FileReference, Box<dyn Error>> {
    let format = format.to_string_lossy().into_owned();
    Ok(FileReference { name: FileName::new(role, name)?, format })
}

/// A size in bytes.
pub(super) fn parse_size(text: &OsStr) -> Result<u64, size::SizeError> {
    size::parse(&text.to_string_lossy())
}

/// A cluster size that may be written.
pub(super) fn parse_cluster_size(text: &OsStr) -> Result<ClusterSize, Box<dyn Error>> {
    let bytes = parse_size(text)?;
    ClusterSize::from_bytes(bytes).filter(|cluster| cluster.bytes() >= 4096).ok_or_else(|| {
        let text = text.display();
        format!("invalid cluster size '{text}': must be a power of two from 4K to 2M").into()
    })
}

/// The keys and values in all `-o` of a verb, or `None` if help is asked for. A comma in a value is
/// written twice.
pub(super) fn split_options(
    options: &[OsString],
    uses: &Uses,
) -> Result<Option<Given>, Box<dyn Error>> {
    let mut given = Vec::new();
    for options in options {
        for option in split_at_commas(options.as_bytes()) {
            let (key, value) = match option.iter().position(|&byte| byte == b'=') {
                Some(at) => (&option[..at], Some(&option[at + 1..])),
                None => (&option[..], None),
            };
            let key = String::from_utf8_lossy(key);
            if value.is_none() && (key == "help" || key == "?") {
                return Ok(None);
            }
            let index = key_index(&key, uses)?;
            let value = value.ok_or_else(|| format!("option '{key}' needs a value ({key}=...)"))?;
            given.push((index, OsString::from_vec(value.to_vec())));
        }
    }
    Ok(Some(given))
}

/// The pieces of `text` between single commas; two commas stand for one.
fn split_at_commas(text: &[u8]) -> Vec<Vec<u8>> {
    let mut pieces = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            pieces.push(Vec::new());
        } else if let Some(piece) = pieces.last_mut() {
            piece.push(byte);
        }
    }
    pieces
}

/// The keys, and what a verb does with them.
fn keys(uses: &Uses) -> impl Iterator<Item = (&Key, Use)> {
    KEYS.iter().zip(uses.iter().copied())
}

/// Where in [`KEYS`] a key is that a verb takes.
fn key_index(key: &str, uses: &Uses) -> Result<usize, Box<dyn Error>> {
    if let Some(index) = KEYS.iter().position(|known| known.name == key) {
        return match uses[index] {
            Use::Not(why) => Err(format!("option '{key}' cannot be used here: {why}").into()),
            _ => Ok(index),
        };
    }
    let taken = keys(uses).filter(|(_, taken)| !matches!(taken, Use::Not(_)));
    let nearest = taken.map(|(known, _)| (distance(key, known.name), known.name)).min();
    let hint = match nearest {
        // Further off it is no slip of the finger.
        Some((distance, name)) if distance <= 1 + name.len() / 3 => {
            format!("did you mean '{name}'?")
        }
        _ => "'-o help' lists them".to_owned(),
    };
    Err(format!("unknown option '{key}': {hint}").into())
}

/// How many characters have to be put in, taken out or changed to make `b` of `a`.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

/// Both ways to give a value, of which only one may be used.
pub(super) fn merge(
    mut values: Values,
    given: Given,
    uses: &Uses,
) -> Result<Values, Box<dyn Error>> {
    for (index, value) in given {
        if values[index].replace(value).is_some() {
            let other = match uses[index] {
                Use::SameAs(other) => format!(" (or {other})"),
                _ => String::new(),
            };
            return Err(format!("option '{}'{other} is given twice", KEYS[index].name).into());
        }
    }
    Ok(values)
}

/// What `-o help` of a verb prints.
pub(super) fn options_help(uses: &Uses) -> String {
    let mut text = "Supported options:\n".to_owned();
    for (Key { name, help }, taken) in keys(uses) {
        let how = match taken {
            Use::SameAs(other) => format!("same as {other}"),
            Use::OfAddCow => "with -O add-cow".to_owned(),
            Use::Not(_) => continue,
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {name:<13} - {help}; {how}");
    }
    text
}

/// The line that says what was made.
pub(super) fn summary(path: &Path, Created { header, geometry }: &Created) -> String {
    let mut line = format!(
        "Formatting '{}', fmt=add-cow cluster_size={} size={}",
        path.display(),
        header.cluster_size.bytes(),
        geometry.virtual_size()
    );
    let files = [("backing", header.backing.as_ref()), ("image", Some(&header.image))];
    for (role, file) in files {
        if let Some(FileReference { name, format }) = file {
            let name: &Path = name.as_ref();
            // Writing to a string cannot fail.
            let _ = write!(line, " {role}_file={} {role}_fmt={format}", name.display());
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_separate_options_and_two_of_them_are_one() {
        let pieces = |text: &str| {
            let pieces = split_at_commas(text.as_bytes());
            pieces.into_iter().map(|piece| String::from_utf8(piece).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(pieces("a=1,b=2"), ["a=1", "b=2"]);
        assert_eq!(pieces("a=x,,y,b=,,"), ["a=x,y", "b=,"]);
        assert_eq!(pieces("a,"), ["a", ""]);
    }

    #[test]
    fn distance_counts_single_changes() {
        assert_eq!(distance("backing_file", "backing_file"), 0);
        assert_eq!(distance("backing_fil", "backing_file"), 1);
        assert_eq!(distance("clustersize", "cluster_size"), 1);
        assert_eq!(distance("szie", "size"), 2);
        assert_eq!(distance("", "size"), 4);
    }

    #[test]
    fn the_image_lies_beside_the_disk() {
        let name = |disk: &str| default_image_name(Path::new(disk)).unwrap();
        assert_eq!(name("test.add-cow"), "test.raw");
        assert_eq!(name("a/b/test.add-cow"), "test.raw");
        assert_eq!(name("disk"), "disk.raw");
        assert_eq!(name("vm:1.add-cow"), "./vm:1.raw");
        assert!(default_image_name(Path::new("a/..")).is_err());
    }
}
