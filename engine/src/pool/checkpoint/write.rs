//! The steps of a checkpoint in order, numbered as in the parent module.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::join_all;

use super::changes::Freed;
use super::net::net;
use super::tables::{Finished, NewTables};
use super::{Checkpointer, Kind, drops};
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalogue::{Catalogue, GroupEntry, chain_blocks, encode_chain_block};
use crate::format::codec::encode_catalogue;
use crate::format::geometry::{Geometry, Table};
use crate::format::superblock::Superblock;
use crate::map::{RefChange, RefDelta};
use crate::pool::{Pool, count};
use crate::runtime::Buf;
use crate::space::{Run, TakeError};
use crate::state::{State, Volume};
use crate::units::{
    BLOCK_BYTES, BLOCK_SIZE, BlockNo, Generation, Seqno, VolumeId, to_u32, to_u64, to_usize,
};

/// Maximum of nodes per write.
const NODES_PER_WRITE: usize = 64;
/// Writes under way concurrently.
const PARALLEL: usize = 8;

/// What the seal takes out of the state.
struct Sealed {
    seal: Seqno,
    journal: u64,
    log: Vec<RefDelta>,
    nodes: Vec<BlockNo>,
    volumes: BTreeMap<VolumeId, Arc<Volume>>,
    next_id: u64,
}

/// Writes a checkpoint.
pub(super) async fn run(pool: &Pool, checkpointer: &mut Checkpointer, kind: Kind) -> Result<()> {
    let generation = checkpointer.superblock.generation.next();
    let geometry = checkpointer.superblock.geometry;
    let sealed = seal(pool);
    write_nodes(pool, &sealed.nodes).await?;
    let mut tables = NewTables::new(pool, geometry, generation);
    let mut freed = Freed::default();
    let mut drops = checkpointer.drops.clone();
    net(&mut tables, sealed.log, &mut freed, &mut drops).await?;
    drops::run(pool, &mut tables, &mut freed, &mut drops).await?;
    merge_sums(pool, &mut tables).await?;
    let mut catalogue = Catalogue {
        next_id: sealed.next_id,
        volumes: State::entries(&sealed.volumes),
        drops,
        groups: pool.core.lock().state.tables.entries().to_vec(),
    };
    let new_geometry = grown(geometry, kind)?;
    let groups = to_usize(new_geometry.groups());
    catalogue.groups.resize(groups, GroupEntry::default());
    let blocks = move_catalogue(pool, &mut tables, &mut freed, checkpointer, &catalogue).await?;
    let finished = tables.finish().await?;
    for (group, entry, _) in &finished.groups {
        catalogue.groups[to_usize(u64::from(*group))] = *entry;
    }
    add_grown(&mut catalogue.groups, geometry, new_geometry);
    let bytes = write_catalogue(pool, &catalogue, &blocks, generation).await?;
    let superblock = Superblock {
        geometry: new_geometry,
        generation,
        catalogue: blocks[0],
        catalogue_bytes: to_u64(bytes),
        journal_offset: pool.core.lock().journal.offset(sealed.journal),
        seal: sealed.seal,
        salt: if kind.new_salt { generation.get() } else { checkpointer.superblock.salt },
        clean: kind.clean,
        ..checkpointer.superblock.clone()
    };
    write_superblock(pool, &superblock).await?;
    checkpointer.superblock = superblock;
    checkpointer.catalogue_blocks = blocks;
    checkpointer.drops = catalogue.drops;
    publish(pool, finished, freed, checkpointer, sealed.journal);
    if new_geometry != geometry {
        pool.core.lock().state.grow(new_geometry, catalogue.groups);
    }
    Ok(())
}

/// Adds the new space as free blocks: to the last group, which may be longer, and to new groups.
fn add_grown(groups: &mut [GroupEntry], old: Geometry, new: Geometry) {
    for (group, entry) in (0..).zip(groups) {
        let before = if group < old.groups() { old.group_len(group) } else { 0 };
        entry.free += to_u32(new.group_len(group) - before);
    }
}

fn grown(geometry: Geometry, kind: Kind) -> Result<Geometry> {
    match kind.pool_blocks {
        None => Ok(geometry),
        Some(blocks) => Geometry::new(blocks, geometry.journal_blocks, geometry.group_pages),
    }
}

/// 1. Everything up to now belongs to this checkpoint; later changes copy what they change.
fn seal(pool: &Pool) -> Sealed {
    let mut inner = pool.core.lock();
    let journal = inner.journal.pad();
    let state = &mut inner.state;
    assert!(state.sealed_sums.is_none(), "one checkpoint at a time");
    state.seal = state.seqno;
    state.sealed_sums = Some(std::mem::take(&mut state.sums));
    state.space.sealed();
    Sealed {
        seal: state.seal,
        journal,
        log: std::mem::take(&mut state.log),
        nodes: state.cache.dirty_blocks_sealed(state.seal),
        volumes: state.volumes.clone(),
        next_id: state.next_id,
    }
}

/// 2. Nodes are in runs because their blocks were set aside in runs.
async fn write_nodes(pool: &Pool, nodes: &[BlockNo]) -> Result<()> {
    let runs: Vec<&[BlockNo]> = nodes
        .chunk_by(|a, b| a.plus(1) == *b)
        .flat_map(|run| run.chunks(NODES_PER_WRITE))
        .collect();
    for some in runs.chunks(PARALLEL) {
        let writes = some.iter().map(|run| async {
            let mut buf = Buf::new(run.len());
            {
                let inner = pool.core.lock();
                for (block, out) in run.iter().zip(buf.as_mut_bytes().chunks_exact_mut(BLOCK_SIZE))
                {
                    assert!(inner.state.cache.copy_out(*block, out), "sealed nodes stay cached");
                }
            }
            pool.disk().write(run[0], vec![buf]).await
        });
        for written in join_all(writes).await {
            written?;
        }
        let mut inner = pool.core.lock();
        for block in some.iter().copied().flatten() {
            inner.state.cache.mark_clean(*block);
        }
    }
    count(&pool.core.counters.metadata_bytes, to_u64(nodes.len()) * BLOCK_BYTES);
    Ok(())
}

/// 5. Merges the fresh checksums into the tables.
async fn merge_sums(pool: &Pool, tables: &mut NewTables<'_>) -> Result<()> {
    let ids = {
        let inner = pool.core.lock();
        inner.state.sealed_sums.as_ref().map(|sums| sums.pages()).unwrap_or_default()
    };
    for some in ids.chunks(256) {
        tables.prefetch(some).await?;
        for id in some {
            debug_assert_eq!(id.table, Table::Sums);
            let page = tables.page(*id).await?;
            let inner = pool.core.lock();
            if let Some(sums) = &inner.state.sealed_sums {
                sums.merge_into(*id, page);
            }
        }
    }
    Ok(())
}

/// 6a. Counts the blocks for the new catalogue and frees those of the old one while the tables can
/// still change. The length of the catalogue is known already: its integers have fixed widths.
async fn move_catalogue(
    pool: &Pool,
    tables: &mut NewTables<'_>,
    freed: &mut Freed,
    checkpointer: &Checkpointer,
    catalogue: &Catalogue,
) -> Result<Vec<BlockNo>> {
    let wanted = chain_blocks(encode_catalogue(catalogue)?.len());
    let mut blocks = Vec::with_capacity(wanted);
    let delta = |block, change| RefDelta { block, birth: Seqno::new(0), count: 1, change };
    while blocks.len() < wanted {
        let taken = pool.core.lock().state.space.take(to_u64(wanted - blocks.len()));
        match taken {
            Ok(run) => blocks.extend((0..run.len).map(|i| run.block.plus(i))),
            Err(TakeError::Load(group)) => pool.load_group(group).await?,
            Err(TakeError::Full) => await_freed(pool).await?,
        }
    }
    {
        let mut inner = pool.core.lock();
        for block in &blocks {
            inner.state.space.recorded(Run { block: *block, len: 1 });
        }
    }
    let old = checkpointer.catalogue_blocks.iter();
    let log = old
        .map(|block| delta(*block, RefChange::CatalogueDown))
        .chain(blocks.iter().map(|block| delta(*block, RefChange::CatalogueUp)))
        .collect();
    let mut none = Vec::new();
    net(tables, log, freed, &mut none).await?;
    debug_assert!(none.is_empty(), "a catalogue block is no node");
    Ok(blocks)
}

/// Waits in a full pool until blocks that earlier checkpoints freed become allocatable. Each
/// checkpoint takes some of the blocks kept for catalogues, and a reader can outlast many
/// checkpoints.
async fn await_freed(pool: &Pool) -> Result<()> {
    loop {
        let event = pool.core.reader_event.notified();
        {
            let inner = pool.core.lock();
            inner.check_not_poisoned()?;
            if inner.state.space.free() > 0 {
                return Ok(());
            }
            if inner.state.reuse.waiting().next().is_none() {
                return Err(Error::new(ErrorKind::NoSpace, "no block for the catalogue"));
            }
        }
        event.await;
    }
}

/// 6b. Writes the catalogue to its fresh blocks. Returns its length in bytes.
async fn write_catalogue(
    pool: &Pool,
    catalogue: &Catalogue,
    blocks: &[BlockNo],
    generation: Generation,
) -> Result<usize> {
    let bytes = encode_catalogue(catalogue)?;
    assert_eq!(chain_blocks(bytes.len()), blocks.len(), "the length has not changed");
    let mut writes = Vec::new();
    let mut index = 0;
    for run in blocks.chunk_by(|a, b| a.plus(1) == *b).flat_map(|run| run.chunks(NODES_PER_WRITE)) {
        let mut buf = Buf::new(run.len());
        for out in buf.as_mut_bytes().chunks_exact_mut(BLOCK_SIZE) {
            encode_chain_block(&bytes, index, blocks, generation, pool.core.uuid, out);
            index += 1;
        }
        writes.push(pool.disk().write(run[0], vec![buf]));
    }
    count(&pool.core.counters.metadata_bytes, to_u64(blocks.len()) * BLOCK_BYTES);
    for written in join_all(writes).await {
        written?;
    }
    Ok(bytes.len())
}

/// 7. Flush, superblock, flush.
async fn write_superblock(pool: &Pool, superblock: &Superblock) -> Result<()> {
    pool.barrier().await?;
    let slot = u64::from(superblock.generation.get()) % 2;
    for place in superblock.geometry.super_places(slot) {
        let mut buf = Buf::new(1);
        buf.as_mut_bytes().copy_from_slice(&superblock.encode());
        pool.disk().write(place, vec![buf]).await?;
    }
    pool.barrier().await?;
    count(&pool.core.counters.metadata_bytes, 2 * BLOCK_BYTES);
    Ok(())
}

/// 8. Publishes the durable state to readers and writers.
fn publish(
    pool: &Pool,
    finished: Finished,
    freed: Freed,
    checkpointer: &Checkpointer,
    journal: u64,
) {
    count(&pool.core.counters.checkpoints, 1);
    let runs = freed.into_runs();
    let mut inner = pool.core.lock();
    inner.journal.release(journal, checkpointer.superblock.generation);
    inner.published += 1;
    inner.generation = checkpointer.superblock.generation;
    inner.catalogue_blocks = to_u64(checkpointer.catalogue_blocks.len());
    inner.drops_pending = to_u64(checkpointer.drops.len());
    inner.durable = inner.durable.max(checkpointer.superblock.seal);
    let state = &mut inner.state;
    if checkpointer.drops.is_empty() {
        state.settle_sharing(checkpointer.superblock.seal);
    }
    for run in &runs {
        for offset in 0..run.len {
            state.cache.forget(run.block.plus(offset));
        }
    }
    state.tables.publish(finished.groups, finished.pages);
    state.sealed_sums = None;
    state.reuse.freed(runs);
    let recycled = inner.recycle();
    drop(inner);
    pool.core.poison_on(&recycled);
    pool.core.durable_event.notify_waiters();
    pool.core.published_event.notify_waiters();
}
