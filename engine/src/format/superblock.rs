//! The superblock: the root of a checkpoint. Checkpoint *n* is written to the slots `n mod 2` at
//! both ends of the pool; the newest whole one wins; recovery never repairs a torn slot.

use serde::{Serialize, Serializer};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::geometry::Geometry;
use super::layout::{Field, fields};

use crate::error::{Error, ErrorKind, Result};
use crate::limits::{GENERATION_MAX, SEQNO_MAX};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, BlockNo, Generation, Seqno};

/// First bytes of a superblock.
pub const MAGIC: [u8; 8] = *b"PANDO\x01\r\n";
/// Version of the structures on disk.
pub const VERSION: u32 = 1;
/// Features that a reader must know to open the pool at all.
pub const FEATURES_INCOMPATIBLE: u64 = 0;
/// Features that a reader must know to write to the pool.
pub const FEATURES_READ_ONLY_COMPATIBLE: u64 = 0;

/// The superblock's first bytes; the rest of its block is zero.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    crc: U32,
    version: U32,
    incompatible: U64,
    read_only_compatible: U64,
    compatible: U64,
    uuid: [u8; 16],
    pool_blocks: U64,
    journal_blocks: U64,
    group_pages: U32,
    generation: U32,
    catalogue: U64,
    catalogue_bytes: U64,
    journal_offset: U64,
    seal: U64,
    salt: U32,
    clean: U32,
}

const _: () = assert!(size_of::<Raw>() == 120);

/// The fields of a superblock.
pub const FIELDS: &[Field] = fields!(
    Raw: magic, crc, version, incompatible, read_only_compatible, compatible, uuid [u64],
    pool_blocks, journal_blocks, group_pages, generation, catalogue, catalogue_bytes,
    journal_offset, seal, salt, clean,
);

const CRC_START: usize = 8;
const CRC_END: usize = 12;

/// What a superblock says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Superblock {
    /// Identity of the pool.
    #[serde(serialize_with = "uuid_as_text")]
    pub uuid: [u8; 16],
    /// The places in the pool.
    pub geometry: Geometry,
    /// Number of the checkpoint.
    pub generation: Generation,
    /// First block of the catalogue.
    pub catalogue: BlockNo,
    /// Bytes of the encoded catalogue.
    pub catalogue_bytes: u64,
    /// Where in the ring the first record after the checkpoint is, in bytes.
    pub journal_offset: u64,
    /// Sequence number of the last record in the checkpoint.
    pub seal: Seqno,
    /// Salt of the records that follow.
    pub salt: u32,
    /// The pool was closed and its journal holds nothing to replay.
    pub clean: bool,
}

fn uuid_as_text<S: Serializer>(
    uuid: &[u8; 16],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&uuid::Uuid::from_bytes(*uuid))
}

impl Superblock {
    /// The block to write.
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK_SIZE] {
        let raw = Raw {
            magic: MAGIC,
            crc: U32::ZERO,
            version: VERSION.into(),
            incompatible: FEATURES_INCOMPATIBLE.into(),
            read_only_compatible: FEATURES_READ_ONLY_COMPATIBLE.into(),
            compatible: U64::ZERO,
            uuid: self.uuid,
            pool_blocks: self.geometry.pool_blocks.into(),
            journal_blocks: self.geometry.journal_blocks.into(),
            group_pages: crate::units::to_u32(self.geometry.group_pages).into(),
            generation: self.generation.get().into(),
            catalogue: self.catalogue.get().into(),
            catalogue_bytes: self.catalogue_bytes.into(),
            journal_offset: self.journal_offset.into(),
            seal: self.seal.get().into(),
            salt: self.salt.into(),
            clean: u32::from(self.clean).into(),
        };
        let mut block = [0; BLOCK_SIZE];
        block[..size_of::<Raw>()].copy_from_slice(raw.as_bytes());
        set_crc(&mut block);
        block
    }

    /// Reads a slot. `place` names it in errors.
    ///
    /// # Errors
    /// `NotAPool` without the magic; `Corrupt` when torn or damaged; `Unsupported` for a version
    /// or feature that this program does not know.
    pub fn decode(block: &[u8], place: BlockNo) -> Result<Self> {
        let (raw, _) = Raw::read_from_prefix(block)
            .map_err(|_| Error::corrupt(format!("superblock at {place} is cut short")))?;
        if raw.magic != MAGIC {
            return Err(Error::new(ErrorKind::NotAPool, format!("no superblock at {place}")));
        }
        if block.len() != BLOCK_SIZE || raw.crc.get() != crc_of(block) {
            return Err(Error::corrupt(format!("superblock at {place}: checksum does not match")));
        }
        let unknown = raw.incompatible.get() & !FEATURES_INCOMPATIBLE;
        let unknown_ro = raw.read_only_compatible.get() & !FEATURES_READ_ONLY_COMPATIBLE;
        if raw.version.get() != VERSION || unknown != 0 || unknown_ro != 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "superblock at {place}: version {} with features {unknown:#x}/{unknown_ro:#x}, \
                     this program knows version {VERSION}; use a newer one",
                    raw.version
                ),
            ));
        }
        let bad = |what: &str| Error::corrupt(format!("superblock at {place}: {what}"));
        let geometry = Geometry::new(
            raw.pool_blocks.get(),
            raw.journal_blocks.get(),
            u64::from(raw.group_pages.get()),
        )
        .map_err(|e| bad(&e.to_string()))?;
        let journal_bytes = geometry.journal_blocks * BLOCK_BYTES;
        if raw.journal_offset.get() >= journal_bytes
            || !raw.journal_offset.get().is_multiple_of(BLOCK_BYTES)
        {
            return Err(bad("journal position is outside the journal"));
        }
        if raw.seal.get() > SEQNO_MAX || raw.generation.get() > GENERATION_MAX {
            return Err(bad("an impossible sequence number or generation"));
        }
        if geometry.locate(BlockNo::new(raw.catalogue.get())).is_none() {
            return Err(bad("catalogue is outside the pool"));
        }
        Ok(Self {
            uuid: raw.uuid,
            geometry,
            generation: Generation::new(raw.generation.get()),
            catalogue: BlockNo::new(raw.catalogue.get()),
            catalogue_bytes: raw.catalogue_bytes.get(),
            journal_offset: raw.journal_offset.get(),
            seal: Seqno::new(raw.seal.get()),
            salt: raw.salt.get(),
            clean: raw.clean.get() != 0,
        })
    }
}

/// Computes the checksum of a superblock and stores it; for tests that damage one on purpose too.
pub fn set_crc(block: &mut [u8; BLOCK_SIZE]) {
    let crc = crc_of(block);
    block[CRC_START..CRC_END].copy_from_slice(&crc.to_le_bytes());
}

fn crc_of(block: &[u8]) -> u32 {
    crate::crc::crc32_of_parts(&[&block[..CRC_START], &[0; 4], &block[CRC_END..]])
}

/// Whether the start of a device looks like something that belongs to somebody: any byte that is
/// not zero in its first 128 KiB (filesystems, partition tables, LVM and pools all put their
/// marks there; btrfs's is at 64 KiB).
#[must_use]
pub fn looks_used(start: &[u8]) -> bool {
    start.iter().any(|&byte| byte != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crc::crc32;

    fn sample() -> Superblock {
        Superblock {
            uuid: [7; 16],
            geometry: Geometry::new(5000, 16, 1).unwrap(),
            generation: Generation::new(9),
            catalogue: Geometry::new(5000, 16, 1).unwrap().block_at(0, 3),
            catalogue_bytes: 100,
            journal_offset: 4096,
            seal: Seqno::new(77),
            salt: 5,
            clean: true,
        }
    }

    #[test]
    fn round_trip_and_golden_bytes() {
        let block = sample().encode();
        assert_eq!(Superblock::decode(&block, BlockNo::new(0)).unwrap(), sample());
        assert_eq!(crc32(&block), 0x06A3_190D, "the format has changed: raise VERSION");
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let block = sample().encode();
        for bit in 0..8 * 256 {
            let mut bad = block;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&bad, BlockNo::new(0)).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn fields_that_cannot_be_are_refused() {
        let geometry = sample().geometry;
        let journal_bytes = geometry.journal_blocks * BLOCK_BYTES;
        let cases = [
            ("pool_blocks", 20, "too small"),
            ("journal_offset", journal_bytes, "outside the journal"),
            ("journal_offset", 4104, "outside the journal"),
            ("seal", SEQNO_MAX + 1, "an impossible sequence number"),
            ("generation", u64::from(GENERATION_MAX) + 1, "an impossible sequence number"),
            ("catalogue", geometry.pool_blocks - 1, "catalogue is outside"),
            ("catalogue", geometry.header_place(0, 0).get(), "catalogue is outside"),
        ];
        for (name, value, says) in cases {
            let field = FIELDS.iter().find(|field| field.name == name).unwrap();
            let mut block = sample().encode();
            block[field.offset..field.offset + field.bytes]
                .copy_from_slice(&value.to_le_bytes()[..field.bytes]);
            set_crc(&mut block);
            let error = Superblock::decode(&block, BlockNo::new(1)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().contains(says), "{name}: {error}");
        }
        let mut block = sample().encode();
        block[0] ^= 1;
        set_crc(&mut block);
        let error = Superblock::decode(&block, BlockNo::new(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotAPool);
    }

    #[test]
    fn unknown_version_and_features_are_named() {
        for (offset, expected) in [(12, "version 2"), (16, "features 0x2"), (24, "/0x2")] {
            let mut block = sample().encode();
            block[offset] = 2;
            set_crc(&mut block);
            let error = Superblock::decode(&block, BlockNo::new(1)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
