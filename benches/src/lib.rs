//! Benchmarks of Pando: a pool on a RAM-backed disk or on a file, and load on it. The criterion
//! benches and the report of `make bench` share what is here.

pub mod load;
pub mod maps;
pub mod memory;
pub mod report;
pub mod rig;
