//! The checker finds nothing in a sound pool, and each kind of damage by its number and place.
//! Damage is made with all checksums right, where it is not the checksum that is damaged.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;

use super::super::durable::Durable;
use super::super::testing::{World, durable_of, image};
use super::{Check, CheckReport, check_offline};
use crate::checkpoint::load;
use crate::disk::executor::{end_of_turn, spawn_local};
use crate::disk::sim::{CutPlan, Image, SimDisk, SimImage, SimOptions};
use crate::error::ErrorKind;
use crate::format::catalogue::{Catalogue, NodeDrop, chain_blocks, encode_chain_block};
use crate::format::codec::encode_catalogue;
use crate::format::geometry::{Geometry, PageId, Table};
use crate::format::group::{BlockType, TablePage};
use crate::format::node::{LeafEntry, Node, NodeRef, Root, seal_crc};
use crate::format::superblock::Superblock;
use crate::map::Extent;
use crate::space::Run;
use crate::units::{BLOCK_SIZE, BlockNo, Lba, Seqno, to_usize};
use zerocopy::FromBytes;

const BLOCKS: u64 = 4096;

/// A sound image and what its last checkpoint says.
struct Sound {
    image: SimImage,
    superblock: Superblock,
    catalogue: Catalogue,
    chain: Vec<BlockNo>,
    /// A leaf with three extents at least, that one volume alone has.
    leaf: NodeRef,
    /// All blocks in use, with their types.
    used: Vec<(BlockNo, BlockType)>,
}

fn sound(seed: u64) -> Sound {
    let (image, _) = image(seed, BLOCKS, 300);
    sound_of(image)
}

fn sound_of(image: SimImage) -> Sound {
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
    fn geometry(&self) -> Geometry {
        self.superblock.geometry
    }

    fn blocks(&mut self) -> &mut Image {
        self.image.blocks_mut()
    }

    fn first(&self, kind: BlockType) -> BlockNo {
        self.used.iter().find(|(_, k)| *k == kind).unwrap().0
    }

    fn free_block(&self) -> BlockNo {
        let used: BTreeSet<_> = self.used.iter().map(|(block, _)| *block).collect();
        let group = |index| self.geometry().block_at(0, index);
        (0..).map(group).find(|block| !used.contains(block)).unwrap()
    }

    /// Changes bytes of a node, whose checksum is right again after that.
    fn edit_node(&mut self, block: BlockNo, change: impl FnOnce(&mut [u8; BLOCK_SIZE])) {
        let mut bytes = *self.blocks().block(block);
        change(&mut bytes);
        seal_crc(&mut bytes);
        self.blocks().write(block, 0, &bytes);
    }

    /// Changes the entries of the leaf.
    fn edit_leaf(&mut self, change: impl FnOnce(&mut Vec<LeafEntry>)) {
        self.edit_node(self.leaf.block, |bytes| {
            let node = Node::mut_from_bytes(bytes).unwrap();
            let mut entries = node.leaf().to_vec();
            change(&mut entries);
            node.splice(0..node.count(), &entries);
        });
    }

    /// Writes the catalogue, as `change` makes it, and the superblock that names it.
    fn edit_catalogue(&mut self, change: impl FnOnce(&mut Catalogue)) {
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

    fn write_superblock(&mut self) {
        let slot = u64::from(self.superblock.generation.get() % 2);
        let bytes = self.superblock.encode();
        for place in self.geometry().super_places(slot) {
            self.blocks().write(place, 0, &bytes);
        }
    }

    /// Where the last version of a page lies.
    fn page_place(&self, id: PageId) -> BlockNo {
        let sim = SimDisk::from_image(self.image.clone(), 1, SimOptions::default());
        let header =
            sim.run(async { durable_of(&sim.disk()).await.header(id.group).await.unwrap() });
        self.geometry().page_place(id, header.unwrap().version(id).0)
    }

    /// Sets the stored reference count of a block.
    fn set_count(&mut self, block: BlockNo, entry: u32) {
        let (id, at) = self.geometry().page_of(Table::Refs, block).unwrap();
        let place = self.page_place(id);
        let mut bytes = *self.blocks().block(place);
        let generation = TablePage::ref_from_bytes(&bytes).unwrap().generation();
        let mut page = TablePage::decode(&bytes, id, generation).unwrap();
        page.set(at, entry);
        page.encode(generation, &mut bytes);
        self.blocks().write(place, 0, &bytes);
    }

    fn check(&self) -> CheckReport {
        check_image(&self.image, u64::MAX)
    }

    /// The checker says `code`, and only that, and names `place`.
    fn finds(&self, code: &str, place: impl std::fmt::Display) {
        let report = self.check();
        let place = place.to_string();
        let codes: BTreeSet<&str> = report.findings.iter().map(|f| f.code.as_str()).collect();
        assert_eq!(codes, BTreeSet::from([code]), "{:#?}", report.findings);
        assert!(report.findings[0].what.contains(&place), "{place}: {:?}", report.findings);
        let windows = check_image(&self.image, 1);
        let sort = |report: &CheckReport| {
            let mut found: Vec<_> = report.findings.iter().map(|f| f.what.clone()).collect();
            found.sort();
            found
        };
        assert_eq!(sort(&windows), sort(&report), "window by window");
    }
}

/// Checks an image with at most `window` pages of counts in memory.
fn check_image(image: &SimImage, window: u64) -> CheckReport {
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
fn k1_node_damaged() {
    let mut sound = sound(1);
    let block = sound.leaf.block;
    sound.blocks().flip_bit(block, 3000);
    sound.finds("K1", format!("map node at {block}: checksum"));
}

#[test]
fn k2_node_of_another_birth() {
    let mut sound = sound(1);
    let block = sound.leaf.block;
    let birth = Seqno::new(sound.leaf.birth.get() - 1);
    sound.edit_node(block, |bytes| Node::mut_from_bytes(bytes).unwrap().place(block, birth));
    sound.finds("K2", format!("map node at {block}: born at {birth}"));
}

#[test]
fn k3_node_out_of_shape() {
    let mut sound = sound(1);
    let block = sound.leaf.block;
    sound.edit_leaf(|entries| entries.swap(1, 2));
    sound.finds("K3", format!("map node at {block}: extents overlap or are not sorted"));
}

#[test]
fn k4_wrong_count() {
    let mut sound = sound(1);
    let block = sound.first(BlockType::Data);
    sound.set_count(block, BlockType::Data.entry(77));
    sound.finds("K4", format!("{block}: counted 77 times as Data"));
}

#[test]
fn k5_used_and_free() {
    let mut sound = sound(1);
    let block = sound.first(BlockType::Data);
    sound.set_count(block, 0);
    sound.edit_catalogue(|catalogue| catalogue.groups[0].free += 1);
    sound.finds("K5", format!("{block}: counted as free"));
}

#[test]
fn k6_two_types() {
    let mut sound = sound(1);
    let block = sound.leaf.block;
    sound.set_count(block, BlockType::Data.entry(1));
    sound.finds("K6", format!("{block}: counted 1 times as Data"));
}

#[test]
fn k8_wrong_deletion() {
    let mut sound = sound(1);
    let NodeRef { block, birth, .. } = sound.leaf;
    sound.edit_catalogue(|catalogue| catalogue.drops.push(NodeDrop { block, birth }));
    sound.finds("K8", format!("{block}: counted 1 times as Node, 2 references"));
}

#[test]
fn k9_out_of_bounds() {
    let mut sound = sound(1);
    let block = sound.leaf.block;
    sound.edit_leaf(|entries| {
        let extent = entries[1].extent();
        entries[1] = LeafEntry::new(&Extent { block: BlockNo::new(BLOCKS - 1), ..extent });
    });
    sound.finds("K9", format!("map node at {block}"));
    let mut sound = self::sound(1);
    let volumes = &sound.catalogue.volumes;
    let shrunk = volumes.iter().position(|volume| volume.root.is_some()).unwrap();
    sound.edit_catalogue(|catalogue| catalogue.volumes[shrunk].size_bytes = 4096);
    sound.finds("K9", "are beyond its 1 blocks");
}

/// An image with flushed records behind the last checkpoint, and where in the ring they begin.
fn with_records() -> Sound {
    let sim = SimDisk::new(4, BLOCKS, SimOptions::default());
    sim.run(async {
        let mut world = World::new(&sim, 4).await;
        world.steps(100).await;
        let volume = world.create(None, false).await;
        world.write(volume, 0, 9).await;
        world.pool.checkpoint().await.unwrap();
        for lba in [3, 20, 40] {
            world.write(volume, lba, 1).await;
            world.pool.flush().await.unwrap();
        }
    })
    .unwrap();
    sound_of(sim.image_after_cut(CutPlan::KeepNone))
}

#[test]
fn k10_flushed_record_damaged() {
    let mut sound = with_records();
    assert_eq!(sound.check().findings, []);
    let start = sound.superblock.journal_offset;
    let block = sound.geometry().journal_start().plus(start / 4096);
    sound.blocks().flip_bit(block, to_usize(start % 4096) * 8 + 400);
    let next = sound.superblock.seal.next().get();
    sound.finds("K10", format!("record {next} is damaged or lost"));
}

#[test]
fn k11_superblock_slots() {
    let sound = sound(1);
    for slot in 0..2 {
        for place in sound.geometry().super_places(slot) {
            let mut bad = self::sound(1);
            bad.blocks().flip_bit(place, 500);
            bad.finds("K11", format!("superblock at {place}"));
        }
    }
}

#[test]
fn k12_clean_with_records() {
    let mut sound = with_records();
    sound.superblock.clean = true;
    sound.write_superblock();
    let next = sound.superblock.seal.next().get();
    sound.finds("K12", format!("record {next} follows"));
}

#[test]
fn k13_catalogue() {
    let mut sound = sound(1);
    let name = sound.catalogue.volumes[0].name.clone();
    sound.edit_catalogue(|catalogue| catalogue.volumes[1].name.clone_from(&name));
    sound.finds("K13", format!("two volumes are named {name}"));
    let mut sound = self::sound(1);
    let place = sound.chain[0];
    sound.blocks().flip_bit(place, 700);
    sound.finds("K13", format!("catalogue at {place}: checksum"));
}

#[test]
fn k14_sums() {
    let mut sound = sound(1);
    sound.edit_catalogue(|catalogue| catalogue.groups[1].free -= 1);
    sound.finds("K14", "group 1: ");
    let mut sound = self::sound(1);
    let roots = sound.catalogue.volumes.iter().map(|volume| volume.root);
    let at = roots.clone().position(|root| root.is_some()).unwrap();
    let Root { ptr, .. } = sound.catalogue.volumes[at].root.unwrap();
    // All volumes that share the root say so.
    sound.edit_catalogue(|catalogue| {
        for root in catalogue.volumes.iter_mut().filter_map(|volume| volume.root.as_mut()) {
            root.ptr.mapped += u64::from(root.ptr.block == ptr.block);
        }
    });
    sound.finds("K14", format!("map node at {}: maps {} blocks", ptr.block, ptr.mapped));
}

#[test]
fn k16_tables() {
    for table in [Table::Refs, Table::Sums] {
        let mut sound = sound(1);
        let id = PageId { group: 0, table, page: 0 };
        let place = sound.page_place(id);
        sound.blocks().flip_bit(place, 3000);
        sound.finds("K16", format!("{place}: {id}: checksum"));
    }
    let mut sound = sound(1);
    let place = sound.geometry().header_place(0, u64::from(sound.catalogue.groups[0].slot));
    sound.blocks().flip_bit(place, 3000);
    sound.finds("K16", format!("{place}: header of group 0: checksum"));
}

#[test]
fn k17_leak() {
    let mut sound = sound(1);
    let block = sound.free_block();
    sound.set_count(block, BlockType::Data.entry(1));
    sound.edit_catalogue(|catalogue| catalogue.groups[0].free -= 1);
    sound.finds("K17", format!("{block}: counted 1 times as Data, no reference"));
}

#[test]
fn k7_and_k18_what_an_open_pool_would_allocate() {
    let sim = SimDisk::new(6, BLOCKS, SimOptions::default());
    sim.run(async {
        let mut world = World::new(&sim, 6).await;
        let volume = world.create(None, false).await;
        world.write(volume, 0, 9).await;
        world.pool.checkpoint().await.unwrap();
        let (extents, _) = world.pool.extents(volume, Lba::new(0), Lba::new(1)).await.unwrap();
        let run = Run { block: extents[0].block, len: 1 };
        world.pool.core.lock().state.space.release(run).unwrap();
        let report = world.pool.check(&|_, _| ()).await.unwrap();
        let found: Vec<_> = report.findings.iter().map(|f| (&*f.code, &*f.what)).collect();
        assert_eq!(found, [("K7", &*format!("{} may be allocated", run.block))]);
        {
            let mut inner = world.pool.core.lock();
            inner.state.space.take_exactly(run).unwrap();
            inner.state.space.recorded(run);
            let free = inner.state.space.take(1).unwrap();
            inner.state.space.untake(free);
            inner.state.reuse.freed(vec![free], true);
        }
        let report = world.pool.check(&|_, _| ()).await.unwrap();
        assert_eq!(report.findings.len(), 1, "{report:?}");
        assert_eq!(report.findings[0].code, "K18");
    })
    .unwrap();
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
