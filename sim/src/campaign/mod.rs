//! Campaigns: many crash states, for as long as there is time. `pando-sim` runs them, a test a part.
//!
//! ```text
//!  exhaustive: every sequence of the alphabet --+
//!  random:     a chain of lives from a seed ----+--> Explorer --> states, each judged
//!  faults:     a life on a device that fails ---+        `-- Failure --> shrink --> a small Case
//! ```

pub mod alphabet;
pub mod exhaustive;
pub mod faults;
mod hung;
pub mod random;
pub mod shrink;
pub mod tally;

pub use exhaustive::Exhaustive;
pub use faults::Faults;
pub use random::Random;
pub use shrink::shrink;
pub use tally::{Failure, Tally, quiet};
