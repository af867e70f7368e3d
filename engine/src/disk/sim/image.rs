//! The content of a simulated disk: blocks shared between all images that have them in common, so
//! that a copy costs one pointer for each 256 KiB and thousands of crash states a second can be
//! made.

use std::sync::Arc;

use crate::units::{BLOCK_SIZE, BlockNo, to_u64, to_usize};

/// Bytes of a block.
pub(super) type Bytes = [u8; BLOCK_SIZE];
/// Sectors of a block, one bit each.
pub(super) type SectorMask = u8;

/// Bytes of a sector: what the simulated device writes in one piece.
pub(super) const SECTOR_SIZE: usize = 512;
/// Sectors of a block.
pub(super) const SECTORS: usize = BLOCK_SIZE / SECTOR_SIZE;
/// All sectors of a block.
pub(super) const ALL_SECTORS: SectorMask = 0xFF;

/// Blocks that are copied together when one of them is changed in a shared image.
const CHUNK_BLOCKS: usize = 64;

static ZEROS: Bytes = [0; BLOCK_SIZE];

/// `None` is a block of zeros.
type Chunk = [Option<Arc<Bytes>>; CHUNK_BLOCKS];

/// The content of a device.
#[derive(Clone)]
pub struct Image {
    chunks: Vec<Option<Arc<Chunk>>>,
    len_blocks: u64,
}

impl Image {
    /// A device of `len_blocks` blocks of zeros.
    #[must_use]
    pub fn new(len_blocks: u64) -> Self {
        let mut image = Self { chunks: Vec::new(), len_blocks: 0 };
        image.extend(len_blocks);
        image
    }

    /// Length of the device.
    #[must_use]
    pub const fn len_blocks(&self) -> u64 {
        self.len_blocks
    }

    /// Makes the device at least this long.
    pub fn extend(&mut self, len_blocks: u64) {
        if len_blocks > self.len_blocks {
            self.len_blocks = len_blocks;
            self.chunks.resize(to_usize(len_blocks).div_ceil(CHUNK_BLOCKS), None);
        }
    }

    /// The content of a block.
    ///
    /// # Panics
    /// When it is beyond the end.
    #[must_use]
    pub fn block(&self, at: BlockNo) -> &[u8; BLOCK_SIZE] {
        self.shared(at.get()).map_or(&ZEROS, |block| block)
    }

    /// Replaces bytes of a block: damage at rest, or an image made by hand.
    ///
    /// # Panics
    /// When the bytes are not inside one block of the device.
    pub fn write(&mut self, at: BlockNo, offset: usize, bytes: &[u8]) {
        self.block_mut(at.get())[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Inverts one bit of a block.
    ///
    /// # Panics
    /// When it is beyond the end.
    pub fn flip_bit(&mut self, at: BlockNo, bit: usize) {
        self.block_mut(at.get())[bit / 8] ^= 1 << (bit % 8);
    }

    /// Blocks that were ever written, in order: where damage may matter.
    pub fn written(&self) -> impl Iterator<Item = BlockNo> {
        let blocks = self.chunks.iter().enumerate().flat_map(|(number, chunk)| {
            let slots = chunk.iter().flat_map(|chunk| chunk.iter().enumerate());
            slots.filter(|(_, slot)| slot.is_some()).map(move |(i, _)| number * CHUNK_BLOCKS + i)
        });
        blocks.map(|block| BlockNo::new(to_u64(block)))
    }

    /// The block as it is shared; `None` is zeros.
    pub(super) fn shared(&self, at: u64) -> Option<&Arc<Bytes>> {
        assert!(at < self.len_blocks, "block {at} is beyond the end of the image");
        let (chunk, slot) = split(at);
        self.chunks[chunk].as_ref()?[slot].as_ref()
    }

    pub(super) fn set(&mut self, at: u64, content: Option<Arc<Bytes>>) {
        *self.slot(at) = content;
    }

    /// Takes some sectors of `content` over.
    pub(super) fn set_sectors(&mut self, at: u64, content: Option<&Arc<Bytes>>, mask: SectorMask) {
        if mask == ALL_SECTORS {
            return self.set(at, content.cloned());
        }
        let from = content.map_or(&ZEROS, |content| content);
        let to = self.block_mut(at);
        for sector in sectors(mask) {
            to[sector.clone()].copy_from_slice(&from[sector]);
        }
    }

    pub(super) fn block_mut(&mut self, at: u64) -> &mut Bytes {
        Arc::make_mut(self.slot(at).get_or_insert_with(|| Arc::new(ZEROS)))
    }

    fn slot(&mut self, at: u64) -> &mut Option<Arc<Bytes>> {
        assert!(at < self.len_blocks, "block {at} is beyond the end of the image");
        let (chunk, slot) = split(at);
        let chunk =
            self.chunks[chunk].get_or_insert_with(|| Arc::new([const { None }; CHUNK_BLOCKS]));
        &mut Arc::make_mut(chunk)[slot]
    }
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
        let ones = Arc::new([1; BLOCK_SIZE]);
        image.set_sectors(2, Some(&ones), 0b1000_0010);
        let block = image.block(BlockNo::new(2));
        let written: Vec<bool> = block.chunks(SECTOR_SIZE).map(|sector| sector[0] == 1).collect();
        assert_eq!(written, [false, true, false, false, false, false, false, true]);
        image.set_sectors(2, None, ALL_SECTORS);
        assert_eq!(image.block(BlockNo::new(2)), &ZEROS);
    }
}
