//! The content of the disk after a power failure, or after the process was killed.
//!
//! ```text
//!   durable image                      what syncs have covered
//!   + pieces, oldest first             each landed or not, in whole or in part, by the plan
//!   = image after the cut
//! ```
//! A piece is a write to one block, or a store to one block of the journal's ring, that no sync has
//! covered. Each store to the ring keeps its version of the block, because the kernel may write
//! such a page back at any time.

use super::image::{ALL_SECTORS, Bytes, Content, Image, SECTOR_SIZE, SECTORS, SectorMask, sectors};
use super::rng::Rng;

/// A write to (part of) one block that is not durable yet.
#[derive(Clone)]
pub(super) struct Piece {
    /// The number of the write that it is part of.
    pub(super) write: u64,
    pub(super) block: u64,
    pub(super) content: Content,
    /// The sectors that it writes.
    pub(super) mask: SectorMask,
    pub(super) stage: Stage,
}

/// Progress of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The device has not completed it.
    InFlight,
    /// The device has completed it, but the completion was not delivered yet.
    Completed,
    /// The completion was delivered at this moment: a sync requested later covers it.
    Delivered(u64),
    /// A sync that covered it has failed. It may be on the disk or not, and no later sync of this
    /// process makes it durable.
    Orphaned,
}

/// Unit that lands as a whole or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// A sector of 512 bytes of a write.
    Sector,
    /// A block of a write, or the change of one store to one block of the ring.
    Block,
}

/// Which of the pieces that no sync has covered survive the power failure. Numbers count units of a
/// [`Grain`] in the order in which they were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutPlan {
    /// None.
    KeepNone,
    /// All.
    KeepAll,
    /// The first units, this many.
    Prefix(Grain, usize),
    /// Only this unit.
    OnlyOne(Grain, usize),
    /// All except this unit.
    AllBut(Grain, usize),
    /// The units whose bit is set (of the first 64; the others do not survive).
    Mask(Grain, u64),
    /// Chosen by a seed: of each block all sectors, none, or some.
    Subset(u64),
    /// As `Subset`, but some sectors are partly old, or partly or wholly garbage.
    Torn(u64),
    /// As `Subset`, but some blocks of writes in flight are wholly garbage.
    Garbled(u64),
}

/// Number of units of a grain in `pieces`.
pub(super) fn count(pieces: &[Piece], grain: Grain) -> usize {
    match grain {
        Grain::Block => pieces.len(),
        Grain::Sector => pieces.iter().map(|piece| sectors(piece.mask).count()).sum(),
    }
}

/// The durable image with the pieces that survive by the plan. A growth of the file that no sync
/// has covered survives if all pieces do, or if a piece beyond the old end does.
pub(super) fn apply(durable: &Image, pieces: &[Piece], len_blocks: u64, plan: CutPlan) -> Image {
    let mut image = durable.clone();
    match plan {
        CutPlan::KeepNone => {}
        CutPlan::KeepAll => {
            image.extend(len_blocks);
            keep(&mut image, pieces, Grain::Block, |_| true);
        }
        CutPlan::Prefix(grain, n) => keep(&mut image, pieces, grain, |i| i < n),
        CutPlan::OnlyOne(grain, n) => keep(&mut image, pieces, grain, |i| i == n),
        CutPlan::AllBut(grain, n) => keep(&mut image, pieces, grain, |i| i != n),
        CutPlan::Mask(grain, bits) => {
            keep(&mut image, pieces, grain, |i| i < 64 && bits >> i & 1 == 1);
        }
        CutPlan::Subset(seed) => choose(&mut image, pieces, &mut Rng::new(seed), Damage::None),
        CutPlan::Torn(seed) => choose(&mut image, pieces, &mut Rng::new(seed), Damage::Sectors),
        CutPlan::Garbled(seed) => choose(&mut image, pieces, &mut Rng::new(seed), Damage::Blocks),
    }
    image
}

fn keep(image: &mut Image, pieces: &[Piece], grain: Grain, survives: impl Fn(usize) -> bool) {
    let mut next = 0;
    let mut decide = || {
        next += 1;
        survives(next - 1)
    };
    for piece in pieces {
        let mask = match grain {
            Grain::Block => piece.mask * u8::from(decide()),
            Grain::Sector => (0..SECTORS)
                .map(|sector| piece.mask & (1 << sector))
                .filter(|bit| *bit != 0 && decide())
                .fold(0, |mask, bit| mask | bit),
        };
        if mask != 0 {
            image.extend(piece.block + 1);
            image.set_sectors(piece.block, &piece.content, mask);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Damage {
    None,
    Sectors,
    Blocks,
}

/// Lets random pieces survive. The probability to land is itself random, so that almost none, about
/// half and almost all occur. Pieces of one write mostly share their fate.
fn choose(image: &mut Image, pieces: &[Piece], rng: &mut Rng, damage: Damage) {
    let inclination = [1, 4, 8, 12, 15][usize::from(rng.bits().to_le_bytes()[0] % 5)];
    let tears = if rng.chance(8) { rng.below(6) } else { 0 };
    let together = rng.chance(8);
    let mut write_lands = (u64::MAX, false);
    for piece in pieces {
        if write_lands.0 != piece.write {
            write_lands = (piece.write, rng.chance(inclination));
        }
        let lands = if together { write_lands.1 } else { rng.chance(inclination) };
        let in_flight = piece.stage == Stage::InFlight;
        if lands {
            image.extend(piece.block + 1);
        } else if piece.block >= image.len_blocks() {
            continue;
        }
        if damage == Damage::Blocks && in_flight && rng.chance(8) {
            image.change(piece.block, |block| garble(block, rng));
        } else if rng.chance(tears) || (damage == Damage::Sectors && rng.chance(4)) {
            let some = piece.mask & rng.bits().to_le_bytes()[0];
            image.set_sectors(piece.block, &piece.content, some);
            if damage == Damage::Sectors {
                tear_sectors(image, piece, piece.mask & !some, rng);
            }
        } else if lands {
            image.set_sectors(piece.block, &piece.content, piece.mask);
        }
    }
}

/// Tears sectors that did not land whole: a quarter of them stays old; in the others the left part,
/// the right part or all of the sector becomes new bytes or garbage (the distribution of
/// FoundationDB).
fn tear_sectors(image: &mut Image, piece: &Piece, mask: SectorMask, rng: &mut Rng) {
    static ZEROS: Bytes = [0; SECTOR_SIZE * SECTORS];
    let new = piece.content.as_ref().map_or(&ZEROS, |content| content.bytes());
    image.change(piece.block, |old| {
        for sector in sectors(mask) {
            let border = sector.start + usize::from(rng.bits().to_le_bytes()[0]) * 2;
            let part = match rng.below(4) {
                0 => continue,
                1 => sector.start..border,
                2 => border..sector.end,
                _ => sector,
            };
            if rng.chance(8) {
                old[part.clone()].copy_from_slice(&new[part]);
            } else {
                garble(&mut old[part], rng);
            }
        }
    });
}

fn garble(bytes: &mut [u8], rng: &mut Rng) {
    for chunk in bytes.chunks_mut(8) {
        let garbage = rng.bits().to_le_bytes();
        chunk.copy_from_slice(&garbage[..chunk.len()]);
    }
}

/// The pieces after a kill of the process: completed writes and all stores to the ring stay, still
/// not durable; writes in flight land or not.
pub(super) fn after_kill(pieces: &[Piece], seed: u64) -> Vec<Piece> {
    let mut rng = Rng::new(seed);
    let mut left = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let mut piece = piece.clone();
        // Moments of the old process mean nothing in the next one: all are before its start.
        match piece.stage {
            // The next process reads from the device, so the piece is lost now or never.
            Stage::Orphaned if rng.chance(8) => continue,
            Stage::Orphaned => piece.stage = Stage::Delivered(0),
            Stage::Delivered(_) | Stage::Completed => piece.stage = Stage::Delivered(0),
            Stage::InFlight => {
                let mask = if rng.chance(8) { ALL_SECTORS } else { rng.bits().to_le_bytes()[0] };
                if rng.chance(8) {
                    continue;
                }
                piece.mask &= mask;
                piece.stage = Stage::Delivered(0);
            }
        }
        left.push(piece);
    }
    left
}

/// The content that a read through the caches returns.
pub(super) fn seen(durable: &Image, pieces: &[Piece], len_blocks: u64) -> Image {
    let mut image = durable.clone();
    image.extend(len_blocks);
    for piece in pieces.iter().filter(|piece| piece.stage != Stage::InFlight) {
        image.set_sectors(piece.block, &piece.content, piece.mask);
    }
    image
}
