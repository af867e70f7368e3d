//! Rounds of load, SIGKILL, restart and comparison.
//!
//! ```text
//! load     two volumes with two connections each, one volume with a client of others, and
//!          somebody who takes snapshots and clones, grows, deletes, scrubs and checks
//! kill     in the midst of it; or stopped before; or while a chosen deed is done; or told to end
//!          before; or again and again while it starts
//! check    offline, as the kill has left it, in some rounds
//! restart  with the other program in every second round, if there is one
//! compare  snapshots, clones, volumes, what the client of others has written
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use pando_engine::units::{to_u64, to_usize};
use pando_tests::noise::Noise;
use pando_tests::tools::{run, text};
use pando_tests::{Cli, Nbd, System};
use rustix::process::Signal;

use crate::clients::{self, Foreign, TOOLS};
use crate::control::{Control, DEEDS, Deed, Frozen, Made, PREFIX};
use crate::log::{BLOCK_SECTORS, Clock, Cut, Log, Moment, SECTOR};
use crate::tally::Tally;
use crate::writer::{Load, Writer};

const VOLUMES: [&str; 2] = ["left", "right"];
const VOLUME_BYTES: u64 = 8 << 20;
const SECTORS: u64 = VOLUME_BYTES / SECTOR;
/// Connections to each volume, each with a part of it for itself.
const WRITERS: u64 = 2;
/// A journal so small that it is gone through many times.
const POOL: [&str; 6] = ["--size", "512MiB", "--allocate", "sparse", "--journal", "1MiB"];
/// Rounds in which a snapshot is looked at again.
const KEPT_ROUNDS: u64 = 6;
/// Every so many rounds the pool is checked as the kill has left it.
const OFFLINE_EVERY: u64 = 3;
const PIECE: u32 = 1 << 20;
/// Longest time until the pool of a killed daemon can be opened.
const RELEASE: Duration = Duration::from_secs(10);

const _: () = assert!(SECTORS.is_multiple_of(WRITERS * BLOCK_SECTORS));

/// What is wished of a campaign.
pub(crate) struct Options {
    pub(crate) kills: u64,
    pub(crate) seconds: u64,
    pub(crate) seed: u64,
    /// Longest life of a daemon under load; most are much shorter.
    pub(crate) life_ms_max: u64,
    /// Another pandod for every second round.
    pub(crate) old: Option<PathBuf>,
}

/// When a daemon is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strike {
    /// In the midst of the load.
    Load,
    /// After SIGSTOP, with or without SIGCONT.
    Stopped,
    /// While something certain is done.
    During(Deed),
    /// While it writes its last checkpoint.
    Ending,
    /// Under load, and then while it starts.
    Start,
}

impl Strike {
    fn choose(noise: &mut Noise) -> Self {
        match noise.below(16) {
            0..=5 => Self::Load,
            6 | 7 => Self::Stopped,
            8..=11 => Self::During(DEEDS[to_usize(noise.below(to_u64(DEEDS.len())))]),
            12 | 13 => Self::Ending,
            _ => Self::Start,
        }
    }

    fn name(self) -> String {
        match self {
            Self::During(deed) => format!("during {deed:?}").to_lowercase(),
            other => format!("{other:?}").to_lowercase(),
        }
    }
}

/// A snapshot or clone that outlives its round, and what is in it.
struct Kept {
    name: String,
    bytes: Vec<u8>,
    until: u64,
}

struct Campaign<'a> {
    options: &'a Options,
    system: System,
    clock: Arc<Clock>,
    logs: Vec<Arc<Log>>,
    foreign: Vec<Foreign>,
    kept: Option<Kept>,
    noise: Noise,
    round: u64,
    tally: Tally,
}

/// What a round under load has left.
struct Left {
    made: Made,
    loads: Vec<Load>,
}

/// Runs a campaign; what fails first ends it.
pub(crate) fn campaign(options: &Options) -> Tally {
    let since = Instant::now();
    let mut campaign = Campaign::new(options);
    while campaign.tally.kills < options.kills && since.elapsed().as_secs() < options.seconds {
        let done = catch_unwind(AssertUnwindSafe(|| campaign.round()));
        let failure = match done {
            Ok(Ok(())) => None,
            Ok(Err(why)) => Some(why),
            Err(_) => Some("a panic; see above".to_owned()),
        };
        if let Some(why) = failure {
            campaign.keep(&why);
            break;
        }
        campaign.round += 1;
    }
    campaign.tally.seconds = since.elapsed().as_secs_f64();
    campaign.tally
}

impl<'a> Campaign<'a> {
    fn new(options: &'a Options) -> Self {
        let mut system = System::empty();
        system.configure("export_all = true\n");
        system.create_pool(&POOL);
        system.spawn();
        let cli = system.cli();
        let tools = TOOLS.map(|tool| (tool.name(), clients::BYTES));
        for (name, bytes) in VOLUMES.map(|name| (name, VOLUME_BYTES)).into_iter().chain(tools) {
            cli.run(&["volume", "create", name, "--size", &bytes.to_string()]);
        }
        let clock = Arc::new(Clock::default());
        let log = |volume| Arc::new(Log::new(volume, SECTORS, Arc::clone(&clock)));
        let logs = (0..to_u64(VOLUMES.len())).map(log).collect();
        let socket = system.path().join("nbd/all.sock");
        let foreign = TOOLS.map(|tool| Foreign::new(tool, system.path(), &socket)).into();
        let noise = Noise::new(options.seed);
        let (tally, kept) = (Tally::new(options.seed), None);
        Self { options, system, clock, logs, foreign, kept, noise, round: 0, tally }
    }

    fn round(&mut self) -> Result<(), String> {
        let strike = Strike::choose(&mut self.noise);
        let client = to_usize(self.noise.below(4)).saturating_sub(1);
        let left = self.load_and_kill(strike, client)?;
        *self.tally.strikes.entry(strike.name()).or_default() += 1;
        *self.tally.clients.entry(TOOLS[client].name()).or_default() += 1;
        if self.round % OFFLINE_EVERY == 1 {
            self.check_offline()?;
        }
        let other = self.options.old.clone().filter(|_| self.round.is_multiple_of(2));
        self.tally.old_rounds += u64::from(other.is_some());
        self.system.use_daemon(other);
        if strike == Strike::Start {
            for _ in 0..=self.noise.below(3) {
                // A start takes about as long as the longest so far, or is soon over.
                let within = self.tally.restart_ms_max.max(20);
                let after = Duration::from_millis(self.noise.below(within));
                self.tally.kills += u64::from(self.system.spawn_and_kill(after));
            }
        }
        let since = Instant::now();
        self.system.spawn();
        let took = u64::try_from(since.elapsed().as_millis()).expect("short");
        self.tally.restart_ms_max = self.tally.restart_ms_max.max(took);
        for load in &left.loads {
            self.tally.acknowledged += load.acknowledged;
            self.tally.under_way += load.under_way;
        }
        self.tally.deeds += left.made.deeds;
        self.verify(&left.made, client)?;
        self.tally.rounds += 1;
        Ok(())
    }

    fn load_and_kill(&mut self, strike: Strike, client: usize) -> Result<Left, String> {
        let (cli, round) = (self.system.cli(), self.round);
        let socket = self.system.path().join("nbd/all.sock");
        let seeds: Vec<u64> = (0..8).map(|_| self.noise.next()).collect();
        let stop = AtomicBool::new(false);
        let (tell, told) = channel();
        let may_end = strike == Strike::Ending;
        let control = Control {
            cli,
            clock: Arc::clone(&self.clock),
            volumes: &VOLUMES,
            volume_bytes: VOLUME_BYTES,
            round,
            noise: Noise::new(seeds[0]),
            tell,
            may_end,
        };
        let writers = writers(&self.logs, round, &seeds[1..]);
        let killer =
            Killer { strike, life_ms_max: self.options.life_ms_max, noise: &mut self.noise };
        let (foreign, system) = (&mut self.foreign[client], &mut self.system);
        let mut killed = false;
        let left = thread::scope(|scope| {
            let run = |(writer, name): (Writer, &'static str)| {
                let socket = &socket;
                scope.spawn(move || writer.run(socket, name, may_end))
            };
            let writers: Vec<_> = writers.into_iter().map(run).collect();
            let control = scope.spawn(|| control.run(&stop));
            let foreign = scope.spawn(|| foreign.run(&stop));
            killer.wait(system, &told);
            stop.store(true, Ordering::Relaxed);
            killed = system.try_kill();
            let made = control.join().expect("no panic of the control")?;
            foreign.join().expect("no panic of the client's thread")?;
            let loads = writers.into_iter().map(|writer| writer.join().expect("no panic"));
            Ok(Left { made, loads: loads.collect::<Result<_, String>>()? })
        });
        self.tally.kills += u64::from(killed);
        if !killed && !may_end {
            return Err("pandod has ended by itself".to_owned());
        }
        left
    }

    /// Checks the pool as the kill has left it. The kernel lets go of it when the last I/O of the
    /// daemon is over.
    fn check_offline(&mut self) -> Result<(), String> {
        let pool = text(self.system.pool()).to_owned();
        let until = Instant::now() + RELEASE;
        loop {
            let done = self.system.cli().output(&["pool", "check", "--offline", &pool]);
            let why = String::from_utf8_lossy(&done.stderr);
            if done.status.success() {
                self.tally.checks += 1;
                return Ok(());
            }
            if !why.contains("is in use by another process") || Instant::now() >= until {
                let said = String::from_utf8_lossy(&done.stdout);
                return Err(format!("check: {said}\n{why}"));
            }
        }
    }

    fn verify(&mut self, made: &Made, client: usize) -> Result<(), String> {
        let cli = self.system.cli();
        let sizes = sizes(&cli);
        if let Some(name) = made.deleted.iter().find(|name| sizes.contains_key(*name)) {
            return Err(format!("{name} is there, its deletion was acknowledged"));
        }
        self.verify_frozen(&made.frozen, &sizes)?;
        for (log, name) in self.logs.iter().zip(VOLUMES) {
            let judged = log.judge(name, &self.read(name), Moment::END)?;
            log.settle(&judged);
            self.tally.blocks += SECTORS / BLOCK_SECTORS;
        }
        let found = self.read(TOOLS[client].name());
        self.foreign[client].verify(&found)?;
        self.tally.blocks += to_u64(found.len()) / 4096;
        self.tally.foreign_acknowledged = self.foreign.iter().map(|one| one.acknowledged).sum();
        if let Some(kept) = &self.kept {
            if self.read(&kept.name) != kept.bytes {
                return Err(format!("{} has changed since it was taken", kept.name));
            }
            self.kept = self.kept.take().filter(|kept| kept.until > self.round);
        }
        let kept = self.kept.as_ref().map(|kept| kept.name.as_str());
        for name in sizes.keys().filter(|name| name.starts_with(PREFIX) && Some(&***name) != kept) {
            cli.run(&["volume", "delete", name]);
        }
        Ok(())
    }

    /// Compares snapshots and clones with the logs of their sources.
    fn verify_frozen(
        &mut self,
        all: &[Frozen],
        sizes: &BTreeMap<String, u64>,
    ) -> Result<(), String> {
        let mut cuts: BTreeMap<u64, Cut> = BTreeMap::new();
        let mut whole: BTreeMap<&str, BTreeSet<bool>> = BTreeMap::new();
        for frozen in all {
            let (name, size) = (&frozen.name, sizes.get(&frozen.name));
            // What was asked for in one request is there or not there as one.
            let request = name.rsplit_once('-').map_or("", |(request, _)| request);
            let there = whole.entry(request).or_default();
            there.insert(size.is_some());
            if there.len() > 1 {
                return Err(format!("{name}: a part of what was frozen together is there"));
            }
            let Some(size) = size else {
                if frozen.acknowledged {
                    return Err(format!("{name} is lost, it was acknowledged"));
                }
                continue;
            };
            let found = self.read(name);
            if !frozen.bytes.contains(size) || to_u64(found.len()) != *size {
                return Err(format!("{name} has {size} bytes, not {:?}", frozen.bytes));
            }
            let judged = self.logs[frozen.volume].judge(name, &found, frozen.at)?;
            let cut = cuts.entry(frozen.group).or_insert(Cut::NONE);
            *cut = cut.and(judged.cut);
            cut.check(name)?;
            if found[to_usize(VOLUME_BYTES)..].iter().any(|byte| *byte != 0) {
                return Err(format!("{name} has grown by something else than zeros"));
            }
            self.tally.frozen += 1;
            self.tally.blocks += size / 4096;
            if self.kept.is_none() {
                let until = self.round + KEPT_ROUNDS;
                self.kept = Some(Kept { name: name.clone(), bytes: found, until });
            }
        }
        self.tally.cuts += to_u64(cuts.len());
        Ok(())
    }

    /// A whole volume, through NBD.
    fn read(&self, name: &str) -> Vec<u8> {
        let socket = self.system.path().join("nbd/all.sock");
        let mut nbd = Nbd::open(&socket, name).expect("all volumes are offered");
        let pieces = 0..nbd.size / u64::from(PIECE);
        let content = pieces.flat_map(|i| nbd.read(i * u64::from(PIECE), PIECE)).collect();
        nbd.close();
        content
    }

    /// Writes a failure down, and keeps the pool and the daemon's log.
    fn keep(&mut self, why: &str) {
        let Options { seed, .. } = self.options;
        let place = std::env::temp_dir().join(format!("pando-hammer-{seed}-{}", self.round));
        let kept = catch_unwind(AssertUnwindSafe(|| {
            std::fs::create_dir_all(&place).expect("a directory");
            for file in ["pool", "log"] {
                let file = self.system.path().join(file);
                run("cp", &["--sparse=always", text(&file), text(&place)]);
            }
        }));
        let place = if kept.is_ok() { place.as_path() } else { Path::new("(not kept)") };
        let log = self.system.log();
        let end: Vec<&str> = log.lines().rev().take(20).collect();
        let end = end.into_iter().rev().collect::<Vec<_>>().join("\n");
        let round = self.round;
        let failure = format!("seed {seed}, round {round}, kept in {}: {why}", place.display());
        eprintln!("{failure}\nend of the log of pandod:\n{end}");
        self.tally.failures.push(failure);
    }
}

/// The connections of a round.
fn writers(logs: &[Arc<Log>], round: u64, seeds: &[u64]) -> Vec<(Writer, &'static str)> {
    let part = SECTORS / WRITERS;
    let all = logs.iter().zip(VOLUMES).flat_map(|pair| (0..WRITERS).map(move |n| (pair, n)));
    let writer = |(((log, name), number), seed): (((&Arc<Log>, _), u64), &u64)| {
        let stamp = (round << 40) | ((number + 1) << 32);
        (Writer::new(Arc::clone(log), (number * part, part), *seed, stamp), name)
    };
    all.zip(seeds).map(writer).collect()
}

/// Names and sizes of all volumes.
fn sizes(cli: &Cli) -> BTreeMap<String, u64> {
    let list = cli.json(&["volume", "list"]);
    let one = |volume: &serde_json::Value| {
        let name = volume["name"].as_str().expect("a name").to_owned();
        (name, volume["size_bytes"].as_u64().expect("a size"))
    };
    list.as_array().expect("a list").iter().map(one).collect()
}

/// Waits for the moment of the kill. It is what is random here; nothing waits for anything.
struct Killer<'a> {
    strike: Strike,
    life_ms_max: u64,
    noise: &'a mut Noise,
}

impl Killer<'_> {
    fn wait(mut self, system: &System, told: &Receiver<Deed>) {
        match self.strike {
            Strike::Load | Strike::Start => self.live(),
            Strike::Stopped => {
                self.live();
                system.signal(Signal::STOP);
                self.sleep(200);
                if self.noise.below(2) == 0 {
                    system.signal(Signal::CONT);
                    self.sleep(50);
                }
            }
            Strike::During(wanted) => {
                let until = Instant::now() + Duration::from_millis(self.life_ms_max);
                let left = || until.saturating_duration_since(Instant::now());
                while told.recv_timeout(left()).is_ok_and(|deed| deed != wanted) {}
                self.sleep(40);
            }
            Strike::Ending => {
                self.live();
                system.signal(Signal::TERM);
                self.sleep(60);
            }
        }
    }

    /// A life that is mostly short.
    fn live(&mut self) {
        let part = self.noise.below(1000);
        let ms = self.life_ms_max * part.pow(3) / 1_000_000_000;
        thread::sleep(Duration::from_millis(10 + ms));
    }

    fn sleep(&mut self, ms_max: u64) {
        thread::sleep(Duration::from_micros(self.noise.below(ms_max * 1000)));
    }
}
