//! Where two maps differ, without looking at what they share.
//!
//! ```text
//! old:      [ a ]             At each LBA both trees are descended level by level, the higher
//!          /  |  \            one first. Nodes on the same block hold the same extents, so the
//!        [b] [c] [d]          walk jumps behind them: here it looks at a, e, c and f, and at
//!         |       |           nothing below b and d.
//! new:   [b] [f] [d]
//!          \  |  /
//!           [ e ]
//! ```
//!
//! The work is proportional to the difference: a path of nodes for each leaf that differs.

use std::ops::Range;

use super::lookup::{child_ref, first_overlap};
use super::search::upper_bound;
use super::{Missing, NodeCache, Root};
use crate::format::node::{Entry, LBA_END, LeafEntry, NodeRef};
use crate::units::Lba;

/// Pairs of leaves or shared nodes that one call looks at: well below a millisecond of work.
const STEPS_MAX: usize = 256;

/// A run of LBAs that two maps have on different blocks, or that one of them does not map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiffRun {
    /// First LBA.
    pub lba: Lba,
    /// Blocks.
    pub len: u64,
    /// Whether the new map has blocks there.
    pub mapped_in_new: bool,
}

/// Appends to `out` the runs of `range` in which the map `new` differs from `old`, in order, until
/// `out` holds `runs_max` or enough work is done for one call. Says where to go on; all of `range`
/// is answered when that is its end. A run that goes on where the last one in `out` ends makes
/// that one longer.
///
/// # Errors
/// `Missing` if nothing can be answered without reading that node.
pub fn diff(
    cache: &NodeCache,
    old: Option<&Root>,
    new: Option<&Root>,
    range: Range<Lba>,
    runs_max: usize,
    out: &mut Vec<DiffRun>,
) -> Result<Lba, Missing> {
    let (start, end) = (range.start.get(), range.end.get().min(LBA_END));
    let mut at = start;
    for _ in 0..STEPS_MAX {
        if at >= end {
            return Ok(range.end);
        }
        let meeting = match meet(cache, old, new, at) {
            Ok(meeting) => meeting,
            Err(missing) if at == start => return Err(missing),
            Err(_) => break,
        };
        let until = meeting.end.min(end);
        let Some([old, new]) = meeting.leaves else {
            at = until;
            continue;
        };
        at = compare(old, new, at..until, runs_max, out);
        if at < until {
            break;
        }
    }
    Ok(Lba::new(at))
}

/// What the two maps have at an LBA.
struct Meeting<'a> {
    /// The leaves to compare; `None` if the maps share the node that holds the LBA.
    leaves: Option<[&'a [LeafEntry]; 2]>,
    /// Valid up to here.
    end: u64,
}

/// One of the two descents.
struct Descent {
    /// The node that holds the LBA; none if nothing is mapped before `end`.
    node: Option<NodeRef>,
    end: u64,
}

impl Descent {
    fn new(root: Option<&Root>, at: u64) -> Self {
        match root.map(Root::node_ref) {
            None => Self { node: None, end: LBA_END },
            Some(node) if node.lba.get() > at => Self { node: None, end: node.lba.get() },
            Some(node) => Self { node: Some(node), end: node.end.get() },
        }
    }

    fn level(&self) -> u8 {
        self.node.map_or(0, |node| node.level)
    }

    fn go_down(&mut self, cache: &NodeCache, at: u64) -> Result<(), Missing> {
        if let Some(wanted) = self.node {
            let node = cache.node(cache.resident(&wanted)?);
            let child = upper_bound(node.inner(), &wanted, at).saturating_sub(1);
            let child = child_ref(node, child, wanted.end);
            *self = Self { node: Some(child), end: child.end.get() };
        }
        Ok(())
    }

    /// The entries of the leaf that end after `at`.
    fn leaf<'a>(&self, cache: &'a NodeCache, at: u64) -> Result<&'a [LeafEntry], Missing> {
        match &self.node {
            Some(node) => {
                let leaf = cache.node(cache.resident(node)?).leaf();
                Ok(&leaf[first_overlap(leaf, node, at)..])
            }
            None => Ok(&[]),
        }
    }
}

fn meet<'a>(
    cache: &'a NodeCache,
    old: Option<&Root>,
    new: Option<&Root>,
    at: u64,
) -> Result<Meeting<'a>, Missing> {
    let mut sides = [Descent::new(old, at), Descent::new(new, at)];
    loop {
        let [old, new] = &sides;
        let end = old.end.min(new.end);
        let place = |side: &Descent| side.node.map(|node| (node.block, node.birth));
        if place(old) == place(new) {
            return Ok(Meeting { leaves: None, end });
        }
        let level = old.level().max(new.level());
        if level == 0 {
            let leaves = Some([old.leaf(cache, at)?, new.leaf(cache, at)?]);
            return Ok(Meeting { leaves, end });
        }
        for side in &mut sides {
            if side.level() == level {
                side.go_down(cache, at)?;
            }
        }
    }
}

/// Compares what two leaves have in `range`, both from its start on; says how far `out` had room.
fn compare(
    old: &[LeafEntry],
    new: &[LeafEntry],
    range: Range<u64>,
    runs_max: usize,
    out: &mut Vec<DiffRun>,
) -> u64 {
    let mut at = range.start;
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    while at < range.end {
        let (old_block, old_end) = piece(&mut old, at);
        let (new_block, new_end) = piece(&mut new, at);
        let until = old_end.min(new_end).min(range.end);
        let mapped_in_new = new_block.is_some();
        if old_block != new_block && !add(out, at..until, mapped_in_new, runs_max) {
            return at;
        }
        at = until;
    }
    at
}

/// The block at `at` and where the extent, or the gap, ends. `entries` begin with the first
/// extent that ends after the last `at` asked for.
fn piece<'a>(
    entries: &mut std::iter::Peekable<impl Iterator<Item = &'a LeafEntry>>,
    at: u64,
) -> (Option<u64>, u64) {
    while entries.next_if(|entry| entry.end() <= at).is_some() {}
    match entries.peek() {
        None => (None, u64::MAX),
        Some(entry) if entry.key() > at => (None, entry.key()),
        Some(entry) => (Some(entry.extent().block.get() + (at - entry.key())), entry.end()),
    }
}

/// Adds a run to `out`; false if there is no room.
fn add(out: &mut Vec<DiffRun>, run: Range<u64>, mapped_in_new: bool, runs_max: usize) -> bool {
    let len = run.end - run.start;
    if let Some(last) = out.last_mut() {
        let goes_on = last.lba.get() + last.len == run.start;
        if goes_on && last.mapped_in_new == mapped_in_new {
            last.len += len;
            return true;
        }
    }
    if out.len() >= runs_max {
        return false;
    }
    out.push(DiffRun { lba: Lba::new(run.start), len, mapped_in_new });
    true
}
