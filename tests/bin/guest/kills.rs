//! SIGKILL of the daemon under load: no I/O fails, nothing that was written is lost.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pando_tests::devices::Mounted;
use pando_tests::noise::Noise;
use pando_tests::{System, tools};

use serde_json::Value;

use crate::load::Load;
use crate::machine::{attach, check_kernel_log, create, detach, device, start};
use crate::suite::Case;

/// That under fio is among the cases of the CSI adapter.
pub(crate) const CASES: &[Case] = &[("ext4", under_ext4), ("coming and going", coming_and_going)];
/// As many kills as the command line says, at moments from its seed.
pub(crate) const CAMPAIGN: &[Case] =
    &[("fio", under_fio), ("ext4", under_ext4), ("coming and going", coming_and_going)];

/// Kills in a case, if nothing else is said.
const KILLS: u64 = 5;
/// Time between kills: at least, and at random up to as much more, in milliseconds.
const GAP: (u64, u64) = (500, 1500);
/// One of so many kills is followed by kills of daemons that are just starting, some at most, each
/// so many milliseconds after its start at most: they take the device back meanwhile.
const EARLY: (u64, u64, u64) = (2, 3, 600);
/// Time for a kill with all that follows it, on a busy host.
const KILL_TIME_MAX: Duration = Duration::from_secs(6);
/// What fio overwrites at random and reads again, again and again.
const FIO_BYTES: u64 = 8 << 20;
/// Kills while a device is made or removed, and the longest time from the beginning of that, in
/// milliseconds.
const COMINGS: u64 = 8;
const COMING_MS_MAX: u64 = 80;

/// A number on the command line.
pub(crate) fn told(place: usize) -> Option<u64> {
    std::env::args().nth(place)?.parse().ok()
}

/// How long all kills may take.
pub(crate) fn time_max() -> Duration {
    KILL_TIME_MAX * u32::try_from(told(2).unwrap_or(KILLS)).unwrap_or(u32::MAX)
}

/// Kills the daemon, and those that follow it, while the load is `alive`.
pub(crate) fn kill_some_times(system: &mut System, seed: u64, mut alive: impl FnMut() -> bool) {
    let mut noise = Noise::new(told(3).unwrap_or(seed));
    for round in 0..told(2).unwrap_or(KILLS) {
        // The moment is the only thing that is random.
        thread::sleep(Duration::from_millis(GAP.0 + noise.below(GAP.1)));
        assert!(alive(), "the load has ended before kill {round}");
        eprintln!("kill {round}");
        system.kill();
        if noise.below(EARLY.0) == 0 {
            for _ in 0..=noise.below(EARLY.1) {
                system.spawn_and_kill(Duration::from_millis(noise.below(EARLY.2)));
            }
        }
        system.spawn();
    }
}

/// fio on the device of a volume.
fn under_fio(kind: &str) {
    let mut system = start(kind);
    create(&system, "v", "32MiB");
    let path = device(&attach(&system, "v", kind, &[]));
    write_and_verify(&mut system, Path::new(&path));
    check_kernel_log();
    detach(&system, "v");
    system.check();
}

/// fio writes at random places and knows what must be there.
pub(crate) fn write_and_verify(system: &mut System, device: &Path) {
    let (device, over) = (device.display().to_string(), Arc::new(AtomicBool::new(false)));
    let stop = Arc::clone(&over);
    let writer = thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            fio(&device);
        }
    });
    kill_some_times(system, 11, || !writer.is_finished());
    over.store(true, Ordering::Relaxed);
    writer.join().expect("no error");
}

/// Writes everything once, in a random order, and reads it.
fn fio(device: &str) {
    let (filename, size) = (format!("--filename={device}"), format!("--size={FIO_BYTES}"));
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
        "--fsync=64",
        "--output-format=json",
    ];
    let output = tools::output("fio", &arguments);
    assert!(output.status.success(), "fio: {output:?}");
    let said: Value = serde_json::from_slice(&output.stdout).expect("fio tells in JSON");
    let job = &said["jobs"][0];
    assert_eq!(job["error"], 0, "{job}");
    // All that was written has been read again and was right.
    for direction in ["write", "read"] {
        assert_eq!(job[direction]["io_bytes"], FIO_BYTES, "{direction}: {job}");
    }
}

/// The daemon is killed while it makes a device, or removes it: the next one starts at once, and can
/// do what the other one began.
fn coming_and_going(kind: &str) {
    let mut system = start(kind);
    create(&system, "v", "16MiB");
    let mut noise = Noise::new(told(3).unwrap_or(14));
    for round in 0..COMINGS {
        let coming = round % 2 == 0;
        let path = device(&attach(&system, "v", kind, &[]));
        // Some of it may have to be written when the device goes.
        tools::run("dd", &["if=/dev/urandom", &format!("of={path}"), "bs=1M", "count=4"]);
        let command: &[&str] = match coming {
            true => &["volume", "attach", "v", "--kind", kind],
            false => &["volume", "detach", "v"],
        };
        if coming {
            detach(&system, "v");
        }
        let mut asked = system.cli().command(command);
        let asked = asked.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut asked = asked.expect("the command line starts");
        thread::sleep(Duration::from_millis(noise.below(COMING_MS_MAX)));
        system.kill();
        // It may have been answered before.
        asked.wait().expect("the command line ends");
        system.spawn();
        let detached = system.cli().output(&["volume", "detach", "v"]);
        let told = String::from_utf8_lossy(&detached.stderr).into_owned();
        assert!(detached.status.success() || told.contains("is not attached"), "{told}");
    }
    let left = system.cli().json(&["volume", "attachments"]);
    assert_eq!(left.as_array().map(Vec::len), Some(0), "{left}");
    check_kernel_log();
    system.check();
}

/// Programs change files on a mounted file system.
fn under_ext4(kind: &str) {
    let mut system = start(kind);
    create(&system, "v", "64MiB");
    let path = device(&attach(&system, "v", kind, &[]));
    tools::run("mkfs.ext4", &["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", &path]);
    let mounted = Mounted::new(&path, Path::new("/mnt/a"));
    let mut load = Load::start(mounted.path(), 12);
    kill_some_times(&mut system, 12, || load.goes_on());
    load.stop();
    mounted.unmount();
    tools::run("e2fsck", &["-f", "-n", &path]);
    // From the disk, not from the kernel's memory.
    fs::write("/proc/sys/vm/drop_caches", "3").expect("caches are dropped");
    let mounted = Mounted::new(&path, Path::new("/mnt/a"));
    load.check();
    mounted.unmount();
    check_kernel_log();
    detach(&system, "v");
    system.check();
}
