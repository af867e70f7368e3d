//! Races between shards, under a scheduler that chooses who goes on: `shuttle`. The engine is built
//! with the feature of that name (`engine/src/runtime/sync.rs`); `scripts/shuttle` builds and runs this.

#[path = "shuttle/control.rs"]
mod control;
#[path = "shuttle/data.rs"]
mod data;
#[path = "shuttle/explore.rs"]
mod explore;
#[path = "shuttle/harness.rs"]
mod harness;
#[path = "shuttle/history.rs"]
mod history;
#[path = "shuttle/shard.rs"]
mod shard;
#[path = "../../engine/src/daemon/uses.rs"]
#[expect(dead_code, reason = "the rest of the daemon is not built with the feature `shuttle`")]
mod uses;
#[path = "shuttle/wake.rs"]
mod wake;

// Where `uses.rs` looks for them.
use pando_engine::{error, pool, runtime, units};
