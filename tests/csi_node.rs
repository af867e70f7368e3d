//! The service Node where it is refused something, repeated, or interrupted: raw devices, read-only
//! volumes, hostile paths and flags, devices that are not what they should be, volumes that must
//! not be formatted, and everything after a restart.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::Path;

use pando_csi::proto::csi::VolumeUsage;
use pando_csi::proto::csi::volume_capability::access_mode::Mode;
use pando_csi::proto::csi::volume_usage::Unit;
use pando_tests::cli::number;
use pando_tests::csi::{
    Mounted, block, can_mount, from_volume, mount_of, mount_with, mounted_below, request,
};
use pando_tests::tools::{output, present, run, text};
use pando_tests::{Cli, Csi, Nbd, System};
use tonic::{Code, Status};

const MIB: i64 = 1 << 20;
const SIZE: i64 = 64 * MIB;

/// A daemon and an adapter, if volumes can be mounted here.
fn start() -> Option<(System, Csi)> {
    if !can_mount() || !present(&["mkfs.ext4", "mkfs.xfs", "blkid", "losetup"]) {
        return None;
    }
    let system = System::start("1GiB");
    let csi = Csi::start(&system);
    Some((system, csi))
}

fn create(csi: &Csi, name: &str, bytes: i64) -> String {
    csi.create(request(name, bytes, &mount_of("ext4"))).expect("a volume").volume_id
}

fn create_block(csi: &Csi, name: &str) -> String {
    csi.create(request(name, SIZE, &block())).expect("a volume").volume_id
}

fn code<T: std::fmt::Debug>(answer: Result<T, Status>) -> Code {
    answer.expect_err("it is refused").code()
}

fn write_durably(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).expect("a file");
    file.write_all(bytes).expect("space");
    file.sync_all().expect("what was written reaches the volume");
}

/// The pool's name of a volume that CSI calls `name`.
fn pool_name(name: &str) -> String {
    format!("csi-vol-{name}")
}

fn label(cli: &Cli, name: &str, label: &str) {
    cli.run(&["volume", "set", &pool_name(name), "--label", label]);
}

#[test]
fn raw_devices_are_published_and_grow() {
    let Some((system, csi)) = start() else { return };
    let id = create_block(&csi, "raw");
    let raw = Mounted::up(&csi, &id, "raw", &block());
    let found = std::fs::metadata(&raw.target).expect("a target");
    assert!(found.file_type().is_block_device());
    let mut device = File::options().read(true).write(true).open(&raw.target).expect("a device");
    device.write_all(&[5; 1 << 20]).expect("space");
    device.sync_all().expect("what was written reaches the volume");

    // What is used is what the pool keeps.
    let usage = csi.stats(&id, &raw.target).expect("a volume has stats");
    let expected =
        VolumeUsage { available: SIZE - MIB, total: SIZE, used: MIB, unit: Unit::Bytes.into() };
    assert_eq!(usage, [expected]);

    // Growth is seen by who has it open.
    assert_eq!(csi.expand(&id, &raw.target, 2 * SIZE).expect("growth"), 2 * SIZE);
    assert_eq!(device.seek(SeekFrom::End(0)).expect("a size"), 2 * SIZE.cast_unsigned());
    assert_eq!(csi.expand_node(&id, &raw.target, SIZE).expect("it is larger"), 2 * SIZE);
    assert_eq!(csi.expand_node(&id, &raw.target, 3 * SIZE).expect("growth"), 3 * SIZE);
    assert_eq!(device.seek(SeekFrom::End(0)).expect("a size"), 3 * SIZE.cast_unsigned());
    drop(device);

    // The same again is fine; other things at the target are not.
    raw.publish(&block()).expect("the same again");
    let answer = csi.publish(&id, (&raw.staging, &raw.target), &block(), true);
    assert_eq!(code(answer), Code::AlreadyExists);
    let second = raw.target.with_file_name("second");
    csi.publish(&id, (&raw.staging, &second), &block(), false).expect("a second pod of the node");
    assert_eq!(code(csi.unstage(&id, &raw.staging)), Code::FailedPrecondition, "published");
    csi.unpublish(&id, &second).expect("the volume is unpublished");
    raw.down();
    let volume = system.cli().json(&["volume", "show", &pool_name("raw")]);
    assert_eq!(number(&volume, "/mapped_bytes"), 1 << 20, "nothing is written by staging");
    csi.delete(&id).expect("it is not in use");
}

#[test]
fn each_call_can_be_repeated() {
    let Some((_system, csi)) = start() else { return };
    let id = create(&csi, "again", SIZE);
    let capability = mount_of("ext4");
    let places = Mounted::places(&csi, &id, "again");
    for round in 0..3 {
        for _ in 0..3 {
            csi.stage(&id, &places.staging, &capability).expect("the volume is staged");
        }
        for _ in 0..3 {
            places.publish(&capability).expect("the volume is published");
        }
        let file = places.target.join("file");
        let read = std::fs::read_to_string(&file).unwrap_or_default();
        assert_eq!(read, "x".repeat(round), "formatted once");
        std::fs::write(&file, "x".repeat(round + 1)).expect("a file");
        for _ in 0..3 {
            csi.unpublish(&id, &places.target).expect("the volume is unpublished");
            assert!(!places.target.exists());
        }
        for _ in 0..3 {
            csi.unstage(&id, &places.staging).expect("the volume is unstaged");
        }
    }
    assert_eq!(code(places.publish(&capability)), Code::FailedPrecondition, "not staged");
    // What is not there is unpublished, and a volume that is gone is cleaned up after.
    csi.delete(&id).expect("it is not in use");
    csi.unpublish(&id, &places.target).expect("nothing is there");
    csi.unpublish(&id, Path::new("/nonexistent/directory/target")).expect("nothing is there");
    csi.unstage(&id, &places.staging).expect("nothing is there");
    assert_eq!(code(csi.stage(&id, &places.staging, &capability)), Code::NotFound);
    assert_eq!(code(places.publish(&capability)), Code::NotFound);
    assert_eq!(code(csi.stats(&id, &places.target)), Code::NotFound);
    assert_eq!(code(csi.expand_node(&id, &places.target, SIZE)), Code::NotFound);
}

#[test]
fn read_only_and_single_writer_are_kept() {
    let Some((_system, csi)) = start() else { return };
    let id = create(&csi, "ro", SIZE);
    let writer = mount_of("ext4");
    let mounted = Mounted::up(&csi, &id, "ro", &writer);
    std::fs::write(mounted.target.join("file"), "content").expect("a file");

    // One more target that refuses writes, beside the one that takes them.
    let reader = mounted.target.with_file_name("reader");
    csi.publish(&id, (&mounted.staging, &reader), &writer, true).expect("a reader");
    csi.publish(&id, (&mounted.staging, &reader), &writer, true).expect("the same again");
    assert_eq!(std::fs::read(reader.join("file")).expect("a file"), b"content");
    let refused = std::fs::write(reader.join("file"), "other").expect_err("read-only");
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let answer = csi.publish(&id, (&mounted.staging, &reader), &writer, false);
    assert_eq!(code(answer), Code::AlreadyExists);
    csi.unpublish(&id, &reader).expect("the volume is unpublished");

    // A single writer is at one target.
    let single = mount_with("ext4", &[], Mode::SingleNodeSingleWriter);
    mounted.publish(&single).expect("the same target");
    let answer = csi.publish(&id, (&mounted.staging, &reader), &single, false);
    assert_eq!(code(answer), Code::FailedPrecondition);
    assert!(!reader.exists(), "nothing is left of what was refused");
    let several = mount_with("ext4", &[], Mode::SingleNodeMultiWriter);
    csi.publish(&id, (&mounted.staging, &reader), &several, false).expect("one of several");
    csi.unpublish(&id, &reader).expect("the volume is unpublished");
    let elsewhere = mount_with("ext4", &[], Mode::MultiNodeMultiWriter);
    let answer = csi.publish(&id, (&mounted.staging, &reader), &elsewhere, false);
    assert_eq!(code(answer), Code::FailedPrecondition);
    // Staged for writing, so not for reading only.
    let readers = mount_with("ext4", &[], Mode::SingleNodeReaderOnly);
    assert_eq!(code(csi.stage(&id, &mounted.staging, &readers)), Code::AlreadyExists);
    mounted.down();

    let mounted = Mounted::up(&csi, &id, "ro", &readers);
    assert!(std::fs::write(mounted.target.join("file"), "other").is_err());
    assert!(std::fs::write(mounted.staging.join("file"), "other").is_err());
    assert_eq!(code(csi.expand_node(&id, &mounted.target, SIZE)), Code::FailedPrecondition);
    mounted.down();
}

#[test]
fn stats_are_of_the_volume_and_of_no_other_path() {
    let Some((system, csi)) = start() else { return };
    let id = create(&csi, "stats", SIZE);
    let mounted = Mounted::up(&csi, &id, "stats", &mount_of("ext4"));
    let before = csi.stats(&id, &mounted.target).expect("a volume has stats");
    assert_eq!(
        before.iter().map(VolumeUsage::unit).collect::<Vec<_>>(),
        [Unit::Bytes, Unit::Inodes]
    );
    assert!(before[0].total > SIZE * 8 / 10 && before[0].total <= SIZE, "{before:?}");
    write_durably(&mounted.target.join("file"), &[1; 8 << 20]);
    let after = csi.stats(&id, &mounted.target).expect("a volume has stats");
    assert_eq!(after[0].used - before[0].used, 8 * MIB);
    assert_eq!(before[0].available - after[0].available, 8 * MIB);
    assert_eq!(after[1].used - before[1].used, 1);
    assert_eq!(csi.stats(&id, &mounted.staging).expect("the same").len(), 2);
    let inside = mounted.target.join("lost+found");
    let outside = mounted.target.parent().expect("a parent");
    let link = system.path().join("link");
    symlink(&mounted.target, &link).expect("a link");
    for path in [&*inside, outside, &link, Path::new("/"), Path::new("some/path")] {
        assert_eq!(code(csi.stats(&id, path)), Code::NotFound, "{}", path.display());
        assert_eq!(code(csi.expand_node(&id, path, SIZE)), Code::NotFound, "{}", path.display());
    }
    let other = create(&csi, "other", SIZE);
    assert_eq!(code(csi.stats(&other, &mounted.target)), Code::NotFound, "another volume's");
    let beside = Mounted::up(&csi, &other, "other", &mount_of("ext4"));
    assert_eq!(code(csi.stats(&other, &mounted.target)), Code::NotFound, "another volume's");
    assert_eq!(code(csi.expand_node(&other, &mounted.target, SIZE)), Code::NotFound);
    assert_eq!(csi.stats(&other, &beside.target).expect("its own").len(), 2);
    beside.down();
    mounted.down();
}

#[test]
fn hostile_paths_lead_nowhere() {
    let Some((system, csi)) = start() else { return };
    let id = create(&csi, "paths", SIZE);
    let capability = mount_of("ext4");
    let mounted = Mounted::up(&csi, &id, "paths", &capability);
    let victim = system.path().join("victim");
    std::fs::create_dir(&victim).expect("a directory");
    std::fs::write(victim.join("file"), "content").expect("a file");
    let link = system.path().join("link");
    symlink(&victim, &link).expect("a link");
    let directory = mounted.target.parent().expect("a parent").to_owned();
    let cases = [
        (link.clone(), Code::FailedPrecondition),
        (link.join("target"), Code::FailedPrecondition),
        (victim.clone(), Code::FailedPrecondition),
        (victim.join("file"), Code::FailedPrecondition),
        (victim.join("file/target"), Code::FailedPrecondition),
        (system.path().join("none/target"), Code::FailedPrecondition),
        (directory.join("../target"), Code::InvalidArgument),
        ("relative/target".into(), Code::InvalidArgument),
        ("/".into(), Code::InvalidArgument),
    ];
    for (target, expected) in cases {
        let answer = csi.publish(&id, (&mounted.staging, &target), &capability, false);
        assert_eq!(code(answer), expected, "{}", target.display());
    }
    for path in [&link, &link.join("target")] {
        assert_eq!(code(csi.unpublish(&id, path)), Code::FailedPrecondition, "{}", path.display());
        assert_eq!(code(csi.stage(&id, path, &capability)), Code::FailedPrecondition);
    }
    // What is mounted there is not the volume's.
    let other = create(&csi, "other", SIZE);
    assert_eq!(code(csi.unpublish(&other, &mounted.target)), Code::FailedPrecondition);
    assert_eq!(code(csi.unstage(&other, &mounted.staging)), Code::FailedPrecondition);
    assert_eq!(code(csi.stage(&other, &mounted.staging, &capability)), Code::FailedPrecondition);
    let answer = csi.publish(&other, (&mounted.staging, &mounted.target), &capability, false);
    assert_eq!(code(answer), Code::FailedPrecondition);
    // An id is no path.
    for id in ["../../etc", "/etc/passwd", "a/b", "node-1..7", ""] {
        let answer = csi.stage(id, &mounted.staging, &capability);
        let expected = if id.is_empty() { Code::InvalidArgument } else { Code::NotFound };
        assert_eq!(code(answer), expected, "{id:?}");
    }
    assert_eq!(std::fs::read(victim.join("file")).expect("a file"), b"content");
    std::fs::write(mounted.target.join("file"), "content").expect("still mounted");
    assert_eq!(mounted_below(&victim), Vec::<std::path::PathBuf>::new());
    mounted.down();
}

#[test]
fn flags_are_applied_or_refused() {
    let Some((_system, csi)) = start() else { return };
    let id = create(&csi, "flags", SIZE);
    let places = Mounted::places(&csi, &id, "flags");
    for flag in ["bind", "remount", "journal_path=/dev/vda", "noload", "x,ro", "errors=panic"] {
        let capability = mount_with("ext4", &[flag], Mode::SingleNodeWriter);
        assert_eq!(
            code(csi.stage(&id, &places.staging, &capability)),
            Code::InvalidArgument,
            "{flag}"
        );
    }
    let options =
        |path: &Path| run("findmnt", &["-n", "-o", "OPTIONS", "--mountpoint", text(path)]);
    let mounted = Mounted::up(&csi, &id, "flags", &mount_of("ext4"));
    for path in [&mounted.staging, &mounted.target] {
        let found = options(path);
        assert!(found.contains("nosuid") && found.contains("nodev"), "{found}");
    }
    mounted.down();
    let flags = ["noatime,discard", "suid", "commit=30"];
    let capability = mount_with("ext4", &flags, Mode::SingleNodeWriter);
    let mounted = Mounted::up(&csi, &id, "flags", &capability);
    let found = options(&mounted.target);
    for flag in ["noatime", "discard", "commit=30", "nodev"] {
        assert!(found.contains(flag), "{flag}: {found}");
    }
    assert!(!found.contains("nosuid"), "{found}");
    // Deleted files give their space back to the pool.
    mounted.down();
}

#[test]
fn nothing_is_formatted_that_may_hold_something() {
    let Some((system, csi)) = start() else { return };
    let cli = system.cli();
    let capability = mount_of("ext4");
    let refused = |id: &str, name: &str| {
        let places = Mounted::places(&csi, id, name);
        let answer = csi.stage(id, &places.staging, &capability).expect_err("not formatted");
        assert_eq!(answer.code(), Code::FailedPrecondition, "{answer}");
        assert!(answer.message().contains("not formatted"), "{answer}");
        csi.unstage(id, &places.staging).expect("nothing is staged");
    };
    // Data that no probe knows.
    let data = create(&csi, "data", SIZE);
    let mut nbd = Nbd::open(&cli.serve(&pool_name("data")), &pool_name("data")).expect("an export");
    nbd.write(20 << 20, &[9; 4096]);
    nbd.flush();
    nbd.close();
    cli.run(&["volume", "serve", "--stop", &pool_name("data")]);
    refused(&data, "data");
    let volume = cli.json(&["volume", "show", &pool_name("data")]);
    assert_eq!(number(&volume, "/mapped_bytes"), 4096, "nothing was written");

    // A clone, even of a volume that is empty.
    let empty = create(&csi, "empty", SIZE);
    let mut wanted = request("clone", SIZE, &capability);
    wanted.volume_content_source = from_volume(&empty);
    let clone = csi.create(wanted).expect("a clone").volume_id;
    refused(&clone, "clone");

    // Another file system.
    let xfs = csi.create(request("xfs", 320 * MIB, &mount_of("xfs"))).expect("a volume").volume_id;
    let mounted = Mounted::up(&csi, &xfs, "xfs", &mount_of("xfs"));
    std::fs::write(mounted.target.join("file"), "content").expect("a file");
    mounted.down();
    refused(&xfs, "xfs");
    let mounted = Mounted::up(&csi, &xfs, "xfs", &mount_of("xfs"));
    assert_eq!(std::fs::read(mounted.target.join("file")).expect("a file"), b"content");
    mounted.down();

    // What we were formatting ourselves when we were interrupted is formatted again.
    label(&cli, "data", "csi.pando.dev/formatting=true");
    let mounted = Mounted::up(&csi, &data, "data", &capability);
    mounted.down();
    let volume = cli.json(&["volume", "show", &pool_name("data")]);
    assert!(!volume["labels"].to_string().contains("formatting"), "{volume}");
}

#[test]
fn a_device_that_is_another_is_refused() {
    let Some((system, csi)) = start() else { return };
    let id = create_block(&csi, "wrong");
    let places = Mounted::places(&csi, &id, "wrong");
    csi.stage(&id, &places.staging, &block()).expect("the volume is staged");
    let attached = system.cli().json(&["volume", "attachments"]);
    let device = attached.pointer("/0/device").and_then(|device| device.as_str());
    let device = device.unwrap_or_else(|| panic!("no device: {attached}")).to_owned();
    // The number of the device is taken by somebody else, behind the daemon's back.
    let foreign = system.path().join("foreign");
    File::create(&foreign).expect("a file").set_len(1 << 20).expect("space");
    run("losetup", &["--detach", &device]);
    run("losetup", &[&device, text(&foreign)]);
    let answer = places.publish(&block()).expect_err("another device");
    assert_eq!(answer.code(), Code::Internal, "{answer}");
    assert!(answer.message().contains("the kernel says it is \"foreign\""), "{answer}");
    assert_eq!(code(csi.stats(&id, &places.target)), Code::Internal);
    assert!(!places.target.exists());
    run("losetup", &["--detach", &device]);
}

/// Everything that a volume went through, and what is on it afterwards.
fn restart(kind: &'static str, bytes: i64, mounts_survive: bool) {
    let Some((mut system, mut csi)) = start() else { return };
    let capability = mount_of(kind);
    let id = csi.create(request("pod", bytes, &capability)).expect("a volume").volume_id;
    let raw = create_block(&csi, "raw");
    {
        let mounted = Mounted::up(&csi, &id, "pod", &capability);
        write_durably(&mounted.target.join("file"), b"content");
        let raw = Mounted::up(&csi, &raw, "raw", &block());
        let device = File::options().write(true).open(&raw.target).expect("a device");
        (&device).write_all(&[3; 4096]).expect("space");
        device.sync_all().expect("what was written reaches the volume");
    }
    csi.kill();
    system.kill();
    if !mounts_survive {
        for point in mounted_below(system.path()) {
            output("umount", &["--lazy", text(&point)]);
        }
    }
    system.spawn();
    csi.spawn();
    for _ in 0..2 {
        let mounted = Mounted::up(&csi, &id, "pod", &capability);
        assert_eq!(std::fs::read(mounted.target.join("file")).expect("a file"), b"content");
        write_durably(&mounted.target.join("new"), b"content");
        let raw = Mounted::up(&csi, &raw, "raw", &block());
        let mut read = [0; 4096];
        File::open(&raw.target).and_then(|mut d| d.read_exact(&mut read)).expect("a device");
        assert_eq!(read, [3; 4096]);
        raw.down();
        mounted.down();
    }
    assert_eq!(mounted_below(system.path()), Vec::<std::path::PathBuf>::new());
    for id in [id, raw] {
        csi.delete(&id).expect("it is not in use");
    }
    system.check();
}

#[test]
fn dead_mounts_give_way_when_the_daemon_was_killed() {
    restart("ext4", SIZE, true);
    restart("xfs", 320 * MIB, true);
}

/// kubelet keeps a volume staged for a pod that is there before the last one has gone, and asks only
/// to publish it.
#[test]
fn a_pod_that_follows_at_once_is_published_on_a_new_device() {
    let Some((mut system, csi)) = start() else { return };
    let capability = mount_of("ext4");
    let id = csi.create(request("pod", SIZE, &capability)).expect("a volume").volume_id;
    let mounted = Mounted::up(&csi, &id, "pod", &capability);
    write_durably(&mounted.target.join("file"), b"content");
    system.kill();
    system.spawn();
    csi.unpublish(&id, &mounted.target).expect("the last pod goes");
    mounted.publish(&capability).expect("the next one comes");
    assert_eq!(std::fs::read(mounted.target.join("file")).expect("a file"), b"content");
    write_durably(&mounted.target.join("new"), b"content");
    mounted.publish(&capability).expect("once more");
    mounted.down();
    assert_eq!(mounted_below(system.path()), Vec::<std::path::PathBuf>::new());
    csi.delete(&id).expect("it is not in use");
}

#[test]
fn everything_is_staged_again_after_a_reboot() {
    restart("ext4", SIZE, false);
}
