//! Runs a part of the campaign, and adds up what its processes say.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Map, Number, Value};

use crate::parts::{Part, Spread};

/// Where each fuzz target has a file of its name.
const FUZZ_TARGETS: &str = "fuzz/fuzz_targets";
/// What a power-off takes at most, the start of the machine included.
const POWER_OFF_SECONDS: f64 = 15.0;
/// Seeds of one process: more than it can use.
const SEEDS: u64 = 1 << 32;
/// How much longer than its share a process may take: what it builds, and its last case.
const PATIENCE: Duration = Duration::from_secs(1800);
const PAUSE: Duration = Duration::from_millis(100);

/// What the commands of the table are filled with.
pub(crate) struct Setting {
    pub(crate) seconds: f64,
    pub(crate) seed: u64,
    pub(crate) cores: usize,
    pub(crate) programs: PathBuf,
    pub(crate) old: Option<PathBuf>,
    pub(crate) out: PathBuf,
}

impl Setting {
    /// Seconds for a part.
    pub(crate) fn seconds_of(&self, part: &Part) -> u64 {
        whole(self.seconds * f64::from(part.share) / 100.0).max(1)
    }

    /// The commands of a part, each as its words.
    fn commands(&self, part: &Part) -> Vec<Vec<String>> {
        match part.spread {
            Spread::One => vec![self.words(part, (0, 1), "")],
            Spread::Cores => {
                (0..self.cores).map(|number| self.words(part, (number, self.cores), "")).collect()
            }
            Spread::Targets => {
                let targets = fuzz_targets();
                let command = |target: &String| self.words(part, (0, targets.len()), target);
                targets.iter().map(command).collect()
            }
        }
    }

    /// The words of the command of one process of some.
    fn words(&self, part: &Part, (process, of): (usize, usize), target: &str) -> Vec<String> {
        let number = |count: usize| u64::try_from(count).expect("few");
        let seconds = self.seconds_of(part);
        let first = self.seed + number(process) * SEEDS;
        let each = seconds * number(self.cores) / number(of).max(1);
        let power_offs = whole(self.seconds * f64::from(part.share) / 100.0 / POWER_OFF_SECONDS);
        let old = self.old.as_ref().map(|path| format!("--old {}", path.display()));
        let places = [
            ("{programs}", self.programs.display().to_string()),
            ("{seconds}", seconds.to_string()),
            ("{seconds_each}", each.max(1).to_string()),
            ("{power_offs}", power_offs.max(1).to_string()),
            ("{part}", process.to_string()),
            ("{number}", (process + 1).to_string()),
            ("{parts}", of.to_string()),
            ("{order}", self.seed.to_string()),
            ("{seed}", first.to_string()),
            ("{seeds}", format!("{first}..{}", first + SEEDS)),
            ("{old}", old.unwrap_or_default()),
            ("{target}", target.to_owned()),
        ];
        let mut command = part.command.to_owned();
        for (place, text) in places {
            command = command.replace(place, &text);
        }
        command.split_whitespace().map(str::to_owned).collect()
    }
}

/// The names of all fuzz targets.
fn fuzz_targets() -> Vec<String> {
    let entries = fs::read_dir(FUZZ_TARGETS).into_iter().flatten();
    let stem = |entry: io::Result<fs::DirEntry>| {
        Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned())
    };
    let mut targets: Vec<String> = entries.filter_map(stem).collect();
    targets.sort();
    targets
}

/// A number of seconds or rounds, rounded down.
fn whole(number: f64) -> u64 {
    Duration::try_from_secs_f64(number).map_or(0, |time| time.as_secs())
}

/// What a part has come to.
pub(crate) struct Outcome {
    pub(crate) name: &'static str,
    pub(crate) commands: Vec<String>,
    pub(crate) seconds: f64,
    /// The closing lines of all processes, added up.
    pub(crate) result: Value,
    pub(crate) errors: Vec<String>,
}

/// One process of a part, and how it has ended.
struct Process {
    command: String,
    out: PathBuf,
    child: io::Result<Child>,
    ended: Option<Result<(), String>>,
}

impl Process {
    /// Whether it has ended.
    fn ended(&mut self, until: Instant) -> bool {
        if self.ended.is_some() {
            return true;
        }
        self.ended = match &mut self.child {
            Err(error) => Some(Err(error.to_string())),
            Ok(child) => match child.try_wait() {
                Ok(Some(status)) if status.success() => Some(Ok(())),
                Ok(Some(status)) => Some(Err(format!("{status}, see {}", self.out.display()))),
                Ok(None) if Instant::now() < until => None,
                Ok(None) => Some(Err(child.kill().map_or_else(
                    |error| format!("did not end, and cannot be ended: {error}"),
                    |()| "did not end".to_owned(),
                ))),
                Err(error) => Some(Err(error.to_string())),
            },
        };
        self.ended.is_some()
    }
}

/// Runs a part to its end, as many processes at a time as there are cores.
pub(crate) fn run(part: &Part, setting: &Setting) -> io::Result<Outcome> {
    let since = Instant::now();
    let until = since + Duration::from_secs(setting.seconds_of(part)) + PATIENCE;
    let mut commands = setting.commands(part).into_iter().enumerate();
    let mut all: Vec<Process> = Vec::new();
    loop {
        let under_way: usize = all.iter_mut().map(|one| usize::from(!one.ended(until))).sum();
        for (number, words) in commands.by_ref().take(setting.cores - under_way) {
            all.push(start(part, setting, number, &words)?);
        }
        if all.iter().all(|one| one.ended.is_some()) {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    let commands = all.iter().map(|process| process.command.clone()).collect();
    let (mut result, mut errors) = (Value::Null, Vec::new());
    if all.is_empty() {
        errors.push("there is nothing to run".to_owned());
    }
    for Process { command, out, ended, .. } in all {
        let lines = closing_lines(&out)?;
        match ended {
            Some(Err(why)) => errors.push(format!("{command}: {why}")),
            _ if lines.is_empty() => errors.push(format!("{command}: said nothing")),
            _ => {}
        }
        for line in lines {
            add(&mut result, by_target(line));
        }
    }
    // A program can fail and end well.
    for key in ["failures", "survived"] {
        let said = result.get(key).and_then(Value::as_array);
        errors.extend(said.into_iter().flatten().map(|why| format!("{key}: {why}")));
    }
    let seconds = since.elapsed().as_secs_f64();
    Ok(Outcome { name: part.name, commands, seconds, result, errors })
}

fn start(part: &Part, setting: &Setting, number: usize, words: &[String]) -> io::Result<Process> {
    let plain = |c: char| if c.is_alphanumeric() { c } else { '-' };
    let stem: String = part.name.chars().map(plain).collect();
    let out = setting.out.join(format!("{stem}.{number}.out"));
    let errors = File::create(setting.out.join(format!("{stem}.{number}.err")))?;
    let child = Command::new(&words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(File::create(&out)?)
        .stderr(errors)
        .spawn();
    Ok(Process { command: words.join(" "), out, child, ended: None })
}

/// The lines that are JSON objects.
fn closing_lines(path: &Path) -> io::Result<Vec<Value>> {
    let text = String::from_utf8_lossy(&fs::read(path)?).into_owned();
    let object = |line: &str| serde_json::from_str(line).ok().filter(Value::is_object);
    Ok(text.lines().filter(|line| line.starts_with('{')).filter_map(object).collect())
}

/// What belongs to a target stays apart from the others; everything else is added up.
fn by_target(line: Value) -> Value {
    match line.get("target").and_then(Value::as_str).map(str::to_owned) {
        Some(target) => Value::Object(Map::from_iter([(target, line)])),
        None => line,
    }
}

/// Adds a result to others: numbers are added, of maxima the larger one stays, lists of numbers are
/// added place by place, other lists follow each other.
fn add(sum: &mut Value, more: Value) {
    if sum.is_null() {
        *sum = more;
        return;
    }
    match (sum, more) {
        (Value::Object(sum), Value::Object(more)) => {
            for (key, value) in more {
                match sum.get_mut(&key) {
                    Some(old) if key.ends_with("_max") => {
                        if value.as_f64() > old.as_f64() {
                            *old = value;
                        }
                    }
                    Some(old) => add(old, value),
                    None => {
                        sum.insert(key, value);
                    }
                }
            }
        }
        (Value::Array(sum), Value::Array(more)) => {
            let numbers = sum.iter().chain(&more).all(Value::is_number);
            let common = if numbers { sum.len().min(more.len()) } else { 0 };
            let mut more = more.into_iter();
            for (old, value) in sum.iter_mut().zip(more.by_ref().take(common)) {
                add(old, value);
            }
            sum.extend(more);
        }
        (Value::Number(sum), Value::Number(more)) => {
            let whole = sum.as_u64().zip(more.as_u64()).map(|(sum, more)| Number::from(sum + more));
            let parts = sum.as_f64().zip(more.as_f64());
            let parts = parts.and_then(|(sum, more)| Number::from_f64(sum + more));
            if let Some(added) = whole.or(parts) {
                *sum = added;
            }
        }
        // A word is the same for all processes, or the first one stands.
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn results_are_added_up() {
        let mut sum = Value::Null;
        add(&mut sum, json!({"n": 1, "by": [1, 2], "ms_max": 7, "f": [], "in": {"a": 1}}));
        add(&mut sum, json!({"n": 2, "by": [5, 5, 5], "ms_max": 3, "f": ["x"], "in": {"b": 2}}));
        add(&mut sum, json!({"n": 0.5, "f": ["y"], "in": {"a": 4}}));
        let expected = json!({
            "n": 3.5, "by": [6, 7, 5], "ms_max": 7, "f": ["x", "y"], "in": {"a": 5, "b": 2}
        });
        assert_eq!(sum, expected);
    }

    #[test]
    fn a_program_that_is_missing_or_fails_is_an_error() {
        let directory = tempfile::tempdir().expect("a directory");
        let setting = Setting {
            seconds: 60.0,
            seed: 5,
            cores: 2,
            programs: directory.path().to_owned(),
            old: None,
            out: directory.path().to_owned(),
        };
        let outcome = |command| {
            let part = Part { name: "a part", share: 10, spread: Spread::Cores, command };
            run(&part, &setting).expect("it is written down")
        };
        let missing = outcome("{programs}/nothing");
        assert_eq!(missing.errors.len(), 2, "{:?}", missing.errors);
        assert_eq!(outcome("false").errors.len(), 2);
        assert_eq!(outcome("true").errors.len(), 2, "they said nothing");
        let good = outcome("printf {\"n\":%s,\"seconds\":{seconds}}\\n {part}");
        assert!(good.errors.is_empty(), "{:?}", good.errors);
        assert_eq!(good.result, json!({"n": 1, "seconds": 12}));
        let found = outcome("echo {\"failures\":[\"seed-7\"]}");
        assert_eq!(found.errors, ["failures: \"seed-7\"", "failures: \"seed-7\""]);
    }
}
