//! A daemon in memory: a catalogue and nothing else. It panics on requests that make no sense,
//! because the adapter must never send one, whatever request it received.

use std::collections::BTreeMap;
use std::sync::Arc;

use pando_proto::v1::pando_server::Pando;
use pando_proto::v1::volume_ref::By;
use pando_proto::{ERROR_KIND_KEY, v1};
use parking_lot::Mutex;
use tokio_stream::Empty;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status, Streaming};

/// Bytes of the pool.
const POOL_BYTES: u64 = 1 << 40;

/// The volumes of the daemon.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Catalogue {
    pub(super) volumes: BTreeMap<u64, v1::Volume>,
    next: u64,
}

/// The daemon. Clones share its state.
#[derive(Clone, Default)]
pub(super) struct FakeDaemon(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    catalogue: Catalogue,
    /// The failure to inject: calls before it, kind and code.
    failure: Option<(u8, &'static str, Code)>,
    /// Failures injected so far.
    failed: u64,
}

type Answer<T> = Result<Response<T>, Status>;

fn error(kind: &'static str, code: Code, message: &str) -> Status {
    let mut status = Status::new(code, message);
    status.metadata_mut().insert(ERROR_KIND_KEY, MetadataValue::from_static(kind));
    status
}

impl FakeDaemon {
    /// An empty pool.
    pub(super) fn reset(&self) {
        *self.0.lock() = State::default();
    }

    pub(super) fn catalogue(&self) -> Catalogue {
        self.0.lock().catalogue.clone()
    }

    /// Lets one call fail with a kind and a code, after the given number of calls that succeed.
    pub(super) fn fail(&self, failure: Option<(u8, &'static str, Code)>) {
        self.0.lock().failure = failure;
    }

    /// The number of failures injected so far.
    pub(super) fn failed(&self) -> u64 {
        self.0.lock().failed
    }

    fn call<T>(&self, work: impl FnOnce(&mut Catalogue) -> Result<T, Status>) -> Answer<T> {
        let mut state = self.0.lock();
        match state.failure.take() {
            Some((0, kind, code)) => {
                state.failed += 1;
                return Err(error(kind, code, "an injected failure"));
            }
            Some((after, kind, code)) => state.failure = Some((after - 1, kind, code)),
            None => {}
        }
        work(&mut state.catalogue).map(Response::new)
    }
}

/// Checks the rules for names, which exclude paths.
fn check_name(name: &str) {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    assert!(name.starts_with("csi-") && name.len() <= 253 && name.chars().all(good), "{name:?}");
}

fn check_labels(labels: &BTreeMap<String, String>) {
    let fit = |(key, value): (&String, &String)| !key.is_empty() && key.len() + value.len() <= 512;
    assert!(labels.len() <= 32 && labels.iter().all(fit), "{labels:?}");
}

impl Catalogue {
    fn find(&self, volume: Option<v1::VolumeRef>) -> Result<&v1::Volume, Status> {
        let found = match volume.and_then(|volume| volume.by).expect("the request names a volume") {
            By::Id(id) => self.volumes.get(&id),
            By::Name(name) => {
                check_name(&name);
                self.volumes.values().find(|volume| volume.name == name)
            }
        };
        found.ok_or_else(|| error("not_found", Code::NotFound, "no such volume"))
    }

    fn create(&mut self, request: v1::CreateVolumeRequest) -> Result<v1::Volume, Status> {
        check_name(&request.name);
        check_labels(&request.labels);
        let source = match request.source {
            None => None,
            some => Some(self.find(some)?.clone()),
        };
        let size_bytes = request.size_bytes.or(source.as_ref().map(|source| source.size_bytes));
        let size_bytes = size_bytes.expect("a volume has a size or a source");
        assert!(size_bytes.is_multiple_of(512) && (4096..=64 << 40).contains(&size_bytes));
        assert!(!request.snapshot || source.is_some(), "a snapshot has a source");
        let source_id = source.map(|source| source.id);
        if let Some(old) = self.volumes.values().find(|volume| volume.name == request.name) {
            let same = old.source_id == source_id && old.snapshot == request.snapshot;
            return match same && !request.must_be_new {
                true => Ok(old.clone()),
                false => Err(error("exists", Code::AlreadyExists, "the name is taken")),
            };
        }
        self.next += 1;
        let volume = v1::Volume {
            id: self.next,
            name: request.name,
            size_bytes,
            snapshot: request.snapshot,
            read_only: request.snapshot,
            source_id,
            reservation_bytes: request.reservation_bytes,
            growth_limit_bytes: request.growth_limit_bytes,
            labels: request.labels,
            created_at: 1_700_000_000,
            iops_limit: request.iops_limit,
            bandwidth_limit_bytes: request.bandwidth_limit_bytes,
            ..v1::Volume::default()
        };
        self.volumes.insert(volume.id, volume.clone());
        Ok(volume)
    }

    fn modify(&mut self, request: v1::ModifyVolumeRequest) -> Result<v1::Volume, Status> {
        check_labels(&request.labels);
        let id = self.find(request.volume)?.id;
        let volume = self.volumes.get_mut(&id).expect("just found");
        if let Some(size_bytes) = request.size_bytes {
            if size_bytes < volume.size_bytes || !size_bytes.is_multiple_of(512) {
                return Err(error("invalid", Code::InvalidArgument, "not that size"));
            }
            volume.size_bytes = size_bytes;
        }
        volume.reservation_bytes = request.reservation_bytes.unwrap_or(volume.reservation_bytes);
        volume.growth_limit_bytes = request.growth_limit_bytes.unwrap_or(volume.growth_limit_bytes);
        volume.iops_limit = request.iops_limit.unwrap_or(volume.iops_limit);
        let bandwidth = request.bandwidth_limit_bytes;
        volume.bandwidth_limit_bytes = bandwidth.unwrap_or(volume.bandwidth_limit_bytes);
        Ok(volume.clone())
    }

    fn list(&self, request: &v1::ListVolumesRequest) -> Result<v1::ListVolumesResponse, Status> {
        assert!(request.page_size <= 1000 && request.name_prefix.starts_with("csi-"));
        let source = match request.source.as_ref().and_then(|source| source.by.as_ref()) {
            Some(By::Id(id)) => Some(*id),
            _ => None,
        };
        let kind = v1::VolumeKind::try_from(request.kind).expect("a kind");
        let mut all: Vec<v1::Volume> = self
            .volumes
            .values()
            .filter(|volume| {
                volume.name.starts_with(&request.name_prefix)
                    && volume.name > request.page_token
                    && request
                        .labels
                        .iter()
                        .all(|(key, value)| volume.labels.get(key) == Some(value))
                    && (source.is_none() || volume.source_id == source)
                    && match kind {
                        v1::VolumeKind::Unspecified => true,
                        v1::VolumeKind::Volume => !volume.snapshot,
                        v1::VolumeKind::Snapshot => volume.snapshot,
                    }
            })
            .cloned()
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        let page = usize::try_from(request.page_size).expect("small");
        let more = page > 0 && all.len() > page;
        if more {
            all.truncate(page);
        }
        let next_page_token = all.last().filter(|_| more).map(|last| last.name.clone());
        let next_page_token = next_page_token.unwrap_or_default();
        Ok(v1::ListVolumesResponse { volumes: all, next_page_token })
    }
}

type NoStream<T> = Empty<Result<T, Status>>;

#[tonic::async_trait]
impl Pando for FakeDaemon {
    type PoolCheckStream = NoStream<v1::PoolCheckResponse>;
    type PoolScrubStream = NoStream<v1::PoolScrubResponse>;
    type PoolDumpStream = NoStream<v1::PoolDumpResponse>;
    type ListExtentsStream = NoStream<v1::ListExtentsResponse>;
    type DiffVolumesStream = NoStream<v1::DiffVolumesResponse>;
    type ReadVolumeStream = NoStream<v1::ReadVolumeResponse>;

    async fn pool_status(
        &self,
        _: Request<v1::PoolStatusRequest>,
    ) -> Answer<v1::PoolStatusResponse> {
        self.call(|catalogue| {
            let provisioned_bytes = catalogue
                .volumes
                .values()
                .fold(0, |sum: u64, volume| sum.saturating_add(volume.size_bytes));
            let pool = v1::Pool {
                uuid: "0f3c0000-1111-2222-3333-4444555566e1".into(),
                size_bytes: POOL_BYTES,
                usable_bytes: POOL_BYTES,
                free_bytes: POOL_BYTES / 2,
                provisioned_bytes,
                available_bytes: POOL_BYTES / 2,
                ..v1::Pool::default()
            };
            Ok(v1::PoolStatusResponse { pool: Some(pool), ..v1::PoolStatusResponse::default() })
        })
    }

    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Answer<v1::CreateVolumeResponse> {
        self.call(|catalogue| {
            let volume = Some(catalogue.create(request.into_inner())?);
            Ok(v1::CreateVolumeResponse { volume })
        })
    }

    async fn create_volumes(
        &self,
        request: Request<v1::CreateVolumesRequest>,
    ) -> Answer<v1::CreateVolumesResponse> {
        self.call(|catalogue| {
            let requests = request.into_inner().volumes;
            assert!((1..=64).contains(&requests.len()));
            let volumes: Result<_, _> =
                requests.into_iter().map(|request| catalogue.create(request)).collect();
            Ok(v1::CreateVolumesResponse { volumes: volumes? })
        })
    }

    async fn get_volume(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Answer<v1::GetVolumeResponse> {
        self.call(|catalogue| {
            let volume = Some(catalogue.find(request.into_inner().volume)?.clone());
            Ok(v1::GetVolumeResponse { volume, ..v1::GetVolumeResponse::default() })
        })
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Answer<v1::ListVolumesResponse> {
        self.call(|catalogue| catalogue.list(&request.into_inner()))
    }

    async fn modify_volume(
        &self,
        request: Request<v1::ModifyVolumeRequest>,
    ) -> Answer<v1::ModifyVolumeResponse> {
        self.call(|catalogue| {
            let volume = Some(catalogue.modify(request.into_inner())?);
            Ok(v1::ModifyVolumeResponse { volume })
        })
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Answer<v1::DeleteVolumeResponse> {
        self.call(|catalogue| {
            let id = catalogue.find(request.into_inner().volume)?.id;
            catalogue.volumes.remove(&id);
            Ok(v1::DeleteVolumeResponse::default())
        })
    }

    async fn list_extents(
        &self,
        request: Request<v1::ListExtentsRequest>,
    ) -> Answer<Self::ListExtentsStream> {
        self.call(|catalogue| {
            catalogue.find(request.into_inner().volume)?;
            Ok(tokio_stream::empty())
        })
    }

    async fn diff_volumes(
        &self,
        request: Request<v1::DiffVolumesRequest>,
    ) -> Answer<Self::DiffVolumesStream> {
        self.call(|catalogue| {
            let request = request.into_inner();
            catalogue.find(request.base)?;
            catalogue.find(request.volume)?;
            Ok(tokio_stream::empty())
        })
    }

    /// Always fails, so that nothing is ever mounted.
    async fn attach_volume(
        &self,
        request: Request<v1::AttachVolumeRequest>,
    ) -> Answer<v1::AttachVolumeResponse> {
        self.call(|catalogue| {
            catalogue.find(request.into_inner().volume)?;
            Err(error("unsupported", Code::Unimplemented, "no devices here"))
        })
    }

    async fn detach_volume(
        &self,
        request: Request<v1::DetachVolumeRequest>,
    ) -> Answer<v1::DetachVolumeResponse> {
        self.call(|catalogue| {
            catalogue.find(request.into_inner().volume)?;
            Ok(v1::DetachVolumeResponse::default())
        })
    }

    async fn list_attachments(
        &self,
        _: Request<v1::ListAttachmentsRequest>,
    ) -> Answer<v1::ListAttachmentsResponse> {
        self.call(|_| Ok(v1::ListAttachmentsResponse::default()))
    }

    // The adapter never makes these calls.

    async fn pool_grow(&self, _: Request<v1::PoolGrowRequest>) -> Answer<v1::PoolGrowResponse> {
        panic!("the adapter calls pool_grow")
    }

    async fn pool_check(&self, _: Request<v1::PoolCheckRequest>) -> Answer<Self::PoolCheckStream> {
        panic!("the adapter calls pool_check")
    }

    async fn pool_scrub(&self, _: Request<v1::PoolScrubRequest>) -> Answer<Self::PoolScrubStream> {
        panic!("the adapter calls pool_scrub")
    }

    async fn pool_dump(&self, _: Request<v1::PoolDumpRequest>) -> Answer<Self::PoolDumpStream> {
        panic!("the adapter calls pool_dump")
    }

    async fn read_volume(
        &self,
        _: Request<v1::ReadVolumeRequest>,
    ) -> Answer<Self::ReadVolumeStream> {
        panic!("the adapter calls read_volume")
    }

    async fn write_volume(
        &self,
        _: Request<Streaming<v1::WriteVolumeRequest>>,
    ) -> Answer<v1::WriteVolumeResponse> {
        panic!("the adapter calls write_volume")
    }

    async fn start_export(
        &self,
        _: Request<v1::StartExportRequest>,
    ) -> Answer<v1::StartExportResponse> {
        panic!("the adapter calls start_export")
    }

    async fn stop_export(
        &self,
        _: Request<v1::StopExportRequest>,
    ) -> Answer<v1::StopExportResponse> {
        panic!("the adapter calls stop_export")
    }

    async fn list_exports(
        &self,
        _: Request<v1::ListExportsRequest>,
    ) -> Answer<v1::ListExportsResponse> {
        panic!("the adapter calls list_exports")
    }
}
