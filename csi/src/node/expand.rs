//! Grows a staged volume: the volume, its device and its file system.
//!
//! ```text
//! in place   can the mounted file system grow? -- volume and device -- file system
//! else       unmount -- detach -- volume -- stage, which grows the file system -- publish
//! ```
//!
//! The second way is for volumes that cannot grow in place: an ext4 without CAP_SYS_RESOURCE, a
//! ublk device before Linux 6.16, a read-only mount. kubelet sends the call after it has published
//! the volume and before it starts the pod, so one restart of the pod is enough. A running pod
//! keeps the device busy; then everything is mounted again as before, and the call is refused.
//!
//! If a call is refused, nothing has grown. If the adapter is killed in between, a label records
//! that the volume must be staged again, which kubelet's next call does.

use pando_proto::v1;
use tonic::{Code, Status};

use crate::adapter::Adapter;
use crate::daemon::by_number;
use crate::labels;
use crate::proto::csi::CapacityRange;
use crate::validate::{self, SIZE_UNIT, SIZES};

use super::device::Device;
use super::fs::Kind;
use super::mount::{self, Unmount};
use super::mountinfo::Mount;
use super::options::MountOptions;
use super::paths::Place;
use super::publish::{Publication, publish};
use super::request::Access;
use super::stage::{mounts_of, set_label, stage};
use super::stats::{At, find};
use super::{blocking, grow};

/// A request to grow a volume.
pub(crate) struct Expansion {
    /// A path at which the volume is staged or published.
    pub(crate) path: String,
    /// The path at which it is staged.
    pub(crate) staging: String,
    pub(crate) range: Option<CapacityRange>,
    /// The access with which it was staged, if the request contains it.
    pub(crate) access: Option<Access>,
}

/// Grows the volume to the requested size, and its device and file system to the size of the
/// volume. Returns the size. The caller has locked the volume.
///
/// # Errors
/// `NOT_FOUND`: it is not at the path; `OUT_OF_RANGE`: the volume is larger than the limit;
/// `FAILED_PRECONDITION`: the file system cannot grow as it is mounted, or the device cannot grow
/// while it is in use. A volume whose growth is refused keeps its size.
pub(crate) async fn expand(
    adapter: &Adapter,
    volume: v1::Volume,
    attachment: Option<v1::Attachment>,
    expansion: Expansion,
) -> Result<i64, Status> {
    let (volume, attachment) = resume(adapter, volume, attachment, &expansion).await?;
    let size = target_size(volume.size_bytes, expansion.range.as_ref())?;
    let path = expansion.path.clone();
    let (volume, (device, at)) =
        blocking(move || find(&volume, attachment.as_ref(), &path).map(|found| (volume, found)))
            .await?;
    let grown = match at {
        At::Node => grow_device(adapter, &volume, &device, size).await.map(drop),
        At::FileSystem(opened) => {
            // The programs need exclusive access to the file system.
            drop(opened);
            match in_place(adapter, &volume, &device, size).await {
                Err(refusal) if refusal.code() == Code::FailedPrecondition => {
                    restage(adapter, &volume, &device, (size, refusal), expansion).await
                }
                grown => grown,
            }
        }
    };
    grown.map(|()| i64::try_from(size).unwrap_or(i64::MAX))
}

/// Stages the volume again if an earlier call was interrupted between unmounting and staging.
async fn resume(
    adapter: &Adapter,
    volume: v1::Volume,
    attachment: Option<v1::Attachment>,
    expansion: &Expansion,
) -> Result<(v1::Volume, Option<v1::Attachment>), Status> {
    let Some(access) = &expansion.access else { return Ok((volume, attachment)) };
    if !volume.labels.contains_key(labels::RESTAGING) {
        return Ok((volume, attachment));
    }
    stage(adapter, (&volume, attachment.is_some()), &expansion.staging, access).await?;
    adapter.read_again(volume.id).await
}

/// The new size of a volume: the requested size, rounded up to whole sectors, or its current size.
fn target_size(size: u64, range: Option<&CapacityRange>) -> Result<u64, Status> {
    let Some(range) = range else { return Ok(size) };
    let required: u64 = validate::not_negative("required_bytes", range.required_bytes)?;
    let limit: u64 = validate::not_negative("limit_bytes", range.limit_bytes)?;
    let target = required.next_multiple_of(SIZE_UNIT).max(size);
    if limit != 0 && limit < target {
        let text = format!(
            "capacity_range of {required} to {limit} bytes: the volume has {size} bytes, and sizes \
             are multiples of {SIZE_UNIT}"
        );
        return Err(Status::out_of_range(text));
    }
    if target > *SIZES.end() {
        let text =
            format!("capacity_range of {required} bytes: the limit of a volume is {}", SIZES.end());
        return Err(Status::out_of_range(text));
    }
    Ok(target)
}

/// Grows a volume and its device. The daemon refuses to grow the volume if the device cannot grow.
async fn grow_device(
    adapter: &Adapter,
    volume: &v1::Volume,
    device: &Device,
    size: u64,
) -> Result<u64, Status> {
    if volume.size_bytes < size || device.size_bytes()? < size {
        resize(adapter, volume.id, size).await?;
    }
    let shown = device.size_bytes()?;
    if shown < size {
        let (name, path) = (&volume.name, device.path.display());
        let text = format!("volume {name} has {size} bytes, but its device {path} has {shown}");
        return Err(Status::unavailable(text));
    }
    Ok(shown)
}

async fn resize(adapter: &Adapter, volume: u64, size_bytes: u64) -> Result<(), Status> {
    let request = v1::ModifyVolumeRequest {
        volume: Some(by_number(volume)),
        size_bytes: Some(size_bytes),
        ..v1::ModifyVolumeRequest::default()
    };
    adapter.daemon.modify(request).await.map(drop)
}

/// Grows a file system while it is mounted.
async fn in_place(
    adapter: &Adapter,
    volume: &v1::Volume,
    device: &Device,
    size: u64,
) -> Result<(), Status> {
    let (kind, mount) = writable(&volume.name, device)?;
    grow::may_grow_mounted(kind, &device.path, size).await?;
    let shown = grow_device(adapter, volume, device, size).await?;
    let root = mount.open_root();
    let root = root.map_err(|error| {
        let point = String::from_utf8_lossy(&mount.point);
        Status::internal(format!("cannot grow the file system mounted at {point}: {error}"))
    })?;
    grow::mounted(kind, (&device.path, shown), root).await
}

/// A writable mount of the root of the file system on a device, through which it can grow.
fn writable(name: &str, device: &Device) -> Result<(Kind, Mount), Status> {
    let mut mounts = mounts_of(device)?.into_iter();
    let found = mounts.find(|mount| !mount.read_only && mount.root == b"/");
    let found = found.and_then(|mount| Some((Kind::named(&mount.fs)?, mount)));
    found.ok_or_else(|| {
        Status::failed_precondition(format!(
            "volume {name} is mounted read-only, so its file system cannot grow"
        ))
    })
}

/// The mounts of a volume, which have to be mounted again.
struct Mounted {
    staging: String,
    access: Access,
    /// Target paths, and whether they are read-only.
    targets: Vec<(String, bool)>,
}

impl Mounted {
    /// Finds the mounts. `None` if it is unknown how to mount them again, or if a subdirectory is
    /// mounted by itself: that is done only for a running pod, so unmounting would fail.
    fn of(device: &Device, expansion: Expansion) -> Result<Option<Self>, Status> {
        let Some(Access::Mount { fs_type, mut flags, mode }) = expansion.access else {
            return Ok(None);
        };
        let staging = expansion.staging.trim_end_matches('/').to_owned();
        let mounts = mounts_of(device)?;
        if !mounts.iter().all(|mount| mount.root == b"/" && !mount.is_node(&device.path)) {
            return Ok(None);
        }
        let (staged, published): (Vec<Mount>, Vec<Mount>) =
            mounts.into_iter().partition(|mount| mount.point == staging.as_bytes());
        let [staged] = staged.as_slice() else { return Ok(None) };
        // kubelet sends the SELinux label when it stages, but not when it expands.
        if let Some(context) = &staged.context
            && !flags.iter().any(|flag| flag.contains("context="))
        {
            flags.push(format!("context=\"{context}\""));
        }
        MountOptions::parse(Kind::named(&staged.fs).unwrap_or(Kind::Ext4), &flags)?;
        let targets = published
            .into_iter()
            .map(|mount| String::from_utf8(mount.point).map(|point| (point, mount.read_only)).ok());
        let access = Access::Mount { fs_type, flags, mode };
        let targets: Option<Vec<_>> = targets.collect();
        Ok(targets.map(|targets| Self { staging, access, targets }))
    }

    /// Unmounts all mounts.
    async fn unmount(&self) -> Result<(), Status> {
        let targets = self.targets.iter().map(|(target, _)| target);
        let paths: Vec<String> = targets.chain([&self.staging]).cloned().collect();
        blocking(move || {
            paths.iter().try_for_each(|path| {
                mount::unmount(&Place::existing_parent("mount", path)?, Unmount::WhenUnused)
            })
        })
        .await
    }

    /// Mounts again what was unmounted.
    async fn mount(&self, adapter: &Adapter, volume: u64) -> Result<(), Status> {
        let (found, attachment) = adapter.read_again(volume).await?;
        let staged = (&found, attachment.is_some());
        stage(adapter, staged, &self.staging, &self.access).await?;
        for (target, read_only) in &self.targets {
            let (found, attachment) = adapter.read_again(volume).await?;
            let publication = Publication {
                staging: self.staging.clone(),
                target: target.clone(),
                access: self.access.clone(),
                read_only: *read_only,
            };
            publish(adapter, &found, attachment, publication).await?;
        }
        Ok(())
    }
}

/// Grows a volume while it is detached; `refusal` is the error of growing it in place.
async fn restage(
    adapter: &Adapter,
    volume: &v1::Volume,
    device: &Device,
    (size, refusal): (u64, Status),
    expansion: Expansion,
) -> Result<(), Status> {
    let Some(mounted) = Mounted::of(device, expansion)? else { return Err(refusal) };
    set_label(adapter, volume.id, labels::RESTAGING, labels::TRUE).await?;
    let detached = match mounted.unmount().await {
        Ok(()) => adapter.daemon.detach(volume.id).await,
        busy => busy,
    };
    let grown = match detached {
        Ok(()) => resize(adapter, volume.id, size).await,
        Err(busy) => {
            tracing::info!(
                volume = volume.name,
                why = busy.message(),
                "cannot detach a volume to grow it"
            );
            Err(refusal)
        }
    };
    // Also after an error.
    mounted.mount(adapter, volume.id).await?;
    grown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_sectors_within_the_range() {
        let of = |required_bytes, limit_bytes| {
            let range = CapacityRange { required_bytes, limit_bytes };
            target_size(8192, Some(&range)).map_err(|refused| refused.code())
        };
        assert_eq!(target_size(8192, None).unwrap(), 8192);
        assert_eq!(of(0, 0), Ok(8192));
        assert_eq!(of(4096, 0), Ok(8192), "nothing shrinks");
        assert_eq!(of(10_000, 0), Ok(10_240));
        assert_eq!(of(10_000, 10_240), Ok(10_240));
        assert_eq!(of(10_000, 10_100), Err(Code::OutOfRange));
        assert_eq!(of(4096, 4096), Err(Code::OutOfRange), "it is larger");
        assert_eq!(of((64 << 40) + 1, 0), Err(Code::OutOfRange));
        assert_eq!(of(i64::MAX, 0), Err(Code::OutOfRange));
        assert_eq!(of(-1, 0), Err(Code::InvalidArgument));
        assert_eq!(of(0, -1), Err(Code::InvalidArgument));
    }
}
