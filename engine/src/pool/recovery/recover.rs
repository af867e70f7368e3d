//! Replay of the journal when a pool is opened, through the same `apply` as the live path. The log
//! is read three times, each time a few records at once, so that memory does not grow with it:
//!
//! ```text
//! survey   where the log ends, and up to where it was known to be durable
//! prove    what came later may have lost its data: the log ends there (I2); blocks that the log
//!          names are set aside, before any block is taken for a node
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

/// Records whose nodes are read at the same time.
const WINDOW: usize = 64;
/// Records whose data is verified at the same time, at most 1 MiB each.
const VERIFY: usize = 16;

/// How far the log behind a checkpoint goes.
#[derive(Clone, Copy)]
pub(in crate::pool) struct Survey {
    /// The last record that is there.
    pub(in crate::pool) last: Seqno,
    /// Up to here everything was known to be durable.
    durable: Seqno,
}

impl Survey {
    /// Reads the log behind the checkpoint of a superblock.
    ///
    /// # Errors
    /// `Corrupt` when a record that was durable is not there, the device's.
    pub(in crate::pool) async fn of(disk: &Rc<dyn Disk>, superblock: &Superblock) -> Result<Self> {
        let mut log = LogReader::behind(disk, superblock);
        let (mut last, mut durable) = (superblock.seal, superblock.seal);
        while let Some(framed) = log.next().await? {
            last = framed.seqno;
            durable = durable.max(framed.durable);
        }
        if let Some(later) = lost_record(disk, superblock, last.next()).await? {
            // No power cut takes away what was flushed: the log is not short, it is damaged.
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
    /// Brings the state from the checkpoint of `superblock` to the end of the log; returns the
    /// last record applied.
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

    /// The last record of which all data is there, and of all before it. Their blocks are not
    /// free any more.
    async fn prove(&self, superblock: &Superblock, survey: Survey) -> Result<Seqno> {
        let mut log = LogReader::behind(self.disk(), superblock);
        let mut proved = superblock.seal;
        loop {
            let some = log.next_up_to(survey.last, VERIFY).await?;
            if some.is_empty() {
                return Ok(proved);
            }
            let checks = some.iter().map(|framed| async {
                // What was flushed is proved by that.
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

    /// Blocks that a record names are not free, though the tables say so.
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
                    // What leads out of its volume is refused when its turn has come.
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
                        // Under a number of this life: see the module `open`.
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

/// Whether the data that a record names is on the disk. Data that cannot be read just now may be
/// there: the pool is not opened without it.
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
