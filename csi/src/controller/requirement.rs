//! What a request asks of a volume: how it will be used, how large it is to be, and where. What can
//! never be staged is refused here: kubelet would try it for ever.

use tonic::Status;

use crate::node::{Kind, MountOptions};
use crate::proto::csi::volume_capability::AccessType;
use crate::proto::csi::volume_capability::access_mode::Mode;
use crate::proto::csi::{CapacityRange, Topology, TopologyRequirement, VolumeCapability};
use crate::validate::{self, SIZE_UNIT, SIZES};

/// Modes in which a volume can be used. It is on one node, so nothing is promised about writers on
/// several; readers are all on that node.
const MODES: [Mode; 5] = [
    Mode::SingleNodeWriter,
    Mode::SingleNodeReaderOnly,
    Mode::SingleNodeSingleWriter,
    Mode::SingleNodeMultiWriter,
    Mode::MultiNodeReaderOnly,
];

/// How a volume will be used: the file system to mount from it, empty for any; or none for a block
/// device.
///
/// # Errors
/// INVALID_ARGUMENT: a field is missing, or the volume cannot be used so.
pub(super) fn usage(capabilities: &[VolumeCapability]) -> Result<Option<String>, Status> {
    let mut usage: Option<Option<String>> = None;
    for capability in capabilities {
        let one = match &capability.access_type {
            None => return Err(Status::invalid_argument("a volume_capability has no access_type")),
            Some(AccessType::Block(_)) => None,
            Some(AccessType::Mount(mount)) => {
                validate::optional("fs_type", &mount.fs_type)?;
                validate::list("mount_flags", &mount.mount_flags)?;
                Some(mount.fs_type.clone())
            }
        };
        let mode = capability.access_mode.as_ref().map_or(Mode::Unknown, |mode| mode.mode());
        if mode == Mode::Unknown {
            return Err(Status::invalid_argument("a volume_capability has no access_mode"));
        }
        if !MODES.contains(&mode) {
            return Err(Status::invalid_argument(format!(
                "access mode {}: a volume of Pando is on one node; use {}",
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
    usage.ok_or_else(|| Status::invalid_argument("volume_capabilities are missing"))
}

/// Whether some volume can be used in the modes that are named. The external-provisioner asks for
/// the capacity of a class without naming one.
pub(super) fn possible(capabilities: &[VolumeCapability]) -> bool {
    let modes = capabilities.iter().filter_map(|capability| capability.access_mode.as_ref());
    modes.map(|mode| mode.mode()).all(|mode| mode == Mode::Unknown || MODES.contains(&mode))
}

/// Checks that a file system of `kind` can be mounted with the flags of all capabilities.
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

/// Bytes of the smallest volume that a file system fits on.
pub(super) const fn smallest(kind: Kind) -> u64 {
    match kind {
        // 224 KiB with mke2fs 1.47 and the options of ours.
        Kind::Ext4 => 256 << 10,
        // Since xfsprogs 5.19, whatever the options.
        Kind::Xfs => 300 << 20,
        // mkfs.btrfs makes one of 109 MiB, but the kernel grows none to less than this, and each one
        // is grown to the size of its device when it is staged.
        Kind::Btrfs => 256 << 20,
    }
}

/// Checks that a new volume of `size_bytes` can be formatted.
///
/// # Errors
/// OUT_OF_RANGE, naming the least size.
pub(super) fn holds(name: &str, kind: Kind, size_bytes: u64) -> Result<(), Status> {
    let least = smallest(kind);
    if size_bytes < least {
        return Err(Status::out_of_range(format!(
            "volume {name}: {kind} does not fit on {size_bytes} bytes; ask for {least} or more"
        )));
    }
    Ok(())
}

/// Sizes that a request accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capacity {
    /// At least this, in units of a sector; 0 if nothing was said.
    pub(super) required_bytes: u64,
    /// At most this; the largest volume if nothing was said.
    limit_bytes: u64,
}

impl Capacity {
    /// Reads a range.
    ///
    /// # Errors
    /// INVALID_ARGUMENT for negative numbers, OUT_OF_RANGE when no volume is in the range.
    pub(super) fn parse(range: Option<CapacityRange>) -> Result<Self, Status> {
        let range = range.unwrap_or_default();
        let bytes = |field: &str, bytes: i64| {
            u64::try_from(bytes)
                .map_err(|_| Status::invalid_argument(format!("{field} = {bytes} is negative")))
        };
        let asked = bytes("required_bytes", range.required_bytes)?;
        let limit = bytes("limit_bytes", range.limit_bytes)?;
        let limit_bytes = if limit == 0 { *SIZES.end() } else { limit.min(*SIZES.end()) };
        let required_bytes = match asked {
            0 => 0,
            asked => asked.next_multiple_of(SIZE_UNIT).max(*SIZES.start()),
        };
        if required_bytes.max(*SIZES.start()) > limit_bytes {
            let range = match limit {
                0 => format!("{asked} bytes or more"),
                limit => format!("{asked} to {limit} bytes"),
            };
            return Err(Status::out_of_range(format!(
                "no volume has {range}: sizes are multiples of {SIZE_UNIT}, {} to {} bytes",
                SIZES.start(),
                SIZES.end()
            )));
        }
        Ok(Self { required_bytes, limit_bytes })
    }

    /// Whether a volume of this size is what was asked for.
    pub(super) const fn accepts(&self, size_bytes: u64) -> bool {
        size_bytes >= self.required_bytes && size_bytes <= self.limit_bytes
    }

    /// Size of a new volume without a source; `default_bytes` if none was asked for, or the limit.
    pub(super) fn choose(&self, default_bytes: u64) -> u64 {
        match self.required_bytes {
            0 => default_bytes.min(self.limit_bytes - self.limit_bytes % SIZE_UNIT),
            required => required,
        }
    }
}

/// Whether a volume at `here` is accessible where it has to be.
pub(super) fn fits(requirement: Option<&TopologyRequirement>, here: &Topology) -> bool {
    requirement.is_none_or(|requirement| {
        // A topology that says less than ours is a larger place around it; one that says nothing
        // is none.
        let around = |place: &Topology| {
            !place.segments.is_empty()
                && place.segments.iter().all(|(key, value)| here.segments.get(key) == Some(value))
        };
        requirement.requisite.is_empty() || requirement.requisite.iter().any(around)
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
    fn one_use_on_one_node() {
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
            format!("no volume has 140737488355328 bytes or more: {rest}")
        );
        assert_eq!(message(4097, 4100), format!("no volume has 4097 to 4100 bytes: {rest}"));
        assert_eq!(message(0, 4095), format!("no volume has 0 to 4095 bytes: {rest}"));
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
    fn a_mode_that_is_not_named_is_possible() {
        let of = |mode| possible(&[capability(mount(""), mode)]);
        assert!(possible(&[]) && of(Mode::Unknown) && of(Mode::SingleNodeWriter));
        assert!(!of(Mode::MultiNodeMultiWriter));
    }

    #[test]
    fn a_place_is_ours_or_not() {
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
        assert!(fits(None, &here));
        assert!(yes.iter().all(|requirement| fits(Some(requirement), &here)));
        assert!(!no.iter().any(|requirement| fits(Some(requirement), &here)));
    }
}
