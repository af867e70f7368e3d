//! Releasing the children of dropped nodes: the one cascade behind overwrites, discards and
//! deletions. Each checkpoint does a bounded amount of it; the catalogue keeps the remaining drops.

use super::changes::Freed;
use super::net::net;
use super::tables::NewTables;
use crate::error::Result;
use crate::format::catalogue::NodeDrop;
use crate::format::node::{Node, NodeChild, children};
use crate::limits::DROPS_WAITING_MAX;
use crate::map::{RefChange, RefDelta};
use crate::pool::Pool;

/// Drops whose reference changes are netted together.
const ROUND: usize = 64;

/// Processes [`OpenOptions::cascade_nodes`] of `drops`, and more while more than
/// [`DROPS_WAITING_MAX`] are left, which is what the catalogue has room for. A drop holds one
/// reference to its node. If it is the last one, the node is freed and each child loses a
/// reference.
///
/// [`OpenOptions::cascade_nodes`]: crate::pool::OpenOptions::cascade_nodes
pub(super) async fn run(
    pool: &Pool,
    tables: &mut NewTables<'_>,
    freed: &mut Freed,
    drops: &mut Vec<NodeDrop>,
) -> Result<()> {
    let mut left = pool.core.options.cascade_nodes;
    while !drops.is_empty() && (left > 0 || drops.len() > DROPS_WAITING_MAX) {
        let most = if left > 0 { ROUND.min(left) } else { ROUND };
        let round = drops.split_off(drops.len().saturating_sub(most));
        left = left.saturating_sub(round.len());
        let mut log = Vec::new();
        for drop in round {
            give_up(pool, tables, drop, &mut log, drops).await?;
        }
        net(tables, log, freed, drops).await?;
    }
    Ok(())
}

async fn give_up(
    pool: &Pool,
    tables: &mut NewTables<'_>,
    drop: NodeDrop,
    log: &mut Vec<RefDelta>,
    drops: &mut Vec<NodeDrop>,
) -> Result<()> {
    let mut change = RefChange::NodeDown;
    if tables.count_of(drop.block).await? == 1 {
        for child in load(pool, drop).await? {
            match child {
                NodeChild::Node(ptr) => drops.push(ptr.into()),
                NodeChild::Data(extent) => log.push(RefDelta::data_down(&extent)),
            }
        }
        change = RefChange::NodeMoved;
    }
    log.push(RefDelta { block: drop.block, birth: drop.birth, count: 1, change });
    Ok(())
}

/// The children of a dropped node.
async fn load(pool: &Pool, drop: NodeDrop) -> Result<Vec<NodeChild>> {
    {
        let inner = pool.core.lock();
        if let Some(node) = inner.state.cache.get(drop.block)
            && node.birth() == drop.birth
        {
            return Ok(children(node).collect());
        }
    }
    let buf = pool.read_block(drop.block).await?;
    let node = Node::verify_orphan(buf.as_bytes(), drop.block, drop.birth, &pool.core.uuid)?;
    Ok(children(node).collect())
}
