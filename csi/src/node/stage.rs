//! Staging: a volume becomes a device, and its file system is mounted once for this node.
//!
//! ```text
//! 1 attach     the daemon makes the volume a device; it is verified (device.rs)
//! 2 clear      what is mounted at the path from a device that is dead is taken away
//! 3 prepare    empty volume: mark, mkfs, unmark      others: check, new identity of a clone, mark
//! 4 mount      complete before it appears at the path
//! 5 grow       to the size of the device
//! ```
//!
//! Each step can be repeated, and what has been done is told by the kernel and by labels in the
//! pool's catalogue; so after a crash anywhere the same call goes on where it ended. A volume is
//! formatted only if no block of it was ever written, or if a mark says that we were formatting
//! it when we were interrupted, and never if it has a content source.

use std::collections::BTreeMap;
use std::path::Path;

use pando_proto::v1;
use tonic::Status;

use crate::adapter::Adapter;
use crate::daemon::by_number;
use crate::labels;

use super::device::{self, Device, Owner, owner};
use super::fs::{self, Found, Kind};
use super::mount::{self, Unmount};
use super::options::MountOptions;
use super::paths::Place;
use super::request::Access;
use super::{blocking, identity, mountinfo};

/// What is wrong with a copy of a claim that no pod had used yet.
const EMPTY_COPY: &str = "its source had no file system when it was copied (make the copy again \
                          once a pod has used the source)";
/// Mounts on top of each other at one place that are cleared away.
const STACKED_MAX: usize = 8;

/// Stages a volume that the caller has locked. `attached`: it was a device before.
///
/// # Errors
/// As the table of `NodeStageVolume` says.
pub(crate) async fn stage(
    adapter: &Adapter,
    (volume, attached): (&v1::Volume, bool),
    path: &str,
    access: &Access,
) -> Result<(), Status> {
    let Access::Mount { fs_type, flags, .. } = access else {
        // A raw device has nothing to mount; publishing binds its node.
        return attach(adapter, volume, attached).await.map(drop);
    };
    let asked = asked_kind(volume, fs_type)?;
    let place = Place::of("staging_target_path", path)?;
    if place.open()?.is_none() {
        return Err(Status::failed_precondition(format!("staging_target_path {path}: not there")));
    }
    let device = attach(adapter, volume, attached).await?;
    let live = adapter.daemon.attachments().await?;
    let place =
        blocking(move || clear(&place, &device, &live).map(|staged| (place, device, staged)));
    let (place, device, staged) = place.await?;
    let kind = match (asked, &staged) {
        (Some(kind), _) => kind,
        (None, Some(staged)) => Kind::named(&staged.fs).unwrap_or(Kind::Ext4),
        (None, None) => held_kind(volume, &device).await?,
    };
    let mut options = MountOptions::parse(kind, flags)?;
    if access.read_only() {
        options.set_read_only();
    }
    match staged {
        Some(staged) if staged.fs == kind.name() && staged.read_only == options.read_only() => {}
        Some(staged) => {
            return Err(Status::already_exists(format!(
                "volume {}: staged at {path} as {}, read-only: {}",
                volume.name, staged.fs, staged.read_only
            )));
        }
        None => {
            prepare(adapter, volume, &device, kind).await?;
            mount_at(kind, &device, &options, place).await?;
        }
    }
    if options.read_only() || !fs::grows_mounted(kind) {
        return Ok(());
    }
    fs::grow(kind, (&device.path, device.size_bytes()?), Path::new(path)).await
}

/// Makes a volume a device. Where the node of a new device is bound already, it was bound for
/// another volume, which had the number before a restart: nobody may reach the new one there.
async fn attach(adapter: &Adapter, volume: &v1::Volume, attached: bool) -> Result<Device, Status> {
    let device = device::attach(adapter, volume).await?;
    if attached {
        return Ok(device);
    }
    blocking(move || {
        for path in targets(&device, &[])? {
            let path = String::from_utf8_lossy(&path);
            tracing::warn!(path = &*path, "takes away the node of a device that was another's");
            mount::unmount(&Place::of("mount", &path)?, Unmount::Detached)?;
        }
        Ok(device)
    })
    .await
}

/// The file system that a request asks for, or the volume was made for. `None`: a clone is taken
/// with what it holds, unless a request asks for something.
fn asked_kind(volume: &v1::Volume, fs_type: &str) -> Result<Option<Kind>, Status> {
    if fs_type.is_empty() && volume.source_id.is_some() {
        return Ok(None);
    }
    let of_volume = volume.labels.get(labels::FS_TYPE).map_or("", String::as_str);
    let name = [fs_type, of_volume].into_iter().find(|name| !name.is_empty());
    let name = name.unwrap_or(Kind::Ext4.name());
    Kind::named(name).map(Some).ok_or_else(|| {
        Status::invalid_argument(format!("fs_type {name:?}: ext4, xfs and btrfs are possible"))
    })
}

/// The file system that a clone holds.
async fn held_kind(volume: &v1::Volume, device: &Device) -> Result<Kind, Status> {
    match fs::probe(&device.path).await? {
        Found::FileSystem(kind) => Ok(kind),
        Found::Other(what) => Err(unusable(&volume.name, &format!("holds {what}"))),
        Found::Nothing => Err(unusable(&volume.name, EMPTY_COPY)),
    }
}

/// Why a volume is neither mounted nor formatted.
fn unusable(name: &str, what: &str) -> Status {
    Status::failed_precondition(format!("volume {name}: {what}; it is not formatted"))
}

/// Takes away what is mounted at the place from devices that are dead. Returns what is mounted
/// there of this volume.
fn clear(
    place: &Place,
    device: &Device,
    live: &[v1::Attachment],
) -> Result<Option<mountinfo::Mount>, Status> {
    for _ in 0..STACKED_MAX {
        let Some(found) = place.mount()? else { return Ok(None) };
        match owner(&found, Some(device), live) {
            Owner::Volume => return Ok(Some(found)),
            Owner::Dead => {
                tracing::warn!(path = place.shown(), "unmounts the file system of a dead device");
                mount::unmount(place, Unmount::Detached)?;
            }
            Owner::Another => return Err(foreign(place, &found)),
        }
    }
    Err(place.failed("too many mounts on top of each other", &STACKED_MAX))
}

fn foreign(place: &Place, found: &mountinfo::Mount) -> Status {
    Status::failed_precondition(format!(
        "{}: {} from {} is mounted there, which is not this volume",
        place.shown(),
        found.fs,
        String::from_utf8_lossy(&found.source)
    ))
}

/// Brings the file system on the device into the state in which it can be mounted.
async fn prepare(
    adapter: &Adapter,
    volume: &v1::Volume,
    device: &Device,
    kind: Kind,
) -> Result<(), Status> {
    // What the pool says now that the volume is this device and nothing else.
    let volume = adapter.daemon.find(by_number(volume.id)).await?.map(|(volume, _)| volume);
    let volume = &volume.ok_or_else(|| Status::not_found("the volume was deleted"))?;
    let mark = |key: &str| volume.labels.get(key).map(String::as_str);
    let formatting = mark(labels::FORMATTING) == Some(labels::TRUE);
    let clone = volume.source_id.is_some();
    let blank = volume.mapped_bytes == 0;
    if !clone && (formatting || blank) {
        return make(adapter, volume, device, kind).await;
    }
    let what = match fs::probe(&device.path).await? {
        Found::FileSystem(found) if found == kind => None,
        Found::FileSystem(found) => Some(format!("holds {found}, not {kind}")),
        Found::Other(what) => Some(format!("holds {what}, not {kind}")),
        Found::Nothing if clone => Some(EMPTY_COPY.to_owned()),
        Found::Nothing => Some("holds data, but no file system that is known".to_owned()),
    };
    if let Some(what) = what {
        return Err(unusable(&volume.name, &what));
    }
    fs::check(kind, &device.path).await?;
    if clone && mark(labels::IDENTITY) != Some(labels::DONE) {
        identity::renew(kind, &device.path).await?;
        set_label(adapter, volume.id, labels::IDENTITY, labels::DONE).await?;
    }
    if fs::grows_mounted(kind) {
        return Ok(());
    }
    fs::grow_unmounted(&device.path, device.size_bytes()?).await
}

/// Formats a volume that holds nothing. The mark makes that known until it is complete.
async fn make(
    adapter: &Adapter,
    volume: &v1::Volume,
    device: &Device,
    kind: Kind,
) -> Result<(), Status> {
    let options = volume.labels.get(labels::MKFS_OPTIONS).map_or("", String::as_str);
    fs::format_options(options)?;
    set_label(adapter, volume.id, labels::FORMATTING, labels::TRUE).await?;
    tracing::info!(volume = volume.name, device = %device.path.display(), %kind, "formats");
    fs::format(kind, &device.path, options).await?;
    // An empty value removes the label.
    set_label(adapter, volume.id, labels::FORMATTING, "").await
}

/// Sets one label of a volume.
pub(crate) async fn set_label(
    adapter: &Adapter,
    volume: u64,
    key: &str,
    value: &str,
) -> Result<(), Status> {
    let request = v1::ModifyVolumeRequest {
        volume: Some(by_number(volume)),
        labels: BTreeMap::from([(key.to_owned(), value.to_owned())]),
        ..v1::ModifyVolumeRequest::default()
    };
    adapter.daemon.modify(request).await.map(drop)
}

async fn mount_at(
    kind: Kind,
    device: &Device,
    options: &MountOptions,
    place: Place,
) -> Result<(), Status> {
    let (device, options) = (device.path.clone(), options.clone());
    blocking(move || {
        let mounted = mount::file_system(kind, &device, &options)?;
        let target = place.make_directory()?;
        mount::attach(&mounted, &target, &place)
    })
    .await
}

/// Ends the staging of a volume that the caller has locked. `volume` is `None` if there is no such
/// volume: then nothing but a dead mount can be there.
///
/// # Errors
/// `FAILED_PRECONDITION`: it is in use, or published; what the daemon says.
pub(crate) async fn unstage(
    adapter: &Adapter,
    volume: Option<(u64, Option<v1::Attachment>)>,
    path: &str,
) -> Result<(), Status> {
    let place = Place::find("staging_target_path", path)?;
    let number = volume.as_ref().map(|(number, _)| *number);
    let (device, live) = devices(adapter, volume).await?;
    blocking(move || {
        if let Some(device) = &device {
            refuse_published(device, path_of(place.as_ref()))?;
        }
        place.map_or(Ok(()), |place| unmount_all(&place, device.as_ref(), &live))
    })
    .await?;
    match number {
        Some(number) => adapter.daemon.detach(number).await,
        None => Ok(()),
    }
}

/// The device of a volume, if it is one that can be verified, and those of all other volumes.
pub(super) async fn devices(
    adapter: &Adapter,
    volume: Option<(u64, Option<v1::Attachment>)>,
) -> Result<(Option<Device>, Vec<v1::Attachment>), Status> {
    let mut live = adapter.daemon.attachments().await?;
    let Some((number, attachment)) = volume else { return Ok((None, live)) };
    live.retain(|other| other.volume_id != number);
    let device = attachment.and_then(|attachment| {
        let verified = Device::verify(&attachment, number);
        verified.inspect_err(|why| tracing::warn!(why = why.message(), "not a volume's")).ok()
    });
    Ok((device, live))
}

fn path_of(place: Option<&Place>) -> &[u8] {
    place.map_or(&[], |place| place.shown().trim_end_matches('/').as_bytes())
}

/// A device node that is bound somewhere is not open, so the daemon would let go of the device,
/// and its number would soon be another volume's.
fn refuse_published(device: &Device, staging: &[u8]) -> Result<(), Status> {
    let targets = targets(device, staging)?;
    let Some(first) = targets.first() else { return Ok(()) };
    Err(Status::failed_precondition(format!(
        "volume {}: still published at {}",
        device.volume,
        String::from_utf8_lossy(first)
    )))
}

/// Where a volume is mounted beside its staging path.
pub(super) fn targets(device: &Device, staging: &[u8]) -> Result<Vec<Vec<u8>>, Status> {
    let mounts = mountinfo::mounts().map_err(|error| Status::internal(error.to_string()))?;
    let mounts = mounts.into_iter().filter(|mount| device.carries(mount));
    Ok(mounts.map(|mount| mount.point).filter(|point| point != staging).collect())
}

/// Unmounts what is at the place of this volume, and of devices that are dead.
///
/// # Errors
/// `FAILED_PRECONDITION`: it is in use, or another volume's.
pub(super) fn unmount_all(
    place: &Place,
    device: Option<&Device>,
    live: &[v1::Attachment],
) -> Result<(), Status> {
    for _ in 0..STACKED_MAX {
        let Some(found) = place.mount()? else { return Ok(()) };
        match owner(&found, device, live) {
            Owner::Volume => mount::unmount(place, Unmount::Whole)?,
            Owner::Dead => mount::unmount(place, Unmount::Detached)?,
            Owner::Another => return Err(foreign(place, &found)),
        }
    }
    Err(place.failed("too many mounts on top of each other", &STACKED_MAX))
}
