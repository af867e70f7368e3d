//! Calls about volumes.
//!
//! A volume is made by one call of the daemon, keyed by its name: what it was made from and for is
//! written by the same record. A request that comes again, whatever crashed meanwhile, finds it by
//! the name and compares.

use std::collections::BTreeMap;

use pando_proto::v1;
use tonic::Status;
use tracing::info;

use crate::adapter::{Adapter, Found};
use crate::controller::parameters::{DEFAULT_KIND, Limits, Parameters};
use crate::controller::requirement::{self, Capacity};
use crate::controller::{capacity, frozen, page, same_request, signed};
use crate::daemon::by_number;
use crate::ids::{self, PoolId};
use crate::labels;
use crate::node::Kind;
use crate::proto::csi::volume_content_source::{SnapshotSource, Type as Source, VolumeSource};
use crate::proto::csi::{
    ControllerExpandVolumeRequest, ControllerExpandVolumeResponse, ControllerGetVolumeRequest,
    ControllerGetVolumeResponse, ControllerModifyVolumeRequest, ControllerModifyVolumeResponse,
    CreateVolumeRequest, CreateVolumeResponse, DeleteVolumeRequest, DeleteVolumeResponse,
    ListVolumesRequest, ListVolumesResponse, ValidateVolumeCapabilitiesRequest,
    ValidateVolumeCapabilitiesResponse, Volume, VolumeCapability, VolumeContentSource,
    controller_get_volume_response, list_volumes_response, validate_volume_capabilities_response,
};
use crate::validate;

/// What a new volume is to share its blocks with.
struct Origin {
    volume: Box<v1::Volume>,
    /// Value of the label that says what it is.
    kind: &'static str,
}

/// A request to make a volume, read and checked.
struct Wanted {
    /// Its name in the pool.
    name: String,
    capacity: Capacity,
    parameters: Parameters,
    capabilities: Vec<VolumeCapability>,
    /// Whether a file system is mounted from it.
    mounted: bool,
    /// The file system that it is to have. None for a block device, and for a copy whose request
    /// names none: that has the one of its source.
    kind: Option<Kind>,
    labels: BTreeMap<String, String>,
    source: Option<Source>,
}

impl Wanted {
    fn parse(request: CreateVolumeRequest) -> Result<Self, Status> {
        validate::name("name", &request.name)?;
        validate::map("parameters", &request.parameters)?;
        validate::map("mutable_parameters", &request.mutable_parameters)?;
        let usage = requirement::usage(&request.volume_capabilities)?;
        let parameters = Parameters::parse(&request.parameters, &request.mutable_parameters)?;
        let mut labels = parameters.labels(usage.is_some());
        let source = match request.volume_content_source {
            None => None,
            Some(VolumeContentSource { r#type: None }) => {
                return Err(Status::invalid_argument("volume_content_source says no source"));
            }
            Some(VolumeContentSource { r#type: some }) => some,
        };
        let kind = match &source {
            None => None,
            Some(Source::Volume(volume)) => {
                validate::required("source volume_id", &volume.volume_id)?;
                Some(labels::SOURCE_VOLUME)
            }
            Some(Source::Snapshot(snapshot)) => {
                validate::required("source snapshot_id", &snapshot.snapshot_id)?;
                Some(labels::SOURCE_SNAPSHOT)
            }
        };
        labels.extend(kind.map(|kind| (labels::SOURCE.to_owned(), kind.to_owned())));
        let kind = match &usage {
            Some(asked) => parameters.kind(asked)?.or(source.is_none().then_some(DEFAULT_KIND)),
            None => None,
        };
        if let Some(kind) = kind {
            requirement::mountable(&request.volume_capabilities, kind)?;
        }
        Ok(Self {
            name: ids::volume_name(&request.name),
            capacity: Capacity::parse(request.capacity_range)?,
            parameters,
            capabilities: request.volume_capabilities,
            mounted: usage.is_some(),
            kind,
            labels,
            source,
        })
    }

    /// Id of the source as the request has it, if there is one.
    fn source_id(&self) -> Option<&str> {
        self.source.as_ref().map(|source| match source {
            Source::Volume(volume) => volume.volume_id.as_str(),
            Source::Snapshot(snapshot) => snapshot.snapshot_id.as_str(),
        })
    }

    /// Whether `volume` is what an equal request made. Its source may be gone by now.
    fn made(&self, pool: &PoolId, volume: &v1::Volume) -> bool {
        let source = self.source_id().map(ids::parse);
        let same_source = match (source, volume.source_id) {
            (None, None) => true,
            (Some(Some(id)), Some(number)) => id.pool == *pool && id.number == number,
            _ => false,
        };
        let same_kind = self.kind.is_none_or(|kind| recorded(volume) == Some(kind));
        same_source
            && same_kind
            && self.capacity.accepts(volume.size_bytes)
            && same_request(&volume.labels, &self.labels)
    }

    /// The file system to record for the volume; none if neither the request nor its source names
    /// one.
    ///
    /// # Errors
    /// INVALID_ARGUMENT: the two differ, or that of the source takes none of these flags.
    fn settle(&self, origin: Option<&Origin>) -> Result<Option<Kind>, Status> {
        let held = origin.filter(|_| self.mounted).and_then(|origin| recorded(&origin.volume));
        match (self.kind, held) {
            (Some(asked), Some(held)) if asked != held => Err(Status::invalid_argument(format!(
                "volume {}: {asked} is asked for, but its source {} holds {held}; use a class with \
                 fsType {held}, or one that names no file system",
                self.name,
                origin.map_or("", |origin| origin.kind)
            ))),
            (None, Some(held)) => {
                requirement::mountable(&self.capabilities, held)?;
                Ok(Some(held))
            }
            (asked, _) => Ok(asked),
        }
    }
}

/// The file system that a volume or snapshot was made with, if it was made by CSI to be mounted.
fn recorded(volume: &v1::Volume) -> Option<Kind> {
    volume.labels.get(labels::FS_TYPE).and_then(|name| Kind::named(name))
}

/// CreateVolume.
pub(super) async fn create(
    adapter: &Adapter,
    mut request: CreateVolumeRequest,
) -> Result<CreateVolumeResponse, Status> {
    let requirement = request.accessibility_requirements.take();
    let mut wanted = Wanted::parse(request)?;
    let _lock = adapter.locks.lock(&wanted.name)?;
    let status = adapter.daemon.pool().await?;
    let pool = PoolId::new(&status.uuid);
    let fits = requirement::fits(requirement.as_ref(), &adapter.topology());
    if let Some(volume) = frozen::made(adapter, &wanted.name).await? {
        if fits && ids::is_volume(&volume) && wanted.made(&pool, &volume) {
            return Ok(CreateVolumeResponse { volume: Some(shown(adapter, &pool, &volume)) });
        }
        return Err(Status::already_exists(format!(
            "volume {}: made before with another size, source, place or other parameters",
            wanted.name
        )));
    }
    if !fits {
        return Err(Status::resource_exhausted(format!(
            "volume {}: node {} is not among the places asked for",
            wanted.name, adapter.config.node_id
        )));
    }
    let origin = origin(adapter, &pool, &wanted).await?;
    let kind = wanted.settle(origin.as_ref())?;
    wanted.labels.extend(kind.map(|kind| (labels::FS_TYPE.to_owned(), kind.name().to_owned())));
    let volume = make(adapter, &status, &wanted, origin).await?;
    info!(volume = volume.name, id = volume.id, source = volume.source_id, "volume made");
    Ok(CreateVolumeResponse { volume: Some(shown(adapter, &pool, &volume)) })
}

/// Looks up what the volume is to be made from.
async fn origin(
    adapter: &Adapter,
    pool: &PoolId,
    wanted: &Wanted,
) -> Result<Option<Origin>, Status> {
    let (found, kind) = match &wanted.source {
        None => return Ok(None),
        Some(Source::Volume(source)) => {
            (adapter.find_volume(pool, &source.volume_id).await?, labels::SOURCE_VOLUME)
        }
        Some(Source::Snapshot(source)) => {
            (adapter.find_snapshot(pool, &source.snapshot_id).await?, labels::SOURCE_SNAPSHOT)
        }
    };
    let id = wanted.source_id().unwrap_or_default();
    match found {
        Found::Here(volume, _) => Ok(Some(Origin { volume, kind })),
        // With this code the provisioner lets the scheduler choose another node.
        Found::Elsewhere => Err(Status::resource_exhausted(format!(
            "source {kind} {id:?} is on another node than {}",
            adapter.config.node_id
        ))),
        Found::Nowhere => Err(Status::not_found(format!("source {kind} {id:?} does not exist"))),
    }
}

/// Makes the volume: one call, one record. `pool` is the one that it is to be in.
async fn make(
    adapter: &Adapter,
    pool: &v1::Pool,
    wanted: &Wanted,
    origin: Option<Origin>,
) -> Result<v1::Volume, Status> {
    let limits = wanted.parameters.limits;
    let required = wanted.capacity.required_bytes;
    let size_bytes = match &origin {
        None => {
            let smallest = wanted.kind.map_or(0, requirement::smallest);
            let default_bytes = adapter.config.default_size_bytes.max(smallest);
            let chosen = wanted.capacity.choose(default_bytes);
            if let Some(kind) = wanted.kind {
                requirement::holds(&wanted.name, kind, chosen)?;
            }
            capacity::check(adapter, pool, (&wanted.name, chosen), limits)?;
            Some(chosen)
        }
        Some(origin) => {
            let source_bytes = origin.volume.size_bytes;
            let chosen = if required == 0 { source_bytes } else { required };
            if chosen < source_bytes || !wanted.capacity.accepts(chosen) {
                return Err(Status::out_of_range(format!(
                    "volume {}: its source {} has {source_bytes} bytes, which is more than asked \
                     for",
                    wanted.name, origin.kind
                )));
            }
            (required > 0).then_some(required)
        }
    };
    let request = v1::CreateVolumeRequest {
        name: wanted.name.clone(),
        size_bytes,
        source: origin.as_ref().map(|origin| by_number(origin.volume.id)),
        reservation_bytes: limits.reservation_bytes.unwrap_or_default(),
        growth_limit_bytes: limits.growth_bytes.unwrap_or_default(),
        iops_limit: limits.iops.unwrap_or_default(),
        bandwidth_limit_bytes: limits.bandwidth_bytes.unwrap_or_default(),
        labels: wanted.labels.clone(),
        ..v1::CreateVolumeRequest::default()
    };
    // A snapshot does not change, so there is nothing to freeze.
    let freeze = |volume: &v1::Volume| {
        !volume.snapshot && (wanted.parameters.freeze || frozen::wanted(volume))
    };
    let source = origin.map(|origin| origin.volume).filter(|volume| freeze(volume));
    frozen::make_one(adapter, source.map(|volume| volume.id), request).await
}

/// A volume as CSI shows it.
fn shown(adapter: &Adapter, pool: &PoolId, volume: &v1::Volume) -> Volume {
    let source = volume.source_id.map(|number| adapter.id(pool, number));
    let kind = volume.labels.get(labels::SOURCE).map(String::as_str);
    let content_source = match (source, kind) {
        (Some(volume_id), Some(labels::SOURCE_VOLUME)) => {
            Some(Source::Volume(VolumeSource { volume_id }))
        }
        (Some(snapshot_id), Some(labels::SOURCE_SNAPSHOT)) => {
            Some(Source::Snapshot(SnapshotSource { snapshot_id }))
        }
        _ => None,
    };
    Volume {
        capacity_bytes: signed(volume.size_bytes),
        volume_id: adapter.id(pool, volume.id),
        volume_context: BTreeMap::new(),
        content_source: content_source.map(|t| VolumeContentSource { r#type: Some(t) }),
        accessible_topology: vec![adapter.topology()],
    }
}

/// DeleteVolume.
pub(super) async fn delete(
    adapter: &Adapter,
    request: DeleteVolumeRequest,
) -> Result<DeleteVolumeResponse, Status> {
    validate::required("volume_id", &request.volume_id)?;
    let pool = adapter.pool_id().await?;
    match adapter.find_volume(&pool, &request.volume_id).await? {
        Found::Here(volume, _) => {
            let _lock = adapter.lock_volume(volume.id)?;
            adapter.daemon.delete(volume.id).await?;
            info!(volume = volume.name, id = volume.id, "volume deleted");
        }
        Found::Elsewhere => return Err(adapter.elsewhere("volume", &request.volume_id)),
        Found::Nowhere => {}
    }
    Ok(DeleteVolumeResponse {})
}

/// ValidateVolumeCapabilities.
pub(super) async fn validate(
    adapter: &Adapter,
    request: ValidateVolumeCapabilitiesRequest,
) -> Result<ValidateVolumeCapabilitiesResponse, Status> {
    validate::required("volume_id", &request.volume_id)?;
    if request.volume_capabilities.is_empty() {
        return Err(Status::invalid_argument("volume_capabilities are missing"));
    }
    let (volume, _) = adapter.volume(&request.volume_id).await?;
    if let Err(refusal) = confirm(&volume, &request) {
        let message = refusal.message().to_owned();
        return Ok(ValidateVolumeCapabilitiesResponse { confirmed: None, message });
    }
    let confirmed = validate_volume_capabilities_response::Confirmed {
        volume_context: request.volume_context,
        volume_capabilities: request.volume_capabilities,
        parameters: request.parameters,
        mutable_parameters: request.mutable_parameters,
    };
    Ok(ValidateVolumeCapabilitiesResponse { confirmed: Some(confirmed), message: String::new() })
}

/// Whether a volume can be used so, with these parameters.
///
/// # Errors
/// What CreateVolume would answer.
fn confirm(volume: &v1::Volume, request: &ValidateVolumeCapabilitiesRequest) -> Result<(), Status> {
    let usage = requirement::usage(&request.volume_capabilities)?;
    let parameters = Parameters::parse(&request.parameters, &request.mutable_parameters)?;
    let Some(asked) = usage else { return Ok(()) };
    let (asked, held) = (parameters.kind(&asked)?, recorded(volume));
    if let (Some(asked), Some(held)) = (asked, held)
        && asked != held
    {
        let text = format!("volume {} was made with {held}, not {asked}", volume.name);
        return Err(Status::invalid_argument(text));
    }
    let kind = asked.or(held).unwrap_or(DEFAULT_KIND);
    requirement::mountable(&request.volume_capabilities, kind)?;
    match volume.source_id {
        None => requirement::holds(&volume.name, kind, volume.size_bytes),
        // A copy has its file system already.
        Some(_) => Ok(()),
    }
}

/// ListVolumes. A token is the name in the pool to go on behind.
pub(super) async fn list(
    adapter: &Adapter,
    request: ListVolumesRequest,
) -> Result<ListVolumesResponse, Status> {
    let pool = adapter.pool_id().await?;
    let query = v1::ListVolumesRequest {
        name_prefix: ids::VOLUME_PREFIX.to_owned(),
        kind: v1::VolumeKind::Volume.into(),
        ..v1::ListVolumesRequest::default()
    };
    let max = page(request.max_entries)?;
    let (volumes, next_token) = adapter.list(query, max, request.starting_token).await?;
    let made = volumes.iter().filter(|volume| !frozen::unproven(volume));
    let entries = made.map(|volume| list_volumes_response::Entry {
        volume: Some(shown(adapter, &pool, volume)),
        status: None,
    });
    Ok(ListVolumesResponse { entries: entries.collect(), next_token })
}

/// ControllerGetVolume.
pub(super) async fn get(
    adapter: &Adapter,
    request: ControllerGetVolumeRequest,
) -> Result<ControllerGetVolumeResponse, Status> {
    validate::required("volume_id", &request.volume_id)?;
    let (volume, _) = adapter.volume(&request.volume_id).await?;
    let pool = adapter.pool_id().await?;
    Ok(ControllerGetVolumeResponse {
        volume: Some(shown(adapter, &pool, &volume)),
        // The field is required; which nodes have it published is not among the capabilities.
        status: Some(controller_get_volume_response::VolumeStatus::default()),
    })
}

/// ControllerExpandVolume, while the volume is in use or not.
pub(super) async fn expand(
    adapter: &Adapter,
    request: ControllerExpandVolumeRequest,
) -> Result<ControllerExpandVolumeResponse, Status> {
    if !adapter.config.controller_expand {
        return Err(Status::unimplemented("volumes are grown by NodeExpandVolume here"));
    }
    validate::required("volume_id", &request.volume_id)?;
    if request.capacity_range.is_none() {
        return Err(Status::invalid_argument("capacity_range is missing"));
    }
    let (volume, _) = adapter.volume(&request.volume_id).await?;
    let capacity = Capacity::parse(request.capacity_range)?;
    let _lock = adapter.lock_volume(volume.id)?;
    let size_bytes = volume.size_bytes.max(capacity.required_bytes);
    if !capacity.accepts(size_bytes) {
        return Err(Status::out_of_range(format!(
            "volume {} has {} bytes already: it cannot be made smaller",
            volume.name, volume.size_bytes
        )));
    }
    let volume = match size_bytes == volume.size_bytes {
        true => volume,
        false => {
            let grow = v1::ModifyVolumeRequest {
                volume: Some(by_number(volume.id)),
                size_bytes: Some(size_bytes),
                ..v1::ModifyVolumeRequest::default()
            };
            let grown = adapter.daemon.modify(grow).await?;
            info!(volume = grown.name, id = grown.id, size_bytes, "volume grown");
            grown
        }
    };
    Ok(ControllerExpandVolumeResponse {
        capacity_bytes: signed(volume.size_bytes),
        // Device and file system follow; where there is none, the call finds nothing to do.
        node_expansion_required: true,
    })
}

/// ControllerModifyVolume: one call of the daemon, so all of it or nothing.
pub(super) async fn modify(
    adapter: &Adapter,
    request: ControllerModifyVolumeRequest,
) -> Result<ControllerModifyVolumeResponse, Status> {
    validate::required("volume_id", &request.volume_id)?;
    validate::map("mutable_parameters", &request.mutable_parameters)?;
    let (volume, _) = adapter.volume(&request.volume_id).await?;
    let limits = Limits::parse(&request.mutable_parameters)?;
    let _lock = adapter.lock_volume(volume.id)?;
    let change = v1::ModifyVolumeRequest {
        volume: Some(by_number(volume.id)),
        reservation_bytes: limits.reservation_bytes,
        growth_limit_bytes: limits.growth_bytes,
        iops_limit: limits.iops,
        bandwidth_limit_bytes: limits.bandwidth_bytes,
        ..v1::ModifyVolumeRequest::default()
    };
    adapter.daemon.modify(change).await?;
    info!(volume = volume.name, id = volume.id, "limits of a volume changed");
    Ok(ControllerModifyVolumeResponse {})
}
