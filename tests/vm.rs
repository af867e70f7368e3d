//! The exports that this machine's own kernel may lack, in a virtual machine: ublk and the kernel's
//! NBD client.

use pando_tests::vm;

#[test]
fn the_machine_boots_and_has_the_drivers() {
    vm::run("boot", &["modules"]);
}
