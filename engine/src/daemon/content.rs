//! The content of volumes over the API: what export and import are made of.

use std::ops::Range;
use std::sync::Arc;

use pando_proto::v1::{
    ReadVolumeRequest, ReadVolumeResponse, WriteVolumeRequest, WriteVolumeResponse,
    read_volume_response, write_volume_request,
};
use tonic::{Status, Streaming};

use crate::daemon::engine::Engine;
use crate::daemon::exports::Exports;
use crate::daemon::rpc::Answers;
use crate::daemon::stream::{answers, send};
use crate::daemon::temporary::Frozen;
use crate::device::{MappedRun, ZeroFlags, check_range};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::{ModifyVolume, VolumeInfo};
use crate::runtime::Buf;
use crate::units::{BLOCK_BYTES, Size, VolumeId, blocks_for, to_u32, to_u64, to_usize};

/// Bytes of data in one message.
const PIECE_BYTES: u64 = 1 << 20;
/// Runs asked for at once.
const RUNS_MAX: usize = 1024;

/// The content of the volume `info` that `request` asks for, of one instant if it asks for that.
///
/// # Errors
/// `Invalid` for a range that is not inside the volume.
pub(super) fn read(
    engine: Arc<Engine>,
    exports: Arc<Exports>,
    info: VolumeInfo,
    request: &ReadVolumeRequest,
) -> Result<Answers<ReadVolumeResponse>> {
    let offset = request.offset;
    let length = match request.length {
        0 => info.size_bytes.saturating_sub(offset),
        length => length,
    };
    let end = check_range(info.size_bytes, offset, length)
        .map_err(|error| error.context(format!("volume {}", info.name)))?;
    let freeze = request.frozen && !info.read_only;
    Ok(answers(move |out| async move {
        if !freeze {
            return read_range(&engine, info.id, offset..end, &out).await.map_err(advise);
        }
        // This task is never cancelled, so that a snapshot which it makes is deleted, too.
        let frozen = Frozen::new(&engine, &exports, &info).await?;
        let read = read_range(&engine, frozen.info.id, offset..end, &out).await;
        frozen.delete(&engine).await;
        read.map_err(advise)
    }))
}

/// Damage in one place is seldom alone.
fn advise(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Checksum | ErrorKind::Corrupt => {
            error.hint("`pando pool check` and `pando pool scrub` find all that is damaged")
        }
        _ => error,
    }
}

/// Sends a range of a volume, or what of it the client waits for.
async fn read_range(
    engine: &Engine,
    id: VolumeId,
    range: Range<u64>,
    out: &super::stream::Out<ReadVolumeResponse>,
) -> Result<()> {
    let Range { start: mut at, end } = range;
    while at < end {
        let runs = engine.data(id, move |pool| async move {
            pool.device(id)?.mapped_runs(at, end - at, RUNS_MAX).await
        });
        for run in runs.await? {
            at = run.offset + run.len;
            if !read_run(engine, id, run, out).await? {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Sends one run; false if the client is gone.
async fn read_run(
    engine: &Engine,
    id: VolumeId,
    run: MappedRun,
    out: &super::stream::Out<ReadVolumeResponse>,
) -> Result<bool> {
    use read_volume_response::Content;
    let message = |offset, content| ReadVolumeResponse { offset, content: Some(content) };
    if !run.mapped {
        return Ok(send(out, message(run.offset, Content::HoleBytes(run.len))).await);
    }
    let end = run.offset + run.len;
    let mut offset = run.offset;
    while offset < end {
        let len = (end - offset).min(PIECE_BYTES);
        let piece = engine.data(id, move |pool| async move {
            let read = pool.device(id)?.read(offset, to_u32(len)).await?;
            Ok(read.bytes().to_vec())
        });
        let data = piece.await?;
        if !send(out, message(offset, Content::Data(data.into()))).await {
            return Ok(false);
        }
        offset += len;
    }
    Ok(true)
}

/// Writes the pieces of a stream into a volume, and makes them durable.
///
/// # Errors
/// The status of the first piece that could not be written; those before it are.
pub(super) async fn write(
    engine: &Engine,
    info: &VolumeInfo,
    first: WriteVolumeRequest,
    mut pieces: Streaming<WriteVolumeRequest>,
) -> std::result::Result<WriteVolumeResponse, Status> {
    let id = info.id;
    let grow = first.grow;
    let mut size = info.size_bytes;
    let mut answer = WriteVolumeResponse::default();
    let mut next = Some(first);
    while let Some(piece) = next {
        let end = end_of(&piece).map_err(|error| error.context(format!("volume {}", info.name)))?;
        if grow && end > size {
            grow_to(engine, id, end).await?;
            size = end;
        }
        match piece.content {
            None => {}
            Some(write_volume_request::Content::Data(data)) => {
                answer.data_bytes += to_u64(data.len());
                write_data(engine, id, piece.offset, data).await?;
            }
            Some(write_volume_request::Content::HoleBytes(bytes)) => {
                answer.hole_bytes += bytes;
                write_hole(engine, id, piece.offset, bytes).await?;
            }
        }
        next = pieces.message().await?;
    }
    engine.data(id, move |pool| async move { pool.device(id)?.flush().await }).await?;
    Ok(answer)
}

/// Where a piece ends; checks what the volume does not.
fn end_of(piece: &WriteVolumeRequest) -> Result<u64> {
    let len = match &piece.content {
        None => 0,
        Some(write_volume_request::Content::HoleBytes(bytes)) => *bytes,
        Some(write_volume_request::Content::Data(data)) => {
            let len = to_u64(data.len());
            if len > PIECE_BYTES {
                return Err(Error::invalid(format!(
                    "piece of {}: at most {} are possible",
                    Size(len),
                    Size(PIECE_BYTES)
                )));
            }
            len
        }
    };
    check_range(u64::MAX, piece.offset, len)
}

async fn grow_to(engine: &Engine, id: VolumeId, size_bytes: u64) -> Result<()> {
    let change = ModifyVolume { size_bytes: Some(size_bytes), ..ModifyVolume::default() };
    engine.control(move |pool| async move { pool.modify(id, change).await }).await?;
    Ok(())
}

async fn write_data(
    engine: &Engine,
    id: VolumeId,
    offset: u64,
    data: impl AsRef<[u8]> + Send + 'static,
) -> Result<()> {
    if data.as_ref().is_empty() {
        return Ok(());
    }
    let write = engine.data(id, move |pool| async move {
        let data = data.as_ref();
        // Block-aligned in the volume is block-aligned in the buffer.
        let start = to_usize(offset % BLOCK_BYTES);
        let len = to_u64(data.len());
        let mut buf = Buf::zeroed(to_usize(blocks_for(offset % BLOCK_BYTES + len)));
        buf.as_mut_bytes()[start..start + data.len()].copy_from_slice(data);
        pool.device(id)?.write(offset, to_u32(len), buf, false).await
    });
    write.await
}

async fn write_hole(engine: &Engine, id: VolumeId, offset: u64, bytes: u64) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let zero = engine.data(id, move |pool| async move {
        pool.device(id)?.write_zeroes(offset, bytes, ZeroFlags::default()).await
    });
    zero.await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(offset: u64, len: u64) -> WriteVolumeRequest {
        let content = write_volume_request::Content::Data(vec![1; to_usize(len)].into());
        WriteVolumeRequest { offset, content: Some(content), ..WriteVolumeRequest::default() }
    }

    #[test]
    fn pieces_are_checked_before_the_volume_is_touched() {
        assert_eq!(end_of(&data(512, 4096)).unwrap(), 4608);
        assert_eq!(end_of(&data(0, PIECE_BYTES)).unwrap(), PIECE_BYTES);
        assert!(end_of(&data(0, PIECE_BYTES + 512)).is_err(), "too long");
        assert!(end_of(&data(0, 100)).is_err(), "not whole sectors");
        assert!(end_of(&data(u64::MAX - 511, 512)).is_err(), "overflow");
    }
}
