//! The structures of a pool, for bug reports: superblocks, catalogue, groups, every node with its
//! entries, deletions in progress, records. The output is text or JSON. The dump continues after
//! damage and shows where it is. It contains names and labels, but no data.

use std::collections::HashSet;
use std::fmt;
use std::hash::BuildHasherDefault;
use std::io::Write;
use std::rc::Rc;

use serde::Serialize;

use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::format::catalogue::{GroupEntry, NodeDrop, VolumeEntry};
use crate::format::node::{
    Entry, Extent, InnerEntry, LBA_END, LeafEntry, Node, NodePtr, NodeRef, Root,
};
use crate::format::record::Record;
use crate::format::superblock::Superblock;
use crate::journal::LogReader;
use crate::pool::checkpoint::load::{self, read_block};
use crate::pool::core::Pool;
use crate::pool::inspect::durable::Durable;
use crate::space::KeyHasher;
use crate::units::{BlockNo, Lba, Seqno, VolumeId, to_u64};

/// Output format of a dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DumpForm {
    /// Indented lines of text.
    #[default]
    Text,
    /// A JSON array with one object per line. `what` is the kind of structure, `depth` its depth of
    /// nesting.
    Json,
}

/// One line of a dump.
#[derive(Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
enum Item<'a> {
    Superblock {
        place: BlockNo,
        superblock: &'a Superblock,
    },
    Catalogue {
        next_id: u64,
        blocks: &'a [BlockNo],
    },
    Volume {
        volume: &'a VolumeEntry,
    },
    Groups {
        count: u64,
    },
    Group {
        group: u32,
        blocks: u64,
        entry: &'a GroupEntry,
    },
    Map {
        volume: VolumeId,
        name: &'a str,
    },
    Deletion {
        node: &'a NodeDrop,
    },
    Node {
        block: BlockNo,
        birth: Seqno,
        level: u8,
        lba: Lba,
        mapped: u64,
        own: u64,
        /// Whether another map shares the node, so that its subtree was written before.
        written_above: bool,
    },
    Extent {
        extent: Extent,
    },
    Journal {
        seal: Seqno,
        offset: u64,
    },
    Record {
        seqno: Seqno,
        bytes: usize,
        durable: Seqno,
        record: &'a Record,
    },
    /// A structure that is unreadable or wrong.
    Damage {
        message: String,
    },
}

impl fmt::Display for Item<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superblock { place, superblock } => {
                write!(f, "superblock at {place}: {superblock:?}")
            }
            Self::Catalogue { next_id, blocks } => {
                write!(f, "catalogue: next id {next_id}, on {blocks:?}")
            }
            Self::Volume { volume } => write!(f, "{volume:?}"),
            Self::Groups { count } => write!(f, "groups: {count}"),
            Self::Group { group, blocks, entry } => {
                write!(f, "group {group}: {} of {blocks} blocks free, {entry:?}", entry.free)
            }
            Self::Map { volume, name } => write!(f, "map of volume {name} ({volume})"),
            Self::Deletion { node } => write!(f, "deletion under way of {node:?}"),
            Self::Node { block, birth, level, lba, mapped, own, written_above } => {
                let again = if *written_above { ": written above" } else { "" };
                write!(f, "node at {block} {birth} level {level} {lba} mapped {mapped} own {own}")?;
                f.write_str(again)
            }
            Self::Extent { extent } => {
                let own = if extent.own { " own" } else { "" };
                write!(f, "{} {} blocks on {}{own}", extent.lba, extent.len, extent.block)
            }
            Self::Journal { seal, offset } => {
                write!(f, "journal behind {seal}, from byte {offset} of the ring")
            }
            Self::Record { seqno, bytes, durable, record } => {
                write!(f, "{seqno}, {bytes} bytes, durable {durable}: ")?;
                match record {
                    Record::Map { runs, .. } => write!(f, "map {runs:?}"),
                    other => write!(f, "{other:?}"),
                }
            }
            Self::Damage { message } => f.write_str(message),
        }
    }
}

impl Pool {
    /// Writes the structures of the last checkpoint, and the journal after it. Delays further
    /// checkpoints meanwhile: writers are not blocked until the journal is full.
    ///
    /// # Errors
    /// Those of `out`; `Shutdown` if the pool is closed meanwhile. Read errors of the disk become
    /// part of the dump.
    pub async fn dump(&self, form: DumpForm, out: &mut dyn Write) -> Result<()> {
        let checkpointer = self.core.checkpointer.lock().await;
        let going_on = || self.core.check_walking();
        let target = Target { form, out, going_on: &going_on };
        dump(self.disk(), &checkpointer.superblock, target).await
    }
}

/// Writes the structures of a pool that is not open.
///
/// # Errors
/// Those of `out`, or those of a missing superblock.
pub async fn dump_offline(disk: &Rc<dyn Disk>, form: DumpForm, out: &mut dyn Write) -> Result<()> {
    let superblock = load::superblock(disk).await?;
    dump(disk, &superblock, Target { form, out, going_on: &|| Ok(()) }).await
}

async fn dump(disk: &Rc<dyn Disk>, superblock: &Superblock, target: Target<'_>) -> Result<()> {
    let mut dump = Dump { target, items: 0, printed: HashSet::default() };
    dump.superblocks(disk, superblock).await?;
    match load::catalogue_as_is(disk, superblock).await {
        Ok(found) if to_u64(found.catalogue.groups.len()) == superblock.geometry.groups() => {
            let durable = Durable::new(disk, superblock.clone(), found);
            dump.catalogue(&durable)?;
            dump.groups(&durable).await?;
            dump.maps(&durable).await?;
        }
        Ok(found) => {
            let (found, groups) = (found.catalogue.groups.len(), superblock.geometry.groups());
            dump.damage(0, format_args!("catalogue: {found} groups of {groups}"))?;
        }
        Err(error) => dump.damage(0, format_args!("catalogue: {error}"))?,
    }
    dump.journal(disk, superblock).await?;
    dump.end()
}

/// Output of a dump.
struct Target<'a> {
    form: DumpForm,
    out: &'a mut dyn Write,
    /// Called before each node; its error ends the dump.
    going_on: &'a dyn Fn() -> Result<()>,
}

struct Dump<'a> {
    target: Target<'a>,
    items: u64,
    /// Nodes written so far: a node that several maps share is written once.
    printed: HashSet<u64, BuildHasherDefault<KeyHasher>>,
}

impl Dump<'_> {
    fn put(&mut self, depth: usize, item: &Item<'_>) -> Result<()> {
        #[derive(Serialize)]
        struct Line<'a> {
            depth: usize,
            #[serde(flatten)]
            item: &'a Item<'a>,
        }
        let out = &mut *self.target.out;
        let written = match self.target.form {
            DumpForm::Text => writeln!(out, "{:indent$}{item}", "", indent = 2 * depth),
            DumpForm::Json => write!(out, "{}", if self.items == 0 { "[\n" } else { ",\n" })
                .and_then(|()| Ok(serde_json::to_writer(out, &Line { depth, item })?)),
        };
        self.items += 1;
        written.map_err(|error| Error::io("writing the dump", error))
    }

    fn end(&mut self) -> Result<()> {
        let written = match self.target.form {
            DumpForm::Text => Ok(()),
            DumpForm::Json => writeln!(self.target.out, "\n]"),
        };
        written.map_err(|error| Error::io("writing the dump", error))
    }

    fn damage(&mut self, depth: usize, what: impl fmt::Display) -> Result<()> {
        self.put(depth, &Item::Damage { message: what.to_string() })
    }

    async fn superblocks(&mut self, disk: &Rc<dyn Disk>, newest: &Superblock) -> Result<()> {
        for slot in 0..2 {
            for place in newest.geometry.super_places(slot) {
                let read = read_block(disk, place).await;
                match read.and_then(|buf| Superblock::decode(buf.as_bytes(), place)) {
                    Ok(superblock) => {
                        self.put(0, &Item::Superblock { place, superblock: &superblock })?;
                    }
                    Err(error) => self.damage(0, error)?,
                }
            }
        }
        Ok(())
    }

    fn catalogue(&mut self, durable: &Durable) -> Result<()> {
        let (catalogue, blocks) = (&durable.found.catalogue, &durable.found.catalogue_blocks);
        self.put(0, &Item::Catalogue { next_id: catalogue.next_id, blocks })?;
        for volume in &catalogue.volumes {
            self.put(1, &Item::Volume { volume })?;
        }
        Ok(())
    }

    async fn groups(&mut self, durable: &Durable) -> Result<()> {
        let geometry = durable.superblock.geometry;
        self.put(0, &Item::Groups { count: geometry.groups() })?;
        for (group, entry) in (0u32..).zip(&durable.found.catalogue.groups) {
            if entry.generation.get() == 0 {
                continue; // Never written.
            }
            let blocks = geometry.group_len(u64::from(group));
            self.put(1, &Item::Group { group, blocks, entry })?;
            if let Err(error) = durable.header(group).await {
                self.damage(2, error)?;
            }
        }
        Ok(())
    }

    async fn maps(&mut self, durable: &Durable) -> Result<()> {
        for volume in &durable.found.catalogue.volumes {
            self.put(0, &Item::Map { volume: volume.id, name: &volume.name })?;
            if let Some(Root { ptr, level }) = volume.root {
                let node = NodeRef::new(&ptr, level, Lba::new(LBA_END));
                self.tree(durable, node, ptr.own, false).await?;
            }
        }
        for drop in &durable.found.catalogue.drops {
            self.put(0, &Item::Deletion { node: drop })?;
            let (lba, block, birth) = (Lba::new(0), drop.block, drop.birth);
            let ptr = NodePtr { lba, block, birth, mapped: 0, own: 0 };
            let node = NodeRef::new(&ptr, 0, Lba::new(LBA_END));
            self.tree(durable, node, 0, true).await?;
        }
        Ok(())
    }

    /// Writes a node and its subtree, in order.
    async fn tree(
        &mut self,
        durable: &Durable,
        top: NodeRef,
        own: u64,
        orphan: bool,
    ) -> Result<()> {
        let mut stack = vec![(top, own, 1)];
        while let Some((wanted, own, depth)) = stack.pop() {
            (self.target.going_on)()?;
            let NodeRef { block, birth, level, lba, mapped, .. } = wanted;
            let written_above = !self.printed.insert(block.get());
            self.put(depth, &Item::Node { block, birth, level, lba, mapped, own, written_above })?;
            if written_above {
                continue;
            }
            if durable.superblock.geometry.locate(block).is_none() {
                self.damage(depth, format_args!("{block} is out of bounds"))?;
                continue;
            }
            let known = orphan && depth == 1;
            for (child, own) in self.node(durable, &wanted, known, depth).await?.into_iter().rev() {
                stack.push((child, own, depth + 1));
            }
        }
        Ok(())
    }

    /// Writes the damage of a node, and its extents; returns its pointers.
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
            Err(error) => return self.damage(depth, error).map(|()| Vec::new()),
        };
        let verified = if orphan {
            Node::verify_orphan(buf.as_bytes(), wanted.block, wanted.birth, uuid)
        } else {
            durable.verify(buf.as_bytes(), wanted)
        };
        if let Err(error) = verified {
            self.damage(depth, error)?;
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
                self.put(depth + 1, &Item::Extent { extent })?;
            }
            return Ok(Vec::new());
        }
        let owns = node.inner().iter().map(Entry::own);
        Ok(node.child_refs(wanted.end).zip(owns).collect())
    }

    async fn journal(&mut self, disk: &Rc<dyn Disk>, superblock: &Superblock) -> Result<()> {
        let Superblock { journal_offset, seal, .. } = *superblock;
        self.put(0, &Item::Journal { seal, offset: journal_offset })?;
        let mut log = LogReader::behind(disk, superblock);
        loop {
            let framed = match log.next().await {
                Ok(Some(framed)) => framed,
                Ok(None) => return Ok(()),
                Err(error) => return self.damage(1, error),
            };
            let (seqno, durable, bytes) = (framed.seqno, framed.durable, framed.bytes);
            self.put(1, &Item::Record { seqno, bytes, durable, record: &framed.record })?;
        }
    }
}
