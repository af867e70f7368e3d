//! Stages a volume: attaches it as a device, and mounts its file system once on this node.
//!
//! ```text
//! 1 attach     the daemon attaches the volume; the device is verified (device.rs)
//! 2 clear      mounts of dead devices at the path are unmounted
//! 3 prepare    blank volume: set label, mkfs, remove label
//!              others: check; for a clone a new identity, set label
//! 4 mount      complete before it appears at the path
//! 5 grow       to the size of the device
//! ```
//!
//! Each step can be repeated, and the kernel and labels in the pool's catalogue show what has been
//! done. So after a crash at any point the repeated call continues. A call that fails undoes its
//! own steps (undo.rs).
//!
//! A volume is formatted only if it maps no block, so that it reads as zeros, or if its label shows
//! that a format was interrupted. This includes clones: a clone of a volume that was never
//! formatted is blank as well, and a copy of a partly formatted volume has the label of its source.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

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
use super::undo::Undo;
use super::{blocking, grow, identity, mountinfo};

/// The reason to refuse a volume that maps blocks, but in which a probe finds nothing.
const UNKNOWN_DATA: &str = "holds data, but no known file system";
/// Maximum number of mounts at one path that are unmounted.
const STACKED_MAX: usize = 8;

/// Stages a volume that the caller has locked. `attached`: it is attached already.
///
/// # Errors
/// As the error table of `NodeStageVolume` in the CSI specification.
pub(crate) async fn stage(
    adapter: &Adapter,
    (volume, attached): (&v1::Volume, bool),
    path: &str,
    access: &Access,
) -> Result<(), Status> {
    let mut undo = Undo::new(adapter, volume.id);
    match steps(adapter, (volume, attached), (path, access), &mut undo).await {
        Ok(()) if volume.labels.contains_key(labels::RESTAGING) => {
            set_label(adapter, volume.id, labels::RESTAGING, "").await
        }
        Ok(()) => Ok(()),
        Err(why) => Err(undo.undo(why).await),
    }
}

async fn steps(
    adapter: &Adapter,
    (volume, attached): (&v1::Volume, bool),
    (path, access): (&str, &Access),
    undo: &mut Undo<'_>,
) -> Result<(), Status> {
    let Access::Mount { fs_type, flags, .. } = access else {
        // A raw device is not mounted; publishing bind mounts its node.
        return attach(adapter, volume, attached, undo).await.map(drop);
    };
    let requested = Kind::requested("fs_type", fs_type)?;
    let place = Place::existing_parent("staging_target_path", path)?;
    if place.open()?.is_none() {
        return Err(Status::failed_precondition(format!(
            "staging_target_path {path:?} does not exist"
        )));
    }
    let device = attach(adapter, volume, attached, undo).await?;
    let live = adapter.daemon.attachments().await?;
    let place =
        blocking(move || clear(&place, &device, &live).map(|staged| (place, device, staged)));
    let (place, device, staged) = place.await?;
    if let Some(staged) = staged {
        return staged_already(volume, &device, (&place, &staged), (requested, flags, access))
            .await;
    }
    refuse_second_path(volume, &device, path)?;
    // Read again now that only this device can write to the volume.
    let (volume, _) = adapter.read_again(volume.id).await?;
    let kind = kind(&volume, requested, &device).await?;
    let options = options(kind, flags, access)?;
    prepare(adapter, &volume, &device, kind).await?;
    let device_bytes = device.size_bytes()?;
    if kind == Kind::Ext4 && (options.read_only() || !grow::grows_mounted(kind)) {
        grow::unmounted_ext4(&device.path, device_bytes).await?;
    }
    let read_only = options.read_only();
    let (mounted, place) = mount_at(kind, &device, device_bytes, options, place).await?;
    undo.mounted(place);
    if read_only {
        return Ok(());
    }
    grow::mounted(kind, (&device.path, device_bytes), mounted).await
}

/// The mount options of a request.
fn options(kind: Kind, flags: &[String], access: &Access) -> Result<MountOptions, Status> {
    let mut options = MountOptions::parse(kind, flags)?;
    if access.read_only() {
        options.set_read_only();
    }
    Ok(options)
}

/// Checks that a staged volume is staged as requested, and grows its file system to the size of its
/// device.
///
/// # Errors
/// `ALREADY_EXISTS`: it is staged with other options.
async fn staged_already(
    volume: &v1::Volume,
    device: &Device,
    (place, staged): (&Place, &mountinfo::Mount),
    (requested, flags, access): (Option<Kind>, &[String], &Access),
) -> Result<(), Status> {
    let kind = requested.or_else(|| Kind::named(&staged.fs)).unwrap_or(Kind::Ext4);
    let read_only = options(kind, flags, access)?.read_only();
    if staged.fs != kind.name() || staged.read_only != read_only {
        return Err(Status::already_exists(format!(
            "volume {} is already staged at {} as {}, read-only: {}",
            volume.name,
            place.shown(),
            staged.fs,
            staged.read_only
        )));
    }
    let Some(root) = place.open()?.filter(|_| !read_only && grow::grows_mounted(kind)) else {
        return Ok(());
    };
    grow::mounted(kind, (&device.path, device.size_bytes()?), root).await
}

/// Refuses a second staging path. CSI defines one for each volume. With two, neither could be told
/// from the target of a pod, so neither could be unstaged.
fn refuse_second_path(volume: &v1::Volume, device: &Device, path: &str) -> Result<(), Status> {
    let staging = path.trim_end_matches('/').as_bytes();
    let Some(first) = targets(device, staging)?.into_iter().next() else { return Ok(()) };
    Err(Status::failed_precondition(format!(
        "volume {} is mounted at {}: unstage it there first, a volume has one staging path",
        volume.name,
        String::from_utf8_lossy(&first)
    )))
}

/// Attaches a volume. If the node of a new device is bind mounted already, this was done for
/// another volume, which had the device number before a restart. Such mounts are removed, because
/// they would give access to the new volume.
async fn attach(
    adapter: &Adapter,
    volume: &v1::Volume,
    attached: bool,
    undo: &mut Undo<'_>,
) -> Result<Device, Status> {
    if attached {
        return device::attach(adapter, volume).await;
    }
    undo.attached();
    let device = device::attach(adapter, volume).await?;
    blocking(move || {
        for path in targets(&device, &[])? {
            let path = String::from_utf8_lossy(&path);
            tracing::warn!(
                path = &*path,
                "unmounting a device node that was published for another volume"
            );
            mount::unmount(&Place::existing_parent("mount", &path)?, Unmount::Detached)?;
        }
        Ok(device)
    })
    .await
}

/// The file system of a volume: that of the request, or that which a clone holds, or that of the
/// label.
async fn kind(
    volume: &v1::Volume,
    requested: Option<Kind>,
    device: &Device,
) -> Result<Kind, Status> {
    if let Some(kind) = requested {
        return Ok(kind);
    }
    if volume.source_id.is_some() && !is_blank(volume) {
        return match fs::probe(&device.path).await? {
            Found::FileSystem(kind) => Ok(kind),
            Found::Other(what) => Err(unusable(&volume.name, &format!("holds {what}"))),
            Found::Nothing => Err(unusable(&volume.name, UNKNOWN_DATA)),
        };
    }
    volume
        .labels
        .get(labels::FS_TYPE)
        .map_or(Ok(Kind::Ext4), |name| Kind::parse(labels::FS_TYPE, name))
}

/// Whether formatting a volume loses no data: it maps no block, so it reads as zeros, or its format
/// was interrupted.
fn is_blank(volume: &v1::Volume) -> bool {
    let formatting = volume.labels.get(labels::FORMATTING).is_some_and(|mark| mark == labels::TRUE);
    formatting || volume.mapped_bytes == 0
}

/// The error for a volume that is neither mounted nor formatted.
fn unusable(name: &str, what: &str) -> Status {
    Status::failed_precondition(format!("volume {name} {what}; it is not formatted"))
}

/// Unmounts file systems of dead devices at the place. Returns the mount of this volume, if there
/// is one.
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
                tracing::warn!(path = place.shown(), "unmounting the file system of a dead device");
                mount::unmount(place, Unmount::Detached)?;
            }
            Owner::Another => return Err(Status::failed_precondition(foreign(place, &found))),
        }
    }
    Err(stacked(place))
}

/// The message for a mount that does not belong to the volume.
pub(super) fn foreign(place: &Place, found: &mountinfo::Mount) -> String {
    let source = String::from_utf8_lossy(&found.source);
    format!("{}: {} from {source} is mounted there, not this volume", place.shown(), found.fs)
}

fn stacked(place: &Place) -> Status {
    Status::internal(format!("{} has more than {STACKED_MAX} mounts", place.shown()))
}

/// Prepares the file system on the device for the mount.
async fn prepare(
    adapter: &Adapter,
    volume: &v1::Volume,
    device: &Device,
    kind: Kind,
) -> Result<(), Status> {
    if is_blank(volume) {
        return format(adapter, volume, device, kind).await;
    }
    let what = match fs::probe(&device.path).await? {
        Found::FileSystem(found) if found == kind => None,
        Found::FileSystem(found) => Some(format!("holds {found}, not {kind}")),
        Found::Other(what) => Some(format!("holds {what}, not {kind}")),
        Found::Nothing => Some(UNKNOWN_DATA.to_owned()),
    };
    if let Some(what) = what {
        return Err(unusable(&volume.name, &what));
    }
    fs::check(kind, &device.path).await?;
    let renewed = volume.labels.get(labels::IDENTITY).is_some_and(|mark| mark == labels::DONE);
    if volume.source_id.is_none() || renewed {
        return Ok(());
    }
    identity::renew(kind, &device.path).await?;
    set_label(adapter, volume.id, labels::IDENTITY, labels::DONE).await
}

/// Formats a blank volume. A label marks it until the format is complete.
async fn format(
    adapter: &Adapter,
    volume: &v1::Volume,
    device: &Device,
    kind: Kind,
) -> Result<(), Status> {
    let options = volume.labels.get(labels::MKFS_OPTIONS).map_or("", String::as_str);
    fs::format_options(options)?;
    set_label(adapter, volume.id, labels::FORMATTING, labels::TRUE).await?;
    let path = device.path.display();
    tracing::info!(volume = volume.name, device = %path, %kind, "formatting a volume");
    fs::format(kind, &device.path, options).await?;
    // An empty value removes the label. A new file system has an identity of its own.
    let done = [(labels::FORMATTING, ""), (labels::IDENTITY, labels::DONE)];
    let done = if volume.source_id.is_some() { &done[..] } else { &done[..1] };
    set_labels(adapter, volume.id, done).await
}

/// Sets a label of a volume; an empty value removes it.
pub(crate) async fn set_label(
    adapter: &Adapter,
    volume: u64,
    key: &str,
    value: &str,
) -> Result<(), Status> {
    set_labels(adapter, volume, &[(key, value)]).await
}

async fn set_labels(adapter: &Adapter, volume: u64, labels: &[(&str, &str)]) -> Result<(), Status> {
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    let request = v1::ModifyVolumeRequest {
        volume: Some(by_number(volume)),
        labels: labels.collect::<BTreeMap<_, _>>(),
        ..v1::ModifyVolumeRequest::default()
    };
    adapter.daemon.modify(request).await.map(drop)
}

async fn mount_at(
    kind: Kind,
    device: &Device,
    device_bytes: u64,
    options: MountOptions,
    place: Place,
) -> Result<(OwnedFd, Place), Status> {
    let device = device.path.clone();
    blocking(move || {
        let mounted = mount::grown_file_system(kind, (&device, device_bytes), &options)?;
        let target = place.create_directory()?;
        mount::attach(&mounted, &target, &place)?;
        Ok((mounted, place))
    })
    .await
}

/// Unstages a volume that the caller has locked. `volume` is `None` if it does not exist: then only
/// a mount of a dead device can be at the path.
///
/// # Errors
/// `FAILED_PRECONDITION`: it is in use or published; errors of the daemon.
pub(crate) async fn unstage(
    adapter: &Adapter,
    volume: Option<(v1::Volume, Option<v1::Attachment>)>,
    path: &str,
) -> Result<(), Status> {
    let place = Place::find("staging_target_path", path)?;
    let number = volume.as_ref().map(|(volume, _)| volume.id);
    if let Some((volume, _)) = &volume
        && volume.labels.contains_key(labels::RESTAGING)
    {
        set_label(adapter, volume.id, labels::RESTAGING, "").await?;
    }
    let volume = volume.map(|(volume, attachment)| (volume.id, attachment));
    let (device, live) = devices(adapter, volume).await?;
    let path = path.trim_end_matches('/').to_owned();
    let staged_elsewhere = blocking(move || {
        if let Some(device) = &device
            && is_staged_elsewhere(device, path.as_bytes())?
        {
            return Ok(true);
        }
        place.map_or(Ok(()), |place| unmount_all(&place, device.as_ref(), &live))?;
        Ok(false)
    })
    .await?;
    match number {
        Some(number) if !staged_elsewhere => adapter.daemon.detach(number).await,
        _ => Ok(()),
    }
}

/// Whether a volume is staged at another path than `staging`, so that there is nothing to do.
///
/// # Errors
/// `FAILED_PRECONDITION`: it is published. A bind mount does not keep the device node open, so the
/// daemon would detach the device, and its number could become that of another volume.
fn is_staged_elsewhere(device: &Device, staging: &[u8]) -> Result<bool, Status> {
    let mounts = mounts_of(device)?;
    let here = mounts.iter().any(|mount| mount.point == staging);
    let Some(other) = mounts.iter().find(|mount| mount.point != staging) else { return Ok(false) };
    // A raw device has no mount at its staging path.
    if !here && !mounts.iter().any(|mount| mount.is_node(&device.path)) {
        return Ok(true);
    }
    Err(Status::failed_precondition(format!(
        "volume {} is still published at {}",
        device.volume,
        String::from_utf8_lossy(&other.point)
    )))
}

/// The device of a volume, if it can be verified, and the devices of all other volumes.
pub(super) async fn devices(
    adapter: &Adapter,
    volume: Option<(u64, Option<v1::Attachment>)>,
) -> Result<(Option<Device>, Vec<v1::Attachment>), Status> {
    let mut live = adapter.daemon.attachments().await?;
    let Some((number, attachment)) = volume else { return Ok((None, live)) };
    live.retain(|other| other.volume_id != number);
    let device = attachment.and_then(|attachment| {
        let verified = Device::verify(&attachment, number);
        verified
            .inspect_err(|why| tracing::warn!(why = why.message(), "cannot verify a device"))
            .ok()
    });
    Ok((device, live))
}

/// The mounts of a volume: of its file system or of its device node.
pub(super) fn mounts_of(device: &Device) -> Result<Vec<mountinfo::Mount>, Status> {
    Ok(mountinfo::mounts()?.into_iter().filter(|mount| device.carries(mount)).collect())
}

/// The mount points of a volume other than its staging path.
pub(super) fn targets(device: &Device, staging: &[u8]) -> Result<Vec<Vec<u8>>, Status> {
    let points = mounts_of(device)?.into_iter().map(|mount| mount.point);
    Ok(points.filter(|point| point != staging).collect())
}

/// Unmounts mounts of this volume and of dead devices at the place.
///
/// # Errors
/// `FAILED_PRECONDITION`: it is in use, or something else is mounted there.
pub(super) fn unmount_all(
    place: &Place,
    device: Option<&Device>,
    live: &[v1::Attachment],
) -> Result<(), Status> {
    for _ in 0..STACKED_MAX {
        let Some(found) = place.mount()? else { return Ok(()) };
        match owner(&found, device, live) {
            Owner::Volume => mount::unmount(place, Unmount::WhenUnused)?,
            Owner::Dead => mount::unmount(place, Unmount::Detached)?,
            Owner::Another => return Err(Status::failed_precondition(foreign(place, &found))),
        }
    }
    Err(stacked(place))
}
