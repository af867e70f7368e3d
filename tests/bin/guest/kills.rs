//! SIGKILL of the daemon under load: no I/O fails, nothing that was written is lost.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pando_engine::units::to_u64;
use pando_tests::devices::Mounted;
use pando_tests::noise::Noise;
use pando_tests::{System, tools};

use serde_json::Value;

use crate::machine::{Files, attach, check_files, check_kernel_log, create, detach, device, start};
use crate::suite::Case;

pub(crate) const CASES: &[Case] = &[("fio", under_fio), ("ext4", under_ext4)];

const KILLS: u64 = 5;
/// Time between kills: at least, and at random up to as much more, in milliseconds.
const GAP: (u64, u64) = (500, 1500);
/// What fio overwrites at random and reads again, and how often.
const FIO_BYTES: u64 = 16 << 20;
const LOOPS: u32 = 8;
/// Programs that change files at the same time.
const WRITERS: u64 = 3;
/// Files of each.
const FILES: u64 = 24;

fn kill_some_times(system: &mut System, seed: u64, mut alive: impl FnMut() -> bool) {
    let mut noise = Noise::new(seed);
    for round in 0..KILLS {
        // The moment is the only thing that is random.
        thread::sleep(Duration::from_millis(GAP.0 + noise.below(GAP.1)));
        assert!(alive(), "the load has ended before kill {round}");
        system.crash();
    }
}

/// fio writes at random places and knows what must be there.
fn under_fio(kind: &str) {
    let mut system = start(kind);
    create(&system, "v", "32MiB");
    let path = device(&attach(&system, "v", kind, &[]));
    let filename = format!("--filename={path}");
    let (loops, size) = (format!("--loops={LOOPS}"), format!("--size={FIO_BYTES}"));
    let arguments = [
        "--name=kills",
        &filename,
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randwrite",
        "--bs=4k",
        &size,
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--serialize_overlap=1",
        &loops,
        "--fsync=64",
        "--output-format=json",
    ];
    let mut command = Command::new("fio");
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut fio = command.spawn().expect("fio starts");
    kill_some_times(&mut system, 11, || fio.try_wait().expect("fio").is_none());
    let output = fio.wait_with_output().expect("fio ends");
    assert!(output.status.success(), "fio: {output:?}");
    let said: Value = serde_json::from_slice(&output.stdout).expect("fio tells in JSON");
    let job = &said["jobs"][0];
    assert_eq!(job["error"], 0, "{job}");
    // All that was written has been read again and was right.
    let written = u64::from(LOOPS) * FIO_BYTES;
    for direction in ["write", "read"] {
        assert_eq!(job[direction]["io_bytes"], written, "{direction}: {job}");
    }
    check_kernel_log();
    detach(&system, "v");
    system.check();
}

/// One program: makes, overwrites, renames, cuts and removes files of its own, and knows what is
/// in each. Any error ends it.
fn change_files(root: &Path, seed: u64, stop: &AtomicBool) -> Files {
    let mut noise = Noise::new(seed);
    let mut files = Files::new();
    fs::create_dir_all(root).expect("a directory");
    while !stop.load(Ordering::Relaxed) {
        let path = root.join(format!("f{}", noise.below(FILES)));
        let length = usize::try_from(noise.below(100_000)).expect("it is small");
        match noise.below(8) {
            0 => {
                fs::remove_file(&path).unwrap_or_else(|error| {
                    assert!(error.kind() == std::io::ErrorKind::NotFound, "remove: {error}");
                });
                files.remove(&path);
            }
            1 => {
                if let Some(content) = files.remove(&path) {
                    let other = root.join(format!("f{}", noise.below(FILES)));
                    fs::rename(&path, &other).expect("rename");
                    files.insert(other, content);
                }
            }
            2 => {
                if let Some(content) = files.get_mut(&path) {
                    let length = length % (content.len() + 1);
                    let file = File::options().write(true).open(&path).expect("open");
                    file.set_len(to_u64(length)).expect("truncate");
                    content.truncate(length);
                }
            }
            way => {
                let content = noise.bytes(length);
                let mut file = File::create(&path).expect("create");
                file.write_all(&content).expect("write");
                if way == 3 {
                    file.sync_all().expect("fsync");
                }
                files.insert(path, content);
            }
        }
    }
    files
}

/// Programs change files on a mounted file system.
fn under_ext4(kind: &str) {
    let mut system = start(kind);
    create(&system, "v", "64MiB");
    let path = device(&attach(&system, "v", kind, &[]));
    tools::run("mkfs.ext4", &["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", &path]);
    let mounted = Mounted::new(&path, Path::new("/mnt/a"));
    let stop = Arc::new(AtomicBool::new(false));
    let writers = (0..WRITERS).map(|number| {
        let (root, stop) = (mounted.path().join(format!("w{number}")), Arc::clone(&stop));
        thread::spawn(move || change_files(&root, number, &stop))
    });
    let writers: Vec<_> = writers.collect();
    // Beside them somebody who wants everything on the disk.
    let (root, over) = (mounted.path().to_owned(), Arc::clone(&stop));
    let syncer = thread::spawn(move || {
        let root = File::open(root).expect("the root");
        while !over.load(Ordering::Relaxed) {
            rustix::fs::syncfs(&root).expect("syncfs");
            thread::sleep(Duration::from_millis(200));
        }
    });
    kill_some_times(&mut system, 12, || !writers.iter().any(thread::JoinHandle::is_finished));
    stop.store(true, Ordering::Relaxed);
    let files: Vec<_> =
        writers.into_iter().map(|writer| writer.join().expect("no error")).collect();
    syncer.join().expect("no error");
    mounted.unmount();
    tools::run("e2fsck", &["-f", "-n", &path]);
    // From the disk, not from the kernel's memory.
    fs::write("/proc/sys/vm/drop_caches", "3").expect("caches are dropped");
    let mounted = Mounted::new(&path, Path::new("/mnt/a"));
    let written: usize = files.iter().map(Files::len).sum();
    assert!(written > 0);
    for files in &files {
        check_files(files);
    }
    mounted.unmount();
    check_kernel_log();
    detach(&system, "v");
    system.check();
}
