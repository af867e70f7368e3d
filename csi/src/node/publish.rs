//! Publishing: what is staged appears at the path of a pod, by a bind mount. For a file system the
//! root of what is staged is bound onto a directory, for a raw device its node onto a file.
//!
//! The source is a descriptor that was verified, the target a name in an open directory, and the
//! mount is read-only before it appears, if it is to be: nothing can be exchanged in between.

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
use super::stage::{devices, stage, targets, unmount_all};
use super::{blocking, fs::Kind};

/// What to publish, and where.
pub(crate) struct Publication {
    pub(crate) staging: String,
    pub(crate) target: String,
    pub(crate) access: Access,
    /// Refuse writes at this target.
    pub(crate) read_only: bool,
}

/// Publishes a volume that the caller has locked.
///
/// # Errors
/// As the table of `NodePublishVolume` says.
pub(crate) async fn publish(
    adapter: &Adapter,
    volume: &v1::Volume,
    attachment: Option<v1::Attachment>,
    publication: Publication,
) -> Result<(), Status> {
    let name = volume.name.clone();
    let mut attachment = attachment;
    let restages = volume.labels.contains_key(labels::RESTAGING);
    if restages || died(adapter, volume, attachment.clone(), &publication).await? {
        let why = if restages {
            "its growth was interrupted"
        } else {
            "its device died with an earlier daemon"
        };
        tracing::warn!(volume = name, why, "stages it again");
        let before = (volume, attachment.is_some());
        stage(adapter, before, &publication.staging, &publication.access).await?;
        attachment = adapter.daemon.find(by_number(volume.id)).await?.and_then(|found| found.1);
    }
    let attachment = attachment
        .ok_or_else(|| Status::failed_precondition(format!("volume {name} is not staged")))?;
    let device = Device::verify(&attachment, volume.id)?;
    let (_, live) = devices(adapter, Some((volume.id, None))).await?;
    blocking(move || publish_now(&name, &device, &live, &publication)).await
}

/// Whether the file system of this volume was staged on a device that is dead now. kubelet does not
/// stage it again as long as it has a pod for it, and it has one if the next is there when the
/// last one goes.
async fn died(
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

fn publish_now(
    name: &str,
    device: &Device,
    live: &[v1::Attachment],
    publication: &Publication,
) -> Result<(), Status> {
    let source = source(name, device, publication)?;
    let read_only = read_only(publication, &source)?;
    let target = Place::of("target_path", &publication.target)?;
    while let Some(found) = target.mount()? {
        match owner(&found, Some(device), live) {
            Owner::Volume if found.read_only == read_only => return Ok(()),
            Owner::Volume => {
                return Err(Status::already_exists(format!(
                    "volume {name} is published at {} with read-only: {}",
                    target.shown(),
                    found.read_only
                )));
            }
            Owner::Dead => mount::unmount(&target, Unmount::Detached)?,
            Owner::Another => {
                return Err(Status::already_exists(format!(
                    "{}: something else is mounted there: {}",
                    target.shown(),
                    found.fs
                )));
            }
        }
    }
    if publication.access.single_target() {
        let staging = publication.staging.trim_end_matches('/').as_bytes();
        if let Some(other) = targets(device, staging)?.first() {
            let other = String::from_utf8_lossy(other);
            let text = format!("volume {name}: its single writer is at {other}");
            return Err(Status::failed_precondition(text));
        }
    }
    onto_target(&target, || {
        let onto = match publication.access {
            Access::Mount { .. } => empty_directory(&target)?,
            Access::Block { .. } => target.make_file()?,
        };
        mount::bind(source.opened.as_fd(), read_only, &onto, &target)
    })
}

/// Makes a target and mounts something onto it. If that fails, no target is left that was not there
/// before.
fn onto_target(target: &Place, work: impl FnOnce() -> Result<(), Status>) -> Result<(), Status> {
    let was_there = target.open()?.is_some();
    work().inspect_err(|_| {
        if !was_there && let Err(left) = target.remove() {
            tracing::warn!(target = target.shown(), why = left.message(), "a target is left");
        }
    })
}

/// What is bound.
struct Source {
    opened: OwnedFd,
    /// The file system that it is, `None` for a device, and whether that refuses writes.
    file_system: Option<(Kind, bool)>,
}

/// Opens and verifies what is staged.
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

/// Whether the target is to refuse writes. The flags are the same as at staging and have their
/// effect there; here they are checked.
fn read_only(publication: &Publication, source: &Source) -> Result<bool, Status> {
    let asked = publication.read_only || publication.access.read_only();
    match (&publication.access, source.file_system) {
        (Access::Mount { flags, .. }, Some((kind, staged_read_only))) => {
            let options = MountOptions::parse(kind, flags)?;
            Ok(asked || staged_read_only || options.read_only())
        }
        _ => Ok(asked),
    }
}

/// Makes the directory to mount onto. What is in one that exists would be hidden, so it is refused.
fn empty_directory(target: &Place) -> Result<OwnedFd, Status> {
    let directory = target.make_directory()?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let entries = openat(&directory, ".", flags, Mode::empty()).and_then(Dir::new);
    let mut entries = entries.map_err(|errno| target.failed("cannot read it", &errno))?;
    let other = entries.find(|entry| {
        entry
            .as_ref()
            .is_ok_and(|entry| ![&b"."[..], b".."].contains(&entry.file_name().to_bytes()))
    });
    match other {
        None => Ok(directory),
        Some(_) => Err(Status::failed_precondition(format!("{}: not empty", target.shown()))),
    }
}

/// Ends the publishing of a volume that the caller has locked, and removes the target. `volume` is
/// `None` if there is no such volume.
///
/// # Errors
/// `FAILED_PRECONDITION`: in use, or another volume's.
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
    fn a_target_that_was_made_in_vain_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("target");
        let target = Place::of("target_path", path.to_str().unwrap()).unwrap();
        let fails = || Err(Status::internal("the mount fails"));
        for _ in 0..2 {
            let made = onto_target(&target, || target.make_directory().and_then(|_| fails()));
            assert!(made.is_err() && !path.exists());
            let made = onto_target(&target, || target.make_file().and_then(|_| fails()));
            assert!(made.is_err() && !path.exists());
        }
        std::fs::create_dir(&path).unwrap();
        assert!(onto_target(&target, fails).is_err());
        assert!(path.is_dir(), "it was there before");
        onto_target(&target, || target.make_directory().map(drop)).unwrap();
    }
}
