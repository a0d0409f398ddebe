//! `addcow info`: what a disk is made of.
//!
//! Shows everything but the backing file's own facts even where the backing file is missing.
//!
//! Not here: whether all is well (`check`).

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::DiskArguments;
use crate::cli::Outcome;
use crate::cli::output::{Output, human_size, print, printable, write_json};
use crate::format::{BitmapGeometry, Header};
use crate::image::chain::{DiskFormat, Layer, LayerDetails};
use crate::image::inspect::{DiskAccess, DiskFiles};
use crate::image::open::{RAW_FORMAT, folder_of, raw};
use crate::image::{FileRole, OpenError};
use crate::storage::host_file::{CacheMode, HostFile};

/// The command line of `addcow info`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Which disk, and how to show it.
    #[command(flatten)]
    disk: DiskArguments,
    /// Show the backing file too, which must then be there
    #[arg(short, long)]
    backing_chain: bool,
}

/// The facts about one file of a chain; the keys are those of qemu-img.
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
    /// The backing file's name as stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    /// The backing file's name as it is looked up.
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<String>,
    /// The backing file's format as stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    /// Whether the disk needs repair before it is used: never, by design of the format.
    dirty_flag: bool,
    /// What only add-cow has.
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<FormatSpecific>,
}

/// What only one format has.
#[derive(Debug, Serialize)]
struct FormatSpecific {
    /// The format.
    #[serde(rename = "type")]
    kind: &'static str,
    /// Its facts.
    data: AddCowInfo,
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
}

/// Shows a disk.
pub fn run(arguments: &Arguments) -> Outcome {
    let path = &arguments.disk.disk;
    let chain = match arguments.disk.format {
        DiskFormat::Raw => {
            let image = raw(path, arguments.disk.options())?;
            vec![raw_info(&image.raw, image.state.virtual_size())?]
        }
        DiskFormat::AddCow => {
            let disk = DiskFiles::open(
                path,
                DiskAccess { locking: arguments.disk.locking(), ..DiskAccess::READ },
            )?;
            let own = AddCowFiles {
                header: &disk.header,
                geometry: &disk.geometry,
                side: &disk.side,
                raw: &disk.raw,
                backing_path: disk.backing_path.clone(),
                allocated: disk.allocated_clusters()?,
            };
            let mut chain = vec![add_cow_info(path, &own)?];
            if arguments.backing_chain
                && let Some(backing) = disk.open_backing(CacheMode::Buffered)?
            {
                for layer in backing.layers() {
                    chain.push(layer_info(layer)?);
                }
            }
            chain
        }
    };
    print(|out| {
        match (arguments.disk.output, chain.as_slice()) {
            (Output::Json, [info]) if !arguments.backing_chain => write_json(out, info)?,
            (Output::Json, chain) => write_json(out, &chain)?,
            (Output::Human, chain) => {
                for (index, info) in chain.iter().enumerate() {
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

/// The facts about a layer of a chain.
fn layer_info(layer: &Layer) -> Result<Info, OpenError> {
    let mut files = layer.files();
    let (first, second) = (files.next(), files.next());
    match (layer.details(), first, second) {
        (LayerDetails::AddCow { header, geometry, allocated }, Some(raw), Some(side)) => {
            let backing = header.backing.as_ref();
            let folder = folder_of(layer.path());
            let disk = AddCowFiles {
                header,
                geometry,
                side,
                raw,
                backing_path: backing.map(|file| file.name.resolve(folder)),
                allocated: *allocated,
            };
            add_cow_info(layer.path(), &disk)
        }
        (_, Some(file), _) => raw_info(file, layer.virtual_size()),
        (_, None, _) => unreachable!("a layer has at least one file"),
    }
}

/// What [`add_cow_info`] is made of.
#[derive(Debug)]
struct AddCowFiles<'a> {
    /// The header.
    header: &'a Header,
    /// The shape of the bitmap.
    geometry: &'a BitmapGeometry,
    /// The add-cow file.
    side: &'a HostFile,
    /// The raw image.
    raw: &'a HostFile,
    /// Where the backing file would be.
    backing_path: Option<PathBuf>,
    /// Clusters in the raw image.
    allocated: u64,
}

/// The facts about an add-cow disk.
fn add_cow_info(path: &Path, disk: &AddCowFiles<'_>) -> Result<Info, OpenError> {
    let header = disk.header;
    let shown = |name: &Path| name.display().to_string();
    let data = AddCowInfo {
        image_filename: shown(header.image.name.as_ref()),
        image_format: header.image.format.clone(),
        full_image_filename: shown(disk.raw.path()),
        image_actual_size: disk.raw.allocated_len().map_err(size_error(disk.raw))?,
        all_allocated: header.all_allocated,
        compat_features: header.compat_features,
        allocated_clusters: disk.allocated,
        total_clusters: disk.geometry.clusters(),
    };
    let backing = header.backing.as_ref();
    Ok(Info {
        virtual_size: disk.geometry.virtual_size(),
        filename: shown(path),
        format: DiskFormat::AddCow.name(),
        actual_size: disk.side.allocated_len().map_err(size_error(disk.side))?,
        cluster_size: Some(header.cluster_size.bytes()),
        backing_filename: backing.map(|file| shown(file.name.as_ref())),
        full_backing_filename: disk.backing_path.as_deref().map(shown),
        backing_filename_format: backing.map(|file| file.format.clone()),
        dirty_flag: false,
        format_specific: Some(FormatSpecific { kind: DiskFormat::AddCow.name(), data }),
    })
}

/// The facts about a raw image or a raw backing file of which a guest can see that many bytes.
fn raw_info(file: &HostFile, virtual_size: u64) -> Result<Info, OpenError> {
    Ok(Info {
        virtual_size,
        filename: file.path().display().to_string(),
        format: RAW_FORMAT,
        actual_size: file.allocated_len().map_err(size_error(file))?,
        cluster_size: None,
        backing_filename: None,
        full_backing_filename: None,
        backing_filename_format: None,
        dirty_flag: false,
        format_specific: None,
    })
}

/// Says whose size the host did not tell.
fn size_error(file: &HostFile) -> impl FnOnce(io::Error) -> OpenError {
    let path = file.path().to_owned();
    move |source| OpenError::Io { action: "get the size of", role: FileRole::Raw, path, source }
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
    if let (Some(name), Some(full)) = (&info.backing_filename, &info.full_backing_filename) {
        writeln!(out, "backing file: {}", name_and_path(name, full))?;
    }
    if let Some(format) = &info.backing_filename_format {
        writeln!(out, "backing file format: {}", printable(format))?;
    }
    let Some(FormatSpecific { data, .. }) = &info.format_specific else { return Ok(()) };
    writeln!(out, "Format specific information:")?;
    let image = name_and_path(&data.image_filename, &data.full_image_filename);
    writeln!(out, "    image file: {image}")?;
    writeln!(out, "    image format: {}", printable(&data.image_format))?;
    writeln!(out, "    image disk size: {}", human_size(data.image_actual_size))?;
    writeln!(out, "    all allocated: {}", data.all_allocated)?;
    writeln!(out, "    compat features: {:#x}", data.compat_features)?;
    let (allocated, total) = (data.allocated_clusters, data.total_clusters);
    writeln!(out, "    allocated clusters: {allocated} of {total}")
}

/// A name as stored, and where it leads if that is somewhere else.
fn name_and_path(name: &str, full: &str) -> String {
    if name == full {
        printable(name)
    } else {
        format!("{} (actual path: {})", printable(name), printable(full))
    }
}
