//! The bodies of the fuzz targets that drive the engine. `fuzz/fuzz_targets/` has a line for each;
//! `fuzz/bodies/tests/corpus.rs` replays the inputs in `fuzz/corpus/` and checks that the three agree.
//!
//! ```text
//! bytes --Input--> configuration, operations, faults, bytes of a structure
//!                      |
//!                      v
//!          the code under test  ==  an oracle that shares no code with it
//! ```
//! Everything comes from the bytes, so that an input repeats what it has found. An input is read
//! from its front in pieces of fixed width, so that a byte that is changed changes one thing; when it
//! is used up, zeros follow. A body panics when the oracle says no, and counts what it has reached: a
//! corpus that reaches nothing any more has rotted.

mod allocator;
mod crash;
mod engine_model;
mod forge;
mod image_mutate;
mod input;
mod io_errors;
mod journal;
mod nbd_handshake;
mod nbd_transmission;
mod node;
mod node_graph;
mod ops;
mod superblock;
#[cfg(feature = "daemon")]
mod ublk_descriptor;

use std::collections::BTreeMap;

use input::Input;

/// What inputs have come to, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reached(pub BTreeMap<&'static str, u64>);

impl Reached {
    fn add(&mut self, what: &'static str, count: u64) {
        *self.0.entry(what).or_default() += count;
    }

    /// Counts one of `what`.
    pub fn note(&mut self, what: &'static str) {
        self.add(what, 1);
    }
}

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The name of its file and of the directory of its corpus.
    pub name: &'static str,
    /// What it does with an input.
    pub body: fn(&[u8], &mut Reached),
    /// What its corpus must come to, all of it.
    pub reaches: &'static [&'static str],
}

/// All targets whose bodies are in the engine, by name.
pub const TARGETS: &[Target] = &[
    Target { name: "allocator", body: allocator::body, reaches: allocator::REACHES },
    Target { name: "crash", body: crash::body, reaches: crash::REACHES },
    Target { name: "engine_model", body: engine_model::body, reaches: engine_model::REACHES },
    Target { name: "image_mutate", body: image_mutate::body, reaches: image_mutate::REACHES },
    Target { name: "io_errors", body: io_errors::body, reaches: io_errors::REACHES },
    Target { name: "journal", body: journal::body, reaches: journal::REACHES },
    Target { name: "nbd_handshake", body: nbd_handshake::body, reaches: nbd_handshake::REACHES },
    Target {
        name: "nbd_transmission",
        body: nbd_transmission::body,
        reaches: nbd_transmission::REACHES,
    },
    Target { name: "node", body: node::body, reaches: node::REACHES },
    Target { name: "node_graph", body: node_graph::body, reaches: node_graph::REACHES },
    Target { name: "superblock", body: superblock::body, reaches: superblock::REACHES },
    #[cfg(feature = "daemon")]
    Target {
        name: "ublk_descriptor",
        body: ublk_descriptor::body,
        reaches: ublk_descriptor::REACHES,
    },
];

/// Runs one input of a target.
///
/// # Panics
/// When the oracle says no, or there is no such target.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of this name");
    (target.body)(bytes, &mut Reached::default());
}
