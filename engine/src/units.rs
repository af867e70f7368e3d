//! The quantities of the engine, each a type of its own, so that an address in a volume cannot be
//! taken for an address in the pool, nor a count for an index. Arithmetic is checked where the
//! operands can come from outside.

use std::fmt;

/// Bytes in a block: the unit of mapping, allocation and checksum.
pub const BLOCK_SIZE: usize = 4096;
/// The same as a `u64`, for arithmetic on offsets.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes in a sector: the unit of addressing at protocol edges.
pub const SECTOR_BYTES: u64 = 512;

/// `usize` from a `u64` that is known to fit (the engine runs on 64-bit targets only).
#[must_use]
pub const fn to_usize(value: u64) -> usize {
    const _: () = assert!(usize::BITS == 64, "Pando needs a 64-bit target");
    #[expect(clippy::cast_possible_truncation, reason = "usize is 64 bits wide, asserted above")]
    {
        value as usize
    }
}

/// `u64` from a `usize`; never loses anything on a 64-bit target.
#[must_use]
pub const fn to_u64(value: usize) -> u64 {
    value as u64
}

/// `u32` from a value that the caller has bounded; saturates, and asserts in debug builds.
#[must_use]
pub fn to_u32(value: u64) -> u32 {
    debug_assert!(u32::try_from(value).is_ok(), "{value} does not fit in 32 bits");
    u32::try_from(value).unwrap_or(u32::MAX)
}

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident($int:ty), $unit:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(bincode::Encode, bincode::Decode, serde::Serialize)]
        pub struct $name($int);

        impl $name {
            /// Wraps the bare integer.
            #[must_use]
            pub const fn new(value: $int) -> Self {
                Self(value)
            }
            /// The bare integer.
            #[must_use]
            pub const fn get(self) -> $int {
                self.0
            }
            /// The quantity `by` further on; panics on overflow, which no bounded input reaches.
            #[must_use]
            pub const fn plus(self, by: $int) -> Self {
                match self.0.checked_add(by) {
                    Some(sum) => Self(sum),
                    None => panic!("overflow of a bounded quantity"),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($unit, "{}"), self.0)
            }
        }
    };
}

quantity!(
    /// Block address in a volume.
    Lba(u64), "lba "
);
quantity!(
    /// Block address in the pool.
    BlockNo(u64), "block "
);
quantity!(
    /// Position of a record in the one order of all changes.
    Seqno(u64), "seq "
);
quantity!(
    /// Number of a checkpoint.
    Generation(u32), "generation "
);
quantity!(
    /// Identity of a volume or snapshot; never used again after its deletion.
    VolumeId(u64), "volume "
);

impl BlockNo {
    /// Byte offset of the block in the pool.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        self.0 * BLOCK_BYTES
    }
}

impl Seqno {
    /// The sequence number of the next record.
    #[must_use]
    pub const fn next(self) -> Self {
        self.plus(1)
    }
}

impl Generation {
    /// The generation of the next checkpoint.
    #[must_use]
    pub const fn next(self) -> Self {
        self.plus(1)
    }
}

/// Whole blocks that hold `bytes`, rounded up.
#[must_use]
pub const fn blocks_for(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES)
}

/// Bytes for people: exact. The unit is the largest that needs neither a fraction nor more than four
/// digits; where none does, the bytes follow a rounded number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 5] = [
            (1 << 50, "PiB"),
            (1 << 40, "TiB"),
            (1 << 30, "GiB"),
            (1 << 20, "MiB"),
            (1 << 10, "KiB"),
        ];
        let bytes = self.0;
        let mut fitting = UNITS.iter().filter(|(unit, _)| bytes >= *unit);
        let exact =
            |(unit, _): &&(u64, &str)| bytes.is_multiple_of(*unit) && bytes / *unit < 10_000;
        match (fitting.clone().find(exact), fitting.next()) {
            (Some((unit, name)), _) => write!(f, "{} {name}", bytes / unit),
            (None, Some((unit, name))) => {
                let (whole, tenth) = (bytes / unit, bytes % unit / unit.div_ceil(10));
                write!(f, "{whole}.{tenth} {name} ({bytes} bytes)")
            }
            (None, None) => write!(f, "{bytes} bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_round_up() {
        assert_eq!(blocks_for(0), 0);
        assert_eq!(blocks_for(1), 1);
        assert_eq!(blocks_for(BLOCK_BYTES), 1);
        assert_eq!(blocks_for(BLOCK_BYTES + 1), 2);
    }

    #[test]
    fn sizes_are_exact() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1000, "1000 bytes"),
            (4096, "4 KiB"),
            (3 << 29, "1536 MiB"),
            (64 << 40, "64 TiB"),
            (10_000_000_000, "9.3 GiB (10000000000 bytes)"),
            ((8 << 30) + 512, "8.0 GiB (8589935104 bytes)"),
            ((2 << 30) - 1, "1.9 GiB (2147483647 bytes)"),
            (u64::MAX, "16383.9 PiB (18446744073709551615 bytes)"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn quantities_say_what_they_are() {
        assert_eq!(BlockNo::new(7).to_string(), "block 7");
        assert_eq!(BlockNo::new(2).byte_offset(), 8192);
        assert_eq!(Seqno::new(1).next(), Seqno::new(2));
    }
}
