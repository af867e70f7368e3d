//! The one place that computes checksums: IEEE crc32, always over at most a block or a record, so
//! that any three flipped bits are found (`crc32fast` has its first 3-bit blind spot at 11 KiB).

/// Checksum of `bytes`.
#[must_use]
pub fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// Checksum of the concatenation of `parts`.
#[must_use]
pub fn crc32_of_parts(parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize()
}
