//! A disk that judges each discard of an open pool: every block of it is out of the free ones for
//! the time, no checkpoint and no change since refers to it, and no lock is held.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use pando_engine::disk::Disk;
use pando_engine::error::Result;
use pando_engine::format::geometry::Table;
use pando_engine::format::group::BlockType;
use pando_engine::map::RefDelta;
use pando_engine::pool::probe::Probe;
use pando_engine::runtime::{Buf, Clock, LocalFuture};
use pando_engine::space::Run;
use pando_engine::state::State;
use pando_engine::units::BlockNo;

/// The judge. Cheap to clone; all clones are the same.
#[derive(Clone, Default)]
pub struct DiscardJudge(Rc<RefCell<Option<Probe>>>);

impl DiscardJudge {
    /// The disk to open the pool on.
    #[must_use]
    pub fn before(&self, disk: Rc<dyn Disk>) -> Rc<dyn Disk> {
        Rc::new(Judged { judge: self.clone(), disk })
    }

    /// The pool is open.
    pub fn watch(&self, probe: Probe) {
        *self.0.borrow_mut() = Some(probe);
    }

    fn judge(&self, run: Run) {
        let probe = self.0.borrow().clone().expect("an open pool discards");
        probe.look_unlocked(|inside| judge(inside.state, run));
    }
}

/// Nothing refers to any block of `run`, and none of it can be allocated.
fn judge(state: &mut State, run: Run) {
    assert_eq!(state.reuse.discarding(), Some(run), "what is discarded was taken for that");
    let within = |block: BlockNo| block >= run.block && block < run.end();
    for block in (0..run.len).map(|offset| run.block.plus(offset)) {
        assert!(!state.space.is_free(block), "{block} may be allocated during its discard");
        let place = state.geometry.page_of(Table::Refs, block);
        let (page, at) = place.unwrap_or_else(|| panic!("{block} holds no data"));
        // A page that is not in memory cannot be asked here.
        if let Ok(page) = state.tables.page(page) {
            let entry = page.map_or(0, |page| page.get(at));
            let kind = BlockType::of(entry);
            assert_eq!(kind, BlockType::Free, "{block} is in the last checkpoint");
        }
    }
    let meets = |delta: &RefDelta| {
        let changed = Run { block: delta.block, len: u64::from(delta.count) };
        changed.block < run.end() && run.block < changed.end()
    };
    assert!(!state.log.iter().any(meets), "{run:?} was referred to since the last checkpoint");
    assert!(!state.node_blocks.iter().any(|block| within(*block)), "{run:?} is for a node");
}

struct Judged {
    judge: DiscardJudge,
    disk: Rc<dyn Disk>,
}

impl Clock for Judged {
    fn now(&self) -> Duration {
        self.disk.now()
    }

    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()> {
        self.disk.sleep(time)
    }
}

impl Disk for Judged {
    fn len_bytes(&self) -> u64 {
        self.disk.len_bytes()
    }

    fn read(&self, at: BlockNo, buf: Buf) -> LocalFuture<'_, (Buf, Result<()>)> {
        self.disk.read(at, buf)
    }

    fn write(&self, at: BlockNo, bufs: Vec<Buf>) -> LocalFuture<'_, Result<()>> {
        self.disk.write(at, bufs)
    }

    fn sync(&self) -> LocalFuture<'_, Result<()>> {
        self.disk.sync()
    }

    fn discard(&self, at: BlockNo, count: u64) -> LocalFuture<'_, Result<()>> {
        self.judge.judge(Run { block: at, len: count });
        self.disk.discard(at, count)
    }

    fn extend(&self, len_bytes: u64) -> LocalFuture<'_, Result<()>> {
        self.disk.extend(len_bytes)
    }
}
