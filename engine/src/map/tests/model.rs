//! Random histories of several volumes that share nodes.

use super::*;

const LBAS: u64 = 500;
const VOLUMES_MAX: usize = 6;

fn step(world: &mut World, rng: &mut Rng) {
    if world.volumes.is_empty() {
        world.volumes.push(Volume::default());
    }
    let at = to_usize(rng.below(to_u64(world.volumes.len())));
    match rng.below(100) {
        0..=54 => {
            let lba = rng.below(LBAS);
            let longest = if rng.below(4) == 0 { 40 } else { 3 };
            let len = 1 + rng.below(longest);
            world.map(at, lba, len.min(LBAS - lba));
        }
        55..=74 => {
            let lba = rng.below(LBAS);
            let longest = if rng.below(4) == 0 { LBAS } else { 8 };
            let len = 1 + rng.below(longest);
            world.unmap(at, lba, len.min(LBAS - lba));
        }
        75..=80 if world.volumes.len() < VOLUMES_MAX => world.clone_volume(at),
        81..=84 => world.delete(at),
        85..=87 => {
            world.finish();
            world.seal();
            world.check();
        }
        88..=90 => world.finish(),
        91 => {
            let lbas = || (0..LBAS).step_by(7).map(Lba::new);
            let root = world.volumes[at].root;
            let missing = missing_for(&world.cache, root.as_ref(), lbas());
            let blocks: BTreeSet<BlockNo> = missing.iter().map(|node| node.block).collect();
            assert_eq!(blocks.len(), missing.len(), "each node once");
            missing.iter().for_each(|node| world.load(node));
        }
        92..=93 => {
            let old = to_usize(rng.below(to_u64(world.volumes.len()) + 1));
            let old = (old < world.volumes.len()).then_some(old);
            world.check_diff(old, at, LBAS, to_usize(1 + rng.below(20)));
        }
        94 => {
            let lba = rng.below(LBAS);
            let len = 1 + rng.below(6).min(LBAS - lba - 1);
            world.check_own(at, lba, len);
        }
        _ => world.read_all(at, LBAS, to_usize(1 + rng.below(20))),
    }
}

fn history(seed: u64, fanout: Fanout) -> u64 {
    eprintln!("seed {seed}");
    let mut rng = Rng(seed);
    let mut world = World::new(fanout, 40);
    for _ in 0..600 {
        step(&mut world, &mut rng);
    }
    world.checkpoint();
    for at in 0..world.volumes.len() {
        world.read_all(at, LBAS, 1000);
    }
    while !world.volumes.is_empty() {
        world.delete(0);
    }
    world.checkpoint();
    assert!(world.counts.is_empty(), "a leak: {:?}", world.counts);
    assert!(world.disk.is_empty());
    world.loads
}

#[test]
fn random_histories_in_small_nodes() {
    let fanout = Fanout { leaf_max: 4, inner_max: 4 };
    let loads: u64 = (0..60).map(|seed| history(seed, fanout)).sum();
    assert!(loads > 1000, "eviction was not exercised: {loads} loads");
}

#[test]
fn random_histories_in_full_nodes() {
    for seed in 0..20 {
        history(1000 + seed, Fanout::FULL);
    }
}

#[test]
fn same_seed_same_tree() {
    let run = || {
        let mut rng = Rng(7);
        let mut world = World::new(Fanout { leaf_max: 5, inner_max: 6 }, 40);
        for _ in 0..400 {
            step(&mut world, &mut rng);
        }
        world.checkpoint();
        (world.disk, world.loads)
    };
    assert_eq!(run(), run());
}
