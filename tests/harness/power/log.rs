//! What dm-log-writes has recorded of the writes to a device, read entry by entry. The format is that
//! of the kernel's `dm-log-writes.c`:
//!
//! ```text
//! sector 0     super: magic 8 | version 8 | entries 8 | bytes of a sector 4
//! sector 1     entry: sector 8 | sectors 8 | flags 8 | bytes of data 8 | a mark's text
//!              the data of a write, in whole sectors
//!              the next entry ...
//! ```
//!
//! Numbers are little-endian, and `sector` and `sectors` count sectors of the size in the super. Writes
//! are recorded when they have completed; those that a flush covers come before it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// A log, and how far it has been read.
pub struct WriteLog {
    log: File,
    sector: u64,
    entries: u64,
    taken: u64,
    /// Where the next entry begins.
    at: u64,
}

/// What was written where; zeros for a discard, which may read so afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// First byte.
    pub offset: u64,
    /// The bytes; none of a flush alone.
    pub data: Vec<u8>,
}

/// What an entry was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A write or a discard.
    Change(Change),
    /// Everything before it is durable, and it itself.
    Barrier(Change),
    /// A text, from whoever has marked the log.
    Mark(String),
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("log of writes: {what}"))
}

impl WriteLog {
    /// The log in the file or device at `path`.
    ///
    /// # Errors
    /// It holds none.
    pub fn open(path: &Path) -> io::Result<Self> {
        let log = File::open(path)?;
        let mut bytes = [0; 28];
        log.read_exact_at(&mut bytes, 0)?;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        if word(0) != MAGIC || word(8) != VERSION {
            return Err(bad("another magic number or version"));
        }
        let sector = u32::from_le_bytes(bytes[24..28].try_into().expect("4 bytes")).into();
        if ![512, 4096].contains(&sector) {
            return Err(bad("sectors of another size"));
        }
        Ok(Self { log, sector, entries: word(16), taken: 0, at: sector })
    }

    /// Entries that it holds.
    #[must_use]
    pub const fn entries(&self) -> u64 {
        self.entries
    }

    /// The next entry; `None` at the end.
    ///
    /// # Errors
    /// The log is damaged.
    pub fn entry(&mut self) -> io::Result<Option<Entry>> {
        if self.taken == self.entries {
            return Ok(None);
        }
        let mut bytes = vec![0; usize::try_from(self.sector).expect("64 bits")];
        self.log.read_exact_at(&mut bytes, self.at)?;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let (sector, sectors, flags, length) = (word(0), word(8), word(16), word(24));
        self.at += self.sector;
        self.taken += 1;
        let text = || {
            let end = bytes.len().min(32 + usize::try_from(length).unwrap_or(usize::MAX));
            let text = String::from_utf8_lossy(&bytes[32..end]).into_owned();
            text.trim_end_matches('\0').to_owned()
        };
        if flags & MARK != 0 {
            return Ok(Some(Entry::Mark(text())));
        }
        let count = sectors.checked_mul(self.sector).filter(|count| *count <= 1 << 30);
        let count = usize::try_from(count.ok_or_else(|| bad("a long entry"))?).expect("64 bits");
        let mut data = vec![0; count];
        if flags & DISCARD == 0 && count > 0 {
            self.log.read_exact_at(&mut data, self.at)?;
            self.at += sectors * self.sector;
        }
        let change = Change { offset: sector * self.sector, data };
        let barrier = flags & (FLUSH | FUA) != 0;
        Ok(Some(if barrier { Entry::Barrier(change) } else { Entry::Change(change) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(words: [u64; 4], text: &str) -> Vec<u8> {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend_from_slice(text.as_bytes());
        bytes.resize(512, 0);
        bytes
    }

    #[test]
    fn a_log_is_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        let mut bytes: Vec<u8> =
            [MAGIC, VERSION, 5].iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend_from_slice(&512_u32.to_le_bytes());
        bytes.resize(512, 0);
        bytes.extend(entry([2, 2, 0, 0], ""));
        bytes.extend([7; 1024]);
        bytes.extend(entry([0, 0, FLUSH, 0], ""));
        bytes.extend(entry([0, 0, MARK, 6], "here 1"));
        bytes.extend(entry([3, 1, DISCARD, 0], ""));
        bytes.extend(entry([0, 1, FUA, 0], ""));
        bytes.extend([9; 512]);
        std::fs::write(&log, &bytes).expect("a log");
        let mut read = WriteLog::open(&log).expect("a log");
        assert_eq!(read.entries(), 5);
        let mut next = || read.entry().expect("a log");
        let change = |offset, byte, len| Change { offset, data: vec![byte; len] };
        assert_eq!(next(), Some(Entry::Change(change(1024, 7, 1024))));
        assert_eq!(next(), Some(Entry::Barrier(change(0, 0, 0))));
        assert_eq!(next(), Some(Entry::Mark("here 1".to_owned())));
        assert_eq!(next(), Some(Entry::Change(change(1536, 0, 512))));
        assert_eq!(next(), Some(Entry::Barrier(change(0, 9, 512))));
        assert_eq!(next(), None);
        std::fs::write(&log, &bytes[8..]).expect("a log");
        assert!(WriteLog::open(&log).is_err());
    }
}
