//! A node of a map, 4 KiB on disk: the header, then either extents (a leaf) or pointers to nodes.
//!
//! ```text
//! 0      4       8           24      32      40      42      44         64                   4096
//! +------+-------+-----------+-------+-------+-------+-------+----------+--------------------+
//! | crc  | magic | pool uuid | block | birth | level | count | reserved | entries ... zeros  |
//! +------+-------+-----------+-------+-------+-------+-------+----------+--------------------+
//! leaf entry,  16 bytes:  lba << 16 | len,  block << 1 | own                  at most 252
//! inner entry, 40 bytes:  lba, block, birth, mapped, own                      at most 100
//! ```
//!
//! All integers are little-endian. The crc covers bytes 4 to 4096. Invariants of a valid node:
//! it is not empty, its keys are strictly sorted, its extents do not overlap, `lba` of a pointer
//! is the first LBA mapped below it, and `mapped` of a pointer the number of blocks mapped below.
//! A pair (block, birth) is written once and never again, so a lost, stale or misdirected write
//! is seen: the node does not say what the pointer to it says.

use std::ops::Range;

use serde::Serialize;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, transmute_mut};
use zerocopy::{FromZeros, transmute_ref};

use super::layout::{Field, fields};
use crate::crc::crc32;
use crate::error::{Error, Result};
use crate::limits::{EXTENT_BLOCKS_MAX, MAP_LEVELS_MAX};
use crate::units::{BLOCK_SIZE, BlockNo, Lba, Seqno};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;
/// Extents in a full leaf: (4096 - 64) / 16.
pub const LEAF_ENTRIES_MAX: usize = (BLOCK_SIZE - HEADER_BYTES) / size_of::<LeafEntry>();
/// Pointers in a full inner node: (4096 - 64) / 40, rounded down.
pub const INNER_ENTRIES_MAX: usize = (BLOCK_SIZE - HEADER_BYTES) / size_of::<InnerEntry>();
/// First LBA that a leaf entry cannot hold: 48 bits.
pub const LBA_END: u64 = 1 << 48;

const MAGIC: u32 = u32::from_le_bytes(*b"PNod");
const BODY_BYTES: usize = BLOCK_SIZE - HEADER_BYTES;
const INNER_SPARE_BYTES: usize = BODY_BYTES - INNER_ENTRIES_MAX * size_of::<InnerEntry>();

/// A pointer to a node: what its parent, or the catalogue, says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode, Serialize)]
pub struct NodePtr {
    /// First LBA mapped below.
    pub lba: Lba,
    /// Where the node is.
    pub block: BlockNo,
    /// Sequence number of the record that made the node.
    pub birth: Seqno,
    /// Blocks mapped below.
    pub mapped: u64,
    /// Blocks below that are flagged as the volume's own; counts only while the node's birth is
    /// greater than the volume's `shared_at`.
    pub own: u64,
}

/// A volume's map that is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode, Serialize)]
pub struct Root {
    /// The topmost node.
    pub ptr: NodePtr,
    /// Its level; 0 is a leaf.
    pub level: u8,
}

impl Root {
    /// Blocks mapped.
    #[must_use]
    pub const fn mapped(&self) -> u64 {
        self.ptr.mapped
    }

    /// Blocks written since the volume last took part in a clone or snapshot.
    #[must_use]
    pub fn own(&self, shared_at: Seqno) -> u64 {
        if self.ptr.birth > shared_at { self.ptr.own } else { 0 }
    }

    /// The root's node with all that is known of it.
    #[must_use]
    pub const fn node_ref(&self) -> NodeRef {
        NodeRef::new(&self.ptr, self.level, Lba::new(LBA_END))
    }
}

/// A run of LBAs on consecutive blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Extent {
    /// First LBA.
    pub lba: Lba,
    /// Block of the first LBA.
    pub block: BlockNo,
    /// Blocks, 1 to 65535 in a leaf.
    pub len: u64,
    /// Written by the volume since it last took part in a clone or snapshot. Counts only while
    /// the birth of the leaf is greater than the volume's `shared_at`.
    pub own: bool,
}

/// A node as its pointer describes it: everything that is verified when it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeRef {
    /// Where it is.
    pub block: BlockNo,
    /// Its birth.
    pub birth: Seqno,
    /// 0 is a leaf.
    pub level: u8,
    /// First LBA mapped below.
    pub lba: Lba,
    /// Nothing at or after this LBA is mapped below (the next sibling begins there).
    pub end: Lba,
    /// Blocks mapped below.
    pub mapped: u64,
}

impl NodeRef {
    /// The node that `ptr` names, `level` above the leaves, whose keys end before `end`
    /// (`LBA_END` where the caller knows no better bound).
    #[must_use]
    pub const fn new(ptr: &NodePtr, level: u8, end: Lba) -> Self {
        let NodePtr { lba, block, birth, mapped, .. } = *ptr;
        Self { block, birth, level, lba, end, mapped }
    }

    fn corrupt(&self, what: impl std::fmt::Display) -> Error {
        Error::corrupt(format!("map node at {}: {what}", self.block))
    }
}

/// What a leaf and an inner node hold: an item with a key and the sums below it.
pub trait Entry: Copy + FromZeros + 'static {
    /// Entries in a full node.
    const MAX: usize;
    /// First LBA.
    fn key(&self) -> u64;
    /// Blocks mapped.
    fn mapped(&self) -> u64;
    /// Blocks flagged as the volume's own.
    fn own(&self) -> u64;
    /// The same entry without that flag.
    #[must_use]
    fn shared(self) -> Self;
    #[doc(hidden)]
    fn all(body: &[u8; BODY_BYTES]) -> &[Self];
    #[doc(hidden)]
    fn all_mut(body: &mut [u8; BODY_BYTES]) -> &mut [Self];
}

/// An extent in a leaf.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct LeafEntry {
    lba_len: U64,
    block_own: U64,
}

impl LeafEntry {
    /// The entry of `extent`, whose length and LBA fit by the engine's limits.
    #[must_use]
    pub fn new(extent: &Extent) -> Self {
        let Extent { lba, block, len, own } = *extent;
        assert!((1..=EXTENT_BLOCKS_MAX).contains(&len), "an extent of {len} blocks");
        assert!(lba.get() + len <= LBA_END, "an extent at {lba}");
        Self {
            lba_len: U64::new(lba.get() << 16 | len),
            block_own: U64::new(block.get() << 1 | u64::from(own)),
        }
    }

    /// The extent.
    #[must_use]
    pub fn extent(&self) -> Extent {
        let (lba, block) = (Lba::new(self.key()), BlockNo::new(self.block_own.get() >> 1));
        Extent { lba, block, len: self.mapped(), own: self.block_own.get() & 1 == 1 }
    }

    /// The LBA behind the last one.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.key() + self.mapped()
    }
}

impl Entry for LeafEntry {
    const MAX: usize = LEAF_ENTRIES_MAX;

    fn key(&self) -> u64 {
        self.lba_len.get() >> 16
    }
    fn mapped(&self) -> u64 {
        self.lba_len.get() & 0xffff
    }
    fn own(&self) -> u64 {
        if self.block_own.get() & 1 == 1 { self.mapped() } else { 0 }
    }
    fn shared(self) -> Self {
        Self { block_own: U64::new(self.block_own.get() & !1), ..self }
    }
    fn all(body: &[u8; BODY_BYTES]) -> &[Self] {
        let entries: &[Self; LEAF_ENTRIES_MAX] = transmute_ref!(body);
        entries
    }
    fn all_mut(body: &mut [u8; BODY_BYTES]) -> &mut [Self] {
        let entries: &mut [Self; LEAF_ENTRIES_MAX] = transmute_mut!(body);
        entries
    }
}

/// A pointer in an inner node.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct InnerEntry {
    lba: U64,
    block: U64,
    birth: U64,
    mapped: U64,
    own: U64,
}

impl InnerEntry {
    /// The entry of `ptr`.
    #[must_use]
    pub fn new(ptr: &NodePtr) -> Self {
        Self {
            lba: U64::new(ptr.lba.get()),
            block: U64::new(ptr.block.get()),
            birth: U64::new(ptr.birth.get()),
            mapped: U64::new(ptr.mapped),
            own: U64::new(ptr.own),
        }
    }

    /// The pointer.
    #[must_use]
    pub fn ptr(&self) -> NodePtr {
        NodePtr {
            lba: Lba::new(self.lba.get()),
            block: BlockNo::new(self.block.get()),
            birth: Seqno::new(self.birth.get()),
            mapped: self.mapped.get(),
            own: self.own.get(),
        }
    }
}

impl Entry for InnerEntry {
    const MAX: usize = INNER_ENTRIES_MAX;

    fn key(&self) -> u64 {
        self.lba.get()
    }
    fn mapped(&self) -> u64 {
        self.mapped.get()
    }
    fn own(&self) -> u64 {
        self.own.get()
    }
    fn shared(self) -> Self {
        Self { own: U64::new(0), ..self }
    }
    fn all(body: &[u8; BODY_BYTES]) -> &[Self] {
        let inner: &InnerBody = transmute_ref!(body);
        &inner.entries
    }
    fn all_mut(body: &mut [u8; BODY_BYTES]) -> &mut [Self] {
        let inner: &mut InnerBody = transmute_mut!(body);
        &mut inner.entries
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct InnerBody {
    entries: [InnerEntry; INNER_ENTRIES_MAX],
    spare: [u8; INNER_SPARE_BYTES],
}

#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct NodeHeader {
    crc: U32,
    magic: U32,
    pool: [u8; 16],
    block: U64,
    birth: U64,
    level: U16,
    count: U16,
    reserved: [u8; 20],
}

/// The fields of a node's header.
pub const HEADER_FIELDS: &[Field] =
    fields!(NodeHeader: crc, magic, pool [u64], block, birth, level, count, reserved [u32]);
/// The fields of an entry of a leaf.
pub const LEAF_FIELDS: &[Field] = fields!(LeafEntry: lba_len, block_own);
/// The fields of an entry of an inner node.
pub const INNER_FIELDS: &[Field] = fields!(InnerEntry: lba, block, birth, mapped, own);

const _: () = assert!(size_of::<NodeHeader>() == HEADER_BYTES);
const _: () = assert!(size_of::<LeafEntry>() == 16 && LEAF_ENTRIES_MAX == 252);
const _: () = assert!(size_of::<InnerEntry>() == 40 && INNER_ENTRIES_MAX == 100);
const _: () = assert!(size_of::<Node>() == BLOCK_SIZE && size_of::<NodeBlock>() == BLOCK_SIZE);

/// The bytes of one node.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Node {
    header: NodeHeader,
    body: [u8; BODY_BYTES],
}

/// A node in memory, alone on its page: one entry of the TLB for each node that is looked at.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct NodeBlock(pub Node);

impl NodeBlock {
    /// A node of nobody: not valid before [`Node::reset`].
    pub const ZERO: Self = Self(Node {
        header: NodeHeader {
            crc: U32::ZERO,
            magic: U32::ZERO,
            pool: [0; 16],
            block: U64::ZERO,
            birth: U64::ZERO,
            level: U16::ZERO,
            count: U16::ZERO,
            reserved: [0; 20],
        },
        body: [0; BODY_BYTES],
    });
}

impl Node {
    /// Makes this an empty node of `level` with no place yet ([`Self::place`]).
    pub fn reset(&mut self, pool: &[u8; 16], level: u8) {
        self.as_mut_bytes().fill(0);
        self.header.magic = U32::new(MAGIC);
        self.header.pool = *pool;
        self.header.level = U16::new(u16::from(level));
    }

    /// Gives the node its own block number and birth.
    pub fn place(&mut self, block: BlockNo, birth: Seqno) {
        self.header.block = U64::new(block.get());
        self.header.birth = U64::new(birth.get());
    }

    /// 0 is a leaf.
    #[must_use]
    pub fn level(&self) -> u8 {
        self.header.level.get().to_le_bytes()[0]
    }

    /// Entries.
    #[must_use]
    pub fn count(&self) -> usize {
        usize::from(self.header.count.get())
    }

    /// The entries; `E` is the kind that the node's level calls for.
    #[must_use]
    pub fn entries<E: Entry>(&self) -> &[E] {
        &E::all(&self.body)[..self.count()]
    }

    /// The extents of a leaf.
    #[must_use]
    pub fn leaf(&self) -> &[LeafEntry] {
        self.entries()
    }

    /// The pointers of an inner node.
    #[must_use]
    pub fn inner(&self) -> &[InnerEntry] {
        self.entries()
    }

    /// Puts `with` in the place of the entries `range`; the caller has seen that they fit.
    pub fn splice<E: Entry>(&mut self, range: Range<usize>, with: &[E]) {
        let before = self.count();
        let after = before - range.len() + with.len();
        let all = E::all_mut(&mut self.body);
        if range.len() != with.len() {
            all.copy_within(range.end..before, range.start + with.len());
        }
        all[range.start..range.start + with.len()].copy_from_slice(with);
        if after < before {
            all[after..before].fill(E::new_zeroed());
        }
        let count = u16::try_from(after).unwrap_or(u16::MAX);
        self.header.count = U16::new(count);
    }

    /// Takes the own flag from every entry, because everything below is shared now.
    pub fn clear_own<E: Entry>(&mut self) {
        let count = self.count();
        for entry in &mut E::all_mut(&mut self.body)[..count] {
            *entry = entry.shared();
        }
    }

    /// The nodes below an inner node, each with its bounds; `end` is the bound of this node.
    pub fn child_refs(&self, end: Lba) -> impl Iterator<Item = NodeRef> {
        let inner = if self.level() == 0 { &[] } else { self.inner() };
        let level = self.level().saturating_sub(1);
        inner.iter().enumerate().map(move |(at, entry)| {
            let end = inner.get(at + 1).map_or(end, |next| Lba::new(next.key()));
            NodeRef::new(&entry.ptr(), level, end)
        })
    }

    /// The node in `bytes`, if all of it is what `expected` and `pool` say. Any bytes will do.
    ///
    /// # Errors
    /// `Corrupt`, with the block number and the first thing that is wrong.
    pub fn verify<'a>(bytes: &'a [u8], expected: &NodeRef, pool: &[u8; 16]) -> Result<&'a Self> {
        let node = Self::identify(bytes, expected.block, pool)?;
        node.verify_header(expected)?;
        let wrong = |what: &'static str| expected.corrupt(what);
        let mapped = if expected.level == 0 {
            node.verify_leaf(expected.end).map_err(wrong)?
        } else {
            node.verify_inner(expected.end).map_err(wrong)?
        };
        let first = if expected.level == 0 { node.leaf()[0].key() } else { node.inner()[0].key() };
        if first != expected.lba.get() {
            let what = format!("begins at lba {first}, its pointer says {}", expected.lba);
            return Err(expected.corrupt(what));
        }
        if mapped != expected.mapped {
            let what = format!("maps {mapped} blocks, its pointer says {}", expected.mapped);
            return Err(expected.corrupt(what));
        }
        Ok(node)
    }

    /// The node in `bytes`, of which only its block and birth are known: its parent is gone.
    ///
    /// # Errors
    /// `Corrupt`, as [`Node::verify`].
    pub fn verify_orphan<'a>(
        bytes: &'a [u8],
        block: BlockNo,
        birth: Seqno,
        pool: &[u8; 16],
    ) -> Result<&'a Self> {
        let node = Self::identify(bytes, block, pool)?;
        let (lba, end, level) = (Lba::new(0), Lba::new(LBA_END), node.level());
        let expected = NodeRef { block, birth, level, lba, end, mapped: 0 };
        node.verify_header(&expected)?;
        let sums = if level == 0 { node.verify_leaf(end) } else { node.verify_inner(end) };
        sums.map(|_| node).map_err(|what| expected.corrupt(what))
    }

    /// Sequence number of the record that made the node.
    #[must_use]
    pub fn birth(&self) -> Seqno {
        Seqno::new(self.header.birth.get())
    }

    /// The node in `bytes` if it is a whole node of this pool that was written to `block`: what
    /// can be said without a pointer to it. Its entries are not looked at, nor their number.
    ///
    /// # Errors
    /// `Corrupt`, with the block number and what is wrong.
    pub fn identify<'a>(bytes: &'a [u8], block: BlockNo, pool: &[u8; 16]) -> Result<&'a Self> {
        let bad = |what: &str| Error::corrupt(format!("map node at {block}: {what}"));
        let Ok(node) = Self::ref_from_bytes(bytes) else {
            return Err(bad(&format!("{} bytes, not 4096", bytes.len())));
        };
        let header = &node.header;
        if header.magic.get() != MAGIC {
            return Err(bad("not a map node (magic)"));
        }
        if header.crc.get() != crc32(&bytes[4..]) {
            return Err(bad("checksum does not match"));
        }
        if header.pool != *pool {
            return Err(bad("belongs to another pool (uuid)"));
        }
        if header.block.get() != block.get() {
            return Err(bad(&format!("block {}, its pointer says {}", header.block, block.get())));
        }
        Ok(node)
    }

    fn verify_header(&self, expected: &NodeRef) -> Result<()> {
        let header = &self.header;
        let told = [
            ("birth", header.birth.get(), expected.birth.get()),
            ("level", u64::from(header.level.get()), u64::from(expected.level)),
        ];
        for (name, is, says) in told {
            if is != says {
                return Err(expected.corrupt(format_args!("{name} {is}, its pointer says {says}")));
            }
        }
        if usize::from(expected.level) >= MAP_LEVELS_MAX {
            return Err(expected.corrupt(format_args!("level {} is too high", expected.level)));
        }
        let max = if expected.level == 0 { LeafEntry::MAX } else { InnerEntry::MAX };
        let count = self.count();
        if count == 0 || count > max {
            return Err(expected.corrupt(format_args!("{count} entries, not 1 to {max}")));
        }
        if header.reserved.iter().any(|&byte| byte != 0) {
            return Err(expected.corrupt("reserved bytes are not zero"));
        }
        Ok(())
    }

    /// Blocks mapped by a leaf whose header is valid.
    fn verify_leaf(&self, end: Lba) -> std::result::Result<u64, &'static str> {
        let mut free_from = 0;
        let mut mapped = 0;
        for entry in self.leaf() {
            if entry.mapped() == 0 {
                return Err("an extent of no blocks");
            }
            if entry.key() < free_from {
                return Err("extents overlap or are not sorted");
            }
            free_from = entry.end();
            mapped += entry.mapped();
        }
        let fits = free_from <= end.get().min(LBA_END);
        if fits { Ok(mapped) } else { Err("an extent beyond its end") }
    }

    /// Blocks mapped below an inner node whose header is valid.
    fn verify_inner(&self, end: Lba) -> std::result::Result<u64, &'static str> {
        let mut mapped: u64 = 0;
        let mut last: Option<u64> = None;
        for entry in self.inner() {
            if last.is_some_and(|last| entry.key() <= last) {
                return Err("pointers are not sorted");
            }
            if entry.mapped() == 0 || entry.own() > entry.mapped() {
                return Err("a pointer with impossible sums");
            }
            last = Some(entry.key());
            mapped = mapped.checked_add(entry.mapped()).ok_or("sums overflow")?;
        }
        let fits = last.is_some_and(|last| last < end.get().min(LBA_END));
        if fits { Ok(mapped) } else { Err("a pointer beyond its end") }
    }
}

/// Finishes the bytes of a node for the disk: computes its crc.
pub fn seal_crc(bytes: &mut [u8]) {
    assert_eq!(bytes.len(), BLOCK_SIZE, "a node is one block");
    let crc = crc32(&bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
}

/// What a node refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeChild {
    /// A node below an inner node.
    Node(NodePtr),
    /// An extent of a leaf.
    Data(Extent),
}

/// Everything that a verified node refers to, in order: one reference for each item (for each
/// block of an extent).
pub fn children(node: &Node) -> impl Iterator<Item = NodeChild> {
    let (leaf, inner): (&[LeafEntry], &[InnerEntry]) =
        if node.level() == 0 { (node.leaf(), &[]) } else { (&[], node.inner()) };
    let extents = leaf.iter().map(|entry| NodeChild::Data(entry.extent()));
    extents.chain(inner.iter().map(|entry| NodeChild::Node(entry.ptr())))
}

/// Sums of `entries`: blocks mapped, blocks flagged own. They saturate: two pointers of a damaged
/// pool may disagree about one node, which the checker reports and which must not stop a volume.
#[must_use]
pub fn sums<E: Entry>(entries: &[E]) -> (u64, u64) {
    entries.iter().fold((0, 0), |(mapped, own), entry| {
        (mapped.saturating_add(entry.mapped()), own.saturating_add(entry.own()))
    })
}

#[cfg(test)]
mod tests;
