//! Damage on the disk, structure by structure: it is met with an error that says which structure
//! and where, in the answer or in the log, and never with wrong data. What is not damaged is still
//! served.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pando_engine::format::geometry::{Geometry, PageId, Table};
use pando_engine::format::superblock::Superblock;
use pando_engine::units::{BLOCK_BYTES, BLOCK_SIZE, BlockNo};
use pando_tests::cli::number;
use pando_tests::noise::Noise;
use pando_tests::{Nbd, System};

const EIO: u32 = 5;
const VOLUME_BYTES: u64 = 4 << 20;

/// The file of a pool whose daemon is stopped.
struct Image(File);

impl Image {
    fn open(pool: &Path) -> Self {
        Self(File::options().read(true).write(true).open(pool).expect("a pool"))
    }

    fn blocks(&self) -> u64 {
        self.0.metadata().expect("a length").len() / BLOCK_BYTES
    }

    fn read(&self, block: BlockNo) -> [u8; BLOCK_SIZE] {
        let mut bytes = [0; BLOCK_SIZE];
        self.0.read_exact_at(&mut bytes, block.byte_offset()).expect("a block");
        bytes
    }

    /// Flips one bit in the middle of a block.
    fn flip(&self, block: BlockNo) {
        let mut bytes = self.read(block);
        bytes[100] ^= 0x10;
        self.0.write_all_at(&bytes, block.byte_offset()).expect("a block");
    }

    fn superblock_places(&self) -> [BlockNo; 4] {
        let blocks = self.blocks();
        [0, 1, blocks - 2, blocks - 1].map(BlockNo::new)
    }

    fn superblock(&self) -> Superblock {
        let places = self.superblock_places();
        let found = places.iter().filter_map(|at| Superblock::decode(&self.read(*at), *at).ok());
        found.max_by_key(|superblock| superblock.generation).expect("a superblock")
    }

    /// Blocks for data and nodes that begin with these bytes after their crc.
    fn find(&self, geometry: &Geometry, mark: &[u8]) -> Vec<BlockNo> {
        let blocks = (0..geometry.pool_blocks).map(BlockNo::new);
        let usable = blocks.filter(|block| geometry.locate(*block).is_some());
        usable.filter(|block| self.read(*block)[4..].starts_with(mark)).collect()
    }
}

fn content(volume: u64) -> Vec<u8> {
    Noise::new(volume).bytes(1 << 20)
}

/// A pool with two volumes, closed; each has a MiB of noise in every other block, so that their
/// maps have more than one node.
fn pool() -> System {
    let mut system = System::start("64MiB");
    let cli = system.cli();
    for (name, volume) in [("left", 1), ("right", 2)] {
        cli.run(&["volume", "create", name, "--size", &VOLUME_BYTES.to_string()]);
        let mut nbd = Nbd::open(&cli.serve(name), name).expect("an export");
        for (index, block) in (0..).zip(content(volume).chunks(BLOCK_SIZE)) {
            nbd.write(2 * index * BLOCK_BYTES, block);
        }
        nbd.close();
    }
    system.stop();
    system
}

/// Reads a volume; how many of its blocks cannot be read. Those that can hold what was written.
fn unreadable(system: &System, name: &str, volume: u64) -> usize {
    let mut nbd = Nbd::open(&system.cli().serve(name), name).expect("an export");
    let mut bad = 0;
    for (index, block) in (0..).zip(content(volume).chunks(BLOCK_SIZE)) {
        match nbd.try_read(2 * index * BLOCK_BYTES, 4096).expect("a connection") {
            Ok(found) => assert!(found == block, "{name}, block {index}: wrong data"),
            Err(errno) => {
                assert_eq!(errno, EIO);
                bad += 1;
            }
        }
    }
    nbd.close();
    bad
}

fn refusal(system: &mut System) -> String {
    let log = system.try_spawn().expect_err("such a pool is not served");
    log.lines().last().unwrap_or_default().to_owned()
}

fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not said: {message}");
    }
}

#[test]
fn one_superblock_is_enough_and_none_is_too_few() {
    let mut system = pool();
    let image = Image::open(system.pool());
    let newest = image.superblock().generation;
    let places = image.superblock_places();
    let whole = places.map(|at| image.read(at));
    for left in places {
        for (at, bytes) in places.iter().zip(&whole) {
            image.0.write_all_at(bytes, at.byte_offset()).expect("a block");
        }
        let kept = Superblock::decode(&image.read(left), left).expect("whole");
        if kept.generation < newest {
            // Half a checkpoint back: what it refers to may be gone. Not promised.
            continue;
        }
        for at in places.iter().filter(|at| **at != left) {
            image.flip(*at);
        }
        let copy = std::fs::read(system.pool()).expect("a pool");
        system.spawn();
        assert_eq!((unreadable(&system, "left", 1), unreadable(&system, "right", 2)), (0, 0));
        system.kill();
        std::fs::write(system.pool(), copy).expect("a pool");
    }
    for at in places.iter().filter(|at| Superblock::decode(&image.read(**at), **at).is_ok()) {
        image.flip(*at);
    }
    says(&refusal(&mut system), &["superblock at block", "checksum does not match"]);
}

#[test]
fn a_damaged_catalogue_is_named() {
    let mut system = pool();
    let image = Image::open(system.pool());
    let block = image.superblock().catalogue;
    image.flip(block);
    let shown = format!("catalogue at {block}");
    says(&refusal(&mut system), &[&shown, "checksum does not match"]);
}

#[test]
fn a_damaged_node_hides_its_volume_alone() {
    let mut system = pool();
    let image = Image::open(system.pool());
    let geometry = image.superblock().geometry;
    // One by one: only nodes of the present maps matter, and each belongs to one volume.
    let mut harmed = 0;
    for block in image.find(&geometry, b"PNod") {
        let before = std::fs::read(system.pool()).expect("a pool");
        image.flip(block);
        system.spawn();
        let bad = (unreadable(&system, "left", 1), unreadable(&system, "right", 2));
        assert!(bad.0 == 0 || bad.1 == 0, "{block} harms both volumes: {bad:?}");
        if bad != (0, 0) {
            harmed += 1;
            let shown = format!("map node at {block}");
            says(&system.log(), &[&shown]);
            let report = system.cli().output(&["--output", "json", "pool", "check"]);
            assert_eq!(report.status.code(), Some(1), "a check finds it");
            says(&String::from_utf8_lossy(&report.stdout), &[&block.to_string()]);
        }
        system.kill();
        std::fs::write(system.pool(), before).expect("a pool");
    }
    assert!(harmed >= 2, "each volume has nodes; {harmed} were in use");
}

#[test]
fn damaged_data_is_an_error_and_not_data() {
    let mut system = pool();
    let image = Image::open(system.pool());
    let geometry = image.superblock().geometry;
    let (left, right) = (content(1), content(2));
    let block = |content: &[u8]| {
        let found = image.find(&geometry, &content[4..64]);
        *found.first().expect("the data is on the disk")
    };
    let broken = block(&left[5 * BLOCK_SIZE..]);
    image.flip(broken);
    assert_ne!(broken, block(&right));
    system.spawn();
    assert_eq!((unreadable(&system, "left", 1), unreadable(&system, "right", 2)), (1, 0));
    says(&system.log(), &["left", &broken.get().to_string()]);
    let cli = system.cli();
    let scrub = cli.output(&["--output", "json", "pool", "scrub", "--rate", "4GiB"]);
    assert_eq!(scrub.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&scrub.stdout).expect("JSON");
    assert_eq!(report["errors"].as_array().map(Vec::len), Some(1), "{report}");
    assert_eq!(number(&report, "/errors/0/block"), broken.get());
    let exported = system.path().join("out");
    let error = cli.error(&["volume", "export", "left", exported.to_str().expect("text")]);
    says(&error, &[&broken.to_string(), "does not match its checksum"]);
    assert!(!exported.exists(), "a copy with a hole in it is not left to be taken for a good one");
    // Written again, it is well.
    let mut nbd = Nbd::open(&cli.serve("left"), "left").expect("an export");
    nbd.write(10 * BLOCK_BYTES, &left[5 * BLOCK_SIZE..6 * BLOCK_SIZE]);
    nbd.close();
    assert_eq!(unreadable(&system, "left", 1), 0);
}

#[test]
fn damaged_tables_and_headers_are_named() {
    for (table, name) in [(Table::Refs, "reference-count page"), (Table::Sums, "checksum page")] {
        let mut system = pool();
        let image = Image::open(system.pool());
        let geometry = image.superblock().geometry;
        // The last version of a page is in one of its slots; both are hit.
        for group in 0..u32::try_from(geometry.groups()).expect("a small pool") {
            for slot in 0..2 {
                image.flip(geometry.page_place(PageId { group, table, page: 0 }, slot));
            }
        }
        says(&met(&mut system), &[name, "of group", "checksum does not match"]);
    }
    let mut system = pool();
    let image = Image::open(system.pool());
    let geometry = image.superblock().geometry;
    for group in 0..geometry.groups() {
        for slot in 0..2 {
            image.flip(geometry.header_place(group, slot));
        }
    }
    says(&met(&mut system), &["header of group", "checksum does not match"]);
}

/// Everything that is said about a damaged pool while it is opened, used and checked.
fn met(system: &mut System) -> String {
    if let Err(log) = system.try_spawn() {
        return log;
    }
    let cli = system.cli();
    let mut nbd = Nbd::open(&cli.serve("left"), "left").expect("an export");
    for index in 0..16 {
        // Data, an error, but nothing else: the pool may have stopped by now.
        if let Ok(Ok(found)) = nbd.try_read(2 * index * BLOCK_BYTES, 4096) {
            let at = usize::try_from(index).expect("small") * BLOCK_SIZE;
            assert!(found == content(1)[at..at + BLOCK_SIZE], "wrong data");
        }
        nbd.try_write((2 * index + 1) * BLOCK_BYTES, &[9; 4096], 0).map(drop).unwrap_or_default();
    }
    drop(nbd);
    let report = cli.output(&["--output", "json", "pool", "check"]);
    let shown = [report.stdout, report.stderr].concat();
    system.terminate();
    system.log() + &String::from_utf8_lossy(&shown)
}

#[test]
fn a_damaged_journal_is_not_taken_for_a_short_one() {
    let mut system = System::start("64MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "4MiB"]);
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    for index in 0..64 {
        nbd.write(index * BLOCK_BYTES, &[7; 4096]);
        nbd.flush();
    }
    system.kill();
    let image = Image::open(system.pool());
    let superblock = image.superblock();
    // The second block of the log: records that were flushed, with flushed records behind them.
    let start = superblock.geometry.journal_start().plus(superblock.journal_offset / BLOCK_BYTES);
    image.0.write_all_at(&[0xFF; 64], start.plus(2).byte_offset()).expect("a block");
    says(&refusal(&mut system), &["journal", "damaged"]);
}
