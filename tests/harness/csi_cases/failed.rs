//! What a failed call leaves on the node: nothing. kubelet takes most errors of NodeStageVolume for
//! final and never unstages after them, so no case here does.

use std::path::{Path, PathBuf};

use pando_csi::proto::csi::VolumeCapability;
use pando_csi::proto::csi::volume_capability::access_mode::Mode;
use tonic::{Code, Status};

use super::Device;
use super::node::{SIZE, code, create, label, pool_name, start, write_unknown};
use crate::csi::{Mounted, block, from_volume, mount_of, mount_with, mounted_below, request_of};
use crate::tools::{run, text};
use crate::{Csi, System};

const MIB: i64 = 1 << 20;
const XFS_SIZE: i64 = 320 * MIB;

/// Stages a volume, which must fail and leave nothing; the volume can be deleted then.
fn fails(
    system: &System,
    csi: &Csi,
    (id, name): (&str, &str),
    capability: &VolumeCapability,
) -> Status {
    let places = Mounted::places(csi, id, name);
    let refused = csi.stage(id, &places.staging, capability).expect_err("it cannot be staged");
    assert_nothing_left(system, name);
    csi.delete(id).unwrap_or_else(|why| panic!("{name} after {refused}: {why}"));
    refused
}

fn assert_nothing_left(system: &System, name: &str) {
    let attached = system.cli().json(&["volume", "attachments"]);
    assert_eq!(attached.as_array().map(Vec::len), Some(0), "{name}: {attached}");
    assert_eq!(mounted_below(system.path()), Vec::<PathBuf>::new(), "{name}");
}

/// A NodeStageVolume that fails undoes what it did.
///
/// # Panics
/// Anything is not as it should be.
pub fn a_failed_stage_leaves_nothing(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    let cli = system.cli();
    let ext4 = mount_of("ext4");

    let id = create(&csi, device, "option");
    let unknown = mount_with("ext4", &["no-such-option"], Mode::SingleNodeWriter);
    assert_eq!(fails(&system, &csi, (&id, "option"), &unknown).code(), Code::InvalidArgument);

    // An option that only the kernel refuses, after the volume was formatted.
    let id = create(&csi, device, "value");
    let wrong = mount_with("ext4", &["data=no-such-mode"], Mode::SingleNodeWriter);
    fails(&system, &csi, (&id, "value"), &wrong);

    let id = create(&csi, device, "mkfs");
    label(&cli, "mkfs", "csi.pando.dev/mkfs-options=--no-such-option");
    let refused = fails(&system, &csi, (&id, "mkfs"), &ext4);
    assert!(refused.message().contains("mkfsOptions"), "{refused}");
    assert!(!refused.message().to_lowercase().contains("usage"), "{refused}");

    let id = create(&csi, device, "data");
    write_unknown(&cli, "data");
    let refused = fails(&system, &csi, (&id, "data"), &ext4);
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");

    // What a clone holds is not what its pod asks for.
    let wanted = request_of(device.name(), "xfs", XFS_SIZE, &mount_of("xfs"));
    let source = csi.create(wanted).expect("a volume").volume_id;
    Mounted::up(&csi, &source, "xfs", &mount_of("xfs")).down();
    let clone = clone_of(&csi, device, (&source, "clone"), XFS_SIZE, &mount_of("xfs"));
    let refused = fails(&system, &csi, (&clone, "clone"), &ext4);
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");

    // No space to format it, to mount it, or to grow its file system.
    let id = create(&csi, device, "none");
    cli.run(&["volume", "set", &pool_name("none"), "--growth-limit", "64KiB"]);
    fails(&system, &csi, (&id, "none"), &ext4);
    for limit in ["4KiB", "64KiB", "256KiB"] {
        let clone = clone_of(&csi, device, (&source, "larger"), 64 * XFS_SIZE, &mount_of("xfs"));
        cli.run(&["volume", "set", &pool_name("larger"), "--growth-limit", limit]);
        fails(&system, &csi, (&clone, "larger"), &mount_of("xfs"));
    }
    csi.delete(&source).expect("it is not in use");
    system.check();
}

fn clone_of(
    csi: &Csi,
    device: Device,
    (source, name): (&str, &str),
    bytes: i64,
    capability: &VolumeCapability,
) -> String {
    let mut wanted = request_of(device.name(), name, bytes, capability);
    wanted.volume_content_source = from_volume(source);
    csi.create(wanted).expect("a clone").volume_id
}

/// A call that fails undoes nothing that an earlier call did.
///
/// # Panics
/// Anything is not as it should be.
pub fn what_others_did_stays(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    let cli = system.cli();
    let unknown = mount_with("ext4", &["no-such-option"], Mode::SingleNodeWriter);
    // Attached by a person.
    let id = create(&csi, device, "there");
    cli.run(&["volume", "attach", &pool_name("there"), "--kind", device.name()]);
    let places = Mounted::places(&csi, &id, "there");
    assert_eq!(code(csi.stage(&id, &places.staging, &unknown)), Code::InvalidArgument);
    let attached = cli.json(&["volume", "attachments"]);
    assert_eq!(attached.as_array().map(Vec::len), Some(1), "{attached}");

    // Staged and published before.
    let mounted = Mounted::up(&csi, &id, "there", &mount_of("ext4"));
    assert_eq!(code(csi.stage(&id, &mounted.staging, &unknown)), Code::InvalidArgument);
    assert_eq!(code(csi.stage(&id, &mounted.staging, &mount_of("xfs"))), Code::AlreadyExists);
    std::fs::write(mounted.target.join("file"), "content").expect("still mounted");
    mounted.publish(&mount_of("ext4")).expect("still staged");
    mounted.down();
    csi.delete(&id).expect("it is not in use");
    assert_nothing_left(&system, "there");
}

/// A volume has one staging path: a second one is refused, and the first goes on.
///
/// # Panics
/// Anything is not as it should be.
pub fn a_second_staging_path_is_refused(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    let capability = mount_of("ext4");
    let id = create(&csi, device, "one");
    let second = Mounted::places(&csi, &id, "second").staging;
    let mounted = Mounted::up(&csi, &id, "one", &capability);
    let refused = csi.stage(&id, &second, &capability).expect_err("it is staged");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains(text(&mounted.staging)), "{refused}");
    csi.stage(&id, &mounted.staging, &capability).expect("the first is as it was");
    // It was never staged there, so nothing is to be done, and nothing is.
    csi.unstage(&id, &second).expect("it is not staged there");
    std::fs::write(mounted.target.join("file"), "content").expect("still mounted");
    assert_eq!(code(csi.unstage(&id, &mounted.staging)), Code::FailedPrecondition, "published");
    csi.unpublish(&id, &mounted.target).expect("the volume is unpublished");

    // The first was unmounted by hand: the second takes its place.
    run("umount", &[text(&mounted.staging)]);
    csi.stage(&id, &second, &capability).expect("it is staged nowhere else");
    csi.unstage(&id, &mounted.staging).expect("it is not staged there any more");
    csi.publish(&id, (&second, &mounted.target), &capability, false).expect("it is staged");
    assert_eq!(std::fs::read(mounted.target.join("file")).expect("a file"), b"content");
    csi.unpublish(&id, &mounted.target).expect("the volume is unpublished");
    csi.unstage(&id, &second).expect("the volume is unstaged");
    assert_nothing_left(&system, "one");
    csi.delete(&id).expect("it is not in use");
    two_mounts_end(&system, &csi, device);
}

/// An older adapter staged a volume twice. Once one of the mounts was unmounted by hand, both can be
/// unstaged.
fn two_mounts_end(system: &System, csi: &Csi, device: Device) {
    let capability = mount_of("ext4");
    for by_hand in [0, 1] {
        let id = create(csi, device, "two");
        let places = ["two", "other"].map(|name| Mounted::places(csi, &id, name).staging);
        csi.stage(&id, &places[0], &capability).expect("the volume is staged");
        let staged: [&Path; 2] = [&places[0], &places[1]];
        run("mount", &["--bind", text(staged[0]), text(staged[1])]);
        for path in staged {
            assert_eq!(code(csi.unstage(&id, path)), Code::FailedPrecondition, "which is it?");
        }
        run("umount", &[text(staged[by_hand])]);
        csi.unstage(&id, staged[by_hand]).expect("nothing is there");
        csi.unstage(&id, staged[1 - by_hand]).expect("the volume is unstaged");
        assert_nothing_left(system, "two");
        csi.delete(&id).expect("it is not in use");
    }
}

/// A raw device that cannot be published leaves no target, and one that cannot be staged no device.
///
/// # Panics
/// Anything is not as it should be.
pub fn raw_devices_leave_nothing_either(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    let wanted = request_of(device.name(), "raw", SIZE, &block());
    let id = csi.create(wanted).expect("a volume").volume_id;
    let places = Mounted::places(&csi, &id, "raw");
    assert_eq!(code(places.publish(&block())), Code::FailedPrecondition, "not staged");
    assert!(!places.target.exists());
    label(&system.cli(), "raw", "csi.pando.dev/device-kind=no-such-kind");
    assert_eq!(code(csi.stage(&id, &places.staging, &block())), Code::FailedPrecondition);
    assert_nothing_left(&system, "raw");
    csi.delete(&id).expect("it is not in use");
}

/// The adapter was killed while a volume was unmounted to be grown: kubelet, for which it is staged,
/// asks to grow it or to publish it, and both stage it again.
///
/// # Panics
/// Anything is not as it should be.
pub fn an_interrupted_growth_is_taken_up(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    let cli = system.cli();
    let capability = mount_of("ext4");
    let id = create(&csi, device, "grow");
    let places = Mounted::places(&csi, &id, "grow");
    let interrupted = || {
        csi.stage(&id, &places.staging, &capability).expect("the volume is staged");
        label(&cli, "grow", "csi.pando.dev/restaging=true");
        run("umount", &[text(&places.staging)]);
        cli.run(&["volume", "detach", &pool_name("grow")]);
    };
    interrupted();
    let grown = places.expand(&places.staging, 2 * SIZE, &capability);
    assert_eq!(grown.expect("it is staged again"), 2 * SIZE);
    csi.unstage(&id, &places.staging).expect("the volume is unstaged");

    interrupted();
    places.publish(&capability).expect("it is staged again");
    let labels = cli.json(&["volume", "show", &pool_name("grow")])["labels"].to_string();
    assert!(!labels.contains("restaging"), "{labels}");
    csi.unpublish(&id, &places.target).expect("the volume is unpublished");
    csi.unstage(&id, &places.staging).expect("the volume is unstaged");

    interrupted();
    csi.unstage(&id, &places.staging).expect("nothing is there");
    assert_eq!(code(places.publish(&capability)), Code::FailedPrecondition, "not staged");
    assert_nothing_left(&system, "grow");
    csi.delete(&id).expect("it is not in use");
}
