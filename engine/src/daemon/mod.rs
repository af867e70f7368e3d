//! L8: the daemon `pandod`: configuration, API, metrics, exports, orderly start and end.
//!
//! ```text
//!  config --> run                                      threads
//!              |-- engine    the pool on its shards     shard-0 .. shard-n
//!              |-- exports   NBD sockets                (on the shards)
//!              |-- attach    block devices              (on the shards)
//!              |-- rpc       pando.v1: stream, content, temporary, ...    \
//!              |-- metrics   /metrics                                      > control (tokio)
//!              |-- tls       NBD over TCP                                  |
//!              `-- watch     watermarks, watchdog                         /
//! ```
//!
//! The control thread never touches the data path; NBD over TCP is the exception, its bytes pass
//! through there. The order of the end: no more API calls and TCP connections -> exports answer
//! what is in flight and close -> devices are detached or suspended -> last
//! checkpoint -> shards end.

mod attach;
pub mod config;
mod content;
mod convert;
mod engine;
mod exports;
mod listen;
mod log;
mod metrics;
mod offered;
mod rpc;
mod stream;
mod temporary;
#[cfg(test)]
mod tests;
mod tls;
mod uses;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use pando_proto::v1::pando_server::PandoServer;
use rustix::process::{Resource, Rlimit, configure_io_flusher_behavior, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch as latch;
use tokio::task::{AbortHandle, JoinHandle};
use tracing::{debug, info, warn};

use crate::error::{Error, Result};
use attach::Attachments;
use config::{Config, Paths};
use engine::Engine;
use exports::Exports;
pub use log::init as init_log;
use rpc::Service;

/// How long calls that are under way may take at the end.
const CALLS_DRAIN: Duration = Duration::from_secs(5);
/// Streams of one API connection at a time.
const STREAMS_MAX: u32 = 256;

/// A task that ends with its owner.
struct Background(AbortHandle);

impl Background {
    fn spawn(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(task).abort_handle())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Checks what can be checked without opening the pool: the configuration, that the pool exists,
/// and the certificates.
///
/// # Errors
/// What a start would fail with.
pub fn check(config: &Config) -> Result<()> {
    config.validate()?;
    engine::check_exists(&config.pool)?;
    config.nbd_tls.as_ref().map_or(Ok(()), |tls| tls::Server::new(tls).map(|_| ()))
}

/// Runs the daemon until SIGTERM or SIGINT, and ends it in good order.
///
/// # Errors
/// Why it could not start, or could not end in good order. In the latter case nothing that was
/// acknowledged is lost: the next start recovers it from the journal.
pub fn run(config: &Config) -> Result<()> {
    raise_limit_of_files();
    // The threads to come inherit it: memory that they ask for is not won by writing to the
    // devices that they serve, which would wait for them.
    let flusher = configure_io_flusher_behavior(true);
    debug!(set = flusher.is_ok(), "I/O flusher");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(|error| Error::io("start of the control thread", error))?;
    let ended = runtime.block_on(async {
        // Caught from the beginning: a signal during recovery ends the daemon after it.
        let mut signals = StopSignals::new()?;
        serve(config, signals.received()).await
    });
    // What is left are calls that did not end in time.
    runtime.shutdown_background();
    ended
}

/// Serves the pool until `stop` returns the reason to end. Public for the fuzz target
/// `control_api`; it needs a runtime, but neither signals nor limits of the process.
///
/// # Errors
/// As [`run`].
#[doc(hidden)]
pub async fn serve(config: &Config, stop: impl Future<Output = &'static str>) -> Result<()> {
    let paths = config.paths()?;
    let (listener, socket_file) = listen::bind(&paths.socket)?;
    let tls = config.nbd_tls.as_ref().map(tls::Server::new).transpose()?;
    info!(pool = %config.pool.display(), "pool is being opened");
    let engine = Arc::new(Engine::start(config, &paths.journal_dir).await?);
    let served = serve_pool(config, &paths, &engine, listener, tls, stop).await;
    drop(socket_file);
    let stopped = engine.stop().await;
    if stopped.is_ok() {
        info!("pool is closed");
    }
    served.and(stopped)
}

/// Everything between the opening of the pool and its closing.
async fn serve_pool(
    config: &Config,
    paths: &Paths,
    engine: &Arc<Engine>,
    listener: tokio::net::UnixListener,
    tls: Option<tls::Server>,
    stop: impl Future<Output = &'static str>,
) -> Result<()> {
    let exports = Arc::new(Exports::new(Arc::clone(engine), &paths.nbd_dir));
    // First of all: there may be I/O that waits for a device to be taken back.
    let (devices_dir, kind) = (&paths.devices_dir, config.devices.kind);
    let attachments =
        Attachments::new(Arc::clone(engine), Arc::clone(&exports), devices_dir, kind).await?;
    temporary::sweep(engine, &exports).await?;
    if config.export_all {
        exports.offer_everything().await?;
    }
    let metrics = match &config.metrics {
        Some(metrics) => Some(metrics::bind(&metrics.listen).await?),
        None => None,
    };
    let _metrics = metrics.map(|listener| {
        let sources = metrics::Sources {
            engine: Arc::clone(engine),
            exports: Arc::clone(&exports),
            attachments: Arc::clone(&attachments),
        };
        Background::spawn(metrics::serve(listener, sources))
    });
    let (stopping, stopped) = latch::channel(false);
    let tls = match tls {
        Some(server) => {
            let listener = server.bind().await?;
            let (engine, source) = (Arc::clone(engine), exports.source());
            Some(tokio::spawn(server.serve(listener, engine, source, stopped.clone())))
        }
        None => None,
    };
    let _watch = Background::spawn(watch::run(Arc::clone(engine)));
    let _watchdog = Background::spawn(watch::watchdog(Arc::clone(engine)));
    let service = Service::new(Arc::clone(engine), Arc::clone(&exports), Arc::clone(&attachments));
    let peers = listen::peers(listener, config.allowed_uids.clone());
    let mut calls = tokio::spawn(serve_api(service, peers, stopped));
    info!(socket = %paths.socket.display(), shards = engine.shards().len(), "pandod is ready");
    watch::notify(&[NotifyState::Ready]);

    let served = tokio::select! {
        reason = stop => {
            info!(reason, "pandod is stopping");
            Ok(())
        }
        ended = &mut calls => Err(api_ended(ended)),
    };
    watch::notify(&[NotifyState::Stopping]);
    engine.refuse_work();
    // Whoever waits for it is there; if nobody is, nobody needs it.
    stopping.send(true).unwrap_or_default();
    if served.is_ok() {
        drain(calls, "API calls").await;
    }
    exports.stop_all().await;
    attachments.stop().await;
    if let Some(tls) = tls {
        drain(tls, "TCP connections").await;
    }
    served
}

async fn serve_api(
    service: Service,
    peers: impl tokio_stream::Stream<Item = std::io::Result<tokio::net::UnixStream>>,
    mut stopped: latch::Receiver<bool>,
) -> std::result::Result<(), tonic::transport::Error> {
    let end = async move {
        stopped.wait_for(|stopped| *stopped).await.map(|_| ()).unwrap_or_default();
    };
    tonic::transport::Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .add_service(PandoServer::new(service))
        .serve_with_incoming_shutdown(peers, end)
        .await
}

fn api_ended(
    ended: std::result::Result<
        std::result::Result<(), tonic::transport::Error>,
        tokio::task::JoinError,
    >,
) -> Error {
    let cause = match ended {
        Ok(Ok(())) => "no reason is known".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    Error::io("the API ended by itself", std::io::Error::other(cause))
}

/// Gives a task its time to end, and ends it after that.
async fn drain<T>(mut task: JoinHandle<T>, what: &str) {
    if tokio::time::timeout(CALLS_DRAIN, &mut task).await.is_err() {
        warn!(what, "cut off: they took too long");
        task.abort();
    }
}

/// SIGTERM and SIGINT.
struct StopSignals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl StopSignals {
    fn new() -> Result<Self> {
        let caught = |kind| signal(kind).map_err(|error| Error::io("signal handler", error));
        Ok(Self {
            terminate: caught(SignalKind::terminate())?,
            interrupt: caught(SignalKind::interrupt())?,
        })
    }

    /// Waits for one of them and names it.
    async fn received(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Raises the limit of open files as far as it goes.
fn raise_limit_of_files() {
    let old = getrlimit(Resource::Nofile);
    let highest = Rlimit { current: old.maximum, maximum: old.maximum };
    let raised = setrlimit(Resource::Nofile, highest).is_ok();
    debug!(raised, "limit of open files");
}
