//! The block device of a volume, and the proof that a device belongs to the volume.
//!
//! A path proves nothing: device numbers are reused for other volumes. So before each use three
//! views are compared: the daemon's, the node in `/dev`, and the identity of the volume that the
//! kernel shows for the device (docs/PROTOCOLS.md).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use pando_proto::v1;
use rustix::fs::{Dev, FileType, Mode, OFlags, Stat, fstat, makedev, open};
use tonic::Status;

use crate::adapter::Adapter;
use crate::daemon::by_number;
use crate::labels;

use super::mountinfo::Mount;

/// Maximum number of bytes that are read from a file of sysfs.
const SHOWN_BYTES_MAX: usize = 4096;
/// Bytes of a sector in sysfs, which does not depend on the device.
const SYSFS_SECTOR_BYTES: u64 = 512;

/// A verified device.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    /// For example `/dev/loop3`.
    pub(crate) path: PathBuf,
    /// Its device number.
    pub(crate) number: Dev,
    /// Number of its volume.
    pub(crate) volume: u64,
}

impl Device {
    /// Verifies the device that the daemon reports for `volume`.
    ///
    /// # Errors
    /// `INTERNAL`: it is another device.
    pub(crate) fn verify(attachment: &v1::Attachment, volume: u64) -> Result<Self, Status> {
        let device = Self {
            path: PathBuf::from(&attachment.device),
            number: makedev(attachment.major, attachment.minor),
            volume,
        };
        let identity = &attachment.identity;
        if attachment.volume_id != volume || !names(identity, volume) {
            return Err(device.refused(&format!("pandod reports {identity:?}")));
        }
        device.node()?;
        if attachment.kind() == v1::DeviceKind::Ublk {
            return device.verified_ublk();
        }
        match shown_identity(attachment.kind(), device.number) {
            Ok(kernel) if kernel == *identity => Ok(device),
            Ok(kernel) => Err(device.refused(&format!("the kernel reports {kernel:?}"))),
            Err(error) => Err(device.refused(&format!("the kernel reports no identity: {error}"))),
        }
    }

    /// Verifies a ublk device. The kernel keeps a digest of its identity, but shows it to its
    /// server only; the daemon has compared it when it created the device or recovered it. Here it
    /// is checked that the number belongs to a ublk device, and to the one that the path names.
    fn verified_ublk(self) -> Result<Self, Status> {
        let link = std::fs::read_link(sysfs(self.number, ""));
        let link = link.map_err(|error| self.refused(&format!("sysfs: {error}")))?;
        let name = link.file_name().filter(|name| name.as_encoded_bytes().starts_with(b"ublkb"));
        if name.is_some() && name == self.path.file_name() {
            return Ok(self);
        }
        Err(self.refused(&format!("the kernel reports {}", link.display())))
    }

    /// The node in `/dev`, opened with `O_PATH`.
    ///
    /// # Errors
    /// `INTERNAL`: it is not the node of this device.
    pub(crate) fn node(&self) -> Result<OwnedFd, Status> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let node = open(&self.path, flags, Mode::empty());
        let node = node.map_err(|errno| self.refused(&errno.to_string()))?;
        let found = fstat(&node).map_err(|errno| self.refused(&errno.to_string()))?;
        if self.is(&found) { Ok(node) } else { Err(self.refused("the node is of another device")) }
    }

    /// Whether a file is a node of this device.
    pub(crate) fn is(&self, found: &Stat) -> bool {
        let block = FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice;
        block && found.st_rdev == self.number
    }

    /// The size in bytes, as the kernel reports it.
    ///
    /// # Errors
    /// `INTERNAL`: sysfs cannot be read.
    pub(crate) fn size_bytes(&self) -> Result<u64, Status> {
        let text = read(&sysfs(self.number, "size"));
        let text = text.map_err(|error| self.refused(&format!("size: {error}")))?;
        let sectors: Option<u64> = text.parse().ok();
        let bytes = sectors.and_then(|sectors| sectors.checked_mul(SYSFS_SECTOR_BYTES));
        bytes.ok_or_else(|| self.refused(&format!("size {text:?}")))
    }

    /// Whether a mount is of the file system on this device, or a bind mount of its node.
    pub(crate) fn carries(&self, mount: &Mount) -> bool {
        mount.is_of(&self.path, self.number) || mount.is_node(&self.path)
    }

    fn refused(&self, why: &str) -> Status {
        let path = self.path.display();
        Status::internal(format!("{path} is not the device of volume {}: {why}", self.volume))
    }
}

/// Attaches the volume unless it is attached, and verifies the device.
///
/// # Errors
/// Errors of the daemon; `INTERNAL`: the device belongs to another volume.
pub(crate) async fn attach(adapter: &Adapter, volume: &v1::Volume) -> Result<Device, Status> {
    let request = v1::AttachVolumeRequest {
        volume: Some(by_number(volume.id)),
        kind: requested_kind(&volume.labels)?.into(),
        read_only: false,
        sector_bytes: 0,
    };
    let attachment = adapter.daemon.attach(request).await?;
    Device::verify(&attachment, volume.id)
}

/// The kind of device that the label of a volume requests.
fn requested_kind(labels_of_volume: &BTreeMap<String, String>) -> Result<v1::DeviceKind, Status> {
    match labels_of_volume.get(labels::DEVICE_KIND).map(String::as_str) {
        None | Some("" | "auto") => Ok(v1::DeviceKind::Unspecified),
        Some("ublk") => Ok(v1::DeviceKind::Ublk),
        Some("nbd") => Ok(v1::DeviceKind::Nbd),
        Some("loop") => Ok(v1::DeviceKind::Loop),
        Some(other) => Err(Status::failed_precondition(format!(
            "label {} has the unknown kind of device {other:?}",
            labels::DEVICE_KIND
        ))),
    }
}

/// Whether `identity` is `pando-<uuid of a pool>-<volume>`.
fn names(identity: &str, volume: u64) -> bool {
    let pool = identity.strip_prefix("pando-").and_then(|rest| rest.rsplit_once('-'));
    pool.is_some_and(|(pool, number)| !pool.is_empty() && number == volume.to_string())
}

fn sysfs(number: Dev, file: &str) -> PathBuf {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    if file.is_empty() { device } else { device.join(file) }
}

fn read(path: &Path) -> std::io::Result<String> {
    let text = std::fs::read(path)?;
    let text = text.get(..SHOWN_BYTES_MAX).unwrap_or(&text);
    Ok(String::from_utf8_lossy(text).trim_end().to_owned())
}

/// The identity that the kernel shows for a device of this kind.
fn shown_identity(kind: v1::DeviceKind, number: Dev) -> std::io::Result<String> {
    match kind {
        // The name of the file that the daemon serves, without its directory.
        v1::DeviceKind::Loop => {
            let file = read(&sysfs(number, "loop/backing_file"))?;
            let name = file.rsplit('/').next().unwrap_or_default();
            Ok(name.strip_suffix(" (deleted)").unwrap_or(name).to_owned())
        }
        v1::DeviceKind::Nbd => read(&sysfs(number, "backend")),
        v1::DeviceKind::Ublk | v1::DeviceKind::Unspecified => {
            Err(std::io::Error::other(format!("not available for {kind:?} devices")))
        }
    }
}

/// The owner of a mount at a path of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The volume, with its current device.
    Volume,
    /// None: its device died with an earlier daemon, or is unknown to the daemon.
    Dead,
    /// Another volume, or something outside of Pando.
    Another,
}

/// Finds the owner of a mount. `device` is that of the volume, if it is attached; `live` are the
/// other devices that the daemon serves. A bind mount of a device node belongs to the volume or is
/// dead, but never to another volume: it does not show for which volume it was created, and after a
/// restart its number can be another volume's.
pub(crate) fn owner(mount: &Mount, device: Option<&Device>, live: &[v1::Attachment]) -> Owner {
    if device.is_some_and(|device| device.carries(mount)) {
        return Owner::Volume;
    }
    let served = live
        .iter()
        .any(|other| mount.is_of(Path::new(&other.device), makedev(other.major, other.minor)));
    let ours = ["ext4", "xfs", "btrfs", "devtmpfs"].contains(&mount.fs.as_str());
    if ours && !served { Owner::Dead } else { Owner::Another }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment() -> v1::Attachment {
        v1::Attachment {
            volume_id: 7,
            kind: v1::DeviceKind::Loop.into(),
            device: "/dev/null".to_owned(),
            major: 1,
            minor: 3,
            identity: "pando-5c1a-7".to_owned(),
            ..v1::Attachment::default()
        }
    }

    #[test]
    fn an_identity_names_one_volume() {
        assert!(names("pando-11111111-2222-3333-4444-555555555555-7", 7));
        for identity in ["", "pando-7", "pando--7", "pando-x-17", "pando-x-07", "pando-x-7 ", "x-7"]
        {
            assert!(!names(identity, 7), "{identity:?}");
        }
    }

    #[test]
    fn other_devices_are_refused() {
        let message = |attachment: &v1::Attachment, volume| {
            Device::verify(attachment, volume).unwrap_err().message().to_owned()
        };
        let good = attachment();
        assert!(message(&good, 8).contains("pandod reports"));
        assert!(message(&good, 7).contains("the node is of another device"), "a character device");
        let gone = v1::Attachment { device: "/dev/no-such".to_owned(), ..attachment() };
        assert!(message(&gone, 7).contains("No such file"));
        let other = v1::Attachment { identity: "pando-5c1a-8".to_owned(), ..attachment() };
        assert!(message(&other, 7).contains("pandod reports"));
    }

    #[test]
    fn the_kind_of_device_comes_from_the_label() {
        let kind = |text: &str| {
            let labels_of_volume =
                BTreeMap::from([(labels::DEVICE_KIND.to_owned(), text.to_owned())]);
            requested_kind(&labels_of_volume).ok()
        };
        assert_eq!(requested_kind(&BTreeMap::new()).unwrap(), v1::DeviceKind::Unspecified);
        assert_eq!(kind("loop"), Some(v1::DeviceKind::Loop));
        assert_eq!(kind("ublk"), Some(v1::DeviceKind::Ublk));
        assert_eq!(kind("/dev/sda"), None);
    }

    #[test]
    fn a_mount_of_another_volume_is_not_touched() {
        let mount = |fs: &str, minor, source: &str| Mount {
            id: 1,
            dev: makedev(7, minor),
            root: b"/".to_vec(),
            point: b"/staging".to_vec(),
            read_only: false,
            context: None,
            fs: fs.to_owned(),
            source: source.as_bytes().to_vec(),
        };
        let device = Device { path: PathBuf::from("/dev/loop3"), number: makedev(7, 3), volume: 7 };
        let other =
            v1::Attachment { device: "/dev/loop4".to_owned(), major: 7, minor: 4, ..attachment() };
        let owner = |mount: &Mount| owner(mount, Some(&device), std::slice::from_ref(&other));
        assert_eq!(owner(&mount("ext4", 3, "/dev/loop3")), Owner::Volume);
        assert_eq!(owner(&mount("btrfs", 99, "/dev/loop3")), Owner::Volume);
        assert_eq!(owner(&mount("xfs", 4, "/dev/loop4")), Owner::Another);
        assert_eq!(owner(&mount("xfs", 5, "/dev/loop5")), Owner::Dead);
        assert_eq!(owner(&mount("tmpfs", 5, "tmpfs")), Owner::Another);
    }
}
