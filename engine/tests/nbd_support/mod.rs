//! A server of volumes in memory, on threads of its own.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use pando_engine::error::Result;
use pando_engine::export::nbd::{NbdServer, ServerOptions};
use pando_engine::export::testing::{RamDisk, RamExports};
use pando_engine::runtime::executor::Executor;
use pando_engine::runtime::park::ThreadDriver;
use pando_engine::runtime::shard::{Shard, ShardHandle};
use tempfile::TempDir;

/// Waits on this thread.
pub(crate) fn wait<T>(work: impl Future<Output = T>) -> T {
    Executor::new(ThreadDriver::new()).block_on(work)
}

pub(crate) struct TestServer {
    pub(crate) server: NbdServer,
    pub(crate) shards: Vec<ShardHandle>,
    _directory: TempDir,
}

impl TestServer {
    /// Serves `disks` from one shard.
    pub(crate) fn start(disks: &[(&str, &RamDisk)]) -> Self {
        Self::with(disks, ServerOptions::default(), 0)
    }

    /// Serves `disks`; the connections go to `helpers` shards if there are any.
    pub(crate) fn with(
        disks: &[(&str, &RamDisk)],
        mut options: ServerOptions,
        helpers: usize,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sockets/export.sock");
        let start = |index| Shard::start(format!("nbd-{index}"), || async {}).unwrap();
        let shards: Vec<ShardHandle> = (0..=helpers).map(start).collect();
        options.shards = shards[1..].to_vec();
        let server = listen(&shards[0], disks, &path, options).unwrap();
        Self { server, shards, _directory: directory }
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        self.server.path()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        for shard in &self.shards {
            shard.stop();
        }
        for shard in &self.shards {
            shard.join().unwrap();
        }
    }
}

/// Serves `disks` at `path` from `shard`.
pub(crate) fn listen(
    shard: &ShardHandle,
    disks: &[(&str, &RamDisk)],
    path: &Path,
    options: ServerOptions,
) -> Result<NbdServer> {
    let disks = disks.iter().map(|&(name, disk)| (name.to_owned(), disk.clone())).collect();
    let source = Arc::new(RamExports::new(disks));
    let path = path.to_owned();
    wait(shard.call(move || async move { NbdServer::listen_unix(&path, source, options).await }))
        .unwrap()
}
