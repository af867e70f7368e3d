//! One operation at a time on each object. CSI allows a plugin to answer ABORTED while another call
//! works on the same object; callers then retry.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::Mutex;
use tonic::Status;

/// The objects with an operation under way. Each has a key such as `volume 42`.
#[derive(Clone, Default)]
pub(crate) struct Locks(Arc<Mutex<HashSet<String>>>);

/// An operation under way; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Locked {
    held: Arc<Mutex<HashSet<String>>>,
    key: String,
}

impl Locks {
    /// Begins an operation on the object `key`.
    ///
    /// # Errors
    /// ABORTED: another operation on it is under way.
    pub(crate) fn lock(&self, key: impl Into<String>) -> Result<Locked, Status> {
        let key = key.into();
        if !self.0.lock().insert(key.clone()) {
            return Err(Status::aborted(format!(
                "{key}: another operation is under way, try again"
            )));
        }
        Ok(Locked { held: Arc::clone(&self.0), key })
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.held.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_operation_on_an_object_is_aborted() {
        let locks = Locks::default();
        let first = locks.lock("volume 1").unwrap();
        let _other = locks.lock("volume 2").unwrap();
        assert_eq!(locks.lock("volume 1").unwrap_err().code(), tonic::Code::Aborted);
        drop(first);
        locks.lock("volume 1").unwrap();
    }
}
