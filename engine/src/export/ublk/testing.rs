//! A queue whose requests and data are in a file of memory, as the kernel would show them.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};
use tokio::sync::mpsc;
use zerocopy::IntoBytes;

use super::abi::{self, IoDesc};
use super::queue::{Queue, Shared};
use crate::device::BlockDevice;
use crate::units::{to_u64, to_usize};

/// A queue without a kernel.
pub struct TestQueue {
    file: Arc<OwnedFd>,
    queue: Queue,
}

/// Tags of the queue.
pub const DEPTH: u16 = 4;
/// Bytes of data that a tag has room for, by the kernel's interface.
pub const DATA_BYTES: usize = 32 << 20;

impl TestQueue {
    /// A queue of `device`.
    ///
    /// # Panics
    /// When there is no memory for it.
    #[must_use]
    pub fn new(device: Rc<dyn BlockDevice>) -> Self {
        let file = memfd_create("ublk", MemfdFlags::CLOEXEC).expect("a file in memory");
        ftruncate(&file, abi::data_offset(0, DEPTH)).expect("it has no blocks yet");
        let file = Arc::new(file);
        let (_alive, _) = mpsc::channel(1);
        let shared = Shared { fd: Arc::clone(&file), suspended: Arc::default(), _alive };
        let queue = Queue::new(shared, ("volume".to_owned(), device), 0);
        queue.map(DEPTH).expect("the file can be mapped");
        Self { file, queue }
    }

    /// Puts a request into the place of a tag.
    ///
    /// # Panics
    /// Never: the file is long enough.
    pub fn put(&self, tag: u16, op_flags: u32, sectors: u32, start_sector: u64) {
        let request = IoDesc { op_flags, sectors, start_sector, address: u64::MAX };
        let at = to_u64(usize::from(tag) * size_of::<IoDesc>());
        assert_eq!(pwrite(&self.file, request.as_bytes(), at), Ok(size_of::<IoDesc>()));
    }

    /// Does the request of a tag; what the kernel would be told.
    ///
    /// # Panics
    /// When there is no such tag.
    pub async fn serve(&self, tag: u16) -> i32 {
        assert!(tag < DEPTH, "the queue has no such tag");
        self.queue.told(self.queue.serve(tag).await)
    }

    /// Sets the data of a tag.
    ///
    /// # Panics
    /// When it is too long.
    pub fn set_data(&self, tag: u16, data: &[u8]) {
        assert!(data.len() <= DATA_BYTES);
        assert_eq!(pwrite(&self.file, data, abi::data_offset(0, tag)), Ok(data.len()));
    }

    /// The first bytes of the data of a tag.
    ///
    /// # Panics
    /// Never: the file is long enough.
    #[must_use]
    pub fn data(&self, tag: u16, len: u64) -> Vec<u8> {
        let mut data = vec![0; to_usize(len)];
        assert_eq!(pread(&self.file, &mut data[..], abi::data_offset(0, tag)), Ok(data.len()));
        data
    }
}
