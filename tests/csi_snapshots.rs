//! The CSI controller, about snapshots: they are what their volume was, outlive it, and are found
//! again. Clones of a volume that is being written are one point in the order of its writes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pando_csi::proto::csi::{self, volume_content_source::Type as Source};
use pando_tests::csi::{block, from_snapshot, from_volume, request};
use pando_tests::data::number;
use pando_tests::noise::Noise;
use pando_tests::{Csi, Data, Nbd, System};
use tonic::{Code, Status};

const MIB: i64 = 1 << 20;
const SIZE: i64 = 4 * MIB;
const BLOCK: u64 = 4096;
/// Clones of the volume that is being written.
const CLONES: usize = 12;

fn start() -> (System, Csi, Data) {
    let system = System::start("512MiB");
    let csi = Csi::start(&system);
    let data = Data::new(&system);
    (system, csi, data)
}

fn snapshot(csi: &Csi, name: &str, volume: &str) -> Result<csi::Snapshot, Status> {
    let request = csi::CreateSnapshotRequest {
        source_volume_id: volume.to_owned(),
        name: name.to_owned(),
        ..Default::default()
    };
    let answer = csi.answer(csi.controller().create_snapshot(request))?;
    Ok(answer.snapshot.expect("an answer has a snapshot"))
}

fn delete(csi: &Csi, id: &str) -> Result<(), Status> {
    let request = csi::DeleteSnapshotRequest { snapshot_id: id.to_owned(), ..Default::default() };
    csi.answer(csi.controller().delete_snapshot(request)).map(drop)
}

fn restored(name: &str, snapshot: &str) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest {
        volume_content_source: from_snapshot(snapshot),
        capacity_range: None,
        ..request(name, 0, &block())
    }
}

fn list(
    csi: &Csi,
    request: csi::ListSnapshotsRequest,
) -> Result<(Vec<csi::Snapshot>, String), Status> {
    let answer = csi.answer(csi.controller().list_snapshots(request))?;
    let snapshots = answer.entries.into_iter().map(|entry| entry.snapshot.expect("a snapshot"));
    Ok((snapshots.collect(), answer.next_token))
}

fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.expect_err("a refusal").code()
}

#[test]
fn a_snapshot_is_what_the_volume_was_and_outlives_it() {
    let (system, csi, data) = start();
    let mut noise = Noise::new(1);
    let mut content = || noise.bytes(SIZE.try_into().expect("small"));
    let source = csi.create(request("source", SIZE, &block())).expect("a volume").volume_id;
    let first = content();
    data.write(number(&source), 0, &first);
    let taken = snapshot(&csi, "one", &source).expect("a snapshot");
    assert!(taken.ready_to_use && taken.creation_time.is_some_and(|time| time.seconds > 0));
    assert_eq!((taken.size_bytes, taken.source_volume_id.as_str()), (SIZE, source.as_str()));
    data.write(number(&source), 0, &content());

    let volume = csi.create(restored("restored", &taken.snapshot_id)).expect("a volume");
    let from = volume.content_source.clone().and_then(|content| content.r#type);
    let expected =
        csi::volume_content_source::SnapshotSource { snapshot_id: taken.snapshot_id.clone() };
    assert_eq!(from, Some(Source::Snapshot(expected)));
    csi.delete(&source).expect("a deletion");
    assert_eq!(data.read(number(&taken.snapshot_id)), first);
    let query =
        csi::ListSnapshotsRequest { source_volume_id: source.clone(), ..Default::default() };
    assert_eq!(
        list(&csi, query).expect("a list").0,
        std::slice::from_ref(&taken),
        "the volume is gone"
    );
    assert_eq!(snapshot(&csi, "one", &source).expect("again"), taken);

    delete(&csi, &taken.snapshot_id).expect("a deletion");
    delete(&csi, &taken.snapshot_id).expect("gone is gone");
    assert_eq!(data.read(number(&volume.volume_id)), first);
    assert_eq!(csi.create(restored("restored", &taken.snapshot_id)).expect("again"), volume);
    csi.delete(&volume.volume_id).expect("a deletion");
    system.check();
    assert_eq!(data.pool().provisioned_bytes, 0);
}

#[test]
fn what_is_asked_of_the_wrong_object_is_refused() {
    let (_system, csi, data) = start();
    let one = csi.create(request("one", SIZE, &block())).expect("a volume").volume_id;
    let two = csi.create(request("two", SIZE, &block())).expect("a volume").volume_id;
    // A snapshot and a volume may have one name.
    let taken = snapshot(&csi, "one", &one).expect("a snapshot").snapshot_id;
    assert_eq!(code(snapshot(&csi, "one", &two)), Code::AlreadyExists);
    assert_eq!(code(snapshot(&csi, "of nothing", "fake")), Code::NotFound);
    assert_eq!(code(snapshot(&csi, "of a snapshot", &taken)), Code::NotFound);
    assert_eq!(code(snapshot(&csi, "", &one)), Code::InvalidArgument);
    assert_eq!(code(csi.create(restored("of a volume", &two))), Code::NotFound);
    let clone = csi::CreateVolumeRequest {
        volume_content_source: from_volume(&taken),
        ..restored("clone of a snapshot", "")
    };
    assert_eq!(code(csi.create(clone)), Code::NotFound);
    // To each call the other kind of object is unknown, so it is deleted already.
    csi.delete(&taken).expect("no volume of this id");
    delete(&csi, &one).expect("no snapshot of this id");
    assert_eq!((data.pool().volumes, data.pool().snapshots), (2, 1));
    let small = csi::CreateVolumeRequest {
        capacity_range: Some(csi::CapacityRange { required_bytes: MIB, limit_bytes: 0 }),
        ..restored("smaller", &taken)
    };
    assert_eq!(code(csi.create(small)), Code::OutOfRange);
    let unknown = csi::CreateSnapshotRequest {
        source_volume_id: one,
        name: "unknown".to_owned(),
        parameters: BTreeMap::from([("size".to_owned(), "1".to_owned())]),
        ..Default::default()
    };
    assert_eq!(code(csi.answer(csi.controller().create_snapshot(unknown))), Code::InvalidArgument);
}

#[test]
fn a_call_that_went_to_the_wrong_node_decides_nothing() {
    let (_system, csi, _data) = start();
    let other_system = System::start("256MiB");
    let other = Csi::on(&other_system, "node-2", &[]);
    let volume = other.create(request("far", SIZE, &block())).expect("a volume").volume_id;
    let taken = snapshot(&other, "far", &volume).expect("a snapshot");
    let id = taken.snapshot_id.clone();
    let refused = delete(&csi, &id).expect_err("it is another node's");
    assert!(refused.message().contains("is on another node than node-1"), "{refused}");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(code(snapshot(&csi, "far", &volume)), Code::FailedPrecondition);
    let get = csi::GetSnapshotRequest { snapshot_id: id.clone(), ..Default::default() };
    let got = csi.answer(csi.controller().get_snapshot(get));
    assert_eq!(code(got), Code::FailedPrecondition);
    assert_eq!(code(csi.create(restored("restored", &id))), Code::ResourceExhausted);
    // A list has what is here.
    let query = csi::ListSnapshotsRequest { snapshot_id: id.clone(), ..Default::default() };
    assert!(list(&csi, query.clone()).expect("a list").0.is_empty());
    assert_eq!(list(&other, query).expect("a list").0, [taken]);
    delete(&other, &id).expect("it is still there, on its own node");
}

#[test]
fn lists_are_filtered_and_go_page_by_page() {
    let (system, csi, _data) = start();
    let one = csi.create(request("one", SIZE, &block())).expect("a volume").volume_id;
    let two = csi.create(request("two", SIZE, &block())).expect("a volume").volume_id;
    system.cli().run(&["volume", "snapshot", "csi-vol-one", "mine"]);
    let mut made = BTreeMap::new();
    for (name, source) in [("a", &one), ("b", &two), ("c", &one), ("d e", &one), ("f", &two)] {
        let taken = snapshot(&csi, name, source).expect("a snapshot");
        made.insert(taken.snapshot_id.clone(), taken);
    }
    let query = csi::ListSnapshotsRequest::default;
    let mut found = BTreeMap::new();
    let mut pages = 0;
    let mut starting_token = String::new();
    loop {
        let page = csi::ListSnapshotsRequest { max_entries: 2, starting_token, ..query() };
        let (snapshots, next) = list(&csi, page).expect("a page");
        assert!(snapshots.len() <= 2);
        found.extend(snapshots.into_iter().map(|taken| (taken.snapshot_id.clone(), taken)));
        pages += 1;
        if next.is_empty() {
            break;
        }
        starting_token = next;
    }
    assert_eq!((pages, &found), (3, &made));

    let filtered = |snapshot_id: &str, source_volume_id: &str| {
        let request = csi::ListSnapshotsRequest {
            snapshot_id: snapshot_id.to_owned(),
            source_volume_id: source_volume_id.to_owned(),
            ..query()
        };
        let snapshots = list(&csi, request).expect("a list").0.into_iter();
        snapshots.map(|taken| taken.snapshot_id).collect::<BTreeSet<_>>()
    };
    for (id, taken) in &made {
        assert_eq!(filtered(id, ""), BTreeSet::from([id.clone()]));
        let other = if taken.source_volume_id == one { &two } else { &one };
        assert!(filtered(id, other).is_empty());
        let get = csi::GetSnapshotRequest { snapshot_id: id.clone(), ..Default::default() };
        let got = csi.answer(csi.controller().get_snapshot(get)).expect("a snapshot");
        assert_eq!(got.snapshot.as_ref(), Some(taken));
    }
    assert_eq!(filtered("", &one).len(), 3);
    assert!(filtered("fake", "").is_empty() && filtered("", "fake").is_empty());
    assert!(filtered(&one, "").is_empty(), "a volume is no snapshot");
    let token = csi::ListSnapshotsRequest { starting_token: "x".to_owned(), ..query() };
    assert_eq!(code(list(&csi, token)), Code::Aborted);
    let get = csi::GetSnapshotRequest { snapshot_id: "fake".to_owned(), ..Default::default() };
    assert_eq!(code(csi.answer(csi.controller().get_snapshot(get))), Code::NotFound);
}

/// Writes block after block, each with its number, around and around, until told to end.
fn keep_writing(socket: &Path, end: &AtomicBool, answered: &AtomicU64) {
    let mut nbd = Nbd::open(socket, "csi-vol-busy").expect("an export");
    let blocks = SIZE.unsigned_abs() / BLOCK;
    let mut stamp: u64 = 0;
    while !end.load(Ordering::Relaxed) {
        stamp += 1;
        let block = stamp.to_le_bytes().repeat(usize::try_from(BLOCK).expect("small") / 8);
        nbd.write((stamp % blocks) * BLOCK, &block);
        answered.store(stamp, Ordering::SeqCst);
    }
}

/// The last write that a copy holds; all before it must be there too, and none after it.
fn last_write(copy: &[u8]) -> u64 {
    let blocks = SIZE.unsigned_abs() / BLOCK;
    let block = usize::try_from(BLOCK).expect("small");
    let stamps: Vec<u64> = copy
        .chunks(block)
        .map(|bytes| {
            let stamp = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
            assert_eq!(bytes, stamp.to_le_bytes().repeat(block / 8), "a torn block");
            stamp
        })
        .collect();
    let last = *stamps.iter().max().expect("blocks");
    for (index, stamp) in (0_u64..).zip(stamps) {
        // The newest write to this block that is not after the last one.
        let behind = (last + blocks - index) % blocks;
        assert_eq!(
            stamp,
            last.saturating_sub(behind),
            "block {index} of a copy that ends at {last}"
        );
    }
    last
}

#[test]
fn a_clone_under_writes_is_one_instant() {
    let (system, csi, data) = start();
    let source = csi.create(request("busy", SIZE, &block())).expect("a volume").volume_id;
    let socket = system.cli().serve("csi-vol-busy");
    let end = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU64::new(0));
    let writer = {
        let (end, answered) = (Arc::clone(&end), Arc::clone(&answered));
        std::thread::spawn(move || keep_writing(&socket, &end, &answered))
    };
    let mut last = 0;
    for index in 0..CLONES {
        // Some writes between one clone and the next, and the second time around before the first.
        while answered.load(Ordering::SeqCst) < last + 1500 {
            assert!(!writer.is_finished(), "the writer ended by itself");
            std::thread::yield_now();
        }
        let before = answered.load(Ordering::SeqCst);
        let copy = if index % 2 == 0 {
            let clone = csi::CreateVolumeRequest {
                volume_content_source: from_volume(&source),
                ..request(&format!("clone-{index}"), SIZE, &block())
            };
            csi.create(clone).expect("a clone").volume_id
        } else {
            snapshot(&csi, &format!("snapshot-{index}"), &source).expect("a snapshot").snapshot_id
        };
        let after = answered.load(Ordering::SeqCst);
        last = last_write(&data.read(number(&copy)));
        // One write can have been done and not yet answered.
        assert!((before..=after + 1).contains(&last), "{last} is not in {before}..={after}");
    }
    end.store(true, Ordering::Relaxed);
    writer.join().expect("the writer ends");
    system.check();
}
