//! Health over HTTP, for kubelet's probes. Liveness reports this process alone: kubelet restarts a
//! container whose liveness fails, and a restart would repair neither the daemon nor the pool, but
//! interrupt the sidecars. Readiness reports the pool.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tonic::Status;

use crate::adapter::Adapter;

/// Serves `/healthz` and `/readyz` on the configured address, if there is one, until dropped.
///
/// # Errors
/// The address cannot be listened on.
pub(crate) async fn serve(adapter: Arc<Adapter>) -> Result<()> {
    let Some(address) = adapter.config.health_address else {
        return std::future::pending().await;
    };
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("health_address {address}"))?;
    let readiness = move || async move {
        match ready(&adapter).await {
            Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
            Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", error.message())),
        }
    };
    let router =
        Router::new().route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(readiness));
    axum::serve(listener, router).await.context("health")
}

/// Checks that volumes can be served now.
///
/// # Errors
/// UNAVAILABLE: the daemon does not answer, for example while it starts; FAILED_PRECONDITION: its
/// pool has failed and needs an operator.
async fn ready(adapter: &Adapter) -> Result<(), Status> {
    let pool = adapter.daemon.pool().await?;
    if pool.poisoned.is_empty() {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "pool {} accepts no change: {}; check its device, then restart pandod",
        pool.path, pool.poisoned
    )))
}
