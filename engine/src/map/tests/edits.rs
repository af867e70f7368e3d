//! Edits whose exact effect on nodes and log is known.

use super::*;

fn changes(world: &World, change: RefChange) -> u64 {
    let of_kind = world.log.iter().filter(|delta| delta.change == change);
    of_kind.map(|delta| u64::from(delta.count)).sum()
}

fn small() -> World {
    World::new(Fanout { leaf_max: 4, inner_max: 4 }, 40)
}

#[test]
fn sequential_fill_leaves_full_nodes() {
    let mut world = World::new(Fanout::FULL, 1000);
    // Odd blocks only, so that nothing coalesces.
    for lba in 0..252 * 40 {
        world.edit(0, lba, 1, Some(BlockNo::new(1_000_000 + 2 * lba)));
    }
    let fill = world.leaf_fill(0);
    assert_eq!(fill.len(), 40);
    assert!(fill.iter().all(|&count| count == 252), "{fill:?}");
}

/// Writes that go backwards: below new blocks, below a gap, and in the place of one long extent.
#[test]
fn descending_writes_leave_nodes_half_full() {
    for (first, len) in [(0, 0), (0, 20), (0, 4000)] {
        let mut world = World::new(Fanout { leaf_max: 20, inner_max: 10 }, 1000);
        let pieces = if len > 20 { 1 } else { len };
        for piece in 0..pieces {
            world.map(0, first + 2 * piece, len / pieces);
        }
        for lba in (40..4000).rev() {
            world.edit(0, lba, 1, Some(BlockNo::new(1_000_000 + 2 * lba)));
        }
        let fill = world.leaf_fill(0);
        let sparse = fill.iter().filter(|count| **count < 10).count();
        assert!(sparse <= 2, "{len} before: {} leaves, {sparse} sparse: {fill:?}", fill.len());
    }
}

#[test]
fn sequential_writes_coalesce_up_to_the_longest_extent() {
    let mut world = World::new(Fanout::FULL, 1000);
    for at in 0..600 {
        world.edit(0, at * 256, 256, Some(BlockNo::new(5000 + at * 256)));
    }
    let mut out = Vec::new();
    let root = world.volumes[0].root;
    lookup(&world.cache, root.as_ref(), Lba::new(0), 600 * 256, 100, &mut out).unwrap();
    let lens: Vec<u64> = out.iter().map(|extent| extent.len).collect();
    assert_eq!(lens, [65280, 65280, 600 * 256 - 2 * 65280]);
}

#[test]
fn overwriting_the_middle_splits_an_extent_in_three() {
    let mut world = small();
    world.edit(0, 100, 10, Some(BlockNo::new(5000)));
    world.edit(0, 103, 2, Some(BlockNo::new(7000)));
    let mut out = Vec::new();
    let root = world.volumes[0].root;
    let answered = lookup(&world.cache, root.as_ref(), Lba::new(0), 200, 100, &mut out).unwrap();
    assert_eq!(answered, 200);
    let found: Vec<_> = out.iter().map(|e| (e.lba.get(), e.block.get(), e.len)).collect();
    assert_eq!(found, [(100, 5000, 3), (103, 7000, 2), (105, 5005, 5)]);
    assert_eq!(changes(&world, RefChange::DataDown), 2);
}

#[test]
fn a_dirty_path_takes_no_new_nodes_and_a_sealed_one_is_moved() {
    let mut world = small();
    for lba in 0..40 {
        world.edit(0, lba * 2, 1, Some(BlockNo::new(5000 + lba * 2)));
    }
    world.log.clear();
    let level = world.volumes[0].root.unwrap().level;
    world.edit(0, 20, 1, Some(BlockNo::new(9000)));
    assert_eq!(world.space.taken, 0);
    world.seal = world.seq;
    world.edit(0, 20, 1, Some(BlockNo::new(9001)));
    assert_eq!(world.space.taken, usize::from(level) + 1);
    assert_eq!(changes(&world, RefChange::NodeMoved), u64::from(level) + 1);
    assert_eq!(changes(&world, RefChange::NodeDown), 0);
    assert_eq!(changes(&world, RefChange::NodeUp), u64::from(level) + 1);
}

#[test]
fn discard_in_a_clone_keeps_the_leaves_of_the_snapshot() {
    // dm-thin f046f89a99cc: a shared leaf was changed without references for what it holds.
    let mut world = small();
    for lba in 0..60 {
        world.map(0, lba * 2, 1);
    }
    world.checkpoint();
    world.clone_volume(0);
    world.unmap(1, 31, 40);
    world.unmap(1, 0, 3);
    world.seal();
    world.check();
    world.finish();
    world.delete(1);
    world.checkpoint();
    world.read_all(0, 200, 100);
    world.delete(0);
    world.checkpoint();
    assert!(world.counts.is_empty());
}

#[test]
fn clone_of_a_root_that_was_never_written() {
    // btrfs eb96e221937a: the clone took a root whose dirty buffers were dropped.
    let mut world = small();
    for lba in 0..30 {
        world.map(0, lba * 3, 2);
    }
    world.clone_volume(0);
    world.map(0, 10, 5);
    world.delete(0);
    world.checkpoint();
    world.check_reopened();
    world.read_all(0, 200, 100);
}

#[test]
fn unmapping_nothing_changes_nothing() {
    let mut world = small();
    for lba in 0..30 {
        world.map(0, 100 + lba * 3, 1);
    }
    world.checkpoint();
    let before = world.volumes[0].root;
    world.unmap(0, 0, 100);
    world.unmap(0, 101, 2);
    world.unmap(0, 1000, 1 << 34);
    assert_eq!(world.volumes[0].root, before);
    assert!(world.log.is_empty());
}

#[test]
fn discarding_everything_is_one_reference_for_each_subtree() {
    let mut world = small();
    for lba in 0..300 {
        world.map(0, lba * 2, 1);
    }
    world.checkpoint();
    let level = world.volumes[0].root.unwrap().level;
    world.prepare(0, 0, 1 << 34);
    world.volumes[0].model.clear();
    world.volumes[0].own.clear();
    world.edit(0, 0, 1 << 20, None);
    assert!(world.volumes[0].root.is_none());
    assert_eq!(world.space.taken, 0);
    assert!(world.log.len() <= 4 * (usize::from(level) + 1), "{:?}", world.log);
    world.checkpoint();
    assert!(world.counts.is_empty());
}

#[test]
fn a_root_with_one_child_gives_way_to_it() {
    let mut world = small();
    for lba in 0..64 {
        world.map(0, lba * 2, 1);
    }
    assert!(world.volumes[0].root.unwrap().level >= 2);
    world.unmap(0, 2, 1000);
    assert_eq!(world.volumes[0].root.unwrap().level, 0);
    world.seal();
    world.check();
}

#[test]
fn a_shared_node_with_one_child_stays_as_the_root() {
    let mut world = small();
    for lba in 0..40 {
        world.map(0, lba * 2, 1);
    }
    world.unmap(0, 8, 24);
    world.clone_volume(0);
    world.unmap(1, 32, 1000);
    let root = world.volumes[1].root.unwrap();
    assert_eq!(root.level, 1);
    assert!(root.ptr.birth.get() < world.volumes[1].shared_at);
    world.seal();
    world.check();
    world.finish();
    // The next change makes it the volume's own; then it gives way to its child.
    world.map(1, 0, 1);
    assert_eq!(world.volumes[1].root.unwrap().level, 0);
    world.checkpoint();
    world.check();
    world.read_all(1, 100, 10);
}

/// What a checkpoint is about to write stays until it is written.
#[test]
fn a_sealed_node_with_one_child_stays_as_the_root() {
    let mut world = small();
    for lba in 0..64 {
        world.map(0, lba * 2, 1);
    }
    // A leaf at either end, and nothing between them.
    world.unmap(0, 8, 112);
    assert_eq!(world.volumes[0].root.unwrap().level, 2);
    world.seal();
    world.unmap(0, 120, 100);
    let root = world.volumes[0].root.unwrap();
    assert_eq!(root.level, 1);
    assert!(root.ptr.birth.get() <= world.seal);
    world.finish();
    world.checkpoint();
    world.check();
    // The next change makes it one that may be changed; then it gives way to its child.
    world.map(0, 0, 1);
    assert_eq!(world.volumes[0].root.unwrap().level, 0);
    world.checkpoint();
    world.check();
    world.read_all(0, 200, 10);
}

#[test]
fn what_is_shared_does_not_coalesce_with_what_is_own() {
    let mut world = small();
    world.edit(0, 10, 5, Some(BlockNo::new(5000)));
    world.clone_volume(0);
    world.edit(0, 15, 3, Some(BlockNo::new(5005)));
    world.seal();
    world.check();
    let mut out = Vec::new();
    let root = world.volumes[0].root;
    lookup(&world.cache, root.as_ref(), Lba::new(10), 100, 9, &mut out).unwrap();
    let found: Vec<_> = out.iter().map(|e| (e.lba.get(), e.len, e.own)).collect();
    assert_eq!(found, [(10, 5, false), (15, 3, true)]);
}

#[test]
fn a_wrong_sum_stays_one_that_readers_take() {
    let mut world = small();
    for lba in 0..30 {
        world.map(0, lba * 3, 2);
    }
    world.clone_volume(0);
    world.map(0, 0, 1);
    // As a damaged pool may say: all is its own, though but one block is.
    let ptr = &mut world.volumes[0].root.as_mut().unwrap().ptr;
    ptr.own = ptr.mapped;
    world.unmap(0, 30, 30);
    let ptr = world.volumes[0].root.unwrap().ptr;
    assert!(ptr.own <= ptr.mapped, "{ptr:?}");
}

#[test]
fn loading_refuses_what_the_pointer_does_not_say() {
    let mut world = small();
    for lba in 0..20 {
        world.map(0, lba * 2, 1);
    }
    world.checkpoint();
    let root = world.volumes[0].root.unwrap().node_ref();
    let bytes = world.disk[&root.block.get()].clone();
    world.cache.forget(root.block);
    let stale = Missing { birth: Seqno::new(root.birth.get() + 4), ..root };
    let error = world.cache.insert_loaded(&stale, &bytes).unwrap_err();
    let (block, birth) = (root.block.get(), root.birth.get());
    let told = format!("map node at block {block}: birth {birth}, its pointer says {}", birth + 4);
    assert_eq!(error.to_string(), told);
    assert!(world.cache.get(root.block).is_none());
    world.cache.insert_loaded(&root, &bytes).unwrap();
    world.cache.insert_loaded(&root, &bytes).unwrap();
    assert_eq!(world.cache.get_bytes(root.block).unwrap()[4..], bytes[4..]);
}

#[test]
fn a_node_of_another_birth_is_not_the_one() {
    let mut world = small();
    world.map(0, 5, 1);
    world.checkpoint();
    let root = world.volumes[0].root.unwrap().node_ref();
    assert!(world.cache.resident(&root).is_ok());
    let younger = Missing { birth: Seqno::new(root.birth.get() + 1), ..root };
    assert_eq!(world.cache.resident(&younger), Err(younger));
    let higher = Missing { level: 1, ..root };
    assert_eq!(world.cache.resident(&higher), Err(higher));
}

#[test]
fn the_cache_is_bounded() {
    let mut world = World::new(Fanout { leaf_max: 4, inner_max: 4 }, 60);
    for lba in 0..400 {
        world.map(0, lba * 2, 1);
        if lba % 20 == 0 {
            world.checkpoint();
        }
    }
    world.checkpoint();
    world.read_all(0, 1000, 100);
    assert!(world.cache.len() <= world.cache.capacity(), "{} nodes", world.cache.len());
}
