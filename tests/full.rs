//! Too little space: a full pool, a growth limit, a reservation, and a host file system that runs
//! full below a sparse pool. Growth is refused for the request that asks for it; nothing that was
//! acknowledged is lost; everything that gives space back works, also back to the host.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use pando_tests::cli::number;
use pando_tests::nbd::command;
use pando_tests::noise::Noise;
use pando_tests::tools::run;
use pando_tests::{Cli, Nbd, System};

const PIECE: usize = 64 << 10;
const PIECE_BYTES: u64 = 64 << 10;
const ENOSPC: u32 = 28;
const EIO: u32 = 5;

fn piece(seed: u64) -> Vec<u8> {
    Noise::new(seed).bytes(PIECE)
}

/// Writes pieces one after another until one is refused; how many were not, and the errno.
fn fill(nbd: &mut Nbd, from: u64) -> (u64, u32) {
    let mut index = from;
    loop {
        match nbd.try_write(index * PIECE_BYTES, &piece(index), 0).expect("a connection") {
            Ok(()) => index += 1,
            Err(errno) => return (index, errno),
        }
    }
}

fn verify(nbd: &mut Nbd, count: u64) {
    for index in 0..count {
        let found = nbd.read(index * PIECE_BYTES, 64 << 10);
        assert!(found == piece(index), "piece {index} of {count}");
    }
}

fn delete(cli: &Cli, name: &str) {
    cli.run(&["volume", "serve", "--stop", name]);
    cli.run(&["volume", "delete", name]);
}

fn free_bytes(cli: &Cli) -> u64 {
    number(&cli.json(&["pool", "status"]), "/free_bytes")
}

#[test]
fn a_full_pool_refuses_growth_and_nothing_else() {
    let mut system = System::start("64MiB");
    let cli = system.cli();
    let empty = free_bytes(&cli);
    cli.run(&["volume", "create", "big", "--size", "1GiB"]);
    cli.run(&["volume", "create", "small", "--size", "1MiB"]);
    let mut small = Nbd::open(&cli.serve("small"), "small").expect("an export");
    small.write(0, &[1; 8192]);
    let mut big = Nbd::open(&cli.serve("big"), "big").expect("an export");
    let (count, errno) = fill(&mut big, 0);
    assert_eq!(errno, ENOSPC);
    assert!(count * PIECE_BYTES > empty * 8 / 10, "most of the pool can be used: {count} pieces");
    let refused = number(&cli.json(&["pool", "status"]), "/counters/no_space");
    assert!(refused > 0, "refusals are counted");

    // Full: growth is refused to everyone; all else goes on.
    let answer = small.try_write(512 << 10, &piece(1), 0).expect("a connection");
    assert_eq!(answer, Err(ENOSPC));
    verify(&mut big, count);
    assert_eq!(small.read(0, 8192), [1; 8192]);
    for turn in 0..200_u64 {
        // Overwrites of its own blocks, many times over: the reserve and the checkpoints carry it.
        let index = turn % count;
        big.write(index * PIECE_BYTES, &piece(index));
    }
    small.write(0, &[2; 8192]);
    big.flush();
    cli.run(&["snapshot", "small", "frozen"]);
    cli.run(&["volume", "delete", "frozen"]);

    // Killed while full, it opens again and holds everything.
    system.crash();
    let mut big = Nbd::open(&cli.serve("big"), "big").expect("an export");
    verify(&mut big, count);
    let mut small = Nbd::open(&cli.serve("small"), "small").expect("an export");
    assert_eq!(small.read(0, 8192), [2; 8192]);

    // A discard makes room, a delete makes all of it.
    big.simple(command::TRIM, (0, 4 << 20));
    small.write(512 << 10, &piece(1));
    assert_eq!(big.read(0, 4096), [0; 4096]);
    big.close();
    delete(&cli, "big");
    small.close();
    delete(&cli, "small");
    settled(&cli, empty);
    system.check();
    system.stop();
}

/// Waits until deletions have given all space back: they do so in the background.
fn settled(cli: &Cli, expected: u64) {
    let since = std::time::Instant::now();
    loop {
        let status = cli.json(&["pool", "status"]);
        let (free, pending) = (number(&status, "/free_bytes"), number(&status, "/pending_bytes"));
        // Blocks set aside for nodes, and the catalogue, are not free.
        if free + pending + (2 << 20) >= expected && number(&status, "/deletions_pending") == 0 {
            return;
        }
        assert!(since.elapsed().as_secs() < 30, "space does not come back: {status}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn a_growth_limit_stops_one_clone_alone() {
    let system = System::start("128MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "base", "--size", "16MiB"]);
    let mut base = Nbd::open(&cli.serve("base"), "base").expect("an export");
    let (count, errno) = fill(&mut base, 0);
    assert_eq!((count, errno), (256, ENOSPC), "the end of the volume");
    cli.run(&["clone", "base", "limited", "--growth-limit", "1MiB"]);
    cli.run(&["clone", "base", "free"]);
    let mut limited = Nbd::open(&cli.serve("limited"), "limited").expect("an export");
    let (count, errno) = fill(&mut limited, 0);
    assert_eq!((count, errno), (16, ENOSPC), "16 pieces are the limit");
    limited.write(0, &piece(99));
    verify(&mut base, 256);
    let mut free = Nbd::open(&cli.serve("free"), "free").expect("an export");
    free.write(2 << 20, &piece(5));
    cli.run(&["volume", "set", "limited", "--growth-limit", "2MiB"]);
    limited.write(1 << 20, &piece(16));
    system.check();
}

#[test]
fn a_reservation_is_kept_in_a_full_pool() {
    let system = System::start("64MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "promised", "--size", "16MiB", "--reservation", "8MiB"]);
    cli.run(&["volume", "create", "greedy", "--size", "1GiB"]);
    let mut greedy = Nbd::open(&cli.serve("greedy"), "greedy").expect("an export");
    assert_eq!(fill(&mut greedy, 0).1, ENOSPC);
    let mut promised = Nbd::open(&cli.serve("promised"), "promised").expect("an export");
    let (count, errno) = fill(&mut promised, 0);
    assert_eq!(errno, ENOSPC);
    assert!(count >= 128, "8 MiB were promised, {count} pieces of 64 KiB were had");
    verify(&mut promised, count);
    system.check();
}

#[test]
fn a_full_host_loses_nothing_that_was_acknowledged() {
    let mut system = System::empty();
    // A file system of its own for the pool. Where nothing may be mounted this cannot be tried.
    let host = system.path().join("host");
    std::fs::create_dir(&host).expect("a directory");
    let shown = host.to_str().expect("paths of tests are text");
    let mounted = pando_tests::tools::output(
        "mount",
        &["-t", "tmpfs", "-o", "size=48m", "pando-test", shown],
    );
    if !mounted.status.success() {
        let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
        assert!(!ci, "no mount: {}", String::from_utf8_lossy(&mounted.stderr));
        eprintln!("left out: a file system cannot be mounted here");
        return;
    }
    let mount = Mounted(shown.to_owned());
    system.move_pool(host.join("pool"));
    system.create_pool(&["--size", "256MiB", "--allocate", "sparse"]);
    system.spawn();
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "200MiB"]);
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    nbd.write(0, &piece(0));
    nbd.flush();
    let (count, errno) = fill(&mut nbd, 1);
    assert!(errno == ENOSPC || errno == EIO, "errno {errno}");

    // The pool takes no change any more and says why; what is there can be read.
    let refused = nbd.try_write(0, &piece(0), 0).expect("a connection");
    assert!(refused.is_err(), "nothing is acknowledged after a failed write");
    let flushed = nbd.try_simple(command::FLUSH, (0, 0)).expect("a connection");
    assert!(flushed.is_err(), "least of all a flush");
    let status = cli.json(&["pool", "status"]);
    let why = status["poisoned"].as_str().expect("a reason");
    assert!(why.contains("No space left on device"), "{why}");
    assert_eq!(cli.refused(&["volume", "create", "x", "--size", "1MiB"])["kind"], "poisoned");
    // An export that is refused leaves no file in the way of the next one.
    let copy = system.path().join("copy");
    let export = ["volume", "export", "db", copy.to_str().expect("paths of tests are text")];
    assert_eq!(cli.refused(&export)["kind"], "poisoned");
    assert!(!copy.exists());
    nbd.close();
    system.terminate();

    // More room, a new start: everything that was acknowledged is there.
    run("mount", &["-o", "remount,size=400m", shown]);
    system.spawn();
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    verify(&mut nbd, count);
    nbd.write(count * PIECE_BYTES, &piece(count));
    verify(&mut nbd, count + 1);
    system.check();
    system.stop();
    drop(mount);
}

/// Bytes that the host has allocated for a file.
fn allocated(file: &Path) -> u64 {
    std::fs::metadata(file).expect("a file").blocks() * 512
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is_so() {
        assert!(since.elapsed() < Duration::from_secs(60), "{what}: not in time");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What is deleted goes back to the host from a sparse file. A file whose space was set aside keeps it:
/// the host may not have it any more when the pool needs it again.
#[test]
fn space_goes_back_to_the_host_unless_it_was_set_aside() {
    for allocate in ["sparse", "reserve", "write"] {
        let mut system = System::empty();
        system.create_pool(&["--size", "128MiB", "--allocate", allocate]);
        system.spawn();
        let cli = system.cli();
        cli.run(&["volume", "create", "v", "--size", "32MiB"]);
        let mut nbd = Nbd::open(&cli.serve("v"), "v").expect("an export");
        for index in 0..(32 << 20) / PIECE_BYTES {
            nbd.write(index * PIECE_BYTES, &piece(index));
        }
        nbd.flush();
        nbd.close();
        let before = allocated(system.pool());
        assert!(before >= 32 << 20, "{allocate}: {before} bytes are allocated");
        delete(&cli, "v");
        eventually("all of it is free", || {
            let status = cli.json(&["pool", "status"]);
            number(&status, "/pending_bytes") + number(&status, "/deletions_pending") == 0
        });
        if allocate == "sparse" {
            // Single pieces at the borders of the pool's groups stay.
            eventually("space goes back", || allocated(system.pool()) < before - (20 << 20));
        }
        system.stop();
        let (after, len) = (allocated(system.pool()), 128 << 20);
        assert!(
            allocate == "sparse" || after >= len,
            "{allocate}: only {after} bytes are allocated"
        );
        let kept = system.log().contains("free blocks are not discarded");
        assert_eq!(kept, allocate != "sparse", "{}", system.log());
        system.spawn();
        system.check();
        system.stop();
    }
}

/// A mount that does not outlive its test.
struct Mounted(String);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a daemon may still be there when a test fails.
        pando_tests::tools::output("umount", &["-l", &self.0]);
    }
}
