//! Operations on a pool, and random ones from a seed.
//!
//! Each seed leaves a random half of the kinds of operation out (swarm testing): a state that two
//! kinds only reach when a third does not disturb is reached by some seed. Addresses are skewed,
//! so that some blocks are written over and over and others once.

use super::model::{BLOCK_SECTORS, Birth, Model, Step};
use pando_engine::disk::sim::Rng;
use pando_engine::units::SECTOR_BYTES;

/// An operation. Ranges are in sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Write, with the operation's number as the stamp.
    Write {
        /// Volume.
        volume: String,
        /// First sector.
        first: u64,
        /// Sectors.
        count: u64,
        /// Durable before it is acknowledged.
        fua: bool,
    },
    /// Write zeros, or unmap.
    Zero {
        /// Volume.
        volume: String,
        /// First sector.
        first: u64,
        /// Sectors.
        count: u64,
        /// Keep blocks allocated.
        no_hole: bool,
    },
    /// Discard.
    Discard {
        /// Volume.
        volume: String,
        /// First sector.
        first: u64,
        /// Sectors.
        count: u64,
    },
    /// Flush everything.
    Flush,
    /// Make volumes, clones or snapshots, all at one instant.
    Create(Vec<Birth>),
    /// Delete a volume.
    Delete(String),
    /// Make a volume longer.
    Grow(String, u64),
    /// Write a checkpoint.
    Checkpoint,
    /// Close the pool and open it again.
    Reopen,
}

impl Op {
    /// What the operation does to the model, in steps that are atomic each.
    #[must_use]
    pub fn steps(&self, model: &Model, stamp: u64) -> Vec<Step> {
        let set = |volume: &String, first, count, stamp| Step::Set {
            volume: volume.clone(),
            first,
            count,
            stamp,
        };
        match self {
            Self::Write { volume, first, count, .. } => {
                let cut = pieces(*first, *count);
                cut.into_iter().map(|(first, count)| set(volume, first, count, stamp)).collect()
            }
            Self::Zero { volume, first, count, no_hole } => {
                let end = first + count;
                let head = first.next_multiple_of(BLOCK_SECTORS).min(end);
                let tail = (end / BLOCK_SECTORS * BLOCK_SECTORS).max(head);
                let middle =
                    if *no_hole { pieces(head, tail - head) } else { vec![(head, tail - head)] };
                let edges = [(*first, head - first), (tail, end - tail)].into_iter();
                let all = edges.chain(middle).filter(|(_, count)| *count > 0);
                all.map(|(first, count)| set(volume, first, count, 0)).collect()
            }
            Self::Discard { volume, first, count } => {
                let sectors = model.volumes.get(volume).map_or(0, |v| v.sectors());
                let end = first + count;
                let head = first.next_multiple_of(BLOCK_SECTORS).min(end);
                let whole = if end == sectors { end } else { end / BLOCK_SECTORS * BLOCK_SECTORS };
                let count = whole.saturating_sub(head);
                if count == 0 { vec![] } else { vec![set(volume, head, count, 0)] }
            }
            Self::Create(births) => vec![Step::Create(births.clone())],
            Self::Delete(name) => vec![Step::Delete(name.clone())],
            Self::Grow(name, size) => vec![Step::Grow(name.clone(), *size)],
            Self::Flush | Self::Checkpoint | Self::Reopen => vec![],
        }
    }

    /// Whether it can be done to a pool that holds `model`: what it names is there, or not yet, and
    /// its range is inside of that.
    #[must_use]
    pub fn fits(&self, model: &Model) -> bool {
        let holds = |volume: &String, end: u64| {
            let found = model.volumes.get(volume);
            found.is_some_and(|v| !v.snapshot && end <= v.sectors())
        };
        match self {
            Self::Write { volume, first, count, .. }
            | Self::Zero { volume, first, count, .. }
            | Self::Discard { volume, first, count } => holds(volume, first + count),
            Self::Create(births) => births.iter().all(|birth| {
                let source = birth.source.as_ref().map(|source| model.volumes.get(source));
                let large = source.is_none_or(|source| {
                    source.is_some_and(|v| birth.size_bytes.is_none_or(|size| size >= v.size_bytes))
                });
                large && !model.volumes.contains_key(&birth.name)
            }),
            Self::Delete(name) => model.volumes.contains_key(name),
            Self::Grow(name, size) => {
                model.volumes.get(name).is_some_and(|volume| *size >= volume.size_bytes)
            }
            Self::Flush | Self::Checkpoint | Self::Reopen => true,
        }
    }

    /// Whether everything so far is durable when the operation is acknowledged.
    #[must_use]
    pub const fn is_durable(&self) -> bool {
        match self {
            Self::Write { fua, .. } => *fua,
            Self::Zero { .. } | Self::Discard { .. } => false,
            Self::Flush
            | Self::Create(_)
            | Self::Delete(_)
            | Self::Grow(..)
            | Self::Checkpoint
            | Self::Reopen => true,
        }
    }
}

/// Each block is old or new; a write of several may take several records, cut at any block.
fn pieces(first: u64, count: u64) -> Vec<(u64, u64)> {
    let end = first + count;
    let mut pieces = Vec::new();
    let mut at = first;
    while at < end {
        let next = ((at / BLOCK_SECTORS + 1) * BLOCK_SECTORS).min(end);
        pieces.push((at, next - at));
        at = next;
    }
    pieces
}

/// Kinds of operation, with their weights.
const KINDS: [(Kind, u64); 14] = [
    (Kind::WriteBlock, 10),
    (Kind::WritePart, 6),
    (Kind::WriteStraddling, 4),
    (Kind::WriteLong, 3),
    (Kind::WriteFua, 2),
    (Kind::Zero, 3),
    (Kind::Discard, 4),
    (Kind::Flush, 4),
    (Kind::Clone, 3),
    (Kind::Group, 1),
    (Kind::Delete, 2),
    (Kind::Grow, 1),
    (Kind::Checkpoint, 2),
    (Kind::Reopen, 1),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    WriteBlock,
    WritePart,
    WriteStraddling,
    WriteLong,
    WriteFua,
    Zero,
    Discard,
    Flush,
    Clone,
    Group,
    Delete,
    Grow,
    Checkpoint,
    Reopen,
}

/// Bounds of what the generator makes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Volumes and snapshots at the same time.
    pub volumes: usize,
    /// Blocks of the largest volume.
    pub volume_blocks: u64,
    /// Blocks of the longest write.
    pub write_blocks: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { volumes: 6, volume_blocks: 48, write_blocks: 20 }
    }
}

/// Random operations.
pub struct Generator {
    rng: Rng,
    bounds: Bounds,
    kinds: Vec<(Kind, u64)>,
    born: u64,
}

impl Generator {
    /// The operations of `seed`.
    #[must_use]
    pub fn new(seed: u64, bounds: Bounds) -> Self {
        let mut rng = Rng::new(seed ^ 0x5EED_0F09);
        let all = rng.chance(4);
        let kept = KINDS.iter().filter(|_| all || rng.chance(9));
        let mut kinds: Vec<_> = kept.copied().collect();
        if kinds.iter().all(|(kind, _)| *kind as u8 > Kind::WriteFua as u8) {
            kinds.push((Kind::WriteBlock, 10));
        }
        Self { rng, bounds, kinds, born: 0 }
    }

    /// The next operation on a pool that holds `model`.
    pub fn next_op(&mut self, model: &Model) -> Op {
        if model.volumes.values().all(|volume| volume.snapshot) {
            return Op::Create(vec![self.empty_volume(model)]);
        }
        let total = self.kinds.iter().map(|(_, weight)| weight).sum();
        let mut pick = self.rng.below(total);
        let mut kind = Kind::WriteBlock;
        for (candidate, weight) in &self.kinds {
            if pick < *weight {
                kind = *candidate;
                break;
            }
            pick -= weight;
        }
        match kind {
            Kind::Flush => Op::Flush,
            Kind::Checkpoint => Op::Checkpoint,
            Kind::Reopen => Op::Reopen,
            Kind::Delete => Op::Delete(self.pick(model, false)),
            Kind::Clone | Kind::Group => self.births(kind, model),
            Kind::Grow => {
                let name = self.pick(model, true);
                let sectors = model.volumes[&name].sectors() + self.rng.below(40);
                Op::Grow(name, sectors * SECTOR_BYTES)
            }
            Kind::Zero | Kind::Discard => self.unmapping(kind, model),
            _ => self.write(kind, model),
        }
    }

    fn write(&mut self, kind: Kind, model: &Model) -> Op {
        let volume = self.pick(model, true);
        let sectors = model.volumes[&volume].sectors();
        let part = 1 + self.rng.below(BLOCK_SECTORS - 1);
        let block = self.address(sectors) / BLOCK_SECTORS * BLOCK_SECTORS;
        let (first, count) = match kind {
            Kind::WritePart => (block + self.rng.below(BLOCK_SECTORS), part),
            Kind::WriteStraddling => {
                (block + self.rng.below(BLOCK_SECTORS), BLOCK_SECTORS * (1 + self.rng.below(3)))
            }
            Kind::WriteLong => {
                let blocks = 2 + self.rng.below(self.bounds.write_blocks);
                let (head, tail) = if self.rng.chance(4) { (part, 3) } else { (0, 0) };
                (block + head, blocks * BLOCK_SECTORS + tail)
            }
            _ => (block, BLOCK_SECTORS),
        };
        let first = first.min(sectors - 1);
        let count = count.min(sectors - first);
        Op::Write { volume, first, count, fua: kind == Kind::WriteFua }
    }

    fn unmapping(&mut self, kind: Kind, model: &Model) -> Op {
        let volume = self.pick(model, true);
        let sectors = model.volumes[&volume].sectors();
        let mut first = self.address(sectors);
        if self.rng.chance(8) {
            first -= first % BLOCK_SECTORS;
        }
        let most = if self.rng.chance(3) { sectors } else { 6 * BLOCK_SECTORS };
        let count = (1 + self.rng.below(most)).min(sectors - first);
        match kind {
            Kind::Zero => Op::Zero { volume, first, count, no_hole: self.rng.chance(5) },
            _ => Op::Discard { volume, first, count },
        }
    }

    fn births(&mut self, kind: Kind, model: &Model) -> Op {
        let room = self.bounds.volumes.saturating_sub(model.volumes.len());
        if room == 0 {
            return Op::Delete(self.pick(model, false));
        }
        if self.rng.chance(4) {
            return Op::Create(vec![self.empty_volume(model)]);
        }
        let wanted = if kind == Kind::Group { 2 + self.rng.below(2) } else { 1 };
        let snapshot = self.rng.chance(7);
        let births = (0..wanted).take(room).map(|_| {
            let source = self.pick(model, false);
            let longer = !snapshot && self.rng.chance(3);
            let size = model.volumes[&source].size_bytes + 8 * SECTOR_BYTES;
            let size_bytes = longer.then_some(size);
            Birth { name: self.name(model), size_bytes, source: Some(source), snapshot }
        });
        Op::Create(births.collect())
    }

    fn empty_volume(&mut self, model: &Model) -> Birth {
        let blocks = 1 + self.rng.below(self.bounds.volume_blocks);
        let odd = if self.rng.chance(4) { self.rng.below(BLOCK_SECTORS) } else { 0 };
        let size_bytes = Some((blocks * BLOCK_SECTORS + odd) * SECTOR_BYTES);
        Birth { name: self.name(model), size_bytes, source: None, snapshot: false }
    }

    /// A name that is not taken.
    fn name(&mut self, model: &Model) -> String {
        loop {
            self.born += 1;
            let name = format!("v{}", self.born);
            if !model.volumes.contains_key(&name) {
                return name;
            }
        }
    }

    /// A sector; the first eighth of the volume is hit as often as all the rest.
    fn address(&mut self, sectors: u64) -> u64 {
        if self.rng.chance(8) {
            self.rng.below(sectors.div_ceil(8))
        } else {
            self.rng.below(sectors)
        }
    }

    fn pick(&mut self, model: &Model, writable: bool) -> String {
        let fits = |writable: bool, snapshot: bool| !writable || !snapshot;
        let mut names = model.volumes.iter().filter(|(_, v)| fits(writable, v.snapshot));
        let count = names.clone().count();
        let pick =
            pando_engine::units::to_usize(self.rng.below(pando_engine::units::to_u64(count)));
        names.nth(pick).map(|(name, _)| name.clone()).expect("there is a volume to choose")
    }
}
