//! What GetCapacity publishes is what CreateVolume gives, in whatever state the pool is: that much
//! and no more. The scheduler believes it, and claims are sent elsewhere where there is nothing.

use std::collections::BTreeMap;

use pando_csi::proto::csi;
use pando_csi::proto::csi::volume_capability::access_mode::Mode;
use pando_tests::csi::{
    block, can_mount, from_snapshot, from_volume, mount_of, mount_with, request,
};
use pando_tests::data::number;
use pando_tests::nbd::command;
use pando_tests::noise::Noise;
use pando_tests::tools::{output, text};
use pando_tests::{Csi, Data, Nbd, System};
use tonic::{Code, Status};

const MIB: i64 = 1 << 20;
const GIB: i64 = 1 << 30;
const ENOSPC: u32 = 28;
/// States of a pool that are looked at.
const STATES: usize = 40;
/// Times that a class is tried in one state.
const TRIES_MAX: usize = 10;
/// Classes that are asked about in each state.
const CLASSES: [&[(&str, &str)]; 5] = [
    &[],
    &[("growthLimit", "1Gi"), ("freeze", "true")],
    &[("reservation", "1000001")],
    &[("reservation", "40Mi"), ("csi.storage.k8s.io/fstype", "ext4")],
    &[("fsType", "xfs")],
];

fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.expect_err("a refusal").code()
}

/// What was made, unless there was no room for it.
fn roomy<T>(result: Result<T, Status>) -> Option<T> {
    let full = |error: &Status| error.code() == Code::ResourceExhausted;
    assert!(result.as_ref().err().is_none_or(full), "{:?}", result.as_ref().err());
    result.ok()
}

/// A request of a class: the provisioner keeps the keys that are its own.
fn of_class(name: &str, bytes: i64, class: &[(&str, &str)]) -> csi::CreateVolumeRequest {
    let own = class.iter().filter(|(key, _)| !key.starts_with("csi.storage.k8s.io/"));
    let mut wanted = request(name, bytes, &mount_of(""));
    wanted.parameters.extend(own.map(|(key, value)| (key.to_string(), value.to_string())));
    wanted
}

fn snapshot(csi: &Csi, name: &str, volume: &str) -> Result<String, Status> {
    let request = csi::CreateSnapshotRequest {
        source_volume_id: volume.to_owned(),
        name: name.to_owned(),
        ..Default::default()
    };
    let answer = csi.answer(csi.controller().create_snapshot(request))?;
    Ok(answer.snapshot.expect("an answer has a snapshot").snapshot_id)
}

/// Tries what is published for a class, and a sector more. A checkpoint in between may give space
/// back: then once more.
fn try_class(life: &Life, class: &[(&str, &str)]) -> i64 {
    let csi = &life.csi;
    for _ in 0..TRIES_MAX {
        let published = csi.capacity(class);
        let most = published.maximum_volume_size.expect("a size");
        let least = published.minimum_volume_size.expect("a size");
        assert_eq!(published.available_capacity, most, "the scheduler looks at either");
        if most > 0 {
            assert!(least <= most, "{least} to {most}");
            match csi.create(of_class("most", most, class)) {
                Ok(made) => {
                    assert_eq!(made.capacity_bytes, most);
                    csi.delete(&made.volume_id).expect("a deletion");
                }
                Err(_) if csi.capacity(class) != published => continue,
                Err(error) => panic!("{most} of {class:?}: {error}"),
            }
        }
        // The checkpoint behind the deletion holds the old catalogue until it is published.
        life.settle();
        let published = csi.capacity(class);
        let most = published.maximum_volume_size.expect("a size");
        match csi.create(of_class("more", least.max(most + 512), class)) {
            Err(error) => {
                assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
                return most;
            }
            Ok(made) => csi.delete(&made.volume_id).expect("a deletion"),
        }
    }
    panic!("more than what is published is given, of {class:?}");
}

/// Volumes and snapshots that come and go, in a pool that fills and empties.
struct Life {
    csi: Csi,
    data: Data,
    noise: Noise,
    volumes: Vec<String>,
    snapshots: Vec<String>,
    made: usize,
}

impl Life {
    fn step(&mut self) {
        self.made += 1;
        let name = format!("volume-{}", self.made);
        let at = |noise: &mut Noise, len: usize| {
            usize::try_from(noise.below(len.try_into().expect("small"))).expect("small")
        };
        let volumes = self.volumes.len();
        match self.noise.below(8) {
            0 | 1 if volumes > 0 => {
                let volume = self.volumes.swap_remove(at(&mut self.noise, volumes));
                self.csi.delete(&volume).expect("a deletion");
            }
            2 if volumes > 0 => {
                let source = &self.volumes[at(&mut self.noise, volumes)];
                self.snapshots.extend(roomy(snapshot(&self.csi, &name, source)));
            }
            3 if volumes > 0 => {
                let source = &self.volumes[at(&mut self.noise, volumes)];
                let clone = csi::CreateVolumeRequest {
                    volume_content_source: from_volume(source),
                    capacity_range: None,
                    ..request(&name, 0, &mount_of(""))
                };
                let made = roomy(self.csi.create(clone));
                self.volumes.extend(made.map(|volume| volume.volume_id));
            }
            4 if !self.snapshots.is_empty() => {
                let count = self.snapshots.len();
                let snapshot_id = self.snapshots.swap_remove(at(&mut self.noise, count));
                let request = csi::DeleteSnapshotRequest { snapshot_id, ..Default::default() };
                let mut controller = self.csi.controller();
                self.csi.answer(controller.delete_snapshot(request)).expect("a deletion");
            }
            _ => self.fill(&name),
        }
    }

    /// A new volume, of which a part is written.
    fn fill(&mut self, name: &str) {
        let class = CLASSES[usize::try_from(self.noise.below(4)).expect("small")];
        let Some(made) = roomy(self.csi.create(of_class(name, 64 * MIB, class))) else { return };
        let blocks = usize::try_from(self.noise.below(15 << 10)).expect("small");
        let written =
            self.data.try_write(number(&made.volume_id), 0, &self.noise.bytes(blocks << 12));
        roomy(written);
        self.volumes.push(made.volume_id);
    }

    /// Waits until nothing is on its way back.
    fn settle(&self) {
        let since = std::time::Instant::now();
        loop {
            if let Some(volume) = self.volumes.first() {
                self.data.checkpoint(number(volume));
            }
            let before = self.data.pool();
            let again = self.data.pool();
            if before.deletions_pending == 0 && before.available_bytes == again.available_bytes {
                return;
            }
            assert!(since.elapsed().as_secs() < 30, "{before:?}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

#[test]
fn what_is_published_is_given_and_no_more() {
    let system = System::start("256MiB");
    let (csi, data) = (Csi::start(&system), Data::new(&system));
    let noise = Noise::new(15);
    let (volumes, snapshots) = (Vec::new(), Vec::new());
    let mut life = Life { csi, data, noise, volumes, snapshots, made: 0 };
    let (mut nothing, mut something) = (0, 0);
    for _ in 0..STATES {
        life.step();
        life.settle();
        for class in CLASSES {
            match try_class(&life, class) {
                0 => nothing += 1,
                _ => something += 1,
            }
        }
    }
    assert!(nothing >= 10 && something >= 50, "{nothing} without capacity, {something} with");
    system.check();
}

#[test]
fn sizes_of_what_is_there_do_not_count() {
    let system = System::start("64GiB");
    let (csi, data) = (Csi::start(&system), Data::new(&system));
    let empty = csi.capacity(&[]).available_capacity;
    let available = i64::try_from(data.pool().available_bytes).expect("small");
    assert_eq!(empty, 10 * available);
    assert!(empty > 600 * GIB, "{empty}");
    let large = csi.create(request("large", 300 * GIB, &mount_of("ext4"))).expect("a volume");
    for index in 0..4 {
        let taken = snapshot(&csi, &format!("s{index}"), &large.volume_id).expect("a snapshot");
        let restored = csi::CreateVolumeRequest {
            volume_content_source: from_snapshot(&taken),
            ..request(&format!("r{index}"), 400 * GIB, &mount_of("ext4"))
        };
        csi.create(restored).expect("a copy of any size");
    }
    assert!(empty - csi.capacity(&[]).available_capacity < GIB, "nothing was written");
    // What is reserved is there once, the rest several times.
    let reserving = csi.capacity(&[("reservation", "10Gi")]).available_capacity;
    assert!(empty - reserving > 80 * GIB, "{reserving} of {empty}");
    assert_eq!(csi.capacity(&[("reservation", "65Gi")]).available_capacity, 0);
}

#[test]
fn places_modes_and_kinds_have_their_own_answers() {
    let system = System::start("512MiB");
    let csi = Csi::start(&system);
    let here = csi.capacity(&[]);
    let ask = |request: csi::GetCapacityRequest| {
        csi.answer(csi.controller().get_capacity(request)).expect("an answer")
    };
    let there = BTreeMap::from([("csi.pando.dev/node".to_owned(), "node-2".to_owned())]);
    let there = Some(csi::Topology { segments: there });
    let elsewhere = csi::GetCapacityRequest { accessible_topology: there, ..Default::default() };
    assert_eq!(ask(elsewhere).available_capacity, 0);
    let with = |capability| csi::GetCapacityRequest {
        volume_capabilities: vec![capability],
        ..Default::default()
    };
    let many = mount_with("ext4", &[], Mode::MultiNodeMultiWriter);
    assert_eq!(ask(with(many)).available_capacity, 0);
    // The provisioner names no mode, or has none.
    let open = mount_with("ext4", &[], Mode::Unknown);
    assert_eq!(ask(with(open)), here);
    // What is wrong with a class is said by CreateVolume, which is not called without room.
    assert_eq!(csi.capacity(&[("frieze", "true")]), here);
    let least = |answer: csi::GetCapacityResponse| answer.minimum_volume_size;
    assert_eq!(least(csi.capacity(&[("csi.storage.k8s.io/fstype", "xfs")])), Some(300 * MIB));
    assert_eq!(least(ask(with(mount_of("btrfs")))), Some(256 * MIB));
    assert_eq!(least(ask(with(block()))), Some(4096));
}

#[test]
fn a_full_pool_has_no_capacity() {
    let system = System::start("64MiB");
    let (csi, cli) = (Csi::start(&system), system.cli());
    let create = |name| csi.create(request(name, 100 * MIB, &block())).expect("a volume").volume_id;
    let (big, small) = (create("big"), create("small"));
    let mut nbd = Nbd::open(&cli.serve("csi-vol-big"), "csi-vol-big").expect("an export");
    let mut other = Nbd::open(&cli.serve("csi-vol-small"), "csi-vol-small").expect("an export");
    let content = Noise::new(1).bytes(1 << 20);
    let mut at = 0;
    for piece in [1 << 20, 64 << 10, 4 << 10] {
        while nbd.try_write(at, &content[..piece], 0).expect("a connection").is_ok() {
            at += u64::try_from(piece).expect("small");
        }
    }
    // The last blocks are had one by one, whenever a checkpoint gives one back.
    let mut refused = 0;
    let mut offset = 0;
    while refused < 10 {
        match other.try_write(offset, &content[..4096], 0).expect("a connection") {
            Ok(()) => (refused, offset) = (0, offset + 4096),
            Err(errno) => {
                assert_eq!(errno, ENOSPC);
                refused += 1;
            }
        }
        assert!(offset < 32 << 20, "the pool is full");
    }
    let published = csi.capacity(&[]);
    assert_eq!((published.available_capacity, published.maximum_volume_size), (0, Some(0)));
    let answer = csi.create(request("none", MIB, &block())).expect_err("no room");
    assert_eq!(answer.code(), Code::ResourceExhausted, "{answer}");
    assert!(answer.message().contains("no room for 1048576 bytes on node node-1"), "{answer}");
    // A copy takes nothing, and no other node could make it.
    let clone = csi::CreateVolumeRequest {
        volume_content_source: from_volume(&small),
        ..request("clone", 100 * MIB, &block())
    };
    csi.create(clone).expect("a clone");

    nbd.simple(command::TRIM, (0, 8 << 20));
    nbd.flush();
    Data::new(&system).checkpoint(number(&big));
    assert!(csi.capacity(&[]).available_capacity > 0, "there is room again");
    csi.create(request("some", MIB, &block())).expect("a volume");
}

/// A file system that does not outlive its test.
struct Mounted(String);

impl Drop for Mounted {
    fn drop(&mut self) {
        output("umount", &["-l", &self.0]);
    }
}

#[test]
fn a_pool_that_failed_sends_claims_elsewhere() {
    if !can_mount() {
        return;
    }
    let mut system = System::empty();
    let host = system.path().join("host");
    std::fs::create_dir(&host).expect("a directory");
    let options = ["-t", "tmpfs", "-o", "size=32m", "pando-test", text(&host)];
    assert!(output("mount", &options).status.success());
    let _mounted = Mounted(text(&host).to_owned());
    system.move_pool(host.join("pool"));
    system.create_pool(&["--size", "256MiB", "--allocate", "sparse"]);
    system.spawn();
    let csi = Csi::start(&system);
    let data = Data::new(&system);
    let made = csi.create(request("made", 100 * MIB, &block())).expect("a volume");
    assert!(csi.capacity(&[]).available_capacity > 0);
    // The file of the pool cannot grow any more.
    let socket = system.cli().serve("csi-vol-made");
    let mut nbd = Nbd::open(&socket, "csi-vol-made").expect("an export");
    let content = Noise::new(1).bytes(1 << 20);
    let refused = (0..100).any(|at| !matches!(nbd.try_write(at << 20, &content, 0), Ok(Ok(()))));
    assert!(refused && !data.pool().poisoned.is_empty(), "{:?}", data.pool());

    assert_eq!(csi.capacity(&[]).available_capacity, 0);
    let answer = csi.create(request("other", 100 * MIB, &block())).expect_err("it failed");
    assert_eq!(answer.code(), Code::ResourceExhausted, "{answer}");
    assert!(answer.message().contains("its pool accepts no change"), "{answer}");
    // What was made before is found all the same, and a copy can be made nowhere else.
    assert_eq!(csi.create(request("made", 100 * MIB, &block())).expect("again"), made);
    let clone = csi::CreateVolumeRequest {
        volume_content_source: from_volume(&made.volume_id),
        ..request("clone", 100 * MIB, &block())
    };
    assert_eq!(code(csi.create(clone)), Code::Unavailable);
    nbd.close();
    system.terminate();

    // Without a daemon nothing can be given either; whether a volume was made is open.
    assert_eq!(csi.capacity(&[]).available_capacity, 0);
    assert_eq!(code(csi.create(request("other", 100 * MIB, &block()))), Code::Unavailable);
}
