//! Space of a published volume, and its growth.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pando_proto::v1;
use rustix::fs::{fstat, fstatvfs};
use tonic::Status;

use crate::adapter::Adapter;
use crate::daemon::by_number;
use crate::proto::csi::volume_usage::Unit;
use crate::proto::csi::{CapacityRange, VolumeUsage};

use super::blocking;
use super::device::Device;
use super::fs::{self, Kind};
use super::mountinfo;
use super::paths::Place;

/// What a path of a volume is.
enum At {
    /// Its device node.
    Node,
    /// Its file system.
    FileSystem(OwnedFd),
}

/// Finds the volume at the path.
///
/// # Errors
/// `NOT_FOUND`: it is not there.
fn find(
    volume: &v1::Volume,
    attachment: Option<&v1::Attachment>,
    path: &str,
) -> Result<(Device, At), Status> {
    let missing = || Status::not_found(format!("volume {} is not at {path:?}", volume.name));
    let device = Device::verify(attachment.ok_or_else(missing)?, volume.id)?;
    let place = Place::find("volume_path", path).map_err(|_| missing())?.ok_or_else(missing)?;
    // A path that leads nowhere, or over a link, is as good as none.
    let opened = place.open().map_err(|_| missing())?.ok_or_else(missing)?;
    if fstat(&opened).is_ok_and(|found| device.is(&found)) {
        return Ok((device, At::Node));
    }
    let mount = place.mount_of(&opened)?.ok_or_else(missing)?;
    if !mount.is_of(&device.path, device.number) {
        return Err(missing());
    }
    Ok((device, At::FileSystem(opened)))
}

/// Space of the volume at the path.
///
/// # Errors
/// `NOT_FOUND`: it is not there; `INTERNAL`: its file system does not answer.
pub(crate) async fn stats(
    volume: v1::Volume,
    attachment: Option<v1::Attachment>,
    path: String,
) -> Result<Vec<VolumeUsage>, Status> {
    blocking(move || match find(&volume, attachment.as_ref(), &path)?.1 {
        At::Node => {
            // What a raw device holds is what the pool keeps for it.
            let used = volume.mapped_bytes.min(volume.size_bytes);
            let available = volume.size_bytes - used;
            Ok(vec![usage(Unit::Bytes, volume.size_bytes, used, available)])
        }
        At::FileSystem(opened) => {
            let found = fstatvfs(&opened)
                .map_err(|errno| Status::internal(format!("{path}: statvfs: {errno}")))?;
            let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
            let used = bytes(found.f_blocks.saturating_sub(found.f_bfree));
            let inodes = found.f_files.saturating_sub(found.f_ffree);
            Ok(vec![
                usage(Unit::Bytes, bytes(found.f_blocks), used, bytes(found.f_bavail)),
                usage(Unit::Inodes, found.f_files, inodes, found.f_favail),
            ])
        }
    })
    .await
}

fn usage(unit: Unit, total: u64, used: u64, available: u64) -> VolumeUsage {
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    VolumeUsage {
        available: signed(available),
        total: signed(total),
        used: signed(used),
        unit: unit.into(),
    }
}

/// Grows what is at the path to the size of the volume, and that first if more is asked; returns
/// the size.
///
/// # Errors
/// `NOT_FOUND`: it is not there; `OUT_OF_RANGE`: the volume is larger than allowed;
/// `FAILED_PRECONDITION`: the file system cannot grow while it is mounted like this, or the device
/// not while it is used.
pub(crate) async fn expand(
    adapter: &Adapter,
    volume: v1::Volume,
    attachment: Option<v1::Attachment>,
    path: String,
    range: Option<CapacityRange>,
) -> Result<i64, Status> {
    let (number, name) = (volume.id, volume.name.clone());
    let mut size = volume.size_bytes;
    let found = blocking(move || find(&volume, attachment.as_ref(), &path)).await?;
    size = grown(adapter, number, size, range.as_ref()).await?;
    let (device, at) = found;
    let mut shown = device.size_bytes()?;
    if shown < size {
        // Asked for again, the daemon tries it again, or says why that is of no use.
        resize(adapter, number, size).await?;
        shown = device.size_bytes()?;
    }
    if shown < size {
        let path = device.path.display();
        let text = format!("volume {name} has {size} bytes, but its device {path} has {shown}");
        return Err(Status::unavailable(text));
    }
    if let At::FileSystem(opened) = at {
        // Nothing may be open while the programs run but what they open.
        drop(opened);
        let (kind, point) = writable(&name, &device)?;
        fs::grow(kind, (&device.path, shown), &point).await?;
    }
    Ok(i64::try_from(size).unwrap_or(i64::MAX))
}

/// The size of a volume after the part of its growth that is the node's.
async fn grown(
    adapter: &Adapter,
    volume: u64,
    size: u64,
    range: Option<&CapacityRange>,
) -> Result<u64, Status> {
    let Some(range) = range else { return Ok(size) };
    let bytes = |number: i64| {
        let negative = |_| Status::invalid_argument("capacity_range: negative");
        u64::try_from(number).map_err(negative)
    };
    let (required, limit) = (bytes(range.required_bytes)?, bytes(range.limit_bytes)?);
    if limit != 0 && (limit < required || limit < size) {
        let text = format!("capacity_range: limit {limit}, but the volume has {size} bytes");
        return Err(Status::out_of_range(text));
    }
    if required <= size {
        return Ok(size);
    }
    // The controller should have done it, but a volume is of one node, and so is this call.
    resize(adapter, volume, required).await
}

/// Gives a volume and its device a size; returns what the volume has then.
async fn resize(adapter: &Adapter, volume: u64, size_bytes: u64) -> Result<u64, Status> {
    let request = v1::ModifyVolumeRequest {
        volume: Some(by_number(volume)),
        size_bytes: Some(size_bytes),
        ..v1::ModifyVolumeRequest::default()
    };
    Ok(adapter.daemon.modify(request).await?.size_bytes)
}

/// Where the file system on a device can be told to grow.
fn writable(name: &str, device: &Device) -> Result<(Kind, PathBuf), Status> {
    let mounts = mountinfo::mounts().map_err(|error| Status::internal(error.to_string()))?;
    let mut mounts = mounts.into_iter().filter(|m| m.is_of(&device.path, device.number));
    let found = mounts.find(|mount| !mount.read_only && mount.root == b"/");
    let found = found.and_then(|mount| {
        Some((Kind::named(&mount.fs)?, Path::new(OsStr::from_bytes(&mount.point)).to_owned()))
    });
    found.ok_or_else(|| {
        Status::failed_precondition(format!("volume {name}: mounted read-only, so it cannot grow"))
    })
}
