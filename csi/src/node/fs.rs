//! File systems on a device: probing, formatting, checking.
//!
//! Mistakes here lose data, so two rules hold. Only [`format`] creates a file system, and only its
//! caller decides that the device is empty: by the state of the pool, not by a probe without a
//! result, since a probe also finds nothing when it cannot read. And what a probe finds is used or
//! refused, never overwritten.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use tonic::Status;

use super::command::{run, succeed};

/// Time limit to read metadata of a device.
pub(super) const PROBE_LIMIT: Duration = Duration::from_secs(30);
/// Time limit to format. The time grows with the size: the tables of a 64 TiB ext4 are gigabytes.
const FORMAT_LIMIT: Duration = Duration::from_secs(10 * 60);
/// Time limit for a check, which reads all metadata of a file system that had errors.
pub(super) const CHECK_LIMIT: Duration = Duration::from_secs(60 * 60);

/// The file systems that volumes can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The default.
    Ext4,
    /// Mounted with `nouuid`.
    Xfs,
    /// On one device.
    Btrfs,
}

impl Kind {
    /// The kind with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        [Self::Ext4, Self::Xfs, Self::Btrfs].into_iter().find(|kind| kind.name() == name)
    }

    /// The kind that a field of a request names.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`, naming the field.
    pub(crate) fn parse(field: &str, name: &str) -> Result<Self, Status> {
        Self::named(name).ok_or_else(|| {
            Status::invalid_argument(format!("{field} = {name:?} must be one of ext4, xfs, btrfs"))
        })
    }

    /// The kind that a field of a request names; `None` if the field is empty.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`, naming the field.
    pub(crate) fn requested(field: &str, name: &str) -> Result<Option<Self>, Status> {
        if name.is_empty() { Ok(None) } else { Self::parse(field, name).map(Some) }
    }

    /// Its name in the kernel and in CSI.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The result of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// No known signature. This does not prove that the device is empty.
    Nothing,
    /// A supported file system.
    FileSystem(Kind),
    /// Something else, such as another file system, a partition table or a RAID member.
    Other(String),
}

/// Looks for signatures on a device.
///
/// # Errors
/// `INTERNAL`: blkid fails; `FAILED_PRECONDITION`: there are contradicting signatures.
pub(crate) async fn probe(device: &Path) -> Result<Found, Status> {
    let shown = device.display();
    let arguments = ["-p", "-o", "export", "-s", "TYPE", "-s", "PTTYPE"].map(AsRef::as_ref);
    let arguments = [&arguments[..], &[device.as_os_str()]].concat();
    let output = run("blkid", &arguments, PROBE_LIMIT).await?;
    match output.code {
        Some(0) => Ok(found(&output.stdout)),
        Some(2) => Ok(Found::Nothing),
        Some(8) => Err(Status::failed_precondition(format!(
            "{shown}: several file systems or partition tables: {}",
            output.message
        ))),
        _ => Err(output.failure("blkid")),
    }
}

/// Parses the output of `blkid -o export`, such as a line `TYPE=ext4`.
fn found(text: &str) -> Found {
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
    match value("TYPE=") {
        Some(name) => {
            Kind::named(name).map_or_else(|| Found::Other(name.to_owned()), Found::FileSystem)
        }
        None => value("PTTYPE=")
            .map_or(Found::Nothing, |table| Found::Other(format!("partition table {table}"))),
    }
}

/// Splits the options for mkfs into arguments. They contain no `/`, so none of them names a file or
/// another device. No shell is involved.
///
/// # Errors
/// `INVALID_ARGUMENT`: other characters.
pub(crate) fn format_options(text: &str) -> Result<Vec<&str>, Status> {
    let plain = |c: char| c.is_ascii_graphic() && c != '/';
    let options: Vec<&str> = text.split(' ').filter(|option| !option.is_empty()).collect();
    if !options.iter().all(|option| option.chars().all(plain)) {
        let text =
            format!("parameter mkfsOptions = {text:?} must be space-separated options without `/`");
        return Err(Status::invalid_argument(text));
    }
    Ok(options)
}

/// Creates a file system and overwrites whatever is on the device: the caller has established that
/// it is empty. Nothing is discarded first, because a new volume holds no data.
///
/// # Errors
/// `INTERNAL` with the message of mkfs; `INVALID_ARGUMENT`: invalid options.
pub(crate) async fn format(kind: Kind, device: &Path, options: &str) -> Result<(), Status> {
    let (program, own): (&str, &[&str]) = match kind {
        // With metadata_csum_seed the checksums do not depend on the UUID, so a clone can get a new
        // UUID without rewriting its metadata. The pool has blocks of 4 KiB, too.
        Kind::Ext4 => {
            let own = &["-q", "-F", "-m", "0", "-b", "4096", "-E", "nodiscard"];
            ("mkfs.ext4", &[&own[..], &["-O", "metadata_csum_seed"]].concat())
        }
        Kind::Xfs => ("mkfs.xfs", &["-q", "-f", "-K"]),
        Kind::Btrfs => ("mkfs.btrfs", &["-q", "-f", "-K"]),
    };
    let mut arguments: Vec<_> = own.iter().map(AsRef::as_ref).collect();
    arguments.extend(format_options(options)?.into_iter().map(std::ffi::OsStr::new));
    arguments.push(device.as_os_str());
    let formatted = succeed(program, &arguments, FORMAT_LIMIT).await.map(|_| ());
    formatted.map_err(|error| match options {
        "" => error,
        options => Status::internal(format!("{}; mkfsOptions = {options:?}", error.message())),
    })
}

/// Checks a file system before it is mounted, as kubelet's mounter does for its own volumes. e2fsck
/// replays the journal of an ext4 and makes safe repairs; xfs and btrfs check themselves when they
/// are mounted.
///
/// # Errors
/// `INTERNAL`: errors that need an operator.
pub(crate) async fn check(kind: Kind, device: &Path) -> Result<(), Status> {
    if kind != Kind::Ext4 {
        return Ok(());
    }
    let shown = device.display();
    let output = run("e2fsck", &["-p".as_ref(), device.as_os_str()], CHECK_LIMIT).await?;
    match output.code {
        // e2fsck(8): 1 errors corrected, 2 also of a mounted file system, 8 and more: it did not
        // run.
        Some(0) => Ok(()),
        Some(1..=3) => {
            tracing::warn!(device = %shown, output = output.message, "e2fsck corrected errors");
            Ok(())
        }
        Some(code) if code & 4 != 0 => Err(Status::internal(format!(
            "{shown}: errors that e2fsck does not repair by itself; run it by hand: {}",
            output.message
        ))),
        _ => {
            tracing::warn!(device = %shown, output = output.message, "e2fsck did not run");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::command::present;

    #[test]
    fn output_of_blkid_is_parsed() {
        assert_eq!(found("DEVNAME=/dev/loop0\nTYPE=ext4\n"), Found::FileSystem(Kind::Ext4));
        assert_eq!(found("TYPE=xfs\n"), Found::FileSystem(Kind::Xfs));
        assert_eq!(found("TYPE=btrfs\nPTTYPE=dos\n"), Found::FileSystem(Kind::Btrfs));
        assert_eq!(found("TYPE=crypto_LUKS\n"), Found::Other("crypto_LUKS".to_owned()));
        assert_eq!(found("PTTYPE=gpt\n"), Found::Other("partition table gpt".to_owned()));
        assert_eq!(found(""), Found::Nothing);
    }

    #[test]
    fn options_for_mkfs_name_no_files() {
        assert_eq!(format_options("-i 8192  -O ^has_journal,quota").unwrap().len(), 4);
        assert!(format_options("").unwrap().is_empty());
        for text in ["-d /etc", "-J device=/dev/sda", "-L a\tb", "-L a\n", "\u{e9}"] {
            assert!(format_options(text).is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn file_systems_are_created_found_and_checked() {
        if !present(&["mkfs.ext4", "e2fsck", "mkfs.xfs", "mkfs.btrfs", "blkid"]) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for (kind, size) in
            [(Kind::Ext4, 16 << 20), (Kind::Xfs, 300 << 20), (Kind::Btrfs, 128 << 20)]
        {
            let path = dir.path().join(kind.name());
            std::fs::File::create(&path).unwrap().set_len(size).unwrap();
            assert_eq!(probe(&path).await.unwrap(), Found::Nothing);
            format(kind, &path, "").await.unwrap();
            assert_eq!(probe(&path).await.unwrap(), Found::FileSystem(kind));
            check(kind, &path).await.unwrap();
            let refused = format(kind, &path, "--no-such-option").await.unwrap_err();
            assert_eq!(refused.code(), tonic::Code::Internal, "{refused}");
            let message = refused.message();
            assert!(message.ends_with("; mkfsOptions = \"--no-such-option\""), "{message}");
            assert!(message.len() < 200 && !message.to_lowercase().contains("usage"), "{message}");
        }
        let missing = probe(Path::new("/nonexistent/device")).await;
        assert_eq!(
            missing.unwrap(),
            Found::Nothing,
            "the reason why a probe alone does not decide"
        );
    }
}
