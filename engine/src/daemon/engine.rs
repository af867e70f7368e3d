//! The open pool and the shards that serve it.
//!
//! ```text
//!   tokio (API, metrics, signals)           shard 0: Pool, control operations, background work
//!        | Engine::control, Engine::on -->  shard 1: Pool (same core)
//!        |                                  ...
//!        |                                  discard: Pool (same core), serves no volume
//! ```
//!
//! Each shard's thread holds its handle of the pool in a thread local; work that comes in through
//! the mailbox takes it from there, so nothing of the pool leaves its thread. All control
//! operations run on shard 0: between its awaits, one cannot interleave with another.

use std::cell::RefCell;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::info;

use crate::daemon::config::Config;
use crate::disk::PoolFile;
use crate::error::{Error, ErrorKind, Result};
use crate::pool::{Core, OpenOptions, Pool};
use crate::runtime::executor::spawn_local;
use crate::runtime::shard::{Shard, ShardHandle, ShardOptions};
use crate::units::{VolumeId, to_u64, to_usize};

/// Attempts to lock a pool that another process holds: 2 s in all.
const LOCK_ATTEMPTS: usize = 100;
/// Pause between them.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

thread_local! {
    /// The pool's handle of this shard.
    static POOL: RefCell<Option<Pool>> = const { RefCell::new(None) };
}

/// The pool's handle of the calling shard.
///
/// # Errors
/// `Shutdown` before the pool is open and after it was closed.
pub(super) fn pool_here() -> Result<Pool> {
    POOL.with(|pool| pool.borrow().clone())
        .ok_or_else(|| Error::new(ErrorKind::Shutdown, "the pool is closed"))
}

fn set_pool(new: Option<Pool>) {
    let old = POOL.with(|pool| pool.replace(new));
    // Dropped with nothing borrowed: what it owns may come back here.
    drop(old);
}

/// The open pool and its shards.
pub(super) struct Engine {
    shards: Vec<ShardHandle>,
    /// Discards free blocks, beside the shards: a discard can hold its thread up.
    discards: Option<ShardHandle>,
    file: Arc<PoolFile>,
    core: Arc<Core>,
    /// Work for the API is refused.
    stopping: AtomicBool,
}

impl Engine {
    /// Starts the shards and opens the pool.
    ///
    /// # Errors
    /// What stands in the way, with advice if the pool does not exist.
    pub(super) async fn start(config: &Config, journal_dir: &Path) -> Result<Self> {
        let file = Arc::new(open_file_patiently(&config.pool).await?);
        let options = ShardOptions { spin: Duration::from_micros(config.spin_us) };
        let mut shards = Vec::new();
        for index in 0..config.shard_count() {
            shards.push(Shard::start_with(format!("shard-{index}"), options, || async {})?);
        }
        let reserved = file.is_reserved()?;
        if config.discard && reserved {
            info!("free blocks are not discarded: the space of the pool's file was set aside");
        }
        let discard = config.discard && !reserved;
        let open =
            OpenOptions { cache_bytes: config.cache_bytes, discard, ..OpenOptions::default() };
        let core = open_pool(&shards[0], &file, journal_dir, open).await?;
        for shard in &shards[1..] {
            let (core, file) = (Arc::clone(&core), Arc::clone(&file));
            shard
                .call(move || async move { set_pool(Some(Pool::attach(core, file.disk()))) })
                .await?;
        }
        let discards = if discard { Some(start_discards(&core, &file)?) } else { None };
        Ok(Self { shards, discards, file, core, stopping: AtomicBool::new(false) })
    }

    /// Runs `work` with the pool on the shard of control operations.
    pub(super) async fn control<R, F, Fut>(&self, work: F) -> Result<R>
    where
        F: FnOnce(Pool) -> Fut + Send + 'static,
        Fut: Future<Output = Result<R>> + 'static,
        R: Send + 'static,
    {
        self.check_running()?;
        on(&self.shards[0], work).await
    }

    /// Runs `work` with the pool on the shard that moves the data of volume `id`.
    pub(super) async fn data<R, F, Fut>(&self, id: VolumeId, work: F) -> Result<R>
    where
        F: FnOnce(Pool) -> Fut + Send + 'static,
        Fut: Future<Output = Result<R>> + 'static,
        R: Send + 'static,
    {
        self.check_running()?;
        on(&self.shards[to_usize(id.get() % to_u64(self.shards.len()))], work).await
    }

    fn check_running(&self) -> Result<()> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Shutdown, "pandod is stopping")
                .hint("try again when pandod is back"));
        }
        Ok(())
    }

    /// Refuses work for the API from now on, so that long calls come to their end.
    pub(super) fn refuse_work(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.core.end_walks();
    }

    /// The shards, the one of control operations first.
    pub(super) fn shards(&self) -> &[ShardHandle] {
        &self.shards
    }

    /// The device or file.
    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The present length of the device or file.
    pub(super) fn device_len_bytes(&self) -> Result<u64> {
        let failed = |error| Error::io(format!("size of {}", self.path().display()), error);
        let mut device = std::fs::File::open(self.path()).map_err(failed)?;
        std::io::Seek::seek(&mut device, std::io::SeekFrom::End(0)).map_err(failed)
    }

    /// Writes the last checkpoint and ends the shards. Exports have ended before.
    ///
    /// # Errors
    /// The checkpoint could not be written; the next start recovers from the journal.
    pub(super) async fn stop(&self) -> Result<()> {
        self.refuse_work();
        let closed = on(&self.shards[0], |pool| async move { pool.close().await }).await;
        let shards: Vec<_> = self.shards.iter().chain(&self.discards).cloned().collect();
        for shard in &shards {
            // A shard that is gone has no pool any more.
            shard.call(|| async { set_pool(None) }).await.unwrap_or_default();
            shard.stop();
        }
        let joined = tokio::task::spawn_blocking(move || {
            shards.iter().map(ShardHandle::join).collect::<Result<Vec<()>>>()
        });
        let joined = joined.await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Shutdown, "the threads of the shards could not be joined"))
        });
        closed.and(joined.map(|_| ()))
    }
}

/// Opens the pool on the shard of control operations, with its background task.
async fn open_pool(
    shard: &ShardHandle,
    file: &Arc<PoolFile>,
    journal_dir: &Path,
    options: OpenOptions,
) -> Result<Arc<Core>> {
    let path = file.path().display().to_string();
    let file = Arc::clone(file);
    let directory = journal_dir.to_owned();
    let opened = shard.call(move || async move {
        let ring = Arc::clone(&file);
        let map = move |len| ring.map_ring(&directory, len);
        let pool = Pool::open(file.disk(), map, options).await?;
        let core = pool.core();
        set_pool(Some(pool.clone()));
        spawn_local(async move { pool.run_background().await });
        Ok(core)
    });
    opened.await?.map_err(|error: Error| error.context(format!("pool {path}")))
}

/// Starts the thread that discards free blocks.
fn start_discards(core: &Arc<Core>, file: &Arc<PoolFile>) -> Result<ShardHandle> {
    let options = ShardOptions { spin: Duration::ZERO };
    let shard = Shard::start_with("discard".to_owned(), options, || async {})?;
    let (core, file) = (Arc::clone(core), Arc::clone(file));
    shard.spawn(move || async move { Pool::attach(core, file.disk()).run_discards().await })?;
    Ok(shard)
}

async fn on<R, F, Fut>(shard: &ShardHandle, work: F) -> Result<R>
where
    F: FnOnce(Pool) -> Fut + Send + 'static,
    Fut: Future<Output = Result<R>> + 'static,
    R: Send + 'static,
{
    shard.call(move || async move { work(pool_here()?).await }).await.and_then(|result| result)
}

/// Opens the file, waiting a little for a process that has just ended: the kernel lets go of the
/// pool only when the last I/O of a daemon that was killed is over.
async fn open_file_patiently(path: &Path) -> Result<PoolFile> {
    let mut left = LOCK_ATTEMPTS;
    loop {
        match open_file(path) {
            Err(error) if error.kind() == ErrorKind::Busy && left > 0 => left -= 1,
            result => return result,
        }
        tokio::time::sleep(LOCK_PAUSE).await;
    }
}

fn open_file(path: &Path) -> Result<PoolFile> {
    PoolFile::open(path).map_err(|error| explain(path, error))
}

/// Checks that there is something at `path` that can be a pool, without opening it.
///
/// # Errors
/// As the opening would fail, with the same words.
pub(super) fn check_exists(path: &Path) -> Result<()> {
    PoolFile::block_device_at(path).map(|_| ()).map_err(|error| explain(path, error))
}

/// Adds advice to the failed opening of the pool at `path`.
fn explain(path: &Path, error: Error) -> Error {
    let shown = path.display();
    match error.kind() {
        ErrorKind::NotFound => Error::new(
            ErrorKind::NotFound,
            format!(
                "pool {shown} does not exist; make it with `pando pool create {shown} --size SIZE`"
            ),
        ),
        ErrorKind::Busy => error.context(format!("pool {shown}: is another pandod running?")),
        _ => error.context(format!("pool {shown}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_pool_says_how_to_make_one() {
        let error = open_file(Path::new("/nonexistent/pool")).unwrap_err();
        assert!(error.to_string().contains("`pando pool create /nonexistent/pool"), "{error}");
        let checked = check_exists(Path::new("/nonexistent/pool")).unwrap_err();
        assert_eq!(checked.to_string(), error.to_string());
        assert_eq!(
            check_exists(Path::new("/dev/null")).unwrap_err().kind(),
            ErrorKind::Unsupported
        );
    }
}
