//! Volumes as block devices of this machine.
//!
//! ```text
//!  AttachVolume --> Attachments --- forced, asked for, or the first that works --> dyn Driver
//!                     |  slot of each volume: one operation at a time                  |
//!                     |                                                                v
//!                     |-- Exports: the volume is a device's, nobody else's      dyn Attached
//!                     `-- records: intent, then device --> <devices_dir>/<pool>/7.toml
//!
//!  start: sweep -> each record is compared with the kernel: taken back or cleaned up
//!  end:   what outlives the daemon is suspended, the rest detached, or given up after a while
//! ```
//!
//! Invariants:
//! * A record is there before its device and goes after it, so a daemon that was killed leaves
//!   no device behind that the next one does not know of.
//! * An operation that has begun is brought to its end, even if whoever asked for it has gone.

mod drivers;
mod records;
mod source;
mod wish;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use pando_proto::v1;
use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::daemon::config::DeviceChoice;
use crate::daemon::convert;
use crate::daemon::engine::Engine;
use crate::daemon::exports::Exports;
use crate::daemon::uses::Claim;
use crate::error::{Error, ErrorKind, Result};
use crate::export::driver::{Attached, DeviceKind, DeviceSpec, Home, Left};
use crate::pool::VolumeInfo;
use crate::units::{Size, VolumeId, to_u64, to_usize};

use drivers::Drivers;
use records::{Record, Records};
use source::AttachedVolume;
pub(super) use wish::Wish;

/// Logical sectors that a device can have.
const SECTOR_SIZES: [u32; 2] = [512, 4096];
/// How long the end of the daemon waits for devices that are in use and cannot outlive it.
const IN_USE_DRAIN: Duration = Duration::from_secs(10);
/// Pause between looks at them.
const IN_USE_PAUSE: Duration = Duration::from_millis(200);

/// A volume that is a device.
struct Attachment {
    device: Box<dyn Attached>,
    kind: DeviceKind,
    /// As the API shows it.
    shown: v1::Attachment,
    _claim: Claim,
}

/// A volume's place.
#[derive(Default)]
struct Slot {
    /// Held by the operation that changes it.
    turn: tokio::sync::Mutex<()>,
    attachment: Mutex<Option<Arc<Attachment>>>,
}

/// All block devices.
pub(super) struct Attachments {
    engine: Arc<Engine>,
    exports: Arc<Exports>,
    records: Records,
    prefix: String,
    drivers: Drivers,
    choice: DeviceChoice,
    slots: Mutex<BTreeMap<VolumeId, Arc<Slot>>>,
    stopping: AtomicBool,
}

impl Attachments {
    /// What earlier daemons left is taken back or cleaned up; beyond that there are none.
    ///
    /// # Errors
    /// The directory of the records cannot be had.
    pub(super) async fn new(
        engine: Arc<Engine>,
        exports: Arc<Exports>,
        devices_dir: &Path,
        choice: DeviceChoice,
    ) -> Result<Arc<Self>> {
        let status = engine.control(|pool| async move { Ok(pool.status()) }).await?;
        let uuid = uuid::Uuid::from_bytes(status.uuid).to_string();
        let prefix = format!("pando-{uuid}-");
        // A directory for each pool: the pool's lock protects this as well.
        let records = Records::open(&devices_dir.join(uuid))?;
        let home = Home { dir: records.dir().to_owned(), prefix: prefix.clone() };
        let attachments = Arc::new(Self {
            engine,
            exports,
            records,
            prefix,
            drivers: Drivers::new(home),
            choice,
            slots: Mutex::default(),
            stopping: AtomicBool::new(false),
        });
        attachments.recover().await;
        Ok(attachments)
    }

    async fn recover(&self) {
        for driver in self.drivers.all() {
            if let Err(error) = driver.sweep().await {
                warn!(kind = %driver.kind(), %error, "devices of an earlier pandod may be left");
            }
        }
        for volume in self.records.volumes() {
            let slot = self.slot(volume);
            let _turn = slot.turn.lock().await;
            if let Err(error) = self.take_back(volume, &slot).await {
                warn!(volume = volume.get(), %error, "device of an earlier pandod is left alone");
            }
        }
    }

    /// Deals with the device that the record of `volume` tells of, if there is one.
    ///
    /// # Errors
    /// It is there, and can neither be taken back nor removed; the record stays.
    async fn take_back(&self, volume: VolumeId, slot: &Arc<Slot>) -> Result<()> {
        let Some(record) = self.records.read(volume, &self.prefix) else { return Ok(()) };
        let left = Left { identity: record.identity.clone(), node: record.node.clone() };
        let driver = self.drivers.of(record.kind);
        let found = self.engine.control(move |pool| async move { Ok(pool.get(volume).ok()) });
        let Some(info) = found.await? else {
            drop(driver.recover(left, None).await?);
            self.records.remove(volume);
            return Ok(());
        };
        let claim = self.exports.use_as_device(&info).await?;
        let spec = self.spec(&info, record.read_only, record.sector_bytes);
        let Some(device) = driver.recover(left, Some(spec)).await? else {
            info!(volume = info.name, kind = %record.kind, "device of an earlier pandod is gone");
            self.records.remove(volume);
            return Ok(());
        };
        let shown = self.publish(slot, &info, record, (device, claim)).await?;
        info!(volume = info.name, device = shown.device, "device is taken back");
        // The volume may have grown while nobody could tell the device. That may take its time.
        let (engine, slot) = (Arc::clone(&self.engine), Arc::clone(slot));
        tokio::spawn(async move {
            let _turn = slot.turn.lock().await;
            let Some(attachment) = slot.get() else { return };
            let found = engine.control(move |pool| async move { pool.get(volume) }).await;
            let resized = match found {
                Ok(info) => attachment.device.resize(info.size_bytes).await,
                Err(error) => Err(error),
            };
            if let Err(error) = resized {
                warn!(volume = info.name, %error, "device has an old size");
            }
        });
        Ok(())
    }

    /// Makes a volume a device, or returns the one that it is.
    ///
    /// # Errors
    /// `Busy` when the volume is used otherwise, or is a device of another sort; `Unsupported`
    /// when no kind works that may be taken, saying why of each; or the kind's own error.
    pub(super) async fn attach(
        self: &Arc<Self>,
        id: VolumeId,
        wish: Wish,
    ) -> Result<v1::Attachment> {
        let own = Arc::clone(self);
        to_the_end(async move {
            let slot = own.slot(id);
            let turn = slot.turn.lock().await;
            // Not before: it could have grown, or have gone, meanwhile.
            let info = own.engine.control(move |pool| async move { pool.get(id) }).await;
            let done = match info {
                Ok(info) => own.attach_in(&slot, &info, wish).await,
                Err(error) => Err(error),
            };
            drop(turn);
            own.forget(id, &slot);
            done
        })
        .await
    }

    async fn attach_in(
        &self,
        slot: &Arc<Slot>,
        info: &VolumeInfo,
        wish: Wish,
    ) -> Result<v1::Attachment> {
        self.check_running()?;
        // A device that could not be taken back at the start: there must not be a second one.
        if slot.get().is_none() {
            self.take_back(info.id, slot).await?;
        }
        let kinds = wish.kinds(self.choice)?;
        let read_only = wish.read_only || info.read_only || info.snapshot;
        if let Some(there) = slot.get() {
            return there.serves(&kinds, read_only, wish.sector_bytes);
        }
        if !info.size_bytes.is_multiple_of(u64::from(wish.sector_bytes)) {
            let (size, sector) = (info.size_bytes, wish.sector_bytes);
            let what = format!(
                "volume {}: its size of {} is not a multiple of the sector size {sector}",
                info.name,
                Size(size)
            );
            return Err(Error::invalid(what));
        }
        let claim = self.exports.use_as_device(info).await?;
        let mut passed_over = Vec::new();
        for kind in &kinds {
            let spec = self.spec(info, read_only, wish.sector_bytes);
            let mut record =
                Record::new(info.id, *kind, spec.identity.clone(), (read_only, wish.sector_bytes));
            match self.make(&record, spec).await {
                Ok(device) => {
                    record.passed_over = passed_over;
                    let shown = self.publish(slot, info, record, (device, claim)).await?;
                    info!(volume = info.name, device = shown.device, %kind, "volume is attached");
                    return Ok(shown);
                }
                Err(error) if kinds.len() > 1 && lets_pass(error.kind()) => {
                    passed_over.push(format!("{kind}: {error}"));
                }
                Err(error) => return Err(error.context(format_args!("volume {}", info.name))),
            }
        }
        let reasons = passed_over.join("; ");
        let what = format!("volume {}: no block device can be made: {reasons}", info.name);
        Err(Error::new(ErrorKind::Unsupported, what))
    }

    /// Makes a device of one kind. If it fails nothing is left, neither of it nor of the record.
    async fn make(&self, record: &Record, spec: DeviceSpec) -> Result<Box<dyn Attached>> {
        let driver = self.drivers.of(record.kind);
        driver.probe().await?;
        let volume = spec.volume;
        self.records.write(record)?;
        let made = driver.attach(spec).await;
        if made.is_err() {
            self.records.remove(volume);
        }
        made
    }

    /// Makes a device known that has been made or taken back.
    ///
    /// # Errors
    /// The record cannot be written; the device is then removed again.
    async fn publish(
        &self,
        slot: &Slot,
        info: &VolumeInfo,
        mut record: Record,
        (device, claim): (Box<dyn Attached>, Claim),
    ) -> Result<v1::Attachment> {
        record.node = Some(device.node().clone());
        if let Err(error) = self.records.write(&record) {
            device.detach().await?;
            return Err(error);
        }
        let node = device.node();
        let path = node.path.display().to_string();
        claim.name_device(path.clone());
        let shown = v1::Attachment {
            volume_id: info.id.get(),
            volume_name: info.name.clone(),
            kind: convert::device_kind(record.kind).into(),
            device: path,
            major: node.major,
            minor: node.minor,
            read_only: record.read_only,
            sector_bytes: record.sector_bytes,
            identity: record.identity,
            passed_over: record.passed_over,
        };
        let attachment =
            Attachment { device, kind: record.kind, shown: shown.clone(), _claim: claim };
        *slot.attachment.lock() = Some(Arc::new(attachment));
        Ok(shown)
    }

    /// Removes the device of a volume and returns it; there may be none.
    ///
    /// # Errors
    /// `Busy` while it is mounted, open or held, or the kind's own error; the device goes on.
    pub(super) async fn detach(self: &Arc<Self>, id: VolumeId) -> Result<Option<v1::Attachment>> {
        let own = Arc::clone(self);
        to_the_end(async move {
            let slot = own.slot(id);
            let turn = slot.turn.lock().await;
            let done = own.detach_in(&slot, id).await;
            drop(turn);
            own.forget(id, &slot);
            done
        })
        .await
    }

    async fn detach_in(&self, slot: &Arc<Slot>, id: VolumeId) -> Result<Option<v1::Attachment>> {
        // One that could not be taken back at the start has to go as well.
        if slot.get().is_none() {
            self.take_back(id, slot).await?;
        }
        let Some(attachment) = slot.get() else { return Ok(None) };
        let shown = &attachment.shown;
        let name = format!("volume {}", shown.volume_name);
        attachment.device.detach().await.map_err(|error| error.context(name))?;
        slot.attachment.lock().take();
        self.records.remove(id);
        info!(volume = shown.volume_name, device = shown.device, "volume is detached");
        Ok(Some(shown.clone()))
    }

    /// Gives a volume a size by `grow`, and shows it to the users of its device, if it has one. The
    /// device is asked first, so that one that keeps its size keeps the volume from growing.
    ///
    /// # Errors
    /// `Unsupported`: the device keeps its size; those of `grow`; or the device's own error, when
    /// the volume has grown and the device has not.
    pub(super) async fn grow<T: Send + 'static>(
        self: &Arc<Self>,
        id: VolumeId,
        size_bytes: u64,
        grow: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let own = Arc::clone(self);
        to_the_end(async move {
            let slot = own.slot(id);
            let turn = slot.turn.lock().await;
            let done = match slot.get() {
                None => grow.await,
                Some(attachment) => grow_attached(&attachment, size_bytes, grow).await,
            };
            drop(turn);
            own.forget(id, &slot);
            done
        })
        .await
    }

    /// The device of a volume.
    pub(super) fn of(&self, id: VolumeId) -> Option<v1::Attachment> {
        let slots = self.slots.lock();
        slots.get(&id).and_then(|slot| slot.get()).map(|attachment| attachment.shown.clone())
    }

    /// All devices.
    pub(super) fn list(&self) -> Vec<v1::Attachment> {
        let slots = self.slots.lock();
        let there = slots.values().filter_map(|slot| slot.get());
        there.map(|attachment| attachment.shown.clone()).collect()
    }

    /// Suspends what outlives the daemon and detaches the rest; waits a while for what is in use.
    pub(super) async fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        let since = Instant::now();
        let mut left: Vec<(VolumeId, Arc<Slot>)> =
            self.slots.lock().iter().map(|(id, slot)| (*id, Arc::clone(slot))).collect();
        let mut warned = false;
        loop {
            let gone = join_all(left.iter().map(|(id, slot)| self.let_go(*id, slot))).await;
            let mut gone = gone.into_iter();
            left.retain(|_| gone.next() == Some(false));
            if left.is_empty() || since.elapsed() >= IN_USE_DRAIN {
                break;
            }
            if !std::mem::replace(&mut warned, true) {
                warn!(devices = in_use(&left), "devices are in use: waiting for them to be closed");
            }
            tokio::time::sleep(IN_USE_PAUSE).await;
        }
        if !left.is_empty() {
            warn!(
                devices = in_use(&left),
                "devices in use end with pandod: their users get I/O errors; unmount, and attach again"
            );
        }
        for driver in self.drivers.all() {
            if let Err(error) = driver.close().await {
                warn!(kind = %driver.kind(), %error, "devices are not closed in good order");
            }
        }
    }

    /// Whether a device needs the daemon no more.
    async fn let_go(&self, id: VolumeId, slot: &Arc<Slot>) -> bool {
        let _turn = slot.turn.lock().await;
        let Some(attachment) = slot.get() else { return true };
        let device = attachment.shown.device.as_str();
        match attachment.device.suspend().await {
            Ok(true) => {
                info!(device, kind = %attachment.kind, "device waits for the next pandod");
                return true;
            }
            Ok(false) => {}
            Err(error) => warn!(device, %error, "device does not outlive pandod"),
        }
        match self.detach_in(slot, id).await {
            Ok(_) => true,
            Err(error) if error.kind() == ErrorKind::Busy => false,
            Err(error) => {
                warn!(device, %error, "device is not detached");
                true
            }
        }
    }

    fn check_running(&self) -> Result<()> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Shutdown, "pandod is stopping")
                .hint("try again when pandod is back"));
        }
        Ok(())
    }

    fn slot(&self, id: VolumeId) -> Arc<Slot> {
        Arc::clone(self.slots.lock().entry(id).or_default())
    }

    /// Drops the place of a volume without a device, unless someone else waits there.
    fn forget(&self, id: VolumeId, slot: &Arc<Slot>) {
        let mut slots = self.slots.lock();
        // The map's and the caller's.
        if Arc::strong_count(slot) == 2 && slot.get().is_none() {
            slots.remove(&id);
        }
    }

    fn spec(&self, info: &VolumeInfo, read_only: bool, sector_bytes: u32) -> DeviceSpec {
        let mut shards = self.engine.shards().to_vec();
        // Volumes are spread over the shards.
        let first = to_usize(info.id.get() % to_u64(shards.len()));
        shards.rotate_left(first);
        DeviceSpec {
            volume: info.id,
            name: info.name.clone(),
            identity: format!("{}{}", self.prefix, info.id.get()),
            size_bytes: info.size_bytes,
            read_only,
            sector_bytes,
            source: Arc::new(AttachedVolume::new(info, read_only)),
            shards,
        }
    }
}

impl Slot {
    fn get(&self) -> Option<Arc<Attachment>> {
        self.attachment.lock().clone()
    }
}

impl Attachment {
    /// This device as the answer to a request for one, if it is what was asked for.
    fn serves(
        &self,
        kinds: &[DeviceKind],
        read_only: bool,
        sector_bytes: u32,
    ) -> Result<v1::Attachment> {
        let shown = &self.shown;
        if kinds.contains(&self.kind)
            && shown.read_only == read_only
            && shown.sector_bytes == sector_bytes
        {
            return Ok(shown.clone());
        }
        let access = if shown.read_only { "read-only" } else { "read-write" };
        let what = format!(
            "volume {}: it is attached as {} ({}, {access}, sectors of {} bytes); detach it first",
            shown.volume_name, shown.device, self.kind, shown.sector_bytes
        );
        Err(Error::new(ErrorKind::Busy, what)
            .hint(format!("`pando volume detach {}`", shown.volume_name)))
    }
}

async fn grow_attached<T>(
    attachment: &Attachment,
    size_bytes: u64,
    grow: impl Future<Output = Result<T>>,
) -> Result<T> {
    let name = || format!("volume {}", attachment.shown.volume_name);
    let possible = attachment.device.can_resize(size_bytes).await;
    possible.map_err(|error| error.context(name()))?;
    let grown = grow.await?;
    attachment.device.resize(size_bytes).await?;
    Ok(grown)
}

/// Whether the next kind may do better after such an error.
const fn lets_pass(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Unsupported | ErrorKind::Io | ErrorKind::Limit)
}

fn in_use(slots: &[(VolumeId, Arc<Slot>)]) -> String {
    let there = slots.iter().filter_map(|(_, slot)| slot.get());
    let names: Vec<String> = there
        .map(|one| format!("{} (volume {})", one.shown.device, one.shown.volume_name))
        .collect();
    names.join(", ")
}

/// Does `work` as a task of its own, so that it goes on if whoever asked for it goes away.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Shutdown, "the operation was given up: see the log of pandod"))
    })
}
