//! The pool as its last checkpoint left it on the disk, for the checker, the walk of the space
//! report, and the dump. Everything is read from the disk, through a small cache of table pages;
//! this code does not depend on whether the pool is open.
//!
//! On an open pool, hold the checkpointer's lock while using this view. Writers need not stop: no
//! block that the last checkpoint reaches is written before the next one is durable.

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

/// Table pages in the cache: 1 MiB.
const PAGES: usize = 256;
/// Nodes read concurrently.
pub(in crate::pool) const PARALLEL: usize = 32;

/// A checkpoint on the disk.
pub(in crate::pool) struct Durable {
    pub(in crate::pool) disk: Rc<dyn Disk>,
    pub(in crate::pool) superblock: Superblock,
    pub(in crate::pool) found: Found,
    tables: RefCell<Tables>,
}

impl Durable {
    /// The checkpoint of a superblock with its catalogue, which must have one entry per group.
    pub(in crate::pool) fn new(disk: &Rc<dyn Disk>, superblock: Superblock, found: Found) -> Self {
        let groups = found.catalogue.groups.clone();
        let tables = Tables::new(superblock.geometry, superblock.uuid, groups, PAGES);
        Self { disk: Rc::clone(disk), superblock, found, tables: RefCell::new(tables) }
    }

    /// Loads the checkpoint of a superblock.
    ///
    /// # Errors
    /// `Corrupt` if the catalogue is damaged, or the device's.
    pub(in crate::pool) async fn load(disk: &Rc<dyn Disk>, superblock: Superblock) -> Result<Self> {
        let found = load::catalogue(disk, &superblock).await?;
        Ok(Self::new(disk, superblock, found))
    }

    /// A table page; `None` for one that was never written.
    ///
    /// # Errors
    /// `Corrupt`, with the page, or the device's.
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
    /// `Corrupt`, with the group, or the device's.
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

    /// The entries of a table for `count` consecutive blocks of one group.
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

    /// Reads blocks in parallel; each has its own result.
    pub(in crate::pool) async fn read_all(
        &self,
        places: impl Iterator<Item = BlockNo>,
    ) -> Vec<Result<Buf>> {
        join_all(places.map(|place| read_block(&self.disk, place))).await
    }

    /// Decodes the node in `bytes` and verifies it against the pointer to it.
    ///
    /// # Errors
    /// `Corrupt`, with the node.
    pub(in crate::pool) fn verify<'a>(
        &self,
        bytes: &'a [u8],
        expected: &NodeRef,
    ) -> Result<&'a Node> {
        Node::verify(bytes, expected, &self.superblock.uuid)
    }
}
