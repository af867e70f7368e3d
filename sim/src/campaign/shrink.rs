//! Makes a failing case smaller: fewer lives, fewer operations, an earlier cut, a simpler plan, as
//! long as it fails in the same place of the code, within a bounded number of tries.
//!
//! When an operation is left out, everything after it happens at other events. So a cut is looked for
//! again, near where it was: as far behind the beginning of the same operation, then elsewhere.

use super::tally::caught;
use crate::case::{Case, CaseLife, End, live, play};
use crate::gen_ops::Op;
use crate::model::{BLOCK_SECTORS, Model};
use crate::rare::Rares;
use crate::run::Log;
use crate::stage::{Act, Keep, Seen, Stage};
use crate::trouble::Trouble;
use pando_engine::disk::sim::{CutPlan, Fault, Grain};
use pando_engine::units::to_u64;

/// Runs of a case in all.
const TRIES_MAX: usize = 4000;
/// Runs in the search for a cut, or for the operation that a fault strikes, after each change.
const SEARCH_MAX: usize = 60;

/// A smaller case that fails as `case` does, and how; `None` if it does not fail when it is run
/// again.
#[must_use]
pub fn shrink(case: &Case) -> Option<(Case, String)> {
    let why = caught(|| case.run()).err()?;
    let mut shrinker = Shrinker { place: place(&why), best: case.clone(), why, tries: TRIES_MAX };
    while shrinker.tries > 0 {
        let before = shrinker.size();
        shrinker.fewer_lives();
        for life in (0..shrinker.best.lives.len()).rev() {
            shrinker.fewer_acts(life);
            shrinker.simpler_end(life);
        }
        shrinker.shorter_writes();
        if shrinker.size() >= before {
            break;
        }
    }
    Some((shrinker.best, shrinker.why))
}

/// Where a panic was, as the first line of what it says tells.
fn place(why: &str) -> String {
    why.lines().next().unwrap_or_default().to_owned()
}

struct Shrinker {
    place: String,
    best: Case,
    why: String,
    tries: usize,
}

/// How complicated a plan is.
const fn rank(plan: CutPlan) -> usize {
    match plan {
        CutPlan::KeepNone => 0,
        CutPlan::KeepAll => 1,
        CutPlan::Prefix(Grain::Block, _) => 2,
        CutPlan::OnlyOne(Grain::Block, _) => 3,
        CutPlan::AllBut(Grain::Block, _) => 4,
        CutPlan::Mask(Grain::Block, bits) => 5 + bits.count_ones() as usize,
        CutPlan::Prefix(..) | CutPlan::OnlyOne(..) | CutPlan::AllBut(..) => 100,
        CutPlan::Mask(..) => 101,
        CutPlan::Subset(_) => 102,
        CutPlan::Torn(_) | CutPlan::Garbled(_) => 103,
    }
}

impl Shrinker {
    /// Lives, acts, sectors, events until the cuts, plans: the less the better, in this order.
    fn size(&self) -> [u64; 5] {
        let lives = &self.best.lives;
        let sectors = |act: &Act| match act {
            Act::One(
                Op::Write { count, .. } | Op::Zero { count, .. } | Op::Discard { count, .. },
            ) => *count,
            Act::Race(..) => BLOCK_SECTORS,
            Act::One(_) => 1,
        };
        let plan = |life: &CaseLife| match life.end {
            End::Power { plan, .. } => to_u64(rank(plan)),
            _ => 0,
        };
        [
            to_u64(lives.len()),
            to_u64(self.best.acts()),
            lives.iter().flat_map(|life| &life.acts).map(sectors).sum(),
            lives.iter().filter_map(|life| life.end.at()).sum(),
            lives.iter().map(plan).sum(),
        ]
    }

    /// Takes a case if it fails in the same way.
    fn take(&mut self, case: Case) -> bool {
        if self.tries == 0 {
            return false;
        }
        self.tries -= 1;
        let Err(why) = caught(|| case.run()) else { return false };
        let same = place(&why) == self.place;
        if same {
            (self.best, self.why) = (case, why);
        }
        same
    }

    fn fewer_lives(&mut self) {
        let mut number = 0;
        while number + 1 < self.best.lives.len() {
            let mut case = self.best.clone();
            case.lives.remove(number);
            if !self.take(case) {
                number += 1;
            }
        }
    }

    /// Leaves out half of the acts of a life, then a quarter, and so on.
    fn fewer_acts(&mut self, life: usize) {
        let mut size = self.best.lives[life].acts.len();
        while size > 0 {
            let mut from = 0;
            while from < self.best.lives[life].acts.len() && self.tries > 0 {
                let end = (from + size).min(self.best.lives[life].acts.len());
                if !self.take_without(life, from, end) {
                    from += size;
                }
            }
            size /= 2;
        }
    }

    /// Takes the case without some acts of a life, if it fails so with a cut or a fault near where
    /// they were.
    fn take_without(&mut self, life: usize, from: usize, end: usize) -> bool {
        let mut case = self.best.clone();
        let cut = case.lives[life].end.at();
        let before = cut.and_then(|_| watch(&case, life));
        case.lives[life].acts.drain(from..end);
        if let Some(Trouble::Fault(fault)) = case.lives[life].troubles.first().copied() {
            return self.take_with_fault(&case, life, fault);
        }
        let (Some(cut), Some(before)) = (cut, before) else { return self.take(case) };
        let Some(after) = watch(&case, life) else { return false };
        let was = place_of(&before, cut);
        // The operation that was under way has another number now.
        let begun = if was.0 > end { was.0 - (end - from) } else { was.0.min(from) };
        let mut moments: Vec<&Seen> = after.iter().collect();
        moments.sort_by_key(|seen| {
            let here = place_of(&after, seen.moment.events());
            (here.0.abs_diff(begun), here.1.abs_diff(was.1))
        });
        let mut left = SEARCH_MAX;
        for seen in moments {
            for end in ends(case.lives[life].end, seen) {
                if left == 0 {
                    return false;
                }
                left -= 1;
                case.lives[life].end = end;
                if self.take(case.clone()) {
                    return true;
                }
            }
        }
        false
    }

    fn take_with_fault(&mut self, case: &Case, life: usize, fault: Fault) -> bool {
        let first = fault.after.saturating_sub(to_u64(SEARCH_MAX));
        (first..=fault.after).rev().any(|after| {
            let mut case = case.clone();
            case.lives[life].troubles = vec![Trouble::Fault(Fault { after, ..fault })];
            self.take(case)
        })
    }

    /// Tries earlier cuts and simpler plans.
    fn simpler_end(&mut self, life: usize) {
        let End::Power { at, plan } = self.best.lives[life].end else { return };
        let Some(seen) = watch(&self.best, life) else { return };
        let until = at.unwrap_or(u64::MAX);
        for seen in seen.iter().filter(|seen| seen.moment.events() <= until).take(SEARCH_MAX) {
            let mut plans = plans(seen);
            plans.retain(|other| rank(*other) < rank(plan));
            if seen.moment.events() < until {
                plans.push(plan);
            }
            for plan in plans {
                let mut case = self.best.clone();
                case.lives[life].end = End::Power { at: Some(seen.moment.events()), plan };
                if self.take(case) {
                    return;
                }
            }
        }
    }

    /// Tries single blocks and sectors instead of long ranges, and less at once.
    fn shorter_writes(&mut self) {
        for life in 0..self.best.lives.len() {
            for number in 0..self.best.lives[life].acts.len() {
                for act in simpler(&self.best.lives[life].acts[number]) {
                    let mut case = self.best.clone();
                    case.lives[life].acts[number] = act;
                    if self.take(case) {
                        break;
                    }
                }
            }
        }
    }
}

fn simpler(act: &Act) -> Vec<Act> {
    match act {
        Act::Race(one, other) => vec![Act::One(one.clone()), Act::One(other.clone())],
        Act::One(Op::Write { volume, first, count, fua }) => {
            let write = |first, count, fua| {
                Act::One(Op::Write { volume: volume.clone(), first, count, fua })
            };
            let block = first / BLOCK_SECTORS * BLOCK_SECTORS;
            let mut all = vec![write(block, BLOCK_SECTORS, false), write(*first, 1, false)];
            if *fua {
                all.push(write(*first, *count, false));
            }
            all.retain(|other| other != act);
            if *count == BLOCK_SECTORS && first == &block {
                all.clear();
            }
            all
        }
        Act::One(_) => Vec::new(),
    }
}

/// The moments of a life of a case, not cut; `None` if it cannot be lived through.
fn watch(case: &Case, life: usize) -> Option<Vec<Seen>> {
    let rares = Rares::default();
    let moments = caught(|| {
        let (mut image, mut log) = (case.config.formatted(), Log::new(Model::default()));
        for before in &case.lives[..life] {
            (image, log, _) = live(&case.config, image, log, before, &rares);
        }
        let here = &case.lives[life];
        let stage = Stage::new(&case.config, here.rotten(image), here.seed, log, &rares);
        play(&stage, here, Keep::From(0)).0
    });
    moments.ok()
}

/// How many acts were begun at an event, and how many events before it the last of them was.
fn place_of(seen: &[Seen], event: u64) -> (usize, u64) {
    let until = seen.iter().filter(|seen| seen.moment.events() <= event);
    let begun = until.map(|seen| seen.begun).max().unwrap_or(0);
    let first = seen.iter().find(|seen| seen.begun == begun);
    (begun, event.saturating_sub(first.map_or(0, |seen| seen.moment.events())))
}

/// The ends to try at a moment instead of another one.
fn ends(end: End, seen: &Seen) -> Vec<End> {
    let at = Some(seen.moment.events());
    match end {
        End::Power { plan, .. } => {
            let all = [plan].into_iter().chain(plans(seen));
            all.map(|plan| End::Power { at, plan }).collect()
        }
        End::Kill { seed, memory, .. } => vec![End::Kill { at, seed, memory }],
        End::Close | End::Drain => vec![end],
    }
}

/// Plans for people, the simplest first.
fn plans(seen: &Seen) -> Vec<CutPlan> {
    let pending = seen.moment.pending(Grain::Block);
    let mut plans = vec![CutPlan::KeepNone, CutPlan::KeepAll];
    let all: [fn(usize) -> CutPlan; 3] = [
        |n| CutPlan::Prefix(Grain::Block, n),
        |n| CutPlan::OnlyOne(Grain::Block, n),
        |n| CutPlan::AllBut(Grain::Block, n),
    ];
    plans.extend(all.iter().flat_map(|plan| (0..pending).map(plan)));
    plans
}
