//! The pool as its last checkpoint left it on the disk: what the checker, the scrubber's and the
//! space report's walks, and the dump look at. Everything comes from the disk, through a small
//! cache of table pages; nothing here knows whether the pool is open.
//!
//! Of an open pool, whoever holds the lock of its checkpoints may walk this view while writers go
//! on: no block that the last checkpoint reaches is written before the next one is durable.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::join_all;

use crate::disk::Disk;
use crate::error::Result;
use crate::format::geometry::{PageId, Table};
use crate::format::group::{GroupHeader, TablePage};
use crate::format::node::{Node, NodeRef};
use crate::format::superblock::Superblock;
use crate::pool::checkpoint::load::{self, Found, read_block};
use crate::runtime::Buf;
use crate::space::{MissingTable, Tables};
use crate::units::{BlockNo, to_usize};

/// Table pages kept: 1 MiB.
const PAGES: usize = 256;
/// Nodes read at the same time.
pub(in crate::pool) const PARALLEL: usize = 32;

/// A checkpoint on the disk.
pub(in crate::pool) struct Durable {
    pub(in crate::pool) disk: Rc<dyn Disk>,
    pub(in crate::pool) superblock: Superblock,
    pub(in crate::pool) found: Found,
    tables: RefCell<Tables>,
}

impl Durable {
    /// The checkpoint of a superblock and its catalogue, which has one entry for each group.
    pub(in crate::pool) fn new(disk: &Rc<dyn Disk>, superblock: Superblock, found: Found) -> Self {
        let groups = found.catalogue.groups.clone();
        let tables = Tables::new(superblock.geometry, superblock.uuid, groups, PAGES);
        Self { disk: Rc::clone(disk), superblock, found, tables: RefCell::new(tables) }
    }

    /// The checkpoint of a superblock.
    ///
    /// # Errors
    /// `Corrupt` when the catalogue is damaged, the device's.
    pub(in crate::pool) async fn load(disk: &Rc<dyn Disk>, superblock: Superblock) -> Result<Self> {
        let found = load::catalogue(disk, &superblock).await?;
        Ok(Self::new(disk, superblock, found))
    }

    /// A page of a table; `None` for one that was never written.
    ///
    /// # Errors
    /// `Corrupt`, naming the page, or the device's.
    pub(in crate::pool) async fn page(&self, id: PageId) -> Result<Option<Arc<TablePage>>> {
        loop {
            let missing = match self.tables.borrow_mut().page(id) {
                Ok(page) => return Ok(page),
                Err(missing) => missing,
            };
            self.load_table(missing).await?;
        }
    }

    /// The header of a group.
    ///
    /// # Errors
    /// `Corrupt`, naming the group, or the device's.
    pub(in crate::pool) async fn header(&self, group: u32) -> Result<Arc<GroupHeader>> {
        loop {
            let missing = match self.tables.borrow_mut().header(group) {
                Ok(header) => return Ok(header),
                Err(missing) => missing,
            };
            self.load_table(missing).await?;
        }
    }

    async fn load_table(&self, missing: MissingTable) -> Result<()> {
        let place = missing.place();
        let buf = read_block(&self.disk, place).await?;
        let installed = self.tables.borrow_mut().install(missing, buf.as_bytes());
        installed.map_err(|error| error.context(place))
    }

    /// The entries of `count` consecutive blocks of one group in a table.
    ///
    /// # Errors
    /// As [`Self::page`].
    pub(in crate::pool) async fn entries(
        &self,
        table: Table,
        block: BlockNo,
        count: u64,
    ) -> Result<Vec<u32>> {
        let mut entries = Vec::with_capacity(to_usize(count));
        let mut known: Option<(PageId, Option<Arc<TablePage>>)> = None;
        for offset in 0..count {
            let place = self.superblock.geometry.page_of(table, block.plus(offset));
            let Some((id, entry)) = place else { continue };
            let page = match &known {
                Some((last, page)) if *last == id => page,
                _ => &known.insert((id, self.page(id).await?)).1,
            };
            entries.push(page.as_ref().map_or(0, |page| page.get(entry)));
        }
        Ok(entries)
    }

    /// Reads blocks in parallel; each answers for itself.
    pub(in crate::pool) async fn read_all(
        &self,
        places: impl Iterator<Item = BlockNo>,
    ) -> Vec<Result<Buf>> {
        join_all(places.map(|place| read_block(&self.disk, place))).await
    }

    /// The node in `bytes`, verified against the pointer that led to it.
    ///
    /// # Errors
    /// `Corrupt`, naming the node.
    pub(in crate::pool) fn verify<'a>(
        &self,
        bytes: &'a [u8],
        expected: &NodeRef,
    ) -> Result<&'a Node> {
        Node::verify(bytes, expected, &self.superblock.uuid)
    }
}
