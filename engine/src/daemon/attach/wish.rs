//! What a request for a block device asks for, and what may be taken for it.

use pando_proto::v1;

use super::SECTOR_SIZES;
use crate::daemon::config::DeviceChoice;
use crate::error::{Error, ErrorKind, Result};
use crate::export::driver::DeviceKind;

/// In which order kinds are tried.
const ORDER: [DeviceKind; 3] = [DeviceKind::Ublk, DeviceKind::Nbd, DeviceKind::Loop];

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(in crate::daemon) struct Wish {
    /// `None`: whatever works.
    pub(super) kind: Option<DeviceKind>,
    pub(super) read_only: bool,
    pub(super) sector_bytes: u32,
}

impl Wish {
    /// What a request says.
    ///
    /// # Errors
    /// `Unsupported` or `Invalid`, naming the field.
    pub(in crate::daemon) fn from_request(request: &v1::AttachVolumeRequest) -> Result<Self> {
        let kind = match v1::DeviceKind::try_from(request.kind) {
            Ok(v1::DeviceKind::Unspecified) => None,
            Ok(v1::DeviceKind::Ublk) => Some(DeviceKind::Ublk),
            Ok(v1::DeviceKind::Nbd) => Some(DeviceKind::Nbd),
            Ok(v1::DeviceKind::Loop) => Some(DeviceKind::Loop),
            Err(_) => {
                let what = format!("kind {} of devices is unknown to this pandod", request.kind);
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
        };
        let sector_bytes = match request.sector_bytes {
            0 => SECTOR_SIZES[0],
            size if SECTOR_SIZES.contains(&size) => size,
            size => {
                let what = format!("sectors of {size} bytes: 512 and 4096 are possible");
                return Err(Error::invalid(what));
            }
        };
        Ok(Self { kind, read_only: request.read_only, sector_bytes })
    }

    /// The kinds that may be taken for it, the best first.
    ///
    /// # Errors
    /// `Unsupported` when the configuration allows only another one.
    pub(super) fn kinds(&self, choice: DeviceChoice) -> Result<Vec<DeviceKind>> {
        let only = match choice {
            DeviceChoice::Auto => return Ok(self.kind.map_or(ORDER.to_vec(), |kind| vec![kind])),
            DeviceChoice::Ublk => DeviceKind::Ublk,
            DeviceChoice::Nbd => DeviceKind::Nbd,
            DeviceChoice::Loop => DeviceKind::Loop,
        };
        match self.kind {
            Some(kind) if kind != only => Err(Error::new(
                ErrorKind::Unsupported,
                format!("{kind} is asked for, but the configuration allows only {only}"),
            )),
            _ => Ok(vec![only]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(kind: i32, sector_bytes: u32) -> Result<Wish> {
        Wish::from_request(&v1::AttachVolumeRequest {
            kind,
            sector_bytes,
            ..v1::AttachVolumeRequest::default()
        })
    }

    #[test]
    fn requests_are_checked() {
        assert_eq!(wish(0, 0).unwrap().sector_bytes, 512);
        assert_eq!(wish(0, 4096).unwrap().sector_bytes, 4096);
        assert_eq!(wish(0, 1024).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(wish(9, 0).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn the_configuration_forces_a_kind() {
        let (any, nbd) = (wish(0, 0).unwrap(), wish(v1::DeviceKind::Nbd.into(), 0).unwrap());
        assert_eq!(any.kinds(DeviceChoice::Auto).unwrap(), ORDER);
        assert_eq!(nbd.kinds(DeviceChoice::Auto).unwrap(), [DeviceKind::Nbd]);
        assert_eq!(any.kinds(DeviceChoice::Loop).unwrap(), [DeviceKind::Loop]);
        assert_eq!(nbd.kinds(DeviceChoice::Nbd).unwrap(), [DeviceKind::Nbd]);
        let refused = nbd.kinds(DeviceChoice::Loop).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        assert!(refused.to_string().contains("allows only loop"), "{refused}");
    }
}
