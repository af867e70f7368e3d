//! What a campaign has come to, and what it has found.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::case::Case;
use crate::crash::CrashCounts;
use crate::rare::{Rare, Rares};

/// Something that must not be.
#[derive(Debug)]
pub struct Failure {
    /// The command that repeats it.
    pub repeat: String,
    /// What is wrong.
    pub why: String,
    /// What led to it.
    pub case: Box<Case>,
}

/// The sums of a campaign.
#[derive(Debug, Default)]
pub struct Tally {
    /// Seeds.
    pub seeds: u64,
    /// Sequences of operations.
    pub sequences: u64,
    /// Sequences that cannot be done, or are the same as shorter ones.
    pub impossible: u64,
    /// Crash states.
    pub counts: CrashCounts,
    /// Faults that have struck, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Rare states.
    pub rare: BTreeMap<Rare, u64>,
}

impl Tally {
    /// Adds counts.
    pub fn add(&mut self, counts: &CrashCounts, rares: &Rares) {
        let sum = &mut self.counts;
        for (sum, more) in sum.states.iter_mut().zip(counts.states) {
            *sum += more;
        }
        sum.cuts += counts.cuts;
        sum.went_on += counts.went_on;
        sum.kills += counts.kills;
        sum.distinct += counts.distinct;
        sum.repeated += counts.repeated;
        for rare in Rare::ALL {
            *self.rare.entry(rare).or_default() += rares.count(rare);
        }
    }
}

thread_local! {
    /// What the last panic of this thread has said, while [`caught`] listens.
    static SAID: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Does `work`; what a panic says, and where, is an error. Panics of other threads, and outside of
/// this, are told as always.
///
/// # Errors
/// A panic.
pub(super) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| said(&*panic))
}

fn said(panic: &(dyn Any + Send)) -> String {
    if let Some(said) = SAID.take() {
        return said;
    }
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}

/// Keeps what panics say for [`Failure::why`] instead of printing it: for programs that try many
/// cases.
pub fn quiet() {
    std::panic::set_hook(Box::new(|info| SAID.set(Some(info.to_string()))));
}
