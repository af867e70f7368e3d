//! The service SnapshotMetadata: which parts of a snapshot hold data, and in which parts two
//! snapshots of a volume differ. The engine compares the maps alone, so the cost depends on the
//! size of the differences, not on that of the volume.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use crate::adapter::Adapter;
use crate::controller::{signed, snapshots};
use crate::daemon::Extents;
use crate::proto::csi::snapshot_metadata_server::SnapshotMetadata;
use crate::proto::csi::{
    BlockMetadata, BlockMetadataType, GetMetadataAllocatedRequest, GetMetadataAllocatedResponse,
    GetMetadataDeltaRequest, GetMetadataDeltaResponse,
};
use crate::validate;

/// Maximum number of ranges in a message: about 64 KiB.
const RANGES_MAX: usize = 4096;
/// Messages that are buffered for a slow caller.
const WAITING_MAX: usize = 4;

/// The service.
pub(crate) struct MetadataService {
    adapter: Arc<Adapter>,
}

impl MetadataService {
    pub(crate) const fn new(adapter: Arc<Adapter>) -> Self {
        Self { adapter }
    }
}

/// The part of a snapshot that is requested, and the maximum number of ranges per message.
struct Window {
    start_bytes: u64,
    size_bytes: u64,
    ranges_max: usize,
}

impl Window {
    fn new(size_bytes: u64, starting_offset: i64, max_results: i32) -> Result<Self, Status> {
        let start = u64::try_from(starting_offset).ok().filter(|start| *start <= size_bytes);
        let start_bytes = start.ok_or_else(|| {
            Status::out_of_range(format!(
                "starting_offset = {starting_offset}: the snapshot has {size_bytes} bytes"
            ))
        })?;
        let ranges_max = match validate::not_negative("max_results", max_results)? {
            0 => RANGES_MAX,
            max => max.min(RANGES_MAX),
        };
        Ok(Self { start_bytes, size_bytes, ranges_max })
    }

    /// The part of an extent that is inside of the window. The last block of a volume can be longer
    /// than what remains of the volume.
    fn cut(&self, (offset, length): (u64, u64)) -> Option<BlockMetadata> {
        let start = offset.max(self.start_bytes);
        let end = offset.saturating_add(length).min(self.size_bytes);
        (start < end)
            .then(|| BlockMetadata { byte_offset: signed(start), size_bytes: signed(end - start) })
    }
}

/// Sends the ranges of `extents` in messages that `message` creates. At least one message is sent,
/// because it contains the size of the volume.
async fn send_ranges<T>(
    window: Window,
    mut extents: Extents,
    answers: mpsc::Sender<Result<T, Status>>,
    message: impl Fn(Vec<BlockMetadata>) -> T,
) {
    let mut ranges = Vec::new();
    let mut sent = false;
    loop {
        let runs = match extents.next().await {
            Ok(Some(runs)) => runs,
            Ok(None) => break,
            Err(error) => {
                // If the caller is gone the error has no receiver.
                return answers.send(Err(error)).await.unwrap_or_default();
            }
        };
        for run in runs {
            ranges.extend(window.cut(run));
            if ranges.len() == window.ranges_max {
                sent = true;
                if answers.send(Ok(message(std::mem::take(&mut ranges)))).await.is_err() {
                    return;
                }
            }
        }
    }
    if !sent || !ranges.is_empty() {
        answers.send(Ok(message(ranges))).await.unwrap_or_default();
    }
}

#[tonic::async_trait]
impl SnapshotMetadata for MetadataService {
    async fn get_metadata_allocated(
        &self,
        request: Request<GetMetadataAllocatedRequest>,
    ) -> Result<Response<BoxStream<GetMetadataAllocatedResponse>>, Status> {
        let request = request.into_inner();
        validate::required("snapshot_id", &request.snapshot_id)?;
        let pool = self.adapter.pool_id().await?;
        let snapshot = snapshots::existing(&self.adapter, &pool, &request.snapshot_id).await?;
        let window =
            Window::new(snapshot.size_bytes, request.starting_offset, request.max_results)?;
        let extents = self.adapter.daemon.extents(snapshot.id).await?;
        let (answers, stream) = mpsc::channel(WAITING_MAX);
        let capacity = signed(snapshot.size_bytes);
        tokio::spawn(send_ranges(window, extents, answers, move |block_metadata| {
            GetMetadataAllocatedResponse {
                block_metadata_type: BlockMetadataType::VariableLength.into(),
                volume_capacity_bytes: capacity,
                block_metadata,
            }
        }));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn get_metadata_delta(
        &self,
        request: Request<GetMetadataDeltaRequest>,
    ) -> Result<Response<BoxStream<GetMetadataDeltaResponse>>, Status> {
        let request = request.into_inner();
        validate::required("base_snapshot_id", &request.base_snapshot_id)?;
        validate::required("target_snapshot_id", &request.target_snapshot_id)?;
        let pool = self.adapter.pool_id().await?;
        let base = snapshots::existing(&self.adapter, &pool, &request.base_snapshot_id).await?;
        let target = snapshots::existing(&self.adapter, &pool, &request.target_snapshot_id).await?;
        // A newer snapshot has a higher number.
        if base.source_id != target.source_id || base.id > target.id {
            return Err(Status::invalid_argument(format!(
                "snapshot {} is not an older snapshot of the same volume as {}",
                base.name, target.name
            )));
        }
        let window = Window::new(target.size_bytes, request.starting_offset, request.max_results)?;
        let extents = self.adapter.daemon.changed(base.id, target.id).await?;
        let (answers, stream) = mpsc::channel(WAITING_MAX);
        let capacity = signed(target.size_bytes);
        tokio::spawn(send_ranges(window, extents, answers, move |block_metadata| {
            GetMetadataDeltaResponse {
                block_metadata_type: BlockMetadataType::VariableLength.into(),
                volume_capacity_bytes: capacity,
                block_metadata,
            }
        }));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_both_ends() {
        let window = Window::new(10_240, 4096, 0).unwrap();
        let cut = |run| window.cut(run).map(|range| (range.byte_offset, range.size_bytes));
        assert_eq!(cut((0, 4096)), None);
        assert_eq!(cut((0, 8192)), Some((4096, 4096)));
        assert_eq!(cut((8192, 4096)), Some((8192, 2048)));
        assert_eq!(cut((12_288, 4096)), None);
        assert_eq!(window.ranges_max, RANGES_MAX);
    }

    #[test]
    fn bounds_are_those_of_the_specification() {
        let code = |start, max| Window::new(8192, start, max).err().map(|error| error.code());
        assert_eq!(code(-1, 0), Some(tonic::Code::OutOfRange));
        assert_eq!(code(8193, 0), Some(tonic::Code::OutOfRange));
        assert_eq!(code(8192, 0), None, "a call may continue at the end");
        assert_eq!(code(0, -1), Some(tonic::Code::InvalidArgument));
        assert_eq!(Window::new(8192, 0, 3).unwrap().ranges_max, 3);
    }
}
