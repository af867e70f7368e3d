//! The report of the node: what a pod waits for whose volume is a clone, from the call that makes
//! the clone of a mounted volume to the file system at the pod's path. Real programs, a loop device
//! on a FUSE file, a real disk.
//!
//! ```text
//! report_stage [CLONES]       TMPDIR names the disk; 20 clones of each kind if nothing is said
//! ```
//! The programs are those beside this one: build them with the same profile first. Needs root.

use std::io::Write as _;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use pando_benches::report::Table;
use pando_tests::csi::{Mounted, can_mount, from_volume, mount_of, request};
use pando_tests::noise::Noise;
use pando_tests::{Csi, System};

const BYTES: i64 = 1 << 30;
/// Files in the source, of 1 MiB each.
const FILES: u64 = 200;

fn main() -> Result<()> {
    let clones: usize = match std::env::args().nth(1) {
        Some(text) => text.parse().context("CLONES is a number")?,
        None => 20,
    };
    ensure!(clones > 0, "at least one clone");
    ensure!(can_mount(), "needs root, FUSE and loop devices");
    let mut system = System::empty();
    system.create_pool(&["--size", "8GiB", "--allocate", "write"]);
    system.spawn();
    let csi = Csi::start(&system);
    let mut table = Table::new("CSI: a clone of a mounted volume, until a pod can use it");
    for kind in ["ext4", "xfs", "btrfs"] {
        let times = measure(&csi, kind, clones)?;
        let aim = |kind| if kind == "ext4" { "<= 1 s" } else { "" };
        for (what, mut ms) in ["make", "stage", "publish", "stage and publish"].iter().zip(times) {
            ms.sort_by(f64::total_cmp);
            let (median, p95) = (ms[ms.len() / 2], ms[ms.len() * 95 / 100]);
            let shown = format!("median {median:.1} ms, 95th percentile {p95:.1} ms");
            let aim = if what.contains("and") { aim(kind) } else { "" };
            table.row(format!("{kind}: {what}"), shown, aim);
        }
    }
    writeln!(std::io::stdout(), "{table}")?;
    Ok(())
}

/// Milliseconds of making, staging, publishing, and of the last two together.
fn measure(csi: &Csi, kind: &str, clones: usize) -> Result<[Vec<f64>; 4]> {
    let capability = mount_of(kind);
    let id = csi.create(request(&format!("{kind}-source"), BYTES, &capability))?.volume_id;
    let source = Mounted::up(csi, &id, &format!("{kind}-source"), &capability);
    let piece = Noise::new(1).bytes(1 << 20);
    for file in 0..FILES {
        std::fs::write(source.target.join(format!("file-{file}")), &piece)?;
    }
    rustix::fs::syncfs(std::fs::File::open(&source.target)?)?;
    let mut times = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    for clone in 0..clones {
        let name = format!("{kind}-{clone}");
        let mut wanted = request(&name, BYTES, &capability);
        wanted.volume_content_source = from_volume(&id);
        let begin = Instant::now();
        let clone_id = csi.create(wanted)?.volume_id;
        let made = ms(begin);
        let clone = Mounted::places(csi, &clone_id, &name);
        let begin = Instant::now();
        csi.stage(&clone_id, &clone.staging, &capability)?;
        let staged = ms(begin);
        clone.publish(&capability)?;
        let published = ms(begin);
        for (all, one) in times.iter_mut().zip([made, staged, published - staged, published]) {
            all.push(one);
        }
        clone.down();
        csi.delete(&clone_id)?;
    }
    source.down();
    csi.delete(&id)?;
    Ok(times)
}

fn ms(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}
