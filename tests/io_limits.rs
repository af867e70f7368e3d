//! The I/O limits of a volume, seen by a client. How exact they are is shown on simulated time, in
//! the engine's tests; here, that they reach the volume that is exported.

use std::time::{Duration, Instant};

use pando_tests::cli::number;
use pando_tests::{Nbd, System};

#[test]
fn limits_hold_for_an_export_and_change_while_it_is_used() {
    let system = System::start("64MiB");
    let cli = system.cli();
    let limits = ["--iops-limit", "100", "--bandwidth-limit", "1MiB"];
    cli.run(&[&["volume", "create", "db", "--size", "16MiB"][..], &limits].concat());
    let shown = cli.json(&["volume", "show", "db"]);
    assert_eq!(number(&shown, "/iops_limit"), 100);
    assert_eq!(number(&shown, "/bandwidth_limit_bytes"), 1 << 20);
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");

    // Ten requests may pass at once, and each tenth of a second ten more.
    let begin = Instant::now();
    for index in 0..30 {
        nbd.write(index * 4096, &[1; 4096]);
        nbd.read(index * 4096, 4096);
    }
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(450), "60 requests at 100/s took {took:?}");

    // The first of the two is paid off before the second.
    cli.run(&["volume", "set", "db", "--iops-limit", "0"]);
    let begin = Instant::now();
    nbd.write(0, &vec![2; 1 << 20]);
    nbd.write(0, &[3; 4096]);
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(800), "1 MiB at 1 MiB/s took {took:?}");

    // Without the change this would take over an hour.
    cli.run(&["volume", "set", "db", "--bandwidth-limit", "4KiB"]);
    cli.run(&["volume", "set", "db", "--bandwidth-limit", "0"]);
    let begin = Instant::now();
    for _ in 0..16 {
        nbd.write(0, &vec![4; 1 << 20]);
    }
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(60), "16 MiB without a limit took {took:?}");
    system.check();
}
