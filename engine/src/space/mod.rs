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
}

impl Group {
    /// A group that is not loaded.
    const fn new(free: u64) -> Self {
        Self { free, bitmap: None, outstanding: 0, touched: 0, pieces: 0 }
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

    /// Hands in the bitmap of a group: free is what has no reference in the last durable
    /// checkpoint and is not waiting in [`Reuse`].
    pub fn install(&mut self, group: u32, bitmap: Bitmap) {
        if self.is_loaded(group) {
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

    /// The group where the next blocks should come from, when the current one runs out of them
    /// within `ahead` blocks and the next is not loaded.
    #[must_use]
    pub fn wants_load(&self, ahead: u64) -> Option<u32> {
        let loaded: u64 = self.groups.iter().filter(|g| g.bitmap.is_some()).map(|g| g.free).sum();
        if loaded >= ahead.min(self.free) {
            return None;
        }
        let unloaded = self.groups.iter().enumerate().filter(|(_, g)| g.bitmap.is_none());
        let (group, best) = unloaded.max_by_key(|(i, g)| (g.free, std::cmp::Reverse(*i)))?;
        (best.free > 0).then(|| to_u32(to_u64(group)))
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
mod tests {
    use super::*;
    use crate::format::geometry::PAGE_ENTRIES;

    fn free(len: u64) -> Bitmap {
        let mut bitmap = Bitmap::full(len);
        bitmap.set(0, len, true);
        bitmap
    }

    /// Which groups of blocks stay loaded: those whose takes the tables on the disk do not have yet.
    #[test]
    fn a_group_stays_loaded_until_the_tables_have_its_takes() {
        let geometry = Geometry::new(12 + 300 * 1026, 8, 1).expect("a pool of 300 groups");
        let mut space = Space::new(geometry, (0..geometry.groups()).map(|g| geometry.group_len(g)));
        let load = |space: &mut Space, group| space.install(group, free(PAGE_ENTRIES));
        let most = to_u32(to_u64(LOADED_MAX));
        (0..most).for_each(|group| load(&mut space, group));
        space.sealed();
        let run = Run { block: geometry.block_at(1, 7), len: 2 };
        space.take_exactly(run).expect("it is free");
        load(&mut space, most);
        assert!(space.is_loaded(1) && !space.is_loaded(2), "the bitmap alone knows what is taken");
        space.recorded(run);
        load(&mut space, most + 1);
        assert!(space.is_loaded(1) && !space.is_loaded(3), "no checkpoint has the record");
        space.sealed();
        load(&mut space, most + 2);
        assert!(space.is_loaded(1) && !space.is_loaded(4), "the checkpoint is under way");
        space.sealed();
        load(&mut space, most + 3);
        assert!(!space.is_loaded(1), "the tables have it");
        assert_eq!(space.wrong_sums(), Vec::<String>::new());
    }

    /// Pieces are merged over releases; a unit that is in use again, or lies in part among the tables,
    /// is left out.
    #[test]
    fn whole_units_that_were_freed_are_claimed() {
        let geometry = Geometry::new(2100, 8, 1).expect("a pool");
        let mut space = Space::new(geometry, (0..geometry.groups()).map(|g| geometry.group_len(g)));
        space.note_freed(16);
        space.install(0, free(PAGE_ENTRIES));
        assert_eq!(space.claim(64), Claim::Nothing, "what was never in use");
        let start = geometry.block_at(0, 0).get();
        let run = |block, len| Run { block: BlockNo::new(block), len };
        space.take_exactly(run(start, 100)).expect("free");
        assert_eq!((start, start % 16), (16, 0), "the group begins with a unit");
        space.release(run(16, 15)).expect("taken");
        assert_eq!(space.claim(64), Claim::Nothing, "a block of the unit is in use");
        space.release(run(31, 18)).expect("taken");
        assert_eq!(space.claim(15), Claim::Nothing, "less than a unit");
        assert_eq!(space.claim(16), Claim::Run(run(16, 16)), "no more than was asked for");
        assert!(!space.is_free(BlockNo::new(16)), "not before it is given back");
        assert_eq!(space.wrong_sums(), Vec::<String>::new());
        space.unclaim(run(16, 16)).expect("claimed");
        assert!(space.is_free(BlockNo::new(16)));
        assert_eq!(space.claim(64), Claim::Run(run(32, 16)), "once each; half of 48 is in use");
        space.unclaim(run(32, 16)).expect("claimed");
        space.release(run(49, 67)).expect("taken");
        space.take_exactly(run(70, 1)).expect("free");
        assert_eq!(space.claim(640), Claim::Run(run(48, 16)), "71 is in use again");
        space.unclaim(run(48, 16)).expect("claimed");
        assert_eq!(space.claim(640), Claim::Run(run(80, 48)), "runs are merged");
        space.unclaim(run(80, 48)).expect("claimed");
        assert_eq!(space.claim(640), Claim::Nothing);
        space.take_exactly(run(16, 16)).expect("free");
        space.release(run(16, 16)).expect("taken");
        space.take_exactly(run(20, 1)).expect("free");
        assert_eq!(space.claim(640), Claim::Nothing, "20 is in use again");
        assert_eq!(space.wrong_sums(), Vec::<String>::new());
    }

    /// What is known of a group that is not loaded: what came back in one piece, and how much in
    /// smaller ones.
    #[test]
    fn a_group_is_loaded_for_what_was_freed_there() {
        let geometry = Geometry::new(2100, 8, 1).expect("a pool");
        let run = |block, len| Run { block: BlockNo::new(block), len };
        let unloaded = || {
            let groups = (0..geometry.groups()).map(|_| 0);
            let mut space = Space::new(geometry, groups);
            space.note_freed(16);
            space
        };
        let mut space = unloaded();
        space.release(run(16, 8)).expect("believed");
        space.release(run(24, 8)).expect("believed");
        assert_eq!(space.claim(64), Claim::Nothing);
        space.release(run(32, 24)).expect("believed");
        assert_eq!(space.claim(64), Claim::Load(0));
        space.install(0, free(PAGE_ENTRIES));
        assert_eq!(space.claim(64), Claim::Run(run(32, 16)));
        let mut space = unloaded();
        for piece in 0..PAGE_ENTRIES / PIECES_SHARE / 8 {
            assert_eq!(space.claim(64), Claim::Nothing, "piece {piece}");
            space.release(run(16 + 8 * piece, 8)).expect("believed");
        }
        space.release(run(16 + PAGE_ENTRIES / 2, 8)).expect("believed");
        assert_eq!(space.claim(64), Claim::Load(0));
        let mut bitmap = free(PAGE_ENTRIES);
        bitmap.set(20, 1, false);
        space.install(0, bitmap);
        assert_eq!(space.claim(64), Claim::Run(run(16, 16)), "the next is in use in part");
        assert_eq!(space.claim(64), Claim::Run(run(48, 64)));
    }

    #[test]
    fn only_free_blocks_are_taken_and_only_taken_ones_come_back() {
        let geometry = Geometry::new(2100, 8, 1).expect("a pool");
        let mut space = Space::new(geometry, (0..geometry.groups()).map(|g| geometry.group_len(g)));
        let run = |index, len| Run { block: geometry.block_at(0, index), len };
        assert_eq!(space.take_exactly(run(3, 1)), Err(TakeError::Load(0)));
        space.install(0, free(PAGE_ENTRIES));
        space.take_exactly(run(3, 2)).expect("free");
        assert_eq!(space.take_exactly(run(4, 1)), Err(TakeError::Full), "taken already");
        assert_eq!(space.take(PAGE_ENTRIES).map(|run| run.len), Ok(PAGE_ENTRIES - 5));
        assert_eq!(space.take(3), Ok(run(0, 3)));
        assert_eq!(space.take(1), Err(TakeError::Load(1)), "the group is full");
        space.untake(run(0, 3));
        space.release(run(3, 2)).expect("taken");
        assert!(space.release(run(4, 1)).is_err(), "given up twice");
        assert_eq!(space.wrong_sums(), Vec::<String>::new());
    }
}
