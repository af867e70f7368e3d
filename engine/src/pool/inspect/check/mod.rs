//! The checker: verifies every structure of the last checkpoint and recounts all references. It
//! changes nothing. It reports each damaged structure with its place and continues with the others.
//!
//! ```text
//! superblock slots (K11) -> catalogue (K13) -> journal (K10, K12)
//!                               |
//!        for each window of groups, as large as fits into memory:
//!          walk all maps and drops: nodes (K1 K2 K3 K9), sums (K14), count references (K6)
//!          compare with the tables (K16): counts (K4 K5 K8 K17), free blocks (K14),
//!          blocks written since by the journal (K10), blocks that an open pool may allocate (K7)
//!        of an open pool: blocks in use or waiting now (K7 K18), its sums in memory (K14)
//! ```
//! The same code checks an open pool and a disk on which no pool is open. A check of an open pool
//! delays further checkpoints: writers are not blocked until the journal is full. Closing the pool
//! ends the check. Data is not read; that is the scrub (K15).

mod count;
mod findings;
#[cfg(test)]
mod kind_tests;
mod live;
mod records;
mod roots;
#[cfg(test)]
mod stop_tests;
mod tables;
#[cfg(test)]
mod tests;
mod trees;

use std::rc::Rc;

pub use findings::{FINDINGS_MAX, Finding, FindingKind, Policy};

use crate::disk::Disk;
use crate::error::Result;
use crate::format::superblock::Superblock;
use crate::pool::checkpoint::load;
use crate::pool::core::Pool;
use crate::pool::inspect::durable::Durable;
use crate::units::Seqno;
use count::{Recount, WINDOW_PAGES, windows};
use findings::Findings;
use records::Written;
use roots::Strict;
use tables::Compare;
use trees::Walk;

/// Result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// The checkpoint that was checked.
    pub generation: u32,
    /// The damage found, at most [`FINDINGS_MAX`]; empty for a sound pool.
    pub findings: Vec<Finding>,
    /// Number of findings that are not listed.
    pub more: u64,
    /// Nodes visited.
    pub nodes: u64,
    /// Data blocks that the maps name; a shared block counts once.
    pub data_blocks: u64,
}

impl Pool {
    /// Checks the pool online, as of its last checkpoint. `progress` is called with the number of
    /// blocks done and the total.
    ///
    /// # Errors
    /// `Shutdown` if the pool is closed meanwhile. Findings are not errors.
    pub async fn check(&self, progress: &dyn Fn(u64, u64)) -> Result<CheckReport> {
        let checkpointer = self.core.checkpointer.lock().await;
        let superblock = checkpointer.superblock.clone();
        let (durable, settled) = {
            let inner = self.core.lock();
            (inner.durable, inner.published > 1)
        };
        let strict = Strict { newest: true, older: settled };
        let check = Check { disk: self.disk(), live: Some(self), window: WINDOW_PAGES };
        check.run(superblock, strict, Some(durable), progress).await
    }
}

/// Checks a disk on which no pool is open, without replaying its journal.
///
/// # Errors
/// If there is no whole superblock: `NotAPool`, `Unsupported`, `Corrupt`, or the device's.
pub async fn check_offline(
    disk: &Rc<dyn Disk>,
    progress: &dyn Fn(u64, u64),
) -> Result<CheckReport> {
    let superblock = load::superblock(disk).await?;
    let strict = Strict { newest: superblock.clean, older: superblock.clean };
    let check = Check { disk, live: None, window: WINDOW_PAGES };
    check.run(superblock, strict, None, progress).await
}

/// State of one check.
struct Check<'a> {
    disk: &'a Rc<dyn Disk>,
    live: Option<&'a Pool>,
    /// Maximum of count pages in memory.
    window: u64,
}

impl Check<'_> {
    async fn run(
        &self,
        superblock: Superblock,
        strict: Strict,
        durable: Option<Seqno>,
        progress: &dyn Fn(u64, u64),
    ) -> Result<CheckReport> {
        let generation = superblock.generation.get();
        let mut report = CheckReport { generation, ..CheckReport::default() };
        let mut findings = Findings::default();
        roots::superblocks(self.disk, &superblock, strict, &mut findings).await;
        match load::catalogue_as_is(self.disk, &superblock).await {
            Ok(found) => {
                let known = Some(&found.catalogue);
                let written =
                    records::journal(self.disk, &superblock, known, durable, &mut findings).await;
                if roots::catalogue(&superblock, &found.catalogue, &mut findings) {
                    let durable = Durable::new(self.disk, superblock, found);
                    let found = (&mut report, &mut findings);
                    self.blocks(&durable, &written, found, progress).await?;
                }
            }
            Err(error) => {
                findings.add(FindingKind::Catalogue, error);
                records::journal(self.disk, &superblock, None, durable, &mut findings).await;
            }
        }
        report.findings = findings.list;
        report.more = findings.more;
        Ok(report)
    }

    /// Checks everything that the catalogue refers to, and the tables.
    async fn blocks(
        &self,
        durable: &Durable,
        written: &Written,
        (report, findings): (&mut CheckReport, &mut Findings),
        progress: &dyn Fn(u64, u64),
    ) -> Result<()> {
        let geometry = durable.superblock.geometry;
        let dropped = tables::dropped(durable);
        let windows = windows(&geometry, self.window);
        // Each pass walks the blocks in use and then compares all blocks of its window.
        let free: u64 = durable.found.catalogue.groups.iter().map(|g| u64::from(g.free)).sum();
        let used = geometry.usable_blocks().saturating_sub(free);
        let total = geometry.pool_blocks + used;
        let mut done = 0;
        for (pass, window) in windows.into_iter().enumerate() {
            let counts = Recount::new(geometry, window);
            let mut walk = Walk::new(durable, counts, findings, pass == 0);
            let progress_here = |walked: u64| {
                progress((done + walked).min(total), total);
                self.check_walking()
            };
            walk.all(&progress_here).await?;
            report.nodes = walk.nodes();
            report.data_blocks += walk.data_blocks;
            done += walk.data_blocks;
            let (counts, complete) = (&walk.counts, walk.complete);
            let dropped = &dropped;
            let compare = Compare { durable, counts, complete, dropped, written, live: self.live };
            for group in counts.groups() {
                self.check_walking()?;
                compare.group(group, walk.findings).await;
                done += geometry.group_len(group);
                progress(done.min(total), total);
            }
        }
        if let Some(pool) = self.live {
            live::all(pool, findings).await;
        }
        progress(total, total);
        Ok(())
    }

    /// Ends the check if the pool is about to be closed.
    fn check_walking(&self) -> Result<()> {
        self.live.map_or(Ok(()), |pool| pool.core.check_walking())
    }
}
