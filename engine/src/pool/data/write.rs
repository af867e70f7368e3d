//! The write path. All writes that arrive in one turn of a thread's event loop are gathered: they
//! get one run of fresh blocks and are submitted as one vectored write. Random small writes so
//! reach the disk as a few large sequential ones. A block in use is never written here (I1).
//!
//! ```text
//! 1 admit: bounds, growth limit, reserve; allocate fresh blocks  (lock)
//! 2 write them; meanwhile read the map nodes that will change
//! 3 append the records and apply them, in one critical section   (lock)
//! 4 acknowledge (a write with FUA: after its commit)
//! ```

use futures_util::future::{join, join_all};
use tokio::sync::oneshot;

use crate::crc::crc32;
use crate::error::{Error, ErrorKind, Result};
use crate::format::record::{MapRun, Record};
use crate::limits::RECORD_BLOCKS_MAX;
use crate::pool::core::{Inner, Pool, count};
use crate::pool::data::fetch::Pin;
use crate::pool::data::place::{Admission, Placed, deleted};
use crate::pool::data::record::Obstacle;
use crate::runtime::Buf;
use crate::runtime::executor::{end_of_turn, spawn_local};
use crate::runtime::sync::atomic::Ordering;
use crate::units::{BLOCK_SIZE, BlockNo, Lba, VolumeId, to_u32, to_u64, to_usize};

/// Blocks after which a batch is submitted.
const BATCH_BLOCKS: u64 = 1024;
/// Maximum of runs in one record.
const RECORD_RUNS_MAX: usize = 32;

/// Outcome of a write that did not fail.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The data is in the map.
    Done,
    /// A block that the write was merged with has changed meanwhile: the caller merges again.
    Overtaken,
}

/// A write of whole blocks that waits for its batch.
pub(crate) struct Pending {
    pub(crate) volume: VolumeId,
    pub(crate) lba: Lba,
    pub(crate) buf: Buf,
    /// Blocks that the data was merged with, a read-modify-write. The map must still name them
    /// when the write is recorded.
    pub(crate) unless_changed: Vec<(Lba, Option<BlockNo>)>,
    pub(crate) done: oneshot::Sender<Result<Outcome>>,
}

/// Writes of this thread that wait for the end of the turn.
#[derive(Default)]
pub(crate) struct Gather {
    pending: Vec<Pending>,
    scheduled: bool,
}

impl Pool {
    /// Writes whole blocks.
    pub(crate) async fn write_blocks(
        &self,
        volume: VolumeId,
        lba: Lba,
        buf: Buf,
        unless_changed: Vec<(Lba, Option<BlockNo>)>,
    ) -> Result<Outcome> {
        let (done, answer) = oneshot::channel();
        let schedule = {
            let mut gather = self.lane.gather.borrow_mut();
            gather.pending.push(Pending { volume, lba, buf, unless_changed, done });
            !std::mem::replace(&mut gather.scheduled, true)
        };
        if schedule {
            let pool = self.clone();
            spawn_local(async move {
                end_of_turn().await;
                let pending = {
                    let mut gather = pool.lane.gather.borrow_mut();
                    gather.scheduled = false;
                    std::mem::take(&mut gather.pending)
                };
                pool.write_pending(pending);
            });
        }
        answer.await.map_err(|_| Error::new(ErrorKind::Shutdown, "the write was given up"))?
    }

    /// Places what can be placed at once in batches; each of the rest waits in a task of its own.
    fn write_pending(&self, pending: Vec<Pending>) {
        let mut batch: Vec<Placed> = Vec::new();
        let mut blocks = 0;
        let mut waiting = Vec::new();
        {
            let mut inner = self.core.lock();
            for write in pending {
                match inner.admit(write) {
                    Admission::Placed(placed) => {
                        blocks += placed.write.buf.block_count();
                        batch.push(placed);
                    }
                    Admission::Refused(write, error) => self.refuse(&mut inner, write, error),
                    Admission::Wait(write, wait) => waiting.push((write, wait)),
                }
                if blocks >= BATCH_BLOCKS {
                    self.spawn_batch(std::mem::take(&mut batch));
                    blocks = 0;
                }
            }
        }
        if !batch.is_empty() {
            self.spawn_batch(batch);
        }
        for (write, wait) in waiting {
            let pool = self.clone();
            spawn_local(async move { pool.write_waiting(write, wait).await });
        }
    }

    fn spawn_batch(&self, batch: Vec<Placed>) {
        let pool = self.clone();
        spawn_local(async move { pool.write_batch(batch).await });
    }

    /// Writes the data of a batch, then its records, and completes every write.
    pub(in crate::pool) async fn write_batch(&self, mut batch: Vec<Placed>) {
        for placed in &mut batch {
            placed.sums = placed.write.buf.iter_blocks().map(crc32).collect();
        }
        let (data, _) = {
            let ranges = batch_ranges(&batch);
            join(self.write_data(&mut batch), self.warm(&ranges)).await
        };
        if let Err(error) = data {
            self.core.poison(&error);
            self.abandon(batch, &error);
            return;
        }
        let mut left = batch;
        while !left.is_empty() {
            let (rest, obstacle) = self.record_batch(left);
            left = rest;
            if let Some((obstacle, pin)) = obstacle
                && let Err(error) = self.overcome(obstacle, pin).await
            {
                self.abandon(left, &error);
                return;
            }
        }
        self.sync_if_overdue().await;
    }

    /// Submits the data; adjacent runs form one vectored write.
    async fn write_data(&self, batch: &mut [Placed]) -> Result<()> {
        let mut writes: Vec<(BlockNo, u64, Vec<Buf>)> = Vec::new();
        for placed in batch.iter_mut() {
            let bufs = placed.take_bufs();
            for (run, buf) in placed.runs.iter().zip(bufs) {
                match writes.last_mut() {
                    Some((start, len, bufs)) if start.plus(*len) == run.block => {
                        *len += run.len;
                        bufs.push(buf);
                    }
                    _ => writes.push((run.block, run.len, vec![buf])),
                }
            }
        }
        let blocks: u64 = writes.iter().map(|(_, len, _)| len).sum();
        count(&self.core.counters.data_bytes, blocks * to_u64(BLOCK_SIZE));
        self.core.unsynced_blocks.fetch_add(blocks, Ordering::Relaxed);
        if let [(start, _, bufs)] = writes.as_mut_slice() {
            return self.disk().write(*start, std::mem::take(bufs)).await;
        }
        let writes = writes.into_iter().map(|(start, _, bufs)| self.disk().write(start, bufs));
        join_all(writes).await.into_iter().collect()
    }

    /// Reads the missing nodes that the edits of the ranges will need. An optimization only: what
    /// is still missing when the record is prepared is fetched then.
    async fn warm(&self, ranges: &[(VolumeId, Lba, u64)]) {
        let needed = |inner: &Inner| {
            ranges.iter().any(|(volume, lba, len)| {
                let root = inner.state.volume(*volume).and_then(|v| v.entry.root.as_ref());
                crate::map::missing_for_edit(&inner.state.cache, root, *lba, *len).is_some()
            })
        };
        let _pin = {
            let mut inner = self.core.lock();
            if !needed(&inner) {
                return;
            }
            Pin::new(self, &mut inner)
        };
        let loads = ranges.iter().map(|(volume, lba, len)| self.warm_one(*volume, *lba, *len));
        join_all(loads).await;
    }

    async fn warm_one(&self, volume: VolumeId, lba: Lba, len: u64) {
        loop {
            let missing = {
                let inner = self.core.lock();
                let root = inner.state.volume(volume).and_then(|v| v.entry.root.as_ref());
                crate::map::missing_for_edit(&inner.state.cache, root, lba, len)
            };
            let Some(missing) = missing else { return };
            if self.load_node(&missing).await.is_err() {
                return; // The preparation of the record meets and reports it again.
            }
        }
    }

    /// Records as many writes of the batch as possible in one critical section. Returns the rest
    /// with what is in the way.
    fn record_batch(&self, mut batch: Vec<Placed>) -> (Vec<Placed>, Option<(Obstacle, Pin)>) {
        let mut answers = Vec::with_capacity(batch.len());
        let mut obstacle = None;
        let (wanted, pin) = {
            let mut inner = self.core.lock();
            let mut done = 0;
            while done < batch.len() && obstacle.is_none() {
                if let Err(error) = inner.check_alive() {
                    obstacle = Some(Obstacle::Need(crate::state::Need::Refused(error)));
                    break;
                }
                let take = inner.overtaken_or_group(&mut batch[done..]);
                match take {
                    Group::Gone => {
                        inner.give_back(&batch[done]);
                        answers.push(Err(deleted(batch[done].write.volume)));
                        done += 1;
                    }
                    Group::Overtaken => {
                        inner.give_back(&batch[done]);
                        answers.push(Ok(Outcome::Overtaken));
                        done += 1;
                    }
                    Group::Of(0) => {
                        // The write is larger than a record allows: one piece per record.
                        obstacle = inner.record_piece(&mut batch[done]).err();
                        if obstacle.is_none() && batch[done].runs.is_empty() {
                            answers.push(Ok(Outcome::Done));
                            done += 1;
                        }
                    }
                    Group::Of(count) => match inner.record_group(&batch[done..done + count]) {
                        Ok(()) => {
                            answers.extend((0..count).map(|_| Ok(Outcome::Done)));
                            done += count;
                        }
                        Err(found) => obstacle = Some(found),
                    },
                }
            }
            let pin = obstacle.is_some().then(|| Pin::new(self, &mut inner));
            (inner.wants_checkpoint(), pin)
        };
        if wanted {
            self.core.want_checkpoint();
        }
        let rest = batch.split_off(answers.len());
        for (placed, answer) in batch.into_iter().zip(answers) {
            // If the receiver is gone, nothing waits for the answer.
            drop(placed.write.done.send(answer));
        }
        (rest, obstacle.zip(pin))
    }

    fn abandon(&self, batch: Vec<Placed>, error: &Error) {
        {
            let mut inner = self.core.lock();
            for placed in &batch {
                inner.give_back(placed);
            }
        }
        for placed in batch {
            drop(placed.write.done.send(Err(error.duplicate())));
        }
    }
}

enum Group {
    /// The volume of the first write was deleted meanwhile.
    Gone,
    Overtaken,
    Of(usize),
}

fn batch_ranges(batch: &[Placed]) -> Vec<(VolumeId, Lba, u64)> {
    batch.iter().map(|p| (p.write.volume, p.write.lba, p.blocks)).collect()
}

impl Inner {
    /// What has become of the first write of `batch`, or how many writes, from the first on, go
    /// into one record. 0: the first write is too large for one record.
    fn overtaken_or_group(&self, batch: &mut [Placed]) -> Group {
        let (mut runs, mut blocks, mut nodes, mut count) = (0, 0, 0, 0);
        for placed in batch.iter() {
            if self.state.volume(placed.write.volume).is_none() {
                if count == 0 {
                    return Group::Gone;
                }
                break;
            }
            runs += placed.runs.len();
            blocks += placed.sums.len();
            nodes += placed.runs.len() * self.state.nodes_for_edit(placed.write.volume);
            if runs > RECORD_RUNS_MAX || blocks > RECORD_BLOCKS_MAX {
                break;
            }
            // A pool that is short of space has few blocks for nodes: then each record takes one
            // write, and a write that is scattered over many runs is recorded in pieces.
            if count > 0 && nodes > self.state.node_blocks.len() {
                break;
            }
            if placed.runs.len() > 1 && nodes > self.node_room() {
                break;
            }
            // The condition holds for the state before the record, so its write must come first.
            if !placed.write.unless_changed.is_empty() {
                if count > 0 {
                    break;
                }
                if self.is_overtaken(placed) {
                    return Group::Overtaken;
                }
            }
            count += 1;
        }
        if count == 0 && self.is_overtaken(&batch[0]) {
            return Group::Overtaken;
        }
        Group::Of(count)
    }

    /// Whether the map no longer names a block that the write was merged with. A node that was
    /// evicted since the merge counts as a change.
    fn is_overtaken(&self, placed: &Placed) -> bool {
        let Some(volume) = self.state.volume(placed.write.volume) else { return false };
        placed.write.unless_changed.iter().any(|(lba, expected)| {
            let mut found = Vec::new();
            let root = volume.entry.root.as_ref();
            match crate::map::lookup(&self.state.cache, root, *lba, 1, 1, &mut found) {
                Ok(_) => found.first().map(|extent| extent.block) != *expected,
                Err(_) => true, // Evicted meanwhile: the next merge reads it again.
            }
        })
    }

    fn record_group(&mut self, group: &[Placed]) -> std::result::Result<(), Obstacle> {
        let mut runs = Vec::with_capacity(group.len());
        let mut sums = Vec::with_capacity(group.len());
        for placed in group {
            placed.map_runs(&mut runs);
            sums.extend_from_slice(&placed.sums);
        }
        self.try_record(Record::Map { runs, sums }).map_err(|(_, obstacle)| obstacle)?;
        for placed in group {
            self.landed(placed.write.volume, placed.blocks);
        }
        Ok(())
    }

    /// Records the first blocks of a write that is too large for one record.
    fn record_piece(&mut self, placed: &mut Placed) -> std::result::Result<(), Obstacle> {
        let first = placed.runs[0];
        let len = first.len.min(to_u64(RECORD_BLOCKS_MAX));
        let run = MapRun {
            volume: placed.write.volume,
            lba: placed.write.lba,
            block: first.block,
            len: to_u32(len),
        };
        let sums = placed.sums[..to_usize(len)].to_vec();
        self.try_record(Record::Map { runs: vec![run], sums }).map_err(|(_, o)| o)?;
        self.landed(placed.write.volume, len);
        placed.advance(len);
        Ok(())
    }

    fn landed(&mut self, volume: VolumeId, blocks: u64) {
        if let Some(volume) = self.state.volume_mut(volume) {
            volume.inflight_blocks -= blocks;
        }
    }

    /// Gives back the blocks of a write that goes into no record.
    fn give_back(&mut self, placed: &Placed) {
        for run in &placed.runs {
            self.state.space.untake(*run);
        }
        self.landed(placed.write.volume, placed.blocks);
    }
}
