//! Races: one pool on one simulated disk, several shards, each a thread of shuttle's with an
//! executor of its own; another thread is the device. What the shards do, the order in which I/O
//! completes, and the moment at which the power fails come from one number, which the scheduler
//! draws; so a schedule repeats all of it.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, OnceLock};

use pando_engine::disk::sim::{Fault, Rng, SimDisk, SimImage, SimOptions};
use pando_engine::pool::{OpenOptions, Pool};
use pando_engine::runtime::LocalFuture;
use pando_engine::runtime::executor::{Executor, spawn_local};
use pando_engine::runtime::sync::thread;
use pando_engine::units::BLOCK_SIZE;
use pando_sim::crash::plans;
use pando_sim::run::{DISCARD_UNIT, check_sound, drain, observe, perform, settle};
use pando_sim::{Config, Model, Op};
use parking_lot::Mutex;
use shuttle::rand::RngCore;
use shuttle::sync::Barrier;
use tokio::sync::oneshot;

use crate::explore::once;
use crate::history::{Before, History, before};
use crate::shard::{Shard, limit};

/// What a shard does.
pub(crate) type Body = Box<dyn FnOnce(Shard) -> LocalFuture<'static, ()> + Send>;

/// A shard that runs `body`.
pub(crate) fn shard<F, Fut>(body: F) -> Body
where
    F: FnOnce(Shard) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + 'static,
{
    Box::new(move |shard| Box::pin(body(shard)))
}

/// A pool before a race.
pub(crate) struct Start {
    config: Config,
    image: SimImage,
    before: Before,
}

impl Start {
    /// A pool on which `ops` were carried out, and which was closed.
    pub(crate) fn after(config: Config, ops: Vec<Op>) -> Arc<Self> {
        let place: Arc<OnceLock<Self>> = Arc::default();
        let made = Arc::clone(&place);
        once(move || {
            let sim = SimDisk::from_image(config.formatted(), 1, SimOptions::default());
            let before = sim.run(async {
                let pool = open(&config, &sim).await;
                spawn_background(&pool);
                for (op, stamp) in ops.iter().zip(1..) {
                    perform(&pool, op, stamp).await.expect("what comes before the race");
                }
                settle(&pool).await.expect("no fault was injected");
                let model = observe(&pool).await.expect("the pool can be read");
                pool.close().await.expect("no fault was injected");
                before(&model)
            });
            let image = sim.image_after_kill(1);
            let before = before.expect("no power failure was asked for");
            assert!(made.set(Self { config, image, before }).is_ok(), "this runs once");
        });
        Arc::new(Arc::into_inner(place).and_then(OnceLock::into_inner).expect("it was made"))
    }
}

/// Opens the pool on `sim`, without its background tasks.
async fn open(config: &Config, sim: &SimDisk) -> Pool {
    let options = OpenOptions {
        cache_bytes: config.cache_bytes,
        fanout: config.fanout,
        discard: config.discard,
        discard_unit: DISCARD_UNIT,
        ..OpenOptions::default()
    };
    let memory = |len: usize| sim.map_ring(len / BLOCK_SIZE * 3 / 4 * BLOCK_SIZE);
    Pool::open(sim.disk(), memory, options).await.unwrap_or_else(|e| panic!("open: {e}"))
}

fn spawn_background(pool: &Pool) {
    let (checkpoints, discards) = (pool.clone(), pool.clone());
    spawn_local(async move { checkpoints.run_background().await });
    spawn_local(async move { discards.run_discards().await });
}

/// A race in one schedule.
pub(crate) struct Race {
    start: Arc<Start>,
    pub(crate) sim: SimDisk,
    pub(crate) history: Arc<Mutex<History>>,
    pub(crate) rng: Rng,
    /// The power fails within so many events, in half of the schedules; 0: it never does.
    cut_within: u64,
    /// The pool's background tasks run.
    background: bool,
    /// A volume with a limit of requests in a second.
    limited: Option<(&'static str, u64)>,
    /// What goes wrong after the pool was opened.
    fault: Option<Fault>,
    end: End,
}

/// In what state a race leaves the pool, if the power does not fail.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It goes on.
    Well,
    /// It was closed; opened again it holds all that was acknowledged.
    Closed,
    /// It may be poisoned; what is left of it is what a power failure leaves.
    Poisoned,
}

impl Race {
    /// The race of this schedule.
    pub(crate) fn new(start: &Arc<Start>) -> Self {
        let mut rng = Rng::new(shuttle::rand::thread_rng().next_u64());
        let sim = SimDisk::from_image(start.image.clone(), rng.bits(), SimOptions::default());
        let history = Arc::new(Mutex::new(History::new(&start.before)));
        let start = Arc::clone(start);
        Self {
            start,
            sim,
            history,
            rng,
            cut_within: 0,
            background: true,
            limited: None,
            fault: None,
            end: End::Well,
        }
    }

    /// Lets the power fail within `events`, in half of the schedules.
    pub(crate) const fn cut_within(mut self, events: u64) -> Self {
        self.cut_within = events;
        self
    }

    /// Without the pool's background task: checkpoints are made by shards alone.
    pub(crate) const fn without_background(mut self) -> Self {
        self.background = false;
        self
    }

    /// With a limit of requests in a second on a volume.
    pub(crate) const fn limited(mut self, volume: &'static str, iops: u64) -> Self {
        self.limited = Some((volume, iops));
        self
    }

    /// Something goes wrong.
    pub(crate) const fn with_fault(mut self, fault: Fault) -> Self {
        self.fault = Some(fault);
        self
    }

    /// The pool is not well at the end.
    pub(crate) const fn leaves_it(mut self, end: End) -> Self {
        self.end = end;
        self
    }

    /// Runs the shards to their end, or until the power fails; then checks all that there is.
    pub(crate) fn run(self, bodies: Vec<Body>) {
        self.run_then(bodies, async |_: &Pool| ());
    }

    /// As [`Self::run`]; `then` looks at the pool before all of it is deleted.
    pub(crate) fn run_then(mut self, bodies: Vec<Body>, then: impl AsyncFnOnce(&Pool)) {
        let mut threads = Vec::new();
        let mut executor = Executor::new(self.sim.driver());
        let dead = Arc::new(Barrier::new(bodies.len() + 1));
        let ended = executor.run(self.race(bodies, &mut threads, &dead, then));
        if ended.is_none() {
            dead.wait();
        }
        drop(executor);
        for thread in threads {
            thread.join().expect("a thread that panics ends the test");
        }
        assert_eq!(ended.is_none(), self.sim.is_cut(), "the race ends, or the power fails");
        match self.end {
            End::Well if ended.is_some() => {}
            End::Closed if ended.is_some() => self.reopen(),
            _ => self.recover(),
        }
    }

    async fn race(
        &mut self,
        bodies: Vec<Body>,
        threads: &mut Vec<thread::JoinHandle<()>>,
        dead: &Arc<Barrier>,
        then: impl AsyncFnOnce(&Pool),
    ) {
        let pool = open(&self.start.config, &self.sim).await;
        if self.cut_within > 0 && self.rng.chance(8) {
            let number = self.sim.io_count() + self.rng.below(self.cut_within);
            self.sim.set_cut_at(number);
        }
        if let Some((volume, iops)) = self.limited {
            limit(&pool, volume, iops).await;
        }
        if let Some(fault) = self.fault {
            self.sim.inject(fault);
        }
        if self.background {
            spawn_background(&pool);
        }
        self.sim.begin_service();
        let device = self.sim.clone();
        let device = thread::spawn(move || device.serve());
        let mut ends = Vec::new();
        let mut quits = Vec::new();
        for body in bodies {
            let (end, ended) = oneshot::channel();
            let (quit, quitted) = oneshot::channel::<()>();
            let (sim, core, dead) = (self.sim.clone(), pool.core(), Arc::clone(dead));
            let (history, rng) = (Arc::clone(&self.history), Rng::new(self.rng.bits()));
            threads.push(thread::spawn(move || {
                let mut executor = Executor::new(sim.driver());
                let ended = executor.run(async {
                    let pool = Pool::attach(core, sim.disk());
                    spawn_local(async move {
                        body(Shard { pool, history, rng }).await;
                        end.send(()).ok();
                    });
                    // It stays until the others are done: they may have given it work.
                    quitted.await.ok();
                });
                if ended.is_none() {
                    // When the power fails all stop at once: nobody sees what the others drop.
                    dead.wait();
                }
            }));
            ends.push(ended);
            quits.push(quit);
        }
        for ended in ends {
            // Dropped by a shard that stopped because the power failed, as this one will.
            ended.await.ok();
        }
        self.sim.set_cut_at(u64::MAX);
        if self.sim.is_cut() {
            return std::future::pending().await;
        }
        drop(quits);
        threads.drain(..).for_each(|thread| thread.join().expect("a shard ends"));
        self.sim.end_service();
        device.join().expect("the device ends");
        then(&pool).await;
        if self.end == End::Well {
            self.check(&pool).await;
        }
    }

    /// Nothing is under way any more.
    async fn check(&self, pool: &Pool) {
        check_sound(pool).await;
        let seen = observe(pool).await.unwrap_or_else(|e| panic!("at the end: {e}"));
        self.history.lock().check_now(&seen);
        drain(pool).await.unwrap_or_else(|e| panic!("cannot delete all: {e}"));
    }

    /// Opens what a power failure has left, some of what was not durable included.
    fn recover(&mut self) {
        for plan in plans(&self.sim, &mut self.rng, 2) {
            let image = self.sim.image_after_cut(plan);
            self.open_again(image, |history, seen| history.check_left(seen));
        }
    }

    /// Opens what the pool has left when it stopped by itself.
    fn reopen(&mut self) {
        let image = self.sim.image_after_kill(self.rng.bits());
        self.open_again(image, History::check_now);
    }

    fn open_again(&mut self, image: SimImage, check: impl Fn(&mut History, &Model)) {
        let sim = SimDisk::from_image(image, self.rng.bits(), SimOptions::default());
        sim.run(async {
            let pool = open(&self.start.config, &sim).await;
            spawn_background(&pool);
            check_sound(&pool).await;
            let seen = observe(&pool).await.unwrap_or_else(|e| panic!("opened again: {e}"));
            check(&mut self.history.lock(), &seen);
            drain(&pool).await.unwrap_or_else(|e| panic!("cannot delete all: {e}"));
        });
    }
}

/// The operation that makes empty volumes of so many blocks.
pub(crate) fn volumes(sizes: &[(&str, u64)]) -> Op {
    use pando_sim::model::Birth;
    let birth = |(name, blocks): &(&str, u64)| Birth {
        name: (*name).into(),
        size_bytes: Some(blocks * 4096),
        source: None,
        snapshot: false,
    };
    Op::Create(sizes.iter().map(birth).collect())
}

/// The operation that writes whole blocks.
pub(crate) fn filled(volume: &str, first: u64, blocks: u64) -> Op {
    Op::Write { volume: volume.into(), first: first * 8, count: blocks * 8, fua: false }
}

/// What was read, as a map.
pub(crate) type Blocks = BTreeMap<u64, [u64; 8]>;
