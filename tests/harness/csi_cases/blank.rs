//! Clones of claims that no pod has used yet: source and clone are applied at once, and the pod of
//! the clone can be the first. A copy of nothing is formatted as a new volume is; a copy of half a
//! file system is never handed out, or is known to be one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pando_csi::proto::csi::controller_client::ControllerClient;
use pando_csi::proto::csi::node_client::NodeClient;
use pando_csi::proto::csi::{CreateSnapshotRequest, NodeStageVolumeRequest, VolumeContentSource};
use tonic::Code;

use super::Device;
use super::node::{code, label, pool_name, start, write_unknown};
use crate::csi::{Mounted, from_snapshot, from_volume, mount_of, request_of};
use crate::tools::{present, run, text};
use crate::{Csi, System};

const MIB: i64 = 1 << 20;
const KINDS: [(&str, i64); 3] = [("ext4", 64 * MIB), ("xfs", 320 * MIB), ("btrfs", 256 * MIB)];
/// Sources that are cloned while they are formatted.
const ROUNDS: u64 = 6;

fn create(
    csi: &Csi,
    device: Device,
    name: &str,
    (kind, bytes): (&str, i64),
    source: Option<VolumeContentSource>,
) -> String {
    let mut wanted = request_of(device.name(), name, bytes, &mount_of(kind));
    wanted.volume_content_source = source;
    csi.create(wanted).expect("a volume").volume_id
}

fn snapshot(csi: &Csi, name: &str, source: &str) -> String {
    let request = CreateSnapshotRequest {
        name: name.to_owned(),
        source_volume_id: source.to_owned(),
        ..Default::default()
    };
    let answer = csi.answer(csi.controller().create_snapshot(request)).expect("a snapshot");
    answer.snapshot.expect("an answer has a snapshot").snapshot_id
}

/// Stages and publishes a volume for the first time, and once more; what is written stays.
fn used(csi: &Csi, id: &str, name: &str, kind: &str) {
    let mounted = Mounted::up(csi, id, name, &mount_of(kind));
    let target = text(&mounted.target);
    assert_eq!(run("findmnt", &["-n", "-o", "FSTYPE", "--mountpoint", target]).trim(), kind);
    std::fs::write(mounted.target.join("file"), name).expect("a file");
    mounted.down();
    // What kubelet does not name is what the volume was made for.
    let mounted = Mounted::up(csi, id, name, &mount_of(""));
    assert_eq!(std::fs::read(mounted.target.join("file")).expect("a file"), name.as_bytes());
    mounted.down();
}

/// A clone of a volume that no pod has used, and a clone of that, and what is restored from a
/// snapshot of it, are formatted when they are used; so is the source.
///
/// # Panics
/// Anything is not as it should be.
pub fn clones_are_formatted(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    if !present(&["mkfs.btrfs", "btrfstune"]) {
        return;
    }
    for (kind, bytes) in KINDS {
        let new = (kind, bytes);
        let source = create(&csi, device, "source", new, None);
        let clone = create(&csi, device, "clone", (kind, 2 * bytes), from_volume(&source));
        let second = create(&csi, device, "second", (kind, 2 * bytes), from_volume(&clone));
        let taken = snapshot(&csi, "taken", &source);
        let restored = create(&csi, device, "restored", new, from_snapshot(&taken));
        for (id, name) in [(&clone, "clone"), (&source, "source"), (&restored, "restored")] {
            used(&csi, id, name, kind);
        }
        // Its source was used meanwhile, but it is of before.
        used(&csi, &second, "second", kind);
        for id in [&source, &clone, &second, &restored] {
            csi.delete(id).expect("it is not in use");
        }
        let request = pando_csi::proto::csi::DeleteSnapshotRequest {
            snapshot_id: taken,
            ..Default::default()
        };
        csi.answer(csi.controller().delete_snapshot(request)).expect("it is not in use");
    }
    system.check();
}

/// An adapter was killed while it formatted the source: the source has a mark, and half a file
/// system. Its copies have the mark, and are formatted when they are used; copies of what was used
/// have none.
///
/// # Panics
/// Anything is not as it should be.
pub fn half_formatted_sources_have_usable_clones(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    let cli = system.cli();
    let new = KINDS[0];
    let source = create(&csi, device, "source", new, None);
    write_unknown(&cli, "source");
    label(&cli, "source", "csi.pando.dev/formatting=true");
    let clone = create(&csi, device, "clone", new, from_volume(&source));
    let taken = snapshot(&csi, "taken", &source);
    let restored = create(&csi, device, "restored", new, from_snapshot(&taken));
    for (id, name) in [(&clone, "clone"), (&restored, "restored"), (&source, "source")] {
        used(&csi, id, name, "ext4");
        let labels = cli.json(&["volume", "show", &pool_name(name)])["labels"].to_string();
        assert!(!labels.contains("formatting"), "{labels}");
    }
    let copy = create(&csi, device, "copy", new, from_volume(&source));
    let mounted = Mounted::up(&csi, &copy, "copy", &mount_of("ext4"));
    assert_eq!(std::fs::read(mounted.target.join("file")).expect("a file"), b"source");
    mounted.down();
}

/// Clones that are made while the first pod of their source has it formatted: those that are made
/// at all can be used. A caller that is told ABORTED comes again.
///
/// # Panics
/// Anything is not as it should be.
pub fn clones_made_meanwhile_are_usable(device: Device) {
    let Some((system, csi)) = start(device) else { return };
    for round in 0..ROUNDS {
        let (kind, bytes) = KINDS[usize::try_from(round % 2).expect("small")];
        let name = format!("source-{round}");
        let source = create(&csi, device, &name, (kind, bytes), None);
        let places = Mounted::places(&csi, &source, &name);
        let request = NodeStageVolumeRequest {
            volume_id: source.clone(),
            staging_target_path: places.staging.to_str().expect("a text").to_owned(),
            volume_capability: Some(mount_of(kind)),
            ..Default::default()
        };
        let staged = Arc::new(AtomicBool::new(false));
        let (channel, done) = (csi.channel(), Arc::clone(&staged));
        let staging = csi.begin(async move {
            let mut node = NodeClient::new(channel);
            loop {
                let answer = node.node_stage_volume(request.clone()).await;
                if answer.as_ref().err().is_some_and(|error| error.code() == Code::Aborted) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
                done.store(true, Ordering::Release);
                return answer;
            }
        });
        let clones = clone_until(&csi, device, (&source, round), (kind, bytes), &staged);
        csi.wait(staging).expect("a task").expect("the volume is staged");
        for (name, id) in &clones {
            let mounted = Mounted::up(&csi, id, name, &mount_of(kind));
            std::fs::write(mounted.target.join("file"), "content").expect("a file");
            mounted.down();
            csi.delete(id).expect("it is not in use");
        }
        csi.unstage(&source, &places.staging).expect("the volume is unstaged");
        csi.delete(&source).expect("it is not in use");
    }
    system_is_sound(&system);
}

fn system_is_sound(system: &System) {
    let left = system.cli().json(&["volume", "attachments"]);
    assert_eq!(left.as_array().map(Vec::len), Some(0), "{left}");
    system.check();
}

/// Clones a volume again and again, until it is staged and once after that.
fn clone_until(
    csi: &Csi,
    device: Device,
    (source, round): (&str, u64),
    (kind, bytes): (&str, i64),
    staged: &AtomicBool,
) -> BTreeMap<String, String> {
    let mut clones = BTreeMap::new();
    loop {
        let last = staged.load(Ordering::Acquire);
        let name = format!("clone-{round}-{}", clones.len());
        let mut wanted = request_of(device.name(), &name, bytes, &mount_of(kind));
        wanted.volume_content_source = from_volume(source);
        let mut controller = ControllerClient::new(csi.channel());
        match csi.answer(controller.create_volume(wanted)) {
            Ok(answer) => {
                let clone = answer.volume.expect("an answer has a volume").volume_id;
                clones.insert(name, clone);
            }
            refused => assert_eq!(code(refused), Code::Aborted),
        }
        if last {
            return clones;
        }
    }
}
