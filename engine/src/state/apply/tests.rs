//! What is refused before anything is changed, record by record, and the sums that are kept.

use super::*;
use crate::format::catalogue::{Catalogue, GroupEntry, IoLimits};
use crate::format::geometry::Geometry;
use crate::format::node::{HEADER_BYTES, InnerEntry, seal_crc};
use crate::map::{Fanout, NodeCache};
use crate::space::Bitmap;
use crate::units::{BLOCK_BYTES, BLOCK_SIZE};

const UUID: [u8; 16] = [1; 16];

/// A volume of 100 blocks, number 1, and a snapshot of it, number 2.
fn state() -> State {
    let geometry = Geometry::new(3000, 8, 1).expect("a pool");
    let groups = vec![GroupEntry::default(); 3];
    let catalogue = Catalogue { next_id: 1, groups, ..Catalogue::default() };
    let cache = NodeCache::new(64, UUID, Fanout::FULL);
    let mut state = State::new(geometry, UUID, catalogue, Seqno::new(0), cache, 64);
    let snapshot = NewVolume { snapshot: true, ..new(2, "s", Some(1)) };
    for record in [Record::Create(vec![new(1, "v", None)]), Record::Create(vec![snapshot])] {
        state.prepare(&record).expect("it can be made");
        state.apply(state.seqno.next(), record);
    }
    // Nobody needs the blocks of nodes here.
    state.node_blocks = vec![BlockNo::new(0); NODE_RESERVE];
    state
}

fn new(id: u64, name: &str, source: Option<u64>) -> NewVolume {
    NewVolume {
        id: VolumeId::new(id),
        name: name.into(),
        size_bytes: 100 * BLOCK_BYTES,
        source: source.map(VolumeId::new),
        snapshot: false,
        read_only: false,
        reservation_blocks: 0,
        growth_limit_blocks: 0,
        io_limits: IoLimits::default(),
        labels: Vec::new(),
        created_at: 0,
    }
}

fn change(id: u64) -> NewProperties {
    NewProperties {
        id: VolumeId::new(id),
        size_bytes: 100 * BLOCK_BYTES,
        read_only: false,
        reservation_blocks: 0,
        growth_limit_blocks: 0,
        io_limits: IoLimits::default(),
        labels: Vec::new(),
    }
}

fn run(volume: u64, lba: u64, block: BlockNo, len: u32) -> MapRun {
    MapRun { volume: VolumeId::new(volume), lba: Lba::new(lba), block, len }
}

/// Each of these is refused with an error that says so.
fn refused(state: &State, records: Vec<(&str, Record)>) {
    for (says, record) in records {
        match state.prepare(&record) {
            Err(Need::Refused(error)) => assert!(error.to_string().contains(says), "{error}"),
            other => panic!("not refused ({says}): {other:?}, {record:?}"),
        }
    }
}

#[test]
fn what_cannot_be_written_is_refused() {
    let state = state();
    let block = state.geometry.block_at(0, 0);
    let last = state.geometry.block_at(0, 1019);
    let map =
        |run: MapRun, sums: u32| Record::Map { runs: vec![run], sums: vec![0; sums as usize] };
    let unmap = |volume, lba, len| {
        let (volume, lba) = (VolumeId::new(volume), Lba::new(lba));
        Record::Unmap { volume, lba, len }
    };
    state.prepare(&map(run(1, 0, block, 2), 2)).expect("it can be written");
    state.prepare(&unmap(1, 99, 1)).expect("it can be discarded");
    let most = u32::try_from(limits::RECORD_BLOCKS_MAX).expect("small");
    refused(
        &state,
        vec![
            ("do not agree", map(run(1, 0, block, 2), 1)),
            ("do not agree", map(run(1, 0, block, most + 1), most + 1)),
            ("no volume 9", map(run(9, 0, block, 1), 1)),
            ("run out of bounds", map(run(1, 99, block, 2), 2)),
            ("run out of bounds", map(run(1, 0, last, 2), 2)),
            ("run out of bounds", map(run(1, 0, BlockNo::new(1), 1), 1)),
            ("no volume 9", unmap(9, 0, 1)),
            ("range out of bounds", unmap(1, 99, 2)),
            ("range out of bounds", unmap(1, u64::MAX, 2)),
            ("no volume 9", Record::Delete(VolumeId::new(9))),
        ],
    );
}

/// An edit must find the blocks for its nodes at hand.
#[test]
fn blocks_for_nodes_are_asked_for_first() {
    let mut state = state();
    state.node_blocks.truncate(3);
    let (volume, lba) = (VolumeId::new(1), Lba::new(0));
    let record =
        Record::Map { runs: vec![run(1, 0, state.geometry.block_at(0, 0), 1)], sums: vec![0] };
    assert!(matches!(state.prepare(&record), Err(Need::NodeBlocks(4))));
    let record = Record::Unmap { volume, lba, len: 1 };
    assert!(matches!(state.prepare(&record), Err(Need::NodeBlocks(4))));
}

/// [`state`] with free blocks; those that are taken, and the rest for nodes.
fn writable(fanout: Fanout) -> (State, BlockNo) {
    let mut state = state();
    state.cache = NodeCache::new(64, UUID, fanout);
    let mut bitmap = Bitmap::full(1020);
    bitmap.set(0, 1020, true);
    state.space.install(0, bitmap);
    let taken = state.space.take(400).expect("all is free");
    state.node_blocks = (200..400).map(|n| taken.block.plus(n)).collect();
    (state, taken.block)
}

fn map_of(runs: &[MapRun]) -> Record {
    Record::Map { runs: runs.to_vec(), sums: vec![0; runs.len()] }
}

fn do_all(state: &mut State, records: Vec<Record>) {
    for record in records {
        state.prepare(&record).expect("it can be done");
        state.apply(state.seqno.next(), record);
    }
}

/// A node that a clone shares with its source, until a damaged catalogue says to both that it is
/// their own.
#[test]
fn a_record_that_meets_a_node_of_two_owners_is_refused() {
    let (mut state, block) = writable(Fanout::FULL);
    let clone = Record::Create(vec![new(3, "c", Some(1))]);
    do_all(&mut state, vec![map_of(&[run(1, 0, block, 1)]), clone]);
    state.seal = state.seqno;

    let block = block.plus(1);
    let both = map_of(&[run(1, 5, block, 1), run(3, 5, block, 1)]);
    state.prepare(&both).expect("they share it");
    for id in [1, 3] {
        state.volume_mut(VolumeId::new(id)).expect("made").entry.shared_at = Seqno::new(0);
    }
    refused(&state, vec![("two pointers name it", both)]);
    let one = map_of(&[run(1, 5, block, 1), run(1, 9, block, 1)]);
    state.prepare(&one).expect("it has one owner");
}

/// The first leaf and the last are the same, as a damaged root has it.
#[test]
fn a_discard_that_meets_a_node_twice_is_refused() {
    let (mut state, block) = writable(Fanout { leaf_max: 4, inner_max: 4 });
    let writes = (0..12).map(|n| map_of(&[run(1, 2 * n, block.plus(2 * n), 1)]));
    do_all(&mut state, writes.collect());
    let root = state.volume(VolumeId::new(1)).and_then(|v| v.entry.root).expect("written");
    let blocks = state.cache.dirty_blocks_sealed(state.seqno);
    blocks.into_iter().for_each(|block| state.cache.mark_clean(block));
    state.seal = state.seqno;
    let discard = Record::Unmap { volume: VolumeId::new(1), lba: Lba::new(1), len: 21 };
    state.prepare(&discard).expect("all is well");

    let mut bytes = [0; BLOCK_SIZE];
    assert!(state.cache.copy_out(root.ptr.block, &mut bytes), "it is in memory");
    let entry = |n: usize| HEADER_BYTES + n * size_of::<InnerEntry>();
    let first = bytes[entry(0) + 8..entry(0) + 24].to_vec();
    bytes[entry(2) + 8..entry(2) + 24].copy_from_slice(&first); // Block and birth.
    seal_crc(&mut bytes);
    state.cache.forget(root.ptr.block);
    state.cache.insert_loaded(&root.node_ref(), &bytes).expect("nothing wrong is seen in it");
    refused(&state, vec![("two pointers name it", discard)]);
}

#[test]
fn what_cannot_be_made_is_refused() {
    let state = state();
    let one = |new| Record::Create(vec![new]);
    state.prepare(&one(new(3, "w", Some(2)))).expect("it can be made");
    let many = (0..65).map(|n| new(3 + n, &format!("w{n}"), None)).collect();
    let label = |k: &str, v: &str| vec![(k.to_owned(), v.to_owned())];
    let labels = (0..33).map(|n| (n.to_string(), String::new())).collect();
    refused(
        &state,
        vec![
            ("0 volumes at once", Record::Create(Vec::new())),
            ("65 volumes at once", Record::Create(many)),
            ("is not a volume name", one(new(3, "", None))),
            ("is not a volume name", one(new(3, "-x", None))),
            ("is not a volume name", one(new(3, "a/b", None))),
            ("is not a volume name", one(new(3, &"x".repeat(254), None))),
            ("is not a multiple", one(NewVolume { size_bytes: 4097, ..new(3, "w", None) })),
            ("is not between", one(NewVolume { size_bytes: 512, ..new(3, "w", None) })),
            ("is not between", one(NewVolume { size_bytes: 65 << 40, ..new(3, "w", None) })),
            ("labels", one(NewVolume { labels: label("", "x"), ..new(3, "w", None) })),
            (
                "labels",
                one(NewVolume { labels: label("k", &"x".repeat(512)), ..new(3, "w", None) }),
            ),
            ("labels", one(NewVolume { labels, ..new(3, "w", None) })),
            (
                "larger than the largest pool",
                one(NewVolume { reservation_blocks: 1 << 40, ..new(3, "w", None) }),
            ),
            ("the name is taken", one(new(3, "v", None))),
            ("the name is taken", Record::Create(vec![new(3, "w", None), new(4, "w", None)])),
            ("the name is taken", Record::Create(vec![new(3, "w", None), new(3, "x", None)])),
            ("the name is taken", one(new(2, "w", None))),
            ("the name is taken", one(new(limits::VOLUME_ID_MAX, "w", None))),
            ("no volume 9", one(new(3, "w", Some(9)))),
            (
                "of its source",
                one(NewVolume { size_bytes: 99 * BLOCK_BYTES, ..new(3, "w", Some(1)) }),
            ),
        ],
    );
}

#[test]
fn a_pool_holds_so_many_volumes() {
    let mut state = state();
    let volume = state.volumes[&VolumeId::new(1)].clone();
    while state.volumes.len() < limits::VOLUMES_MAX - 1 {
        let id = VolumeId::new(10 + to_u64(state.volumes.len()));
        state.volumes.insert(id, volume.clone());
    }
    let id = state.next_id;
    let two = Record::Create(vec![new(id, "w", None), new(id + 1, "x", None)]);
    refused(&state, vec![("holds at most 65536", two)]);
    state.prepare(&Record::Create(vec![new(id, "w", None)])).expect("it is the last one");
}

/// No reader takes a catalogue of any length, so none is written.
#[test]
fn the_entries_of_all_volumes_have_a_bound() {
    let mut state = state();
    let labels = |bytes: usize| vec![("k".to_owned(), "x".repeat(bytes))];
    let modify =
        |bytes| Record::Modify(Box::new(NewProperties { labels: labels(bytes), ..change(1) }));
    state.prepare(&modify(100)).expect("there is room");
    state.apply(state.seqno.next(), modify(100));
    state.entries_bytes = limits::VOLUME_ENTRIES_BYTES_MAX - 400;
    let create =
        |bytes| Record::Create(vec![NewVolume { labels: labels(bytes), ..new(3, "w", None) }]);
    state.prepare(&create(200)).expect("there is room");
    state.prepare(&modify(500)).expect("there is room");
    state.entries_bytes += 101;
    refused(&state, vec![("no room", create(300)), ("no room", modify(500))]);
    state.entries_bytes = limits::VOLUME_ENTRIES_BYTES_MAX + 1;
    refused(&state, vec![("no room", create(0)), ("no room", modify(101))]);
    state.prepare(&modify(99)).expect("it becomes shorter");
    state.prepare(&Record::Delete(VolumeId::new(1))).expect("it becomes shorter");
}

#[test]
fn what_cannot_be_changed_is_refused() {
    let state = state();
    let record = |new| Record::Modify(Box::new(new));
    let longer = NewProperties { size_bytes: 101 * BLOCK_BYTES, ..change(1) };
    state.prepare(&record(longer.clone())).expect("it may grow");
    refused(
        &state,
        vec![
            ("no volume 9", record(change(9))),
            ("is not a multiple", record(NewProperties { size_bytes: 409_601, ..change(1) })),
            ("cannot shrink", record(NewProperties { size_bytes: 99 * BLOCK_BYTES, ..change(1) })),
            ("keeps its size", record(NewProperties { id: VolumeId::new(2), ..longer })),
            (
                "labels",
                record(NewProperties { labels: vec![(String::new(), "x".into())], ..change(1) }),
            ),
            (
                "larger than the largest pool",
                record(NewProperties { reservation_blocks: 1 << 40, ..change(1) }),
            ),
        ],
    );
}

#[test]
fn sums_follow_every_record() {
    let mut state = state();
    let reserved = |blocks| NewVolume { reservation_blocks: blocks, ..new(3, "w", None) };
    let changed = NewProperties { reservation_blocks: 7, ..change(3) };
    // A map of 100 blocks is a single node, which can be promised, too.
    for (record, promises, next_id) in [
        (Record::Create(vec![reserved(40)]), 41, 4),
        (Record::Modify(Box::new(changed)), 8, 4),
        (Record::Create(vec![new(6, "x", Some(3)), new(5, "y", None)]), 8, 7),
        (Record::Delete(VolumeId::new(3)), 0, 7),
        (Record::Create(vec![new(7, "w", None)]), 0, 8),
    ] {
        state.prepare(&record).expect("it can be done");
        state.apply(state.seqno.next(), record);
        assert_eq!((state.promises_max, state.next_id), (promises, next_id));
        assert_eq!(state.wrong_sums(), Vec::<String>::new());
    }
}
