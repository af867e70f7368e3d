//! The CSI adapter with devices that only the machine has. What it must do is said in the harness,
//! for every kind of device; kills under load are said here.

use std::fs;

use pando_tests::Csi;
use pando_tests::csi::{Mounted, block, mount_of, request_of};
use pando_tests::csi_cases::Device;
use pando_tests::csi_cases::fs::World;
use pando_tests::csi_cases::node;
use pando_tests::tools;

use crate::kills::{kill_some_times, write_and_verify};
use crate::load::Load;
use crate::machine::{check_kernel_log, load, start};
use crate::suite::Case;

pub(crate) const CASES: &[Case] = &[
    ("csi ext4", |kind| whole_life(kind, "ext4", 96 * MIB)),
    ("csi xfs", |kind| whole_life(kind, "xfs", 320 * MIB)),
    ("csi raw", |kind| with(kind, node::raw_devices_are_published_and_grow)),
    ("csi repeated", |kind| with(kind, node::each_call_can_be_repeated)),
    ("csi read-only", |kind| with(kind, node::read_only_and_single_writer_are_kept)),
    ("csi stats", |kind| with(kind, node::stats_are_of_the_volume_and_of_no_other_path)),
    ("csi restart", |kind| with(kind, |device| node::staged_volumes_survive_a_kill(device, EXT4))),
    ("csi reboot", |kind| {
        with(kind, |device| node::everything_is_staged_again_after_a_reboot(device, EXT4));
    }),
    ("csi kills, fio", staged_fio),
    ("csi kills, ext4", staged_ext4),
];

const MIB: i64 = 1 << 20;
const EXT4: (&str, i64) = ("ext4", 64 * MIB);

fn with(kind: &str, case: impl FnOnce(Device)) {
    load(kind);
    case(Device::named(kind));
    check_kernel_log();
}

/// A file system beside its clone, and growth.
fn whole_life(kind: &str, file_system: &'static str, bytes: i64) {
    with(kind, |device| {
        if file_system != "ext4" {
            tools::run("modprobe", &[file_system]);
        }
        let world = World::new(device, file_system, bytes).expect("everything is there");
        let csi = Csi::start(world.system());
        world.side_by_side(&csi);
        world.growth(&csi);
        world.empty();
    });
}

/// fio on a raw volume that is published.
fn staged_fio(kind: &str) {
    let mut system = start(kind);
    let mut csi = Csi::start(&system);
    let wanted = request_of(kind, "v", 32 * MIB, &block());
    let id = csi.create(wanted).expect("a volume").volume_id;
    let raw = Mounted::up(&csi, &id, "v", &block());
    let target = raw.target.clone();
    write_and_verify(&mut system, &target);
    // The adapter was there all the time, and another one knows as much.
    csi.kill();
    csi.spawn();
    Mounted::up(&csi, &id, "v", &block()).down();
    csi.delete(&id).expect("it is not in use");
    check_kernel_log();
    system.check();
}

/// Programs change files on a volume that is published, while daemon and adapter are killed.
fn staged_ext4(kind: &str) {
    let mut system = start(kind);
    let mut csi = Csi::start(&system);
    let capability = mount_of("ext4");
    let wanted = request_of(kind, "v", 64 * MIB, &capability);
    let id = csi.create(wanted).expect("a volume").volume_id;
    let target = Mounted::up(&csi, &id, "v", &capability).target;
    let mut changing = Load::start(&target, 13);
    kill_some_times(&mut system, 13, || {
        // With the next kill no adapter is there, and the one that comes finds all as it was.
        csi.kill();
        csi.spawn();
        changing.goes_on()
    });
    changing.stop();
    let stats = csi.stats(&id, &target).expect("it is published");
    assert!(stats[0].used > 0, "{stats:?}");
    Mounted::up(&csi, &id, "v", &capability).down();
    // From the disk, not from the kernel's memory.
    fs::write("/proc/sys/vm/drop_caches", "3").expect("caches are dropped");
    let mounted = Mounted::up(&csi, &id, "v", &capability);
    changing.check();
    mounted.down();
    assert!(!csi.log().contains("e2fsck corrected"), "{}", csi.log());
    csi.delete(&id).expect("it is not in use");
    check_kernel_log();
    system.check();
}
