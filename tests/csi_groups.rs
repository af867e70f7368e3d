//! Groups of snapshots are of one instant or not at all; the streams of metadata say what changed,
//! no more and no less.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pando_csi::proto::csi;
use pando_csi::proto::csi::group_controller_client::GroupControllerClient;
use pando_csi::proto::csi::snapshot_metadata_client::SnapshotMetadataClient;
use pando_tests::csi::{block, from_snapshot, request};
use pando_tests::data::number;
use pando_tests::noise::Noise;
use pando_tests::{Csi, Data, Nbd, System};
use tonic::transport::Channel;
use tonic::{Code, Status};

const SIZE: i64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Groups that are made under writes.
const GROUPS: usize = 10;

fn start() -> (System, Csi, Data) {
    let system = System::start("512MiB");
    let csi = Csi::start(&system);
    let data = Data::new(&system);
    (system, csi, data)
}

fn volumes(csi: &Csi, names: &[&str]) -> Vec<String> {
    let create =
        |name: &&str| csi.create(request(name, SIZE, &block())).expect("a volume").volume_id;
    names.iter().map(create).collect()
}

fn groups(csi: &Csi) -> GroupControllerClient<Channel> {
    GroupControllerClient::new(csi.channel())
}

fn take(csi: &Csi, name: &str, sources: &[String]) -> Result<csi::VolumeGroupSnapshot, Status> {
    let request = csi::CreateVolumeGroupSnapshotRequest {
        name: name.to_owned(),
        source_volume_ids: sources.to_vec(),
        ..Default::default()
    };
    let answer = csi.answer(groups(csi).create_volume_group_snapshot(request))?;
    Ok(answer.group_snapshot.expect("an answer has a group"))
}

fn get(csi: &Csi, id: &str, members: &[String]) -> Result<csi::VolumeGroupSnapshot, Status> {
    let request = csi::GetVolumeGroupSnapshotRequest {
        group_snapshot_id: id.to_owned(),
        snapshot_ids: members.to_vec(),
        ..Default::default()
    };
    let answer = csi.answer(groups(csi).get_volume_group_snapshot(request))?;
    Ok(answer.group_snapshot.expect("an answer has a group"))
}

fn delete(csi: &Csi, id: &str, members: &[String]) -> Result<(), Status> {
    let request = csi::DeleteVolumeGroupSnapshotRequest {
        group_snapshot_id: id.to_owned(),
        snapshot_ids: members.to_vec(),
        ..Default::default()
    };
    csi.answer(groups(csi).delete_volume_group_snapshot(request)).map(drop)
}

fn members(group: &csi::VolumeGroupSnapshot) -> Vec<String> {
    group.snapshots.iter().map(|member| member.snapshot_id.clone()).collect()
}

fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.expect_err("a refusal").code()
}

#[test]
fn a_group_is_made_found_and_deleted_as_one() {
    let (system, csi, data) = start();
    let sources = volumes(&csi, &["one", "two", "three"]);
    let group = take(&csi, "all of it", &sources).expect("a group");
    assert!(group.ready_to_use && group.creation_time.is_some());
    let of: BTreeSet<&String> = group.snapshots.iter().map(|m| &m.source_volume_id).collect();
    assert_eq!(of, sources.iter().collect());
    let id = group.group_snapshot_id.clone();
    assert!(id.len() <= 128 && group.snapshots.iter().all(|m| m.group_snapshot_id == id));
    let reversed: Vec<String> = sources.iter().rev().cloned().collect();
    assert_eq!(take(&csi, "all of it", &reversed).expect("again"), group);
    assert_eq!(code(take(&csi, "all of it", &sources[..2])), Code::AlreadyExists);
    // Groups whose names begin alike are not mixed up, nor is a snapshot of that name.
    let other = take(&csi, "all of it.7", &sources[..1]).expect("another group");
    assert_ne!(other.group_snapshot_id, id);
    assert_eq!(get(&csi, &id, &members(&group)).expect("the group"), group);

    let member = csi::DeleteSnapshotRequest {
        snapshot_id: group.snapshots[0].snapshot_id.clone(),
        ..Default::default()
    };
    let alone = csi.answer(csi.controller().delete_snapshot(member));
    assert_eq!(code(alone), Code::InvalidArgument, "a member goes with its group");
    let restored = csi::CreateVolumeRequest {
        volume_content_source: from_snapshot(&group.snapshots[0].snapshot_id),
        ..request("restored", SIZE, &block())
    };
    csi.create(restored).expect("a volume from a member");

    assert_eq!(code(delete(&csi, &id, &members(&group)[1..])), Code::InvalidArgument);
    assert_eq!(code(get(&csi, &id, &[])), Code::InvalidArgument);
    delete(&csi, &id, &members(&group)).expect("a deletion");
    delete(&csi, &id, &members(&group)).expect("gone is gone");
    assert_eq!(code(get(&csi, &id, &members(&group))), Code::NotFound);
    assert_eq!(data.pool().snapshots, 1, "the other group is still there");
    delete(&csi, &other.group_snapshot_id, &members(&other)).expect("a deletion");
    system.check();
}

#[test]
fn impossible_groups_leave_nothing() {
    let (_system, csi, data) = start();
    let sources = volumes(&csi, &["one", "two"]);
    let with = |id: &str| [sources.clone(), vec![id.to_owned()]].concat();
    assert_eq!(code(take(&csi, "g", &with("fake"))), Code::NotFound);
    assert_eq!(code(take(&csi, "g", &[])), Code::InvalidArgument);
    assert_eq!(code(take(&csi, "", &sources)), Code::InvalidArgument);
    let many: Vec<String> = (0..65).map(|index| format!("fake-{index}")).collect();
    assert_eq!(code(take(&csi, "g", &many)), Code::InvalidArgument);
    let other_system = System::start("256MiB");
    let other = Csi::on(&other_system, "node-2", &[]);
    let foreign = volumes(&other, &["far"]);
    assert_eq!(code(take(&csi, "g", &with(&foreign[0]))), Code::FailedPrecondition);
    // A call about a group of another node decides nothing.
    let group = take(&other, "g", &foreign).expect("a group");
    let id = &group.group_snapshot_id;
    assert_eq!(code(delete(&csi, id, &members(&group))), Code::FailedPrecondition);
    assert_eq!(code(get(&csi, id, &members(&group))), Code::FailedPrecondition);
    assert_eq!(get(&other, id, &members(&group)).expect("it is still there"), group);
    assert_eq!(data.pool().snapshots, 0);
    for fake in ["fake", "../..", "node-1.x.g1"] {
        delete(&csi, fake, &[]).expect("nothing is there to be deleted");
        assert_eq!(code(get(&csi, fake, &[])), Code::NotFound);
    }
}

/// Writes the same number to both volumes, first the left one, again and again.
fn keep_writing(sockets: &[PathBuf; 2], end: &AtomicBool, answered: &AtomicU64) {
    let [left, right] = sockets;
    let mut exports = [(left, "csi-vol-left"), (right, "csi-vol-right")]
        .map(|(socket, name)| Nbd::open(socket, name).expect("an export"));
    let mut stamp: u64 = 0;
    while !end.load(Ordering::Relaxed) {
        stamp += 1;
        let bytes = stamp.to_le_bytes().repeat(usize::try_from(BLOCK).expect("small") / 8);
        for export in &mut exports {
            export.write(0, &bytes);
        }
        answered.store(stamp, Ordering::SeqCst);
    }
}

#[test]
fn a_group_under_writes_is_one_instant() {
    let (system, csi, data) = start();
    let sources = volumes(&csi, &["left", "right"]);
    let sockets = ["left", "right"].map(|name| system.cli().serve(&format!("csi-vol-{name}")));
    let end = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU64::new(0));
    let writer = {
        let (end, answered) = (Arc::clone(&end), Arc::clone(&answered));
        std::thread::spawn(move || keep_writing(&sockets, &end, &answered))
    };
    for index in 0..GROUPS {
        let before = answered.load(Ordering::SeqCst);
        while answered.load(Ordering::SeqCst) < before + 50 {
            assert!(!writer.is_finished(), "the writer ended by itself");
            std::thread::yield_now();
        }
        let group = take(&csi, &format!("group-{index}"), &sources).expect("a group");
        let stamp = |source: &String| {
            let member = group.snapshots.iter().find(|m| m.source_volume_id == *source);
            let bytes = data.read(number(&member.expect("a member").snapshot_id));
            u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"))
        };
        let (left, right) = (stamp(&sources[0]), stamp(&sources[1]));
        assert!(left == right || left == right + 1, "left {left}, right {right}: no instant");
    }
    end.store(true, Ordering::Relaxed);
    writer.join().expect("the writer ends");
}

/// A stream of metadata: its ranges, after a look at what holds for all messages.
struct Told {
    ranges: Vec<(i64, i64)>,
    messages: usize,
}

impl Told {
    fn add(&mut self, kind: i32, capacity: i64, ranges: &[csi::BlockMetadata], max: usize) {
        assert_eq!(kind, i32::from(csi::BlockMetadataType::VariableLength));
        assert_eq!(capacity, SIZE);
        assert!(max == 0 || ranges.len() <= max);
        self.messages += 1;
        for range in ranges {
            let behind = self.ranges.last().map_or(0, |(offset, length)| offset + length);
            assert!(
                range.byte_offset >= behind && range.size_bytes > 0,
                "{range:?} after {behind}"
            );
            self.ranges.push((range.byte_offset, range.size_bytes));
        }
    }
}

fn allocated(csi: &Csi, id: &str, starting_offset: i64, max_results: i32) -> Result<Told, Status> {
    let request = csi::GetMetadataAllocatedRequest {
        snapshot_id: id.to_owned(),
        starting_offset,
        max_results,
        ..Default::default()
    };
    csi.wait(async {
        let mut client = SnapshotMetadataClient::new(csi.channel());
        let mut stream = client.get_metadata_allocated(request).await?.into_inner();
        let mut told = Told { ranges: Vec::new(), messages: 0 };
        while let Some(m) = stream.message().await? {
            let max = usize::try_from(max_results).expect("not negative");
            told.add(m.block_metadata_type, m.volume_capacity_bytes, &m.block_metadata, max);
        }
        Ok(told)
    })
}

fn delta(csi: &Csi, base: &str, target: &str, starting_offset: i64) -> Result<Told, Status> {
    let request = csi::GetMetadataDeltaRequest {
        base_snapshot_id: base.to_owned(),
        target_snapshot_id: target.to_owned(),
        starting_offset,
        ..Default::default()
    };
    csi.wait(async {
        let mut client = SnapshotMetadataClient::new(csi.channel());
        let mut stream = client.get_metadata_delta(request).await?.into_inner();
        let mut told = Told { ranges: Vec::new(), messages: 0 };
        while let Some(m) = stream.message().await? {
            told.add(m.block_metadata_type, m.volume_capacity_bytes, &m.block_metadata, 0);
        }
        Ok(told)
    })
}

fn snapshot(csi: &Csi, name: &str, volume: &str) -> String {
    let request = csi::CreateSnapshotRequest {
        source_volume_id: volume.to_owned(),
        name: name.to_owned(),
        ..Default::default()
    };
    let answer = csi.answer(csi.controller().create_snapshot(request)).expect("a snapshot");
    answer.snapshot.expect("an answer has a snapshot").snapshot_id
}

/// The blocks of a stream, however it cuts them into ranges.
fn blocks(told: &Told) -> BTreeSet<i64> {
    let block = i64::try_from(BLOCK).expect("small");
    let of = |(offset, length): &(i64, i64)| {
        assert!(offset % block == 0 && length % block == 0);
        offset / block..(offset + length) / block
    };
    told.ranges.iter().flat_map(of).collect()
}

#[test]
fn streams_say_what_is_there_and_what_changed() {
    let (_system, csi, data) = start();
    let id = volumes(&csi, &["one"]).remove(0);
    let mut noise = Noise::new(5);
    let mut write = |first: u64, count: usize| {
        let bytes = noise.bytes(count * usize::try_from(BLOCK).expect("small"));
        data.write(number(&id), first * BLOCK, &bytes);
    };
    let empty = snapshot(&csi, "empty", &id);
    let told = allocated(&csi, &empty, 0, 0).expect("a stream");
    assert_eq!((told.ranges.len(), told.messages), (0, 1), "the size is told all the same");
    for first in [3, 10, 20, 30, 255] {
        write(first, 1);
    }
    write(40, 8);
    let old = snapshot(&csi, "old", &id);
    write(10, 1);
    write(41, 2);
    write(100, 1);
    data.clear(number(&id), 20 * BLOCK, BLOCK);
    let new = snapshot(&csi, "new", &id);

    let there = BTreeSet::from([3, 10, 20, 30, 40, 41, 42, 43, 44, 45, 46, 47, 255]);
    let told = allocated(&csi, &old, 0, 0).expect("a stream");
    assert_eq!(blocks(&told), there);
    let pieces = allocated(&csi, &old, 0, 2).expect("a stream");
    assert_eq!((blocks(&pieces), pieces.messages >= 3), (there.clone(), true));
    let block = i64::try_from(BLOCK).expect("small");
    let later = allocated(&csi, &old, 42 * block, 0).expect("a stream");
    assert_eq!(blocks(&later), there.range(42..).copied().collect());
    assert!(allocated(&csi, &old, SIZE, 0).expect("a stream").ranges.is_empty());

    // What was cleared has changed too: it now reads as zeros.
    let changed = BTreeSet::from([10, 20, 41, 42, 100]);
    assert_eq!(blocks(&delta(&csi, &old, &new, 0).expect("a stream")), changed);
    let later = delta(&csi, &old, &new, 41 * block).expect("a stream");
    assert_eq!(blocks(&later), changed.range(41..).copied().collect());
    assert!(delta(&csi, &new, &new, 0).expect("a stream").ranges.is_empty());
    assert_eq!(blocks(&delta(&csi, &empty, &old, 0).expect("a stream")), there);
}

#[test]
fn impossible_questions_are_refused() {
    let (_system, csi, _data) = start();
    let ids = volumes(&csi, &["one", "two"]);
    let old = snapshot(&csi, "old", &ids[0]);
    let new = snapshot(&csi, "new", &ids[0]);
    let other = snapshot(&csi, "other", &ids[1]);
    let refusal = |result: Result<Told, Status>| result.err().map(|error| error.code());
    assert_eq!(refusal(allocated(&csi, "", 0, 0)), Some(Code::InvalidArgument));
    assert_eq!(refusal(allocated(&csi, "fake", 0, 0)), Some(Code::NotFound));
    assert_eq!(refusal(allocated(&csi, &ids[0], 0, 0)), Some(Code::NotFound));
    assert_eq!(refusal(allocated(&csi, &old, -1, 0)), Some(Code::OutOfRange));
    assert_eq!(refusal(allocated(&csi, &old, SIZE + 1, 0)), Some(Code::OutOfRange));
    assert_eq!(refusal(delta(&csi, &old, "", 0)), Some(Code::InvalidArgument));
    assert_eq!(refusal(delta(&csi, &old, "fake", 0)), Some(Code::NotFound));
    assert_eq!(refusal(delta(&csi, &new, &old, 0)), Some(Code::InvalidArgument), "backwards");
    assert_eq!(refusal(delta(&csi, &old, &other, 0)), Some(Code::InvalidArgument));
    assert_eq!(refusal(delta(&csi, &old, &new, SIZE + 1)), Some(Code::OutOfRange));
}
