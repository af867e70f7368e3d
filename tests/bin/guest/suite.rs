//! The suites, and how their cases are run.
//!
//! A case that hangs would leave nothing but a machine that is ended by force from outside. So each
//! has its time, and when that is over a thread of its own tells who waits in the kernel, and for
//! what, and turns the machine off.

use std::fs;
use std::panic::catch_unwind;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use pando_tests::tools;

use crate::{auto, csi, kills, power, volumes};

/// A case: its name on the console, and what it does with devices of a kind. It panics when
/// something is wrong, and that is the end of the machine.
pub(crate) type Case = (&'static str, fn(&str));

/// Longest time for a case, much more than it takes on a busy host.
const CASE_TIME_MAX: Duration = Duration::from_secs(120);

/// Lines of the kernel's log that are shown.
const LINES_SHOWN: usize = 60;

/// A suite: its cases, the kind of devices that they are about, and the time for each case.
pub(crate) struct Suite {
    kind: &'static str,
    cases: Vec<Case>,
    time_max: Duration,
}

/// The suite of a name.
pub(crate) fn named(name: &str) -> Option<Suite> {
    let suite = |kind, cases| Some(Suite { kind, cases, time_max: CASE_TIME_MAX });
    let long = |kind| {
        let time_max = CASE_TIME_MAX + kills::time_max();
        Some(Suite { kind, cases: kills::CAMPAIGN.to_vec(), time_max })
    };
    let all = [volumes::CASES, kills::CASES, csi::CASES].concat();
    match name {
        "auto" => suite("auto", vec![("order", auto::order)]),
        "ublk" => suite("ublk", all),
        "nbd" => suite("nbd", all),
        "power-devices" => suite("", power::CASES.to_vec()),
        "ublk-kills" => long("ublk"),
        "nbd-kills" => long("nbd"),
        _ => None,
    }
}

/// Runs the cases in order; whether all were passed. `tests/vm.rs` looks for the lines that this
/// prints. A case that fails leaves the machine in disorder, but those that follow may tell more.
pub(crate) fn run(suite: &Suite) -> bool {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        usual(info);
        // What is cleaned up next may wait for the same.
        tell_who_waits();
    }));
    let mut all = true;
    for (name, case) in &suite.cases {
        eprintln!("CASE {name}");
        let since = Instant::now();
        let passed = {
            let _watch = Watch::begin(name, suite.time_max);
            catch_unwind(|| case(suite.kind)).is_ok()
        };
        eprintln!("{} {name}", if passed { "PASS" } else { "FAIL" });
        eprintln!("     in {:.1} s", since.elapsed().as_secs_f64());
        all &= passed;
    }
    all
}

/// Ends the machine unless it is dropped in time.
struct Watch(#[expect(dead_code, reason = "what counts is its end")] mpsc::Sender<()>);

impl Watch {
    fn begin(name: &'static str, time_max: Duration) -> Self {
        let (sender, ended) = mpsc::channel();
        thread::spawn(move || {
            if ended.recv_timeout(time_max) == Err(RecvTimeoutError::Timeout) {
                eprintln!("FAIL {name}: not at its end after {} s", time_max.as_secs());
                tell_who_waits();
                eprintln!("guest: exit 124");
                // The processes that hang would hold an orderly end up.
                fs::write("/proc/sysrq-trigger", "o").expect("the machine is turned off");
            }
        });
        Self(sender)
    }
}

/// Prints where threads are in the kernel: those that cannot be interrupted, and all of programs;
/// the requests that block devices have under way, and what the kernel says.
fn tell_who_waits() {
    let directories = |path: &str| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    for process in directories("/proc") {
        let program = fs::read(process.join("cmdline")).is_ok_and(|words| !words.is_empty());
        for task in directories(&format!("{}/task", process.display())) {
            let read = |file: &str| fs::read_to_string(task.join(file)).unwrap_or_default();
            // The name of a program can hold anything; what follows it is the state.
            let stat = read("stat");
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            if program || state == Some('D') {
                let state = state.unwrap_or('?');
                eprintln!("{} {state} {}{}", task.display(), read("comm"), read("stack"));
            }
        }
    }
    for device in directories("/sys/block") {
        let under_way = fs::read_to_string(device.join("inflight")).unwrap_or_default();
        if under_way.split_whitespace().any(|count| count != "0") {
            eprintln!("{}: under way {under_way}", device.display());
        }
    }
    let said = tools::run("dmesg", &[""; 0]);
    let lines: Vec<&str> = said.lines().collect();
    eprintln!("{}", lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n"));
}
