//! Publishes a staged volume at the path of a pod with a bind mount: of the root of the staged file
//! system onto a directory, or of a raw device's node onto a file.
//!
//! The source is a verified descriptor, the target is a name in an open directory, and a read-only
//! mount is read-only before it becomes visible. So nothing can be exchanged in between.

use std::os::fd::{AsFd, OwnedFd};

use pando_proto::v1;
use rustix::fs::{Dir, Mode, OFlags, openat};
use tonic::Status;

use crate::adapter::Adapter;
use crate::daemon::by_number;
use crate::labels;

use super::device::{Device, Owner, owner};
use super::mount::{self, Unmount};
use super::options::MountOptions;
use super::paths::Place;
use super::request::Access;
use super::stage::{devices, foreign, stage, targets, unmount_all};
use super::{blocking, fs::Kind};

/// A request to publish a volume.
pub(crate) struct Publication {
    pub(crate) staging: String,
    pub(crate) target: String,
    pub(crate) access: Access,
    /// Mount it read-only at this target.
    pub(crate) read_only: bool,
}

/// Publishes a volume that the caller has locked.
///
/// # Errors
/// As the error table of `NodePublishVolume` in the CSI specification.
pub(crate) async fn publish(
    adapter: &Adapter,
    volume: &v1::Volume,
    attachment: Option<v1::Attachment>,
    publication: Publication,
) -> Result<(), Status> {
    let name = volume.name.clone();
    let mut attachment = attachment;
    let interrupted = volume.labels.contains_key(labels::RESTAGING);
    if interrupted || is_dead(adapter, volume, attachment.clone(), &publication).await? {
        let why = if interrupted {
            "its growth was interrupted"
        } else {
            "its device died with an earlier daemon"
        };
        tracing::warn!(volume = name, why, "staging a volume again");
        let before = (volume, attachment.is_some());
        stage(adapter, before, &publication.staging, &publication.access).await?;
        attachment = adapter.daemon.find(by_number(volume.id)).await?.and_then(|found| found.1);
    }
    let attachment = attachment
        .ok_or_else(|| Status::failed_precondition(format!("volume {name} is not staged")))?;
    let device = Device::verify(&attachment, volume.id)?;
    let (_, live) = devices(adapter, Some((volume.id, None))).await?;
    blocking(move || bind_mount(&name, &device, &live, &publication)).await
}

/// Whether the volume was staged on a device that is dead now. kubelet does not stage it again as
/// long as it has a pod for it, which is always the case if the next pod arrives before the last
/// one ends.
async fn is_dead(
    adapter: &Adapter,
    volume: &v1::Volume,
    attachment: Option<v1::Attachment>,
    publication: &Publication,
) -> Result<bool, Status> {
    if matches!(publication.access, Access::Block { .. }) {
        return Ok(false);
    }
    let (device, live) = devices(adapter, Some((volume.id, attachment))).await?;
    let path = publication.staging.clone();
    blocking(move || {
        let staging = Place::find("staging_target_path", &path)?;
        let mounted = staging.map(|place| place.mount()).transpose()?.flatten();
        Ok(mounted.is_some_and(|found| owner(&found, device.as_ref(), &live) == Owner::Dead))
    })
    .await
}

fn bind_mount(
    name: &str,
    device: &Device,
    live: &[v1::Attachment],
    publication: &Publication,
) -> Result<(), Status> {
    let source = source(name, device, publication)?;
    let read_only = read_only(publication, &source)?;
    let target = Place::existing_parent("target_path", &publication.target)?;
    while let Some(found) = target.mount()? {
        match owner(&found, Some(device), live) {
            Owner::Volume if found.read_only == read_only => return Ok(()),
            Owner::Volume => {
                return Err(Status::already_exists(format!(
                    "volume {name} is already published at {} with read-only: {}",
                    target.shown(),
                    found.read_only
                )));
            }
            Owner::Dead => mount::unmount(&target, Unmount::Detached)?,
            Owner::Another => {
                return Err(Status::already_exists(foreign(&target, &found)));
            }
        }
    }
    if publication.access.single_target() {
        let staging = publication.staging.trim_end_matches('/').as_bytes();
        if let Some(other) = targets(device, staging)?.first() {
            let other = String::from_utf8_lossy(other);
            let text = format!("volume {name} has a single writer and is published at {other}");
            return Err(Status::failed_precondition(text));
        }
    }
    create_target(&target, || {
        let onto = match publication.access {
            Access::Mount { .. } => empty_directory(&target)?,
            Access::Block { .. } => target.create_file()?,
        };
        mount::bind(source.opened.as_fd(), read_only, &onto, &target)
    })
}

/// Runs `work`, which creates a target and mounts onto it. If it fails, a target that did not exist
/// before is removed.
fn create_target(target: &Place, work: impl FnOnce() -> Result<(), Status>) -> Result<(), Status> {
    let existed = target.open()?.is_some();
    work().inspect_err(|_| {
        if !existed && let Err(left) = target.remove() {
            tracing::warn!(target = target.shown(), why = left.message(), "cannot remove a target");
        }
    })
}

/// The source of the bind mount.
struct Source {
    opened: OwnedFd,
    /// Kind of the file system, and whether it is read-only; `None` for a device.
    file_system: Option<(Kind, bool)>,
}

/// Opens and verifies the staged volume.
fn source(name: &str, device: &Device, publication: &Publication) -> Result<Source, Status> {
    if matches!(publication.access, Access::Block { .. }) {
        return Ok(Source { opened: device.node()?, file_system: None });
    }
    let path = &publication.staging;
    let missing = || Status::failed_precondition(format!("volume {name} is not staged at {path}"));
    let staging = Place::find("staging_target_path", path)?.ok_or_else(missing)?;
    let opened = staging.open()?.ok_or_else(missing)?;
    let mounted = staging.mount_of(&opened)?.ok_or_else(missing)?;
    if !mounted.is_of(&device.path, device.number) {
        return Err(missing());
    }
    let kind = Kind::named(&mounted.fs).ok_or_else(missing)?;
    Ok(Source { opened, file_system: Some((kind, mounted.read_only)) })
}

/// Whether the target is read-only. The mount flags have their effect when the volume is staged;
/// here they are only checked.
fn read_only(publication: &Publication, source: &Source) -> Result<bool, Status> {
    let requested = publication.read_only || publication.access.read_only();
    match (&publication.access, source.file_system) {
        (Access::Mount { flags, .. }, Some((kind, staged_read_only))) => {
            let options = MountOptions::parse(kind, flags)?;
            Ok(requested || staged_read_only || options.read_only())
        }
        _ => Ok(requested),
    }
}

/// Creates the directory to mount onto. Refuses a directory that is not empty, because the mount
/// would hide its content.
fn empty_directory(target: &Place) -> Result<OwnedFd, Status> {
    let directory = target.create_directory()?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let entries = openat(&directory, ".", flags, Mode::empty()).and_then(Dir::new);
    let mut entries =
        entries.map_err(|errno| target.failed("cannot read the directory", &errno))?;
    let other = entries.find(|entry| {
        entry
            .as_ref()
            .is_ok_and(|entry| ![&b"."[..], b".."].contains(&entry.file_name().to_bytes()))
    });
    match other {
        None => Ok(directory),
        Some(_) => Err(Status::failed_precondition(format!("{} is not empty", target.shown()))),
    }
}

/// Unmounts a target and removes it. The caller has locked the volume, which is `None` if it does
/// not exist.
///
/// # Errors
/// `FAILED_PRECONDITION`: it is in use, or something else is mounted there.
pub(crate) async fn unpublish(
    adapter: &Adapter,
    volume: Option<(u64, Option<v1::Attachment>)>,
    path: &str,
) -> Result<(), Status> {
    let Some(target) = Place::find("target_path", path)? else { return Ok(()) };
    let (device, live) = devices(adapter, volume).await?;
    blocking(move || {
        unmount_all(&target, device.as_ref(), &live)?;
        target.remove()
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_removed_if_the_mount_fails() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("target");
        let target = Place::existing_parent("target_path", path.to_str().unwrap()).unwrap();
        let fails = || Err(Status::internal("the mount fails"));
        for _ in 0..2 {
            let result = create_target(&target, || target.create_directory().and_then(|_| fails()));
            assert!(result.is_err() && !path.exists());
            let result = create_target(&target, || target.create_file().and_then(|_| fails()));
            assert!(result.is_err() && !path.exists());
        }
        std::fs::create_dir(&path).unwrap();
        assert!(create_target(&target, fails).is_err());
        assert!(path.is_dir(), "it existed before");
        create_target(&target, || target.create_directory().map(drop)).unwrap();
    }
}
