//! What the report measures, section by section.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::future::{Either, select};
use pando_engine::disk::sim::Rng;
use pando_engine::pool::{Pool, VolumeInfo};
use pando_engine::runtime::reactor;
use pando_engine::units::Lba;

use crate::load::{self, Kind};
use crate::maps::Map;
use crate::memory;
use crate::rig::{self, RigOptions};

/// Where and how thoroughly to measure.
pub struct Context {
    /// A directory on the disk to measure.
    pub dir: PathBuf,
    /// One short repetition of everything, to see that it works.
    pub quick: bool,
}

impl Context {
    const fn repetitions(&self) -> usize {
        if self.quick { 1 } else { 5 }
    }

    const fn scaled(&self, count: u64) -> u64 {
        if self.quick { count / 20 } else { count }
    }
}

/// A table of the report.
pub struct Table {
    title: &'static str,
    rows: Vec<Row>,
}

struct Row {
    what: String,
    measured: String,
    aim: &'static str,
}

impl Table {
    /// An empty table.
    pub fn new(title: &'static str) -> Self {
        Self { title, rows: Vec::new() }
    }

    /// Adds a row: what, measured, aim.
    pub fn row(&mut self, what: impl Into<String>, measured: impl Into<String>, aim: &'static str) {
        self.rows.push(Row { what: what.into(), measured: measured.into(), aim });
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "### {}\n\n| what | measured | aim |\n|---|---|---|", self.title)?;
        for row in &self.rows {
            writeln!(f, "| {} | {} | {} |", row.what, row.measured, row.aim)?;
        }
        Ok(())
    }
}

/// A section's measurement.
pub type Measure = fn(&Context) -> Result<Table>;

/// All sections by name.
#[must_use]
pub fn sections() -> Vec<(&'static str, Measure)> {
    vec![
        // First: what the others leave behind would count.
        ("memory", memory as Measure),
        ("ram", ram),
        ("map", map),
        ("clone", clones),
        ("first", first_writes),
        ("disk", disk),
        ("open", open),
    ]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn rate(count: u64, taken: Duration) -> f64 {
    count as f64 / taken.as_secs_f64()
}

fn thousands(rate: f64) -> String {
    format!("{:.0}k/s", rate / 1000.0)
}

/// One thread, a disk of memory: what the engine's own work costs.
fn ram(context: &Context) -> Result<Table> {
    const SPAN: u64 = 256 << 20;
    let mut table = Table::new("RAM-backed disk, one thread, 4 KiB through the volume interface");
    let count = context.scaled(400_000);
    let kinds = [(Kind::Read, 1), (Kind::Read, 32), (Kind::Write, 1), (Kind::Write, 32)];
    let rates = rig::in_memory(RigOptions::sized(2 << 30), |pool| async move {
        let info = rig::volume(&pool, "v", SPAN).await?;
        let device = rig::device(&pool, &info)?;
        load::fill(&device, SPAN).await?;
        let mut rates = vec![Vec::new(); kinds.len()];
        for _ in 0..context.repetitions() {
            for ((kind, depth), rates) in kinds.iter().zip(&mut rates) {
                let taken = load::run(&device, *kind, SPAN, *depth, count).await?;
                rates.push(rate(count, taken));
            }
        }
        anyhow::Ok(rates)
    })??;
    for ((kind, depth), rates) in kinds.iter().zip(rates) {
        let aim = if *kind == Kind::Read { ">= 500k/s" } else { ">= 250k/s" };
        table.row(format!("random {kind:?}, depth {depth}"), thousands(median(rates)), aim);
    }
    Ok(table)
}

/// Look-up and change in a large map.
fn map(context: &Context) -> Result<Table> {
    let extents = context.scaled(10_000_000);
    let mut table = Table::new("map of 10 million extents, all nodes cached");
    let mut map = Map::fragmented(extents);
    let (mut look_ups, mut changes) = (Vec::new(), Vec::new());
    let mut random = Rng::new(1);
    let mut out = Vec::new();
    let count = context.scaled(1_000_000);
    for _ in 0..context.repetitions() {
        let begin = Instant::now();
        let mut answered = 0;
        for _ in 0..count {
            answered += map.look_up(Lba::new(random.below(extents) * 2), &mut out);
        }
        look_ups.push(begin.elapsed().as_secs_f64() / count as f64 * 1e9);
        ensure!(answered == count, "every look-up answers");
        let begin = Instant::now();
        for _ in 0..count {
            map.write(Lba::new(random.below(extents) * 2));
        }
        changes.push(begin.elapsed().as_secs_f64() / count as f64 * 1e9);
    }
    table.row("look-up", format!("{:.0} ns", median(look_ups)), "<= 300 ns");
    table.row("change of one block", format!("{:.0} ns", median(changes)), "<= 1500 ns");
    Ok(table)
}

/// Clones of both volumes in turn, so that both meet the same disk: microseconds of each.
async fn time_clones(
    pool: &Pool,
    sources: [&VolumeInfo; 2],
    round: usize,
    count: usize,
) -> Result<[f64; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    for index in 0..count {
        for (times, source) in times.iter_mut().zip(sources) {
            let name = format!("{}-{round}-{index}", source.name);
            let begin = Instant::now();
            rig::clone(pool, &name, source).await?;
            times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(times.map(median))
}

/// Durable clones on the disk: of an empty volume, of a large fragmented one, many, deep.
fn clones(context: &Context) -> Result<Table> {
    let path = context.dir.join("pando-bench-clone");
    let options = RigOptions::sized(4 << 30);
    rig::make_file(&path, options)?;
    let mut table = Table::new("clone, durable when it is acknowledged");
    let (many, deep) = (context.scaled(10_000), context.scaled(1000));
    let blocks = context.scaled(400_000);
    let measured = rig::on_file(&path, options, |pool| async move {
        let empty = rig::volume(&pool, "empty", 1 << 30).await?;
        let large = rig::volume(&pool, "large", 1 << 40).await?;
        let device = rig::device(&pool, &large)?;
        // One block here and there over the whole TiB: as fragmented as a volume can be.
        load::run(&device, Kind::Write, 1 << 40, 64, blocks).await?;
        device.flush().await?;
        pool.checkpoint().await?;
        let mut ratios = Vec::new();
        let mut times = (Vec::new(), Vec::new());
        for round in 0..context.repetitions() {
            let [a, b] = time_clones(&pool, [&empty, &large], round, 100).await?;
            times.0.push(a);
            times.1.push(b);
            ratios.push(b / a);
        }
        let begin = Instant::now();
        for _ in 0..200 {
            pool.disk_sync_for_bench().await?;
        }
        let barrier = begin.elapsed().as_secs_f64() * 1e6 / 200.0;
        let begin = Instant::now();
        let source = pool.find("large")?;
        for index in 0..many {
            rig::clone(&pool, &format!("many{index}"), &source).await?;
        }
        let all = begin.elapsed().as_secs_f64();
        let mut last = rig::volume(&pool, "chain", 64 << 20).await?;
        load::fill(&rig::device(&pool, &last)?, 64 << 20).await?;
        let shallow = rig::device(&pool, &last)?;
        for depth in 0..deep {
            last = rig::clone(&pool, &format!("deep{depth}"), &last).await?;
            load::run(&rig::device(&pool, &last)?, Kind::Write, 64 << 20, 4, 4).await?;
        }
        pool.checkpoint().await?;
        let bottom = rig::device(&pool, &last)?;
        let mut depth_ratios = Vec::new();
        let count = context.scaled(20_000);
        for _ in 0..context.repetitions() {
            let a = load::run(&shallow, Kind::Read, 64 << 20, 1, count).await?;
            let b = load::run(&bottom, Kind::Read, 64 << 20, 1, count).await?;
            depth_ratios.push(b.as_secs_f64() / a.as_secs_f64());
        }
        anyhow::Ok((times, median(ratios), barrier, all, median(depth_ratios)))
    })??;
    std::fs::remove_file(&path)?;
    let (times, ratio, barrier, all, depth_ratio) = measured;
    let (empty, large) = (median(times.0), median(times.1));
    table.row("1 GiB, empty", format!("{empty:.0} us"), "");
    table.row(
        format!("1 TiB, {blocks} extents"),
        format!("{large:.0} us ({ratio:.2}x)"),
        "<= 1.2x",
    );
    let barriers = large / barrier;
    table.row("in device barriers", format!("{barriers:.1} (of {barrier:.0} us)"), "<= 3");
    table.row(format!("{many} clones of one volume"), format!("{all:.1} s"), "work");
    table.row(
        format!("read at depth {deep} against depth 0"),
        format!("{depth_ratio:.2}x"),
        "<= 1.05x",
    );
    Ok(table)
}

/// Bytes written to the disk for random first writes to a fresh clone.
fn first_writes(context: &Context) -> Result<Table> {
    const SPAN: u64 = 1 << 30;
    let mut table = Table::new("10,000 random first writes of 4 KiB to a fresh clone");
    let path = context.dir.join("pando-bench-first");
    let options = RigOptions::sized(4 << 30);
    rig::make_file(&path, options)?;
    let count = 10_000;
    for (depth, flushed) in [(32, false), (1, true)] {
        let (before, after) = rig::on_file(&path, options, |pool| async move {
            let name = format!("base{depth}");
            let info = rig::volume(&pool, &name, SPAN).await?;
            load::fill(&rig::device(&pool, &info)?, SPAN).await?;
            pool.checkpoint().await?;
            let clone = rig::clone(&pool, &format!("clone{depth}"), &info).await?;
            let device = rig::device(&pool, &clone)?;
            let before = pool.counters();
            let kind = if flushed { Kind::WriteFlush } else { Kind::Write };
            load::run(&device, kind, SPAN, depth, count).await?;
            pool.checkpoint().await?;
            anyhow::Ok((before, pool.counters()))
        })??;
        let written = (after.written_bytes - before.written_bytes) as f64;
        let times = |a: u64, b: u64| format!("{:.2}x", (b - a) as f64 / written);
        let how = if flushed { "flush after each" } else { "no flush" };
        let data = times(before.data_bytes, after.data_bytes);
        table.row(format!("{how}: data"), data, "<= 1.1x");
        let metadata = times(before.metadata_bytes, after.metadata_bytes);
        table.row(format!("{how}: nodes, tables, catalogue"), metadata, "reported");
        let journal = times(before.journal_bytes, after.journal_bytes);
        table.row(format!("{how}: journal"), journal, "reported");
    }
    std::fs::remove_file(&path)?;
    Ok(table)
}

/// Against the raw file, by the same code on the same ring.
fn disk(context: &Context) -> Result<Table> {
    const SPAN: u64 = 1 << 30;
    let mut table = Table::new("a real disk, against the raw file through the same ring");
    let pool_path = context.dir.join("pando-bench-pool");
    let raw_path = context.dir.join("pando-bench-raw");
    let options = RigOptions::sized(4 << 30);
    rig::make_file(&pool_path, options)?;
    rig::make_file(&raw_path, RigOptions::sized(SPAN))?;
    let cases = [
        (Kind::Read, 1, 20_000, ">= 0.95x"),
        (Kind::Read, 32, 100_000, ">= 0.95x"),
        (Kind::Write, 1, 20_000, ""),
        (Kind::Write, 32, 100_000, ">= 1.0x"),
        (Kind::WriteFlush, 1, 6000, ">= 0.6x"),
    ];
    let raw_file = std::sync::Arc::new(pando_engine::disk::file::PoolFile::open(&raw_path)?);
    let results = rig::on_file(&pool_path, options, |pool| async move {
        let raw = raw_file.disk();
        let info = rig::volume(&pool, "v", SPAN).await?;
        let device = rig::device(&pool, &info)?;
        load::fill(&device, SPAN).await?;
        pool.checkpoint().await?;
        let mut results = vec![(Vec::new(), Vec::new()); cases.len()];
        for _ in 0..context.repetitions() {
            for ((kind, depth, count, _), (mine, ratios)) in cases.iter().zip(&mut results) {
                let count = context.scaled(*count);
                let a = load::run_raw(&raw, *kind, SPAN, *depth, count).await?;
                let b = load::run(&device, *kind, SPAN, *depth, count).await?;
                mine.push(rate(count, b));
                ratios.push(a.as_secs_f64() / b.as_secs_f64());
            }
        }
        anyhow::Ok(results)
    })??;
    for ((kind, depth, _, aim), (mine, ratios)) in cases.iter().zip(results) {
        let measured = format!("{} ({:.2}x raw)", thousands(median(mine)), median(ratios));
        table.row(format!("{kind:?}, depth {depth}"), measured, aim);
    }
    std::fs::remove_file(&pool_path)?;
    std::fs::remove_file(&raw_path)?;
    Ok(table)
}

/// Resident memory with many extents in use and a cache that holds a part of their map.
fn memory(context: &Context) -> Result<Table> {
    const CACHE: u64 = 256 << 20;
    let extents = context.scaled(10_000_000);
    let mut table = Table::new("memory, single-block extents, cache of 256 MiB");
    let path = context.dir.join("pando-bench-memory");
    let (resident, seconds) = memory::measure(&path, CACHE, extents)?;
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let aim = "<= 320 MiB";
    table.row(format!("{extents} extents: resident"), mib(resident.all), aim);
    table.row("of that, no file's", mib(resident.anonymous), "");
    table.row("most at any time", mib(resident.peak), "");
    table.row("time to write them", format!("{seconds:.0} s"), "");
    Ok(table)
}

/// Opening after the process was killed, its journal nearly full; a small pool and one of 100
/// times the data.
fn open(context: &Context) -> Result<Table> {
    const JOURNAL: u64 = 64 << 20;
    let mut table = Table::new("open with a full journal, after the process was killed");
    let mut opened = Vec::new();
    // Room for the data and for what is overwritten meanwhile, which no checkpoint gives back.
    for (name, span, size) in [("small", 64u64 << 20, 4u64 << 30), ("large", 6400 << 20, 11 << 30)]
    {
        let path = context.dir.join("pando-bench-open");
        let options = RigOptions {
            journal_bytes: Some(JOURNAL),
            cache_bytes: 256 << 20,
            background: false,
            ..RigOptions::sized(size)
        };
        rig::make_file(&path, options)?;
        rig::on_file(&path, options, |pool| async move {
            let info = rig::volume(&pool, "v", span).await?;
            let device = rig::device(&pool, &info)?;
            load::fill(&device, span).await?;
            pool.checkpoint().await
        })??;
        let (mut times, mut used, mut records) = (Vec::new(), 0, 0);
        for _ in 0..context.repetitions().min(3) {
            (used, records) = rig::on_file(&path, options, |pool| async move {
                let device = rig::device(&pool, &pool.find("v")?)?;
                let before = pool.status().seqno;
                // Nobody makes the checkpoint that a half-full journal calls for: the load stands
                // still when the journal is as full as it can be.
                let full = Box::pin(reactor::sleep(Duration::from_secs(20)));
                let load = Box::pin(load::run(&device, Kind::Write, span, 32, u64::MAX));
                if let Either::Left((result, _)) = select(load, full).await {
                    result?;
                }
                let used = pool.status().journal_used_bytes;
                // Nothing is closed: what is left is what a killed process leaves.
                anyhow::Ok((used, pool.status().seqno - before))
            })??;
            let begin = Instant::now();
            times.push(rig::on_file(
                &path,
                options,
                |_| async move { begin.elapsed().as_secs_f64() },
            )?);
        }
        std::fs::remove_file(&path)?;
        let seconds = median(times);
        let what = format!(
            "{name}: {} MiB of data, {} of {} MiB of journal, {records} records",
            span >> 20,
            used >> 20,
            JOURNAL >> 20
        );
        table.row(what, format!("{seconds:.2} s"), "<= 5 s");
        opened.push(seconds);
    }
    table.row("large against small", format!("{:.2}x", opened[1] / opened[0]), "<= 1.2x");
    Ok(table)
}
