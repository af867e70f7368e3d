//! Health over HTTP, for kubelet's probes. Liveness is that of this process: kubelet answers its
//! end with a restart, which mends neither the daemon nor the pool, and would take the sidecars
//! along. Readiness is that of the pool.

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

/// Whether volumes can be served now.
///
/// # Errors
/// Why not: UNAVAILABLE when the daemon does not answer, as while it starts; FAILED_PRECONDITION
/// when its pool failed and needs a person.
async fn ready(adapter: &Adapter) -> Result<(), Status> {
    let pool = adapter.daemon.pool().await?;
    if pool.poisoned.is_empty() {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "pool {} accepts no change: {}; see to its device, then restart pandod",
        pool.path, pool.poisoned
    )))
}
