//! Batches of requests from a seed, and what the pool holds after each of them.

use std::collections::BTreeMap;

use crate::noise::Noise;

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// Blocks of a volume.
pub const BLOCKS: u64 = 1024;
/// Volumes and snapshots, at most.
const VOLUMES_MAX: usize = 8;
/// Requests of a batch, at most.
const REQUESTS_MAX: u64 = 24;
/// Blocks of a write, at most.
const WRITE_BLOCKS_MAX: u64 = 8;
/// Blocks of a discard, at most.
const DISCARD_BLOCKS_MAX: u64 = 64;
/// Batches until a flush, at most: so many can be lost.
pub const UNFLUSHED_MAX: u32 = 40;

/// Who wrote a block: the number of the batch, and of the one that had made the volume. Zeros: it
/// was never written, or discarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// The batch.
    pub batch: u32,
    /// The batch that had made the volume that it was written to.
    pub origin: u32,
}

const RECORD: usize = 32;

impl Stamp {
    fn record(self, lba: u64) -> [u8; RECORD] {
        let word = u64::from(self.batch) << 32 | u64::from(self.origin);
        let check = !(word.rotate_left(23) ^ lba).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut record = [0; RECORD];
        for (place, word) in record.chunks_exact_mut(8).zip([word, lba, check, !word]) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        record
    }

    /// The bytes of a block that it has written.
    #[must_use]
    pub fn block(self, lba: u64) -> Vec<u8> {
        if self == Self::default() {
            return vec![0; BLOCK];
        }
        self.record(lba).repeat(BLOCK / RECORD)
    }

    /// Who has written these bytes.
    ///
    /// # Errors
    /// Nobody, or parts of them were written by others.
    ///
    /// # Panics
    /// They are no block.
    pub fn of(bytes: &[u8], lba: u64) -> Result<Self, String> {
        assert_eq!(bytes.len(), BLOCK, "a block");
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(Self::default());
        }
        let low = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let stamp = Self { batch: low(4), origin: low(0) };
        match bytes.chunks_exact(RECORD).position(|part| part != stamp.record(lba)) {
            None => Ok(stamp),
            Some(at) => Err(format!("{stamp:?} at its begin, other bytes at {}", at * RECORD)),
        }
    }
}

/// What a batch does to some blocks of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Stamps them.
    Write,
    /// Makes them zeros.
    Zeroes,
    /// Discards them.
    Trim,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Name of the volume.
    pub volume: String,
    /// First block.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// What for.
    pub what: What,
}

/// What is done at once.
#[derive(Clone, Debug)]
pub enum Work {
    /// Requests, in no order; with FUA or not.
    Blocks(Vec<Request>, bool),
    /// A flush.
    Flush,
    /// A volume, or of a source a clone or snapshot.
    Create {
        /// Its name.
        name: String,
        /// Whom it is a copy of, and whether it is frozen.
        source: Option<(String, bool)>,
    },
    /// The end of one.
    Delete(String),
}

/// What is done at once, and its number.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Its place in the order; the first is 1.
    pub number: u32,
    /// What is done.
    pub work: Work,
}

impl Batch {
    /// Whether everything up to it is durable once it is acknowledged.
    #[must_use]
    pub fn makes_durable(&self) -> bool {
        matches!(self.work, Work::Flush | Work::Create { .. } | Work::Blocks(_, true))
    }
}

/// A volume or snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The batch that has made it.
    pub origin: u32,
    /// It is a snapshot.
    pub frozen: bool,
    /// What its blocks hold.
    pub blocks: Vec<Stamp>,
}

/// What a pool holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// By name.
    pub volumes: BTreeMap<String, Volume>,
}

impl Model {
    /// Does a batch, all of it.
    ///
    /// # Panics
    /// It was made for another state.
    pub fn apply(&mut self, batch: &Batch) {
        match &batch.work {
            Work::Blocks(requests, _) => {
                for request in requests {
                    let volume = self.volumes.get_mut(&request.volume).expect("it exists");
                    let stamp = match request.what {
                        What::Write => Stamp { batch: batch.number, origin: volume.origin },
                        What::Zeroes | What::Trim => Stamp::default(),
                    };
                    let blocks = volume.blocks.iter_mut().skip(index(request.first));
                    blocks.take(index(request.count)).for_each(|block| *block = stamp);
                }
            }
            Work::Flush => {}
            Work::Create { name, source: None } => {
                let blocks = vec![Stamp::default(); index(BLOCKS)];
                let made = Volume { origin: batch.number, frozen: false, blocks };
                self.volumes.insert(name.clone(), made);
            }
            Work::Create { name, source: Some((source, frozen)) } => {
                let blocks = self.volumes[source].blocks.clone();
                let made = Volume { origin: batch.number, frozen: *frozen, blocks };
                self.volumes.insert(name.clone(), made);
            }
            Work::Delete(name) => {
                self.volumes.remove(name).expect("it exists");
            }
        }
    }

    /// Its volumes without what they hold, as a word for a command line.
    #[must_use]
    pub fn shape(&self) -> String {
        let one = |(name, volume): (&String, &Volume)| {
            format!("{name}.{}.{}", volume.origin, if volume.frozen { "s" } else { "v" })
        };
        self.volumes.iter().map(one).collect::<Vec<_>>().join("+")
    }

    /// A model of this shape, with volumes that hold nothing: batches do not depend on that.
    ///
    /// # Panics
    /// The word is none.
    #[must_use]
    pub fn of_shape(word: &str) -> Self {
        let mut model = Self::default();
        for one in word.split('+').filter(|one| !one.is_empty()) {
            let parts: Vec<&str> = one.split('.').collect();
            let [name, origin, kind] = parts[..] else { panic!("{one:?} is no volume") };
            let blocks = vec![Stamp::default(); index(BLOCKS)];
            let origin = origin.parse().expect("a number");
            let volume = Volume { origin, frozen: kind == "s", blocks };
            model.volumes.insert(name.to_owned(), volume);
        }
        model
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("64 bits")
}

/// All batches from a seed on.
#[derive(Clone, Debug)]
pub struct Stream {
    noise: Noise,
    /// What the pool holds after the last one that was made.
    pub model: Model,
    /// Number of the last batch.
    pub number: u32,
    unflushed: u32,
}

impl Stream {
    /// Batches for a pool that is in the state of `model` after batch `number`.
    #[must_use]
    pub fn new(seed: u64, model: Model, number: u32) -> Self {
        Self { noise: Noise::new(seed), model, number, unflushed: 0 }
    }

    /// The next batch, after which the model is in the state that the pool must be in.
    pub fn advance(&mut self) -> Batch {
        self.number += 1;
        let batch = Batch { number: self.number, work: self.work() };
        self.unflushed = if batch.makes_durable() { 0 } else { self.unflushed + 1 };
        self.model.apply(&batch);
        batch
    }

    fn work(&mut self) -> Work {
        let name = format!("n{}", self.number);
        let writable = self.model.volumes.values().filter(|volume| !volume.frozen).count();
        if writable < 2 {
            return Work::Create { name, source: None };
        }
        if self.unflushed >= UNFLUSHED_MAX - 1 {
            return Work::Flush;
        }
        match self.noise.below(64) {
            0..4 => Work::Flush,
            4 if self.model.volumes.len() < VOLUMES_MAX => Work::Create { name, source: None },
            5..8 if self.model.volumes.len() < VOLUMES_MAX => {
                let source = self.any(|_| true);
                Work::Create { name, source: Some((source, self.noise.below(2) == 0)) }
            }
            8..10 if self.model.volumes.len() > VOLUMES_MAX / 2 => Work::Delete(self.any(|_| true)),
            way => Work::Blocks(self.requests(), way < 14),
        }
    }

    /// The name of any volume like this.
    fn any(&mut self, like: impl Fn(&Volume) -> bool) -> String {
        let all: Vec<&String> =
            self.model.volumes.iter().filter(|(_, v)| like(v)).map(|(name, _)| name).collect();
        let count = u64::try_from(all.len()).expect("few");
        all[index(self.noise.below(count))].clone()
    }

    /// Requests that have no block in common.
    fn requests(&mut self) -> Vec<Request> {
        let mut requests: Vec<Request> = Vec::new();
        for _ in 0..=self.noise.below(REQUESTS_MAX) {
            let (what, most) = match self.noise.below(16) {
                0 => (What::Trim, DISCARD_BLOCKS_MAX),
                1 => (What::Zeroes, DISCARD_BLOCKS_MAX),
                _ => (What::Write, WRITE_BLOCKS_MAX),
            };
            let count = 1 + self.noise.below(most);
            let first = self.noise.below(BLOCKS - count);
            let volume = self.any(|volume| !volume.frozen);
            let apart = |other: &Request| {
                other.volume != volume
                    || other.first + other.count <= first
                    || first + count <= other.first
            };
            if requests.iter().all(apart) {
                requests.push(Request { volume, first, count, what });
            }
        }
        requests
    }
}
