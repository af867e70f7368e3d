//! Control operations. Each is one record, which is durable before the operation is acknowledged.
//! Creation is idempotent: a repeated request gets the answer of the first one.

use std::collections::BTreeSet;
use std::ops::Bound;

use crate::error::{Error, ErrorKind, Result};
use crate::format::catalogue::entry_bytes;
use crate::format::geometry::Geometry;
use crate::format::record::{NewProperties, NewVolume, Record};
use crate::limits::LIST_PAGE_MAX;
use crate::pool::checkpoint::Kind;
use crate::pool::core::{Inner, Pool, count};
use crate::pool::data::fetch::Hope;
use crate::pool::data::place::{PATIENCE, pool_full};
use crate::pool::types::{
    CreateVolume, IoLimits, ModifyVolume, PoolCounters, PoolStatus, Source, VolumeInfo,
};
use crate::state::{Volume, check_name, is_temporary};
use crate::units::{BLOCK_BYTES, Lba, Seqno, Size, VolumeId, blocks_for, to_u64};

fn info(volume: &Volume) -> VolumeInfo {
    let entry = &volume.entry;
    VolumeInfo {
        id: entry.id,
        name: entry.name.clone(),
        size_bytes: entry.size_bytes,
        snapshot: entry.snapshot,
        read_only: entry.snapshot || entry.read_only,
        source: entry.source.map_or(Source::Empty, Source::Volume),
        reservation_bytes: entry.reservation_blocks.saturating_mul(BLOCK_BYTES),
        growth_limit_bytes: entry.growth_limit_blocks.saturating_mul(BLOCK_BYTES),
        io_limits: entry.io_limits,
        labels: entry.labels.iter().cloned().collect(),
        created_at: entry.created_at,
        mapped_bytes: volume.mapped().saturating_mul(BLOCK_BYTES),
        own_bytes: volume.own().saturating_mul(BLOCK_BYTES),
    }
}

pub(in crate::pool) fn no_volume(what: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("no volume or snapshot {what}; `pando volume list` shows all"),
    )
}

impl Inner {
    fn existing(&self, request: &CreateVolume) -> Result<Option<VolumeInfo>> {
        let Some(id) = self.state.names.get(&request.name) else { return Ok(None) };
        let volume = self.state.volume(*id).ok_or_else(|| no_volume(&request.name))?;
        let found = info(volume);
        let same = found.source == request.source
            && found.snapshot == request.snapshot
            && request.size_bytes.is_none_or(|size| size == found.size_bytes);
        if same {
            return Ok(Some(found));
        }
        Err(Error::new(
            ErrorKind::Exists,
            format!("volume {}: the name is taken by one with other properties", request.name),
        ))
    }

    fn new_volume(&self, request: &CreateVolume, id: u64) -> Result<NewVolume> {
        let source = match request.source {
            Source::Empty => None,
            Source::Volume(id) => Some(self.state.volume(id).ok_or_else(|| no_volume(id))?),
        };
        if request.snapshot && source.is_none() {
            return Err(Error::invalid(format!("snapshot {}: it needs a source", request.name)));
        }
        let source_size = source.map(|s| s.entry.size_bytes);
        let size_bytes = request
            .size_bytes
            .or(source_size)
            .ok_or_else(|| Error::invalid(format!("volume {}: it needs a size", request.name)))?;
        if request.snapshot && Some(size_bytes) != source_size {
            return Err(Error::invalid(format!(
                "snapshot {}: it has the size of its source",
                request.name
            )));
        }
        Ok(NewVolume {
            id: VolumeId::new(id),
            name: request.name.clone(),
            size_bytes,
            source: source.map(|s| s.entry.id),
            snapshot: request.snapshot,
            read_only: request.read_only,
            reservation_blocks: blocks_for(request.reservation_bytes),
            growth_limit_blocks: blocks_for(request.growth_limit_bytes),
            io_limits: request.io_limits,
            labels: request.labels.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            created_at: request.created_at,
        })
    }

    /// Checks that there is space for the promises to new volumes and for the renewed promises to
    /// their sources. A clone or snapshot keeps what its source has written, so writing that again
    /// takes as many blocks, and nodes for them.
    fn check_promises(&self, new: &[NewVolume]) -> Result<()> {
        let fanout = self.state.cache.fanout();
        let mut more = 0u64;
        // A temporary snapshot will be deleted soon: a backup must not need space for a second
        // copy.
        let lasting = new.iter().filter(|new| !is_temporary(new.snapshot, &new.labels));
        let sources: BTreeSet<VolumeId> = lasting.filter_map(|new| new.source).collect();
        for source in sources.into_iter().filter_map(|id| self.state.volume(id)) {
            let renewed = source.renewed_promise(fanout) - source.promise(fanout);
            more = more.saturating_add(renewed);
            self.check_promise(&source.entry.name, more)?;
        }
        for new in new {
            more = more.saturating_add(new.reservation_blocks);
            let source = new.source.and_then(|id| self.state.volume(id));
            if new.reservation_blocks > 0 && source.is_some_and(|source| source.mapped() > 0) {
                more = more.saturating_add(fanout.nodes_max(blocks_for(new.size_bytes)));
            }
            self.check_promise(&new.name, more)?;
        }
        Ok(())
    }

    /// Checks that the nodes which a discard copies do not use up space that other volumes were
    /// promised. A volume that shares no blocks needs no copies.
    fn check_nodes_of_unmap(&self, volume: &Volume) -> Result<()> {
        let nodes = to_u64(self.state.nodes_for_edit(volume.entry.id));
        let room = self.state.space.free().saturating_sub(self.hard_reserve() + nodes);
        if volume.mapped() == volume.own_by_birth() || room >= self.state.promises_max {
            return Ok(()); // Enough whatever is reserved.
        }
        let fanout = self.state.cache.fanout();
        let others = self.state.reserved_blocks() - volume.promise(fanout);
        if room < others {
            let what = format!(
                "volume {}: a discard would take what other volumes were promised; delete volumes \
                 or snapshots, or grow the pool",
                volume.entry.name
            );
            return Err(Error::new(ErrorKind::NoSpace, what));
        }
        Ok(())
    }

    /// Checks that there is space to promise `more` blocks.
    fn check_promise(&self, name: &str, more: u64) -> Result<()> {
        let free = self.state.space.free();
        let taken = self.growth_reserve() + self.state.reserved_blocks();
        if more > 0 && taken.saturating_add(more) > free {
            let what = format!(
                "volume {name}: its reservation needs {} more, {} are left; lower it, delete \
                 volumes or snapshots, or grow the pool",
                Size(more.saturating_mul(BLOCK_BYTES)),
                Size(free.saturating_sub(taken) * BLOCK_BYTES)
            );
            return Err(Error::new(ErrorKind::NoSpace, what));
        }
        Ok(())
    }
}

impl Pool {
    /// Creates a volume, a clone or a snapshot in constant time, whatever the source holds.
    /// Idempotent: if the request was carried out before, returns the existing volume.
    ///
    /// # Errors
    /// `Exists`, `NotFound` (source), `Invalid`, `Limit`, `NoSpace` (reservation), or the pool's.
    pub async fn create(&self, request: CreateVolume) -> Result<VolumeInfo> {
        let mut made = self.create_group(vec![request]).await?;
        made.pop().ok_or_else(|| Error::invalid("no volume was asked for"))
    }

    /// Creates several volumes, clones or snapshots at one instant, all or none.
    ///
    /// # Errors
    /// As [`Pool::create`]; also `Exists` if only some of them existed before.
    pub async fn create_group(&self, requests: Vec<CreateVolume>) -> Result<Vec<VolumeInfo>> {
        // Names are validated first, so an invalid name never appears in another error.
        requests.iter().try_for_each(|request| check_name(&request.name))?;
        let seqno = self
            .transact_when_free(|inner| {
                let found: Vec<_> =
                    requests.iter().map(|r| inner.existing(r)).collect::<Result<_>>()?;
                if !found.is_empty() && found.iter().all(Option::is_some) {
                    return Ok(None);
                }
                if let Some(old) = found.into_iter().flatten().next() {
                    return Err(Error::new(
                        ErrorKind::Exists,
                        format!("volume {} exists, others of the group do not", old.name),
                    ));
                }
                let next = inner.state.next_id;
                let new = requests.iter().zip(next..).map(|(r, id)| inner.new_volume(r, id));
                let new: Vec<NewVolume> = new.collect::<Result<_>>()?;
                let entries = new.iter().map(|new| entry_bytes(&new.name, &new.labels)).sum();
                if inner.state.space.free() < inner.hard_reserve_with(entries) {
                    return Err(pool_full());
                }
                inner.check_promises(&new)?;
                Ok(Some(Record::Create(new)))
            })
            .await?;
        self.commit(seqno).await?;
        requests.iter().map(|request| self.find(&request.name)).collect()
    }

    /// Makes a record. On ENOSPC it retries after checkpoints that may free blocks, [`PATIENCE`]
    /// times at most.
    async fn transact_when_free(
        &self,
        mut build: impl FnMut(&Inner) -> Result<Option<Record>>,
    ) -> Result<Seqno> {
        let mut waited = 0;
        loop {
            let published = self.core.lock().published;
            let made = self.transact(|inner| Ok((build(inner)?, ()))).await;
            match made {
                Err(error) if error.kind() == ErrorKind::NoSpace && waited < PATIENCE => {
                    waited += 1;
                    // If no checkpoint can free blocks, the first error is the more specific one.
                    self.await_space(published, Hope::Changes).await.map_err(|later| {
                        if later.kind() == ErrorKind::NoSpace { error } else { later }
                    })?;
                }
                made => return made.map(|(seqno, ())| seqno),
            }
        }
    }

    /// The volume or snapshot with this id.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: VolumeId) -> Result<VolumeInfo> {
        let inner = self.core.lock();
        inner.state.volume(id).map(info).ok_or_else(|| no_volume(id))
    }

    /// The volume or snapshot with this name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn find(&self, name: &str) -> Result<VolumeInfo> {
        // An invalid name is not repeated in the error: it can be long or have several lines.
        check_name(name).map_err(|error| Error::new(ErrorKind::NotFound, error.to_string()))?;
        let inner = self.core.lock();
        let id = inner.state.names.get(name);
        id.and_then(|id| inner.state.volume(*id)).map(info).ok_or_else(|| no_volume(name))
    }

    /// Volumes and snapshots sorted by name, after `after`, at most `limit` and [`LIST_PAGE_MAX`];
    /// and, if there are more, the name to continue after.
    #[must_use]
    pub fn list(&self, after: Option<&str>, limit: usize) -> (Vec<VolumeInfo>, Option<String>) {
        let limit = limit.clamp(1, LIST_PAGE_MAX);
        let inner = self.core.lock();
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut names = inner.state.names.range::<str, _>((start, Bound::Unbounded));
        let page = names.by_ref().take(limit).filter_map(|(_, id)| inner.state.volume(*id));
        let page: Vec<VolumeInfo> = page.map(info).collect();
        let more = names.next().is_some();
        let token = page.last().filter(|_| more).map(|last| last.name.clone());
        (page, token)
    }

    /// Changes properties of a volume.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` (a smaller size), `Limit`, `NoSpace` (reservation), or the pool's.
    pub async fn modify(&self, id: VolumeId, change: ModifyVolume) -> Result<VolumeInfo> {
        let seqno = self
            .transact_when_free(|inner| {
                let volume = inner.state.volume(id).ok_or_else(|| no_volume(id))?;
                let entry = &volume.entry;
                if entry.snapshot && change.read_only == Some(false) {
                    return Err(Error::new(
                        ErrorKind::ReadOnly,
                        format!("volume {}: a snapshot is never written; clone it", entry.name),
                    ));
                }
                let reservation = change.reservation_bytes.map(blocks_for);
                // For the current size: growth of the volume does not depend on a promise.
                let fanout = inner.state.cache.fanout();
                let more = reservation.map_or(0, |blocks| volume.promise_of(blocks, fanout));
                let more = more.saturating_sub(volume.promise(fanout));
                inner.check_promise(&entry.name, more)?;
                let mut labels: std::collections::BTreeMap<_, _> =
                    entry.labels.iter().cloned().collect();
                labels.extend(change.labels.clone());
                labels.retain(|key, value| !value.is_empty() || !change.labels.contains_key(key));
                let labels: Vec<_> = labels.into_iter().collect();
                let before = entry_bytes(&entry.name, &entry.labels);
                let longer = entry_bytes(&entry.name, &labels).saturating_sub(before);
                let kept = inner.kept_for_catalogues_with(longer);
                if longer > 0 && inner.state.space.free() < kept {
                    return Err(pool_full());
                }
                let new = NewProperties {
                    id,
                    size_bytes: change.size_bytes.unwrap_or(entry.size_bytes),
                    read_only: change.read_only.unwrap_or(entry.read_only),
                    reservation_blocks: reservation.unwrap_or(entry.reservation_blocks),
                    growth_limit_blocks: change
                        .growth_limit_bytes
                        .map_or(entry.growth_limit_blocks, blocks_for),
                    io_limits: IoLimits {
                        iops: change.iops_limit.unwrap_or(entry.io_limits.iops),
                        bandwidth_bytes: change
                            .bandwidth_limit_bytes
                            .unwrap_or(entry.io_limits.bandwidth_bytes),
                    },
                    labels,
                };
                Ok(Some(Record::Modify(Box::new(new))))
            })
            .await?;
        self.update_throttle(id);
        self.commit(seqno).await?;
        self.get(id)
    }

    /// Deletes a volume or snapshot. It disappears at once; its space is freed in the background.
    ///
    /// # Errors
    /// `NotFound`, or the pool's.
    pub async fn delete(&self, id: VolumeId) -> Result<()> {
        let (seqno, ()) = self
            .transact(|inner| {
                inner.state.volume(id).ok_or_else(|| no_volume(id))?;
                Ok((Some(Record::Delete(id)), ()))
            })
            .await?;
        self.update_throttle(id);
        self.core.want_checkpoint();
        self.commit(seqno).await
    }

    /// Unmaps `len` LBAs from `lba` on: they read as zeros.
    pub(crate) async fn unmap(&self, volume: VolumeId, lba: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let lba = Lba::new(lba);
        self.transact_when_free(|inner| {
            let found = inner.state.volume(volume).ok_or_else(|| no_volume(volume))?;
            if found.entry.root.is_none() {
                return Ok(None);
            }
            inner.check_nodes_of_unmap(found)?;
            Ok(Some(Record::Unmap { volume, lba, len }))
        })
        .await
        .map(|_| ())
    }

    pub(crate) fn count_read(&self, bytes: u64) {
        count(&self.core.counters.reads, 1);
        count(&self.core.counters.read_bytes, bytes);
    }

    pub(crate) fn count_write(&self, bytes: u64) {
        count(&self.core.counters.writes, 1);
        count(&self.core.counters.written_bytes, bytes);
    }

    /// Grows the pool online. A file is extended; a device must have the new size already.
    ///
    /// # Errors
    /// `Invalid` if the pool would shrink, or the device's.
    pub async fn grow(&self, new_size_bytes: u64) -> Result<()> {
        let blocks = new_size_bytes / BLOCK_BYTES;
        let geometry = self.core.lock().state.geometry;
        if blocks < geometry.pool_blocks {
            return Err(Error::invalid(format!(
                "the pool has {} and cannot shrink to {}",
                Size(geometry.pool_blocks * BLOCK_BYTES),
                Size(new_size_bytes)
            )));
        }
        Geometry::new(blocks, geometry.journal_blocks, geometry.group_pages)?;
        self.disk().extend(blocks * BLOCK_BYTES).await?;
        self.checkpoint_of(Kind { pool_blocks: Some(blocks), ..Kind::default() }).await
    }

    /// Counters since the pool was opened.
    #[must_use]
    pub fn counters(&self) -> PoolCounters {
        let journal = self.core.lock().journal.appended_bytes();
        self.core.snapshot_counters(journal)
    }

    /// Summary of the pool.
    #[must_use]
    pub fn status(&self) -> PoolStatus {
        let inner = self.core.lock();
        let state = &inner.state;
        let snapshots = state.volumes.values().filter(|v| v.entry.snapshot).count();
        let waiting: u64 = state.reuse.waiting().map(|run| run.len).sum();
        let discarding = state.reuse.discarding().map_or(0, |run| run.len);
        let freed = state.log.iter().filter(|d| d.change == crate::map::RefChange::DataDown);
        let freed: u64 = freed.map(|d| u64::from(d.count)).sum();
        PoolStatus {
            uuid: state.uuid,
            size_bytes: state.geometry.pool_blocks * BLOCK_BYTES,
            usable_bytes: state.geometry.usable_blocks() * BLOCK_BYTES,
            // Blocks being discarded count as free: they are allocatable when the discard is done.
            free_bytes: (state.space.free() + discarding) * BLOCK_BYTES,
            pending_bytes: (waiting + freed) * BLOCK_BYTES,
            reserve_bytes: inner.growth_reserve() * BLOCK_BYTES,
            provisioned_bytes: state.volumes.values().map(|v| v.entry.size_bytes).sum(),
            reserved_bytes: state.reserved_blocks() * BLOCK_BYTES,
            volumes: to_u64(state.volumes.len() - snapshots),
            snapshots: to_u64(snapshots),
            generation: inner.generation.get(),
            seqno: state.seqno.get(),
            journal_used_bytes: inner.journal.used_bytes(),
            journal_bytes: inner.journal.ring_bytes(),
            deletions_pending: inner.drops_pending,
            poisoned: inner.poisoned.clone(),
        }
    }
}
