//! What a shard can do in a race, each with its entry in the history.

use std::sync::Arc;

use pando_engine::device::ZeroFlags;
use pando_engine::disk::sim::Rng;
use pando_engine::error::{Error, ErrorKind, Result};
use pando_engine::pool::{ModifyVolume, Pool};
use pando_engine::units::{BLOCK_BYTES, SECTOR_BYTES, to_u32};
use pando_sim::Op;
use pando_sim::model::{BLOCK_SECTORS, Birth, stamps_of};
use pando_sim::run::{perform, stamped};
use parking_lot::Mutex;

use crate::harness::Blocks;
use crate::history::History;

/// A shard in a race. Operations that fail may have happened, or not.
pub(crate) struct Shard {
    pub(crate) pool: Pool,
    pub(crate) history: Arc<Mutex<History>>,
    pub(crate) rng: Rng,
}

impl Shard {
    /// Notes that the pool is poisoned, if the answer says so.
    fn told<T>(&self, answer: Result<T>) -> Result<T> {
        if answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::Poisoned) {
            self.history.lock().poisoned();
        }
        answer
    }

    /// Writes sectors.
    pub(crate) async fn try_write(
        &self,
        volume: &str,
        first: u64,
        count: u64,
        fua: bool,
    ) -> Result<()> {
        let device = self.pool.device(self.pool.find(volume)?.id)?;
        let asked = self.history.lock().ask(volume, first, count, false);
        let (buf, len) = stamped(first, count, asked.stamp);
        self.told(device.write(first * SECTOR_BYTES, len, buf, fua).await)?;
        let mut history = self.history.lock();
        if fua {
            // What was acknowledged before the question is covered as well.
            history.durable_since(asked.at);
        }
        history.acknowledge(asked);
        Ok(())
    }

    /// Writes sectors of a volume that stays.
    pub(crate) async fn write(&self, volume: &str, first: u64, count: u64) {
        self.try_write(volume, first, count, false).await.unwrap_or_else(|e| panic!("write: {e}"));
    }

    /// Writes sectors of a volume that stays, if there is space.
    pub(crate) async fn write_or_not(&self, volume: &str, first: u64, count: u64) {
        tolerate(self.try_write(volume, first, count, false).await, &[ErrorKind::NoSpace]);
    }

    /// Writes a whole block of a volume that stays.
    pub(crate) async fn write_block(&self, volume: &str, block: u64) {
        self.write(volume, block * BLOCK_SECTORS, BLOCK_SECTORS).await;
    }

    /// Discards blocks, or writes zeros to them.
    pub(crate) async fn try_zero(
        &self,
        volume: &str,
        block: u64,
        blocks: u64,
        discard: bool,
    ) -> Result<()> {
        let device = self.pool.device(self.pool.find(volume)?.id)?;
        let (first, count) = (block * BLOCK_SECTORS, blocks * BLOCK_SECTORS);
        let asked = self.history.lock().ask(volume, first, count, true);
        let (offset, len) = (block * BLOCK_BYTES, blocks * BLOCK_BYTES);
        if discard {
            device.discard(offset, len, false).await?;
        } else {
            let flags = ZeroFlags { fua: false, no_hole: false };
            device.write_zeroes(offset, len, flags).await?;
        }
        self.history.lock().acknowledge(asked);
        Ok(())
    }

    /// Discards blocks of a volume that stays.
    pub(crate) async fn discard(&self, volume: &str, block: u64, blocks: u64) {
        let done = self.try_zero(volume, block, blocks, true).await;
        done.unwrap_or_else(|e| panic!("discard: {e}"));
    }

    /// Reads blocks and checks each against the history.
    pub(crate) async fn try_read(&self, volume: &str, block: u64, blocks: u64) -> Result<()> {
        let device = self.pool.device(self.pool.find(volume)?.id)?;
        let asked_at = self.history.lock().moment();
        let read = device.read(block * BLOCK_BYTES, to_u32(blocks * BLOCK_BYTES)).await?;
        let mut seen = Blocks::new();
        stamps_of(read.bytes(), block * BLOCK_SECTORS, &mut seen)
            .unwrap_or_else(|e| panic!("{volume}: {e}"));
        let mut history = self.history.lock();
        for block in block..block + blocks {
            let stamps = seen.get(&block).copied().unwrap_or_default();
            history.check_read(volume, block, &stamps, asked_at);
        }
        Ok(())
    }

    /// Reads blocks of a volume that stays.
    pub(crate) async fn read(&self, volume: &str, block: u64, blocks: u64) {
        let done = self.try_read(volume, block, blocks).await;
        done.unwrap_or_else(|e| panic!("read: {e}"));
    }

    /// Asks which of the first `blocks` blocks are mapped.
    pub(crate) async fn mapped(&self, volume: &str, blocks: u64) {
        let device = self.pool.device(self.pool.find(volume).expect("it stays").id).expect("so");
        let asked_at = self.history.lock().moment();
        let runs = device.mapped_runs(0, blocks * BLOCK_BYTES, 100).await.expect("a map");
        let mut history = self.history.lock();
        history.moment();
        for run in runs {
            for block in run.offset / BLOCK_BYTES..(run.offset + run.len) / BLOCK_BYTES {
                history.check_mapped(volume, block, run.mapped, asked_at);
            }
        }
    }

    /// Asks in which of the first `blocks` blocks it differs from a copy from before the race.
    pub(crate) async fn changed(&self, volume: &str, copy: &str, blocks: u64) {
        let id = |name| self.pool.find(name).expect("it stays").id;
        let asked_at = self.history.lock().moment();
        let (runs, next) =
            self.pool.changed(Some(id(copy)), id(volume), 0, 100).await.expect("a map");
        assert_eq!(next, None, "there are few runs");
        let mut history = self.history.lock();
        history.moment();
        for block in 0..blocks {
            let at = block * BLOCK_BYTES;
            let changed = runs.iter().any(|run| (run.offset..run.offset + run.len).contains(&at));
            history.check_changed(volume, block, changed, asked_at);
        }
    }

    /// A flush.
    pub(crate) async fn try_flush(&self) -> Result<()> {
        let asked_at = self.history.lock().moment();
        self.told(self.pool.flush().await)?;
        self.history.lock().durable_since(asked_at);
        Ok(())
    }

    /// A flush of a pool that is well.
    pub(crate) async fn flush(&self) {
        self.try_flush().await.unwrap_or_else(|e| panic!("flush: {e}"));
    }

    /// A checkpoint, which implies a flush.
    pub(crate) async fn try_checkpoint(&self) -> Result<()> {
        let asked_at = self.history.lock().moment();
        self.told(self.pool.checkpoint().await)?;
        self.history.lock().durable_since(asked_at);
        Ok(())
    }

    /// A checkpoint of a pool that is well.
    pub(crate) async fn checkpoint(&self) {
        self.try_checkpoint().await.unwrap_or_else(|e| panic!("checkpoint: {e}"));
    }

    /// Takes copies, all at one instant: names and sources.
    pub(crate) async fn try_copy(&self, copies: &[(&str, &str)], snapshot: bool) -> Result<()> {
        let owned: Vec<(String, String)> =
            copies.iter().map(|(name, source)| ((*name).into(), (*source).into())).collect();
        let birth = |(name, source): &(String, String)| Birth {
            name: name.clone(),
            size_bytes: None,
            source: Some(source.clone()),
            snapshot,
        };
        let op = Op::Create(owned.iter().map(birth).collect());
        let number = self.history.lock().ask_copies(&owned);
        perform(&self.pool, &op, 0).await?;
        self.history.lock().acknowledge_copies(number);
        Ok(())
    }

    /// Takes copies of volumes that stay.
    pub(crate) async fn copy(&self, copies: &[(&str, &str)], snapshot: bool) {
        self.try_copy(copies, snapshot).await.unwrap_or_else(|e| panic!("copy: {e}"));
    }

    /// Changes the limit of requests in a second of a volume that exists.
    pub(crate) async fn limit(&self, volume: &str, iops: u64) {
        limit(&self.pool, volume, iops).await;
    }

    /// Deletes a volume.
    pub(crate) async fn try_delete(&self, volume: &str) -> Result<()> {
        let id = self.pool.find(volume)?.id;
        let asked_at = self.history.lock().ask_end(volume);
        self.pool.delete(id).await?;
        self.history.lock().acknowledge_end(volume, asked_at);
        Ok(())
    }

    /// Deletes a volume of a pool that is well.
    pub(crate) async fn delete(&self, volume: &str) {
        self.try_delete(volume).await.unwrap_or_else(|e| panic!("delete: {e}"));
    }
}

/// Changes the limit of requests in a second of a volume that exists.
pub(crate) async fn limit(pool: &Pool, volume: &str, iops: u64) {
    let id = pool.find(volume).expect("it exists").id;
    let change = ModifyVolume { iops_limit: Some(iops), ..ModifyVolume::default() };
    pool.modify(id, change).await.expect("a limit");
}

/// Lets pass what went well and the errors of certain kinds.
pub(crate) fn tolerate(result: Result<()>, kinds: &[ErrorKind]) -> bool {
    let unexpected = |error: &Error| !kinds.contains(&error.kind());
    match result {
        Ok(()) => true,
        Err(error) if unexpected(&error) => panic!("unexpected: {error}"),
        Err(_) => false,
    }
}
