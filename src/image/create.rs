//! Creating a disk: its add-cow file, and its raw image where there is none yet.
//!
//! Promises: the add-cow file appears whole and durable, or not at all; an error leaves behind what
//! was there before. So everything that can be found out by looking is checked first; then the
//! add-cow file is written under a temporary name; then the raw image is made, or grown; and at
//! last the add-cow file gets its name, without replacing one unless that was asked for.
//!
//! An add-cow file that is to be replaced loses its name before the image grows or appears: it may
//! be the image's own, and no cut may leave it over an image that it knows nothing of.
//!
//! Relies on nobody else creating the same disk at the same time beyond that last step, which only
//! one of them can win. Files that are there are locked: one that is in use is left alone.
//!
//! Not here: what a command line means, and the bytes of the header (`format`).

use std::fs::{remove_file, symlink_metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{self, ChainOptions, Layer, OpenChain};
use super::open::{
    check_distinct, check_raw, file_len, folder_of, io_error, lock_file, open_existing,
    open_unlocked,
};
use super::{FileRole, OpenError};
use crate::executor::block_on;
use crate::format::bitmap::MAX_VIRTUAL_SIZE;
use crate::format::{BitmapGeometry, FileReference, FormatError, Header, encode_words};
use crate::image::allocation::AllocationMap;
use crate::storage::file::FileStorage;
use crate::storage::host_file::{Access, CacheMode, HostFile, sync_folder};
use crate::storage::lock::Usage;
use crate::storage::name_policy::Named;
use crate::storage::new_file::{NewFile, SetAside};
use crate::storage::{IoBuffer, Storage, transfer};
use crate::units::{ClusterSize, SECTOR_SIZE};

/// Smallest cluster size that is written: 4 KiB.
const MIN_CLUSTER_BITS: u32 = crate::format::header::MIN_WRITTEN_CLUSTER_BITS;

/// As many clusters as the default cluster size allows, if it can: their bitmap takes 32 MiB of
/// memory. 4 KiB clusters reach 1 TiB with it.
const MAX_DEFAULT_CLUSTERS: u64 = 8 * (32 << 20);

const _: () = assert!(MAX_DEFAULT_CLUSTERS << MIN_CLUSTER_BITS == 1 << 40);

/// The largest bitmap of a new disk, in bytes: it is held in memory when the disk is opened, and
/// written at once when the disk has no backing file. 2^33 clusters: 32 TiB of disk with clusters
/// of 4 KiB, 16 PiB with 2 MiB.
const MAX_NEW_BITMAP: u64 = 1 << 30;

/// How much of the bitmap is written at once, in words of 8 bytes.
const CHUNK_WORDS: u64 = (1 << 20) / 8;

/// The disk to be made.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Where the add-cow file goes. Names of the other files are relative to its folder.
    pub path: PathBuf,
    /// Virtual size in bytes, a multiple of 512 and not 0; `None`: that of the raw image, or else
    /// that of the backing file, rounded up to a sector.
    pub size: Option<u64>,
    /// Size of a cluster, 4 KiB to 2 MiB; `None`: see [`default_cluster_size`].
    pub cluster_size: Option<ClusterSize>,
    /// What the guest sees where it has written nothing.
    pub backing: Option<FileReference>,
    /// The raw image. It is made if there is no such file, and grown if it is too short.
    pub image: FileReference,
    /// Whether `image` may exist already.
    pub reuse_image: bool,
    /// Whether an existing add-cow file may be replaced.
    pub force: bool,
}

/// What was made.
#[derive(Debug, Clone)]
pub struct Created {
    /// The header as written.
    pub header: Header,
    /// The bitmap as written: also virtual size and file length.
    pub geometry: BitmapGeometry,
}

/// The default cluster size for a disk of `virtual_size` bytes: 4 KiB up to 1 TiB, and beyond the
/// smallest whose bitmap has at most 32 MiB; never more than 2 MiB.
///
/// With 4 KiB clusters a first write of whole pages never has to copy anything.
#[must_use]
pub fn default_cluster_size(virtual_size: u64) -> ClusterSize {
    (MIN_CLUSTER_BITS..ClusterSize::MAX_BITS)
        .filter_map(ClusterSize::from_bits)
        .find(|cluster| cluster.count(virtual_size) <= MAX_DEFAULT_CLUSTERS)
        .or(ClusterSize::from_bits(ClusterSize::MAX_BITS))
        .expect("the largest cluster size is one")
}

/// Makes a disk.
///
/// # Errors
/// An [`OpenError`] that names the file. There is then no new file, and an image that existed has
/// its old length.
pub fn add_cow(options: &CreateOptions) -> Result<Created, OpenError> {
    Plan::new(options)?.carry_out()
}

/// The content of a new add-cow file.
#[derive(Debug)]
pub struct NewSide {
    /// Fixed header and names.
    header: Vec<u8>,
    /// Where the bitmap lies.
    geometry: BitmapGeometry,
    /// The bits; `None`: all of them are 0.
    bits: Option<AllocationMap>,
}

impl NewSide {
    /// The file for `header` and a bitmap of this geometry: all ones with ALL_ALLOCATED, else all
    /// zeros.
    ///
    /// # Errors
    /// The rule for writers that the header breaks.
    pub fn new(header: &Header, geometry: BitmapGeometry) -> Result<Self, FormatError> {
        let bits = header.all_allocated.then(AllocationMap::all);
        Ok(Self { header: header.encode()?, geometry, bits })
    }

    /// The file for `header` and these bits, which must be all ones with ALL_ALLOCATED.
    ///
    /// # Errors
    /// As [`NewSide::new`].
    pub fn with_bits(
        header: &Header,
        geometry: BitmapGeometry,
        bits: AllocationMap,
    ) -> Result<Self, FormatError> {
        Ok(Self { header: header.encode()?, geometry, bits: Some(bits) })
    }

    /// Writes it to the empty file `side`, and syncs it.
    ///
    /// The bitmap is durable before the header is written (docs/format.md, "Feature words"): who
    /// sees ALL_ALLOCATED may rely on the ones.
    ///
    /// # Errors
    /// What the storage said. The file then holds any part of it.
    pub async fn write<S: Storage>(&self, side: &S) -> io::Result<()> {
        side.set_len(self.geometry.file_len())?;
        if let Some(bits) = &self.bits {
            self.write_bits(side, bits).await?;
            side.sync().await?;
        }
        transfer::write_all(side, 0, IoBuffer::from_bytes(&self.header)).await?;
        side.sync().await
    }

    /// Writes the bitmap where it is not all zeros. Bits behind the last cluster stay 0.
    async fn write_bits<S: Storage>(&self, side: &S, bits: &AllocationMap) -> io::Result<()> {
        let words = self.geometry.words();
        let mut first = 0;
        while first < words {
            let end = words.min(first + CHUNK_WORDS);
            let len = usize::try_from((end - first) * 8).map_err(io::Error::other)?;
            let mut bytes = vec![0; len];
            let word = |word| bits.word(word) & self.geometry.word_mask(word);
            encode_words((first..end).map(word), &mut bytes);
            if bytes.iter().any(|&byte| byte != 0) {
                let offset = self.geometry.offset() + first * 8;
                transfer::write_all(side, offset, IoBuffer::from_bytes(&bytes)).await?;
            }
            first = end;
        }
        Ok(())
    }
}

/// A disk that passed every check which needs no change.
struct Plan<'a> {
    /// What was asked for.
    options: &'a CreateOptions,
    /// The header to be written.
    header: Header,
    /// The bitmap to be written.
    geometry: BitmapGeometry,
    /// Where the raw image is, or will be.
    image_path: PathBuf,
    /// The raw image, if it exists; open for reading.
    image: Option<Arc<HostFile>>,
    /// The backing chain.
    backing: Option<OpenChain>,
    /// The add-cow file that is to be replaced, if there is one; kept for its lock.
    replaced: Option<HostFile>,
}

impl<'a> Plan<'a> {
    /// Looks at everything, changes nothing.
    fn new(options: &'a CreateOptions) -> Result<Self, OpenError> {
        let folder = folder_of(&options.path);
        let image_path = check_raw(FileRole::Raw, &options.image, folder)?;
        let backing = match &options.backing {
            Some(reference) => {
                let (path, format) = chain::open::resolve(reference, folder)?;
                Some(OpenChain::open_backing(&path, format, ChainOptions::BUFFERED)?)
            }
            None => None,
        };
        let image = open_existing(FileRole::Raw, &image_path)?.map(Arc::new);
        let replaced = check_side(options, image.as_deref(), backing.as_ref())?;
        if image.is_some() && !options.reuse_image {
            return Err(OpenError::Exists { role: FileRole::Raw, path: image_path });
        }
        // The new disk is ours alone, whatever its files were before.
        for (role, file) in [(FileRole::Raw, image.as_deref()), (FileRole::Side, replaced.as_ref())]
        {
            file.map_or(Ok(()), |file| lock_file(role, file, Usage::Write))?;
        }
        let size = choose_size(options, image.as_deref(), backing.as_ref())?;
        let cluster_size = options.cluster_size.unwrap_or_else(|| default_cluster_size(size));
        let header = Header {
            cluster_size,
            backing: options.backing.clone(),
            image: options.image.clone(),
            all_allocated: options.backing.is_none(),
            compat_features: 0,
        };
        let geometry = new_geometry(&options.path, cluster_size, size)?;
        Ok(Self { options, header, geometry, image_path, image, backing, replaced })
    }

    /// Makes the files.
    fn carry_out(self) -> Result<Created, OpenError> {
        let path = &self.options.path;
        let content = NewSide::new(&self.header, self.geometry).map_err(header_error(path))?;
        let side = write_temporary(path, &content)?;
        // Declared first: after an error the image has its old length before the file is back.
        let aside = self.set_aside()?;
        let image = self.make_image()?;
        // Once more: who asked for one name for two new files has by now got the first of them,
        // and would lose it to the second.
        check_side(self.options, Some(&image.file), self.backing.as_ref())?;
        // The name of one that was set aside is free; if it is not, it is somebody else's.
        publish(side, path, self.options.force && aside.is_none())?;
        image.keep();
        aside.into_iter().for_each(SetAside::discard);
        Ok(Created { header: self.header, geometry: self.geometry })
    }

    /// The length of the raw image in bytes, if there is one that has to grow.
    fn shorter_image(&self) -> Result<Option<u64>, OpenError> {
        let Some(image) = &self.image else { return Ok(None) };
        let len = file_len(FileRole::Raw, image)?;
        Ok((len < self.geometry.virtual_size()).then_some(len))
    }

    /// Takes its name away from the add-cow file that is to be replaced, if the image will change
    /// or appear.
    fn set_aside(&self) -> Result<Option<SetAside>, OpenError> {
        let is_as_it_was = self.image.is_some() && self.shorter_image()?.is_none();
        if self.replaced.is_none() || is_as_it_was {
            return Ok(None);
        }
        let path = &self.options.path;
        SetAside::new(path).map(Some).map_err(io_error("replace", FileRole::Side, path))
    }

    /// Makes the raw image, or grows it, and makes that durable.
    fn make_image(&self) -> Result<MadeImage, OpenError> {
        let (path, size) = (&self.image_path, self.geometry.virtual_size());
        let made = match &self.image {
            Some(image) => {
                let Some(len) = self.shorter_image()? else {
                    return Ok(MadeImage { file: Arc::clone(image), undo: Undo::Nothing });
                };
                // Locked already, through the other open file.
                let (role, access) = (FileRole::Raw, Access::ReadWrite);
                let file = open_unlocked(role, path, Named::Operator, access, CacheMode::Buffered)?;
                MadeImage { file, undo: Undo::SetLen { from: size, to: len } }
            }
            None => {
                let file =
                    HostFile::create_new(path).map_err(io_error("create", FileRole::Raw, path))?;
                let made = MadeImage { file: Arc::new(file), undo: Undo::Remove };
                lock_file(FileRole::Raw, &made.file, Usage::Write)?;
                made
            }
        };
        let storage = FileStorage::new(Arc::clone(&made.file));
        storage.set_len(size).map_err(io_error("set the length of", FileRole::Raw, path))?;
        block_on(storage.sync()).map_err(io_error("sync", FileRole::Raw, path))?;
        sync_folder(folder_of(path)).map_err(io_error(
            "sync the folder of",
            FileRole::Raw,
            path,
        ))?;
        Ok(made)
    }
}

/// The raw image of a disk whose add-cow file has no name yet. Dropped, it becomes what it was.
struct MadeImage {
    /// The image.
    file: Arc<HostFile>,
    /// How to make it what it was.
    undo: Undo,
}

/// How a raw image is made what it was.
enum Undo {
    /// It was not changed.
    Nothing,
    /// It did not exist.
    Remove,
    /// It was shorter.
    SetLen {
        /// The length that we gave it, in bytes.
        from: u64,
        /// The length that it had, in bytes.
        to: u64,
    },
}

impl MadeImage {
    /// The disk is complete: there is nothing to undo any more.
    fn keep(mut self) {
        self.undo = Undo::Nothing;
    }
}

impl Drop for MadeImage {
    fn drop(&mut self) {
        // The error that brought us here is the one to be reported; where cleaning up fails, zeros
        // stay behind that harm nobody.
        match self.undo {
            Undo::Nothing => {}
            Undo::Remove => drop(remove_file(self.file.path())),
            // Not if somebody else has changed it since.
            Undo::SetLen { from, to } if self.file.len().is_ok_and(|len| len == from) => {
                let storage = FileStorage::new(Arc::clone(&self.file));
                // Durable before an add-cow file that was set aside is back.
                drop(storage.set_len(to).and_then(|()| block_on(storage.sync())));
            }
            Undo::SetLen { .. } => {}
        }
    }
}

/// Writes the add-cow file, durably, under a name of its own beside `path`. Dropped, it goes away.
fn write_temporary(path: &Path, content: &NewSide) -> Result<NewFile, OpenError> {
    let error = |action| io_error(action, FileRole::Side, path);
    let side = NewFile::create(path).map_err(error("create"))?;
    let storage = FileStorage::new(Arc::clone(side.file()));
    block_on(content.write(&storage)).map_err(error("write"))?;
    Ok(side)
}

/// Gives the add-cow file its name, and makes that durable.
fn publish(side: NewFile, path: &Path, force: bool) -> Result<(), OpenError> {
    side.publish(force).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            OpenError::Exists { role: FileRole::Side, path: path.to_owned() }
        }
        _ => io_error("name", FileRole::Side, path)(error),
    })
}

/// Whether the add-cow file may be made: there is none, or it may be replaced; and it is none of
/// the disk's other files, which must be two themselves. Returns the one that will be replaced.
fn check_side(
    options: &CreateOptions,
    image: Option<&HostFile>,
    backing: Option<&OpenChain>,
) -> Result<Option<HostFile>, OpenError> {
    let backing = || backing.into_iter().flat_map(OpenChain::layers).flat_map(Layer::files);
    for backing in backing() {
        if let Some(image) = image {
            check_distinct(FileRole::Raw, image, FileRole::Backing, backing)?;
        }
    }
    let path = &options.path;
    let metadata = match symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("look at", FileRole::Side, path)(error)),
    };
    // One that cannot be opened is none of the others, which were; what that means comes last.
    let side = open_existing(FileRole::Side, path);
    if let Ok(Some(side)) = &side {
        let image = image.map(|file| (FileRole::Raw, file));
        let backing = backing().map(|file| (FileRole::Backing, &**file));
        for (role, file) in image.into_iter().chain(backing) {
            check_distinct(role, file, FileRole::Side, side)?;
        }
    }
    if !options.force {
        return Err(OpenError::Exists { role: FileRole::Side, path: path.clone() });
    }
    // What is replaced is a file like the new one, never a device, a folder or a link.
    if !metadata.is_file() {
        let problem = io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file");
        return Err(io_error("replace", FileRole::Side, path)(problem));
    }
    side
}

/// The virtual size in bytes.
fn choose_size(
    options: &CreateOptions,
    image: Option<&HostFile>,
    backing: Option<&OpenChain>,
) -> Result<u64, OpenError> {
    let image_len = image.map_or(Ok(0), |file| file_len(FileRole::Raw, file))?;
    // docs/format.md, "What the guest sees": an image's last part of a sector is not on the disk.
    let image_size = image_len - image_len % SECTOR_SIZE;
    let size = match (options.size, backing) {
        (Some(size), _) => size,
        (None, _) if image_size > 0 => image_size,
        (None, Some(chain)) => {
            chain.virtual_size().checked_next_multiple_of(SECTOR_SIZE).unwrap_or(u64::MAX)
        }
        (None, None) => return Err(OpenError::SizeUnknown { path: options.path.clone() }),
    };
    check_size(size)?;
    if image_size > size {
        let path = options.image.name.resolve(folder_of(&options.path));
        return Err(OpenError::ImageTooLong { path, len: image_len, size });
    }
    Ok(size)
}

/// Refuses a size that no disk can have.
///
/// # Errors
/// `InvalidSize`.
pub fn check_size(size: u64) -> Result<(), OpenError> {
    let problem = if size == 0 {
        "a disk has at least one sector of 512 bytes"
    } else if size > MAX_VIRTUAL_SIZE {
        "larger than the largest possible file, 8 EiB less one byte"
    } else if !size.is_multiple_of(SECTOR_SIZE) {
        "not a multiple of 512 bytes"
    } else {
        return Ok(());
    };
    Err(OpenError::InvalidSize { size, problem })
}

/// The bitmap that the add-cow file `path` gets for a disk of `size` bytes.
///
/// # Errors
/// `BitmapTooLarge`, or `Header` if no file could have that size.
pub fn new_geometry(
    path: &Path,
    cluster_size: ClusterSize,
    size: u64,
) -> Result<BitmapGeometry, OpenError> {
    let geometry = BitmapGeometry::new(cluster_size, size).map_err(header_error(path))?;
    let (len, max) = (geometry.padded_len(), MAX_NEW_BITMAP);
    if len > max {
        return Err(OpenError::BitmapTooLarge { size, cluster: cluster_size.bytes(), len, max });
    }
    Ok(geometry)
}

/// Makes an [`OpenError::Header`].
fn header_error(path: &Path) -> impl FnOnce(FormatError) -> OpenError {
    move |source| OpenError::Header { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{FileName, FileRole as NameRole};
    use crate::storage::sim::{Fault, Operation, SimDisk};

    /// The content of the add-cow file of a disk of 100 clusters of 4 KiB.
    fn content(all_allocated: bool) -> NewSide {
        let reference = |role, name: &str| FileReference {
            name: FileName::new(role, name).unwrap(),
            format: "raw".to_owned(),
        };
        let cluster_size = ClusterSize::from_bits(12).unwrap();
        let header = Header {
            cluster_size,
            backing: (!all_allocated).then(|| reference(NameRole::Backing, "base.img")),
            image: reference(NameRole::Image, "disk.raw"),
            all_allocated,
            compat_features: 0,
        };
        NewSide::new(&header, BitmapGeometry::new(cluster_size, 100 * 4096).unwrap()).unwrap()
    }

    /// The bitmap that belongs to it, without the padding.
    fn bits(all_allocated: bool) -> [u8; 13] {
        if all_allocated {
            let mut ones = [0xff; 13];
            ones[12] = 0x0f;
            ones
        } else {
            [0; 13]
        }
    }

    #[test]
    fn a_new_file_survives_a_power_cut_once_it_is_written() {
        for all_allocated in [false, true] {
            for seed in 0..20 {
                let disk = SimDisk::new(seed);
                let side = disk.create(&[]);
                block_on(content(all_allocated).write(&side)).unwrap();
                disk.power_cut();
                let bytes = side.content();
                assert_eq!(bytes.len(), 8192);
                let header = Header::decode(&bytes[..4096]).unwrap();
                assert_eq!(header.all_allocated, all_allocated);
                assert_eq!(bytes[4096..4109], bits(all_allocated));
                assert!(bytes[4109..].iter().all(|&byte| byte == 0));
            }
        }
    }

    #[test]
    fn all_bits_are_durable_before_the_header_says_so() {
        let disk = SimDisk::new(1);
        let side = disk.create(&[]);
        block_on(content(true).write(&side)).unwrap();
        let log: Vec<Operation> = disk.log().into_iter().map(|(_, operation)| operation).collect();
        let position = |wanted: fn(&Operation) -> bool| log.iter().position(wanted).unwrap();
        let bitmap = position(|o| matches!(o, Operation::Write(range) if range.start() == 4096));
        let synced = position(|o| matches!(o, Operation::SyncEnd));
        let header = position(|o| matches!(o, Operation::Write(range) if range.start() == 0));
        assert!(bitmap < synced && synced < header, "{log:?}");
        assert_eq!(log.last(), Some(&Operation::SyncEnd));
    }

    #[test]
    fn every_failure_of_the_storage_is_reported() {
        for all_allocated in [false, true] {
            let count = {
                let disk = SimDisk::new(1);
                block_on(content(all_allocated).write(&disk.create(&[]))).unwrap();
                disk.operations()
            };
            assert_eq!(count, if all_allocated { 5 } else { 3 });
            for index in 0..count {
                let disk = SimDisk::new(1);
                disk.set_fault(index, Fault::Error(libc::EIO), false);
                let result = block_on(content(all_allocated).write(&disk.create(&[])));
                assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EIO));
            }
        }
    }

    /// A disk of 1 MiB in `folder`, without a backing file.
    fn options(folder: &Path) -> CreateOptions {
        CreateOptions {
            path: folder.join("disk.add-cow"),
            size: Some(1 << 20),
            cluster_size: None,
            backing: None,
            image: FileReference {
                name: FileName::new(NameRole::Image, "disk.raw").unwrap(),
                format: "raw".to_owned(),
            },
            reuse_image: true,
            force: false,
        }
    }

    #[test]
    fn an_image_becomes_what_it_was_when_a_later_step_fails() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path());
        let image = folder.path().join("disk.raw");
        // It did not exist.
        drop(Plan::new(&options).unwrap().make_image().unwrap());
        assert!(!image.exists());
        // It was shorter.
        std::fs::write(&image, b"guest data").unwrap();
        let made = Plan::new(&options).unwrap().make_image().unwrap();
        assert_eq!(made.file.len().unwrap(), 1 << 20);
        drop(made);
        assert_eq!(std::fs::read(&image).unwrap(), b"guest data");
        // It was shorter, and somebody else has made it longer meanwhile.
        let made = Plan::new(&options).unwrap().make_image().unwrap();
        std::fs::File::options().write(true).open(&image).unwrap().set_len(2 << 20).unwrap();
        drop(made);
        assert_eq!(std::fs::metadata(&image).unwrap().len(), 2 << 20);
    }

    #[test]
    fn an_add_cow_file_that_appeared_meanwhile_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path());
        let side = write_temporary(&options.path, &content(true)).unwrap();
        std::fs::write(&options.path, b"somebody else's").unwrap();
        let error = publish(side, &options.path, false).unwrap_err();
        assert!(matches!(error, OpenError::Exists { role: FileRole::Side, .. }), "{error}");
        assert_eq!(std::fs::read(&options.path).unwrap(), b"somebody else's");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left behind");
    }

    #[test]
    fn default_clusters_grow_with_the_disk_and_their_bitmap_stays_at_32_mib() {
        const TIB: u64 = 1 << 40;
        let rows = [
            (512, 12),
            (TIB, 12),
            (TIB + 512, 13),
            (2 * TIB, 13),
            (2 * TIB + 512, 14),
            (512 * TIB, 21),
            (512 * TIB + 512, 21),
            (MAX_VIRTUAL_SIZE, 21),
        ];
        for (size, bits) in rows {
            assert_eq!(default_cluster_size(size).bits(), bits, "{size} bytes");
        }
    }
}
