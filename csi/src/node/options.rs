//! Mount flags by allow-list. What Kubernetes calls mount options is text from a StorageClass; only
//! options of these lists reach the kernel, each as a parameter of its own, so that no text can
//! smuggle in another one. A mount is nosuid and nodev unless asked otherwise.

use rustix::mount::MountAttrFlags;
use tonic::Status;

use super::fs::Kind;

/// Options in a request.
const OPTIONS_MAX: usize = 32;

/// Options of a file system that are flags. No volume may panic its node: `errors=panic` is none.
const EXT4_FLAGS: [&str; 7] = [
    "discard",
    "nodiscard",
    "lazytime",
    "auto_da_alloc",
    "noauto_da_alloc",
    "errors=remount-ro",
    "errors=continue",
];
const XFS_FLAGS: [&str; 6] = ["discard", "nodiscard", "lazytime", "largeio", "inode64", "swalloc"];
const BTRFS_FLAGS: [&str; 8] =
    ["discard", "nodiscard", "lazytime", "autodefrag", "ssd", "nossd", "compress", "datacow"];
/// Options of a file system that have a value.
const EXT4_VALUES: [&str; 3] = ["commit", "data", "stripe"];
const XFS_VALUES: [&str; 3] = ["allocsize", "logbufs", "logbsize"];
const BTRFS_VALUES: [&str; 5] = ["commit", "compress", "compress-force", "discard", "max_inline"];

/// How a file system is to be mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountOptions {
    /// Attributes of the mount, `nosuid` and `nodev` among them unless lifted.
    pub(crate) attributes: MountAttrFlags,
    /// Options of the file system: a name, and a value if it has one.
    pub(crate) settings: Vec<(String, Option<String>)>,
}

impl MountOptions {
    /// Reads mount flags for a file system of `kind`.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`: an option that is not on the list.
    pub(crate) fn parse(kind: Kind, flags: &[String]) -> Result<Self, Status> {
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let mut options = Self { attributes, settings: Vec::new() };
        // One entry of the list may hold several options, as mount(8) takes them.
        let all = flags.iter().flat_map(|flag| flag.split(','));
        for (count, option) in all.enumerate() {
            if count == OPTIONS_MAX {
                let text = format!("mount_flags: more than {OPTIONS_MAX}");
                return Err(Status::invalid_argument(text));
            }
            options.add(kind, option)?;
        }
        Ok(options)
    }

    /// Whether writes are to be refused.
    pub(crate) fn read_only(&self) -> bool {
        self.attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY)
    }

    /// Refuse writes.
    pub(crate) fn set_read_only(&mut self) {
        self.attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }

    fn add(&mut self, kind: Kind, option: &str) -> Result<(), Status> {
        if self.add_attribute(option) {
            return Ok(());
        }
        let (flags, values): (&[&str], &[&str]) = match kind {
            Kind::Ext4 => (&EXT4_FLAGS, &EXT4_VALUES),
            Kind::Xfs => (&XFS_FLAGS, &XFS_VALUES),
            Kind::Btrfs => (&BTRFS_FLAGS, &BTRFS_VALUES),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_');
        let (name, value) = match option.split_once('=') {
            None => (option, None),
            Some((name, value)) => (name, Some(value)),
        };
        let plain = value.is_some_and(|value| !value.is_empty() && value.chars().all(plain));
        if !(flags.contains(&option) || values.contains(&name) && plain) {
            let text = format!("mount flag {option:?} is not one for {kind}");
            return Err(Status::invalid_argument(text));
        }
        self.settings.push((name.to_owned(), value.map(str::to_owned)));
        Ok(())
    }

    /// Adds an option that every file system has; `false` if it is none.
    fn add_attribute(&mut self, option: &str) -> bool {
        use MountAttrFlags as Flags;
        let times = Flags::MOUNT_ATTR_NOATIME | Flags::MOUNT_ATTR_STRICTATIME;
        let (set, clear) = match option {
            "ro" => (Flags::MOUNT_ATTR_RDONLY, Flags::empty()),
            "rw" => (Flags::empty(), Flags::MOUNT_ATTR_RDONLY),
            "nosuid" => (Flags::MOUNT_ATTR_NOSUID, Flags::empty()),
            "suid" => (Flags::empty(), Flags::MOUNT_ATTR_NOSUID),
            "nodev" => (Flags::MOUNT_ATTR_NODEV, Flags::empty()),
            "dev" => (Flags::empty(), Flags::MOUNT_ATTR_NODEV),
            "noexec" => (Flags::MOUNT_ATTR_NOEXEC, Flags::empty()),
            "exec" => (Flags::empty(), Flags::MOUNT_ATTR_NOEXEC),
            "nodiratime" => (Flags::MOUNT_ATTR_NODIRATIME, Flags::empty()),
            "nosymfollow" => (Flags::MOUNT_ATTR_NOSYMFOLLOW, Flags::empty()),
            "noatime" => (Flags::MOUNT_ATTR_NOATIME, times),
            "strictatime" => (Flags::MOUNT_ATTR_STRICTATIME, times),
            "relatime" => (Flags::empty(), times),
            "defaults" => (Flags::empty(), Flags::empty()),
            _ => return false,
        };
        self.attributes = (self.attributes - clear) | set;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use MountAttrFlags as Flags;

    fn parse(kind: Kind, flags: &[&str]) -> Result<MountOptions, Status> {
        let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        MountOptions::parse(kind, &flags)
    }

    #[test]
    fn nosuid_and_nodev_unless_asked_otherwise() {
        let default = Flags::MOUNT_ATTR_NOSUID | Flags::MOUNT_ATTR_NODEV;
        assert_eq!(parse(Kind::Ext4, &[]).unwrap().attributes, default);
        assert_eq!(parse(Kind::Xfs, &["suid", "dev"]).unwrap().attributes, Flags::empty());
        let options = parse(Kind::Ext4, &["noatime,relatime,noatime", "ro"]).unwrap();
        assert_eq!(
            options.attributes - default,
            Flags::MOUNT_ATTR_NOATIME | Flags::MOUNT_ATTR_RDONLY
        );
        assert!(options.read_only());
    }

    #[test]
    fn options_of_the_file_system_are_parameters() {
        let options =
            parse(Kind::Ext4, &["discard,data=ordered", "commit=30,errors=remount-ro"]).unwrap();
        let setting = |name: &str, value: Option<&str>| (name.to_owned(), value.map(str::to_owned));
        let expected = [
            setting("discard", None),
            setting("data", Some("ordered")),
            setting("commit", Some("30")),
            setting("errors", Some("remount-ro")),
        ];
        assert_eq!(options.settings, expected);
        assert!(parse(Kind::Btrfs, &["compress=zstd:3"]).is_ok());
    }

    #[test]
    fn what_is_not_on_the_list_is_refused() {
        let many = vec!["ro"; OPTIONS_MAX + 1];
        assert!(parse(Kind::Ext4, &many).is_err());
        assert!(parse(Kind::Ext4, &many[1..]).is_ok());
        for (kind, flag) in [
            (Kind::Ext4, ""),
            (Kind::Ext4, "bind"),
            (Kind::Ext4, "remount"),
            (Kind::Ext4, "journal_path=/dev/sda"),
            (Kind::Ext4, "data="),
            (Kind::Ext4, "data=ordered\ndax"),
            (Kind::Ext4, "errors=panic"),
            (Kind::Ext4, "stripe=/etc"),
            (Kind::Ext4, "compress=zstd"),
            (Kind::Ext4, "context=x"),
            (Kind::Xfs, "nouuid"),
            (Kind::Xfs, "norecovery"),
            (Kind::Xfs, "logdev=/dev/sda"),
            (Kind::Btrfs, "device=/dev/sda"),
            (Kind::Btrfs, "subvol=other"),
            (Kind::Btrfs, "RO"),
        ] {
            let refused = parse(kind, &[flag]).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{flag}");
        }
    }
}
