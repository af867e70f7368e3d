//! Growth of a volume that is staged: the volume, its device, its file system.
//!
//! ```text
//! in place   may the file system grow as it is mounted? -- volume and device -- file system
//! else       unmount -- detach -- volume -- stage, which grows the file system -- publish
//! ```
//!
//! The second way is for what cannot grow in place: an ext4 without CAP_SYS_RESOURCE, a ublk device
//! before Linux 6.16, a mount that is read-only. kubelet asks after it has published the volume and
//! before it starts the pod, so one restart of the pod does it. A pod that runs keeps the device
//! busy; then all is mounted again as it was, and the call is refused.
//!
//! Nothing has grown when a call is refused. If the adapter is killed in between, a label makes it
//! known that the volume has to be staged again: kubelet's next call does that.

use pando_proto::v1;
use tonic::{Code, Status};

use crate::adapter::Adapter;
use crate::daemon::by_number;
use crate::labels;
use crate::proto::csi::CapacityRange;
use crate::validate::{SIZE_UNIT, SIZES};

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

/// What is to grow, and how far.
pub(crate) struct Expansion {
    /// Where the volume is staged or published.
    pub(crate) path: String,
    /// Where it is staged.
    pub(crate) staging: String,
    pub(crate) range: Option<CapacityRange>,
    /// How it was staged, if the request contains that.
    pub(crate) access: Option<Access>,
}

/// Grows what is at the path to the size of the volume, and that first if more is asked; returns
/// the size. The caller has locked the volume.
///
/// # Errors
/// `NOT_FOUND`: it is not there; `OUT_OF_RANGE`: the volume is larger than allowed;
/// `FAILED_PRECONDITION`: the file system cannot grow while it is mounted like this, or the device
/// not while it is used. A volume whose growth is refused has its old size.
pub(crate) async fn expand(
    adapter: &Adapter,
    volume: v1::Volume,
    attachment: Option<v1::Attachment>,
    expansion: Expansion,
) -> Result<i64, Status> {
    let (volume, attachment) = resumed(adapter, volume, attachment, &expansion).await?;
    let size = wanted(volume.size_bytes, expansion.range.as_ref())?;
    let path = expansion.path.clone();
    let (volume, (device, at)) =
        blocking(move || find(&volume, attachment.as_ref(), &path).map(|found| (volume, found)))
            .await?;
    let grown = match at {
        At::Node => grow_device(adapter, &volume, &device, size).await.map(drop),
        At::FileSystem(opened) => {
            // The programs want the file system for themselves.
            drop(opened);
            match in_place(adapter, &volume, &device, size).await {
                Err(barred) if barred.code() == Code::FailedPrecondition => {
                    staged_again(adapter, &volume, &device, (size, barred), expansion).await
                }
                grown => grown,
            }
        }
    };
    grown.map(|()| i64::try_from(size).unwrap_or(i64::MAX))
}

/// Stages a volume whose growth by staging was interrupted.
async fn resumed(
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
    existing(adapter, volume.id).await
}

/// The size that a volume is to have: what is asked for in whole sectors, or what it has.
fn wanted(size: u64, range: Option<&CapacityRange>) -> Result<u64, Status> {
    let Some(range) = range else { return Ok(size) };
    let bytes = |number: i64| {
        let negative = |_| Status::invalid_argument("capacity_range: negative");
        u64::try_from(number).map_err(negative)
    };
    let (required, limit) = (bytes(range.required_bytes)?, bytes(range.limit_bytes)?);
    let wanted = required.next_multiple_of(SIZE_UNIT).max(size);
    if limit != 0 && limit < wanted {
        let text = format!(
            "capacity_range: {required} to {limit} bytes, but the volume has {size} bytes, and \
             sizes are multiples of {SIZE_UNIT}"
        );
        return Err(Status::out_of_range(text));
    }
    if wanted > *SIZES.end() {
        let text =
            format!("capacity_range: {required} bytes; a volume has at most {}", SIZES.end());
        return Err(Status::out_of_range(text));
    }
    Ok(wanted)
}

/// Gives a volume and its device a size. The daemon refuses both if the device keeps its size.
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
        Status::internal(format!("cannot grow what is mounted at {point}: {error}"))
    })?;
    grow::mounted(kind, (&device.path, shown), root).await
}

/// Where the file system on a device can be told to grow.
fn writable(name: &str, device: &Device) -> Result<(Kind, Mount), Status> {
    let mut mounts = mounts_of(device)?.into_iter();
    let found = mounts.find(|mount| !mount.read_only && mount.root == b"/");
    let found = found.and_then(|mount| Some((Kind::named(&mount.fs)?, mount)));
    found.ok_or_else(|| {
        Status::failed_precondition(format!("volume {name}: mounted read-only, so it cannot grow"))
    })
}

/// What is mounted of a volume, and has to be mounted again.
struct Mounted {
    staging: String,
    access: Access,
    /// Paths of pods, and whether they are read-only.
    targets: Vec<(String, bool)>,
}

impl Mounted {
    /// `None` if it is not known how to mount it again, or that would be of no use: a subdirectory
    /// is mounted by itself, which is done only for a pod that runs.
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
        // kubelet names the label of SELinux when it stages, but not when it expands.
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

    /// Unmounts all of it.
    async fn unmount(&self) -> Result<(), Status> {
        let targets = self.targets.iter().map(|(target, _)| target);
        let paths: Vec<String> = targets.chain([&self.staging]).cloned().collect();
        blocking(move || {
            paths
                .iter()
                .try_for_each(|path| mount::unmount(&Place::of("mount", path)?, Unmount::Whole))
        })
        .await
    }

    /// Mounts again what is not.
    async fn mount(&self, adapter: &Adapter, volume: u64) -> Result<(), Status> {
        let (found, attachment) = existing(adapter, volume).await?;
        let staged = (&found, attachment.is_some());
        stage(adapter, staged, &self.staging, &self.access).await?;
        for (target, read_only) in &self.targets {
            let (found, attachment) = existing(adapter, volume).await?;
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

async fn existing(
    adapter: &Adapter,
    volume: u64,
) -> Result<(v1::Volume, Option<v1::Attachment>), Status> {
    let found = adapter.daemon.find(by_number(volume)).await?;
    found.ok_or_else(|| Status::not_found("the volume was deleted"))
}

/// Grows a volume while it is detached; `barred` is why it cannot grow in place.
async fn staged_again(
    adapter: &Adapter,
    volume: &v1::Volume,
    device: &Device,
    (size, barred): (u64, Status),
    expansion: Expansion,
) -> Result<(), Status> {
    let Some(mounted) = Mounted::of(device, expansion)? else { return Err(barred) };
    set_label(adapter, volume.id, labels::RESTAGING, labels::TRUE).await?;
    let free = match mounted.unmount().await {
        Ok(()) => adapter.daemon.detach(volume.id).await,
        busy => busy,
    };
    let grown = match free {
        Ok(()) => resize(adapter, volume.id, size).await,
        Err(busy) => {
            tracing::info!(
                volume = volume.name,
                why = busy.message(),
                "cannot be detached to grow"
            );
            Err(barred)
        }
    };
    // Whatever came of it.
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
            wanted(8192, Some(&range)).map_err(|refused| refused.code())
        };
        assert_eq!(wanted(8192, None).unwrap(), 8192);
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
