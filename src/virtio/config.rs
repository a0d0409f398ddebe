//! The device configuration: feature bits and `struct virtio_blk_config` (VIRTIO 1.3, 5.2.3 and
//! 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use crate::image::ImageState;
use crate::units::SECTOR_SIZE;

/// Offset of `writeback` in the configuration: the only byte that a driver may write.
pub const WRITEBACK_OFFSET: u32 = 32;

/// Bytes of a block, the unit that drivers should use: always one sector, so that guests with
/// 512-byte file systems and boot loaders work on every disk.
const BLOCK_SIZE: u32 = 512;

/// The most segments of one DISCARD or WRITE_ZEROES request.
pub const MAX_SEGMENTS: u32 = 32;

/// The most sectors of one DISCARD segment: 1 GiB, so that a request stays short whatever the file
/// system does.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// The most sectors of one WRITE_ZEROES segment: 128 MiB, which may have to be written.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 18;

/// `struct virtio_blk_config` up to the fields of the features that we offer.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireConfig {
    /// Size in 512-byte sectors, whatever the block size.
    capacity: U64,
    /// Not offered (SIZE_MAX): 0.
    size_max: U32,
    /// The most data segments of a request.
    seg_max: U32,
    /// Not offered (GEOMETRY): 0.
    geometry: U32,
    /// Bytes of a block.
    blk_size: U32,
    /// log2 of the blocks in a physical block.
    physical_block_exp: u8,
    /// Blocks before the first aligned one.
    alignment_offset: u8,
    /// Suggested least I/O in blocks.
    min_io_size: U16,
    /// Suggested best I/O in blocks.
    opt_io_size: U32,
    /// 1 = write-back.
    writeback: u8,
    /// Padding.
    unused0: u8,
    /// Number of request queues.
    num_queues: U16,
    /// The most sectors of a DISCARD segment.
    max_discard_sectors: U32,
    /// The most segments of a DISCARD request.
    max_discard_seg: U32,
    /// Alignment of a discard in sectors.
    discard_sector_alignment: U32,
    /// The most sectors of a WRITE_ZEROES segment.
    max_write_zeroes_sectors: U32,
    /// The most segments of a WRITE_ZEROES request.
    max_write_zeroes_seg: U32,
    /// 1 = a write of zeros with the unmap flag may give space back.
    write_zeroes_may_unmap: u8,
    /// Padding.
    unused1: [u8; 3],
}

// 5.2.4: write_zeroes_may_unmap is byte 56, and front ends ask for 60 bytes.
const _: () = assert!(size_of::<WireConfig>() == 60);
const _: () = assert!(std::mem::offset_of!(WireConfig, writeback) == WRITEBACK_OFFSET as usize);

/// What is fixed about a device.
#[derive(Debug, Clone)]
pub struct DeviceConfig {
    /// Number of request queues, 1 to 64.
    pub num_queues: u16,
    /// Size of the queues that the front end is expected to make; sets seg_max.
    pub queue_size: u16,
    /// What GET_ID answers: at most 20 bytes (5.2.6: no NUL if it has 20).
    pub serial: Vec<u8>,
}

/// The feature bits that a device on `image` offers.
#[must_use]
pub fn offered_features(image: &ImageState) -> u64 {
    let always = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
    ];
    let writable = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
    let read_only = [VIRTIO_BLK_F_RO];
    let by_access: &[u32] = if image.is_writable() { &writable } else { &read_only };
    always.iter().chain(by_access).fold(0, |bits, bit| bits | 1_u64 << bit)
}

/// Whether `features` has bit number `bit`.
#[must_use]
pub fn has_feature(features: u64, bit: u32) -> bool {
    features.checked_shr(bit).unwrap_or(0) & 1 == 1
}

/// `len` bytes of the configuration from byte `offset`; what lies past its end reads zero.
#[must_use]
pub fn read_config(
    image: &ImageState,
    config: &DeviceConfig,
    writeback: bool,
    offset: u32,
    len: u32,
) -> Vec<u8> {
    let wire = wire_config(image, config, writeback);
    let bytes = wire.as_bytes().iter().copied().chain(std::iter::repeat(0));
    let skip = usize::try_from(offset).unwrap_or(usize::MAX).min(size_of::<WireConfig>());
    bytes.skip(skip).take(usize::try_from(len).unwrap_or(0)).collect()
}

/// The configuration as it stands.
fn wire_config(image: &ImageState, config: &DeviceConfig, writeback: bool) -> WireConfig {
    // At most 2 MiB / 512 = 4096.
    let cluster_sectors = image.cluster_size().bytes() / SECTOR_SIZE;
    let cluster = u16::try_from(cluster_sectors).unwrap_or(u16::MAX);
    // 4 KiB, what file systems align to, or the cluster if that is smaller.
    let physical_block_exp = u8::try_from(cluster.min(8).trailing_zeros()).unwrap_or(0);
    WireConfig {
        capacity: (image.virtual_size() / SECTOR_SIZE).into(),
        size_max: 0.into(),
        // 2.7.5.3.1: a chain is not longer than the queue; header and status take one each.
        seg_max: u32::from(config.queue_size.saturating_sub(2).max(1)).into(),
        geometry: 0.into(),
        blk_size: BLOCK_SIZE.into(),
        physical_block_exp,
        alignment_offset: 0,
        // Writes of whole clusters never copy anything up.
        min_io_size: cluster.into(),
        opt_io_size: u32::from(cluster).into(),
        writeback: writeback.into(),
        unused0: 0,
        num_queues: config.num_queues.into(),
        max_discard_sectors: MAX_DISCARD_SECTORS.into(),
        max_discard_seg: MAX_SEGMENTS.into(),
        discard_sector_alignment: u32::from(cluster).into(),
        max_write_zeroes_sectors: MAX_WRITE_ZEROES_SECTORS.into(),
        max_write_zeroes_seg: MAX_SEGMENTS.into(),
        write_zeroes_may_unmap: 1,
        unused1: [0; 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_reads_the_same_in_pieces_and_zero_beyond() {
        let image = ImageState::raw(10 << 20, true);
        let config = DeviceConfig { num_queues: 4, queue_size: 128, serial: Vec::new() };
        let whole = read_config(&image, &config, true, 0, 64);
        assert_eq!(whole.len(), 64);
        assert_eq!(&whole[..8], &[0, 0x50, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&whole[12..16], &[126, 0, 0, 0]);
        assert_eq!(&whole[24..32], &[3, 0, 8, 0, 8, 0, 0, 0]);
        assert_eq!((whole[32], whole[34]), (1, 4));
        assert_eq!(&whole[60..], &[0; 4]);
        assert_eq!(read_config(&image, &config, true, 20, 8), &whole[20..28]);
        assert_eq!(read_config(&image, &config, true, u32::MAX, 4), [0; 4]);
    }
}
