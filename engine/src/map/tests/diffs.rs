//! What differs between maps, and that what they share is not looked at.

use super::*;
use crate::map::{DiffRun, diff};

impl World {
    /// All that differs between two volumes (`None` is an empty one), in calls of `runs_max`.
    pub(super) fn diff(
        &mut self,
        old: Option<usize>,
        new: usize,
        end: u64,
        runs_max: usize,
    ) -> Vec<DiffRun> {
        let old = old.and_then(|at| self.volumes[at].root);
        let new = self.volumes[new].root;
        let mut runs: Vec<DiffRun> = Vec::new();
        let mut at = Lba::new(0);
        while at < Lba::new(end) {
            let mut out = Vec::new();
            let range = at..Lba::new(end);
            match diff(&self.cache, old.as_ref(), new.as_ref(), range, runs_max, &mut out) {
                Ok(next) => {
                    assert!(next > at && out.len() <= runs_max);
                    at = next;
                }
                Err(missing) => self.load(&missing),
            }
            runs.extend(out);
        }
        runs
    }

    /// Compares [`diff`] with the models.
    pub(super) fn check_diff(&mut self, old: Option<usize>, new: usize, end: u64, max: usize) {
        let mut found = BTreeMap::new();
        for run in self.diff(old, new, end, max) {
            for i in 0..run.len {
                let twice = found.insert(run.lba.get() + i, run.mapped_in_new);
                assert_eq!(twice, None);
            }
        }
        let empty = BTreeMap::new();
        let old = old.map_or(&empty, |at| &self.volumes[at].model);
        let new = &self.volumes[new].model;
        let differs = |lba: &u64| old.get(lba) != new.get(lba);
        let expected: BTreeMap<u64, bool> =
            (0..end).filter(differs).map(|lba| (lba, new.contains_key(&lba))).collect();
        assert_eq!(found, expected);
    }

    /// Drops every clean node, so that loads count the nodes that are visited.
    fn chill(&mut self) {
        self.checkpoint();
        self.cache = NodeCache::new(10_000, POOL, self.cache.fanout());
        self.loads = 0;
    }
}

#[test]
fn work_is_proportional_to_the_difference() {
    let mut world = World::new(Fanout { leaf_max: 10, inner_max: 10 }, 10_000);
    for lba in 0..20_000 {
        world.edit(0, lba * 2, 1, Some(BlockNo::new(1_000_000 + lba * 2)));
    }
    world.chill();
    world.clone_volume(0);
    let levels = u64::from(world.volumes[0].root.unwrap().level) + 1;
    assert!(levels >= 4);
    assert_eq!(world.diff(Some(0), 1, 1 << 34, 100), []);
    assert_eq!(world.loads, 0, "equal roots are not even read");

    world.map(1, 20_000, 1);
    world.unmap(1, 7, 2);
    world.chill();
    let run = |lba, mapped_in_new| DiffRun { lba: Lba::new(lba), len: 1, mapped_in_new };
    assert_eq!(world.diff(Some(0), 1, 1 << 34, 100), [run(8, false), run(20_000, true)]);
    assert!(world.loads <= 2 * 2 * levels, "{} nodes read", world.loads);
    // The other way round as well.
    world.chill();
    assert_eq!(world.diff(Some(1), 0, 1 << 34, 100), [run(8, true), run(20_000, true)]);
    assert!(world.loads <= 2 * 2 * levels, "{} nodes read", world.loads);
}

#[test]
fn a_tree_that_grew_still_shares_its_subtrees() {
    let mut world = World::new(Fanout { leaf_max: 4, inner_max: 4 }, 10_000);
    for lba in 0..200 {
        world.map(0, lba * 2, 1);
    }
    world.clone_volume(0);
    let level = world.volumes[1].root.unwrap().level;
    for lba in 400..2000 {
        world.map(1, lba * 2, 1);
    }
    assert!(world.volumes[1].root.unwrap().level > level);
    world.chill();
    world.check_diff(Some(0), 1, 800, 3);
    assert!(world.loads <= 8 * u64::from(level), "{} nodes read", world.loads);
    world.check_diff(Some(0), 1, 5000, 7);
    world.check_diff(Some(1), 0, 5000, 7);
    world.check_diff(None, 1, 5000, 5);
}

#[test]
fn one_call_is_bounded() {
    let mut world = World::new(Fanout { leaf_max: 4, inner_max: 4 }, 10_000);
    for lba in 0..5000 {
        world.edit(0, lba * 2, 1, Some(BlockNo::new(1_000_000 + lba * 2)));
    }
    let root = world.volumes[0].root;
    let mut out = Vec::new();
    let range = Lba::new(0)..Lba::new(1 << 34);
    let next = diff(&world.cache, None, root.as_ref(), range, usize::MAX, &mut out).unwrap();
    assert!(next < Lba::new(10_000) && out.len() <= 4 * 256);
}
