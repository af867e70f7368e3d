//! Any block as a superblock, its checksum made right: an error, or what encodes to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pando_engine::format::superblock::{Superblock, set_crc};
use pando_engine::units::{BLOCK_SIZE, BlockNo};

fuzz_target!(|bytes: &[u8]| {
    let mut block = [0; BLOCK_SIZE];
    let len = bytes.len().min(BLOCK_SIZE);
    block[..len].copy_from_slice(&bytes[..len]);
    set_crc(&mut block);
    if let Ok(superblock) = Superblock::decode(&block, BlockNo::new(0)) {
        let again = Superblock::decode(&superblock.encode(), BlockNo::new(0));
        assert_eq!(again.ok(), Some(superblock));
    }
});
