//! The requirements of a request for a volume: usage, size and topology. Requirements that can
//! never be staged are refused here, because kubelet would retry them forever.

use tonic::Status;

use crate::node::{Kind, MountOptions};
use crate::proto::csi::volume_capability::AccessType;
use crate::proto::csi::volume_capability::access_mode::Mode;
use crate::proto::csi::{CapacityRange, Topology, TopologyRequirement, VolumeCapability};
use crate::validate::{self, SIZE_UNIT, SIZES};

/// Supported access modes. A volume is on one node, so several nodes cannot write to it; all
/// readers are on that node.
const MODES: [Mode; 5] = [
    Mode::SingleNodeWriter,
    Mode::SingleNodeReaderOnly,
    Mode::SingleNodeSingleWriter,
    Mode::SingleNodeMultiWriter,
    Mode::MultiNodeReaderOnly,
];

/// The usage of a volume: the file system to mount, empty for any; `None` for a block device.
///
/// # Errors
/// INVALID_ARGUMENT: a field is missing, or the usage is not supported.
pub(super) fn usage(capabilities: &[VolumeCapability]) -> Result<Option<String>, Status> {
    let mut usage: Option<Option<String>> = None;
    for capability in capabilities {
        let one = match &capability.access_type {
            None => return Err(validate::missing("volume_capability.access_type")),
            Some(AccessType::Block(_)) => None,
            Some(AccessType::Mount(mount)) => {
                validate::optional("fs_type", &mount.fs_type)?;
                validate::list("mount_flags", &mount.mount_flags)?;
                Some(mount.fs_type.clone())
            }
        };
        let mode = capability.access_mode.as_ref().map_or(Mode::Unknown, |mode| mode.mode());
        if mode == Mode::Unknown {
            return Err(validate::missing("volume_capability.access_mode"));
        }
        if !MODES.contains(&mode) {
            return Err(Status::invalid_argument(format!(
                "access mode {} is not supported, a volume is on one node; use {}",
                mode.as_str_name(),
                Mode::SingleNodeWriter.as_str_name()
            )));
        }
        if usage.as_ref().is_some_and(|other| *other != one) {
            return Err(Status::invalid_argument(
                "volume_capabilities differ in access type or file system",
            ));
        }
        usage = Some(one);
    }
    usage.ok_or_else(|| validate::missing("volume_capabilities"))
}

/// Whether the access modes are supported. The external-provisioner requests the capacity of a
/// class without a mode.
pub(super) fn modes_supported(capabilities: &[VolumeCapability]) -> bool {
    let modes = capabilities.iter().filter_map(|capability| capability.access_mode.as_ref());
    modes.map(|mode| mode.mode()).all(|mode| mode == Mode::Unknown || MODES.contains(&mode))
}

/// Checks that a file system of `kind` takes the mount flags of all capabilities.
///
/// # Errors
/// INVALID_ARGUMENT, naming the flag.
pub(super) fn mountable(capabilities: &[VolumeCapability], kind: Kind) -> Result<(), Status> {
    for capability in capabilities {
        if let Some(AccessType::Mount(mount)) = &capability.access_type {
            MountOptions::parse(kind, &mount.mount_flags)?;
        }
    }
    Ok(())
}

/// Size in bytes of the smallest volume on which a file system fits.
pub(super) const fn smallest(kind: Kind) -> u64 {
    match kind {
        // 224 KiB with mke2fs 1.47 and our options.
        Kind::Ext4 => 256 << 10,
        // Since xfsprogs 5.19, whatever the options.
        Kind::Xfs => 300 << 20,
        // mkfs.btrfs needs 109 MiB, but the kernel does not resize a file system to less than this,
        // and each one is resized to its device when it is staged.
        Kind::Btrfs => 256 << 20,
    }
}

/// Checks that a new volume of `size_bytes` can be formatted.
///
/// # Errors
/// OUT_OF_RANGE, naming the minimum size.
pub(super) fn check_fits(name: &str, kind: Kind, size_bytes: u64) -> Result<(), Status> {
    let least = smallest(kind);
    if size_bytes < least {
        return Err(Status::out_of_range(format!(
            "volume {name}: {kind} does not fit on {size_bytes} bytes; ask for {least} or more"
        )));
    }
    Ok(())
}

/// The sizes that a request accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capacity {
    /// Minimum, a multiple of a sector; 0 if the request has none.
    pub(super) required_bytes: u64,
    /// Maximum; that of all volumes if the request has none.
    limit_bytes: u64,
}

impl Capacity {
    /// Parses a range.
    ///
    /// # Errors
    /// INVALID_ARGUMENT: a negative number; OUT_OF_RANGE: no valid size is in the range.
    pub(super) fn parse(range: Option<CapacityRange>) -> Result<Self, Status> {
        let range = range.unwrap_or_default();
        let required: u64 = validate::not_negative("required_bytes", range.required_bytes)?;
        let limit: u64 = validate::not_negative("limit_bytes", range.limit_bytes)?;
        let limit_bytes = if limit == 0 { *SIZES.end() } else { limit.min(*SIZES.end()) };
        let required_bytes = match required {
            0 => 0,
            required => required.next_multiple_of(SIZE_UNIT).max(*SIZES.start()),
        };
        if required_bytes.max(*SIZES.start()) > limit_bytes {
            let range = match limit {
                0 => format!("{required} bytes or more"),
                limit => format!("{required} to {limit} bytes"),
            };
            return Err(Status::out_of_range(format!(
                "capacity_range of {range}: sizes are multiples of {SIZE_UNIT}, {} to {} bytes",
                SIZES.start(),
                SIZES.end()
            )));
        }
        Ok(Self { required_bytes, limit_bytes })
    }

    /// Whether the request accepts a volume of this size.
    pub(super) const fn accepts(&self, size_bytes: u64) -> bool {
        size_bytes >= self.required_bytes && size_bytes <= self.limit_bytes
    }

    /// Size of a new volume without a source: the minimum, or else `default_bytes`, which the
    /// maximum bounds.
    pub(super) fn choose(&self, default_bytes: u64) -> u64 {
        match self.required_bytes {
            0 => default_bytes.min(self.limit_bytes - self.limit_bytes % SIZE_UNIT),
            required => required,
        }
    }
}

/// Whether the topology `here` satisfies a requirement.
pub(super) fn satisfied_by(requirement: Option<&TopologyRequirement>, here: &Topology) -> bool {
    requirement.is_none_or(|requirement| {
        // A topology with fewer segments than ours is a larger place that contains it. An empty one
        // matches nothing.
        let contains_here = |place: &Topology| {
            !place.segments.is_empty()
                && place.segments.iter().all(|(key, value)| here.segments.get(key) == Some(value))
        };
        requirement.requisite.is_empty() || requirement.requisite.iter().any(contains_here)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};
    use std::collections::BTreeMap;
    use tonic::Code;

    fn capability(access_type: AccessType, mode: Mode) -> VolumeCapability {
        VolumeCapability {
            access_mode: Some(AccessMode { mode: mode.into() }),
            access_type: Some(access_type),
        }
    }

    fn mount(fs_type: &str) -> AccessType {
        AccessType::Mount(MountVolume { fs_type: fs_type.to_owned(), ..MountVolume::default() })
    }

    #[test]
    fn capabilities_agree_on_one_usage_of_one_node() {
        let one = capability(mount("xfs"), Mode::SingleNodeWriter);
        assert_eq!(usage(std::slice::from_ref(&one)).unwrap(), Some("xfs".to_owned()));
        let block = capability(AccessType::Block(BlockVolume {}), Mode::SingleNodeMultiWriter);
        assert_eq!(usage(std::slice::from_ref(&block)).unwrap(), None);
        let missing = VolumeCapability { access_type: None, ..one.clone() };
        let modeless = VolumeCapability { access_mode: None, ..one.clone() };
        let many = capability(mount(""), Mode::MultiNodeMultiWriter);
        let unknown =
            VolumeCapability { access_mode: Some(AccessMode { mode: 99 }), ..one.clone() };
        let refused: [&[VolumeCapability]; 6] =
            [&[], &[missing], &[modeless], &[many], &[unknown], &[one, block]];
        for capabilities in refused {
            assert_eq!(usage(capabilities).unwrap_err().code(), Code::InvalidArgument);
        }
    }

    fn range(required_bytes: i64, limit_bytes: i64) -> Result<Capacity, Status> {
        Capacity::parse(Some(CapacityRange { required_bytes, limit_bytes }))
    }

    #[test]
    fn sizes_are_exact_or_rounded_up_to_a_sector() {
        let gib = 1 << 30;
        let choose = |required, limit| range(required, limit).unwrap().choose(gib);
        assert_eq!(Capacity::parse(None).unwrap().choose(gib), gib);
        assert_eq!(choose(0, 0), gib);
        assert_eq!(choose(5 * 512 + 4096, 0), 5 * 512 + 4096);
        assert_eq!(choose(10_000_000_000, 10_000_000_000), 10_000_000_000);
        assert_eq!(choose(1, 0), 4096);
        assert_eq!(choose(4097, 0), 4608);
        assert_eq!(choose(0, 5000), 4608, "not more than the limit");
        assert!(range(4097, 4608).unwrap().accepts(4608));
        assert!(!range(4097, 8192).unwrap().accepts(4096));
    }

    #[test]
    fn impossible_sizes_are_out_of_range() {
        let code = |required, limit| range(required, limit).unwrap_err().code();
        assert_eq!(code(8192, 4096), Code::OutOfRange);
        assert_eq!(code(0, 4095), Code::OutOfRange);
        assert_eq!(code(4097, 4100), Code::OutOfRange);
        assert_eq!(code((64 << 40) + 1, 0), Code::OutOfRange);
        assert_eq!(code(i64::MAX, 0), Code::OutOfRange);
        assert_eq!(code(-1, 0), Code::InvalidArgument);
        assert_eq!(code(0, -1), Code::InvalidArgument);
    }

    #[test]
    fn a_range_without_limit_is_shown_without_one() {
        let message = |required, limit| range(required, limit).unwrap_err().message().to_owned();
        let rest = "sizes are multiples of 512, 4096 to 70368744177664 bytes";
        assert_eq!(
            message(1 << 47, 0),
            format!("capacity_range of 140737488355328 bytes or more: {rest}")
        );
        assert_eq!(message(4097, 4100), format!("capacity_range of 4097 to 4100 bytes: {rest}"));
        assert_eq!(message(0, 4095), format!("capacity_range of 0 to 4095 bytes: {rest}"));
    }

    #[test]
    fn flags_are_those_of_the_file_system() {
        let with = |flags: &[&str]| {
            let mount_flags = flags.iter().map(|&flag| flag.to_owned()).collect();
            let mount = MountVolume { mount_flags, ..MountVolume::default() };
            capability(AccessType::Mount(mount), Mode::SingleNodeWriter)
        };
        let both = [with(&["noatime"]), with(&["discard,allocsize=64k"])];
        mountable(&both, Kind::Xfs).unwrap();
        let refused = mountable(&both, Kind::Ext4).unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains("allocsize"), "{}", refused.message());
        mountable(&[capability(AccessType::Block(BlockVolume {}), Mode::Unknown)], Kind::Xfs)
            .unwrap();
    }

    #[test]
    fn capabilities_without_a_mode_are_supported() {
        let of = |mode| modes_supported(&[capability(mount(""), mode)]);
        assert!(modes_supported(&[]) && of(Mode::Unknown) && of(Mode::SingleNodeWriter));
        assert!(!of(Mode::MultiNodeMultiWriter));
    }

    #[test]
    fn a_requirement_must_contain_this_node() {
        let place = |pairs: &[(&str, &str)]| Topology {
            segments: pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        };
        let here = place(&[("d/node", "a")]);
        let requisite = |places: Vec<Topology>| TopologyRequirement {
            requisite: places,
            preferred: Vec::new(),
        };
        let yes = [
            requisite(Vec::new()),
            requisite(vec![here.clone()]),
            requisite(vec![place(&[("d/node", "b")]), here.clone()]),
        ];
        let no = [
            requisite(vec![place(&[("d/node", "b")])]),
            requisite(vec![place(&[("zone", "a")])]),
            requisite(vec![Topology { segments: BTreeMap::new() }]),
            requisite(vec![place(&[("d/node", "a"), ("zone", "z")])]),
        ];
        assert!(satisfied_by(None, &here));
        assert!(yes.iter().all(|requirement| satisfied_by(Some(requirement), &here)));
        assert!(!no.iter().any(|requirement| satisfied_by(Some(requirement), &here)));
    }
}
