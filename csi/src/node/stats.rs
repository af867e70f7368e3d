//! Space usage of a staged or published volume.

use std::os::fd::OwnedFd;

use pando_proto::v1;
use rustix::fs::{fstat, fstatvfs};
use tonic::Status;

use crate::proto::csi::VolumeUsage;
use crate::proto::csi::volume_usage::Unit;

use super::blocking;
use super::device::Device;
use super::paths::Place;

/// What is at a path of a volume.
pub(super) enum At {
    /// Its device node.
    Node,
    /// Its file system.
    FileSystem(OwnedFd),
}

/// Finds the volume at the path.
///
/// # Errors
/// `NOT_FOUND`: it is not at the path.
pub(super) fn find(
    volume: &v1::Volume,
    attachment: Option<&v1::Attachment>,
    path: &str,
) -> Result<(Device, At), Status> {
    let missing = || Status::not_found(format!("volume {} is not at {path:?}", volume.name));
    let device = Device::verify(attachment.ok_or_else(missing)?, volume.id)?;
    let place = Place::find("volume_path", path).map_err(|_| missing())?.ok_or_else(missing)?;
    // A path that is invalid, or contains a link, does not lead to the volume.
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

/// Space usage of the volume at the path.
///
/// # Errors
/// `NOT_FOUND`: it is not at the path; `INTERNAL`: statvfs fails.
pub(crate) async fn stats(
    volume: v1::Volume,
    attachment: Option<v1::Attachment>,
    path: String,
) -> Result<Vec<VolumeUsage>, Status> {
    blocking(move || match find(&volume, attachment.as_ref(), &path)?.1 {
        At::Node => {
            // A raw device uses the space that the pool maps for it.
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
