//! The command line, as a program uses it: JSON out, errors as JSON too.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// `pando` with the socket of one daemon.
#[derive(Clone, Debug)]
pub struct Cli {
    program: PathBuf,
    socket: PathBuf,
}

impl Cli {
    /// The program in `programs`, for the daemon at `socket`.
    #[must_use]
    pub fn new(programs: &Path, socket: &Path) -> Self {
        Self { program: programs.join("pando"), socket: socket.to_owned() }
    }

    /// The command to be run, without input.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--socket").arg(&self.socket).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// The program cannot be started.
    #[must_use]
    pub fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap_or_else(|error| {
            panic!("{}: {error}; `make test` builds it", self.program.display())
        })
    }

    /// Runs a command that must succeed; what it printed.
    ///
    /// # Panics
    /// It fails.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(
            output.status.success(),
            "pando {}: {}\n{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("pando prints text")
    }

    /// Runs a command that must succeed; its answer.
    ///
    /// # Panics
    /// It fails, or the answer is no JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.run(&[&["--output", "json"], arguments].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Runs a command that must be refused; its error: `error`, `hint`, `kind`, `errno`.
    ///
    /// # Panics
    /// It succeeds, or ends otherwise than with exit code 1 and JSON on stderr.
    pub fn refused(&self, arguments: &[&str]) -> Value {
        let output = self.output(&[&["--output", "json"], arguments].concat());
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "pando {}: {text}", arguments.join(" "));
        let last = text.lines().last().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Runs a command that must be refused; the message alone.
    ///
    /// # Panics
    /// As [`Self::refused`].
    pub fn error(&self, arguments: &[&str]) -> String {
        self.refused(arguments)["error"].as_str().expect("an error has a message").to_owned()
    }

    /// Offers a volume over NBD; its socket.
    ///
    /// # Panics
    /// It is refused.
    pub fn serve(&self, name: &str) -> PathBuf {
        let export = self.json(&["volume", "serve", name]);
        PathBuf::from(export["path"].as_str().expect("an export has a path"))
    }

    /// Offers a volume over NBD; its address, as other programs take it.
    ///
    /// # Panics
    /// It is refused.
    pub fn serve_uri(&self, name: &str) -> String {
        let export = self.json(&["volume", "serve", name]);
        export["uri"].as_str().expect("an export has an address").to_owned()
    }
}

/// The number at `pointer` (`/pool/size_bytes`) of an answer.
///
/// # Panics
/// There is none.
#[must_use]
pub fn number(answer: &Value, pointer: &str) -> u64 {
    let found = answer.pointer(pointer).and_then(Value::as_u64);
    found.unwrap_or_else(|| panic!("no number {pointer} in {answer}"))
}
