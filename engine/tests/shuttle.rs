//! Races between shards, under a scheduler that chooses who goes on: `shuttle`. The engine is built
//! with the feature of that name (`engine/src/sync.rs`); `scripts/shuttle` builds and runs this.

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
#[path = "shuttle/wake.rs"]
mod wake;
