//! Changing a header in place: what is written where, and in which order.
//!
//! All that may change is the backing file and ALL_ALLOCATED. Cluster size, image file and whatever
//! else the header area holds stay as they are, byte by byte, also in files that we would not write
//! that way (v18).
//!
//! Promises: between any two of the three steps the file has a valid header, the old one or the new
//! one, as long as a medium writes one aligned block of 512 bytes whole: the fixed header lies in
//! such a block, and the name that it leads to is there before it and its old name after it.
//!
//! Not here: writing and syncing (`DiskParts::change_header` in `jobs::parts`).

use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U32, U64};

use crate::format::error::FormatError;
use crate::format::header::{COMPAT_ALL_ALLOCATED, FIXED_HEADER_LEN, FixedHeader, Header};
use crate::format::reference::{FileReference, FileRole, check_len, encode_format};
use crate::units::ByteRange;

/// The steps that turn a header into another one. Each must be durable before the next begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderChange {
    /// First: bytes to be written at an offset of the file where no name in use lies.
    pub name: Option<(u64, Vec<u8>)>,
    /// Second, and what it all turns on: the new fixed header, at offset 0. `None` if the header
    /// says already what it is to say; nothing is to be done then.
    pub fixed: Option<[u8; FIXED_HEADER_LEN]>,
    /// Third: where zeros are to be written, because no name lies there any more.
    pub unused: Option<ByteRange>,
}

impl HeaderChange {
    /// How the header at the start of `area` gets another backing file, or none.
    ///
    /// `area` is the whole header area of the file, which decodes.
    ///
    /// # Errors
    /// The rule for headers that the new one would break; `NamesDoNotFit` if there is no gap for
    /// the name.
    pub fn to_backing(area: &[u8], backing: Option<&FileReference>) -> Result<Self, FormatError> {
        let header = Header::decode(area)?;
        let mut fixed = FixedHeader::parse(area)?.clone();
        let at = |offset: U32, size: U32| {
            ByteRange::between(offset.into(), u64::from(offset).saturating_add(size.into()))
        };
        // A damaged reference, which ALL_ALLOCATED keeps from mattering, leads anywhere.
        let old = header.backing.as_ref().map(|_| at(fixed.backing_offset, fixed.backing_size));
        let image = at(fixed.image_offset, fixed.image_size);
        let mut change = Self { name: None, fixed: None, unused: old };
        match backing {
            None => {
                (fixed.backing_offset, fixed.backing_size) = (U32::ZERO, U32::ZERO);
                fixed.backing_fmt = [0; 16];
            }
            Some(file) if header.backing.as_ref().is_some_and(|old| old.name == file.name) => {
                fixed.backing_fmt = encode_format(FileRole::Backing, file)?;
                change.unused = None;
            }
            Some(file) => {
                let name = file.name.as_bytes();
                check_len(FileRole::Backing, name.len())?;
                fixed.backing_fmt = encode_format(FileRole::Backing, file)?;
                let used = [Some(image), old].into_iter().flatten();
                let no_gap =
                    FormatError::NoGap { len: name.len(), header_size: header.header_size() };
                let (offset, size) =
                    find_gap(used, name.len(), header.header_size()).ok_or(no_gap)?;
                (fixed.backing_offset, fixed.backing_size) = (U32::new(offset), U32::new(size));
                change.name = Some((offset.into(), name.to_vec()));
            }
        }
        change.finish(area, &fixed)
    }

    /// How ALL_ALLOCATED is switched on or off in the header at the start of `area`. Who switches
    /// it on has set every bit before, durably.
    ///
    /// # Errors
    /// What is wrong with the backing reference, which an ALL_ALLOCATED that is switched off had
    /// kept from mattering.
    pub fn to_all_allocated(area: &[u8], all_allocated: bool) -> Result<Self, FormatError> {
        let mut fixed = FixedHeader::parse(area)?.clone();
        let others = fixed.compat_features.get() & !COMPAT_ALL_ALLOCATED;
        let flag = if all_allocated { COMPAT_ALL_ALLOCATED } else { 0 };
        fixed.compat_features = U64::new(others | flag);
        Self { name: None, fixed: None, unused: None }.finish(area, &fixed)
    }

    /// Adds the fixed header, once what comes of it has been decoded.
    fn finish(mut self, area: &[u8], fixed: &FixedHeader) -> Result<Self, FormatError> {
        let bytes = fixed.as_bytes();
        if !area.starts_with(bytes) {
            self.fixed = bytes.first_chunk().copied();
        }
        let mut after = area.to_vec();
        self.apply(&mut after);
        Header::decode(&after).map(|_| self)
    }

    /// Carries out all steps on the bytes of a header area.
    fn apply(&self, area: &mut [u8]) {
        let name = self.name.as_ref().map(|(offset, bytes)| (*offset, bytes.clone()));
        let fixed = self.fixed.map(|bytes| (0, bytes.to_vec()));
        let unused = self.unused.map(|range| {
            (range.start(), vec![0; usize::try_from(range.len()).unwrap_or_default()])
        });
        for (offset, bytes) in name.into_iter().chain(fixed).chain(unused) {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            for (to, from) in area.iter_mut().skip(start).zip(bytes) {
                *to = from;
            }
        }
    }
}

/// Offset and size of a name of `len` bytes in the first gap behind the fixed header that has room
/// for it, in a header area of `header_size` bytes of which `used` is in use.
fn find_gap(
    used: impl Iterator<Item = ByteRange> + Clone,
    len: usize,
    header_size: u64,
) -> Option<(u32, u32)> {
    let len = u64::try_from(len).ok()?;
    // Writers keep a name's offset at or below header_size - 2 (docs/format.md, "Names"): one byte
    // stays free.
    let end = header_size.checked_sub(1)?;
    let starts = std::iter::once(FIXED_HEADER_LEN as u64).chain(used.clone().map(ByteRange::end));
    let fits = |start: &u64| match ByteRange::new(*start, len) {
        Some(gap) if gap.end() <= end => used.clone().all(|used| used.intersect(gap).is_empty()),
        _ => false,
    };
    let start = starts.filter(fits).min()?;
    Some((u32::try_from(start).ok()?, u32::try_from(len).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::reference::FileName;
    use crate::units::ClusterSize;

    /// A reference to a raw backing file.
    fn backing(name: &str) -> FileReference {
        let name = FileName::new(FileRole::Backing, name).unwrap();
        FileReference { name, format: "raw".to_owned() }
    }

    /// The header area of a disk with 4 KiB clusters.
    fn area(header: &Header) -> Vec<u8> {
        let mut area = header.encode().unwrap();
        area.resize(4096, 0);
        area
    }

    /// A header with that backing file.
    fn header(backing: Option<FileReference>) -> Header {
        let name = FileName::new(FileRole::Image, "disk.raw").unwrap();
        Header {
            cluster_size: ClusterSize::from_bits(12).unwrap(),
            backing,
            image: FileReference { name, format: "raw".to_owned() },
            all_allocated: false,
            compat_features: 0,
        }
    }

    /// The areas before, between and after the steps.
    fn stages(area: &[u8], change: &HeaderChange) -> Vec<Vec<u8>> {
        let mut stages = vec![area.to_vec()];
        let nothing = HeaderChange { name: None, fixed: None, unused: None };
        for step in [
            HeaderChange { name: change.name.clone(), ..nothing.clone() },
            HeaderChange { fixed: change.fixed, ..nothing.clone() },
            HeaderChange { unused: change.unused, ..nothing.clone() },
        ] {
            let mut next = stages.last().unwrap().clone();
            step.apply(&mut next);
            stages.push(next);
        }
        stages
    }

    #[test]
    fn every_stage_has_the_old_or_the_new_header_and_the_last_no_other_byte() {
        let names: Vec<Option<FileReference>> =
            ["a", "base.img", "a/much/longer/name.img", &"x".repeat(1023)]
                .map(|name| Some(backing(name)))
                .into_iter()
                .chain([None])
                .collect();
        for (old, new) in names.iter().flat_map(|old| names.iter().map(move |new| (old, new))) {
            let before = area(&header(old.clone()));
            let change = HeaderChange::to_backing(&before, new.as_ref()).unwrap();
            let stages = stages(&before, &change);
            let found: Vec<Header> = stages.iter().map(|s| Header::decode(s).unwrap()).collect();
            let (old, new) = (header(old.clone()), header(new.clone()));
            assert_eq!(found, [old.clone(), old.clone(), new.clone(), new.clone()]);
            let names = |h: &Header| {
                h.image.name.as_bytes().len()
                    + h.backing.as_ref().map_or(0, |b| b.name.as_bytes().len())
            };
            let used = stages[3][FIXED_HEADER_LEN..].iter().filter(|&&byte| byte != 0).count();
            assert_eq!(used, names(&new), "bytes that are not zero behind the fixed header");
            if old == new {
                assert_eq!((change.name, change.fixed, change.unused), (None, None, None));
            }
        }
    }

    #[test]
    fn another_format_for_the_same_name_moves_nothing() {
        let before = area(&header(Some(backing("base"))));
        let new = FileReference { format: "add-cow".to_owned(), ..backing("base") };
        let change = HeaderChange::to_backing(&before, Some(&new)).unwrap();
        assert_eq!((&change.name, change.unused), (&None, None));
        let stages = stages(&before, &change);
        assert_eq!(Header::decode(&stages[3]).unwrap().backing, Some(new));
    }

    #[test]
    fn what_else_the_file_says_stays_as_it_is() {
        let mut before = area(&header(Some(backing("base"))));
        // An unknown compatible feature, its data at the end of the area, and small clusters.
        before[33] = 0x80;
        before[4095] = 7;
        before[20] = 9;
        let change = HeaderChange::to_backing(&before, Some(&backing("other"))).unwrap();
        let after = stages(&before, &change).pop().unwrap();
        assert_eq!((after[33], after[4095], after[20]), (0x80, 7, 9));
    }

    #[test]
    fn a_header_without_a_gap_is_refused() {
        let mut header = header(Some(backing(&"b".repeat(1000))));
        header.image.name = FileName::new(FileRole::Image, "i".repeat(2500)).unwrap();
        let before = area(&header);
        assert!(HeaderChange::to_backing(&before, Some(&backing(&"c".repeat(519)))).is_ok());
        let error =
            HeaderChange::to_backing(&before, Some(&backing(&"c".repeat(520)))).unwrap_err();
        assert_eq!(error, FormatError::NoGap { len: 520, header_size: 4096 });
    }

    #[test]
    fn a_name_that_cannot_be_is_refused() {
        let before = area(&header(None));
        let error = HeaderChange::to_backing(&before, Some(&backing("disk.raw"))).unwrap_err();
        assert!(matches!(error, FormatError::SameFile { .. }), "{error}");
        let new = FileReference { format: String::new(), ..backing("base") };
        let error = HeaderChange::to_backing(&before, Some(&new)).unwrap_err();
        assert!(matches!(error, FormatError::BackingFormatMissing { .. }), "{error}");
    }

    #[test]
    fn the_flag_is_one_bit_and_a_damaged_backing_file_keeps_it_on() {
        let before = area(&header(Some(backing("base"))));
        let on = HeaderChange::to_all_allocated(&before, true).unwrap();
        let mut area = stages(&before, &on).pop().unwrap();
        assert_eq!(area.iter().zip(&before).filter(|(a, b)| a != b).count(), 1);
        assert!(Header::decode(&area).unwrap().all_allocated);
        let off = HeaderChange::to_all_allocated(&area, false).unwrap();
        assert_eq!(stages(&area, &off).pop().unwrap(), before);
        // A backing name that lies in the fixed header.
        area[4] = 3;
        assert!(HeaderChange::to_all_allocated(&area, false).is_err());
        // But it can be replaced, and the bytes that it leads to are left alone.
        let change = HeaderChange::to_backing(&area, Some(&backing("new"))).unwrap();
        assert_eq!(change.unused, None);
        let after = stages(&area, &change).pop().unwrap();
        assert_eq!(Header::decode(&after).unwrap().backing, Some(backing("new")));
    }
}
