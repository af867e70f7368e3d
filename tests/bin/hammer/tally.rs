//! What a campaign has done, for people and for programs.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// Counts of a campaign.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) seed: u64,
    pub(crate) seconds: f64,
    pub(crate) rounds: u64,
    pub(crate) kills: u64,
    /// Rounds by the moment of the kill.
    pub(crate) strikes: BTreeMap<String, u64>,
    /// Rounds by the client of others that wrote.
    pub(crate) clients: BTreeMap<&'static str, u64>,
    /// Rounds that were opened by the other program.
    pub(crate) old_rounds: u64,
    /// Requests of our own clients.
    pub(crate) acknowledged: u64,
    pub(crate) under_way: u64,
    /// Blocks of clients of others.
    pub(crate) foreign_acknowledged: u64,
    /// Blocks that were compared.
    pub(crate) blocks: u64,
    /// Snapshots and clones that were compared, and the instants that they are of.
    pub(crate) frozen: u64,
    pub(crate) cuts: u64,
    /// Snapshots, clones, deletions and so on that were asked for.
    pub(crate) deeds: u64,
    /// Checks of the pool as a kill has left it.
    pub(crate) checks: u64,
    pub(crate) restart_ms_max: u64,
    pub(crate) failures: Vec<String>,
}

impl Tally {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// The closing line for programs.
    pub(crate) fn json(&self) -> Value {
        json!({
            "seed": self.seed,
            "seconds": (self.seconds * 10.0).round() / 10.0,
            "rounds": self.rounds,
            "kills": self.kills,
            "strikes": self.strikes,
            "clients": self.clients,
            "old_rounds": self.old_rounds,
            "acknowledged": self.acknowledged,
            "under_way": self.under_way,
            "foreign_acknowledged_blocks": self.foreign_acknowledged,
            "compared_blocks": self.blocks,
            "frozen": self.frozen,
            "cuts": self.cuts,
            "deeds": self.deeds,
            "offline_checks": self.checks,
            "restart_ms_max": self.restart_ms_max,
            "failures": self.failures,
        })
    }

    /// The same for people.
    pub(crate) fn text(&self) -> String {
        let Value::Object(all) = self.json() else { unreachable!("made as one") };
        all.iter().map(|(key, value)| format!("{key:28} {value}\n")).collect()
    }
}
