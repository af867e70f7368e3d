//! The NBD server against the clients that people use. A client that is not installed fails the
//! test with the name of its package.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod nbd_support;

use std::path::Path;
use std::process::{Command, Output};

use nbd_support::TestServer;
use pando_engine::export::testing::RamDisk;

const MIB: usize = 1 << 20;

fn uri(server: &TestServer, name: &str) -> String {
    format!("nbd+unix:///{name}?socket={}", server.path().display())
}

/// Runs a client to its end; `package` is what to install if it is missing.
fn run(package: &str, program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| {
        panic!("{program} does not start ({error}): apt-get install {package}")
    });
    let shown = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{shown}", output.status);
    output
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Half a MiB of noise, half a MiB of zeros, and so on.
fn pattern(bytes: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let noise = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    };
    let mut content: Vec<u8> = (0..bytes).map(noise).collect();
    for hole in content.chunks_mut(MIB) {
        hole[MIB / 2..].fill(0);
    }
    content
}

fn path_text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let (disk, frozen) = (RamDisk::new(8 * MIB as u64), RamDisk::new(512));
    frozen.set_read_only(true);
    let server = TestServer::start(&[("disk", &disk), ("frozen", &frozen)]);
    let text = stdout(&run("libnbd-bin", "nbdinfo", &["--json", &uri(&server, "disk")]));
    for expected in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-size\": 8388608",
        "\"is_read_only\": false",
        "\"can_multi_conn\": true",
        "\"can_fua\": true",
        "\"can_fast_zero\": true",
        "\"can_df\": true",
        "\"block_size_minimum\": 512",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "base:allocation",
    ] {
        assert!(text.contains(expected), "{expected} is not in {text}");
    }
    run("libnbd-bin", "nbdinfo", &["--is", "read-only", &uri(&server, "frozen")]);
    let list = stdout(&run("libnbd-bin", "nbdinfo", &["--list", "--json", &uri(&server, "")]));
    assert!(list.contains("\"export-name\": \"disk\"") && list.contains("\"frozen\""), "{list}");
}

#[test]
fn nbdcopy_copies_in_and_out_and_keeps_holes() {
    let disk = RamDisk::new(8 * MIB as u64);
    let server = TestServer::start(&[("disk", &disk)]);
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    let content = pattern(8 * MIB);
    std::fs::write(&from, &content).unwrap();

    let uri = uri(&server, "disk");
    run("libnbd-bin", "nbdcopy", &["--flush", path_text(&from), &uri]);
    assert!(disk.content() == content, "what was copied in");
    assert!(disk.counters().flushes > 0);
    run("libnbd-bin", "nbdcopy", &[&uri, path_text(&to)]);
    assert!(std::fs::read(&to).unwrap() == content, "what was copied out");

    let map = stdout(&run("libnbd-bin", "nbdinfo", &["--map", "--totals", &uri]));
    let hole = map.lines().find(|line| line.contains("hole,zero")).unwrap_or_default();
    assert!(hole.contains("4194304"), "half of it is holes: {map}");
}

#[test]
fn qemu_reads_writes_zeroes_and_discards() {
    let disk = RamDisk::new(8 * MIB as u64);
    let server = TestServer::start(&[("disk", &disk)]);
    let uri = uri(&server, "disk");
    let commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 512 512",
        "aio_write -P 0x33 1M 64k",
        "aio_write -P 0x44 2M 64k",
        "aio_flush",
        "write -z -u 64k 64k",
        "write -z 192k 64k",
        "discard 512k 128k",
        "flush",
        "read -P 0x11 0 512",
        "read -P 0x22 512 512",
        "read -P 0x11 1k 63k",
        "read -P 0 64k 64k",
        "read -P 0 192k 64k",
        "read -P 0 512k 128k",
        "read -P 0x33 1M 64k",
        "read -P 0x44 2M 64k",
    ];
    let mut arguments = vec!["-t", "none", "-f", "raw", "-d", "unmap", &uri];
    for command in &commands {
        arguments.extend(["-c", command]);
    }
    let text = stdout(&run("qemu-utils", "qemu-io", &arguments));
    assert!(!text.contains("failed") && !text.contains("error"), "{text}");
    let counters = disk.counters();
    assert_eq!(counters.discards, 1);
    assert!(counters.zeroes >= 2);

    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("copy");
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw"];
    run("qemu-utils", "qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, path_text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == disk.content());
    let text = stdout(&run("qemu-utils", "qemu-img", &["map", "-f", "raw", "--output=json", &uri]));
    assert!(text.contains("\"zero\": true"), "{text}");

    std::fs::write(&copy, pattern(8 * MIB)).unwrap();
    run("qemu-utils", "qemu-img", &[&convert[..], &[path_text(&copy), &uri]].concat());
    assert!(disk.content() == pattern(8 * MIB));
    run("qemu-utils", "qemu-img", &["compare", "-f", "raw", "-F", "raw", path_text(&copy), &uri]);
}

#[test]
fn fio_verifies_what_it_wrote() {
    let disk = RamDisk::new(16 * MIB as u64);
    let server = TestServer::start(&[("disk", &disk)]);
    let uri = format!("--uri={}", uri(&server, "disk"));
    let arguments = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--iodepth=32",
        "--size=16m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--fsync=64",
        "--randseed=1",
        // Otherwise a file with the state of the job stays behind.
        "--verify_state_save=0",
    ];
    run("fio", "fio", &arguments);
    let counters = disk.counters();
    assert!(counters.writes > 200 && counters.flushes > 0 && counters.reads > 0);
}
