//! Damage at rest: a slice of what `pando-damage` does in whole. Flipped bits, blocks that hold what
//! they held before or what others hold, fields changed with their checksums made right: an error
//! that names the structure, or right data; no panic, no hang, bounded memory.

use std::collections::BTreeSet;

use pando_sim::damage::places::Structure;
use pando_sim::damage::subject::Past;
use pando_sim::damage::{BELIEVED, Campaign, Choice, Sort, Tally};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What all of it may take, several images at a time, whatever they say. The pools' caches are 1 MiB
/// each; what an image forges is sizes of terabytes.
const PEAK_BYTES_MAX: usize = 256 << 20;

/// Tries every so many cases of metadata and of data on a pool of each past.
fn slice(seed: u64, sort: Sort, metadata: u64, data: u64) -> Tally {
    let mut tally = Tally::default();
    for past in Past::ALL {
        let campaign = Campaign::new(past, seed);
        let choice = Choice { metadata, data, part: 0, parts: 1 };
        campaign.run(sort, &choice, &mut tally, &mut |_| true);
    }
    assert_eq!(tally.failures, Vec::<String>::new());
    assert!(MEMORY.peak_usage() < PEAK_BYTES_MAX, "{} bytes", MEMORY.peak_usage());
    tally
}

#[test]
fn flipped_bits() {
    let tally = slice(1, Sort::Bits, 997, 9973);
    assert!(tally.images > 3000 && tally.refused > 100, "{tally:?}");
}

#[test]
fn replaced_blocks() {
    let tally = slice(2, Sort::Blocks, 7, 97);
    assert!(tally.images > 1000 && tally.refused > 10, "{tally:?}");
}

#[test]
fn forged_fields() {
    let tally = slice(3, Sort::Fields, 11, 11);
    let met: BTreeSet<&str> = tally.noticed.keys().copied().collect();
    let all = [
        Structure::Superblock,
        Structure::Journal,
        Structure::GroupHeader,
        Structure::Counts,
        Structure::Sums,
        Structure::Catalogue,
        Structure::Inner,
        Structure::Leaf,
    ];
    assert_eq!(met, all.into_iter().map(Structure::name).collect());
    assert!(tally.believed.len() <= BELIEVED.len());
}
