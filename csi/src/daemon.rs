//! The client of the daemon, and the translation of its errors.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result as Started};
use pando_proto::ERROR_KIND_KEY;
use pando_proto::v1::pando_client::PandoClient;
use pando_proto::v1::volume_ref::By;
use pando_proto::v1::{self, VolumeRef};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

/// Timeout of a call. The work of the daemon is short, or continues in the background.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Maximum length of a response in bytes: a page of a list, with the maximum of labels.
const ANSWER_BYTES_MAX: usize = 32 << 20;

/// The engine's kinds of errors, as `pando.v1` names them, and their codes in CSI. Callers of CSI
/// take UNAVAILABLE and ABORTED for "may have happened, retry", and most other codes for "has not
/// happened". So every error that leaves the outcome open is UNAVAILABLE.
const CODES: [(&str, Code); 14] = [
    ("not_found", Code::NotFound),
    ("exists", Code::AlreadyExists),
    ("invalid", Code::InvalidArgument),
    ("no_space", Code::ResourceExhausted),
    ("limit", Code::ResourceExhausted),
    ("read_only", Code::FailedPrecondition),
    ("busy", Code::FailedPrecondition),
    ("not_a_pool", Code::FailedPrecondition),
    // Not UNIMPLEMENTED, which in CSI means that the plugin lacks the call.
    ("unsupported", Code::FailedPrecondition),
    ("corrupt", Code::DataLoss),
    ("checksum", Code::DataLoss),
    ("io", Code::Unavailable),
    ("poisoned", Code::Unavailable),
    ("shutdown", Code::Unavailable),
];

/// Translates an error of the daemon: code and message, without details and trailers.
fn status(error: &Status) -> Status {
    let kind = error.metadata().get(ERROR_KIND_KEY).and_then(|kind| kind.to_str().ok());
    let code = CODES.iter().find(|(name, _)| Some(*name) == kind).map(|(_, code)| *code);
    match (code, error.code()) {
        (Some(code), _) => Status::new(code, error.message()),
        (None, Code::Unimplemented) => Status::failed_precondition(
            "pandod lacks this call: it is older than this adapter, upgrade it",
        ),
        // The error is not the engine's, so the outcome is unknown.
        _ => Status::unavailable(format!("pandod does not answer: {}", error.message())),
    }
}

/// The required part of a response.
///
/// # Errors
/// INTERNAL: it is missing.
pub(crate) fn present<T>(part: Option<T>) -> Result<T, Status> {
    part.ok_or_else(|| Status::internal("pandod sent an empty response"))
}

/// A reference by number, the identity in the catalogue.
pub(crate) const fn by_number(number: u64) -> VolumeRef {
    VolumeRef { by: Some(By::Id(number)) }
}

/// A reference by name.
pub(crate) fn by_name(name: impl Into<String>) -> VolumeRef {
    VolumeRef { by: Some(By::Name(name.into())) }
}

/// The client. It connects with the first call, and again after a restart of the daemon.
#[derive(Clone)]
pub(crate) struct Daemon(PandoClient<Channel>);

impl Daemon {
    /// A client of the daemon that listens on `socket`, now or later.
    ///
    /// # Errors
    /// The path is invalid.
    pub(crate) fn new(socket: &Path) -> Started<Self> {
        let shown = socket.display();
        let absolute = std::path::absolute(socket).with_context(|| format!("socket {shown}"))?;
        let endpoint = Endpoint::from_shared(format!("unix:{}", absolute.display()))
            .with_context(|| format!("socket {shown}"))?
            .timeout(ANSWER_MAX);
        let client = PandoClient::new(endpoint.connect_lazy());
        Ok(Self(client.max_decoding_message_size(ANSWER_BYTES_MAX)))
    }

    /// The status of the pool.
    pub(crate) async fn pool(&self) -> Result<v1::Pool, Status> {
        let answer = self.0.clone().pool_status(v1::PoolStatusRequest {}).await;
        present(answer.map_err(|error| status(&error))?.into_inner().pool)
    }

    /// A volume or snapshot, and its device if it is attached. `None` if it does not exist.
    pub(crate) async fn find(
        &self,
        volume: VolumeRef,
    ) -> Result<Option<(v1::Volume, Option<v1::Attachment>)>, Status> {
        let request = v1::GetVolumeRequest { volume: Some(volume), with_space: false };
        match self.0.clone().get_volume(request).await.map_err(|error| status(&error)) {
            Ok(answer) => {
                let answer = answer.into_inner();
                Ok(Some((present(answer.volume)?, answer.attachment)))
            }
            Err(error) if error.code() == Code::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates a volume, clone or snapshot.
    pub(crate) async fn create(
        &self,
        request: v1::CreateVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        let answer = self.0.clone().create_volume(request).await;
        present(answer.map_err(|error| status(&error))?.into_inner().volume)
    }

    /// Creates several at one instant.
    pub(crate) async fn create_group(
        &self,
        volumes: Vec<v1::CreateVolumeRequest>,
    ) -> Result<Vec<v1::Volume>, Status> {
        let answer = self.0.clone().create_volumes(v1::CreateVolumesRequest { volumes }).await;
        Ok(answer.map_err(|error| status(&error))?.into_inner().volumes)
    }

    /// Changes a volume.
    pub(crate) async fn modify(
        &self,
        request: v1::ModifyVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        let answer = self.0.clone().modify_volume(request).await;
        present(answer.map_err(|error| status(&error))?.into_inner().volume)
    }

    /// Deletes a volume or snapshot. Succeeds if it does not exist.
    pub(crate) async fn delete(&self, number: u64) -> Result<(), Status> {
        let request = v1::DeleteVolumeRequest { volume: Some(by_number(number)) };
        match self.0.clone().delete_volume(request).await.map_err(|error| status(&error)) {
            Err(error) if error.code() != Code::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// One page of a list, and the token of the next.
    pub(crate) async fn list(
        &self,
        request: v1::ListVolumesRequest,
    ) -> Result<v1::ListVolumesResponse, Status> {
        let answer = self.0.clone().list_volumes(request).await;
        Ok(answer.map_err(|error| status(&error))?.into_inner())
    }

    /// Attaches a volume as a block device of this machine.
    pub(crate) async fn attach(
        &self,
        request: v1::AttachVolumeRequest,
    ) -> Result<v1::Attachment, Status> {
        let answer = self.0.clone().attach_volume(request).await;
        present(answer.map_err(|error| status(&error))?.into_inner().attachment)
    }

    /// Detaches a volume. Succeeds if it is not attached.
    pub(crate) async fn detach(&self, number: u64) -> Result<(), Status> {
        let request = v1::DetachVolumeRequest { volume: Some(by_number(number)) };
        let answer = self.0.clone().detach_volume(request).await;
        answer.map(|_| ()).map_err(|error| status(&error))
    }

    /// All block devices.
    pub(crate) async fn attachments(&self) -> Result<Vec<v1::Attachment>, Status> {
        let answer = self.0.clone().list_attachments(v1::ListAttachmentsRequest {}).await;
        Ok(answer.map_err(|error| status(&error))?.into_inner().attachments)
    }

    /// The allocated extents of a volume.
    pub(crate) async fn extents(&self, number: u64) -> Result<Extents, Status> {
        let request = v1::ListExtentsRequest { volume: Some(by_number(number)) };
        let answer = self.0.clone().list_extents(request).await;
        Ok(Extents::Allocated(answer.map_err(|error| status(&error))?.into_inner()))
    }

    /// The extents in which a volume differs from an older one.
    pub(crate) async fn changed(&self, base: u64, number: u64) -> Result<Extents, Status> {
        let request =
            v1::DiffVolumesRequest { base: Some(by_number(base)), volume: Some(by_number(number)) };
        let answer = self.0.clone().diff_volumes(request).await;
        Ok(Extents::Changed(answer.map_err(|error| status(&error))?.into_inner()))
    }
}

/// A stream of extents of a volume: offset and length in bytes, ascending, without overlap.
pub(crate) enum Extents {
    /// Extents that hold data.
    Allocated(Streaming<v1::ListExtentsResponse>),
    /// Extents that differ.
    Changed(Streaming<v1::DiffVolumesResponse>),
}

impl Extents {
    /// The next extents; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<(u64, u64)>>, Status> {
        match self {
            Self::Allocated(stream) => {
                let piece = stream.message().await.map_err(|error| status(&error))?;
                Ok(piece.map(|p| p.extents.iter().map(|e| (e.offset, e.length)).collect()))
            }
            // An extent that the newer volume no longer maps has changed as well: it reads as
            // zeros.
            Self::Changed(stream) => {
                let piece = stream.message().await.map_err(|error| status(&error))?;
                Ok(piece.map(|p| p.extents.iter().map(|e| (e.offset, e.length)).collect()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::metadata::MetadataValue;

    fn error(code: Code, kind: Option<&'static str>) -> Status {
        let mut error = Status::with_details(code, "volume db: why", b"details".to_vec().into());
        if let Some(kind) = kind {
            error.metadata_mut().insert(ERROR_KIND_KEY, MetadataValue::from_static(kind));
        }
        error
    }

    #[test]
    fn every_kind_of_the_protocol_has_a_code() {
        let protocol = include_str!("../../proto/pando/v1/pando.proto");
        let table = protocol.split("kind          code").nth(2).unwrap();
        let table = table.split("// Durability").next().unwrap();
        let lower = |word: &&str| word.starts_with(|c: char| c.is_ascii_lowercase());
        let mut documented: Vec<&str> = table.split_whitespace().filter(lower).collect();
        let mut known: Vec<&str> = CODES.iter().map(|(kind, _)| *kind).collect();
        known.sort_unstable();
        documented.sort_unstable();
        assert_eq!(known, documented);
    }

    #[test]
    fn only_code_and_message_are_kept() {
        let passed = status(&error(Code::FailedPrecondition, Some("busy")));
        assert_eq!((passed.code(), passed.message()), (Code::FailedPrecondition, "volume db: why"));
        assert!(passed.details().is_empty() && passed.metadata().is_empty());
    }

    #[test]
    fn errors_without_a_known_kind_are_unavailable() {
        for code in [Code::Unknown, Code::Internal, Code::Cancelled, Code::Unavailable] {
            assert_eq!(status(&error(code, None)).code(), Code::Unavailable);
        }
        assert_eq!(status(&error(Code::NotFound, Some("new_kind"))).code(), Code::Unavailable);
        assert_eq!(status(&error(Code::Unimplemented, None)).code(), Code::FailedPrecondition);
    }
}
