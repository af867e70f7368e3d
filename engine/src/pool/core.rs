//! The shared state of an open pool, and the handle of each thread.
//!
//! ```text
//!  Pool (one per thread) -- Rc<Lane>: the thread's disk, its writes waiting to be gathered
//!     |
//!     `-- Arc<Core> ------ Mutex<Inner>: state + journal, held for microseconds, not across await
//!                    |---- checkpointer: one checkpoint at a time
//!                    `---- events: durable, published, reader, wanted
//! ```

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Notify;

use super::data::live::LiveVolume;
use super::data::place::Refusals;
use super::data::write::Gather;
use super::types::PoolCounters;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::journal::Journal;
use crate::limits::{CASCADE_NODES_MAX, DISCARD_UNIT_BLOCKS};
use crate::pool::checkpoint::Checkpointer;
use crate::runtime::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::runtime::sync::{Counter, Mutex, MutexGuard};
use crate::state::State;
use crate::units::{Generation, Seqno, VolumeId};

/// How a pool is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Bytes for cached nodes and table pages.
    pub cache_bytes: u64,
    /// Discard blocks that become free, with [`Pool::run_discards`].
    pub discard: bool,
    /// Blocks per aligned unit of discard; small only in tests.
    pub discard_unit: u64,
    /// Maximum of entries in a node; below that of the format only in tests.
    pub fanout: crate::map::Fanout,
    /// Dropped nodes that one checkpoint processes; the rest waits for the next. Small only in
    /// tests.
    pub cascade_nodes: usize,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 256 << 20,
            discard: false,
            discard_unit: DISCARD_UNIT_BLOCKS,
            fanout: crate::map::Fanout::FULL,
            cascade_nodes: CASCADE_NODES_MAX,
        }
    }
}

/// State that the lock protects.
pub(crate) struct Inner {
    /// The state of the pool.
    pub state: State,
    /// The journal: appended to in the same critical section in which the state changes (I3).
    pub journal: Journal,
    /// Records up to this one are durable.
    pub durable: Seqno,
    /// Whether a sync of the journal is under way.
    pub syncing: bool,
    /// The error after which nothing is acknowledged (I7).
    pub poisoned: Option<String>,
    /// Checkpoints published since the pool was opened.
    pub published: u64,
    /// Generation of the last durable checkpoint.
    pub generation: Generation,
    /// Whether the pool is being closed: no change is accepted.
    pub closing: bool,
    /// Blocks of the last catalogue.
    pub catalogue_blocks: u64,
    /// Dropped roots and nodes whose children are not released yet.
    pub drops_pending: u64,
    /// Writes refused for lack of space that were not queried yet.
    pub refusals: Refusals,
    /// Of volumes that have been opened as a device and exist.
    pub live: BTreeMap<VolumeId, Arc<LiveVolume>>,
}

/// Counters, incremented without a lock.
#[derive(Default)]
pub(crate) struct Counters {
    /// Reads; this and the others as in [`PoolCounters`].
    pub reads: Counter,
    /// Bytes read.
    pub read_bytes: Counter,
    /// Writes.
    pub writes: Counter,
    /// Bytes written by users.
    pub written_bytes: Counter,
    /// Bytes of data written to the device.
    pub data_bytes: Counter,
    /// Bytes of nodes, tables, catalogue and superblocks written to the device.
    pub metadata_bytes: Counter,
    /// Flushes by users.
    pub flushes: Counter,
    /// Syncs of the device.
    pub syncs: Counter,
    /// Checkpoints.
    pub checkpoints: Counter,
    /// Writes refused for lack of space.
    pub no_space: Counter,
    /// Data blocks that failed checksum verification.
    pub checksum_errors: Counter,
    /// Nodes and table pages read.
    pub metadata_reads: Counter,
    /// Bytes of free blocks discarded.
    pub discarded_bytes: Counter,
    /// How often the lock of the state was taken.
    #[cfg(feature = "testing")]
    pub locks: Counter,
}

pub(crate) fn count(counter: &Counter, by: u64) {
    counter.add(by);
}

/// Shared state of an open pool.
pub struct Core {
    inner: Mutex<Inner>,
    /// One checkpoint at a time; also holds what only checkpoints access.
    pub(crate) checkpointer: tokio::sync::Mutex<Checkpointer>,
    /// Notified when something became durable or the pool was poisoned.
    pub(crate) durable_event: Notify,
    /// Notified when a checkpoint was published, or the pool was poisoned or is closing.
    pub(crate) published_event: Notify,
    /// Notified when a reader of freed blocks or a discard has finished, or the pool was poisoned.
    pub(crate) reader_event: Notify,
    /// Notified when a checkpoint is wanted or the pool is closing.
    pub(crate) wanted_event: Notify,
    /// Data blocks written since the last sync started.
    pub(crate) unsynced_blocks: AtomicU64,
    /// Whether walks of the whole pool must end, because the pool is about to be closed.
    walks_end: AtomicBool,
    /// Counters.
    pub(crate) counters: Counters,
    /// How the pool was opened.
    pub(crate) options: OpenOptions,
    /// Identity of the pool.
    pub(crate) uuid: [u8; 16],
}

impl Core {
    pub(crate) fn new(inner: Inner, checkpointer: Checkpointer, options: OpenOptions) -> Self {
        let uuid = inner.state.uuid;
        Self {
            inner: Mutex::new(inner),
            checkpointer: tokio::sync::Mutex::new(checkpointer),
            durable_event: Notify::new(),
            published_event: Notify::new(),
            reader_event: Notify::new(),
            wanted_event: Notify::new(),
            unsynced_blocks: AtomicU64::new(0),
            walks_end: AtomicBool::new(false),
            counters: Counters::default(),
            options,
            uuid,
        }
    }

    /// Takes the lock. It must not be held across an await.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        #[cfg(feature = "testing")]
        self.counters.locks.add(1);
        self.inner.lock()
    }

    /// Takes the lock unless it is held.
    #[cfg(feature = "testing")]
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, Inner>> {
        self.inner.try_lock()
    }

    /// Poisons the pool after a failed write or flush: nothing is acknowledged from now on (I7).
    pub(crate) fn poison(&self, error: &Error) {
        let mut inner = self.lock();
        if inner.poisoned.is_none() {
            tracing::error!(%error, "pool poisoned: open it again to recover");
            inner.poisoned = Some(error.to_string());
        }
        drop(inner);
        self.durable_event.notify_waiters();
        self.published_event.notify_waiters();
        self.reader_event.notify_waiters();
        self.wanted_event.notify_one();
    }

    /// As [`Self::poison`], if the result is an error.
    pub(crate) fn poison_on(&self, result: &Result<()>) {
        if let Err(error) = result {
            self.poison(error);
        }
    }

    /// Requests a checkpoint from the background task.
    pub(crate) fn want_checkpoint(&self) {
        self.wanted_event.notify_one();
    }

    /// Ends all checks, dumps and space reports under way with an error, because they delay
    /// checkpoints. Called before the pool is closed; no new ones can start after that.
    pub fn end_walks(&self) {
        self.walks_end.store(true, Ordering::Relaxed);
    }

    /// Fails if walks must end; a walk calls it between its steps.
    pub(crate) fn check_walking(&self) -> Result<()> {
        if self.walks_end.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Shutdown, "given up: the pool is being closed"));
        }
        Ok(())
    }

    pub(crate) fn snapshot_counters(&self, journal_bytes: u64) -> PoolCounters {
        let c = &self.counters;
        PoolCounters {
            reads: c.reads.get(),
            read_bytes: c.read_bytes.get(),
            writes: c.writes.get(),
            written_bytes: c.written_bytes.get(),
            data_bytes: c.data_bytes.get(),
            metadata_bytes: c.metadata_bytes.get(),
            journal_bytes,
            flushes: c.flushes.get(),
            syncs: c.syncs.get(),
            checkpoints: c.checkpoints.get(),
            no_space: c.no_space.get(),
            checksum_errors: c.checksum_errors.get(),
            metadata_reads: c.metadata_reads.get(),
            discarded_bytes: c.discarded_bytes.get(),
        }
    }
}

impl Inner {
    /// Fails if the pool accepts no changes.
    pub(crate) fn check_alive(&self) -> Result<()> {
        self.check_not_poisoned()?;
        if self.closing {
            return Err(Error::new(ErrorKind::Shutdown, "the pool is being closed"));
        }
        Ok(())
    }

    /// Fails if the pool is poisoned.
    pub(crate) fn check_not_poisoned(&self) -> Result<()> {
        let Some(reason) = &self.poisoned else { return Ok(()) };
        Err(Error::new(
            ErrorKind::Poisoned,
            format!("the pool stopped after an error and must be opened again: {reason}"),
        )
        .hint("look for a failing device in the kernel log, then restart pandod"))
    }
}

/// The state of one thread.
pub(crate) struct Lane {
    pub(crate) disk: Rc<dyn Disk>,
    pub(crate) gather: RefCell<Gather>,
}

/// A handle of an open pool for one thread; cheap to clone.
#[derive(Clone)]
pub struct Pool {
    pub(crate) core: Arc<Core>,
    pub(crate) lane: Rc<Lane>,
}

impl Pool {
    /// A handle for this thread, with the thread's own access to the disk.
    #[must_use]
    pub fn attach(core: Arc<Core>, disk: Rc<dyn Disk>) -> Self {
        Self { core, lane: Rc::new(Lane { disk, gather: RefCell::new(Gather::default()) }) }
    }

    /// The core that the handles of all threads share.
    #[must_use]
    pub fn core(&self) -> Arc<Core> {
        Arc::clone(&self.core)
    }

    pub(crate) fn disk(&self) -> &Rc<dyn Disk> {
        &self.lane.disk
    }
}
