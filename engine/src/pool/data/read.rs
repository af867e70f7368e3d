//! The read path: look up and pin the extents, read, verify the checksum of every block, unpin. A
//! mismatch is an I/O error that names volume, LBA and block; bad data is never returned.

use futures_util::future::join_all;

use crate::crc::crc32;
use crate::error::{Error, ErrorKind, Result};
use crate::map::{self, Extent, Missing};
use crate::pool::core::{Inner, Pool, count};
use crate::pool::data::fetch::Pin;
use crate::runtime::Buf;
use crate::space::MissingTable;
use crate::state::Need;
use crate::units::{BLOCK_SIZE, BlockNo, Lba, VolumeId, to_usize};

/// Extents of one request that are read concurrently.
const PARALLEL: usize = 64;

/// The extents of a range of a volume, with the checksums to verify.
struct Plan {
    extents: Vec<Extent>,
    sums: Vec<u32>,
}

enum PlanMiss {
    Node(Missing),
    Table(MissingTable),
}

impl Inner {
    /// Extends `plan` from `lba + done` on. Advances `done`, or returns what is missing.
    fn plan(
        &mut self,
        volume: VolumeId,
        lba: Lba,
        len: u64,
        plan: &mut Plan,
        done: &mut u64,
    ) -> Result<Option<PlanMiss>> {
        let Some(found) = self.state.volumes.get(&volume) else {
            return Err(Error::new(ErrorKind::NotFound, format!("{volume} was deleted")));
        };
        let root = found.entry.root.as_ref();
        while *done < len {
            let at = lba.plus(*done);
            let left = len - *done;
            let room = to_usize(left);
            match map::lookup(&self.state.cache, root, at, left, room, &mut plan.extents) {
                Ok(answered) => *done += answered,
                Err(missing) => return Ok(Some(PlanMiss::Node(missing))),
            }
        }
        let mut known = plan.sums.len();
        for extent in &plan.extents {
            let len = to_usize(extent.len);
            if known >= len {
                known -= len; // Looked up before the last miss.
                continue;
            }
            for offset in known..len {
                let block = extent.block.plus(crate::units::to_u64(offset));
                match self.state.sum_of(block) {
                    Ok(sum) => plan.sums.push(sum),
                    Err(missing) => return Ok(Some(PlanMiss::Table(missing))),
                }
            }
            known = 0;
        }
        Ok(None)
    }
}

impl Pool {
    /// Reads `len` blocks. Also returns the block of the first LBA, if it is mapped.
    pub(crate) async fn read_blocks(
        &self,
        volume: VolumeId,
        lba: Lba,
        len: u64,
    ) -> Result<(Buf, Option<BlockNo>)> {
        let (plan, _pin) = self.plan_read(volume, lba, len).await?;
        let first = plan.extents.first().filter(|e| e.lba == lba).map(|e| e.block);
        let buf = match plan.extents.as_slice() {
            [] => Buf::zeroed(to_usize(len)),
            [only] if only.len == len => {
                self.read_extent(volume, only, &plan.sums, Buf::new(to_usize(len))).await?
            }
            _ => self.read_pieces(volume, lba, len, &plan).await?,
        };
        Ok((buf, first))
    }

    async fn plan_read(&self, volume: VolumeId, lba: Lba, len: u64) -> Result<(Plan, Pin)> {
        let mut plan = Plan { extents: Vec::with_capacity(1), sums: Vec::new() };
        let mut done = 0;
        // The volume may change between two attempts. An extent found before a miss is the state at
        // that moment, and the pin keeps its blocks readable.
        let mut pin = None;
        loop {
            let miss = {
                let mut inner = self.core.lock();
                if pin.is_none() {
                    pin = Some(Pin::new(self, &mut inner));
                }
                inner.plan(volume, lba, len, &mut plan, &mut done)
            };
            match miss? {
                None => return Ok((plan, pin.expect("pinned before the first look-up"))),
                Some(PlanMiss::Node(missing)) => self.fetch(Need::Node(missing)).await?,
                Some(PlanMiss::Table(missing)) => self.load_table(missing).await?,
            }
        }
    }

    async fn read_pieces(&self, volume: VolumeId, lba: Lba, len: u64, plan: &Plan) -> Result<Buf> {
        let mut whole = Buf::zeroed(to_usize(len));
        let mut sums = plan.sums.as_slice();
        for some in plan.extents.chunks(PARALLEL) {
            let mut reads = Vec::with_capacity(some.len());
            for extent in some {
                let (mine, rest) = sums.split_at(to_usize(extent.len));
                sums = rest;
                reads.push(self.read_extent(volume, extent, mine, Buf::new(to_usize(extent.len))));
            }
            for (extent, piece) in some.iter().zip(join_all(reads).await) {
                let start = to_usize(extent.lba.get() - lba.get()) * BLOCK_SIZE;
                let piece = piece?;
                whole.as_mut_bytes()[start..start + piece.len_bytes()]
                    .copy_from_slice(piece.as_bytes());
            }
        }
        Ok(whole)
    }

    async fn read_extent(
        &self,
        volume: VolumeId,
        extent: &Extent,
        sums: &[u32],
        buf: Buf,
    ) -> Result<Buf> {
        let (buf, result) = self.disk().read(extent.block, buf).await;
        result.map_err(|e| e.context(format_args!("read of {volume} at {}", extent.lba)))?;
        for (offset, (bytes, sum)) in (0..).zip(buf.iter_blocks().zip(sums)) {
            if crc32(bytes) != *sum {
                let (lba, block) = (extent.lba.plus(offset), extent.block.plus(offset));
                return Err(self.mismatch(volume, lba, block));
            }
        }
        Ok(buf)
    }

    fn mismatch(&self, volume: VolumeId, lba: Lba, block: BlockNo) -> Error {
        count(&self.core.counters.checksum_errors, 1);
        let name = self.get(volume).map_or_else(|_| volume.to_string(), |info| info.name);
        tracing::error!(volume = name, %lba, %block, "data does not match its checksum");
        let what = format!("volume {name}, {lba} on {block}: data does not match its checksum");
        Error::new(ErrorKind::Checksum, what)
    }
}
