//! csi-sanity, the acceptance suite of the CSI project, against the real adapter and daemon, with
//! every capability on. Nothing of it may fail, and nothing may be left out but what belongs to
//! calls that the adapter does not offer.

use std::collections::BTreeMap;
use std::fs;

use pando_tests::csi::can_mount;
use pando_tests::{Csi, Data, System, tools};
use serde_json::Value;

/// Reasons for which csi-sanity leaves a test out, and how many it leaves out for each. Volumes of
/// a node are not attached by the controller, so there is no ControllerPublishVolume.
const LEFT_OUT: [(&str, usize); 3] = [
    ("ControllerPublishVolume not supported", 7),
    ("Controller Publish, UnpublishVolume not supported", 2),
    ("ControllerUnpublishVolume not supported", 1),
];
/// Tests that csi-sanity itself has switched off: the paging of ListVolumes.
const SWITCHED_OFF: usize = 1;
/// Tests that pass, at least: csi-sanity 5.5.0 has 96.
const PASSED_MIN: usize = 85;

/// Growing an ext4 that is mounted takes CAP_SYS_RESOURCE, which not every machine for tests gives to
/// its root; xfs and btrfs take only what mounting takes.
const XFS: &str = "deviceKind: loop\nfsType: xfs\n";
const BTRFS: &str = "deviceKind: loop\nfsType: btrfs\n";
const BLOCK: &str = "deviceKind: loop\n";
const MUTABLE: &str = "iopsLimit: \"100000\"\ngrowthLimit: 20Gi\n";
const SNAPSHOT: &str = "freeze: \"true\"\n";

/// Tests by how they ended, and the reasons of those that were left out.
#[derive(Debug, Default)]
struct Report {
    ended: BTreeMap<String, usize>,
    left_out: BTreeMap<String, usize>,
    failed: Vec<String>,
}

impl Report {
    fn read(text: &str) -> Self {
        let suites: Value = serde_json::from_str(text).expect("a report");
        let mut report = Self::default();
        let specs = suites.as_array().expect("suites").iter();
        for spec in specs.flat_map(|suite| suite["SpecReports"].as_array().expect("tests")) {
            if spec["LeafNodeType"] != "It" {
                assert_eq!(spec["State"], "passed", "{spec}");
                continue;
            }
            let state = spec["State"].as_str().expect("a state").to_owned();
            let reason = spec["Failure"]["Message"].as_str().unwrap_or_default().to_owned();
            match state.as_str() {
                "skipped" => *report.left_out.entry(reason).or_default() += 1,
                "passed" | "pending" => {}
                _ => report.failed.push(format!("{}: {reason}", spec["LeafNodeText"])),
            }
            *report.ended.entry(state).or_default() += 1;
        }
        report
    }

    fn count(&self, state: &str) -> usize {
        self.ended.get(state).copied().unwrap_or_default()
    }
}

fn sanity(access_type: &str, parameters: &str) {
    if !tools::present(&["csi-sanity"]) || !can_mount() {
        return;
    }
    let system = System::start("64GiB");
    let csi = Csi::start(&system);
    let path = |name: &str| tools::text(&system.path().join(name)).to_owned();
    let file = |name: &str, text: &str| {
        fs::write(path(name), text).expect("a file");
        path(name)
    };
    let arguments = [
        format!("--csi.endpoint={}", path("csi.sock")),
        format!("--csi.mountdir={}", path("target")),
        format!("--csi.stagingdir={}", path("staging")),
        format!("--csi.testvolumeaccesstype={access_type}"),
        format!("--csi.testvolumeparameters={}", file("parameters.yaml", parameters)),
        format!("--csi.testvolumemutableparameters={}", file("mutable.yaml", MUTABLE)),
        format!("--csi.testsnapshotparameters={}", file("snapshot.yaml", SNAPSHOT)),
        format!("--ginkgo.json-report={}", path("report.json")),
    ];
    let output = tools::output("csi-sanity", &arguments);
    let text = fs::read_to_string(path("report.json")).unwrap_or_else(|error| {
        panic!("{error}: csi-sanity ended with {}", String::from_utf8_lossy(&output.stderr))
    });
    let report = Report::read(&text);
    assert!(report.failed.is_empty(), "{:#?}", report.failed);
    assert!(output.status.success());
    let expected = LEFT_OUT.iter().map(|(reason, count)| ((*reason).to_owned(), *count));
    assert_eq!(report.left_out, expected.collect());
    assert_eq!(report.count("pending"), SWITCHED_OFF);
    assert!(report.count("passed") >= PASSED_MIN, "{report:?}");
    // What it made it has deleted, and nothing is mounted or attached any more.
    assert_eq!(Data::new(&system).pool().provisioned_bytes, 0);
    assert!(pando_tests::csi::mounted_below(system.path()).is_empty());
    drop(csi);
    system.check();
}

#[test]
fn volumes_with_xfs() {
    sanity("mount", XFS);
}

#[test]
fn volumes_with_btrfs() {
    sanity("mount", BTRFS);
}

#[test]
fn block_volumes() {
    sanity("block", BLOCK);
}
