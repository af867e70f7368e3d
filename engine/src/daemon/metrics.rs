//! `/metrics` for Prometheus. Everything is read from the engine when it is asked for; nothing is
//! counted on the data path for its sake.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Registry, Unit};
use tokio::net::{TcpListener, UnixListener};
use tracing::{info, warn};

use crate::daemon::attach::Attachments;
use crate::daemon::config::MetricsAddress;
use crate::daemon::engine::Engine;
use crate::daemon::exports::Exports;
use crate::daemon::{listen, watch};
use crate::error::{Error, Result};
use crate::limits::LIST_PAGE_MAX;
use crate::pool::{PoolCounters, PoolStatus, VolumeInfo};
use crate::units::to_u64;

/// The media type of the text format.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What metrics are read from.
#[derive(Clone)]
pub(super) struct Sources {
    pub(super) engine: Arc<Engine>,
    pub(super) exports: Arc<Exports>,
    pub(super) attachments: Arc<Attachments>,
}

/// A listening socket of either kind.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, listen::SocketFile),
}

/// Listens at `address`.
///
/// # Errors
/// The address cannot be had.
pub(super) async fn bind(address: &MetricsAddress) -> Result<Listener> {
    match address {
        MetricsAddress::Unix(path) => {
            listen::bind(path).map(|(listener, file)| Listener::Unix(listener, file))
        }
        MetricsAddress::Tcp(address) => {
            if !address.ip().is_loopback() {
                warn!(%address, "metrics tell the names of volumes to the network");
            }
            let listener = TcpListener::bind(address).await;
            listener
                .map(Listener::Tcp)
                .map_err(|error| Error::io(format!("metrics on {address}"), error))
        }
    }
}

/// Serves `/metrics` until the task is dropped.
pub(super) async fn serve(listener: Listener, sources: Sources) {
    let router = Router::new().route("/metrics", get(answer)).with_state(sources);
    info!("metrics are served");
    let ended = match listener {
        Listener::Tcp(listener) => axum::serve(listener, router).await,
        Listener::Unix(listener, _file) => axum::serve(listener, router).await,
    };
    if let Err(error) = ended {
        warn!(%error, "metrics are no longer served");
    }
}

async fn answer(State(sources): State<Sources>) -> Response {
    match read(&sources).await {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
    }
}

async fn read(sources: &Sources) -> Result<String> {
    let values = sources.engine.control(|pool| async move {
        let (volumes, more) = pool.list(None, LIST_PAGE_MAX);
        Ok((pool.status(), pool.counters(), volumes, more.is_some()))
    });
    let (status, counters, volumes, more) = values.await?;
    let (exports, connections) = sources.exports.counts().await;
    let mut registry = Registry::with_prefix("pando");
    pool_gauges(&mut registry, &status);
    pool_counters(&mut registry, &counters);
    volume_gauges(&mut registry, &volumes, more);
    gauge(&mut registry, "exports", "Exports", to_u64(exports));
    gauge(&mut registry, "connections", "Connections of NBD clients", to_u64(connections));
    let attachments = to_u64(sources.attachments.list().len());
    gauge(&mut registry, "attachments", "Volumes that are block devices", attachments);
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|_| Error::invalid("metrics cannot be written"))?;
    Ok(text)
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    registry.register(name, help, ConstGauge::new(value));
}

fn gauge_bytes(registry: &mut Registry, name: &str, help: &str, value: u64) {
    registry.register_with_unit(name, help, Unit::Bytes, ConstGauge::new(value));
}

fn pool_gauges(registry: &mut Registry, status: &PoolStatus) {
    let r = registry;
    gauge_bytes(r, "pool_size", "Size of the pool", status.size_bytes);
    gauge_bytes(r, "pool_usable", "What can hold data or nodes", status.usable_bytes);
    gauge_bytes(r, "pool_free", "Free at once", status.free_bytes);
    gauge_bytes(r, "pool_pending", "Freed, on its way back", status.pending_bytes);
    gauge_bytes(r, "pool_reserve", "Kept back for upkeep and overwrites", status.reserve_bytes);
    gauge_bytes(r, "pool_provisioned", "Sum of the volumes' sizes", status.provisioned_bytes);
    gauge_bytes(
        r,
        "pool_reserved",
        "Promised to volumes and not yet theirs",
        status.reserved_bytes,
    );
    gauge_bytes(r, "pool_journal_used", "Journal in use", status.journal_used_bytes);
    gauge_bytes(r, "pool_journal", "Size of the journal", status.journal_bytes);
    gauge(r, "pool_volumes", "Volumes", status.volumes);
    gauge(r, "pool_snapshots", "Snapshots", status.snapshots);
    gauge(r, "pool_deletions_pending", "Deleted maps to be returned", status.deletions_pending);
    gauge(r, "pool_generation", "Last checkpoint", u64::from(status.generation));
    gauge(r, "pool_watermark_percent", "Highest watermark passed, or 0", watch::mark(status));
    gauge(r, "pool_poisoned", "1 if no change is accepted", u64::from(status.poisoned.is_some()));
}

fn pool_counters(registry: &mut Registry, counters: &PoolCounters) {
    let mut count = |name: &str, help: &str, value: u64| {
        registry.register(name, help, ConstCounter::new(value));
    };
    count("reads", "Reads of users", counters.reads);
    count("read_bytes", "Bytes read by users", counters.read_bytes);
    count("writes", "Writes of users", counters.writes);
    count("written_bytes", "Bytes written by users", counters.written_bytes);
    count("flushes", "Flushes of users", counters.flushes);
    count("device_data_bytes", "Bytes of data written to the device", counters.data_bytes);
    count("device_metadata_bytes", "Bytes of metadata written", counters.metadata_bytes);
    count("journal_bytes", "Bytes appended to the journal", counters.journal_bytes);
    count("device_syncs", "Syncs of the device", counters.syncs);
    count("checkpoints", "Checkpoints written", counters.checkpoints);
    count("no_space_errors", "Writes refused for lack of space", counters.no_space);
    count("checksum_errors", "Data blocks that did not match", counters.checksum_errors);
    count("metadata_reads", "Nodes and table pages read", counters.metadata_reads);
    let discarded = "Bytes of free blocks that the device was told to discard";
    count("discarded_bytes", discarded, counters.discarded_bytes);
}

/// Labels of the gauges of one volume.
type Labels = Vec<(&'static str, String)>;
/// A gauge with a value for each volume.
type VolumeGauge = Family<Labels, Gauge<u64, AtomicU64>>;

fn volume_gauges(registry: &mut Registry, volumes: &[VolumeInfo], more: bool) {
    let (size, mapped, own) =
        (VolumeGauge::default(), VolumeGauge::default(), VolumeGauge::default());
    for volume in volumes {
        let kind = if volume.snapshot { "snapshot" } else { "volume" };
        let labels: Labels = vec![("volume", volume.name.clone()), ("kind", kind.to_owned())];
        size.get_or_create(&labels).set(volume.size_bytes);
        mapped.get_or_create(&labels).set(volume.mapped_bytes);
        own.get_or_create(&labels).set(volume.own_bytes);
    }
    let mut family = |name: &str, help: &str, family| {
        registry.register_with_unit(name, help, Unit::Bytes, family);
    };
    family("volume_size", "Size of the volume", size);
    family("volume_mapped", "Mapped, shared or not", mapped);
    family("volume_own", "Its own for certain", own);
    gauge(
        registry,
        "volumes_omitted",
        "1 if there are more volumes than metrics are given for",
        u64::from(more),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{IoLimits, Source};
    use crate::units::VolumeId;

    fn text_of(fill: impl FnOnce(&mut Registry)) -> String {
        let mut registry = Registry::with_prefix("pando");
        fill(&mut registry);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn counters_and_gauges_have_their_customary_names() {
        let counters = PoolCounters { written_bytes: 42, ..PoolCounters::default() };
        let text = text_of(|registry| pool_counters(registry, &counters));
        assert!(text.contains("\npando_written_bytes_total 42\n"), "{text}");
        assert!(text.contains("# TYPE pando_checksum_errors counter\n"), "{text}");
    }

    #[test]
    fn volumes_are_labels() {
        let volume = VolumeInfo {
            id: VolumeId::new(7),
            name: "db".to_owned(),
            size_bytes: 1 << 30,
            snapshot: true,
            read_only: false,
            source: Source::Empty,
            reservation_bytes: 0,
            growth_limit_bytes: 0,
            io_limits: IoLimits::default(),
            labels: std::collections::BTreeMap::new(),
            created_at: 0,
            mapped_bytes: 4096,
            own_bytes: 0,
        };
        let text = text_of(|registry| volume_gauges(registry, &[volume], true));
        let line = "pando_volume_size_bytes{volume=\"db\",kind=\"snapshot\"} 1073741824\n";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("\npando_volumes_omitted 1\n"), "{text}");
    }
}
