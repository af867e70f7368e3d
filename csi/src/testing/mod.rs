//! The body of the fuzz target `csi_requests` (f14): requests with hostile ids, names, paths,
//! capabilities, parameters and secrets, against the adapter's own services and a daemon in memory. Of
//! every call:
//!
//! * An id that is none of ours names nothing: NOT_FOUND, or OK where something is ended; nothing in
//!   the pool changes for it. An id is never a part of a path or name.
//! * Asked twice, it answers the same; what it makes is what was asked for.
//! * Errors have the codes of CSI, and say neither secrets nor control characters.
//! * Outside of the directories that a request names nothing is made or removed.
//!
//! ```text
//! 10 bytes a request: call, name, id, size (2), capability, parameter, path, more, failure of the daemon
//! ```

mod pandod;
mod raw;
mod requests;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use pando_proto::v1::pando_server::PandoServer;
use tokio::runtime::Runtime;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Endpoint, Server};

use crate::adapter::Adapter;
use crate::config::Config;
use crate::daemon::Daemon;
use crate::locks::Locks;
use pandod::Pandod;
use requests::Calls;

/// What inputs have come to, by name.
pub type Reached = BTreeMap<&'static str, u64>;

/// What the corpus must come to.
pub const REACHES: &[&str] = &[
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
/// Requests of one input.
const REQUESTS_MAX: usize = 16;
const REQUEST_BYTES: usize = 10;
/// Bytes that wait between adapter and daemon.
const PIPE_BYTES: usize = 1 << 16;

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// The adapter, its daemon, and a directory to mount in; made once a thread.
struct World {
    runtime: Runtime,
    pandod: Pandod,
    adapter: Arc<Adapter>,
    home: Home,
}

/// Runs one input.
///
/// # Panics
/// When the oracle says no.
pub fn run(bytes: &[u8]) {
    body(bytes, &mut Reached::new());
}

/// Runs one input and counts what it has reached.
///
/// # Panics
/// When the oracle says no.
pub fn body(bytes: &[u8], reached: &mut Reached) {
    WORLD.with_borrow_mut(|world| {
        let world = world.get_or_insert_with(World::new);
        world.pandod.reset();
        world.home.restore();
        let mut calls = Calls::new(&world.adapter, &world.pandod, &world.home.inside, reached);
        world.runtime.block_on(async {
            for raw in bytes.chunks_exact(REQUEST_BYTES).take(REQUESTS_MAX) {
                let raw = raw.try_into().expect("as long as a request");
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
        let pandod = Pandod::default();
        let (connect, connections) = tokio::sync::mpsc::unbounded_channel();
        let incoming = UnboundedReceiverStream::new(connections).map(Ok::<_, std::io::Error>);
        let service = PandoServer::new(pandod.clone());
        runtime.spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        let connector = tower::service_fn(move |_| {
            let (near, far) = tokio::io::duplex(PIPE_BYTES);
            let sent = connect.send(far);
            std::future::ready(sent.map(|()| TokioIo::new(near)).map_err(std::io::Error::other))
        });
        let channel = {
            let _entered = runtime.enter();
            Endpoint::from_static("http://pandod").connect_with_connector_lazy(connector)
        };
        let config = Config { node_id: "node-1".into(), ..Config::default() };
        let daemon = Daemon::over(channel);
        let adapter = Arc::new(Adapter { config, daemon, locks: Locks::default() });
        Self { runtime, pandod, adapter, home: Home::new() }
    }
}

/// A directory that requests may name, and beside it what must stay as it is.
struct Home {
    root: tempfile::TempDir,
    inside: PathBuf,
}

impl Home {
    fn new() -> Self {
        // In memory where that is possible: most of an input's time is that of these few files.
        let root = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let root = root.expect("a directory");
        let inside = root.path().join("inside");
        let home = Self { root, inside };
        let outside = home.root.path().join("outside");
        std::fs::create_dir_all(outside.join("empty")).expect("a directory");
        std::fs::write(outside.join("file"), "precious").expect("a file");
        home
    }

    /// What was made or removed by the input before is undone.
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
            let entries = std::fs::read_dir(path).expect("it is still there");
            let mut names: Vec<_> =
                entries.map(|entry| entry.expect("an entry").file_name()).collect();
            names.sort();
            names
        };
        let outside = self.root.path().join("outside");
        assert_eq!(names(self.root.path()), ["inside", "outside"]);
        assert_eq!(names(&outside), ["empty", "file"]);
        assert_eq!(names(&outside.join("empty")).len(), 0);
        assert_eq!(std::fs::read(outside.join("file")).expect("a file"), b"precious");
        assert_eq!(std::fs::read(self.inside.join("full/file")).expect("a file"), b"data");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Replays `fuzz/corpus/csi_requests`, which must reach all that it is there for.
    #[test]
    fn the_corpus_is_replayed() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("fuzz");
        let mut inputs: Vec<_> = std::fs::read_dir(fuzz.join("corpus/csi_requests"))
            .expect("a corpus")
            .map(|entry| entry.unwrap().path())
            .collect();
        inputs.sort();
        let mut reached = Reached::new();
        for path in &inputs {
            println!("{}", path.display());
            body(&std::fs::read(path).unwrap(), &mut reached);
        }
        println!("{} inputs, {reached:?}", inputs.len());
        for what in REACHES {
            assert!(reached.contains_key(what), "the corpus has rotted: no {what} any more");
        }
    }
}
