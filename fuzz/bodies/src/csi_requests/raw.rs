//! The bytes of one request and their meaning: ordinary values and hostile ones.

use std::collections::BTreeMap;
use std::path::Path;

use pando_csi::proto::csi::volume_capability::access_mode::Mode;
use pando_csi::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use pando_csi::proto::csi::{CapacityRange, VolumeCapability};

/// The bytes of one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Raw {
    pub(super) call: u8,
    pub(super) name: u8,
    pub(super) id: u8,
    pub(super) size: [u8; 2],
    pub(super) capability: u8,
    pub(super) parameter: u8,
    pub(super) path: u8,
    pub(super) more: u8,
    pub(super) failure: u8,
}

impl Raw {
    pub(super) fn of(raw: [u8; super::REQUEST_BYTES]) -> Self {
        let [call, name, id, s0, s1, capability, parameter, path, more, failure] = raw;
        Self { call, name, id, size: [s0, s1], capability, parameter, path, more, failure }
    }

    pub(super) fn name(self) -> String {
        match self.name {
            0xF0 => String::new(),
            0xF1 => "n".repeat(128),
            0xF2 => "n".repeat(129),
            0xF3 => "a\nb".into(),
            0xF4 => "../../etc".into(),
            0xF5 => "\u{e4}/\\ ".into(),
            0xF6 => "a\0b".into(),
            0xF7 => "\u{10ffff}".repeat(32),
            name => format!("name-{}", name % 6),
        }
    }

    pub(super) fn range(self) -> Option<CapacityRange> {
        let bytes = |size: u8| match size {
            0..=0x7F => i64::from(size % 16) << 20,
            0x80..=0xBF => i64::from(size) * 100,
            0xC0..=0xCF => -i64::from(size),
            0xD0..=0xDF => i64::from(size) << 40,
            _ => i64::MAX - i64::from(size),
        };
        let [required, limit] = self.size;
        let limit_bytes = if limit < 0x40 { 0 } else { bytes(limit) };
        (required != 0xFF).then(|| CapacityRange { required_bytes: bytes(required), limit_bytes })
    }

    pub(super) fn capability(self) -> Option<VolumeCapability> {
        let mode = match self.capability & 15 {
            0..=8 => Mode::SingleNodeWriter.into(),
            9 => 0,
            10 => 99,
            11 => Mode::MultiNodeMultiWriter.into(),
            12 => Mode::MultiNodeReaderOnly.into(),
            _ => Mode::SingleNodeSingleWriter.into(),
        };
        let text = |text: &str| text.to_owned();
        let access_type = match self.capability >> 4 {
            0 => return None,
            1 => None,
            2 => Some(AccessType::Block(BlockVolume {})),
            3 => Some(AccessType::Mount(MountVolume {
                fs_type: text("xfs,suid"),
                mount_flags: vec![text("suid,dev"), text("rw\0")],
                ..MountVolume::default()
            })),
            4 => Some(AccessType::Mount(MountVolume {
                mount_flags: vec!["f".repeat(5000)],
                ..MountVolume::default()
            })),
            5 => Some(AccessType::Mount(MountVolume {
                volume_mount_group: text("0"),
                ..MountVolume::default()
            })),
            _ => Some(AccessType::Mount(MountVolume::default())),
        };
        let access_mode = (self.capability & 15 != 15).then_some(AccessMode { mode });
        Some(VolumeCapability { access_mode, access_type })
    }

    pub(super) fn parameters(self) -> BTreeMap<String, String> {
        let map = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let long = "x".repeat(5000);
        match self.parameter {
            0x80..=0x8F => map(&[("fsType", "xfs")]),
            0x90..=0x9F => map(&[("growthLimit", "10Gi"), ("iopsLimit", "100")]),
            0xA0..=0xA7 => map(&[("unknown-key", "1")]),
            0xA8..=0xAF => map(&[("iopsLimit", "-1")]),
            0xB0..=0xB7 => map(&[("reservation", "99999999999999999999Gi")]),
            0xB8..=0xBF => map(&[("mkfsOptions", "-E\nlazy --")]),
            0xC0..=0xC7 => map(&[("fsType", "../../sbin/init")]),
            0xC8..=0xCF => map(&[("fsType", &long)]),
            0xD0..=0xD7 => map(&[("csi.storage.k8s.io/pvc/name", "../../x")]),
            0xD8..=0xDF => map(&[("freeze", "true")]),
            _ => BTreeMap::new(),
        }
    }

    pub(super) fn path(self, inside: &Path) -> String {
        let inside = inside.display();
        match self.path {
            0x80 => String::new(),
            0x81 => "some/path".into(),
            0x82 => format!("{inside}/../outside/empty"),
            0x83 => format!("{inside}/link/empty"),
            0x84 => format!("{inside}/a\0b"),
            0x85 => format!("{inside}/a\nb"),
            0x86 => format!("{inside}/{}", "a".repeat(4200)),
            0x87 => "/".into(),
            0x88 => format!("{inside}/empty/."),
            0x89 => format!("{inside}/full"),
            0x8A => format!("{inside}/link"),
            0x8B => format!("{inside}//empty//"),
            0x8C => format!("{inside}/file/below"),
            0x8D => format!("{inside}/\u{202e}target"),
            path => {
                format!("{inside}/{}", ["empty", "new", "file", "none/new"][usize::from(path % 4)])
            }
        }
    }

    pub(super) fn hostile_path(self) -> bool {
        (0x80..=0x8D).contains(&self.path)
    }
}
