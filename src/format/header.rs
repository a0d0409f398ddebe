//! The header of an add-cow file: encode, decode, validate.
//!
//! Reads the layout of April 2013 and later (v18 to v20), writes the last one (v20). What is
//! decoded has passed every check that needs no other file (I8); what is encoded obeys the
//! stricter rules for writers. `docs/format.md` is the normative text.
//!
//! Not here: how long the file must be (`bitmap`), and anything about the files that are named
//! beyond their names.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::error::FormatError;
use crate::format::reference::{
    FileName, FileReference, FileRole, check_len, decode_format, encode_format,
};
use crate::units::{ByteRange, ClusterSize};

/// Bytes of the fixed part of the header; names come after it.
pub const FIXED_HEADER_LEN: usize = 76;

/// The header area is never shorter than this many bytes, whatever the cluster size.
pub const MIN_HEADER_LEN: u64 = 4096;

/// The header area of the largest cluster size: 2 MiB = `1 << ClusterSize::MAX_BITS`.
pub const MAX_HEADER_LEN: u64 = 1 << ClusterSize::MAX_BITS;

/// Smallest `cluster_bits` that is written (4 KiB); v18 files may have less.
pub const MIN_WRITTEN_CLUSTER_BITS: u32 = 12;

/// Compatible feature bit: every cluster is in the image file, the bitmap is not consulted.
pub const COMPAT_ALL_ALLOCATED: u64 = 1;

/// The first bytes of every file that we read or write.
const MAGIC: [u8; 4] = *b"ACOW";

/// The first bytes of the versions up to the autumn of 2012, which we only recognise.
const OLD_MAGIC: [u8; 8] = *b"ADD_COW\xff";

/// The fixed part of the header as it lies in the file; all integers are little-endian.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct FixedHeader {
    /// [`MAGIC`].
    magic: [u8; 4],
    /// Where in the file the backing file's name starts; 0 if there is none.
    pub(super) backing_offset: U32,
    /// Bytes of the backing file's name; 0 if there is none.
    pub(super) backing_size: U32,
    /// Where in the file the image file's name starts.
    pub(super) image_offset: U32,
    /// Bytes of the image file's name (not of the file).
    pub(super) image_size: U32,
    /// log2 of the cluster size in bytes.
    cluster_bits: U32,
    /// Bits that a reader must know; none is defined.
    features: U64,
    /// Bits that a reader may ignore.
    pub(super) compat_features: U64,
    /// Bytes of the header area, at whose end the bitmap starts.
    header_size: U32,
    /// Name of the backing file's format, zero padded.
    pub(super) backing_fmt: [u8; 16],
    /// Name of the image file's format, zero padded.
    image_fmt: [u8; 16],
}

const _: () = assert!(size_of::<FixedHeader>() == FIXED_HEADER_LEN);

/// A header that has passed all checks, or that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Size of a cluster: 4 KiB to 2 MiB; from 512 bytes when read.
    pub cluster_size: ClusterSize,
    /// The file behind the image, if any. With `all_allocated` it is never read, and is `None`
    /// also if the reference in the file is damaged.
    pub backing: Option<FileReference>,
    /// The file with the guest's own bytes.
    pub image: FileReference,
    /// Whether every cluster is in the image file: backing file and bitmap are not used.
    pub all_allocated: bool,
    /// The compatible feature word, every bit as read, unknown ones too. When written, bit 0 comes
    /// from `all_allocated` instead.
    pub compat_features: u64,
}

impl Header {
    /// Bytes of the header area: where the bitmap starts.
    #[must_use]
    pub fn header_size(&self) -> u64 {
        header_size_of(self.cluster_size)
    }

    /// The fixed header and the names: the first bytes of the file. The rest of the header area
    /// is zeros in a new file.
    ///
    /// # Errors
    /// Names the first rule for writers that the header breaks.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.check_writable()?;
        let backing = self.backing.as_ref();
        let backing_name = backing.map_or(&[][..], |file| file.name.as_bytes());
        let image_name = self.image.name.as_bytes();
        let too_large = || FormatError::NamesDoNotFit {
            names: backing_name.len().saturating_add(image_name.len()),
            header_size: self.header_size(),
        };
        // Backing name first, image name right behind it: no gap, as the original wrote them.
        let image_offset = FIXED_HEADER_LEN.saturating_add(backing_name.len());
        let field = |value: usize| u32::try_from(value).map(U32::new).map_err(|_| too_large());
        let fixed = FixedHeader {
            magic: MAGIC,
            backing_offset: field(if backing.is_some() { FIXED_HEADER_LEN } else { 0 })?,
            backing_size: field(backing_name.len())?,
            image_offset: field(image_offset)?,
            image_size: field(image_name.len())?,
            cluster_bits: U32::new(self.cluster_size.bits()),
            features: U64::new(0),
            compat_features: U64::new(self.compat_word()),
            header_size: U32::new(u32::try_from(self.header_size()).map_err(|_| too_large())?),
            backing_fmt: match backing {
                Some(file) => encode_format(FileRole::Backing, file)?,
                None => [0; 16],
            },
            image_fmt: encode_format(FileRole::Image, &self.image)?,
        };
        Ok([fixed.as_bytes(), backing_name, image_name].concat())
    }

    /// Decodes the header at the start of a file.
    ///
    /// `area` is the first bytes of the file: as many of [`Header::area_len`] as it has. More do
    /// no harm. Bytes of the area that belong to no name are room for extensions, and ignored.
    ///
    /// # Errors
    /// Names the first rule that the header breaks. A damaged backing reference is no error when
    /// ALL_ALLOCATED is set, since it is then never followed.
    pub fn decode(area: &[u8]) -> Result<Self, FormatError> {
        let fixed = FixedHeader::parse(area)?;
        let cluster_size = fixed.cluster_size()?;
        let compat_features = fixed.compat_features.get();
        let all_allocated = compat_features & COMPAT_ALL_ALLOCATED != 0;
        let names = Names { area, header_size: header_size_of(cluster_size) };
        let (image, image_at) = fixed.image(&names)?;
        let backing = match fixed.backing(&names, &image, image_at) {
            Err(_) if all_allocated => None,
            other => other?,
        };
        Ok(Self { cluster_size, backing, image, all_allocated, compat_features })
    }

    /// How many bytes the header area has, from the first [`FIXED_HEADER_LEN`] bytes of a file.
    ///
    /// # Errors
    /// Names the first rule that magic, feature bits, cluster size or header size break.
    pub fn area_len(fixed: &[u8]) -> Result<u64, FormatError> {
        FixedHeader::parse(fixed)?.cluster_size().map(header_size_of)
    }

    /// The compatible feature word as it is written.
    fn compat_word(&self) -> u64 {
        let others = self.compat_features & !COMPAT_ALL_ALLOCATED;
        others | if self.all_allocated { COMPAT_ALL_ALLOCATED } else { 0 }
    }

    /// The rules for writers that concern cluster size and names (docs/format.md, "Names").
    fn check_writable(&self) -> Result<(), FormatError> {
        if self.cluster_size.bits() < MIN_WRITTEN_CLUSTER_BITS {
            return Err(FormatError::ClusterTooSmall {
                bytes: self.cluster_size.bytes(),
                min: 1 << MIN_WRITTEN_CLUSTER_BITS,
            });
        }
        let image = self.image.name.as_bytes().len();
        check_len(FileRole::Image, image)?;
        let mut names = image;
        if let Some(backing) = &self.backing {
            let len = backing.name.as_bytes().len();
            check_len(FileRole::Backing, len)?;
            if backing.name == self.image.name {
                return Err(FormatError::SameFile { name: backing.name.clone() });
            }
            names = names.saturating_add(len);
        }
        // Writers leave one byte free, which readers do not ask for: a name's size must be less
        // than header_size - 76. This also keeps every offset at or below header_size - 2 ...
        let room = self.header_size().saturating_sub(FIXED_HEADER_LEN as u64);
        // ... because a name has at least one byte.
        if names as u64 >= room {
            return Err(FormatError::NamesDoNotFit { names, header_size: self.header_size() });
        }
        Ok(())
    }
}

/// Whether a file claims to be add-cow, by the magic alone.
///
/// Also true for the old magic, which [`Header::decode`] then refuses with the reason: such a
/// file must not be taken for the bytes of a disk.
#[must_use]
pub fn is_add_cow(first_bytes: &[u8]) -> bool {
    first_bytes.starts_with(&MAGIC) || first_bytes.starts_with(&OLD_MAGIC)
}

/// Bytes of the header area in a file with clusters of that size.
#[must_use]
pub fn header_size_of(cluster_size: ClusterSize) -> u64 {
    cluster_size.bytes().max(MIN_HEADER_LEN)
}

/// The part of a file in which names may lie.
struct Names<'a> {
    /// The first bytes of the file, as many as there are; at least the fixed header.
    area: &'a [u8],
    /// Bytes of the header area by its own account; `area` may be shorter or longer.
    header_size: u64,
}

impl Names<'_> {
    /// The name of `size` bytes at `offset`, and where in the file it lies.
    fn read(
        &self,
        role: FileRole,
        offset: u32,
        size: u32,
    ) -> Result<(FileName, ByteRange), FormatError> {
        let header_size = self.header_size;
        if (offset as usize) < FIXED_HEADER_LEN {
            return Err(FormatError::NameInFixedHeader { role, offset, min: FIXED_HEADER_LEN });
        }
        let max = header_size.saturating_sub(2);
        if u64::from(offset) > max {
            return Err(FormatError::NameOffset { role, offset, max });
        }
        let past_header = FormatError::NamePastHeader { role, offset, size, header_size };
        let at = match ByteRange::new(offset.into(), size.into()) {
            Some(at) if at.end() <= header_size => at,
            _ => return Err(past_header),
        };
        // The limit for names comes before the length of the file: a name that is too long is
        // that, however much of it there is.
        check_len(role, size as usize)?;
        let slice = self.area.get(offset as usize..).and_then(|rest| rest.get(..size as usize));
        let Some(bytes) = slice else {
            return Err(FormatError::NameTruncated { role, end: at.end(), len: self.area.len() });
        };
        Ok((FileName::from_bytes(role, bytes)?, at))
    }
}

impl FixedHeader {
    /// The fixed header at the start of `bytes`, with the magic and the feature bits checked.
    pub(super) fn parse(bytes: &[u8]) -> Result<&Self, FormatError> {
        if bytes.starts_with(&OLD_MAGIC) {
            return Err(FormatError::OldMagic);
        }
        let short = FormatError::TooShort { len: bytes.len(), needed: FIXED_HEADER_LEN };
        let Some(magic) = bytes.first_chunk::<4>() else {
            return Err(short);
        };
        if *magic != MAGIC {
            return Err(FormatError::BadMagic { found: magic.to_vec() });
        }
        let Ok((fixed, _)) = Self::ref_from_prefix(bytes) else {
            return Err(short);
        };
        // Before any other field: an unknown feature may give them another meaning.
        match fixed.features.get() {
            0 => Ok(fixed),
            bits => Err(FormatError::UnknownFeatures { bits }),
        }
    }

    /// The cluster size, once the header size agrees with it.
    fn cluster_size(&self) -> Result<ClusterSize, FormatError> {
        let bits = self.cluster_bits.get();
        let cluster_size = ClusterSize::from_bits(bits).ok_or(FormatError::ClusterBits {
            bits,
            min: ClusterSize::MIN_BITS,
            max: ClusterSize::MAX_BITS,
        })?;
        let expected = header_size_of(cluster_size);
        let found = self.header_size.get();
        if u64::from(found) != expected {
            let cluster = cluster_size.bytes();
            return Err(FormatError::HeaderSize { found, expected, cluster });
        }
        Ok(cluster_size)
    }

    /// The image file's reference and where its name lies.
    fn image(&self, names: &Names<'_>) -> Result<(FileReference, ByteRange), FormatError> {
        let (offset, size) = (self.image_offset.get(), self.image_size.get());
        if size == 0 {
            return Err(FormatError::ImageNameMissing { offset, size });
        }
        let (name, at) = names.read(FileRole::Image, offset, size)?;
        let format = decode_format(FileRole::Image, &self.image_fmt)?;
        if format.is_empty() {
            return Err(FormatError::ImageFormatMissing);
        }
        Ok((FileReference { name, format }, at))
    }

    /// The backing file's reference, if there is a backing file. Its format field means nothing
    /// without one, and is then not looked at.
    fn backing(
        &self,
        names: &Names<'_>,
        image: &FileReference,
        image_at: ByteRange,
    ) -> Result<Option<FileReference>, FormatError> {
        let (offset, size) = (self.backing_offset.get(), self.backing_size.get());
        match (offset, size) {
            (0, 0) => return Ok(None),
            (0, _) | (_, 0) => return Err(FormatError::BackingInconsistent { offset, size }),
            _ => {}
        }
        let (name, at) = names.read(FileRole::Backing, offset, size)?;
        if !at.intersect(image_at).is_empty() {
            return Err(FormatError::NamesOverlap { backing: at, image: image_at });
        }
        if name == image.name {
            return Err(FormatError::SameFile { name });
        }
        let format = decode_format(FileRole::Backing, &self.backing_fmt)?;
        if format.is_empty() {
            return Err(FormatError::BackingFormatMissing { name });
        }
        Ok(Some(FileReference { name, format }))
    }
}
