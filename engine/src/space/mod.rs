//! L2: which blocks are free. Allocation works on bitmaps of loaded groups; the tables on disk
//! change only in a checkpoint. No I/O here: a group that is needed and not loaded is returned to
//! the caller, who reads its reference counts and calls again.
//!
//! ```text
//!  free --take()--> taken --record applied--> counted at the next checkpoint
//!    ^                 `--untake()--> free         (the write failed or was overtaken)
//!    `--Reuse decides-- count fell to 0 in a durable checkpoint
//! ```
//! A run that is being discarded is not free meanwhile (`discard`, [`Space::claim`]).
//! A group whose tables are damaged is quarantined: it has no free blocks, and what is given back to it
//! is leaked, because nothing says which of its blocks are in use ([`Space::quarantine`]).
//! A taken block that no record names is free again after a crash: nothing on disk says taken.

mod alloc;
mod clock;
mod discard;
mod reuse;
mod sums;
mod tables;

pub use alloc::Bitmap;
pub use clock::{Clock, KeyHasher};
pub use reuse::Reuse;
pub use sums::FreshSums;
pub use tables::{MissingTable, Tables};

use crate::format::geometry::Geometry;
use crate::units::{BlockNo, to_u32, to_u64, to_usize};
use discard::FreedUnits;

/// Freed units that [`Space::claim`] looks at in one call.
const CLAIM_LOOKS: usize = 64;
/// The share of a group that is freed in pieces before the group is loaded to look for units among
/// them: a load reads less than a hundredth of what was freed.
const PIECES_SHARE: u64 = 4;
/// Loaded groups that are kept; 8 KiB each at most.
const LOADED_MAX: usize = 256;

/// Consecutive blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First block.
    pub block: BlockNo,
    /// Number of blocks.
    pub len: u64,
}

impl Run {
    /// The block behind the last.
    #[must_use]
    pub const fn end(&self) -> BlockNo {
        self.block.plus(self.len)
    }
}

/// Why no blocks were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakeError {
    /// This group has free blocks and must be loaded first.
    Load(u32),
    /// Nothing is free.
    Full,
}

/// What there is to discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// These free blocks, which nobody else gets before they are given back.
    Run(Run),
    /// This group must be loaded first.
    Load(u32),
    /// Some units are in use again; ask once more.
    Again,
    /// Nothing.
    Nothing,
}

struct Group {
    /// Blocks that may be allocated (loaded), or are believed to be (not loaded).
    free: u64,
    bitmap: Option<Bitmap>,
    /// Blocks taken that are neither in a record nor given back: the bitmap alone knows them.
    outstanding: u64,
    /// The seal whose checkpoint has the last takes in its tables.
    touched: u64,
    /// Blocks that were freed in pieces of units while the bitmap was not loaded.
    pieces: u64,
    /// Its tables are damaged: no block of it is allocated or freed until the pool is opened again.
    quarantined: bool,
}

impl Group {
    /// A group that is not loaded.
    const fn new(free: u64) -> Self {
        Self { free, bitmap: None, outstanding: 0, touched: 0, pieces: 0, quarantined: false }
    }
}

/// The free blocks of the pool.
pub struct Space {
    geometry: Geometry,
    groups: Vec<Group>,
    free: u64,
    outstanding: u64,
    current: usize,
    cursor: u64,
    loaded: usize,
    seals: u64,
    /// What may be discarded, if the pool discards.
    freed: Option<FreedUnits>,
}

impl Space {
    /// A pool with `free[i]` free blocks in group *i*, none loaded.
    #[must_use]
    pub fn new(geometry: Geometry, free: impl Iterator<Item = u64>) -> Self {
        let groups: Vec<Group> = free.map(Group::new).collect();
        let free = groups.iter().map(|g| g.free).sum();
        Self {
            geometry,
            groups,
            free,
            outstanding: 0,
            current: 0,
            cursor: 0,
            loaded: 0,
            seals: 0,
            freed: None,
        }
    }

    /// Notes from now on what becomes free in aligned units of so many blocks, for [`Self::claim`].
    pub fn note_freed(&mut self, unit: u64) {
        self.freed = Some(FreedUnits::new(unit));
    }

    /// Blocks that may be allocated.
    #[must_use]
    pub const fn free(&self) -> u64 {
        self.free
    }

    /// Blocks taken that are neither in a record nor given back.
    #[must_use]
    pub const fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// Whether the group's bitmap is present.
    #[must_use]
    pub fn is_loaded(&self, group: u32) -> bool {
        self.groups[to_usize(u64::from(group))].bitmap.is_some()
    }

    /// Whether a block may be allocated right now; false where the group is not loaded.
    #[must_use]
    pub fn is_free(&self, block: BlockNo) -> bool {
        self.geometry.locate(block).is_some_and(|(group, index)| {
            self.groups[to_usize(group)].bitmap.as_ref().is_some_and(|map| map.is_free(index))
        })
    }

    /// The tables of a group are damaged: it takes no allocations and no frees any more. Returns
    /// false if that was known.
    pub fn quarantine(&mut self, group: u32) -> bool {
        let entry = &mut self.groups[to_usize(u64::from(group))];
        if std::mem::replace(&mut entry.quarantined, true) {
            return false;
        }
        self.free -= entry.free;
        entry.free = 0;
        self.loaded -= usize::from(entry.bitmap.take().is_some());
        true
    }

    /// Number of groups that are quarantined.
    #[must_use]
    pub fn quarantined(&self) -> usize {
        self.groups.iter().filter(|group| group.quarantined).count()
    }

    /// Whether the tables of a group are known to be damaged.
    #[must_use]
    pub fn is_quarantined(&self, group: u32) -> bool {
        self.groups[to_usize(u64::from(group))].quarantined
    }

    /// Hands in the bitmap of a group: free is what has no reference in the last durable
    /// checkpoint and is not waiting in [`Reuse`].
    pub fn install(&mut self, group: u32, bitmap: Bitmap) {
        if self.is_loaded(group) || self.is_quarantined(group) {
            return;
        }
        self.unload_idle();
        let entry = &mut self.groups[to_usize(u64::from(group))];
        self.free = self.free - entry.free + bitmap.free();
        entry.free = bitmap.free();
        entry.bitmap = Some(bitmap);
        self.loaded += 1;
    }

    /// Takes up to `want` consecutive blocks, going on behind the last ones.
    ///
    /// # Errors
    /// A group to load first, or nothing free.
    pub fn take(&mut self, want: u64) -> Result<Run, TakeError> {
        assert!(want > 0, "a run has blocks");
        if self.groups[self.current].free == 0 {
            self.current = self.roomiest().ok_or(TakeError::Full)?;
            self.cursor = 0;
        }
        let group = &mut self.groups[self.current];
        let Some(bitmap) = group.bitmap.as_mut() else {
            return Err(TakeError::Load(to_u32(to_u64(self.current))));
        };
        let (index, len) = bitmap.find(self.cursor, want).expect("free blocks are found");
        let (cursor, free) = (self.cursor, group.free);
        if index < cursor && len < want && self.goes_elsewhere(free) {
            // Once round this group: what is left of it are holes.
            return self.take(want);
        }
        let group = &mut self.groups[self.current];
        let bitmap = group.bitmap.as_mut().expect("loaded above");
        bitmap.set(index, len, false);
        group.free -= len;
        group.outstanding += len;
        self.outstanding += len;
        self.free -= len;
        self.cursor = index + len;
        Ok(Run { block: self.geometry.block_at(to_u64(self.current), index), len })
    }

    /// Marks blocks of loaded groups as taken: records that are replayed name them.
    ///
    /// # Errors
    /// The group to load first; `Full` when a block is not free, so that the journal and the
    /// tables contradict each other.
    pub fn take_exactly(&mut self, run: Run) -> Result<(), TakeError> {
        let (group, index) = self.geometry.locate(run.block).ok_or(TakeError::Full)?;
        let entry = &mut self.groups[to_usize(group)];
        if entry.quarantined {
            // Nothing is allocated there, so the blocks are safe without a bitmap.
            entry.outstanding += run.len;
            self.outstanding += run.len;
            return Ok(());
        }
        let Some(bitmap) = entry.bitmap.as_mut() else {
            return Err(TakeError::Load(to_u32(group)));
        };
        if (index..index + run.len).any(|i| !bitmap.is_free(i)) {
            return Err(TakeError::Full);
        }
        bitmap.set(index, run.len, false);
        entry.free -= run.len;
        entry.outstanding += run.len;
        self.outstanding += run.len;
        self.free -= run.len;
        Ok(())
    }

    /// Taken blocks are named by a record now; the next checkpoint counts them.
    pub fn recorded(&mut self, run: Run) {
        let (group, _) = self.geometry.locate(run.block).expect("only taken blocks are recorded");
        let entry = &mut self.groups[to_usize(group)];
        entry.outstanding -= run.len;
        entry.touched = self.seals + 1;
        self.outstanding -= run.len;
    }

    /// Gives back taken blocks that no record names.
    pub fn untake(&mut self, run: Run) {
        let (group, _) = self.geometry.locate(run.block).expect("only taken blocks come back");
        self.groups[to_usize(group)].outstanding -= run.len;
        self.outstanding -= run.len;
        if let Err(error) = self.release(run) {
            tracing::error!(%error, "a block that was taken is free");
        }
    }

    /// Blocks that [`Reuse`] lets go are free again.
    ///
    /// # Errors
    /// `Corrupt` when one of them is free already: damaged maps or counts have given it up twice.
    pub fn release(&mut self, run: Run) -> crate::error::Result<()> {
        self.give_back(run)?;
        let Some(freed) = &mut self.freed else { return Ok(()) };
        let (group, _) = self.geometry.locate(run.block).expect("it was given back");
        let entry = &mut self.groups[to_usize(group)];
        if entry.quarantined {
            return Ok(());
        }
        let mut pieces = 0;
        for unit in freed.touched(run) {
            let covered = run.block <= unit.block && unit.end() <= run.end();
            let whole = || {
                let (_, index) = self.geometry.locate(unit.block)?;
                let inside = self.geometry.holds_run(unit.block, unit.len);
                Some(inside && entry.bitmap.as_ref()?.all_free(index, unit.len))
            };
            if covered || whole() == Some(true) {
                freed.insert(unit);
            } else {
                pieces += unit.len;
            }
        }
        if entry.bitmap.is_some() {
            return Ok(());
        }
        // The bitmap alone knows which pieces make a unit. It is loaded for many of them at once.
        entry.pieces += pieces.min(run.len);
        let len = self.geometry.group_len(group);
        if entry.pieces >= len / PIECES_SHARE {
            entry.pieces = 0;
            let all = Run { block: self.geometry.block_at(group, 0), len };
            let units = freed.touched(all);
            units.filter(|u| self.geometry.holds_run(u.block, u.len)).for_each(|u| freed.insert(u));
        }
        Ok(())
    }

    /// Takes up to `most` blocks that were freed and not discarded since, for a discard: nobody
    /// writes them before [`Self::unclaim`].
    pub fn claim(&mut self, most: u64) -> Claim {
        let Some(freed) = &mut self.freed else { return Claim::Nothing };
        for _ in 0..CLAIM_LOOKS {
            let Some(mut run) = freed.next() else { return Claim::Nothing };
            if run.len > most {
                return Claim::Nothing;
            }
            let (group, index) = self.geometry.locate(run.block).expect("a unit of one group");
            let entry = &mut self.groups[to_usize(group)];
            if entry.quarantined {
                freed.remove(run.block);
                continue;
            }
            let Some(bitmap) = entry.bitmap.as_mut() else { return Claim::Load(to_u32(group)) };
            let unit = run.len;
            freed.remove(run.block);
            freed.go_on_behind(run);
            if !bitmap.all_free(index, unit) {
                continue; // Allocated since.
            }
            // Between two groups are tables, so units beside each other are in the same.
            while run.len + unit <= most && freed.remove(run.end()) {
                if !bitmap.all_free(index + run.len, unit) {
                    break;
                }
                run.len += unit;
            }
            freed.go_on_behind(run);
            bitmap.set(index, run.len, false);
            entry.free -= run.len;
            self.free -= run.len;
            return Claim::Run(run);
        }
        Claim::Again
    }

    /// The discard of what was claimed is over.
    ///
    /// # Errors
    /// `Corrupt` as for [`Self::release`].
    pub fn unclaim(&mut self, run: Run) -> crate::error::Result<()> {
        self.give_back(run)
    }

    fn give_back(&mut self, run: Run) -> crate::error::Result<()> {
        let (group, index) = self.geometry.locate(run.block).expect("only taken blocks come back");
        let entry = &mut self.groups[to_usize(group)];
        if entry.quarantined {
            return Ok(());
        }
        if let Some(bitmap) = entry.bitmap.as_mut() {
            if (index..index + run.len).any(|index| bitmap.is_free(index)) {
                return Err(crate::error::Error::corrupt(format!(
                    "{} blocks at {} were given up twice; run `pando pool check`",
                    run.len, run.block
                )));
            }
            bitmap.set(index, run.len, true);
        }
        entry.free += run.len;
        self.free += run.len;
        Ok(())
    }

    /// A checkpoint is sealed.
    pub fn sealed(&mut self) {
        self.seals += 1;
    }

    /// The pool has grown.
    pub fn grow(&mut self, geometry: Geometry, free: impl Iterator<Item = u64>) {
        self.geometry = geometry;
        for (index, free) in free.enumerate() {
            if index >= self.groups.len() {
                self.groups.push(Group::new(free));
                self.free += free;
            }
        }
    }

    /// The last group of before has `added` more blocks, all free.
    pub fn lengthen(&mut self, group: u32, added: u64) {
        let entry = &mut self.groups[to_usize(u64::from(group))];
        if entry.quarantined {
            return;
        }
        if let Some(bitmap) = entry.bitmap.as_mut() {
            bitmap.lengthen(added);
        }
        entry.free += added;
        self.free += added;
    }

    /// Sums that are not the sums of what they stand for: for the checker.
    #[must_use]
    pub fn wrong_sums(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for (number, group) in self.groups.iter().enumerate() {
            let Some(bitmap) = &group.bitmap else { continue };
            let is = bitmap.count_free();
            if is != group.free || is != bitmap.free() {
                let kept = group.free;
                wrong.push(format!("group {number}: {is} blocks may be allocated, not {kept}"));
            }
        }
        let is: u64 = self.groups.iter().map(|group| group.free).sum();
        if is != self.free {
            wrong.push(format!("{is} blocks may be allocated, not {}", self.free));
        }
        let is: u64 = self.groups.iter().map(|group| group.outstanding).sum();
        if is != self.outstanding {
            wrong.push(format!("{is} blocks are taken, not {}", self.outstanding));
        }
        wrong
    }

    /// Turns to another group if that has much more room than `free` blocks.
    fn goes_elsewhere(&mut self, free: u64) -> bool {
        let Some(best) = self.roomiest() else { return false };
        let better = best != self.current && self.groups[best].free / 2 > free;
        if better {
            self.current = best;
            self.cursor = 0;
        }
        better
    }

    fn roomiest(&self) -> Option<usize> {
        let groups = self.groups.iter().enumerate();
        let (index, group) = groups.max_by_key(|(i, g)| (g.free, std::cmp::Reverse(*i)))?;
        (group.free > 0).then_some(index)
    }

    /// Forgets the bitmap of a group whose takes are all in the tables.
    fn unload_idle(&mut self) {
        if self.loaded < LOADED_MAX {
            return;
        }
        let (current, seals) = (self.current, self.seals);
        let idle = self.groups.iter_mut().enumerate().find(|(i, g)| {
            g.bitmap.is_some() && *i != current && g.outstanding == 0 && g.touched < seals
        });
        if let Some((_, group)) = idle {
            group.bitmap = None;
            self.loaded -= 1;
        }
    }
}

#[cfg(test)]
mod tests;
