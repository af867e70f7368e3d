//! The simulated disk's [`Disk`] for the code under test: its operations wait for the driver.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::driver::{Outcome, Progress, State, Work};
use super::fault::FaultOp;
use super::image::{Bytes, Content, Stored};
use super::timer::Key;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::runtime::sync::Mutex;
use crate::runtime::{Buf, Clock, LocalFuture};
use crate::units::{BLOCK_BYTES, BlockNo};

/// The handle of the code under test.
pub(super) struct Handle {
    state: Arc<Mutex<State>>,
}

impl Handle {
    pub(super) const fn new(state: Arc<Mutex<State>>) -> Self {
        Self { state }
    }

    async fn finish(&self, key: Option<usize>, what: &str, at: BlockNo) -> Result<Vec<Content>> {
        match (Waiting { state: &self.state, key }).await {
            Outcome::Done(blocks) => Ok(blocks),
            Outcome::Failed(errno) => Err(Error::io(
                format!("{what} at {at} of the simulated disk"),
                io::Error::from_raw_os_error(errno),
            )),
        }
    }
}

/// An operation under way; it has no key if the power failed before it started.
struct Waiting<'a> {
    state: &'a Mutex<State>,
    key: Option<usize>,
}

impl Future for Waiting<'_> {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        let Some(key) = self.key else { return Poll::Pending };
        let mut state = self.state.lock();
        if state.halted {
            return Poll::Pending;
        }
        if let Progress::InFlight(waker) = &mut state.ops[key].progress {
            *waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        let outcome = state.take(key).expect("an operation that is awaited is not abandoned");
        drop(state);
        self.key = None;
        Poll::Ready(outcome)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut state = self.state.lock();
        if let Progress::InFlight(_) = state.ops[key].progress {
            state.ops[key].progress = Progress::Abandoned;
        } else {
            state.take(key);
        }
    }
}

impl Clock for Handle {
    fn now(&self) -> Duration {
        self.state.lock().timers.now()
    }

    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()> {
        Box::pin(Sleep::new(&self.state, time))
    }
}

impl Disk for Handle {
    fn len_bytes(&self) -> u64 {
        self.state.lock().len_bytes()
    }

    fn read(&self, at: BlockNo, mut buf: Buf) -> LocalFuture<'_, (Buf, Result<()>)> {
        Box::pin(async move {
            let key = {
                let mut state = self.state.lock();
                if let Err(error) = state.check_range(at, buf.block_count()) {
                    return (buf, Err(error));
                }
                let work = Work::Read { at: at.get(), count: buf.block_count() };
                state.submit(FaultOp::Read, work, at.get(), buf.block_count())
            };
            match self.finish(key, "read", at).await {
                Ok(blocks) => {
                    let targets = buf.as_mut_bytes().chunks_exact_mut(size_of::<Bytes>());
                    for (target, block) in targets.zip(&blocks) {
                        match block {
                            Some(block) => target.copy_from_slice(block.bytes()),
                            None => target.fill(0),
                        }
                    }
                    (buf, Ok(()))
                }
                Err(error) => (buf, Err(error)),
            }
        })
    }

    fn write(&self, at: BlockNo, bufs: Vec<Buf>) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let key = {
                let mut state = self.state.lock();
                let count = bufs.iter().map(Buf::block_count).sum();
                state.check_range(at, count)?;
                let write = state.new_write();
                let key = state.submit(FaultOp::Write, Work::Write(write), at.get(), count);
                let blocks = bufs.iter().flat_map(Buf::iter_blocks).map(|bytes| {
                    let bytes: &Bytes = bytes.try_into().expect("a block");
                    Some(Arc::new(Stored::new(*bytes)))
                });
                state.add_pieces(key, at.get(), blocks.collect());
                key
            };
            self.finish(key, "write", at).await.map(drop)
        })
    }

    fn sync(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let key = {
                let mut state = self.state.lock();
                let asked_at = state.moment();
                let len_blocks = state.current.len_blocks();
                state.submit(FaultOp::Sync, Work::Sync { asked_at, len_blocks }, 0, 0)
            };
            self.finish(key, "sync", BlockNo::new(0)).await.map(drop)
        })
    }

    fn discard(&self, at: BlockNo, count: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let key = {
                let mut state = self.state.lock();
                state.check_range(at, count)?;
                let write = state.new_write();
                let key = state.submit(FaultOp::Discard, Work::Write(write), at.get(), count);
                // A device may discard or do nothing; the code must rely on neither.
                let blocks: Vec<Content> = (at.get()..at.get() + count)
                    .map(|block| {
                        let old = state.current.shared(block).cloned();
                        if state.rng.chance(8) { old } else { None }
                    })
                    .collect();
                state.add_pieces(key, at.get(), blocks);
                key
            };
            self.finish(key, "discard", at).await.map(drop)
        })
    }

    fn extend(&self, len_bytes: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.state.lock().current.extend(len_bytes / BLOCK_BYTES);
            Ok(())
        })
    }
}

/// Waits until a moment of simulated time.
pub(super) struct Sleep<'a> {
    state: &'a Mutex<State>,
    key: Key,
}

impl<'a> Sleep<'a> {
    pub(super) fn new(state: &'a Mutex<State>, time: Duration) -> Self {
        let timers = &mut state.lock().timers;
        timers.next += 1;
        Self { state, key: (timers.now.saturating_add(time), timers.next) }
    }
}

impl Future for Sleep<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if state.halted {
            return Poll::Pending;
        }
        if self.key.0 <= state.timers.now {
            return Poll::Ready(());
        }
        state.timers.waiting.insert(self.key, context.waker().clone());
        state.served.something_to_do();
        Poll::Pending
    }
}

impl Drop for Sleep<'_> {
    fn drop(&mut self) {
        self.state.lock().timers.waiting.remove(&self.key);
    }
}
