//! What is in a volume, by way of the daemon's own calls: no device, no mount, no root.

use std::path::Path;

use pando_proto::v1;
use pando_proto::v1::pando_client::PandoClient;
use pando_proto::v1::read_volume_response::Content;
use pando_proto::v1::volume_ref::By;
use pando_proto::v1::write_volume_request::Content as Written;
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::System;

/// A connection to the daemon.
pub struct Data {
    runtime: Runtime,
    client: PandoClient<Channel>,
}

impl Data {
    /// To the daemon of `system`, which may be restarted meanwhile.
    ///
    /// # Panics
    /// There can be no connection.
    #[must_use]
    pub fn new(system: &System) -> Self {
        let socket: &Path = &system.path().join("pando.sock");
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build().expect("a runtime");
        let address = Endpoint::from_shared(format!("unix:{}", socket.display()));
        let address = address.expect("an address");
        let client = PandoClient::new(runtime.block_on(async { address.connect_lazy() }));
        Self { runtime, client }
    }

    /// Waits for a call of the daemon.
    pub fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// A client of the daemon.
    #[must_use]
    pub fn client(&self) -> PandoClient<Channel> {
        self.client.clone()
    }

    /// The volume `number`.
    ///
    /// # Panics
    /// There is none.
    #[must_use]
    pub fn volume(&self, number: u64) -> v1::Volume {
        let request = v1::GetVolumeRequest { volume: by(number), with_space: false };
        let answer = self.wait(self.client().get_volume(request)).expect("a volume");
        answer.into_inner().volume.expect("an answer has a volume")
    }

    /// The pool.
    ///
    /// # Panics
    /// The daemon does not answer.
    #[must_use]
    pub fn pool(&self) -> v1::Pool {
        let answer = self.wait(self.client().pool_status(v1::PoolStatusRequest {}));
        answer.expect("an answer").into_inner().pool.expect("an answer has a pool")
    }

    /// Writes `bytes` at `offset` of a volume.
    ///
    /// # Panics
    /// It fails.
    pub fn write(&self, number: u64, offset: u64, bytes: &[u8]) {
        self.try_write(number, offset, bytes).expect("a write");
    }

    /// Writes `bytes` at `offset` of a volume, as far as there is room.
    ///
    /// # Errors
    /// What the daemon answers.
    pub fn try_write(&self, number: u64, offset: u64, bytes: &[u8]) -> Result<(), Status> {
        // The most that one message takes.
        for (piece, at) in bytes.chunks(1 << 20).zip((offset..).step_by(1 << 20)) {
            self.put(number, at, Written::Data(piece.to_vec().into()))?;
        }
        Ok(())
    }

    /// Writes a checkpoint, which gives back what was freed before.
    ///
    /// # Panics
    /// It fails.
    pub fn checkpoint(&self, number: u64) {
        // The exact space of a volume is that in a checkpoint, which is written for it.
        let request = v1::GetVolumeRequest { volume: by(number), with_space: true };
        self.wait(self.client().get_volume(request)).expect("a volume");
    }

    /// Makes a part of a volume zeros, unmapped.
    ///
    /// # Panics
    /// It fails.
    pub fn clear(&self, number: u64, offset: u64, length: u64) {
        self.put(number, offset, Written::HoleBytes(length)).expect("a write");
    }

    fn put(&self, number: u64, offset: u64, content: Written) -> Result<(), Status> {
        let piece = v1::WriteVolumeRequest {
            volume: by(number),
            grow: false,
            offset,
            content: Some(content),
        };
        let pieces = tokio_stream::once(piece);
        self.wait(self.client().write_volume(pieces)).map(drop)
    }

    /// Reads a whole volume.
    ///
    /// # Panics
    /// It fails.
    #[must_use]
    pub fn read(&self, number: u64) -> Vec<u8> {
        self.wait(async {
            let request =
                v1::ReadVolumeRequest { volume: by(number), ..v1::ReadVolumeRequest::default() };
            let answer = self.client().read_volume(request).await.expect("an answer");
            let mut pieces = answer.into_inner();
            let mut bytes = Vec::new();
            while let Some(piece) = pieces.message().await.expect("a piece") {
                assert_eq!(piece.offset, u64::try_from(bytes.len()).expect("small"));
                match piece.content.expect("a piece says something") {
                    Content::Data(data) => bytes.extend_from_slice(&data),
                    Content::HoleBytes(hole) => {
                        let hole = usize::try_from(hole).expect("small");
                        bytes.resize(bytes.len() + hole, 0);
                    }
                }
            }
            bytes
        })
    }
}

#[expect(clippy::unnecessary_wraps, reason = "fields of messages are optional on the wire")]
const fn by(number: u64) -> Option<v1::VolumeRef> {
    Some(v1::VolumeRef { by: Some(By::Id(number)) })
}

/// The identity in the pool's catalogue of what CSI calls `id`.
///
/// # Panics
/// It is no id of Pando.
#[must_use]
pub fn number(id: &str) -> u64 {
    id.rsplit('.').next().and_then(|number| number.parse().ok()).expect("an id ends in a number")
}
