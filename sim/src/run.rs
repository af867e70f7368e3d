//! Runs operations on a pool and on the model side by side, and keeps the history of states that
//! the pool may be found in.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::discards::DiscardJudge;
use super::gen_ops::Op;
use super::model::{BLOCK_SECTORS, Birth, Model, ModelVolume, fill_sector, stamps_of};
use pando_engine::device::ZeroFlags;
use pando_engine::disk::sim::{CutPlan, Rng, SimDisk, SimImage, SimOptions};
use pando_engine::error::{ErrorKind, Result};
use pando_engine::limits::CASCADE_NODES_MAX;
use pando_engine::map::Fanout;
use pando_engine::pool::{
    CreateVolume, FormatOptions, IoLimits, ModifyVolume, OpenOptions, Pool, Source,
};
use pando_engine::runtime::Buf;
use pando_engine::runtime::executor::spawn_local;
use pando_engine::units::{
    BLOCK_BYTES, BLOCK_SIZE, SECTOR_BYTES, VolumeId, to_u32, to_u64, to_usize,
};

/// Blocks of a unit that is discarded in such a pool.
pub const DISCARD_UNIT: u64 = 4;

/// A pool to test on: tiny, so that splits, checkpoints, laps of the journal and full pools happen
/// all the time.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Blocks of the pool.
    pub pool_blocks: u64,
    /// Blocks of its journal.
    pub journal_blocks: u64,
    /// Entries of its nodes.
    pub fanout: Fanout,
    /// Bytes of its cache; the least is 40 nodes.
    pub cache_bytes: u64,
    /// Whether freed blocks are discarded, as the daemon does by default.
    pub discard: bool,
    /// Nodes that one checkpoint gives up for deletions.
    pub cascade_nodes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            pool_blocks: 700,
            journal_blocks: 16,
            fanout: Fanout { leaf_max: 4, inner_max: 4 },
            cache_bytes: 1 << 20,
            discard: true,
            cascade_nodes: CASCADE_NODES_MAX,
        }
    }
}

impl Config {
    /// A configuration from a seed: 250 to 1149 blocks, a journal of 8 to 31.
    #[must_use]
    pub const fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0xC0FF);
        Self {
            pool_blocks: 250 + rng.below(900),
            journal_blocks: 8 + rng.below(24),
            fanout: Fanout {
                leaf_max: to_usize(4 + rng.below(5)),
                inner_max: to_usize(4 + rng.below(5)),
            },
            cache_bytes: if rng.chance(8) { 0 } else { 1 << 20 },
            discard: !rng.chance(5),
            cascade_nodes: to_usize(2 + seed % 7),
        }
    }

    /// A disk with a pool on it, all of it durable.
    ///
    /// # Panics
    /// When formatting fails.
    #[must_use]
    pub fn formatted(&self) -> SimImage {
        let sim = SimDisk::new(0, self.pool_blocks, SimOptions::default());
        sim.run(async {
            let options = FormatOptions {
                size_bytes: self.pool_blocks * BLOCK_BYTES,
                journal_bytes: Some(self.journal_blocks * BLOCK_BYTES),
                force: false,
                uuid: [9; 16],
            };
            Pool::format(&sim.disk(), &options).await.expect("an empty disk can be formatted");
        });
        sim.image_after_cut(CutPlan::KeepNone)
    }

    /// Opens the pool on `sim` with its background tasks.
    ///
    /// # Errors
    /// The pool's.
    pub async fn open(&self, sim: &SimDisk) -> Result<Pool> {
        let options = OpenOptions {
            cache_bytes: self.cache_bytes,
            fanout: self.fanout,
            discard: self.discard,
            discard_unit: DISCARD_UNIT,
            cascade_nodes: self.cascade_nodes,
        };
        // Less than the journal, so that it is sometimes the memory that is full.
        let memory = |len: usize| sim.map_ring(len / BLOCK_SIZE * 3 / 4 * BLOCK_SIZE);
        let judge = DiscardJudge::default();
        let pool = Pool::open(judge.before(sim.disk()), memory, options).await?;
        judge.watch(pool.probe());
        let background = pool.clone();
        spawn_local(async move { background.run_background().await });
        let discards = pool.clone();
        spawn_local(async move { discards.run_discards().await });
        Ok(pool)
    }
}

/// Tells on the way out of a panic what was being tried, so that every failure has its seed.
pub struct Told<F: Fn() -> String>(pub F);

impl<F: Fn() -> String> Drop for Told<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("while trying {}", (self.0)());
        }
    }
}

/// The states that the pool went through, and how far it has promised what.
#[derive(Clone, Debug)]
pub struct Log {
    /// State 0, then the state after each step.
    pub states: Vec<Model>,
    /// This state is durable.
    pub durable: usize,
    /// This state is acknowledged, and the power has not failed since.
    pub acknowledged: usize,
    /// Operations so far; the next one's stamp.
    pub stamp: u64,
    /// Operations refused for lack of space.
    pub refused: u64,
}

impl Log {
    /// A history that begins with `model`, durable.
    #[must_use]
    pub fn new(model: Model) -> Self {
        Self { states: vec![model], durable: 0, acknowledged: 0, stamp: 1, refused: 0 }
    }

    /// The newest state.
    ///
    /// # Panics
    /// Never: there is always state 0.
    #[must_use]
    pub fn last(&self) -> &Model {
        self.states.last().expect("there is always a state")
    }

    /// What was acknowledged and is not durable may be lost.
    pub const fn power_failed(&mut self) {
        self.acknowledged = self.durable;
    }

    /// The history goes on with the pool in state `number`, durable.
    pub fn go_on_from(&mut self, number: usize) {
        let model = self.states[number].clone();
        *self = Self { stamp: self.stamp, refused: self.refused, ..Self::new(model) };
    }

    /// The number of a state that `seen` is, not older than `least`.
    ///
    /// # Errors
    /// How `seen` differs from the oldest and from the newest state that it might be.
    pub fn find(&self, seen: &Model, least: usize) -> std::result::Result<usize, String> {
        let newest = self.states.len() - 1;
        let found = (least..=newest).rev().find(|n| self.states[*n] == *seen);
        found.ok_or_else(|| {
            format!(
                "the pool is in none of the states {least} to {newest} (acknowledged {}):\n\
                 against the oldest: {}\nagainst the newest: {}",
                self.acknowledged,
                seen.difference(&self.states[least]),
                seen.difference(&self.states[newest]),
            )
        })
    }

    fn issue(&mut self, op: &Op) -> u64 {
        let stamp = self.stamp;
        self.stamp += 1;
        let mut model = self.last().clone();
        for step in op.steps(&model, stamp) {
            model.apply(&step);
            self.states.push(model.clone());
        }
        stamp
    }

    /// Two operations of one step each are asked for at once: after each of them alone the pool may
    /// be seen, and after both. Returns their stamps.
    pub(super) fn issue_race(&mut self, one: &Op, other: &Op) -> (u64, u64) {
        let before = self.last().clone();
        let stamps = (self.stamp, self.stamp + 1);
        self.stamp += 2;
        let after = |model: &Model, op: &Op, stamp| {
            let mut model = model.clone();
            op.steps(&before, stamp).iter().for_each(|step| model.apply(step));
            model
        };
        let first = after(&before, one, stamps.0);
        self.states.push(after(&before, other, stamps.1));
        self.states.push(first.clone());
        self.states.push(after(&first, other, stamps.1));
        stamps
    }

    /// Everything that was asked for is acknowledged; none of it need be durable.
    pub(super) fn acknowledge_all(&mut self) {
        self.acknowledged = self.states.len() - 1;
    }

    /// The history without the states that are older than the durable one.
    #[must_use]
    pub(super) fn since_durable(&self) -> Self {
        Self {
            states: self.states[self.durable..].to_vec(),
            durable: 0,
            acknowledged: self.acknowledged - self.durable,
            ..*self
        }
    }

    fn acknowledge(&mut self, op: &Op) {
        self.acknowledged = self.states.len() - 1;
        if op.is_durable() {
            self.durable = self.acknowledged;
        }
    }
}

/// The history, shared with the code that runs until the power fails.
pub type SharedLog = Rc<RefCell<Log>>;

/// Does `op`, both on the pool and in the history. Lack of space is an answer like any other; a
/// part of the operation may have happened then.
///
/// # Errors
/// Any other failure of the pool.
///
/// # Panics
/// When the pool is found in a state in which it cannot be.
pub async fn step(pool: &Pool, log: &SharedLog, op: &Op) -> Result<()> {
    let before = log.borrow().states.len() - 1;
    let stamp = log.borrow_mut().issue(op);
    match perform(pool, op, stamp).await {
        Ok(()) => log.borrow_mut().acknowledge(op),
        Err(error) if error.kind() == ErrorKind::NoSpace => {
            log.borrow_mut().refused += 1;
            resolve(pool, log, before).await;
        }
        Err(error) => return Err(error.context(format_args!("{op:?}"))),
    }
    Ok(())
}

/// After an operation that was refused: how much of it has happened? `before` is the number of the
/// state before it.
///
/// # Panics
/// When something else has changed.
pub async fn resolve(pool: &Pool, log: &SharedLog, before: usize) {
    let seen = observe(pool).await.unwrap_or_else(|e| panic!("after a refusal: {e}"));
    let mut log = log.borrow_mut();
    let now = log.find(&seen, before).unwrap_or_else(|e| panic!("after a refusal: {e}"));
    log.states.truncate(now + 1);
    log.acknowledged = now;
}

/// Does `op` on the pool; `stamp` is what a write writes.
///
/// # Errors
/// The pool's.
pub async fn perform(pool: &Pool, op: &Op, stamp: u64) -> Result<()> {
    let device = |name: &String| pool.device(pool.find(name)?.id);
    match op {
        Op::Write { volume, first, count, fua } => {
            let (buf, len) = stamped(*first, *count, stamp);
            device(volume)?.write(first * SECTOR_BYTES, len, buf, *fua).await
        }
        Op::Zero { volume, first, count, no_hole } => {
            let flags = ZeroFlags { fua: false, no_hole: *no_hole };
            let (offset, len) = (first * SECTOR_BYTES, count * SECTOR_BYTES);
            device(volume)?.write_zeroes(offset, len, flags).await
        }
        Op::Discard { volume, first, count } => {
            let (offset, len) = (first * SECTOR_BYTES, count * SECTOR_BYTES);
            device(volume)?.discard(offset, len, false).await
        }
        Op::Flush => pool.flush().await,
        Op::Create(births) => {
            let requests: Result<Vec<_>> = births.iter().map(|b| request(pool, b)).collect();
            pool.create_group(requests?).await.map(drop)
        }
        Op::Delete(name) => pool.delete(pool.find(name)?.id).await,
        Op::Grow(name, size) => {
            let change = ModifyVolume { size_bytes: Some(*size), ..ModifyVolume::default() };
            pool.modify(pool.find(name)?.id, change).await.map(drop)
        }
        Op::Checkpoint | Op::Reopen => pool.checkpoint().await,
    }
}

/// A buffer for a write of `count` sectors from `first` on, and its length in bytes.
#[must_use]
pub fn stamped(first: u64, count: u64, stamp: u64) -> (Buf, u32) {
    let start = first % BLOCK_SECTORS;
    let mut buf = Buf::zeroed(to_usize((start + count).div_ceil(BLOCK_SECTORS)));
    let sectors = buf.as_mut_bytes().chunks_exact_mut(512).skip(to_usize(start));
    for (sector, bytes) in (first..first + count).zip(sectors) {
        fill_sector(bytes, sector, stamp);
    }
    (buf, to_u32(count * SECTOR_BYTES))
}

fn request(pool: &Pool, birth: &Birth) -> Result<CreateVolume> {
    let source = match &birth.source {
        None => Source::Empty,
        Some(name) => Source::Volume(pool.find(name)?.id),
    };
    Ok(CreateVolume {
        name: birth.name.clone(),
        size_bytes: birth.size_bytes,
        source,
        snapshot: birth.snapshot,
        read_only: false,
        reservation_bytes: 0,
        growth_limit_bytes: 0,
        io_limits: IoLimits::default(),
        labels: BTreeMap::new(),
        created_at: 0,
    })
}

/// Reads every byte of every volume.
///
/// # Errors
/// What cannot be read, or was never written where it is.
pub async fn observe(pool: &Pool) -> std::result::Result<Model, String> {
    let mut model = Model::default();
    for info in pool.list(None, usize::MAX).0 {
        let mut volume = ModelVolume { size_bytes: info.size_bytes, ..ModelVolume::default() };
        volume.snapshot = info.snapshot;
        let what = |e: String| format!("volume {}: {e}", info.name);
        read_volume(pool, info.id, &mut volume).await.map_err(what)?;
        model.volumes.insert(info.name, Rc::new(volume));
    }
    Ok(model)
}

async fn read_volume(
    pool: &Pool,
    id: VolumeId,
    volume: &mut ModelVolume,
) -> std::result::Result<(), String> {
    let device = pool.device(id).map_err(|e| e.to_string())?;
    let mut at = 0;
    while at < volume.size_bytes {
        let len = (volume.size_bytes - at).min(1 << 20);
        let read = device.read(at, to_u32(len)).await.map_err(|e| e.to_string())?;
        stamps_of(read.bytes(), at / SECTOR_BYTES, &mut volume.blocks)?;
        at += len;
    }
    Ok(())
}

/// What a pool is opened on, and what it must be found to hold.
pub struct Life<'a> {
    /// The disk.
    pub sim: &'a SimDisk,
    /// How the pool is opened.
    pub config: &'a Config,
    /// The history so far. The pool is not found in a state older than the acknowledged one.
    pub log: &'a SharedLog,
}

impl Life<'_> {
    /// Opens the pool and finds out in which state it is; the history goes on from there.
    ///
    /// # Errors
    /// The pool's.
    ///
    /// # Panics
    /// When the pool is in a state in which it cannot be.
    pub async fn begin(&self) -> Result<Pool> {
        let pool = self.config.open(self.sim).await?;
        check_sound(&pool).await;
        let seen = observe(&pool).await.unwrap_or_else(|e| panic!("after opening: {e}"));
        let mut log = self.log.borrow_mut();
        let number =
            log.find(&seen, log.acknowledged).unwrap_or_else(|e| panic!("after opening: {e}"));
        log.go_on_from(number);
        Ok(pool)
    }

    /// Runs operations from `next` until it has none, then compares the pool with the model.
    ///
    /// # Errors
    /// The pool's.
    ///
    /// # Panics
    /// When the pool does not hold what the model holds.
    pub async fn drive(&self, mut next: impl FnMut(&Model) -> Option<Op>) -> Result<Pool> {
        let mut pool = self.begin().await?;
        loop {
            let op = next(self.log.borrow().last());
            let Some(op) = op else { break };
            if op == Op::Reopen {
                pool.close().await?;
                pool = self.config.open(self.sim).await?;
            }
            step(&pool, self.log, &op).await?;
        }
        check_sound(&pool).await;
        let seen = observe(&pool).await.unwrap_or_else(|e| panic!("at the end: {e}"));
        let log = self.log.borrow();
        assert!(seen == *log.last(), "at the end: {}", seen.difference(log.last()));
        Ok(pool)
    }
}

/// Blocks of the pool, and how they are used when nothing is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// For data and nodes.
    pub usable: u64,
    /// Free at once.
    pub free: u64,
    /// Set aside for new nodes.
    pub aside: u64,
    /// Taken by the catalogue.
    pub catalogue: u64,
    /// Free, and being discarded.
    pub discarding: u64,
}

impl Blocks {
    /// Blocks that hold data and nodes, or wait to become free.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.usable - self.free - self.discarding - self.aside - self.catalogue
    }

    /// How the blocks of `pool` are used.
    #[must_use]
    pub fn of(pool: &Pool) -> Self {
        pool.look(|inside| Self {
            usable: inside.state.geometry.usable_blocks(),
            free: inside.state.space.free(),
            aside: to_u64(inside.state.node_blocks.len()),
            catalogue: inside.catalogue_blocks,
            discarding: inside.state.reuse.discarding().map_or(0, |run| run.len),
        })
    }
}

/// Writes checkpoints until nothing is on its way to become free.
///
/// # Errors
/// The pool's.
pub async fn settle(pool: &Pool) -> Result<()> {
    loop {
        pool.checkpoint().await?;
        let settled = pool.look_between_checkpoints(|inside| {
            let waiting = inside.state.reuse.waiting().next().is_some();
            inside.drops_pending == 0 && inside.state.log.is_empty() && !waiting
        });
        if settled == Some(true) {
            return Ok(());
        }
    }
}

/// Lets the checker look at the pool.
///
/// # Panics
/// When it finds anything.
pub async fn check_sound(pool: &Pool) {
    let report = pool.check(&|_, _| ()).await.unwrap_or_else(|e| panic!("check: {e}"));
    assert!(report.findings.is_empty(), "check: {:?}", report.findings);
}

/// Deletes everything and makes sure that every block has come back.
///
/// # Errors
/// The pool's.
///
/// # Panics
/// When a block has not come back, or the checker finds anything.
pub async fn drain(pool: &Pool) -> Result<()> {
    for info in pool.list(None, usize::MAX).0 {
        pool.delete(info.id).await?;
    }
    settle(pool).await?;
    let blocks = Blocks::of(pool);
    assert_eq!(blocks.used(), 0, "blocks did not come back: {blocks:?}");
    check_sound(pool).await;
    Ok(())
}
