//! The power of a virtual machine goes while it changes a pool on its disk, and the device below a
//! pool fails: what was acknowledged and flushed is there, everything is of one moment, and nothing is
//! damaged. `scripts/vm-campaign` does it as often as one likes.

use pando_tests::power::replay;
use pando_tests::power::rounds::Rounds;
use pando_tests::vm::{Root, possible};

/// Power failures here.
const POWER_OFFS: u64 = 4;
/// Of a log of writes: its seed, and one in how many of its barriers is looked at.
const SEED: u64 = 21;
const STRIDE: u64 = 4;

#[test]
fn flushed_writes_survive_the_power() {
    if !possible() {
        return;
    }
    let mut rounds = Rounds::new(5);
    while rounds.tally.power_offs < POWER_OFFS {
        if let Err(what) = rounds.round() {
            panic!("{what}; the pool is kept in {}", rounds.keep().display());
        }
    }
    let tally = rounds.tally;
    assert!(tally.durable_batches > 0 && tally.lost_sectors > 0 && tally.flushes > 0, "{tally:?}");
}

#[test]
fn a_pool_stands_on_what_its_device_has_said() {
    if !possible() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let root = Root::new(directory.path());
    let replayed = replay::devices(&root, directory.path(), SEED, STRIDE);
    let replayed = replayed.expect("a sound pool");
    assert!(replayed.compared > 6 && replayed.torn > 12 && replayed.durable > 80, "{replayed:?}");
}
