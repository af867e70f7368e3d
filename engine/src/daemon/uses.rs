//! Who uses a volume. It is offered to any number of connections, or it is a block device, or one
//! operation needs it for itself (delete, import): one of the three at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::pool::VolumeInfo;
use crate::runtime::sync::Mutex;
use crate::units::VolumeId;

/// Who uses a volume at present.
enum Use {
    /// Exports: open connections.
    Connections(usize),
    /// A block device; its path once it is there.
    Device(Option<String>),
    /// One operation, for itself.
    Claimed,
}

impl Use {
    /// What whoever wants the volume otherwise is told.
    fn refusal(&self, name: &str) -> Error {
        let why = match self {
            Self::Connections(count) => {
                format!("{count} NBD connections use it; disconnect them first")
            }
            Self::Device(Some(path)) => format!("it is attached as {path}; detach it first"),
            Self::Device(None) => "it is being attached; detach it first".to_owned(),
            Self::Claimed => {
                "another operation needs it for itself; try again when that is done".to_owned()
            }
        };
        let error = Error::new(ErrorKind::Busy, format!("volume {name}: {why}"));
        match self {
            Self::Device(Some(_)) => error.hint(format!("`pando volume detach {name}`")),
            _ => error,
        }
    }
}

/// Who uses which volume.
#[derive(Default)]
pub(super) struct Uses {
    volumes: Mutex<BTreeMap<VolumeId, Use>>,
}

impl Uses {
    /// One connection more to the volume.
    pub(super) fn connect(self: &Arc<Self>, info: &VolumeInfo) -> Result<Connected> {
        match self.volumes.lock().entry(info.id).or_insert(Use::Connections(0)) {
            Use::Connections(count) => *count += 1,
            other => return Err(other.refusal(&info.name)),
        }
        Ok(Connected { uses: Arc::clone(self), id: info.id })
    }

    /// Takes an unused volume for one operation.
    pub(super) fn claim(self: &Arc<Self>, id: VolumeId, name: &str) -> Result<Claim> {
        self.take(id, name, Use::Claimed)
    }

    /// Takes an unused volume for a block device.
    pub(super) fn attach(self: &Arc<Self>, id: VolumeId, name: &str) -> Result<Claim> {
        self.take(id, name, Use::Device(None))
    }

    fn take(self: &Arc<Self>, id: VolumeId, name: &str, new: Use) -> Result<Claim> {
        let mut volumes = self.volumes.lock();
        if let Some(other) = volumes.get(&id) {
            return Err(other.refusal(name));
        }
        volumes.insert(id, new);
        Ok(Claim { uses: Arc::clone(self), id })
    }

    /// Whether an export of the volume may begin.
    pub(super) fn check_shareable(&self, info: &VolumeInfo) -> Result<()> {
        match self.volumes.lock().get(&info.id) {
            None | Some(Use::Connections(_)) => Ok(()),
            Some(other) => Err(other.refusal(&info.name)),
        }
    }

    /// Connections to all volumes.
    pub(super) fn connections(&self) -> usize {
        let volumes = self.volumes.lock();
        volumes
            .values()
            .map(|one| match one {
                Use::Connections(count) => *count,
                Use::Device(_) | Use::Claimed => 0,
            })
            .sum()
    }
}

/// A connection to a volume, until it is dropped.
pub(super) struct Connected {
    uses: Arc<Uses>,
    id: VolumeId,
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut volumes = self.uses.volumes.lock();
        if let Some(Use::Connections(count)) = volumes.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                volumes.remove(&self.id);
            }
        }
    }
}

/// A volume that one operation or one block device has for itself, until this is dropped.
pub(super) struct Claim {
    uses: Arc<Uses>,
    id: VolumeId,
}

impl Claim {
    /// Makes known which device the claim is for.
    pub(super) fn name_device(&self, path: String) {
        self.uses.volumes.lock().insert(self.id, Use::Device(Some(path)));
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.uses.volumes.lock().remove(&self.id);
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::pool::{IoLimits, Source};

    fn volume(id: u64) -> VolumeInfo {
        VolumeInfo {
            id: VolumeId::new(id),
            name: format!("v{id}"),
            size_bytes: 4096,
            snapshot: false,
            read_only: false,
            source: Source::Empty,
            reservation_bytes: 0,
            growth_limit_bytes: 0,
            io_limits: IoLimits::default(),
            labels: BTreeMap::new(),
            created_at: 0,
            mapped_bytes: 0,
            own_bytes: 0,
        }
    }

    #[test]
    fn a_volume_is_offered_or_a_device_or_claimed() {
        let uses = Arc::new(Uses::default());
        let (one, two) = (volume(1), volume(2));
        let first = uses.connect(&one).unwrap();
        let second = uses.connect(&one).unwrap();
        let refused = uses.claim(one.id, &one.name).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(refused.to_string().contains("volume v1: 2 NBD connections"), "{refused}");
        let other = uses.claim(two.id, &two.name).unwrap();
        assert_eq!(uses.connections(), 2);
        drop((first, second));
        let claim = uses.claim(one.id, &one.name).unwrap();
        assert_eq!(uses.connect(&one).err().unwrap().kind(), ErrorKind::Busy);
        assert_eq!(uses.check_shareable(&one).unwrap_err().kind(), ErrorKind::Busy);
        drop((claim, other));
        let device = uses.attach(one.id, &one.name).unwrap();
        device.name_device("/dev/loop7".to_owned());
        let refused = uses.claim(one.id, &one.name).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(refused.to_string().contains("attached as /dev/loop7"), "{refused}");
        assert_eq!(uses.connect(&one).err().unwrap().kind(), ErrorKind::Busy);
        assert_eq!(uses.check_shareable(&one).unwrap_err().kind(), ErrorKind::Busy);
        drop(device);
        drop(uses.connect(&one).unwrap());
        assert!(uses.volumes.lock().is_empty(), "nothing is remembered of unused volumes");
    }
}
