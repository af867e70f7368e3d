//! Volumes as block devices of this machine, through the real daemon and the kernel: what a file
//! system needs of a disk, what a person needs of the command line, and what is left when the
//! daemon is gone.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pando_tests::cli::number;
use pando_tests::devices::{Mounted, possible, sysfs};
use pando_tests::noise::Noise;
use pando_tests::tools::{output, present, run, text};
use pando_tests::{Cli, System};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// Where a real tree of files comes from.
const TREE: &str = "/usr/include/linux";

/// What all tests here need.
fn ready(more: &[&str]) -> bool {
    possible() && present(&["mount", "umount", "losetup"]) && present(more)
}

/// Makes a volume a loop device; the path.
fn attach(cli: &Cli, name: &str) -> String {
    let answer = cli.json(&["volume", "attach", name, "--kind", "loop"]);
    answer["device"].as_str().expect("an attachment has a device").to_owned()
}

fn detach(cli: &Cli, name: &str) {
    cli.run(&["volume", "detach", name]);
}

fn mapped(cli: &Cli, name: &str) -> u64 {
    number(&cli.json(&["volume", "show", name]), "/mapped_bytes")
}

fn counter(cli: &Cli, name: &str) -> u64 {
    number(&cli.json(&["pool", "status"]), &format!("/counters/{name}"))
}

fn devices(cli: &Cli) -> Vec<Value> {
    let all = cli.json(&["volume", "attachments"]);
    all.as_array().expect("a list").clone()
}

/// All files below a directory with their contents.
fn tree(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut left = vec![directory.to_owned()];
    while let Some(place) = left.pop() {
        for entry in fs::read_dir(&place).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                left.push(path);
            } else {
                let name = path.strip_prefix(directory).expect("below it").to_owned();
                files.insert(name, fs::read(&path).expect("a file"));
            }
        }
    }
    files
}

fn assert_same(what: &str, found: &Path, expected: &BTreeMap<PathBuf, Vec<u8>>) {
    let found = tree(found);
    let differ: Vec<_> =
        expected.iter().filter(|(name, bytes)| found.get(*name) != Some(*bytes)).collect();
    let names: Vec<_> = differ.iter().take(5).map(|(name, _)| name).collect();
    assert!(differ.is_empty(), "{what}: {} files differ: {names:?}", differ.len());
    assert_eq!(found.len(), expected.len(), "{what}: files that should not be there");
}

/// Copies the real tree and makes it durable.
fn copy_tree(to: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    run("cp", &["-rL", TREE, text(to)]);
    run("sync", &["-f", text(to)]);
    let copied = tree(&to.join("linux"));
    assert!(copied.len() > 100, "a real tree has files, this one {}", copied.len());
    copied
}

fn direct(device: &str) -> File {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(0o40000);
    options.open(device).unwrap_or_else(|error| panic!("{device}: {error}"))
}

/// Memory at an address that direct I/O takes, filled by `fill`.
fn aligned(len: usize, fill: impl FnOnce(&mut [u8])) -> (Vec<u8>, std::ops::Range<usize>) {
    let mut memory = vec![0; len + 4096];
    let start = memory.as_ptr().align_offset(4096);
    fill(&mut memory[start..start + len]);
    (memory, start..start + len)
}

#[test]
fn a_file_system_is_there_again_after_detaching() {
    if !ready(&["mkfs.ext4", "e2fsck"]) {
        return;
    }
    let mut system = System::start("512MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "128MiB"]);
    let device = attach(&cli, "db");
    run("mkfs.ext4", &["-q", &device]);
    let mounted = Mounted::new(&device, &system.path().join("mnt"));
    let expected = copy_tree(mounted.path());
    mounted.unmount();
    assert_eq!(cli.json(&["volume", "detach", "db"])[0]["device"], device.as_str());
    let refused = cli.refused(&["volume", "detach", "db"]);
    assert_eq!(refused["error"], "volume db is not attached");
    assert_eq!(devices(&cli).len(), 0);

    // A restart in between, and another device before it, so that it has another number.
    system.stop();
    system.spawn();
    cli.run(&["volume", "create", "other", "--size", "16MiB"]);
    attach(&cli, "other");
    let device = attach(&cli, "db");
    run("e2fsck", &["-fn", &device]);
    let mounted = Mounted::new(&device, &system.path().join("mnt"));
    assert_same("after a restart", &mounted.path().join("linux"), &expected);
    mounted.unmount();
    assert_eq!(devices(&cli).len(), 2);
    detach(&cli, "other");
    detach(&cli, "db");
    system.check();
    system.stop();
    assert!(!system.log().contains("WARN"), "nothing to warn of:\n{}", system.log());
}

#[test]
fn the_kernel_shows_whose_device_it_is() {
    if !ready(&["blockdev"]) {
        return;
    }
    let system = System::start("128MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "16MiB"]);
    let answer = cli.json(&["volume", "attach", "db"]);
    let kind = answer["kind"].as_str().expect("a kind");
    // Each kind that is better than the one taken says why it was not.
    let better: Vec<&str> =
        ["ublk", "nbd", "loop"].into_iter().take_while(|k| *k != kind).collect();
    let passed = answer["passed_over"].as_array().expect("a list");
    assert_eq!(passed.len(), better.len(), "{answer}");
    for (why, kind) in passed.iter().zip(better) {
        let why = why.as_str().expect("text");
        let reason = why.strip_prefix(kind).and_then(|rest| rest.strip_prefix(": "));
        assert!(reason.is_some_and(|reason| reason.len() > 5), "{why}");
    }
    detach(&cli, "db");

    let answer = cli.json(&["volume", "attach", "db", "--kind", "loop"]);
    assert_eq!(answer["passed_over"].as_array().map(Vec::len), Some(0), "it was asked for");
    let device = answer["device"].as_str().expect("a device");
    let uuid = cli.json(&["pool", "status"])["uuid"].as_str().expect("an uuid").to_owned();
    let id = number(&answer, "/volume_id");
    let identity = format!("pando-{uuid}-{id}");
    assert_eq!(answer["identity"], identity.as_str());
    let backing = sysfs(device, "loop/backing_file");
    assert_eq!(Path::new(&backing).file_name().and_then(|n| n.to_str()), Some(&*identity));
    assert_eq!(sysfs(device, "loop/dio"), "1", "direct I/O");
    assert_eq!(sysfs(device, "queue/write_cache"), "write back", "flushes are sent");
    assert_eq!(sysfs(device, "queue/discard_granularity"), "4096");
    assert_eq!(sysfs(device, "dev"), format!("{}:{}", answer["major"], answer["minor"]));
    assert_eq!(run("blockdev", &["--getsize64", device]).trim(), (16 * MIB).to_string());

    // Asked for again, it is the same; asked for otherwise, it is refused by name.
    assert_eq!(attach(&cli, "db"), device);
    assert_eq!(cli.json(&["volume", "attach", "db"])["device"], device);
    for other in [&["--read-only"][..], &["--sector-bytes", "4096"]] {
        let refused = cli.refused(&[&["volume", "attach", "db"][..], other].concat());
        assert_eq!(refused["kind"], "busy", "{refused}");
        assert!(refused["error"].as_str().expect("text").contains(device), "{refused}");
    }
    let shown = cli.json(&["volume", "show", "db"]);
    assert_eq!(shown["attachment"]["device"], device);
    assert!(cli.run(&["volume", "attachments"]).contains(&identity));
    assert_eq!(cli.refused(&["volume", "attach", "nobody"])["kind"], "not_found");
    detach(&cli, "db");
}

#[test]
fn a_device_is_not_pulled_from_under_its_users() {
    if !ready(&["mkfs.ext4"]) {
        return;
    }
    let mut system = System::start("256MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "64MiB"]);
    let device = attach(&cli, "db");
    let refused = |arguments: &[&str]| {
        let refused = cli.refused(arguments);
        assert_eq!(refused["kind"], "busy", "{arguments:?}: {refused}");
        let what = refused["error"].as_str().expect("text").to_owned();
        assert!(what.contains(&device), "{arguments:?}: {what}");
    };
    refused(&["volume", "delete", "db"]);
    refused(&["volume", "serve", "db"]);

    run("mkfs.ext4", &["-q", &device]);
    let mounted = Mounted::new(&device, &system.path().join("mnt"));
    refused(&["volume", "detach", "db"]);
    let expected = copy_tree(mounted.path());
    refused(&["volume", "delete", "db"]);
    mounted.unmount();
    let opened = File::open(&device).expect("a device");
    refused(&["volume", "detach", "db"]);
    // It has not been marked to go away with its last user either.
    drop(opened);
    let mounted = Mounted::new(&device, &system.path().join("mnt"));
    assert_same("after refusals", &mounted.path().join("linux"), &expected);
    mounted.unmount();
    detach(&cli, "db");

    // The other way round: offered over NBD, it does not become a device.
    cli.serve("db");
    assert_eq!(cli.refused(&["volume", "attach", "db"])["kind"], "busy");
    cli.run(&["volume", "serve", "--stop", "db"]);
    cli.run(&["volume", "delete", "db"]);
    system.check();
    system.stop();
}

#[test]
fn discards_give_the_space_back() {
    if !ready(&["mkfs.ext4", "blkdiscard", "fstrim"]) {
        return;
    }
    let system = System::start("512MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "128MiB"]);
    let device = attach(&cli, "db");
    let file = direct(&device);
    let (memory, data) =
        aligned(1 << 20, |bytes| bytes.copy_from_slice(&Noise::new(1).bytes(1 << 20)));
    for at in 0..32 {
        file.write_all_at(&memory[data.clone()], at * MIB).expect("room");
    }
    assert_eq!(mapped(&cli, "db"), 32 * MIB);
    run("blkdiscard", &["--offset", "1MiB", "--length", "15MiB", &device]);
    assert_eq!(mapped(&cli, "db"), 17 * MIB);
    // Zeros inside of blocks are zeros to the byte, and what is beside them stays.
    run("blkdiscard", &["--zeroout", "--offset", "512", "--length", "8192", &device]);
    let (mut memory, read) = aligned(12288, |_| ());
    file.read_exact_at(&mut memory[read.clone()], 0).expect("readable");
    let (expected, found) = (Noise::new(1).bytes(12288), &memory[read]);
    assert_eq!(found[..512], expected[..512]);
    assert!(found[512..8704].iter().all(|byte| *byte == 0));
    assert_eq!(found[8704..], expected[8704..12288]);
    drop(file);
    run("blkdiscard", &[&device]);
    assert_eq!(mapped(&cli, "db"), 0);

    run("mkfs.ext4", &["-q", &device]);
    let mounted = Mounted::new(&device, &system.path().join("mnt"));
    let empty = mapped(&cli, "db");
    let big = mounted.path().join("big");
    fs::write(&big, Noise::new(2).bytes(48 << 20)).expect("a file");
    run("sync", &["-f", text(mounted.path())]);
    assert!(mapped(&cli, "db") >= empty + 48 * MIB);
    fs::remove_file(&big).expect("our file");
    // Blocks are trimmed once their release is in the journal.
    run("sync", &["-f", text(mounted.path())]);
    run("fstrim", &[text(mounted.path())]);
    assert!(mapped(&cli, "db") < empty + 2 * MIB, "{} after fstrim", mapped(&cli, "db"));
    mounted.unmount();
    detach(&cli, "db");
    system.check();
}

#[test]
fn a_mounted_volume_grows() {
    // XFS, since ext4 wants more rights than a container may have for this.
    if !ready(&["mkfs.xfs", "xfs_growfs", "xfs_repair", "blockdev"]) {
        return;
    }
    let system = System::start("1GiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "320MiB"]);
    let device = attach(&cli, "db");
    run("mkfs.xfs", &["-q", &device]);
    let mounted = Mounted::new(&device, &system.path().join("mnt"));
    let expected = copy_tree(mounted.path());
    cli.run(&["volume", "grow", "db", "768MiB"]);
    assert_eq!(run("blockdev", &["--getsize64", &device]).trim(), (768 * MIB).to_string());
    run("xfs_growfs", &[mounted.path()]);
    // More than the old size can hold, if what is there already is counted.
    let bytes = Noise::new(3).bytes(320 << 20);
    fs::write(mounted.path().join("more"), &bytes).expect("room");
    mounted.unmount();
    detach(&cli, "db");
    let device = attach(&cli, "db");
    run("xfs_repair", &["-n", &device]);
    let mounted = Mounted::new(&device, &system.path().join("mnt"));
    assert_same("after growth", &mounted.path().join("linux"), &expected);
    assert!(fs::read(mounted.path().join("more")).expect("a file") == bytes);
    mounted.unmount();
    detach(&cli, "db");
}

#[test]
fn what_was_synced_survives_a_kill_of_the_daemon() {
    if !ready(&["mkfs.ext4", "e2fsck"]) {
        return;
    }
    let mut system = System::start("512MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "128MiB"]);
    let mut expected = BTreeMap::new();
    for round in 0..3 {
        let device = attach(&cli, "db");
        if round == 0 {
            run("mkfs.ext4", &["-q", &device]);
        }
        // The first mount replays the journal of the file system; then it must be sound.
        Mounted::new(&device, &system.path().join("mnt")).unmount();
        run("e2fsck", &["-fn", &device]);
        let mounted = Mounted::new(&device, &system.path().join(format!("mnt{round}")));
        if round == 0 {
            expected = copy_tree(mounted.path());
        }
        assert_same("what was synced", &mounted.path().join("linux"), &expected);
        let flushes = counter(&cli, "flushes");
        let name = format!("linux/round-{round}");
        let mut file = File::create(mounted.path().join(&name)).expect("a file");
        file.write_all(name.as_bytes()).expect("room");
        file.sync_all().expect("durable");
        assert!(counter(&cli, "flushes") > flushes, "fsync is a flush of the pool");
        expected.insert(format!("round-{round}").into(), name.into_bytes());
        // Killed with files open, the device mounted, and writes that nobody has synced.
        fs::write(mounted.path().join("unsynced"), Noise::new(round).bytes(1 << 20)).expect("room");
        system.kill();
        assert!(
            file.sync_all().is_err() || file.write_all(b"x").is_err() || file.sync_all().is_err()
        );
        drop(file);
        system.spawn();
        assert_eq!(devices(&cli).len(), 0, "a loop device does not outlive its daemon");
        let fresh = attach(&cli, "db");
        assert_ne!(fresh, device, "the old one is still mounted");
        detach(&cli, "db");
        mounted.unmount();
        let gone = !Path::new(&format!("/sys/block/{}/loop", &device[5..])).exists();
        assert!(gone, "the old device goes when it is unmounted");
    }
    system.check();
    system.stop();
    let fuse = fs::read_to_string("/proc/self/mountinfo").expect("a table");
    assert!(!fuse.contains(text(system.path())), "no mount is left:\n{fuse}");
}

#[test]
fn an_orderly_end_waits_for_what_is_in_use() {
    if !ready(&["mkfs.ext4"]) {
        return;
    }
    let mut system = System::start("256MiB");
    let cli = system.cli();
    for name in ["idle", "used"] {
        cli.run(&["volume", "create", name, "--size", "64MiB"]);
    }
    let (idle, used) = (attach(&cli, "idle"), attach(&cli, "used"));
    run("mkfs.ext4", &["-q", &used]);
    let mounted = Mounted::new(&used, &system.path().join("mnt"));
    let pid = Pid::from_raw(i32::try_from(system.pid()).expect("a pid")).expect("a pid");
    kill_process(pid, Signal::TERM).expect("a child");
    let since = Instant::now();
    while Path::new(&format!("/sys/block/{}/loop", &idle[5..])).exists() {
        assert!(since.elapsed() < Duration::from_secs(5), "the unused device goes at once");
        std::thread::sleep(Duration::from_millis(10));
    }
    let named = format!("{used} (volume used)");
    while !system.log().contains(&named) {
        assert!(since.elapsed() < Duration::from_secs(5), "it says who is waited for");
        std::thread::sleep(Duration::from_millis(10));
    }
    // What is in use still works.
    let expected = copy_tree(mounted.path());
    mounted.unmount();
    system.stop();
    system.spawn();
    let mounted = Mounted::new(&attach(&cli, "used"), &system.path().join("mnt"));
    assert_same("after the end", &mounted.path().join("linux"), &expected);
    mounted.unmount();
    detach(&cli, "used");
}

#[test]
fn a_full_pool_and_a_read_only_device_say_so() {
    if !ready(&["blockdev"]) {
        return;
    }
    let system = System::start("64MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "big", "--size", "256MiB"]);
    let device = attach(&cli, "big");
    let file = direct(&device);
    let (memory, data) = aligned(1 << 20, |bytes| bytes.fill(7));
    let refused = (0..256).find_map(|at| file.write_all_at(&memory[data.clone()], at * MIB).err());
    let refused = refused.expect("the pool is smaller than the volume");
    assert_eq!(refused.raw_os_error(), Some(28), "ENOSPC: {refused}");
    // Overwrites go on, in pieces that the reserve of so small a pool has room for.
    file.write_all_at(&memory[data][..65536], 0).expect("an overwrite");
    file.sync_all().expect("a flush");
    drop(file);
    detach(&cli, "big");

    cli.run(&["snapshot", "big", "frozen"]);
    let device = attach(&cli, "frozen");
    assert_eq!(run("blockdev", &["--getro", &device]).trim(), "1");
    let written = File::options().write(true).open(&device).and_then(|mut file| {
        file.write_all(&[1; 4096])?;
        file.sync_all()
    });
    assert!(written.is_err(), "{device} is read-only");
    let mut bytes = vec![0; 8192];
    File::open(&device).and_then(|mut file| file.read_exact(&mut bytes)).expect("readable");
    assert!(bytes.iter().all(|byte| *byte == 7));
    detach(&cli, "frozen");
    let arguments = ["volume", "attach", "frozen", "--kind", "loop", "--sector-bytes", "4096"];
    let answer = cli.json(&arguments);
    let device = answer["device"].as_str().expect("a device");
    assert_eq!(sysfs(device, "queue/logical_block_size"), "4096");
    assert_eq!(answer["read_only"], true);
    detach(&cli, "frozen");
}

#[test]
fn a_kind_can_be_forced() {
    if !ready(&[]) {
        return;
    }
    let system = System::with("128MiB", "[devices]\nkind = \"loop\"\n");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "16MiB"]);
    let answer = cli.json(&["volume", "attach", "db"]);
    assert_eq!(
        (&answer["kind"], answer["passed_over"].as_array()),
        (&"loop".into(), Some(&vec![]))
    );
    detach(&cli, "db");
    let refused = cli.refused(&["volume", "attach", "db", "--kind", "nbd"]);
    assert_eq!(refused["kind"], "unsupported");
    assert!(refused["error"].as_str().expect("text").contains("only loop"), "{refused}");
}

#[test]
fn fio_finds_what_it_has_written() {
    if !ready(&["fio"]) {
        return;
    }
    let system = System::start("512MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "96MiB"]);
    let device = attach(&cli, "db");
    // Writes that overlap have an order only if one waits for the other; fio sees to that. So each
    // block is written in part again and again, beside others that are under way.
    for sizes in ["--bs=4k", "--bsrange=4k-128k", "--bs=512"] {
        let filename = format!("--filename={device}");
        let fixed = [
            "--name=verify",
            "--rw=randwrite",
            "--blockalign=512",
            "--ioengine=libaio",
            "--direct=1",
            "--iodepth=32",
            "--serialize_overlap=1",
            if sizes == "--bs=512" { "--size=4m" } else { "--size=32m" },
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--fsync=200",
        ];
        let done = output("fio", &[&fixed[..], &[filename.as_str(), sizes]].concat());
        let text = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success() && text.contains("err= 0"), "{sizes}:\n{text}");
    }
    detach(&cli, "db");
    system.check();
    assert_eq!(counter(&cli, "checksum_errors"), 0);
}

/// The commands of "Look into a snapshot" in docs/OPERATIONS.md.
#[test]
fn a_snapshot_is_looked_into() {
    if !ready(&["mkfs.ext4", "mkfs.xfs", "fsfreeze"]) {
        return;
    }
    let system = System::start("1GiB");
    let cli = system.cli();
    for (kind, look) in [("ext4", "ro,noload"), ("xfs", "ro,norecovery,nouuid")] {
        cli.run(&["volume", "create", kind, "--size", "320MiB"]);
        let device = attach(&cli, kind);
        run(&format!("mkfs.{kind}"), &["-q", &device]);
        let live = Mounted::new(&device, &system.path().join(kind));
        let place = text(live.path());
        fs::write(live.path().join("old"), kind).expect("room");
        // Freezing brings it from the log to its place; what follows is in the log alone.
        for step in ["--freeze", "--unfreeze"] {
            run("fsfreeze", &[step, place]);
        }
        fs::write(live.path().join("new"), kind).expect("room");
        run("sync", &["-f", place]);
        let (snapshot, clone) = (format!("{kind}-snapshot"), format!("{kind}-clone"));
        cli.run(&["snapshot", kind, &snapshot]);
        let device = attach(&cli, &snapshot);
        let place = system.path().join(&snapshot);
        fs::create_dir(&place).expect("a directory");
        let plain = output("mount", &["-o", "ro", &device, text(&place)]);
        assert!(!plain.status.success(), "{kind}: the log would have to be replayed");
        let mounted = Mounted::with(look, &device, &place);
        assert_eq!(fs::read_to_string(place.join("old")).expect("a file"), kind);
        mounted.unmount();
        // A clone replays its log; XFS refuses a second file system of one UUID.
        cli.run(&["clone", &snapshot, &clone]);
        let device = attach(&cli, &clone);
        let options = if kind == "xfs" { "nouuid" } else { "defaults" };
        let mounted = Mounted::with(options, &device, &place);
        assert_eq!(fs::read_to_string(place.join("new")).expect("a file"), kind);
        mounted.unmount();
        live.unmount();
        cli.run(&["volume", "detach", kind, &snapshot, &clone]);
    }
}

#[test]
fn partitions_of_a_volume_become_devices() {
    if !ready(&["partx", "mkfs.ext4"]) {
        return;
    }
    let system = System::start("128MiB");
    let cli = system.cli();
    // One partition of 32 MiB behind the first MiB.
    let mut disk = vec![0; 64 << 20];
    disk[450] = 0x83;
    disk[454..458].copy_from_slice(&2048_u32.to_le_bytes());
    disk[458..462].copy_from_slice(&(64_u32 << 10).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xAA]);
    let image = system.path().join("disk");
    fs::write(&image, disk).expect("a file");
    cli.run(&["volume", "import", "disk", text(&image)]);
    let device = attach(&cli, "disk");
    run("partx", &["-a", &device]);
    let part = format!("{device}p1");
    run("mkfs.ext4", &["-q", &part]);
    let mounted = Mounted::new(&part, &system.path().join("mnt"));
    assert_eq!(cli.refused(&["volume", "detach", "disk"])["kind"], "busy");
    mounted.unmount();
    run("partx", &["-d", &device]);
    detach(&cli, "disk");
    assert!(!Path::new(&part).exists());
    assert!(mapped(&cli, "disk") > 0);
}

#[test]
fn many_come_and_go_at_once() {
    if !ready(&[]) {
        return;
    }
    let mut system = System::start("128MiB");
    let cli = system.cli();
    let names: Vec<String> = (0..24).map(|number| format!("v{number}")).collect();
    for name in &names {
        cli.run(&["volume", "create", name, "--size", "1MiB"]);
    }
    for _ in 0..2 {
        std::thread::scope(|scope| {
            for name in &names {
                scope.spawn(|| {
                    let device = attach(&cli, name);
                    let (memory, data) =
                        aligned(4096, |bytes| bytes[..name.len()].copy_from_slice(name.as_bytes()));
                    let file = direct(&device);
                    file.write_all_at(&memory[data], 0).expect("room");
                });
            }
        });
        assert_eq!(devices(&cli).len(), names.len());
        std::thread::scope(|scope| {
            for name in &names {
                scope.spawn(|| detach(&cli, name));
            }
        });
    }
    for name in &names {
        let bytes = cli.output(&["volume", "export", name, "-"]).stdout;
        assert!(bytes.starts_with(name.as_bytes()), "{name} has its own bytes");
    }
    system.stop();
}
