//! Reads, writes and clones of a pool on a RAM-backed disk, through the volume interface.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pando_benches::load::{self, Kind};
use pando_benches::rig::{self, RigOptions};

const SPAN: u64 = 256 << 20;
/// Requests measured for each sample.
const REQUESTS: u64 = 200_000;

fn time(kind: Kind, depth: usize, count: u64) -> Duration {
    let options = RigOptions::sized(2 << 30);
    rig::in_memory(options, |pool| async move {
        let info = rig::volume(&pool, "v", SPAN).await.expect("volume");
        let device = rig::device(&pool, &info).expect("device");
        load::fill(&device, SPAN).await.expect("fill");
        // Enough requests that the first ones, which fault memory in, do not count.
        load::run(&device, kind, SPAN, depth, 50_000).await.expect("warm-up");
        let taken = load::run(&device, kind, SPAN, depth, REQUESTS).await.expect("load");
        taken.mul_f64(count as f64 / REQUESTS as f64)
    })
    .expect("pool")
}

fn requests(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ram_4k");
    group.throughput(Throughput::Elements(1)).sample_size(10);
    for (name, kind) in [("read", Kind::Read), ("write", Kind::Write)] {
        for depth in [1, 32] {
            group.bench_function(BenchmarkId::new(name, depth), |bench| {
                bench.iter_custom(|count| time(kind, depth, count));
            });
        }
    }
    group.finish();
}

fn clones(criterion: &mut Criterion) {
    criterion.bench_function("clone_ram", |bench| {
        bench.iter_custom(|count| {
            rig::in_memory(RigOptions::sized(2 << 30), |pool| async move {
                let info = rig::volume(&pool, "v", SPAN).await.expect("volume");
                let device = rig::device(&pool, &info).expect("device");
                load::fill(&device, SPAN).await.expect("fill");
                let begin = std::time::Instant::now();
                for index in 0..count.min(60_000) {
                    rig::clone(&pool, &format!("c{index}"), &info).await.expect("clone");
                }
                begin.elapsed() * u32::try_from(count.div_ceil(60_000)).unwrap_or(1)
            })
            .expect("pool")
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_millis(500));
    targets = requests, clones
}
criterion_main!(benches);
