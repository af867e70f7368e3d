//! Pools to be damaged: an image, what it must hold, and what each of its blocks held before.

use std::cell::RefCell;
use std::rc::Rc;

use super::places::Places;
use crate::gen_ops::{Bounds, Generator, Op};
use crate::model::{Birth, Model};
use crate::run::{Config, Life, Log, SharedLog, step};
use pando_engine::disk::sim::{CutPlan, Image, SimDisk, SimImage, SimOptions};
use pando_engine::journal::LogReader;
use pando_engine::map::Fanout;
use pando_engine::units::Seqno;

/// How a pool has come to its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// It was closed.
    Closed,
    /// The process was killed: records behind the last checkpoint, the last of them not flushed.
    Killed,
    /// The power failed in the middle of a checkpoint; it was opened again, and the process killed.
    Recovered,
}

impl Past {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Closed, Self::Killed, Self::Recovered];

    /// The name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Killed => "killed",
            Self::Recovered => "recovered",
        }
    }
}

/// A pool to be damaged.
pub struct Subject {
    /// How it has come about.
    pub past: Past,
    /// How it is opened.
    pub config: Config,
    /// The whole image.
    pub image: SimImage,
    /// What it must hold: the acknowledged state.
    pub log: Log,
    /// Damage to the end of the journal, or to the data that it names, can take the pool back to
    /// this state, since nothing says that what came later was flushed.
    pub proved: usize,
    /// Images from before.
    pub older: Vec<Image>,
    /// What lies where.
    pub places: Places,
}

/// Operations of a life.
const OPS: usize = 36;

impl Subject {
    /// The pool of a seed.
    ///
    /// # Panics
    /// When the engine fails without any damage.
    #[must_use]
    pub fn new(past: Past, seed: u64) -> Self {
        let mut maker = Maker::new(seed);
        maker.live(&first_ops(), OPS, None);
        if past == Past::Recovered {
            // The checkpoint that a life like the next one begins is cut in its middle.
            let events = maker.clone().live(&[], 6, Some(u64::MAX));
            let whole = maker.clone();
            // From before its superblock, the last of them with all the rest in its place.
            for back in (8..24).rev() {
                let mut dead = whole.clone();
                dead.live(&[], 6, Some(events.saturating_sub(back)));
                maker.older.push(dead.image.blocks().clone());
                (maker.image, maker.log) = (dead.image, dead.log);
            }
        }
        let random = if past == Past::Recovered { 0 } else { 8 };
        maker.live(&last_ops(past), random, None);
        maker.finish(past)
    }
}

/// Volumes with clones and snapshots and something in them, whatever the seed adds.
fn first_ops() -> Vec<Op> {
    let birth = |name: &str, source: Option<&str>, snapshot| Birth {
        name: name.into(),
        size_bytes: source.is_none().then_some(40 * 4096),
        source: source.map(Into::into),
        snapshot,
    };
    let write =
        |volume: &str, first, count| Op::Write { volume: volume.into(), first, count, fua: false };
    let mut ops = vec![Op::Create(vec![birth("a", None, false), birth("b", None, false)])];
    ops.extend((0..10).map(|n| write("a", n * 32, 8 + 8 * (n % 2))));
    ops.extend([write("b", 16, 40), Op::Checkpoint]);
    ops.push(Op::Create(vec![birth("s", Some("a"), true), birth("c", Some("a"), false)]));
    ops.extend((0..6).map(|n| write("c", n * 48 + 4, 8)));
    ops.extend([Op::Flush, write("a", 64, 24), Op::Checkpoint]);
    ops
}

/// Ends a life with a checkpoint, and, if it is to be killed, records behind it in several flushes.
/// What was recovered is left as the recovery has left it.
fn last_ops(past: Past) -> Vec<Op> {
    let write = |first| Op::Write { volume: "x".into(), first, count: 8, fua: false };
    let size_bytes = Some(20 * 4096);
    let birth = Birth { name: "x".into(), size_bytes, source: None, snapshot: false };
    let mut ops = vec![Op::Create(vec![birth]), write(0), Op::Checkpoint];
    if past == Past::Recovered {
        ops.pop();
    }
    if past != Past::Closed {
        ops.extend([write(16), write(24), Op::Flush, write(40), Op::Flush, write(48), write(56)]);
        // No record comes after the last flush and says that it was there.
        ops.extend([Op::Flush, write(72), write(80), Op::Flush]);
    }
    ops
}

/// A pool in the making.
#[derive(Clone)]
struct Maker {
    seed: u64,
    config: Config,
    image: SimImage,
    log: Log,
    older: Vec<Image>,
    /// The number of the last record in each state of the last life.
    marks: Vec<(usize, Seqno)>,
}

impl Maker {
    fn new(seed: u64) -> Self {
        let config = Config {
            pool_blocks: 480,
            journal_blocks: 12,
            fanout: Fanout { leaf_max: 4, inner_max: 4 },
            cache_bytes: 1 << 20,
            discard: false,
            ..Config::default()
        };
        let image = config.formatted();
        let log = Log::new(Model::default());
        Self { seed, config, image, log, older: Vec::new(), marks: Vec::new() }
    }

    /// One life: these operations, and some random ones before the last checkpoint among them. Cut
    /// at an event, or closed if there is nothing behind the checkpoint, else killed. Returns the
    /// events until its last checkpoint is whole.
    fn live(&mut self, ops: &[Op], random: usize, cut: Option<u64>) -> u64 {
        self.seed += 1;
        let sim = SimDisk::from_image(self.image.clone(), self.seed, SimOptions::default());
        if let Some(cut) = cut {
            sim.set_cut_at(cut);
        }
        let log: SharedLog = Rc::new(RefCell::new(self.log.clone()));
        let bounds = Bounds { volumes: 7, volume_blocks: 40, write_blocks: 8 };
        let mut generator = Generator::new(self.seed, bounds);
        let (older, marks) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let closes = ops.last().is_none_or(|op| *op == Op::Checkpoint);
        let events = sim.run(async {
            let life = Life { sim: &sim, config: &self.config, log: &log };
            let pool = life.begin().await.expect("a sound pool");
            let first = ops.iter().rposition(|op| *op == Op::Checkpoint).unwrap_or(0);
            let (before, after) = ops.split_at(first.min(ops.len()));
            let random = (0..random).map(|_| None);
            let all = before.iter().map(Some).chain(random).chain(after.iter().map(Some));
            for op in all {
                let op = op.cloned().unwrap_or_else(|| generator.next_op(log.borrow().last()));
                // The volume of the last operations is still needed.
                if op == Op::Reopen || op == Op::Delete("x".into()) {
                    continue;
                }
                step(&pool, &log, &op).await.expect("nothing is damaged yet");
                marks.borrow_mut().push((log.borrow().states.len() - 1, pool.status().seqno));
                if op == Op::Checkpoint {
                    older.borrow_mut().push(sim.image_after_cut(CutPlan::KeepAll).blocks().clone());
                }
            }
            if closes {
                pool.close().await.expect("nothing is damaged yet");
            }
            sim.io_count()
        });
        self.log = log.borrow().clone();
        self.image = sim.image_after_cut(CutPlan::KeepAll);
        self.older.extend(older.take());
        self.marks = marks.take().into_iter().map(|(n, s)| (n, Seqno::new(s))).collect();
        events.unwrap_or(0)
    }

    fn finish(self, past: Past) -> Subject {
        let places = Places::of(self.image.blocks());
        let sim = SimDisk::from_image(self.image.clone(), 0, SimOptions::default());
        let durable = sim.run(async {
            let mut log = LogReader::behind(&sim.disk(), &places.superblock);
            let mut durable = places.superblock.seal;
            while let Some(framed) = log.next().await.expect("a sound journal") {
                durable = durable.max(framed.durable);
            }
            durable
        });
        let durable = durable.expect("nothing cuts the power");
        let newest = self.log.states.len() - 1;
        let proved = self.marks.iter().filter(|(_, seqno)| *seqno <= durable).map(|(n, _)| *n);
        let proved = if past == Past::Closed { newest } else { proved.max().unwrap_or(0) };
        let (config, image, log, older) = (self.config, self.image, self.log, self.older);
        Subject { past, config, image, log, proved, older, places }
    }
}
