//! What can never be staged is refused when it is made: kubelet would try to stage it for ever, and
//! the author of a claim looks at the claim. One line says what would do.

use std::collections::BTreeMap;

use pando_csi::proto::csi;
use pando_csi::proto::csi::group_controller_client::GroupControllerClient;
use pando_csi::proto::csi::volume_capability::access_mode::Mode;
use pando_tests::csi::{
    Mounted, block, can_mount, from_snapshot, from_volume, mount_of, mount_with, request,
};
use pando_tests::data::number;
use pando_tests::tools::present;
use pando_tests::{Csi, Data, System};
use tonic::{Code, Status};

const KIB: i64 = 1 << 10;
const MIB: i64 = 1 << 20;
/// The smallest volume of each file system.
const SMALLEST: [(&str, i64); 3] = [("ext4", 256 * KIB), ("xfs", 300 * MIB), ("btrfs", 256 * MIB)];

fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, words: &[&str]) {
    let error = result.expect_err("a refusal");
    assert_eq!(error.code(), code, "{error}");
    let message = error.message();
    assert!(words.iter().all(|word| message.contains(word)), "{message:?}: {words:?}");
    assert!(message.lines().count() == 1 && message.len() < 300, "{message:?}");
}

fn flags(fs_type: &str, flags: &[&str]) -> csi::VolumeCapability {
    mount_with(fs_type, flags, Mode::SingleNodeWriter)
}

fn class(pairs: &[(&str, &str)], wanted: csi::CreateVolumeRequest) -> csi::CreateVolumeRequest {
    let parameters = pairs.iter().map(|(key, value)| (key.to_string(), value.to_string()));
    csi::CreateVolumeRequest { parameters: parameters.collect(), ..wanted }
}

#[test]
fn a_volume_without_room_for_its_file_system_is_refused() {
    let system = System::start("512MiB");
    let (csi, data) = (Csi::start(&system), Data::new(&system));
    for (kind, least) in SMALLEST {
        let words = [kind, &least.to_string()];
        for bytes in [least - 512, 4096] {
            let wanted = request("small", bytes, &mount_of(kind));
            refused(csi.create(wanted), Code::OutOfRange, &words);
            let by_class = class(&[("fsType", kind)], request("small", bytes, &mount_of("")));
            refused(csi.create(by_class), Code::OutOfRange, &words);
        }
        let range = csi::CapacityRange { required_bytes: 0, limit_bytes: least - 1 };
        let limited = csi::CreateVolumeRequest {
            capacity_range: Some(range),
            ..request("small", 0, &mount_of(kind))
        };
        refused(csi.create(limited), Code::OutOfRange, &words);
        // A raw device has no file system.
        csi.create(request(&format!("raw of {least}"), least - 512, &block())).expect("a volume");
    }
    assert_eq!(data.pool().volumes, 3);
    let too_large = request("large", 1 << 47, &block());
    let words = ["140737488355328 bytes or more: ", "4096 to 70368744177664 bytes"];
    refused(csi.create(too_large), Code::OutOfRange, &words);
}

#[test]
fn the_smallest_volume_of_each_file_system_is_of_use() {
    if !can_mount() || !present(&["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"]) {
        return;
    }
    let system = System::start("1GiB");
    let csi = Csi::start(&system);
    for (kind, bytes) in SMALLEST {
        let made = csi.create(request(kind, bytes, &mount_of(kind))).expect("a volume");
        assert_eq!(made.capacity_bytes, bytes);
        let pod = Mounted::up(&csi, &made.volume_id, kind, &mount_of(kind));
        std::fs::write(pod.target.join("file"), vec![7; 64 << 10]).expect("a file");
        pod.down();
        csi.delete(&made.volume_id).expect("a deletion");
    }
    system.check();
}

#[test]
fn mount_options_are_those_that_the_node_takes() {
    let system = System::start("512MiB");
    let (csi, data) = (Csi::start(&system), Data::new(&system));
    let cases: [(&str, &[&str], &str); 6] = [
        ("ext4", &["noatime", "no_such_option"], "no_such_option"),
        ("ext4", &["allocsize=64k"], "allocsize"),
        ("xfs", &["data=ordered"], "data=ordered"),
        ("btrfs", &["subvol=other"], "subvol"),
        ("", &["compress=zstd"], "compress"),
        ("xfs", &["logdev=/dev/sda"], "logdev"),
    ];
    for (kind, options, word) in cases {
        let wanted = request("odd", 512 * MIB, &flags(kind, options));
        refused(csi.create(wanted), Code::InvalidArgument, &[word]);
    }
    let by_class = request("odd", 512 * MIB, &flags("", &["data=ordered"]));
    let by_class = class(&[("fsType", "xfs")], by_class);
    refused(csi.create(by_class), Code::InvalidArgument, &["data=ordered", "xfs"]);
    assert_eq!(data.pool().volumes, 0);
    csi.create(request("good", 512 * MIB, &flags("xfs", &["noatime", "allocsize=64k"])))
        .expect("a volume");
}

/// Snapshots of a volume: one alone, and one in a group.
fn snapshots(csi: &Csi, volume: &str) -> [String; 2] {
    let alone = csi::CreateSnapshotRequest {
        source_volume_id: volume.to_owned(),
        name: "alone".to_owned(),
        ..Default::default()
    };
    let alone = csi.answer(csi.controller().create_snapshot(alone)).expect("a snapshot").snapshot;
    let group = csi::CreateVolumeGroupSnapshotRequest {
        source_volume_ids: vec![volume.to_owned()],
        name: "group".to_owned(),
        ..Default::default()
    };
    let mut groups = GroupControllerClient::new(csi.channel());
    let group = csi.answer(groups.create_volume_group_snapshot(group)).expect("a group");
    let member = group.group_snapshot.expect("a group").snapshots.remove(0);
    [alone.expect("a snapshot").snapshot_id, member.snapshot_id]
}

#[test]
fn a_copy_has_the_file_system_of_its_source() {
    let system = System::start("512MiB");
    let (csi, data) = (Csi::start(&system), Data::new(&system));
    let kind = |volume: &csi::Volume| {
        let labels = data.volume(number(&volume.volume_id)).labels;
        labels.get("csi.pando.dev/fs-type").cloned().unwrap_or_default()
    };
    let wanted = class(&[("fsType", "xfs")], request("source", 512 * MIB, &mount_of("")));
    let source = csi.create(wanted).expect("a volume");
    let mut sources = vec![from_volume(&source.volume_id)];
    sources.extend(snapshots(&csi, &source.volume_id).map(|id| from_snapshot(&id)));
    let copy = |name: &str, content: &Option<csi::VolumeContentSource>, capability| {
        csi::CreateVolumeRequest {
            volume_content_source: content.clone(),
            ..request(name, 512 * MIB, &capability)
        }
    };
    for (index, content) in sources.iter().enumerate() {
        // With a --default-fstype of the provisioner this is what a class that names none asks for.
        let words = ["ext4", "holds xfs", "use a class with fsType xfs"];
        let other = copy("other", content, mount_of("ext4"));
        refused(csi.create(other), Code::InvalidArgument, &words);
        let by_class = class(&[("fsType", "btrfs")], copy("other", content, mount_of("")));
        refused(csi.create(by_class), Code::InvalidArgument, &["btrfs", "holds xfs"]);
        let options = copy("other", content, flags("", &["data=ordered"]));
        refused(csi.create(options), Code::InvalidArgument, &["data=ordered", "xfs"]);

        let named = csi.create(copy(&format!("named {index}"), content, mount_of("xfs")));
        assert_eq!(kind(&named.expect("a copy")), "xfs");
        let name = format!("open {index}");
        let open = csi.create(copy(&name, content, mount_of(""))).expect("a copy");
        assert_eq!(kind(&open), "xfs");
        let again = csi.create(copy(&name, content, mount_of("xfs")));
        assert_eq!(again.expect("the same"), open);
        refused(csi.create(copy(&name, content, mount_of("ext4"))), Code::AlreadyExists, &[]);
        let second = from_volume(&open.volume_id);
        let second = csi.create(copy("of a copy", &second, mount_of("ext4")));
        refused(second, Code::InvalidArgument, &["holds xfs"]);
    }
    // What a raw volume holds is not recorded: it is seen when it is staged.
    let raw = csi.create(request("raw", 512 * MIB, &block())).expect("a volume").volume_id;
    csi.create(copy("of raw", &from_volume(&raw), mount_of("xfs"))).expect("a copy");
    let open = csi.create(copy("of raw, any", &from_volume(&raw), mount_of(""))).expect("a copy");
    assert_eq!(kind(&open), "");
}

/// Why a capability is not confirmed; none if it is.
fn validate(
    csi: &Csi,
    volume_id: &str,
    capability: csi::VolumeCapability,
    parameters: &[(&str, &str)],
) -> Option<String> {
    let parameters = parameters.iter().map(|(key, value)| (key.to_string(), value.to_string()));
    let request = csi::ValidateVolumeCapabilitiesRequest {
        volume_id: volume_id.to_owned(),
        volume_capabilities: vec![capability],
        parameters: parameters.collect::<BTreeMap<_, _>>(),
        ..Default::default()
    };
    let answer = csi.answer(csi.controller().validate_volume_capabilities(request));
    let answer = answer.expect("an answer");
    assert_eq!(answer.confirmed.is_some(), answer.message.is_empty(), "{answer:?}");
    answer.confirmed.is_none().then_some(answer.message)
}

#[test]
fn only_what_can_be_staged_is_confirmed() {
    let system = System::start("512MiB");
    let csi = Csi::start(&system);
    let create = |name, bytes, capability| {
        csi.create(request(name, bytes, &capability)).expect("a volume").volume_id
    };
    let xfs = create("xfs", 512 * MIB, mount_of("xfs"));
    let raw = create("raw", 100 * MIB, block());
    for capability in [mount_of("xfs"), mount_of(""), flags("xfs", &["noatime"]), block()] {
        assert_eq!(validate(&csi, &xfs, capability, &[]), None);
    }
    assert_eq!(validate(&csi, &raw, block(), &[]), None);
    let refusal = |id, capability, parameters: &[(&str, &str)], words: &[&str]| {
        let message = validate(&csi, id, capability, parameters).expect("a refusal");
        assert!(words.iter().all(|word| message.contains(word)), "{message}: {words:?}");
    };
    refusal(&xfs, mount_of("ext4"), &[], &["xfs", "not ext4"]);
    refusal(&xfs, mount_of(""), &[("fsType", "btrfs")], &["xfs", "not btrfs"]);
    refusal(&xfs, flags("", &["data=ordered"]), &[], &["data=ordered"]);
    refusal(&xfs, mount_of("ntfs"), &[], &["ntfs"]);
    refusal(&xfs, mount_of("xfs"), &[("fsType", "ext4")], &["asks for xfs"]);
    refusal(&raw, mount_of("xfs"), &[], &["xfs does not fit", "314572800"]);
}
