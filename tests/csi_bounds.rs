//! What the adapter bounds and keeps to itself: requests larger than anybody needs, two calls at
//! once on one object, and secrets, which no log shows.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pando_csi::proto::csi;
use pando_csi::proto::csi::controller_client::ControllerClient;
use pando_csi::proto::csi::group_controller_client::GroupControllerClient;
use pando_csi::proto::csi::identity_client::IdentityClient;
use pando_csi::proto::csi::node_client::NodeClient;
use pando_csi::proto::csi::snapshot_metadata_client::SnapshotMetadataClient;
use pando_csi::proto::csi::volume_capability::access_mode::Mode;
use pando_tests::csi::{Mounted, block, can_mount, from_volume, mount_of, mount_with, request};
use pando_tests::tools::{present, text};
use pando_tests::{Cli, Csi, Data, System};
use tonic::transport::Channel;
use tonic::{Code, Status};

const SIZE: i64 = 64 << 20;
/// Longest time for something to begin.
const PATIENCE: Duration = Duration::from_secs(10);
/// A text that must be in no log.
const SECRET: &str = "correct-horse-battery-staple";

fn code<T: std::fmt::Debug>(answer: Result<T, Status>) -> Code {
    answer.expect_err("it is refused").code()
}

fn wide(entries: usize) -> BTreeMap<String, String> {
    (0..entries).map(|index| (format!("key-{index}"), "x".repeat(100))).collect()
}

#[test]
fn requests_without_bounds_are_refused() {
    let system = System::start("256MiB");
    let csi = Csi::start(&system);
    let id = csi.create(request("one", SIZE, &block())).expect("a volume").volume_id;
    let base = || request("hostile", SIZE, &block());
    let hostile: Vec<csi::CreateVolumeRequest> = vec![
        csi::CreateVolumeRequest { parameters: wide(100), ..base() },
        csi::CreateVolumeRequest { mutable_parameters: wide(100), ..base() },
        csi::CreateVolumeRequest { name: "n".repeat(1 << 20), ..base() },
        csi::CreateVolumeRequest {
            volume_capabilities: vec![mount_of(&"f".repeat(1 << 20))],
            ..base()
        },
        csi::CreateVolumeRequest {
            volume_content_source: from_volume(&"i".repeat(1 << 20)),
            ..base()
        },
        csi::CreateVolumeRequest {
            parameters: BTreeMap::from([("mkfsOptions".to_owned(), "-q ".repeat(1000))]),
            ..base()
        },
    ];
    for request in hostile {
        assert_eq!(code(csi.create(request)), Code::InvalidArgument);
    }
    // Many that are fine are still one volume; what is larger than any message is no request.
    let many = csi::CreateVolumeRequest { volume_capabilities: vec![block(); 10_000], ..base() };
    csi.create(many).expect("a volume");
    let huge = csi::CreateVolumeRequest { name: "n".repeat(5 << 20), ..base() };
    assert_eq!(code(csi.create(huge)), Code::OutOfRange);
    // What is only for people, and does not fit, is left out.
    let claim = |name: String| {
        let key = |key: &str| format!("csi.storage.k8s.io/pvc/{key}");
        BTreeMap::from([(key("namespace"), "default".to_owned()), (key("name"), name)])
    };
    for (index, length) in [253, 254, 3000].into_iter().enumerate() {
        let parameters = claim("c".repeat(length));
        let name = format!("claimed-{index}");
        csi.create(csi::CreateVolumeRequest { parameters, ..request(&name, SIZE, &block()) })
            .expect("a volume");
        let shown = system.cli().json(&["volume", "show", &format!("csi-vol-{name}")]);
        let labelled = shown["labels"]["csi.pando.dev/claim"].is_string();
        assert_eq!(labelled, length <= 253, "{length}: {shown}");
    }

    let list = |max_entries: i32, token: &str| {
        let request = csi::ListVolumesRequest { max_entries, starting_token: token.to_owned() };
        csi.answer(csi.controller().list_volumes(request)).map(|answer| answer.entries.len())
    };
    assert_eq!(list(i32::MAX, "").expect("a list"), 5);
    assert_eq!(code(list(-1, "")), Code::InvalidArgument);
    assert_eq!(code(list(0, &"t".repeat(1 << 20))), Code::Aborted);
    assert_eq!(code(list(0, &format!("csi-{}", "t".repeat(1 << 20)))), Code::Aborted);
    let members = csi::DeleteVolumeGroupSnapshotRequest {
        group_snapshot_id: "fake".to_owned(),
        snapshot_ids: vec!["x".to_owned(); 1000],
        ..Default::default()
    };
    let mut groups = GroupControllerClient::new(csi.channel());
    let deleted = csi.answer(groups.delete_volume_group_snapshot(members));
    assert_eq!(code(deleted), Code::InvalidArgument);
    for id in ["i".repeat(129), "i".repeat(1 << 20)] {
        assert_eq!(code(csi.delete(&id)), Code::InvalidArgument);
        assert_eq!(code(csi.stats(&id, "/x".as_ref())), Code::InvalidArgument);
    }
    let deep = format!("/{}", "d/".repeat(100_000));
    assert_eq!(code(csi.stage(&id, deep.as_ref(), &mount_of("ext4"))), Code::InvalidArgument);
    csi.delete(&id).expect("the adapter is as it was");
}

#[test]
fn flags_and_paths_have_a_bound() {
    if !can_mount() {
        return;
    }
    let system = System::start("256MiB");
    let csi = Csi::start(&system);
    let id = csi.create(request("one", SIZE, &mount_of("ext4"))).expect("a volume").volume_id;
    let places = Mounted::places(&csi, &id, "one");
    let long = "x".repeat(1 << 20);
    for flags in [vec!["ro"; 1000], vec!["ro"; 100_000], vec![long.as_str()]] {
        let capability = mount_with("ext4", &flags, Mode::SingleNodeWriter);
        let staged = csi.stage(&id, &places.staging, &capability);
        assert_eq!(code(staged), Code::InvalidArgument);
    }
    let kind = csi.stage(&id, &places.staging, &mount_of(&long));
    assert_eq!(code(kind), Code::InvalidArgument);
    // An answer with all of a long path in it would be none: it exceeds what gRPC takes for one.
    let path = format!("/{long}");
    for answer in [
        csi.stage(&id, path.as_ref(), &mount_of("ext4")),
        csi.unstage(&id, path.as_ref()),
        csi.publish(&id, (&places.staging, path.as_ref()), &mount_of("ext4"), false),
        csi.unpublish(&id, path.as_ref()),
        csi.stats(&id, path.as_ref()).map(drop),
        csi.expand_node(&id, path.as_ref(), SIZE).map(drop),
    ] {
        assert_eq!(code(answer), Code::InvalidArgument);
    }
}

fn throttle(cli: &Cli, name: &str, iops: &str) {
    cli.run(&["volume", "set", name, "--iops-limit", iops]);
}

/// While one call on a volume is at work, every other one is told to come again.
#[test]
fn the_second_call_on_an_object_is_aborted() {
    if !can_mount() || !present(&["mkfs.ext4"]) {
        return;
    }
    let system = System::start("256MiB");
    let csi = Csi::start(&system);
    let (cli, capability) = (system.cli(), mount_of("ext4"));
    let id = csi.create(request("slow", SIZE, &capability)).expect("a volume").volume_id;
    let places = Mounted::places(&csi, &id, "slow");
    throttle(&cli, "csi-vol-slow", "2");
    let staging = csi::NodeStageVolumeRequest {
        volume_id: id.clone(),
        staging_target_path: text(&places.staging).to_owned(),
        volume_capability: Some(capability.clone()),
        ..Default::default()
    };
    let mut node = csi.node();
    let first = csi.begin(async move { node.node_stage_volume(staging).await });
    let since = Instant::now();
    let labels = || cli.json(&["volume", "show", "csi-vol-slow"])["labels"].to_string();
    while !labels().contains("csi.pando.dev/formatting") {
        assert!(since.elapsed() < PATIENCE, "the first call does not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(code(csi.stage(&id, &places.staging, &capability)), Code::Aborted);
    assert_eq!(code(places.publish(&capability)), Code::Aborted);
    assert_eq!(code(csi.unpublish(&id, &places.target)), Code::Aborted);
    assert_eq!(code(csi.unstage(&id, &places.staging)), Code::Aborted);
    assert_eq!(code(csi.expand(&id, &places.target, 2 * SIZE)), Code::Aborted);
    assert_eq!(code(csi.expand_node(&id, &places.target, 2 * SIZE)), Code::Aborted);
    assert_eq!(code(csi.delete(&id)), Code::Aborted);
    let limits = csi::ControllerModifyVolumeRequest {
        volume_id: id.clone(),
        mutable_parameters: BTreeMap::from([("iopsLimit".to_owned(), "0".to_owned())]),
        ..Default::default()
    };
    assert_eq!(code(csi.answer(csi.controller().controller_modify_volume(limits))), Code::Aborted);
    let other = csi.create(request("other", SIZE, &block())).expect("another object is free");
    csi.delete(&other.volume_id).expect("another object is free");
    assert!(!first.is_finished(), "the first call was at work all the time");

    throttle(&cli, "csi-vol-slow", "0");
    csi.wait(first).expect("a call ends").expect("the volume is staged");
    places.publish(&capability).expect("the volume is published");
    places.down();
    csi.delete(&id).expect("it is not in use");
}

fn secrets() -> BTreeMap<String, String> {
    BTreeMap::from([("password".to_owned(), SECRET.to_owned())])
}

/// The calls of the service Node that have a field for secrets; what they are refused with.
async fn node_with_secrets(channel: Channel, volume_id: String) -> Vec<Status> {
    let mut node = NodeClient::new(channel);
    let path = "/nonexistent/path".to_owned();
    let publish = csi::NodePublishVolumeRequest {
        volume_id: volume_id.clone(),
        staging_target_path: path.clone(),
        target_path: path.clone(),
        volume_capability: Some(block()),
        secrets: secrets(),
        ..Default::default()
    };
    let stage = csi::NodeStageVolumeRequest {
        volume_id: volume_id.clone(),
        staging_target_path: path.clone(),
        volume_capability: Some(mount_of("ext4")),
        secrets: secrets(),
        ..Default::default()
    };
    let expand = csi::NodeExpandVolumeRequest {
        volume_id,
        volume_path: path,
        secrets: secrets(),
        ..Default::default()
    };
    let refused = [
        node.node_publish_volume(publish).await.err(),
        node.node_stage_volume(stage).await.err(),
        node.node_expand_volume(expand).await.err(),
    ];
    refused.into_iter().flatten().collect()
}

/// The same of the service Controller.
async fn controller_with_secrets(channel: Channel, volume_id: String) -> Vec<Status> {
    let mut controller = ControllerClient::new(channel);
    let grow = csi::ControllerExpandVolumeRequest {
        volume_id: volume_id.clone(),
        secrets: secrets(),
        ..Default::default()
    };
    let modify = csi::ControllerModifyVolumeRequest {
        volume_id: volume_id.clone(),
        secrets: secrets(),
        ..Default::default()
    };
    let validate = csi::ValidateVolumeCapabilitiesRequest {
        volume_id: volume_id.clone(),
        secrets: secrets(),
        ..Default::default()
    };
    let list = csi::ListSnapshotsRequest { secrets: secrets(), ..Default::default() };
    let delete = csi::DeleteVolumeRequest { volume_id, secrets: secrets() };
    let refused = [
        controller.controller_expand_volume(grow).await.err(),
        controller.controller_modify_volume(modify).await.err(),
        controller.validate_volume_capabilities(validate).await.err(),
        controller.list_snapshots(list).await.err(),
        controller.delete_volume(delete).await.err(),
    ];
    refused.into_iter().flatten().collect()
}

/// The same of what is about snapshots.
async fn snapshots_with_secrets(channel: Channel, volume_id: String) -> Vec<Status> {
    let snapshot = csi::CreateSnapshotRequest {
        source_volume_id: volume_id.clone(),
        name: format!("of {volume_id}"),
        secrets: secrets(),
        ..Default::default()
    };
    let group = csi::CreateVolumeGroupSnapshotRequest {
        source_volume_ids: vec![volume_id.clone()],
        name: format!("of {volume_id}"),
        secrets: secrets(),
        ..Default::default()
    };
    let allocated = csi::GetMetadataAllocatedRequest {
        snapshot_id: volume_id.clone(),
        secrets: secrets(),
        ..Default::default()
    };
    let delete = csi::DeleteSnapshotRequest { snapshot_id: volume_id, secrets: secrets() };
    let mut controller = ControllerClient::new(channel.clone());
    let mut groups = GroupControllerClient::new(channel.clone());
    let mut metadata = SnapshotMetadataClient::new(channel);
    let refused = [
        controller.create_snapshot(snapshot).await.err(),
        groups.create_volume_group_snapshot(group).await.err(),
        metadata.get_metadata_allocated(allocated).await.err(),
        controller.delete_snapshot(delete).await.err(),
    ];
    refused.into_iter().flatten().collect()
}

#[test]
fn no_log_shows_a_secret() {
    let system = System::start("256MiB");
    let config = system.path().join("csi.toml");
    std::fs::write(&config, "[log]\nlevel = \"trace\"\n").expect("a file");
    let csi = Csi::with(&system, &["--config", text(&config)]);
    let wanted = csi::CreateVolumeRequest { secrets: secrets(), ..request("one", SIZE, &block()) };
    let id = csi.create(wanted).expect("a volume").volume_id;
    let refused = csi::CreateVolumeRequest {
        secrets: secrets(),
        parameters: BTreeMap::from([("unknown".to_owned(), "x".to_owned())]),
        ..request("two", SIZE, &block())
    };
    assert_eq!(code(csi.create(refused)), Code::InvalidArgument);
    let mut codes = Vec::new();
    for volume_id in [id, "fake".to_owned(), String::new()] {
        let refused = [
            csi.wait(snapshots_with_secrets(csi.channel(), volume_id.clone())),
            csi.wait(node_with_secrets(csi.channel(), volume_id.clone())),
            csi.wait(controller_with_secrets(csi.channel(), volume_id)),
        ];
        for status in refused.into_iter().flatten() {
            assert!(!format!("{status:?}").contains(SECRET), "{status:?}");
            codes.push(status.code());
        }
    }
    assert!(codes.contains(&Code::InvalidArgument) && codes.contains(&Code::NotFound), "{codes:?}");
    let mut identity = IdentityClient::new(csi.channel());
    csi.answer(identity.probe(csi::ProbeRequest {})).expect("an answer");
    let log = csi.log();
    assert!(log.contains("TRACE") && log.contains("CreateSnapshot"), "the log says everything");
    assert!(!log.contains(SECRET), "the adapter's log shows a secret");
    assert!(!system.log().contains(SECRET), "the daemon's log shows a secret");
    let pool = std::fs::read(system.pool()).expect("a pool");
    let found = pool.windows(SECRET.len()).any(|window| window == SECRET.as_bytes());
    assert!(!found, "the pool holds a secret");
    assert_eq!(Data::new(&system).pool().volumes, 0);
}
