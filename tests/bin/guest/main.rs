//! The tests that run inside the virtual machine: `pando-guest SUITE [KILLS SEED]`, started by its
//! init with everything in its initial file system. See `tests/vm.rs`, which starts the machine and
//! counts the lines `PASS <case>`.
//!
//! ```text
//! auto     which kind of device is taken
//! csi      the CSI adapter
//! volumes  what every kind must do: file systems, discard, growth, users, identity, restart
//! kills    SIGKILL of the daemon under load
//! load     changes on a file system, in a process of their own
//! power    the power of the machine goes; what lies below a pool fails
//! machine  a daemon in the machine, its devices, its kernel's log
//! ```

mod auto;
mod csi;
mod kills;
mod load;
mod machine;
mod power;
mod suite;
mod volumes;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        [load::WORD, root, seed] => load::main(Path::new(root), seed.parse().expect("a number")),
        ["power" | "power-open", ..] => power::until_the_power_goes(&words),
        _ => run(words.first().unwrap_or(&"")),
    }
}

fn run(name: &str) -> ExitCode {
    let Some(suite) = suite::named(name) else {
        eprintln!("pando-guest: no suite {name:?}");
        return ExitCode::FAILURE;
    };
    if suite::run(&suite) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
