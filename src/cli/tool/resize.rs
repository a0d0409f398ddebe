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
use crate::cli::tool::on_disk;
use crate::cli::{Outcome, failed, size};
use crate::executor::block_on;
use crate::image::chain::DiskFormat;
use crate::image::create::{check_size, new_geometry};
use crate::image::inspect::{DiskAccess, DiskFiles};
use crate::image::open::{OpenOptions, raw};
use crate::image::session;
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

/// The size in bytes that `text` asks for of a disk that has `present` bytes now.
fn new_size(text: &OsStr, present: u64) -> Result<u64, Box<dyn Error>> {
    let text = &*text.to_string_lossy();
    let bytes = |digits| size::parse(digits).map_err(|error| error.about(text));
    if let Some(more) = text.strip_prefix('+') {
        let size = present.checked_add(bytes(more)?);
        Ok(size.ok_or_else(|| size::SizeError::TooLarge(text.to_owned()))?)
    } else if let Some(less) = text.strip_prefix('-') {
        let size = present.checked_sub(bytes(less)?);
        Ok(size.ok_or_else(|| format!("invalid size '{text}': the disk has {present} bytes"))?)
    } else {
        Ok(bytes(text)?)
    }
}

/// Resizes a disk.
pub fn run(arguments: &Arguments) -> Outcome {
    let path = &arguments.disk;
    match arguments.format {
        DiskFormat::AddCow => resize_disk(path, &arguments.size, arguments.shrink)?,
        DiskFormat::Raw => resize_raw(path, &arguments.size, arguments.shrink)?,
        other => return Err(format!("disks in format '{other}' cannot be resized").into()),
    }
    if !arguments.quiet {
        print(|out| Ok(writeln!(out, "Image resized.")?))?;
    }
    Ok(0)
}

/// Resizes an add-cow disk.
fn resize_disk(path: &Path, size: &OsStr, shrink: bool) -> Result<(), Box<dyn Error>> {
    let disk = DiskFiles::open(path, DiskAccess::WRITE)?;
    disk.check_complete()?;
    let present = disk.geometry.virtual_size();
    let size = new_size(size, present)?;
    check_size(size)?;
    let new = new_geometry(path, disk.header.cluster_size, size)?;
    check_change(path, &disk.raw, present, size, shrink)?;
    let (side, raw) =
        (FileStorage::new(Arc::clone(&disk.side)), FileStorage::new(Arc::clone(&disk.raw)));
    // A disk that gets smaller shows nothing new of its backing file.
    let backing = if size > present { disk.open_backing(CacheMode::Buffered)? } else { None };
    let backing = backing.as_ref().map(|chain| chain.handle(FileStorage::new));
    let header = disk.header.clone();
    session::renew_in(&disk.side)?;
    let parts = DiskParts { side: &side, raw: &raw, header, geometry: disk.geometry };
    block_on(resize::resize(&parts, backing.as_ref(), new)).map_err(on_disk(path))
}

/// Resizes a raw image. Its length is all there is to it.
///
/// To the byte: its last part of a sector is on no disk, but it is what somebody's file holds, and
/// must not be cut off unasked.
fn resize_raw(path: &Path, size: &OsStr, shrink: bool) -> Result<(), Box<dyn Error>> {
    let disk = raw(path, OpenOptions { writable: true, ..OpenOptions::READ_ONLY })?;
    let present = disk.raw.len();
    let present = present.map_err(failed(format!("cannot resize '{}'", path.display())))?;
    let size = new_size(size, present)?;
    check_size(size)?;
    check_change(path, &disk.raw, present, size, shrink)?;
    let storage = FileStorage::new(Arc::clone(&disk.raw));
    let resized = storage.set_len(size).and_then(|()| block_on(storage.sync()));
    resized.map_err(failed(format!("cannot resize '{}'", path.display())))
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
        let size = |text: &str| new_size(OsStr::new(text), 1 << 20).map_err(|e| e.to_string());
        assert_eq!(size("2M"), Ok(2 << 20));
        assert_eq!(size("+1M"), Ok(2 << 20));
        assert_eq!(size("-512k"), Ok(512 << 10));
        assert_eq!(size("-1M"), Ok(0));
        assert_eq!(size("-2M").unwrap_err(), "invalid size '-2M': the disk has 1048576 bytes");
        for text in ["--1", "+-1", "-", "+", "", "1X", "+15.999999999999999999E"] {
            let error = size(text).unwrap_err();
            assert!(error.starts_with(&format!("invalid size '{text}': ")), "{error}");
        }
    }
}
