//! Every sequence of a few operations, cut at every event from its last operation on (the cuts
//! before that are those of a shorter sequence), with every subset of what was not durable.

use super::alphabet::{ALPHABET, Base, config, lives, setup};
use super::tally::{Failure, caught};
use crate::case::live;
use crate::crash::{Explorer, Reach};
use crate::model::Model;
use crate::run::Log;
use crate::stage::Keep;
use pando_engine::disk::sim::Rng;
use pando_engine::units::{to_u64, to_usize};

/// Pieces of which every subset is tried.
const SUBSETS_OF: usize = 10;

/// Explores sequences.
pub struct Exhaustive {
    /// What does the work, and counts.
    pub explorer: Explorer,
    /// Sequences explored.
    pub sequences: u64,
    /// Sequences that cannot be done, or are the same as a shorter one.
    pub impossible: u64,
    base: Base,
}

/// How far to go with sequences of a length: up to two operations the recovery of every state is cut
/// at every event, beyond that the recovery of some states, at some events.
const fn reach(length: usize) -> Reach {
    let (plans, nested_one_in, nested_cuts) = match length {
        0 | 1 => ([4, 16, 4], [1, 16], 1000),
        2 => ([4, 3, 3], [1, 64], 1000),
        _ => ([4, 4, 3], [64, 8], 4),
    };
    Reach { plans, nested_one_in, nested_cuts, go_on_one_in: 16 }
}

impl Default for Exhaustive {
    fn default() -> Self {
        let mut explorer = Explorer::new(config(), reach(1), 0);
        explorer.subsets_of = SUBSETS_OF;
        let log = Log::new(Model::default());
        let (image, log, _) = live(&config(), config().formatted(), log, &setup(), &explorer.rares);
        Self { explorer, sequences: 0, impossible: 0, base: Base { image, log } }
    }
}

impl Exhaustive {
    /// Explores one sequence of symbols.
    ///
    /// # Errors
    /// What was found wrong.
    pub fn explore(&mut self, sequence: &[usize]) -> Result<(), Failure> {
        let seed = sequence.iter().fold(7, |seed, symbol| seed * 64 + to_u64(*symbol));
        let Some(lives) = lives(sequence, self.base.log.last(), seed) else {
            self.impossible += 1;
            return Ok(());
        };
        self.sequences += 1;
        let Self { explorer, base, .. } = self;
        explorer.begin(config(), seed);
        explorer.reach = reach(sequence.len());
        let done = caught(|| {
            explorer.trail.push(setup());
            let (mut image, mut log) = (base.image.clone(), base.log.clone());
            let (last, before) = lives.split_last().expect("there is always one");
            for life in before {
                explorer.trail.push(life.clone());
                (image, log, _) = live(&config(), image, log, life, &explorer.rares);
            }
            let keep = Keep::From(last.acts.len());
            for seen in &explorer.watch(image, &log, last, keep).seen {
                explorer.cut(seen, last);
                explorer.kill(seen, last, true);
            }
        });
        done.map_err(|why| {
            let names: Vec<&str> = sequence.iter().map(|number| ALPHABET[*number].name).collect();
            let repeat = format!("pando-sim exhaustive --sequence {}", names.join(","));
            Failure { repeat, why, case: Box::new(explorer.case()) }
        })
    }
}

/// How many sequences of a length there are.
#[must_use]
pub fn count(length: usize) -> u64 {
    to_u64(ALPHABET.len()).pow(pando_engine::units::to_u32(to_u64(length)))
}

/// The sequence of a number: all of them in an order that jumps about, so that the first ones are a
/// fair sample of all.
#[must_use]
pub fn sequence(length: usize, number: u64, order: u64) -> Vec<usize> {
    let all = count(length);
    let mut rest = (number * step(all, order) + order) % all;
    let mut symbols = Vec::with_capacity(length);
    for _ in 0..length {
        symbols.push(to_usize(rest % to_u64(ALPHABET.len())));
        rest /= to_u64(ALPHABET.len());
    }
    symbols
}

/// A number that has no divisor in common with `all`, so that its multiples go through everything.
fn step(all: u64, order: u64) -> u64 {
    const fn divisor(mut one: u64, mut other: u64) -> u64 {
        while other > 0 {
            (one, other) = (other, one % other);
        }
        one
    }
    let mut rng = Rng::new(order);
    loop {
        let step = 1 + rng.below(all);
        if divisor(step, all) == 1 {
            return step;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_sequence_has_its_number() {
        for order in 0..3 {
            let all: BTreeSet<_> = (0..count(2)).map(|number| sequence(2, number, order)).collect();
            assert_eq!(to_u64(all.len()), count(2));
        }
    }
}
