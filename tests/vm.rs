//! The exports that this machine's own kernel may lack, in a virtual machine: ublk and the kernel's
//! NBD client.

use pando_tests::vm;

/// What every kind of device must do: `tests/bin/guest/volumes.rs`, `kills.rs` and `csi.rs`.
const CASES: [&str; 21] = [
    "file systems",
    "shape",
    "discard",
    "growth",
    "users",
    "read-only",
    "orderly restart",
    "identity",
    "deleted volume",
    "ext4",
    "coming and going",
    "csi ext4",
    "csi xfs",
    "csi raw",
    "csi repeated",
    "csi read-only",
    "csi stats",
    "csi restart",
    "csi reboot",
    "csi kills, fio",
    "csi kills, ext4",
];

#[test]
fn the_best_kind_is_taken() {
    vm::run("auto", &["order"]);
}

#[test]
fn volumes_are_ublk_devices() {
    vm::run("ublk", &CASES);
}

#[test]
fn volumes_are_devices_of_the_nbd_client() {
    vm::run("nbd", &CASES);
}
