//! Which kind of device is taken when any will do.

use crate::machine::{attach, create, detach, load};
use pando_tests::System;

/// The best that the kernel has, and why not a better one.
pub(crate) fn order(_kind: &str) {
    let system = System::start("64MiB");
    create(&system, "v", "8MiB");
    let (ublk, nbd) =
        ("ublk: this kernel: no /dev/ublk-control", "nbd: this kernel: no NBD client");
    let refused = system.cli().error(&["volume", "attach", "v", "--kind", "ublk"]);
    assert!(refused.contains("load the kernel's module ublk_drv"), "{refused}");
    for (module, expected, passed_over) in
        [("nbd", "nbd", vec![ublk]), ("ublk", "ublk", Vec::new())]
    {
        load(module);
        let attachment = attach(&system, "v", "auto", &[]);
        assert_eq!(attachment["kind"], expected, "{attachment}");
        let reasons = attachment["passed_over"].as_array().expect("a list").iter();
        let reasons: Vec<&str> = reasons.map(|reason| reason.as_str().expect("text")).collect();
        assert_eq!(reasons.len(), passed_over.len(), "{reasons:?}");
        for (reason, expected) in reasons.iter().zip(passed_over) {
            assert!(reason.starts_with(expected), "{reason}");
        }
        assert!(!reasons.iter().any(|reason| reason.starts_with(nbd)), "{reasons:?}");
        detach(&system, "v");
    }
}
