//! `apply`: the one door through which the state changes. `prepare` looks first for everything
//! that `apply` will need and changes nothing; what it misses the caller fetches.

use std::sync::Arc;

use super::volumes::{HELD_BLOCKS_MAX, check_labels, check_name, check_reservation, check_size};
use super::{Sharing, State, Volume};
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalogue::{VolumeEntry, entry_bytes};
use crate::format::geometry::Table;
use crate::format::node::NodeRef;
use crate::format::record::{MapRun, NewProperties, NewVolume, Record};
use crate::limits;
use crate::map::{self, Claims, EditContext, FreshNodes, Missing, RefChange, RefDelta};
use crate::space::{Run, Space};
use crate::units::{BlockNo, Lba, Seqno, Size, VolumeId, to_u64};

/// Blocks for nodes that the pool likes to have at hand: 2 MiB.
pub const NODE_RESERVE: usize = 512;

/// What must be there before a record can be applied.
#[derive(Debug)]
pub enum Need {
    /// A node must be read.
    Node(Missing),
    /// This many blocks for new nodes must be set aside.
    NodeBlocks(usize),
    /// The record can never be applied.
    Refused(Error),
}

impl From<Missing> for Need {
    fn from(missing: Missing) -> Self {
        Self::Node(missing)
    }
}

impl From<Error> for Need {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

struct NodeBlocks<'a> {
    blocks: &'a mut Vec<BlockNo>,
    space: &'a mut Space,
}

impl FreshNodes for NodeBlocks<'_> {
    fn take(&mut self) -> BlockNo {
        let block = self.blocks.pop().expect("prepare has counted the blocks");
        self.space.recorded(Run { block, len: 1 });
        block
    }
}

impl State {
    /// Looks for what `record` needs. After `Ok`, [`State::apply`] of it cannot fail.
    ///
    /// # Errors
    /// What to fetch before calling again, or why the record is refused.
    pub fn prepare(&self, record: &Record) -> std::result::Result<(), Need> {
        match record {
            Record::Map { runs, sums } => self.prepare_map(runs, sums),
            Record::Unmap { volume, lba, len } => self.prepare_unmap(*volume, *lba, *len),
            Record::Create(volumes) => Ok(self.check_create(volumes)?),
            Record::Modify(properties) => Ok(self.check_modify(properties)?),
            Record::Delete(id) => Ok(self.known(*id).map(|_| ())?),
        }
    }

    fn known(&self, id: VolumeId) -> Result<&Volume> {
        self.volume(id).ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no {id}")))
    }

    /// Blocks that one edit of a volume's map takes at most: see [`map::NODES_PER_EDIT_MAX`],
    /// with one level more than the map has, because an edit before it in the record may add one.
    #[must_use]
    pub fn nodes_for_edit(&self, id: VolumeId) -> usize {
        let root = self.volume(id).and_then(|volume| volume.entry.root.as_ref());
        let levels = root.map_or(0, |root| usize::from(root.level) + 1);
        (3 * (levels + 1) + 1).min(map::NODES_PER_EDIT_MAX)
    }

    fn prepare_map(&self, runs: &[MapRun], sums: &[u32]) -> std::result::Result<(), Need> {
        let blocks: u64 = runs.iter().map(|r| u64::from(r.len)).sum();
        if blocks != to_u64(sums.len()) || sums.len() > limits::RECORD_BLOCKS_MAX {
            return Err(Error::corrupt("map record: runs and checksums do not agree").into());
        }
        let nodes = runs.iter().map(|run| self.nodes_for_edit(run.volume)).sum();
        if self.node_blocks.len() < nodes {
            return Err(Need::NodeBlocks(nodes));
        }
        let mut claims = Claims::new(self.seal);
        for run in runs {
            let volume = self.known(run.volume)?;
            let len = u64::from(run.len);
            if !volume.holds(run.lba, len) || !self.geometry.holds_run(run.block, len) {
                return Err(Error::corrupt("map record: run out of bounds").into());
            }
            self.prepare_edit(volume, run.lba, len, &mut claims)?;
        }
        Ok(claims.check()?)
    }

    fn prepare_unmap(&self, id: VolumeId, lba: Lba, len: u64) -> std::result::Result<(), Need> {
        let volume = self.known(id)?;
        if !volume.holds(lba, len) {
            return Err(Error::corrupt("unmap record: range out of bounds").into());
        }
        let nodes = self.nodes_for_edit(id);
        if self.node_blocks.len() < nodes {
            return Err(Need::NodeBlocks(nodes));
        }
        let mut claims = Claims::new(self.seal);
        self.prepare_edit(volume, lba, len, &mut claims)?;
        Ok(claims.check()?)
    }

    fn prepare_edit(
        &self,
        volume: &Volume,
        lba: Lba,
        len: u64,
        claims: &mut Claims,
    ) -> std::result::Result<(), Missing> {
        let VolumeEntry { id, shared_at, root, .. } = &volume.entry;
        let meet = |node: &NodeRef| claims.add(*id, *shared_at, node);
        map::prepare_edit(&self.cache, root.as_ref(), lba, len, meet)
    }

    fn check_create(&self, volumes: &[NewVolume]) -> Result<()> {
        if volumes.is_empty() || volumes.len() > limits::GROUP_MAX {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("{} volumes at once, the limit is {}", volumes.len(), limits::GROUP_MAX),
            ));
        }
        if self.volumes.len() + volumes.len() > limits::VOLUMES_MAX {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("the pool holds at most {} volumes and snapshots", limits::VOLUMES_MAX),
            ));
        }
        let entries = volumes.iter().map(|new| entry_bytes(&new.name, &new.labels));
        self.check_entries_bytes(entries.sum())?;
        for (index, new) in volumes.iter().enumerate() {
            check_name(&new.name)?;
            check_size(&new.name, new.size_bytes)?;
            check_labels(&new.name, &new.labels)?;
            check_reservation(&new.name, new.reservation_blocks)?;
            let twice = volumes[..index].iter().any(|v| v.name == new.name || v.id == new.id);
            if twice
                || self.names.contains_key(&new.name)
                || !(self.next_id..limits::VOLUME_ID_MAX).contains(&new.id.get())
            {
                return Err(Error::new(
                    ErrorKind::Exists,
                    format!("volume {}: the name is taken", new.name),
                ));
            }
            if let Some(source) = new.source {
                let source = self.known(source)?;
                if new.size_bytes < source.entry.size_bytes {
                    return Err(Error::invalid(format!(
                        "volume {}: {} are less than the {} of its source {}",
                        new.name,
                        Size(new.size_bytes),
                        Size(source.entry.size_bytes),
                        source.entry.name
                    )));
                }
            }
        }
        Ok(())
    }

    /// A catalogue that no reader takes must never be written.
    fn check_entries_bytes(&self, more: u64) -> Result<()> {
        if self.entries_bytes + more > limits::VOLUME_ENTRIES_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "the names and labels of all volumes take {}, there is no room for {} more of \
                     {}; delete volumes or labels",
                    Size(self.entries_bytes),
                    Size(more),
                    Size(limits::VOLUME_ENTRIES_BYTES_MAX)
                ),
            ));
        }
        Ok(())
    }

    fn check_modify(&self, new: &NewProperties) -> Result<()> {
        let volume = self.known(new.id)?;
        let name = &volume.entry.name;
        check_size(name, new.size_bytes)?;
        check_labels(name, &new.labels)?;
        check_reservation(name, new.reservation_blocks)?;
        let before = entry_bytes(name, &volume.entry.labels);
        let more = entry_bytes(name, &new.labels).saturating_sub(before);
        if more > 0 {
            self.check_entries_bytes(more)?;
        }
        if new.size_bytes < volume.entry.size_bytes {
            return Err(Error::invalid(format!(
                "volume {name}: it has {} and cannot shrink to {}",
                Size(volume.entry.size_bytes),
                Size(new.size_bytes)
            )));
        }
        if volume.entry.snapshot && new.size_bytes != volume.entry.size_bytes {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("volume {name}: a snapshot keeps its size"),
            ));
        }
        Ok(())
    }

    /// Changes the state by record number `seqno`, for which [`State::prepare`] has just said
    /// `Ok`.
    pub fn apply(&mut self, seqno: Seqno, record: Record) {
        assert_eq!(seqno, self.seqno.next(), "records are applied in order and once (I3)");
        self.seqno = seqno;
        match record {
            Record::Map { runs, sums } => self.apply_map(&runs, &sums),
            Record::Unmap { volume, lba, len } => {
                self.edit(volume, lba, len, None);
                self.cache.trim();
            }
            Record::Create(volumes) => {
                for new in volumes {
                    self.apply_create(new);
                }
            }
            Record::Modify(properties) => self.apply_modify(*properties),
            Record::Delete(id) => self.apply_delete(id),
        }
    }

    fn edit(&mut self, id: VolumeId, lba: Lba, len: u64, target: Option<BlockNo>) {
        let volume = self.volumes.get_mut(&id).map(Arc::make_mut).expect("prepared");
        let mut fresh = NodeBlocks { blocks: &mut self.node_blocks, space: &mut self.space };
        let mut context = EditContext {
            cache: &mut self.cache,
            fresh: &mut fresh,
            log: &mut self.log,
            seq: self.seqno,
            seal: self.seal,
            shared_at: volume.entry.shared_at,
        };
        map::edit(&mut context, &mut volume.entry.root, lba, len, target);
    }

    fn apply_map(&mut self, runs: &[MapRun], sums: &[u32]) {
        let mut sums = sums.iter();
        for run in runs {
            for offset in 0..u64::from(run.len) {
                let place = self.geometry.page_of(Table::Sums, run.block.plus(offset));
                let (page, entry) = place.expect("prepared: the run lies in a group");
                self.sums.put(page, entry, *sums.next().expect("prepared: a sum for each block"));
            }
            self.space.recorded(Run { block: run.block, len: u64::from(run.len) });
            self.edit(run.volume, run.lba, u64::from(run.len), Some(run.block));
        }
        self.cache.trim();
    }

    fn apply_create(&mut self, new: NewVolume) {
        let mut root = None;
        let mut frozen_blocks = 0;
        if let Some(source) = new.source {
            let seqno = self.seqno;
            let source = self.volume_mut(source).expect("prepared");
            frozen_blocks = source.own_by_birth();
            source.frozen_blocks += frozen_blocks;
            source.entry.shared_at = seqno;
            root.clone_from(&source.entry.root);
        }
        if let Some(root) = &root {
            self.log.push(RefDelta::node(root.ptr.block, root.ptr.birth, RefChange::NodeUp));
        }
        let entry = VolumeEntry {
            id: new.id,
            name: new.name.clone(),
            size_bytes: new.size_bytes,
            source: new.source,
            snapshot: new.snapshot,
            read_only: new.read_only,
            reservation_blocks: new.reservation_blocks,
            growth_limit_blocks: new.growth_limit_blocks,
            io_limits: new.io_limits,
            labels: new.labels,
            created_at: new.created_at,
            root,
            shared_at: self.seqno,
            held_blocks: 0,
            frozen_blocks,
        };
        self.next_id = self.next_id.max(new.id.get() + 1);
        self.entries_bytes += entry_bytes(&entry.name, &entry.labels);
        self.names.insert(new.name, new.id);
        let mut volume = Volume::new(entry);
        if let Some(source) = new.source.and_then(|id| self.volume(id)) {
            volume.founder = source.founder;
            volume.sharing = Sharing::Family;
        }
        let changed = self.families.add(&volume);
        self.set_sharing(changed);
        self.promises_max += volume.promise_max(self.cache.fanout());
        self.volumes.insert(new.id, Arc::new(volume));
    }

    fn set_sharing(&mut self, changed: impl IntoIterator<Item = (VolumeId, Sharing)>) {
        for (id, sharing) in changed {
            let volume = self.volume_mut(id).expect("members of families exist");
            // A temporary snapshot adds nothing to what a family shares already.
            if sharing != Sharing::Temporary || volume.sharing == Sharing::Nothing {
                volume.sharing = sharing;
            }
        }
    }

    /// Checkpoint `seal` is durable and no deletion is under way: volumes whose copies are gone
    /// share nothing any more.
    pub fn settle_sharing(&mut self, seal: Seqno) {
        for (id, sharing) in self.families.settle(seal) {
            self.volume_mut(id).expect("members of families exist").sharing = sharing;
        }
    }

    fn apply_modify(&mut self, new: NewProperties) {
        let fanout = self.cache.fanout();
        let volume = self.volume_mut(new.id).expect("prepared");
        let sums = |volume: &Volume| {
            let entry = &volume.entry;
            (volume.promise_max(fanout), entry_bytes(&entry.name, &entry.labels))
        };
        let before = sums(volume);
        volume.entry.size_bytes = new.size_bytes;
        volume.entry.read_only = new.read_only;
        volume.entry.reservation_blocks = new.reservation_blocks;
        volume.entry.growth_limit_blocks = new.growth_limit_blocks;
        volume.entry.io_limits = new.io_limits;
        let was = volume.clone();
        volume.entry.labels = new.labels;
        let now = sums(volume);
        let moved = (was.is_temporary() != volume.is_temporary()).then(|| (was, volume.clone()));
        self.promises_max = self.promises_max - before.0 + now.0;
        self.entries_bytes = self.entries_bytes - before.1 + now.1;
        if let Some((was, volume)) = moved {
            self.families.remove(&was, self.seqno);
            let changed = self.families.add(&volume);
            self.set_sharing(changed);
        }
    }

    fn apply_delete(&mut self, id: VolumeId) {
        let volume = self.volumes.remove(&id).expect("prepared");
        self.names.remove(&volume.entry.name);
        self.families.remove(&volume, self.seqno);
        self.promises_max -= volume.promise_max(self.cache.fanout());
        self.entries_bytes -= entry_bytes(&volume.entry.name, &volume.entry.labels);
        self.pass_on_frozen(&volume.entry);
        if let Some(root) = &volume.entry.root {
            self.log.push(RefDelta::node(root.ptr.block, root.ptr.birth, RefChange::NodeDown));
        }
    }

    /// A clone or snapshot is gone. What it froze of its source may still be kept by the next one
    /// after it, which is younger and so holds everything that the source has kept since; if there
    /// is none, by the source alone. A snapshot keeps no more than its map names.
    fn pass_on_frozen(&mut self, gone: &VolumeEntry) {
        let frozen = gone.frozen_blocks;
        let Some(source) = gone.source.filter(|id| frozen > 0 && self.volumes.contains_key(id))
        else {
            return;
        };
        let younger = self.volumes.range(gone.id..);
        let next = younger.map(|(_, v)| v).find(|v| v.entry.source == Some(source));
        let mut given_back = frozen;
        if let Some(next) = next.map(|next| next.entry.id).and_then(|id| self.volume_mut(id)) {
            let all = next.entry.frozen_blocks + frozen;
            let most = if next.entry.snapshot { next.mapped() } else { HELD_BLOCKS_MAX };
            next.entry.frozen_blocks = all.min(most);
            given_back = all - next.entry.frozen_blocks;
        } else if let Some(source) = self.volume_mut(source) {
            let left = source.mapped() - source.own_by_birth();
            source.entry.held_blocks = (source.entry.held_blocks + frozen).min(left);
        }
        self.volume_mut(source).expect("looked up above").frozen_blocks -= given_back;
    }
}

#[cfg(test)]
mod tests;
