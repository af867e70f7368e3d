//! What `make run` shows: a pool in an ordinary file, a volume filled with real data, a clone of
//! it, changes to both, and the numbers. Everything is done with the programs that users have;
//! each command is printed before it is run.

#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pando_tests::cli::number;
use pando_tests::noise::Noise;
use pando_tests::system::programs;
use pando_tests::{Cli, Nbd};
use rustix::process::{Pid, Signal, kill_process};

/// Size of the file that is the pool; it takes only what is used of it.
const POOL: &str = "8GiB";
/// Most of the real data that is taken.
const DATA_BYTES_MAX: u64 = 1 << 30;
/// What is read, the first that exists.
const SOURCES: [&str; 3] = ["/usr/lib", "/usr", "."];
/// Blocks changed in the volume and in its clone.
const CHANGES: u64 = 2000;
const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;

fn main() -> io::Result<()> {
    let directory = PathBuf::from(std::env::args_os().nth(1).unwrap_or_else(|| "run".into()));
    std::fs::create_dir_all(&directory)?;
    let directory = directory.canonicalize()?;
    let socket = directory.join("pando.sock");
    let cli = Cli::new(&programs(), &socket);
    say(&format!("everything is in {}\n", directory.display()))?;

    let pool = directory.join("pool");
    let shown = pool.display().to_string();
    if !pool.exists() {
        step(&cli, &["pool", "create", &shown, "--size", POOL, "--allocate", "sparse"])?;
    }
    let mut daemon = Daemon::start(&directory, &pool, &cli)?;
    remove_last_run(&cli)?;
    demonstrate(&cli)?;
    if std::env::var_os("KEEP").is_some() {
        daemon.0 = None;
        say("\npandod keeps running\n")?;
    } else {
        daemon.stop()?;
        say(&format!(
            "\npandod is stopped; go on with\n  {}/pandod --pool {shown} --run-dir {} &\n",
            programs().display(),
            directory.display()
        ))?;
    }
    let pando = programs().join("pando");
    say(&format!("  {} --run-dir {} volume list\n", pando.display(), directory.display()))
}

/// Prints to a terminal that may have gone.
fn say(text: &str) -> io::Result<()> {
    io::stdout().lock().write_all(text.as_bytes())
}

/// Prints a command, runs it, and prints its answer and how long it took, its own start included.
fn step(cli: &Cli, arguments: &[&str]) -> io::Result<Duration> {
    say(&format!("\n$ pando {}\n", arguments.join(" ")))?;
    let since = Instant::now();
    let answer = cli.run(arguments);
    let took = since.elapsed();
    say(&answer)?;
    say(&format!("  ({:.1} ms, start of the program included)\n", took.as_secs_f64() * 1e3))?;
    Ok(took)
}

/// The daemon, stopped in good order at the end.
struct Daemon(Option<Child>);

impl Daemon {
    fn start(directory: &Path, pool: &Path, cli: &Cli) -> io::Result<Self> {
        let log = std::fs::File::create(directory.join("pandod.log"))?;
        say(&format!(
            "\n$ pandod --pool {} --run-dir {} &\n",
            pool.display(),
            directory.display()
        ))?;
        let child = Command::new(programs().join("pandod"))
            .args(["--pool".as_ref(), pool.as_os_str()])
            .args(["--run-dir".as_ref(), directory.as_os_str()])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()?;
        let mut daemon = Self(Some(child));
        while !cli.output(&["pool", "status"]).status.success() {
            let child = daemon.0.as_mut().expect("just started");
            if let Some(status) = child.try_wait()? {
                let log = std::fs::read_to_string(directory.join("pandod.log"))?;
                daemon.0 = None;
                return Err(io::Error::other(format!("pandod ended with {status}:\n{log}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }

    fn stop(&mut self) -> io::Result<()> {
        let Some(mut child) = self.0.take() else { return Ok(()) };
        kill_process(Pid::from_child(&child), Signal::TERM)?;
        let status = child.wait()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(format!("pandod: {status}"))) }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("{error}");
        }
    }
}

fn remove_last_run(cli: &Cli) -> io::Result<()> {
    let volumes = cli.json(&["volume", "list", "--prefix", "demo"]);
    let names: Vec<&str> =
        volumes.as_array().into_iter().flatten().filter_map(|v| v["name"].as_str()).collect();
    if names.is_empty() {
        return Ok(());
    }
    step(cli, &[&["volume", "delete"], &names[..]].concat()).map(|_| ())
}

fn demonstrate(cli: &Cli) -> io::Result<()> {
    let (bytes, filled) = fill(cli)?;
    let cloned = step(cli, &["clone", "demo", "demo-clone"])?;
    say(&format!(
        "\n{CHANGES} blocks of 4 KiB at random are written to each of the two over NBD\n"
    ))?;
    change(cli, "demo", 1, bytes)?;
    change(cli, "demo-clone", 2, bytes)?;
    step(cli, &["volume", "list", "--prefix", "demo"])?;
    let clone = cli.json(&["volume", "show", "demo-clone", "--space"]);
    let source = cli.json(&["volume", "show", "demo"]);
    step(cli, &["pool", "check"])?;
    let mib = |bytes: u64| format!("{:.1} MiB", to_f64(bytes) / to_f64(MIB));
    let rate = to_f64(bytes / MIB) / filled.as_secs_f64();
    let shared = number(&clone, "/space/shared_bytes");
    say(&format!(
        "\nfill        {} of real data in {:.2} s, {rate:.0} MiB/s\n\
         clone       {:.1} ms, start of the program included: the same for any size\n\
         shared      {} of {} mapped by the clone\n\
         written     {} to the volume and {} to the clone since: all that the clone costs\n",
        mib(bytes),
        filled.as_secs_f64(),
        cloned.as_secs_f64() * 1e3,
        mib(shared),
        mib(number(&clone, "/mapped_bytes")),
        mib(number(&source, "/own_bytes")),
        mib(number(&clone, "/own_bytes")),
    ))
}

#[expect(clippy::cast_precision_loss, reason = "for people, rounded to a tenth")]
const fn to_f64(value: u64) -> f64 {
    value as f64
}

/// Fills the volume with a tar of real files, through a pipe.
fn fill(cli: &Cli) -> io::Result<(u64, Duration)> {
    let source = SOURCES.into_iter().find(|path| Path::new(path).is_dir()).unwrap_or(".");
    say(&format!("\n$ tar -cf - {source} | head -c 1G | pando volume import demo -\n"))?;
    let since = Instant::now();
    let mut tar = Command::new("tar")
        .args(["-cf", "-", source])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut import = cli
        .command(&["volume", "import", "demo", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::inherit())
        .spawn()?;
    let from = tar.stdout.take().expect("a pipe");
    let mut to = import.stdin.take().expect("a pipe");
    let bytes = io::copy(&mut from.take(DATA_BYTES_MAX), &mut to)?;
    drop(to);
    let imported = import.wait()?;
    // It may still want to write more than was taken.
    tar.kill()?;
    tar.wait()?;
    if !imported.success() {
        return Err(io::Error::other("the import failed"));
    }
    Ok((bytes, since.elapsed()))
}

/// Changes blocks at random and reads them back.
fn change(cli: &Cli, name: &str, seed: u64, bytes: u64) -> io::Result<()> {
    let mut nbd = Nbd::open(&cli.serve(name), name)?;
    let mut noise = Noise::new(seed);
    let since = Instant::now();
    let blocks = bytes / BLOCK;
    let mut written = std::collections::BTreeMap::new();
    for _ in 0..CHANGES {
        let (block, seed) = (noise.below(blocks), noise.next());
        nbd.write(block * BLOCK, &Noise::new(seed).bytes(4096));
        written.insert(block, seed);
    }
    nbd.flush();
    let took = since.elapsed();
    for (block, seed) in written {
        assert!(nbd.read(block * BLOCK, 4096) == Noise::new(seed).bytes(4096), "block {block}");
    }
    nbd.close();
    cli.run(&["volume", "serve", "--stop", name]);
    say(&format!(
        "{name}: {CHANGES} writes one after another and a flush in {:.0} ms, verified\n",
        took.as_secs_f64() * 1e3
    ))
}
