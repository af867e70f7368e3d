//! Start and stop of the adapter, and the handling of every call.
//!
//! A call that has begun runs to its end, even if its caller disconnects: CSI has no cancellation,
//! a repeated call must find the work done or not done, and a timeout of a sidecar must not leave a
//! file system half formatted.

use std::convert::Infallible;
use std::io::IsTerminal;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Waking, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::transport::Server;
use tonic::{Code, Status};
use tower::Service;
use tower::layer::layer_fn;
use tracing::{debug, info, warn};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::adapter::Adapter;
use crate::config::{Config, Log, LogFormat};
use crate::controller::ControllerService;
use crate::group::GroupService;
use crate::identity::IdentityService;
use crate::metadata::MetadataService;
use crate::node::{NodeService, freeze};
use crate::proto::csi::controller_server::{Controller, ControllerServer};
use crate::proto::csi::group_controller_server::{GroupController, GroupControllerServer};
use crate::proto::csi::identity_server::IdentityServer;
use crate::proto::csi::node_server::{Node, NodeServer};
use crate::proto::csi::snapshot_metadata_server::SnapshotMetadataServer;
use crate::proto::registration::registration_server::RegistrationServer;
use crate::registration::RegistrationService;
use crate::{health, listen};

/// Threads that handle calls. Long calls only wait for the daemon or for other programs.
const THREADS: usize = 2;
/// Concurrent calls on one connection; further calls wait.
const CALLS_MAX: u32 = 256;
/// Time for the calls under way to end when the adapter stops.
const DRAIN: Duration = Duration::from_secs(30);
/// Directives for libraries that would log every frame.
const QUIET: &str = "h2=warn,hyper=warn,tower=warn";

/// Parses `log.level`.
///
/// # Errors
/// It is not a filter; the message lists what is allowed.
pub(crate) fn filter(level: &str) -> Result<EnvFilter> {
    let allowed = "write error, warn, info, debug, trace or off, or a filter such as \
                   info,pando_csi=debug";
    // `EnvFilter` would take a word that is not a level for the name of the only module to log.
    let mut words = level.split(',').filter(|directive| !directive.contains(['=', '[']));
    if let Some(word) = words.find(|word| word.is_empty() || word.parse::<LevelFilter>().is_err()) {
        bail!("log.level = {level:?}: {word:?} is not a level; {allowed}");
    }
    EnvFilter::try_new(format!("{QUIET},{level}"))
        .with_context(|| format!("log.level = {level:?}; {allowed}"))
}

/// Starts logging for the life of the process.
///
/// # Errors
/// The level is not a filter, or logging was started before.
pub fn init_log(log: &Log) -> Result<()> {
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter(&log.level)?)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match log.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow!("logging: {error}"))
}

/// Runs the adapter until SIGTERM or SIGINT. `config` must have been validated.
///
/// # Errors
/// It cannot start, or one of its servers failed.
pub fn run(config: Config) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("csi")
        .enable_all()
        .build()
        .context("cannot start the threads")?;
    let ended = runtime.block_on(serve(config));
    // The remaining calls did not end in time; their callers can repeat them.
    runtime.shutdown_background();
    ended
}

/// The services of an adapter without the server around them, for the fuzz target `csi_requests`.
#[doc(hidden)]
pub struct Services {
    pub controller: Box<dyn Controller>,
    pub group: Box<dyn GroupController>,
    pub node: Box<dyn Node>,
}

impl Services {
    /// Makes the services. They connect to pandod when the first call needs it.
    ///
    /// # Errors
    /// The path of pandod's socket is invalid.
    pub fn new(config: Config) -> Result<Self> {
        let adapter = Arc::new(Adapter::new(config)?);
        Ok(Self {
            controller: Box::new(ControllerService::new(Arc::clone(&adapter))),
            group: Box::new(GroupService::new(Arc::clone(&adapter))),
            node: Box::new(NodeService::new(adapter)),
        })
    }
}

async fn serve(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("signal handler")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signal handler")?;
    let adapter = Arc::new(Adapter::new(config)?);
    let (stopping, stopped) = watch::channel(false);
    let mut csi = tokio::spawn(serve_csi(Arc::clone(&adapter), stopped.clone()));
    let mut registration = tokio::spawn(serve_registration(Arc::clone(&adapter), stopped));
    let thawing = Arc::clone(&adapter);
    tokio::spawn(async move { freeze::thaw_left_over(&thawing).await });
    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        ended = &mut csi => ended.context("the driver's socket")?,
        ended = &mut registration => ended.context("the registration's socket")?,
        ended = health::serve(adapter) => ended,
    };
    info!("pando-csi is stopping");
    // If no receiver is left there is nothing to stop, so the error is ignored.
    stopping.send(true).unwrap_or_default();
    if ended.is_ok() && tokio::time::timeout(DRAIN, csi).await.is_err() {
        warn!("calls aborted: they did not end in time");
    }
    registration.abort();
    ended
}

async fn serve_csi(adapter: Arc<Adapter>, stopped: watch::Receiver<bool>) -> Result<()> {
    let config = &adapter.config;
    let (peers, _socket) = listen::bind(&config.endpoint)?;
    info!(
        endpoint = %config.endpoint.display(),
        driver = config.driver_name,
        node = config.node_id,
        "pando-csi is ready"
    );
    Server::builder()
        .max_concurrent_streams(CALLS_MAX)
        .layer(layer_fn(Calls))
        .add_service(IdentityServer::new(IdentityService::new(Arc::clone(&adapter))))
        .add_service(ControllerServer::new(ControllerService::new(Arc::clone(&adapter))))
        .add_service(GroupControllerServer::new(GroupService::new(Arc::clone(&adapter))))
        .add_service(SnapshotMetadataServer::new(MetadataService::new(Arc::clone(&adapter))))
        .add_service(NodeServer::new(NodeService::new(Arc::clone(&adapter))))
        .serve_with_incoming_shutdown(peers, end(stopped))
        .await
        .context("the driver's socket")
}

async fn serve_registration(adapter: Arc<Adapter>, stopped: watch::Receiver<bool>) -> Result<()> {
    let Some(socket) = adapter.config.registration_socket() else {
        return std::future::pending().await;
    };
    let (peers, _socket) = listen::bind(&socket)?;
    Server::builder()
        .add_service(RegistrationServer::new(RegistrationService::new(adapter)))
        .serve_with_incoming_shutdown(peers, end(stopped))
        .await
        .context("the registration's socket")
}

async fn end(mut stopped: watch::Receiver<bool>) {
    stopped.wait_for(|stopped| *stopped).await.map(|_| ()).unwrap_or_default();
}

/// Wraps every call: it continues without its caller, and its result is logged.
#[derive(Clone)]
struct Calls<S>(S);

impl<S> Service<Request<Body>> for Calls<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, waking: &mut Waking<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(waking)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // `poll_ready` made this service ready, not its clone.
        let clone = self.0.clone();
        let mut ready = std::mem::replace(&mut self.0, clone);
        let call = tokio::spawn(async move {
            let path = request.uri().path().to_owned();
            let since = Instant::now();
            let response = ready.call(request).await;
            if let Ok(response) = &response {
                log_call(&path, since.elapsed(), response);
            }
            response
        });
        Box::pin(async move {
            call.await.unwrap_or_else(|error| {
                tracing::error!(%error, "a call panicked: this is a bug of pando-csi");
                Ok(Status::internal("a bug of pando-csi; its log has details").into_http())
            })
        })
    }
}

/// Logs the result of a call: name, time, code. Requests are not logged, they can contain secrets.
fn log_call(path: &str, took: Duration, response: &Response<Body>) {
    let call = path.rsplit('/').next().unwrap_or(path);
    let ms = took.as_millis();
    let error = Status::from_header_map(response.headers());
    match error.filter(|error| error.code() != Code::Ok) {
        None => debug!(call, ms, "call"),
        Some(error) => info!(call, ms, code = ?error.code(), error = error.message(), "call"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn a_call_continues_without_its_caller() {
        let (done, ended) = oneshot::channel();
        let done = Arc::new(parking_lot::Mutex::new(Some(done)));
        let slow = tower::service_fn(move |_: Request<Body>| {
            let done = Arc::clone(&done);
            async move {
                tokio::task::yield_now().await;
                done.lock().take().map(|done| done.send(())).transpose().unwrap();
                Ok::<_, Infallible>(Response::new(Body::empty()))
            }
        });
        drop(Calls(slow).call(Request::new(Body::empty())));
        ended.await.expect("the call did not run to its end");
    }

    #[tokio::test]
    async fn a_panic_is_answered_with_an_error() {
        let broken = tower::service_fn(|_: Request<Body>| async move {
            assert_eq!(1, 2, "a bug, on purpose");
            Ok::<_, Infallible>(Response::new(Body::empty()))
        });
        let response = Calls(broken).call(Request::new(Body::empty())).await.unwrap();
        let error = Status::from_header_map(response.headers()).unwrap();
        assert_eq!(error.code(), Code::Internal);
    }
}
