//! The body of the fuzz target `csi_requests` (f14): requests with hostile ids, names, paths,
//! capabilities, parameters and secrets, sent to the services of the adapter, which talks to a
//! daemon in memory. For every call:
//!
//! * An id that the adapter did not issue names nothing: the answer is NOT_FOUND, or OK for calls
//!   that end something, and the pool does not change. An id is never part of a path or name.
//! * A repeated request gets the same answer, and what is created is what was requested.
//! * Errors have the codes of CSI, and contain neither secrets nor control characters.
//! * Nothing is created or removed outside of the directories that a request names.
//!
//! ```text
//! 10 bytes per request: call, name, id, size (2), capability, parameter, path, more, failure
//! ```

mod fake_daemon;
mod raw;
mod requests;

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use pando_csi::Services;
use pando_csi::config::Config;
use pando_proto::v1::pando_server::PandoServer;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::Reached;
use fake_daemon::FakeDaemon;
use requests::Calls;

/// What the corpus must reach.
pub(crate) const REACHES: &[&str] = &[
    "clones",
    "deletions",
    "failures of the daemon",
    "groups",
    "hostile ids",
    "hostile paths",
    "lists",
    "refused",
    "requests",
    "snapshots",
    "volumes",
];
/// The name of the node in ids.
const NODE: &str = "node-1";
/// Requests per input.
const REQUESTS_MAX: usize = 16;
const REQUEST_BYTES: usize = 10;
/// The socket of the daemon in [`Home`].
const SOCKET: &str = "pandod.sock";

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// The adapter, its daemon, and a directory to mount in; made once per thread.
struct World {
    runtime: Runtime,
    daemon: FakeDaemon,
    services: Services,
    home: Home,
}

/// Runs one input.
///
/// # Panics
/// If an answer, the pool or the file system differs from what the oracle expects.
pub fn run(bytes: &[u8]) {
    body(bytes, &mut Reached::default());
}

/// Runs one input and counts what it reaches.
pub(crate) fn body(bytes: &[u8], reached: &mut Reached) {
    WORLD.with_borrow_mut(|world| {
        let world = world.get_or_insert_with(World::new);
        world.daemon.reset();
        world.home.restore();
        let mut calls = Calls::new(&world.services, &world.daemon, &world.home.inside, reached);
        world.runtime.block_on(async {
            for raw in bytes.chunks_exact(REQUEST_BYTES).take(REQUESTS_MAX) {
                let raw = raw.try_into().expect("the length of a request");
                calls.call(raw::Raw::of(raw)).await;
            }
        });
        world.home.check();
    });
}

impl World {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let entered = runtime.enter();
        let daemon = FakeDaemon::default();
        let home = Home::new();
        let daemon_socket = home.root.path().join(SOCKET);
        let listener = UnixListener::bind(&daemon_socket).expect("a socket");
        let service = PandoServer::new(daemon.clone());
        let incoming = UnixListenerStream::new(listener);
        runtime.spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        let config = Config { node_id: NODE.into(), daemon_socket, ..Config::default() };
        let services = Services::new(config).expect("the path of a socket");
        drop(entered);
        Self { runtime, daemon, services, home }
    }
}

/// A directory `inside` that requests may name, and beside it files that must never change.
struct Home {
    root: TempDir,
    inside: PathBuf,
}

impl Home {
    fn new() -> Self {
        let root = crate::scratch_dir();
        let inside = root.path().join("inside");
        let home = Self { root, inside };
        let outside = home.root.path().join("outside");
        std::fs::create_dir_all(outside.join("empty")).expect("a directory");
        std::fs::write(outside.join("file"), "precious").expect("a file");
        home
    }

    /// Undoes the changes of the previous input.
    fn restore(&self) {
        if self.inside.exists() {
            std::fs::remove_dir_all(&self.inside).expect("nothing is mounted here");
        }
        std::fs::create_dir_all(self.inside.join("empty")).expect("a directory");
        std::fs::write(self.inside.join("file"), "").expect("a file");
        std::fs::create_dir(self.inside.join("full")).expect("a directory");
        std::fs::write(self.inside.join("full/file"), "data").expect("a file");
        std::os::unix::fs::symlink("../outside", self.inside.join("link")).expect("a link");
    }

    fn check(&self) {
        let names = |path: &Path| {
            let entries = std::fs::read_dir(path).expect("the directory still exists");
            let mut names: Vec<_> =
                entries.map(|entry| entry.expect("an entry").file_name()).collect();
            names.sort();
            names
        };
        let outside = self.root.path().join("outside");
        assert_eq!(names(self.root.path()), ["inside", "outside", SOCKET]);
        assert_eq!(names(&outside), ["empty", "file"]);
        assert_eq!(names(&outside.join("empty")).len(), 0);
        assert_eq!(std::fs::read(outside.join("file")).expect("a file"), b"precious");
        assert_eq!(std::fs::read(self.inside.join("full/file")).expect("a file"), b"data");
    }
}
