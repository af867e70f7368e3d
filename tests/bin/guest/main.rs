//! The tests that run inside the virtual machine: `pando-guest SUITE`, started by the machine's
//! init with everything in its initial file system. See `tests/vm.rs`, which starts the machine and
//! counts the lines `PASS <case>`.
//!
//! ```text
//! auto     which kind of device is taken
//! volumes  what every kind must do: file systems, discard, growth, users, identity, restart
//! kills    SIGKILL of the daemon under load
//! machine  a daemon in the machine, its devices, its kernel's log
//! ```

mod auto;
mod kills;
mod machine;
mod suite;
mod volumes;

use std::process::ExitCode;

fn main() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    let Some((kind, cases)) = suite::cases(&name) else {
        eprintln!("pando-guest: no suite {name:?}");
        return ExitCode::FAILURE;
    };
    if suite::run(kind, &cases) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
