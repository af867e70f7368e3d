//! The first minutes: a daemon and a pool of one's own by few options, a configuration that is
//! checked before the daemon starts, and sizes as other tools read them.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pando_tests::cli::number;
use pando_tests::system::programs;
use pando_tests::tools::{present, text};
use pando_tests::{Cli, System};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longest time for a start and for an end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program with an environment of its own: no variable names a daemon or a run directory.
fn program(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(programs().join(name));
    command.args(arguments).stdin(Stdio::null());
    command.env_remove("PANDO_SOCKET").env_remove("XDG_RUNTIME_DIR");
    command
}

fn output(name: &str, arguments: &[&str]) -> Output {
    program(name, arguments).output().expect("`make test` builds it")
}

/// Exit code, standard output and standard error.
fn ended(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A daemon that ends with the test.
struct Daemon(Child);

impl Daemon {
    fn start(arguments: &[&str]) -> Self {
        Self(program("pandod", arguments).spawn().expect("`make test` builds it"))
    }

    fn stop(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).expect("it runs");
        assert!(self.0.wait().expect("our child").success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().unwrap_or_default();
        self.0.wait().map(|_| ()).unwrap_or_default();
    }
}

/// Runs `pando` until the daemon answers.
fn answer(arguments: &[&str]) -> Value {
    let since = Instant::now();
    loop {
        // An option wins over the variable.
        let run = program("pando", arguments).env("PANDO_SOCKET", "/nonexistent/socket").output();
        let (code, out, err) = ended(&run.expect("`make test` builds it"));
        if code == Some(0) {
            return serde_json::from_str(&out).expect("JSON");
        }
        assert!(since.elapsed() < PATIENCE, "no answer: {err}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.expect("an entry").file_name();
    let mut names: Vec<_> =
        entries.map(|entry| name(entry).to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn one_directory_is_enough_for_both_programs() {
    let home = System::empty();
    home.create_pool(&["--size", "64M", "--allocate", "sparse"]);
    let run_dir = home.path().join("run");
    let daemon = Daemon::start(&["--pool", text(home.pool()), "--run-dir", text(&run_dir)]);
    let run_dir_option = ["--run-dir", text(&run_dir), "-o", "json"];
    let pando = |arguments: &[&str]| answer(&[&run_dir_option, arguments].concat());
    pando(&["volume", "create", "db", "--size", "10M"]);
    let export = pando(&["volume", "serve", "db"]);
    assert!(Path::new(export["path"].as_str().expect("a path")).starts_with(&run_dir));
    assert_eq!(names(&run_dir), ["devices", "journal", "nbd", "pando.sock"]);
    daemon.stop();
    assert_eq!(names(home.path()), ["pool", "run"], "nothing else is made");
}

#[test]
fn a_key_or_option_for_one_path_wins_over_the_directory() {
    let home = System::empty();
    home.create_pool(&["--size", "64M", "--allocate", "sparse"]);
    let place = |name: &str| text(&home.path().join(name)).to_owned();
    let config = place("pandod.toml");
    let lines = format!("run_dir = {:?}\njournal_dir = {:?}\n", place("run"), place("journal"));
    std::fs::write(&config, lines + &format!("pool = {:?}\n", text(home.pool()))).expect("a file");
    let socket = place("own.sock");
    let daemon = Daemon::start(&["--config", &config, "--socket", &socket]);
    answer(&["--socket", &socket, "-o", "json", "volume", "create", "db", "--size", "10M"]);
    assert_eq!(names(&home.path().join("run")), ["devices"]);
    assert_eq!(names(home.path()), ["journal", "own.sock", "pandod.toml", "pool", "run"]);
    daemon.stop();
}

#[test]
fn without_options_the_system_configuration_is_read() {
    if Path::new("/etc/pando/pandod.toml").exists() {
        eprintln!("skipped: this machine has a configuration");
        return;
    }
    let (code, _, err) = ended(&output("pandod", &["--check-config"]));
    assert_eq!(code, Some(1), "{err}");
    for part in ["configuration /etc/pando/pandod.toml", "--pool", "--config"] {
        assert!(err.contains(part), "{part:?} is missing: {err}");
    }
}

// ---- --check-config ---------------------------------------------------------------------------

/// `pandod --check-config` with `lines` beside a pool and a run directory.
fn check(home: &System, lines: &str) -> (Option<i32>, String, String) {
    let config = home.path().join("pandod.toml");
    let pool = if lines.contains("pool =") {
        String::new()
    } else {
        format!("pool = {:?}\n", text(home.pool()))
    };
    let run_dir = format!("run_dir = {:?}\n", text(home.path()));
    std::fs::write(&config, format!("{pool}{run_dir}{lines}\n")).expect("a file");
    ended(&output("pandod", &["--check-config", "--config", text(&config)]))
}

#[test]
fn a_sound_configuration_is_confirmed_in_one_line() {
    let home = System::empty();
    home.create_pool(&["--size", "64M", "--allocate", "sparse"]);
    let (code, out, err) = check(&home, "cache = '64M'\n[log]\nlevel = 'info,pando_engine=debug'");
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert_eq!(out.lines().count(), 1, "{out}");
    for part in ["valid", text(home.pool()), text(&home.path().join("pando.sock"))] {
        assert!(out.contains(part), "{part:?} is missing: {out}");
    }
    assert_eq!(names(home.path()), ["pandod.toml", "pool"], "a check makes nothing");
}

#[test]
fn a_check_finds_what_a_start_would() {
    let home = System::empty();
    home.create_pool(&["--size", "64M", "--allocate", "sparse"]);
    let long = format!("nbd_dir = '/tmp/{}'", "x".repeat(90));
    for (lines, parts) in [
        ("pool = '/nonexistent/pool'", &["pool /nonexistent/pool", "pando pool create"][..]),
        ("pool = '/dev/null'", &["/dev/null", "neither a regular file nor a block device"]),
        (&long, &["nbd_dir", "socket", "107 bytes"]),
        ("cache = 'lots'", &["cache = 'lots'", "\"lots\" is not a size", "powers of 1024"]),
        ("log.level = 'loud'", &["log.level = \"loud\"", "error, warn, info, debug, trace"]),
        (
            "[nbd_tls]\nlisten = '127.0.0.1:0'\ncertificate = '/c'\nkey = '/k'\nclient_ca = '/none'",
            &["nbd_tls", "/none", "No such file"],
        ),
    ] {
        let (code, out, err) = check(&home, lines);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{lines}: {err}");
        for part in parts {
            assert!(err.contains(part), "{lines}: {part:?} is missing: {err}");
        }
    }
}

// ---- Pools and sizes --------------------------------------------------------------------------

#[test]
fn letters_are_powers_of_1024_for_pools_and_volumes() {
    let mut system = System::empty();
    system.create_pool(&["--size", "64M", "--journal", "4m", "--allocate", "sparse"]);
    assert_eq!(system.pool().metadata().expect("a pool").len(), 64 << 20);
    system.configure("cache = '64M'\n");
    system.spawn();
    let cli = system.cli();
    for (name, size, bytes) in [
        ("a", "10G", 10_u64 << 30),
        ("b", "10GiB", 10 << 30),
        ("c", "10M", 10 << 20),
        ("d", "4k", 4096),
        ("e", "1.5G", 3 << 29),
        ("f", "10GB", 10_000_000_000),
    ] {
        let made = cli.json(&["volume", "create", name, "--size", size]);
        assert_eq!(number(&made[0], "/size_bytes"), bytes, "{size}");
    }
    cli.run(&["volume", "grow", "d", "1M"]);
    assert_eq!(number(&cli.json(&["volume", "show", "d"]), "/size_bytes"), 1 << 20);
}

#[test]
fn a_size_that_cannot_be_is_refused_with_what_can() {
    let home = System::empty();
    let cli = home.cli();
    for (size, parts) in [
        ("10GB", &["10000000000 bytes are not a multiple of 4096", "9999998976"][..]),
        ("lots", &["\"lots\" is not a size", "K, M, G or T (powers of 1024"]),
        ("10X", &["\"10X\" is not a size", "KiB, MiB"]),
    ] {
        let (code, _, err) =
            ended(&cli.output(&["pool", "create", text(home.pool()), "--size", size]));
        assert_eq!(code, Some(2), "{err}");
        for part in parts {
            assert!(err.contains(part), "{size}: {part:?} is missing: {err}");
        }
    }
    assert!(!home.pool().exists());
}

#[test]
fn the_missing_directory_of_a_new_pool_is_named() {
    let home = System::empty();
    let cli = Cli::new(&programs(), Path::new("/nonexistent/socket"));
    let missing = home.path().join("missing");
    let message = cli.error(&["pool", "create", text(&missing.join("pool")), "--size", "64M"]);
    let directory = format!("directory {} does not exist", missing.display());
    assert!(message.contains(&directory) && message.contains("mkdir -p"), "{message}");
}

// ---- scripts/setup ----------------------------------------------------------------------------

/// What `scripts/setup-backports` prints on a machine with these sources of apt.
fn backports(sources: &str) -> (Option<i32>, String, String) {
    let home = System::empty();
    let etc = home.path().join("apt");
    std::fs::create_dir(&etc).expect("a directory");
    std::fs::write(etc.join("debian.sources"), sources).expect("a file");
    let config = home.path().join("apt.conf");
    let dirs = format!(
        "Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{}\";\nDir::State \"{}\";\n",
        etc.display(),
        home.path().display()
    );
    std::fs::write(&config, dirs).expect("a file");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/setup-backports");
    let output = Command::new(script).env("APT_CONFIG", &config).output();
    ended(&output.expect("the script runs"))
}

#[test]
fn setup_takes_packages_from_the_archive_of_this_machine() {
    if !present(&["apt-get"]) {
        return;
    }
    let entry = |uri: &str, suites: &str| {
        format!("Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main contrib\n\n")
    };
    let mirror = entry("http://mirror.invalid/debian", "bookworm bookworm-updates");
    let others = entry("http://security.invalid/debian-security", "bookworm-security");
    let (code, line, err) = backports(&(others.clone() + &mirror));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(line, "deb http://mirror.invalid/debian/ bookworm-backports main\n");
    let there = mirror + &entry("http://other.invalid/debian", "bookworm-backports");
    assert_eq!(backports(&there), (Some(0), String::new(), String::new()));
    let (code, line, err) = backports(&others);
    assert_eq!((code, line.as_str()), (Some(1), ""));
    assert!(err.contains("no archive of bookworm"), "{err}");
}
