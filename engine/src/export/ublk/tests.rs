//! What the kernel is told of requests that it should not send.

use std::rc::Rc;

use super::testing::{DEPTH, TestQueue};
use crate::export::testing::{RamCounters, RamDisk};
use crate::runtime::executor::Executor;
use crate::runtime::park::ThreadDriver;

const READ: u32 = 0;
const WRITE: u32 = 1;
const DISCARD: u32 = 3;
const WRITE_ZEROES: u32 = 5;
const INVALID: i32 = -22;
/// One sector more than a request can carry.
const TOO_MANY_SECTORS: u32 = (32 << 11) + 1;

/// The answers to requests from sector 0, each with the last tag.
fn answers(disk: &RamDisk, requests: &[(u32, u32)]) -> Vec<i32> {
    let queue = TestQueue::new(Rc::new(disk.clone()));
    let (mut executor, tag) = (Executor::new(ThreadDriver::new()), DEPTH - 1);
    let answer = |&(operation, sectors): &(u32, u32)| {
        queue.put(tag, operation, sectors, 0);
        executor.block_on(queue.serve(tag))
    };
    requests.iter().map(answer).collect()
}

#[test]
fn a_request_of_no_sectors_is_refused() {
    let disk = RamDisk::new(1 << 20);
    let requests = [(READ, 0), (WRITE, 0), (DISCARD, 0), (WRITE_ZEROES, 0)];
    assert_eq!(answers(&disk, &requests), [INVALID; 4]);
    assert_eq!(disk.counters(), RamCounters::default());
}

/// There is no data beyond the last tag's: were it asked for, the answer would be another.
#[test]
fn a_write_that_is_too_long_is_refused_before_its_data_is_fetched() {
    let disk = RamDisk::new(64 << 20);
    assert_eq!(answers(&disk, &[(WRITE, TOO_MANY_SECTORS)]), [INVALID]);
    assert_eq!(disk.counters(), RamCounters::default());
}
