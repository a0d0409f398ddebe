//! Measuring: how long the files of a disk would be that holds what another one does.
//!
//! As with qemu-img a raw image counts with its whole length, although its holes take no space: so
//! what is needed is all that can ever be needed.
//!
//! Not here: how much space a disk takes on its file system.

use crate::format::BitmapGeometry;
use crate::format::bitmap::MAX_VIRTUAL_SIZE;
use crate::image::OpenError;
use crate::image::create::{default_cluster_size, new_geometry};
use crate::units::{ClusterSize, SECTOR_SIZE};

/// The format of a disk to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A raw image.
    Raw,
    /// An add-cow file and its raw image, with clusters of this size, or of that which `create`
    /// would choose.
    AddCow(Option<ClusterSize>),
}

/// How long the files of a new disk of `size` bytes, rounded up to a sector, would be together, in
/// bytes.
///
/// # Errors
/// An [`OpenError`] if there is no such disk.
pub fn measure(target: Target, size: u64) -> Result<u64, OpenError> {
    if size > MAX_VIRTUAL_SIZE {
        let problem = "larger than the largest possible file, 8 EiB less one byte";
        return Err(OpenError::InvalidSize { size, problem });
    }
    let size = size.next_multiple_of(SECTOR_SIZE);
    match target {
        Target::Raw => Ok(size),
        Target::AddCow(cluster) => {
            let cluster = cluster.unwrap_or_else(|| default_cluster_size(size));
            let geometry = new_geometry("new".as_ref(), cluster, size)?;
            Ok(size.saturating_add(BitmapGeometry::file_len(&geometry)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_to_sectors_and_add_cow_files_counted() {
        let cluster = ClusterSize::from_bits(16);
        assert_eq!(measure(Target::Raw, 1000).unwrap(), 1024);
        // docs/format.md, "Bitmap": 6 GiB and a sector.
        let size = (6 << 30) + 512;
        assert_eq!(measure(Target::AddCow(cluster), size).unwrap(), size + 131_072);
        assert_eq!(measure(Target::AddCow(None), 1 << 20).unwrap(), (1 << 20) + 8192);
        assert!(measure(Target::AddCow(None), u64::MAX).is_err());
        assert!(measure(Target::Raw, u64::MAX).is_err());
    }
}
