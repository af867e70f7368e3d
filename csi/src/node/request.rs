//! Parsing of requests of the service Node.

use tonic::Status;

use crate::proto::csi::VolumeCapability;
use crate::proto::csi::volume_capability::AccessType;
use crate::proto::csi::volume_capability::access_mode::Mode;
use crate::validate;

/// Maximum length of a path in bytes, the limit of the kernel.
const PATH_BYTES_MAX: usize = 4096;

/// The usage of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// A file system.
    Mount {
        /// Its type; if empty, that of the volume.
        fs_type: String,
        /// Mount flags, not parsed yet.
        flags: Vec<String>,
        mode: Mode,
    },
    /// A raw device.
    Block { mode: Mode },
}

impl Access {
    /// Parses a capability.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`: missing or incomplete; `FAILED_PRECONDITION`: a mode in which several
    /// nodes write, because a volume is on one node.
    pub(crate) fn parse(capability: Option<VolumeCapability>) -> Result<Self, Status> {
        let capability = capability.ok_or_else(|| validate::missing("volume_capability"))?;
        let mode = capability.access_mode.map(|mode| mode.mode());
        let mode = mode.filter(|mode| *mode != Mode::Unknown);
        let mode = mode.ok_or_else(|| validate::missing("volume_capability.access_mode"))?;
        if matches!(mode, Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter) {
            let text = format!("access mode {mode:?} is not supported, a volume is on one node");
            return Err(Status::failed_precondition(text));
        }
        match capability.access_type {
            Some(AccessType::Block(_)) => Ok(Self::Block { mode }),
            Some(AccessType::Mount(mount)) => {
                if !mount.volume_mount_group.is_empty() {
                    let text = "volume_mount_group: this driver lacks VOLUME_MOUNT_GROUP";
                    return Err(Status::invalid_argument(text));
                }
                validate::optional("fs_type", &mount.fs_type)?;
                validate::list("mount_flags", &mount.mount_flags)?;
                Ok(Self::Mount { fs_type: mount.fs_type, flags: mount.mount_flags, mode })
            }
            None => Err(validate::missing("volume_capability.access_type")),
        }
    }

    const fn mode(&self) -> Mode {
        match self {
            Self::Mount { mode, .. } | Self::Block { mode } => *mode,
        }
    }

    /// Whether the mode is read-only.
    pub(crate) fn read_only(&self) -> bool {
        matches!(self.mode(), Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly)
    }

    /// Whether the volume may be published at one target only.
    pub(crate) fn single_target(&self) -> bool {
        self.mode() == Mode::SingleNodeSingleWriter
    }
}

/// Checks a required path. Its form is checked when it is opened, because the existence of the
/// object is checked first.
///
/// # Errors
/// `INVALID_ARGUMENT`, naming the field.
pub(crate) fn path(field: &str, path: &str) -> Result<(), Status> {
    if path.is_empty() {
        return Err(validate::missing(field));
    }
    short_path(field, path)
}

/// Checks the length of a path, which may be empty.
///
/// # Errors
/// `INVALID_ARGUMENT`, naming the field.
pub(crate) fn short_path(field: &str, path: &str) -> Result<(), Status> {
    validate::length(field, path.len(), PATH_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};
    use tonic::Code;

    fn capability(access_type: Option<AccessType>, mode: Mode) -> Option<VolumeCapability> {
        let access_mode = Some(AccessMode { mode: mode.into() });
        Some(VolumeCapability { access_type, access_mode })
    }

    #[test]
    fn a_capability_must_be_complete_and_of_one_node() {
        let block = || Some(AccessType::Block(BlockVolume {}));
        let code = |capability| Access::parse(capability).unwrap_err().code();
        assert_eq!(code(None), Code::InvalidArgument);
        assert_eq!(code(capability(None, Mode::SingleNodeWriter)), Code::InvalidArgument);
        assert_eq!(code(capability(block(), Mode::Unknown)), Code::InvalidArgument);
        assert_eq!(code(capability(block(), Mode::MultiNodeMultiWriter)), Code::FailedPrecondition);
        let group = MountVolume { volume_mount_group: "7".to_owned(), ..MountVolume::default() };
        let group = Some(AccessType::Mount(group));
        assert_eq!(code(capability(group, Mode::SingleNodeWriter)), Code::InvalidArgument);
    }

    #[test]
    fn modes_determine_writers_and_targets() {
        let of = |mode| {
            let mount = Some(AccessType::Mount(MountVolume::default()));
            let access = Access::parse(capability(mount, mode)).unwrap();
            (access.read_only(), access.single_target())
        };
        assert_eq!(of(Mode::SingleNodeWriter), (false, false));
        assert_eq!(of(Mode::SingleNodeMultiWriter), (false, false));
        assert_eq!(of(Mode::SingleNodeSingleWriter), (false, true));
        assert_eq!(of(Mode::SingleNodeReaderOnly), (true, false));
        assert_eq!(of(Mode::MultiNodeReaderOnly), (true, false));
    }
}
