//! The service Node with volumes that are loop devices: the cases of
//! `tests/harness/csi_cases/`, and some more.

use std::fs::File;
use std::path::Path;

use pando_tests::csi::{Mounted, block, can_mount, request};
use pando_tests::csi_cases::Device;
use pando_tests::csi_cases::{blank, failed, node};
use pando_tests::tools::{output, present, run, text};
use pando_tests::{Csi, System};
use tonic::Code;

const MIB: i64 = 1 << 20;
const EXT4: (&str, i64) = ("ext4", 64 * MIB);
const XFS: (&str, i64) = ("xfs", 320 * MIB);

#[test]
fn raw_devices_are_published_and_grow() {
    node::raw_devices_are_published_and_grow(Device::Loop);
}

#[test]
fn each_call_can_be_repeated() {
    node::each_call_can_be_repeated(Device::Loop);
}

#[test]
fn read_only_and_single_writer_are_kept() {
    node::read_only_and_single_writer_are_kept(Device::Loop);
}

#[test]
fn stats_are_of_the_volume_and_of_no_other_path() {
    node::stats_are_of_the_volume_and_of_no_other_path(Device::Loop);
}

#[test]
fn hostile_paths_lead_nowhere() {
    node::hostile_paths_lead_nowhere(Device::Loop);
}

#[test]
fn flags_are_applied_or_refused() {
    node::flags_are_applied_or_refused(Device::Loop);
}

#[test]
fn nothing_is_formatted_that_may_hold_something() {
    node::nothing_is_formatted_that_may_hold_something(Device::Loop);
}

#[test]
fn a_failed_stage_leaves_nothing() {
    failed::a_failed_stage_leaves_nothing(Device::Loop);
}

#[test]
fn what_others_did_stays() {
    failed::what_others_did_stays(Device::Loop);
}

#[test]
fn a_second_staging_path_is_refused() {
    failed::a_second_staging_path_is_refused(Device::Loop);
}

#[test]
fn an_interrupted_growth_is_taken_up() {
    failed::an_interrupted_growth_is_taken_up(Device::Loop);
}

#[test]
fn raw_devices_leave_nothing_either() {
    failed::raw_devices_leave_nothing_either(Device::Loop);
}

#[test]
fn clones_of_what_no_pod_has_used_are_formatted() {
    blank::clones_are_formatted(Device::Loop);
}

#[test]
fn clones_of_what_was_half_formatted_are_formatted() {
    blank::half_formatted_sources_have_usable_clones(Device::Loop);
}

#[test]
fn clones_made_while_their_source_is_formatted_are_usable() {
    blank::clones_made_meanwhile_are_usable(Device::Loop);
}

/// What kubelet and the sidecars need on a host with SELinux, which no test has.
#[test]
fn the_manifest_is_for_hosts_with_selinux() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/driver.yaml");
    let text = std::fs::read_to_string(path).expect("a manifest");
    let object = |kind: &str| {
        let heading = format!("kind: {kind}\n");
        text.split("\n---\n").find(|object| object.contains(&heading)).expect("an object")
    };
    assert!(object("CSIDriver").contains("\n  seLinuxMount: true\n"));
    // Of the pod, so of all its containers: they share a socket.
    let domain = "\n      securityContext:\n        seLinuxOptions: {type: spc_t, level: s0}\n";
    assert!(object("DaemonSet").contains(domain));
}

#[test]
fn a_device_that_is_another_is_refused() {
    if !can_mount() || !present(&["losetup"]) {
        return;
    }
    // Another test can be faster in taking the number of the device.
    assert!((0..10).any(|_| another_device_is_refused()), "the device was taken every time");
}

/// False if the number of the device was taken by another test.
fn another_device_is_refused() -> bool {
    let system = System::start("1GiB");
    let csi = Csi::start(&system);
    let id = csi.create(request("wrong", 64 * MIB, &block())).expect("a volume").volume_id;
    let places = Mounted::places(&csi, &id, "wrong");
    csi.stage(&id, &places.staging, &block()).expect("the volume is staged");
    let attached = system.cli().json(&["volume", "attachments"]);
    let device = attached.pointer("/0/device").and_then(|device| device.as_str());
    let device = device.unwrap_or_else(|| panic!("no device: {attached}")).to_owned();
    // The number of the device is taken by somebody else, behind the daemon's back.
    let foreign = system.path().join("foreign");
    File::create(&foreign).expect("a file").set_len(1 << 20).expect("space");
    run("losetup", &["--detach", &device]);
    if !output("losetup", &[&device, text(&foreign)]).status.success() {
        return false;
    }
    let answer = places.publish(&block()).expect_err("another device");
    assert_eq!(answer.code(), Code::Internal, "{answer}");
    assert!(answer.message().contains("the kernel reports \"foreign\""), "{answer}");
    let answer = csi.stats(&id, &places.target).expect_err("another device");
    assert_eq!(answer.code(), Code::Internal, "{answer}");
    assert!(!places.target.exists());
    run("losetup", &["--detach", &device]);
    true
}

#[test]
fn dead_mounts_give_way_when_the_daemon_was_killed() {
    node::staged_volumes_survive_a_kill(Device::Loop, EXT4);
    node::staged_volumes_survive_a_kill(Device::Loop, XFS);
}

#[test]
fn a_pod_that_follows_at_once_is_published_on_a_new_device() {
    node::a_pod_that_follows_at_once_is_published_on_a_new_device();
}

#[test]
fn everything_is_staged_again_after_a_reboot() {
    node::everything_is_staged_again_after_a_reboot(Device::Loop, EXT4);
}
