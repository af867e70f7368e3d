//! Exports in memory, for tests and for measuring an export by itself.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use parking_lot::Mutex;

use super::{Export, ExportSource};
use crate::device::{BlockDevice, MappedRun, ReadData, ZeroFlags, check_payload, check_range};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Buf, LocalFuture};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, blocks_for, to_u64, to_usize};

/// What has been asked of a [`RamDisk`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamCounters {
    /// Reads that were answered.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes, and operations with FUA.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
    /// Writes of zeros.
    pub zeroes: u64,
}

struct Ram {
    bytes: Vec<u8>,
    mapped: Vec<bool>,
    read_only: bool,
    /// Reads and writes that touch this byte fail with a checksum error.
    damaged: Option<u64>,
    /// Reads wait until they are released.
    held: bool,
    waiting: Vec<Waker>,
    counters: RamCounters,
}

/// A thin volume in memory. Clones are handles of the same volume.
#[derive(Clone)]
pub struct RamDisk(Arc<Mutex<Ram>>);

impl RamDisk {
    /// An empty volume.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self(Arc::new(Mutex::new(Ram {
            bytes: vec![0; to_usize(size_bytes)],
            mapped: vec![false; to_usize(blocks_for(size_bytes))],
            read_only: false,
            damaged: None,
            held: false,
            waiting: Vec::new(),
            counters: RamCounters::default(),
        })))
    }

    /// Refuses or accepts writes.
    pub fn set_read_only(&self, read_only: bool) {
        self.0.lock().read_only = read_only;
    }

    /// Lets reads and writes that touch the byte at `offset` fail.
    pub fn damage(&self, offset: u64) {
        self.0.lock().damaged = Some(offset);
    }

    /// Lets reads wait until [`Self::release`].
    pub fn hold(&self) {
        self.0.lock().held = true;
    }

    /// Lets the reads that wait, and all others, go on. Returns how many waited.
    pub fn release(&self) -> usize {
        let waiting = {
            let mut ram = self.0.lock();
            ram.held = false;
            std::mem::take(&mut ram.waiting)
        };
        let count = waiting.len();
        waiting.into_iter().for_each(Waker::wake);
        count
    }

    /// Reads that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.lock().waiting.len()
    }

    /// Grows the volume.
    pub fn grow(&self, size_bytes: u64) {
        let mut ram = self.0.lock();
        ram.bytes.resize(to_usize(size_bytes), 0);
        ram.mapped.resize(to_usize(blocks_for(size_bytes)), false);
    }

    /// What has been asked so far.
    #[must_use]
    pub fn counters(&self) -> RamCounters {
        self.0.lock().counters
    }

    /// A copy of the content.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        self.0.lock().bytes.clone()
    }
}

impl Ram {
    fn range(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>> {
        let end = check_range(to_u64(self.bytes.len()), offset, len)?;
        Ok(to_usize(offset)..to_usize(end))
    }

    fn writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "ram disk is read-only"));
        }
        Ok(())
    }

    fn sound(&self, range: &std::ops::Range<usize>) -> Result<()> {
        if self.damaged.is_some_and(|at| range.contains(&to_usize(at))) {
            return Err(Error::new(ErrorKind::Checksum, "ram disk is damaged here"));
        }
        Ok(())
    }

    fn read(&mut self, offset: u64, len: u32) -> Result<ReadData> {
        check_payload(len)?;
        let range = self.range(offset, len.into())?;
        self.counters.reads += 1;
        self.sound(&range)?;
        let start = range.start % BLOCK_SIZE;
        let mut buf = Buf::new((start + range.len()).div_ceil(BLOCK_SIZE));
        buf.as_mut_bytes()[start..start + range.len()].copy_from_slice(&self.bytes[range.clone()]);
        Ok(ReadData { buf, start, len: range.len() })
    }

    fn write(&mut self, offset: u64, len: u32, buf: &Buf, fua: bool) -> Result<()> {
        self.writable()?;
        check_payload(len)?;
        let range = self.range(offset, len.into())?;
        let start = range.start % BLOCK_SIZE;
        let blocks = (start + range.len()).div_ceil(BLOCK_SIZE);
        assert_eq!(buf.len_bytes(), blocks * BLOCK_SIZE, "exactly the blocks of the range");
        self.sound(&range)?;
        self.mapped[range.start / BLOCK_SIZE..][..blocks].fill(true);
        self.bytes[range.clone()].copy_from_slice(&buf.as_bytes()[start..start + range.len()]);
        self.counters.writes += 1;
        self.counters.flushes += u64::from(fua);
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.writable()?;
        let range = self.range(offset, len)?;
        if flags.no_hole {
            let blocks = range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE);
            self.mapped[blocks].fill(true);
        } else {
            self.unmap(&range);
        }
        self.bytes[range].fill(0);
        self.counters.zeroes += 1;
        self.counters.flushes += u64::from(flags.fua);
        Ok(())
    }

    fn discard(&mut self, offset: u64, len: u64, fua: bool) -> Result<()> {
        self.writable()?;
        let range = self.range(offset, len)?;
        self.unmap(&range);
        self.counters.discards += 1;
        self.counters.flushes += u64::from(fua);
        Ok(())
    }

    /// Unmaps the whole blocks of `range`.
    fn unmap(&mut self, range: &std::ops::Range<usize>) {
        for block in range.start.div_ceil(BLOCK_SIZE)..range.end / BLOCK_SIZE {
            self.mapped[block] = false;
            self.bytes[block * BLOCK_SIZE..(block + 1) * BLOCK_SIZE].fill(0);
        }
    }

    fn mapped_runs(&self, offset: u64, len: u64, max_runs: usize) -> Result<Vec<MappedRun>> {
        let range = self.range(offset, len)?;
        let (mut at, end) = (to_u64(range.start), to_u64(range.end));
        let mut runs: Vec<MappedRun> = Vec::new();
        while at < end {
            let next = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(end);
            let mapped = self.mapped[to_usize(at / BLOCK_BYTES)];
            let full = runs.len() == max_runs;
            match runs.last_mut() {
                Some(run) if run.mapped == mapped => run.len += next - at,
                _ if full => break,
                _ => runs.push(MappedRun { offset: at, len: next - at, mapped }),
            }
            at = next;
        }
        Ok(runs)
    }
}

fn ready<'a, T: 'a>(result: T) -> LocalFuture<'a, T> {
    Box::pin(std::future::ready(result))
}

impl BlockDevice for RamDisk {
    fn size_bytes(&self) -> u64 {
        to_u64(self.0.lock().bytes.len())
    }

    fn read_only(&self) -> bool {
        self.0.lock().read_only
    }

    fn read(&self, offset: u64, len: u32) -> LocalFuture<'_, Result<ReadData>> {
        let mut waited = false;
        Box::pin(poll_fn(move |context| {
            let mut ram = self.0.lock();
            if ram.held {
                if !std::mem::replace(&mut waited, true) {
                    ram.waiting.push(context.waker().clone());
                }
                return Poll::Pending;
            }
            Poll::Ready(ram.read(offset, len))
        }))
    }

    fn write(&self, offset: u64, len: u32, buf: Buf, fua: bool) -> LocalFuture<'_, Result<()>> {
        ready(self.0.lock().write(offset, len, &buf, fua))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        ready(self.0.lock().write_zeroes(offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64, fua: bool) -> LocalFuture<'_, Result<()>> {
        ready(self.0.lock().discard(offset, len, fua))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.0.lock().counters.flushes += 1;
        ready(Ok(()))
    }

    fn mapped_runs(
        &self,
        offset: u64,
        len: u64,
        max_runs: usize,
    ) -> LocalFuture<'_, Result<Vec<MappedRun>>> {
        ready(self.0.lock().mapped_runs(offset, len, max_runs))
    }
}

/// Named volumes in memory; the first one is the default.
pub struct RamExports(Vec<(String, RamDisk)>);

impl RamExports {
    /// A source of these volumes.
    #[must_use]
    pub fn new(disks: Vec<(String, RamDisk)>) -> Self {
        Self(disks)
    }
}

impl ExportSource for RamExports {
    fn list(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }

    fn open<'a>(&'a self, name: &'a str) -> LocalFuture<'a, Result<Export>> {
        let found = self.0.iter().find(|(known, _)| name.is_empty() || known == name);
        ready(match found {
            Some((name, disk)) => Ok(Export {
                name: name.clone(),
                description: "memory".to_owned(),
                device: Rc::new(disk.clone()),
            }),
            None => Err(Error::new(ErrorKind::NotFound, format!("export {name}: no such export"))),
        })
    }
}
