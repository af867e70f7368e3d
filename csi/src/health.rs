//! Health over HTTP, for kubelet's liveness probe: what Probe says, without a sidecar that calls
//! it.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;

use crate::adapter::Adapter;
use crate::identity;

/// Serves `/healthz` on the configured address, if there is one, until dropped.
///
/// # Errors
/// The address cannot be listened on.
pub(crate) async fn serve(adapter: Arc<Adapter>) -> Result<()> {
    let Some(address) = adapter.config.health_address else {
        return std::future::pending().await;
    };
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("health_address {address}"))?;
    let answer = get(move || async move {
        match identity::ready(&adapter).await {
            Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
            Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", error.message())),
        }
    });
    axum::serve(listener, Router::new().route("/healthz", answer)).await.context("health")
}
