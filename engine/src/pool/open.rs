//! Opening a pool: newest superblock, catalogue, replay of the journal through the same `apply`
//! as the live path, and a checkpoint, after which the log goes on with a new salt. The time is
//! bounded by the journal, whatever the pool holds. Closing: a last checkpoint, marked clean.
//!
//! Recovery changes nothing on the disk but by that checkpoint, so it can be cut and begun again;
//! and what it begins with is made durable first, so that it is the same then.

use std::rc::Rc;

use futures_util::future::join_all;

use super::core::{OpenOptions, Pool};
use super::create::core_of;
use crate::checkpoint::{Checkpointer, Kind, load};
use crate::crc::crc32;
use crate::disk::{Buf, Disk, RingMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::format::record::{Framed, MapRun, Record};
use crate::format::superblock::Superblock;
use crate::journal::{ReplayLog, lost_record, read_log};
use crate::map;
use crate::space::{Run, TakeError};
use crate::state::Need;
use crate::units::{BLOCK_BYTES, Seqno, to_usize};

/// Records whose nodes are read at the same time.
const WINDOW: usize = 64;
/// Records whose data is verified at the same time, at most 1 MiB each.
const VERIFY: usize = 16;

impl Pool {
    /// Opens a pool. `map_ring` maps the journal at a byte offset of the pool, of a length.
    ///
    /// # Errors
    /// `NotAPool`, `Unsupported`, `Corrupt` (naming the structure and its place), the device's.
    pub async fn open(
        disk: Rc<dyn Disk>,
        map_ring: impl FnOnce(u64, usize) -> Result<Box<dyn RingMemory>>,
        options: OpenOptions,
    ) -> Result<Self> {
        // A killed process may have left a superblock that is not durable yet. What replaces the
        // checkpoint before it must not be on its way before this one is safe.
        disk.sync().await?;
        let superblock = load::superblock(&disk).await?;
        let found = load::catalogue(&disk, &superblock).await?;
        let log = read_records(&disk, &superblock).await?;
        if superblock.clean && !log.is_empty() {
            return Err(Error::corrupt(
                "the pool was closed cleanly, but its journal holds records",
            ));
        }
        let geometry = superblock.geometry;
        let ring_bytes = to_usize(geometry.journal_blocks * BLOCK_BYTES);
        let ring = map_ring(geometry.journal_start().byte_offset(), ring_bytes)?;
        let checkpointer = Checkpointer {
            superblock: superblock.clone(),
            catalogue_blocks: found.catalogue_blocks,
            drops: found.catalogue.drops.clone(),
        };
        let core = core_of(checkpointer, found.catalogue, ring, options)?;
        let pool = Self::attach(core, disk);
        let replayed = log.len();
        pool.replay(log).await?;
        pool.checkpoint_of(Kind { new_salt: true, ..Kind::default() }).await?;
        let salt = pool.core.checkpointer.lock().await.superblock.salt;
        pool.core.lock().journal.set_salt(salt);
        tracing::info!(replayed, generation = superblock.generation.get() + 1, "pool opened");
        Ok(pool)
    }

    /// Stops the background task and writes a last checkpoint, after which there is nothing to
    /// replay. The caller has stopped everything that uses the pool.
    ///
    /// # Errors
    /// The device's.
    pub async fn close(&self) -> Result<()> {
        self.core.lock().closing = true;
        self.core.wanted_event.notify_one();
        self.core.published_event.notify_waiters();
        self.checkpoint_of(Kind { clean: true, ..Kind::default() }).await
    }

    /// Applies the records of the log, reading what they need ahead.
    async fn replay(&self, log: Vec<Framed>) -> Result<()> {
        self.take_named_blocks(&log).await?;
        let mut log = log.into_iter().peekable();
        let mut window = Vec::new();
        while log.peek().is_some() {
            window.extend(log.by_ref().take(WINDOW));
            self.read_ahead(&window).await?;
            for framed in window.drain(..) {
                self.replay_one(framed).await?;
            }
        }
        Ok(())
    }

    /// Blocks that the log names are not free, though the tables say so: set them aside before
    /// any block is taken for a node.
    async fn take_named_blocks(&self, log: &[Framed]) -> Result<()> {
        for framed in log {
            let Record::Map { runs, .. } = &framed.record else { continue };
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
        }
        Ok(())
    }

    async fn read_ahead(&self, window: &[Framed]) -> Result<()> {
        for _ in 0..crate::limits::MAP_LEVELS_MAX {
            let mut missing: Vec<map::Missing> = {
                let inner = self.core.lock();
                let ranges = window.iter().flat_map(ranges);
                let look = |run: MapRun| {
                    let root = inner.state.volume(run.volume)?.entry.root.as_ref();
                    let len = u64::from(run.len);
                    map::prepare_edit(&inner.state.cache, root, run.lba, len).err()
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
                        inner.state.apply(framed.seqno, framed.record);
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

/// The records behind the checkpoint, up to the first that is not there or whose data is not (I2).
async fn read_records(disk: &Rc<dyn Disk>, superblock: &Superblock) -> Result<Vec<Framed>> {
    let ring = read_log(disk, &superblock.geometry).await?;
    let first = superblock.seal.next();
    let mut log: Vec<Framed> =
        ReplayLog::new(&ring, superblock.journal_offset, first, superblock.salt).collect();
    let last = log.last().map_or(superblock.seal, |framed| framed.seqno);
    if let Some(later) = lost_record(&ring, last.next(), superblock.salt) {
        // No power cut takes away what was flushed: the log is not short, it is damaged.
        return Err(Error::corrupt(format!(
            "journal: record {} is damaged, record {} says that it was durable",
            last.next().get(),
            later.get()
        )));
    }
    drop(ring);
    let durable = log.iter().map(|framed| framed.durable).max().unwrap_or(superblock.seal);
    // What was flushed is proved by that; what came later may have lost its data.
    let start = log.partition_point(|framed| framed.seqno <= durable);
    let mut proved = start;
    'verify: for some in log[start..].chunks(VERIFY) {
        let checks = some.iter().map(|framed| has_its_data(disk, superblock, &framed.record));
        for whole in join_all(checks).await {
            if !whole? {
                break 'verify;
            }
            proved += 1;
        }
    }
    log.truncate(proved);
    Ok(log)
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
