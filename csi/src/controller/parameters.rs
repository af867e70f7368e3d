//! The parameters of StorageClasses, VolumeAttributesClasses and snapshot classes.
//!
//! | parameter | values | mutable |
//! |---|---|---|
//! | `fsType` | `ext4` (default), `xfs`, `btrfs` | |
//! | `mkfsOptions` | arguments of mkfs, separated by spaces | |
//! | `deviceKind` | `auto` (default), `ublk`, `nbd`, `loop` | |
//! | `freeze` | `true`, `false` (default) | |
//! | `growthLimit`, `reservation` | bytes, such as `10Gi`; 0: none | yes |
//! | `iopsLimit` | requests per second; 0: none | yes |
//! | `bandwidthLimit` | bytes per second, such as `100Mi`; 0: none | yes |
//!
//! Keys with the prefix `csi.storage.k8s.io/` belong to Kubernetes: they name the claim or
//! snapshot.

use std::collections::BTreeMap;

use bytesize::ByteSize;
use tonic::Status;

use crate::labels;
use crate::node::{Kind, format_options};
use crate::validate;

/// Prefix of the keys that the sidecars of Kubernetes add.
const SIDECARS: &str = "csi.storage.k8s.io/";
/// File system of a class that names none.
pub(super) const DEFAULT_KIND: Kind = Kind::Ext4;
/// Key with which a class names the file system for the provisioner, which copies it to the
/// capability. Only GetCapacity gets this key.
const CAPABILITY_KIND: &str = "csi.storage.k8s.io/fstype";
/// Kinds of devices; the first is the default.
const DEVICE_KINDS: [&str; 4] = ["auto", "ublk", "nbd", "loop"];
/// Maximum length of the arguments for mkfs in bytes: with the key they must fit into a label.
const MKFS_BYTES_MAX: usize = 400;

/// Parameters of a request.
type Map = BTreeMap<String, String>;

/// Limits of a volume, which can be changed while it is in use. `None`: the request does not
/// contain it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) growth_bytes: Option<u64>,
    pub(super) reservation_bytes: Option<u64>,
    pub(super) iops: Option<u64>,
    pub(super) bandwidth_bytes: Option<u64>,
}

impl Limits {
    /// Sets one limit. Returns `false` if the parameter is not a limit.
    fn set(&mut self, key: &str, value: &str) -> Result<bool, Status> {
        match key {
            "growthLimit" => self.growth_bytes = Some(bytes(key, value)?),
            "reservation" => self.reservation_bytes = Some(bytes(key, value)?),
            "bandwidthLimit" => self.bandwidth_bytes = Some(bytes(key, value)?),
            "iopsLimit" => {
                let number = value.parse();
                self.iops = Some(number.map_err(|_| refused(key, value, "be a number"))?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The limits that a VolumeAttributesClass names.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, naming the parameter.
    pub(super) fn parse(mutable: &Map) -> Result<Self, Status> {
        let mut limits = Self::default();
        for (key, value) in mutable {
            if !limits.set(key, value)? {
                return Err(unknown(key, "growthLimit, reservation, iopsLimit, bandwidthLimit"));
            }
        }
        Ok(limits)
    }

    /// One text for all limits, to compare a repeated request with the first one.
    fn label(self) -> Option<String> {
        (self != Self::default()).then(|| {
            let shown = |value: Option<u64>| value.unwrap_or_default();
            format!(
                "growth={} reservation={} iops={} bandwidth={}",
                shown(self.growth_bytes),
                shown(self.reservation_bytes),
                shown(self.iops),
                shown(self.bandwidth_bytes)
            )
        })
    }
}

/// The parameters of a StorageClass.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parameters {
    /// The file system, if the class names one.
    kind: Option<Kind>,
    mkfs_options: Option<String>,
    device_kind: Option<String>,
    /// Freeze the mounted source while the clone is created.
    pub(super) freeze: bool,
    pub(super) limits: Limits,
    /// Namespace and name of the claim, if the sidecar adds them.
    claim: Option<String>,
}

impl Parameters {
    /// Parses the parameters. Mutable ones override the others.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, naming the parameter.
    pub(super) fn parse(parameters: &Map, mutable: &Map) -> Result<Self, Status> {
        let mut parsed = Self::default();
        for (key, value) in parameters {
            parsed.set(key, value)?;
        }
        parsed.claim = claim(parameters);
        // First on their own, so that a parameter that is not mutable is refused.
        Limits::parse(mutable)?;
        for (key, value) in mutable {
            parsed.limits.set(key, value)?;
        }
        Ok(parsed)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Status> {
        match key {
            "fsType" => self.kind = Some(Kind::parse("parameter fsType", value)?),
            "mkfsOptions" => self.mkfs_options = mkfs_options(value)?,
            "deviceKind" => {
                if !DEVICE_KINDS.contains(&value) {
                    return Err(refused(
                        key,
                        value,
                        &format!("be one of {}", DEVICE_KINDS.join(", ")),
                    ));
                }
                self.device_kind = (value != DEVICE_KINDS[0]).then(|| value.to_owned());
            }
            "freeze" => self.freeze = freeze(value)?,
            _ if key.starts_with(SIDECARS) => {}
            _ => {
                if !self.limits.set(key, value)? {
                    return Err(unknown(
                        key,
                        "fsType, mkfsOptions, deviceKind, freeze, growthLimit, reservation, \
                         iopsLimit, bandwidthLimit",
                    ));
                }
            }
        }
        Ok(())
    }

    /// The file system that the class and the capabilities of a request name; `None` if neither
    /// does. `fs_type` is that of the capabilities, or empty.
    ///
    /// # Errors
    /// INVALID_ARGUMENT: an unknown file system, or two different ones.
    pub(super) fn kind(&self, fs_type: &str) -> Result<Option<Kind>, Status> {
        let requested = Kind::requested("fs_type", fs_type)?;
        match (self.kind, requested) {
            (Some(class), Some(requested)) if class != requested => Err(Status::invalid_argument(
                format!("parameter fsType = {class}, but the capability asks for {requested}"),
            )),
            (class, requested) => Ok(class.or(requested)),
        }
    }

    /// The file system of a class alone, without the capabilities of a claim.
    pub(super) fn kind_of_class(&self, parameters: &Map) -> Kind {
        let named = parameters.get(CAPABILITY_KIND).and_then(|name| Kind::named(name));
        self.kind.or(named).unwrap_or(DEFAULT_KIND)
    }

    /// The labels of a new volume, without that of its file system. `mounted`: the volume is not a
    /// block device.
    pub(super) fn labels(&self, mounted: bool) -> Map {
        let mut labels = Map::new();
        let mut add = |key: &str, value: Option<String>| {
            labels.extend(value.map(|value| (key.to_owned(), value)));
        };
        let access = if mounted {
            add(labels::MKFS_OPTIONS, self.mkfs_options.clone());
            labels::ACCESS_MOUNT
        } else {
            labels::ACCESS_BLOCK
        };
        add(labels::ACCESS, Some(access.to_owned()));
        add(labels::DEVICE_KIND, self.device_kind.clone());
        add(labels::FREEZE, self.freeze.then(|| labels::TRUE.to_owned()));
        add(labels::LIMITS, self.limits.label());
        add(labels::CLAIM, self.claim.clone());
        labels
    }
}

/// Parses the parameters of a snapshot class: whether the mounted source is frozen while the
/// snapshot is created.
///
/// # Errors
/// INVALID_ARGUMENT, naming the parameter.
pub(crate) fn snapshot_freeze(parameters: &Map) -> Result<bool, Status> {
    let mut frozen = false;
    for (key, value) in parameters {
        match key.as_str() {
            "freeze" => frozen = freeze(value)?,
            _ if key.starts_with(SIDECARS) => {}
            _ => return Err(unknown(key, "freeze")),
        }
    }
    Ok(frozen)
}

/// Labels that are equal if two requests are equal. The claim is only information for people, and a
/// repeated request for a copy may omit its file system.
pub(super) const COMPARED: [&str; 6] = [
    labels::ACCESS,
    labels::MKFS_OPTIONS,
    labels::DEVICE_KIND,
    labels::FREEZE,
    labels::LIMITS,
    labels::SOURCE,
];

/// Arguments for mkfs, with single spaces between them; `None` if there are none.
fn mkfs_options(value: &str) -> Result<Option<String>, Status> {
    validate::length("parameter mkfsOptions", value.len(), MKFS_BYTES_MAX)?;
    let options = format_options(value)?;
    Ok((!options.is_empty()).then(|| options.join(" ")))
}

fn freeze(value: &str) -> Result<bool, Status> {
    value.parse().map_err(|_| refused("freeze", value, "be true or false"))
}

fn bytes(key: &str, value: &str) -> Result<u64, Status> {
    let parsed = value.parse::<ByteSize>().map(|size| size.as_u64());
    parsed.map_err(|_| refused(key, value, "be a number of bytes, such as 10Gi"))
}

/// Namespace and name of the claim. The provisioner adds them with `--extra-create-metadata`.
fn claim(parameters: &Map) -> Option<String> {
    let namespace = parameters.get("csi.storage.k8s.io/pvc/namespace")?;
    let name = parameters.get("csi.storage.k8s.io/pvc/name")?;
    // The limits of Kubernetes: 63 and 253 bytes.
    let valid = namespace.len() <= 63 && name.len() <= 253;
    valid.then(|| format!("{namespace}/{name}"))
}

fn refused(key: &str, value: &str, rule: &str) -> Status {
    Status::invalid_argument(format!("parameter {key} = {value:?} must {rule}"))
}

fn unknown(key: &str, known: &str) -> Status {
    Status::invalid_argument(format!("unknown parameter {key:?}; the known ones are {known}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> Map {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn parameters_become_labels() {
        let parameters = map(&[
            ("fsType", "xfs"),
            ("mkfsOptions", " -m  crc=1 "),
            ("deviceKind", "loop"),
            ("freeze", "true"),
            ("growthLimit", "10Gi"),
            ("csi.storage.k8s.io/pvc/name", "db"),
            ("csi.storage.k8s.io/pvc/namespace", "shop"),
        ]);
        let mutable = map(&[("growthLimit", "20Gi"), ("iopsLimit", "500")]);
        let parsed = Parameters::parse(&parameters, &mutable).unwrap();
        assert_eq!(parsed.limits.growth_bytes, Some(20 << 30));
        let mut expected = map(&[
            (labels::ACCESS, "mount"),
            (labels::MKFS_OPTIONS, "-m crc=1"),
            (labels::DEVICE_KIND, "loop"),
            (labels::FREEZE, "true"),
            (labels::LIMITS, "growth=21474836480 reservation=0 iops=500 bandwidth=0"),
            (labels::CLAIM, "shop/db"),
        ]);
        assert_eq!(parsed.labels(true), expected);
        expected.remove(labels::MKFS_OPTIONS);
        expected.insert(labels::ACCESS.to_owned(), "block".to_owned());
        assert_eq!(parsed.labels(false), expected);
    }

    #[test]
    fn parameter_and_capability_must_name_the_same_file_system() {
        let kind = |pairs: &[(&str, &str)], fs_type| {
            Parameters::parse(&map(pairs), &Map::new()).unwrap().kind(fs_type)
        };
        let xfs = [("fsType", "xfs")];
        assert_eq!(kind(&xfs, "").unwrap(), Some(Kind::Xfs));
        assert_eq!(kind(&xfs, "xfs").unwrap(), Some(Kind::Xfs));
        assert_eq!(kind(&[], "btrfs").unwrap(), Some(Kind::Btrfs));
        assert_eq!(kind(&[], "").unwrap(), None);
        assert!(kind(&xfs, "ext4").unwrap_err().message().contains("asks for ext4"));
        assert!(kind(&[], "ntfs").unwrap_err().message().contains("ext4, xfs, btrfs"));
        let of_class = |pairs: &[(&str, &str)]| {
            let parameters = map(pairs);
            Parameters::parse(&parameters, &Map::new()).unwrap().kind_of_class(&parameters)
        };
        assert_eq!(of_class(&xfs), Kind::Xfs);
        assert_eq!(of_class(&[(CAPABILITY_KIND, "btrfs")]), Kind::Btrfs);
        assert_eq!(of_class(&[]), Kind::Ext4);
    }

    #[test]
    fn without_parameters_there_are_only_defaults() {
        let parsed = Parameters::parse(&Map::new(), &Map::new()).unwrap();
        assert_eq!(parsed.labels(true), map(&[(labels::ACCESS, "mount")]));
    }

    #[test]
    fn mistakes_are_refused_and_named() {
        let cases = [
            ("fstype", "ext4"),
            ("fsType", "ntfs"),
            ("mkfsOptions", "-l logdev=/dev/sda"),
            ("mkfsOptions", "-L\nx"),
            ("deviceKind", "iscsi"),
            ("freeze", "yes"),
            ("growthLimit", "much"),
            ("growthLimit", "-1"),
            ("iopsLimit", "1k"),
        ];
        for (key, value) in cases {
            let error = Parameters::parse(&map(&[(key, value)]), &Map::new()).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            assert!(error.message().contains(key), "{}", error.message());
        }
        let fixed = map(&[("fsType", "xfs")]);
        assert!(Limits::parse(&fixed).is_err(), "the file system is not mutable");
        assert!(Parameters::parse(&Map::new(), &fixed).is_err());
        assert!(snapshot_freeze(&fixed).is_err());
        assert!(snapshot_freeze(&map(&[("freeze", "true")])).unwrap());
    }

    #[test]
    fn sizes_are_read_as_kubernetes_writes_them() {
        for (text, expected) in
            [("0", 0), ("512", 512), ("10G", 10_000_000_000), ("10Gi", 10 << 30), ("1Mi", 1 << 20)]
        {
            assert_eq!(bytes("growthLimit", text).unwrap(), expected, "{text}");
        }
    }
}
