//! The operations of a ring as async functions. Buffers are passed by value and returned.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use io_uring::opcode;
use io_uring::types::{Fd, FsyncFlags, Timespec};

use crate::runtime::Buf;
use crate::runtime::reactor::{OpKind, start};
use crate::units::{to_u32, to_u64, to_usize};

/// Maximum of pieces in one vectored operation: the kernel's UIO_MAXIOV.
const PIECES_MAX: usize = 1024;

/// Converts the kernel's result into a count or an error.
fn count(result: i32) -> io::Result<usize> {
    match u32::try_from(result) {
        Ok(count) => Ok(to_usize(u64::from(count))),
        Err(_) => Err(io::Error::from_raw_os_error(-result)),
    }
}

fn descriptor(fd: &Arc<OwnedFd>) -> Fd {
    Fd(fd.as_raw_fd())
}

fn interrupted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// Length of a piece of memory for the kernel. A longer piece is transferred partially.
fn piece_len(len: usize) -> u32 {
    const PIECE_BYTES_MAX: usize = 1 << 30;
    to_u32(to_u64(len.min(PIECE_BYTES_MAX)))
}

/// Reads at `offset` of the file into `buf`, from byte `start` of it on. May read less.
pub async fn read_at(
    fd: &Arc<OwnedFd>,
    mut buf: Buf,
    start_at: usize,
    offset: u64,
) -> (Buf, io::Result<usize>) {
    let target = &mut buf.as_mut_bytes()[start_at..];
    let entry = opcode::Read::new(descriptor(fd), target.as_mut_ptr(), piece_len(target.len()))
        .offset(offset)
        .build();
    // SAFETY: the operation owns the descriptor and the buffer, whose memory is on the heap.
    let op = unsafe { start(OpKind::Disk, entry, (buf, Arc::clone(fd))) };
    let ((buf, _), result) = op.await;
    (buf, count(result))
}

/// Memory for a gather or scatter operation, and its list of pieces.
struct Gather<T> {
    _memory: T,
    _pieces: Vec<libc::iovec>,
}

/// The pieces of `memory` after the first `skip` bytes.
fn pieces<'a>(memory: impl Iterator<Item = &'a [u8]>, mut skip: usize) -> Vec<libc::iovec> {
    let mut pieces = Vec::with_capacity(memory.size_hint().0.min(PIECES_MAX));
    for bytes in memory {
        let skipped = skip.min(bytes.len());
        skip -= skipped;
        let rest = &bytes[skipped..];
        if rest.is_empty() {
            continue;
        }
        if pieces.len() == PIECES_MAX {
            break;
        }
        let base = rest.as_ptr().cast_mut().cast();
        pieces.push(libc::iovec { iov_base: base, iov_len: rest.len() });
    }
    pieces
}

/// Writes all of `bufs` consecutively at `offset`. Continues after partial writes.
pub async fn write_all_at(
    fd: &Arc<OwnedFd>,
    mut bufs: Vec<Buf>,
    offset: u64,
) -> (Vec<Buf>, io::Result<()>) {
    let total: usize = bufs.iter().map(Buf::len_bytes).sum();
    let mut written = 0;
    while written < total {
        let pieces = pieces(bufs.iter().map(Buf::as_bytes), written);
        let at = offset + to_u64(written);
        let entry = if let [piece] = pieces[..] {
            let from = piece.iov_base.cast_const().cast();
            opcode::Write::new(descriptor(fd), from, piece_len(piece.iov_len)).offset(at).build()
        } else {
            let listed = to_u32(to_u64(pieces.len()));
            opcode::Writev::new(descriptor(fd), pieces.as_ptr(), listed).offset(at).build()
        };
        let owned = (Gather { _memory: bufs, _pieces: pieces }, Arc::clone(fd));
        // SAFETY: the operation owns the descriptor, the list and what it lists, all on the heap.
        let op = unsafe { start(OpKind::Disk, entry, owned) };
        let ((gather, _), result) = op.await;
        bufs = gather._memory;
        match count(result) {
            Ok(0) => return (bufs, Err(io::ErrorKind::WriteZero.into())),
            Ok(more) => written += more,
            Err(e) if interrupted(&e) => {}
            Err(e) => return (bufs, Err(e)),
        }
    }
    (bufs, Ok(()))
}

/// Makes the file's data durable (fdatasync). Never retried: the kernel reports a lost write only
/// once.
///
/// # Errors
/// The kernel's.
pub async fn sync_data(fd: &Arc<OwnedFd>) -> io::Result<()> {
    let entry = opcode::Fsync::new(descriptor(fd)).flags(FsyncFlags::DATASYNC).build();
    // SAFETY: the operation owns the descriptor.
    let op = unsafe { start(OpKind::Disk, entry, Arc::clone(fd)) };
    count(op.await.1).map(drop)
}

/// Deallocates a range of a regular file, which then reads as zeros.
///
/// # Errors
/// The kernel's.
pub async fn punch_hole(fd: &Arc<OwnedFd>, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let entry = opcode::Fallocate::new(descriptor(fd), len).offset(offset).mode(mode).build();
    // SAFETY: the operation owns the descriptor.
    let op = unsafe { start(OpKind::Disk, entry, Arc::clone(fd)) };
    count(op.await.1).map(drop)
}

/// Sends a device a command that points to no memory (`IORING_OP_URING_CMD`) and waits for its
/// completion. The completion may come only with the end of the ring, which does not wait for it.
///
/// # Errors
/// The device's.
pub async fn device_command(
    fd: &Arc<OwnedFd>,
    operation: u32,
    command: [u8; 16],
) -> io::Result<()> {
    let entry = opcode::UringCmd16::new(descriptor(fd), operation).cmd(command).build();
    // SAFETY: the operation owns the descriptor; the command lies in the entry itself.
    let op = unsafe { start(OpKind::Command, entry, Arc::clone(fd)) };
    count(op.await.1).map(drop)
}

/// Waits until a descriptor is ready: for non-blocking sockets, on which the kernel does not wait
/// itself.
async fn ready(fd: &Arc<OwnedFd>, events: i16) -> io::Result<()> {
    let events = u32::from(events.unsigned_abs());
    let entry = opcode::PollAdd::new(descriptor(fd), events).build();
    // SAFETY: the operation owns the descriptor.
    let op = unsafe { start(OpKind::Other, entry, Arc::clone(fd)) };
    count(op.await.1).map(drop)
}

/// Accepts a connection on a listening socket.
///
/// # Errors
/// The kernel's; for example, no free descriptor.
pub async fn accept(fd: &Arc<OwnedFd>) -> io::Result<OwnedFd> {
    loop {
        let entry = opcode::Accept::new(descriptor(fd), ptr::null_mut(), ptr::null_mut())
            .flags(libc::SOCK_CLOEXEC)
            .build();
        // SAFETY: the operation owns the descriptor and asks for no address.
        let op = unsafe { start(OpKind::Accept, entry, Arc::clone(fd)) };
        let (_, result) = op.await;
        match count(result) {
            // SAFETY: the kernel has just created this descriptor for us; nothing else owns it.
            Ok(_) => return Ok(unsafe { OwnedFd::from_raw_fd(result) }),
            Err(e) if interrupted(&e) => ready(fd, libc::POLLIN).await?,
            Err(e) => return Err(e),
        }
    }
}

/// Memory into which a socket's bytes can be received.
trait Target: 'static {
    fn bytes_mut(&mut self) -> &mut [u8];
}

impl Target for Vec<u8> {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl Target for Buf {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.as_mut_bytes()
    }
}

async fn recv_into<T: Target>(
    fd: &Arc<OwnedFd>,
    mut target: T,
    range: Range<usize>,
    flags: i32,
) -> (T, io::Result<usize>) {
    loop {
        let bytes = &mut target.bytes_mut()[range.clone()];
        let entry = opcode::Recv::new(descriptor(fd), bytes.as_mut_ptr(), piece_len(bytes.len()))
            .flags(flags)
            .build();
        // SAFETY: the operation owns the descriptor and the target, whose memory is on the heap
        // (both kinds of `Target` are vectors).
        let op = unsafe { start(OpKind::Other, entry, (target, Arc::clone(fd))) };
        let ((back, _), result) = op.await;
        target = back;
        match count(result) {
            Err(e) if interrupted(&e) => {
                if let Err(e) = ready(fd, libc::POLLIN).await {
                    return (target, Err(e));
                }
            }
            result => return (target, result),
        }
    }
}

/// Receives at least one byte into `range` of `buf`; 0 if the peer has closed.
///
/// # Panics
/// If the range is not inside the vector.
pub async fn recv(
    fd: &Arc<OwnedFd>,
    buf: Vec<u8>,
    range: Range<usize>,
) -> (Vec<u8>, io::Result<usize>) {
    recv_into(fd, buf, range, 0).await
}

/// Receives into `range` of `buf` until it is full; less if the peer has closed or a signal
/// interrupted.
///
/// # Panics
/// If the range is not inside the buffer.
pub async fn recv_buf(
    fd: &Arc<OwnedFd>,
    buf: Buf,
    range: Range<usize>,
) -> (Buf, io::Result<usize>) {
    recv_into(fd, buf, range, libc::MSG_WAITALL).await
}

/// One part of a message to send.
pub enum SendPart {
    /// All bytes of a vector.
    Bytes(Vec<u8>),
    /// A range of a buffer.
    Buf {
        /// The buffer.
        buf: Buf,
        /// The bytes of it to send.
        range: Range<usize>,
    },
}

impl SendPart {
    /// The bytes to send.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Buf { buf, range } => &buf.as_bytes()[range.clone()],
        }
    }
}

/// Sends all parts in order, in as few messages as possible.
pub async fn send(fd: &Arc<OwnedFd>, mut parts: Vec<SendPart>) -> (Vec<SendPart>, io::Result<()>) {
    let total: usize = parts.iter().map(|part| part.bytes().len()).sum();
    let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
    let mut sent = 0;
    while sent < total {
        let mut pieces = pieces(parts.iter().map(SendPart::bytes), sent);
        let message = message(&mut pieces);
        let entry = opcode::SendMsg::new(descriptor(fd), &raw const *message)
            .flags(flags.unsigned_abs())
            .build();
        let gather = Gather { _memory: parts, _pieces: pieces };
        // SAFETY: the operation owns the descriptor, the message, the list and what it lists,
        // all on the heap.
        let op = unsafe { start(OpKind::Other, entry, (gather, message, Arc::clone(fd))) };
        let ((gather, ..), result) = op.await;
        parts = gather._memory;
        match count(result) {
            Ok(0) => return (parts, Err(io::ErrorKind::WriteZero.into())),
            Ok(more) => sent += more,
            Err(e) if interrupted(&e) => {
                if let Err(e) = ready(fd, libc::POLLOUT).await {
                    return (parts, Err(e));
                }
            }
            Err(e) => return (parts, Err(e)),
        }
    }
    (parts, Ok(()))
}

fn message(pieces: &mut [libc::iovec]) -> Box<libc::msghdr> {
    // SAFETY: all zeros is a message with no address, no list and no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    Box::new(message)
}

/// Waits for `duration`.
pub async fn sleep(duration: Duration) {
    let time = Box::new(Timespec::from(duration));
    let entry = opcode::Timeout::new(&raw const *time).build();
    // SAFETY: the operation owns the boxed time.
    let op = unsafe { start(OpKind::Other, entry, time) };
    // ETIME means that the time is over: the success of a timeout.
    op.await;
}
