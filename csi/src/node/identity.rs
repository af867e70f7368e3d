//! Gives the file system of a clone a new identity, so that it can be mounted beside its source.
//!
//! We chose / because / it costs:
//!
//! * xfs: always mounted with `nouuid` / then the kernel mounts copies side by side, and also a
//!   volume whose former device has died; nothing has to be rewritten / source and clone have the
//!   same UUID.
//! * btrfs: a new fsid with `btrfstune -m` / the kernel takes two devices with the same fsid for
//!   one file system; btrfstune changes the superblocks only / the log of fsyncs must be replayed
//!   before, by mounting the file system once, because after btrfstune a file system with an
//!   unreplayed log cannot be mounted. Beside a mounted source this needs Linux 6.7.
//! * ext4: a new UUID, if only the superblocks change, as with our format options / the kernel does
//!   not need it, but users may mount by UUID / other file systems keep their UUID.
//!
//! Each step can be repeated: a second new identity replaces the first.

use std::path::Path;
use std::time::Duration;

use tonic::Status;

use super::command::{run, succeed};
use super::fs::Kind;
use super::{blocking, mount};

/// Time limit for each program; they change a few blocks.
const LIMIT: Duration = Duration::from_secs(60);

/// Gives the file system on `device` a new identity. It must not be mounted, and must have been
/// checked.
///
/// # Errors
/// `INTERNAL` with the message of the program; `FAILED_PRECONDITION`: its source must be unmounted
/// first.
pub(crate) async fn renew(kind: Kind, device: &Path) -> Result<(), Status> {
    match kind {
        Kind::Ext4 => renew_ext4(device).await,
        Kind::Xfs => Ok(()),
        Kind::Btrfs => renew_btrfs(device).await,
    }
}

async fn renew_ext4(device: &Path) -> Result<(), Status> {
    let device = device.as_os_str();
    let header = succeed("dumpe2fs", &["-h".as_ref(), device], LIMIT).await?;
    if !superblocks_only(&header.stdout) {
        tracing::warn!(device = %device.display(), "a clone keeps the UUID of its source");
        return Ok(());
    }
    succeed("tune2fs", &["-U".as_ref(), "random".as_ref(), device], LIMIT).await.map(|_| ())
}

/// Whether a new UUID changes only the superblocks of an ext4: it has no metadata checksums, or it
/// stores their seed.
fn superblocks_only(header: &str) -> bool {
    let features = header.lines().find_map(|line| line.strip_prefix("Filesystem features:"));
    let features: Vec<&str> = features.unwrap_or_default().split_whitespace().collect();
    let has = |feature| features.contains(&feature);
    has("metadata_csum_seed") || !(has("metadata_csum") || has("uninit_bg"))
}

async fn renew_btrfs(device: &Path) -> Result<(), Status> {
    if log_root(device).await? != 0 {
        let path = device.to_owned();
        blocking(move || Ok(mount::replay_log(Kind::Btrfs, &path))).await?.map_err(|status| {
            Status::failed_precondition(format!(
                "the btrfs log of the clone must be replayed first; before Linux 6.7 this fails \
                 while the source is mounted: {}",
                status.message()
            ))
        })?;
        if log_root(device).await? != 0 {
            let text = format!("{}: btrfs still has a log after it was mounted", device.display());
            return Err(Status::internal(text));
        }
    }
    succeed("btrfstune", &["-m".as_ref(), device.as_os_str()], LIMIT).await.map(|_| ())
}

/// Address of the log of fsyncs; 0 if the file system has no such log.
async fn log_root(device: &Path) -> Result<u64, Status> {
    let words = ["inspect-internal", "dump-super"].map(AsRef::as_ref);
    let output = run("btrfs", &[&words[..], &[device.as_os_str()]].concat(), LIMIT).await?;
    let value = |line: &str| -> Option<u64> {
        let (name, value) = line.split_once(char::is_whitespace)?;
        (name == "log_root").then(|| value.trim().parse().ok())?
    };
    let root = output.stdout.lines().find_map(value);
    root.ok_or_else(|| output.failure("btrfs inspect-internal dump-super"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::command::present;
    use crate::node::fs;

    #[test]
    fn a_new_uuid_is_cheap_without_checksums_or_with_their_seed() {
        let features = |list: &str| format!("Filesystem UUID: x\nFilesystem features:  {list}\n");
        assert!(superblocks_only(&features("has_journal metadata_csum metadata_csum_seed")));
        assert!(superblocks_only(&features("has_journal extent")));
        assert!(!superblocks_only(&features("has_journal metadata_csum")));
        assert!(!superblocks_only(&features("uninit_bg")));
    }

    /// The UUID of the file system on a device.
    async fn uuid(device: &Path) -> String {
        let arguments = ["-p", "-o", "value", "-s", "UUID"].map(AsRef::as_ref);
        let arguments = [&arguments[..], &[device.as_os_str()]].concat();
        succeed("blkid", &arguments, LIMIT).await.unwrap().stdout
    }

    #[tokio::test]
    async fn our_formats_get_a_new_identity() {
        if !present(&["mkfs.ext4", "tune2fs", "mkfs.btrfs", "btrfstune", "blkid"]) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for (kind, size) in [(Kind::Ext4, 16 << 20), (Kind::Btrfs, 128 << 20)] {
            let path = dir.path().join(kind.name());
            std::fs::File::create(&path).unwrap().set_len(size).unwrap();
            fs::format(kind, &path, "").await.unwrap();
            let before = uuid(&path).await;
            // Twice, as after a crash.
            renew(kind, &path).await.unwrap();
            let between = uuid(&path).await;
            renew(kind, &path).await.unwrap();
            let after = uuid(&path).await;
            assert!(before != between && between != after && before != after, "{kind}");
            fs::check(kind, &path).await.unwrap();
        }
    }
}
