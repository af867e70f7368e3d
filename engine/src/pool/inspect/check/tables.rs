//! Compares the stored reference counts with those found, page by page, and the free blocks of an
//! open pool with both.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::future::join;

use crate::error::Result;
use crate::format::geometry::{PAGE_ENTRIES, PageId, Table};
use crate::format::group::{BlockType, COUNT_MASK, TablePage};
use crate::units::{BlockNo, to_u32, to_usize};

use super::count::{Counted, Recount};
use super::findings::{FindingKind as Kind, Findings};
use super::records::Written;
use crate::pool::core::Pool;
use crate::pool::inspect::durable::Durable;

/// Inputs of the comparison besides the tables.
pub(super) struct Compare<'a> {
    pub(super) durable: &'a Durable,
    pub(super) counts: &'a Recount,
    /// Whether every reference was found: then a counted block without a reference is leaked.
    pub(super) complete: bool,
    pub(super) dropped: &'a BTreeSet<BlockNo>,
    /// Blocks that the journal has written since the checkpoint.
    pub(super) written: &'a Written,
    /// The pool, if it is open.
    pub(super) live: Option<&'a Pool>,
}

/// Consecutive blocks with the same error.
#[derive(Clone, Copy, PartialEq)]
struct Wrong {
    kind: Kind,
    stored: u32,
    counted: Counted,
    block: BlockNo,
    len: u64,
}

impl Compare<'_> {
    /// Compares one group.
    pub(super) async fn group(&self, group: u64, findings: &mut Findings) {
        let geometry = self.durable.superblock.geometry;
        let entry = self.durable.found.catalogue.groups[to_usize(group)];
        let group_len = geometry.group_len(group);
        if let Err(error) = self.durable.header(to_u32(group)).await {
            findings.add(Kind::Table, error);
            return;
        }
        let mut free = Some(0);
        for page in 0..group_len.div_ceil(PAGE_ENTRIES) {
            let len = PAGE_ENTRIES.min(group_len - page * PAGE_ENTRIES);
            let id = PageId { group: to_u32(group), table: Table::Refs, page: to_u32(page) };
            let sums_id = PageId { table: Table::Sums, ..id };
            let (refs, sums) = join(self.durable.page(id), self.durable.page(sums_id)).await;
            let data = self.has_data(id, len);
            match sums {
                Ok(None) if data => {
                    let what = format_args!("{sums_id} was never written, and there is data");
                    findings.add(Kind::Table, what);
                }
                Ok(_) => {}
                Err(error) => findings.add(Kind::Table, error),
            }
            let here = self.page(id, len, refs, findings);
            free = free.zip(here).map(|(sum, here)| sum + here);
        }
        if let Some(free) = free.filter(|free| *free != u64::from(entry.free)) {
            let told = entry.free;
            let what = format!("group {group}: {free} free blocks, the catalogue says {told}");
            findings.add(Kind::Sum, what);
        }
    }

    /// Whether a map names data in the blocks of a page.
    fn has_data(&self, id: PageId, len: u64) -> bool {
        let (group, page) = (u64::from(id.group), u64::from(id.page));
        let base = self.durable.superblock.geometry.block_at(group, page * PAGE_ENTRIES);
        self.counts.has_page(group, page)
            && (0..len).any(|offset| self.counts.of(base.plus(offset)).kind == BlockType::Data)
    }

    /// Compares one page; returns its number of free blocks.
    fn page(
        &self,
        id: PageId,
        len: u64,
        refs: Result<Option<Arc<TablePage>>>,
        findings: &mut Findings,
    ) -> Option<u64> {
        let (group, page) = (u64::from(id.group), u64::from(id.page));
        let refs = match refs {
            Ok(None) if !self.counts.has_page(group, page) => return Some(len),
            Ok(refs) => refs,
            Err(error) => {
                findings.add(Kind::Table, error);
                return None;
            }
        };
        let geometry = self.durable.superblock.geometry;
        let base = geometry.block_at(group, page * PAGE_ENTRIES);
        let mut run: Option<Wrong> = None;
        let mut free = 0;
        for offset in 0..len {
            let block = base.plus(offset);
            let stored = refs.as_ref().map_or(0, |page| page.get(to_usize(offset)));
            free += u64::from(stored == 0);
            let counted = self.counts.of(block);
            if (stored != 0 || counted.count > 0) && self.written.has(&geometry, block) {
                let what = "was written by a record, and the checkpoint before it needs it";
                findings.add(Kind::Journal, format_args!("journal: {block} {what}"));
            }
            let wrong = self.judge(block, stored, counted).map(|kind| Wrong {
                kind,
                stored,
                counted,
                block,
                len: 1,
            });
            match (&mut run, wrong) {
                (Some(run), Some(wrong)) if run.goes_on_in(&wrong) => run.len += 1,
                (_, wrong) => {
                    if let Some(done) = std::mem::replace(&mut run, wrong) {
                        done.report(findings);
                    }
                }
            }
        }
        if let Some(done) = run {
            done.report(findings);
        }
        self.may_be_taken(base, len, findings);
        Some(free)
    }

    /// The kind of damage of a block, if any.
    fn judge(&self, block: BlockNo, stored: u32, counted: Counted) -> Option<Kind> {
        let count = u64::from(stored & COUNT_MASK);
        if count == counted.count {
            return (count > 0 && BlockType::of(stored) != counted.kind).then_some(Kind::Type);
        }
        if self.dropped.contains(&block) {
            return Some(Kind::Drop);
        }
        match (count, counted.count) {
            (0, 1..) => Some(Kind::UsedAndFree),
            (1.., 0) => self.complete.then_some(Kind::Leak),
            (stored, found) if stored > found && !self.complete => None,
            _ => Some(Kind::Count),
        }
    }

    /// K7: no block that the last checkpoint needs may be allocatable.
    fn may_be_taken(&self, base: BlockNo, len: u64, findings: &mut Findings) {
        let Some(pool) = self.live else { return };
        let inner = pool.core.lock();
        for block in (0..len).map(|offset| base.plus(offset)) {
            if inner.state.space.is_free(block) && self.counts.of(block).count > 0 {
                findings.add(Kind::Allocatable, format_args!("{block} may be allocated"));
            }
        }
    }
}

impl Wrong {
    fn goes_on_in(&self, next: &Self) -> bool {
        let end = self.block.plus(self.len);
        *self == Self { block: self.block, len: self.len, ..*next } && next.block == end
    }

    fn report(&self, findings: &mut Findings) {
        let Self { kind, stored, counted, block, len } = *self;
        let more = if len > 1 { format!(" ({len} blocks)") } else { String::new() };
        let found = match counted.count {
            0 => "no reference was found".to_owned(),
            count => format!("{count} references as {:?} were found", counted.kind),
        };
        let stored = match stored {
            0 => "counted as free".to_owned(),
            _ => format!("counted {} times as {:?}", stored & COUNT_MASK, BlockType::of(stored)),
        };
        findings.add(kind, format_args!("{block}{more}: {stored}, {found}"));
    }
}

/// The dropped nodes, whose wrong counts are a kind of their own.
pub(super) fn dropped(durable: &Durable) -> BTreeSet<BlockNo> {
    durable.found.catalogue.drops.iter().map(|drop| drop.block).collect()
}
