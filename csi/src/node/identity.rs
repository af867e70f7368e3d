//! A new identity for the file system of a clone, so that it can be mounted beside its source.
//!
//! We chose / because / it costs:
//!
//! * xfs: mounted with `nouuid`, always / the kernel then mounts copies side by side, and a volume
//!   whose former device has died as well; nothing has to be rewritten / both have one UUID.
//! * btrfs: a new fsid by `btrfstune -m` / the kernel takes two devices with one fsid for one file
//!   system; this changes the superblocks only / a log of fsyncs must be replayed before, which is
//!   done by mounting it once: what btrfstune writes over an unreplayed log cannot be mounted.
//!   Beside a mounted source that needs Linux 6.7.
//! * ext4: a new UUID, if that is a change of the superblocks only, as it is in what we format /
//!   the kernel does not care, people who mount by UUID do / others keep theirs.
//!
//! Each step can be repeated: a second new identity is as good as the first.

use std::path::Path;
use std::time::Duration;

use tonic::Status;

use super::command::{run, succeed};
use super::fs::Kind;
use super::mount;

/// Time for each of the programs, which change a few blocks.
const LIMIT: Duration = Duration::from_secs(60);

/// Gives the file system on `device`, which is mounted nowhere and has been checked, an identity
/// of its own.
///
/// # Errors
/// `INTERNAL` with the words of the program; `FAILED_PRECONDITION` if its source must be unmounted
/// for that.
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

/// Whether a new UUID is a change of an ext4's superblocks alone: it has no checksums of metadata,
/// or their seed is stored.
fn superblocks_only(header: &str) -> bool {
    let features = header.lines().find_map(|line| line.strip_prefix("Filesystem features:"));
    let features: Vec<&str> = features.unwrap_or_default().split_whitespace().collect();
    let has = |feature| features.contains(&feature);
    has("metadata_csum_seed") || !(has("metadata_csum") || has("uninit_bg"))
}

async fn renew_btrfs(device: &Path) -> Result<(), Status> {
    if log_root(device).await? != 0 {
        let path = device.to_owned();
        let mounting = tokio::task::spawn_blocking(move || mount::replay_log(Kind::Btrfs, &path));
        let replayed = mounting.await.map_err(|error| Status::internal(error.to_string()))?;
        replayed.map_err(|status| {
            Status::failed_precondition(format!(
                "its log must be replayed before it can be mounted beside its source, and Linux \
                 before 6.7 does that only while the source is not mounted: {}",
                status.message()
            ))
        })?;
        if log_root(device).await? != 0 {
            let text = format!("{}: btrfs still has a log after a mount", device.display());
            return Err(Status::internal(text));
        }
    }
    succeed("btrfstune", &["-m".as_ref(), device.as_os_str()], LIMIT).await.map(|_| ())
}

/// Where the log of fsyncs begins; 0 if there is none.
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
    fn knows_when_a_new_uuid_is_cheap() {
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
    async fn what_we_format_gets_a_new_identity() {
        if !present(&["mkfs.ext4", "tune2fs", "mkfs.btrfs", "btrfstune", "blkid"]) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for (kind, size) in [(Kind::Ext4, 16 << 20), (Kind::Btrfs, 128 << 20)] {
            let path = dir.path().join(kind.name());
            std::fs::File::create(&path).unwrap().set_len(size).unwrap();
            fs::format(kind, &path, "").await.unwrap();
            let before = uuid(&path).await;
            // Twice: a crash may repeat it.
            renew(kind, &path).await.unwrap();
            let between = uuid(&path).await;
            renew(kind, &path).await.unwrap();
            let after = uuid(&path).await;
            assert!(before != between && between != after && before != after, "{kind}");
            fs::check(kind, &path).await.unwrap();
        }
    }
}
