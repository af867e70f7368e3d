//! Admission control: which write may allocate blocks, which waits, and which gets ENOSPC.
//!
//! ```text
//!  free = |<- hard reserve ->|<- maps of overwrites ->|<- reserved ->|<- growth ->|
//!         |<------------- growth reserve ------------>|
//! ```
//! All quantities are blocks:
//!
//! ```text
//!  free            blocks that may be allocated (`Space::free`); those set aside for map nodes
//!                  (`State::node_blocks`) and those of writes under way are taken out already
//!  nodes kept      usable / 64, within 20..8192: nodes of changes that no checkpoint has written
//!  catalogues kept 2 * max(next, last catalogue) + slack; slack = usable / 512, within 4..256
//!  hard reserve    (nodes kept - set aside for nodes, at least 0) + catalogues kept
//!  growth reserve  hard reserve + max(usable / 64, 20) + catalogues kept
//!  promised(v)     unmet reservation of v: reservation - its own blocks - its blocks in flight
//!  reserved        sum of promised(v) over all volumes, plus the nodes that a volume with a
//!                  reservation must still copy while it shares its map
//!  promises_max    upper bound of `reserved` that needs no walk over the volumes
//! ```
//! A write of `n` blocks to volume `v` leaves `left = free - n`. It gets its blocks if one holds:
//!
//! ```text
//!  growth      left >= growth reserve + reserved - promised(v)
//!  promised    promised(v) >= n  and  left >= hard reserve
//!  overwrite   the next checkpoint frees n blocks for it  and  left >= hard reserve
//! ```
//! Otherwise it waits while a checkpoint can free blocks, for [`PATIENCE`] checkpoints at most (or
//! [`PATIENCE_OWED`], if promised or an overwrite). Then this request alone gets ENOSPC. Only
//! checkpoints use the hard reserve. The growth limit of a volume is a separate condition: a write
//! beyond it gets ENOSPC at once, unless it replaces only blocks that count as the volume's own.

use std::collections::BTreeMap;

use crate::error::{Error, ErrorKind, Result};
use crate::format::catalogue::{catalogue_bytes, chain_blocks};
use crate::format::record::MapRun;
use crate::map::{self, Missing};
use crate::pool::core::{Inner, Pool, count};
use crate::pool::data::fetch::Hope;
use crate::pool::data::write::Pending;
use crate::runtime::Buf;
use crate::space::{Run, TakeError};
use crate::state::Sharing;
use crate::units::{BLOCK_SIZE, VolumeId, to_u32, to_u64, to_usize};

/// Bounds of the slack of the catalogue: blocks by which drops may lengthen it in one checkpoint.
/// Changes that no checkpoint has settled can become many drops then. The slack is a 512th of the
/// pool within these bounds.
const CATALOGUE_SLACK: (u64, u64) = (4, 256);
/// Minimum of blocks kept for nodes: what one edit of a map of five levels takes.
const NODES_LEAST: u64 = 20;
/// Checkpoints that a growing write waits for before it gets ENOSPC.
pub(in crate::pool) const PATIENCE: usize = 4;
/// The same for a write that is owed its blocks: it overwrites the volume's own blocks, or its
/// volume was promised them. If many such writes do not fit at once, each checkpoint admits some.
const PATIENCE_OWED: usize = 64;
/// Maximum of volumes whose refused writes are counted separately.
const REFUSED_NAMES_MAX: usize = 16;

/// A write whose blocks are allocated.
pub(crate) struct Placed {
    pub(crate) write: Pending,
    /// The allocated runs, in the order of the data.
    pub(crate) runs: Vec<Run>,
    /// Checksums of its blocks.
    pub(crate) sums: Vec<u32>,
    /// Blocks that are not in the map yet.
    pub(crate) blocks: u64,
}

/// Result of a request for blocks.
pub(crate) enum Admission {
    /// The blocks are allocated.
    Placed(Placed),
    /// The write fails with this error.
    Refused(Pending, Error),
    /// The write must wait for this first.
    Wait(Pending, Wait),
}

/// Writes refused for lack of space since the last query, by volume name.
#[derive(Default)]
pub(crate) struct Refusals {
    by_volume: BTreeMap<String, u64>,
}

impl Refusals {
    fn add(&mut self, name: String) {
        if self.by_volume.len() < REFUSED_NAMES_MAX || self.by_volume.contains_key(&name) {
            *self.by_volume.entry(name).or_default() += 1;
        }
    }
}

/// What a write waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wait {
    /// A group must be loaded.
    Group(u32),
    /// The map nodes above the replaced blocks must be loaded.
    Map,
    /// A checkpoint must free blocks.
    Space {
        /// Number of checkpoints published when the wait began.
        published: u64,
        /// The write is owed its blocks: the next checkpoint frees as many, or they were promised.
        owed: bool,
    },
}

/// Whether a write replaces only blocks of the volume's own.
struct Replaced {
    /// By the rules of the growth limit: the write does not make the volume grow.
    counted: bool,
    /// With certainty: the next checkpoint frees as many blocks as the write takes.
    comes_back: bool,
}

impl Replaced {
    const NOTHING: Self = Self { counted: false, comes_back: false };
}

/// The error for a request that needs space when the pool has none left.
pub(in crate::pool) fn pool_full() -> Error {
    let what = "the pool is full; delete volumes or snapshots, or grow it with `pando pool grow`";
    Error::new(ErrorKind::NoSpace, what)
}

/// The error for a write whose volume was deleted.
pub(in crate::pool) fn deleted(volume: VolumeId) -> Error {
    Error::new(ErrorKind::NotFound, format!("{volume} was deleted"))
}

impl Placed {
    /// One buffer per run. A write in one run, the usual case, is not copied.
    pub(crate) fn take_bufs(&mut self) -> Vec<Buf> {
        let whole = std::mem::replace(&mut self.write.buf, Buf::new(1));
        if self.runs.len() == 1 {
            return vec![whole];
        }
        let mut from = 0;
        let mut part = |run: &Run| {
            let mut buf = Buf::new(to_usize(run.len));
            let end = from + to_usize(run.len) * BLOCK_SIZE;
            buf.as_mut_bytes().copy_from_slice(&whole.as_bytes()[from..end]);
            from = end;
            buf
        };
        self.runs.iter().map(&mut part).collect()
    }

    /// Appends the runs in the form of a map record.
    pub(crate) fn map_runs(&self, out: &mut Vec<MapRun>) {
        let mut lba = self.write.lba;
        for run in &self.runs {
            let len = to_u32(run.len);
            out.push(MapRun { volume: self.write.volume, lba, block: run.block, len });
            lba = lba.plus(run.len);
        }
    }

    /// Removes the first `len` blocks, all of them in the first run: they are in the map now.
    pub(crate) fn advance(&mut self, len: u64) {
        self.write.lba = self.write.lba.plus(len);
        self.sums.drain(..to_usize(len));
        self.blocks -= len;
        // The condition on blocks that are in the map now has been checked.
        let left = self.write.lba;
        self.write.unless_changed.retain(|(lba, _)| *lba >= left);
        let first = &mut self.runs[0];
        first.block = first.block.plus(len);
        first.len -= len;
        if first.len == 0 {
            self.runs.remove(0);
        }
    }
}

impl Inner {
    /// Blocks that only checkpoints may use: two catalogues, and the nodes of changes that no
    /// checkpoint has written. Blocks set aside for nodes already count towards the latter.
    pub(crate) fn hard_reserve(&self) -> u64 {
        self.hard_reserve_with(0)
    }

    /// As [`Self::hard_reserve`], for a catalogue whose entries are longer by `entries_bytes`.
    pub(crate) fn hard_reserve_with(&self, entries_bytes: u64) -> u64 {
        let aside = to_u64(self.state.node_blocks.len());
        let catalogues = self.kept_for_catalogues_with(entries_bytes);
        self.kept_for_nodes().saturating_sub(aside) + catalogues
    }

    /// Blocks that growth leaves for checkpoints, overwrites and promises: the hard reserve, nodes
    /// and catalogues once more. The nodes suffice however small the pieces of overwrites are: a
    /// half-full node names 126 blocks, and a replaced block adds two extents at most.
    pub(crate) fn growth_reserve(&self) -> u64 {
        let maps = (self.state.geometry.usable_blocks() / 64).max(NODES_LEAST);
        self.hard_reserve() + maps + self.kept_for_catalogues()
    }

    /// Blocks for the nodes of changes that the next checkpoint writes.
    fn kept_for_nodes(&self) -> u64 {
        (self.state.geometry.usable_blocks() / 64).clamp(NODES_LEAST, 8192)
    }

    /// Blocks for two catalogues, of which the next may be longer than the last.
    pub(crate) fn kept_for_catalogues(&self) -> u64 {
        self.kept_for_catalogues_with(0)
    }

    /// As [`Self::kept_for_catalogues`], for entries that are longer by `entries_bytes`.
    pub(crate) fn kept_for_catalogues_with(&self, entries_bytes: u64) -> u64 {
        let geometry = &self.state.geometry;
        let entries = self.state.entries_bytes + entries_bytes;
        let bytes = catalogue_bytes(entries, self.drops_pending, geometry.groups());
        let next = to_u64(chain_blocks(to_usize(bytes))).max(self.catalogue_blocks);
        let (least, most) = CATALOGUE_SLACK;
        2 * next + (geometry.usable_blocks() / 512).clamp(least, most)
    }

    /// Checks a write and allocates blocks for it.
    pub(crate) fn admit(&mut self, write: Pending) -> Admission {
        let blocks = write.buf.block_count();
        if let Err(error) = self.check_alive() {
            return Admission::Refused(write, error);
        }
        let Some(volume) = self.state.volume(write.volume) else {
            let error = deleted(write.volume);
            return Admission::Refused(write, error);
        };
        if volume.refuses_writes() {
            let what = format!("volume {} is read-only", volume.entry.name);
            return Admission::Refused(write, Error::new(ErrorKind::ReadOnly, what));
        }
        debug_assert!(volume.holds(write.lba, blocks), "the volume has checked the range");
        let may_grow = volume.may_grow(blocks);
        let roomy = self.has_space_to_grow(&write, blocks);
        if may_grow && roomy {
            return self.place(write, blocks);
        }
        let Ok(replaced) = self.replaced_by(&write, blocks) else {
            return Admission::Wait(write, Wait::Map);
        };
        if !may_grow && !replaced.counted {
            let name = self.state.volume(write.volume).map_or("", |v| &v.entry.name);
            let what = format!(
                "volume {name} has reached its growth limit; delete its snapshots and clones, \
                 discard what it does not need, or raise the limit"
            );
            return Admission::Refused(write, Error::new(ErrorKind::NoSpace, what));
        }
        let free = self.state.space.free();
        if roomy || (replaced.comes_back && free >= blocks + self.hard_reserve()) {
            return self.place(write, blocks);
        }
        let published = self.published;
        let owed = replaced.comes_back || self.promised(&write) >= blocks;
        Admission::Wait(write, Wait::Space { published, owed })
    }

    fn place(&mut self, write: Pending, blocks: u64) -> Admission {
        let mut runs = Vec::with_capacity(1);
        let mut left = blocks;
        while left > 0 {
            match self.state.space.take(left) {
                Ok(run) => {
                    left -= run.len;
                    runs.push(run);
                }
                Err(error) => {
                    for run in runs {
                        self.state.space.untake(run);
                    }
                    let wait = match error {
                        TakeError::Load(group) => Wait::Group(group),
                        TakeError::Full => Wait::Space { published: self.published, owed: false },
                    };
                    return Admission::Wait(write, wait);
                }
            }
        }
        if let Some(volume) = self.state.volume_mut(write.volume) {
            volume.inflight_blocks += blocks;
        }
        Admission::Placed(Placed { write, runs, sums: Vec::new(), blocks })
    }

    /// Whether the write is admitted as growth or on the promise to its volume (see the module).
    fn has_space_to_grow(&self, write: &Pending, blocks: u64) -> bool {
        let Some(left) = self.state.space.free().checked_sub(blocks) else { return false };
        let reserve = self.growth_reserve();
        if left >= reserve + self.state.promises_max {
            return true; // Enough whatever is reserved: no need to sum it up.
        }
        let promised = self.promised(write);
        if promised >= blocks {
            return left >= self.hard_reserve();
        }
        left >= reserve + self.state.reserved_blocks() - promised
    }

    /// Blocks that the volume of the write was promised and has not used yet.
    fn promised(&self, write: &Pending) -> u64 {
        self.state.volume(write.volume).map_or(0, |volume| volume.unmet_reservation())
    }

    /// Looks up whether the write replaces only blocks of the volume's own.
    ///
    /// # Errors
    /// The node that must be read first.
    fn replaced_by(&self, write: &Pending, blocks: u64) -> std::result::Result<Replaced, Missing> {
        let Some(volume) = self.state.volume(write.volume) else { return Ok(Replaced::NOTHING) };
        let Some(root) = volume.entry.root.as_ref() else { return Ok(Replaced::NOTHING) };
        let is_own = |shared_at| map::is_own(&self.state.cache, root, shared_at, write.lba, blocks);
        let shared_at = Some(volume.entry.shared_at);
        Ok(match volume.sharing {
            Sharing::Nothing => {
                let own = is_own(None)?;
                Replaced { counted: own, comes_back: own }
            }
            Sharing::Temporary => {
                Replaced { counted: is_own(None)?, comes_back: is_own(shared_at)? }
            }
            Sharing::Family => {
                let own = is_own(shared_at)?;
                Replaced { counted: own, comes_back: own }
            }
        })
    }
}

impl Pool {
    /// Reads the nodes above all blocks that a write replaces.
    async fn load_map_of(&self, write: &Pending) -> Result<()> {
        let mut from = write.lba;
        let end = from.plus(write.buf.block_count());
        while from < end {
            (_, from) = self.extents(write.volume, from, end).await?;
        }
        Ok(())
    }

    fn name_volume(&self, volume: VolumeId, error: Error) -> Error {
        if error.kind() != ErrorKind::NoSpace {
            return error;
        }
        let inner = self.core.lock();
        let name = inner.state.volume(volume).map_or("", |volume| &volume.entry.name);
        Error::new(ErrorKind::NoSpace, format!("volume {name}: {error}"))
    }

    /// Answers a write with an error; `inner` is locked.
    pub(in crate::pool) fn refuse(&self, inner: &mut Inner, write: Pending, error: Error) {
        if error.kind() == ErrorKind::NoSpace {
            count(&self.core.counters.no_space, 1);
            let name = inner.state.volume(write.volume).map(|volume| volume.entry.name.clone());
            inner.refusals.add(name.unwrap_or_default());
        }
        drop(write.done.send(Err(error)));
    }

    /// Writes refused for lack of space since the last call, by volume: 16 volumes at most.
    #[must_use]
    pub fn take_refusals(&self) -> BTreeMap<String, u64> {
        std::mem::take(&mut self.core.lock().refusals).by_volume
    }

    /// Completes a write that could not be placed at once: waits for what it needs and retries.
    pub(crate) async fn write_waiting(&self, mut write: Pending, mut wait: Wait) {
        let mut waited = 0;
        loop {
            let fetched = match wait {
                Wait::Group(group) => self.load_group(group).await,
                Wait::Map => self.load_map_of(&write).await,
                Wait::Space { published, owed } => {
                    waited += 1;
                    let patience = if owed { PATIENCE_OWED } else { PATIENCE };
                    let freed = if waited > patience {
                        Err(pool_full())
                    } else {
                        self.await_space(published, Hope::Writes).await
                    };
                    freed.map_err(|error| self.name_volume(write.volume, error))
                }
            };
            if let Err(error) = fetched {
                return self.refuse(&mut self.core.lock(), write, error);
            }
            let placed = {
                let mut inner = self.core.lock();
                match inner.admit(write) {
                    Admission::Placed(placed) => placed,
                    Admission::Refused(write, error) => {
                        return self.refuse(&mut inner, write, error);
                    }
                    Admission::Wait(same, next) => {
                        (write, wait) = (same, next);
                        continue;
                    }
                }
            };
            return self.write_batch(vec![placed]).await;
        }
    }
}
