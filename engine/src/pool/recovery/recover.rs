//! Replay of the journal when a pool is opened, through the same `apply` as the live path. The log
//! is read three times, a few records at a time, so that memory does not grow with its length:
//!
//! ```text
//! survey   find the end of the log, and up to which record it was known to be durable
//! prove    verify the data of later records, which may be lost: the log ends before the first
//!          record without its data (I2). Blocks that the log names are taken out of the free
//!          ones before any block is taken for a node
//! apply    in order
//! ```

use std::rc::Rc;

use futures_util::future::join_all;

use crate::crc::crc32;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::record::{Framed, MapRun, Record};
use crate::format::superblock::Superblock;
use crate::journal::{LogReader, lost_record};
use crate::map;
use crate::pool::core::Pool;
use crate::runtime::Buf;
use crate::space::{Run, TakeError};
use crate::state::Need;
use crate::units::{Seqno, to_usize};

/// Records whose nodes are read concurrently.
const WINDOW: usize = 64;
/// Records whose data is verified concurrently, at most 1 MiB each.
const VERIFY: usize = 16;

/// The extent of the log after a checkpoint.
#[derive(Clone, Copy)]
pub(in crate::pool) struct Survey {
    /// The last record in the log.
    pub(in crate::pool) last: Seqno,
    /// Records up to this one were known to be durable.
    durable: Seqno,
}

impl Survey {
    /// Reads the log after the checkpoint of a superblock.
    ///
    /// # Errors
    /// `Corrupt` if a record that was durable is missing, or the device's.
    pub(in crate::pool) async fn of(disk: &Rc<dyn Disk>, superblock: &Superblock) -> Result<Self> {
        let mut log = LogReader::behind(disk, superblock);
        let (mut last, mut durable) = (superblock.seal, superblock.seal);
        while let Some(framed) = log.next().await? {
            last = framed.seqno;
            durable = durable.max(framed.durable);
        }
        if let Some(later) = lost_record(disk, superblock, last.next()).await? {
            // A power failure cannot remove what was flushed: the log does not end here, it is
            // damaged.
            return Err(Error::corrupt(format!(
                "journal: record {} is damaged, record {} says that it was durable",
                last.next().get(),
                later.get()
            )));
        }
        Ok(Self { last, durable })
    }
}

impl Pool {
    /// Replays the log from the checkpoint of `superblock` to its end; returns the last record
    /// applied.
    pub(in crate::pool) async fn replay(
        &self,
        superblock: &Superblock,
        survey: Survey,
    ) -> Result<Seqno> {
        let proved = self.prove(superblock, survey).await?;
        let mut log = LogReader::behind(self.disk(), superblock);
        loop {
            let some = log.next_up_to(proved, WINDOW).await?;
            if some.is_empty() {
                return Ok(proved);
            }
            self.read_ahead(&some).await?;
            for framed in some {
                self.replay_one(framed).await?;
            }
        }
    }

    /// The last record whose data is present, as is that of all records before it. Takes their
    /// blocks out of the free ones.
    async fn prove(&self, superblock: &Superblock, survey: Survey) -> Result<Seqno> {
        let mut log = LogReader::behind(self.disk(), superblock);
        let mut proved = superblock.seal;
        loop {
            let some = log.next_up_to(survey.last, VERIFY).await?;
            if some.is_empty() {
                return Ok(proved);
            }
            let checks = some.iter().map(|framed| async {
                // Records that were flushed need no proof.
                Ok(framed.seqno <= survey.durable
                    || has_its_data(self.disk(), superblock, &framed.record).await?)
            });
            let checked: Vec<Result<bool>> = join_all(checks).await;
            for (framed, whole) in some.iter().zip(checked) {
                if !whole? {
                    return Ok(proved);
                }
                self.take_named_blocks(framed).await?;
                proved = framed.seqno;
            }
        }
    }

    /// Takes the blocks that a record names out of the free ones; the tables do not count them yet.
    async fn take_named_blocks(&self, framed: &Framed) -> Result<()> {
        let Record::Map { runs, .. } = &framed.record else { return Ok(()) };
        for run in runs {
            let run = Run { block: run.block, len: u64::from(run.len) };
            loop {
                let taken = self.core.lock().state.space.take_exactly(run);
                match taken {
                    Ok(()) => break,
                    Err(TakeError::Load(group)) => self.load_group(group).await?,
                    Err(TakeError::Full) => {
                        return Err(Error::corrupt(format!(
                            "journal record {}: {} is in use or out of bounds",
                            framed.seqno.get(),
                            run.block
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    async fn read_ahead(&self, window: &[Framed]) -> Result<()> {
        for _ in 0..crate::limits::MAP_LEVELS_MAX {
            let mut missing: Vec<map::Missing> = {
                let inner = self.core.lock();
                let ranges = window.iter().flat_map(ranges);
                let look = |run: MapRun| {
                    let (volume, len) = (inner.state.volume(run.volume)?, u64::from(run.len));
                    // A run outside its volume is refused when its record is applied.
                    let root = volume.entry.root.as_ref().filter(|_| volume.holds(run.lba, len));
                    map::missing_for_edit(&inner.state.cache, root, run.lba, len)
                };
                ranges.filter_map(look).collect()
            };
            missing.sort_unstable_by_key(|node| node.block);
            missing.dedup_by_key(|node| node.block);
            if missing.is_empty() {
                break;
            }
            for loaded in join_all(missing.iter().map(|node| self.load_node(node))).await {
                loaded?;
            }
        }
        Ok(())
    }

    async fn replay_one(&self, framed: Framed) -> Result<()> {
        loop {
            let need = {
                let mut inner = self.core.lock();
                match inner.state.prepare(&framed.record) {
                    Ok(()) => {
                        // With a new sequence number: see "Fresh numbers" in the module `open`.
                        let seqno = inner.state.seqno.next();
                        inner.state.apply(seqno, framed.record);
                        return Ok(());
                    }
                    Err(need) => need,
                }
            };
            self.fetch_for_replay(need, framed.seqno).await?;
        }
    }

    async fn fetch_for_replay(&self, need: Need, seqno: Seqno) -> Result<()> {
        self.fetch(need).await.map_err(|error| match error.kind() {
            ErrorKind::Io => error,
            _ => Error::corrupt(format!("journal record {}: {error}", seqno.get())),
        })
    }
}

fn ranges(framed: &Framed) -> Vec<MapRun> {
    match &framed.record {
        Record::Map { runs, .. } => runs.clone(),
        _ => Vec::new(),
    }
}

/// Whether the data of a record is on the disk. A read error is returned: the data may be there, so
/// the pool must not be opened without it.
async fn has_its_data(
    disk: &Rc<dyn Disk>,
    superblock: &Superblock,
    record: &Record,
) -> Result<bool> {
    let Record::Map { runs, sums } = record else { return Ok(true) };
    let mut sums = sums.iter();
    for run in runs {
        if !superblock.geometry.holds_run(run.block, u64::from(run.len)) {
            return Ok(false);
        }
        let buf = Buf::new(to_usize(u64::from(run.len)));
        let (buf, result) = disk.read(run.block, buf).await;
        result.map_err(|e| e.context("data of a journal record"))?;
        if buf.iter_blocks().any(|block| sums.next() != Some(&crc32(block))) {
            return Ok(false);
        }
    }
    Ok(true)
}
