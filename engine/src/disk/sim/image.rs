//! The content of a simulated disk. Images share equal blocks, so a copy costs one pointer per 64
//! KiB, and thousands of crash states per second can be created. An image keeps a hash of its
//! content up to date, so that equal images are recognized at once.

use std::sync::Arc;

use crate::units::{BLOCK_SIZE, BlockNo, to_u64, to_usize};

/// Bytes of a block.
pub(super) type Bytes = [u8; BLOCK_SIZE];
/// Sectors of a block, one bit each.
pub(super) type SectorMask = u8;

/// Bytes of a sector, which the simulated device writes atomically.
pub(super) const SECTOR_SIZE: usize = 512;
/// Sectors of a block.
pub(super) const SECTORS: usize = BLOCK_SIZE / SECTOR_SIZE;
/// All sectors of a block.
pub(super) const ALL_SECTORS: SectorMask = 0xFF;

/// Blocks that are copied together when one of them changes in a shared image.
const CHUNK_BLOCKS: usize = 16;

static ZEROS: Bytes = [0; BLOCK_SIZE];

/// The bytes of a block and their hash.
#[derive(Clone)]
pub(super) struct Stored {
    bytes: Bytes,
    sum: u64,
}

impl Stored {
    pub(super) fn new(bytes: Bytes) -> Self {
        Self { sum: sum_of(&bytes), bytes }
    }

    pub(super) const fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub(super) const fn sum(&self) -> u64 {
        self.sum
    }
}

/// A block that images share; `None` stands for zeros.
pub(super) type Content = Option<Arc<Stored>>;

type Chunk = [Content; CHUNK_BLOCKS];

/// The content of a device.
#[derive(Clone)]
pub struct Image {
    chunks: Vec<Option<Arc<Chunk>>>,
    len_blocks: u64,
    sum: u64,
}

impl Image {
    /// A device of `len_blocks` blocks of zeros.
    #[must_use]
    pub fn new(len_blocks: u64) -> Self {
        let mut image = Self { chunks: Vec::new(), len_blocks: 0, sum: 0 };
        image.extend(len_blocks);
        image
    }

    /// Length of the device.
    #[must_use]
    pub const fn len_blocks(&self) -> u64 {
        self.len_blocks
    }

    /// Extends the device to at least this length.
    pub fn extend(&mut self, len_blocks: u64) {
        if len_blocks > self.len_blocks {
            self.len_blocks = len_blocks;
            self.chunks.resize(to_usize(len_blocks).div_ceil(CHUNK_BLOCKS), None);
        }
    }

    /// A hash of the whole content: two images that differ have equal hashes with a probability of
    /// 1 in 2^64.
    #[must_use]
    pub const fn sum(&self) -> u64 {
        mixed(self.sum, self.len_blocks)
    }

    /// The content of a block.
    ///
    /// # Panics
    /// If it is beyond the end.
    #[must_use]
    pub fn block(&self, at: BlockNo) -> &[u8; BLOCK_SIZE] {
        self.shared(at.get()).map_or(&ZEROS, |block| &block.bytes)
    }

    /// Replaces bytes of a block: for damage at rest, or to build an image by hand.
    ///
    /// # Panics
    /// If the bytes are not inside one block of the device.
    pub fn write(&mut self, at: BlockNo, offset: usize, bytes: &[u8]) {
        self.change(at.get(), |block| {
            block[offset..offset + bytes.len()].copy_from_slice(bytes);
        });
    }

    /// Inverts one bit of a block.
    ///
    /// # Panics
    /// If it is beyond the end.
    pub fn flip_bit(&mut self, at: BlockNo, bit: usize) {
        self.change(at.get(), |block| block[bit / 8] ^= 1 << (bit % 8));
    }

    /// Blocks that were ever written, in order: only damage there can matter.
    pub fn written(&self) -> impl Iterator<Item = BlockNo> {
        let blocks = self.chunks.iter().enumerate().flat_map(|(number, chunk)| {
            let slots = chunk.iter().flat_map(|chunk| chunk.iter().enumerate());
            slots.filter(|(_, slot)| slot.is_some()).map(move |(i, _)| number * CHUNK_BLOCKS + i)
        });
        blocks.map(|block| BlockNo::new(to_u64(block)))
    }

    /// The shared block; `None` stands for zeros.
    pub(super) fn shared(&self, at: u64) -> Option<&Arc<Stored>> {
        assert!(at < self.len_blocks, "block {at} is beyond the end of the image");
        let (chunk, slot) = split(at);
        self.chunks[chunk].as_ref()?[slot].as_ref()
    }

    pub(super) fn set(&mut self, at: u64, content: Content) {
        let new = content.as_ref().map_or(0, |block| block.sum);
        let slot = self.slot(at);
        let old = slot.as_ref().map_or(0, |block| block.sum);
        *slot = content;
        self.account(at, old, new);
    }

    /// Copies some sectors of `content`.
    pub(super) fn set_sectors(&mut self, at: u64, content: &Content, mask: SectorMask) {
        match mask {
            0 => {}
            ALL_SECTORS => self.set(at, content.clone()),
            _ => self.change(at, |to| {
                let from = content.as_ref().map_or(&ZEROS, |content| &content.bytes);
                for sector in sectors(mask) {
                    to[sector.clone()].copy_from_slice(&from[sector]);
                }
            }),
        }
    }

    pub(super) fn change(&mut self, at: u64, change: impl FnOnce(&mut Bytes)) {
        let slot = self.slot(at);
        let block = slot.get_or_insert_with(|| Arc::new(Stored { bytes: ZEROS, sum: 0 }));
        let block = Arc::make_mut(block);
        let old = block.sum;
        change(&mut block.bytes);
        block.sum = sum_of(&block.bytes);
        let new = block.sum;
        self.account(at, old, new);
    }

    /// Updates the hash of the image after the hash of a block changed.
    fn account(&mut self, at: u64, old: u64, new: u64) {
        self.sum ^= placed(at, old) ^ placed(at, new);
    }

    fn slot(&mut self, at: u64) -> &mut Content {
        assert!(at < self.len_blocks, "block {at} is beyond the end of the image");
        let (chunk, slot) = split(at);
        let chunk =
            self.chunks[chunk].get_or_insert_with(|| Arc::new([const { None }; CHUNK_BLOCKS]));
        &mut Arc::make_mut(chunk)[slot]
    }
}

/// Hash of the bytes; 0 for zeros. Four independent chains, which a processor computes in parallel.
pub(super) fn sum_of(bytes: &[u8]) -> u64 {
    let mut chains = [0u64; 4];
    for words in bytes.chunks_exact(32) {
        for (chain, word) in chains.iter_mut().zip(words.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            *chain = (*chain ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
        }
    }
    chains.into_iter().fold(0, |sum, chain| (sum ^ chain).wrapping_mul(0x94D0_49BB_1331_11EB))
}

/// What a block with this hash adds to the hash of the image: 0 for zeros, written or not.
const fn placed(at: u64, sum: u64) -> u64 {
    if sum == 0 { 0 } else { mixed(sum, at) }
}

const fn mixed(sum: u64, with: u64) -> u64 {
    let mut mixed = sum ^ with.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed ^ (mixed >> 29)
}

fn split(at: u64) -> (usize, usize) {
    let at = to_usize(at);
    (at / CHUNK_BLOCKS, at % CHUNK_BLOCKS)
}

/// Byte ranges of the sectors in `mask`.
pub(super) fn sectors(mask: SectorMask) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..SECTORS)
        .filter(move |sector| mask & (1 << sector) != 0)
        .map(|sector| sector * SECTOR_SIZE..(sector + 1) * SECTOR_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_share_until_written() {
        let mut image = Image::new(100);
        image.write(BlockNo::new(70), 10, &[1, 2, 3]);
        let copy = image.clone();
        image.write(BlockNo::new(70), 10, &[9]);
        assert_eq!(copy.block(BlockNo::new(70))[9..14], [0, 1, 2, 3, 0]);
        assert_eq!(image.block(BlockNo::new(70))[9..14], [0, 9, 2, 3, 0]);
        assert_eq!(copy.block(BlockNo::new(3)), &[0; BLOCK_SIZE]);
        assert_eq!(image.written().collect::<Vec<_>>(), [BlockNo::new(70)]);
        image.flip_bit(BlockNo::new(70), 80);
        assert_eq!(image.block(BlockNo::new(70))[10], 8);
    }

    #[test]
    fn some_sectors_only() {
        let mut image = Image::new(4);
        let ones = Some(Arc::new(Stored::new([1; BLOCK_SIZE])));
        image.set_sectors(2, &ones, 0b1000_0010);
        let block = image.block(BlockNo::new(2));
        let written: Vec<bool> = block.chunks(SECTOR_SIZE).map(|sector| sector[0] == 1).collect();
        assert_eq!(written, [false, true, false, false, false, false, false, true]);
        image.set_sectors(2, &None, ALL_SECTORS);
        assert_eq!(image.block(BlockNo::new(2)), &ZEROS);
    }

    #[test]
    fn equal_content_has_equal_sums_whatever_its_past() {
        let (one, other) = (BlockNo::new(3), BlockNo::new(20));
        let empty = Image::new(40);
        let mut image = empty.clone();
        image.write(one, 8, &[5]);
        let once = image.sum();
        assert_ne!(once, empty.sum());
        let mut elsewhere = empty.clone();
        elsewhere.write(other, 8, &[5]);
        assert_ne!(elsewhere.sum(), once, "another block");
        let mut shifted = empty.clone();
        shifted.write(one, 9, &[5]);
        assert_ne!(shifted.sum(), once, "another place in the block");
        image.write(other, 0, &[1; 100]);
        image.write(other, 0, &[0; 100]);
        assert_eq!(image.sum(), once, "zeros are zeros");
        image.flip_bit(one, 64);
        image.flip_bit(one, 66);
        assert_eq!(image.sum(), empty.sum());
        image.extend(41);
        assert_ne!(image.sum(), empty.sum());
    }
}
