//! Every bound of the engine, with its arithmetic. What has no bound here has none.

use std::time::Duration;

use crate::units::{BLOCK_BYTES, to_u64};

/// Largest volume: 64 TiB.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;
/// Smallest volume: one block.
pub const VOLUME_BYTES_MIN: u64 = BLOCK_BYTES;
/// LBAs of the largest volume: 2^34.
pub const VOLUME_BLOCKS_MAX: u64 = VOLUME_BYTES_MAX / BLOCK_BYTES;
/// Largest pool: 64 TiB.
pub const POOL_BYTES_MAX: u64 = 64 << 40;
/// Volumes and snapshots in a pool. 64 Ki entries of about 250 bytes are a 16 MiB catalogue.
pub const VOLUMES_MAX: usize = 1 << 16;
/// Largest identity of a volume: no pool lives long enough to come there.
pub const VOLUME_ID_MAX: u64 = 1 << 62;
/// Largest sequence number.
pub const SEQNO_MAX: u64 = 1 << 62;
/// Sequence numbers left out when a pool is opened: more than records fit into the largest journal
/// (1 GiB of records of 48 bytes or more). There are 2^30 of such steps.
pub const SEQNOS_SKIPPED: u64 = 1 << 32;
/// Generations left out when a pool is opened: the one that a dead life may have begun to write. An
/// even number, so that the next checkpoint goes to the other slot as always.
pub const GENERATIONS_SKIPPED: u32 = 2;
/// Largest generation: a checkpoint a second for 130 years.
pub const GENERATION_MAX: u32 = u32::MAX - 1024;
/// Bytes in a name of a volume.
pub const NAME_BYTES_MAX: usize = 253;
/// Labels on a volume.
pub const LABELS_MAX: usize = 32;
/// Bytes of a label's key and value together.
pub const LABEL_BYTES_MAX: usize = 512;
/// Bytes of one request at the volume interface (NBD's customary bound).
pub const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Memory in which records wait for their flush: those of some 50,000 small writes.
pub const RING_MEMORY_BYTES: usize = 4 << 20;
/// Blocks mapped by one extent: a 16-bit length.
pub const EXTENT_BLOCKS_MAX: u64 = 65535;
/// Volumes in one atomic snapshot or clone of several.
pub const GROUP_MAX: usize = 64;
/// Bytes of one record's payload in the journal; the crc of a record covers at most this.
pub const RECORD_BYTES_MAX: usize = 48 << 10;
/// Blocks that one record maps: 256 x (4 bytes crc + at most 32 bytes extent) = 9 KiB.
pub const RECORD_BLOCKS_MAX: usize = 256;
/// Blocks of data written since the last sync that call for one: recovery reads every block that
/// may not have been durable, so this bounds its time (128 MiB).
pub const UNSYNCED_BLOCKS_WANTED: u64 = 32 << 10;
/// Bytes of the encoded catalogue that a reader accepts.
pub const CATALOGUE_BYTES_MAX: usize = 64 << 20;
/// Bytes of the entries of all volumes in it, of 149 bytes each with their names and labels. What is
/// left is for the groups of the largest pool (66 Ki of 9 bytes) and for deletions.
pub const VOLUME_ENTRIES_BYTES_MAX: u64 = 48 << 20;
/// Deletions of 16 bytes that wait in the catalogue: with more, a checkpoint works off more of them.
/// Few in unit tests, which cannot make half a million.
pub const DROPS_WAITING_MAX: usize = if cfg!(test) { 600 } else { 1 << 19 };
/// Levels of a map. 2^34 LBAs, one an extent, in half-full nodes: 126 * 50^5 > 2^34.
pub const MAP_LEVELS_MAX: usize = 10;
/// Nodes given up by one checkpoint's cascade of deletions; the rest waits for the next.
pub const CASCADE_NODES_MAX: usize = 1024;
/// Blocks of the aligned units in which free space is discarded: 1 MiB. A discard of less costs the
/// device and the writes beside it more than its space is worth.
pub const DISCARD_UNIT_BLOCKS: u64 = 256;
/// Blocks in one discard: 8 MiB. Nobody gets them, and a host's file system may let no write into its
/// file, while it lasts.
pub const DISCARD_BLOCKS_MAX: u64 = 8 * DISCARD_UNIT_BLOCKS;
/// Least time between two discards: at most 800 MiB are discarded in a second.
pub const DISCARD_PAUSE_MIN: Duration = Duration::from_millis(10);
/// The time between two discards, in times that the first took.
pub const DISCARD_REST: u32 = 9;
/// Names in one page of a list.
pub const LIST_PAGE_MAX: usize = 1000;

const _: () = assert!(VOLUME_BLOCKS_MAX <= 1 << 40, "an LBA has 48 bits in a leaf entry");
const _: () = assert!(VOLUME_ENTRIES_BYTES_MAX + (12 << 20) < to_u64(CATALOGUE_BYTES_MAX));
const _: () = assert!(RECORD_BLOCKS_MAX * 36 + 256 < RECORD_BYTES_MAX);
