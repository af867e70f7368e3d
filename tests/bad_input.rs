//! What is not right gets a clear error that names the object, and loses nothing: files that are
//! no pools, requests that cannot be carried out, bytes that no client should send, and a daemon
//! that has run out of file descriptors.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use pando_engine::format::superblock::set_crc;
use pando_engine::units::BLOCK_SIZE;
use pando_tests::nbd::command;
use pando_tests::noise::Noise;
use pando_tests::system::programs;
use pando_tests::tools::{present, run, text};
use pando_tests::{Cli, Nbd, System};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

const MIB: u64 = 1 << 20;
const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

/// Asserts that a message says all of `parts`.
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not said: {message}");
    }
}

/// The daemon's last words on a pool that it does not open.
fn refusal(system: &mut System) -> String {
    let log = system.try_spawn().expect_err("such a pool is not served");
    log.lines().last().unwrap_or_default().to_owned()
}

// ---- What is not a pool -----------------------------------------------------------------------

#[test]
fn what_is_no_pool_is_not_served() {
    let mut system = System::empty();
    says(&refusal(&mut system), &["pool", "pando pool create"]);

    let pool = system.pool().to_owned();
    File::create(&pool).expect("a file").set_len(8 * MIB).expect("a length");
    says(&refusal(&mut system), &[text(&pool), "no superblock"]);

    std::fs::write(&pool, Noise::new(1).bytes(1 << 20)).expect("a file");
    let before = std::fs::read(&pool).expect("a file");
    says(&refusal(&mut system), &[text(&pool), "no superblock"]);
    assert_eq!(std::fs::read(&pool).expect("a file"), before, "nothing was changed");

    std::fs::write(&pool, b"short").expect("a file");
    says(&refusal(&mut system), &[text(&pool), "too short"]);

    std::fs::remove_file(&pool).expect("our file");
    std::fs::create_dir(&pool).expect("a directory");
    says(&refusal(&mut system), &[text(&pool), "neither a regular file nor a block device"]);
}

#[test]
fn somebodys_data_is_not_made_a_pool_unasked() {
    if !present(&["mkfs.ext4"]) {
        return;
    }
    let system = System::empty();
    let (cli, pool) = (system.cli(), text(system.pool()).to_owned());
    run("mkfs.ext4", &["-q", &pool, "32M"]);
    let before = std::fs::read(&pool).expect("an image");
    says(&cli.error(&["pool", "create", &pool]), &[&pool, "ext2/3/4", "--force"]);
    assert_eq!(std::fs::read(&pool).expect("an image"), before, "nothing was changed");
    cli.run(&["pool", "create", &pool, "--force"]);
    says(&cli.error(&["pool", "create", &pool]), &[&pool, "a Pando pool"]);
    says(&cli.error(&["pool", "create", &pool, "--size", "1TiB"]), &["less than --size"]);
    let new = format!("{pool}.new");
    says(&cli.error(&["pool", "create", &new]), &[&new, "no size"]);
    says(&cli.error(&["pool", "create", &new, "--size", "64KiB"]), &["too small"]);
    assert!(!Path::new(&new).exists(), "a pool that could not be made leaves no file");
}

/// Changes every superblock of a pool and gives it a valid checksum again.
fn change_superblocks(pool: &Path, offset: usize, value: u8) {
    let file = File::options().read(true).write(true).open(pool).expect("a pool");
    let blocks = file.metadata().expect("a length").len() / BLOCK_SIZE as u64;
    for block in [0, 1, blocks - 2, blocks - 1] {
        let mut bytes = [0; BLOCK_SIZE];
        file.read_exact_at(&mut bytes, block * BLOCK_SIZE as u64).expect("a block");
        if bytes.starts_with(b"PANDO") {
            bytes[offset] = value;
            set_crc(&mut bytes);
            file.write_all_at(&bytes, block * BLOCK_SIZE as u64).expect("a block");
        }
    }
}

#[test]
fn a_pool_of_the_future_is_left_alone() {
    for (offset, expected) in [(12, "version 9"), (16, "features 0x9"), (24, "/0x9")] {
        let mut system = System::empty();
        system.create_pool(&["--size", "16MiB", "--allocate", "sparse"]);
        change_superblocks(system.pool(), offset, 9);
        let before = std::fs::read(system.pool()).expect("a pool");
        says(&refusal(&mut system), &["superblock at block", expected, "use a newer one"]);
        assert_eq!(std::fs::read(system.pool()).expect("a pool"), before, "nothing was changed");
    }
}

#[test]
fn a_truncated_pool_is_refused_and_a_longer_file_is_served() {
    let mut system = System::start("64MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "1MiB"]);
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    nbd.write(0, &[7; 8192]);
    nbd.close();
    system.stop();
    let whole = std::fs::read(system.pool()).expect("a pool");

    let file = File::options().write(true).open(system.pool()).expect("a pool");
    file.set_len(32 * MIB).expect("a length");
    says(&refusal(&mut system), &["16384 blocks", "8192", "truncated"]);

    // Put back, and longer than the pool: what is behind its end is not its business.
    std::fs::write(system.pool(), &whole).expect("a pool");
    let file = File::options().write(true).open(system.pool()).expect("a pool");
    file.set_len(80 * MIB).expect("a length");
    system.spawn();
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    assert_eq!(nbd.read(0, 8192), [7; 8192]);
    nbd.close();
    cli.run(&["pool", "grow"]);
    system.crash();
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    assert_eq!(nbd.read(0, 8192), [7; 8192]);
    system.check();
}

#[test]
fn two_daemons_do_not_share_a_pool() {
    let system = System::start("64MiB");
    let shown = text(system.pool());
    let output = Command::new(programs().join("pandod"))
        .args(["--pool", shown])
        .arg("--run-dir")
        .arg(system.path().join("other"))
        .output()
        .expect("pandod starts");
    assert_eq!(output.status.code(), Some(1));
    says(&String::from_utf8_lossy(&output.stderr), &[shown, "in use by another process"]);
    let error = system.cli().refused(&["pool", "check", "--offline", shown]);
    says(&error.to_string(), &[shown, "in use by another process", "leave out --offline"]);
    says(&system.cli().error(&["pool", "create", "--force", shown]), &["in use"]);
    system.check();
}

#[test]
fn a_wrong_configuration_is_named() {
    let mut system = System::empty();
    system.create_pool(&["--size", "16MiB"]);
    for (line, expected) in [("sokcet = '/x'\n", "sokcet"), ("shards = 1000\n", "shards = 1000")] {
        let config = system.path().join("wrong.toml");
        let pool = format!("pool = {:?}\n{line}", text(system.pool()));
        std::fs::write(&config, pool).expect("a file");
        let output = Command::new(programs().join("pandod"))
            .args(["--config", text(&config), "--check-config"])
            .output()
            .expect("pandod starts");
        assert_eq!(output.status.code(), Some(1));
        says(&String::from_utf8_lossy(&output.stderr), &["wrong.toml", expected]);
    }
    system.spawn();
}

// ---- Requests that cannot be carried out ------------------------------------------------------

#[test]
fn impossible_requests_are_refused_by_name() {
    let system = System::start("64MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "8MiB"]);
    cli.run(&["snapshot", "db", "frozen"]);
    let long = "n".repeat(254);
    let size = |size: &str| {
        vec!["volume".to_owned(), "create".into(), "x".into(), "--size".into(), size.into()]
    };
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let cases: Vec<(Vec<String>, &str, &str)> = vec![
        (words("volume create db --size 8MiB"), "exists", "db"),
        (words("clone db frozen"), "exists", "frozen"),
        (size("1000"), "invalid", "not a multiple of 512"),
        (size("0"), "invalid", "between 4 KiB and 64 TiB"),
        (size("65TiB"), "invalid", "between 4 KiB and 64 TiB"),
        (
            words("clone db small --size 4MiB"),
            "invalid",
            "4 MiB are less than the 8 MiB of its source",
        ),
        (words("clone nothing x"), "not_found", "nothing"),
        (words("snapshot nothing x"), "not_found", "nothing"),
        (words("volume show nothing"), "not_found", "nothing"),
        (words("volume delete nothing"), "not_found", "nothing"),
        (words("volume grow nothing 1GiB"), "not_found", "nothing"),
        (words("volume serve nothing"), "not_found", "nothing"),
        (words("volume serve --stop db"), "not_found", "db is not exported"),
        (words("volume diff db nothing"), "not_found", "nothing"),
        (words("volume extents nothing"), "not_found", "nothing"),
        (words("volume grow db 4MiB"), "invalid", "cannot shrink"),
        (words("volume grow frozen 16MiB"), "read_only", "frozen"),
        (words("volume create a/b --size 1MiB"), "invalid", "a/b"),
        (words("volume create .hidden --size 1MiB"), "invalid", ".hidden"),
        (words(&format!("volume create {long} --size 1MiB")), "invalid", "253"),
        (
            words("volume create x --size 1MiB --reservation 1TiB"),
            "no_space",
            "its reservation needs",
        ),
        (words("pool grow --size 32MiB"), "invalid", "shrink"),
    ];
    for (line, kind, expected) in cases {
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let error = cli.refused(&line);
        assert_eq!(error["kind"], kind, "{line:?}: {error}");
        says(error["error"].as_str().expect("a message"), &[expected]);
    }
    // Wrong usage is another exit code.
    assert_eq!(cli.output(&["volume", "create", "x"]).status.code(), Some(2));
    assert_eq!(cli.output(&["volume", "create", "x", "--size", "ten"]).status.code(), Some(2));
    // Nothing came of all that.
    let volumes = cli.json(&["volume", "list"]);
    assert_eq!(volumes.as_array().map(Vec::len), Some(2), "{volumes}");
    system.check();
}

#[test]
fn what_is_in_use_is_not_deleted() {
    let system = System::start("64MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "1MiB"]);
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    let error = cli.refused(&["volume", "delete", "db"]);
    assert_eq!(error["kind"], "busy", "{error}");
    says(&error.to_string(), &["db", "exported"]);
    nbd.write(0, &[1; 512]);
    nbd.close();
    cli.run(&["volume", "serve", "--stop", "db"]);
    cli.run(&["volume", "delete", "db"]);
}

#[test]
fn an_import_that_fails_leaves_no_volume() {
    let system = System::start("64MiB");
    let cli = system.cli();
    let file = system.path().join("large");
    let mut large = File::create(&file).expect("a file");
    let mut noise = Noise::new(3);
    for _ in 0..80 {
        large.write_all(&noise.bytes(1 << 20)).expect("a file");
    }
    let error = cli.refused(&["volume", "import", "large", text(&file)]);
    assert_eq!(error["kind"], "no_space", "{error}");
    let error = cli.error(&["volume", "import", "x", text(&system.path().join("missing"))]);
    says(&error, &["missing"]);
    assert_eq!(cli.json(&["volume", "list"]).as_array().map(Vec::len), Some(0));
    system.check();
}

// ---- Bytes that no client should send ---------------------------------------------------------

/// A volume with a mark in it, and its socket.
fn marked(cli: &Cli) -> std::path::PathBuf {
    cli.run(&["volume", "create", "db", "--size", "8MiB"]);
    let socket = cli.serve("db");
    let mut nbd = Nbd::open(&socket, "db").expect("an export");
    nbd.write(0, &[0x5A; 4096]);
    nbd.close();
    socket
}

#[test]
fn hostile_greetings_harm_nobody_else() {
    let system = System::start("64MiB");
    let cli = system.cli();
    let socket = marked(&cli);
    let mut bystander = Nbd::open(&socket, "db").expect("an export");
    for seed in 0..50 {
        let mut noise = Noise::new(seed);
        let mut nbd = Nbd::greet(&socket).expect("a greeting");
        let len = usize::try_from(noise.below(5000)).expect("64 bits");
        // The server may have hung up already.
        nbd.raw(&noise.bytes(len)).unwrap_or_default();
    }
    // A name that is said to be as long as memory, and one that is not there.
    let mut nbd = Nbd::greet(&socket).expect("a greeting");
    let header = [b"IHAVEOPT", &7_u32.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();
    nbd.raw(&header).expect("a connection");
    assert!(nbd.is_closed(), "4 GiB of option are not worth draining");
    let mut nbd = Nbd::greet(&socket).expect("a greeting");
    nbd.send_option(7, &[0xFF; 64]).expect("a connection");
    assert_eq!(nbd.option_reply().expect("a reply").0, (1 << 31) + 3, "invalid");
    nbd.send_option(4711, &[]).expect("a connection");
    assert_eq!(nbd.option_reply().expect("a reply").0, (1 << 31) + 1, "unsupported");
    nbd.send_option(5, &[]).expect("a connection");
    assert_eq!(nbd.option_reply().expect("a reply").0, (1 << 31) + 2, "no TLS on a local socket");
    let error = Nbd::open(&socket, "other").err().expect("no such export");
    says(&error.to_string(), &["0x80000006"]);
    assert_eq!(bystander.read(0, 4096), [0x5A; 4096]);
}

#[test]
fn hostile_requests_are_answered_by_the_rules() {
    let system = System::start("64MiB");
    let cli = system.cli();
    let socket = marked(&cli);
    let size = 8 * MIB;
    let mut nbd = Nbd::open(&socket, "db").expect("an export");
    let mut answer = |command, flags, offset, len, payload: &[u8]| {
        nbd.send((command, flags), 1, (offset, len), payload).expect("a connection");
        nbd.receive().expect("an answer").1
    };
    assert_eq!(answer(99, 0, 0, 0, &[]), Err(EINVAL), "unknown command");
    assert_eq!(answer(command::READ, 1 << 9, 0, 512, &[]), Err(EINVAL), "unknown flag");
    assert_eq!(answer(command::READ, 0, size, 512, &[]), Err(EINVAL), "beyond the end");
    assert_eq!(answer(command::READ, 0, u64::MAX - 511, 1024, &[]), Err(EINVAL), "overflow");
    assert_eq!(answer(command::READ, 0, 0, !511, &[]), Err(EINVAL), "too long");
    assert_eq!(answer(command::READ, 0, 1, 512, &[]), Err(EINVAL), "not aligned");
    assert_eq!(answer(command::WRITE, 0, size, 512, &[0; 512]), Err(ENOSPC), "beyond the end");
    assert_eq!(answer(command::WRITE, 0, 100, 512, &[0; 512]), Err(EINVAL), "not aligned");
    assert_eq!(answer(command::TRIM, 0, size, 512, &[]), Err(EINVAL), "beyond the end");
    assert_eq!(answer(command::WRITE_ZEROES, 0, size, 512, &[]), Err(ENOSPC), "beyond the end");
    assert_eq!(answer(command::FLUSH, 0, 512, 512, &[]), Err(EINVAL), "flush of a range");
    assert_eq!(nbd.read(0, 4096), [0x5A; 4096], "the stream is still in step");

    // A write that is broken off, a request out of step, a payload beyond all bounds.
    nbd.send((command::WRITE, 0), 1, (0, 4096), &[0xEE; 100]).expect("a connection");
    drop(nbd);
    let mut nbd = Nbd::open(&socket, "db").expect("an export");
    nbd.raw(&[0x13; 28]).expect("a connection");
    assert!(nbd.is_closed(), "a wrong magic ends the connection");
    let mut nbd = Nbd::open(&socket, "db").expect("an export");
    nbd.send((command::WRITE, 0), 1, (0, u32::MAX), &[0; 512]).expect("a connection");
    assert!(nbd.is_closed(), "4 GiB of payload are not worth draining");
    for seed in 0..50 {
        let mut noise = Noise::new(seed);
        let mut nbd = Nbd::open(&socket, "db").expect("an export");
        let mut bytes = noise.bytes(28 * 20);
        for request in bytes.chunks_mut(28) {
            request[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
            // Everything but what could change the volume.
            let harmless = [0, 3, 7, 8, 200][usize::from(request[8] % 5)];
            request[6..8].copy_from_slice(&[0, harmless]);
        }
        nbd.raw(&bytes).unwrap_or_default();
    }
    let mut nbd = Nbd::open(&socket, "db").expect("an export");
    assert_eq!(nbd.read(0, 4096), [0x5A; 4096], "a write that was broken off is not done");
    system.check();
}

#[test]
fn what_is_frozen_is_not_written() {
    let system = System::start("64MiB");
    let cli = system.cli();
    marked(&cli);
    cli.run(&["snapshot", "db", "frozen"]);
    let mut nbd = Nbd::open(&cli.serve("frozen"), "frozen").expect("an export");
    let refused = nbd.try_write(0, &[1; 512], 0).expect("a connection");
    assert_eq!(refused, Err(EPERM));
    assert_eq!(nbd.try_simple(command::TRIM, (0, 4096)).expect("a connection"), Err(EPERM));
    assert_eq!(nbd.read(0, 4096), [0x5A; 4096]);
    let error = cli.refused(&["volume", "set", "frozen", "--read-only", "false"]);
    says(&error.to_string(), &["frozen"]);
}

// ---- Limits of the process --------------------------------------------------------------------

#[test]
fn out_of_file_descriptors_is_survived() {
    let system = System::start("64MiB");
    let cli = system.cli();
    let socket = marked(&cli);
    let mut old = Nbd::open(&socket, "db").expect("an export");
    let open = std::fs::read_dir(format!("/proc/{}/fd", system.pid())).expect("proc").count();
    let limit = u64::try_from(open + 4).expect("64 bits");
    let pid = Pid::from_raw(i32::try_from(system.pid()).expect("a pid"));
    let few = Rlimit { current: Some(limit), maximum: Some(limit) };
    prlimit(pid, Resource::Nofile, few).expect("a limit of our own child");

    // More connections than descriptors: those that get none are not served, that is all.
    let connect = || std::os::unix::net::UnixStream::connect(&socket).expect("a backlog");
    let crowd: Vec<_> = (0..20).map(|_| connect()).collect();
    old.write(4096, &[0xA5; 4096]);
    assert_eq!(old.read(0, 4096), [0x5A; 4096], "who is connected is served");
    drop(crowd);
    let mut new = Nbd::open(&socket, "db").expect("served again");
    assert_eq!(new.read(4096, 4096), [0xA5; 4096]);
    system.check();
}
