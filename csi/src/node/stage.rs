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
//! pool's catalogue; so after a crash anywhere the same call goes on where it ended. A call that
//! fails takes back what it did itself (undo.rs).
//!
//! A volume is formatted only if it maps no block, so that it reads as zeros, or if it has the mark
//! of a format that was interrupted. That includes clones: a clone of a volume that no pod has used
//! yet is blank as well, and a copy of half a file system has the mark of its source.

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

/// What is wrong with a volume that maps blocks in which a probe finds nothing.
const NOTHING_KNOWN: &str = "holds data, but no file system that is known";
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
        // A raw device has nothing to mount; publishing binds its node.
        return attach(adapter, volume, attached, undo).await.map(drop);
    };
    let asked = Some(fs_type).filter(|name| !name.is_empty()).map(|name| kind_named(name));
    let asked = asked.transpose()?;
    let place = Place::of("staging_target_path", path)?;
    if place.open()?.is_none() {
        return Err(Status::failed_precondition(format!("staging_target_path {path}: not there")));
    }
    let device = attach(adapter, volume, attached, undo).await?;
    let live = adapter.daemon.attachments().await?;
    let place =
        blocking(move || clear(&place, &device, &live).map(|staged| (place, device, staged)));
    let (place, device, staged) = place.await?;
    if let Some(staged) = staged {
        return staged_already(volume, &device, (&place, &staged), (asked, flags, access)).await;
    }
    refuse_elsewhere(volume, &device, path)?;
    // What the pool says now that the volume is this device and nothing else.
    let found = adapter.daemon.find(by_number(volume.id)).await?;
    let (volume, _) = found.ok_or_else(|| Status::not_found("the volume was deleted"))?;
    let kind = kind(&volume, asked, &device).await?;
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

/// The options that a file system is mounted with.
fn options(kind: Kind, flags: &[String], access: &Access) -> Result<MountOptions, Status> {
    let mut options = MountOptions::parse(kind, flags)?;
    if access.read_only() {
        options.set_read_only();
    }
    Ok(options)
}

/// Finds that a volume is staged as asked for, and makes its file system as large as its device.
///
/// # Errors
/// `ALREADY_EXISTS`: it is staged in another way.
async fn staged_already(
    volume: &v1::Volume,
    device: &Device,
    (place, staged): (&Place, &mountinfo::Mount),
    (asked, flags, access): (Option<Kind>, &[String], &Access),
) -> Result<(), Status> {
    let kind = asked.or_else(|| Kind::named(&staged.fs)).unwrap_or(Kind::Ext4);
    let read_only = options(kind, flags, access)?.read_only();
    if staged.fs != kind.name() || staged.read_only != read_only {
        return Err(Status::already_exists(format!(
            "volume {}: staged at {} as {}, read-only: {}",
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

/// CSI gives a volume one staging path. With two, neither could be told from a pod's, and so not be
/// unstaged.
fn refuse_elsewhere(volume: &v1::Volume, device: &Device, path: &str) -> Result<(), Status> {
    let staging = path.trim_end_matches('/').as_bytes();
    let Some(first) = targets(device, staging)?.into_iter().next() else { return Ok(()) };
    Err(Status::failed_precondition(format!(
        "volume {}: it is mounted at {}, and has one staging path; unstage or unmount it there first",
        volume.name,
        String::from_utf8_lossy(&first)
    )))
}

/// Makes a volume a device. Where the node of a new device is bound already, it was bound for
/// another volume, which had the number before a restart: nobody may reach the new one there.
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
            tracing::warn!(path = &*path, "takes away the node of a device that was another's");
            mount::unmount(&Place::of("mount", &path)?, Unmount::Detached)?;
        }
        Ok(device)
    })
    .await
}

fn kind_named(name: &str) -> Result<Kind, Status> {
    Kind::named(name).ok_or_else(|| {
        Status::invalid_argument(format!("fs_type {name:?}: ext4, xfs and btrfs are possible"))
    })
}

/// The file system that a volume is mounted with: what the request asks for, or what a clone holds,
/// or what the volume was made for.
async fn kind(volume: &v1::Volume, asked: Option<Kind>, device: &Device) -> Result<Kind, Status> {
    if let Some(kind) = asked {
        return Ok(kind);
    }
    if volume.source_id.is_some() && !is_blank(volume) {
        return match fs::probe(&device.path).await? {
            Found::FileSystem(kind) => Ok(kind),
            Found::Other(what) => Err(unusable(&volume.name, &format!("holds {what}"))),
            Found::Nothing => Err(unusable(&volume.name, NOTHING_KNOWN)),
        };
    }
    volume.labels.get(labels::FS_TYPE).map_or(Ok(Kind::Ext4), |name| kind_named(name))
}

/// Whether formatting a volume loses nothing: it maps nothing, so it reads as zeros, or what it maps
/// is part of a file system that was never finished.
fn is_blank(volume: &v1::Volume) -> bool {
    let formatting = volume.labels.get(labels::FORMATTING).is_some_and(|mark| mark == labels::TRUE);
    formatting || volume.mapped_bytes == 0
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
    if is_blank(volume) {
        return make(adapter, volume, device, kind).await;
    }
    let what = match fs::probe(&device.path).await? {
        Found::FileSystem(found) if found == kind => None,
        Found::FileSystem(found) => Some(format!("holds {found}, not {kind}")),
        Found::Other(what) => Some(format!("holds {what}, not {kind}")),
        Found::Nothing => Some(NOTHING_KNOWN.to_owned()),
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
    // An empty value removes the label. What was made here has an identity of its own.
    let made = [(labels::FORMATTING, ""), (labels::IDENTITY, labels::DONE)];
    let made = if volume.source_id.is_some() { &made[..] } else { &made[..1] };
    set_labels(adapter, volume.id, made).await
}

/// Sets one label of a volume.
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
        let target = place.make_directory()?;
        mount::attach(&mounted, &target, &place)?;
        Ok((mounted, place))
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
            && is_elsewhere(device, path.as_bytes())?
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

/// Whether a volume is staged at another path than `staging`, so that nothing is to be done here.
///
/// # Errors
/// `FAILED_PRECONDITION`: it is published. A device node that is bound somewhere is not open, so the
/// daemon would let go of the device, and its number would soon be another volume's.
fn is_elsewhere(device: &Device, staging: &[u8]) -> Result<bool, Status> {
    let mounts = mounts_of(device)?;
    let here = mounts.iter().any(|mount| mount.point == staging);
    let Some(other) = mounts.iter().find(|mount| mount.point != staging) else { return Ok(false) };
    // Of a raw device nothing is mounted where it is staged.
    if !here && !mounts.iter().any(|mount| mount.is_node(&device.path)) {
        return Ok(true);
    }
    Err(Status::failed_precondition(format!(
        "volume {}: still published at {}",
        device.volume,
        String::from_utf8_lossy(&other.point)
    )))
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

/// The mounts of a volume: its file system, or its node.
pub(super) fn mounts_of(device: &Device) -> Result<Vec<mountinfo::Mount>, Status> {
    let mounts = mountinfo::mounts().map_err(|error| Status::internal(error.to_string()))?;
    Ok(mounts.into_iter().filter(|mount| device.carries(mount)).collect())
}

/// Where a volume is mounted beside its staging path.
pub(super) fn targets(device: &Device, staging: &[u8]) -> Result<Vec<Vec<u8>>, Status> {
    let points = mounts_of(device)?.into_iter().map(|mount| mount.point);
    Ok(points.filter(|point| point != staging).collect())
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
