//! What the daemon writes down of its block devices, so that the next one finds them: one small
//! file for each volume, in a directory of the pool's own. A record is replaced by a rename, so
//! that it is whole after SIGKILL; after a restart of the machine it is worth nothing, as the
//! devices are gone, and so it is never synced.

use std::fs::{self, DirBuilder, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::error::{Error, Result};
use crate::export::driver::{DeviceKind, DeviceNode};
use crate::limits::VOLUMES_MAX;
use crate::units::VolumeId;

/// Version of the records that this program writes, and the only one that it reads.
const VERSION: u32 = 1;
/// Bytes of a record: some 300, and what the errors of three kinds of devices say.
const RECORD_BYTES_MAX: u64 = 64 << 10;
const EXTENSION: &str = "toml";

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    version: u32,
    pub(super) volume: u64,
    pub(super) kind: DeviceKind,
    pub(super) identity: String,
    pub(super) read_only: bool,
    pub(super) sector_bytes: u32,
    /// Kinds that were tried before.
    pub(super) passed_over: Vec<String>,
    /// `None` while the device is being made.
    pub(super) node: Option<DeviceNode>,
}

impl Record {
    /// A record of a device that is about to be made.
    pub(super) const fn new(
        volume: VolumeId,
        kind: DeviceKind,
        identity: String,
        (read_only, sector_bytes): (bool, u32),
    ) -> Self {
        Self {
            version: VERSION,
            volume: volume.get(),
            kind,
            identity,
            read_only,
            sector_bytes,
            passed_over: Vec::new(),
            node: None,
        }
    }
}

/// The records of one pool.
pub(super) struct Records {
    dir: PathBuf,
}

impl Records {
    /// In `dir`, which is made, with mode 0700, if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        // Without links, as the kernel names the place of a mount.
        let whole = made.and_then(|()| fs::canonicalize(dir));
        let whole =
            whole.map_err(|error| Error::io(format!("devices_dir {}", dir.display()), error))?;
        Ok(Self { dir: whole })
    }

    /// The directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, volume: VolumeId) -> PathBuf {
        self.dir.join(format!("{}.{EXTENSION}", volume.get()))
    }

    /// Writes a record, or replaces it.
    ///
    /// # Errors
    /// The directory's.
    pub(super) fn write(&self, record: &Record) -> Result<()> {
        let path = self.path(VolumeId::new(record.volume));
        let text = toml::to_string(record)
            .map_err(|error| Error::invalid(format!("record {}: {error}", path.display())))?;
        let fresh = path.with_extension("new");
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let written = options
            .open(&fresh)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| fs::rename(&fresh, &path));
        written.map_err(|error| Error::io(format!("record {}", path.display()), error))
    }

    /// Removes the record of a volume, if there is one.
    pub(super) fn remove(&self, volume: VolumeId) {
        let path = self.path(volume);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                warn!(path = %path.display(), %error, "record of a device is not removed");
            }
            _ => {}
        }
    }

    /// The record of a volume, if there is one that can be understood and that is of a device of
    /// this pool: `prefix` is how their identities begin. Others are removed.
    pub(super) fn read(&self, volume: VolumeId, prefix: &str) -> Option<Record> {
        let path = self.path(volume);
        let why = match load(&path) {
            Ok(None) => return None,
            Ok(Some(record)) => match check(&record, volume, prefix) {
                Ok(()) => return Some(record),
                Err(why) => why.to_owned(),
            },
            Err(error) => error.to_string(),
        };
        warn!(path = %path.display(), why, "record of a device is of no use and is removed");
        self.remove(volume);
        None
    }

    /// The volumes that have records.
    pub(super) fn volumes(&self) -> Vec<VolumeId> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names
            .filter_map(|name| name.strip_suffix(EXTENSION)?.strip_suffix('.')?.parse().ok())
            .map(VolumeId::new)
            .take(VOLUMES_MAX)
            .collect()
    }
}

fn load(path: &Path) -> Result<Option<Record>> {
    let failed = |error| Error::io("it cannot be read", error);
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        result => result.map_err(failed)?,
    };
    let mut text = String::new();
    file.take(RECORD_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    toml::from_str(&text).map(Some).map_err(|error| Error::invalid(error.message().to_owned()))
}

fn check(record: &Record, volume: VolumeId, prefix: &str) -> std::result::Result<(), &'static str> {
    if record.version != VERSION {
        return Err("it is of another version");
    }
    if record.volume != volume.get() || record.identity != format!("{prefix}{}", volume.get()) {
        return Err("it is of another volume");
    }
    if !super::SECTOR_SIZES.contains(&record.sector_bytes) {
        return Err("there are no such sectors");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFIX: &str = "pando-00-";

    fn record(volume: u64) -> Record {
        let identity = format!("{PREFIX}{volume}");
        Record::new(VolumeId::new(volume), DeviceKind::Loop, identity, (false, 512))
    }

    #[test]
    fn a_record_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(&dir.path().join("a/b")).unwrap();
        assert_eq!(records.volumes(), []);
        let mut one = record(7);
        records.write(&one).unwrap();
        one.node = Some(DeviceNode { path: "/dev/loop3".into(), major: 7, minor: 3 });
        one.passed_over = vec!["ublk: no module".to_owned()];
        records.write(&one).unwrap();
        assert_eq!(records.volumes(), [VolumeId::new(7)]);
        assert_eq!(records.read(VolumeId::new(7), PREFIX), Some(one));
        records.remove(VolumeId::new(7));
        assert_eq!(records.read(VolumeId::new(7), PREFIX), None);
        assert_eq!(records.volumes(), []);
    }

    #[test]
    fn a_record_that_is_not_right_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let other_pool = Record { identity: "pando-11-7".to_owned(), ..record(7) };
        let other_volume = Record { volume: 7, ..record(8) };
        let sectors = Record { sector_bytes: 1024, ..record(7) };
        let version = Record { version: 2, ..record(7) };
        let texts = [other_pool, other_volume, sectors, version]
            .map(|record| toml::to_string(&record).unwrap())
            .into_iter()
            .chain(["", "volume = 7", "\0", "node = 1\nnode = 2"].map(str::to_owned))
            .chain(["x".repeat(1 << 20)]);
        for text in texts {
            fs::write(dir.path().join("7.toml"), &text).unwrap();
            assert_eq!(records.read(VolumeId::new(7), PREFIX), None, "{text:.100}");
            assert!(!dir.path().join("7.toml").exists(), "it is removed: {text:.100}");
        }
        // What has another name is not ours.
        fs::write(dir.path().join("seven.toml"), "").unwrap();
        fs::write(dir.path().join("7.toml.new"), "").unwrap();
        assert_eq!(records.volumes(), []);
    }
}
