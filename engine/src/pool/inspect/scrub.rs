//! The scrub: reads every block that the last checkpoint counts and verifies its checksum, in steps
//! at the pace of the caller (K15 of the checker).
//!
//! Each table page is looked up under a pin. A block in use, and its checksum, then stay unchanged
//! until the pin is dropped, even if the block is freed meanwhile. So a mismatch is damage, never a
//! block that was freed and reused.

use std::ops::Range;
use std::sync::Arc;

use futures_util::future::join_all;

use crate::crc::crc32;
use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::{Geometry, PAGE_ENTRIES, PageId, Table};
use crate::format::group::{BlockType, TablePage};
use crate::format::node::Node;
use crate::pool::core::{Pool, count};
use crate::runtime::Buf;
use crate::space::Run;
use crate::units::{BlockNo, to_u32, to_usize};

/// Maximum of table pages per step, since long ranges may hold no block in use.
const PAGES_MAX: usize = 256;
/// Blocks per read.
const READ_BLOCKS: u64 = 64;
/// Reads under way concurrently.
const PARALLEL: usize = 8;

/// A block that is unreadable or failed checksum verification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrubError {
    /// Block number in the pool.
    pub block: u64,
    /// The kind of block, and the damage.
    pub what: String,
}

/// Result of one step of the scrub.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubStep {
    /// Where the next step continues; `None` at the end of the pool.
    pub next_block: Option<u64>,
    /// Blocks read.
    pub blocks: u64,
    /// The damage found.
    pub errors: Vec<ScrubError>,
}

impl ScrubStep {
    fn take(&mut self, block: BlockNo, verified: Result<()>) {
        if let Err(error) = verified {
            tracing::error!(%block, %error, "scrub found damage");
            self.errors.push(ScrubError { block: block.get(), what: error.to_string() });
        }
    }
}

impl Pool {
    /// Verifies up to `max_blocks` blocks in use from `from_block` on. A scrub starts at block 0
    /// and continues at `next_block` until that is `None`. A step may verify fewer blocks.
    ///
    /// # Errors
    /// Never: read errors are reported in the step.
    pub async fn scrub(&self, from_block: u64, max_blocks: u64) -> Result<ScrubStep> {
        let mut step = ScrubStep { next_block: Some(from_block), ..ScrubStep::default() };
        let max = max_blocks.max(1);
        for _ in 0..PAGES_MAX {
            let geometry = self.core.lock().state.geometry;
            let at = step.next_block.and_then(|at| usable_from(&geometry, BlockNo::new(at)));
            step.next_block = at.map(BlockNo::get);
            let Some(at) = at.filter(|_| step.blocks < max) else { break };
            let next = self.scrub_page(&geometry, at, max - step.blocks, &mut step).await;
            step.next_block = Some(next.get());
        }
        Ok(step)
    }

    /// Verifies up to `max` blocks of one table page from `at` on; returns the block to continue
    /// at.
    async fn scrub_page(
        &self,
        geometry: &Geometry,
        at: BlockNo,
        max: u64,
        step: &mut ScrubStep,
    ) -> BlockNo {
        let Some((group, index)) = geometry.locate(at) else { return at.plus(1) };
        let (page, first) = (index / PAGE_ENTRIES, index % PAGE_ENTRIES);
        let end = PAGE_ENTRIES.min(geometry.group_len(group) - page * PAGE_ENTRIES);
        let id = PageId { group: to_u32(group), table: Table::Refs, page: to_u32(page) };
        let _pin = self.pin();
        let (refs, sums) = match self.scrub_tables(id).await {
            Ok((Some(refs), sums)) => (refs, sums),
            Ok((None, _)) => return at.plus(end - first),
            Err(error) => {
                step.take(at, Err(error));
                return at.plus(end - first);
            }
        };
        let kind = |entry: u64| BlockType::of(refs.get(to_usize(entry)));
        let (runs, entry) = used_runs(at, first..end, max, |entry| kind(entry) != BlockType::Free);
        step.blocks += runs.iter().map(|run| run.len).sum::<u64>();
        let judge = |block: BlockNo, bytes: &[u8]| {
            let entry = block.get() - at.get() + first;
            let sum = sums.as_ref().map_or(0, |page| page.get(to_usize(entry)));
            self.verify_block(block, kind(entry), sum, bytes)
        };
        for some in runs.chunks(PARALLEL) {
            let reads = some.iter().map(|run| self.disk().read(run.block, buf_for(run)));
            for (run, (buf, result)) in some.iter().zip(join_all(reads).await) {
                let blocks = (0..run.len).map(|offset| run.block.plus(offset));
                if result.is_err() {
                    self.scrub_singly(blocks, judge, step).await;
                    continue;
                }
                for (block, bytes) in blocks.zip(buf.iter_blocks()) {
                    step.take(block, judge(block, bytes));
                }
            }
        }
        at.plus(entry - first)
    }

    async fn scrub_tables(
        &self,
        refs: PageId,
    ) -> Result<(Option<Arc<TablePage>>, Option<Arc<TablePage>>)> {
        let refs_page = self.table_page(refs).await?;
        let sums = PageId { table: Table::Sums, ..refs };
        Ok((refs_page, self.table_page(sums).await?))
    }

    async fn table_page(&self, id: PageId) -> Result<Option<Arc<TablePage>>> {
        loop {
            let found = self.core.lock().state.tables.page(id);
            match found {
                Ok(page) => return Ok(page),
                Err(missing) => self.load_table(missing).await?,
            }
        }
    }

    /// Reads blocks of a failed read one by one, so that the error names the right one.
    async fn scrub_singly(
        &self,
        blocks: impl Iterator<Item = BlockNo>,
        judge: impl Fn(BlockNo, &[u8]) -> Result<()>,
        step: &mut ScrubStep,
    ) {
        for block in blocks {
            let read = self.read_block(block).await;
            step.take(block, read.and_then(|buf| judge(block, buf.as_bytes())));
        }
    }

    fn verify_block(&self, block: BlockNo, kind: BlockType, sum: u32, bytes: &[u8]) -> Result<()> {
        let wrong = |what: &str| Error::new(ErrorKind::Checksum, format!("{block}: {what}"));
        match kind {
            BlockType::Data if crc32(bytes) != sum => {
                count(&self.core.counters.checksum_errors, 1);
                Err(wrong("data does not match its checksum"))
            }
            BlockType::Node => Node::identify(bytes, block, &self.core.uuid).map(|_| ()),
            BlockType::Catalogue if bytes[..4] != crc32(&bytes[4..]).to_le_bytes() => {
                Err(wrong("catalogue block does not match its checksum"))
            }
            _ => Ok(()),
        }
    }
}

/// Up to `max` used entries of a page as runs of at most [`READ_BLOCKS`], and the entry to continue
/// at. `at` is the block of the first entry.
fn used_runs(
    at: BlockNo,
    entries: Range<u64>,
    max: u64,
    is_used: impl Fn(u64) -> bool,
) -> (Vec<Run>, u64) {
    let mut runs: Vec<Run> = Vec::new();
    let mut left = max;
    for entry in entries.clone() {
        if left == 0 {
            return (runs, entry);
        }
        if !is_used(entry) {
            continue;
        }
        left -= 1;
        let block = at.plus(entry - entries.start);
        match runs.last_mut() {
            Some(run) if run.block.plus(run.len) == block && run.len < READ_BLOCKS => run.len += 1,
            _ => runs.push(Run { block, len: 1 }),
        }
    }
    (runs, entries.end)
}

fn buf_for(run: &Run) -> Buf {
    Buf::new(to_usize(run.len))
}

/// The first block at or after `at` that can hold nodes or data.
fn usable_from(geometry: &Geometry, at: BlockNo) -> Option<BlockNo> {
    if geometry.locate(at).is_some() {
        return Some(at);
    }
    let start = geometry.header_place(0, 0).get();
    let group = at.get().saturating_sub(start) / geometry.group_blocks();
    let firsts = [group, group + 1].into_iter().filter(|group| *group < geometry.groups());
    firsts.map(|group| geometry.block_at(group, 0)).find(|first| *first >= at)
}
