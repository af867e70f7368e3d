//! The command as it is typed: exit codes, what goes to stdout, what goes to stderr.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::{Command, Output};

fn pando(dir: &Path, line: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pando"))
        .args(line)
        .current_dir(dir)
        .env("PANDO_SOCKET", dir.join("none.sock"))
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn exit_codes() {
    let dir = tempfile::tempdir().unwrap();
    let code = |line: &[&str]| pando(dir.path(), line).status.code();
    assert_eq!(code(&["--version"]), Some(0));
    assert_eq!(code(&["volume", "list"]), Some(1), "no daemon");
    assert_eq!(code(&["volume", "create", "db"]), Some(2), "no size");
    assert_eq!(code(&["volume", "create", "db", "--size", "much"]), Some(2));
}

#[test]
fn failures_say_what_to_do_next() {
    let dir = tempfile::tempdir().unwrap();
    let failed = pando(dir.path(), &["clone", "db", "db-test"]);
    assert!(failed.stdout.is_empty());
    let told = text(&failed.stderr);
    assert!(told.starts_with("error: pandod is not running on "), "{told}");
    assert!(told.contains("\nhint: start it with "), "{told}");
    let failed = pando(dir.path(), &["volume", "list", "--output", "json"]);
    let told: serde_json::Value = serde_json::from_slice(&failed.stderr).unwrap();
    assert!(told["hint"].as_str().unwrap().contains("`pandod --pool POOL --socket "), "{told}");
}

#[test]
fn pools_are_made_and_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let create = |more: &[&str]| {
        let line = [&["pool", "create", "p", "--allocate", "sparse", "--journal", "4MiB"], more];
        pando(dir.path(), &line.concat())
    };
    let failed = create(&[]);
    assert!(text(&failed.stderr).contains("\nhint: pando pool create p --size 10GiB"));
    assert!(!dir.path().join("p").exists());

    let made = create(&["--size", "64MiB", "-o", "json"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let told: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!((&told["path"], &told["size_bytes"]), (&"p".into(), &(64 << 20).into()));

    let refused = create(&[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("--force"), "{}", text(&refused.stderr));
    let forced = create(&["--force"]);
    assert_eq!(text(&forced.stdout), "pool p is ready; serve it with `pandod --pool p`\n");

    let too_large = create(&["--force", "--size", "1GiB"]);
    assert!(text(&too_large.stderr).contains("less than --size"));
    let broken = pando(dir.path(), &["pool", "create", "q", "--size", "8KiB"]);
    assert_eq!(broken.status.code(), Some(1));
    assert!(!dir.path().join("q").exists(), "what is no pool does not stay");
}

#[test]
fn completions_for_every_shell() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let made = pando(dir.path(), &["completions", shell]);
        assert!(made.status.success());
        assert!(text(&made.stdout).contains("snapshot"), "{shell}");
    }
}
