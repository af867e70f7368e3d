//! Netting: all changes of a block's count since the last seal, +1 and -1, are added up before any
//! block is freed. The order of the changes therefore does not matter.
//!
//! The log is processed in the order of the pages of the reference-count table. Memory is bounded
//! by the log and one page, however long the extents in it are.

use super::changes::{Freed, PageChange};
use super::tables::NewTables;
use crate::error::Result;
use crate::format::catalogue::NodeDrop;
use crate::format::geometry::{PAGE_ENTRIES, PageId, Table};
use crate::map::RefDelta;
use crate::units::BlockNo;

/// Pages to read ahead.
const AHEAD: usize = 256;

/// Applies the log to the tables. Appends freed blocks to `freed` and dropped nodes to `drops`.
pub(super) async fn net(
    tables: &mut NewTables<'_>,
    mut log: Vec<RefDelta>,
    freed: &mut Freed,
    drops: &mut Vec<NodeDrop>,
) -> Result<()> {
    log.sort_by_key(|delta| delta.block);
    let mut log = log.iter().copied().peekable();
    let mut carried: Vec<RefDelta> = Vec::new();
    let mut ahead = 0;
    loop {
        let first = carried.iter().map(|d| d.block).chain(log.peek().map(|d| d.block)).min();
        let Some(first) = first else { return Ok(()) };
        let mut change = PageChange::at(tables.geometry(), first)?;
        let end = change.base.plus(PAGE_ENTRIES);
        let mut here = std::mem::take(&mut carried);
        while let Some(delta) = log.next_if(|delta| delta.block < end) {
            here.push(delta);
        }
        for delta in here {
            carried.extend(change.take(&delta)?);
        }
        if ahead == 0 {
            let upcoming: Vec<BlockNo> = log.clone().take(16 * AHEAD).map(|d| d.block).collect();
            ahead = read_ahead(tables, change.id, upcoming).await?;
        }
        ahead -= 1;
        tables.change_page(&change, freed, drops).await?;
    }
}

/// Reads the pages of the next blocks in parallel. Returns how many pages this read covers.
async fn read_ahead(
    tables: &mut NewTables<'_>,
    current: PageId,
    blocks: Vec<BlockNo>,
) -> Result<usize> {
    let mut ids = vec![current];
    for block in blocks {
        if let Some((id, _)) = tables.geometry().page_of(Table::Refs, block)
            && ids.last() != Some(&id)
            && ids.len() < AHEAD
        {
            ids.push(id);
        }
    }
    tables.prefetch(&ids).await?;
    Ok(ids.len())
}
