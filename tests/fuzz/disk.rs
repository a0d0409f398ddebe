//! A small disk on the simulated host, as an input of `requests` wants it: sizes, backing file,
//! which clusters are allocated. Also what a reader of the format sees in its files.
//!
//! Not here: what is done to it.

use std::sync::Arc;

use addcow::format::BitmapGeometry;
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::Chain as BackingChain;
use addcow::image::{Image, ImageState};
use addcow::storage::sim::{SimDisk, SimStorage};
use addcow::units::ClusterSize;

use super::content::Disk;
use super::{Input, pattern, to_u64, to_usize};

/// Bytes in a sector.
const SECTOR: usize = 512;

/// The files of a disk: raw image 0, side file 1, backing file 2.
pub struct Files {
    /// The host.
    pub host: SimDisk,
    /// The shape of the bitmap.
    pub geometry: BitmapGeometry,
    /// What it shows.
    pub disk: Disk,
    /// Open.
    pub image: Image<SimStorage>,
}

impl Files {
    /// Makes a disk.
    pub fn new(input: &mut Input<'_>, concurrent: bool, read_only: bool) -> Self {
        let bits = 9 + u32::from(input.u8() % 5);
        let sectors = 1 + to_u64(input.below(96));
        let (backing, shift) = (input.u8(), input.u16());
        let (allocated, seed) = (input.u16(), input.u8());
        let size = to_usize(sectors) * SECTOR;
        let backing_len = match backing % 4 {
            0 => 0,
            1 => usize::from(shift) % (size + 1),
            2 => size + usize::from(shift) % 8192,
            _ => size,
        };
        let cluster = ClusterSize::from_bits(bits).expect("in range");
        let geometry = BitmapGeometry::new(cluster, to_u64(size)).expect("small");
        let mut bitmap = vec![0; to_usize(geometry.file_len())];
        let (raw, base) = (pattern(0x10, 0, size), pattern(0x20, 0, backing_len));
        let mut shown = base.clone();
        shown.resize(size, 0);
        for index in (0..to_usize(geometry.clusters())).filter(|i| allocated >> (i % 16) & 1 == 1) {
            let (byte, mask) = geometry.position(to_u64(index));
            bitmap[to_usize(byte)] |= mask;
            let (start, end) = (index << bits, ((index + 1) << bits).min(size));
            shown[start..end].copy_from_slice(&raw[start..end]);
        }
        let host = SimDisk::new(seed.into());
        host.set_max_delay(if concurrent { 3 } else { 0 });
        let files = [host.create(&raw), host.create(&bitmap), host.create(&base)];
        let mut map = AllocationMap::empty(&geometry).expect("little memory");
        map.load(0, &bitmap[to_usize(geometry.offset())..][..to_usize(geometry.used_len())]);
        let backing_len = to_u64(backing_len);
        let state = Arc::new(ImageState::add_cow(geometry, map, backing_len, !read_only));
        let [raw, side, base] = files;
        let chain = (backing_len > 0).then(|| BackingChain::raw(base, backing_len));
        let image = Image::new(state, raw, Some(side), chain);
        Self { host, geometry, disk: Disk::new(&shown), image }
    }

    /// What a reader of the format sees in the files.
    pub fn flat_view(host: &SimDisk, geometry: &BitmapGeometry) -> Vec<u8> {
        let [raw, side, mut view] = [0, 1, 2].map(|number| host.file(number).content());
        view.resize(raw.len(), 0);
        let cluster = to_usize(geometry.cluster_size().bytes());
        let bitmap = &side[cluster.max(4096)..];
        for (index, piece) in raw.chunks(cluster).enumerate() {
            if bitmap[index / 8] >> (index % 8) & 1 == 1 {
                view[index * cluster..][..piece.len()].copy_from_slice(piece);
            }
        }
        view
    }
}
