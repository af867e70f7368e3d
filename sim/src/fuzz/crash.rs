//! f02: operations, and up to four ends of the process: the power fails at some event, of the work or
//! of the recovery from the end before, or the process is killed. After each the pool opens, and is in
//! one state between the last durable and the last issued one; after a kill, not older than the last
//! acknowledged one. In the end every block comes back.
//!
//! ```text
//! seed, configuration (6), how many ends, 8 bytes each: event (2), plan, which (1), number (4);
//! then 6 bytes an operation
//! ```

use std::cell::RefCell;
use std::rc::Rc;

use super::input::empty_pool;
use super::ops::{Maker, modulo};
use super::{Input, Reached};
use crate::model::Model;
use crate::run::{Config, Life, Log, SharedLog, Told, drain};
use pando_engine::disk::sim::{CutPlan, Grain, SimDisk, SimImage, SimOptions};
use pando_engine::pool::check_offline;

/// What the corpus must come to.
pub(super) const REACHES: &[&str] =
    &["cuts in a recovery", "cuts in the work", "kills", "operations", "third ends"];
/// Ends of one input.
const ENDS_MAX: u64 = 4;
/// Operations of one input.
const OPS_MAX: u64 = 60;
/// Events of a recovery, roughly.
const RECOVERY_EVENTS: u64 = 64;

/// How a life ends.
#[derive(Clone, Copy, Debug)]
struct End {
    at: u64,
    /// What has landed, by the things that may; a kill otherwise.
    plan: u8,
    number: u64,
}

impl End {
    fn of(input: &mut Input<'_>) -> Self {
        let at = u64::from(input.short());
        let plan = input.byte();
        // A half of them while the pool is being opened.
        let events = if input.byte() & 1 == 1 { RECOVERY_EVENTS } else { 1024 };
        Self { at: at % events, plan, number: input.word().into() }
    }

    fn image(self, sim: &SimDisk, log: &mut Log, reached: &mut Reached) -> SimImage {
        let seed = self.number;
        let grain = if self.plan & 0x80 == 0 { Grain::Block } else { Grain::Sector };
        let thing = modulo(self.number, sim.pending(grain) + 1);
        let plan = match self.plan % 10 {
            0 => CutPlan::KeepNone,
            1 => CutPlan::KeepAll,
            2 => CutPlan::Prefix(grain, thing),
            3 => CutPlan::OnlyOne(grain, thing),
            4 => CutPlan::AllBut(grain, thing),
            5 => CutPlan::Mask(grain, seed | seed << 32),
            6 => CutPlan::Subset(seed),
            7 => CutPlan::Torn(seed),
            8 => CutPlan::Garbled(seed),
            _ => {
                reached.note("kills");
                return sim.image_after_kill(seed);
            }
        };
        log.power_failed();
        sim.image_after_cut(plan)
    }
}

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    let seed = u64::from(input.byte());
    let config = input.config();
    let ends: Vec<End> = (0..input.below(ENDS_MAX + 1)).map(|_| End::of(&mut input)).collect();
    let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
    let mut lives = Lives { config, input, maker: Maker::default(), left: OPS_MAX, log };
    let mut image = empty_pool(&config);
    for (number, end) in (0..).zip(ends) {
        let _told = Told(|| format!("life {number}, {end:?}"));
        let sim = SimDisk::from_image(image, seed + number, SimOptions::default());
        sim.set_cut_at(end.at);
        let opened = lives.live(&sim);
        reached.note(if opened { "cuts in the work" } else { "cuts in a recovery" });
        if number >= 2 {
            reached.note("third ends");
        }
        image = end.image(&sim, &mut lives.log.borrow_mut(), reached);
        sound_before_recovery(&image);
    }
    let sim = SimDisk::from_image(image, seed + ENDS_MAX, SimOptions::default());
    lives.live(&sim);
    reached.add("operations", OPS_MAX - lives.left);
    lives.empty(&sim);
}

/// The lives of one pool.
struct Lives<'a> {
    config: Config,
    input: Input<'a>,
    maker: Maker,
    /// Operations that may still be done.
    left: u64,
    log: SharedLog,
}

impl Lives<'_> {
    /// Runs until the power fails, or nothing is left to do. Whether the pool was open by then.
    fn live(&mut self, sim: &SimDisk) -> bool {
        let Self { config, input, maker, left, log } = self;
        let life = Life { sim, config, log };
        let mut opened = false;
        let ended = sim.run(life.drive(|model| {
            opened = true;
            *left = left.checked_sub(1)?;
            maker.next(input, model)
        }));
        if let Some(Err(error)) = ended {
            panic!("{error}");
        }
        opened
    }

    /// Deletes everything.
    fn empty(&self, sim: &SimDisk) {
        let image = sim.image_after_kill(0);
        let sim = SimDisk::from_image(image, 0, SimOptions::default());
        let done = sim.run(async {
            let life = Life { sim: &sim, config: &self.config, log: &self.log };
            let pool = life.begin().await?;
            drain(&pool).await
        });
        done.expect("the power stays on").expect("a sound disk");
    }
}

/// What the power has left is sound before any recovery. Only of the superblock's two copies the
/// second may be missing.
fn sound_before_recovery(image: &SimImage) {
    let sim = SimDisk::from_image(image.clone(), 0, SimOptions::default());
    let report = sim.run(async { check_offline(&sim.disk(), &|_, _| ()).await });
    let report = report.expect("the power stays on").expect("a sound disk");
    let mut findings = report.findings;
    findings.retain(|finding| finding.code != "K11");
    assert!(findings.is_empty(), "before recovery: {findings:?}");
}
