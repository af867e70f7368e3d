//! The reference model: every volume is a map from block to the stamps of its 8 sectors, a clone
//! is a copy of that map. Nothing is shared, nothing is cached, nothing can leak.
//!
//! A stamp is the number of the operation that wrote the sector. It fills the sector together with
//! the sector's address, so that bytes of another volume, another place or another time are seen,
//! whoever reads them. Stamp 0 is zeros: never written, discarded or zeroed.

use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use pando_engine::units::{BLOCK_BYTES, SECTOR_BYTES, to_usize};

/// Sectors of a block.
pub const BLOCK_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;
const SECTOR: usize = 512;

/// The stamps of a block's sectors.
pub type Stamps = [u64; 8];

/// A volume or snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelVolume {
    /// Bytes.
    pub size_bytes: u64,
    /// Frozen.
    pub snapshot: bool,
    /// Blocks that are not all zeros.
    pub blocks: BTreeMap<u64, Stamps>,
}

impl ModelVolume {
    /// Sectors of the volume.
    #[must_use]
    pub const fn sectors(&self) -> u64 {
        self.size_bytes / SECTOR_BYTES
    }

    /// Sets the stamps of some sectors.
    pub fn set(&mut self, first: u64, count: u64, stamp: u64) {
        for sector in first..first + count {
            let block = self.blocks.entry(sector / BLOCK_SECTORS).or_default();
            block[to_usize(sector % BLOCK_SECTORS)] = stamp;
        }
        self.blocks.retain(|_, stamps| *stamps != [0; 8]);
    }
}

/// A change that happens whole or not at all, whenever the power fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Sectors of a volume get a stamp.
    Set {
        /// Volume.
        volume: String,
        /// First sector.
        first: u64,
        /// Number of sectors.
        count: u64,
        /// What they hold from now on; 0 is zeros.
        stamp: u64,
    },
    /// Volumes, clones or snapshots are born.
    Create(Vec<Birth>),
    /// A volume is gone.
    Delete(String),
    /// A volume is longer.
    Grow(String, u64),
}

/// A volume that is born.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Birth {
    /// Its name.
    pub name: String,
    /// Its size; `None` is the source's.
    pub size_bytes: Option<u64>,
    /// What it is a copy of.
    pub source: Option<String>,
    /// Frozen.
    pub snapshot: bool,
}

/// All volumes by name. Copies share what is equal, so that a history of thousands is cheap.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Model {
    /// The volumes.
    pub volumes: BTreeMap<String, Rc<ModelVolume>>,
}

impl Model {
    /// Carries out one step.
    ///
    /// # Panics
    /// When it names a volume that is not there: the operations are wrong.
    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::Set { volume, first, count, stamp } => {
                self.volume_mut(volume).set(*first, *count, *stamp);
            }
            Step::Create(births) => {
                let born: Vec<_> = births.iter().map(|b| (b.name.clone(), self.born(b))).collect();
                self.volumes.extend(born);
            }
            Step::Delete(name) => {
                self.volumes.remove(name).expect("the deleted volume exists");
            }
            Step::Grow(name, size_bytes) => self.volume_mut(name).size_bytes = *size_bytes,
        }
    }

    fn born(&self, birth: &Birth) -> Rc<ModelVolume> {
        let mut volume = birth.source.as_ref().map_or_else(ModelVolume::default, |source| {
            ModelVolume::clone(self.volumes.get(source).expect("the source exists"))
        });
        volume.size_bytes = birth.size_bytes.unwrap_or(volume.size_bytes);
        volume.snapshot = birth.snapshot;
        Rc::new(volume)
    }

    fn volume_mut(&mut self, name: &str) -> &mut ModelVolume {
        Rc::make_mut(self.volumes.get_mut(name).expect("the volume exists"))
    }

    /// In what two models differ, for people.
    #[must_use]
    pub fn difference(&self, other: &Self) -> String {
        let mut out = Vec::new();
        for name in self.volumes.keys().chain(other.volumes.keys()) {
            let (left, right) = (self.volumes.get(name), other.volumes.get(name));
            match (left, right) {
                (Some(left), Some(right)) if left == right => {}
                (Some(left), Some(right)) => {
                    let blocks = left.blocks.keys().chain(right.blocks.keys());
                    let differ = |b: &&u64| left.blocks.get(b) != right.blocks.get(b);
                    let first = blocks.filter(differ).min();
                    let stamps = first.map(|b| (b, left.blocks.get(b), right.blocks.get(b)));
                    let sizes = (left.size_bytes, right.size_bytes);
                    out.push(format!("{name}: sizes {sizes:?}, first block {stamps:?}"));
                }
                _ => out.push(format!("{name}: exists {:?}", (left.is_some(), right.is_some()))),
            }
        }
        out.sort();
        out.dedup();
        out.join("; ")
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = self.volumes.iter().map(|(name, v)| (name, (v.size_bytes, v.blocks.len())));
        f.debug_map().entries(sizes).finish()
    }
}

fn word(stamp: u64, sector: u64, index: u64) -> u64 {
    match index {
        0 => stamp,
        1 => sector,
        _ => (stamp ^ sector.rotate_left(40)).wrapping_mul(0x9E37_79B9_7F4A_7C15 ^ (index << 1)),
    }
}

/// Fills a sector as the stamp wants it.
pub fn fill_sector(bytes: &mut [u8], sector: u64, stamp: u64) {
    if stamp == 0 {
        return bytes.fill(0);
    }
    for (index, chunk) in (0..).zip(bytes.chunks_exact_mut(8)) {
        chunk.copy_from_slice(&word(stamp, sector, index).to_le_bytes());
    }
}

/// The stamp that a sector was filled with; `None` if no stamp fills it so.
#[must_use]
pub fn stamp_of(bytes: &[u8], sector: u64) -> Option<u64> {
    let stamp = u64::from_le_bytes(bytes[..8].try_into().ok()?);
    if stamp == 0 {
        return bytes.iter().all(|&byte| byte == 0).then_some(0);
    }
    let mut words = (0..).zip(bytes.chunks_exact(8));
    words.all(|(i, chunk)| chunk == word(stamp, sector, i).to_le_bytes()).then_some(stamp)
}

/// The stamps of what was read from sector `first` of a volume on, as a volume's blocks.
///
/// # Errors
/// Which sector holds something that was never written there.
pub fn stamps_of(
    bytes: &[u8],
    first: u64,
    blocks: &mut BTreeMap<u64, Stamps>,
) -> Result<(), String> {
    for (sector, chunk) in (first..).zip(bytes.chunks_exact(SECTOR)) {
        let stamp = stamp_of(chunk, sector).ok_or_else(|| {
            format!("sector {sector} holds what was never written there: {:02x?}", &chunk[..16])
        })?;
        if stamp != 0 {
            let stamps = blocks.entry(sector / BLOCK_SECTORS).or_default();
            stamps[to_usize(sector % BLOCK_SECTORS)] = stamp;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_tell_place_and_time() {
        let mut bytes = [0; 1024];
        fill_sector(&mut bytes[..512], 7, 3);
        assert_eq!(stamp_of(&bytes[..512], 7), Some(3));
        assert_eq!(stamp_of(&bytes[..512], 8), None, "misplaced");
        assert_eq!(stamp_of(&bytes[512..], 8), Some(0));
        bytes[100] ^= 1;
        assert_eq!(stamp_of(&bytes[..512], 7), None, "torn");
    }

    #[test]
    fn clones_are_copies() {
        let birth = |name: &str, source: Option<&str>| Birth {
            name: name.into(),
            size_bytes: source.is_none().then_some(8192),
            source: source.map(Into::into),
            snapshot: false,
        };
        let mut model = Model::default();
        model.apply(&Step::Create(vec![birth("a", None)]));
        let set = |first, count, stamp| Step::Set { volume: "a".into(), first, count, stamp };
        model.apply(&set(7, 2, 5));
        model.apply(&Step::Create(vec![birth("b", Some("a"))]));
        model.apply(&set(0, 8, 0));
        model.apply(&set(8, 1, 6));
        assert_eq!(model.volumes["a"].blocks, BTreeMap::from([(1, [6, 0, 0, 0, 0, 0, 0, 0])]));
        assert_eq!(model.volumes["b"].blocks[&0], [0, 0, 0, 0, 0, 0, 0, 5]);
        model.apply(&Step::Delete("a".into()));
        assert_eq!(model.volumes.len(), 1);
    }
}
