use super::*;
use crate::format::geometry::PAGE_ENTRIES;

fn free(len: u64) -> Bitmap {
    let mut bitmap = Bitmap::full(len);
    bitmap.set(0, len, true);
    bitmap
}

/// Which groups of blocks stay loaded: those whose takes the tables on the disk do not have yet.
#[test]
fn a_group_stays_loaded_until_the_tables_have_its_takes() {
    let geometry = Geometry::new(12 + 300 * 1026, 8, 1).expect("a pool of 300 groups");
    let mut space = Space::new(geometry, (0..geometry.groups()).map(|g| geometry.group_len(g)));
    let load = |space: &mut Space, group| space.install(group, free(PAGE_ENTRIES));
    let most = to_u32(to_u64(LOADED_MAX));
    (0..most).for_each(|group| load(&mut space, group));
    space.sealed();
    let run = Run { block: geometry.block_at(1, 7), len: 2 };
    space.take_exactly(run).expect("it is free");
    load(&mut space, most);
    assert!(space.is_loaded(1) && !space.is_loaded(2), "the bitmap alone knows what is taken");
    space.recorded(run);
    load(&mut space, most + 1);
    assert!(space.is_loaded(1) && !space.is_loaded(3), "no checkpoint has the record");
    space.sealed();
    load(&mut space, most + 2);
    assert!(space.is_loaded(1) && !space.is_loaded(4), "the checkpoint is under way");
    space.sealed();
    load(&mut space, most + 3);
    assert!(!space.is_loaded(1), "the tables have it");
    assert_eq!(space.wrong_sums(), Vec::<String>::new());
}

/// Pieces are merged over releases; a unit that is in use again, or lies in part among the tables,
/// is left out.
#[test]
fn whole_units_that_were_freed_are_claimed() {
    let geometry = Geometry::new(2100, 8, 1).expect("a pool");
    let mut space = Space::new(geometry, (0..geometry.groups()).map(|g| geometry.group_len(g)));
    space.note_freed(16);
    space.install(0, free(PAGE_ENTRIES));
    assert_eq!(space.claim(64), Claim::Nothing, "what was never in use");
    let start = geometry.block_at(0, 0).get();
    let run = |block, len| Run { block: BlockNo::new(block), len };
    space.take_exactly(run(start, 100)).expect("free");
    assert_eq!((start, start % 16), (16, 0), "the group begins with a unit");
    space.release(run(16, 15)).expect("taken");
    assert_eq!(space.claim(64), Claim::Nothing, "a block of the unit is in use");
    space.release(run(31, 18)).expect("taken");
    assert_eq!(space.claim(15), Claim::Nothing, "less than a unit");
    assert_eq!(space.claim(16), Claim::Run(run(16, 16)), "no more than was asked for");
    assert!(!space.is_free(BlockNo::new(16)), "not before it is given back");
    assert_eq!(space.wrong_sums(), Vec::<String>::new());
    space.unclaim(run(16, 16)).expect("claimed");
    assert!(space.is_free(BlockNo::new(16)));
    assert_eq!(space.claim(64), Claim::Run(run(32, 16)), "once each; half of 48 is in use");
    space.unclaim(run(32, 16)).expect("claimed");
    space.release(run(49, 67)).expect("taken");
    space.take_exactly(run(70, 1)).expect("free");
    assert_eq!(space.claim(640), Claim::Run(run(48, 16)), "71 is in use again");
    space.unclaim(run(48, 16)).expect("claimed");
    assert_eq!(space.claim(640), Claim::Run(run(80, 48)), "runs are merged");
    space.unclaim(run(80, 48)).expect("claimed");
    assert_eq!(space.claim(640), Claim::Nothing);
    space.take_exactly(run(16, 16)).expect("free");
    space.release(run(16, 16)).expect("taken");
    space.take_exactly(run(20, 1)).expect("free");
    assert_eq!(space.claim(640), Claim::Nothing, "20 is in use again");
    assert_eq!(space.wrong_sums(), Vec::<String>::new());
}

/// What is known of a group that is not loaded: what came back in one piece, and how much in
/// smaller ones.
#[test]
fn a_group_is_loaded_for_what_was_freed_there() {
    let geometry = Geometry::new(2100, 8, 1).expect("a pool");
    let run = |block, len| Run { block: BlockNo::new(block), len };
    let unloaded = || {
        let groups = (0..geometry.groups()).map(|_| 0);
        let mut space = Space::new(geometry, groups);
        space.note_freed(16);
        space
    };
    let mut space = unloaded();
    space.release(run(16, 8)).expect("believed");
    space.release(run(24, 8)).expect("believed");
    assert_eq!(space.claim(64), Claim::Nothing);
    space.release(run(32, 24)).expect("believed");
    assert_eq!(space.claim(64), Claim::Load(0));
    space.install(0, free(PAGE_ENTRIES));
    assert_eq!(space.claim(64), Claim::Run(run(32, 16)));
    let mut space = unloaded();
    for piece in 0..PAGE_ENTRIES / PIECES_SHARE / 8 {
        assert_eq!(space.claim(64), Claim::Nothing, "piece {piece}");
        space.release(run(16 + 8 * piece, 8)).expect("believed");
    }
    space.release(run(16 + PAGE_ENTRIES / 2, 8)).expect("believed");
    assert_eq!(space.claim(64), Claim::Load(0));
    let mut bitmap = free(PAGE_ENTRIES);
    bitmap.set(20, 1, false);
    space.install(0, bitmap);
    assert_eq!(space.claim(64), Claim::Run(run(16, 16)), "the next is in use in part");
    assert_eq!(space.claim(64), Claim::Run(run(48, 64)));
}

#[test]
fn only_free_blocks_are_taken_and_only_taken_ones_come_back() {
    let geometry = Geometry::new(2100, 8, 1).expect("a pool");
    let mut space = Space::new(geometry, (0..geometry.groups()).map(|g| geometry.group_len(g)));
    let run = |index, len| Run { block: geometry.block_at(0, index), len };
    assert_eq!(space.take_exactly(run(3, 1)), Err(TakeError::Load(0)));
    space.install(0, free(PAGE_ENTRIES));
    space.take_exactly(run(3, 2)).expect("free");
    assert_eq!(space.take_exactly(run(4, 1)), Err(TakeError::Full), "taken already");
    assert_eq!(space.take(PAGE_ENTRIES).map(|run| run.len), Ok(PAGE_ENTRIES - 5));
    assert_eq!(space.take(3), Ok(run(0, 3)));
    assert_eq!(space.take(1), Err(TakeError::Load(1)), "the group is full");
    space.untake(run(0, 3));
    space.release(run(3, 2)).expect("taken");
    assert!(space.release(run(4, 1)).is_err(), "given up twice");
    assert_eq!(space.wrong_sums(), Vec::<String>::new());
}

/// A damaged group is out of the way of everything else, and what it had comes back nowhere.
#[test]
fn a_quarantined_group_gives_and_takes_nothing() {
    let geometry = Geometry::new(3 * 1030, 8, 1).expect("a pool of groups");
    let len = |group| geometry.group_len(group);
    let groups = geometry.groups();
    assert!(groups >= 3, "{groups} groups");
    let mut space = Space::new(geometry, (0..groups).map(len));
    space.note_freed(8);
    space.install(0, free(len(0)));
    let taken = space.take(16).expect("group 0 is loaded");
    let all = space.free();
    assert!(space.quarantine(0) && !space.quarantine(0), "told once");
    assert_eq!(space.free(), all - (len(0) - 16));
    space.install(0, free(len(0)));
    assert!(!space.is_loaded(0), "nobody believes its tables");
    space.recorded(taken);
    space.release(taken).expect("it leaks");
    let named = Run { block: geometry.block_at(0, 100), len: 4 };
    space.take_exactly(named).expect("records name its blocks");
    space.untake(named);
    assert_eq!(space.free(), all - (len(0) - 16), "what comes back is leaked");
    assert!(matches!(space.take(1), Err(TakeError::Load(group)) if group != 0));
    assert_eq!(space.claim(640), Claim::Nothing);
    assert_eq!((space.quarantined(), space.outstanding()), (1, 0));
    assert_eq!(space.wrong_sums(), Vec::<String>::new());
}
