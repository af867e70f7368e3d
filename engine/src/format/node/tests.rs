use super::*;

const POOL: [u8; 16] = *b"0123456789abcdef";

fn extent(lba: u64, block: u64, len: u64) -> LeafEntry {
    let (lba, block) = (Lba::new(lba), BlockNo::new(block));
    LeafEntry::new(&Extent { lba, block, len, own: len == 1 })
}

fn sealed(level: u8, fill: impl FnOnce(&mut Node)) -> Vec<u8> {
    let mut node = NodeBlock::ZERO.0;
    node.reset(&POOL, level);
    node.place(BlockNo::new(77), Seqno::new(5));
    fill(&mut node);
    let mut bytes = node.as_bytes().to_vec();
    seal_crc(&mut bytes);
    bytes
}

fn expected(level: u8, lba: u64, mapped: u64) -> NodeRef {
    NodeRef {
        block: BlockNo::new(77),
        birth: Seqno::new(5),
        level,
        lba: Lba::new(lba),
        end: Lba::new(1000),
        mapped,
    }
}

fn leaf() -> Vec<u8> {
    let entries = [extent(3, 100, 2), extent(5, 200, 1), extent(900, 300, 100)];
    sealed(0, |node| node.splice(0..0, &entries))
}

fn inner() -> Vec<u8> {
    let ptr = |lba: u64, block: u64| {
        let (lba, block, birth) = (Lba::new(lba), BlockNo::new(block), Seqno::new(4));
        InnerEntry::new(&NodePtr { lba, block, birth, mapped: 10, own: 2 })
    };
    sealed(1, |node| node.splice(0..0, &[ptr(7, 11), ptr(50, 12)]))
}

fn refusal(bytes: &[u8], expected: &NodeRef) -> String {
    Node::verify(bytes, expected, &POOL).map(|_| ()).unwrap_err().to_string()
}

/// `bytes` with `edit` done to it and a right crc.
fn forged(mut bytes: Vec<u8>, edit: impl FnOnce(&mut [u8])) -> Vec<u8> {
    edit(&mut bytes);
    seal_crc(&mut bytes);
    bytes
}

#[test]
fn valid_nodes_are_accepted_at_any_address() {
    let mut shifted = vec![0; 1];
    shifted.extend(leaf());
    let node = Node::verify(&shifted[1..], &expected(0, 3, 103), &POOL).unwrap();
    assert_eq!(node.leaf()[1], extent(5, 200, 1));
    assert_eq!(children(node).count(), 3);
    let bytes = inner();
    let node = Node::verify(&bytes, &expected(1, 7, 20), &POOL).unwrap();
    let ends: Vec<u64> = node.child_refs(Lba::new(1000)).map(|child| child.end.get()).collect();
    assert_eq!(ends, [50, 1000]);
}

#[test]
fn golden_bytes() {
    let bytes = leaf();
    assert_eq!(bytes[4..8], *b"PNod");
    assert_eq!(bytes[8..24], POOL);
    assert_eq!(bytes[24..32], 77u64.to_le_bytes());
    assert_eq!(bytes[32..40], 5u64.to_le_bytes());
    assert_eq!(bytes[40..44], [0, 0, 3, 0]);
    assert!(bytes[44..64].iter().all(|&byte| byte == 0));
    assert_eq!(bytes[64..72], (3u64 << 16 | 2).to_le_bytes());
    assert_eq!(bytes[72..80], (100u64 << 1).to_le_bytes());
    assert_eq!(bytes[88..96], (200u64 << 1 | 1).to_le_bytes());
    let bytes = inner();
    assert_eq!(bytes[40..44], [1, 0, 2, 0]);
    let words: Vec<u64> = bytes[64..104]
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(words, [7, 11, 4, 10, 2]);
}

#[test]
fn says_what_differs_from_the_pointer() {
    let good = expected(0, 3, 103);
    let birth = NodeRef { birth: Seqno::new(9), ..good };
    assert_eq!(refusal(&leaf(), &birth), "map node at block 77: birth 5, its pointer says 9");
    let block = NodeRef { block: BlockNo::new(78), ..good };
    assert_eq!(refusal(&leaf(), &block), "map node at block 78: block 77, its pointer says 78");
    assert!(refusal(&leaf(), &expected(1, 3, 103)).ends_with("level 0, its pointer says 1"));
    assert!(refusal(&leaf(), &expected(0, 2, 103)).ends_with("its pointer says lba 2"));
    assert!(refusal(&leaf(), &expected(0, 3, 104)).ends_with("103 blocks, its pointer says 104"));
    let short = NodeRef { end: Lba::new(999), ..good };
    assert!(refusal(&leaf(), &short).ends_with("an extent beyond its end"));
    let other = Node::verify(&leaf(), &good, &[0; 16]).map(|_| ()).unwrap_err();
    assert!(other.to_string().ends_with("belongs to another pool (uuid)"));
    assert!(refusal(&leaf()[..4095], &good).ends_with("4095 bytes, not 4096"));
}

#[test]
fn refuses_damage_that_has_a_right_crc() {
    let good = expected(0, 3, 103);
    let cases: [(&str, Vec<u8>); 6] = [
        ("0 entries", forged(leaf(), |b| b[42..44].fill(0))),
        ("253 entries", forged(leaf(), |b| b[42] = 253)),
        ("not sorted", forged(leaf(), |b| b[82] = 4)),
        ("no blocks", forged(leaf(), |b| b[64] = 0)),
        ("magic", forged(leaf(), |b| b[4] = 0)),
        ("reserved", forged(leaf(), |b| b[63] = 1)),
    ];
    for (says, bytes) in cases {
        let error = refusal(&bytes, &good);
        assert!(error.contains(says), "{error}: not {says}");
    }
    let good = expected(1, 7, 20);
    let cases: [(&str, Vec<u8>); 5] = [
        ("not sorted", forged(inner(), |b| b[104] = 7)),
        ("impossible", forged(inner(), |b| b[96] = 11)),
        ("impossible", forged(inner(), |b| b[88..104].fill(0))),
        (
            "overflow",
            forged(inner(), |b| {
                b[88..96].fill(0xff);
                b[128..136].fill(0xff);
            }),
        ),
        ("beyond its end", forged(inner(), |b| b[106] = 1)),
    ];
    for (says, bytes) in cases {
        let error = refusal(&bytes, &good);
        assert!(error.contains(says), "{error}: not {says}");
    }
}

#[test]
fn a_node_above_all_levels_is_refused() {
    let level = u8::try_from(MAP_LEVELS_MAX).unwrap();
    let ptr = NodePtr {
        lba: Lba::new(7),
        block: BlockNo::new(11),
        birth: Seqno::new(4),
        mapped: 10,
        own: 2,
    };
    let fill = |node: &mut Node| node.splice(0..0, &[InnerEntry::new(&ptr)]);
    assert!(Node::verify(&sealed(level - 1, fill), &expected(level - 1, 7, 10), &POOL).is_ok());
    let error = refusal(&sealed(level, fill), &expected(level, 7, 10));
    assert!(error.ends_with("level 10 is too high"), "{error}");
}

#[test]
fn a_node_whose_parent_is_gone_is_what_it_must_be() {
    let verify = |bytes: &[u8], block: u64, birth: u64| {
        let (block, birth) = (BlockNo::new(block), Seqno::new(birth));
        let verified = Node::verify_orphan(bytes, block, birth, &POOL).map(Node::count);
        verified.map_err(|error| error.to_string())
    };
    assert_eq!(verify(&leaf(), 77, 5), Ok(3));
    assert_eq!(verify(&inner(), 77, 5), Ok(2));
    for (says, refused) in [
        ("block 77, its pointer says 78", verify(&leaf(), 78, 5)),
        ("birth 5, its pointer says 6", verify(&leaf(), 77, 6)),
        ("not sorted", verify(&forged(leaf(), |b| b[82] = 4), 77, 5)),
        ("not sorted", verify(&forged(inner(), |b| b[104] = 7), 77, 5)),
    ] {
        let error = refused.unwrap_err();
        assert!(error.contains(says), "{error}: not {says}");
    }
}

#[test]
fn every_flipped_bit_is_seen() {
    let bytes = leaf();
    for bit in 0..BLOCK_SIZE * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(Node::verify(&flipped, &expected(0, 3, 103), &POOL).is_err(), "bit {bit}");
    }
}

#[test]
fn random_damage_never_panics_and_what_passes_adds_up() {
    let mut state = 1u64;
    let mut accepted = 0;
    for round in 0..5000u64 {
        let (level, told) = if round % 2 == 0 { (0, (3, 103)) } else { (1, (7, 20)) };
        let damaged = forged(if level == 0 { leaf() } else { inner() }, |bytes| {
            for _ in 0..=round % 3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = usize::from((state >> 48).to_le_bytes()[0]);
                bytes[at] = state.to_le_bytes()[6];
            }
        });
        if let Ok(node) = Node::verify(&damaged, &expected(level, told.0, told.1), &POOL) {
            accepted += 1;
            let mapped: u64 = children(node)
                .map(|child| match child {
                    NodeChild::Node(ptr) => ptr.mapped,
                    NodeChild::Data(extent) => extent.len,
                })
                .sum();
            assert_eq!(mapped, told.1);
        }
    }
    assert!(accepted > 0, "damage behind the entries is harmless");
}
