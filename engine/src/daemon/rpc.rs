//! The service `pando.v1.Pando`: each call becomes work on a shard. Long calls are in
//! [`super::stream`].

use std::sync::Arc;

use pando_proto::v1::pando_server::Pando;
use pando_proto::v1::{
    AttachVolumeRequest, AttachVolumeResponse, CreateVolumeRequest, CreateVolumeResponse,
    CreateVolumesRequest, CreateVolumesResponse, DeleteVolumeRequest, DeleteVolumeResponse,
    DetachVolumeRequest, DetachVolumeResponse, DiffVolumesRequest, DiffVolumesResponse, ExportKind,
    GetVolumeRequest, GetVolumeResponse, ListAttachmentsRequest, ListAttachmentsResponse,
    ListExportsRequest, ListExportsResponse, ListExtentsRequest, ListExtentsResponse,
    ListVolumesRequest, ListVolumesResponse, ModifyVolumeRequest, ModifyVolumeResponse,
    PoolCheckRequest, PoolCheckResponse, PoolDumpRequest, PoolDumpResponse, PoolGrowRequest,
    PoolGrowResponse, PoolScrubRequest, PoolScrubResponse, PoolStatusRequest, PoolStatusResponse,
    ReadVolumeRequest, ReadVolumeResponse, StartExportRequest, StartExportResponse,
    StopExportRequest, StopExportResponse, Volume, VolumeKind, VolumeRef, WriteVolumeRequest,
    WriteVolumeResponse,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::info;

use crate::daemon::attach::{Attachments, Wish, to_the_end};
use crate::daemon::engine::Engine;
use crate::daemon::exports::Exports;
use crate::daemon::{content, convert, stream, temporary};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{GROUP_MAX, LIST_PAGE_MAX};
use crate::pool::{DumpForm, Pool, Source, VolumeInfo};
use crate::units::{VolumeId, to_usize};

/// Volumes that one step of a list looks at, at least: a filter may let few of them pass.
const LIST_STEP: usize = 128;

/// Answer to a call.
type Answer<T> = std::result::Result<Response<T>, Status>;
/// Answers of a call that streams.
pub(super) type Answers<T> = ReceiverStream<std::result::Result<T, Status>>;

/// The service.
pub(super) struct Service {
    engine: Arc<Engine>,
    exports: Arc<Exports>,
    attachments: Arc<Attachments>,
}

impl Service {
    /// Over the open pool, its exports and block devices.
    pub(super) const fn new(
        engine: Arc<Engine>,
        exports: Arc<Exports>,
        attachments: Arc<Attachments>,
    ) -> Self {
        Self { engine, exports, attachments }
    }

    /// The volume that a request names.
    async fn resolve(&self, reference: Option<VolumeRef>) -> Result<VolumeInfo> {
        self.engine.control(|pool| async move { convert::resolve(&pool, reference) }).await
    }

    async fn create(&self, requests: Vec<CreateVolumeRequest>) -> Result<Vec<Volume>> {
        if requests.is_empty() || requests.len() > GROUP_MAX {
            return Err(Error::invalid(format!(
                "{} volumes in one request: 1 to {GROUP_MAX} are possible",
                requests.len()
            )));
        }
        let made = self.engine.control(|pool| async move {
            let requests: Result<Vec<_>> = requests
                .into_iter()
                .map(|request| convert::create_request(&pool, request))
                .collect();
            let mut requests = requests?;
            let made = if requests.len() == 1 {
                vec![pool.create(requests.remove(0)).await?]
            } else {
                pool.create_group(requests).await?
            };
            Ok(made.into_iter().map(|info| convert::volume(&pool, info)).collect::<Vec<_>>())
        });
        let made = made.await?;
        for volume in &made {
            info!(volume = volume.name, id = volume.id, source = volume.source_id, "volume made");
        }
        Ok(made)
    }

    async fn pool(&self) -> Result<pando_proto::v1::Pool> {
        let status = self.engine.control(|pool| async move { Ok(pool.status()) }).await?;
        Ok(convert::pool(status, self.engine.path().display().to_string()))
    }
}

#[tonic::async_trait]
impl Pando for Service {
    type PoolCheckStream = Answers<PoolCheckResponse>;
    type PoolScrubStream = Answers<PoolScrubResponse>;
    type PoolDumpStream = Answers<PoolDumpResponse>;
    type ListExtentsStream = Answers<ListExtentsResponse>;
    type DiffVolumesStream = Answers<DiffVolumesResponse>;
    type ReadVolumeStream = Answers<ReadVolumeResponse>;

    async fn pool_status(
        &self,
        _request: Request<PoolStatusRequest>,
    ) -> Answer<PoolStatusResponse> {
        let counters = self.engine.control(|pool| async move { Ok(pool.counters()) }).await?;
        Ok(Response::new(PoolStatusResponse {
            pool: Some(self.pool().await?),
            counters: Some(convert::counters(&counters)),
            daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    async fn pool_grow(&self, request: Request<PoolGrowRequest>) -> Answer<PoolGrowResponse> {
        let size_bytes = match request.into_inner().size_bytes {
            0 => self.engine.device_len_bytes()?,
            size_bytes => size_bytes,
        };
        self.engine.control(move |pool| async move { pool.grow(size_bytes).await }).await?;
        info!(size_bytes, "pool grown");
        Ok(Response::new(PoolGrowResponse { pool: Some(self.pool().await?) }))
    }

    async fn pool_check(
        &self,
        _request: Request<PoolCheckRequest>,
    ) -> Answer<Self::PoolCheckStream> {
        Ok(Response::new(stream::check(Arc::clone(&self.engine))))
    }

    async fn pool_scrub(
        &self,
        request: Request<PoolScrubRequest>,
    ) -> Answer<Self::PoolScrubStream> {
        let rate_bytes = request.into_inner().rate_bytes;
        Ok(Response::new(stream::scrub(Arc::clone(&self.engine), rate_bytes)))
    }

    async fn pool_dump(&self, request: Request<PoolDumpRequest>) -> Answer<Self::PoolDumpStream> {
        let form = if request.into_inner().json { DumpForm::Json } else { DumpForm::Text };
        Ok(Response::new(stream::dump(Arc::clone(&self.engine), form)))
    }

    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Answer<CreateVolumeResponse> {
        let volume = self.create(vec![request.into_inner()]).await?.pop();
        Ok(Response::new(CreateVolumeResponse { volume }))
    }

    async fn create_volumes(
        &self,
        request: Request<CreateVolumesRequest>,
    ) -> Answer<CreateVolumesResponse> {
        let volumes = self.create(request.into_inner().volumes).await?;
        Ok(Response::new(CreateVolumesResponse { volumes }))
    }

    async fn get_volume(&self, request: Request<GetVolumeRequest>) -> Answer<GetVolumeResponse> {
        let request = request.into_inner();
        let found = self.engine.control(move |pool| async move {
            let info = convert::resolve(&pool, request.volume)?;
            let space = match request.with_space {
                true => Some(convert::space(&pool.space(info.id).await?)),
                false => None,
            };
            Ok((info.id, convert::volume(&pool, info), space))
        });
        let (id, volume, space) = found.await?;
        let exports = self.exports.list(Some(id)).await;
        Ok(Response::new(GetVolumeResponse {
            volume: Some(volume),
            space,
            exports,
            attachment: self.attachments.of(id),
        }))
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Answer<ListVolumesResponse> {
        Ok(Response::new(list(&self.engine, request.into_inner()).await?))
    }

    async fn modify_volume(
        &self,
        request: Request<ModifyVolumeRequest>,
    ) -> Answer<ModifyVolumeResponse> {
        let mut request = request.into_inner();
        let info = self.resolve(request.volume.take()).await?;
        let (id, size_bytes) = (info.id, request.size_bytes);
        let engine = Arc::clone(&self.engine);
        let modify = async move {
            let modified = engine.control(move |pool| async move {
                let change = convert::modify_request(&pool.get(id)?, request);
                let info = pool.modify(id, change).await?;
                Ok(convert::volume(&pool, info))
            });
            modified.await
        };
        // Asked for the size that it has, the device is asked for it again: it may have failed to
        // grow the last time.
        let volume = match size_bytes {
            Some(size_bytes) if size_bytes >= info.size_bytes => {
                self.attachments.grow(id, size_bytes, modify).await?
            }
            _ => modify.await?,
        };
        info!(
            volume = volume.name,
            id = volume.id,
            size_bytes = volume.size_bytes,
            "volume changed"
        );
        Ok(Response::new(ModifyVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Answer<DeleteVolumeResponse> {
        let info = self.resolve(request.into_inner().volume).await?;
        let id = info.id;
        // Held until the volume is gone, so that no export of it starts meanwhile.
        let _claim = self.exports.claim(id, &info.name).await?;
        let deleted = self.engine.control(move |pool| async move {
            let volume = convert::volume(&pool, pool.get(id)?);
            pool.delete(id).await?;
            Ok(volume)
        });
        let volume = deleted.await?;
        info!(volume = volume.name, id = id.get(), "volume deleted");
        Ok(Response::new(DeleteVolumeResponse { volume: Some(volume) }))
    }

    async fn list_extents(
        &self,
        request: Request<ListExtentsRequest>,
    ) -> Answer<Self::ListExtentsStream> {
        let id = self.resolve(request.into_inner().volume).await?.id;
        let engine = Arc::clone(&self.engine);
        Ok(Response::new(stream::changed(engine, None, id, |runs| ListExtentsResponse {
            extents: runs.iter().filter(|run| run.mapped).map(convert::extent).collect(),
        })))
    }

    async fn diff_volumes(
        &self,
        request: Request<DiffVolumesRequest>,
    ) -> Answer<Self::DiffVolumesStream> {
        let request = request.into_inner();
        let base = self.resolve(request.base).await?.id;
        let id = self.resolve(request.volume).await?.id;
        let engine = Arc::clone(&self.engine);
        Ok(Response::new(stream::changed(engine, Some(base), id, |runs| DiffVolumesResponse {
            extents: runs.iter().map(convert::changed_extent).collect(),
        })))
    }

    async fn read_volume(
        &self,
        request: Request<ReadVolumeRequest>,
    ) -> Answer<Self::ReadVolumeStream> {
        let request = request.into_inner();
        let info = self.resolve(request.volume.clone()).await?;
        let (engine, exports) = (Arc::clone(&self.engine), Arc::clone(&self.exports));
        Ok(Response::new(content::read(engine, exports, info, &request)?))
    }

    async fn write_volume(
        &self,
        request: Request<Streaming<WriteVolumeRequest>>,
    ) -> Answer<WriteVolumeResponse> {
        let mut pieces = request.into_inner();
        let Some(first) = pieces.message().await? else {
            return Err(
                Error::invalid("the stream is empty: the first message names the volume").into()
            );
        };
        let info = self.resolve(first.volume.clone()).await?;
        let claim = self.exports.claim(info.id, &info.name).await?;
        let engine = Arc::clone(&self.engine);
        // Also if the client goes away: a temporary volume that is not whole is deleted.
        let written = to_the_end(async move {
            let written = content::write(&engine, &info, first, pieces).await;
            if written.is_err() && temporary::is_temporary(&info) {
                temporary::delete(&engine, &info, &claim).await;
            }
            Ok(written)
        });
        Ok(Response::new(written.await??))
    }

    async fn start_export(
        &self,
        request: Request<StartExportRequest>,
    ) -> Answer<StartExportResponse> {
        let request = request.into_inner();
        if ExportKind::try_from(request.kind).is_err() {
            let what = format!("kind {} of exports is unknown to this pandod", request.kind);
            return Err(Error::new(ErrorKind::Unsupported, what).into());
        }
        let info = self.resolve(request.volume).await?;
        let export = self.exports.start(&info, request.read_only).await?;
        Ok(Response::new(StartExportResponse { export: Some(export) }))
    }

    async fn stop_export(&self, request: Request<StopExportRequest>) -> Answer<StopExportResponse> {
        let info = self.resolve(request.into_inner().volume).await?;
        let export = self.exports.stop(info.id, &info.name).await?;
        Ok(Response::new(StopExportResponse { export: Some(export) }))
    }

    async fn list_exports(
        &self,
        _request: Request<ListExportsRequest>,
    ) -> Answer<ListExportsResponse> {
        Ok(Response::new(ListExportsResponse { exports: self.exports.list(None).await }))
    }

    async fn attach_volume(
        &self,
        request: Request<AttachVolumeRequest>,
    ) -> Answer<AttachVolumeResponse> {
        let request = request.into_inner();
        let wish = Wish::from_request(&request)?;
        let id = self.resolve(request.volume).await?.id;
        let attachment = self.attachments.attach(id, wish).await?;
        Ok(Response::new(AttachVolumeResponse { attachment: Some(attachment) }))
    }

    async fn detach_volume(
        &self,
        request: Request<DetachVolumeRequest>,
    ) -> Answer<DetachVolumeResponse> {
        let id = self.resolve(request.into_inner().volume).await?.id;
        let attachment = self.attachments.detach(id).await?;
        Ok(Response::new(DetachVolumeResponse { attachment }))
    }

    async fn list_attachments(
        &self,
        _request: Request<ListAttachmentsRequest>,
    ) -> Answer<ListAttachmentsResponse> {
        Ok(Response::new(ListAttachmentsResponse { attachments: self.attachments.list() }))
    }
}

/// What a list is about.
struct Filter {
    prefix: String,
    labels: std::collections::BTreeMap<String, String>,
    source: Option<VolumeId>,
    kind: VolumeKind,
}

impl Filter {
    fn matches(&self, info: &VolumeInfo) -> bool {
        info.name.starts_with(&self.prefix)
            && self.labels.iter().all(|(key, value)| info.labels.get(key) == Some(value))
            && self.source.is_none_or(|id| info.source == Source::Volume(id))
            && match self.kind {
                VolumeKind::Unspecified => true,
                VolumeKind::Volume => !info.snapshot,
                VolumeKind::Snapshot => info.snapshot,
            }
    }
}

/// The source to filter by. An id needs not exist any more: its clones still name it.
fn source_filter(pool: &Pool, source: Option<VolumeRef>) -> Result<Option<VolumeId>> {
    use pando_proto::v1::volume_ref::By;
    match source {
        None => Ok(None),
        Some(VolumeRef { by: Some(By::Id(id)) }) => Ok(Some(VolumeId::new(id))),
        some => convert::resolve(pool, some).map(|info| Some(info.id)),
    }
}

/// One page of a list. The names are walked in steps, each a turn of the shard of its own, so
/// that a filter which matches little does not hold up the shard's I/O.
async fn list(engine: &Engine, request: ListVolumesRequest) -> Result<ListVolumesResponse> {
    let kind = VolumeKind::try_from(request.kind).map_err(|_| {
        Error::new(ErrorKind::Invalid, format!("kind {} of volumes is unknown", request.kind))
    })?;
    let source = request.source;
    let source = engine.control(|pool| async move { source_filter(&pool, source) }).await?;
    let filter =
        Arc::new(Filter { prefix: request.name_prefix, labels: request.labels, source, kind });
    let wanted = match to_usize(u64::from(request.page_size)) {
        0 => LIST_PAGE_MAX,
        size => size.min(LIST_PAGE_MAX),
    };
    let mut after = Some(request.page_token).filter(|token| !token.is_empty());
    let mut volumes = Vec::new();
    loop {
        let filter = Arc::clone(&filter);
        let step = wanted.max(LIST_STEP);
        let from = after.take();
        let page = engine.control(move |pool| async move {
            let (infos, next) = pool.list(from.as_deref(), step);
            let found: Vec<Volume> = infos
                .into_iter()
                .filter(|info| filter.matches(info))
                .map(|info| convert::volume(&pool, info))
                .collect();
            Ok((found, next))
        });
        let (found, next) = page.await?;
        volumes.extend(found);
        if volumes.len() > wanted || (volumes.len() == wanted && next.is_some()) {
            volumes.truncate(wanted);
            // A token is the name to go on behind.
            let next_page_token = volumes.last().map(|last| last.name.clone()).unwrap_or_default();
            return Ok(ListVolumesResponse { volumes, next_page_token });
        }
        if next.is_none() {
            return Ok(ListVolumesResponse { volumes, next_page_token: String::new() });
        }
        after = next;
    }
}
