//! The capacity of a node. GetCapacity and CreateVolume apply the same rule, so that the scheduler
//! does not choose a node on which the creation then fails.
//!
//! ```text
//!  available     bytes that the engine admits for new data now: 0 in a pool that is full or
//!                accepts no change
//!  reservation   of the class: bytes that are reserved for the volume; all must be available
//!
//!  largest = reservation + (available - reservation) * overcommit
//! ```
//!
//! The sizes of existing volumes do not count: a thin volume uses the space of its written data,
//! which is no longer available. A copy uses no space when it is created, and only the node of its
//! source can create it, so it is never refused for its size.

use std::collections::BTreeMap;

use pando_proto::v1;
use tonic::{Code, Status};

use crate::adapter::Adapter;
use crate::controller::parameters::{Limits, Parameters};
use crate::controller::{requirement, signed};
use crate::proto::csi::volume_capability::AccessType;
use crate::proto::csi::{GetCapacityRequest, GetCapacityResponse};
use crate::validate::{SIZE_UNIT, SIZES};

/// Size of the largest volume that can be created now; 0 if none can.
fn largest(pool: &v1::Pool, overcommit: u64, reservation_bytes: u64) -> u64 {
    let Some(shared) = pool.available_bytes.checked_sub(reservation_bytes) else { return 0 };
    let most = shared.saturating_mul(overcommit).saturating_add(reservation_bytes);
    let most = most.min(*SIZES.end());
    most - most % SIZE_UNIT
}

/// Checks that there is room for a new volume without a source.
///
/// # Errors
/// RESOURCE_EXHAUSTED, after which the provisioner lets the scheduler choose another node.
pub(super) fn check(
    adapter: &Adapter,
    pool: &v1::Pool,
    (name, size_bytes): (&str, u64),
    limits: Limits,
) -> Result<(), Status> {
    let reservation = limits.reservation_bytes.unwrap_or_default();
    let largest = largest(pool, adapter.config.overcommit, reservation);
    if size_bytes <= largest {
        return Ok(());
    }
    let node = &adapter.config.node_id;
    let why = match (pool.poisoned.as_str(), reservation) {
        ("", 0) => format!("the limit is {largest} bytes, {} are available", pool.available_bytes),
        ("", reservation) => format!(
            "the limit is {largest} bytes with a reservation of {reservation}, {} are available",
            pool.available_bytes
        ),
        (reason, _) => format!("its pool accepts no change: {reason}"),
    };
    Err(Status::resource_exhausted(format!(
        "volume {name}: no room for {size_bytes} bytes on node {node}: {why}"
    )))
}

/// GetCapacity. If the daemon does not answer, the capacity is 0: after an error the capacity that
/// was published before would remain, and the scheduler would choose a node that cannot create
/// volumes. Wrong parameters of a class are ignored: CreateVolume reports what is wrong with them,
/// while for a class without capacity the scheduler would only report that no node has room.
pub(super) async fn get(
    adapter: &Adapter,
    request: GetCapacityRequest,
) -> Result<GetCapacityResponse, Status> {
    let place = request.accessible_topology.as_ref();
    let elsewhere = place.is_some_and(|place| *place != adapter.topology());
    let supported = requirement::modes_supported(&request.volume_capabilities);
    let class = Parameters::parse(&request.parameters, &BTreeMap::new()).unwrap_or_default();
    let smallest = smallest(&request, &class);
    let pool = match adapter.daemon.pool().await {
        Err(error) if error.code() == Code::Unavailable => {
            tracing::warn!(
                error = error.message(),
                "publishing no capacity: pandod does not answer"
            );
            v1::Pool::default()
        }
        pool => pool?,
    };
    let reservation = class.limits.reservation_bytes.unwrap_or_default();
    let largest = match elsewhere || !supported {
        true => 0,
        false => largest(&pool, adapter.config.overcommit, reservation),
    };
    let largest = if largest < smallest { 0 } else { largest };
    Ok(GetCapacityResponse {
        available_capacity: signed(largest),
        // If this is set, the scheduler compares with it alone.
        maximum_volume_size: Some(signed(largest)),
        minimum_volume_size: Some(signed(smallest)),
    })
}

/// The smallest volume of a class.
fn smallest(request: &GetCapacityRequest, class: &Parameters) -> u64 {
    let mut smallest = requirement::smallest(class.kind_of_class(&request.parameters));
    for capability in &request.volume_capabilities {
        match &capability.access_type {
            Some(AccessType::Block(_)) => smallest = *SIZES.start(),
            Some(AccessType::Mount(mount)) => {
                if let Ok(Some(kind)) = class.kind(&mount.fs_type) {
                    smallest = requirement::smallest(kind);
                }
            }
            None => {}
        }
    }
    smallest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overcommit_applies_to_space_that_is_not_reserved() {
        let pool = |available_bytes| v1::Pool { available_bytes, ..v1::Pool::default() };
        assert_eq!(largest(&pool(0), 10, 0), 0);
        assert_eq!(largest(&pool(4096), 10, 0), 40_960);
        assert_eq!(largest(&pool(4096), 1, 0), 4096);
        assert_eq!(largest(&pool(8192), 10, 4096), 4096 + 40_960);
        assert_eq!(largest(&pool(8192), 10, 8192), 8192);
        assert_eq!(largest(&pool(8192), 10, 8193), 0, "the reservation does not fit");
        assert_eq!(largest(&pool(8192), 1, 100), 8192, "a multiple of a sector");
        assert_eq!(largest(&pool(8192), 10, 100), 81_020 / 512 * 512);
        assert_eq!(largest(&pool(u64::MAX), 1000, 0), 64 << 40, "the largest volume");
    }
}
