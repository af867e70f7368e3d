//! SIGKILL of the real daemon under load, again and again. The clients are in this process, which
//! is not killed, and keep a log of what they asked for and what was acknowledged. After each
//! restart every acknowledged write is there, flushed or not; what was under way is there whole,
//! block by block, or not at all; a clone taken under load is one instant of its source.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pando_tests::nbd::{FUA, command};
use pando_tests::noise::Noise;
use pando_tests::{Cli, Nbd, System};
use parking_lot::Mutex;

/// Kills. Each costs a restart and a comparison of everything.
const KILLS: u64 = 25;
/// Longest life of a daemon.
const LIFE_MS_MAX: u64 = 400;
const VOLUMES: [&str; 2] = ["left", "right"];
const VOLUME_BYTES: u64 = 8 << 20;
const SECTOR: u64 = 512;
/// Sectors in a block: what is written as one.
const BLOCK_SECTORS: u64 = 8;
const SECTORS: u64 = VOLUME_BYTES / SECTOR;
/// Connections to each volume, each with a part of it for itself.
const WRITERS: u64 = 2;
/// Requests under way on each connection.
const DEPTH: usize = 16;
/// Longest write in sectors.
const WRITE_SECTORS_MAX: u64 = 64;

/// What a sector was told to hold, in order: a stamp, or zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Zeros,
    Stamp(u64),
}

/// The log of one sector.
struct History {
    events: Vec<Event>,
    /// The last event that is known to have happened.
    acknowledged: usize,
}

/// The log of a volume.
struct Log {
    volume: u64,
    sectors: Mutex<Vec<History>>,
}

impl Log {
    fn new(volume: u64) -> Self {
        let empty = || History { events: vec![Event::Zeros], acknowledged: 0 };
        let sectors = Mutex::new((0..SECTORS).map(|_| empty()).collect());
        Self { volume, sectors }
    }

    /// For each sector the range of events in which an instant from now on lies.
    fn at_least(&self) -> Vec<usize> {
        self.sectors.lock().iter().map(|sector| sector.acknowledged).collect()
    }

    fn at_most(&self) -> Vec<usize> {
        self.sectors.lock().iter().map(|sector| sector.events.len() - 1).collect()
    }
}

/// The bytes of a sector that holds `event`.
fn content(volume: u64, sector: u64, event: Event) -> Vec<u8> {
    match event {
        Event::Zeros => vec![0; 512],
        Event::Stamp(stamp) => {
            [stamp, sector, volume, !stamp].map(u64::to_le_bytes).concat().repeat(16)
        }
    }
}

/// A request under way.
struct Request {
    start: u64,
    len: u64,
}

/// Writes at random until the daemon is gone.
struct Writer {
    log: Arc<Log>,
    first: u64,
    noise: Noise,
    stamp: u64,
    flying: HashMap<u64, Request>,
}

impl Writer {
    fn run(mut self, socket: &Path, name: &str) {
        let Ok(mut nbd) = Nbd::open(socket, name) else { return };
        loop {
            while self.flying.len() < DEPTH {
                if self.send(&mut nbd).is_err() {
                    return;
                }
            }
            match nbd.receive() {
                Ok((cookie, Ok(()))) => self.acknowledged(cookie),
                Ok((_, Err(errno))) => panic!("{name}: errno {errno}"),
                Err(_) => return,
            }
        }
    }

    /// Sends a write, a discard, zeros or a flush.
    fn send(&mut self, nbd: &mut Nbd) -> std::io::Result<()> {
        self.stamp += 1;
        let cookie = self.stamp;
        let kind = self.noise.below(20);
        if kind == 0 {
            self.flying.insert(cookie, Request { start: 0, len: 0 });
            return nbd.send((command::FLUSH, 0), cookie, (0, 0), &[]);
        }
        let Some(Request { start, len }) = self.choose() else { return Ok(()) };
        let range = (start * SECTOR, u32::try_from(len * SECTOR).expect("short"));
        let event = if kind < 3 { Event::Zeros } else { Event::Stamp(self.stamp) };
        {
            let mut sectors = self.log.sectors.lock();
            let all = start..start + len;
            all.for_each(|sector| at(&mut sectors, sector).events.push(event));
        }
        self.flying.insert(cookie, Request { start, len });
        match event {
            Event::Zeros => nbd.send((command::WRITE_ZEROES, 0), cookie, range, &[]),
            Event::Stamp(_) => {
                let all = start..start + len;
                let data: Vec<u8> =
                    all.flat_map(|sector| content(self.log.volume, sector, event)).collect();
                let flags = if kind == 3 { FUA } else { 0 };
                nbd.send((command::WRITE, flags), cookie, range, &data)
            }
        }
    }

    /// A range in which nothing is under way, so that the order of events is known: often whole
    /// blocks, sometimes parts of them.
    fn choose(&mut self) -> Option<Request> {
        let part = SECTORS / WRITERS;
        let len = match self.noise.below(4) {
            0 => 1 + self.noise.below(WRITE_SECTORS_MAX),
            1 => WRITE_SECTORS_MAX,
            _ => BLOCK_SECTORS,
        };
        let mut start = self.noise.below(part - len);
        if len.is_multiple_of(BLOCK_SECTORS) {
            start -= start % BLOCK_SECTORS;
        }
        let request = Request { start: self.first + start, len };
        let overlaps = |other: &Request| {
            request.start < other.start + other.len && other.start < request.start + request.len
        };
        (!self.flying.values().any(overlaps)).then_some(request)
    }

    fn acknowledged(&mut self, cookie: u64) {
        let request = self.flying.remove(&cookie).expect("an answer to a request under way");
        let mut sectors = self.log.sectors.lock();
        for sector in request.start..request.start + request.len {
            let history = at(&mut sectors, sector);
            history.acknowledged = history.events.len() - 1;
        }
    }
}

fn at(sectors: &mut [History], sector: u64) -> &mut History {
    &mut sectors[usize::try_from(sector).expect("64 bits")]
}

/// A clone or snapshot taken under load, and between which events of each sector it lies.
struct Frozen {
    name: String,
    volume: usize,
    at_least: Vec<usize>,
    at_most: Vec<usize>,
    acknowledged: bool,
}

/// Clones, snapshots and deletes until told to stop.
fn control(cli: &Cli, logs: &[Arc<Log>], round: u64, stop: &AtomicBool) -> Vec<Frozen> {
    let mut made: Vec<Frozen> = Vec::new();
    let mut noise = Noise::new(round);
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let volume = usize::from(noise.below(2) == 1);
        let name = format!("frozen-{round}-{turn}");
        let verb = if noise.below(2) == 0 { "clone" } else { "snapshot" };
        let at_least = logs[volume].at_least();
        let output = cli.output(&[verb, VOLUMES[volume], &name]);
        let at_most = logs[volume].at_most();
        let acknowledged = output.status.success();
        made.push(Frozen { name, volume, at_least, at_most, acknowledged });
        if turn % 3 == 2 && made.len() > 1 {
            let gone = made.remove(0);
            if !cli.output(&["volume", "delete", &gone.name]).status.success() {
                // Killed in between: it is there or not, so nothing is asked of it.
                break;
            }
        }
    }
    made
}

/// Reads a volume through NBD.
fn read_all(cli: &Cli, name: &str) -> Vec<u8> {
    let mut nbd = Nbd::open(&cli.serve(name), name).expect("an export that was started");
    assert_eq!(nbd.size, VOLUME_BYTES);
    let piece = 4_u32 << 20;
    let pieces = 0..VOLUME_BYTES / u64::from(piece);
    let content = pieces.flat_map(|i| nbd.read(i * u64::from(piece), piece)).collect();
    nbd.close();
    content
}

/// Compares a volume with its log, and settles what was under way.
fn verify(log: &Log, name: &str, found: &[u8]) {
    let mut sectors = log.sectors.lock();
    let mut blocks = Vec::new();
    for (index, history) in (0..).zip(sectors.iter_mut()) {
        let bytes = &found[usize::try_from(index * SECTOR).expect("64 bits")..][..512];
        let fits = |event: &Event| bytes == content(log.volume, index, *event);
        let place = (history.acknowledged..history.events.len())
            .find(|place| fits(&history.events[*place]));
        let Some(place) = place else {
            panic!(
                "{name}, sector {index}: found {:?}.., acknowledged is {:?}, under way {:?}",
                &bytes[..32],
                history.events[history.acknowledged],
                &history.events[history.acknowledged + 1..]
            );
        };
        // Zeros over zeros cannot be told apart, so only stamps are looked at.
        let under_way = history.events[history.acknowledged + 1..].last().copied();
        blocks
            .push((under_way.filter(|event| *event != Event::Zeros), place - history.acknowledged));
        history.events = vec![history.events[place]];
        history.acknowledged = 0;
    }
    for (index, block) in blocks.chunks(8).enumerate() {
        let one_write = block[0].0.is_some() && block.iter().all(|sector| sector.0 == block[0].0);
        let there = block.iter().filter(|sector| sector.1 > 0).count();
        let torn = one_write && there != 0 && there != 8;
        assert!(!torn, "{name}, block {index}: {there} of 8 sectors of a write under way");
    }
}

/// Compares a clone or snapshot with the log of its source.
fn verify_frozen(log: &Log, frozen: &Frozen, found: &[u8]) {
    let sectors = log.sectors.lock();
    for (place, history) in sectors.iter().enumerate() {
        let index = u64::try_from(place).expect("64 bits");
        let bytes = &found[place * 512..][..512];
        let (from, to) = (frozen.at_least[place], frozen.at_most[place]);
        let fits = |event: &Event| bytes == content(log.volume, index, *event);
        assert!(
            history.events[from..=to].iter().any(fits),
            "{}, sector {index}: found {:?}.., at its time there were {:?}",
            frozen.name,
            &bytes[..32],
            &history.events[from..=to]
        );
    }
}

/// Lets the daemon live under load for a moment, and kills it.
fn load_and_kill(system: &mut System, logs: &[Arc<Log>], round: u64) -> Vec<Frozen> {
    let cli = system.cli();
    let sockets: Vec<PathBuf> = VOLUMES.iter().map(|name| cli.serve(name)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (volume, name) in VOLUMES.iter().enumerate() {
            for writer in 0..WRITERS {
                let writer = Writer {
                    log: Arc::clone(&logs[volume]),
                    first: writer * (SECTORS / WRITERS),
                    noise: Noise::new((round << 8) | (writer << 1) | logs[volume].volume),
                    stamp: ((round << 4) | (writer + 1)) << 32,
                    flying: HashMap::new(),
                };
                let socket = &sockets[volume];
                scope.spawn(move || writer.run(socket, name));
            }
        }
        let frozen = scope.spawn(|| control(&cli, logs, round, &stop));
        // The moment of the kill is what is random here; nothing waits for anything.
        let life = 20 + Noise::new(!round).below(LIFE_MS_MAX - 20);
        std::thread::sleep(Duration::from_millis(life));
        stop.store(true, Ordering::Relaxed);
        system.kill();
        frozen.join().expect("no panic of the control thread")
    })
}

#[test]
fn no_acknowledged_write_is_lost_by_sigkill() {
    let mut system = System::start("512MiB");
    let cli = system.cli();
    let logs: Vec<Arc<Log>> = (0..2).map(|volume| Arc::new(Log::new(volume))).collect();
    for name in VOLUMES {
        cli.run(&["volume", "create", name, "--size", &VOLUME_BYTES.to_string()]);
    }
    let mut writes = 0;
    for round in 0..KILLS {
        let frozen = load_and_kill(&mut system, &logs, round);
        system.spawn();
        let names: Vec<String> = cli
            .json(&["volume", "list"])
            .as_array()
            .expect("a list")
            .iter()
            .map(|volume| volume["name"].as_str().expect("a name").to_owned())
            .collect();
        for one in &frozen {
            let exists = names.contains(&one.name);
            assert!(exists || !one.acknowledged, "{} was acknowledged", one.name);
            if exists {
                let found = read_all(&cli, &one.name);
                verify_frozen(&logs[one.volume], one, &found);
            }
        }
        for (log, name) in logs.iter().zip(VOLUMES) {
            writes += log.sectors.lock().iter().map(|s| s.events.len() - 1).sum::<usize>();
            verify(log, name, &read_all(&cli, name));
        }
        for name in names.iter().filter(|name| name.starts_with("frozen")) {
            // One whose deletion was cut off is not exported.
            drop(cli.output(&["volume", "serve", "--stop", name]));
            cli.run(&["volume", "delete", name]);
        }
        if round % 5 == 4 {
            system.check();
        }
    }
    eprintln!("{KILLS} kills, {writes} sectors written under load");
    assert!(writes > 10_000, "there was a load worth the name: {writes} sectors");
    system.stop();
}
