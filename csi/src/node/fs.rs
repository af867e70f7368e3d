//! File systems on a device: what is on it, making one, checking it.
//!
//! Data is lost most easily here, so two rules hold. A file system is made only by [`format`], and
//! only its caller decides that nothing is there: by what the pool says, not by a probe that found
//! nothing, since a probe also finds nothing when it cannot read. And what a probe finds is used
//! or refused, never overwritten.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use tonic::Status;

use super::command::{run, succeed};

/// Time for a look at a device.
pub(super) const PROBE_LIMIT: Duration = Duration::from_secs(30);
/// Time to make a file system. It grows with the size: the tables of a 64 TiB ext4 are gigabytes.
const FORMAT_LIMIT: Duration = Duration::from_secs(10 * 60);
/// Time for a check, which reads all metadata of a file system that had errors.
pub(super) const CHECK_LIMIT: Duration = Duration::from_secs(60 * 60);

/// The file systems that volumes can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The default.
    Ext4,
    /// Mounted with `nouuid`.
    Xfs,
    /// One device, of course.
    Btrfs,
}

impl Kind {
    /// The kind of that name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        [Self::Ext4, Self::Xfs, Self::Btrfs].into_iter().find(|kind| kind.name() == name)
    }

    /// Its name to the kernel and in CSI.
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

/// What a probe found on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// No signature that it knows. That is no proof that nothing is there.
    Nothing,
    /// One of ours.
    FileSystem(Kind),
    /// Something else: another file system, a partition table, a member of something.
    Other(String),
}

/// Looks for signatures on a device.
///
/// # Errors
/// `INTERNAL`: blkid fails; `FAILED_PRECONDITION`: several signatures contradict each other.
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
            output.said
        ))),
        _ => Err(output.failure("blkid")),
    }
}

/// Reads what `blkid -o export` prints: a line `TYPE=ext4`.
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

/// Splits a volume's options for mkfs into arguments. They are words without `/`, so that none
/// names a file; no shell sees them.
///
/// # Errors
/// `INVALID_ARGUMENT`: other characters.
pub(crate) fn format_options(text: &str) -> Result<Vec<&str>, Status> {
    let plain = |c: char| c.is_ascii_graphic() && c != '/';
    let options: Vec<&str> = text.split(' ').filter(|option| !option.is_empty()).collect();
    if !options.iter().all(|option| option.chars().all(plain)) {
        let text = format!("mkfsOptions {text:?}: words without a slash are possible");
        return Err(Status::invalid_argument(text));
    }
    Ok(options)
}

/// Makes a file system, whatever is on the device: the caller knows that nothing is. Nothing is
/// discarded first, for a new volume holds nothing.
///
/// # Errors
/// `INTERNAL` with the words of mkfs; `INVALID_ARGUMENT` for options that are none.
pub(crate) async fn format(kind: Kind, device: &Path, options: &str) -> Result<(), Status> {
    let (program, own): (&str, &[&str]) = match kind {
        // With the seed of checksums kept apart from the UUID, a clone can be given a new UUID
        // without rewriting its metadata. Blocks of 4 KiB are the pool's.
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
    let made = succeed(program, &arguments, FORMAT_LIMIT).await.map(|_| ());
    made.map_err(|why| match options {
        "" => why,
        options => Status::internal(format!("{}; mkfsOptions = {options:?}", why.message())),
    })
}

/// Checks a file system before it is mounted, as kubelet's mounter does for volumes of its own:
/// ext4 has its journal replayed and is repaired where that is safe; xfs and btrfs check
/// themselves when they are mounted.
///
/// # Errors
/// `INTERNAL`: errors that a person has to look at.
pub(crate) async fn check(kind: Kind, device: &Path) -> Result<(), Status> {
    if kind != Kind::Ext4 {
        return Ok(());
    }
    let output = run("e2fsck", &["-p".as_ref(), device.as_os_str()], CHECK_LIMIT).await?;
    match output.code {
        // e2fsck(8): 1 errors were corrected, 2 and mounted ones too, 8 and more: it did not run.
        Some(0) => Ok(()),
        Some(1..=3) => {
            tracing::warn!(device = %device.display(), said = output.said, "e2fsck corrected errors");
            Ok(())
        }
        Some(code) if code & 4 != 0 => Err(Status::internal(format!(
            "{}: errors that e2fsck does not repair by itself; run it by hand: {}",
            device.display(),
            output.said
        ))),
        _ => {
            tracing::warn!(device = %device.display(), said = output.said, "e2fsck did not run");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::command::present;

    #[test]
    fn reads_what_blkid_prints() {
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
    async fn makes_finds_and_checks_file_systems() {
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
            let said = refused.message();
            assert!(said.ends_with("; mkfsOptions = \"--no-such-option\""), "{said}");
            assert!(said.len() < 200 && !said.to_lowercase().contains("usage"), "{said}");
        }
        let missing = probe(Path::new("/nonexistent/device")).await;
        assert_eq!(missing.unwrap(), Found::Nothing, "why a probe alone decides nothing");
    }
}
