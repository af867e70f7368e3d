//! The catalogue: the table of volumes with the roots of their maps, the deletions under way, and
//! where each group's header is. It is encoded whole and cut into a chain of blocks.

use bincode::{Decode, Encode};
use serde::{Serialize, Serializer};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::{Field, fields};
use crate::crc::crc32;
use crate::error::{Error, Result};
use crate::format::node::{NodePtr, Root};
use crate::limits::CATALOGUE_BYTES_MAX;
use crate::units::{BLOCK_SIZE, BlockNo, Generation, Seqno, VolumeId, to_u32, to_u64, to_usize};

/// How fast a volume may be read and written, both together; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct IoLimits {
    /// Requests in a second.
    pub iops: u64,
    /// Bytes in a second.
    pub bandwidth_bytes: u64,
}

/// A volume or snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct VolumeEntry {
    /// Identity.
    pub id: VolumeId,
    /// Unique name.
    pub name: String,
    /// Bytes.
    pub size_bytes: u64,
    /// What it was born of; may be gone.
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
    /// Its map; `None` when nothing is mapped.
    pub root: Option<Root>,
    /// The last clone or snapshot that it took part in.
    pub shared_at: Seqno,
    /// At most so many blocks it had written and then shared, and shares with no clone or snapshot
    /// of its own any more.
    pub held_blocks: u64,
    /// At most so many blocks of its source were first shared with it, and count against the growth
    /// limit of the source while both live.
    pub frozen_blocks: u64,
}

/// Serializes labels as people read them.
pub(super) fn labels_as_map<S: Serializer>(
    labels: &[(String, String)],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(labels.iter().map(|(key, value)| (key, value)))
}

/// Bytes of the encoded entry of a volume with this name and these labels, at most. (Fixed-width
/// integers: 8 bytes for a length, 1 for an option.)
#[must_use]
pub fn entry_bytes(name: &str, labels: &[(String, String)]) -> u64 {
    let labels = labels.iter().map(|(key, value)| 16 + key.len() + value.len());
    to_u64(ENTRY_BYTES + name.len() + labels.sum::<usize>())
}

/// Bytes of an entry without its name and labels, with a source and a root.
const ENTRY_BYTES: usize = 149;

/// Bytes of an encoded catalogue whose volumes' entries take `entries` bytes, at most.
#[must_use]
pub const fn catalogue_bytes(entries: u64, drops: u64, groups: u64) -> u64 {
    // The next identity, and the lengths of the three lists.
    8 + (8 + entries) + (8 + drops * 16) + (8 + groups * 9)
}

/// A group, as of a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct GroupEntry {
    /// Checkpoint that wrote the header last; 0: never.
    pub generation: Generation,
    /// Slot of the header.
    pub slot: u8,
    /// Blocks with no reference.
    pub free: u32,
}

/// Everything that the superblock points to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Catalogue {
    /// Identity of the next volume.
    pub next_id: u64,
    /// In order of their identities.
    pub volumes: Vec<VolumeEntry>,
    /// Nodes that lost their last pointer and wait to give up their children; each holds one
    /// reference of its own.
    pub drops: Vec<NodeDrop>,
    /// One for each group.
    pub groups: Vec<GroupEntry>,
}

/// A reference to a node that is to be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct NodeDrop {
    /// Block of the node.
    pub block: BlockNo,
    /// Its birth.
    pub birth: Seqno,
}

impl From<NodePtr> for NodeDrop {
    fn from(ptr: NodePtr) -> Self {
        Self { block: ptr.block, birth: ptr.birth }
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ChainHeader {
    crc: U32,
    magic: U32,
    uuid: [u8; 16],
    next: U64,
    generation: U32,
    length: U32,
    index: U32,
    reserved: U32,
}

const HEADER_BYTES: usize = 48;
const _: () = assert!(size_of::<ChainHeader>() == HEADER_BYTES);

/// The fields of the header of a block of the chain.
pub const FIELDS: &[Field] =
    fields!(ChainHeader: crc, magic, uuid [u64], next, generation, length, index, reserved);
const MAGIC: u32 = 0x6143_4450;
/// Bytes of the catalogue in one block of the chain.
pub const CHAIN_PAYLOAD: usize = BLOCK_SIZE - HEADER_BYTES;

/// Blocks of the chain for a catalogue of `bytes` bytes.
#[must_use]
pub const fn chain_blocks(bytes: usize) -> usize {
    if bytes == 0 { 1 } else { bytes.div_ceil(CHAIN_PAYLOAD) }
}

/// Fills `out` with block `index` of the chain that holds `bytes` in `blocks`.
pub fn encode_chain_block(
    bytes: &[u8],
    index: usize,
    blocks: &[BlockNo],
    generation: Generation,
    uuid: [u8; 16],
    out: &mut [u8],
) {
    let start = index * CHAIN_PAYLOAD;
    let part = &bytes[start.min(bytes.len())..(start + CHAIN_PAYLOAD).min(bytes.len())];
    let header = ChainHeader {
        crc: U32::ZERO,
        magic: MAGIC.into(),
        uuid,
        next: blocks.get(index + 1).map_or(0, |b| b.get()).into(),
        generation: generation.get().into(),
        length: to_u32(to_u64(part.len())).into(),
        index: to_u32(to_u64(index)).into(),
        reserved: U32::ZERO,
    };
    out.fill(0);
    out[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    out[HEADER_BYTES..HEADER_BYTES + part.len()].copy_from_slice(part);
    let crc = crc32(&out[4..]);
    out[..4].copy_from_slice(&crc.to_le_bytes());
}

/// Puts a chain together block by block, with a bound on its length.
pub struct ChainReader {
    uuid: [u8; 16],
    generation: Generation,
    expected: usize,
    next: Option<BlockNo>,
    blocks: Vec<BlockNo>,
    bytes: Vec<u8>,
}

impl ChainReader {
    /// A chain of `bytes` bytes that starts at `first`.
    ///
    /// # Errors
    /// `Corrupt` when it is longer than any catalogue.
    pub fn new(uuid: [u8; 16], generation: Generation, first: BlockNo, bytes: u64) -> Result<Self> {
        if bytes > to_u64(CATALOGUE_BYTES_MAX) {
            return Err(Error::corrupt(format!("superblock: a catalogue of {bytes} bytes")));
        }
        let expected = to_usize(bytes);
        Ok(Self { uuid, generation, expected, next: Some(first), blocks: vec![], bytes: vec![] })
    }

    /// The block to read next; `None` when the chain is whole.
    #[must_use]
    pub const fn wants(&self) -> Option<BlockNo> {
        self.next
    }

    /// Takes the block that was wanted.
    ///
    /// # Errors
    /// `Corrupt`, naming the block.
    pub fn take(&mut self, block: &[u8]) -> Result<()> {
        let Some(place) = self.next else { return Ok(()) };
        let bad = |what: &str| Error::corrupt(format!("catalogue at {place}: {what}"));
        let (header, payload) =
            ChainHeader::read_from_prefix(block).map_err(|_| bad("cut short"))?;
        if block.len() != BLOCK_SIZE || header.crc.get() != crc32(&block[4..]) {
            return Err(bad("checksum does not match"));
        }
        if header.magic.get() != MAGIC || header.uuid != self.uuid {
            return Err(bad("another structure lies in its place"));
        }
        if header.generation.get() != self.generation.get()
            || to_usize(u64::from(header.index.get())) != self.blocks.len()
        {
            return Err(bad("another version lies in its place"));
        }
        let length = to_usize(u64::from(header.length.get()));
        let payload = payload.get(..length).ok_or_else(|| bad("length"))?;
        self.bytes.extend_from_slice(payload);
        self.blocks.push(place);
        let last = self.blocks.len() == chain_blocks(self.expected);
        if (last && self.bytes.len() != self.expected) || last != (header.next.get() == 0) {
            return Err(bad("its length is not the one in the superblock"));
        }
        self.next = (!last).then(|| BlockNo::new(header.next.get()));
        Ok(())
    }

    /// The blocks and bytes of the whole chain.
    #[must_use]
    pub fn finish(self) -> (Vec<BlockNo>, Vec<u8>) {
        (self.blocks, self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_round_trip_and_damage() {
        let bytes: Vec<u8> = (0u32..10_000).map(|i| i.to_le_bytes()[0]).collect();
        let blocks = [5, 9, 7].map(BlockNo::new);
        assert_eq!(chain_blocks(bytes.len()), 3);
        let generation = Generation::new(4);
        let encoded: Vec<[u8; BLOCK_SIZE]> = (0..3)
            .map(|i| {
                let mut out = [0; BLOCK_SIZE];
                encode_chain_block(&bytes, i, &blocks, generation, [1; 16], &mut out);
                out
            })
            .collect();
        let mut reader = ChainReader::new([1; 16], generation, blocks[0], 10_000).unwrap();
        for (block, want) in encoded.iter().zip(blocks) {
            assert_eq!(reader.wants(), Some(want));
            reader.take(block).unwrap();
        }
        assert_eq!(reader.wants(), None);
        assert_eq!(reader.finish(), (blocks.to_vec(), bytes));
        let mut reader = ChainReader::new([1; 16], generation, blocks[0], 10_000).unwrap();
        assert!(reader.take(&encoded[1]).is_err(), "blocks out of order");
    }

    #[test]
    fn entries_are_as_long_as_said() {
        let lba = crate::units::Lba::new(0);
        let ptr = NodePtr { lba, block: BlockNo::new(1), birth: Seqno::new(1), mapped: 1, own: 1 };
        let labels = vec![("key".to_owned(), "value".to_owned()), ("k".to_owned(), String::new())];
        let entry = VolumeEntry {
            id: VolumeId::new(1),
            name: "name".into(),
            size_bytes: 1,
            source: Some(VolumeId::new(2)),
            snapshot: true,
            read_only: false,
            reservation_blocks: 0,
            growth_limit_blocks: 0,
            io_limits: IoLimits::default(),
            labels,
            created_at: 0,
            root: Some(Root { ptr, level: 0 }),
            shared_at: Seqno::new(1),
            held_blocks: 0,
            frozen_blocks: 0,
        };
        let encoded = crate::format::codec::encode_catalogue(&entry).expect("it is short");
        let bytes = to_u64(encoded.len());
        assert_eq!(bytes, entry_bytes(&entry.name, &entry.labels));
        let drop = NodeDrop { block: BlockNo::new(1), birth: Seqno::new(1) };
        let groups = vec![GroupEntry::default(); 3];
        let catalogue =
            Catalogue { next_id: 9, volumes: vec![entry], drops: vec![drop; 2], groups };
        let encoded = crate::format::codec::encode_catalogue(&catalogue).expect("it is short");
        assert_eq!(to_u64(encoded.len()), catalogue_bytes(bytes, 2, 3));
    }

    /// Reads a chain of these blocks; the error.
    fn refusal(blocks: &[&[u8]], generation: u32, uuid: u8, bytes: u64) -> String {
        let generation = Generation::new(generation);
        let reader = ChainReader::new([uuid; 16], generation, BlockNo::new(5), bytes);
        let taken = reader.and_then(|mut reader| {
            blocks.iter().try_for_each(|block| reader.take(block))?;
            Ok(reader.wants())
        });
        taken.expect_err("the chain is not the one").to_string()
    }

    #[test]
    fn chains_that_are_not_the_one_are_refused() {
        let bytes = vec![7; 5000];
        let encode = |index, next: &[u64]| {
            let blocks: Vec<BlockNo> = next.iter().copied().map(BlockNo::new).collect();
            let mut out = [0; BLOCK_SIZE];
            encode_chain_block(&bytes, index, &blocks, Generation::new(4), [1; 16], &mut out);
            out
        };
        let (first, last) = (encode(0, &[5, 9]), encode(1, &[5, 9]));
        let forged = |at: usize, value: u8| {
            let mut block = first;
            block[at] = value;
            let crc = crc32(&block[4..]);
            block[..4].copy_from_slice(&crc.to_le_bytes());
            block
        };
        let field = |name| FIELDS.iter().find(|field| field.name == name).unwrap().offset;
        let mut flipped = first;
        flipped[4000] ^= 4;
        assert!(refusal(&[&flipped], 4, 1, 5000).ends_with("checksum does not match"));
        let magic = forged(field("magic"), 0);
        for (block, uuid) in [(&first, 2), (&magic, 1)] {
            let error = refusal(&[block], 4, uuid, 5000);
            assert!(error.ends_with("another structure lies in its place"), "{error}");
        }
        let index = forged(field("index"), 1);
        for (block, generation) in [(&first, 5), (&first, 3), (&index, 4)] {
            let error = refusal(&[block], generation, 1, 5000);
            assert!(error.ends_with("another version lies in its place"), "{error}");
        }
        let length = forged(field("length") + 1, 0xFF);
        assert!(refusal(&[&length], 4, 1, 5000).ends_with(": length"));
        // Shorter or longer than the superblock says, in bytes and in blocks.
        for (blocks, bytes) in [
            (&[&first[..], &last[..]][..], 5001),
            (&[&first[..], &last[..]], 4999),
            (&[&first[..]], 4000),
            (&[&first[..], &last[..]], 9000),
            (&[&encode(0, &[5])[..]], 5000),
        ] {
            let error = refusal(blocks, 4, 1, bytes);
            assert!(error.ends_with("not the one in the superblock"), "{bytes}: {error}");
        }
        let error = refusal(&[], 4, 1, to_u64(CATALOGUE_BYTES_MAX) + 1);
        assert!(error.starts_with("superblock: a catalogue of"), "{error}");
    }
}
