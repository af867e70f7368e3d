//! The tables of the checkpoint being written: copies of the pages that change. They are written to
//! their unused slots when there are too many of them and at the end.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::join_all;

use super::changes::{Freed, PageChange};
use crate::error::{Error, Result};
use crate::format::catalogue::{GroupEntry, NodeDrop};
use crate::format::geometry::{Geometry, PageId, Table};
use crate::format::group::{BlockType, COUNT_MASK, GroupHeader, TablePage};
use crate::pool::{Pool, count};
use crate::runtime::Buf;
use crate::space::MissingTable;
use crate::units::{BLOCK_BYTES, BlockNo, Generation, to_u64};

/// Changed pages kept in memory before they are written: 16 MiB. Small in unit tests, whose pools
/// have few pages.
const PAGES_MAX: usize = if cfg!(test) { 3 } else { 4096 };
/// Pages written concurrently.
const PARALLEL: usize = 32;

/// A group that the checkpoint changes.
struct Changed {
    header: Box<GroupHeader>,
    free: u32,
}

/// The tables as the checkpoint will publish them.
pub(super) struct NewTables<'a> {
    pool: &'a Pool,
    geometry: Geometry,
    generation: Generation,
    groups: BTreeMap<u32, Changed>,
    pages: BTreeMap<PageId, Box<TablePage>>,
    /// Pages of this generation that were written before the end, sorted.
    written: Vec<PageId>,
    /// Pages to put into the cache once the checkpoint is durable.
    finished: Vec<(PageId, Arc<TablePage>)>,
}

impl<'a> NewTables<'a> {
    pub(super) fn new(pool: &'a Pool, geometry: Geometry, generation: Generation) -> Self {
        Self {
            pool,
            geometry,
            generation,
            groups: BTreeMap::new(),
            pages: BTreeMap::new(),
            written: Vec::new(),
            finished: Vec::new(),
        }
    }

    pub(super) const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The page, for modification.
    pub(super) async fn page(&mut self, id: PageId) -> Result<&mut TablePage> {
        if !self.pages.contains_key(&id) {
            if self.pages.len() >= PAGES_MAX {
                self.write_pages().await?;
            }
            let page = self.load_page(id).await?;
            self.pages.insert(id, page);
        }
        Ok(self.pages.get_mut(&id).expect("just inserted"))
    }

    async fn load_page(&mut self, id: PageId) -> Result<Box<TablePage>> {
        self.load_group(id.group).await?;
        if self.written.binary_search(&id).is_ok() {
            let slot = self.groups[&id.group].header.version(id).0;
            let place = self.geometry.page_place(id, slot);
            let buf = self.pool.read_block(place).await?;
            return TablePage::decode(buf.as_bytes(), id, self.generation);
        }
        loop {
            let found = self.pool.core.lock().state.tables.page(id);
            match found {
                Ok(Some(page)) => return Ok(Box::new((*page).clone())),
                Ok(None) => return Ok(TablePage::empty(id)),
                Err(missing) => self.pool.load_table(missing).await?,
            }
        }
    }

    async fn load_group(&mut self, group: u32) -> Result<()> {
        if self.groups.contains_key(&group) {
            return Ok(());
        }
        loop {
            let found: std::result::Result<_, MissingTable> = {
                let mut inner = self.pool.core.lock();
                let free = inner.state.tables.entry(group).free;
                inner.state.tables.header(group).map(|header| (header, free))
            };
            match found {
                Ok((header, free)) => {
                    let header = Box::new((*header).clone());
                    self.groups.insert(group, Changed { header, free });
                    return Ok(());
                }
                Err(missing) => self.pool.load_table(missing).await?,
            }
        }
    }

    /// Reads the pages that are about to be changed, in parallel.
    pub(super) async fn prefetch(&mut self, ids: &[PageId]) -> Result<()> {
        let wanted =
            |missing: std::result::Result<Option<Arc<TablePage>>, MissingTable>| missing.err();
        for _ in 0..2 {
            // First the headers, then the pages that they point to.
            let mut missing: Vec<MissingTable> = {
                let mut inner = self.pool.core.lock();
                ids.iter().filter_map(|id| wanted(inner.state.tables.page(*id))).collect()
            };
            missing.sort_unstable_by_key(MissingTable::place);
            missing.dedup();
            for some in missing.chunks(PARALLEL) {
                let loads = some.iter().map(|missing| self.pool.load_table(*missing));
                for loaded in join_all(loads).await {
                    loaded?;
                }
            }
        }
        Ok(())
    }

    /// Applies a change to the counts of a page. Blocks whose count drops to 0 go to `freed`, nodes
    /// to `drops`.
    pub(super) async fn change_page(
        &mut self,
        change: &PageChange,
        freed: &mut Freed,
        drops: &mut Vec<NodeDrop>,
    ) -> Result<()> {
        let pool = self.pool;
        let page = self.page(change.id).await?;
        let mut free: i64 = 0;
        for (at, (offset, entry)) in (0u64..).zip(&change.entries).enumerate() {
            let Some(kind) = entry.kind else { continue };
            let block = change.base.plus(offset);
            let old = page.get(at);
            if old != 0 && BlockType::of(old) != kind {
                return Err(Error::corrupt(format!(
                    "{block} is counted as {:?} and used as {kind:?}",
                    BlockType::of(old)
                )));
            }
            let mut count = i64::from(old & COUNT_MASK) + entry.by;
            if count == 0 && kind == BlockType::Node && !entry.moved {
                // Its children still count it: the list of drops keeps one reference.
                count = 1;
                drops.push(NodeDrop { block, birth: entry.birth });
            } else if count == 0 {
                // Allocated and released since the seal, unless a damaged map names a free block.
                if old == 0 && pool.core.lock().state.space.is_free(block) {
                    return Err(Error::corrupt(format!("{block} is free and in use as {kind:?}")));
                }
                freed.push(block);
            }
            let new = u32::try_from(count).ok().filter(|n| *n <= COUNT_MASK).ok_or_else(|| {
                Error::corrupt(format!("{block}: its reference count would become {count}"))
            })?;
            page.set(at, kind.entry(new));
            free += i64::from(new == 0) - i64::from(old & COUNT_MASK == 0);
        }
        let group = self.groups.get_mut(&change.id.group).expect("loaded with its page");
        let total = i64::from(group.free) + free;
        group.free = u32::try_from(total).map_err(|_| {
            Error::corrupt(format!("group {}: {total} free blocks", change.id.group))
        })?;
        Ok(())
    }

    /// The count of a block in the new tables.
    pub(super) async fn count_of(&mut self, block: BlockNo) -> Result<u32> {
        let Some((id, at)) = self.geometry.page_of(Table::Refs, block) else {
            return Err(Error::corrupt(format!("{block} has no reference count: out of bounds")));
        };
        Ok(self.page(id).await?.get(at) & COUNT_MASK)
    }

    /// Writes all changed pages to the slots that the last checkpoint does not use.
    async fn write_pages(&mut self) -> Result<()> {
        let mut pages = std::mem::take(&mut self.pages);
        let ids: Vec<PageId> = pages.keys().copied().collect();
        for some in ids.chunks(PARALLEL) {
            let mut writes = Vec::with_capacity(some.len());
            for id in some {
                let header =
                    &mut self.groups.get_mut(&id.group).expect("loaded with its page").header;
                let slot = header.choose_slot(*id, self.generation);
                let page = pages.get_mut(id).expect("listed");
                let mut buf = Buf::new(1);
                page.encode(self.generation, buf.as_mut_bytes());
                writes.push(self.pool.disk().write(self.geometry.page_place(*id, slot), vec![buf]));
            }
            for written in join_all(writes).await {
                written?;
            }
        }
        count(&self.pool.core.counters.metadata_bytes, to_u64(ids.len()) * BLOCK_BYTES);
        self.finished.retain(|(id, _)| !pages.contains_key(id));
        self.finished.extend(pages.into_iter().map(|(id, page)| (id, page.into())));
        self.written.extend(ids);
        self.written.sort_unstable();
        self.written.dedup();
        Ok(())
    }

    /// Writes the remaining pages and the headers. Returns what readers shall see once the
    /// checkpoint is durable.
    pub(super) async fn finish(mut self) -> Result<Finished> {
        self.write_pages().await?;
        let mut groups = Vec::with_capacity(self.groups.len());
        let mut writes = Vec::with_capacity(self.groups.len());
        for (group, mut changed) in self.groups {
            let entry = self.pool.core.lock().state.tables.entry(group);
            let slot = if entry.generation.get() == 0 { 0 } else { 1 - (entry.slot & 1) };
            let mut buf = Buf::new(1);
            changed.header.encode(self.generation, buf.as_mut_bytes());
            let place = self.geometry.header_place(u64::from(group), u64::from(slot));
            writes.push(self.pool.disk().write(place, vec![buf]));
            let entry = GroupEntry { generation: self.generation, slot, free: changed.free };
            groups.push((group, entry, Arc::from(changed.header)));
        }
        count(&self.pool.core.counters.metadata_bytes, to_u64(groups.len()) * BLOCK_BYTES);
        for written in join_all(writes).await {
            written?;
        }
        Ok(Finished { groups, pages: self.finished })
    }
}

/// What a checkpoint publishes to the readers of the tables.
pub(super) struct Finished {
    pub(super) groups: Vec<(u32, GroupEntry, Arc<GroupHeader>)>,
    pub(super) pages: Vec<(PageId, Arc<TablePage>)>,
}
