//! Power failures of a whole machine: what is done to a pool until the power goes, and what must be
//! there afterwards.
//!
//! ```text
//! model    batches of requests from a seed, and what the pool holds after each of them
//! perform  does them, on a real daemon; says which are durable
//! verify   opens the pool that is left, and finds the one batch after which it was
//! disk     a disk with a volatile cache, over NBD, for the machine
//! rounds   a machine, its power, and all of the above
//! log      what dm-log-writes has recorded; replay: played back, and looked at on the way
//! ```
//!
//! The requests of a batch are under way at the same time; a batch begins when the one before it has
//! been acknowledged. So what is left must be, for one number *n*: everything of the first *n*
//! batches, any part of batch *n* + 1, in whole blocks, and nothing of those that follow. And *n* is
//! not less than the last batch that was flushed, or written with FUA, and known to be.

pub mod disk;
pub mod log;
pub mod model;
pub mod perform;
pub mod replay;
pub mod rounds;
pub mod verify;
