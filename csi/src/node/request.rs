//! What requests of the service Node ask for.

use tonic::Status;

use crate::proto::csi::VolumeCapability;
use crate::proto::csi::volume_capability::AccessType;
use crate::proto::csi::volume_capability::access_mode::Mode;
use crate::validate;

/// Bytes of a path: the kernel takes no longer one.
const PATH_BYTES_MAX: usize = 4096;

/// How a volume is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// A file system.
    Mount {
        /// Its type; empty means what the volume was made for.
        fs_type: String,
        /// Mount flags, not looked at yet.
        flags: Vec<String>,
        mode: Mode,
    },
    /// A raw device.
    Block { mode: Mode },
}

impl Access {
    /// Reads a capability, which must be there.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`: incomplete; `FAILED_PRECONDITION`: a mode of more than one node that
    /// writes, which a volume of one node cannot have.
    pub(crate) fn of(capability: Option<VolumeCapability>) -> Result<Self, Status> {
        let missing = |what: &str| Status::invalid_argument(format!("{what} is missing"));
        let capability = capability.ok_or_else(|| missing("volume_capability"))?;
        let mode = capability.access_mode.map(|mode| mode.mode());
        let mode = mode.filter(|mode| *mode != Mode::Unknown);
        let mode = mode.ok_or_else(|| missing("volume_capability.access_mode"))?;
        if matches!(mode, Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter) {
            let text = format!("{mode:?}: a volume is accessible on its own node only");
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
            None => Err(missing("volume_capability.access_type")),
        }
    }

    const fn mode(&self) -> Mode {
        match self {
            Self::Mount { mode, .. } | Self::Block { mode } => *mode,
        }
    }

    /// Whether nobody may write.
    pub(crate) fn read_only(&self) -> bool {
        matches!(self.mode(), Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly)
    }

    /// Whether the volume may be published at one place only.
    pub(crate) fn single_target(&self) -> bool {
        self.mode() == Mode::SingleNodeSingleWriter
    }
}

/// Checks a path that must be there. Its form is looked at when it is opened: whether an object
/// exists comes first.
///
/// # Errors
/// `INVALID_ARGUMENT`, naming the field.
pub(crate) fn path(field: &str, path: &str) -> Result<(), Status> {
    if path.is_empty() {
        return Err(Status::invalid_argument(format!("{field} is missing")));
    }
    short_path(field, path)
}

/// Checks that a path, which may be empty, is none that no kernel takes and no answer can show.
///
/// # Errors
/// `INVALID_ARGUMENT`, naming the field.
pub(crate) fn short_path(field: &str, path: &str) -> Result<(), Status> {
    if path.len() > PATH_BYTES_MAX {
        let text = format!("{field} is longer than {PATH_BYTES_MAX} bytes");
        return Err(Status::invalid_argument(text));
    }
    Ok(())
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
    fn a_capability_is_complete_and_of_one_node() {
        let block = || Some(AccessType::Block(BlockVolume {}));
        let code = |capability| Access::of(capability).unwrap_err().code();
        assert_eq!(code(None), Code::InvalidArgument);
        assert_eq!(code(capability(None, Mode::SingleNodeWriter)), Code::InvalidArgument);
        assert_eq!(code(capability(block(), Mode::Unknown)), Code::InvalidArgument);
        assert_eq!(code(capability(block(), Mode::MultiNodeMultiWriter)), Code::FailedPrecondition);
        let group = MountVolume { volume_mount_group: "7".to_owned(), ..MountVolume::default() };
        let group = Some(AccessType::Mount(group));
        assert_eq!(code(capability(group, Mode::SingleNodeWriter)), Code::InvalidArgument);
    }

    #[test]
    fn modes_say_who_may_write() {
        let of = |mode| {
            let mount = Some(AccessType::Mount(MountVolume::default()));
            let access = Access::of(capability(mount, mode)).unwrap();
            (access.read_only(), access.single_target())
        };
        assert_eq!(of(Mode::SingleNodeWriter), (false, false));
        assert_eq!(of(Mode::SingleNodeMultiWriter), (false, false));
        assert_eq!(of(Mode::SingleNodeSingleWriter), (false, true));
        assert_eq!(of(Mode::SingleNodeReaderOnly), (true, false));
        assert_eq!(of(Mode::MultiNodeReaderOnly), (true, false));
    }
}
