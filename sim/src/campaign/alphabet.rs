//! The operations of which exhaustive campaigns make all short sequences, and the pool on which
//! they happen: few volumes with few extents, but every relation between them.
//!
//! ```text
//!  a (20 blocks and 3 sectors) --- s, a snapshot of it --- b, a clone of that
//!  extents: 0 = blocks 1, 2    1 = blocks 6 to 9    2 = blocks 18 to the end
//! ```

use crate::case::{CaseLife, End};
use crate::gen_ops::Op;
use crate::model::{BLOCK_SECTORS, Birth, Model};
use crate::run::Config;
use crate::stage::Act;
use pando_engine::disk::sim::SimImage;
use pando_engine::map::Fanout;
use pando_engine::units::SECTOR_BYTES;

const SECTORS: u64 = 20 * BLOCK_SECTORS + 3;
/// First block and blocks of the extents; the last one has a short block more.
const EXTENTS: [(u64, u64); 3] = [(1, 2), (6, 4), (18, 2)];

/// What the operation of a sequence depends on.
#[derive(Default)]
struct Scene {
    /// Its place in the sequence.
    place: usize,
    /// The volume or snapshot born last in the sequence.
    born: Option<String>,
}

/// An operation of the alphabet.
pub struct Symbol {
    /// For people, and to repeat a sequence.
    pub name: &'static str,
    what: What,
}

enum What {
    Op(fn(&Scene) -> Option<Op>),
    /// The process is killed while nothing is under way, and the pool opened again.
    Restart,
}

const fn op(name: &'static str, make: fn(&Scene) -> Option<Op>) -> Symbol {
    Symbol { name, what: What::Op(make) }
}

fn sectors((block, blocks): (u64, u64)) -> (u64, u64) {
    (block * BLOCK_SECTORS, blocks * BLOCK_SECTORS)
}

fn write(volume: &str, (first, count): (u64, u64), fua: bool) -> Option<Op> {
    Some(Op::Write { volume: volume.into(), first, count, fua })
}

/// The first block of an extent.
fn write_block(volume: &str, extent: usize) -> Option<Op> {
    write(volume, sectors((EXTENTS[extent].0, 1)), false)
}

/// A part of the first block of an extent.
fn write_part(volume: &str, extent: usize) -> Option<Op> {
    write(volume, (EXTENTS[extent].0 * BLOCK_SECTORS + 2, 3), false)
}

/// From inside the hole before an extent to inside its second block.
fn write_straddling(volume: &str, extent: usize) -> Option<Op> {
    write(volume, (EXTENTS[extent].0 * BLOCK_SECTORS - 3, 3 + BLOCK_SECTORS + 5), false)
}

fn zero(volume: &str, (first, count): (u64, u64), no_hole: bool) -> Option<Op> {
    Some(Op::Zero { volume: volume.into(), first, count, no_hole })
}

fn discard(volume: &str, (first, count): (u64, u64)) -> Option<Op> {
    Some(Op::Discard { volume: volume.into(), first, count })
}

fn births(scene: &Scene, of: &[(&str, bool)], longer: bool) -> Option<Op> {
    let birth = |(number, (source, snapshot)): (usize, &(&str, bool))| Birth {
        name: format!("{}{number}-of-{source}", ["x", "y", "z"][scene.place % 3]),
        size_bytes: longer.then_some((SECTORS + 12) * SECTOR_BYTES),
        source: Some((*source).into()),
        snapshot: *snapshot,
    };
    Some(Op::Create(of.iter().enumerate().map(birth).collect()))
}

fn grow(volume: &str) -> Option<Op> {
    Some(Op::Grow(volume.into(), (SECTORS + 24) * SECTOR_BYTES))
}

/// The alphabet.
pub const ALPHABET: [Symbol; 44] = [
    op("write-a0", |_| write_block("a", 0)),
    op("write-a1", |_| write_block("a", 1)),
    op("write-a2", |_| write_block("a", 2)),
    op("write-b0", |_| write_block("b", 0)),
    op("write-b1", |_| write_block("b", 1)),
    op("write-hole-a", |_| write("a", sectors((12, 1)), false)),
    op("part-a0", |_| write_part("a", 0)),
    op("part-a1", |_| write_part("a", 1)),
    op("part-b0", |_| write_part("b", 0)),
    op("part-hole-a", |_| write("a", (13 * BLOCK_SECTORS + 1, 2), false)),
    op("part-end-a", |_| write("a", (SECTORS - 2, 2), false)),
    op("straddle-a0", |_| write_straddling("a", 0)),
    op("straddle-a1", |_| write_straddling("a", 1)),
    op("straddle-b1", |_| write_straddling("b", 1)),
    op("long-a", |_| write("a", sectors((4, 9)), false)),
    op("long-b", |_| write("b", sectors((0, 9)), false)),
    op("fua-a1", |_| write("a", sectors((7, 2)), true)),
    op("fua-part-b0", |_| write("b", (EXTENTS[0].0 * BLOCK_SECTORS + 4, 2), true)),
    op("zero-a0", |_| zero("a", sectors(EXTENTS[0]), false)),
    op("zero-part-a1", |_| zero("a", (6 * BLOCK_SECTORS + 5, 2 * BLOCK_SECTORS), false)),
    op("zero-keep-a1", |_| zero("a", sectors(EXTENTS[1]), true)),
    op("zero-b1", |_| zero("b", sectors(EXTENTS[1]), false)),
    op("discard-part-a1", |_| discard("a", sectors((7, 2)))),
    op("discard-a1", |_| discard("a", sectors(EXTENTS[1]))),
    op("discard-end-a", |_| discard("a", (18 * BLOCK_SECTORS, SECTORS - 18 * BLOCK_SECTORS))),
    op("discard-all-a", |_| discard("a", (0, SECTORS))),
    op("discard-part-b1", |_| discard("b", sectors((8, 1)))),
    op("flush", |_| Some(Op::Flush)),
    op("snapshot-a", |scene| births(scene, &[("a", true)], false)),
    op("snapshot-b", |scene| births(scene, &[("b", true)], false)),
    op("clone-a", |scene| births(scene, &[("a", false)], false)),
    op("clone-b", |scene| births(scene, &[("b", false)], false)),
    op("clone-s-longer", |scene| births(scene, &[("s", false)], true)),
    op("group-snapshot", |scene| births(scene, &[("a", true), ("b", true)], false)),
    op("group-clone", |scene| births(scene, &[("a", false), ("s", false)], false)),
    op("write-born", |scene| write_block(scene.born.as_ref()?, 1)),
    op("delete-born", |scene| Some(Op::Delete(scene.born.clone()?))),
    op("delete-a", |_| Some(Op::Delete("a".into()))),
    op("delete-b", |_| Some(Op::Delete("b".into()))),
    op("delete-s", |_| Some(Op::Delete("s".into()))),
    op("grow-a", |_| grow("a")),
    op("checkpoint", |_| Some(Op::Checkpoint)),
    op("reopen", |_| Some(Op::Reopen)),
    Symbol { name: "restart", what: What::Restart },
];

/// The pool of exhaustive campaigns.
#[must_use]
pub const fn config() -> Config {
    Config {
        pool_blocks: 192,
        journal_blocks: 8,
        fanout: Fanout { leaf_max: 4, inner_max: 4 },
        cache_bytes: 1 << 20,
        discard: true,
        cascade_nodes: 2,
    }
}

/// The life in which the pool gets its volumes.
#[must_use]
pub fn setup() -> CaseLife {
    let birth = |name: &str, source: Option<&str>, snapshot| {
        let size_bytes = source.is_none().then_some(SECTORS * SECTOR_BYTES);
        let source = source.map(Into::into);
        Some(Op::Create(vec![Birth { name: name.into(), size_bytes, source, snapshot }]))
    };
    let to_the_end = (18 * BLOCK_SECTORS, SECTORS - 18 * BLOCK_SECTORS);
    let ops = [
        birth("a", None, false),
        write("a", sectors(EXTENTS[0]), false),
        write("a", sectors(EXTENTS[1]), false),
        write("a", to_the_end, false),
        birth("s", Some("a"), true),
        birth("b", Some("s"), false),
        write_block("b", 1),
        write_block("a", 0),
    ];
    let acts = ops.into_iter().flatten().map(Act::One).collect();
    CaseLife { acts, end: End::Close, ..CaseLife::new(1) }
}

/// The number of a symbol.
#[must_use]
pub fn symbol(name: &str) -> Option<usize> {
    ALPHABET.iter().position(|symbol| symbol.name == name)
}

/// The lives of a sequence behind [`setup`]; `None` if it cannot be done, or is a shorter one.
#[must_use]
pub fn lives(sequence: &[usize], model: &Model, seed: u64) -> Option<Vec<CaseLife>> {
    let mut model = model.clone();
    let life = || CaseLife::new(seed);
    let mut lives = vec![life()];
    let mut scene = Scene::default();
    for (place, number) in sequence.iter().enumerate() {
        scene.place = place;
        let here = lives.last_mut().expect("there is always one");
        match &ALPHABET[*number].what {
            What::Restart => {
                if here.acts.is_empty() {
                    return None;
                }
                here.end = End::Kill { at: None, seed, memory: true };
                lives.push(life());
            }
            What::Op(make) => {
                let op = make(&scene)?;
                if !op.fits(&model) {
                    return None;
                }
                op.steps(&model, 1).iter().for_each(|step| model.apply(step));
                match &op {
                    Op::Create(births) => scene.born = Some(births[0].name.clone()),
                    Op::Delete(name) if scene.born.as_ref() == Some(name) => scene.born = None,
                    _ => {}
                }
                here.acts.push(Act::One(op));
            }
        }
    }
    Some(lives)
}

/// An image of the pool after [`setup`].
pub(super) struct Base {
    pub(super) image: SimImage,
    pub(super) log: crate::run::Log,
}
