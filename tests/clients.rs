//! The daemon under the NBD clients that people use: nbdinfo, nbdcopy, nbdkit, qemu-img, qemu-io
//! and fio. What they say must agree with what Pando says.

use std::path::{Path, PathBuf};

use pando_tests::cli::number;
use pando_tests::noise::Noise;
use pando_tests::tools::{output, present, run, text};
use pando_tests::{Nbd, System};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// A file of noise with holes: each second half of a MiB is zero.
fn image(system: &System, name: &str, mib: usize) -> PathBuf {
    let path = system.path().join(name);
    let mut bytes = Noise::new(7).bytes(mib * MIB);
    for piece in bytes.chunks_mut(MIB) {
        piece[MIB / 2..].fill(0);
    }
    std::fs::write(&path, bytes).expect("a file");
    path
}

fn same(left: &Path, right: &Path) -> bool {
    std::fs::read(left).expect("a file") == std::fs::read(right).expect("a file")
}

#[test]
fn nbdinfo_sees_what_the_cli_says() {
    if !present(&["nbdinfo"]) {
        return;
    }
    let system = System::with("128MiB", "export_all = true\n");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "12MiB"]);
    cli.run(&["snapshot", "db", "frozen"]);
    let text = run("nbdinfo", &["--json", &cli.serve_uri("db")]);
    let info: Value = serde_json::from_str(&text).expect("JSON");
    let export = &info["exports"][0];
    assert_eq!(number(export, "/export-size"), 12 << 20);
    for (key, expected) in [
        ("is_read_only", false),
        ("can_multi_conn", true),
        ("can_flush", true),
        ("can_fua", true),
        ("can_trim", true),
        ("can_zero", true),
    ] {
        assert_eq!(export[key], expected, "{key} of {export}");
    }
    assert_eq!(export["contexts"][0], "base:allocation");
    run("nbdinfo", &["--is", "read-only", &cli.serve_uri("frozen")]);
    let all = format!("nbd+unix://?socket={}", system.path().join("nbd/all.sock").display());
    let list = run("nbdinfo", &["--list", "--json", &all]);
    assert!(list.contains("\"db\"") && list.contains("\"frozen\""), "{list}");
}

#[test]
fn nbdcopy_there_and_back() {
    if !present(&["nbdcopy", "nbdinfo"]) {
        return;
    }
    let mut system = System::start("256MiB");
    let cli = system.cli();
    let original = image(&system, "original", 32);
    cli.run(&["volume", "create", "copy", "--size", "32MiB"]);
    let uri = cli.serve_uri("copy");
    run("nbdcopy", &["--flush", "--connections=4", text(&original), &uri]);
    let back = system.path().join("back");
    run("nbdcopy", &["--connections=4", &uri, text(&back)]);
    assert!(same(&original, &back), "nbdcopy brings back what it took");

    // Its holes are known to both: nbdinfo --map adds up to what the CLI says is mapped.
    let map: Value =
        serde_json::from_str(&run("nbdinfo", &["--map", "--json", &uri])).expect("JSON");
    let extents = map.as_array().expect("a list");
    let data = extents.iter().filter(|e| number(e, "/type") == 0).map(|e| number(e, "/length"));
    let mapped = number(&cli.json(&["volume", "show", "copy"]), "/mapped_bytes");
    assert_eq!(data.sum::<u64>(), mapped);

    // A copy of a clone through a daemon that was killed in between.
    cli.run(&["clone", "copy", "clone"]);
    system.crash();
    let again = system.path().join("again");
    run("nbdcopy", &[&cli.serve_uri("clone"), text(&again)]);
    assert!(same(&original, &again), "the clone is the copy");
}

#[test]
fn nbdkit_passes_a_volume_on() {
    if !present(&["nbdkit", "nbdcopy"]) {
        return;
    }
    let system = System::start("128MiB");
    let cli = system.cli();
    let original = image(&system, "original", 8);
    cli.run(&["volume", "import", "db", text(&original)]);
    let back = system.path().join("back");
    let copy = format!("nbdcopy \"$uri\" {}", back.display());
    let uri = format!("uri={}", cli.serve_uri("db"));
    run("nbdkit", &["-U", "-", "nbd", &uri, "--run", &copy]);
    assert!(same(&original, &back), "through another server");
}

#[test]
fn qemu_img_converts_and_compares() {
    if !present(&["qemu-img"]) {
        return;
    }
    let system = System::start("256MiB");
    let cli = system.cli();
    let original = image(&system, "original", 24);
    let qcow = system.path().join("image.qcow2");
    run("qemu-img", &["convert", "-O", "qcow2", text(&original), text(&qcow)]);
    cli.run(&["volume", "create", "disk", "--size", "24MiB"]);
    let uri = cli.serve_uri("disk");
    run("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", text(&qcow), &uri]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&qcow), &uri]);
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    let map: Value = serde_json::from_str(&map).expect("JSON");
    let extents = map.as_array().expect("a list");
    let data = extents.iter().filter(|e| e["data"] == true).map(|e| number(e, "/length"));
    assert_eq!(data.sum::<u64>(), 12 << 20, "the zeros of the image are holes: {map}");
}

#[test]
fn qemu_io_verifies_patterns_on_a_clone() {
    if !present(&["qemu-io"]) {
        return;
    }
    let system = System::start("128MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "db", "--size", "16MiB"]);
    let io = |name: &str, commands: &[&str]| {
        let mut arguments = vec!["-f", "raw", "-t", "writeback", "-d", "unmap"];
        arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
        let uri = cli.serve_uri(name);
        arguments.push(&uri);
        let done = output("qemu-io", &arguments);
        let shown = String::from_utf8_lossy(&done.stdout).into_owned();
        // qemu-io reports a failed verification on stdout only.
        assert!(done.status.success() && !shown.contains("fail"), "{commands:?}: {shown}");
    };
    io("db", &["write -P 0x11 0 4M", "write -P 0x22 4M 512", "flush"]);
    cli.run(&["clone", "db", "clone"]);
    io(
        "clone",
        &["write -P 0x33 1M 8k", "write -z -u 2M 64k", "discard 3M 64k", "write -f -P 0x44 8M 1M"],
    );
    io("db", &["write -P 0x55 1M 4k"]);
    io(
        "clone",
        &[
            "read -P 0x11 0 1M",
            "read -P 0x33 1M 8k",
            "read -P 0 2M 64k",
            "read -P 0 3M 64k",
            "read -P 0x22 4M 512",
            "read -P 0 4194816 3584",
            "read -P 0x44 8M 1M",
        ],
    );
    io("db", &["read -P 0x55 1M 4k", "read -P 0x11 1052672 3141632", "read -P 0 8M 1M"]);
    system.check();
}

#[test]
fn fio_verifies_random_writes() {
    if !present(&["fio"]) {
        return;
    }
    let mut system = System::start("256MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "base", "--size", "32MiB"]);
    let mut nbd = Nbd::open(&cli.serve("base"), "base").expect("an export");
    for at in 0..32 {
        nbd.write(at << 20, &Noise::new(at).bytes(MIB));
    }
    nbd.close();
    cli.run(&["clone", "base", "db"]);
    let fio = |extra: &[&str]| {
        let uri = format!("--uri={}", cli.serve_uri("db"));
        let fixed = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bs=4k",
            "--size=32m",
            "--iodepth=32",
            "--randseed=42",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--fsync=64",
        ];
        run("fio", &[&fixed, extra].concat());
    };
    fio(&["--do_verify=1"]);
    // What it wrote is there after a kill too, and the base is what it was.
    system.crash();
    fio(&["--verify_only"]);
    let mut nbd = Nbd::open(&cli.serve("base"), "base").expect("an export");
    for at in 0..32 {
        assert!(nbd.read(at << 20, 1 << 20) == Noise::new(at).bytes(MIB), "MiB {at} of the base");
    }
    system.check();
}
