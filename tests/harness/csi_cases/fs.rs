//! Real file systems on volumes, as Kubernetes uses them: each kind is staged, published, filled,
//! cloned while it is mounted, mounted beside its clone, changed on both sides, grown, and deleted
//! in different orders. What is there is compared file by file.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use pando_csi::proto::csi::VolumeCapability;
use pando_csi::proto::csi::volume_capability::access_mode::Mode;
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::thread::{CapabilitySet, capabilities};
use tonic::Code;

use super::{Device, write_durably};
use crate::cli::number;
use crate::csi::{Mounted, from_volume, mount_of, mount_with, request_of};
use crate::noise::Noise;
use crate::tools::{present, run};
use crate::{Csi, System};

const TOOLS: [&str; 6] = ["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "btrfstune", "tune2fs", "blkid"];
/// Files of a tree, and bytes of each at most.
const FILES: u64 = 200;
const FILE_BYTES: u64 = 40_000;

type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// Makes files of many sizes in directories below `root`, the same ones each time.
fn plant(root: &Path) {
    let mut noise = Noise::new(FILES);
    for number in 0..FILES {
        let directory = root.join(format!("d{}/e{}", number % 7, number % 3));
        std::fs::create_dir_all(&directory).expect("a directory");
        // Most of them are small, as in life.
        let length = noise.below(FILE_BYTES) * noise.below(FILE_BYTES) / FILE_BYTES;
        let bytes = noise.bytes(usize::try_from(length).expect("small"));
        std::fs::write(directory.join(format!("f{number}")), bytes).expect("a file");
    }
}

/// All files of a directory with their contents.
fn tree(directory: &Path) -> Tree {
    let mut files = Tree::new();
    let mut left = vec![directory.to_owned()];
    while let Some(place) = left.pop() {
        for entry in std::fs::read_dir(&place).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                left.push(path);
            } else {
                let name = path.strip_prefix(directory).expect("below it").to_owned();
                files.insert(name, std::fs::read(&path).expect("a file"));
            }
        }
    }
    files
}

fn assert_same(what: &str, found: &Tree, expected: &Tree) {
    let differing = expected.iter().filter(|(name, bytes)| found.get(*name) != Some(*bytes));
    let names: Vec<_> = differing.map(|(name, _)| name).take(5).collect();
    assert!(names.is_empty(), "{what}: files differ: {names:?}");
    assert_eq!(found.len(), expected.len(), "{what}: files that should not be there");
}

fn sync(directory: &Path) {
    let opened = File::open(directory).expect("a directory");
    rustix::fs::syncfs(opened).expect("what was written reaches the volume");
}

fn capacity(path: &Path) -> u64 {
    let found = rustix::fs::statvfs(path).expect("a file system");
    found.f_blocks * found.f_frsize
}

fn uuid(device: &str) -> String {
    run("blkid", &["-p", "-o", "value", "-s", "UUID", device])
}

/// What a container has of a volume: a copy of its mount, out of reach of who mounted it.
fn container(target: &Path) -> OwnedFd {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, target, flags).expect("a copy of a mount")
}

/// A file system of one kind on volumes that are devices of one kind.
pub struct World {
    device: Device,
    kind: &'static str,
    bytes: i64,
    capability: VolumeCapability,
    system: System,
}

impl World {
    /// A daemon with an empty pool for file systems of `kind` and of `bytes`. None where that
    /// cannot be, and then the caller returns.
    #[must_use]
    pub fn new(device: Device, kind: &'static str, bytes: i64) -> Option<Self> {
        if !device.possible() || !present(&TOOLS) {
            return None;
        }
        let system = System::start("4GiB");
        Some(Self { device, kind, bytes, capability: mount_of(kind), system })
    }

    /// Its daemon.
    #[must_use]
    pub const fn system(&self) -> &System {
        &self.system
    }

    fn create(&self, csi: &Csi, name: &str) -> String {
        let wanted = request_of(self.device.name(), name, self.bytes, &self.capability);
        csi.create(wanted).expect("a volume").volume_id
    }

    fn clone(&self, csi: &Csi, name: &str, source: &str, bytes: i64) -> String {
        let mut wanted = request_of(self.device.name(), name, bytes, &self.capability);
        wanted.volume_content_source = from_volume(source);
        csi.create(wanted).expect("a clone").volume_id
    }

    fn up<'a>(&self, csi: &'a Csi, id: &str, name: &str) -> Mounted<'a> {
        Mounted::up(csi, id, name, &self.capability)
    }

    /// A volume with a clone that was made while it was mounted: both are used at once.
    ///
    /// # Panics
    /// Anything is not as it should be.
    pub fn side_by_side(&self, csi: &Csi) {
        let source_id = self.create(csi, "source");
        let source = self.up(csi, &source_id, "source");
        plant(&source.target.join("tree"));
        sync(&source.target);
        write_durably(&source.target.join("durable"), &[7; 100_000]);
        let expected = tree(&source.target);
        assert!(expected.len() > 100, "a real tree has files, this one {}", expected.len());

        // The clone has the state of its source, with what was only in the log.
        let clone_id = self.clone(csi, "clone", &source_id, self.bytes);
        let clone = self.up(csi, &clone_id, "clone");
        assert_same("the clone", &tree(&clone.target), &expected);
        assert_ne!(source.device(), clone.device());
        if self.kind != "xfs" {
            assert_ne!(uuid(&source.device()), uuid(&clone.device()), "each has its identity");
        }

        // Both are changed, differently.
        let (mut in_source, mut in_clone) = (expected.clone(), expected);
        for (mounted, files, mark) in [(&source, &mut in_source, 1_u8), (&clone, &mut in_clone, 2)]
        {
            let names: Vec<PathBuf> =
                files.keys().skip(usize::from(mark)).step_by(3).cloned().collect();
            for name in names {
                let bytes = vec![mark; 3000];
                std::fs::write(mounted.target.join(&name), &bytes).expect("a file");
                files.insert(name, bytes);
            }
            let name = PathBuf::from(format!("new-{mark}"));
            std::fs::write(mounted.target.join(&name), vec![mark; 2 << 20]).expect("a file");
            files.insert(name, vec![mark; 2 << 20]);
        }
        sync(&source.target);
        sync(&clone.target);
        std::fs::write("/proc/sys/vm/drop_caches", "3").expect("caches are dropped");
        assert_same("the source, changed", &tree(&source.target), &in_source);
        assert_same("the clone, changed", &tree(&clone.target), &in_clone);

        // Unmounted, staged again, unchanged; with the identity it got the first time.
        let before = uuid(&clone.device());
        clone.down();
        let clone = self.up(csi, &clone_id, "clone");
        assert_eq!(uuid(&clone.device()), before, "an identity is given once");
        assert_same("the clone, staged again", &tree(&clone.target), &in_clone);

        // The source goes first, its clone stays.
        source.down();
        csi.delete(&source_id).expect("a source can be deleted");
        assert_same("the clone alone", &tree(&clone.target), &in_clone);
        clone.down();
        csi.delete(&clone_id).expect("a clone can be deleted");
    }

    /// Growth of a mounted volume, and a clone that is larger than its source.
    ///
    /// # Panics
    /// Anything is not as it should be.
    pub fn growth(&self, csi: &Csi) {
        let source_id = self.create(csi, "small");
        let source = self.up(csi, &source_id, "small");
        std::fs::write(source.target.join("file"), "content").expect("a file");
        sync(&source.target);
        let clone_id = self.clone(csi, "large", &source_id, self.bytes * 2);
        let clone = self.up(csi, &clone_id, "large");
        let (small, large) = (capacity(&source.target), capacity(&clone.target));
        assert!(
            large > small * 17 / 10,
            "a larger clone has a larger file system: {small} {large}"
        );
        self.growth_read_only(csi, &source_id, small);
        self.grow_mounted(&source);
        assert!(capacity(&source.target) > small * 17 / 10, "{}", capacity(&source.target));
        // Grown while it was not mounted: the file system follows when it is staged.
        clone.down();
        let answer = csi.expand(&clone_id, Path::new("/nonexistent"), self.bytes * 3);
        assert_eq!(answer.expect_err("not there").code(), Code::NotFound);
        let clone = self.up(csi, &clone_id, "large");
        assert!(capacity(&clone.target) > small * 26 / 10, "{}", capacity(&clone.target));
        assert_eq!(std::fs::read(clone.target.join("file")).expect("a file"), b"content");
        source.down();
        clone.down();
        csi.delete(&clone_id).expect("a clone can be deleted");
        csi.delete(&source_id).expect("a source can be deleted");
    }

    /// A larger clone that is mounted read-only has a larger file system, and grows before its pod
    /// starts, but not while a pod runs.
    fn growth_read_only(&self, csi: &Csi, source: &str, small: u64) {
        let readers = mount_with(self.kind, &[], Mode::MultiNodeReaderOnly);
        let id = self.clone(csi, "readers", source, self.bytes * 2);
        let clone = Mounted::up(csi, &id, "readers", &readers);
        let large = capacity(&clone.target);
        assert!(large > small * 17 / 10, "a larger clone, read-only: {small} {large}");
        self.refuses_while_used(&clone, "readers", (self.bytes * 2, self.bytes * 3), &readers);
        let grown = clone.expand(&clone.target, self.bytes * 3, &readers);
        assert_eq!(grown.expect("no pod runs"), self.bytes * 3);
        assert!(capacity(&clone.target) > small * 26 / 10, "{}", capacity(&clone.target));
        assert_eq!(std::fs::read(clone.target.join("file")).expect("a file"), b"content");
        std::fs::write(clone.target.join("file"), "other").expect_err("it is read-only");
        clone.down();
        csi.delete(&id).expect("a clone can be deleted");
    }

    /// While a pod runs a volume that cannot grow in place keeps its size, and everything stays
    /// mounted.
    fn refuses_while_used(
        &self,
        mounted: &Mounted<'_>,
        name: &str,
        (bytes, more): (i64, i64),
        capability: &VolumeCapability,
    ) {
        let refused = |what: &str| {
            let refused = mounted.expand(&mounted.target, more, capability).expect_err(what);
            assert_eq!(refused.code(), Code::FailedPrecondition, "{what}: {refused}");
            assert_eq!(self.size(name), bytes, "{what}: what is refused has not grown");
            for path in [&mounted.target, &mounted.staging] {
                assert_eq!(std::fs::read(path.join("file")).expect("mounted"), b"content");
            }
        };
        let opened = File::open(mounted.target.join("file")).expect("a file");
        refused("a file is open");
        drop(opened);
        let pod = container(&mounted.target);
        refused("a container has it");
        drop(pod);
    }

    /// Bytes of a volume, by the pool.
    fn size(&self, name: &str) -> i64 {
        let volume = self.system.cli().json(&["volume", "show", &format!("csi-vol-{name}")]);
        number(&volume, "/size_bytes").cast_signed()
    }

    /// Makes a mounted volume twice as large, as a cluster does in which the nodes do it alone. An
    /// ext4 and a ublk device grow in place only where the kernel lets them; elsewhere that is
    /// refused while their pod runs, and done before the next one starts.
    fn grow_mounted(&self, mounted: &Mounted<'_>) {
        let may = capabilities(None).expect("capabilities").effective;
        let possible = self.device.grows_in_use()
            && (self.kind != "ext4" || may.contains(CapabilitySet::SYS_RESOURCE));
        let bytes = self.bytes * 2;
        if possible {
            let pod = container(&mounted.target);
            let grown = mounted.expand(&mounted.target, bytes, &self.capability);
            assert_eq!(grown.expect("growth"), bytes);
            drop(pod);
        } else {
            self.refuses_while_used(mounted, "small", (self.bytes, bytes), &self.capability);
        }
        for _ in 0..2 {
            let grown = mounted.expand(&mounted.target, bytes, &self.capability);
            assert_eq!(grown.expect("no pod runs"), bytes);
        }
        assert_eq!(std::fs::read(mounted.target.join("file")).expect("a file"), b"content");
        std::fs::write(mounted.target.join("more"), "content").expect("it is writable");
    }

    /// A clone of a clone of a volume, deleted in every order; who is left keeps what it has.
    ///
    /// # Panics
    /// Anything is not as it should be.
    pub fn orders(&self, csi: &Csi) {
        let base = self.create(csi, "base");
        let mounted = self.up(csi, &base, "base");
        plant(&mounted.target.join("tree"));
        mounted.down();
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut ids = Vec::new();
            let mut source = base.clone();
            for generation in 0..3 {
                source = self.clone(csi, &format!("g{generation}"), &source, self.bytes);
                ids.push(source.clone());
            }
            let last = order[2];
            let mounted = self.up(csi, &ids[last], "last");
            let own = format!("generation {last}");
            std::fs::write(mounted.target.join("own"), &own).expect("a file");
            let expected = tree(&mounted.target);
            for gone in &order[..2] {
                csi.delete(&ids[*gone]).expect("any order of deletion");
            }
            assert_same("mounted", &tree(&mounted.target), &expected);
            mounted.down();
            let mounted = self.up(csi, &ids[last], "last");
            assert_same("the last of three", &tree(&mounted.target), &expected);
            let busy = csi.delete(&ids[last]).expect_err("it is mounted");
            assert_eq!(busy.code(), Code::FailedPrecondition);
            mounted.down();
            csi.delete(&ids[last]).expect("any order of deletion");
        }
        csi.delete(&base).expect("the base can be deleted");
    }

    /// Everything was deleted: the pool is sound and its space has come back.
    ///
    /// # Panics
    /// It is not so.
    pub fn empty(&self) {
        self.system.check();
        let status = self.system.cli().json(&["pool", "status"]);
        assert_eq!(number(&status, "/volumes"), 0, "{status}");
        assert_eq!(number(&status, "/provisioned_bytes"), 0, "{status}");
    }
}

/// The whole life of a file system of one kind on volumes that are devices of one kind.
///
/// # Panics
/// Anything is not as it should be.
pub fn whole_life(device: Device, kind: &'static str, bytes: i64) {
    let Some(world) = World::new(device, kind, bytes) else { return };
    let csi = Csi::start(&world.system);
    world.side_by_side(&csi);
    world.growth(&csi);
    world.orders(&csi);
    world.empty();
}
