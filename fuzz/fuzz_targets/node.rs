//! Any block as a map node, its checksum made right: an error, or entries in order.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pando_engine::format::node::{Node, NodeChild, children, seal_crc};
use pando_engine::units::{BLOCK_SIZE, BlockNo, Seqno};

fuzz_target!(|bytes: &[u8]| {
    let mut block = vec![0; BLOCK_SIZE];
    let len = bytes.len().min(BLOCK_SIZE);
    block[..len].copy_from_slice(&bytes[..len]);
    seal_crc(&mut block);
    let word = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("8 bytes"));
    let pool: [u8; 16] = block[8..24].try_into().expect("16 bytes");
    let (place, birth) = (BlockNo::new(word(24)), Seqno::new(word(32)));
    if let Ok(node) = Node::verify_orphan(&block, place, birth, &pool) {
        let mut last = None;
        for child in children(node) {
            let lba = match child {
                NodeChild::Node(ptr) => ptr.lba,
                NodeChild::Data(extent) => extent.lba,
            };
            assert!(last < Some(lba), "entries are in order");
            last = Some(lba);
        }
        assert!(last.is_some(), "no node is empty");
    }
});
