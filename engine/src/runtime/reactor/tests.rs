use std::cell::Cell;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::runtime::Buf;
use crate::runtime::executor::{Executor, end_of_turn, spawn_local};
use crate::units::BLOCK_SIZE;

fn executor() -> Executor<ReactorDriver> {
    Executor::with_spin(ReactorDriver::new().unwrap(), Duration::from_micros(50))
}

fn shared(fd: impl Into<OwnedFd>) -> Arc<OwnedFd> {
    Arc::new(fd.into())
}

fn pair() -> (Arc<OwnedFd>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (shared(ours), theirs)
}

fn filled(byte: u8, blocks: usize) -> Buf {
    let mut buf = Buf::new(blocks);
    buf.as_mut_bytes().fill(byte);
    buf
}

#[test]
fn writes_syncs_and_reads_back() {
    let file = shared(tempfile::tempfile().unwrap());
    executor().block_on(async {
        // More pieces than one operation accepts, some of several blocks.
        let bufs: Vec<Buf> =
            (0..1500_usize).map(|n| filled(n.to_le_bytes()[0], 1 + n % 2)).collect();
        let expected: Vec<u8> = bufs.iter().flat_map(|buf| buf.as_bytes().to_vec()).collect();
        let (bufs, result) = write_all_at(&file, bufs, 4096).await;
        result.unwrap();
        assert_eq!(bufs.len(), 1500);
        sync_data(&file).await.unwrap();
        let mut read = Vec::new();
        while read.len() < expected.len() {
            let (buf, result) = read_at(&file, Buf::new(256), 0, 4096 + to_u64(read.len())).await;
            let count = result.unwrap();
            assert!(count > 0);
            read.extend_from_slice(&buf.as_bytes()[..count]);
        }
        assert!(read == expected);
        punch_hole(&file, 4096, 8192).await.unwrap();
        let (buf, result) = read_at(&file, Buf::new(3), 0, 4096).await;
        assert_eq!(result.unwrap(), 3 * BLOCK_SIZE);
        assert!(buf.as_bytes()[..8192].iter().all(|&b| b == 0));
        assert!(buf.as_bytes()[8192..] == expected[8192..3 * BLOCK_SIZE]);
        assert_eq!(disk_ops_in_flight(), 0);
    });
}

#[test]
fn errors_bring_the_buffer_back() {
    let (_, write_only) = std::io::pipe().unwrap();
    let fd = shared(write_only);
    executor().block_on(async {
        let (buf, result) = read_at(&fd, filled(7, 1), 0, 0).await;
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(buf.len_bytes(), BLOCK_SIZE);
    });
}

#[test]
fn more_operations_than_the_queues_hold() {
    let file = shared(tempfile::tempfile().unwrap());
    executor().block_on(async {
        let (_, result) = write_all_at(&file, vec![filled(9, 4)], 0).await;
        result.unwrap();
        let left = Rc::new(Cell::new(10_000));
        for number in 0..left.get() {
            let (left, file) = (Rc::clone(&left), Arc::clone(&file));
            spawn_local(async move {
                let (buf, result) = read_at(&file, Buf::new(1), 0, number % 4 * 4096).await;
                assert_eq!(result.unwrap(), BLOCK_SIZE);
                assert!(buf.as_bytes().iter().all(|&b| b == 9));
                left.set(left.get() - 1);
            });
        }
        while left.get() > 0 {
            end_of_turn().await;
        }
    });
}

#[test]
fn echo_over_a_socket_in_parts() {
    let (ours, mut theirs) = pair();
    let echo = thread::spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let count = theirs.read(&mut bytes).unwrap();
            if count == 0 {
                return;
            }
            theirs.write_all(&bytes[..count]).unwrap();
        }
    });
    executor().block_on(async {
        let blocks = 200;
        let mut buf = Buf::new(blocks);
        for (number, block) in buf.as_mut_bytes().chunks_mut(64).enumerate() {
            block.fill(number.to_le_bytes()[0]);
        }
        let expected = buf.as_bytes()[100..].to_vec();
        let end = buf.len_bytes();
        let parts = vec![
            SendPart::Bytes(b"head".to_vec()),
            SendPart::Bytes(Vec::new()),
            SendPart::Buf { buf, range: 100..end },
        ];
        // Far more than the socket buffers hold, so both directions must make progress together.
        let sender = Arc::clone(&ours);
        spawn_local(async move {
            let (parts, result) = send(&sender, parts).await;
            result.unwrap();
            assert_eq!(parts.len(), 3);
        });
        let mut head = Vec::new();
        while head.len() < 4 {
            let (bytes, result) = recv(&ours, vec![0; 4], 0..4 - head.len()).await;
            head.extend_from_slice(&bytes[..result.unwrap()]);
        }
        assert_eq!(head, b"head");
        let range = 100..end;
        let (buf, result) = recv_buf(&ours, Buf::new(blocks), range).await;
        assert_eq!(result.unwrap(), expected.len());
        assert!(buf.as_bytes()[100..] == expected);
    });
    drop(ours);
    echo.join().unwrap();
}

#[test]
fn the_peers_end_is_seen() {
    let (ours, theirs) = pair();
    executor().block_on(async {
        drop(theirs);
        let (_, result) = recv(&ours, vec![0; 16], 0..16).await;
        assert_eq!(result.unwrap(), 0);
        let (_, result) = send(&ours, vec![SendPart::Bytes(vec![1])]).await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::BrokenPipe);
    });
}

#[test]
fn sockets_that_do_not_block_work_too() {
    let (ours, mut theirs) = pair();
    rustix::io::ioctl_fionbio(&*ours, true).unwrap();
    executor().block_on(async {
        let receiver = Arc::clone(&ours);
        let done = Rc::new(Cell::new(false));
        let set = Rc::clone(&done);
        spawn_local(async move {
            let (bytes, result) = recv(&receiver, vec![0; 8], 0..8).await;
            assert_eq!(&bytes[..result.unwrap()], b"late");
            set.set(true);
        });
        sleep(Duration::from_millis(5)).await;
        theirs.write_all(b"late").unwrap();
        while !done.get() {
            end_of_turn().await;
        }
    });
}

#[test]
fn accepts_connections() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let client = thread::spawn(move || {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(b"hello").unwrap();
    });
    let listener = shared(listener);
    executor().block_on(async {
        let connection = Arc::new(accept(&listener).await.unwrap());
        let (bytes, result) = recv(&connection, vec![0; 5], 0..5).await;
        assert_eq!(&bytes[..result.unwrap()], b"hello");
    });
    client.join().unwrap();
}

/// Records when an object that an operation owns is freed.
struct Guard(Rc<Cell<bool>>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.set(true);
    }
}

#[test]
fn a_dropped_operation_keeps_its_memory_until_it_completes() {
    let (ours, mut theirs) = pair();
    let freed = Rc::new(Cell::new(false));
    let mut executor = executor();
    executor.block_on(async {
        let mut bytes = vec![0_u8; 64];
        let entry = opcode::Recv::new(Fd(ours.as_raw_fd()), bytes.as_mut_ptr(), 64).build();
        let owned = (bytes, Guard(Rc::clone(&freed)), Arc::clone(&ours));
        // SAFETY: the operation owns the bytes and the descriptor.
        let mut op = unsafe { start(OpKind::Other, entry, owned) };
        // Now the kernel has it and waits for bytes.
        std::future::poll_fn(|context| {
            assert!(Pin::new(&mut op).poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
        submit_now();
        drop(op);
        assert!(!freed.get(), "the kernel may still write there");
        // The cancel completes it.
        sleep(Duration::from_millis(1)).await;
        assert!(freed.get());
    });
    // The cancelled receive consumed nothing.
    theirs.write_all(b"x").unwrap();
    executor.block_on(async {
        let (bytes, result) = recv(&ours, vec![0; 4], 0..4).await;
        assert_eq!(&bytes[..result.unwrap()], b"x");
    });
}

#[test]
fn a_ring_ends_only_after_its_operations() {
    let (ours, _theirs) = pair();
    let freed = Rc::new(Cell::new(false));
    let mut executor = executor();
    let (guard, fd) = (Guard(Rc::clone(&freed)), Arc::clone(&ours));
    executor.block_on(async move {
        spawn_local(async move {
            let _guard = guard;
            recv(&fd, vec![0; 64], 0..64).await.1.unwrap();
        });
        spawn_local(sleep(Duration::from_secs(3600)));
        end_of_turn().await;
        end_of_turn().await;
    });
    let start = Instant::now();
    drop(executor);
    assert!(start.elapsed() < Duration::from_secs(60), "waits are cancelled");
    assert!(freed.get());
    assert_eq!(Arc::strong_count(&ours), 1);
    assert!(!is_here());
    drop(ReactorDriver::new().unwrap());
}

#[test]
fn an_unwanted_connection_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = shared(UnixListener::bind(&path).unwrap());
    let mut client = UnixStream::connect(&path).unwrap();
    executor().block_on(async {
        let mut op = Box::pin(accept(&listener));
        std::future::poll_fn(|context| {
            assert!(op.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
        submit_now();
        drop(op);
        sleep(Duration::from_millis(1)).await;
    });
    // The kernel had accepted at once; dropping the operation closes the descriptor.
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_second_ring_on_a_thread_is_refused() {
    let _first = ReactorDriver::new().unwrap();
    assert!(ReactorDriver::new().is_err());
}

#[test]
fn files_are_closed_with_their_last_operation() {
    let file: File = tempfile::tempfile().unwrap();
    let fd = shared(file);
    executor().block_on(async {
        let (_, result) = write_all_at(&fd, vec![filled(1, 1)], 0).await;
        result.unwrap();
    });
    assert_eq!(Arc::strong_count(&fd), 1);
}
