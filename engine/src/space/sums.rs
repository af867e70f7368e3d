//! Checksums of blocks written since a checkpoint was sealed; the next one merges them into the
//! tables.

use std::collections::BTreeMap;

use crate::format::geometry::{PAGE_ENTRIES, PageId};
use crate::format::group::TablePage;
use crate::units::to_usize;

const ENTRIES: usize = to_usize(PAGE_ENTRIES);

struct FreshPage {
    known: [u64; ENTRIES.div_ceil(64)],
    sums: [u32; ENTRIES],
}

/// Checksums by page and entry.
#[derive(Default)]
pub struct FreshSums {
    pages: BTreeMap<PageId, Box<FreshPage>>,
}

impl FreshSums {
    /// Sets the checksum of a block that was just written.
    pub fn put(&mut self, page: PageId, entry: usize, sum: u32) {
        let page = self.pages.entry(page).or_insert_with(|| {
            Box::new(FreshPage { known: [0; ENTRIES.div_ceil(64)], sums: [0; ENTRIES] })
        });
        page.known[entry / 64] |= 1 << (entry % 64);
        page.sums[entry] = sum;
    }

    /// The checksum, if the block was written since the seal.
    #[must_use]
    pub fn get(&self, page: PageId, entry: usize) -> Option<u32> {
        let page = self.pages.get(&page)?;
        (page.known[entry / 64] >> (entry % 64) & 1 == 1).then(|| page.sums[entry])
    }

    /// Pages with at least one checksum, in order.
    #[must_use]
    pub fn pages(&self) -> Vec<PageId> {
        self.pages.keys().copied().collect()
    }

    /// Number of such pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Copies the checksums of `id` into the table's page.
    pub fn merge_into(&self, id: PageId, page: &mut TablePage) {
        let Some(fresh) = self.pages.get(&id) else { return };
        for entry in 0..ENTRIES {
            if fresh.known[entry / 64] >> (entry % 64) & 1 == 1 {
                page.set(entry, fresh.sums[entry]);
            }
        }
    }
}
