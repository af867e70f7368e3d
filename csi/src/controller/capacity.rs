//! How much can be given: one rule, by which GetCapacity answers and CreateVolume refuses, so that
//! the scheduler is not sent to a node that then has no room.
//!
//! ```text
//!  available     what new data may take in the pool now, as the engine admits writes: 0 in a pool
//!                that is full or accepts no change
//!  reservation   of the class: bytes that the volume is promised, which must all be there
//!
//!  largest = reservation + (available - reservation) * overcommit
//! ```
//!
//! The sizes of the volumes that exist do not count: a thin volume takes what was written to it, and
//! that is not available any more. A copy takes nothing when it is made, and only the node of its
//! source can make it: it is never refused for its size.

use std::collections::BTreeMap;

use pando_proto::v1;
use tonic::{Code, Status};

use crate::adapter::Adapter;
use crate::controller::parameters::{Limits, Parameters};
use crate::controller::{requirement, signed};
use crate::proto::csi::volume_capability::AccessType;
use crate::proto::csi::{GetCapacityRequest, GetCapacityResponse};
use crate::validate::{SIZE_UNIT, SIZES};

/// The largest volume that can be made now; 0 if none can.
fn largest(pool: &v1::Pool, overcommit: u64, reservation_bytes: u64) -> u64 {
    let Some(shared) = pool.available_bytes.checked_sub(reservation_bytes) else { return 0 };
    let most = shared.saturating_mul(overcommit).saturating_add(reservation_bytes);
    let most = most.min(*SIZES.end());
    most - most % SIZE_UNIT
}

/// Checks that a volume that is no copy can be given.
///
/// # Errors
/// RESOURCE_EXHAUSTED, with which the provisioner lets the scheduler choose another node.
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
        ("", 0) => format!("it can give {largest} bytes, {} are available", pool.available_bytes),
        ("", reservation) => format!(
            "it can give {largest} bytes with a reservation of {reservation}, {} are available",
            pool.available_bytes
        ),
        (reason, _) => format!("its pool accepts no change: {reason}"),
    };
    Err(Status::resource_exhausted(format!(
        "volume {name}: no room for {size_bytes} bytes on node {node}: {why}"
    )))
}

/// GetCapacity. An error would leave in place what was published before, so that claims go on being
/// sent to a node that can give nothing. Wrong parameters make no difference: of a class without
/// capacity the scheduler reports that no node has room, but CreateVolume what is wrong with it.
pub(super) async fn get(
    adapter: &Adapter,
    request: GetCapacityRequest,
) -> Result<GetCapacityResponse, Status> {
    let place = request.accessible_topology.as_ref();
    let elsewhere = place.is_some_and(|place| *place != adapter.topology());
    let possible = requirement::possible(&request.volume_capabilities);
    let class = Parameters::parse(&request.parameters, &BTreeMap::new()).unwrap_or_default();
    let smallest = smallest(&request, &class);
    let pool = match adapter.daemon.pool().await {
        Err(error) if error.code() == Code::Unavailable => {
            tracing::warn!(error = error.message(), "publishes no capacity");
            v1::Pool::default()
        }
        pool => pool?,
    };
    let reservation = class.limits.reservation_bytes.unwrap_or_default();
    let largest = match elsewhere || !possible {
        true => 0,
        false => largest(&pool, adapter.config.overcommit, reservation),
    };
    let largest = if largest < smallest { 0 } else { largest };
    Ok(GetCapacityResponse {
        available_capacity: signed(largest),
        // The scheduler compares with this alone if it is there.
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
    fn what_is_reserved_counts_once_and_the_rest_several_times() {
        let pool = |available_bytes| v1::Pool { available_bytes, ..v1::Pool::default() };
        assert_eq!(largest(&pool(0), 10, 0), 0);
        assert_eq!(largest(&pool(4096), 10, 0), 40_960);
        assert_eq!(largest(&pool(4096), 1, 0), 4096);
        assert_eq!(largest(&pool(8192), 10, 4096), 4096 + 40_960);
        assert_eq!(largest(&pool(8192), 10, 8192), 8192);
        assert_eq!(largest(&pool(8192), 10, 8193), 0, "the reservation cannot be given");
        assert_eq!(largest(&pool(8192), 1, 100), 8192, "a multiple of a sector");
        assert_eq!(largest(&pool(8192), 10, 100), 81_020 / 512 * 512);
        assert_eq!(largest(&pool(u64::MAX), 1000, 0), 64 << 40, "the largest that there is");
    }
}
