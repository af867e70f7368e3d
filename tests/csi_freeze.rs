//! `freeze`: a copy of a mounted file system under load is clean, or it is an error, also if the
//! adapter, its guard or the daemon is killed meanwhile or the disk is too slow; and nothing is
//! ever left frozen.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pando_csi::proto::csi;
use pando_csi::proto::csi::group_controller_client::GroupControllerClient;
use pando_proto::v1;
use pando_tests::csi::{Mounted, can_mount, from_snapshot, from_volume, mount_of, request};
use pando_tests::data::number;
use pando_tests::noise::Noise;
use pando_tests::tools::{output, present, run, text};
use pando_tests::{Cli, Csi, Data, System};
use tonic::{Code, Status};

const MIB: i64 = 1 << 20;
/// Longest time that a file system may stay frozen in a test.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);
/// Times that adapter or daemon are killed in the middle of a freeze.
const KILLS: u64 = 6;
/// Longest time between the start of a call that freezes and the kill.
const KILL_DELAY_US_MAX: u64 = 40_000;
/// Times that a call is repeated before a test gives up.
const TRIES_MAX: usize = 200;
const TOOLS: [&str; 7] =
    ["mkfs.ext4", "e2fsck", "dumpe2fs", "mkfs.xfs", "xfs_repair", "blkid", "fsfreeze"];

/// A daemon and an adapter, if volumes can be mounted here.
fn start() -> Option<(System, Csi)> {
    if !can_mount() || !present(&TOOLS) {
        return None;
    }
    let system = System::start("4GiB");
    let csi = Csi::start(&system);
    Some((system, csi))
}

/// The smallest volume that mkfs takes, and room for some load.
fn bytes(kind: &str) -> i64 {
    if kind == "xfs" { 320 * MIB } else { 64 * MIB }
}

/// A volume of a class that says `freeze`.
fn create(csi: &Csi, name: &str, kind: &str) -> String {
    let mut wanted = request(name, bytes(kind), &mount_of(kind));
    wanted.parameters.insert("freeze".to_owned(), "true".to_owned());
    csi.create(wanted).expect("a volume").volume_id
}

fn clone_of(name: &str, kind: &str, source: &str) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest {
        volume_content_source: from_volume(source),
        ..request(name, bytes(kind), &mount_of(kind))
    }
}

fn parameters() -> BTreeMap<String, String> {
    BTreeMap::from([("freeze".to_owned(), "true".to_owned())])
}

fn snapshot(csi: &Csi, name: &str, source: &str) -> Result<String, Status> {
    let request = csi::CreateSnapshotRequest {
        source_volume_id: source.to_owned(),
        name: name.to_owned(),
        parameters: parameters(),
        ..Default::default()
    };
    let answer = csi.answer(csi.controller().create_snapshot(request))?;
    Ok(answer.snapshot.expect("an answer has a snapshot").snapshot_id)
}

/// The members of a group, in the order of `sources`.
fn group(csi: &Csi, name: &str, sources: &[&str]) -> Result<Vec<String>, Status> {
    let request = csi::CreateVolumeGroupSnapshotRequest {
        name: name.to_owned(),
        source_volume_ids: sources.iter().map(ToString::to_string).collect(),
        parameters: parameters(),
        ..Default::default()
    };
    let mut client = GroupControllerClient::new(csi.channel());
    let answer = csi.answer(client.create_volume_group_snapshot(request))?;
    let members = answer.group_snapshot.expect("an answer has a group").snapshots;
    let of = |source: &&str| members.iter().find(|member| member.source_volume_id == **source);
    Ok(sources.iter().map(|source| of(source).expect("a member").snapshot_id.clone()).collect())
}

/// Calls until the answer is not that the outcome is open.
fn repeat<T>(mut call: impl FnMut() -> Result<T, Status>) -> T {
    for _ in 0..TRIES_MAX {
        match call() {
            Ok(answer) => return answer,
            Err(error) => {
                let open = matches!(error.code(), Code::Unavailable | Code::Aborted);
                assert!(open, "{error}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
    panic!("the call does not come through");
}

fn write_durably(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).expect("a file");
    file.write_all(bytes).expect("space");
    file.sync_all().expect("what was written reaches the volume");
}

fn label(cli: &Cli, name: &str, label: &str) {
    cli.run(&["volume", "set", name, "--label", label]);
}

fn throttle(cli: &Cli, name: &str, bandwidth: &str) {
    cli.run(&["volume", "set", name, "--bandwidth-limit", bandwidth]);
}

/// Files that come, change their names and go, until told to end. Their numbers tell how far it is.
struct Load {
    end: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    writer: JoinHandle<()>,
}

/// Files that are there at a time.
const FILES: u64 = 50;

fn content(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(2048)
}

impl Load {
    fn on(directory: &Path) -> Self {
        let (end, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let writer = {
            let (end, written) = (Arc::clone(&end), Arc::clone(&written));
            let directory = directory.to_owned();
            std::thread::spawn(move || {
                for number in 1.. {
                    if end.load(Ordering::Relaxed) {
                        return;
                    }
                    let path = directory.join(format!("new-{number}"));
                    std::fs::write(&path, content(number)).expect("a file");
                    let named = directory.join(format!("file-{number}"));
                    std::fs::rename(path, named).expect("a name");
                    written.store(number, Ordering::SeqCst);
                    if let Some(old) = number.checked_sub(FILES).filter(|old| *old > 0) {
                        let old = directory.join(format!("file-{old}"));
                        std::fs::remove_file(old).expect("a file");
                    }
                }
            })
        };
        Self { end, written, writer }
    }

    /// The last file that is complete, after some more were made.
    fn last(&self) -> u64 {
        let before = self.written.load(Ordering::SeqCst);
        while self.written.load(Ordering::SeqCst) < before + FILES {
            assert!(!self.writer.is_finished(), "the load ended by itself");
            std::thread::sleep(PAUSE);
        }
        self.written.load(Ordering::SeqCst)
    }

    fn end(self, directory: &Path) {
        self.end.store(true, Ordering::Relaxed);
        finishes(self.writer, directory);
    }
}

/// Waits until a thread that writes has ended. If it does not, the file system is thawed before the
/// test fails: a thread that waits for that cannot end otherwise.
fn finishes(writer: JoinHandle<()>, directory: &Path) {
    let since = Instant::now();
    while !writer.is_finished() {
        if since.elapsed() > PATIENCE {
            output("fsfreeze", &["--unfreeze", text(directory)]);
            panic!("{}: still frozen after {PATIENCE:?}", directory.display());
        }
        std::thread::sleep(PAUSE);
    }
    writer.join().expect("written");
}

/// Writes a file in another thread; whether it was possible is known after a while.
fn writes(directory: &Path) -> JoinHandle<()> {
    let path = directory.join("file");
    std::thread::spawn(move || write_durably(&path, b"content"))
}

/// The file system on a volume that is not mounted needs nothing before it is used, and holds
/// the file `last` of a load, and those before it. `name` is the pool's.
fn clean(system: &System, name: &str, kind: &str, last: Option<u64>) {
    let cli = system.cli();
    let attached = cli.json(&["volume", "attach", name, "--kind", "loop"]);
    let device = attached["device"].as_str().unwrap_or_else(|| panic!("no device: {attached}"));
    let unrecovered = match kind {
        "xfs" => {
            xfs_is_whole(device);
            "ro,norecovery,nouuid"
        }
        _ => {
            run("e2fsck", &["-f", "-n", device]);
            let header = run("dumpe2fs", &["-h", device]);
            assert!(!header.contains("needs_recovery"), "{name}: {header}");
            "ro,noload"
        }
    };
    if let Some(last) = last {
        let place = system.path().join("checked");
        std::fs::create_dir_all(&place).expect("a directory");
        run("mount", &["-o", unrecovered, device, text(&place)]);
        complete(&place, last);
        run("umount", &[text(&place)]);
    }
    cli.run(&["volume", "detach", name]);
}

/// What `xfs_repair -n`, which replays nothing, says of an xfs that needs no replay. It also tells
/// where it is, and of the totals in the superblock: an xfs that is frozen leaves a record in its
/// log, with which the next mount counts them anew.
const XFS_SAYS: [&str; 9] = [
    "No modify flag",
    "Phase ",
    "        - ",
    "ALERT: The filesystem has valuable metadata changes in a log",
    "ignored because",
    "which may be resolved",
    "sb_fdblocks ",
    "sb_ifree ",
    "sb_icount ",
];

fn xfs_is_whole(device: &str) {
    let checked = output("xfs_repair", &["-n", device]);
    let said = [checked.stdout, checked.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let known = |line: &str| line.is_empty() || XFS_SAYS.iter().any(|one| line.starts_with(one));
    let wrong: Vec<_> = said.lines().filter(|line| !known(line)).collect();
    assert!(said.contains("Phase 7") && wrong.is_empty(), "{wrong:?}: {said}");
}

/// A directory of a load is what it was at one moment, after the file `last` was complete.
fn complete(directory: &Path, last: u64) {
    let names = std::fs::read_dir(directory).expect("a directory").map(|entry| {
        entry.expect("an entry").file_name().into_string().expect("names of tests are text")
    });
    let (files, others): (Vec<_>, Vec<_>) = names.partition(|name| name.starts_with("file-"));
    let under_way = others.iter().filter(|name| name.starts_with("new-")).count();
    assert!(under_way <= 1, "{others:?}");
    let numbers: BTreeSet<u64> =
        files.iter().map(|name| name["file-".len()..].parse().expect("a number")).collect();
    let newest = *numbers.last().expect("there are files");
    assert!(newest >= last, "file {last} was complete before the freeze, this ends at {newest}");
    for number in &numbers {
        let found = std::fs::read(directory.join(format!("file-{number}"))).expect("a file");
        assert!(found == content(*number), "file {number} of {newest} is not what was written");
    }
    let there = newest - FILES + 1..=newest;
    assert!(there.clone().all(|number| numbers.contains(&number)), "{numbers:?}");
    assert!(numbers.len() <= usize::try_from(FILES).expect("small") + 1, "{numbers:?}");
}

#[test]
fn copies_under_load_are_clean() {
    let Some((system, csi)) = start() else { return };
    let kinds = ["ext4", "xfs"];
    let sources = kinds.map(|kind| create(&csi, &format!("source-{kind}"), kind));
    let mounts: Vec<_> = kinds
        .iter()
        .zip(&sources)
        .map(|(kind, id)| Mounted::up(&csi, id, kind, &mount_of(kind)))
        .collect();
    let loads: Vec<_> = mounts.iter().map(|mounted| Load::on(&mounted.target)).collect();
    let restore = |name: &str, kind: &str, snapshot: &str| {
        let mut wanted = request(name, bytes(kind), &mount_of(kind));
        wanted.volume_content_source = from_snapshot(snapshot);
        csi.create(wanted).expect("a restore");
    };
    for (index, kind) in kinds.into_iter().enumerate() {
        let source = &sources[index];
        let last = loads[index].last();
        csi.create(clone_of(&format!("clone-{kind}"), kind, source)).expect("a clone");
        clean(&system, &format!("csi-vol-clone-{kind}"), kind, Some(last));
        let last = loads[index].last();
        let taken = snapshot(&csi, &format!("snap-{kind}"), source).expect("a snapshot");
        restore(&format!("restored-{kind}"), kind, &taken);
        clean(&system, &format!("csi-vol-restored-{kind}"), kind, Some(last));
    }
    let lasts: Vec<_> = loads.iter().map(Load::last).collect();
    let members = group(&csi, "both", &[&sources[0], &sources[1]]).expect("a group");
    for (index, kind) in kinds.into_iter().enumerate() {
        restore(&format!("member-{kind}"), kind, &members[index]);
        clean(&system, &format!("csi-vol-member-{kind}"), kind, Some(lasts[index]));
    }
    // Without it, a copy of the same load has to be recovered: the check is one.
    let plain = csi.create(request("plain", bytes("ext4"), &mount_of("ext4"))).expect("a volume");
    let place = Mounted::up(&csi, &plain.volume_id, "plain", &mount_of("ext4"));
    let load = Load::on(&place.target);
    load.last();
    csi.create(clone_of("dirty", "ext4", &plain.volume_id)).expect("a clone");
    let attached = system.cli().json(&["volume", "attach", "csi-vol-dirty", "--kind", "loop"]);
    let device = attached["device"].as_str().expect("a device").to_owned();
    assert!(run("dumpe2fs", &["-h", &device]).contains("needs_recovery"));
    system.cli().run(&["volume", "detach", "csi-vol-dirty"]);
    load.end(&place.target);
    place.down();
    for (load, mounted) in loads.into_iter().zip(&mounts) {
        load.end(&mounted.target);
    }
    mounts.into_iter().for_each(Mounted::down);
}

#[test]
fn a_copy_that_nobody_has_proven_is_made_anew() {
    let Some((system, csi)) = start() else { return };
    let (cli, data) = (system.cli(), Data::new(&system));
    let unproven = |name: &str| label(&cli, name, "csi.pando.dev/unproven=true");
    let ids = ["one", "two"].map(|name| create(&csi, name, "ext4"));
    let one = Mounted::up(&csi, &ids[0], "one", &mount_of("ext4"));
    let two = Mounted::up(&csi, &ids[1], "two", &mount_of("ext4"));
    let proven = |id: &str| {
        let labels = data.volume(number(id)).labels;
        assert!(!labels.contains_key("csi.pando.dev/unproven"), "{labels:?}");
    };

    let clone = || csi.create(clone_of("clone", "ext4", &ids[0])).expect("a clone").volume_id;
    let first = clone();
    proven(&first);
    assert_eq!(clone(), first);
    // As if the adapter had been killed before it knew.
    unproven("csi-vol-clone");
    let listed = || {
        let answer = csi.answer(csi.controller().list_volumes(csi::ListVolumesRequest::default()));
        let entries = answer.expect("a list").entries.into_iter();
        entries.map(|entry| entry.volume.expect("a volume").volume_id).collect::<Vec<_>>()
    };
    assert!(!listed().contains(&first), "nobody was told of it");
    let second = clone();
    assert_ne!(second, first);
    proven(&second);
    assert!(listed().contains(&second));
    clean(&system, "csi-vol-clone", "ext4", None);

    let take = || snapshot(&csi, "snap", &ids[0]).expect("a snapshot");
    let first = take();
    assert_eq!(take(), first);
    unproven("csi-snap-snap");
    assert_ne!(take(), first);

    let together = || group(&csi, "group", &[&ids[0], &ids[1]]).expect("a group");
    let first = together();
    assert_eq!(together(), first);
    let member = data.volume(number(&first[1])).name;
    unproven(&member);
    let second = together();
    assert!(first.iter().all(|member| !second.contains(member)), "{first:?} {second:?}");
    second.iter().for_each(|member| proven(member));
    assert_eq!((data.pool().volumes, data.pool().snapshots), (3, 3), "none is left over");
    one.down();
    two.down();
}

/// Until it is known to be clean a copy says so itself, whoever is killed meanwhile.
#[test]
fn a_copy_is_unproven_until_its_source_is_thawed() {
    let Some((system, csi)) = start() else { return };
    let id = create(&csi, "source", "ext4");
    let mounted = Mounted::up(&csi, &id, "source", &mount_of("ext4"));
    let data = Data::new(&system);
    for round in 0..TRIES_MAX {
        let name = format!("clone-{round}");
        let (mut controller, wanted) = (csi.controller(), clone_of(&name, "ext4", &id));
        let call = csi.begin(async move { controller.create_volume(wanted).await });
        while !call.is_finished() {
            let mut client = data.client();
            let found = data.wait(client.list_volumes(v1::ListVolumesRequest {
                name_prefix: format!("csi-vol-{name}"),
                ..Default::default()
            }));
            let found = found.expect("a list").into_inner().volumes;
            let unproven = |copy: &v1::Volume| copy.labels.contains_key("csi.pando.dev/unproven");
            if found.iter().any(unproven) {
                csi.wait(call).expect("a call ends").expect("a clone");
                mounted.down();
                return;
            }
        }
        csi.wait(call).expect("a call ends").expect("a clone");
    }
    panic!("no copy ever was unproven");
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Victim {
    Adapter,
    Daemon,
}

/// Copies of a mounted file system under load, each with a kill in the middle, asked for again.
fn kill_in_every_freeze(victim: Victim) {
    let Some((mut system, mut csi)) = start() else { return };
    let capability = mount_of("ext4");
    let id = create(&csi, "source", "ext4");
    let mut noise = Noise::new(11);
    for round in 0..KILLS {
        let place = Mounted::places(&csi, &id, "source");
        let (staging, target) = (place.staging.clone(), place.target.clone());
        csi.stage(&id, &staging, &capability).expect("the volume is staged");
        csi.publish(&id, (&staging, &target), &capability, false).expect("it is published");
        std::fs::write(target.join(format!("round-{round}")), vec![7; 1 << 20]).expect("a file");
        let wanted = clone_of(&format!("clone-{round}"), "ext4", &id);
        let call = {
            let (mut controller, wanted) = (csi.controller(), wanted.clone());
            csi.begin(async move { controller.create_volume(wanted).await })
        };
        std::thread::sleep(Duration::from_micros(noise.below(KILL_DELAY_US_MAX)));
        match victim {
            Victim::Adapter => {
                csi.kill();
                csi.spawn();
            }
            Victim::Daemon => system.crash(),
        }
        let first = csi.wait(call).expect("a call ends");
        if victim == Victim::Daemon {
            // The loop device is dead; kubelet would stage it again.
            repeat(|| csi.stage(&id, &staging, &capability));
            repeat(|| csi.publish(&id, (&staging, &target), &capability, false));
        } else {
            finishes(writes(&target), &target);
        }
        let copy = repeat(|| csi.create(wanted.clone())).volume_id;
        if let Ok(first) = first {
            assert_eq!(first.into_inner().volume.expect("a volume").volume_id, copy);
        }
        finishes(writes(&target), &target);
        clean(&system, &format!("csi-vol-clone-{round}"), "ext4", None);
        csi.unpublish(&id, &target).expect("the volume is unpublished");
        csi.unstage(&id, &staging).expect("the volume is unstaged");
        csi.delete(&copy).expect("it is not in use");
    }
    csi.delete(&id).expect("it is not in use");
    system.check();
}

#[test]
fn the_adapter_is_killed_in_every_freeze() {
    kill_in_every_freeze(Victim::Adapter);
}

#[test]
fn the_daemon_is_killed_in_every_freeze() {
    kill_in_every_freeze(Victim::Daemon);
}

/// Process of the guard that the adapter has started.
fn guard_of(csi: &Csi) -> u32 {
    let parent = format!("PPid:\t{}", csi.pid());
    let since = Instant::now();
    loop {
        let processes = std::fs::read_dir("/proc").expect("processes").flatten();
        let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let found = numbers.find(|number: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{number}/status"));
            let line = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
            status.is_ok_and(|status| status.lines().any(|line| line == parent))
                && line.ends_with(b"freeze-guard\0")
        });
        match found {
            Some(guard) => return guard,
            None => assert!(since.elapsed() < PATIENCE, "no guard"),
        }
        std::thread::sleep(PAUSE);
    }
}

/// Begins to clone a volume whose freeze takes minutes: what was written reaches it at a bounded
/// rate.
fn slow_freeze(
    (system, csi): (&System, &Csi),
    (id, target): (&str, &Path),
) -> JoinHandleOf<csi::CreateVolumeResponse> {
    // In this order, for else the kernel may have written the file before the disk is slow.
    throttle(&system.cli(), "csi-vol-source", "64KiB");
    std::fs::write(target.join("large"), vec![1; 4 << 20]).expect("a file");
    let (mut controller, wanted) = (csi.controller(), clone_of("clone", "ext4", id));
    csi.begin(async move { Ok(controller.create_volume(wanted).await?.into_inner()) })
}

type JoinHandleOf<T> = tokio::task::JoinHandle<Result<T, Status>>;

#[test]
fn a_freeze_that_takes_too_long_is_an_error() {
    let Some((system, csi)) = start() else { return };
    let id = create(&csi, "source", "ext4");
    let mounted = Mounted::up(&csi, &id, "source", &mount_of("ext4"));
    let call = slow_freeze((&system, &csi), (&id, &mounted.target));
    guard_of(&csi);
    // Meanwhile nothing else is done with it.
    let other = csi.create(clone_of("other", "ext4", &id)).expect_err("it is being frozen");
    assert_eq!(other.code(), Code::Aborted, "{other}");
    std::thread::sleep(Duration::from_secs(11));
    throttle(&system.cli(), "csi-vol-source", "0");
    let error = csi.wait(call).expect("a call ends").expect_err("no clean copy in time");
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert_eq!(Data::new(&system).pool().volumes, 1, "no other copy is made");
    finishes(writes(&mounted.target), &mounted.target);
    let volume = Data::new(&system).volume(number(&id));
    assert!(!volume.labels.contains_key("csi.pando.dev/frozen"), "{volume:?}");
    csi.create(clone_of("clone", "ext4", &id)).expect("a clone, now that the disk is fast");
    clean(&system, "csi-vol-clone", "ext4", None);
    mounted.down();
}

#[test]
fn a_guard_that_is_killed_leaves_nothing_frozen() {
    let Some((system, csi)) = start() else { return };
    let id = create(&csi, "source", "ext4");
    let mounted = Mounted::up(&csi, &id, "source", &mount_of("ext4"));
    let call = slow_freeze((&system, &csi), (&id, &mounted.target));
    // The kernel goes on to freeze, and nobody is there to thaw.
    run("kill", &["-KILL", &guard_of(&csi).to_string()]);
    throttle(&system.cli(), "csi-vol-source", "0");
    csi.wait(call).expect("a call ends").expect_err("no clean copy");
    finishes(writes(&mounted.target), &mounted.target);
    assert_eq!(Data::new(&system).pool().volumes, 1);
    csi.create(clone_of("clone", "ext4", &id)).expect("a clone");
    clean(&system, "csi-vol-clone", "ext4", None);
    mounted.down();
}

/// Starts the guard of a freeze by itself, as the adapter does.
fn guard(directory: &Path) -> (Child, UnixStream) {
    let (mut ours, theirs) = UnixStream::pair().expect("sockets");
    let mut command = Command::new(pando_tests::system::programs().join("pando-csi"));
    command.arg("freeze-guard").stdin(File::open(directory).expect("a directory"));
    let theirs = OwnedFd::from(theirs);
    let child = command.stdout(Stdio::from(theirs)).spawn().expect("the guard starts");
    let mut said = [0];
    ours.read_exact(&mut said).expect("the guard speaks");
    assert_eq!(&said, b"F", "frozen");
    (child, ours)
}

#[test]
fn nobody_leaves_a_file_system_frozen() {
    let Some((system, mut csi)) = start() else { return };
    let id = create(&csi, "frozen", "ext4");
    let staged = Mounted::up(&csi, &id, "frozen", &mount_of("ext4"));
    let target = staged.target.clone();
    let pause = || std::thread::sleep(Duration::from_millis(300));

    // The adapter ends, however: its socket closes.
    let (mut child, socket) = guard(&target);
    let writer = writes(&target);
    pause();
    assert!(!writer.is_finished(), "frozen");
    drop(socket);
    finishes(writer, &target);
    child.wait().expect("a child ends");

    // Somebody ends the guard: it thaws, and says that it was not asked to.
    let (mut child, mut socket) = guard(&target);
    run("kill", &["-TERM", &child.id().to_string()]);
    let mut said = [0];
    socket.read_exact(&mut said).expect("the guard speaks");
    assert_eq!(&said, b"L", "thawed too early");
    child.wait().expect("a child ends");
    finishes(writes(&target), &target);

    // Both are killed at once: the next adapter thaws.
    let (mut child, socket) = guard(&target);
    label(&system.cli(), "csi-vol-frozen", "csi.pando.dev/frozen=true");
    child.kill().expect("a child can be killed");
    child.wait().expect("a child ends");
    drop(socket);
    let writer = writes(&target);
    pause();
    assert!(!writer.is_finished(), "frozen");
    csi.kill();
    csi.spawn();
    finishes(writer, &target);
    let volume = system.cli().json(&["volume", "show", "csi-vol-frozen"]);
    assert!(!volume["labels"].to_string().contains("frozen\":"), "{volume}");
}
