//! Block devices: whether this machine can do them, what the kernel says of one, and how to leave
//! none behind when a test fails.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::tools::{output, run, text};

/// What a loop device on a FUSE file needs.
const NEEDED: [&str; 2] = ["/dev/fuse", "/dev/loop-control"];

/// Whether loop devices on FUSE files can be made here; if not, the caller returns.
///
/// # Panics
/// With CI=true, where nothing may be left out.
#[must_use]
pub fn possible() -> bool {
    let refused = NEEDED.iter().find_map(|path| {
        let opened = File::options().read(true).write(true).open(path);
        opened.err().map(|error| format!("{path}: {error}"))
    });
    let Some(why) = refused else { return true };
    let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!ci, "no loop devices: {why}; the tests of devices run as root");
    eprintln!("LEFT OUT, no loop devices: {why}; the tests of devices run as root");
    false
}

/// What sysfs says of a device, for example `queue/logical_block_size`.
///
/// # Panics
/// It says nothing.
#[must_use]
pub fn sysfs(device: &str, file: &str) -> String {
    let name = device.strip_prefix("/dev/").expect("devices are in /dev");
    let path = format!("/sys/block/{name}/{file}");
    let content = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    content.trim_end().to_owned()
}

/// A device that is mounted, until this is dropped.
pub struct Mounted {
    place: PathBuf,
}

impl Mounted {
    /// Mounts `device` at `place`, which is made.
    ///
    /// # Panics
    /// It cannot be mounted.
    #[must_use]
    pub fn new(device: &str, place: &Path) -> Self {
        Self::with("defaults", device, place)
    }

    /// The same with `options` as `mount -o` takes them.
    ///
    /// # Panics
    /// As [`Self::new`].
    #[must_use]
    pub fn with(options: &str, device: &str, place: &Path) -> Self {
        fs::create_dir_all(place).expect("a directory");
        run("mount", &["-o", options, device, text(place)]);
        Self { place: place.to_owned() }
    }

    /// Where.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.place
    }

    /// Unmounts it, as a person would.
    ///
    /// # Panics
    /// It cannot be unmounted.
    pub fn unmount(self) {
        run("umount", &[text(&self.place)]);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Already unmounted, most of the time.
        output("umount", &["-q", "-l", text(&self.place)]);
    }
}

/// Takes away the loop devices on files below `directory`, and what is mounted there: what a
/// daemon that was killed has left.
pub fn clean(directory: &Path) {
    let below = |path: &str| Path::new(path).starts_with(directory);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    let entries = fs::read_dir("/sys/block").into_iter().flatten();
    for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        let backing = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"));
        if backing.is_ok_and(|path| below(&path)) {
            output("losetup", &["-d", &format!("/dev/{name}")]);
        }
    }
    // What was mounted last lies on top.
    for place in places.into_iter().rev().filter(|place| below(place)) {
        output("umount", &["-q", "-l", place]);
    }
}
