//! The CSI controller, about volumes: what csi-sanity does not look at. Data of clones, requests
//! that come again, sizes, places, parameters, ids from an enemy.

use std::collections::{BTreeMap, BTreeSet};

use pando_csi::proto::csi::{self, volume_content_source::Type as Source};
use pando_tests::csi::{block, from_volume, mount_of, request};
use pando_tests::data::number;
use pando_tests::noise::Noise;
use pando_tests::{Csi, Data, System};
use tonic::{Code, Status};

const MIB: i64 = 1 << 20;
const SIZE: i64 = 4 * MIB;
/// Clones that are made at once.
const CROWD: usize = 100;

fn start() -> (System, Csi, Data) {
    let system = System::start("512MiB");
    let csi = Csi::start(&system);
    let data = Data::new(&system);
    (system, csi, data)
}

fn clone_of(name: &str, source: &str) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest {
        volume_content_source: from_volume(source),
        capacity_range: None,
        ..request(name, 0, &mount_of("ext4"))
    }
}

fn sized(name: &str, required_bytes: i64, limit_bytes: i64) -> csi::CreateVolumeRequest {
    let range = csi::CapacityRange { required_bytes, limit_bytes };
    csi::CreateVolumeRequest { capacity_range: Some(range), ..request(name, 0, &block()) }
}

fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    let error = result.expect_err("a refusal");
    // CSI wants no details, and what is between adapter and daemon is nobody's business.
    assert!(error.details().is_empty(), "{error:?}");
    assert!(!error.metadata().keys().any(|key| format!("{key:?}").contains("pando")), "{error:?}");
    assert!(!error.message().is_empty());
    error.code()
}

fn source_id(volume: &csi::Volume) -> Option<&str> {
    match volume.content_source.as_ref()?.r#type.as_ref()? {
        Source::Volume(source) => Some(&source.volume_id),
        Source::Snapshot(source) => Some(&source.snapshot_id),
    }
}

#[test]
fn a_clone_has_the_data_and_goes_its_own_way() {
    let (system, csi, data) = start();
    let mut noise = Noise::new(1);
    let mut content = |bytes: i64| noise.bytes(usize::try_from(bytes).expect("small"));
    let source = csi.create(request("source", SIZE, &mount_of("ext4"))).expect("a volume");
    let first = content(SIZE);
    data.write(number(&source.volume_id), 0, &first);
    let clone = csi.create(clone_of("clone", &source.volume_id)).expect("a clone");
    assert_eq!(clone.capacity_bytes, SIZE);
    assert_eq!(source_id(&clone), Some(source.volume_id.as_str()));

    let later = content(MIB);
    data.write(number(&source.volume_id), 0, &later);
    assert_eq!(data.read(number(&clone.volume_id)), first, "the clone sees no later write");
    let own = content(MIB);
    data.write(number(&clone.volume_id), 65_536, &own);
    let mut expected = first.clone();
    expected[65_536..][..own.len()].copy_from_slice(&own);

    let larger = csi::CreateVolumeRequest {
        capacity_range: Some(csi::CapacityRange { required_bytes: 3 * SIZE, limit_bytes: 0 }),
        ..clone_of("clone of the clone", &clone.volume_id)
    };
    let larger = csi.create(larger).expect("a larger clone of a clone");
    assert_eq!(larger.capacity_bytes, 3 * SIZE);
    let grown = data.read(number(&larger.volume_id));
    assert_eq!(grown[..expected.len()], expected);
    assert!(grown[expected.len()..].iter().all(|byte| *byte == 0));
    let mut source_now = first;
    source_now[..later.len()].copy_from_slice(&later);
    assert_eq!(data.read(number(&source.volume_id)), source_now);
    system.check();
}

/// All orders of `items`.
fn orders<T: Copy>(items: &[T]) -> Vec<Vec<T>> {
    if items.is_empty() {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for at in 0..items.len() {
        let mut rest = items.to_vec();
        let first = rest.remove(at);
        for mut order in orders(&rest) {
            order.insert(0, first);
            all.push(order);
        }
    }
    all
}

#[test]
fn any_order_of_deletion_leaves_the_others_whole() {
    let (system, csi, data) = start();
    let content = Noise::new(2).bytes(MIB.try_into().expect("small"));
    for (round, order) in orders(&[0, 1, 2]).into_iter().enumerate() {
        let create = |request| csi.create(request).expect("a volume").volume_id;
        let source = create(request(&format!("source {round}"), MIB, &block()));
        data.write(number(&source), 0, &content);
        let mut name = format!("clone {round}");
        let clone = create(csi::CreateVolumeRequest {
            volume_capabilities: vec![block()],
            ..clone_of(&name, &source)
        });
        name.push_str(" of it");
        let second = create(clone_of(&name, &clone));
        let ids = [source, clone, second];
        let mut left: BTreeSet<usize> = (0..ids.len()).collect();
        for next in order {
            csi.delete(&ids[next]).expect("any order is fine");
            csi.delete(&ids[next]).expect("gone is gone");
            left.remove(&next);
            for other in &left {
                assert_eq!(data.read(number(&ids[*other])), content, "round {round}");
            }
        }
    }
    system.check();
    assert_eq!(data.pool().provisioned_bytes, 0);
}

#[test]
fn a_hundred_clones_at_once() {
    let (system, csi, data) = start();
    let source = csi.create(request("source", SIZE, &mount_of("ext4"))).expect("a volume");
    let content = Noise::new(3).bytes(65_536);
    data.write(number(&source.volume_id), MIB.unsigned_abs(), &content);
    let before = data.pool();
    let calls: Vec<_> = (0..CROWD)
        .map(|index| {
            let mut controller = csi.controller();
            let request = clone_of(&format!("clone-{index}"), &source.volume_id);
            csi.begin(async move { controller.create_volume(request).await })
        })
        .collect();
    let ids: BTreeSet<String> = calls
        .into_iter()
        .map(|call| csi.wait(call).expect("a call ends").expect("a clone").into_inner())
        .map(|answer| answer.volume.expect("an answer has a volume").volume_id)
        .collect();
    assert_eq!(ids.len(), CROWD);
    let spent = before.free_bytes.saturating_sub(data.pool().free_bytes);
    assert!(spent <= 1 << 20, "{CROWD} clones of data take {spent} bytes");
    let expected = data.read(number(&source.volume_id));
    for id in &ids {
        assert_eq!(data.read(number(id)), expected);
    }
    let calls: Vec<_> = ids
        .into_iter()
        .map(|volume_id| {
            let mut controller = csi.controller();
            let request = csi::DeleteVolumeRequest { volume_id, ..Default::default() };
            csi.begin(async move { controller.delete_volume(request).await })
        })
        .collect();
    for call in calls {
        csi.wait(call).expect("a call ends").expect("a deletion");
    }
    system.check();
}

#[test]
fn the_same_request_again_is_the_same_volume() {
    let (_system, csi, _data) = start();
    let source = csi.create(request("source", SIZE, &mount_of("ext4"))).expect("a volume");
    assert_eq!(csi.create(request("source", SIZE, &mount_of("ext4"))).expect("again"), source);
    let asked = csi::CreateVolumeRequest {
        parameters: BTreeMap::from([("growthLimit".to_owned(), "1Gi".to_owned())]),
        ..clone_of("clone", &source.volume_id)
    };
    let clone = csi.create(asked.clone()).expect("a clone");
    csi.delete(&source.volume_id).expect("a deletion");
    // The source is gone, and the clone was made all the same.
    assert_eq!(csi.create(asked.clone()).expect("again"), clone);

    let changed: [csi::CreateVolumeRequest; 6] = [
        csi::CreateVolumeRequest { volume_content_source: None, ..asked.clone() },
        csi::CreateVolumeRequest {
            volume_content_source: from_volume(&clone.volume_id),
            ..asked.clone()
        },
        csi::CreateVolumeRequest {
            capacity_range: Some(csi::CapacityRange { required_bytes: 2 * SIZE, limit_bytes: 0 }),
            ..asked.clone()
        },
        csi::CreateVolumeRequest { volume_capabilities: vec![block()], ..asked.clone() },
        csi::CreateVolumeRequest { volume_capabilities: vec![mount_of("xfs")], ..asked.clone() },
        csi::CreateVolumeRequest { parameters: BTreeMap::new(), ..asked },
    ];
    for request in changed {
        assert_eq!(code(csi.create(request.clone())), Code::AlreadyExists, "{request:?}");
    }
}

#[test]
fn requests_at_once_for_one_name_make_one_volume() {
    let (_system, csi, data) = start();
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let mut controller = csi.controller();
            let request = request("one", SIZE, &block());
            csi.begin(async move { controller.create_volume(request).await })
        })
        .collect();
    let mut ids = BTreeSet::new();
    for call in calls {
        match csi.wait(call).expect("a call ends") {
            Ok(answer) => {
                ids.insert(answer.into_inner().volume.expect("a volume").volume_id);
            }
            Err(error) => assert_eq!(error.code(), Code::Aborted, "{error}"),
        }
    }
    assert_eq!(ids.len(), 1);
    assert_eq!(data.pool().volumes, 1);
}

#[test]
fn sizes_are_exact_or_refused() {
    let (_system, csi, _data) = start();
    for bytes in [4096, 4608, MIB, 1_000_000_000] {
        let made = csi.create(sized(&format!("of {bytes}"), bytes, bytes)).expect("a volume");
        assert_eq!(made.capacity_bytes, bytes);
    }
    let rounded = csi.create(sized("rounded", 5000, 0)).expect("a volume");
    assert_eq!(rounded.capacity_bytes, 5120);
    let default = csi::CreateVolumeRequest { capacity_range: None, ..sized("default", 0, 0) };
    assert_eq!(csi.create(default).expect("a volume").capacity_bytes, 1 << 30);
    for (required, limit) in [(2 * MIB, MIB), (5000, 5001), ((64 << 40) + 1, 0), (0, 4095)] {
        assert_eq!(code(csi.create(sized("never", required, limit))), Code::OutOfRange);
    }
    let source = csi.create(sized("source", SIZE, 0)).expect("a volume").volume_id;
    let from = |required, limit| csi::CreateVolumeRequest {
        volume_content_source: from_volume(&source),
        ..sized("clone", required, limit)
    };
    assert_eq!(code(csi.create(from(MIB, 0))), Code::OutOfRange, "smaller than its source");
    assert_eq!(code(csi.create(from(0, MIB))), Code::OutOfRange, "limited below its source");
    assert_eq!(csi.create(from(0, SIZE)).expect("a clone").capacity_bytes, SIZE);
}

fn place(segments: &[(&str, &str)]) -> csi::Topology {
    let segments = segments.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    csi::Topology { segments: segments.collect() }
}

#[test]
fn volumes_are_on_their_node() {
    let (_system, csi, _data) = start();
    let here = place(&[("csi.pando.dev/node", "node-1")]);
    let there = place(&[("csi.pando.dev/node", "node-2")]);
    let at = |name: &str, requisite: &[csi::Topology]| csi::CreateVolumeRequest {
        accessibility_requirements: Some(csi::TopologyRequirement {
            requisite: requisite.to_vec(),
            preferred: requisite.to_vec(),
        }),
        ..request(name, SIZE, &block())
    };
    let made = csi.create(at("here", &[there.clone(), here.clone()])).expect("a volume");
    assert_eq!(made.accessible_topology, [here]);
    assert_eq!(code(csi.create(at("elsewhere", &[there]))), Code::ResourceExhausted);

    // A clone of a volume of another node: the scheduler is to choose again.
    let other_system = System::start("256MiB");
    let other = Csi::on(&other_system, "node-2", &[]);
    let foreign = other.create(request("far", SIZE, &block())).expect("a volume").volume_id;
    assert_eq!(code(csi.create(clone_of("clone", &foreign))), Code::ResourceExhausted);
    let nowhere = code(csi.create(clone_of("clone", "node-1.nothing.1")));
    assert_eq!(nowhere, Code::NotFound);
}

/// OK to a deletion, or NOT_FOUND to anything else, would make the caller forget an object that is
/// still there.
#[test]
fn a_call_that_went_to_the_wrong_node_decides_nothing() {
    let (_system, csi, _data) = start();
    let other_system = System::start("256MiB");
    let other = Csi::on(&other_system, "node-2", &[]);
    let volume_id = other.create(request("far", SIZE, &block())).expect("a volume").volume_id;
    let refused = csi.delete(&volume_id).expect_err("it is another node's");
    assert!(refused.message().contains("is on another node than node-1"), "{refused}");
    assert_eq!(code::<()>(Err(refused)), Code::FailedPrecondition);
    let capacity_range = Some(csi::CapacityRange { required_bytes: SIZE, limit_bytes: 0 });
    let mut controller = csi.controller();
    let get = csi::ControllerGetVolumeRequest { volume_id: volume_id.clone() };
    assert_eq!(code(csi.answer(controller.controller_get_volume(get))), Code::FailedPrecondition);
    let expand = csi::ControllerExpandVolumeRequest {
        volume_id: volume_id.clone(),
        capacity_range,
        ..Default::default()
    };
    let expanded = csi.answer(controller.controller_expand_volume(expand));
    assert_eq!(code(expanded), Code::FailedPrecondition);
    let modify =
        csi::ControllerModifyVolumeRequest { volume_id: volume_id.clone(), ..Default::default() };
    let modified = csi.answer(controller.controller_modify_volume(modify));
    assert_eq!(code(modified), Code::FailedPrecondition);
    let validate = csi::ValidateVolumeCapabilitiesRequest {
        volume_id: volume_id.clone(),
        volume_capabilities: vec![block()],
        ..Default::default()
    };
    let validated = csi.answer(controller.validate_volume_capabilities(validate));
    assert_eq!(code(validated), Code::FailedPrecondition);
    other.delete(&volume_id).expect("it is still there, on its own node");

    // A pool of this node that was replaced by another one is gone, and so is what was in it.
    let (_, rest) = volume_id.split_once('.').expect("an id has dots");
    let replaced = format!("node-1.{rest}");
    csi.delete(&replaced).expect("gone is gone");
    assert_eq!(code(csi.create(clone_of("clone", &replaced))), Code::NotFound);
}

#[test]
fn what_is_in_use_is_not_deleted() {
    let (system, csi, data) = start();
    let made = csi.create(request("used", SIZE, &block())).expect("a volume");
    system.cli().serve("csi-vol-used");
    assert_eq!(code(csi.delete(&made.volume_id)), Code::FailedPrecondition);
    let clone = csi.create(clone_of("clone", &made.volume_id)).expect("a clone of what is in use");
    csi.delete(&clone.volume_id).expect("a deletion");
    system.cli().run(&["volume", "serve", "csi-vol-used", "--stop"]);
    csi.delete(&made.volume_id).expect("a deletion");
    assert_eq!(data.pool().volumes, 0);
}

#[test]
fn limits_are_set_and_changed() {
    let (_system, csi, data) = start();
    let parameters = [
        ("growthLimit", "8Mi"),
        ("reservation", "1Mi"),
        ("iopsLimit", "100"),
        ("bandwidthLimit", "10M"),
    ];
    let text = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
    let asked = csi::CreateVolumeRequest {
        parameters: parameters.into_iter().map(text).collect(),
        mutable_parameters: BTreeMap::from([text(("iopsLimit", "200"))]),
        ..request("limited", SIZE, &block())
    };
    let id = csi.create(asked.clone()).expect("a volume").volume_id;
    let limits = |id: &str| {
        let volume = data.volume(number(id));
        (
            volume.growth_limit_bytes,
            volume.reservation_bytes,
            volume.iops_limit,
            volume.bandwidth_limit_bytes,
        )
    };
    assert_eq!(limits(&id), (8 << 20, 1 << 20, 200, 10_000_000));
    let modify = |id: &str, pairs: &[(&str, &str)]| {
        let request = csi::ControllerModifyVolumeRequest {
            volume_id: id.to_owned(),
            mutable_parameters: pairs.iter().copied().map(text).collect(),
            ..Default::default()
        };
        csi.answer(csi.controller().controller_modify_volume(request))
    };
    modify(&id, &[("growthLimit", "0"), ("iopsLimit", "300")]).expect("a change");
    assert_eq!(limits(&id), (0, 1 << 20, 300, 10_000_000), "what is not named stays");
    assert_eq!(
        code(modify(&id, &[("growthLimit", "1Mi"), ("fsType", "xfs")])),
        Code::InvalidArgument
    );
    assert_eq!(code(modify(&id, &[("reservation", "1Ti")])), Code::ResourceExhausted);
    assert_eq!(limits(&id).0, 0, "a refused change changes nothing");
    assert_eq!(code(modify("fake", &[("iopsLimit", "1")])), Code::NotFound);
    csi.create(asked).expect("the request that made it still finds it");
}

#[test]
fn lists_go_page_by_page_and_show_only_what_csi_made() {
    let (system, csi, _data) = start();
    system.cli().run(&["volume", "create", "mine", "--size", "1MiB"]);
    let mut made: BTreeMap<String, csi::Volume> = BTreeMap::new();
    let source = csi.create(request("\u{e4} name", SIZE, &block())).expect("a volume");
    for name in ["a", "b", "c", "d"] {
        let clone = csi.create(clone_of(name, &source.volume_id)).expect("a clone");
        made.insert(clone.volume_id.clone(), clone);
    }
    made.insert(source.volume_id.clone(), source);
    let list = |max_entries, starting_token: &str| {
        let starting_token = starting_token.to_owned();
        let request = csi::ListVolumesRequest { max_entries, starting_token };
        csi.answer(csi.controller().list_volumes(request))
    };
    let all = list(0, "").expect("a list");
    assert_eq!((all.entries.len(), all.next_token.as_str()), (5, ""));
    let mut found = BTreeMap::new();
    let mut token = String::new();
    loop {
        let page = list(2, &token).expect("a page");
        assert!(page.entries.len() <= 2);
        let volumes = page.entries.into_iter().map(|entry| entry.volume.expect("a volume"));
        found.extend(volumes.map(|volume| (volume.volume_id.clone(), volume)));
        token = page.next_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(found, made, "each is listed as it was answered when it was made");
    assert_eq!(code(list(0, "no token")), Code::Aborted);
    assert_eq!(code(list(-1, "")), Code::InvalidArgument);
    for (id, volume) in made {
        let request = csi::ControllerGetVolumeRequest { volume_id: id };
        let answer = csi.answer(csi.controller().controller_get_volume(request)).expect("a volume");
        assert_eq!(answer.volume, Some(volume));
    }
}

#[test]
fn volumes_grow_and_never_shrink() {
    let (_system, csi, data) = start();
    let id = csi.create(request("one", SIZE, &block())).expect("a volume").volume_id;
    let expand = |id: &str, required_bytes, limit_bytes| {
        let request = csi::ControllerExpandVolumeRequest {
            volume_id: id.to_owned(),
            capacity_range: Some(csi::CapacityRange { required_bytes, limit_bytes }),
            ..Default::default()
        };
        csi.answer(csi.controller().controller_expand_volume(request))
    };
    assert_eq!(expand(&id, 2 * SIZE, 0).expect("growth").capacity_bytes, 2 * SIZE);
    assert_eq!(data.volume(number(&id)).size_bytes, (2 * SIZE).unsigned_abs());
    assert_eq!(expand(&id, SIZE, 0).expect("large enough").capacity_bytes, 2 * SIZE);
    assert_eq!(code(expand(&id, 0, SIZE)), Code::OutOfRange);
    assert_eq!(code(expand(&id, i64::MAX, 0)), Code::OutOfRange);
    assert_eq!(code(expand("fake", SIZE, 0)), Code::NotFound);
    assert_eq!(data.volume(number(&id)).size_bytes, (2 * SIZE).unsigned_abs());
}

/// Ids that name nothing, whatever they look like.
fn hostile(id: &str) -> Vec<String> {
    let (rest, number) = id.rsplit_once('.').expect("an id has dots");
    vec![
        "../../../etc/passwd".to_owned(),
        "/dev/sda".to_owned(),
        "csi-vol-one".to_owned(),
        "one".to_owned(),
        "-o".to_owned(),
        "$(reboot)".to_owned(),
        "\u{0}".to_owned(),
        "\u{1f600}".to_owned(),
        "x".repeat(128),
        number.to_owned(),
        format!("{rest}."),
        format!("{rest}.-1"),
        format!("{rest}.+{number}"),
        format!("{rest}.0{number}"),
        format!("{rest}.{number} "),
        format!("{rest}.{number}/.."),
        format!("{rest}.99999"),
        format!("{rest}.18446744073709551615"),
        format!("{rest}.g{number}"),
    ]
}

#[test]
fn hostile_ids_name_nothing() {
    let (_system, csi, data) = start();
    let id = csi.create(request("one", SIZE, &block())).expect("a volume").volume_id;
    for fake in hostile(&id) {
        csi.delete(&fake).expect("nothing is there to be deleted");
        let mut controller = csi.controller();
        let get = csi::ControllerGetVolumeRequest { volume_id: fake.clone() };
        assert_eq!(
            code(csi.answer(controller.controller_get_volume(get))),
            Code::NotFound,
            "{fake:?}"
        );
        assert_eq!(code(csi.create(clone_of("clone", &fake))), Code::NotFound, "{fake:?}");
        let snapshot = csi::CreateSnapshotRequest {
            source_volume_id: fake.clone(),
            name: "snapshot".to_owned(),
            ..Default::default()
        };
        assert_eq!(
            code(csi.answer(controller.create_snapshot(snapshot))),
            Code::NotFound,
            "{fake:?}"
        );
    }
    assert_eq!(code(csi.delete(&"x".repeat(129))), Code::InvalidArgument);
    assert_eq!(data.volume(number(&id)).name, "csi-vol-one", "it is still there");
    // Names are texts, not paths and not options.
    for name in ["../x", "-rf", "a/b", "a b", ".", "\u{e4}", "%2e%2e", &"n".repeat(128)] {
        let made = csi.create(request(name, SIZE, &block())).expect(name);
        csi.delete(&made.volume_id).expect("a deletion");
    }
    for name in ["", "a\nb", "\u{7f}", &"n".repeat(129)] {
        assert_eq!(
            code(csi.create(request(name, SIZE, &block()))),
            Code::InvalidArgument,
            "{name:?}"
        );
    }
}
