//! The tests that run inside the virtual machine: `pando-guest SUITE`, started by the machine's
//! init with everything in its initial file system. See `tests/vm.rs`, which starts the machine and
//! counts the lines `PASS <case>`.

mod suite;

use std::process::ExitCode;

fn main() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    let Some(cases) = suite::cases(&name) else {
        eprintln!("pando-guest: no suite {name:?}");
        return ExitCode::FAILURE;
    };
    suite::run(&cases);
    ExitCode::SUCCESS
}
