//! The report of the CSI adapter: what a PersistentVolumeClaim that names a source waits for, and
//! what adapter and daemon take while nothing happens. Real programs, real sockets, a real disk.
//!
//! ```text
//! report_csi [CLONES]         TMPDIR names the disk; 1000 clones if nothing is said
//! ```
//! The programs are those beside this one: build them with the same profile first.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use pando_benches::report::Table;
use pando_csi::proto::csi;
use pando_tests::csi::{block, from_volume, request};
use pando_tests::noise::Noise;
use pando_tests::{Csi, Nbd, System};

const GIB: i64 = 1 << 30;
/// Clones that are made before sides are changed.
const BATCH: usize = 10;
/// Blocks here and there in the large source: as fragmented as a volume can be.
const SCATTERED: u64 = 100_000;
const BLOCK: u64 = 4096;
/// Bytes of the small source that hold data.
const SMALL_DATA: u64 = 64 << 20;

fn main() -> Result<()> {
    let clones: usize = match std::env::args().nth(1) {
        Some(text) => text.parse().context("CLONES is a number")?,
        None => 1000,
    };
    ensure!(clones >= BATCH, "at least {BATCH} clones");
    let mut system = System::empty();
    system.create_pool(&["--size", "8GiB", "--allocate", "write"]);
    system.spawn();
    let csi = Csi::start(&system);
    let idle = resident_bytes(&[system.pid(), csi.pid()])?;

    let small = source(&system, &csi, "small", GIB, |nbd| {
        let piece = Noise::new(1).bytes(1 << 20);
        for at in (0..SMALL_DATA).step_by(piece.len()) {
            nbd.write(at, &piece);
        }
    })?;
    let large = source(&system, &csi, "large", 1024 * GIB, |nbd| {
        let mut noise = Noise::new(2);
        let content = noise.bytes(usize::try_from(BLOCK).unwrap_or_default());
        for _ in 0..SCATTERED {
            nbd.write(noise.below((1 << 40) / BLOCK) * BLOCK, &content);
        }
    })?;

    let file = File::create_new(system.path().join("barrier")).context("a file")?;
    file.write_all_at(&vec![1; 1 << 20], 0)?;
    file.sync_all()?;
    let (mut of_small, mut of_large, mut barriers) = (Vec::new(), Vec::new(), Vec::new());
    let mut made = 0;
    while made < clones {
        for _ in 0..BATCH {
            of_small.push(create(&csi, made, &small)?);
            of_large.push(create(&csi, made + clones, &large)?);
            barriers.push(barrier(&file, made)?);
            made += 1;
        }
    }
    let full = resident_bytes(&[system.pid(), csi.pid()])?;

    let mut table = Table::new("CSI: CreateVolume from a source, through the adapter");
    let [small_ms, large_ms, barrier_ms] = [of_small, of_large, barriers].map(Times::new);
    table.row("one barrier of the disk (4 KiB, fdatasync)", barrier_ms.shown(), "");
    table.row(format!("{clones} clones of 1 GiB"), small_ms.shown(), "");
    let beyond = small_ms.p95 - barrier_ms.p95;
    table.row("beyond one barrier, 95th percentile", format!("{beyond:.1} ms"), "<= 10 ms");
    let what = format!("{clones} clones of 1 TiB, {SCATTERED} extents");
    table.row(what, large_ms.shown(), "");
    let ratio = large_ms.median / small_ms.median;
    table.row("1 TiB against 1 GiB, medians", format!("{ratio:.2}x"), "<= 1.2x");
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    table.row("idle adapter and daemon, resident", mib(idle), "<= 100 MiB");
    table.row(format!("the same with {} volumes", 2 * clones + 2), mib(full), "");
    writeln!(std::io::stdout(), "{table}")?;
    Ok(())
}

/// Makes a volume with data in it; its id.
fn source(
    system: &System,
    csi: &Csi,
    name: &str,
    bytes: i64,
    fill: impl FnOnce(&mut Nbd),
) -> Result<String> {
    let id = csi.create(request(name, bytes, &block()))?.volume_id;
    let in_pool = format!("csi-vol-{name}");
    let socket = system.cli().serve(&in_pool);
    let mut nbd = Nbd::open(&socket, &in_pool)?;
    fill(&mut nbd);
    nbd.flush();
    drop(nbd);
    system.cli().run(&["volume", "serve", &in_pool, "--stop"]);
    Ok(id)
}

/// Makes a clone; how many milliseconds that took.
fn create(csi: &Csi, index: usize, source: &str) -> Result<f64> {
    let request = csi::CreateVolumeRequest {
        volume_content_source: from_volume(source),
        capacity_range: None,
        ..request(&format!("pvc-{index}"), 0, &block())
    };
    let begin = Instant::now();
    csi.create(request)?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

/// Writes and syncs a block; how many milliseconds that took.
fn barrier(file: &File, index: usize) -> Result<f64> {
    let blocks = (1 << 20) / BLOCK;
    let at = u64::try_from(index).unwrap_or_default() % blocks * BLOCK;
    let begin = Instant::now();
    file.write_all_at(&[2; 4096], at)?;
    file.sync_data()?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

/// Memory of processes that is in use now.
fn resident_bytes(pids: &[u32]) -> Result<u64> {
    let mut sum = 0;
    for pid in pids {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()).context("VmRSS")?;
        sum += kib.parse::<u64>()? << 10;
    }
    Ok(sum)
}

/// What many calls took, in milliseconds.
struct Times {
    median: f64,
    p95: f64,
}

impl Times {
    fn new(mut ms: Vec<f64>) -> Self {
        ms.sort_by(f64::total_cmp);
        Self { median: ms[ms.len() / 2], p95: ms[ms.len() * 95 / 100] }
    }

    fn shown(&self) -> String {
        format!("median {:.2} ms, 95th percentile {:.2} ms", self.median, self.p95)
    }
}
