//! What a StorageClass, a VolumeAttributesClass or a snapshot class can say.
//!
//! | parameter | values | mutable |
//! |---|---|---|
//! | `fsType` | `ext4` (default), `xfs`, `btrfs` | |
//! | `mkfsOptions` | arguments of mkfs, separated by blanks | |
//! | `deviceKind` | `auto` (default), `ublk`, `nbd`, `loop` | |
//! | `freeze` | `true`, `false` (default) | |
//! | `growthLimit`, `reservation` | bytes, as `10Gi`; 0 is none | yes |
//! | `iopsLimit` | requests in a second; 0 is none | yes |
//! | `bandwidthLimit` | bytes in a second, as `100Mi`; 0 is none | yes |
//!
//! Keys of `csi.storage.k8s.io/` are Kubernetes' own: they say for whom something is made.

use std::collections::BTreeMap;

use bytesize::ByteSize;
use tonic::Status;

use crate::labels;
use crate::node::Kind;

/// Begins the keys that the sidecars of Kubernetes add.
const SIDECARS: &str = "csi.storage.k8s.io/";
/// File system of a class that names none.
pub(super) const DEFAULT_KIND: Kind = Kind::Ext4;
/// Where a class names the file system for the provisioner, which puts it into the capability. Only
/// GetCapacity is called with it.
const CAPABILITY_KIND: &str = "csi.storage.k8s.io/fstype";
/// Kinds of devices; the first is the default.
const DEVICE_KINDS: [&str; 4] = ["auto", "ublk", "nbd", "loop"];
/// Bytes of arguments for mkfs: with its key they must fit into a label.
const MKFS_BYTES_MAX: usize = 400;

/// A request's parameters by their names in the request.
type Map = BTreeMap<String, String>;

/// Limits of a volume that can be changed while it is in use. None: nothing was said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) growth_bytes: Option<u64>,
    pub(super) reservation_bytes: Option<u64>,
    pub(super) iops: Option<u64>,
    pub(super) bandwidth_bytes: Option<u64>,
}

impl Limits {
    /// Takes one parameter, if it is one of these.
    fn take(&mut self, key: &str, value: &str) -> Result<bool, Status> {
        match key {
            "growthLimit" => self.growth_bytes = Some(bytes(key, value)?),
            "reservation" => self.reservation_bytes = Some(bytes(key, value)?),
            "bandwidthLimit" => self.bandwidth_bytes = Some(bytes(key, value)?),
            "iopsLimit" => {
                let number = value.parse();
                self.iops = Some(number.map_err(|_| refused(key, value, "a number"))?);
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
            if !limits.take(key, value)? {
                return Err(unknown(key, "growthLimit, reservation, iopsLimit, bandwidthLimit"));
            }
        }
        Ok(limits)
    }

    /// As one text, to be compared with what was asked for the first time.
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

/// What a StorageClass says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parameters {
    /// File system that was asked for, if one was.
    kind: Option<Kind>,
    mkfs_options: Option<String>,
    device_kind: Option<String>,
    /// Freeze the mounted source while the clone is made.
    pub(super) freeze: bool,
    pub(super) limits: Limits,
    /// Namespace and name of the claim, if the sidecar said so.
    claim: Option<String>,
}

impl Parameters {
    /// Reads the parameters; what is mutable wins over what is not.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, naming the parameter.
    pub(super) fn parse(parameters: &Map, mutable: &Map) -> Result<Self, Status> {
        let mut parsed = Self::default();
        for (key, value) in parameters {
            parsed.take(key, value)?;
        }
        parsed.claim = claim(parameters);
        // Those of the volume's attributes are refused by themselves first.
        Limits::parse(mutable)?;
        for (key, value) in mutable {
            parsed.limits.take(key, value)?;
        }
        Ok(parsed)
    }

    fn take(&mut self, key: &str, value: &str) -> Result<(), Status> {
        match key {
            "fsType" => self.kind = Some(fs_type(value)?),
            "mkfsOptions" => self.mkfs_options = mkfs_options(value)?,
            "deviceKind" => {
                if !DEVICE_KINDS.contains(&value) {
                    return Err(refused(key, value, &DEVICE_KINDS.join(", ")));
                }
                self.device_kind = (value != DEVICE_KINDS[0]).then(|| value.to_owned());
            }
            "freeze" => self.freeze = freeze(value)?,
            _ if key.starts_with(SIDECARS) => {}
            _ => {
                if !self.limits.take(key, value)? {
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

    /// The file system that parameter and capabilities ask for; none if neither names one.
    /// `asked` is what the capabilities name, empty for any.
    ///
    /// # Errors
    /// INVALID_ARGUMENT: there is no such file system, or the two contradict each other.
    pub(super) fn kind(&self, asked: &str) -> Result<Option<Kind>, Status> {
        let asked = Some(asked).filter(|asked| !asked.is_empty()).map(fs_type).transpose()?;
        match (self.kind, asked) {
            (Some(one), Some(other)) if one != other => Err(Status::invalid_argument(format!(
                "parameter fsType = {one}, but the capability asks for {other}"
            ))),
            (one, other) => Ok(one.or(other)),
        }
    }

    /// The same for a class alone, without the capabilities of a claim.
    pub(super) fn kind_of_class(&self, parameters: &Map) -> Kind {
        let named = parameters.get(CAPABILITY_KIND).and_then(|name| Kind::named(name));
        self.kind.or(named).unwrap_or(DEFAULT_KIND)
    }

    /// What the catalogue is to remember, beside the file system. `mounted`: the volume is not a
    /// block device.
    pub(super) fn labels(&self, mounted: bool) -> Map {
        let mut kept = Map::new();
        let mut keep = |key: &str, value: Option<String>| {
            kept.extend(value.map(|value| (key.to_owned(), value)));
        };
        let access = if mounted {
            keep(labels::MKFS_OPTIONS, self.mkfs_options.clone());
            labels::ACCESS_MOUNT
        } else {
            labels::ACCESS_BLOCK
        };
        keep(labels::ACCESS, Some(access.to_owned()));
        keep(labels::DEVICE_KIND, self.device_kind.clone());
        keep(labels::FREEZE, self.freeze.then(|| labels::TRUE.to_owned()));
        keep(labels::LIMITS, self.limits.label());
        keep(labels::CLAIM, self.claim.clone());
        kept
    }
}

/// What a class of snapshots says: whether the mounted source is frozen meanwhile.
///
/// # Errors
/// INVALID_ARGUMENT, naming the parameter.
pub(crate) fn snapshot(parameters: &Map) -> Result<bool, Status> {
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

/// Labels that an equal request has; the claim is only there for people, and a copy may be asked
/// for without naming its file system.
pub(super) const COMPARED: [&str; 6] = [
    labels::ACCESS,
    labels::MKFS_OPTIONS,
    labels::DEVICE_KIND,
    labels::FREEZE,
    labels::LIMITS,
    labels::SOURCE,
];

fn fs_type(value: &str) -> Result<Kind, Status> {
    Kind::named(value).ok_or_else(|| refused("fsType", value, "ext4, xfs, btrfs"))
}

/// Arguments for mkfs: words without a path, so that none of them names another device or file.
fn mkfs_options(value: &str) -> Result<Option<String>, Status> {
    let plain = |c: char| c.is_ascii_graphic() && c != '/';
    let words: Vec<&str> = value.split(' ').filter(|word| !word.is_empty()).collect();
    if value.len() > MKFS_BYTES_MAX || !words.iter().all(|word| word.chars().all(plain)) {
        return Err(refused(
            "mkfsOptions",
            value,
            &format!("at most {MKFS_BYTES_MAX} bytes of words without a slash"),
        ));
    }
    Ok((!words.is_empty()).then(|| words.join(" ")))
}

fn freeze(value: &str) -> Result<bool, Status> {
    value.parse().map_err(|_| refused("freeze", value, "true, false"))
}

fn bytes(key: &str, value: &str) -> Result<u64, Status> {
    let parsed = value.parse::<ByteSize>().map(|size| size.as_u64());
    parsed.map_err(|_| refused(key, value, "a number of bytes, as 10Gi"))
}

/// Namespace and name of the claim, which the provisioner adds with `--extra-create-metadata`.
fn claim(parameters: &Map) -> Option<String> {
    let namespace = parameters.get("csi.storage.k8s.io/pvc/namespace")?;
    let name = parameters.get("csi.storage.k8s.io/pvc/name")?;
    // Kubernetes' own limits: 63 and 253 bytes.
    let possible = namespace.len() <= 63 && name.len() <= 253;
    possible.then(|| format!("{namespace}/{name}"))
}

fn refused(key: &str, value: &str, possible: &str) -> Status {
    Status::invalid_argument(format!("parameter {key} = {value:?}: possible is {possible}"))
}

fn unknown(key: &str, known: &str) -> Status {
    Status::invalid_argument(format!("parameter {key:?} is unknown; there are {known}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> Map {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn what_is_said_is_remembered() {
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
    fn parameter_and_capability_name_one_file_system() {
        let kind = |pairs: &[(&str, &str)], asked| {
            Parameters::parse(&map(pairs), &Map::new()).unwrap().kind(asked)
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
    fn nothing_said_is_the_default() {
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
        assert!(snapshot(&fixed).is_err());
        assert!(snapshot(&map(&[("freeze", "true")])).unwrap());
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
