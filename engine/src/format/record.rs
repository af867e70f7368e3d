//! Records of the journal: one change each, behind a fixed header.
//!
//! ```text
//! +-----+--------+-------+---------+------+-------+------------------+
//! | crc | length | seqno | durable | salt | magic | payload (bincode)|  padded to 8 bytes
//! |  4  |   4    |   8   |    8    |  4   |   4   |      length      |
//! +-----+--------+-------+---------+------+-------+------------------+
//! ```
//! `durable` is the last sequence number that was known to be durable when the record was
//! appended: the data of records up to there need no proof at replay.

use bincode::{Decode, Encode};
use serde::Serialize;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::catalogue::{IoLimits, labels_as_map};
use super::codec::{decode_record, encode_record};
use super::layout::{Field, fields};
use crate::crc::crc32_of_parts;
use crate::error::Result;
use crate::limits::RECORD_BYTES_MAX;
use crate::units::{BlockNo, Lba, Seqno, VolumeId, to_u64, to_usize};

/// Bytes of a record's header.
pub const HEADER_BYTES: usize = 32;
/// Records begin at multiples of this.
pub const ALIGN: usize = 8;
const MAGIC: u32 = 0x6352_4450;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    crc: U32,
    length: U32,
    seqno: U64,
    durable: U64,
    salt: U32,
    magic: U32,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

/// The fields of a record's header.
pub const FIELDS: &[Field] = fields!(Header: crc, length, seqno, durable, salt, magic);

/// A run of LBAs of a volume that now stands on a run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct MapRun {
    /// Volume.
    pub volume: VolumeId,
    /// First LBA.
    pub lba: Lba,
    /// First block.
    pub block: BlockNo,
    /// Blocks.
    pub len: u32,
}

/// A volume, clone or snapshot to be made.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct NewVolume {
    /// Its identity.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size_bytes: u64,
    /// What it shares blocks with.
    pub source: Option<VolumeId>,
    /// Frozen.
    pub snapshot: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// Blocks promised.
    pub reservation_blocks: u64,
    /// Blocks that it may add; 0 is no limit.
    pub growth_limit_blocks: u64,
    /// How fast it may be read and written.
    pub io_limits: IoLimits,
    /// Labels in order of their keys.
    #[serde(serialize_with = "labels_as_map")]
    pub labels: Vec<(String, String)>,
    /// Seconds since the epoch.
    pub created_at: u64,
}

/// New properties of a volume; all of them, changed or not.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct NewProperties {
    /// Volume.
    pub id: VolumeId,
    /// Bytes.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Blocks promised.
    pub reservation_blocks: u64,
    /// Blocks that it may add; 0 is no limit.
    pub growth_limit_blocks: u64,
    /// How fast it may be read and written.
    pub io_limits: IoLimits,
    /// Labels in order of their keys.
    #[serde(serialize_with = "labels_as_map")]
    pub labels: Vec<(String, String)>,
}

/// One change of the pool's state. Everything in a record happens at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// Runs of LBAs were written; `sums` has a checksum for each block, in the order of the runs.
    Map {
        /// What was written where.
        runs: Vec<MapRun>,
        /// Checksums of the blocks.
        #[serde(skip)]
        sums: Vec<u32>,
    },
    /// LBAs read as zeros again.
    Unmap {
        /// Volume.
        volume: VolumeId,
        /// First LBA.
        lba: Lba,
        /// Number of LBAs.
        len: u64,
    },
    /// Volumes, clones or snapshots are made, all at one instant.
    Create(Vec<NewVolume>),
    /// A volume has new properties.
    Modify(Box<NewProperties>),
    /// A volume or snapshot is gone.
    Delete(VolumeId),
}

impl Record {
    /// Bytes of the encoded payload. (Fixed-width integers: a tag of 4 bytes for an enum, 8 for a
    /// length, 1 for an option.)
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        let labels = |labels: &[(String, String)]| {
            8 + labels.iter().map(|(k, v)| 16 + k.len() + v.len()).sum::<usize>()
        };
        4 + match self {
            Self::Map { runs, sums } => 16 + runs.len() * 28 + sums.len() * 4,
            Self::Unmap { .. } => 24,
            Self::Create(volumes) => {
                let each = |v: &NewVolume| {
                    66 + v.name.len() + if v.source.is_some() { 9 } else { 1 } + labels(&v.labels)
                };
                8 + volumes.iter().map(each).sum::<usize>()
            }
            Self::Modify(new) => 49 + labels(&new.labels),
            Self::Delete(_) => 8,
        }
    }
}

/// A record as read from the journal.
#[derive(Clone, Debug)]
pub struct Framed {
    /// Its place in the order of changes.
    pub seqno: Seqno,
    /// What was known to be durable when it was appended.
    pub durable: Seqno,
    /// The change.
    pub record: Record,
    /// Bytes that it takes in the ring.
    pub bytes: usize,
}

/// Bytes in the ring of a record with a payload of `payload` bytes.
#[must_use]
pub const fn framed_bytes(payload: usize) -> usize {
    HEADER_BYTES + payload.next_multiple_of(ALIGN)
}

/// Frames `record` into `out`, which is cleared first.
///
/// # Errors
/// `Invalid` when the record is too long.
pub fn encode(
    record: &Record,
    seqno: Seqno,
    durable: Seqno,
    salt: u32,
    out: &mut Vec<u8>,
) -> Result<()> {
    out.clear();
    out.resize(HEADER_BYTES, 0);
    encode_record(record, out)?;
    let length = out.len() - HEADER_BYTES;
    out.resize(framed_bytes(length), 0);
    let mut header = Header {
        crc: U32::ZERO,
        length: crate::units::to_u32(to_u64(length)).into(),
        seqno: seqno.get().into(),
        durable: durable.get().into(),
        salt: salt.into(),
        magic: MAGIC.into(),
    };
    header.crc = crc32_of_parts(&[&header.as_bytes()[4..], &out[HEADER_BYTES..]]).into();
    out[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    Ok(())
}

/// The sequence number of what looks like a record with this salt at the start of `bytes`.
#[must_use]
pub fn seqno_at(bytes: &[u8], salt: u32) -> Option<Seqno> {
    let (header, _) = Header::read_from_prefix(bytes).ok()?;
    let plausible = header.magic.get() == MAGIC && header.salt.get() == salt;
    plausible.then(|| Seqno::new(header.seqno.get()))
}

/// Reads the record at the start of `bytes`, if it is whole, has this salt and is number `seqno`.
/// `None` is where the log ends: there is no way to tell a torn record from an older one.
#[must_use]
pub fn decode(bytes: &[u8], seqno: Seqno, salt: u32) -> Option<Framed> {
    let (header, rest) = Header::read_from_prefix(bytes).ok()?;
    let length = to_usize(u64::from(header.length.get()));
    if header.magic.get() != MAGIC
        || header.salt.get() != salt
        || header.seqno.get() != seqno.get()
        || length > RECORD_BYTES_MAX
    {
        return None;
    }
    let payload = rest.get(..length.next_multiple_of(ALIGN))?;
    if header.crc.get() != crc32_of_parts(&[&header.as_bytes()[4..], payload]) {
        return None;
    }
    let record = decode_record(&payload[..length]).ok()?;
    let durable = Seqno::new(header.durable.get());
    Some(Framed { seqno, durable, record, bytes: framed_bytes(length) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Record {
        Record::Map {
            runs: vec![MapRun {
                volume: VolumeId::new(1),
                lba: Lba::new(2),
                block: BlockNo::new(3),
                len: 1,
            }],
            sums: vec![0xAABB],
        }
    }

    #[test]
    fn round_trip() {
        let mut bytes = Vec::new();
        encode(&sample(), Seqno::new(5), Seqno::new(4), 9, &mut bytes).unwrap();
        assert_eq!(bytes.len(), 32 + 56);
        let framed = decode(&bytes, Seqno::new(5), 9).unwrap();
        assert_eq!(framed.record, sample());
        assert_eq!((framed.durable, framed.bytes), (Seqno::new(4), bytes.len()));
    }

    #[test]
    fn payloads_are_as_long_as_said() {
        let labels = vec![("key".into(), "value".into()), ("k".into(), String::new())];
        let new = |source| NewVolume {
            id: VolumeId::new(1),
            name: "name".into(),
            size_bytes: 1,
            source,
            snapshot: true,
            read_only: false,
            reservation_blocks: 0,
            growth_limit_blocks: 0,
            io_limits: IoLimits::default(),
            labels: labels.clone(),
            created_at: 0,
        };
        let modify = NewProperties {
            id: VolumeId::new(1),
            size_bytes: 4096,
            read_only: true,
            reservation_blocks: 0,
            growth_limit_blocks: 0,
            io_limits: IoLimits::default(),
            labels: labels.clone(),
        };
        let records = [
            sample(),
            Record::Unmap { volume: VolumeId::new(1), lba: Lba::new(2), len: 3 },
            Record::Create(vec![new(None), new(Some(VolumeId::new(7)))]),
            Record::Modify(Box::new(modify)),
            Record::Delete(VolumeId::new(1)),
        ];
        for record in records {
            let mut out = Vec::new();
            encode_record(&record, &mut out).unwrap();
            assert_eq!(out.len(), record.payload_bytes(), "{record:?}");
        }
    }

    #[test]
    fn any_damage_ends_the_log() {
        let mut bytes = Vec::new();
        encode(&sample(), Seqno::new(5), Seqno::new(4), 9, &mut bytes).unwrap();
        assert!(decode(&bytes, Seqno::new(6), 9).is_none(), "gap");
        assert!(decode(&bytes, Seqno::new(5), 8).is_none(), "stale salt");
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut], Seqno::new(5), 9).is_none(), "cut at {cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad, Seqno::new(5), 9).is_none(), "bit {bit}");
        }
        // Whole, but not a record; and a record, but with something behind it.
        for (at, by) in [(28, 1), (4, 8)] {
            let mut bad = bytes.clone();
            bad.extend([0; 8]);
            bad[at] += by;
            let length = usize::from(bad[4]).next_multiple_of(ALIGN);
            let crc = crc32_of_parts(&[&bad[4..HEADER_BYTES + length]]);
            bad[..4].copy_from_slice(&crc.to_le_bytes());
            assert!(decode(&bad, Seqno::new(5), 9).is_none(), "byte {at}");
        }
    }
}
