//! The command line against a real daemon: what a person types on the first day, and the JSON that
//! programs depend on.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pando_tests::cli::number;
use pando_tests::noise::Noise;
use pando_tests::system::programs;
use pando_tests::tools::{output, present, text};
use pando_tests::{Cli, Nbd, System};
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
    let online = cli.json(&["pool", "dump"]);
    system.stop();
    for dump in [online, cli.json(&["pool", "dump", "--offline", text(system.pool())])] {
        let of = |what: &str| {
            let mut items = dump.as_array().expect("a list").iter();
            items.find(|item| item["what"] == what).unwrap_or_else(|| panic!("no {what}: {dump}"))
        };
        assert_eq!(of("superblock")["superblock"]["uuid"], now["uuid"]);
        assert_eq!(of("volume")["volume"]["name"], "db");
        assert_eq!(number(of("volume"), "/volume/size_bytes"), 1 << 30);
        assert!(number(of("extent"), "/extent/len") > 0);
    }
}

#[test]
fn each_of_several_is_tried() {
    let system = System::start("128MiB");
    let cli = system.cli();
    for name in ["a", "b", "c", "d"] {
        cli.run(&["volume", "create", name, "--size", "1MiB"]);
    }
    cli.serve("c");
    let tried = cli.output(&["-o", "json", "volume", "delete", "a", "nosuch", "b", "c"]);
    assert_eq!(tried.status.code(), Some(1));
    let deleted: Value = serde_json::from_slice(&tried.stdout).expect("what was deleted");
    assert_eq!(names(&deleted), ["a", "b"]);
    let told = String::from_utf8_lossy(&tried.stderr).into_owned();
    let told: Vec<Value> =
        told.lines().map(|line| serde_json::from_str(line).expect("an error")).collect();
    assert_eq!((&told[0]["kind"], &told[1]["kind"]), (&json!("not_found"), &json!("busy")));
    assert!(told[0]["error"].to_string().contains("nosuch") && told.len() == 2, "{told:?}");
    assert_eq!(names(&cli.json(&["volume", "list"])), ["c", "d"]);
    // What is not there is not removed either.
    assert_eq!(cli.refused(&["volume", "serve", "--stop", "d"])["kind"], "not_found");
    let detach = cli.output(&["volume", "detach", "c", "d"]);
    assert_eq!(detach.status.code(), Some(1));
    let told = String::from_utf8_lossy(&detach.stderr).into_owned();
    let expected = ["c", "d"].map(|name| {
        format!(
            "error: volume {name} is not attached\n\
             hint: `pando volume attachments` lists what is attached\n"
        )
    });
    assert_eq!(told, expected.concat());
}

#[test]
fn every_command_answers_a_program() {
    let system = System::start("128MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "1MiB"]);
    let uri = cli.serve_uri("db");
    assert_eq!(cli.json(&["volume", "serve", "--stop", "db"])["uri"], uri.as_str());
    let out = system.path().join("out");
    let copied = cli.json(&["volume", "export", "db", text(&out)]);
    assert_eq!((&copied["volume_name"], &copied["path"]), (&json!("db"), &json!(text(&out))));
    assert_eq!(number(&copied, "/size_bytes"), 1 << 20);
    // Where the content goes, nothing else does.
    let piped = cli.output(&["-o", "json", "volume", "export", "db", "-"]);
    assert!(piped.status.success() && piped.stdout == vec![0; 1 << 20]);
    assert_eq!(names(&cli.json(&["volume", "delete", "db"])), ["db"]);
}

#[test]
fn numbers_in_names_count() {
    let system = System::start("128MiB");
    let cli = system.cli();
    for name in ["c-1", "c-10", "c-2", "c-100"] {
        cli.run(&["volume", "create", name, "--size", "1MiB"]);
        cli.serve(name);
    }
    let sorted = ["c-1", "c-2", "c-10", "c-100"];
    assert_eq!(names(&cli.json(&["volume", "list"])), sorted);
    let exports = cli.json(&["volume", "serve"]);
    let exported = exports.as_array().expect("a list").iter();
    assert!(exported.map(|export| &export["volume_name"]).eq(sorted.iter()), "{exports}");
}

/// The advice of a command that is refused with these words.
fn hint(cli: &Cli, arguments: &[&str], words: &str) -> Value {
    let refused = cli.refused(arguments);
    let told = refused["error"].as_str().expect("a message");
    assert!(told.contains(words), "{arguments:?}: {told}");
    refused["hint"].clone()
}

#[test]
fn hints_help_with_what_has_failed() {
    let mut system = System::start("64MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "8MiB"]);
    cli.run(&["snapshot", "db", "snap"]);
    cli.serve("db");
    let none = Value::Null;
    let thaw = ["volume", "set", "snap", "--read-only", "false"];
    assert_eq!(hint(&cli, &thaw, "clone it"), none);
    let reserve = ["volume", "set", "db", "--reservation", "1TiB"];
    assert_eq!(hint(&cli, &reserve, "its reservation needs"), none);
    assert_eq!(hint(&cli, &["volume", "show", "x"], "`pando volume list` shows all"), none);
    let again = hint(&cli, &["volume", "create", "db", "--size", "8MiB"], "the name is taken");
    assert_eq!(again, "choose another name, or `pando volume delete db` first");
    let delete = hint(&cli, &["volume", "delete", "db"], "it is exported");
    assert_eq!(delete, "`pando volume serve --stop db`");

    let pool = text(system.pool()).to_owned();
    let create = ["pool", "create", &pool, "--size", "64MiB", "--force"];
    assert_eq!(hint(&cli, &create, "in use by another process"), none);
    let check = hint(&cli, &["pool", "check", "--offline", &pool], "in use by another process");
    assert!(check.as_str().is_some_and(|hint| hint.contains("leave out --offline")), "{check}");
    system.stop();
    let foreign = system.path().join("foreign");
    std::fs::write(&foreign, Noise::new(1).bytes(1 << 20)).expect("a file");
    let foreign = text(&foreign);
    assert_eq!(hint(&cli, &["pool", "check", "--offline", foreign], "not a Pando pool"), none);
    let create = ["pool", "create", foreign, "--size", "1MiB"];
    assert_eq!(hint(&cli, &create, "use --force to lose that"), none);
    // Sizes are named as people write them, with their bounds.
    let new = system.path().join("new");
    for (size, bound) in [("8k", "at least 328 KiB"), ("65TiB", "the largest has 64 TiB")] {
        assert_eq!(hint(&cli, &["pool", "create", text(&new), "--size", size], bound), none);
        assert!(!new.exists());
    }
}

/// What is in a directory.
fn entries(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    entries.map(|e| e.expect("an entry").file_name().into_string().expect("a name")).collect()
}

#[test]
fn an_export_that_fails_leaves_nothing() {
    let mut system = System::start("64MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "8MiB"]);
    let content = Noise::new(7).bytes(2 << 20);
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    nbd.write(0, &content);
    drop(nbd);
    // Damage to one block makes the copy fail after the first pieces.
    system.stop();
    let mut pool = std::fs::read(system.pool()).expect("a pool");
    let damaged = &content[(1 << 20) + 4096..][..4096];
    let at = pool.chunks(4096).position(|block| block == damaged).expect("its block") * 4096;
    pool[at] ^= 1;
    std::fs::write(system.pool(), pool).expect("a pool");
    system.spawn();
    let directory = system.path().join("copies");
    std::fs::create_dir(&directory).expect("a directory");
    let out = directory.join("db.raw");
    let refused = cli.refused(&["volume", "export", "db", text(&out)]);
    assert_eq!(refused["kind"], "checksum", "{refused}");
    assert!(refused["hint"].to_string().contains("`pando pool scrub`"), "{refused}");
    assert_eq!(entries(&directory), [""; 0]);
    // Nor does it take what is there, if it was to be replaced.
    let old = directory.join("old.raw");
    std::fs::write(&old, "precious").expect("a file");
    cli.refused(&["volume", "export", "db", text(&old), "--force"]);
    assert_eq!(std::fs::read(&old).expect("a file"), b"precious");
    std::fs::remove_file(&old).expect("our file");
    assert_eq!(names(&cli.json(&["volume", "list"])), ["db"]);
    // A block that is written again is sound, and the next try finds nothing in its way.
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    nbd.write(0, &content);
    drop(nbd);
    cli.run(&["volume", "export", "db", text(&out)]);
    assert!(std::fs::read(&out).expect("a copy")[..2 << 20] == content);
    assert_eq!(entries(&directory), ["db.raw"]);
}

/// Waits until the volumes are these and no others.
fn wait_for(cli: &Cli, what: &str, good: impl Fn(&[&str]) -> bool) {
    let since = Instant::now();
    loop {
        let list = cli.json(&["volume", "list"]);
        if good(&names(&list)) {
            return;
        }
        assert!(since.elapsed() < Duration::from_secs(20), "{what}: {list}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn end(mut child: Child) {
    child.kill().expect("a child can be killed");
    child.wait().expect("a child ends");
}

#[test]
fn a_copy_that_is_killed_leaves_no_volume() {
    let mut system = System::start("256MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "48MiB"]);
    let mut nbd = Nbd::open(&cli.serve("db"), "db").expect("an export");
    for piece in 0..48 {
        nbd.write(piece << 20, &Noise::new(piece).bytes(1 << 20));
    }
    drop(nbd);
    cli.run(&["volume", "serve", "--stop", "db"]);
    // Exports that stop in the middle, because nothing reads the pipe.
    let export = || {
        let mut command = cli.command(&["volume", "export", "db", "-"]);
        let child = command.stdout(Stdio::piped()).spawn().expect("pando starts");
        wait_for(&cli, "a snapshot", |names| names.len() == 2);
        child
    };
    // Imports that wait for more.
    let import = || {
        let mut command = cli.command(&["volume", "import", "half", "-"]);
        let mut child = command.stdin(Stdio::piped()).spawn().expect("pando starts");
        let input = child.stdin.as_mut().expect("a pipe");
        input.write_all(&Noise::new(1).bytes(4 << 20)).expect("pando reads");
        wait_for(&cli, "a volume", |names| names == ["db", "half"]);
        child
    };
    let only_db = |names: &[&str]| names == ["db"];
    let copy = export();
    let list = cli.json(&["volume", "list", "--snapshots"]);
    assert_eq!(list[0]["labels"], json!({ "pando/temporary": "export" }));
    assert_eq!(cli.refused(&["volume", "delete", names(&list)[0]])["kind"], "busy");
    end(copy);
    wait_for(&cli, "the client of an export is killed", only_db);
    end(import());
    wait_for(&cli, "the client of an import is killed", only_db);

    let copy = export();
    system.kill();
    end(copy);
    system.spawn();
    assert_eq!(names(&cli.json(&["volume", "list"])), ["db"], "the daemon of an export is killed");
    let copy = import();
    system.kill();
    end(copy);
    system.spawn();
    assert_eq!(names(&cli.json(&["volume", "list"])), ["db"], "the daemon of an import is killed");
    system.check();
}

#[test]
fn a_terminal_gets_no_content() {
    if !present(&["script"]) {
        return;
    }
    let system = System::start("64MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "1MiB", "--label", "x=1"]);
    let in_terminal = |columns: u16, line: &str| {
        let pando = cli.command(&[]);
        let socket = pando.get_args().nth(1).expect("a socket").to_str().expect("text");
        let program = pando.get_program().to_str().expect("text");
        let line = format!("stty rows 24 cols {columns}; {program} --socket {socket} {line}");
        let done = output("script", &["-qec", &line, "/dev/null"]);
        (done.status.code(), String::from_utf8_lossy(&done.stdout).into_owned())
    };
    for target in ["-", "/dev/tty"] {
        let (code, shown) = in_terminal(80, &format!("volume export db {target}"));
        assert_eq!(code, Some(1), "{target}");
        assert!(shown.contains("is a terminal") && shown.len() < 400, "{target}: {shown}");
    }
    let (code, shown) = in_terminal(80, "volume export db - --force");
    assert!(code == Some(0) && shown.len() >= 1 << 20, "{} bytes", shown.len());
    // A line that does not fit loses columns, and is not broken.
    assert!(in_terminal(200, "volume list").1.contains("LABELS"));
    let (_, narrow) = in_terminal(60, "volume list");
    assert!(!narrow.contains("LABELS") && narrow.contains("SIZE"), "{narrow}");
}

#[test]
fn what_contains_a_disk_is_not_taken_for_one() {
    let system = System::start("64MiB");
    let cli = system.cli();
    let file = |name: &str| text(&system.path().join(name)).to_owned();
    let disk = file("a disk");
    let content = [Noise::new(3).bytes(1 << 20), vec![0; 1 << 20]].concat();
    std::fs::write(&disk, &content).expect("a file");
    let path = [programs().into_os_string(), std::env::var_os("PATH").unwrap_or_default()];
    let path = std::env::join_paths(path.iter().flat_map(std::env::split_paths)).expect("a path");
    let made = [
        ("gzip", &["gzip"][..], "gzip -c"),
        ("xz", &["xz"], "xz -c"),
        ("zstd", &["zstd"], "zstd -qc"),
        ("qcow2", &["qemu-img"], "qemu-img convert -O qcow2"),
        ("vmdk", &["qemu-img"], "qemu-img convert -O vmdk"),
        ("vhdx", &["qemu-img"], "qemu-img convert -O vhdx"),
    ];
    for (kind, programs, command) in made.iter().filter(|(_, programs, _)| present(programs)) {
        let packed = file(&format!("my disk.{kind}"));
        let into = if programs == &["qemu-img"] { " " } else { " > " };
        let shell = |line: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", line]).env("PATH", &path);
            let socket = cli.command(&[]).get_args().nth(1).expect("a socket").to_owned();
            let done = command.env("PANDO_SOCKET", socket).output().expect("a shell");
            assert!(done.status.success(), "{line}: {}", String::from_utf8_lossy(&done.stderr));
        };
        shell(&format!("{command} '{disk}'{into}'{packed}'"));
        let refused = cli.refused(&["volume", "import", kind, &packed]);
        assert!(refused["error"].to_string().contains(kind) || *kind != "gzip", "{refused}");
        // The command that it advises makes a volume of the content.
        let hint = refused["hint"].as_str().expect("a command").to_owned();
        shell(hint.split('`').nth(1).expect("a command"));
        let copy = cli.output(&["volume", "export", kind, "-"]).stdout;
        assert!(copy == content, "{kind}: {hint}");
        // Through a pipe it is recognised as well.
        let import = |more: &[&str]| {
            let line = [&["volume", "import", "piped", "-"], more].concat();
            let source = std::fs::File::open(&packed).expect("a file");
            cli.command(&line).stdin(source).output().expect("pando starts")
        };
        assert_eq!(import(&[]).status.code(), Some(1), "{kind}");
        assert!(import(&["--raw"]).status.success(), "{kind}");
        let bytes = std::fs::read(&packed).expect("a file");
        let copy = cli.output(&["volume", "export", "piped", "-"]).stdout;
        assert!(copy.starts_with(&bytes), "{kind}: as it is");
        cli.run(&["volume", "delete", kind, "piped"]);
    }
    // Nothing is no disk either.
    assert!(cli.error(&["volume", "import", "none", "-"]).contains("standard input is empty"));
    assert!(cli.error(&["volume", "import", "none", "/dev/null"]).contains("is empty"));
    assert_eq!(names(&cli.json(&["volume", "list"])), [""; 0]);
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
