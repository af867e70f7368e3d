//! Look-up in and change of a map of 10 million extents.

use criterion::{Criterion, criterion_group, criterion_main};
use pando_benches::maps::Map;
use pando_engine::disk::sim::Rng;
use pando_engine::units::Lba;

const EXTENTS: u64 = 10_000_000;

fn maps(criterion: &mut Criterion) {
    let mut map = Map::fragmented(EXTENTS);
    let mut random = Rng::new(1);
    let mut out = Vec::new();
    criterion.bench_function("map_lookup_10M", |bench| {
        bench.iter(|| map.look_up(Lba::new(random.below(EXTENTS) * 2), &mut out));
    });
    criterion.bench_function("map_apply_10M", |bench| {
        bench.iter(|| map.write(Lba::new(random.below(EXTENTS) * 2)));
    });
}

criterion_group!(benches, maps);
criterion_main!(benches);
