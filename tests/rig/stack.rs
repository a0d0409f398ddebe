//! A disk on a backing chain on a simulated host, with a model of what it shows: what the tests of
//! jobs share.
//!
//! Layer 0 is the disk, an add-cow one; so may be those below it; the last may be a raw file of any
//! length. What a raw image holds where nothing is allocated is garbage. Among the data there are
//! sectors and clusters of zeros.
//!
//! Not here: what is done to the disk, and when the power goes.

use std::ops::RangeInclusive;
use std::sync::Arc;

use addcow::executor::block_on;
use addcow::format::{BitmapGeometry, FileName, FileReference, FileRole, Header};
use addcow::image::allocation::AllocationMap;
use addcow::image::chain::{Chain, ChainLayer, ClusterMap};
use addcow::image::create::NewSide;
use addcow::image::{Image, ImageState, load};
use addcow::storage::sim::{SimDisk, SimStorage};
use addcow::storage::{IoBuffer, Storage};
use addcow::units::ClusterSize;
use fastrand::Rng;

use super::SECTOR;

/// An add-cow layer.
#[derive(Debug, Clone)]
pub struct Overlay {
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Size in sectors.
    pub sectors: u64,
    /// Clusters that are allocated.
    pub allocated: Vec<u64>,
    /// ALL_ALLOCATED in the header.
    pub all_allocated: bool,
}

impl Overlay {
    /// A layer of whole clusters, of which these are allocated.
    pub fn plain(cluster_bits: u32, clusters: u64, allocated: &[u64]) -> Self {
        let sectors = (clusters << cluster_bits) / SECTOR;
        Self { cluster_bits, sectors, allocated: allocated.to_vec(), all_allocated: false }
    }

    /// A layer of up to so many clusters of a size in `bits`, chosen by `rng`; its last cluster is
    /// often partial.
    fn random(rng: &mut Rng, bits: RangeInclusive<u32>, most: u64) -> Self {
        let cluster_bits = rng.u32(bits);
        let cluster = 1_u64 << cluster_bits;
        let sectors = rng.u64(1..=most * cluster / SECTOR);
        let clusters = (sectors * SECTOR).div_ceil(cluster);
        let allocated = (0..clusters).filter(|_| rng.u32(0..3) == 0).collect();
        Self { cluster_bits, sectors, allocated, all_allocated: rng.u32(0..16) == 0 }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        usize::try_from(self.sectors * SECTOR).expect("small")
    }

    /// Where the bitmap lies.
    fn geometry(&self) -> BitmapGeometry {
        let size = ClusterSize::from_bits(self.cluster_bits).expect("in range");
        BitmapGeometry::new(size, self.sectors * SECTOR).expect("not too large")
    }

    /// Whether the layer has the byte at `offset`.
    fn has(&self, offset: usize) -> bool {
        let cluster = (offset >> self.cluster_bits) as u64;
        self.all_allocated || self.allocated.contains(&cluster)
    }

    /// The content of the side file, encoded by what `create` uses.
    fn side(&self, has_backing: bool) -> Vec<u8> {
        let reference = |role, name| FileReference {
            name: FileName::new(role, name).expect("a plain name"),
            format: "raw".to_owned(),
        };
        let smallest = ClusterSize::from_bits(12).expect("in range");
        let geometry = self.geometry();
        let header = Header {
            cluster_size: geometry.cluster_size().max(smallest),
            backing: has_backing.then(|| reference(FileRole::Backing, "base.img")),
            image: reference(FileRole::Image, "disk.raw"),
            all_allocated: self.all_allocated,
            compat_features: 0,
        };
        let file = SimDisk::new(0).create(&[]);
        block_on(NewSide::new(&header, geometry).expect("valid").write(&file)).expect("no faults");
        let mut bytes = file.content();
        // Smaller clusters are read but not created: the header's word is the only difference.
        bytes[20..24].copy_from_slice(&self.cluster_bits.to_le_bytes());
        for cluster in &self.allocated {
            let (byte, mask) = geometry.position(*cluster);
            bytes[usize::try_from(byte).expect("small")] |= mask;
        }
        bytes
    }
}

/// What a disk and its chain are made of.
#[derive(Debug, Clone)]
pub struct Shape {
    /// The add-cow layers from the top down; at least one.
    pub overlays: Vec<Overlay>,
    /// Length in bytes of the raw file at the bottom, if there is one.
    pub base_len: Option<usize>,
}

impl Shape {
    /// A small disk on `overlays - 1` others, and mostly a raw file, chosen by `rng`.
    pub fn random(rng: &mut Rng, overlays: usize) -> Self {
        Self::random_of(rng, overlays, 9..=13, 6)
    }

    /// The same of up to `most` clusters each, of sizes in `bits`.
    pub fn random_of(rng: &mut Rng, overlays: usize, bits: RangeInclusive<u32>, most: u64) -> Self {
        let overlays: Vec<_> =
            (0..overlays).map(|_| Overlay::random(rng, bits.clone(), most)).collect();
        let len = overlays[0].len();
        let base_len = match rng.u32(0..4) {
            0 => None,
            // To the byte.
            1 => Some(rng.usize(0..len)),
            2 => Some(len + rng.usize(0..20_000)),
            _ => Some(len),
        };
        Self { overlays, base_len }
    }
}

/// A disk and its chain on a simulated host. File `2 * n` is the raw image of overlay `n`, file
/// `2 * n + 1` its side file; the last is the raw file at the bottom.
#[derive(Debug)]
pub struct Stack {
    /// What it was made of.
    pub shape: Shape,
    /// The host.
    pub disk: SimDisk,
    /// What each overlay showed when it was made, and behind them what the raw file held.
    pub contents: Vec<Vec<u8>>,
}

/// Bytes of a layer: each sector different, some of them zeros, of a large layer long runs too.
fn data(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut zeros_until = 0;
    let longest = (len / 512 / 16).max(16);
    for (number, sector) in bytes.chunks_mut(512).enumerate() {
        if rng.u32(0..12) == 0 {
            let longest = if rng.u32(0..8) == 0 { longest } else { 16 };
            zeros_until = number + rng.usize(1..=longest);
        }
        if number >= zeros_until {
            sector.fill_with(|| rng.u8(..));
        }
    }
    bytes
}

impl Stack {
    /// Makes the files; `seed` decides about their content, delays and power cuts.
    pub fn new(shape: &Shape, seed: u64) -> Self {
        let disk = SimDisk::new(seed);
        let mut rng = Rng::with_seed(seed ^ 0x57ac);
        let raws: Vec<_> = shape.overlays.iter().map(|o| data(&mut rng, o.len())).collect();
        let base = shape.base_len.map(|len| data(&mut rng, len));
        let mut contents = vec![base.clone().unwrap_or_default()];
        for (overlay, raw) in shape.overlays.iter().zip(&raws).rev() {
            let mut content = contents[0].clone();
            content.resize(overlay.len(), 0);
            for offset in (0..overlay.len()).step_by(512).filter(|&offset| overlay.has(offset)) {
                content[offset..offset + 512].copy_from_slice(&raw[offset..offset + 512]);
            }
            contents.insert(0, content);
        }
        for (index, (overlay, raw)) in shape.overlays.iter().zip(&raws).enumerate() {
            let is_last = index + 1 == shape.overlays.len();
            let _raw = disk.create(raw);
            let _side = disk.create(&overlay.side(!is_last || base.is_some()));
        }
        if let Some(base) = base {
            let _base = disk.create(&base);
        }
        Self { shape: shape.clone(), disk, contents }
    }

    /// The same files in the same state on a host of their own.
    pub fn fork(&self) -> Self {
        let (shape, contents) = (self.shape.clone(), self.contents.clone());
        Self { shape, disk: self.disk.fork(), contents }
    }

    /// What the disk showed when it was made.
    pub fn content(&self) -> &[u8] {
        &self.contents[0]
    }

    /// The raw image of an overlay.
    pub fn raw(&self, overlay: usize) -> SimStorage {
        self.disk.file(2 * overlay)
    }

    /// The side file of an overlay.
    pub fn side(&self, overlay: usize) -> SimStorage {
        self.disk.file(2 * overlay + 1)
    }

    /// The raw file at the bottom.
    pub fn base(&self) -> Option<SimStorage> {
        self.shape.base_len.map(|_| self.disk.file(2 * self.shape.overlays.len()))
    }

    /// The header of an overlay as it is now.
    pub async fn header(&self, overlay: usize) -> Header {
        load::header(&self.side(overlay)).await.expect("an image opens without repair (P1)")
    }

    /// What the side file of an overlay says now.
    pub async fn map(&self, overlay: usize) -> (BitmapGeometry, AllocationMap) {
        let header = self.header(overlay).await;
        let len = self.raw(overlay).file_len().expect("no fault there");
        let geometry = BitmapGeometry::new(header.cluster_size, len).expect("as it was made");
        let map = if header.all_allocated {
            AllocationMap::all()
        } else {
            load::bitmap(&self.side(overlay), &geometry).await.expect("opens without repair")
        };
        (geometry, map)
    }

    /// Overlay number `overlay` alone, as a layer of a chain.
    pub async fn layer(&self, overlay: usize) -> ChainLayer<SimStorage> {
        let (geometry, allocation) = self.map(overlay).await;
        let cluster_size = geometry.cluster_size();
        let map = Arc::new(ClusterMap { cluster_size, allocation });
        ChainLayer::add_cow(self.raw(overlay), geometry.virtual_size(), map)
    }

    /// The chain below an overlay.
    pub async fn below(&self, overlay: usize) -> Option<Chain<SimStorage>> {
        let mut layers = Vec::new();
        for index in overlay + 1..self.shape.overlays.len() {
            layers.push(self.layer(index).await);
        }
        if let Some(base) = self.base() {
            let len = base.file_len().expect("no fault there");
            layers.push(ChainLayer::raw(base, len));
        }
        (!layers.is_empty()).then(|| Chain::new(layers))
    }

    /// Opens an overlay for writing, from the bytes of the side files.
    pub async fn open(&self, overlay: usize) -> Image<SimStorage> {
        let (geometry, allocation) = self.map(overlay).await;
        let backing = self.below(overlay).await.filter(|_| !allocation.is_all());
        let backing_len = backing.as_ref().map_or(0, Chain::virtual_size);
        let state = Arc::new(ImageState::add_cow(geometry, allocation, backing_len, true));
        Image::new(state, self.raw(overlay), Some(self.side(overlay)), backing)
    }

    /// One more handle on an overlay that is open.
    pub async fn handle(&self, overlay: usize, state: &Arc<ImageState>) -> Image<SimStorage> {
        let backing = self.below(overlay).await.filter(|_| !state.allocation().is_all());
        Image::new(Arc::clone(state), self.raw(overlay), Some(self.side(overlay)), backing)
    }

    /// What an overlay shows, opened from its files.
    pub fn bytes(&self, overlay: usize) -> Vec<u8> {
        let image = block_on(self.open(overlay));
        let len = usize::try_from(image.state().virtual_size()).expect("small");
        let buffer = IoBuffer::from_bytes(&vec![0x55; len]);
        block_on(image.read(0, buffer.clone())).expect("the whole disk can be read");
        buffer.to_vec()
    }
}
