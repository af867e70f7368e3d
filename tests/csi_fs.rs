//! Real file systems on volumes that are loop devices; the cases are `tests/harness/csi_cases/fs.rs`.

use pando_tests::csi_cases::Device;
use pando_tests::csi_cases::fs::whole_life;

const MIB: i64 = 1 << 20;

#[test]
fn ext4_lives_beside_its_clones() {
    whole_life(Device::Loop, "ext4", 128 * MIB);
}

#[test]
fn xfs_lives_beside_its_clones() {
    // mkfs.xfs refuses less than 300 MiB.
    whole_life(Device::Loop, "xfs", 320 * MIB);
}

#[test]
fn btrfs_lives_beside_its_clones() {
    whole_life(Device::Loop, "btrfs", 256 * MIB);
}
