//! Finding the last checkpoint: the newest whole superblock, and its catalogue.

#![cfg_attr(
    not(feature = "testing"),
    expect(unreachable_pub, reason = "the probe for pando-sim re-exports them")
)]

use std::rc::Rc;

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalogue::{Catalogue, ChainReader};
use crate::format::codec::decode_catalogue;
use crate::format::geometry::SUPER_SLOTS;
use crate::format::superblock::Superblock;
use crate::limits::VOLUME_ID_MAX;
use crate::runtime::Buf;
use crate::units::{BLOCK_BYTES, BlockNo, to_u64};

/// A checkpoint as found on the disk.
pub struct Found {
    pub catalogue: Catalogue,
    pub catalogue_blocks: Vec<BlockNo>,
}

/// Reads one block.
pub(crate) async fn read_block(disk: &Rc<dyn Disk>, place: BlockNo) -> Result<Buf> {
    let (buf, result) = disk.read(place, Buf::new(1)).await;
    result.map(|()| buf)
}

/// The newest whole superblock of the four places. One that lies in a place of the other slot is
/// rejected: no checkpoint writes there.
///
/// # Errors
/// `NotAPool`, `Unsupported`, `Corrupt` (the damage found, or two superblocks that contradict each
/// other), or the device's.
pub async fn superblock(disk: &Rc<dyn Disk>) -> Result<Superblock> {
    let blocks = disk.len_bytes() / BLOCK_BYTES;
    if blocks < 2 * SUPER_SLOTS {
        return Err(Error::new(ErrorKind::NotAPool, "too short to be a pool"));
    }
    let places = [0, blocks - SUPER_SLOTS].into_iter();
    let places = places.flat_map(|end| (0..SUPER_SLOTS).map(move |slot| (slot, end + slot)));
    let mut newest: Option<Superblock> = None;
    let mut worst: Option<Error> = None;
    for (slot, place) in places.map(|(slot, place)| (slot, BlockNo::new(place))) {
        match superblock_at(disk, slot, place).await {
            Ok(found) => match &newest {
                Some(best) if best.generation > found.generation => {}
                Some(best) if best.generation == found.generation && *best != found => {
                    // One write made both, so one of them was changed since.
                    return Err(Error::corrupt(format!(
                        "superblock at {place}: there is another one of {}, which says otherwise",
                        found.generation
                    )));
                }
                _ => newest = Some(found),
            },
            // An unknown version takes precedence over damage, and damage over a missing
            // superblock.
            Err(error) if error.kind() == ErrorKind::Unsupported => return Err(error),
            Err(error) if error.kind() == ErrorKind::NotAPool => {}
            Err(error) => worst = Some(error),
        }
    }
    let none = || Error::new(ErrorKind::NotAPool, "not a Pando pool: it has no superblock");
    let superblock = newest.ok_or_else(|| worst.unwrap_or_else(none))?;
    if superblock.geometry.pool_blocks > blocks {
        return Err(Error::corrupt(format!(
            "the pool has {} blocks, the file or device only {blocks}: it was truncated",
            superblock.geometry.pool_blocks
        )));
    }
    Ok(superblock)
}

/// Reads the superblock at `place`, which belongs to `slot`.
///
/// # Errors
/// As [`Superblock::decode`]; `Corrupt` for one that belongs into the other slot; the device's.
pub async fn superblock_at(disk: &Rc<dyn Disk>, slot: u64, place: BlockNo) -> Result<Superblock> {
    let buf = read_block(disk, place).await;
    let buf = buf.map_err(|error| error.context(format_args!("superblock at {place}")))?;
    let found = Superblock::decode(buf.as_bytes(), place)?;
    if u64::from(found.generation.get()) % SUPER_SLOTS != slot {
        return Err(Error::corrupt(format!(
            "superblock at {place}: {} belongs into the other slot",
            found.generation
        )));
    }
    Ok(found)
}

/// Overwrites the remains of a superblock that a power failure tore, so that it cannot become valid
/// again. Its place is where the next superblock is written. If that write were torn too, in
/// exactly the sectors that the first one lacks, the old superblock would be whole and newer than
/// `newest`, although its blocks were reused.
///
/// # Errors
/// The device's, also if neither place can be read: either could hold the newest superblock.
pub(crate) async fn forget_torn(disk: &Rc<dyn Disk>, newest: &Superblock) -> Result<()> {
    let next = 1 - u64::from(newest.generation.get()) % SUPER_SLOTS;
    let (mut torn, mut unreadable) = (Vec::new(), Vec::new());
    for place in newest.geometry.super_places(next) {
        match read_block(disk, place).await {
            Err(error) => {
                torn.push(place);
                unreadable.push(error.context(format_args!("superblock at {place}")));
            }
            Ok(buf) if buf.as_bytes().iter().all(|byte| *byte == 0) => {}
            Ok(buf) if Superblock::decode(buf.as_bytes(), place).is_ok() => {}
            Ok(_) => torn.push(place),
        }
    }
    if let [_, error] = unreadable.as_slice() {
        return Err(error.duplicate());
    }
    for place in &torn {
        disk.write(*place, vec![Buf::zeroed(1)]).await?;
    }
    if torn.is_empty() { Ok(()) } else { disk.sync().await }
}

/// The catalogue that a superblock points to.
///
/// # Errors
/// `Corrupt`, naming the block, or the device's.
pub async fn catalogue(disk: &Rc<dyn Disk>, superblock: &Superblock) -> Result<Found> {
    let found = catalogue_as_is(disk, superblock).await?;
    check(superblock, &found.catalogue)?;
    Ok(found)
}

/// The catalogue without a check of its content, so that the checker can report all that is wrong.
///
/// # Errors
/// `Corrupt`, naming the block, or the device's.
pub(crate) async fn catalogue_as_is(disk: &Rc<dyn Disk>, superblock: &Superblock) -> Result<Found> {
    let mut chain = ChainReader::new(
        superblock.uuid,
        superblock.generation,
        superblock.catalogue,
        superblock.catalogue_bytes,
    )?;
    while let Some(place) = chain.wants() {
        if superblock.geometry.locate(place).is_none() {
            return Err(Error::corrupt(format!("catalogue: {place} is out of bounds")));
        }
        let buf = read_block(disk, place).await?;
        chain.take(buf.as_bytes())?;
    }
    let (catalogue_blocks, bytes) = chain.finish();
    let catalogue: Catalogue = decode_catalogue(&bytes)?;
    Ok(Found { catalogue, catalogue_blocks })
}

/// Checks what later code relies on.
fn check(superblock: &Superblock, catalogue: &Catalogue) -> Result<()> {
    let bad = |what: String| Err(Error::corrupt(format!("catalogue: {what}")));
    let geometry = superblock.geometry;
    if to_u64(catalogue.groups.len()) != geometry.groups() {
        return bad(format!("{} groups", catalogue.groups.len()));
    }
    for (group, entry) in (0..).zip(&catalogue.groups) {
        let too_new = entry.generation > superblock.generation;
        if too_new || entry.slot > 1 || u64::from(entry.free) > geometry.group_len(group) {
            return bad(format!("entry of group {group} is impossible"));
        }
    }
    if catalogue.next_id > VOLUME_ID_MAX {
        return bad(format!("the next volume is said to be {}", catalogue.next_id));
    }
    let mut last = None;
    let mut names = std::collections::BTreeSet::new();
    for volume in &catalogue.volumes {
        if last >= Some(volume.id) || volume.id.get() >= catalogue.next_id {
            return bad(format!("{} is out of order", volume.id));
        }
        last = Some(volume.id);
        if !names.insert(&volume.name) {
            return bad(format!("two volumes are named {}", volume.name));
        }
        crate::state::check_entry(volume).map_err(|e| e.context("catalogue"))?;
        if let Some(root) = &volume.root
            && (geometry.locate(root.ptr.block).is_none()
                || usize::from(root.level) >= crate::limits::MAP_LEVELS_MAX
                || root.ptr.birth > superblock.seal)
        {
            return bad(format!("the map of volume {} is impossible", volume.name));
        }
    }
    if catalogue.drops.iter().any(|drop| geometry.locate(drop.block).is_none()) {
        return bad("a deletion is out of bounds".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
