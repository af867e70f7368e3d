//! The NBD server against a client that knows the protocol, its edges, and how to break it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "nbd_support/client.rs"]
mod client;
mod nbd_support;

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use client::{
    BLOCK_STATUS, Client, DISCONNECT, FAST_ZERO, FLUSH, FUA, NO_HOLE, Outcome, READ, REQ_ONE, TRIM,
    WRITE, WRITE_ZEROES,
};
use nbd_support::{TestServer, listen, wait};
use pando_engine::error;
use pando_engine::export::nbd::{Limits, ServerOptions};
use pando_engine::export::testing::RamDisk;

const SIZE: u64 = 4 << 20;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

fn serve(disk: &RamDisk) -> TestServer {
    TestServer::start(&[("disk", disk)])
}

/// Looks again and again until `met`, and fails if that takes too long.
fn eventually(what: &str, met: impl Fn() -> bool) {
    let start = Instant::now();
    while !met() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}: not after 20 s");
        std::thread::yield_now();
    }
}

#[test]
fn data_comes_back_with_and_without_structured_replies() {
    for structured in [false, true] {
        let disk = RamDisk::new(SIZE);
        let server = serve(&disk);
        let mut client = Client::open(server.path(), "disk", structured);
        assert_eq!(client.size, SIZE);
        // In block, over a block's edge, of many blocks, larger than the receive buffer.
        for (offset, len, byte) in
            [(512, 512, 1), (3584, 1024, 2), (8192, 65536, 3), (SIZE / 2 + 512, 1 << 20, 4)]
        {
            assert_eq!(client.write(0, offset, &vec![byte; len]), Outcome::Done);
            let read = client.read(offset, u32::try_from(len).unwrap());
            assert!(read == vec![byte; len], "{len} bytes at {offset}");
        }
        assert_eq!(client.read(0, 512), vec![0; 512]);
        assert_eq!(disk.content()[4096..4608], [2; 512]);

        assert_eq!(client.ask(TRIM, FUA, 8192, 4096), Outcome::Done);
        assert_eq!(client.ask(WRITE_ZEROES, FAST_ZERO, 12288, 4096), Outcome::Done);
        assert_eq!(client.ask(WRITE_ZEROES, NO_HOLE | FUA, 16384, 512), Outcome::Done);
        assert!(client.read(8192, 8704) == vec![0; 8704]);
        assert_eq!(client.ask(FLUSH, 0, 0, 0), Outcome::Done);
        assert_eq!(client.write(FUA, 0, &[9; 512]), Outcome::Done);
        assert_eq!(disk.counters().flushes, 4);

        // Empty requests do nothing, successfully.
        let before = disk.counters();
        for command in [READ, TRIM, WRITE_ZEROES] {
            assert_eq!(client.ask(command, 0, SIZE, 0), Outcome::Done);
        }
        assert_eq!(client.write(FUA, 0, &[]), Outcome::Done);
        assert_eq!(disk.counters(), before);

        client.send(&Client::header(DISCONNECT, 0, 1, 0, 0));
        client.expect_closed();
    }
}

#[test]
fn malformed_requests_are_refused_and_harm_nothing() {
    let disk = RamDisk::new(SIZE);
    let server = serve(&disk);
    let mut client = Client::open(server.path(), "disk", true);
    assert_eq!(client.write(0, 0, &[7; 8192]), Outcome::Done);
    let (before, counters) = (disk.content(), disk.counters());
    let cases = [
        (READ, 0, SIZE, 512, EINVAL),
        (READ, 0, SIZE - 512, 1024, EINVAL),
        (READ, 0, u64::MAX - 511, 1024, EINVAL),
        (READ, 0, 1, 512, EINVAL),
        (READ, 0, 0, 513, EINVAL),
        (READ, 0, 0, (32 << 20) + 512, EINVAL),
        (READ, NO_HOLE, 0, 512, EINVAL),
        (TRIM, 0, SIZE, 512, EINVAL),
        (TRIM, 0, 0, u32::MAX - 511, EINVAL),
        (TRIM, REQ_ONE, 0, 512, EINVAL),
        (WRITE_ZEROES, 0, SIZE, 512, ENOSPC),
        (WRITE_ZEROES, 0, 0, u32::MAX - 511, ENOSPC),
        (WRITE_ZEROES, 0, 0, 100, EINVAL),
        (WRITE_ZEROES, NO_HOLE | FAST_ZERO, 0, 512, ENOTSUP),
        (FLUSH, 0, 0, 512, EINVAL),
        (FLUSH, 0, 512, 0, EINVAL),
        (BLOCK_STATUS, 0, 0, 0, EINVAL),
        (BLOCK_STATUS, 0, SIZE, 512, EINVAL),
        (5, 0, 0, 512, EINVAL),
        (99, 0, 0, 512, EINVAL),
        (READ, 1 << 15, 0, 512, EINVAL),
    ];
    for (command, flags, offset, len, error) in cases {
        let outcome = client.ask(command, flags, offset, len);
        assert_eq!(outcome, Outcome::Error(error), "{command} {flags} {offset} {len}");
    }
    // The payload of a refused write is skipped, whatever its size.
    for (flags, offset, len, error) in [
        (0, SIZE, 512, ENOSPC),
        (0, SIZE - 512, 1024, ENOSPC),
        (0, 1, 512, EINVAL),
        (0, 0, 100, EINVAL),
        (NO_HOLE, 0, 512, EINVAL),
        (0, 0, 300 << 10, 0),
        (0, 0, 33 << 20, ENOSPC),
    ] {
        let payload: Vec<u8> = before.iter().copied().cycle().take(len).collect();
        let outcome = client.write(flags, offset, &payload);
        let expected = if error == 0 { Outcome::Done } else { Outcome::Error(error) };
        assert_eq!(outcome, expected, "write of {len} at {offset}");
    }
    assert!(disk.content() == before);
    assert_eq!(disk.counters().reads, counters.reads);
    assert_eq!(disk.counters().discards + disk.counters().zeroes, 0);
    assert_eq!(client.read(0, 8192), [7; 8192]);
}

#[test]
fn a_payload_beyond_the_maximum_is_skipped_or_ends_the_connection() {
    let disk = RamDisk::new(40 << 20);
    let server = serve(&disk);
    let mut client = Client::open(server.path(), "disk", false);
    assert_eq!(client.write(0, 0, &vec![1; 33 << 20]), Outcome::Error(EINVAL));
    assert_eq!(client.write(0, 0, &vec![2; 32 << 20]), Outcome::Done);
    assert_eq!(client.read(0, 32 << 20), vec![2; 32 << 20]);
    client.send(&Client::header(WRITE, 0, 1, 0, (64 << 20) + 512));
    client.expect_closed();
    assert_eq!(disk.counters().writes, 1);
}

#[test]
fn read_only_exports_refuse_every_change() {
    let disk = RamDisk::new(SIZE);
    disk.set_read_only(true);
    let server = serve(&disk);
    let mut client = Client::open(server.path(), "disk", false);
    assert_eq!(client.flags & 2, 2);
    assert_eq!(client.write(0, 0, &[1; 4096]), Outcome::Error(EPERM));
    assert_eq!(client.ask(TRIM, 0, 0, 4096), Outcome::Error(EPERM));
    assert_eq!(client.ask(WRITE_ZEROES, 0, 0, 4096), Outcome::Error(EPERM));
    assert_eq!(client.ask(FLUSH, 0, 0, 0), Outcome::Done);
    assert_eq!(client.read(0, 4096), [0; 4096]);
}

#[test]
fn a_failing_read_is_an_error_of_that_read_alone() {
    for structured in [false, true] {
        let disk = RamDisk::new(SIZE);
        disk.damage(5000);
        let server = serve(&disk);
        let mut client = Client::open(server.path(), "disk", structured);
        assert_eq!(client.ask(READ, 0, 4096, 4096), Outcome::Error(EIO));
        assert_eq!(client.read(8192, 4096), [0; 4096]);
    }
}

#[test]
fn a_failing_write_is_an_error_of_that_write() {
    let disk = RamDisk::new(SIZE);
    disk.damage(5000);
    let server = serve(&disk);
    let mut client = Client::open(server.path(), "disk", false);
    assert_eq!(client.write(0, 4096, &[1; 4096]), Outcome::Error(EIO));
    assert_eq!(client.write(0, 8192, &[1; 4096]), Outcome::Done);
}

#[test]
fn block_status_tells_data_from_holes() {
    let disk = RamDisk::new(SIZE);
    let server = serve(&disk);
    let mut client = Client::open(server.path(), "disk", true);
    client.write(0, 8192, &[1; 4096]);
    client.write(0, 12288, &[1; 4096]);
    let all = u32::try_from(SIZE).unwrap();
    let expected = vec![(8192, 3), (8192, 0), (all - 16384, 3)];
    assert_eq!(client.ask(BLOCK_STATUS, 0, 0, all), Outcome::Extents(expected));
    assert_eq!(client.ask(BLOCK_STATUS, REQ_ONE, 8192, all / 2), Outcome::Extents(vec![(8192, 0)]));
    assert_eq!(client.ask(BLOCK_STATUS, 0, 9216, 512), Outcome::Extents(vec![(512, 0)]));
    // One extent a block: the answer is bounded, and the client asks again.
    for block in (0..1024).step_by(2) {
        client.write(0, block * 4096, &[1; 512]);
        client.ask(TRIM, 0, (block + 1) * 4096, 4096);
    }
    let Outcome::Extents(extents) = client.ask(BLOCK_STATUS, 0, 0, all) else { panic!() };
    assert_eq!(extents.len(), 1024);
    let mut unstructured = Client::open(server.path(), "disk", false);
    assert_eq!(unstructured.ask(BLOCK_STATUS, 0, 0, 4096), Outcome::Error(EINVAL));
}

#[test]
fn growth_is_seen_at_once() {
    let disk = RamDisk::new(SIZE);
    let server = serve(&disk);
    let mut client = Client::open(server.path(), "disk", false);
    assert_eq!(client.write(0, SIZE, &[1; 512]), Outcome::Error(ENOSPC));
    disk.grow(2 * SIZE);
    assert_eq!(client.write(0, SIZE, &[1; 512]), Outcome::Done);
    assert_eq!(client.read(SIZE, 512), [1; 512]);
}

/// Requests of random kind and size, hundreds at a time, on connections of two shards, against a
/// plain copy of what the volume must hold. Each connection keeps to its part of the volume.
#[test]
fn random_pipelined_requests_match_a_model() {
    const PART: usize = 1 << 20;
    let disk = RamDisk::new(4 * PART as u64);
    let server = TestServer::with(&[("disk", &disk)], ServerOptions::default(), 2);
    std::thread::scope(|scope| {
        for part in 0..4_usize {
            let path = server.path();
            scope.spawn(move || {
                let mut client = Client::open(path, "disk", part % 2 == 0);
                let mut model = vec![0_u8; PART];
                let mut state = 0x1234_5678 + part as u64;
                for _ in 0..20 {
                    pipeline(&mut client, &mut model, (part * PART) as u64, &mut state);
                }
                let read = client.read((part * PART) as u64, u32::try_from(PART).unwrap());
                assert!(read == model, "part {part}");
            });
        }
    });
}

fn next(state: &mut u64, below: usize) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    usize::try_from(*state % below as u64).unwrap()
}

/// One round: 128 requests on ranges that do not overlap, sent at once, then all replies.
fn pipeline(client: &mut Client, model: &mut [u8], base: u64, state: &mut u64) {
    let mut stream = Vec::new();
    let mut expected = HashMap::new();
    let slot = model.len() / 128;
    for cookie in 0..128_usize {
        let start = cookie * slot + next(state, 8) * 512;
        let len = (1 + next(state, 8)) * 512;
        let range = &mut model[start..start + len];
        let (offset, len32) = (base + start as u64, u32::try_from(len).unwrap());
        let mut header = |command| {
            stream.extend(Client::header(command, 0, cookie as u64, offset, len32));
        };
        match next(state, 4) {
            0 => {
                header(READ);
                expected.insert(cookie as u64, (len32, Outcome::Data(range.to_vec())));
            }
            1 => {
                header(WRITE_ZEROES);
                range.fill(0);
                expected.insert(cookie as u64, (0, Outcome::Done));
            }
            _ => {
                header(WRITE);
                range.fill(u8::try_from(1 + next(state, 255)).unwrap());
                stream.extend_from_slice(range);
                expected.insert(cookie as u64, (0, Outcome::Done));
            }
        }
    }
    client.send(&stream);
    while !expected.is_empty() {
        // A simple reply does not say how much data it carries, and replies come in any order;
        // the volume in memory keeps the order of the requests.
        let first = expected.keys().min().copied().unwrap();
        let read_len = if client.structured { 0 } else { expected[&first].0 };
        let (cookie, outcome) = client.reply(read_len);
        let (_, wanted) = expected.remove(&cookie).expect("a reply to what was asked");
        assert!(outcome == wanted, "request {cookie}");
    }
}

#[test]
fn bytes_may_come_one_at_a_time() {
    let disk = RamDisk::new(SIZE);
    let server = serve(&disk);
    let mut client = Client::open(server.path(), "disk", false);
    let mut stream = Client::header(WRITE, 0, 1, 512, 512);
    stream.extend([5; 512]);
    stream.extend(Client::header(READ, 0, 2, 512, 512));
    for byte in stream {
        client.send(&[byte]);
    }
    assert_eq!(client.reply(0), (1, Outcome::Done));
    assert_eq!(client.reply(512), (2, Outcome::Data(vec![5; 512])));
}

#[test]
fn requests_may_follow_the_handshake_without_waiting() {
    let disk = RamDisk::new(SIZE);
    let server = serve(&disk);
    let mut client = Client::connect(server.path());
    let mut stream = b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk".to_vec();
    stream.extend(Client::header(READ, 0, 3, 0, 512));
    client.send(&stream);
    let mut export = [0; 10];
    client.socket.read_exact(&mut export).unwrap();
    assert_eq!(export[..8], SIZE.to_be_bytes());
    assert_eq!(client.reply(512), (3, Outcome::Data(vec![0; 512])));
}

#[test]
fn names_are_looked_up() {
    let (one, two) = (RamDisk::new(512), RamDisk::new(1024));
    let server = TestServer::start(&[("one", &one), ("two", &two)]);
    assert_eq!(Client::open(server.path(), "", false).size, 512, "the default");
    assert_eq!(Client::open(server.path(), "two", true).size, 1024);
    let mut client = Client::connect(server.path());
    let refused = client.option(7, b"\0\0\0\x05three\0\0");
    assert_eq!(refused[0].0, 0x8000_0006);
    let names: Vec<Vec<u8>> = client.option(3, &[]).into_iter().map(|(_, data)| data).collect();
    assert_eq!(names, [b"\0\0\0\x03one".to_vec(), b"\0\0\0\x03two".to_vec(), vec![]]);
    assert_eq!(client.option(5, &[])[0].0, 0x8000_0002, "no TLS on a local socket");
    client.send(b"IHAVEOPT\0\0\0\x01\0\0\0\x05three");
    client.expect_closed();
}

#[test]
fn hostile_bytes_end_only_their_own_connection() {
    let disk = RamDisk::new(SIZE);
    let server = serve(&disk);
    let mut bystander = Client::open(server.path(), "disk", true);
    assert_eq!(bystander.write(0, 0, &[3; 4096]), Outcome::Done);
    let mut state = 99;
    for round in 0..200 {
        let mut garbage: Vec<u8> =
            (0..600).map(|_| u8::try_from(next(&mut state, 256)).unwrap()).collect();
        let mut client = if round % 2 == 0 {
            Client::connect(server.path())
        } else {
            // A good magic with anything behind it; never a write, which would wait for payload.
            garbage[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
            garbage[6..8].copy_from_slice(&[0, u8::try_from(next(&mut state, 12) | 2).unwrap()]);
            Client::open(server.path(), "disk", true)
        };
        // The server may close before it has taken everything.
        let _ignored = client.socket.write_all(&garbage);
        let _ignored = client.socket.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        if let Err(error) = client.socket.read_to_end(&mut rest) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }
    let mut wrong = Client::open(server.path(), "disk", true);
    wrong.send(&[0; 28]);
    wrong.expect_closed();
    // Gone in the middle of a payload: nothing of it is written.
    let mut cut = Client::open(server.path(), "disk", true);
    cut.send(&Client::header(WRITE, 0, 1, 0, 1 << 20));
    cut.send(&[4; 200_000]);
    drop(cut);
    assert_eq!(bystander.read(0, 4096), [3; 4096]);
    eventually("the others leave", || server.server.connections() == 1);
    assert_eq!(disk.counters().writes, 1);
}

/// The reads 0 to `count` are each answered once, in whatever order they were let go.
fn answered_once(client: &mut Client, count: u64, len: u32) {
    let mut cookies: Vec<u64> = (0..count).map(|_| client.reply(len).0).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..count).collect::<Vec<u64>>());
}

#[test]
fn requests_in_flight_are_bounded() {
    let disk = RamDisk::new(SIZE);
    let limits = Limits { requests: 16, bytes: 1 << 20 };
    let options = ServerOptions { limits, ..ServerOptions::default() };
    let server = TestServer::with(&[("disk", &disk)], options, 0);
    disk.hold();
    let mut client = Client::open(server.path(), "disk", false);
    for cookie in 0..100 {
        client.send(&Client::header(READ, 0, cookie, 0, 512));
    }
    let reach = |limit: usize| {
        eventually("the limit is reached", || {
            assert!(disk.waiting() <= limit, "{} requests, not {limit}", disk.waiting());
            disk.waiting() == limit
        });
    };
    reach(16);
    // Another connection is not concerned by it.
    let mut other = Client::open(server.path(), "disk", false);
    assert_eq!(other.ask(FLUSH, 0, 0, 0), Outcome::Done);
    assert_eq!(disk.waiting(), 16);
    assert_eq!(disk.release(), 16);
    answered_once(&mut client, 100, 512);
    // By bytes: three of 300 KiB fit, the fourth does not.
    disk.hold();
    for cookie in 0..8 {
        client.send(&Client::header(READ, 0, cookie, 0, 300 << 10));
    }
    reach(3);
    assert_eq!(other.ask(FLUSH, 0, 0, 0), Outcome::Done);
    assert_eq!(disk.release(), 3);
    answered_once(&mut client, 8, 300 << 10);
}

#[test]
fn a_client_that_does_not_listen_is_not_read() {
    let disk = RamDisk::new(SIZE);
    let limits = Limits { requests: 8, ..Limits::default() };
    let options = ServerOptions { limits, ..ServerOptions::default() };
    let server = TestServer::with(&[("disk", &disk)], options, 0);
    let mut client = Client::open(server.path(), "disk", false);
    client.socket.set_nonblocking(true).unwrap();
    let request = Client::header(READ, 0, 1, 0, 1 << 20);
    let mut sent = 0_u64;
    while client.socket.write(&request).is_ok_and(|count| count == request.len()) {
        sent += 1;
        assert!(sent < 100_000, "the server takes requests without end");
    }
    // Eight replies wait or are being sent, and the kernel holds 4 MiB at most (it doubles what
    // it is asked for); nothing else has been read.
    assert!(disk.counters().reads <= 8 + 4, "{} reads", disk.counters().reads);
    drop(client);
    eventually("it leaves", || server.server.connections() == 0);
}

#[test]
fn connections_are_bounded() {
    let disk = RamDisk::new(SIZE);
    let options = ServerOptions { connections_max: 3, ..ServerOptions::default() };
    let server = TestServer::with(&[("disk", &disk)], options, 1);
    let mut clients: Vec<Client> =
        (0..3).map(|_| Client::open(server.path(), "disk", false)).collect();
    let mut refused = std::os::unix::net::UnixStream::connect(server.path()).unwrap();
    assert_eq!(refused.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(server.server.connections(), 3);
    assert_eq!(clients[2].read(0, 512), [0; 512]);
    clients.pop();
    eventually("there is room again", || server.server.connections() == 2);
    assert_eq!(Client::open(server.path(), "disk", false).read(0, 512), [0; 512]);
}

#[test]
fn stop_answers_what_is_in_flight_and_removes_the_socket() {
    let disk = RamDisk::new(SIZE);
    let server = serve(&disk);
    disk.hold();
    let mut busy = Client::open(server.path(), "disk", true);
    let mut idle = Client::open(server.path(), "disk", true);
    let mut early = Client::connect(server.path());
    busy.send(&Client::header(READ, 0, 5, 0, 4096));
    eventually("the read is under way", || disk.waiting() == 1);
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| wait(server.server.stop()));
        idle.expect_closed();
        early.expect_closed();
        assert!(!stopping.is_finished(), "a read is still in flight");
        disk.release();
        assert_eq!(busy.reply(0), (5, Outcome::Data(vec![0; 4096])));
        busy.expect_closed();
    });
    assert_eq!(server.server.connections(), 0);
    assert!(!server.path().exists());
    wait(server.server.stop());
}

#[test]
fn stop_cuts_off_who_does_not_listen() {
    let disk = RamDisk::new(SIZE);
    let options = ServerOptions { drain: Duration::from_millis(50), ..ServerOptions::default() };
    let server = TestServer::with(&[("disk", &disk)], options, 0);
    let mut deaf = Client::open(server.path(), "disk", false);
    for cookie in 0..4 {
        deaf.send(&Client::header(READ, 0, cookie, 0, 1 << 20));
    }
    eventually("replies wait", || disk.counters().reads == 4);
    wait(server.server.stop());
    assert_eq!(server.server.connections(), 0);
}

#[test]
fn the_socket_is_private_and_never_taken_from_the_living() {
    let disk = RamDisk::new(SIZE);
    let server = serve(&disk);
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(server.path()), 0o600);
    assert_eq!(mode(server.path().parent().unwrap()), 0o700);
    let rival = || {
        let options = ServerOptions::default();
        listen(&server.shards[0], &[("disk", &disk)], server.path(), options)
    };
    let busy = rival().err().unwrap();
    assert_eq!(busy.kind(), error::ErrorKind::Busy);
    assert_eq!(Client::open(server.path(), "disk", false).read(0, 512), [0; 512]);

    wait(server.server.stop());
    // A killed process can leave a socket that takes connections for a moment still.
    let dying = std::os::unix::net::UnixListener::bind(server.path()).unwrap();
    let death = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(dying);
    });
    let heir = rival().unwrap();
    death.join().unwrap();
    assert_eq!(Client::open(server.path(), "disk", false).read(0, 512), [0; 512]);
    wait(heir.stop());
    std::fs::write(server.path(), "a file").unwrap();
    let exists = rival().err().unwrap();
    assert_eq!(exists.kind(), error::ErrorKind::Exists);
    std::fs::remove_file(server.path()).unwrap();

    // What a killed process leaves behind.
    drop(UnixListener::bind(server.path()).unwrap());
    let second = rival().unwrap();
    assert_eq!(Client::open(server.path(), "disk", false).read(0, 512), [0; 512]);
    wait(second.stop());
}
