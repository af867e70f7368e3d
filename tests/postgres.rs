//! PostgreSQL on a volume, cloned by CSI while pgbench runs on it. A second server on the clone
//! recovers as after a crash and passes its own checks, and no committed transaction is missing or
//! halved; the first goes on meanwhile and never notices.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pando_tests::csi::{Mounted, can_mount, from_volume, mount_of, request};
use pando_tests::tools::{present, run, text};
use pando_tests::{Csi, System};

/// Where Debian has a directory for each version.
const VERSIONS: &str = "/usr/lib/postgresql";
/// The user that a server runs as: it refuses root.
const USER: &str = "postgres";
const VOLUME_BYTES: i64 = 1 << 30;
/// pgbench's unit of size: 100,000 accounts each.
const SCALE: &str = "3";
const SECONDS: u64 = 10;
/// When the clone is made.
const CLONE_AFTER: Duration = Duration::from_secs(4);

/// The programs of the newest version that is installed.
fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir(VERSIONS).ok()?;
    let versions = versions.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let newest: u32 = versions.max()?;
    let directory = Path::new(VERSIONS).join(newest.to_string()).join("bin");
    directory.join("pgbench").exists().then_some(directory)
}

/// A server on a volume. Its port is only the name of its socket: it listens nowhere else.
struct Server {
    programs: PathBuf,
    data: PathBuf,
    /// Directory of its socket and its log.
    place: PathBuf,
}

impl Server {
    /// A server whose data is, or will be, on what is mounted at `target`.
    fn new(system: &System, target: &Path, name: &str) -> Self {
        let place = system.path().join(name);
        std::fs::create_dir(&place).expect("a directory");
        run("chown", &[USER, text(&place)]);
        let programs = programs().expect("it was there");
        Self { programs, data: target.join("data"), place }
    }

    /// One of PostgreSQL's programs, run by its user.
    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("runuser");
        command.args(["-u", USER, "--"]).arg(self.programs.join(program)).args(arguments);
        command.env("PGHOST", &self.place).env("PGUSER", USER).env("PGDATABASE", "postgres");
        command.env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program, arguments).output().expect("a program starts");
        let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "{program}: {}\n{}\n{}",
            output.status,
            shown(&output.stderr),
            self.log()
        );
        shown(&output.stdout)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.place.join("log")).unwrap_or_default()
    }

    fn create(&self) {
        let options = ["--auth=trust", "--data-checksums", "--encoding=UTF8", "--locale=C"];
        std::fs::create_dir(&self.data).expect("a directory");
        run("chown", &[USER, text(&self.data)]);
        self.run("initdb", &[&["-D", text(&self.data), "-U", USER][..], &options].concat());
    }

    fn start(&self) {
        let settings =
            format!("-k {} -c listen_addresses='' -c shared_buffers=64MB", self.place.display());
        let log = self.place.join("log");
        // Of what it prints nothing may be inherited by the server, which goes on.
        let mut start = self.command("pg_ctl", &["-D", text(&self.data), "-l", text(&log)]);
        start.args(["-w", "-t", "60", "-o", &settings, "start"]);
        let status = start.stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(status.expect("a program starts").success(), "{}", self.log());
    }

    fn stop(&self, mode: &str) {
        self.run("pg_ctl", &["-D", text(&self.data), "-w", "-m", mode, "stop"]);
    }

    /// The answer to a query, without decoration.
    fn query(&self, query: &str) -> String {
        self.run("psql", &["-XAtq", "-v", "ON_ERROR_STOP=1", "-c", query]).trim().to_owned()
    }

    /// Committed transactions of pgbench.
    fn transactions(&self) -> u64 {
        self.query("select count(*) from pgbench_history").parse().expect("a number")
    }

    /// Everything that PostgreSQL and pgbench can tell about the state of the data.
    fn verify(&self) {
        self.query("create extension if not exists amcheck");
        let checked = self.query(
            "select count(bt_index_check(c.oid, true)) from pg_class c \
             join pg_am a on a.oid = c.relam join pg_index i on i.indexrelid = c.oid \
             where a.amname = 'btree' and c.relkind = 'i' and i.indisready and i.indisvalid",
        );
        assert!(checked.parse::<u64>().expect("a number") > 100, "{checked} indexes");
        // A transaction adds the same to an account, a teller and a branch, and writes it down.
        let sums = self.query(
            "select (select sum(abalance) from pgbench_accounts), \
             (select sum(tbalance) from pgbench_tellers), \
             (select sum(bbalance) from pgbench_branches), \
             (select sum(delta) from pgbench_history)",
        );
        let sums: Vec<&str> = sums.split('|').collect();
        assert!(sums.len() == 4 && sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
        // Reads every page and compares its checksum.
        self.run("pg_dump", &["-f", "/dev/null"]);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Of a test that failed; one that has been stopped says so and is left alone.
        let arguments = ["-D", text(&self.data), "-m", "immediate", "stop"];
        self.command("pg_ctl", &arguments).output().map(drop).unwrap_or_default();
    }
}

/// pgbench at work.
fn load(server: &Server) -> Child {
    let seconds = SECONDS.to_string();
    let mut command = server.command("pgbench", &["-n", "-c", "4", "-j", "2", "-T", &seconds]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("pgbench starts")
}

#[test]
fn a_clone_of_a_running_database_recovers() {
    if !can_mount() || !present(&["mkfs.ext4", "runuser", "pg_ctlcluster"]) {
        return;
    }
    assert!(programs().is_some(), "no version of PostgreSQL in {VERSIONS}");
    let system = System::start("4GiB");
    // The server's user must be able to walk through.
    let open = std::fs::Permissions::from_mode(0o711);
    std::fs::set_permissions(system.path(), open).expect("our directory");
    let csi = Csi::start(&system);
    let capability = mount_of("ext4");
    let wanted = request("database", VOLUME_BYTES, &capability);
    let id = csi.create(wanted).expect("a volume").volume_id;
    let volume = Mounted::up(&csi, &id, "database", &capability);
    let first = Server::new(&system, &volume.target, "first");
    first.create();
    first.start();
    first.run("pgbench", &["-i", "-q", "-s", SCALE]);

    // 1. Cloned in the middle, by the same call as any clone.
    let bench = load(&first);
    std::thread::sleep(CLONE_AFTER);
    let before = first.transactions();
    let mut wanted = request("copy", VOLUME_BYTES, &capability);
    wanted.volume_content_source = from_volume(&id);
    let copy_id = csi.create(wanted).expect("a clone").volume_id;
    let after = first.transactions();
    assert!(before > 0 && after >= before, "{before} {after}");

    // 2. A second server on the clone, while the first goes on.
    let copy = Mounted::up(&csi, &copy_id, "copy", &capability);
    let second = Server::new(&system, &copy.target, "second");
    // It names the first server's process, which runs; in another container it would not.
    std::fs::remove_file(second.data.join("postmaster.pid")).expect("of the first server");
    second.start();
    assert!(second.log().contains("automatic recovery in progress"), "{}", second.log());
    second.verify();
    let copied = second.transactions();
    assert!((before..=after).contains(&copied), "{before} <= {copied} <= {after}");

    // 3. Both are written, and neither sees the other.
    second.run("pgbench", &["-n", "-c", "2", "-t", "50"]);
    assert_eq!(second.transactions(), copied + 100);
    second.verify();
    let bench = bench.wait_with_output().expect("pgbench ends");
    let said = String::from_utf8_lossy(&bench.stderr);
    assert!(bench.status.success(), "the first server never notices: {said}");
    assert!(first.transactions() > after, "the first went on");
    first.verify();

    // 4. The source goes first.
    first.stop("fast");
    volume.down();
    csi.delete(&id).expect("a source can be deleted");
    second.verify();
    second.stop("fast");
    copy.down();
    csi.delete(&copy_id).expect("a clone can be deleted");
    system.check();
}
