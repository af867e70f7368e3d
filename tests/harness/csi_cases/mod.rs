//! What the CSI adapter must do on a node, whatever kind of device its volumes are: with loop
//! devices on any machine, with ublk and the kernel's NBD client in the virtual machine.
//!
//! ```text
//! blank   clones of what no pod has used yet
//! failed  what a failed call leaves: nothing
//! fs      file systems: clones beside their sources, growth, deletion in every order
//! node    what is repeated, refused or interrupted; raw devices; restarts
//! ```

pub mod blank;
pub mod failed;
pub mod fs;
pub mod node;

use std::fs::File;
use std::io::Write;
use std::path::Path;

use crate::csi::can_mount;

/// What volumes are to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Loop devices.
    Loop,
    /// `/dev/ublkbN`.
    Ublk,
    /// `/dev/nbdN`.
    Nbd,
}

/// Linux 6.16 lets a ublk device grow while it is used.
const UBLK_GROWS: (u32, u32) = (6, 16);

impl Device {
    /// The kind of that name.
    ///
    /// # Panics
    /// There is none.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let all = [Self::Loop, Self::Ublk, Self::Nbd];
        all.into_iter().find(|device| device.name() == name).expect("a kind of device")
    }

    /// Its name in the parameters of a class.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loop => "loop",
            Self::Ublk => "ublk",
            Self::Nbd => "nbd",
        }
    }

    /// Whether volumes can be such devices here. Only the virtual machine asks for the others, and
    /// has them.
    fn possible(self) -> bool {
        self != Self::Loop || can_mount()
    }

    /// Whether the device goes on when its daemon is replaced.
    #[must_use]
    pub fn outlives_daemon(self) -> bool {
        self != Self::Loop
    }

    /// Whether a device in use can become larger.
    #[must_use]
    pub fn grows_in_use(self) -> bool {
        self != Self::Ublk || kernel() >= UBLK_GROWS
    }
}

fn kernel() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().expect("a number"));
    (numbers.next().expect("a version"), numbers.next().expect("a version"))
}

/// Writes a file and makes it durable by itself: only the log of the file system has it.
fn write_durably(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).expect("a file");
    file.write_all(bytes).expect("space");
    file.sync_all().expect("what was written reaches the volume");
}
