//! `addcow info`: what a disk is made of.
//!
//! Shows everything but the backing file's own facts even where the backing file is missing.
//!
//! Not here: whether all is well (`check`).

use std::io::{self, Write};
use std::path::Path;

use clap::Args;
use serde::Serialize;

use super::DiskArguments;
use super::below::Below;
use crate::cli::Outcome;
use crate::cli::output::{Output, human_size, print, printable, write_json};
use crate::format::{BitmapGeometry, Header, qcow2};
use crate::image::chain::{ChainOptions, Layer, LayerDetails, OpenChain, qed};
use crate::image::open::{RAW_FORMAT, folder_of};
use crate::image::{FileRole, OpenError};
use crate::storage::host_file::HostFile;
use crate::units::SECTOR_SIZE;

/// Compatible feature bit of qcow2: refcounts may be behind while the disk is written.
const LAZY_REFCOUNTS: u64 = 1;

/// The command line of `addcow info`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Which disk, and how to show it.
    #[command(flatten)]
    disk: DiskArguments,
    /// Show all files that the disk stands on too, which must then be there
    #[arg(short, long)]
    backing_chain: bool,
}

/// The facts about one layer of a chain; the keys are those of qemu-img.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    /// Bytes that a guest sees.
    virtual_size: u64,
    /// The file's name as given, or as the header leads to it.
    filename: String,
    /// Its format.
    format: &'static str,
    /// Bytes that this one file takes on its file system.
    actual_size: u64,
    /// Bytes in a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    /// Its backing file.
    #[serde(flatten)]
    backing: Option<BackingInfo>,
    /// Whether the disk needs repair before it is used: never, by design of the format, and others
    /// that do are refused.
    dirty_flag: bool,
    /// What only its format has.
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<FormatSpecific>,
}

/// A backing file as the layer above names it.
#[derive(Debug, Serialize)]
struct BackingInfo {
    /// Its name as stored.
    #[serde(rename = "backing-filename")]
    name: String,
    /// Its name as it is looked up.
    #[serde(rename = "full-backing-filename")]
    full_name: String,
    /// Its format as stored.
    #[serde(rename = "backing-filename-format", skip_serializing_if = "Option::is_none")]
    format: Option<String>,
}

/// What only one format has.
#[derive(Debug, Serialize)]
#[serde(tag = "type", content = "data")]
enum FormatSpecific {
    /// An add-cow file.
    #[serde(rename = "add-cow")]
    AddCow(AddCowInfo),
    /// A qcow2 file.
    #[serde(rename = "qcow2")]
    Qcow2(Qcow2Info),
}

/// What only add-cow has.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct AddCowInfo {
    /// The raw image's name as stored.
    image_filename: String,
    /// The raw image's format as stored.
    image_format: String,
    /// The raw image's name as it is looked up.
    full_image_filename: String,
    /// Bytes that the raw image takes on its file system.
    image_actual_size: u64,
    /// Whether the header says that every cluster is in the raw image.
    all_allocated: bool,
    /// The header's word of compatible features.
    compat_features: u64,
    /// Clusters in the raw image.
    allocated_clusters: u64,
    /// Clusters of the disk.
    total_clusters: u64,
    /// Bytes that the add-cow file and the raw image take on their file systems.
    overlay_actual_size: u64,
    /// Bytes that still come from the backing chain, unless that cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    left_to_stream: Option<u64>,
    /// What else a reader should know, in words.
    notes: Vec<String>,
}

/// What only qcow2 has; the keys are those of qemu-img.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2Info {
    /// The version by the name that qemu-img has for it.
    compat: &'static str,
    /// How clusters are compressed, if they are: the only type that we read.
    compression_type: &'static str,
    /// Whether refcounts may be behind while the disk is written. From version 3 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    lazy_refcounts: Option<bool>,
    /// Width of a refcount.
    refcount_bits: u64,
    /// The external data file's name as stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<String>,
    /// Whether that file alone is a consistent raw image.
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file_raw: Option<bool>,
    /// Whether it is damaged: such files are refused. From version 3 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    corrupt: Option<bool>,
    /// Whether it has subclusters: such files are refused. From version 3 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    extended_l2: Option<bool>,
}

/// Shows a disk.
pub fn run(arguments: &Arguments) -> Outcome {
    let mut infos = infos(arguments)?;
    if let Some(top) = infos.first_mut() {
        // What a guest sees: an image's last part of a sector is not on the disk.
        top.virtual_size -= top.virtual_size % SECTOR_SIZE;
    }
    print(|out| {
        match (arguments.disk.output, infos.as_slice()) {
            (Output::Json, [info]) if !arguments.backing_chain => write_json(out, info)?,
            (Output::Json, infos) => write_json(out, &infos)?,
            (Output::Human, infos) => {
                for (index, info) in infos.iter().enumerate() {
                    if index > 0 {
                        writeln!(out)?;
                    }
                    write_human(out, info)?;
                }
            }
        }
        Ok(())
    })?;
    Ok(0)
}

/// The facts about each layer that is to be shown.
fn infos(arguments: &Arguments) -> Result<Vec<Info>, OpenError> {
    let (path, format) = (&arguments.disk.disk, arguments.disk.format);
    let options = ChainOptions { locking: arguments.disk.locking(), ..ChainOptions::BUFFERED };
    if !arguments.backing_chain {
        let chain = OpenChain::open_top(path, format, options)?;
        let layers = chain.layers().iter();
        return layers.map(|layer| info(layer, || Below::of(path, options))).collect();
    }
    // Nothing is opened a second time: a person has named the first layer only.
    let mut infos = Vec::new();
    let mut rest = Some(OpenChain::open(path, format, options)?);
    while let Some(chain) = rest {
        if let Some(layer) = chain.layers().first() {
            infos.push(info(layer, || Below::of_open(&chain))?);
        }
        rest = chain.without_top();
    }
    Ok(infos)
}

/// The facts about a layer; `below` finds out what an add-cow disk needs of those below it.
fn info(layer: &Layer, below: impl FnOnce() -> Below) -> Result<Info, OpenError> {
    let (cluster_size, backing, format_specific) = match layer.details() {
        LayerDetails::Raw => (None, None, None),
        LayerDetails::AddCow { header, geometry, allocated } => {
            let backing = header.backing.as_ref();
            let backing = backing.map(|file| (file.name.as_ref(), Some(file.format.as_str())));
            let data = add_cow_info(layer, header, geometry, *allocated, below())?;
            let size = header.cluster_size;
            (Some(size.bytes()), backing, Some(FormatSpecific::AddCow(data)))
        }
        LayerDetails::Qcow2(header) => {
            let backing = header.backing.as_ref();
            let backing = backing.map(|file| (file.name.as_ref(), file.format.as_deref()));
            let size = header.cluster_size;
            (Some(size.bytes()), backing, Some(FormatSpecific::Qcow2(qcow2_info(header))))
        }
        LayerDetails::Qed(qed::Opened { header, backing }) => {
            // It is written nowhere, but a flag says it.
            let format = header.backing_is_raw().then_some(RAW_FORMAT);
            let backing = backing.as_ref().map(|name| (name.as_ref(), format));
            (Some(header.cluster_size()), backing, None)
        }
    };
    Ok(Info {
        virtual_size: layer.virtual_size(),
        filename: shown(layer.path()),
        format: layer.format().name(),
        actual_size: actual_size(layer.own_file())?,
        cluster_size,
        backing: backing.map(|(name, format)| BackingInfo {
            name: shown(name),
            full_name: shown(&folder_of(layer.path()).join(name)),
            format: format.map(str::to_owned),
        }),
        dirty_flag: false,
        format_specific,
    })
}

/// What only add-cow has.
fn add_cow_info(
    layer: &Layer,
    header: &Header,
    geometry: &BitmapGeometry,
    allocated: u64,
    Below { left_to_stream, notes }: Below,
) -> Result<AddCowInfo, OpenError> {
    let raw = layer.data_file();
    let image_actual_size = actual_size(raw)?;
    Ok(AddCowInfo {
        image_filename: shown(header.image.name.as_ref()),
        image_format: header.image.format.clone(),
        full_image_filename: shown(raw.path()),
        image_actual_size,
        all_allocated: header.all_allocated,
        compat_features: header.compat_features,
        allocated_clusters: allocated,
        total_clusters: geometry.clusters(),
        overlay_actual_size: actual_size(layer.own_file())?.saturating_add(image_actual_size),
        left_to_stream,
        notes,
    })
}

/// What only qcow2 has.
fn qcow2_info(header: &qcow2::Header) -> Qcow2Info {
    let since_3 = |value| (header.version >= 3).then_some(value);
    let data_file = header.data_file.as_ref().filter(|_| header.has_external_data());
    Qcow2Info {
        compat: if header.version == 2 { "0.10" } else { "1.1" },
        compression_type: "zlib",
        lazy_refcounts: since_3(header.compatible & LAZY_REFCOUNTS != 0),
        refcount_bits: 1 << header.refcount_order,
        data_file: data_file.map(|name| shown(name.as_ref())),
        data_file_raw: data_file.map(|_| header.has_raw_data()),
        corrupt: since_3(false),
        extended_l2: since_3(false),
    }
}

/// A name as text.
fn shown(name: &Path) -> String {
    name.display().to_string()
}

/// Bytes that a file takes on its file system.
fn actual_size(file: &HostFile) -> Result<u64, OpenError> {
    file.allocated_len().map_err(|source| {
        let (action, path) = ("get the size of", file.path().to_owned());
        OpenError::Io { action, role: FileRole::Disk, path, source }
    })
}

/// Writes the facts in words.
fn write_human(out: &mut dyn Write, info: &Info) -> io::Result<()> {
    writeln!(out, "image: {}", printable(&info.filename))?;
    writeln!(out, "file format: {}", info.format)?;
    let size = info.virtual_size;
    writeln!(out, "virtual size: {} ({size} bytes)", human_size(size))?;
    writeln!(out, "disk size: {}", human_size(info.actual_size))?;
    if let Some(cluster_size) = info.cluster_size {
        writeln!(out, "cluster_size: {cluster_size}")?;
    }
    if let Some(backing) = &info.backing {
        writeln!(out, "backing file: {}", name_and_path(&backing.name, &backing.full_name))?;
        if let Some(format) = &backing.format {
            writeln!(out, "backing file format: {}", printable(format))?;
        }
    }
    match &info.format_specific {
        None => Ok(()),
        Some(FormatSpecific::AddCow(data)) => write_add_cow(out, data),
        Some(FormatSpecific::Qcow2(data)) => write_qcow2(out, data),
    }
}

/// Writes what only add-cow has.
fn write_add_cow(out: &mut dyn Write, data: &AddCowInfo) -> io::Result<()> {
    writeln!(out, "Format specific information:")?;
    let image = name_and_path(&data.image_filename, &data.full_image_filename);
    writeln!(out, "    image file: {image}")?;
    writeln!(out, "    image format: {}", printable(&data.image_format))?;
    writeln!(out, "    image disk size: {}", human_size(data.image_actual_size))?;
    writeln!(out, "    all allocated: {}", data.all_allocated)?;
    writeln!(out, "    compat features: {:#x}", data.compat_features)?;
    let (allocated, total) = (data.allocated_clusters, data.total_clusters);
    writeln!(out, "    allocated clusters: {allocated} of {total}")?;
    writeln!(out, "    overlay disk size: {}", human_size(data.overlay_actual_size))?;
    match data.left_to_stream {
        Some(bytes) => writeln!(out, "    left to stream: {} ({bytes} bytes)", human_size(bytes))?,
        None => writeln!(out, "    left to stream: unknown")?,
    }
    for note in &data.notes {
        writeln!(out, "note: {}", printable(note))?;
    }
    Ok(())
}

/// Writes what only qcow2 has, in the words of qemu-img.
fn write_qcow2(out: &mut dyn Write, data: &Qcow2Info) -> io::Result<()> {
    writeln!(out, "Format specific information:")?;
    writeln!(out, "    compat: {}", data.compat)?;
    writeln!(out, "    compression type: {}", data.compression_type)?;
    if let Some(lazy) = data.lazy_refcounts {
        writeln!(out, "    lazy refcounts: {lazy}")?;
    }
    writeln!(out, "    refcount bits: {}", data.refcount_bits)?;
    if let Some(name) = &data.data_file {
        writeln!(out, "    data file: {}", printable(name))?;
    }
    for (name, value) in [
        ("data file raw", data.data_file_raw),
        ("corrupt", data.corrupt),
        ("extended l2", data.extended_l2),
    ] {
        if let Some(value) = value {
            writeln!(out, "    {name}: {value}")?;
        }
    }
    Ok(())
}

/// A name as stored, and where it leads if that is somewhere else.
fn name_and_path(name: &str, full: &str) -> String {
    if name == full {
        printable(name)
    } else {
        format!("{} (actual path: {})", printable(name), printable(full))
    }
}
