//! A volume in memory: its catalogue entry and what is under way for it.

use super::families::{Sharing, is_temporary};
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalogue::VolumeEntry;
use crate::limits;
use crate::map::Fanout;
use crate::units::{BLOCK_BYTES, Lba, SECTOR_BYTES, Size, VolumeId, blocks_for};

/// Blocks of the largest pool.
const POOL_BLOCKS_MAX: u64 = limits::POOL_BYTES_MAX / BLOCK_BYTES;
/// Characters of a text that is no name in a message about it.
const SHOWN_CHARS: usize = 64;
/// More than any pool has blocks. No count of held or frozen blocks goes beyond it, so that the sum
/// over all volumes fits.
pub(super) const HELD_BLOCKS_MAX: u64 = 1 << 46;

/// A volume or snapshot.
#[derive(Clone, Debug)]
pub struct Volume {
    /// As the catalogue has it.
    pub entry: VolumeEntry,
    /// Blocks taken for writes that are not yet in the map.
    pub inflight_blocks: u64,
    /// Sum of the frozen blocks of its clones and snapshots.
    pub frozen_blocks: u64,
    /// The first volume of its family.
    pub founder: VolumeId,
    /// What it may share blocks with.
    pub sharing: Sharing,
}

impl Volume {
    /// A volume with nothing under way, the founder of a family.
    #[must_use]
    pub const fn new(entry: VolumeEntry) -> Self {
        let founder = entry.id;
        Self { entry, inflight_blocks: 0, frozen_blocks: 0, founder, sharing: Sharing::Nothing }
    }

    /// Whether it is a snapshot that goes by itself.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        is_temporary(self.entry.snapshot, &self.entry.labels)
    }

    /// LBAs of the volume; the last may be partly beyond its size.
    #[must_use]
    pub const fn lbas(&self) -> u64 {
        blocks_for(self.entry.size_bytes)
    }

    /// Blocks that its map names.
    #[must_use]
    pub fn mapped(&self) -> u64 {
        self.entry.root.as_ref().map_or(0, |root| root.mapped())
    }

    /// Blocks written since it last took part in a clone or snapshot: its own, as far as births
    /// show it. The same on replay, whatever checkpoints have settled since.
    #[must_use]
    pub fn own_by_birth(&self) -> u64 {
        self.entry.root.as_ref().map_or(0, |root| root.own(self.entry.shared_at))
    }

    /// Blocks that are surely its own now.
    #[must_use]
    pub fn own(&self) -> u64 {
        if self.sharing == Sharing::Nothing { self.mapped() } else { self.own_by_birth() }
    }

    /// Blocks that limits and promises count as its own: temporary snapshots are ignored.
    #[must_use]
    pub fn counted_own(&self) -> u64 {
        if self.sharing == Sharing::Family { self.own_by_birth() } else { self.mapped() }
    }

    /// Blocks of its reservation that it has not used.
    #[must_use]
    pub fn unmet_reservation(&self) -> u64 {
        self.entry.reservation_blocks.saturating_sub(self.counted_own() + self.inflight_blocks)
    }

    /// Blocks that must be left for it: its unmet reservation and, while it shares anything of its
    /// map, as many as there can be nodes to copy before it can be written everywhere.
    #[must_use]
    pub fn promise(&self, fanout: Fanout) -> u64 {
        self.promise_with(self.entry.reservation_blocks, self.counted_own(), fanout)
    }

    /// The same, if its reservation were of so many blocks.
    #[must_use]
    pub fn promise_of(&self, reservation_blocks: u64, fanout: Fanout) -> u64 {
        self.promise_with(reservation_blocks, self.counted_own(), fanout)
    }

    /// The same behind a clone or snapshot of it: nothing that it has is surely its own any more.
    #[must_use]
    pub fn renewed_promise(&self, fanout: Fanout) -> u64 {
        self.promise_with(self.entry.reservation_blocks, 0, fanout)
    }

    fn promise_with(&self, reservation_blocks: u64, own: u64, fanout: Fanout) -> u64 {
        let shares = self.mapped() > own;
        let nodes = if shares { self.nodes_promised(reservation_blocks, fanout) } else { 0 };
        nodes + reservation_blocks.saturating_sub(own + self.inflight_blocks)
    }

    /// More than it is ever promised with this reservation, whatever it holds.
    #[must_use]
    pub fn promise_max(&self, fanout: Fanout) -> u64 {
        let reserved = self.entry.reservation_blocks;
        reserved + self.nodes_promised(reserved, fanout)
    }

    fn nodes_promised(&self, reservation_blocks: u64, fanout: Fanout) -> u64 {
        if reservation_blocks == 0 { 0 } else { fanout.nodes_max(self.lbas()) }
    }

    /// Blocks that it has added to the pool, at most: what it wrote and still has, and what it
    /// wrote and its clones and snapshots keep.
    #[must_use]
    pub fn grown(&self) -> u64 {
        if self.sharing != Sharing::Family {
            return self.mapped();
        }
        let own = self.own_by_birth();
        // What nobody else keeps is in its map, or gone.
        let held = self.entry.held_blocks.min(self.mapped() - own);
        own + held + self.frozen_blocks
    }

    /// Whether it may take `blocks` more under its growth limit.
    #[must_use]
    pub fn may_grow(&self, blocks: u64) -> bool {
        let limit = self.entry.growth_limit_blocks;
        limit == 0 || self.grown() + self.inflight_blocks + blocks <= limit
    }

    /// Whether writes are refused.
    #[must_use]
    pub const fn refuses_writes(&self) -> bool {
        self.entry.snapshot || self.entry.read_only
    }

    /// Checks that `[lba, lba + len)` lies inside the volume.
    #[must_use]
    pub fn holds(&self, lba: Lba, len: u64) -> bool {
        len > 0 && lba.get().checked_add(len).is_some_and(|end| end <= self.lbas())
    }
}

/// A text of a request that is no name, for a message: its beginning, in one line.
fn shown(text: &str) -> String {
    let beginning: String = text.chars().take(SHOWN_CHARS).collect();
    let rest = if beginning.len() < text.len() { "..." } else { "" };
    format!("{beginning:?}{rest}")
}

/// Checks the name of a new volume.
///
/// # Errors
/// `Invalid`, saying what a name looks like.
pub fn check_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty()
        || name.len() > limits::NAME_BYTES_MAX
        || !name.chars().all(good)
        || name.starts_with(['-', '.'])
    {
        return Err(Error::invalid(format!(
            "{} is not a volume name: 1 to {} characters of A-Z a-z 0-9 . _ -, \
             beginning with a letter, a digit or _",
            shown(name),
            limits::NAME_BYTES_MAX
        )));
    }
    Ok(())
}

/// Checks the size of a volume.
///
/// # Errors
/// `Invalid`, naming the bounds.
pub(super) fn check_size(name: &str, size_bytes: u64) -> Result<()> {
    if !size_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Error::invalid(format!(
            "volume {name}: size {} is not a multiple of {SECTOR_BYTES} bytes",
            Size(size_bytes)
        )));
    }
    if !(limits::VOLUME_BYTES_MIN..=limits::VOLUME_BYTES_MAX).contains(&size_bytes) {
        return Err(Error::invalid(format!(
            "volume {name}: size {} is not between {} and {}",
            Size(size_bytes),
            Size(limits::VOLUME_BYTES_MIN),
            Size(limits::VOLUME_BYTES_MAX)
        )));
    }
    Ok(())
}

/// Checks the labels of a volume.
///
/// # Errors
/// `Limit`, naming the bound.
pub(super) fn check_labels(name: &str, labels: &[(String, String)]) -> Result<()> {
    let long =
        labels.iter().any(|(k, v)| k.is_empty() || k.len() + v.len() > limits::LABEL_BYTES_MAX);
    if labels.len() > limits::LABELS_MAX || long {
        return Err(Error::new(
            ErrorKind::Limit,
            format!(
                "volume {name}: at most {} labels, each with a key and at most {} bytes",
                limits::LABELS_MAX,
                limits::LABEL_BYTES_MAX
            ),
        ));
    }
    Ok(())
}

/// Checks the reservation of a volume. A growth limit can be any number.
///
/// # Errors
/// `Limit`, naming the bound.
pub(super) fn check_reservation(name: &str, blocks: u64) -> Result<()> {
    if blocks > POOL_BLOCKS_MAX {
        return Err(Error::new(
            ErrorKind::Limit,
            format!(
                "volume {name}: a reservation of {} is larger than the largest pool, {}",
                Size(blocks.saturating_mul(BLOCK_BYTES)),
                Size(limits::POOL_BYTES_MAX)
            ),
        ));
    }
    Ok(())
}

/// Checks an entry that was read from the disk.
///
/// # Errors
/// `Corrupt`, naming the volume.
pub fn check_entry(entry: &VolumeEntry) -> Result<()> {
    check_name(&entry.name)
        .and_then(|()| check_size(&entry.name, entry.size_bytes))
        .and_then(|()| check_labels(&entry.name, &entry.labels))
        .and_then(|()| check_reservation(&entry.name, entry.reservation_blocks))
        .and_then(|()| check_sums(entry))
        .map_err(|error| Error::corrupt(error.to_string()))
}

/// Checks that no sum of an entry is beyond what there can be: what is added to it must fit.
fn check_sums(entry: &VolumeEntry) -> Result<()> {
    let (mapped, own) = entry.root.as_ref().map_or((0, 0), |root| (root.ptr.mapped, root.ptr.own));
    if mapped > limits::VOLUME_BLOCKS_MAX
        || own > mapped
        || entry.held_blocks.max(entry.frozen_blocks) > HELD_BLOCKS_MAX
    {
        return Err(Error::corrupt(format!(
            "volume {}: {mapped} blocks mapped, {own} of its own, {} held, {} frozen: impossible",
            entry.name, entry.held_blocks, entry.frozen_blocks
        )));
    }
    Ok(())
}
