//! Formatting a file or device as a pool.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use crate::disk::{Disk, HeapRing, RingMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalogue::{Catalogue, GroupEntry};
use crate::format::geometry::{Geometry, SUPER_SLOTS};
use crate::format::superblock::{MAGIC, Superblock};
use crate::journal::Journal;
use crate::map::NodeCache;
use crate::pool::checkpoint::{Checkpointer, Kind};
use crate::pool::core::{Core, Inner, OpenOptions, Pool};
use crate::pool::data::place::Refusals;
use crate::runtime::Buf;
use crate::state::State;
use crate::units::{
    BLOCK_BYTES, BLOCK_SIZE, BlockNo, Generation, Seqno, Size, to_u32, to_u64, to_usize,
};

/// Blocks at either end that are checked for existing data.
const LOOKED_AT: u64 = 32;
/// Blocks of zeros per write.
const ZERO_BLOCKS: u64 = 256;

/// How to format a pool.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Bytes to use; the file or device must be at least as long.
    pub size_bytes: u64,
    /// Bytes of the journal; `None` means a 16th of the pool, at most 64 MiB.
    pub journal_bytes: Option<u64>,
    /// Overwrite existing data.
    pub force: bool,
    /// Identity of the pool.
    pub uuid: [u8; 16],
}

impl FormatOptions {
    /// Checks the sizes, before a file for the pool is created.
    ///
    /// # Errors
    /// `Invalid`, with the size and its bounds.
    pub fn check(&self) -> Result<()> {
        self.geometry().map(|_| ())
    }

    fn geometry(&self) -> Result<Geometry> {
        let pool_blocks = self.size_bytes / BLOCK_BYTES;
        let journal_blocks = self
            .journal_bytes
            .map_or_else(|| Geometry::default_journal_blocks(pool_blocks), |b| b / BLOCK_BYTES);
        Geometry::new(pool_blocks, journal_blocks, Geometry::default_group_pages(pool_blocks))
    }
}

/// Signatures of filesystems, partition tables and others, as (offset, bytes, name).
const MARKS: [(usize, &[u8], &str); 10] = [
    (0, &MAGIC, "a Pando pool"),
    (BLOCK_SIZE, &MAGIC, "a Pando pool"),
    (0x438, &[0x53, 0xEF], "an ext2/3/4 filesystem"),
    (0, b"XFSB", "an XFS filesystem"),
    (0x1_0040, b"_BHRfS_M", "a btrfs filesystem"),
    (512, b"EFI PART", "a GPT partition table"),
    (512, b"LABELONE", "an LVM physical volume"),
    (0, b"LUKS\xBA\xBE", "a LUKS volume"),
    (0, b"QFI\xFB", "a qcow2 image"),
    (510, &[0x55, 0xAA], "a boot sector or partition table"),
];

impl Pool {
    /// Formats a pool. The tables of the groups are not written, since a page that was never
    /// written counts as zero. So the time does not depend on the size of the pool, only on that of
    /// its journal.
    ///
    /// # Errors
    /// `Exists` if there is other data and `force` is not set; `Invalid` for a size that is out of
    /// bounds; the device's.
    pub async fn format(disk: &Rc<dyn Disk>, options: &FormatOptions) -> Result<()> {
        if options.size_bytes > disk.len_bytes() {
            return Err(Error::invalid(format!(
                "a pool of {} does not fit into {}",
                Size(options.size_bytes),
                Size(disk.len_bytes())
            )));
        }
        let geometry = options.geometry()?;
        let Geometry { pool_blocks, journal_blocks, .. } = geometry;
        if !options.force {
            refuse_used(disk, pool_blocks).await?;
        }
        // Superblocks of an old pool go first: a crash in between leaves no pool, not a wrong one.
        let device_blocks = disk.len_bytes() / BLOCK_BYTES;
        let ends = [0, pool_blocks - SUPER_SLOTS, device_blocks - SUPER_SLOTS];
        for end in ends {
            write_zeros(disk, end, SUPER_SLOTS).await?;
        }
        disk.sync().await?;
        // Written, not only allocated: so a journal write never meets a hole, nor ENOSPC of the
        // host's filesystem. The first checkpoint's barrier makes the zeros durable before its
        // superblock.
        write_zeros(disk, geometry.journal_start().get(), journal_blocks).await?;
        first_checkpoint(disk, geometry, options.uuid).await
    }
}

async fn refuse_used(disk: &Rc<dyn Disk>, blocks: u64) -> Result<()> {
    let count = LOOKED_AT.min(blocks);
    for start in [0, blocks - count] {
        let (buf, result) = disk.read(BlockNo::new(start), Buf::new(to_usize(count))).await;
        result?;
        let bytes = buf.as_bytes();
        let marked = MARKS.iter().find(|(at, mark, _)| {
            start == 0 && bytes.get(*at..*at + mark.len()).is_some_and(|found| found == *mark)
        });
        let what = match marked {
            Some((_, _, name)) => *name,
            None if bytes.iter().any(|&byte| byte != 0) => "data that is not a pool's",
            None => continue,
        };
        return Err(Error::new(
            ErrorKind::Exists,
            format!("there is {what} on it; use --force to lose that"),
        ));
    }
    Ok(())
}

async fn write_zeros(disk: &Rc<dyn Disk>, start: u64, count: u64) -> Result<()> {
    let mut done = 0;
    while done < count {
        let blocks = ZERO_BLOCKS.min(count - done);
        let zeros = Buf::zeroed(to_usize(blocks));
        disk.write(BlockNo::new(start + done), vec![zeros]).await?;
        done += blocks;
    }
    Ok(())
}

/// Writes generation 1, with an empty catalogue, as an ordinary checkpoint.
async fn first_checkpoint(disk: &Rc<dyn Disk>, geometry: Geometry, uuid: [u8; 16]) -> Result<()> {
    let entry =
        |group| GroupEntry { free: to_u32(geometry.group_len(group)), ..GroupEntry::default() };
    let groups = (0..geometry.groups()).map(entry).collect();
    let catalogue = Catalogue { next_id: 1, groups, ..Catalogue::default() };
    let superblock = Superblock {
        uuid,
        geometry,
        generation: Generation::new(0),
        catalogue: geometry.block_at(0, 0),
        catalogue_bytes: 0,
        journal_offset: 0,
        seal: Seqno::new(0),
        salt: 0,
        clean: false,
    };
    let options = OpenOptions { cache_bytes: 1 << 20, ..OpenOptions::default() };
    // No record is appended while the pool is being formatted.
    let ring = HeapRing::new(BLOCK_SIZE);
    let checkpointer = Checkpointer { superblock, catalogue_blocks: vec![], drops: vec![] };
    let core = core_of(checkpointer, catalogue, Box::new(ring), options);
    let pool = Pool::attach(core, Rc::clone(disk));
    pool.checkpoint_of(Kind { clean: true, new_salt: true, pool_blocks: None }).await
}

/// The core of a pool in the state of a checkpoint, with an empty journal.
pub(in crate::pool) fn core_of(
    checkpointer: Checkpointer,
    catalogue: Catalogue,
    ring: Box<dyn RingMemory>,
    options: OpenOptions,
) -> Arc<Core> {
    let superblock = &checkpointer.superblock;
    // Three quarters of the cache are for nodes, one quarter is for table pages.
    let blocks = to_usize(options.cache_bytes / BLOCK_BYTES);
    let cache = NodeCache::new(blocks / 4 * 3, superblock.uuid, options.fanout);
    let mut state = State::new(
        superblock.geometry,
        superblock.uuid,
        catalogue,
        superblock.seal,
        cache,
        blocks / 4,
    );
    if options.discard {
        state.space.note_freed(options.discard_unit);
    }
    let ring_bytes = superblock.geometry.journal_blocks * BLOCK_BYTES;
    let journal = Journal::new(ring, ring_bytes, superblock.journal_offset);
    let inner = Inner {
        durable: superblock.seal,
        state,
        journal,
        syncing: false,
        poisoned: None,
        published: 0,
        generation: superblock.generation,
        closing: false,
        catalogue_blocks: to_u64(checkpointer.catalogue_blocks.len()),
        drops_pending: to_u64(checkpointer.drops.len()),
        refusals: Refusals::default(),
        live: BTreeMap::new(),
    };
    Arc::new(Core::new(inner, checkpointer, options))
}
