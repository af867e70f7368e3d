//! f09: blocks are taken, referred to, given up, in the open pool's own structures, with checkpoints
//! and ends of the process between. A map from block to count says what is in use. Nothing that is in
//! use now, or in the last durable state, or that a reader or a discard still holds, is handed out; and
//! what nobody holds comes back.
//!
//! ```text
//! which (1); then 4 bytes an operation: kind, which block, how many, more
//! ```
//! Two ways: `Space` and `Reuse` by themselves, with the checkpoint played by the model; and a whole
//! pool whose log of changes of counts is written by the input, so that netting, tables and bitmaps are
//! the real ones.

use std::collections::{BTreeMap, BTreeSet};

use super::input::empty_pool;
use super::ops::modulo;
use super::{Input, Reached};
use crate::run::Config;
use pando_engine::disk::sim::{SimDisk, SimImage, SimOptions};
use pando_engine::format::geometry::{Geometry, Table};
use pando_engine::format::group::{BlockType, COUNT_MASK};
use pando_engine::format::node::Extent;
use pando_engine::map::{RefChange, RefDelta};
use pando_engine::pool::Pool;
use pando_engine::space::{Bitmap, Claim, Reuse, Run, Space, TakeError};
use pando_engine::units::{BlockNo, Lba, Seqno, to_u32, to_u64};

/// What the corpus must come to.
pub(super) const REACHES: &[&str] = &[
    "checkpoints",
    "crashes",
    "discards",
    "full",
    "groups loaded",
    "pool checkpoints",
    "pool crashes",
    "pool takes",
    "readers",
    "reused",
    "takes",
];
/// Blocks of a unit that is discarded.
const DISCARD_UNIT: u64 = 4;
/// Operations of one input.
const OPS_MAX: usize = 400;
/// Operations on a whole pool.
const POOL_OPS_MAX: usize = 80;

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    if input.byte() & 1 == 0 {
        let mut alone = Alone::new(reached);
        for _ in 0..OPS_MAX {
            if input.is_empty() {
                break;
            }
            alone.step(Raw::of(&mut input));
        }
        alone.all_comes_back();
    } else {
        whole(&mut input, reached);
    }
}

/// One operation's bytes.
#[derive(Clone, Copy, Debug)]
struct Raw {
    kind: u8,
    which: u8,
    len: u8,
    more: u8,
}

impl Raw {
    fn of(input: &mut Input<'_>) -> Self {
        Self { kind: input.byte(), which: input.byte(), len: input.byte(), more: input.byte() }
    }
}

/// The model: every block is in one of these, or free.
#[derive(Clone, Default)]
struct Model {
    /// Taken, and named by no record.
    taken: Vec<Run>,
    /// Counts of now, and of the last durable checkpoint.
    now: BTreeMap<BlockNo, u64>,
    durable: BTreeMap<BlockNo, u64>,
    /// Freed by a durable checkpoint and not let go of: with the readers from before.
    freed: Vec<(Vec<Run>, BTreeSet<u64>)>,
    /// Free, and being discarded.
    discarding: Option<Run>,
    /// Readers under way, by their own numbers, with their tokens.
    readers: BTreeMap<u64, u64>,
    next_reader: u64,
}

impl Model {
    fn holds(&self, block: BlockNo) -> bool {
        let within = |run: &Run| block >= run.block && block < run.block.plus(run.len);
        self.now.contains_key(&block)
            || self.durable.contains_key(&block)
            || self.taken.iter().any(within)
            || self.freed.iter().any(|(runs, _)| runs.iter().any(within))
            || self.discarding.iter().any(within)
    }

    /// Blocks that are not free.
    fn used(&self) -> u64 {
        let counted: BTreeSet<&BlockNo> = self.now.keys().chain(self.durable.keys()).collect();
        let freed = self.freed.iter().flat_map(|(runs, _)| runs);
        let runs = self.taken.iter().chain(freed).chain(&self.discarding);
        to_u64(counted.len()) + runs.map(|run| run.len).sum::<u64>()
    }
}

/// `Space` and `Reuse` by themselves.
struct Alone<'a> {
    geometry: Geometry,
    space: Space,
    reuse: Reuse,
    model: Model,
    reached: &'a mut Reached,
}

impl<'a> Alone<'a> {
    fn new(reached: &'a mut Reached) -> Self {
        // Two groups, the second a short one.
        let geometry = Geometry::new(8 + 4 + 1026 + 6 + 90, 8, 1).expect("a small pool");
        let space = Self::space(geometry, &Model::default());
        Self { geometry, space, reuse: Reuse::default(), model: Model::default(), reached }
    }

    /// What a pool has after it was opened: the counts of the tables.
    fn space(geometry: Geometry, model: &Model) -> Space {
        let free = (0..geometry.groups()).map(|group| {
            let counted =
                |block: &&BlockNo| geometry.locate(**block).is_some_and(|(g, _)| g == group);
            geometry.group_len(group) - to_u64(model.durable.keys().filter(counted).count())
        });
        let mut space = Space::new(geometry, free);
        space.note_freed(DISCARD_UNIT);
        space
    }

    /// As `Pool::load_group`: free is what has no reference in the last durable checkpoint and is
    /// not waiting.
    fn load(&mut self, group: u32) {
        let len = self.geometry.group_len(group.into());
        let mut bitmap = Bitmap::full(len);
        let waiting: Vec<Run> = self.reuse.waiting().copied().collect();
        for index in 0..len {
            let block = self.geometry.block_at(group.into(), index);
            let waits = waiting.iter().any(|r| block >= r.block && block < r.block.plus(r.len));
            if !self.model.durable.contains_key(&block) && !waits {
                bitmap.set(index, 1, true);
            }
        }
        self.space.install(group, bitmap);
        self.reached.note("groups loaded");
    }

    fn step(&mut self, raw: Raw) {
        match raw.kind % 12 {
            0 | 1 => self.take(1 + u64::from(raw.len % 40)),
            2 => self.record(raw),
            3 => self.untake(raw),
            4 => self.refer(raw),
            5 | 6 => self.give_up(raw),
            7 => self.checkpoint(),
            8 => {
                let token = self.reuse.pin();
                self.model.readers.insert(self.model.next_reader, token);
                self.model.next_reader += 1;
                self.reached.note("readers");
            }
            9 => self.unpin(raw),
            10 => self.discard(raw),
            _ => self.crash(raw),
        }
        self.recycle();
        assert_eq!(self.space.wrong_sums(), Vec::<String>::new());
        self.count_free();
    }

    /// The sums agree with the model, where all groups are loaded.
    fn count_free(&self) {
        let loaded = (0..to_u32(self.geometry.groups())).all(|group| self.space.is_loaded(group));
        if loaded {
            let free = self.geometry.usable_blocks() - self.model.used();
            assert_eq!(self.space.free(), free, "blocks that may be taken");
        }
    }

    fn take(&mut self, want: u64) {
        loop {
            match self.space.take(want) {
                Ok(run) => {
                    assert!(run.len > 0 && run.len <= want, "{run:?} of {want}");
                    assert!(self.geometry.holds_run(run.block, run.len), "{run:?} is in no group");
                    for block in (0..run.len).map(|offset| run.block.plus(offset)) {
                        assert!(!self.model.holds(block), "{block} is in use and handed out");
                    }
                    self.model.taken.push(run);
                    return self.reached.note("takes");
                }
                Err(TakeError::Load(group)) => {
                    assert!(!self.space.is_loaded(group), "group {group} is loaded");
                    self.load(group);
                }
                Err(TakeError::Full) => {
                    let used = self.model.used();
                    assert_eq!(used, self.geometry.usable_blocks(), "full, and is not");
                    return self.reached.note("full");
                }
            }
        }
    }

    /// A record names a run that was taken.
    fn record(&mut self, raw: Raw) {
        if self.model.taken.is_empty() {
            return;
        }
        let at = modulo(raw.which.into(), self.model.taken.len());
        let run = self.model.taken.swap_remove(at);
        self.space.recorded(run);
        for block in (0..run.len).map(|offset| run.block.plus(offset)) {
            self.model.now.insert(block, 1);
        }
    }

    fn untake(&mut self, raw: Raw) {
        if self.model.taken.is_empty() {
            return;
        }
        let at = modulo(raw.which.into(), self.model.taken.len());
        let run = self.model.taken.swap_remove(at);
        self.space.untake(run);
    }

    fn refer(&mut self, raw: Raw) {
        let at = modulo(raw.which.into(), self.model.now.len());
        if let Some(count) = self.model.now.values_mut().nth(at) {
            *count += 1;
        }
    }

    /// Some blocks lose a reference. One that loses its last stays until a checkpoint without it.
    fn give_up(&mut self, raw: Raw) {
        let at = modulo(raw.which.into(), self.model.now.len());
        let len = 1 + usize::from(raw.len % 16);
        let blocks: Vec<BlockNo> = self.model.now.keys().copied().skip(at).take(len).collect();
        for block in blocks {
            let count = self.model.now.get_mut(&block).expect("listed");
            *count -= 1;
            if *count == 0 {
                self.model.now.remove(&block);
                // One that no checkpoint has seen is freed by the next as well.
                self.model.durable.entry(block).or_insert(0);
            }
        }
    }

    /// A checkpoint is sealed, written and durable.
    fn checkpoint(&mut self) {
        self.space.sealed();
        let gone = |block: &&BlockNo| !self.model.now.contains_key(*block);
        let freed: Vec<BlockNo> = self.model.durable.keys().filter(gone).copied().collect();
        let mut runs: Vec<Run> = Vec::new();
        for block in freed {
            let group = |block| self.geometry.locate(block).map(|(group, _)| group);
            match runs.last_mut() {
                Some(last)
                    if last.block.plus(last.len) == block && group(last.block) == group(block) =>
                {
                    last.len += 1;
                }
                _ => runs.push(Run { block, len: 1 }),
            }
        }
        self.model.durable = self.model.now.clone();
        if !runs.is_empty() {
            let readers = self.model.readers.keys().copied().collect();
            self.model.freed.push((runs.clone(), readers));
        }
        self.reuse.freed(runs);
        self.reached.note("checkpoints");
    }

    fn unpin(&mut self, raw: Raw) {
        let at = modulo(raw.which.into(), self.model.readers.len());
        let Some((&number, &token)) = self.model.readers.iter().nth(at) else { return };
        self.model.readers.remove(&number);
        self.reuse.unpin(token);
        for (_, readers) in &mut self.model.freed {
            readers.remove(&number);
        }
    }

    /// A discard begins, or the one under way ends.
    fn discard(&mut self, raw: Raw) {
        if self.reuse.discarding().is_some() {
            return self.end_discard();
        }
        let most = DISCARD_UNIT + u64::from(raw.len);
        match self.space.claim(most) {
            Claim::Run(run) => {
                assert!(
                    run.len <= most && run.len.is_multiple_of(DISCARD_UNIT),
                    "{run:?} of {most}"
                );
                for block in (0..run.len).map(|offset| run.block.plus(offset)) {
                    assert!(!self.model.holds(block), "{block} is in use and discarded");
                }
                self.reuse.begin_discard(run);
                self.model.discarding = Some(run);
                self.reached.note("discards");
            }
            Claim::Load(group) => self.load(group),
            Claim::Again | Claim::Nothing => {}
        }
    }

    fn end_discard(&mut self) {
        let over = self.reuse.end_discard();
        assert_eq!(over, self.model.discarding.take());
        if let Some(run) = over {
            self.space.unclaim(run).expect("claimed once");
        }
    }

    fn recycle(&mut self) {
        for run in self.reuse.reusable() {
            let batch = self.model.freed.iter_mut().find(|(runs, _)| runs.contains(&run));
            let (runs, readers) = batch.expect("what is let go of was freed");
            assert!(readers.is_empty(), "{run:?} is let go of while it is read");
            runs.retain(|known| *known != run);
            self.space.release(run).expect("freed once");
            self.reached.add("reused", run.len);
        }
        self.model.freed.retain(|(runs, _)| !runs.is_empty());
    }

    /// The process ends. What was recorded since the checkpoint is replayed, or it is not.
    fn crash(&mut self, raw: Raw) {
        let replayed = raw.more & 1 == 1;
        self.model.taken.clear();
        self.model.freed.clear();
        self.model.discarding = None;
        self.model.readers.clear();
        // Made and given up since the checkpoint.
        let unseen = |(block, count): (&BlockNo, &u64)| (*count == 0).then_some(*block);
        let unseen: Vec<BlockNo> = self.model.durable.iter().filter_map(unseen).collect();
        self.model.durable.retain(|_, count| *count > 0);
        self.reuse = Reuse::default();
        self.space = Self::space(self.geometry, &self.model);
        if replayed {
            let counted = |block: &BlockNo| self.model.durable.contains_key(block);
            let now = self.model.now.keys().copied().filter(|block| !counted(block));
            let named: Vec<BlockNo> = now.chain(unseen.iter().copied()).collect();
            named.into_iter().for_each(|block| self.replay(block));
            self.model.durable.extend(unseen.into_iter().map(|block| (block, 0)));
        } else {
            self.model.now = self.model.durable.clone();
        }
        self.reached.note("crashes");
    }

    /// A record that is replayed names a block.
    fn replay(&mut self, block: BlockNo) {
        let run = Run { block, len: 1 };
        loop {
            match self.space.take_exactly(run) {
                Ok(()) => return self.space.recorded(run),
                Err(TakeError::Load(group)) => self.load(group),
                Err(TakeError::Full) => panic!("{block} is named and was not free"),
            }
        }
    }

    /// When nobody holds anything, everything is free.
    fn all_comes_back(&mut self) {
        while !self.model.taken.is_empty() {
            self.untake(Raw { kind: 0, which: 0, len: 0, more: 0 });
        }
        while !self.model.readers.is_empty() {
            self.unpin(Raw { kind: 0, which: 0, len: 0, more: 0 });
        }
        for block in std::mem::take(&mut self.model.now).into_keys() {
            self.model.durable.entry(block).or_insert(0);
        }
        self.checkpoint();
        self.recycle();
        self.end_discard();
        (0..to_u32(self.geometry.groups())).for_each(|group| self.load(group));
        assert_eq!(self.space.free(), self.geometry.usable_blocks(), "blocks did not come back");
    }
}

/// A whole pool whose counts are changed by the input.
fn whole(input: &mut Input<'_>, reached: &mut Reached) {
    let config = Config { pool_blocks: 200 + input.below(64), ..Config::default() };
    let mut image = empty_pool(&config);
    let mut counts = Counts::default();
    for life in 0..4 {
        let sim = SimDisk::from_image(image, life, SimOptions::default());
        let done = sim.run(live(&sim, &config, &mut counts, input, reached));
        done.expect("the power stays on");
        image = after(&sim, &mut counts, reached);
        if input.is_empty() {
            break;
        }
    }
}

/// Counts of data blocks, of now and of the last checkpoint.
#[derive(Default)]
struct Counts {
    now: BTreeMap<BlockNo, u32>,
    durable: BTreeMap<BlockNo, u32>,
}

/// The process ends: nothing has named in the journal what was done to the counts.
fn after(sim: &SimDisk, counts: &mut Counts, reached: &mut Reached) -> SimImage {
    counts.now = counts.durable.clone();
    reached.note("pool crashes");
    sim.image_after_kill(1)
}

async fn live(
    sim: &SimDisk,
    config: &Config,
    counts: &mut Counts,
    input: &mut Input<'_>,
    reached: &mut Reached,
) {
    let pool = config.open(sim).await.expect("a sound pool");
    compare(&pool, counts).await;
    for _ in 0..POOL_OPS_MAX {
        if input.is_empty() {
            break;
        }
        let raw = Raw::of(input);
        match raw.kind % 8 {
            0 | 1 => take(&pool, counts, 1 + u64::from(raw.len % 24), reached).await,
            2 | 3 => change(&pool, counts, raw, RefChange::DataUp),
            4 | 5 => change(&pool, counts, raw, RefChange::DataDown),
            6 => {
                pool.checkpoint().await.expect("a sound pool");
                counts.durable = counts.now.clone();
                compare(&pool, counts).await;
                reached.note("pool checkpoints");
            }
            _ if raw.more & 1 == 1 => return,
            _ => {}
        }
    }
    // Everything is given up, and comes back.
    for (block, count) in std::mem::take(&mut counts.now) {
        let down = RefDelta::data_down(&extent(block, 1));
        pool.look(|inside| inside.state.log.extend((0..count).map(|_| down)));
    }
    for _ in 0..3 {
        pool.checkpoint().await.expect("a sound pool");
    }
    counts.durable.clear();
    compare(&pool, counts).await;
    pool.look(|inside| {
        let kept = to_u64(inside.state.node_blocks.len()) + inside.catalogue_blocks;
        let waiting: u64 = inside.state.reuse.waiting().map(|run| run.len).sum();
        let all = inside.state.geometry.usable_blocks();
        assert_eq!(inside.state.space.free() + kept + waiting, all, "blocks did not come back");
    });
}

const fn extent(block: BlockNo, len: u64) -> Extent {
    Extent { lba: Lba::new(0), block, len, own: false }
}

/// Takes blocks for data and gives each its first reference.
async fn take(pool: &Pool, counts: &mut Counts, want: u64, reached: &mut Reached) {
    loop {
        let missing = pool.look(|inside| {
            if inside.state.space.free() < inside.hard_reserve + want {
                return None; // Checkpoints must go on.
            }
            match inside.state.space.take(want) {
                Ok(run) => {
                    inside.state.space.recorded(run);
                    for block in (0..run.len).map(|offset| run.block.plus(offset)) {
                        let held =
                            counts.now.contains_key(&block) || counts.durable.contains_key(&block);
                        assert!(!held, "{block} is in use and handed out");
                        counts.now.insert(block, 1);
                    }
                    let (block, count) = (run.block, to_u32(run.len));
                    let (birth, change) = (Seqno::new(0), RefChange::DataUp);
                    inside.state.log.push(RefDelta { block, birth, count, change });
                    reached.note("pool takes");
                    None
                }
                Err(TakeError::Load(group)) => Some(group),
                Err(TakeError::Full) => panic!("there are free blocks"),
            }
        });
        let Some(group) = missing else { return };
        pool.probe_group(group).await.expect("a sound pool");
    }
}

/// Some blocks get or lose a reference each, in one piece.
fn change(pool: &Pool, counts: &mut Counts, raw: Raw, change: RefChange) {
    let at = modulo(raw.which.into(), counts.now.len());
    let mut blocks = counts.now.keys().copied().skip(at);
    let Some(first) = blocks.next() else { return };
    // Blocks that follow each other, at most so many.
    let most = 1 + to_u64(usize::from(raw.len % 16));
    let len = 1 + blocks.zip(1..most).take_while(|(block, n)| *block == first.plus(*n)).count();
    for offset in 0..to_u64(len) {
        let block = first.plus(offset);
        let count = counts.now.get_mut(&block).expect("listed");
        match change {
            RefChange::DataUp => *count += 1,
            _ => *count -= 1,
        }
        if *count == 0 {
            counts.now.remove(&block);
        }
    }
    let delta = RefDelta { block: first, birth: Seqno::new(0), count: to_u32(to_u64(len)), change };
    pool.look(|inside| inside.state.log.push(delta));
}

/// The tables say what the model says, of every block of the pool.
async fn compare(pool: &Pool, counts: &Counts) {
    let geometry = pool.look(|inside| inside.state.geometry);
    for group in 0..geometry.groups() {
        for index in 0..geometry.group_len(group) {
            let block = geometry.block_at(group, index);
            let (id, at) = geometry.page_of(Table::Refs, block).expect("a block of the group");
            let entry = loop {
                let found = pool.look(|inside| inside.state.tables.page(id));
                match found {
                    Ok(page) => break page.map_or(0, |page| page.get(at)),
                    Err(missing) => pool.probe_table(missing).await.expect("a sound pool"),
                }
            };
            let known = counts.durable.get(&block).copied().unwrap_or(0);
            let kind = BlockType::of(entry);
            let count = if kind == BlockType::Data { entry & COUNT_MASK } else { 0 };
            assert_eq!(count, known, "{block} is counted as {kind:?}");
        }
    }
}
