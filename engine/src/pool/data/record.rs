//! From a change to a record: prepare, append and apply, in one critical section (I3).

use crate::error::{Error, ErrorKind, Result};
use crate::format::record::Record;
use crate::pool::core::{Inner, Pool};
use crate::pool::data::fetch::Pin;
use crate::state::Need;
use crate::units::Seqno;

/// Why a record cannot be appended now.
pub(crate) enum Obstacle {
    /// Something must be fetched first.
    Need(Need),
    /// The journal or the cache of dirty nodes is nearly full: a checkpoint after this number of
    /// published ones must complete first.
    Checkpoint(u64),
    /// The memory of the journal is full: records up to this one must be flushed first.
    Flush(Seqno),
}

impl Inner {
    /// Appends and applies `record`. Returns the obstacle, with nothing changed, if it cannot.
    pub(crate) fn try_record(
        &mut self,
        record: Record,
    ) -> std::result::Result<Seqno, (Record, Obstacle)> {
        if !self.journal.can_ever_hold(record.payload_bytes()) {
            let error = Error::new(ErrorKind::Limit, "the change is too large for the journal");
            return Err((record, Obstacle::Need(Need::Refused(error))));
        }
        if !self.journal.has_room(record.payload_bytes()) || self.is_crowded() {
            let published = self.published;
            return Err((record, Obstacle::Checkpoint(published)));
        }
        if !self.journal.has_memory(record.payload_bytes()) {
            return Err((record, Obstacle::Flush(self.state.seqno)));
        }
        if let Err(need) = self.state.prepare(&record) {
            return Err((record, Obstacle::Need(need)));
        }
        let seqno = self.state.seqno.next();
        if let Err(error) = self.journal.append(seqno, self.durable, &record) {
            return Err((record, Obstacle::Need(Need::Refused(error))));
        }
        let changed = match &record {
            Record::Modify(new) => Some(new.id),
            Record::Delete(id) => Some(*id),
            Record::Map { .. } | Record::Unmap { .. } | Record::Create(_) => None,
        };
        self.state.apply(seqno, record);
        if let Some(id) = changed {
            self.update_live(id);
        }
        Ok(seqno)
    }

    /// Whether a checkpoint should be started: about half of some resource is used.
    pub(crate) fn wants_checkpoint(&self) -> bool {
        self.journal.used_bytes() > self.journal.ring_bytes() / 2
            || self.state.cache.dirty_len() > self.state.cache.capacity() / 2
            || self.state.log.len() > LOG_WANTED
            || self.state.sums.len() > SUM_PAGES_WANTED
    }

    /// Whether records must wait for a checkpoint, because memory is nearly full.
    fn is_crowded(&self) -> bool {
        self.state.cache.dirty_len() > self.state.cache.capacity() / 8 * 7
            || self.state.log.len() > 2 * LOG_WANTED
            || self.state.sums.len() > 2 * SUM_PAGES_WANTED
    }
}

/// Entries in the log of reference changes that trigger a checkpoint: 8 MiB of them.
const LOG_WANTED: usize = 512 << 10;
/// Pages of fresh checksums that trigger a checkpoint: 8 MiB of them.
const SUM_PAGES_WANTED: usize = 2048;

impl Pool {
    /// Builds a record from the current state, appends and applies it. `build` is called again
    /// after each obstacle, since the state may have changed meanwhile.
    pub(crate) async fn transact<T>(
        &self,
        mut build: impl FnMut(&Inner) -> Result<(Option<Record>, T)>,
    ) -> Result<(Seqno, T)> {
        loop {
            let (obstacle, pin) = {
                let mut inner = self.core.lock();
                inner.check_alive()?;
                let (record, answer) = build(&inner)?;
                let Some(record) = record else { return Ok((inner.state.seqno, answer)) };
                match inner.try_record(record) {
                    Ok(seqno) => {
                        let wanted = inner.wants_checkpoint();
                        drop(inner);
                        if wanted {
                            self.core.want_checkpoint();
                        }
                        return Ok((seqno, answer));
                    }
                    Err((_, obstacle)) => (obstacle, Pin::new(self, &mut inner)),
                }
            };
            self.overcome(obstacle, pin).await?;
        }
    }

    /// Removes an obstacle. `pin` was taken in the critical section that met the obstacle: it keeps a
    /// missing node from being overwritten until the node is read. It must not be held for longer: a
    /// task that waits for space while it pins freed blocks would wait for itself.
    pub(crate) async fn overcome(&self, obstacle: Obstacle, pin: Pin) -> Result<()> {
        match obstacle {
            Obstacle::Need(need @ Need::Node(_)) => {
                let fetched = self.fetch(need).await;
                drop(pin);
                fetched
            }
            Obstacle::Need(need) => {
                drop(pin);
                self.fetch(need).await
            }
            Obstacle::Checkpoint(published) => {
                drop(pin);
                self.await_published(published).await
            }
            Obstacle::Flush(seqno) => {
                drop(pin);
                self.commit(seqno).await
            }
        }
    }
}
