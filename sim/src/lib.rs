//! What tests, benches and fuzz targets share: a reference model of the pool that is too simple to
//! be wrong, random operations from a seed, and the machinery that runs both side by side on a
//! simulated disk, cuts the power and compares.
//!
//! ```text
//!   gen: Op ----> run: Pool on SimDisk ----> observe() --+
//!        |                                               |== equal to one state of the history
//!        `------> model: history of states --------------+
//! ```

pub mod campaign;
pub mod case;
pub mod crash;
pub mod damage;
pub mod discards;
pub mod distinct;
pub mod fuzz;
pub mod gen_ops;
pub mod model;
pub mod rare;
pub mod run;
pub mod stage;
pub mod trouble;

pub use case::{Case, CaseLife, End};
pub use crash::{CrashCounts, Explorer, Reach};
pub use gen_ops::{Generator, Op};
pub use model::{Model, ModelVolume, Step};
pub use rare::{Rare, Rares};
pub use run::{Config, Log, Told};
pub use stage::Act;
