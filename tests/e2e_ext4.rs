//! The main job on real data, as a user does it: an ext4 file system made from a real directory
//! tree is copied into a volume, the volume is cloned, source and clone are changed in different
//! ways, both are checked file by file, the source is deleted, the daemon is killed, and the clone
//! is checked again. No mount is needed: `debugfs` changes files in an image, and what it changed
//! is written to the volume block by block, as a mounted file system would.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pando_tests::cli::number;
use pando_tests::tools::{present, run, text};
use pando_tests::{Cli, Nbd, System};

/// Where the tree comes from: what every development machine has, and the repository itself.
const SOURCES: [&str; 2] = ["/usr/include/linux", "/usr/include/asm-generic"];
const IMAGE: &str = "128M";
const BLOCK: usize = 4096;

type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// Copies a real tree into `target`.
fn real_tree(target: &Path) {
    std::fs::create_dir(target).expect("a directory");
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let parts = ["engine", "cli", "docs", "proto"].map(|part| repository.join(part));
    let others = SOURCES.iter().map(PathBuf::from);
    for source in others.chain(parts).filter(|source| source.is_dir()) {
        run("cp", &["-rL", "--no-preserve=mode", text(&source), text(target)]);
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
    // Made by mkfs, not by us.
    files.retain(|name, _| !name.starts_with("lost+found"));
    files
}

/// Copies a volume out, checks the file system on it, and reads all its files.
fn verified(system: &System, name: &str) -> Tree {
    let image = system.path().join(format!("{name}.check"));
    run("nbdcopy", &[system.cli().serve_uri(name).as_str(), text(&image)]);
    run("e2fsck", &["-fn", text(&image)]);
    let files = system.path().join(format!("{name}.files"));
    std::fs::create_dir(&files).expect("a directory");
    run("debugfs", &["-R", &format!("rdump / {}", files.display()), text(&image)]);
    let found = tree(&files);
    std::fs::remove_dir_all(&files).expect("our directory");
    std::fs::remove_file(&image).expect("our file");
    found
}

fn assert_same(what: &str, found: &Tree, expected: &Tree) {
    let differing: Vec<_> =
        expected.iter().filter(|(name, bytes)| found.get(*name) != Some(*bytes)).collect();
    let names: Vec<_> = differing.iter().take(5).map(|(name, _)| name).collect();
    assert!(differing.is_empty(), "{what}: {} files differ: {names:?}", differing.len());
    assert_eq!(found.len(), expected.len(), "{what}: files that should not be there");
}

/// Changes files in the image that the volume holds, and writes the blocks that changed.
fn change(system: &System, image: &Path, name: &str, commands: &[String]) -> usize {
    let changed = system.path().join("changed");
    run("cp", &["--sparse=always", text(image), text(&changed)]);
    let script = system.path().join("script");
    std::fs::write(&script, commands.join("\n") + "\n").expect("a file");
    run("debugfs", &["-w", "-f", text(&script), text(&changed)]);
    let old = std::fs::read(image).expect("an image");
    let new = std::fs::read(&changed).expect("an image");
    let mut nbd = Nbd::open(&system.cli().serve(name), name).expect("an export");
    let mut blocks = 0;
    for (index, (old, new)) in old.chunks(BLOCK).zip(new.chunks(BLOCK)).enumerate() {
        if old != new {
            nbd.write(u64::try_from(index * BLOCK).expect("64 bits"), new);
            blocks += 1;
        }
    }
    nbd.flush();
    nbd.close();
    std::fs::remove_file(changed).expect("our file");
    blocks
}

/// Commands of debugfs that replace `count` files by others and add one, and what becomes of the
/// tree by them.
fn edits(system: &System, tree: &mut Tree, mark: &str, every: usize, count: usize) -> Vec<String> {
    let fresh = system.path().join(mark);
    let mut commands = Vec::new();
    let names: Vec<PathBuf> = tree.keys().step_by(every).take(count).cloned().collect();
    for (turn, name) in names.iter().enumerate() {
        commands.push(format!("rm \"/{}\"", name.display()));
        tree.remove(name);
        if turn % 2 == 0 {
            let bytes = format!("{mark} of {}\n", name.display()).repeat(2000).into_bytes();
            let local = fresh.with_extension(turn.to_string());
            std::fs::write(&local, &bytes).expect("a file");
            commands.push(format!("write \"{}\" \"/{}\"", local.display(), name.display()));
            tree.insert(name.clone(), bytes);
        }
    }
    std::fs::write(&fresh, mark.repeat(100_000)).expect("a file");
    commands.push(format!("write \"{}\" \"/{mark}\"", fresh.display()));
    tree.insert(PathBuf::from(mark), mark.repeat(100_000).into_bytes());
    commands
}

fn delete(cli: &Cli, name: &str) {
    cli.run(&["volume", "serve", "--stop", name]);
    cli.run(&["volume", "delete", name]);
}

#[test]
fn a_clone_of_a_real_file_system_lives_its_own_life() {
    if !present(&["mkfs.ext4", "e2fsck", "debugfs", "nbdcopy"]) {
        return;
    }
    let mut system = System::start("1GiB");
    let cli = system.cli();
    // 1. A real tree becomes a file system, the file system a volume.
    let original = system.path().join("tree");
    real_tree(&original);
    let expected = tree(&original);
    assert!(expected.len() > 100, "a real tree has files, this one {}", expected.len());
    let image = system.path().join("image");
    run("mkfs.ext4", &["-q", "-d", text(&original), text(&image), IMAGE]);
    let size = std::fs::metadata(&image).expect("an image").len();
    cli.run(&["volume", "create", "source", "--size", &size.to_string()]);
    run("nbdcopy", &["--flush", text(&image), &cli.serve_uri("source")]);
    assert_same("the volume as copied in", &verified(&system, "source"), &expected);

    // 2. The clone shares everything.
    cli.run(&["clone", "source", "clone"]);
    let clone = cli.json(&["volume", "show", "clone", "--space"]);
    assert_eq!(number(&clone, "/space/exclusive_bytes"), 0, "a new clone holds nothing alone");
    assert_eq!(number(&clone, "/space/shared_bytes"), number(&clone, "/mapped_bytes"));

    // 3. Both are changed, differently; neither sees the other's changes.
    let (mut in_source, mut in_clone) = (expected.clone(), expected.clone());
    let commands = edits(&system, &mut in_source, "from-the-source", 3, 40);
    change(&system, &image, "source", &commands);
    let commands = edits(&system, &mut in_clone, "from-the-clone", 5, 60);
    let blocks = change(&system, &image, "clone", &commands);
    assert_same("the source", &verified(&system, "source"), &in_source);
    assert_same("the clone", &verified(&system, "clone"), &in_clone);
    let clone = cli.json(&["volume", "show", "clone", "--space"]);
    let own = number(&clone, "/own_bytes");
    let written = u64::try_from(blocks * BLOCK).expect("64 bits");
    assert_eq!(own, written, "a clone adds what is written to it and nothing else");

    // 4. The source goes, the daemon is killed: the clone is what it was.
    delete(&cli, "source");
    system.crash();
    assert_same("the clone alone", &verified(&system, "clone"), &in_clone);
    system.check();
    let scrubbed = cli.json(&["pool", "scrub", "--rate", "4GiB"]);
    assert_eq!(scrubbed["errors"].as_array().map(Vec::len), Some(0), "{scrubbed}");
    system.stop();
}
