//! The checker finds nothing in a sound pool. Also: images for other tests to damage
//! (`kind_tests`), and the bounds of the checker.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;

use super::{Check, CheckReport, check_offline};
use crate::disk::sim::{CutPlan, Image, SimDisk, SimImage, SimOptions};
use crate::error::ErrorKind;
use crate::format::catalogue::{Catalogue, NodeDrop, chain_blocks, encode_chain_block};
use crate::format::codec::encode_catalogue;
use crate::format::geometry::{Geometry, PageId, Table};
use crate::format::group::{BlockType, TablePage};
use crate::format::node::{LeafEntry, Node, NodeRef, seal_crc};
use crate::format::superblock::Superblock;
use crate::pool::checkpoint::load;
use crate::pool::inspect::durable::Durable;
use crate::pool::testing::{World, durable_of, image};
use crate::runtime::executor::{end_of_turn, spawn_local};
use crate::units::{BLOCK_SIZE, BlockNo, Seqno};
use zerocopy::FromBytes;

pub(super) const BLOCKS: u64 = 4096;

/// A sound image and the content of its last checkpoint.
pub(super) struct Sound {
    pub(super) image: SimImage,
    pub(super) superblock: Superblock,
    pub(super) catalogue: Catalogue,
    pub(super) chain: Vec<BlockNo>,
    /// A leaf of at least three extents that only one volume maps.
    pub(super) leaf: NodeRef,
    /// All blocks in use, with their types.
    pub(super) used: Vec<(BlockNo, BlockType)>,
}

pub(super) fn sound(seed: u64) -> Sound {
    let (image, _) = image(seed, BLOCKS, 300);
    sound_of(image)
}

pub(super) fn sound_of(image: SimImage) -> Sound {
    let sim = SimDisk::from_image(image.clone(), 1, SimOptions::default());
    let parts = sim.run(async {
        let durable = durable_of(&sim.disk()).await;
        let geometry = durable.superblock.geometry;
        let mut used = Vec::new();
        for group in 0..geometry.groups() {
            let len = geometry.group_len(group);
            let first = geometry.block_at(group, 0);
            let entries = durable.entries(Table::Refs, first, len).await.unwrap();
            let blocks = (0..len).map(|index| first.plus(index));
            used.extend(blocks.zip(entries).map(|(block, entry)| (block, BlockType::of(entry))));
        }
        used.retain(|(_, kind)| *kind != BlockType::Free);
        let leaf = some_leaf(&durable).await;
        (durable.superblock.clone(), durable.found, leaf, used)
    });
    let (superblock, found, leaf, used) = parts.unwrap();
    Sound {
        image,
        superblock,
        catalogue: found.catalogue,
        chain: found.catalogue_blocks,
        leaf,
        used,
    }
}

async fn some_leaf(durable: &Durable) -> NodeRef {
    let roots = durable.found.catalogue.volumes.iter().filter_map(|volume| volume.root);
    let mut stack: Vec<NodeRef> = roots.map(|root| root.node_ref()).collect();
    while let Some(wanted) = stack.pop() {
        let count = durable.entries(Table::Refs, wanted.block, 1).await.unwrap()[0];
        if count != BlockType::Node.entry(1) {
            continue;
        }
        let buf = durable.read_all([wanted.block].into_iter()).await.pop().unwrap().unwrap();
        let node = durable.verify(buf.as_bytes(), &wanted).unwrap();
        if node.level() == 0 && node.count() >= 3 {
            return wanted;
        }
        stack.extend(node.child_refs(wanted.end));
    }
    panic!("the random operations made no leaf of one volume with three extents");
}

impl Sound {
    pub(super) fn geometry(&self) -> Geometry {
        self.superblock.geometry
    }

    pub(super) fn blocks(&mut self) -> &mut Image {
        self.image.blocks_mut()
    }

    pub(super) fn first(&self, kind: BlockType) -> BlockNo {
        self.used.iter().find(|(_, k)| *k == kind).unwrap().0
    }

    pub(super) fn free_block(&self) -> BlockNo {
        let used: BTreeSet<_> = self.used.iter().map(|(block, _)| *block).collect();
        let group = |index| self.geometry().block_at(0, index);
        (0..).map(group).find(|block| !used.contains(block)).unwrap()
    }

    /// Changes bytes of a node and fixes its checksum.
    pub(super) fn edit_node(&mut self, block: BlockNo, change: impl FnOnce(&mut [u8; BLOCK_SIZE])) {
        let mut bytes = *self.blocks().block(block);
        change(&mut bytes);
        seal_crc(&mut bytes);
        self.blocks().write(block, 0, &bytes);
    }

    /// Changes the entries of the leaf.
    pub(super) fn edit_leaf(&mut self, change: impl FnOnce(&mut Vec<LeafEntry>)) {
        self.edit_node(self.leaf.block, |bytes| {
            let node = Node::mut_from_bytes(bytes).unwrap();
            let mut entries = node.leaf().to_vec();
            change(&mut entries);
            node.splice(0..node.count(), &entries);
        });
    }

    /// Writes a changed catalogue and the superblock that refers to it.
    pub(super) fn edit_catalogue(&mut self, change: impl FnOnce(&mut Catalogue)) {
        change(&mut self.catalogue);
        let bytes = encode_catalogue(&self.catalogue).unwrap();
        assert_eq!(chain_blocks(bytes.len()), self.chain.len(), "the chain is as long as before");
        for (index, block) in self.chain.clone().into_iter().enumerate() {
            let mut out = [0; BLOCK_SIZE];
            let (generation, uuid) = (self.superblock.generation, self.superblock.uuid);
            encode_chain_block(&bytes, index, &self.chain, generation, uuid, &mut out);
            self.blocks().write(block, 0, &out);
        }
        self.superblock.catalogue_bytes = u64::try_from(bytes.len()).unwrap();
        self.write_superblock();
    }

    pub(super) fn write_superblock(&mut self) {
        let slot = u64::from(self.superblock.generation.get() % 2);
        let bytes = self.superblock.encode();
        for place in self.geometry().super_places(slot) {
            self.blocks().write(place, 0, &bytes);
        }
    }

    /// The place of the last version of a page.
    pub(super) fn page_place(&self, id: PageId) -> BlockNo {
        let sim = SimDisk::from_image(self.image.clone(), 1, SimOptions::default());
        let header =
            sim.run(async { durable_of(&sim.disk()).await.header(id.group).await.unwrap() });
        self.geometry().page_place(id, header.unwrap().version(id).0)
    }

    /// Sets the stored reference count of a block.
    pub(super) fn set_count(&mut self, block: BlockNo, entry: u32) {
        let (id, at) = self.geometry().page_of(Table::Refs, block).unwrap();
        let place = self.page_place(id);
        let mut bytes = *self.blocks().block(place);
        let generation = TablePage::ref_from_bytes(&bytes).unwrap().generation();
        let mut page = TablePage::decode(&bytes, id, generation).unwrap();
        page.set(at, entry);
        page.encode(generation, &mut bytes);
        self.blocks().write(place, 0, &bytes);
    }

    pub(super) fn check(&self) -> CheckReport {
        check_image(&self.image, u64::MAX)
    }
}

/// Checks an image with at most `window` count pages in memory.
pub(super) fn check_image(image: &SimImage, window: u64) -> CheckReport {
    let sim = SimDisk::from_image(image.clone(), 1, SimOptions::default());
    let report = sim.run(async {
        let disk = sim.disk();
        if window == u64::MAX {
            return check_offline(&disk, &|_, _| ()).await.unwrap();
        }
        let superblock = load::superblock(&disk).await.unwrap();
        let clean = superblock.clean;
        let strict = super::Strict { newest: clean, older: clean };
        let check = Check { disk: &disk, live: None, window };
        check.run(superblock, strict, None, &|_, _| ()).await.unwrap()
    });
    report.unwrap()
}

#[test]
fn a_sound_pool_has_no_findings() {
    for seed in 0..8 {
        let sim = SimDisk::new(seed, 8192, SimOptions::default());
        sim.run(async {
            let mut world = World::new(&sim, seed).await;
            for _ in 0..20 {
                world.steps(30).await;
                let report = world.pool.check(&|done, total| assert!(done <= total)).await.unwrap();
                assert_eq!(report.findings, [], "seed {seed}");
            }
            world.settle().await;
            let contents = world.volumes.values().flatten();
            let data: BTreeSet<(u64, u64)> = contents.map(|(lba, stamp)| (*stamp, *lba)).collect();
            let report = world.pool.check(&|_, _| ()).await.unwrap();
            assert_eq!(report.findings, []);
            assert_eq!(report.data_blocks, u64::try_from(data.len()).unwrap());
        })
        .unwrap();
        let (image, _) = image(seed, 8192, 300);
        for window in [u64::MAX, 1] {
            assert_eq!(check_image(&image, window).findings, [], "seed {seed}");
        }
    }
}

#[test]
fn a_pool_that_lost_power_has_no_findings() {
    for seed in 0..20 {
        let sim = SimDisk::new(seed, 8192, SimOptions::default());
        sim.set_cut_at(1000 + seed * 37);
        sim.run(async {
            let mut world = World::new(&sim, seed).await;
            world.steps(2000).await;
        });
        assert!(sim.is_cut());
        for plan in [CutPlan::KeepNone, CutPlan::KeepAll] {
            assert_eq!(check_image(&sim.image_after_cut(plan), u64::MAX).findings, []);
        }
    }
}

#[test]
fn a_check_does_not_hold_up_closing() {
    let sim = SimDisk::new(6, BLOCKS, SimOptions::default());
    sim.run(async {
        let mut world = World::new(&sim, 6).await;
        world.steps(300).await;
        let (pool, told) = (world.pool.clone(), Rc::new(Cell::new(0)));
        let calls = Rc::clone(&told);
        let (ended, report) = tokio::sync::oneshot::channel();
        spawn_local(async move {
            let report = pool.check(&|_, _| calls.set(calls.get() + 1)).await;
            ended.send(report.map_err(|error| error.kind())).unwrap();
        });
        while told.get() == 0 {
            end_of_turn().await;
            world.pool.disk().sleep(std::time::Duration::from_micros(1)).await;
        }
        world.pool.close().await.unwrap();
        assert_eq!(report.await.unwrap(), Err(ErrorKind::Shutdown));
        assert!(told.get() <= 2, "it went on for {} steps", told.get());
    })
    .unwrap();
}

#[test]
fn findings_are_bounded() {
    let mut sound = sound(1);
    sound.edit_catalogue(|catalogue| {
        let drop = NodeDrop { block: BlockNo::new(1), birth: Seqno::new(1) };
        catalogue.drops = vec![drop; 60];
    });
    let report = sound.check();
    assert_eq!(report.findings.len(), 60);
    assert!(report.findings.iter().all(|finding| finding.code == "K9"));
    let mut findings = super::Findings::default();
    for number in 0..1010 {
        findings.add(super::FindingKind::Leak, number);
    }
    assert_eq!((findings.list.len(), findings.more), (super::FINDINGS_MAX, 10));
}
