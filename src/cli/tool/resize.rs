//! `addcow resize`: a larger or a smaller disk.
//!
//! SIZE is that of the disk afterwards, or with a sign what is added or taken away, as qemu-img has
//! it. To make a disk smaller needs an option of its own, since it loses data.
//!
//! Not here: what is done to the files (`jobs::resize`).

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use crate::cli::output::print;
use crate::cli::{Outcome, size};
use crate::executor::block_on;
use crate::image::chain::DiskFormat;
use crate::image::create::{check_size, new_geometry};
use crate::image::inspect::{DiskAccess, DiskFiles};
use crate::image::open::{OpenOptions, raw};
use crate::jobs::parts::DiskParts;
use crate::jobs::resize;
use crate::storage::Storage;
use crate::storage::file::FileStorage;
use crate::storage::host_file::{CacheMode, HostFile};

/// The command line of `addcow resize`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Format of the disk: add-cow, or raw
    #[arg(short, long, value_name = "FMT", default_value = "add-cow")]
    format: DiskFormat,
    /// Allow the disk to become smaller, which loses what lies behind its new end
    #[arg(long)]
    shrink: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The disk: its add-cow file, or with -f raw a raw image
    #[arg(value_name = "DISK")]
    disk: PathBuf,
    /// The new size; +SIZE adds to the present one, -SIZE takes away from it
    #[arg(value_name = "[+-]SIZE", allow_hyphen_values = true)]
    size: OsString,
}

/// A size as it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NewSize {
    /// So many bytes.
    Absolute(u64),
    /// So many more than now.
    More(u64),
    /// So many less than now.
    Less(u64),
}

impl NewSize {
    /// What `text` stands for.
    fn parse(text: &OsStr) -> Result<Self, size::SizeError> {
        let text = text.to_string_lossy();
        if let Some(more) = text.strip_prefix('+') {
            size::parse(more).map(Self::More)
        } else if let Some(less) = text.strip_prefix('-') {
            size::parse(less).map(Self::Less)
        } else {
            size::parse(&text).map(Self::Absolute)
        }
    }

    /// The size in bytes of a disk that has `present` bytes now.
    fn of(self, present: u64) -> Result<u64, String> {
        match self {
            Self::Absolute(size) => Ok(size),
            Self::More(more) => present
                .checked_add(more)
                .ok_or_else(|| format!("invalid size +{more}: larger than the largest file")),
            Self::Less(less) => present
                .checked_sub(less)
                .ok_or_else(|| format!("invalid size -{less}: the disk has only {present} bytes")),
        }
    }
}

/// Resizes a disk.
pub fn run(arguments: &Arguments) -> Outcome {
    let path = &arguments.disk;
    let size = NewSize::parse(&arguments.size)?;
    match arguments.format {
        DiskFormat::AddCow => resize_disk(path, size, arguments.shrink)?,
        DiskFormat::Raw => resize_raw(path, size, arguments.shrink)?,
        other => return Err(format!("disks in format '{other}' cannot be resized").into()),
    }
    if !arguments.quiet {
        print(|out| Ok(writeln!(out, "Image resized.")?))?;
    }
    Ok(0)
}

/// Resizes an add-cow disk.
fn resize_disk(path: &Path, size: NewSize, shrink: bool) -> Result<(), Box<dyn Error>> {
    let disk = DiskFiles::open(path, DiskAccess::WRITE)?;
    let present = disk.geometry.virtual_size();
    let size = size.of(present)?;
    check_size(size)?;
    let new = new_geometry(path, disk.header.cluster_size, size)?;
    check_change(path, &disk.raw, present, size, shrink)?;
    let (side, raw) =
        (FileStorage::new(Arc::clone(&disk.side)), FileStorage::new(Arc::clone(&disk.raw)));
    // A disk that gets smaller shows nothing new of its backing file.
    let backing = if size > present { disk.open_backing(CacheMode::Buffered)? } else { None };
    let backing = backing.as_ref().map(|chain| chain.handle(FileStorage::new));
    let header = disk.header.clone();
    let parts = DiskParts { side: &side, raw: &raw, header, geometry: disk.geometry };
    Ok(block_on(resize::resize(&parts, backing.as_ref(), new))?)
}

/// Resizes a raw image. Its length is all there is to it.
fn resize_raw(path: &Path, size: NewSize, shrink: bool) -> Result<(), Box<dyn Error>> {
    let disk = raw(path, OpenOptions { writable: true, ..OpenOptions::READ_ONLY })?;
    let present = disk.state.virtual_size();
    let size = size.of(present)?;
    check_size(size)?;
    check_change(path, &disk.raw, present, size, shrink)?;
    let failed = |error: std::io::Error| format!("cannot resize '{}': {error}", path.display());
    let storage = FileStorage::new(Arc::clone(&disk.raw));
    storage.set_len(size).map_err(failed)?;
    Ok(block_on(storage.sync()).map_err(failed)?)
}

/// Refuses a change that `shrink` does not cover, or that the raw image does not allow.
fn check_change(
    path: &Path,
    raw: &HostFile,
    present: u64,
    size: u64,
    shrink: bool,
) -> Result<(), String> {
    let path = path.display();
    if size < present && !shrink {
        return Err(format!(
            "'{path}' would shrink from {present} to {size} bytes and lose what lies behind: \
             --shrink allows that"
        ));
    }
    if raw.is_device() {
        let raw = raw.path().display();
        return Err(format!("'{path}' has the size of the block device '{raw}'"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_a_sign_are_relative() {
        let size = |text: &str| NewSize::parse(OsStr::new(text)).unwrap().of(1 << 20);
        assert_eq!(size("2M"), Ok(2 << 20));
        assert_eq!(size("+1M"), Ok(2 << 20));
        assert_eq!(size("-512k"), Ok(512 << 10));
        assert_eq!(size("-1M"), Ok(0));
        assert!(size("-2M").is_err() && size("+15.9999E").is_err());
        for text in ["--1", "+-1", "-", "+", "", "1X"] {
            assert!(NewSize::parse(OsStr::new(text)).is_err(), "{text}");
        }
    }
}
