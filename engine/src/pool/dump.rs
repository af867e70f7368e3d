//! The structures of a pool as text, for reports of bugs: superblocks, catalogue, groups, every
//! node with its entries, deletions under way, records. It goes on after damage, and says where
//! it is. Names and labels are part of it, data is not.

use std::collections::HashSet;
use std::hash::BuildHasherDefault;
use std::io::Write;
use std::rc::Rc;

use super::core::Pool;
use super::durable::Durable;
use crate::checkpoint::load::{self, read_block};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::format::node::{Entry, InnerEntry, LBA_END, LeafEntry, Node, NodePtr, NodeRef, Root};
use crate::format::record::Record;
use crate::format::superblock::Superblock;
use crate::journal::LogReader;
use crate::space::KeyHasher;
use crate::units::{Lba, to_u64};

impl Pool {
    /// Writes the structures of the last checkpoint, and the journal behind it, as text. Holds
    /// further checkpoints back meanwhile: writers go on until the journal is full.
    ///
    /// # Errors
    /// Those of `out`, `Shutdown` when the pool is closed meanwhile. What cannot be read on the disk is part of the text.
    pub async fn dump(&self, out: &mut dyn Write) -> Result<()> {
        let checkpointer = self.core.checkpointer.lock().await;
        let going_on = || self.core.check_walking();
        dump(self.disk(), &checkpointer.superblock, out, &going_on).await
    }
}

/// Writes the structures of a pool that is not open as text.
///
/// # Errors
/// Those of `out`, or that there is no whole superblock.
pub async fn dump_offline(disk: &Rc<dyn Disk>, out: &mut dyn Write) -> Result<()> {
    let superblock = load::superblock(disk).await?;
    dump(disk, &superblock, out, &|| Ok(())).await
}

async fn dump(
    disk: &Rc<dyn Disk>,
    superblock: &Superblock,
    out: &mut dyn Write,
    going_on: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let mut dump = Dump { out, going_on, printed: HashSet::default() };
    dump.superblocks(disk, superblock).await?;
    match load::catalogue_as_is(disk, superblock).await {
        Ok(found) if to_u64(found.catalogue.groups.len()) == superblock.geometry.groups() => {
            let durable = Durable::new(disk, superblock.clone(), found);
            dump.catalogue(&durable)?;
            dump.groups(&durable).await?;
            dump.maps(&durable).await?;
        }
        Ok(found) => dump.line(0, format_args!("catalogue: damaged: {:?}", found.catalogue))?,
        Err(error) => dump.line(0, format_args!("catalogue: {error}"))?,
    }
    dump.journal(disk, superblock).await
}

struct Dump<'a> {
    out: &'a mut dyn Write,
    /// Asked before each node; its error ends the dump.
    going_on: &'a dyn Fn() -> Result<()>,
    /// Nodes that several maps share are written once.
    printed: HashSet<u64, BuildHasherDefault<KeyHasher>>,
}

impl Dump<'_> {
    fn line(&mut self, indent: usize, text: impl std::fmt::Display) -> Result<()> {
        let written = writeln!(self.out, "{:indent$}{text}", "", indent = 2 * indent);
        written.map_err(|error| Error::io("writing the dump", error))
    }

    async fn superblocks(&mut self, disk: &Rc<dyn Disk>, newest: &Superblock) -> Result<()> {
        for slot in 0..2 {
            for place in newest.geometry.super_places(slot) {
                let read = read_block(disk, place).await;
                match read.and_then(|buf| Superblock::decode(buf.as_bytes(), place)) {
                    Ok(found) => self.line(0, format_args!("superblock at {place}: {found:?}"))?,
                    Err(error) => self.line(0, error)?,
                }
            }
        }
        Ok(())
    }

    fn catalogue(&mut self, durable: &Durable) -> Result<()> {
        let (catalogue, blocks) = (&durable.found.catalogue, &durable.found.catalogue_blocks);
        self.line(0, format_args!("catalogue: next id {}, on {blocks:?}", catalogue.next_id))?;
        for volume in &catalogue.volumes {
            self.line(1, format_args!("{volume:?}"))?;
        }
        Ok(())
    }

    async fn groups(&mut self, durable: &Durable) -> Result<()> {
        let geometry = durable.superblock.geometry;
        self.line(0, format_args!("groups: {}", geometry.groups()))?;
        for (group, entry) in (0u32..).zip(&durable.found.catalogue.groups) {
            if entry.generation.get() == 0 {
                continue; // Never written.
            }
            let len = geometry.group_len(u64::from(group));
            self.line(
                1,
                format_args!("group {group}: {} of {len} blocks free, {entry:?}", entry.free),
            )?;
            if let Err(error) = durable.header(group).await {
                self.line(2, error)?;
            }
        }
        Ok(())
    }

    async fn maps(&mut self, durable: &Durable) -> Result<()> {
        for volume in &durable.found.catalogue.volumes {
            self.line(0, format_args!("map of volume {} ({})", volume.name, volume.id))?;
            if let Some(Root { ptr, level }) = volume.root {
                let node = NodeRef::new(&ptr, level, Lba::new(LBA_END));
                self.tree(durable, node, ptr.own, false).await?;
            }
        }
        for drop in &durable.found.catalogue.drops {
            self.line(0, format_args!("deletion under way of {drop:?}"))?;
            let (lba, block, birth) = (Lba::new(0), drop.block, drop.birth);
            let ptr = NodePtr { lba, block, birth, mapped: 0, own: 0 };
            let node = NodeRef::new(&ptr, 0, Lba::new(LBA_END));
            self.tree(durable, node, 0, true).await?;
        }
        Ok(())
    }

    /// Writes a node and everything below it, in order.
    async fn tree(
        &mut self,
        durable: &Durable,
        top: NodeRef,
        own: u64,
        orphan: bool,
    ) -> Result<()> {
        let mut stack = vec![(top, own, 1)];
        while let Some((wanted, own, depth)) = stack.pop() {
            (self.going_on)()?;
            let NodeRef { block, birth, level, lba, mapped, .. } = wanted;
            let pointer =
                format!("node at {block} {birth} level {level} {lba} mapped {mapped} own {own}");
            if !self.printed.insert(block.get()) {
                self.line(depth, format_args!("{pointer}: written above"))?;
                continue;
            }
            self.line(depth, pointer)?;
            if durable.superblock.geometry.locate(block).is_none() {
                self.line(depth, format_args!("{block} is out of bounds"))?;
                continue;
            }
            let known = orphan && depth == 1;
            for (child, own) in self.node(durable, &wanted, known, depth).await?.into_iter().rev() {
                stack.push((child, own, depth + 1));
            }
        }
        Ok(())
    }

    /// Writes what is wrong with a node, and its extents; returns its pointers.
    async fn node(
        &mut self,
        durable: &Durable,
        wanted: &NodeRef,
        orphan: bool,
        depth: usize,
    ) -> Result<Vec<(NodeRef, u64)>> {
        let uuid = &durable.superblock.uuid;
        let buf = match read_block(&durable.disk, wanted.block).await {
            Ok(buf) => buf,
            Err(error) => return self.line(depth, error).map(|()| Vec::new()),
        };
        let verified = if orphan {
            Node::verify_orphan(buf.as_bytes(), wanted.block, wanted.birth, uuid)
        } else {
            durable.verify(buf.as_bytes(), wanted)
        };
        if let Err(error) = verified {
            self.line(depth, error)?;
        }
        let Ok(node) = Node::identify(buf.as_bytes(), wanted.block, uuid) else {
            return Ok(Vec::new());
        };
        let leaf = node.level() == 0;
        let max = if leaf { LeafEntry::MAX } else { InnerEntry::MAX };
        if node.count() > max || (!orphan && node.level() != wanted.level) {
            return Ok(Vec::new());
        }
        if leaf {
            for extent in node.leaf().iter().map(LeafEntry::extent) {
                let own = if extent.own { " own" } else { "" };
                let text = format!("{} {} blocks on {}{own}", extent.lba, extent.len, extent.block);
                self.line(depth + 1, text)?;
            }
            return Ok(Vec::new());
        }
        let owns = node.inner().iter().map(Entry::own);
        Ok(node.child_refs(wanted.end).zip(owns).collect())
    }

    async fn journal(&mut self, disk: &Rc<dyn Disk>, superblock: &Superblock) -> Result<()> {
        let Superblock { journal_offset, seal, .. } = *superblock;
        self.line(
            0,
            format_args!("journal behind {seal}, from byte {journal_offset} of the ring"),
        )?;
        let mut log = LogReader::behind(disk, superblock);
        loop {
            let framed = match log.next().await {
                Ok(Some(framed)) => framed,
                Ok(None) => return Ok(()),
                Err(error) => return self.line(1, error),
            };
            let (seqno, durable, bytes) = (framed.seqno, framed.durable, framed.bytes);
            let what = summary(&framed.record);
            self.line(1, format_args!("{seqno}, {bytes} bytes, durable {durable}: {what}"))?;
        }
    }
}

fn summary(record: &Record) -> String {
    match record {
        Record::Map { runs, .. } => format!("map {runs:?}"),
        other => format!("{other:?}"),
    }
}
