//! A volume as the source of a device's requests.

use std::rc::Rc;

use crate::daemon::engine::pool_here;
use crate::daemon::offered::Offered;
use crate::error::Result;
use crate::export::{Export, ExportSource};
use crate::pool::VolumeInfo;
use crate::runtime::LocalFuture;
use crate::units::VolumeId;

/// One volume, whatever name is asked for. That the volume is in use is known elsewhere, for as
/// long as the device is there.
pub(super) struct AttachedVolume {
    id: VolumeId,
    name: String,
    read_only: bool,
}

impl AttachedVolume {
    /// `read_only` refuses writes that the volume itself would take.
    pub(super) fn new(info: &VolumeInfo, read_only: bool) -> Self {
        Self { id: info.id, name: info.name.clone(), read_only }
    }
}

impl ExportSource for AttachedVolume {
    fn list(&self) -> Vec<String> {
        vec![self.name.clone()]
    }

    fn open<'a>(&'a self, _name: &'a str) -> LocalFuture<'a, Result<Export>> {
        Box::pin(async move {
            let device = Offered::new(pool_here()?.device(self.id)?, self.read_only, None);
            Ok(Export {
                name: self.name.clone(),
                description: String::new(),
                device: Rc::new(device),
            })
        })
    }
}
