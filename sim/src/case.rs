//! A case: lives of a pool one behind the other, with all that happens to it. Whatever an explorer
//! or a campaign finds wrong is one, so that it can be repeated, made smaller and read.

use std::fmt;

use super::crash::check_image;
use super::model::Model;
use super::rare::Rares;
use super::run::{Config, Log, drain};
use super::stage::{Act, Keep, Seen, Stage};
use super::trouble::{Response, Suffered, Trouble, judge_damaged};
use pando_engine::disk::sim::{CutPlan, Moment, SimImage};

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The power fails just before an event (`None`: when all is done), and `plan` says what of
    /// that which was not durable is there all the same.
    Power {
        /// The event.
        at: Option<u64>,
        /// What survives.
        plan: CutPlan,
    },
    /// The process is killed just before an event (`None`: when all is done); `seed` says what of
    /// that which was under way lands.
    Kill {
        /// The event.
        at: Option<u64>,
        /// What lands.
        seed: u64,
        /// Whether the memory of the journal is there afterwards.
        memory: bool,
    },
    /// The pool is closed.
    Close,
    /// Everything is deleted, and all space comes back.
    Drain,
}

impl End {
    /// Nothing comes after it.
    pub(super) const REST: Self = Self::Power { at: None, plan: CutPlan::KeepNone };

    /// What a life that ends so at a moment leaves to the next one.
    pub(super) fn leave(&self, moment: &Moment, log: &mut Log) -> SimImage {
        match *self {
            Self::Power { plan, .. } => {
                log.power_failed();
                moment.after_cut(plan)
            }
            Self::Kill { seed, memory: true, .. } => {
                // Memory keeps records, not the data that they name.
                if moment.flush_failed() {
                    log.power_failed();
                }
                moment.after_kill(seed)
            }
            Self::Kill { seed, memory: false, .. } => {
                log.power_failed();
                moment.after_kill(seed).without_memory()
            }
            Self::Close | Self::Drain => moment.after_kill(0),
        }
    }

    pub(super) const fn at(&self) -> Option<u64> {
        match self {
            Self::Power { at, .. } | Self::Kill { at, .. } => *at,
            Self::Close | Self::Drain => None,
        }
    }
}

/// A life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaseLife {
    /// The order of completions.
    pub seed: u64,
    /// What goes wrong.
    pub troubles: Vec<Trouble>,
    /// What is done; what does not fit is left out.
    pub acts: Vec<Act>,
    /// How it ends.
    pub end: End,
}

impl CaseLife {
    /// A life in which nothing is done.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed, troubles: Vec::new(), acts: Vec::new(), end: End::REST }
    }

    /// The image as this life finds it, with what has rotted.
    pub(super) fn rotten(&self, mut image: SimImage) -> SimImage {
        for trouble in &self.troubles {
            if let Trouble::Rot { seed, bits } = *trouble {
                Trouble::rot(seed, bits, &mut image);
            }
        }
        image
    }

    /// What is asked of the pool, if something goes wrong.
    #[must_use]
    pub fn response(&self) -> Option<Response> {
        self.troubles.first().map(Trouble::response)
    }
}

/// Lives of a pool, from its making on.
#[derive(Clone, Debug)]
pub struct Case {
    /// The pool, and how it is opened.
    pub config: Config,
    /// Its lives.
    pub lives: Vec<CaseLife>,
}

impl Case {
    /// Lives through all of it.
    ///
    /// # Panics
    /// When the pool does anything wrong.
    pub fn run(&self) {
        self.run_with(|_| ());
    }

    /// As [`Self::run`]; lets `look` see what each life begins with.
    pub fn run_with(&self, mut look: impl FnMut(&SimImage)) {
        let mut image = self.config.formatted();
        let mut log = Log::new(Model::default());
        let rares = Rares::default();
        let mut damaged = None;
        for life in &self.lives {
            if let Some(suffered) = damaged {
                return judge_damaged(&self.config, &image, &log, &suffered);
            }
            look(&image);
            (image, log, damaged) = live(&self.config, image, log, life, &rares);
        }
    }

    /// Operations in all lives.
    #[must_use]
    pub fn acts(&self) -> usize {
        self.lives.iter().map(|life| life.acts.len()).sum()
    }
}

/// Lives one life; returns what the next one finds, and how it went if that may be damaged.
///
/// # Panics
/// When the pool does anything wrong.
pub(super) fn live(
    config: &Config,
    image: SimImage,
    log: Log,
    life: &CaseLife,
    rares: &Rares,
) -> (SimImage, Log, Option<Suffered>) {
    if life.end == End::Drain {
        check_image(&image);
    }
    let stage = Stage::new(config, life.rotten(image), life.seed, log, rares);
    if let Some(at) = life.end.at() {
        stage.sim.set_cut_at(at);
    }
    play(&stage, life, Keep::Nothing);
    let suffered = stage.suffered.take();
    let mut log = stage.log.borrow().clone();
    let image = life.end.leave(&stage.sim.moment(), &mut log);
    (image, log, suffered.filter(|_| life.response() == Some(Response::Noticed)))
}

/// Does what is done in a life. Also says whether it came to its end.
pub(super) fn play(stage: &Stage<'_>, life: &CaseLife, keep: Keep) -> (Vec<Seen>, bool) {
    for trouble in &life.troubles {
        if let Trouble::Fault(fault) = trouble {
            stage.sim.inject(*fault);
        }
    }
    let mut acts = life.acts.iter().cloned();
    let (ended, seen) = stage.run(keep, async {
        if let Some(response) = life.response() {
            return stage.suffer(life, response).await;
        }
        let pool = stage.live(|_| acts.next()).await;
        match life.end {
            End::Close => pool.close().await.unwrap_or_else(|e| panic!("closing fails: {e}")),
            End::Drain => drain(&pool).await.unwrap_or_else(|e| panic!("cannot delete all: {e}")),
            End::Power { .. } | End::Kill { .. } => {}
        }
    });
    (seen, ended.is_some())
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}", self.config)?;
        for (number, life) in self.lives.iter().enumerate() {
            writeln!(f, "life {number}, order of completions {}:", life.seed)?;
            for trouble in &life.troubles {
                writeln!(f, "    trouble: {trouble:?}")?;
            }
            for act in &life.acts {
                match act {
                    Act::One(op) => writeln!(f, "    {op:?}")?,
                    Act::Race(one, other) => {
                        writeln!(f, "    at once: {one:?}\n             {other:?}")?
                    }
                }
            }
            writeln!(f, "    end: {:?}", life.end)?;
        }
        Ok(())
    }
}
