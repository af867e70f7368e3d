//! Block-aligned buffers for direct I/O, recycled through a small per-thread pool.

use std::cell::RefCell;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::units::{BLOCK_SIZE, to_u64};

/// One block of memory at a block-aligned address.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct Block([u8; BLOCK_SIZE]);

const ZERO_BLOCK: Block = Block([0; BLOCK_SIZE]);

/// Blocks of the largest buffer that is recycled (1 MiB).
const KEPT_BLOCKS_MAX: usize = 256;
/// Size classes 1, 2, 4, ... 256 blocks.
const CLASSES: usize = 9;
/// Maximum of bytes that a thread keeps per class.
const KEPT_BYTES_MAX: usize = 4 << 20;

thread_local! {
    static FREE: RefCell<[Vec<Vec<Block>>; CLASSES]> = const { RefCell::new([const { Vec::new() }; CLASSES]) };
}

/// An owned, block-aligned buffer of whole blocks. Dropping it returns the memory to the thread's
/// pool. The content of a new one is unspecified (old bytes of this process), so code that exposes
/// it must fill all of it first.
pub struct Buf {
    blocks: Vec<Block>,
}

impl Buf {
    /// A buffer of `blocks` blocks with unspecified content.
    #[must_use]
    pub fn new(blocks: usize) -> Self {
        assert!(blocks > 0, "a buffer holds at least one block");
        let class = class_of(blocks);
        let recycled = class.and_then(|c| FREE.with(|free| free.borrow_mut()[c].pop()));
        let mut memory =
            recycled.unwrap_or_else(|| Vec::with_capacity(class.map_or(blocks, |c| 1 << c)));
        memory.resize(blocks, ZERO_BLOCK);
        Self { blocks: memory }
    }

    /// A buffer of `blocks` blocks, all zero.
    #[must_use]
    pub fn zeroed(blocks: usize) -> Self {
        let mut buf = Self::new(blocks);
        buf.as_mut_bytes().fill(0);
        buf
    }

    /// Number of blocks.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        to_u64(self.blocks.len())
    }

    /// Length in bytes: a whole number of blocks.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.blocks.len() * BLOCK_SIZE
    }

    /// The content.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.blocks.as_bytes()
    }

    /// The content, mutable.
    #[must_use]
    pub fn as_mut_bytes(&mut self) -> &mut [u8] {
        self.blocks.as_mut_bytes()
    }

    /// The content block by block.
    pub fn iter_blocks(&self) -> impl Iterator<Item = &[u8]> {
        self.as_bytes().chunks_exact(BLOCK_SIZE)
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.blocks);
        let Some(class) = class_of(memory.len()) else { return };
        if memory.capacity() != 1 << class {
            return;
        }
        // If the thread is exiting, its pool is gone; the memory is freed then.
        let _ignored = FREE.try_with(|free| {
            let kept = &mut free.borrow_mut()[class];
            if kept.len() < (KEPT_BYTES_MAX >> class) / BLOCK_SIZE {
                kept.push(memory);
            }
        });
    }
}

fn class_of(blocks: usize) -> Option<usize> {
    (blocks <= KEPT_BLOCKS_MAX).then(|| blocks.next_power_of_two().trailing_zeros() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_and_recycled() {
        let mut buf = Buf::new(3);
        assert_eq!(buf.as_bytes().as_ptr().align_offset(BLOCK_SIZE), 0);
        assert_eq!(buf.len_bytes(), 3 * BLOCK_SIZE);
        buf.as_mut_bytes().fill(7);
        let address = buf.as_bytes().as_ptr();
        drop(buf);
        let again = Buf::new(4);
        assert_eq!(again.as_bytes().as_ptr(), address, "same size class, same memory");
        assert!(Buf::zeroed(4).as_bytes().iter().all(|&b| b == 0));
    }
}
