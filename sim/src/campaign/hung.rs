//! An I/O that never completes: who does not need it goes on, who waits for it is not told that it
//! has succeeded, and what waits is bounded.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, select};

use crate::case::CaseLife;
use crate::crash::Explorer;
use crate::gen_ops::Op;
use crate::model::{BLOCK_SECTORS, Birth, Model};
use crate::run::{Log, observe, perform, step};
use crate::stage::{Seen, Stage};
use pando_engine::disk::sim::{Effect, Fault, FaultOp, Rng};
use pando_engine::error::Result;
use pando_engine::pool::Pool;
use pando_engine::units::BLOCK_BYTES;

/// What never ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scene {
    /// The read of a block of volume `a`.
    Read,
    /// A write to volume `a`.
    Write,
    /// A flush's write of the journal.
    Journal,
    /// A flush's sync.
    Sync,
}

/// Blocks of the two volumes.
const BLOCKS: u64 = 16;
/// Bytes of the shortest record, header and all.
const RECORD_BYTES_MIN: u64 = 32;

impl Scene {
    const fn op(self) -> FaultOp {
        match self {
            Self::Read => FaultOp::Read,
            Self::Write | Self::Journal => FaultOp::Write,
            Self::Sync => FaultOp::Sync,
        }
    }

    /// Whether flushes wait for it.
    const fn holds_flushes(self) -> bool {
        matches!(self, Self::Journal | Self::Sync)
    }
}

/// Plays a scene, and looks at what a crash leaves then.
pub(super) fn play(explorer: &mut Explorer, scene: Scene, rng: &mut Rng) -> bool {
    let (config, seed) = (explorer.config, rng.bits());
    let (image, log) = (config.formatted(), Log::new(Model::default()));
    let seen = {
        let stage = Stage::new(&config, image, seed, log, &explorer.rares);
        let written = Cell::new(0);
        let (ended, _) = stage.run(crate::stage::Keep::Nothing, async {
            let pool = config.open(&stage.sim).await.unwrap_or_else(|e| panic!("{e}"));
            begin(&stage, &pool).await;
            let fault = Fault { op: scene.op(), after: 0, sticky: false, effect: Effect::Hung };
            stage.sim.inject(fault);
            let others = async {
                while stage.sim.faults_struck() == 0 {
                    pool.probe_disk().sleep(Duration::from_micros(1)).await;
                }
                others(&stage, &pool, scene, rng).await;
                if scene.holds_flushes() {
                    flood(&stage, &pool, &written).await;
                }
            };
            match select(Box::pin(victim(&pool, scene)), Box::pin(others)).await {
                Either::Left((result, _)) => panic!("what never ends has ended: {result:?}"),
                Either::Right(((), _)) => {}
            }
        });
        assert_eq!(ended.is_none(), scene.holds_flushes(), "writers without a flush have an end");
        assert_eq!(ended.is_none(), stage.sim.is_stuck());
        let most = config.journal_blocks * BLOCK_BYTES / RECORD_BYTES_MIN;
        assert!(written.get() <= most, "{} writes behind a flush that never ends", written.get());
        let log = Rc::new(stage.log.borrow().since_durable());
        Seen { moment: stage.sim.moment(), log, begun: 0 }
    };
    let life = CaseLife::new(seed);
    explorer.cut(&seen, &life);
    explorer.kill(&seen, &life, true);
    true
}

/// Two volumes with something in them; not all of it is durable.
async fn begin(stage: &Stage<'_>, pool: &Pool) {
    let birth = |name: &str| {
        let size_bytes = Some(BLOCKS * BLOCK_BYTES);
        Birth { name: name.into(), size_bytes, source: None, snapshot: false }
    };
    let ops = [
        Op::Create(vec![birth("a"), birth("b")]),
        write("a", 0, BLOCKS),
        write("b", 0, BLOCKS),
        Op::Flush,
        write("b", 1, 3),
    ];
    for op in ops {
        step(pool, &stage.log, &op).await.unwrap_or_else(|e| panic!("{e}"));
    }
}

fn write(volume: &str, block: u64, blocks: u64) -> Op {
    let (first, count) = (block * BLOCK_SECTORS, blocks * BLOCK_SECTORS);
    Op::Write { volume: volume.into(), first, count, fua: false }
}

/// Whoever is hit.
async fn victim(pool: &Pool, scene: Scene) -> Result<()> {
    match scene {
        Scene::Read => {
            let device = pool.device(pool.find("a")?.id)?;
            device.read(5 * BLOCK_BYTES, 4096).await.map(drop)
        }
        Scene::Write => perform(pool, &write("a", 5, 2), 1_000_000).await,
        Scene::Journal | Scene::Sync => pool.flush().await,
    }
}

/// Everybody else: all of it succeeds.
async fn others(stage: &Stage<'_>, pool: &Pool, scene: Scene, rng: &mut Rng) {
    let look = || async {
        let seen = observe(pool).await.unwrap_or_else(|e| panic!("others cannot read: {e}"));
        let log = stage.log.borrow();
        assert!(seen == *log.last(), "others read: {}", seen.difference(log.last()));
    };
    look().await;
    for number in 0..8 {
        let block = rng.below(BLOCKS - 2);
        let volume = if rng.chance(4) { "a" } else { "b" };
        let first = block * BLOCK_SECTORS + 1 + rng.below(6);
        let part = Op::Write { volume: volume.into(), first, count: 4, fua: false };
        let birth = |number| Birth {
            name: format!("s{number}"),
            size_bytes: None,
            source: Some("b".into()),
            snapshot: true,
        };
        let op = match rng.below(8) {
            0 | 1 => write(volume, block, 1 + rng.below(2)),
            2 => part,
            _ if scene.holds_flushes() => continue,
            3 => Op::Discard { volume: volume.into(), first: block * BLOCK_SECTORS, count: 8 },
            4 => Op::Checkpoint,
            5 => Op::Create(vec![birth(number)]),
            6 => Op::Write { volume: volume.into(), first, count: 8, fua: true },
            _ => Op::Flush,
        };
        let done = step(pool, &stage.log, &op).await;
        done.unwrap_or_else(|e| panic!("others cannot go on: {e}"));
    }
    look().await;
}

/// Writes on and on, which comes to a halt when the memory of the journal is full.
async fn flood(stage: &Stage<'_>, pool: &Pool, written: &Cell<u64>) {
    loop {
        let op = write("b", written.get() % BLOCKS, 1);
        step(pool, &stage.log, &op).await.unwrap_or_else(|e| panic!("{e}"));
        written.set(written.get() + 1);
    }
}
