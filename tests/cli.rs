//! The command line against a real daemon: what a person types on the first day, and the JSON that
//! programs depend on.

use pando_tests::cli::number;
use pando_tests::noise::Noise;
use pando_tests::tools::text;
use pando_tests::{Nbd, System};
use serde_json::{Value, json};

fn names(list: &Value) -> Vec<&str> {
    let list = list.as_array().expect("a list");
    list.iter().map(|volume| volume["name"].as_str().expect("a name")).collect()
}

#[test]
fn the_life_of_volumes() {
    let mut system = System::start("128MiB");
    let cli = system.cli();
    let made = cli.json(&["volume", "create", "db", "--size", "16MiB", "--label", "team=a"]);
    let made = &made[0];
    assert_eq!((&made["name"], &made["kind"]), (&json!("db"), &json!("volume")));
    assert_eq!(number(made, "/size_bytes"), 16 << 20);
    assert_eq!(made["labels"], json!({ "team": "a" }));
    assert_eq!(made["source_id"], Value::Null);

    cli.run(&["clone", "db", "db-clone", "--size", "32MiB"]);
    cli.run(&["snapshot", "db", "db-monday", "--label", "day=monday"]);
    let list = cli.json(&["volume", "list"]);
    assert_eq!(names(&list), ["db", "db-clone", "db-monday"]);
    assert_eq!(names(&cli.json(&["volume", "list", "--snapshots"])), ["db-monday"]);
    assert_eq!(names(&cli.json(&["volume", "list", "--volumes"])), ["db", "db-clone"]);
    assert_eq!(names(&cli.json(&["volume", "list", "--label", "day=monday"])), ["db-monday"]);
    assert_eq!(names(&cli.json(&["volume", "list", "--prefix", "db-c"])), ["db-clone"]);
    let children = cli.json(&["volume", "list", "--source", "db"]);
    assert_eq!(names(&children), ["db-clone", "db-monday"]);
    assert_eq!((&list[1]["kind"], &list[2]["kind"]), (&json!("clone"), &json!("snapshot")));
    assert_eq!(list[1]["source_name"], "db");
    assert_eq!(number(&list[1], "/size_bytes"), 32 << 20);

    cli.run(&["volume", "grow", "db", "20MiB"]);
    cli.run(&["volume", "set", "db", "--read-only", "true", "--label", "team=", "--label", "x=1"]);
    let shown = cli.json(&["volume", "show", "db"]);
    assert_eq!(number(&shown, "/size_bytes"), 20 << 20);
    assert_eq!((&shown["read_only"], &shown["labels"]), (&json!(true), &json!({ "x": "1" })));

    // A change that was answered survives the daemon.
    system.crash();
    assert_eq!(cli.json(&["volume", "show", "db"]), shown);
    cli.run(&["volume", "delete", "db", "db-monday"]);
    let left = cli.json(&["volume", "list"]);
    assert_eq!(names(&left), ["db-clone"]);
    assert_eq!(left[0]["source_name"], "db", "a source may go before its clone");
    assert_eq!(left[0]["source_deleted"], true);
    assert_eq!(left[0]["labels"], json!({}), "the name is kept out of sight");
    assert!(cli.run(&["volume", "list"]).contains(" db (deleted) "));
    // Another volume of that name is not the source.
    cli.run(&["volume", "create", "db", "--size", "1MiB"]);
    assert_eq!(cli.json(&["volume", "show", "db-clone"])["source_deleted"], true);
    assert_eq!(names(&cli.json(&["volume", "list", "--source", "db"])), [""; 0]);
    system.stop();
    let offline = cli.json(&["pool", "check", "--offline", text(system.pool())]);
    assert_eq!(offline["findings"], json!([]));
    assert!(cli.error(&["volume", "list"]).contains("pandod is not running"));
}

#[test]
fn several_at_one_instant_or_none() {
    let system = System::start("128MiB");
    let cli = system.cli();
    for name in ["data", "log"] {
        cli.run(&["volume", "create", name, "--size", "4MiB"]);
    }
    cli.run(&["snapshot", "data", "data-1", "--with", "log=log-1"]);
    assert_eq!(names(&cli.json(&["volume", "list", "--snapshots"])), ["data-1", "log-1"]);
    let error = cli.refused(&["clone", "data", "data-2", "--with", "missing=log-2"]);
    assert_eq!(error["kind"], "not_found");
    let error = cli.refused(&["clone", "data", "data-2", "--with", "log=log-1"]);
    assert_eq!(error["kind"], "exists");
    assert_eq!(cli.json(&["volume", "list"]).as_array().map(Vec::len), Some(4), "all or none");
}

#[test]
fn what_changed_since_a_snapshot() {
    let system = System::start("128MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "16MiB"]);
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    nbd.write(0, &Noise::new(1).bytes(1 << 20));
    assert_eq!(
        cli.json(&["volume", "extents", "db"]),
        json!([{ "offset": 0, "length": 1 << 20, "mapped": true }])
    );
    cli.run(&["snapshot", "db", "before"]);
    nbd.write(64 << 10, &Noise::new(2).bytes(8192));
    nbd.simple(pando_tests::nbd::command::TRIM, (128 << 10, 4096));
    nbd.write(8 << 20, &Noise::new(3).bytes(4096));
    assert_eq!(
        cli.json(&["volume", "diff", "before", "db"]),
        json!([
            { "offset": 64 << 10, "length": 8192, "mapped": true },
            { "offset": 128 << 10, "length": 4096, "mapped": false },
            { "offset": 8 << 20, "length": 4096, "mapped": true },
        ])
    );
    assert_eq!(cli.json(&["volume", "diff", "before", "before"]), json!([]));
    let space = cli.json(&["volume", "show", "before", "--space"]);
    assert_eq!(number(&space, "/space/mapped_bytes"), 1 << 20);
    assert_eq!(number(&space, "/space/exclusive_bytes"), 8192 + 4096);
}

#[test]
fn copies_in_and_out() {
    let system = System::start("128MiB");
    let cli = system.cli();
    let file = system.path().join("in");
    let mut bytes = Noise::new(5).bytes(5 << 20);
    bytes[1 << 20..3 << 20].fill(0);
    std::fs::write(&file, &bytes).expect("a file");
    cli.run(&["volume", "import", "db", text(&file)]);
    let shown = cli.json(&["volume", "show", "db"]);
    assert_eq!(number(&shown, "/size_bytes"), 5 << 20);
    assert_eq!(number(&shown, "/mapped_bytes"), 3 << 20, "zeros are holes");
    let out = system.path().join("out");
    cli.run(&["volume", "export", "db", text(&out)]);
    assert!(std::fs::read(&out).expect("a file") == bytes, "what came in goes out");
    assert!(cli.error(&["volume", "export", "db", text(&out)]).contains("exists"));

    // Through pipes as well.
    let source = std::fs::File::open(&file).expect("a file");
    let import = cli.command(&["volume", "import", "piped", "-"]).stdin(source).output();
    assert!(import.expect("pando starts").status.success());
    let piped = cli.output(&["volume", "export", "piped", "-"]);
    assert!(piped.status.success() && piped.stdout == bytes);
    assert_eq!(names(&cli.json(&["volume", "list"])), ["db", "piped"], "nothing is left behind");
}

#[test]
fn the_pool_tells_how_it_is() {
    let mut system = System::start("128MiB");
    let cli = system.cli();
    let status = cli.json(&["pool", "status"]);
    assert_eq!(number(&status, "/size_bytes"), 128 << 20);
    assert_eq!(status["poisoned"], Value::Null);
    cli.run(&["volume", "create", "db", "--size", "1GiB"]);
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    nbd.write(0, &Noise::new(1).bytes(4 << 20));
    nbd.flush();
    let now = cli.json(&["pool", "status"]);
    assert_eq!(number(&now, "/volumes"), 1);
    assert_eq!(number(&now, "/provisioned_bytes"), 1 << 30);
    assert!(number(&now, "/free_bytes") + (4 << 20) <= number(&status, "/free_bytes"));
    assert_eq!(number(&now, "/counters/written_bytes"), 4 << 20);
    assert!(number(&now, "/counters/flushes") >= 1);

    // More room while it runs.
    let file = std::fs::File::options().write(true).open(system.pool()).expect("a pool");
    file.set_len(256 << 20).expect("a length");
    let grown = cli.json(&["pool", "grow"]);
    assert_eq!(number(&grown, "/size_bytes"), 256 << 20);
    system.crash();
    let again = cli.json(&["pool", "status"]);
    assert_eq!(number(&again, "/size_bytes"), 256 << 20);
    assert!(number(&again, "/free_bytes") > number(&now, "/free_bytes") + (100 << 20));

    let scrub = cli.json(&["pool", "scrub", "--rate", "4GiB"]);
    assert!(number(&scrub, "/blocks") >= 1024, "{scrub}");
    let dump = cli.run(&["pool", "dump"]);
    assert!(dump.contains("db"), "{dump}");
    system.check();
}

#[test]
fn help_and_completions_need_no_daemon() {
    let system = System::empty();
    let cli = system.cli();
    let help = cli.run(&["--help"]);
    assert!(help.contains("Thin volumes"), "{help}");
    for shell in ["bash", "zsh", "fish"] {
        assert!(cli.run(&["completions", shell]).contains("pando"));
    }
    assert!(cli.run(&["--version"]).starts_with("pando "));
}
