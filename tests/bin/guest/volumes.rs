//! What every kind of device must do.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use pando_tests::devices::{Mounted, sysfs};
use pando_tests::{System, tools};

use crate::load::Load;
use crate::machine::{
    attach, check_files, check_kernel_log, create, detach, device, mapped_bytes, start, write_tree,
};
use crate::suite::Case;

pub(crate) const CASES: &[Case] = &[
    ("file systems", file_systems),
    ("shape", shape),
    ("discard", discard),
    ("growth", growth),
    ("users", users),
    ("read-only", read_only),
    ("orderly restart", orderly_restart),
    ("identity", identity),
    ("deleted volume", deleted_volume),
];

const MIB: u64 = 1 << 20;
const MIB_BYTES: usize = 1 << 20;

/// What is written to a file system is there after detaching and attaching, and after a restart
/// in between.
fn file_systems(kind: &str) {
    let mut system = start(kind);
    for module in ["xfs", "btrfs"] {
        tools::run("modprobe", &[module]);
    }
    for (name, size, program) in [
        ("ext4", "48MiB", "mkfs.ext4"),
        ("xfs", "320MiB", "mkfs.xfs"),
        ("btrfs", "120MiB", "mkfs.btrfs"),
    ] {
        create(&system, name, size);
        let path = device(&attach(&system, name, kind, &[]));
        tools::run(program, &["-q", &path]);
        let mounted = Mounted::new(&path, Path::new("/mnt/a"));
        let files = write_tree(mounted.path(), 1);
        mounted.unmount();
        detach(&system, name);
        system.stop();
        system.spawn();
        let path = device(&attach(&system, name, kind, &[]));
        let mounted = Mounted::new(&path, Path::new("/mnt/a"));
        check_files(&files);
        mounted.unmount();
        detach(&system, name);
    }
    system.check();
    check_kernel_log();
}

/// The device says what it can do.
fn shape(kind: &str) {
    let system = start(kind);
    create(&system, "v", "16MiB");
    for sector in ["512", "4096"] {
        let path = device(&attach(&system, "v", kind, &["--sector-bytes", sector]));
        assert_eq!(sysfs(&path, "queue/logical_block_size"), sector);
        // The NBD client knows one size only.
        let physical = if kind == "nbd" { sector } else { "4096" };
        assert_eq!(sysfs(&path, "queue/physical_block_size"), physical);
        assert_eq!(sysfs(&path, "queue/write_cache"), "write back");
        assert_eq!(sysfs(&path, "queue/fua"), "1");
        assert_ne!(sysfs(&path, "queue/discard_max_bytes"), "0");
        assert_eq!(sysfs(&path, "size"), (16 * MIB / 512).to_string());
        if kind == "ublk" {
            // A daemon that is killed while the kernel searches would never end.
            assert_eq!(sysfs(&path, "partscan"), "0");
        }
        detach(&system, "v");
    }
}

/// Discarded space comes back, and is zero.
fn discard(kind: &str) {
    let system = start(kind);
    create(&system, "v", "32MiB");
    let path = device(&attach(&system, "v", kind, &[]));
    let of = format!("of={path}");
    tools::run("dd", &["if=/dev/urandom", &of, "bs=1M", "count=8", "oflag=direct"]);
    assert_eq!(mapped_bytes(&system, "v"), 8 * MIB);
    tools::run("blkdiscard", &["-o", "1048576", "-l", "4194304", &path]);
    assert_eq!(mapped_bytes(&system, "v"), 4 * MIB);
    let content = fs::read(&path).expect("the device");
    assert!(content[MIB_BYTES..5 * MIB_BYTES].iter().all(|byte| *byte == 0));
    assert!(content[..MIB_BYTES].iter().any(|byte| *byte != 0));
    tools::run("blkdiscard", &["-z", "-o", "0", "-l", "1048576", &path]);
    assert!(fs::read(&path).expect("the device")[..MIB_BYTES].iter().all(|byte| *byte == 0));
    tools::run("blkdiscard", &[&path]);
    assert_eq!(mapped_bytes(&system, "v"), 0);
    detach(&system, "v");
    check_kernel_log();
}

/// A volume grows under a mounted file system; or, where the kernel cannot do that, it says so.
fn growth(kind: &str) {
    let system = start(kind);
    create(&system, "v", "16MiB");
    let path = device(&attach(&system, "v", kind, &[]));
    tools::run("mkfs.ext4", &["-q", &path]);
    let mounted = Mounted::new(&path, Path::new("/mnt/a"));
    let files = write_tree(mounted.path(), 2);
    let grown = system.cli().output(&["volume", "grow", "v", "32MiB"]);
    let mounted = if kind == "nbd" {
        assert!(grown.status.success(), "{grown:?}");
        mounted
    } else {
        // The kernel of this machine is older than the command.
        let why = String::from_utf8_lossy(&grown.stderr).into_owned();
        assert!(why.contains("detach the volume first"), "{why}");
        assert_eq!(sysfs(&path, "size"), (16 * MIB / 512).to_string());
        mounted.unmount();
        detach(&system, "v");
        let grown = system.cli().output(&["volume", "grow", "v", "32MiB"]);
        assert!(grown.status.success(), "{grown:?}");
        assert_eq!(device(&attach(&system, "v", kind, &[])), path);
        Mounted::new(&path, Path::new("/mnt/a"))
    };
    assert_eq!(sysfs(&path, "size"), (32 * MIB / 512).to_string());
    tools::run("resize2fs", &[&path]);
    let space = rustix::fs::statvfs(mounted.path()).expect("a file system");
    assert!(space.f_blocks * space.f_frsize > 24 * MIB, "{}", space.f_blocks);
    check_files(&files);
    mounted.unmount();
    tools::run("e2fsck", &["-f", "-n", &path]);
    detach(&system, "v");
    check_kernel_log();
}

/// A device in use stays, and its volume too.
fn users(kind: &str) {
    let system = start(kind);
    let cli = system.cli();
    create(&system, "v", "16MiB");
    let first = attach(&system, "v", kind, &[]);
    let path = device(&first);
    assert_eq!(attach(&system, "v", kind, &[]), first, "attaching again changes nothing");
    tools::run("mkfs.ext4", &["-q", &path]);
    let mounted = Mounted::new(&path, Path::new("/mnt/a"));
    let refused = cli.refused(&["volume", "detach", "v"]);
    assert_eq!(refused["kind"], "busy", "{refused}");
    let refused = cli.refused(&["volume", "delete", "v"]);
    assert_eq!(refused["kind"], "busy", "{refused}");
    let files = write_tree(mounted.path(), 3);
    mounted.unmount();
    let open = File::open(&path).expect("the device");
    let refused = cli.refused(&["volume", "detach", "v"]);
    assert_eq!(refused["kind"], "busy", "{refused}");
    assert!(refused["error"].as_str().is_some_and(|e| e.contains("open in process")), "{refused}");
    drop(open);
    drop(Mounted::new(&path, Path::new("/mnt/a")));
    let mounted = Mounted::new(&path, Path::new("/mnt/a"));
    check_files(&files);
    mounted.unmount();
    detach(&system, "v");
    assert_eq!(cli.refused(&["volume", "detach", "v"])["kind"], "not_found");
    cli.run(&["volume", "delete", "v"]);
    check_kernel_log();
}

/// A snapshot is a device that cannot be written to.
fn read_only(kind: &str) {
    let system = start(kind);
    create(&system, "v", "16MiB");
    let path = device(&attach(&system, "v", kind, &[]));
    tools::run("mkfs.ext4", &["-q", &path]);
    detach(&system, "v");
    system.cli().run(&["volume", "snapshot", "v", "s"]);
    let attachment = attach(&system, "s", kind, &[]);
    assert_eq!(attachment["read_only"], true);
    let path = device(&attachment);
    assert_eq!(sysfs(&path, "ro"), "1");
    let of = format!("of={path}");
    let written = tools::output("dd", &["if=/dev/zero", &of, "bs=4k", "count=1", "oflag=direct"]);
    assert!(!written.status.success(), "{written:?}");
    fs::create_dir_all("/mnt/a").expect("a directory");
    tools::run("mount", &["-o", "ro,noload", &path, "/mnt/a"]);
    tools::run("umount", &["/mnt/a"]);
    detach(&system, "s");
}

/// A mounted file system does not notice that the daemon is replaced.
fn orderly_restart(kind: &str) {
    let mut system = start(kind);
    create(&system, "v", "48MiB");
    let before = attach(&system, "v", kind, &[]);
    let path = device(&before);
    tools::run("mkfs.ext4", &["-q", &path]);
    let mounted = Mounted::new(&path, Path::new("/mnt/a"));
    let files = write_tree(mounted.path(), 4);
    // What it writes waits for the next daemon, or is in the kernel's memory.
    let mut load = Load::start(&mounted.path().join("more"), 5);
    system.stop();
    system.spawn();
    let listed = system.cli().json(&["volume", "attachments"]);
    assert_eq!(listed[0], before, "the same device");
    load.stop();
    load.check();
    check_files(&files);
    mounted.unmount();
    tools::run("e2fsck", &["-f", "-n", &path]);
    detach(&system, "v");
    system.check();
    check_kernel_log();
}

/// Where the daemon keeps what it knows of the device of a volume.
fn record(system: &System, attachment: &serde_json::Value) -> PathBuf {
    let devices = system.path().join("devices");
    let pool = fs::read_dir(devices).expect("a directory").next().expect("one pool");
    let name = format!("{}.toml", attachment["volume_id"]);
    pool.expect("an entry").path().join(name)
}

/// After a restart a device is known by what the kernel says of it, not by its number.
fn identity(kind: &str) {
    let mut system = start(kind);
    for name in ["one", "two"] {
        create(&system, name, "8MiB");
    }
    let attachments = ["one", "two"].map(|name| attach(&system, name, kind, &[]));
    if kind == "nbd" {
        for attachment in &attachments {
            let shown = sysfs(&device(attachment), "backend");
            assert_eq!(attachment["identity"], shown.as_str());
        }
    }
    let of = format!("of={}", device(&attachments[1]));
    tools::run("dd", &["if=/dev/urandom", &of, "bs=64k", "count=1", "oflag=direct"]);
    let content = fs::read(device(&attachments[1])).expect("a device");
    system.kill();
    // The records tell the number of the other device, and none.
    let paths = attachments.each_ref().map(|attachment| record(&system, attachment));
    let texts = paths.each_ref().map(|path| fs::read_to_string(path).expect("a record"));
    let (fields, node) = texts[0].split_once("[node]").expect("a record has a node");
    let (_, other) = texts[1].split_once("[node]").expect("a record has a node");
    fs::write(&paths[0], format!("{fields}[node]{other}")).expect("a record");
    let (fields, _) = texts[1].split_once("[node]").expect("a record has a node");
    fs::write(&paths[1], fields).expect("a record");
    assert!(!node.is_empty());
    system.spawn();
    let listed = system.cli().json(&["volume", "attachments"]);
    for attachment in &attachments {
        assert!(listed.as_array().expect("a list").contains(attachment), "{listed}");
    }
    assert!(fs::read(device(&attachments[1])).expect("a device") == content);
    let zeros = fs::read(device(&attachments[0])).expect("a device");
    assert!(zeros.iter().all(|byte| *byte == 0));
    for name in ["one", "two"] {
        detach(&system, name);
    }
    check_kernel_log();
}

/// A daemon that finds no pool for a device leaves it; the daemon of its pool removes what has no
/// volume any more.
fn deleted_volume(kind: &str) {
    let mut system = start(kind);
    create(&system, "v", "8MiB");
    let attachment = attach(&system, "v", kind, &[]);
    let path = device(&attachment);
    let kept = fs::read(record(&system, &attachment)).expect("a record");
    let place = record(&system, &attachment);
    system.kill();
    // As if the volume had been deleted by a daemon that knew nothing of the device.
    fs::remove_file(&place).expect("a record");
    system.spawn();
    system.cli().run(&["volume", "delete", "v"]);
    system.stop();
    fs::write(&place, kept).expect("a record");
    system.spawn();
    assert!(!place.exists(), "the record has gone");
    let size = fs::read_to_string(path.replace("/dev/", "/sys/block/") + "/size");
    assert!(size.as_ref().map_or(true, |size| size.trim() == "0"), "{size:?}");
}
