//! The allow-list of mount flags. Mount options of Kubernetes are text from a StorageClass. Only
//! options on these lists reach the kernel, each as a separate parameter, so no text can inject
//! another option. Mounts are nosuid and nodev unless requested otherwise.
//!
//! On hosts with SELinux kubelet adds the label of a pod in the syntax of mount(8), quoted because
//! of its comma: `context="system_u:object_r:container_file_t:s0:c1,c2"`. Like mount(8), we drop
//! such labels if the kernel runs without SELinux.

use rustix::mount::MountAttrFlags;
use tonic::Status;

use super::fs::Kind;

/// Options that set SELinux labels of a mount.
const CONTEXTS: [&str; 4] = ["context", "fscontext", "defcontext", "rootcontext"];
/// Maximum number of options in a request.
const OPTIONS_MAX: usize = 32;

/// Options of a file system without a value. `errors=panic` is missing, because no volume may panic
/// its node.
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
/// Options of a file system with a value.
const EXT4_VALUES: [&str; 3] = ["commit", "data", "stripe"];
const XFS_VALUES: [&str; 3] = ["allocsize", "logbufs", "logbsize"];
const BTRFS_VALUES: [&str; 5] = ["commit", "compress", "compress-force", "discard", "max_inline"];

/// The options of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountOptions {
    /// Attributes of the mount; `nosuid` and `nodev` by default.
    pub(crate) attributes: MountAttrFlags,
    /// Options of the file system: a name, and a value if the option has one.
    pub(crate) settings: Vec<(String, Option<String>)>,
    /// SELinux labels: one of [`CONTEXTS`], and its value without quotes.
    pub(crate) contexts: Vec<(String, String)>,
}

impl MountOptions {
    /// Parses mount flags for a file system of `kind`.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`: an option that is not on the list.
    pub(crate) fn parse(kind: Kind, flags: &[String]) -> Result<Self, Status> {
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let mut options = Self { attributes, settings: Vec::new(), contexts: Vec::new() };
        // As with mount(8), an entry may contain several options.
        let mut count = 0;
        for flag in flags {
            for option in split(flag)? {
                if count == OPTIONS_MAX {
                    let text = format!("mount_flags has more than {OPTIONS_MAX} options");
                    return Err(Status::invalid_argument(text));
                }
                count += 1;
                options.add(kind, option)?;
            }
        }
        Ok(options)
    }

    /// The parameters for the kernel, on a host with or without SELinux.
    pub(crate) fn parameters(&self, selinux: bool) -> impl Iterator<Item = (&str, Option<&str>)> {
        let contexts = self.contexts.iter().filter(move |_| selinux);
        let contexts = contexts.map(|(name, value)| (name.as_str(), Some(value.as_str())));
        let settings = self.settings.iter();
        settings.map(|(name, value)| (name.as_str(), value.as_deref())).chain(contexts)
    }

    /// Whether the mount is read-only.
    pub(crate) fn read_only(&self) -> bool {
        self.attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY)
    }

    /// Makes the mount read-only.
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
        let (name, value) = match option.split_once('=') {
            None => (option, None),
            Some((name, value)) => (name, Some(unquoted(value))),
        };
        let all = |good: fn(char) -> bool| {
            value.is_some_and(|value| !value.is_empty() && value.chars().all(good))
        };
        if let Some(value) = value
            && CONTEXTS.contains(&name)
            && all(|c| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_' | '.' | ','))
        {
            self.contexts.push((name.to_owned(), value.to_owned()));
            return Ok(());
        }
        // Every xfs is mounted with it.
        if kind == Kind::Xfs && option == "nouuid" {
            return Ok(());
        }
        let plain = all(|c| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_'));
        if !(flags.contains(&option) || values.contains(&name) && plain) {
            let text = format!("mount flag {option:?} is not supported for {kind}");
            return Err(Status::invalid_argument(text));
        }
        self.settings.push((name.to_owned(), value.map(str::to_owned)));
        Ok(())
    }

    /// Adds an option that every file system has. Returns `false` for other options.
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

/// Splits an entry at its commas, except for commas in quotes.
///
/// # Errors
/// `INVALID_ARGUMENT`: an unclosed quotation mark.
fn split(flag: &str) -> Result<Vec<&str>, Status> {
    let mut quoted = false;
    let options = flag.split(|c| {
        quoted ^= c == '"';
        c == ',' && !quoted
    });
    let options = options.collect();
    if quoted {
        let text = format!("mount flag {flag:?} has an unclosed quotation mark");
        return Err(Status::invalid_argument(text));
    }
    Ok(options)
}

/// A value without the quotes around it.
fn unquoted(value: &str) -> &str {
    let inner = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
    inner.unwrap_or(value)
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
    fn mounts_are_nosuid_and_nodev_by_default() {
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
    fn selinux_labels_are_passed_without_their_quotes() {
        let label = "system_u:object_r:container_file_t:s0:c1,c2";
        let quoted = format!("context=\"{label}\"");
        let several = format!("noatime,{quoted},discard");
        for kind in [Kind::Ext4, Kind::Xfs, Kind::Btrfs] {
            let options = parse(kind, &[&several]).unwrap();
            assert!(options.attributes.contains(Flags::MOUNT_ATTR_NOATIME));
            let passed: Vec<_> = options.parameters(true).collect();
            assert_eq!(passed, [("discard", None), ("context", Some(label))]);
            let passed: Vec<_> = options.parameters(false).collect();
            assert_eq!(passed, [("discard", None)], "without SELinux in the kernel");
        }
        let plain = parse(Kind::Ext4, &["fscontext=system_u:object_r:fs_t:s0"]).unwrap();
        assert_eq!(plain.parameters(true).count(), 1);
        for flag in [
            "context=\"a:b:c:s0:c1,c2",
            "context=\"\"",
            "context=",
            "context",
            "context=\"a\"b\"",
            "context=\"a b\"",
            "context=a:b:c:s0:c1,c2",
            "seclabel",
        ] {
            let refused = parse(Kind::Ext4, &[flag]).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{flag}");
        }
    }

    #[test]
    fn nouuid_is_accepted_for_xfs() {
        let options = parse(Kind::Xfs, &["nouuid,discard"]).unwrap();
        assert_eq!(options.parameters(true).collect::<Vec<_>>(), [("discard", None)]);
        assert!(parse(Kind::Ext4, &["nouuid"]).is_err());
    }

    #[test]
    fn options_that_are_not_on_the_list_are_refused() {
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
