//! The service Node where it is refused something, repeated, or interrupted: raw devices, read-only
//! volumes, hostile paths and flags, volumes that must not be formatted, and everything after a
//! restart.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};

use pando_csi::proto::csi::volume_capability::access_mode::Mode;
use pando_csi::proto::csi::volume_usage::Unit;
use pando_csi::proto::csi::{VolumeCapability, VolumeUsage};
use tonic::{Code, Status};

use super::{Device, write_durably};
use crate::cli::number;
use crate::csi::{Mounted, block, from_volume, mount_of, mount_with, mounted_below, request_of};
use crate::tools::{output, present, run, text};
use crate::{Cli, Csi, Nbd, System};

const MIB: i64 = 1 << 20;
pub(super) const SIZE: i64 = 64 * MIB;

/// A daemon and an adapter, if volumes can be mounted here.
pub(super) fn start(device: Device) -> Option<(System, Csi)> {
    if !device.possible() || !present(&["mkfs.ext4", "mkfs.xfs", "blkid"]) {
        return None;
    }
    let system = System::start("1GiB");
    let csi = Csi::start(&system);
    Some((system, csi))
}

pub(super) fn create(csi: &Csi, device: Device, name: &str) -> String {
    let wanted = request_of(device.name(), name, SIZE, &mount_of("ext4"));
    csi.create(wanted).expect("a volume").volume_id
}

fn create_block(csi: &Csi, device: Device, name: &str) -> String {
    let wanted = request_of(device.name(), name, SIZE, &block());
    csi.create(wanted).expect("a volume").volume_id
}

pub(super) fn code<T: std::fmt::Debug>(answer: Result<T, Status>) -> Code {
    answer.expect_err("it is refused").code()
}

/// The pool's name of a volume that CSI calls `name`.
pub(super) fn pool_name(name: &str) -> String {
    format!("csi-vol-{name}")
}

pub(super) fn label(cli: &Cli, name: &str, label: &str) {
    cli.run(&["volume", "set", &pool_name(name), "--label", label]);
}

/// Raw devices are published, and grow.
///
/// # Panics
/// Anything is not as it should be.
pub fn raw_devices_are_published_and_grow(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    let id = create_block(&csi, device, "raw");
    let raw = Mounted::up(&csi, &id, "raw", &block());
    let found = std::fs::metadata(&raw.target).expect("a target");
    assert!(found.file_type().is_block_device());
    let mut opened = File::options().read(true).write(true).open(&raw.target).expect("a device");
    opened.write_all(&[5; 1 << 20]).expect("space");
    opened.sync_all().expect("what was written reaches the volume");

    // What is used is what the pool keeps.
    let usage = csi.stats(&id, &raw.target).expect("a volume has stats");
    let expected =
        VolumeUsage { available: SIZE - MIB, total: SIZE, used: MIB, unit: Unit::Bytes.into() };
    assert_eq!(usage, [expected]);

    let raw = grow_raw(&csi, device, raw, opened);

    // A clone of it has what it has.
    let mut wanted = request_of(device.name(), "copy", 3 * SIZE, &block());
    wanted.volume_content_source = from_volume(&id);
    let copy = csi.create(wanted).expect("a clone").volume_id;
    let copied = Mounted::up(&csi, &copy, "copy", &block());
    let mut bytes = vec![0; 2 << 20];
    File::open(&copied.target).and_then(|mut d| d.read_exact(&mut bytes)).expect("a device");
    assert!(bytes[..1 << 20].iter().all(|byte| *byte == 5));
    assert!(bytes[1 << 20..].iter().all(|byte| *byte == 0));
    copied.down();
    csi.delete(&copy).expect("it is not in use");

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

/// Makes a raw volume that somebody has open three times as large.
fn grow_raw<'a>(csi: &'a Csi, device: Device, raw: Mounted<'a>, mut opened: File) -> Mounted<'a> {
    let id = raw.id.clone();
    let mut end = || opened.seek(SeekFrom::End(0)).expect("a size");
    if device.grows_in_use() {
        assert_eq!(csi.expand(&id, &raw.target, 2 * SIZE).expect("growth"), 2 * SIZE);
        assert_eq!(end(), 2 * SIZE.cast_unsigned());
        assert_eq!(csi.expand_node(&id, &raw.target, SIZE).expect("it is larger"), 2 * SIZE);
        assert_eq!(csi.expand_node(&id, &raw.target, 3 * SIZE).expect("growth"), 3 * SIZE);
        assert_eq!(end(), 3 * SIZE.cast_unsigned());
        return raw;
    }
    // The device cannot grow, so the volume does not, and that does not change by asking again.
    for _ in 0..2 {
        assert_eq!(code(csi.expand(&id, &raw.target, 3 * SIZE)), Code::FailedPrecondition);
        let answer = csi.expand_node(&id, &raw.target, 3 * SIZE).expect_err("it is attached");
        assert_eq!(answer.code(), Code::FailedPrecondition, "{answer}");
    }
    assert_eq!(end(), SIZE.cast_unsigned());
    drop(opened);
    raw.down();
    let answer = csi.expand(&id, Path::new("/nonexistent"), 3 * SIZE);
    assert_eq!(code(answer), Code::NotFound, "the volume grows, and nothing else is there");
    let raw = Mounted::up(csi, &id, "raw", &block());
    let mut opened = File::open(&raw.target).expect("a device");
    assert_eq!(opened.seek(SeekFrom::End(0)).expect("a size"), 3 * SIZE.cast_unsigned());
    assert_eq!(csi.expand(&id, &raw.target, 3 * SIZE).expect("nothing to do"), 3 * SIZE);
    raw
}

/// Each call can be repeated.
///
/// # Panics
/// Anything is not as it should be.
pub fn each_call_can_be_repeated(device: Device) {
    let Some((_system, csi)) = start(device) else { return };
    let id = create(&csi, device, "again");
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

/// Read-only targets and single writers are kept.
///
/// # Panics
/// Anything is not as it should be.
pub fn read_only_and_single_writer_are_kept(device: Device) {
    let Some((_system, csi)) = start(device) else { return };
    let id = create(&csi, device, "ro");
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

/// Stats are of the volume, and of no other path.
///
/// # Panics
/// Anything is not as it should be.
pub fn stats_are_of_the_volume_and_of_no_other_path(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    let id = create(&csi, device, "stats");
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
    let other = create(&csi, device, "other");
    assert_eq!(code(csi.stats(&other, &mounted.target)), Code::NotFound, "another volume's");
    let beside = Mounted::up(&csi, &other, "other", &mount_of("ext4"));
    assert_eq!(code(csi.stats(&other, &mounted.target)), Code::NotFound, "another volume's");
    assert_eq!(code(csi.expand_node(&other, &mounted.target, SIZE)), Code::NotFound);
    assert_eq!(csi.stats(&other, &beside.target).expect("its own").len(), 2);
    beside.down();
    mounted.down();
}

/// Hostile paths lead nowhere.
///
/// # Panics
/// Anything is not as it should be.
pub fn hostile_paths_lead_nowhere(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    let id = create(&csi, device, "paths");
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
    let other = create(&csi, device, "other");
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

/// Flags of a mount are applied, or refused.
///
/// # Panics
/// Anything is not as it should be.
pub fn flags_are_applied_or_refused(device: Device) {
    let Some((_system, csi)) = start(device) else { return };
    let id = create(&csi, device, "flags");
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
    // The label of a pod, as kubelet adds it; a kernel without SELinux is not given it.
    let label = "context=\"system_u:object_r:container_file_t:s0:c1,c2\"";
    let flags = ["noatime,discard", "suid", "commit=30", label];
    let capability = mount_with("ext4", &flags, Mode::SingleNodeWriter);
    let mounted = Mounted::up(&csi, &id, "flags", &capability);
    let found = options(&mounted.target);
    for flag in ["noatime", "discard", "commit=30", "nodev"] {
        assert!(found.contains(flag), "{flag}: {found}");
    }
    assert!(!found.contains("nosuid"), "{found}");
    mounted.down();
    let capability = mount_with("ext4", &["context=\"system_u:object_r"], Mode::SingleNodeWriter);
    let refused = csi.stage(&id, &places.staging, &capability).expect_err("half a label");
    assert!(refused.message().contains("quotation mark"), "{refused}");
    nouuid_is_taken(&csi, device);
}

fn nouuid_is_taken(csi: &Csi, device: Device) {
    let capability = mount_with("xfs", &["nouuid,noatime"], Mode::SingleNodeWriter);
    let wanted = request_of(device.name(), "nouuid", 320 * MIB, &capability);
    let id = csi.create(wanted).expect("a volume").volume_id;
    Mounted::up(csi, &id, "nouuid", &capability).down();
}

/// Writes a block that no probe knows.
pub(super) fn write_unknown(cli: &Cli, name: &str) {
    let name = pool_name(name);
    let mut nbd = Nbd::open(&cli.serve(&name), &name).expect("an export");
    nbd.write(20 << 20, &[9; 4096]);
    nbd.flush();
    nbd.close();
    cli.run(&["volume", "serve", "--stop", &name]);
}

/// Nothing is formatted that may hold something.
///
/// # Panics
/// Anything is not as it should be.
pub fn nothing_is_formatted_that_may_hold_something(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    let cli = system.cli();
    let capability = mount_of("ext4");
    let refused = |id: &str, name: &str| {
        let places = Mounted::places(&csi, id, name);
        let answer = csi.stage(id, &places.staging, &capability).expect_err("not formatted");
        assert_eq!(answer.code(), Code::FailedPrecondition, "{answer}");
        assert!(answer.message().contains("not formatted"), "{answer}");
    };
    // Data that no probe knows.
    let data = create(&csi, device, "data");
    write_unknown(&cli, "data");
    refused(&data, "data");
    let volume = cli.json(&["volume", "show", &pool_name("data")]);
    assert_eq!(number(&volume, "/mapped_bytes"), 4096, "nothing was written");

    // A clone of it.
    let mut wanted = request_of(device.name(), "clone", SIZE, &capability);
    wanted.volume_content_source = from_volume(&data);
    let clone = csi.create(wanted).expect("a clone").volume_id;
    refused(&clone, "clone");

    // Another file system.
    let xfs = csi
        .create(request_of(device.name(), "xfs", 320 * MIB, &mount_of("xfs")))
        .expect("a volume")
        .volume_id;
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

/// A volume with a file system and a raw one, each with something in it that is durable, staged and
/// published: what is there when a machine or a daemon ends.
struct Staged {
    system: System,
    csi: Csi,
    capability: VolumeCapability,
    ids: [String; 2],
}

impl Staged {
    fn new(device: Device, (kind, bytes): (&str, i64)) -> Option<Self> {
        let (system, csi) = start(device)?;
        let capability = mount_of(kind);
        let wanted = request_of(device.name(), "pod", bytes, &capability);
        let pod = csi.create(wanted).expect("a volume").volume_id;
        let ids = [pod, create_block(&csi, device, "raw")];
        let staged = Self { system, csi, capability, ids };
        let [pod, raw] = staged.up();
        write_durably(&pod.target.join("file"), b"content");
        let opened = File::options().write(true).open(&raw.target).expect("a device");
        (&opened).write_all(&[3; 4096]).expect("space");
        opened.sync_all().expect("what was written reaches the volume");
        Some(staged)
    }

    /// Asks for everything to be staged and published, whether it is or not.
    fn up(&self) -> [Mounted<'_>; 2] {
        let [pod, raw] = &self.ids;
        let pod = Mounted::up(&self.csi, pod, "pod", &self.capability);
        [pod, Mounted::up(&self.csi, raw, "raw", &block())]
    }

    /// What was written is there, and more can be.
    fn check(&self) {
        let [pod, raw] = ["pod", "raw"].map(|name| Mounted::places(&self.csi, "", name).target);
        assert_eq!(std::fs::read(pod.join("file")).expect("a file"), b"content");
        write_durably(&pod.join("new"), b"content");
        let mut read = [0; 4096];
        File::open(raw).and_then(|mut device| device.read_exact(&mut read)).expect("a device");
        assert_eq!(read, [3; 4096]);
    }

    /// Everything can be used, ended and used again, and in the end nothing is left.
    fn end(self) {
        for _ in 0..2 {
            let mounted = self.up();
            self.check();
            mounted.into_iter().for_each(Mounted::down);
        }
        assert_eq!(mounted_below(self.system.path()), Vec::<PathBuf>::new());
        for id in &self.ids {
            self.csi.delete(id).expect("it is not in use");
        }
        let left = self.system.cli().json(&["volume", "attachments"]);
        assert_eq!(left.as_array().map(Vec::len), Some(0), "{left}");
        self.system.check();
    }
}

/// Adapter and daemon are killed while volumes are staged: what outlives the daemon goes on, dead
/// mounts give way.
///
/// # Panics
/// Anything is not as it should be.
pub fn staged_volumes_survive_a_kill(device: Device, file_system: (&str, i64)) {
    let Some(mut staged) = Staged::new(device, file_system) else { return };
    staged.csi.kill();
    staged.system.kill();
    staged.system.spawn();
    staged.csi.spawn();
    if device.outlives_daemon() {
        staged.check();
    }
    staged.end();
}

/// kubelet keeps a volume staged for a pod that is there before the last one has gone, and asks only
/// to publish it: also when its loop device has died with the daemon.
///
/// # Panics
/// Anything is not as it should be.
pub fn a_pod_that_follows_at_once_is_published_on_a_new_device() {
    let Some((mut system, csi)) = start(Device::Loop) else { return };
    let capability = mount_of("ext4");
    let id = create(&csi, Device::Loop, "pod");
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
    assert_eq!(mounted_below(system.path()), Vec::<PathBuf>::new());
    csi.delete(&id).expect("it is not in use");
}

/// After a restart of the machine mounts and devices are gone, the directories of kubelet and the
/// records of devices are there: everything is staged again, and what nobody wants any more is
/// cleaned up.
///
/// # Panics
/// Anything is not as it should be.
pub fn everything_is_staged_again_after_a_reboot(device: Device, file_system: (&str, i64)) {
    let Some(mut staged) = Staged::new(device, file_system) else { return };
    let records = records(&staged.system);
    assert_eq!(records.len(), 2, "each device has a record");
    staged.csi.kill();
    for point in mounted_below(staged.system.path()) {
        output("umount", &["--lazy", text(&point)]);
    }
    if device.outlives_daemon() {
        for name in ["pod", "raw"] {
            staged.system.cli().run(&["volume", "detach", &pool_name(name)]);
        }
    }
    staged.system.kill();
    for (path, content) in &records {
        std::fs::write(path, content).expect("a record");
    }
    let memory = staged.system.path().join("journal");
    std::fs::remove_dir_all(memory).expect("the memory of the journal does not survive");
    staged.system.spawn();
    staged.csi.spawn();
    let left = staged.system.cli().json(&["volume", "attachments"]);
    assert_eq!(left.as_array().map(Vec::len), Some(0), "the devices are gone: {left}");
    for (path, _) in &records {
        assert!(!path.exists(), "{} is of no use", path.display());
    }
    // The pod of one volume was deleted meanwhile.
    let orphan = Mounted::places(&staged.csi, &staged.ids[0], "pod");
    assert!(orphan.target.exists(), "its directory is there");
    orphan.down();
    staged.end();
}

/// What the daemon keeps of its devices.
fn records(system: &System) -> Vec<(PathBuf, Vec<u8>)> {
    let pools = std::fs::read_dir(system.path().join("devices")).expect("a directory");
    let entries = pools.flat_map(|pool| std::fs::read_dir(pool.expect("an entry").path()));
    let paths = entries.flatten().map(|entry| entry.expect("an entry").path());
    let records = paths.filter(|path| path.extension().is_some_and(|e| e == "toml"));
    records.map(|path| (path.clone(), std::fs::read(path).expect("a record"))).collect()
}
