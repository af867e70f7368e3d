//! Operations of an input, six bytes each, made to fit the model that they meet; and how they are
//! entered in a history.

use super::input::Input;
use crate::gen_ops::Op;
use crate::model::{BLOCK_SECTORS, Birth, Model};
use crate::run::Log;
use pando_engine::units::{SECTOR_BYTES, to_u64, to_usize};

/// Volumes and snapshots at the same time.
const VOLUMES_MAX: usize = 7;
/// Blocks of the largest volume.
const VOLUME_BLOCKS_MAX: u64 = 48;

/// What an operation is, before it is known which volumes there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Block,
    Part,
    Long,
    Fua,
    Zero,
    Discard,
    Flush,
    Volume,
    Clone,
    Snapshot,
    Group,
    Delete,
    Grow,
    Checkpoint,
    Reopen,
}

/// The more often, the likelier.
const KINDS: [Kind; 20] = [
    Kind::Block,
    Kind::Part,
    Kind::Long,
    Kind::Zero,
    Kind::Discard,
    Kind::Clone,
    Kind::Checkpoint,
    Kind::Flush,
    Kind::Delete,
    Kind::Snapshot,
    Kind::Fua,
    Kind::Group,
    Kind::Grow,
    Kind::Reopen,
    Kind::Volume,
    Kind::Block,
    Kind::Part,
    Kind::Long,
    Kind::Discard,
    Kind::Block,
];

/// One operation's bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Raw {
    pub(super) kind: u8,
    pub(super) volume: u8,
    pub(super) place: u8,
    pub(super) part: u8,
    pub(super) len: u8,
    pub(super) more: u8,
}

impl Raw {
    pub(super) fn of(input: &mut Input<'_>) -> Self {
        Self {
            kind: input.byte(),
            volume: input.byte(),
            place: input.byte(),
            part: input.byte(),
            len: input.byte(),
            more: input.byte(),
        }
    }
}

/// Makes operations, and names for new volumes.
#[derive(Default)]
pub(super) struct Maker {
    born: u64,
}

impl Maker {
    /// The next operation of the input on a pool that holds `model`; `None` at its end.
    pub(super) fn next(&mut self, input: &mut Input<'_>, model: &Model) -> Option<Op> {
        (!input.is_empty()).then(|| self.make(Raw::of(input), model))
    }

    /// The operation that some bytes are.
    pub(super) fn make(&mut self, raw: Raw, model: &Model) -> Op {
        let kind = KINDS[usize::from(raw.kind) % KINDS.len()];
        let Some(writable) = pick(model, raw.volume, true) else {
            return Op::Create(vec![self.empty_volume(raw)]);
        };
        let any = pick(model, raw.volume, false).unwrap_or_else(|| writable.clone());
        match kind {
            Kind::Block | Kind::Part | Kind::Long | Kind::Fua => write(kind, raw, writable, model),
            Kind::Zero | Kind::Discard => {
                let (first, count) = range(raw, &writable, model);
                match kind {
                    Kind::Zero => {
                        Op::Zero { volume: writable, first, count, no_hole: raw.more & 1 == 1 }
                    }
                    _ => Op::Discard { volume: writable, first, count },
                }
            }
            Kind::Flush => Op::Flush,
            Kind::Delete => Op::Delete(any),
            Kind::Grow => {
                let sectors = model.volumes[&writable].sectors() + u64::from(raw.len % 40);
                Op::Grow(writable, sectors * SECTOR_BYTES)
            }
            Kind::Checkpoint => Op::Checkpoint,
            Kind::Reopen => Op::Reopen,
            Kind::Volume | Kind::Clone | Kind::Snapshot | Kind::Group => {
                let room = VOLUMES_MAX.saturating_sub(model.volumes.len());
                if room == 0 {
                    return Op::Delete(any);
                }
                if kind == Kind::Volume {
                    return Op::Create(vec![self.empty_volume(raw)]);
                }
                let wanted = if kind == Kind::Group { 2 + usize::from(raw.more % 2) } else { 1 };
                let sources = (0..wanted.min(room))
                    .map(|n| raw.volume.wrapping_add(raw.len.wrapping_mul(to_u8(n))));
                let sources: Vec<_> = sources.filter_map(|n| pick(model, n, false)).collect();
                let copy = |source| self.copy_of(source, kind == Kind::Snapshot, raw, model);
                Op::Create(sources.into_iter().map(copy).collect())
            }
        }
    }

    fn empty_volume(&mut self, raw: Raw) -> Birth {
        let blocks = 1 + u64::from(raw.place) % VOLUME_BLOCKS_MAX;
        let odd = if raw.more & 1 == 1 { u64::from(raw.part) % BLOCK_SECTORS } else { 0 };
        let size_bytes = Some((blocks * BLOCK_SECTORS + odd) * SECTOR_BYTES);
        Birth { name: self.name(), size_bytes, source: None, snapshot: false }
    }

    fn copy_of(&mut self, source: String, snapshot: bool, raw: Raw, model: &Model) -> Birth {
        let longer = !snapshot && raw.more & 2 == 2;
        let size = model.volumes[&source].size_bytes + 8 * SECTOR_BYTES;
        let size_bytes = longer.then_some(size);
        Birth { name: self.name(), size_bytes, source: Some(source), snapshot }
    }

    fn name(&mut self) -> String {
        self.born += 1;
        format!("v{}", self.born)
    }
}

fn to_u8(number: usize) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}

/// One of the volumes, if there is one.
pub(super) fn pick(model: &Model, number: u8, writable: bool) -> Option<String> {
    let fits = |snapshot: bool| !writable || !snapshot;
    let names: Vec<_> = model.volumes.iter().filter(|(_, v)| fits(v.snapshot)).collect();
    let at = usize::from(number).checked_rem(names.len())?;
    Some(names[at].0.clone())
}

/// First sector and count of the range of an operation that unmaps.
fn range(raw: Raw, volume: &str, model: &Model) -> (u64, u64) {
    let sectors = model.volumes[volume].sectors();
    let mut first = u64::from(raw.place) * BLOCK_SECTORS % sectors;
    if raw.part & 8 == 8 {
        first = (first + u64::from(raw.part) % BLOCK_SECTORS) % sectors;
    }
    let most = if raw.len >= 0xE0 { sectors } else { 6 * BLOCK_SECTORS };
    (first, (1 + u64::from(raw.len) % most).min(sectors - first))
}

fn write(kind: Kind, raw: Raw, volume: String, model: &Model) -> Op {
    let sectors = model.volumes[&volume].sectors();
    let block = u64::from(raw.place) * BLOCK_SECTORS % sectors / BLOCK_SECTORS * BLOCK_SECTORS;
    let head = u64::from(raw.part) % BLOCK_SECTORS;
    let len = u64::from(raw.len);
    let (first, count) = match kind {
        Kind::Part => (block + head, 1 + len % (2 * BLOCK_SECTORS)),
        Kind::Long => {
            let (head, tail) = if raw.more & 1 == 1 { (head, 3) } else { (0, 0) };
            (block + head, (2 + len % 20) * BLOCK_SECTORS + tail)
        }
        _ => (block, BLOCK_SECTORS),
    };
    let first = first.min(sectors - 1);
    Op::Write { volume, first, count: count.min(sectors - first), fua: kind == Kind::Fua }
}

/// Enters an operation that is about to be done in a history; returns its stamp.
pub(super) fn issue(log: &mut Log, op: &Op) -> u64 {
    let stamp = log.stamp;
    log.stamp += 1;
    let mut model = log.last().clone();
    for step in op.steps(&model, stamp) {
        model.apply(&step);
        log.states.push(model.clone());
    }
    stamp
}

/// What was issued is acknowledged.
pub(super) fn acknowledge(log: &mut Log, durable: bool) {
    log.acknowledged = log.states.len() - 1;
    if durable {
        log.durable = log.acknowledged;
    }
}

/// Sectors of a volume that an operation changes, from and to.
pub(super) fn touched(op: &Op) -> Option<(&str, u64, u64)> {
    match op {
        Op::Write { volume, first, count, .. }
        | Op::Zero { volume, first, count, .. }
        | Op::Discard { volume, first, count } => Some((volume, *first, first + count)),
        _ => None,
    }
}

/// Whether two operations may happen at the same time and their order says nothing.
pub(super) fn commute(one: &Op, other: &Op) -> bool {
    let harmless = |op: &Op| matches!(op, Op::Flush | Op::Checkpoint);
    match (touched(one), touched(other)) {
        (Some((volume, from, to)), Some((other, other_from, other_to))) => {
            volume != other || to <= other_from || other_to <= from
        }
        (Some(_), None) => harmless(other),
        (None, Some(_)) => harmless(one),
        (None, None) => harmless(one) && harmless(other),
    }
}

/// A number of a list.
pub(super) fn modulo(number: u64, len: usize) -> usize {
    to_usize(number.checked_rem(to_u64(len)).unwrap_or_default())
}
