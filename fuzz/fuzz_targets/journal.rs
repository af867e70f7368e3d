//! Any bytes as a ring, seeded with whole records: what is read has the expected numbers, ends,
//! and encodes to what was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pando_engine::disk::executor::Executor;
use pando_engine::disk::mem::MemDisk;
use pando_engine::disk::park::ThreadDriver;
use pando_engine::format::geometry::Geometry;
use pando_engine::format::record::{self, Record};
use pando_engine::format::superblock::Superblock;
use pando_engine::journal::LogReader;
use pando_engine::units::{BlockNo, Generation, Seqno, VolumeId};

const RING: usize = 8 * 4096;
const SALT: u32 = 7;

fuzz_target!(|bytes: &[u8]| {
    let mut ring = vec![0; RING];
    let mut at = 0;
    let mut next = Seqno::new(1);
    for chunk in bytes.chunks(9) {
        let mut framed = Vec::new();
        let record = Record::Delete(VolumeId::new(u64::from(chunk[0])));
        if record::encode(&record, next, Seqno::new(0), SALT, &mut framed).is_err() {
            return;
        }
        // The rest of the chunk damages it, or leaves a gap behind it.
        for pair in chunk[1..].chunks_exact(2).filter(|pair| pair[1] != 0) {
            let place = usize::from(pair[0]) % framed.len();
            framed[place] ^= pair[1];
        }
        if at + framed.len() > RING {
            break;
        }
        ring[at..at + framed.len()].copy_from_slice(&framed);
        at += framed.len();
        if chunk[0] & 1 == 1 {
            at = at.next_multiple_of(4096) % RING;
        }
        next = next.next();
    }
    let geometry = Geometry::new(1000, 8, 1).expect("a small pool");
    let memory = MemDisk::new(1000 * 4096);
    let mut mapped = memory
        .map_ring(geometry.journal_start().byte_offset(), RING)
        .expect("the ring lies inside the disk");
    mapped.store(0, &ring);
    let superblock = Superblock {
        uuid: [0; 16],
        geometry,
        generation: Generation::new(1),
        catalogue: BlockNo::new(0),
        catalogue_bytes: 0,
        journal_offset: 0,
        seal: Seqno::new(0),
        salt: SALT,
        clean: false,
    };
    Executor::new(ThreadDriver::new()).block_on(async {
        let mut log = LogReader::behind(&memory.disk(), &superblock);
        let mut expected = Seqno::new(1);
        while let Some(framed) = log.next().await.expect("memory can be read") {
            assert_eq!(framed.seqno, expected, "no gap is read over");
            expected = expected.next();
            let mut again = Vec::new();
            record::encode(&framed.record, framed.seqno, framed.durable, SALT, &mut again)
                .expect("what was read can be written");
            assert_eq!(again.len(), framed.bytes);
        }
        assert!(expected <= next, "nothing is read that was not written");
    });
});
