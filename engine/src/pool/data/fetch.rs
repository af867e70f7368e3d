//! Fetching what an operation lacks: map nodes, table pages, free blocks of allocation groups,
//! space. Each function returns when the operation should be retried.

use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::{PAGE_ENTRIES, PageId, Table};
use crate::format::group::{BlockType, TablePage};
use crate::map::Missing;
use crate::pool::core::{Inner, Pool, count};
use crate::pool::data::place::pool_full;
use crate::runtime::Buf;
use crate::space::{Bitmap, MissingTable, TakeError};
use crate::state::{NODE_RESERVE, Need};
use crate::units::{BLOCK_SIZE, BlockNo, to_u64, to_usize};

/// Attempts to read a block of metadata.
const READ_ATTEMPTS: usize = 3;
/// Attempts to read what a checkpoint may replace during the read.
const RETRIES: usize = 8;

/// What can free blocks and so justifies a wait for them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hope {
    /// Changes that the next checkpoint settles.
    Changes,
    /// Also writes of other requests, which will make such changes. Only for a request that holds
    /// no blocks itself; otherwise it could wait for itself.
    Writes,
}

/// Keeps blocks that a look-up returned from being allocated again while they are read.
pub(crate) struct Pin {
    pool: Pool,
    token: u64,
}

impl Pin {
    pub(crate) fn new(pool: &Pool, inner: &mut Inner) -> Self {
        Self { pool: pool.clone(), token: inner.state.reuse.pin() }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut inner = self.pool.core.lock();
        // A notification takes a lock even without listeners, and every read drops a pin.
        let holds_up = inner.state.reuse.waiting().next().is_some();
        inner.state.reuse.unpin(self.token);
        let recycled = inner.recycle();
        drop(inner);
        if holds_up {
            self.pool.core.reader_event.notify_waiters();
        }
        self.pool.core.poison_on(&recycled);
    }
}

impl Inner {
    /// Makes freed blocks allocatable once no reader pins them.
    ///
    /// # Errors
    /// `Corrupt` if one of them is free already: the maps contradict the reference counts.
    pub(crate) fn recycle(&mut self) -> Result<()> {
        for run in self.state.reuse.reusable() {
            self.state.space.release(run)?;
        }
        Ok(())
    }

    /// Whether writes hold blocks that are in no record yet. Node blocks do not count.
    fn writes_under_way(&self) -> bool {
        self.state.space.outstanding() > to_u64(self.state.node_blocks.len())
    }

    /// Free blocks less those kept for the next catalogues.
    fn free_for_nodes(&self) -> u64 {
        self.state.space.free().saturating_sub(self.kept_for_catalogues())
    }

    /// Blocks available for new nodes: those set aside, and those that can be taken at once.
    pub(crate) fn node_room(&self) -> usize {
        self.state.node_blocks.len() + to_usize(self.free_for_nodes())
    }

    /// Inserts a node that was read into the cache. A block that is set aside for a new node is
    /// refused: the loaded node would have to give way to it in the middle of a record.
    fn take_in(&mut self, missing: &Missing, bytes: &[u8]) -> Result<()> {
        let state = &mut self.state;
        let block = missing.block;
        if state.node_blocks.contains(&block) {
            return Err(Error::corrupt(format!(
                "map node at {block}: its block counts as free and is set aside for another; run \
                 `pando pool check`"
            )));
        }
        state.cache.insert_loaded(missing, bytes)
    }

    /// Sets blocks aside for new nodes until there are `count`. Leaves room for two catalogues:
    /// without them no checkpoint could be written, and no deletion would free anything.
    pub(crate) fn refill_nodes(&mut self, count: usize) -> std::result::Result<(), TakeError> {
        let want = count.max(NODE_RESERVE.min(to_usize(self.state.space.free() / 16)));
        while self.state.node_blocks.len() < want {
            let missing = to_u64(want - self.state.node_blocks.len()).min(self.free_for_nodes());
            if missing == 0 {
                let enough = self.state.node_blocks.len() >= count;
                return if enough { Ok(()) } else { Err(TakeError::Full) };
            }
            match self.state.space.take(missing) {
                Ok(run) => {
                    let blocks = (0..run.len).rev().map(|i| run.block.plus(i));
                    // A damaged map may name such a block as a node. The cache must forget it, or a
                    // new node would replace it between two edits.
                    blocks.clone().for_each(|block| self.state.cache.forget(block));
                    self.state.node_blocks.splice(0..0, blocks);
                }
                Err(_) if self.state.node_blocks.len() >= count => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Pool {
    pub(crate) fn pin(&self) -> Pin {
        Pin::new(self, &mut self.core.lock())
    }

    /// Reads one block of metadata.
    pub(crate) async fn read_block(&self, place: BlockNo) -> Result<Buf> {
        self.read_metadata(place, 1).await
    }

    /// Reads metadata and retries, so that a transient read error does not fail a checkpoint.
    async fn read_metadata(&self, place: BlockNo, blocks: usize) -> Result<Buf> {
        count(&self.core.counters.metadata_reads, 1);
        let mut attempts = 1;
        loop {
            match self.disk().read(place, Buf::new(blocks)).await {
                (buf, Ok(())) => return Ok(buf),
                (_, Err(_)) if attempts < READ_ATTEMPTS => attempts += 1,
                (_, Err(error)) => return Err(error),
            }
        }
    }

    /// Loads a node into the cache. The caller must hold a [`Pin`] from before the look-up.
    pub(crate) async fn load_node(&self, missing: &Missing) -> Result<()> {
        let buf = self.read_block(missing.block).await?;
        let loaded = self.core.lock().take_in(missing, buf.as_bytes());
        loaded.inspect_err(|error| tracing::error!(%error, "a part of a volume cannot be read"))
    }

    /// Loads a group header or table page into the cache.
    pub(crate) async fn load_table(&self, missing: MissingTable) -> Result<()> {
        let buf = self.read_block(missing.place()).await?;
        let loaded = self.core.lock().state.tables.install(missing, buf.as_bytes());
        loaded.inspect_err(|error| tracing::error!(%error, "a table cannot be read"))
    }

    /// Loads the free blocks of a group: blocks without a reference in the last durable checkpoint,
    /// except those that may not be allocated yet (`Reuse::waiting`).
    pub(crate) async fn load_group(&self, group: u32) -> Result<()> {
        for _ in 0..RETRIES {
            if self.core.lock().state.space.is_loaded(group) {
                return Ok(());
            }
            let before = self.core.lock().state.tables.entry(group).generation;
            let pages = self.read_counts(group).await;
            let mut inner = self.core.lock();
            if inner.state.tables.entry(group).generation != before {
                continue; // A checkpoint has replaced the pages while they were read.
            }
            let bitmap = inner.free_blocks(group, &pages?);
            inner.state.space.install(group, bitmap);
            return Ok(());
        }
        Err(Error::new(ErrorKind::Busy, format!("group {group} changes too fast to be loaded")))
    }

    /// The reference-count pages of a group; `None` for a page that was never written.
    async fn read_counts(&self, group: u32) -> Result<Vec<Option<Box<TablePage>>>> {
        let header = loop {
            let found = self.core.lock().state.tables.header(group);
            match found {
                Ok(header) => break header,
                Err(missing) => self.load_table(missing).await?,
            }
        };
        let geometry = self.core.lock().state.geometry;
        let first = PageId { group, table: Table::Refs, page: 0 };
        let ids =
            (0..crate::units::to_u32(geometry.group_pages)).map(|page| PageId { page, ..first });
        let versions: Vec<_> = ids.map(|id| (id, header.version(id))).collect();
        if versions.iter().all(|(_, (_, generation))| generation.get() == 0) {
            return Ok(versions.iter().map(|_| None).collect());
        }
        let both_slots = to_usize(2 * geometry.group_pages);
        let buf = self.read_metadata(geometry.page_place(first, 0), both_slots).await?;
        let decode = |(id, (slot, generation)): &(PageId, (u64, _))| {
            let at = to_usize(2 * u64::from(id.page) + slot) * BLOCK_SIZE;
            let bytes = &buf.as_bytes()[at..at + BLOCK_SIZE];
            let never: bool = crate::units::Generation::get(*generation) == 0;
            if never { Ok(None) } else { TablePage::decode(bytes, *id, *generation).map(Some) }
        };
        versions.iter().map(decode).collect()
    }

    /// Fetches what `prepare` has requested.
    pub(crate) async fn fetch(&self, need: Need) -> Result<()> {
        match need {
            Need::Node(missing) => self.load_node(&missing).await,
            Need::NodeBlocks(count) => self.provide_nodes(count).await,
            Need::Refused(error) => Err(error),
        }
    }

    async fn provide_nodes(&self, count: usize) -> Result<()> {
        loop {
            let (result, published) = {
                let mut inner = self.core.lock();
                inner.check_alive()?;
                (inner.refill_nodes(count), inner.published)
            };
            match result {
                Ok(()) => return Ok(()),
                Err(TakeError::Load(group)) => self.load_group(group).await?,
                Err(TakeError::Full) => self.await_space(published, Hope::Changes).await?,
            }
        }
    }

    /// Waits for a checkpoint that may free blocks. Fails if nothing can free any.
    pub(crate) async fn await_space(&self, published: u64, least: Hope) -> Result<()> {
        let hope = {
            let inner = self.core.lock();
            // What a checkpoint under way frees is not known yet, so it always counts.
            inner.published != published
                || (least == Hope::Writes && inner.writes_under_way())
                || inner.state.sealed_sums.is_some()
                || !inner.state.log.is_empty()
                || inner.drops_pending > 0
                || inner.state.reuse.waiting().next().is_some()
        };
        if !hope {
            return Err(pool_full());
        }
        self.await_published(published).await
    }

    /// Waits until a checkpoint after number `published` is durable. Requests one only if none is
    /// under way. Otherwise checkpoints would follow each other without end, and no waiter would
    /// ever find the pool idle, which is how it learns that waiting is useless.
    pub(crate) async fn await_published(&self, published: u64) -> Result<()> {
        loop {
            let event = self.core.published_event.notified();
            let under_way = {
                let inner = self.core.lock();
                if let Some(reason) = &inner.poisoned {
                    return Err(Error::new(ErrorKind::Poisoned, reason.clone()));
                }
                if inner.published > published {
                    return Ok(());
                }
                inner.check_alive()?;
                inner.state.sealed_sums.is_some()
            };
            if !under_way {
                self.core.want_checkpoint();
            }
            event.await;
        }
    }
}

impl Inner {
    fn free_blocks(&self, group: u32, pages: &[Option<Box<TablePage>>]) -> Bitmap {
        let state = &self.state;
        let group = u64::from(group);
        let mut bitmap = Bitmap::full(state.geometry.group_len(group));
        for index in 0..state.geometry.group_len(group) {
            let page = pages[to_usize(index / PAGE_ENTRIES)].as_ref();
            let entry = page.map_or(0, |page| page.get(to_usize(index % PAGE_ENTRIES)));
            if BlockType::of(entry) == BlockType::Free {
                bitmap.set(index, 1, true);
            }
        }
        for run in state.reuse.waiting() {
            if let Some((owner, index)) = state.geometry.locate(run.block)
                && owner == group
            {
                for index in index..index + run.len {
                    if bitmap.is_free(index) {
                        bitmap.set(index, 1, false);
                    }
                }
            }
        }
        bitmap
    }
}
