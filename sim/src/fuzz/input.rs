//! An input as numbers, and the empty pools that it begins with.

use std::cell::RefCell;
use std::collections::BTreeMap;

use arbitrary::Unstructured;

use crate::run::Config;
use pando_engine::disk::sim::SimImage;
use pando_engine::limits::CASCADE_NODES_MAX;
use pando_engine::map::Fanout;
use pando_engine::units::{to_u64, to_usize};

/// The bytes that are still to be used.
pub(super) struct Input<'a>(Unstructured<'a>);

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(Unstructured::new(bytes))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.0.arbitrary().unwrap_or_default()
    }

    pub(super) fn short(&mut self) -> u16 {
        self.0.arbitrary().unwrap_or_default()
    }

    pub(super) fn word(&mut self) -> u32 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// A number below `bound`, from one byte, or from two if that is too few.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        let number = if bound > 256 { self.short().into() } else { u64::from(self.byte()) };
        number % bound
    }

    /// One of `all`.
    pub(super) fn choose<T: Copy>(&mut self, all: &[T]) -> T {
        all[to_usize(self.below(to_u64(all.len())))]
    }

    /// At most `most` bytes.
    pub(super) fn bytes(&mut self, most: usize) -> &'a [u8] {
        let count = most.min(self.0.len());
        self.0.bytes(count).unwrap_or_default()
    }

    /// How a pool is made and opened: six bytes.
    pub(super) fn config(&mut self) -> Config {
        let journal_blocks = 8 + 3 * self.below(8);
        let pool_blocks = 90 + journal_blocks + 24 * self.below(32);
        let fanout = Fanout {
            leaf_max: to_usize(4 + self.below(5)),
            inner_max: to_usize(4 + self.below(5)),
        };
        let cache_bytes = if self.below(2) == 1 { 0 } else { 1 << 20 };
        let discard = self.below(2) == 1;
        let cascade_nodes = CASCADE_NODES_MAX;
        Config { pool_blocks, journal_blocks, fanout, cache_bytes, discard, cascade_nodes }
    }
}

thread_local! {
    static EMPTY: RefCell<BTreeMap<(u64, u64), SimImage>> = const { RefCell::new(BTreeMap::new()) };
}

/// An empty pool. There are some hundred sorts of them, and to make one takes longer than an input.
pub(super) fn empty_pool(config: &Config) -> SimImage {
    let sort = (config.pool_blocks, config.journal_blocks);
    EMPTY.with_borrow_mut(|all| all.entry(sort).or_insert_with(|| config.formatted()).clone())
}
