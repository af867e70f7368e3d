//! f07: maps whose nodes point anywhere: to each other, to themselves, to other levels, to data. The
//! checker says that something is wrong if, and only if, a walker that knows the format alone says
//! so; what is read of each block is what that walker finds, or an error where it finds one (of two
//! pointers that disagree about a node, the one that comes second may find it in the cache); and whatever
//! is done with the pool afterwards ends.
//!
//! ```text
//! seed, roots (2), nodes; for each node: level and entries, flaw, then 5 bytes an entry;
//! behind them 5 bytes a change of a node's bytes: node, place (2), xor, whether to fix the checksum
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::forge::{Forge, POOL, content};
use super::node::{Item, Wanted, reference};
use super::{Input, Reached};
use crate::gen_ops::Op;
use crate::model::{BLOCK_SECTORS, Birth};
use crate::run::{Config, perform};
use pando_engine::disk::sim::{SimDisk, SimOptions};
use pando_engine::error::{Error, Result};
use pando_engine::format::group::BlockType;
use pando_engine::format::node::{
    Extent, InnerEntry, LBA_END, LeafEntry, NodeBlock, NodePtr, Root, seal_crc,
};
use pando_engine::pool::{DumpForm, Pool, check_offline, dump_offline};
use pando_engine::units::{BLOCK_BYTES, BLOCK_SIZE, BlockNo, Lba, Seqno, VolumeId, to_usize};
use zerocopy::IntoBytes;

/// What the corpus must come to.
pub(super) const REACHES: &[&str] =
    &["blocks read", "broken pools", "errors", "shared nodes", "sound pools with a map"];

const POOL_BLOCKS: u64 = 240;
const JOURNAL_BLOCKS: u64 = 8;
const SEAL: u64 = 100;
/// Where nodes and data lie in the group.
const NODES_AT: u64 = 8;
const DATA_AT: u64 = 64;
const DATA_BLOCKS: u64 = 48;
const NODES_MAX: u64 = 16;
const ENTRIES_MAX: u64 = 8;
/// Blocks of the volumes.
const VOLUME_BLOCKS: u64 = 160;
/// Events after which a pool is said to hang.
const EVENTS_MAX: u64 = 20_000;

/// A node in the making.
struct Draft {
    node: NodeBlock,
    ptr: NodePtr,
    level: u8,
}

/// The nodes, the roots of the volumes among them, and what a walker finds.
struct Graph {
    drafts: Vec<Draft>,
    roots: Vec<Option<Root>>,
}

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    let seed = u64::from(input.byte());
    let mut forge = Forge::new(POOL_BLOCKS, JOURNAL_BLOCKS, SEAL);
    let graph = Graph::of(&mut input, &forge);
    for (number, root) in graph.roots.iter().enumerate() {
        forge.volume(["a", "b"][number], VOLUME_BLOCKS, *root);
    }
    for (at, draft) in (0..).zip(&graph.drafts) {
        forge.image.write(forge.block(NODES_AT + at), 0, draft.node.0.as_bytes());
    }
    for at in 0..DATA_BLOCKS {
        forge.data(forge.block(DATA_AT + at));
    }
    let mut walker = Walker::new(&forge);
    for root in graph.roots.iter().flatten() {
        walker.walk(root);
    }
    let shared = !walker.shared.is_empty();
    let (sound, readable) = (walker.sound, walker.readable);
    let find = |root: &Option<Root>| {
        let both = |lba| [true, false].map(|strict| walker.find(root.as_ref(), lba, strict));
        (0..VOLUME_BLOCKS).map(both).collect()
    };
    let expected: Vec<Vec<[Found; 2]>> = graph.roots.iter().map(find).collect();
    let counted = walker.counts.keys().copied().collect();
    forge.counts = walker.counts;
    if shared {
        // Nobody owns a node that has two pointers to it.
        forge.catalogue.volumes.iter_mut().for_each(|volume| volume.shared_at = Seqno::new(SEAL));
        reached.note("shared nodes");
    }
    let mapped = graph.roots.iter().any(Option::is_some);
    reached.note(if !sound {
        "broken pools"
    } else if mapped {
        "sound pools with a map"
    } else {
        "empty pools"
    });
    let works = sound && readable;
    let mut use_of_it = Use { expected, counted, sound, works, seed, reached };
    let image = forge.seal();
    let sim = SimDisk::from_image(image, seed, SimOptions::default());
    sim.set_cut_at(EVENTS_MAX);
    assert!(sim.run(use_of_it.all(&sim)).is_some(), "it hangs");
    let again = SimDisk::from_image(sim.image_after_kill(seed), seed, SimOptions::default());
    again.set_cut_at(EVENTS_MAX);
    assert!(again.run(use_of_it.again(&again)).is_some(), "it hangs when it is opened again");
}

impl Graph {
    fn of(input: &mut Input<'_>, forge: &Forge) -> Self {
        let roots = [input.byte(), input.byte()];
        let count = input.below(NODES_MAX + 1);
        let mut drafts = Vec::new();
        for number in 0..count {
            let draft = Draft::of(input, forge, number, &drafts);
            drafts.push(draft);
        }
        while !input.is_empty() {
            let (node, at) = (input.byte(), usize::from(input.short()) % BLOCK_SIZE);
            let (by, keep) = (input.byte(), input.byte() & 1 == 1);
            let Some(at_node) = usize::from(node).checked_rem(drafts.len()) else { break };
            let bytes = drafts[at_node].node.0.as_mut_bytes();
            bytes[at] ^= by;
            if !keep {
                seal_crc(bytes);
            }
        }
        let root = |number: u8| {
            // The last node is the likeliest root: it can point to all the others.
            let back = usize::from(number >> 2) + 1;
            let draft = drafts.len().checked_sub(back).map(|at| &drafts[at])?;
            (number & 3 != 3).then_some(Root { ptr: draft.ptr, level: draft.level })
        };
        let roots = roots.map(root).to_vec();
        Self { drafts, roots }
    }
}

impl Draft {
    fn of(input: &mut Input<'_>, forge: &Forge, number: u64, others: &[Self]) -> Self {
        let shape = input.byte();
        let flaw = input.byte();
        let level = match shape >> 6 {
            0 | 1 => 0,
            2 => 1 + others.iter().map(|other| other.level).max().unwrap_or(0),
            _ => shape >> 3 & 7,
        };
        let count = 1 + u64::from(shape) % ENTRIES_MAX;
        let block = forge.block(NODES_AT + number);
        let birth = Seqno::new(10 + number);
        let mut node = NodeBlock::ZERO;
        node.0.reset(&POOL, level);
        node.0.place(block, birth);
        let (first, mapped, own) = if level == 0 {
            let extents: Vec<Extent> = extents(input, forge, count);
            for (at, extent) in extents.iter().enumerate() {
                node.0.splice(at..at, &[LeafEntry::new(extent)]);
            }
            let own = extents.iter().filter(|e| e.own).map(|e| e.len).sum();
            (extents[0].lba, extents.iter().map(|e| e.len).sum(), own)
        } else {
            let pointers = pointers(input, forge, count, (shape, number), others);
            for (at, ptr) in pointers.iter().enumerate() {
                node.0.splice(at..at, &[InnerEntry::new(ptr)]);
            }
            let sum = |each: fn(&NodePtr) -> u64| pointers.iter().map(each).sum();
            (pointers[0].lba, sum(|ptr| ptr.mapped), sum(|ptr| ptr.own))
        };
        match flaw {
            1 => node.0.place(block.plus(1), birth),
            2 => node.0.place(block, birth.next()),
            _ => {}
        }
        seal_crc(node.0.as_mut_bytes());
        Self { node, ptr: NodePtr { lba: first, block, birth, mapped, own }, level }
    }
}

/// Extents in order, 5 bytes each.
fn extents(input: &mut Input<'_>, forge: &Forge, count: u64) -> Vec<Extent> {
    let mut lba = 0;
    let mut all = Vec::new();
    for at in 0..count {
        let [gap, len, block, tweak, wide] = [(); 5].map(|()| u64::from(input.byte()));
        lba += if at == 0 { gap % VOLUME_BLOCKS } else { gap % 16 };
        let len = if wide == 0xFF { 1 + len * 200 } else { 1 + len % 8 };
        let block = match tweak {
            0xFE => BlockNo::new(block),
            0xFF => forge.block(NODES_AT).plus(block),
            _ => forge.block(DATA_AT + block % DATA_BLOCKS),
        };
        all.push(Extent { lba: Lba::new(lba), block, len, own: tweak == 0xFD });
        lba += len;
    }
    all
}

/// Pointers to other nodes, 5 bytes each; in the order of their keys, unless the shape says no.
fn pointers(
    input: &mut Input<'_>,
    forge: &Forge,
    count: u64,
    (shape, own_number): (u8, u64),
    others: &[Draft],
) -> Vec<NodePtr> {
    let mut all = Vec::new();
    for _ in 0..count {
        let [child, tweak, by, lba, _] = [(); 5].map(|()| u64::from(input.byte()));
        // To a node before this one, mostly; else to itself, or to one that is still to be made.
        let number = child % (own_number + 1 + u64::from(tweak == 1));
        let mut ptr = others.get(to_usize(number)).map_or_else(
            || NodePtr {
                lba: Lba::new(lba),
                block: forge.block(NODES_AT + number),
                birth: Seqno::new(10 + number),
                mapped: 1 + by,
                own: 0,
            },
            |other| other.ptr,
        );
        match tweak {
            2 => ptr.lba = Lba::new(ptr.lba.get() + by),
            3 => ptr.mapped += by,
            4 => ptr.birth = ptr.birth.plus(by),
            5 => ptr.block = forge.block(DATA_AT + by % DATA_BLOCKS),
            6 => ptr.block = BlockNo::new(by),
            7 => ptr.own += by,
            _ => {}
        }
        all.push(ptr);
    }
    if shape & 0x20 == 0 {
        all.sort_by_key(|ptr| ptr.lba);
        all.dedup_by_key(|ptr| ptr.lba);
    }
    all
}

/// What stands behind a block of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Zeros,
    Data(BlockNo),
    /// A node on the way, or the data itself, is not what its pointer says.
    Error,
}

/// Walks maps by the format alone.
struct Walker<'a> {
    forge: &'a Forge,
    /// Nodes by what their first pointer says of them.
    met: BTreeMap<u64, [u64; 5]>,
    counts: BTreeMap<BlockNo, (BlockType, u32)>,
    data: BTreeSet<BlockNo>,
    /// The checker must find nothing.
    sound: bool,
    /// All data is there. (To look for that is the scrub's, and not the checker's.)
    readable: bool,
    /// Nodes that several pointers name.
    shared: BTreeSet<u64>,
}

impl<'a> Walker<'a> {
    fn new(forge: &'a Forge) -> Self {
        let data = (0..DATA_BLOCKS).map(|at| forge.block(DATA_AT + at)).collect();
        let (met, counts, shared) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        Self { forge, met, counts, data, sound: true, readable: true, shared }
    }

    fn wanted(root: &Root) -> (Wanted, u64) {
        let NodePtr { lba, block, birth, mapped, own } = root.ptr;
        let told = Some((lba.get(), mapped));
        let (block, birth, level) = (block.get(), birth.get(), root.level.into());
        (Wanted { block, birth, level, end: 1 << 48, told }, own)
    }

    fn decode(&self, wanted: &Wanted) -> Option<Vec<Item>> {
        let block = BlockNo::new(wanted.block);
        self.forge.superblock.geometry.locate(block)?;
        reference(self.forge.image.block(block), wanted, &POOL)
    }

    /// Counts a reference. A block that is used as two things is not sound.
    fn refer(&mut self, block: BlockNo, kind: BlockType) {
        // The catalogue lies in the first block.
        if self.forge.superblock.geometry.locate(block).is_none() || block == self.forge.block(0) {
            self.sound = false;
            return;
        }
        let entry = self.counts.entry(block).or_insert((kind, 0));
        self.sound &= entry.0 == kind;
        entry.1 += 1;
    }

    /// Counts all references below a root and judges.
    fn walk(&mut self, root: &Root) {
        let mut left = vec![Self::wanted(root)];
        while let Some((wanted, own)) = left.pop() {
            let (lba, mapped) = wanted.told.expect("there is a pointer");
            let said = [wanted.birth, wanted.level, lba, mapped, own];
            self.refer(BlockNo::new(wanted.block), BlockType::Node);
            if let Some(known) = self.met.get(&wanted.block) {
                self.shared.insert(wanted.block);
                self.sound &= *known == said;
                continue;
            }
            self.met.insert(wanted.block, said);
            let Some(items) = self.decode(&wanted) else {
                self.sound = false;
                continue;
            };
            self.sound &= wanted.birth <= SEAL;
            let mut own_below = 0;
            for (at, item) in items.iter().enumerate() {
                match *item {
                    Item::Extent(lba, len, block, own) => {
                        own_below += if own { len } else { 0 };
                        self.sound &= lba + len <= VOLUME_BLOCKS;
                        let known = |offset| self.data.contains(&BlockNo::new(block + offset));
                        self.readable &= (0..len).all(known);
                        for offset in 0..len.min(1000) {
                            self.refer(BlockNo::new(block + offset), BlockType::Data);
                        }
                    }
                    Item::Pointer { own, .. } => {
                        own_below += own;
                        left.push((below(&wanted, &items, at), own));
                    }
                }
            }
            self.sound &= own_below == own;
        }
    }

    /// What a read of a block must give. If not `strict`: when a node that several pointers name, or
    /// one below it, has been found by another way before, where this way's pointers say otherwise.
    fn find(&self, root: Option<&Root>, lba: u64, strict: bool) -> Found {
        let Some(root) = root else { return Found::Zeros };
        let (mut wanted, _) = Self::wanted(root);
        let mut loose = false;
        loop {
            loose |= !strict && self.shared.contains(&wanted.block);
            if loose {
                wanted = Wanted { told: None, end: LBA_END, ..wanted };
            }
            let Some(items) = self.decode(&wanted) else { return Found::Error };
            let key = |item: &Item| match *item {
                Item::Extent(lba, ..) | Item::Pointer { lba, .. } => lba,
            };
            // What would hold it is looked at, even where it lies before the first.
            let at = items.iter().rposition(|item| key(item) <= lba).unwrap_or(0);
            match items[at] {
                Item::Extent(first, len, ..) if lba < first || lba >= first + len => {
                    return Found::Zeros;
                }
                Item::Extent(first, _, block, _) => {
                    let block = BlockNo::new(block + lba - first);
                    let known = self.data.contains(&block);
                    return if known { Found::Data(block) } else { Found::Error };
                }
                Item::Pointer { .. } => wanted = below(&wanted, &items, at),
            }
        }
    }
}

/// What pointer number `at` of a node says.
fn below(parent: &Wanted, items: &[Item], at: usize) -> Wanted {
    let Item::Pointer { lba, block, birth, mapped, .. } = items[at] else {
        unreachable!("an extent points to no node")
    };
    let end = match items.get(at + 1) {
        Some(Item::Pointer { lba, .. }) => *lba,
        _ => parent.end,
    };
    let level = parent.level - 1;
    Wanted { block, birth, level, end, told: Some((lba, mapped)) }
}

/// What is done with the pool.
struct Use<'a> {
    expected: Vec<Vec<[Found; 2]>>,
    /// Blocks that do not count as free.
    counted: BTreeSet<BlockNo>,
    /// The checker must find nothing.
    sound: bool,
    /// Everything that is done must succeed.
    works: bool,
    seed: u64,
    reached: &'a mut Reached,
}

impl Use<'_> {
    async fn all(&mut self, sim: &SimDisk) {
        let checked = check_offline(&sim.disk(), &|_, _| ()).await;
        let findings = checked.map(|report| report.findings);
        assert_eq!(
            findings.as_ref().is_ok_and(Vec::is_empty),
            self.sound,
            "the checker finds {findings:?}"
        );
        drop(dump_offline(&sim.disk(), DumpForm::Text, &mut std::io::sink()).await);
        let pool = match open(sim).await {
            Ok(pool) => pool,
            Err(error) => {
                assert!(!self.sound, "a sound pool does not open: {error}");
                return;
            }
        };
        self.read(&pool).await;
        let checked = pool.check(&|_, _| ()).await.map(|report| report.findings);
        assert_eq!(checked.as_ref().is_ok_and(Vec::is_empty), self.sound, "open: {checked:?}");
        self.change(&pool).await;
    }

    /// Whether a read was refused because a node lies in a block that counts as free, and is set
    /// aside. Only the first of two pointers that disagree about a node is followed when references
    /// are counted.
    fn in_free_block(&self, error: &Error) -> bool {
        let text = error.to_string();
        let names = |block: &BlockNo| text.starts_with(&format!("map node at {block}:"));
        text.contains("counts as free") && !self.counted.iter().any(names)
    }

    /// Reads each block by itself.
    async fn read(&mut self, pool: &Pool) {
        for (number, expected) in (1..).zip(&self.expected) {
            let device = pool.device(VolumeId::new(number)).expect("the volume exists");
            for (lba, [strict, loose]) in (0..).zip(expected) {
                let read = device.read(lba * BLOCK_BYTES, 4096).await;
                let found = if read.is_ok() && *strict == Found::Error { loose } else { strict };
                match (found, &read) {
                    (Found::Error, Err(_)) => self.reached.note("errors"),
                    (Found::Zeros, Ok(data)) => {
                        assert!(data.bytes().iter().all(|byte| *byte == 0), "lba {lba} is a hole");
                    }
                    (Found::Data(block), Ok(data)) => {
                        assert!(data.bytes() == content(*block), "lba {lba} is not {block}");
                        self.reached.note("blocks read");
                    }
                    (_, Err(error)) if self.in_free_block(error) => self.reached.note("errors"),
                    _ => panic!("volume {number}, lba {lba}: {found:?}, read {:?}", read.err()),
                }
            }
        }
    }

    /// Whatever comes of it, it ends; on a sound pool all of it works.
    async fn change(&mut self, pool: &Pool) {
        let at = self.seed % VOLUME_BLOCKS * BLOCK_SECTORS;
        let rest = VOLUME_BLOCKS * BLOCK_SECTORS - at;
        let a = || "a".to_owned();
        let copy = |name: &str, source: &str| Birth {
            name: name.into(),
            size_bytes: None,
            source: Some(source.into()),
            snapshot: false,
        };
        let ops = [
            Op::Write { volume: a(), first: at, count: 11.min(rest), fua: false },
            Op::Create(vec![copy("c", "b"), copy("d", "a")]),
            Op::Discard { volume: a(), first: at, count: 300.min(rest) },
            Op::Write { volume: "b".into(), first: at, count: 8, fua: true },
            Op::Checkpoint,
            Op::Delete(a()),
            Op::Checkpoint,
            Op::Delete("c".into()),
            Op::Checkpoint,
        ];
        for op in ops {
            let done = perform(pool, &op, 1).await;
            assert!(done.is_ok() || !self.works, "{op:?} on a sound pool: {done:?}");
        }
        if self.works {
            let checked = pool.check(&|_, _| ()).await.map(|report| report.findings);
            assert_eq!(checked.expect("a sound pool"), vec![], "after changes");
        }
    }

    /// After the end of the process.
    async fn again(&mut self, sim: &SimDisk) {
        let opened = open(sim).await;
        assert!(opened.is_ok() || !self.sound, "a sound pool does not open again");
        let checked = check_offline(&sim.disk(), &|_, _| ()).await;
        let clean = checked.is_ok_and(|report| report.findings.is_empty());
        assert!(clean || !self.works, "a sound pool is damaged when it is opened again");
    }
}

async fn open(sim: &SimDisk) -> Result<Pool> {
    Config::default().open(sim).await
}
