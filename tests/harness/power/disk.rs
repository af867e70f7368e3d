//! A disk with a volatile cache, over NBD, for a virtual machine: what was written and not flushed is
//! in its cache alone, and when the power goes, any part of that is lost, sector by sector.
//!
//! It serves one client at a time, in the order of its requests, and answers each at once.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;

use crate::nbd::command;
use crate::noise::Noise;

pub(super) const SECTOR: usize = 512;
/// Sectors of a block.
const BLOCK_SECTORS: u64 = 8;
/// `NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH`.
const FLAGS: u16 = 1 | 4;
/// Options that are answered; all others are unknown.
const OPTION_ABORT: u32 = 2;
const OPTION_GO: u32 = 7;
const REPLY_ACKNOWLEDGED: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_UNKNOWN: u32 = 0x8000_0001;

/// What the disk holds.
struct Content {
    /// What no loss of power takes away.
    durable: Vec<u8>,
    /// Sectors of the cache, with the number of the write that brought them.
    cache: BTreeMap<u64, (u64, Box<[u8]>)>,
    writes: u64,
    flushes: u64,
}

/// What became of the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// Sectors that had not been flushed.
    pub cached: u64,
    /// Of those, how many were lost.
    pub lost: u64,
    /// Flushes that the disk had seen.
    pub flushes: u64,
}

/// The disk.
pub struct VolatileDisk {
    file: PathBuf,
    socket: PathBuf,
    content: Arc<Mutex<Content>>,
}

impl VolatileDisk {
    /// A disk that holds what is in `file`, at a socket beside it.
    ///
    /// # Panics
    /// The file cannot be read, or the socket not be made.
    #[must_use]
    pub fn start(file: &Path) -> Self {
        let durable = std::fs::read(file).expect("what the disk holds");
        let (cache, writes, flushes) = (BTreeMap::new(), 0, 0);
        let content = Arc::new(Mutex::new(Content { durable, cache, writes, flushes }));
        let socket = file.with_extension("disk");
        std::fs::remove_file(&socket).unwrap_or_default();
        let listener = UnixListener::bind(&socket).expect("a socket");
        let shared = Arc::clone(&content);
        thread::spawn(move || {
            // One machine.
            let Ok((client, _)) = listener.accept() else { return };
            // It is killed in the middle of anything.
            serve(client, &shared).unwrap_or_default();
        });
        Self { file: file.to_owned(), socket, content }
    }

    /// Where it is served.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The power goes: of the cache stays what the seed says, and what stays is in the file.
    ///
    /// # Panics
    /// The file cannot be written.
    #[must_use]
    pub fn cut(self, seed: u64) -> Cut {
        let mut content = self.content.lock();
        let Content { durable, cache, writes, flushes } = &mut *content;
        let cached = u64::try_from(cache.len()).expect("few");
        let mut stays = lottery(seed, *writes);
        let mut lost = 0;
        for (sector, (write, bytes)) in std::mem::take(cache) {
            if stays(sector, write) {
                let at = usize::try_from(sector).expect("64 bits") * SECTOR;
                durable[at..at + SECTOR].copy_from_slice(&bytes);
            } else {
                lost += 1;
            }
        }
        std::fs::write(&self.file, durable).expect("the file");
        std::fs::remove_file(&self.socket).unwrap_or_default();
        Cut { cached, lost, flushes: *flushes }
    }
}

/// Decides of each sector of the cache, and the number of its write, whether it stays.
pub(super) fn lottery(seed: u64, writes: u64) -> impl FnMut(u64, u64) -> bool {
    let mut noise = Noise::new(seed);
    let (way, salt, last) = (noise.below(6), noise.next(), noise.below(writes + 1));
    let chance = move |key: u64, of: u64| Noise::new(salt ^ key.rotate_left(32)).below(of);
    move |sector, write| match way {
        // Nothing.
        0 => false,
        // Everything up to one write.
        1 => write <= last,
        // Half of the sectors: most blocks are torn.
        2 => chance(sector, 2) == 0,
        // Half of the blocks.
        3 => chance(sector / BLOCK_SECTORS, 2) == 0,
        // All but a few.
        4 => chance(sector, 16) != 0,
        // What came last, and nothing before.
        _ => write >= last,
    }
}

fn serve(mut client: UnixStream, content: &Mutex<Content>) -> io::Result<()> {
    let size = u64::try_from(content.lock().durable.len()).expect("64 bits");
    client.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    client.read_exact(&mut [0; 4])?;
    while !negotiated(&mut client, size)? {}
    loop {
        let mut header = [0; 28];
        client.read_exact(&mut header)?;
        let code = u16::from_be_bytes([header[6], header[7]]);
        let offset = u64::from_be_bytes(header[16..24].try_into().expect("8 bytes"));
        let length = u32::from_be_bytes(header[24..28].try_into().expect("4 bytes"));
        let mut data = vec![0; usize::try_from(length).expect("64 bits")];
        if code == command::WRITE {
            client.read_exact(&mut data)?;
        }
        let errno = match code {
            command::DISCONNECT => return Ok(()),
            _ => content.lock().perform(code, offset, &mut data),
        };
        let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
        reply.extend_from_slice(&errno.to_be_bytes());
        reply.extend_from_slice(&header[8..16]);
        if code == command::READ && errno == 0 {
            reply.extend_from_slice(&data);
        }
        client.write_all(&reply)?;
    }
}

/// Answers one option; whether it was the last.
fn negotiated(client: &mut UnixStream, size: u64) -> io::Result<bool> {
    let mut header = [0; 16];
    client.read_exact(&mut header)?;
    let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    let (option, length) = (word(8), word(12));
    let mut data = vec![0; usize::try_from(length.min(1 << 16)).expect("64 bits")];
    client.read_exact(&mut data)?;
    let mut reply = |kind: u32, data: &[u8]| {
        let length = u32::try_from(data.len()).expect("short").to_be_bytes();
        let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
        let parts =
            [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length, data].concat();
        client.write_all(&parts)
    };
    match option {
        OPTION_GO => {
            let info = [&[0, 0][..], &size.to_be_bytes(), &FLAGS.to_be_bytes()].concat();
            reply(REPLY_INFO, &info)?;
            reply(REPLY_ACKNOWLEDGED, &[])?;
            Ok(true)
        }
        OPTION_ABORT => Err(io::ErrorKind::ConnectionAborted.into()),
        _ => reply(REPLY_UNKNOWN, &[]).map(|()| false),
    }
}

impl Content {
    /// Does a request; its errno.
    fn perform(&mut self, code: u16, offset: u64, data: &mut [u8]) -> u32 {
        let unit = u64::try_from(SECTOR).expect("few");
        let length = u64::try_from(data.len()).expect("64 bits");
        let end = offset.checked_add(length);
        let size = u64::try_from(self.durable.len()).expect("64 bits");
        let aligned = offset.is_multiple_of(unit) && length.is_multiple_of(unit);
        if !aligned || end.is_none_or(|end| end > size) {
            return 22;
        }
        let sectors = (offset / unit..).zip(data.chunks_exact_mut(SECTOR));
        match code {
            command::READ => {
                for (sector, bytes) in sectors {
                    let at = usize::try_from(sector).expect("64 bits") * SECTOR;
                    match self.cache.get(&sector) {
                        Some((_, cached)) => bytes.copy_from_slice(cached),
                        None => bytes.copy_from_slice(&self.durable[at..at + SECTOR]),
                    }
                }
            }
            command::WRITE => {
                self.writes += 1;
                for (sector, bytes) in sectors {
                    self.cache.insert(sector, (self.writes, bytes.to_vec().into()));
                }
            }
            command::FLUSH => {
                self.flushes += 1;
                for (sector, (_, bytes)) in std::mem::take(&mut self.cache) {
                    let at = usize::try_from(sector).expect("64 bits") * SECTOR;
                    self.durable[at..at + SECTOR].copy_from_slice(&bytes);
                }
            }
            _ => return 22,
        }
        0
    }
}

/// Makes a file of zeros with `size` bytes.
///
/// # Panics
/// It cannot be made.
pub fn blank(path: &Path, size: u64) {
    std::fs::File::create(path).expect("a file").set_len(size).expect("space");
}

/// Copies the bytes of one file into another, in place.
///
/// # Panics
/// It cannot be done.
pub fn overwrite(path: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).expect("a file");
    file.write_all_at(bytes, offset).expect("space");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Nbd;

    #[test]
    fn what_was_flushed_stays_and_the_rest_is_a_lottery() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("disk");
        let mut fates = std::collections::BTreeSet::new();
        for seed in 0..40 {
            blank(&file, 1 << 20);
            let disk = VolatileDisk::start(&file);
            let mut nbd = Nbd::open(disk.socket(), "").expect("a disk");
            assert_eq!(nbd.size, 1 << 20);
            nbd.write(0, &[1; 4096]);
            nbd.flush();
            nbd.write(0, &[2; 4096]);
            nbd.write(8192, &[3; 4096]);
            assert_eq!(nbd.read(0, 4096), [2; 4096]);
            assert_eq!(nbd.try_write(1 << 20, &[0; 512], 0).expect("an answer"), Err(22));
            let cut = disk.cut(seed);
            assert_eq!((cut.cached, cut.flushes), (16, 1));
            let left = std::fs::read(&file).expect("a file");
            let is = |at: usize, values: &[u8]| {
                left[at..at + 4096].chunks(512).filter(|s| values.contains(&s[0])).count()
            };
            assert_eq!(is(0, &[1, 2]), 8, "old or new");
            assert_eq!(is(8192, &[0, 3]), 8, "old or new");
            let stayed = is(0, &[2]) + is(8192, &[3]);
            assert_eq!(u64::try_from(stayed).expect("few"), 16 - cut.lost);
            fates.insert((is(0, &[2]), is(8192, &[3])));
        }
        let torn =
            fates.iter().any(|(one, other)| ![0, 8].contains(one) || ![0, 8].contains(other));
        assert!(torn && fates.contains(&(0, 0)) && fates.contains(&(8, 8)), "{fates:?}");
        assert!(fates.contains(&(8, 0)) && fates.contains(&(0, 8)), "any order: {fates:?}");
    }
}
