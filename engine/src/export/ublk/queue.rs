//! The requests of one queue, on the ring of one shard.
//!
//! ```text
//!            FETCH, then COMMIT_AND_FETCH (the answer to one request asks for the next)
//!   tag  0   ----------------------------------------> kernel
//!   tag  1   <---- completion: a request is there ---
//!    ...       1 read its descriptor (mapped)
//!   tag 127    2 writes: pread its data from /dev/ublkcN into a block-aligned buffer
//!              3 BlockDevice
//!              4 reads: pwrite the data to /dev/ublkcN
//!              5 answer with COMMIT_AND_FETCH
//! ```
//!
//! One task for each tag. The copies of steps 2 and 4 are system calls on the shard's thread: they
//! move pages of memory and never wait for a device.
//!
//! The kernel knows a queue by the thread that fetched for it, so a queue stays on its shard.
//!
//! What a daemon that is killed leaves half done when it takes a device back, kernels before 6.15 cannot
//! undo. So it is not divided: all tags of a queue are fetched for by one system call, and the
//! descriptors are mapped behind that, since the mapping belongs to the first process that makes it.

use std::cell::OnceCell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use tokio::sync::{Semaphore, mpsc};
use zerocopy::transmute;

use super::abi::{self, IoCmd, IoDesc, io_flag, operation};
use crate::device::{BlockDevice, ZeroFlags, check_payload};
use crate::error::{Error, ErrorKind, Result};
use crate::export::ExportSource;
use crate::runtime::Buf;
use crate::runtime::executor::{end_of_turn, spawn_local};
use crate::runtime::reactor::{device_command, submit_now};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, SECTOR_BYTES, to_u32, to_u64, to_usize};

/// Blocks of data that the requests of one queue hold at most: 64 MiB, as one NBD connection.
const QUEUE_BLOCKS_MAX: usize = 64 << 20 >> 12;

/// What all queues of a device share.
#[derive(Clone)]
pub(super) struct Shared {
    /// `/dev/ublkcN`.
    pub(super) fd: Arc<OwnedFd>,
    /// The device stays without this daemon: from now on no request is answered.
    pub(super) suspended: Arc<AtomicBool>,
    /// Gone when the last queue has let go of `fd`.
    pub(super) _alive: mpsc::Sender<()>,
}

/// One queue. The fields are dropped in this order: the mapping and the descriptor first.
pub(super) struct Queue {
    /// Mapped as soon as the kernel has the queue.
    descriptors: OnceCell<MmapRaw>,
    shared: Shared,
    number: u16,
    name: String,
    device: Rc<dyn BlockDevice>,
    room: Semaphore,
}

/// Serves a queue on this shard, until the device is stopped.
///
/// # Errors
/// The volume cannot be opened, or the kernel does not show the requests.
pub(super) async fn serve(
    shared: Shared,
    source: Arc<dyn ExportSource>,
    (number, depth): (u16, u16),
) -> Result<()> {
    let export = source.open("").await?;
    let queue = Rc::new(Queue::new(shared, (export.name, export.device), number));
    // Room for all that is asked for next.
    submit_now();
    for tag in 0..depth {
        spawn_local(serve_tag(Rc::clone(&queue), tag));
    }
    end_of_turn().await;
    fetch_as_a_stranger()?;
    // Nothing that has come in since is looked at before this is done.
    queue.map(depth)
}

/// Hands in what all tags ask for, as a thread that may not administer the system. A device with such a
/// server is not searched for partitions when it starts. Linux 6.12 keeps the device locked while it
/// reads them through this daemon: killed in that moment, it would never end, and no other could take
/// the device back. (Later kernels search behind the start, without the lock.)
fn fetch_as_a_stranger() -> Result<()> {
    let failed = |errno: rustix::io::Errno| Error::io("capabilities of a thread", errno.into());
    let own = capabilities(None).map_err(failed)?;
    let effective = own.effective.difference(CapabilitySet::SYS_ADMIN);
    set_capabilities(None, CapabilitySets { effective, ..own }).map_err(failed)?;
    submit_now();
    set_capabilities(None, own).map_err(failed)
}

async fn serve_tag(queue: Rc<Queue>, tag: u16) {
    let mut command = abi::io::FETCH;
    let mut result = 0;
    loop {
        let io = IoCmd { queue: queue.number, tag, result, address: 0 };
        match device_command(&queue.shared.fd, command, transmute!(io)).await {
            Ok(()) => {}
            // The device has been stopped.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
            Err(error) => {
                tracing::error!(queue = queue.number, tag, %error, "ublk request is not taken");
                return;
            }
        }
        let outcome = queue.serve(tag).await;
        // What is not answered now is asked again of the daemon that comes next.
        if queue.shared.suspended.load(Ordering::Acquire) {
            return;
        }
        result = queue.told(outcome);
        command = abi::io::COMMIT_AND_FETCH;
    }
}

impl Queue {
    /// A queue of a volume, by its name.
    pub(super) fn new(
        shared: Shared,
        (name, device): (String, Rc<dyn BlockDevice>),
        number: u16,
    ) -> Self {
        let (descriptors, room) = (OnceCell::new(), Semaphore::new(QUEUE_BLOCKS_MAX));
        Self { descriptors, shared, number, name, device, room }
    }

    /// Maps the requests, of which there are so many at a time.
    ///
    /// # Errors
    /// The kernel does not show them.
    pub(super) fn map(&self, depth: u16) -> Result<()> {
        let (offset, len) = abi::descriptors(self.number, depth);
        let mapped = MmapOptions::new()
            .offset(offset)
            .len(to_usize(len))
            .map_raw_read_only(&*self.shared.fd)
            .map_err(|error| Error::io(format!("requests of ublk queue {}", self.number), error))?;
        self.descriptors.set(mapped).unwrap_or_else(|_| unreachable!("it is mapped once"));
        Ok(())
    }

    /// Does the request that is there with `tag`, which is below the depth of the queue.
    pub(super) async fn serve(&self, tag: u16) -> Result<i32> {
        self.answer(tag, self.request(tag)).await
    }

    /// What the kernel is to be told.
    pub(super) fn told(&self, outcome: Result<i32>) -> i32 {
        outcome.unwrap_or_else(|error| {
            tracing::warn!(volume = self.name, %error, "ublk request failed");
            -error.errno()
        })
    }

    /// The request that the kernel has just handed over with `tag`.
    fn request(&self, tag: u16) -> IoDesc {
        let start = usize::from(tag) * size_of::<IoDesc>();
        let descriptors = self.descriptors.get().expect("mapped before a request is looked at");
        // SAFETY: the mapping holds a descriptor for each tag up to the depth of the queue, and
        // `tag` is below that.
        let descriptor = unsafe { descriptors.as_ptr().add(start) };
        // SAFETY: in bounds as above; the kernel does not change it before the request has been
        // answered.
        let bytes = unsafe { descriptor.cast::<[u8; size_of::<IoDesc>()]>().read_volatile() };
        transmute!(bytes)
    }

    /// Does a request; returns what the kernel is to be told.
    async fn answer(&self, tag: u16, request: IoDesc) -> Result<i32> {
        let bad = || Error::invalid(format!("ublk: {request:?} is no request"));
        // A flush has no place: what is said of one means nothing.
        if request.op_flags & operation::MASK == operation::FLUSH {
            return self.device.flush().await.map(|()| 0);
        }
        let offset = request.start_sector.checked_mul(SECTOR_BYTES).ok_or_else(bad)?;
        let len = u64::from(request.sectors) * SECTOR_BYTES;
        if len == 0 {
            return Err(bad());
        }
        let fua = request.op_flags & io_flag::FUA != 0;
        match request.op_flags & operation::MASK {
            operation::READ => {
                let len = u32::try_from(len).map_err(|_| bad())?;
                let _room = self.room(offset, len).await;
                let data = self.device.read(offset, len).await?;
                self.put(tag, data.bytes())?;
                i32::try_from(len).map_err(|_| bad())
            }
            operation::WRITE => {
                let len = u32::try_from(len).map_err(|_| bad())?;
                // Before there is memory for it.
                check_payload(len)?;
                let _room = self.room(offset, len).await;
                let buf = self.get(tag, offset, len)?;
                self.device.write(offset, len, buf, fua).await?;
                i32::try_from(len).map_err(|_| bad())
            }
            operation::DISCARD => self.device.discard(offset, len, fua).await.map(|()| 0),
            operation::WRITE_ZEROES => {
                let no_hole = request.op_flags & io_flag::NOUNMAP != 0;
                let flags = ZeroFlags { fua, no_hole };
                self.device.write_zeroes(offset, len, flags).await.map(|()| 0)
            }
            _ => Err(Error::new(ErrorKind::Unsupported, format!("ublk: {request:?}"))),
        }
    }

    /// Waits until the data of one more request may be held.
    async fn room(&self, offset: u64, len: u32) -> impl Drop + '_ {
        let blocks = blocks(offset, len).min(QUEUE_BLOCKS_MAX);
        let permit = self.room.acquire_many(to_u32(to_u64(blocks))).await;
        permit.expect("it is never closed")
    }

    /// The data of a write, where [`BlockDevice::write`] wants it.
    fn get(&self, tag: u16, offset: u64, len: u32) -> Result<Buf> {
        let mut buf = Buf::new(blocks(offset, len));
        let start = to_usize(offset % BLOCK_BYTES);
        let mut left = &mut buf.as_mut_bytes()[start..][..to_usize(len.into())];
        let mut at = abi::data_offset(self.number, tag);
        while !left.is_empty() {
            let done = rustix::io::pread(&self.shared.fd, &mut *left, at);
            let done = done.map_err(|error| lost("of a write", error.into()))?;
            if done == 0 {
                return Err(lost("of a write", io::ErrorKind::UnexpectedEof.into()));
            }
            left = &mut left[done..];
            at += to_u64(done);
        }
        Ok(buf)
    }

    /// Hands the data of a read over.
    fn put(&self, tag: u16, mut left: &[u8]) -> Result<()> {
        let mut at = abi::data_offset(self.number, tag);
        while !left.is_empty() {
            let done = rustix::io::pwrite(&self.shared.fd, left, at);
            let done = done.map_err(|error| lost("of a read", error.into()))?;
            if done == 0 {
                return Err(lost("of a read", io::ErrorKind::WriteZero.into()));
            }
            left = &left[done..];
            at += to_u64(done);
        }
        Ok(())
    }
}

fn blocks(offset: u64, len: u32) -> usize {
    (to_usize(offset % BLOCK_BYTES) + to_usize(len.into())).div_ceil(BLOCK_SIZE)
}

fn lost(what: &str, error: io::Error) -> Error {
    Error::io(format!("ublk: data {what} is not transferred"), error)
}
