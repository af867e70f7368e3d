//! Calls about volumes.
//!
//! One call of the daemon creates a volume under its name; the same record contains its source and
//! its parameters. A repeated request, whatever crashed in between, finds the volume by its name
//! and compares it with the request.

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

/// The source of a new volume.
struct Origin {
    volume: Box<v1::Volume>,
    /// Its kind, a value of the label [`labels::SOURCE`].
    kind: &'static str,
}

/// A parsed request for a volume.
struct Wanted {
    /// Its name in the pool.
    name: String,
    capacity: Capacity,
    parameters: Parameters,
    capabilities: Vec<VolumeCapability>,
    /// Whether a file system is mounted from it.
    mounted: bool,
    /// Its file system. `None` for a block device, and for a copy whose request names none, which
    /// has the file system of its source.
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
                return Err(Status::invalid_argument("volume_content_source has no type set"));
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
            Some(requested) => {
                parameters.kind(requested)?.or(source.is_none().then_some(DEFAULT_KIND))
            }
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

    /// Id of the source in the request, if it has one.
    fn source_id(&self) -> Option<&str> {
        self.source.as_ref().map(|source| match source {
            Source::Volume(volume) => volume.volume_id.as_str(),
            Source::Snapshot(snapshot) => snapshot.snapshot_id.as_str(),
        })
    }

    /// Whether an equal request created `volume`. Its source may no longer exist.
    fn created(&self, pool: &PoolId, volume: &v1::Volume) -> bool {
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

    /// The file system label of the new volume; `None` if neither the request nor the source names
    /// a file system.
    ///
    /// # Errors
    /// INVALID_ARGUMENT: the two differ, or the file system of the source does not take the mount
    /// flags.
    fn fs_label(&self, origin: Option<&Origin>) -> Result<Option<Kind>, Status> {
        let held = origin.filter(|_| self.mounted).and_then(|origin| recorded(&origin.volume));
        match (self.kind, held) {
            (Some(requested), Some(held)) if requested != held => {
                Err(Status::invalid_argument(format!(
                    "volume {}: the request has fsType {requested}, but its source {} holds \
                     {held}; use a class with fsType {held}, or one without fsType",
                    self.name,
                    origin.map_or("", |origin| origin.kind)
                )))
            }
            (None, Some(held)) => {
                requirement::mountable(&self.capabilities, held)?;
                Ok(Some(held))
            }
            (requested, _) => Ok(requested),
        }
    }
}

/// The file system label of a volume or snapshot, which those have that CSI created for mounts.
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
    let fits = requirement::satisfied_by(requirement.as_ref(), &adapter.topology());
    if let Some(volume) = frozen::created_before(adapter, &wanted.name).await? {
        if fits && ids::is_volume(&volume) && wanted.created(&pool, &volume) {
            return Ok(CreateVolumeResponse { volume: Some(to_csi(adapter, &pool, &volume)) });
        }
        return Err(Status::already_exists(format!(
            "volume {} exists with another size, source, topology or other parameters",
            wanted.name
        )));
    }
    if !fits {
        return Err(Status::resource_exhausted(format!(
            "volume {}: node {} does not satisfy accessibility_requirements",
            wanted.name, adapter.config.node_id
        )));
    }
    let origin = origin(adapter, &pool, &wanted).await?;
    let kind = wanted.fs_label(origin.as_ref())?;
    wanted.labels.extend(kind.map(|kind| (labels::FS_TYPE.to_owned(), kind.name().to_owned())));
    let volume = create_in(adapter, &status, &wanted, origin).await?;
    info!(volume = volume.name, id = volume.id, source = volume.source_id, "volume created");
    Ok(CreateVolumeResponse { volume: Some(to_csi(adapter, &pool, &volume)) })
}

/// Looks up the source of a new volume.
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
        // After this code the provisioner lets the scheduler choose another node.
        Found::Elsewhere => Err(Status::resource_exhausted(format!(
            "source {kind} {id:?} is on another node than {}",
            adapter.config.node_id
        ))),
        Found::Nowhere => Err(adapter.not_found(&format!("source {kind}"), id)),
    }
}

/// Creates the volume in `pool`: one call, one record.
async fn create_in(
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
                requirement::check_fits(&wanted.name, kind, chosen)?;
            }
            capacity::check(adapter, pool, (&wanted.name, chosen), limits)?;
            Some(chosen)
        }
        Some(origin) => {
            let source_bytes = origin.volume.size_bytes;
            let chosen = if required == 0 { source_bytes } else { required };
            if chosen < source_bytes || !wanted.capacity.accepts(chosen) {
                return Err(Status::out_of_range(format!(
                    "volume {}: its source {} has {source_bytes} bytes, more than the requested \
                     size",
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
    // A snapshot does not change, so it is not frozen.
    let freeze = |volume: &v1::Volume| {
        !volume.snapshot && (wanted.parameters.freeze || frozen::is_wanted(volume))
    };
    let source = origin.map(|origin| origin.volume).filter(|volume| freeze(volume));
    frozen::create_one(adapter, source.map(|volume| volume.id), request).await
}

/// A volume in the form of CSI.
fn to_csi(adapter: &Adapter, pool: &PoolId, volume: &v1::Volume) -> Volume {
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
        return Err(validate::missing("volume_capabilities"));
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

/// Checks that a volume supports the capabilities and parameters of a request.
///
/// # Errors
/// As CreateVolume.
fn confirm(volume: &v1::Volume, request: &ValidateVolumeCapabilitiesRequest) -> Result<(), Status> {
    let usage = requirement::usage(&request.volume_capabilities)?;
    let parameters = Parameters::parse(&request.parameters, &request.mutable_parameters)?;
    let Some(requested) = usage else { return Ok(()) };
    let (requested, held) = (parameters.kind(&requested)?, recorded(volume));
    if let (Some(requested), Some(held)) = (requested, held)
        && requested != held
    {
        let text = format!("volume {} has {held}, not {requested}", volume.name);
        return Err(Status::invalid_argument(text));
    }
    let kind = requested.or(held).unwrap_or(DEFAULT_KIND);
    requirement::mountable(&request.volume_capabilities, kind)?;
    match volume.source_id {
        None => requirement::check_fits(&volume.name, kind, volume.size_bytes),
        // A copy has its file system already.
        Some(_) => Ok(()),
    }
}

/// ListVolumes.
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
    let proven = volumes.iter().filter(|volume| !frozen::is_unproven(volume));
    let entries = proven.map(|volume| list_volumes_response::Entry {
        volume: Some(to_csi(adapter, &pool, volume)),
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
        volume: Some(to_csi(adapter, &pool, &volume)),
        // The field is required; the capability to report the nodes of a volume is not offered.
        status: Some(controller_get_volume_response::VolumeStatus::default()),
    })
}

/// ControllerExpandVolume. The volume may be in use.
pub(super) async fn expand(
    adapter: &Adapter,
    request: ControllerExpandVolumeRequest,
) -> Result<ControllerExpandVolumeResponse, Status> {
    if !adapter.config.controller_expand {
        return Err(Status::unimplemented(
            "controller_expand is off: NodeExpandVolume grows volumes",
        ));
    }
    validate::required("volume_id", &request.volume_id)?;
    if request.capacity_range.is_none() {
        return Err(validate::missing("capacity_range"));
    }
    let (volume, _) = adapter.volume(&request.volume_id).await?;
    let capacity = Capacity::parse(request.capacity_range)?;
    let _lock = adapter.lock_volume(volume.id)?;
    let size_bytes = volume.size_bytes.max(capacity.required_bytes);
    if !capacity.accepts(size_bytes) {
        return Err(Status::out_of_range(format!(
            "volume {} has {} bytes, more than limit_bytes: a volume cannot shrink",
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
        // The node grows device and file system; without them its call does nothing.
        node_expansion_required: true,
    })
}

/// ControllerModifyVolume. One call of the daemon applies all changes or none.
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
