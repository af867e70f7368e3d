//! Walks of live maps: the mapped runs of a volume, and the differences between two volumes.

use crate::device::MappedRun;
use crate::error::{Error, ErrorKind, Result};
use crate::map::{self, DiffRun, Extent};
use crate::pool::core::{Inner, Pool};
use crate::pool::data::fetch::Pin;
use crate::pool::types::ChangedRun;
use crate::state::{Need, Volume};
use crate::units::{BLOCK_BYTES, Lba, VolumeId, blocks_for};

/// Extents per look-up.
const EXTENTS: usize = 1024;
/// Maximum of changed runs per call.
const CHANGED_MAX: usize = 1 << 16;

impl Inner {
    fn known(&self, id: VolumeId) -> Result<&Volume> {
        let deleted = || Error::new(ErrorKind::NotFound, format!("{id} was deleted"));
        self.state.volume(id).ok_or_else(deleted)
    }
}

impl Pool {
    /// Extents of a volume in `[from, end)`, clipped, and the LBA up to which they were looked up:
    /// at least one step on.
    pub(crate) async fn extents(
        &self,
        volume: VolumeId,
        from: Lba,
        end: Lba,
    ) -> Result<(Vec<Extent>, Lba)> {
        let _pin = self.pin();
        let mut extents = Vec::new();
        loop {
            let found = {
                let inner = self.core.lock();
                let volume = inner.known(volume)?;
                let (root, len) = (volume.entry.root.as_ref(), end.get() - from.get());
                map::lookup(&inner.state.cache, root, from, len, EXTENTS, &mut extents)
            };
            match found {
                Ok(answered) => return Ok((extents, from.plus(answered))),
                Err(missing) => self.fetch(Need::Node(missing)).await?,
            }
        }
    }

    /// Mapped and unmapped runs of `[offset, end)` in bytes, in order, at most `max_runs`.
    pub(crate) async fn mapped_runs(
        &self,
        volume: VolumeId,
        offset: u64,
        end: u64,
        max_runs: usize,
    ) -> Result<Vec<MappedRun>> {
        let mut runs = Runs { runs: Vec::new(), at: offset, end, max: max_runs.max(1) };
        let last = Lba::new(blocks_for(end));
        let mut from = Lba::new(offset / BLOCK_BYTES);
        while from < last && !runs.is_full() {
            let (extents, next) = self.extents(volume, from, last).await?;
            for extent in extents {
                let start = extent.lba.get() * BLOCK_BYTES;
                runs.push(start, false);
                runs.push(start + extent.len * BLOCK_BYTES, true);
            }
            runs.push(next.get() * BLOCK_BYTES, false);
            from = next;
        }
        Ok(runs.runs)
    }

    /// Runs in which `new` differs from `old`, from byte `offset` on, in order, at most `max_runs`
    /// (and 65536), clipped to the size of `new`. Without `old`: the runs that `new` maps. Also
    /// returns the offset to continue at, if there is more. The work is proportional to the
    /// difference. The volumes are read in their current state, so compare snapshots to get a
    /// consistent result.
    /// at as it is at that moment: compare snapshots for one instant.
    ///
    /// `NotFound`, or damage that was found.
    /// `NotFound`, or damage met.
    pub async fn changed(
        &self,
        old: Option<VolumeId>,
        new: VolumeId,
        offset: u64,
        max_runs: usize,
    ) -> Result<(Vec<ChangedRun>, Option<u64>)> {
        let max = max_runs.clamp(1, CHANGED_MAX);
        let size = self.core.lock().known(new)?.entry.size_bytes;
        let end = Lba::new(blocks_for(size));
        let mut runs = Vec::new();
        let mut at = Lba::new(offset / BLOCK_BYTES);
        while at < end {
            let next = self.changed_step(old, new, at..end, max, &mut runs).await?;
            if next == at {
                break; // `runs` has no room for the next run.
            }
            at = next;
        }
        let clip = |run: &DiffRun| {
            let start = (run.lba.get() * BLOCK_BYTES).max(offset);
            let to = ((run.lba.get() + run.len) * BLOCK_BYTES).min(size);
            let len = to.saturating_sub(start);
            (len > 0).then_some(ChangedRun { offset: start, len, mapped: run.mapped_in_new })
        };
        let next = (at < end).then(|| at.get() * BLOCK_BYTES);
        Ok((runs.iter().filter_map(clip).collect(), next))
    }

    /// Adds the result of one call of [`map::diff`] to `runs`; returns the LBA to continue at.
    async fn changed_step(
        &self,
        old: Option<VolumeId>,
        new: VolumeId,
        range: std::ops::Range<Lba>,
        max: usize,
        runs: &mut Vec<DiffRun>,
    ) -> Result<Lba> {
        let mut pin = None;
        loop {
            let missing = {
                let mut inner = self.core.lock();
                if pin.is_none() {
                    pin = Some(Pin::new(self, &mut inner));
                }
                let old = old.map(|old| inner.known(old)).transpose()?;
                let old = old.and_then(|volume| volume.entry.root.as_ref());
                let new = inner.known(new)?.entry.root.as_ref();
                match map::diff(&inner.state.cache, old, new, range.clone(), max, runs) {
                    Ok(next) => return Ok(next),
                    Err(missing) => missing,
                }
            };
            self.fetch(Need::Node(missing)).await?;
        }
    }
}

/// Builds runs from pieces: adjacent pieces of the same kind are merged.
struct Runs {
    runs: Vec<MappedRun>,
    at: u64,
    end: u64,
    max: usize,
}

impl Runs {
    /// Appends a piece of one kind from the end of the last run up to `to`.
    fn push(&mut self, to: u64, mapped: bool) {
        let to = to.min(self.end);
        if to <= self.at {
            return;
        }
        let len = to - self.at;
        let full = self.is_full();
        match self.runs.last_mut() {
            Some(last) if last.mapped == mapped => last.len += len,
            _ if full => {
                self.end = self.at; // Later pieces would not be adjacent to the last run.
                return;
            }
            _ => self.runs.push(MappedRun { offset: self.at, len, mapped }),
        }
        self.at = to;
    }

    /// Whether there are as many runs as requested: the caller continues after the last.
    fn is_full(&self) -> bool {
        self.runs.len() == self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_and_bounded() {
        let mut runs = Runs { runs: vec![], at: 512, end: 20_000, max: 2 };
        runs.push(4096, false);
        runs.push(4096, true);
        runs.push(8192, true);
        runs.push(12_288, true);
        runs.push(16_384, false);
        runs.push(20_480, true);
        let got: Vec<_> = runs.runs.iter().map(|r| (r.offset, r.len, r.mapped)).collect();
        assert_eq!(got, [(512, 3584, false), (4096, 8192, true)]);
        assert!(runs.is_full());
    }
}
