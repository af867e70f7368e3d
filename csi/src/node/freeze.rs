//! Freezes a mounted file system while it is cloned, so that the copy is clean: it needs no
//! recovery. A file system that stays frozen blocks its pods forever, so the thaw does not depend
//! on this process.
//!
//! ```text
//!  adapter                     guard: pando-csi freeze-guard
//!  label "frozen" on the volume
//!    |------ starts ---------->  stdin: root of the file system, stdout: a socket
//!    |                           FIFREEZE
//!    |<----- F ----------------
//!  the clone                     waits: end of the socket, a signal, or the limit
//!    |------ end of socket --->  FITHAW
//!    |<----- T, or L: late ----
//!    |                           ends; if it was killed, the adapter thaws
//!  label off
//! ```
//!
//! However the adapter ends, the kernel closes its end of the socket and the guard thaws. If both
//! are killed at once, for example with their container, the next adapter finds the label and
//! thaws. A file system that was frozen by others has no label and is not touched.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use pando_proto::v1;
use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};
use tonic::Status;

use crate::adapter::Adapter;
use crate::labels;

use super::device::Device;
use super::stage::set_label;
use super::{blocking, mountinfo};

/// Argument that starts the program as the guard.
pub(crate) const GUARD: &str = "freeze-guard";
/// Time limit to write out the dirty pages of the file system.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// Time limit for the work while it is frozen, which takes milliseconds.
const WORK_LIMIT: Duration = Duration::from_secs(10);
/// Time after which the guard thaws, whatever the adapter does.
const GUARD_LIMIT: Duration = Duration::from_secs(20);
/// Pause before the next search for frozen file systems if the daemon did not answer.
const PAUSE: Duration = Duration::from_secs(5);

/// Messages of the guard: frozen; thawed; thawed before the adapter asked for it; cannot freeze.
const FROZEN: u8 = b'F';
const THAWED: u8 = b'T';
const LATE: u8 = b'L';
const REFUSED: u8 = b'E';

/// Runs `work` while the file system that is mounted from the device is frozen. If none is mounted,
/// runs `work` alone.
///
/// # Errors
/// `ABORTED`: it is frozen already; `INTERNAL`: it cannot be frozen; `UNAVAILABLE`: it did not stay
/// frozen until `work` was done, so the copy that `work` created is not clean.
pub(crate) async fn frozen<T>(
    adapter: &Adapter,
    attachment: &v1::Attachment,
    work: impl Future<Output = T>,
) -> Result<T, Status> {
    let volume = attachment.volume_id;
    let device = Device::verify(attachment, volume)?;
    let _locked = adapter.locks.lock(key(volume))?;
    let Some(root) = blocking(move || mounted_root(&device)).await? else { return Ok(work.await) };
    set_label(adapter, volume, labels::FROZEN, labels::TRUE).await?;
    let (result, thawed) = guarded(root, work).await;
    if !thawed {
        tracing::warn!(
            volume,
            "a file system may still be frozen; the next start of the adapter thaws it"
        );
        return result;
    }
    // If this fails, the next start of the adapter finds the label and nothing frozen.
    if let Err(why) = set_label(adapter, volume, labels::FROZEN, "").await {
        tracing::warn!(volume, why = why.message(), "cannot remove the label frozen of a volume");
    }
    result
}

fn key(volume: u64) -> String {
    format!("freeze {volume}")
}

/// Opens the root of the file system that is mounted from a device.
fn mounted_root(device: &Device) -> Result<Option<OwnedFd>, Status> {
    let mount =
        mountinfo::mounts()?.into_iter().find(|mount| mount.is_of(&device.path, device.number));
    let Some(mount) = mount else { return Ok(None) };
    let root = mount.open_root().map_err(|error| {
        let point = String::from_utf8_lossy(&mount.point);
        Status::internal(format!("cannot freeze {point}: {error}"))
    })?;
    Ok(Some(root))
}

/// Runs `work` while a guard keeps the file system frozen. Also returns whether the file system is
/// thawed again.
async fn guarded<T>(root: OwnedFd, work: impl Future<Output = T>) -> (Result<T, Status>, bool) {
    let started = root.try_clone().and_then(start);
    let (mut guard, mut socket) = match started {
        Ok(started) => started,
        Err(error) => return (Err(failed(&error)), true),
    };
    let result = while_frozen(&mut socket, work).await;
    drop(socket);
    let thawed = match timeout(GUARD_LIMIT, guard.wait()).await {
        Ok(Ok(ended)) if ended.success() => true,
        // The kernel is still freezing; the guard thaws after that.
        Err(_) => false,
        Ok(_) => blocking(move || Ok(thaw(&root))).await.is_ok_and(|thawed| thawed.is_ok()),
    };
    (result, thawed)
}

fn failed(error: &io::Error) -> Status {
    Status::internal(format!("freeze: {error}"))
}

/// Thaws a file system if it is frozen.
fn thaw(root: &OwnedFd) -> rustix::io::Result<()> {
    match super::sys::thaw(root) {
        Err(Errno::INVAL) => Ok(()),
        thawed => thawed,
    }
}

/// Runs `work` as soon as the guard reports that the file system is frozen.
async fn while_frozen<T>(
    socket: &mut UnixStream,
    work: impl Future<Output = T>,
) -> Result<T, Status> {
    match timeout(FREEZE_LIMIT, socket.read_u8()).await {
        Ok(Ok(FROZEN)) => {}
        Ok(Ok(REFUSED)) => {
            let errno =
                Errno::from_raw_os_error(socket.read_i32().await.map_err(|error| failed(&error))?);
            let text = format!("the file system cannot be frozen: {errno}");
            let busy = errno == Errno::BUSY;
            return Err(if busy { Status::aborted(text) } else { Status::internal(text) });
        }
        Ok(answer) => {
            return Err(Status::unavailable(format!(
                "the guard of a frozen file system failed: {answer:?}"
            )));
        }
        Err(_) => {
            let seconds = FREEZE_LIMIT.as_secs();
            let text = format!("the file system is not frozen after {seconds} s");
            return Err(Status::unavailable(text));
        }
    }
    let result = timeout(WORK_LIMIT, work).await;
    socket.shutdown().await.map_err(|error| failed(&error))?;
    let released = timeout(GUARD_LIMIT, socket.read_u8()).await;
    match (result, released) {
        (Ok(result), Ok(Ok(THAWED))) => Ok(result),
        _ => Err(Status::unavailable("the file system did not stay frozen long enough")),
    }
}

/// Starts the guard of a file system: this program, even if its file was replaced.
fn start(root: OwnedFd) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let guard = Command::new("/proc/self/exe")
        .arg(GUARD)
        .stdin(Stdio::from(root))
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    Ok((guard, UnixStream::from_std(ours)?))
}

/// The guard: freezes the file system of its standard input. Thaws it when the peer of the socket
/// that is its standard output closes, on a signal, or at the time limit.
pub(crate) fn guard() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.and_then(|runtime| runtime.block_on(keep_frozen())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

async fn keep_frozen() -> io::Result<()> {
    let root = io::stdin().as_fd().try_clone_to_owned()?;
    let socket = io::stdout().as_fd().try_clone_to_owned()?;
    let socket = std::os::unix::net::UnixStream::from(socket);
    socket.set_nonblocking(true)?;
    let mut socket = UnixStream::from_std(socket)?;
    // From here on a signal to end does not leave the file system frozen.
    let mut signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()]
        .map(signal)
        .into_iter()
        .collect::<io::Result<Vec<_>>>()?;
    if let Err(errno) = super::sys::freeze(&root) {
        // Nothing is frozen, so it does not matter whether the adapter still listens.
        let [a, b, c, d] = errno.raw_os_error().to_be_bytes();
        let _sent = socket.write_all(&[REFUSED, a, b, c, d]).await;
        return Ok(());
    }
    // If the adapter is gone, the read below ends.
    let _sent = socket.write_u8(FROZEN).await;
    let mut rest = [0; 1];
    let signalled =
        futures_util::future::select_all(signals.iter_mut().map(|one| Box::pin(one.recv())));
    let in_time = tokio::select! {
        _ = socket.read(&mut rest) => true,
        _ = signalled => false,
        () = sleep(GUARD_LIMIT) => false,
    };
    let thawed = super::sys::thaw(&root);
    let answer = if in_time && thawed.is_ok() { THAWED } else { LATE };
    let _sent = socket.write_u8(answer).await;
    Ok(thawed?)
}

/// Thaws file systems that an adapter left frozen because it was killed together with its guard.
/// Called at the start; returns when the daemon has answered.
pub(crate) async fn thaw_left_over(adapter: &Adapter) {
    while let Err(why) = thaw_labelled(adapter).await {
        tracing::debug!(why = why.message(), "cannot look for frozen file systems yet");
        sleep(PAUSE).await;
    }
}

async fn thaw_labelled(adapter: &Adapter) -> Result<(), Status> {
    let frozen =
        std::collections::BTreeMap::from([(labels::FROZEN.to_owned(), labels::TRUE.to_owned())]);
    let mut request =
        v1::ListVolumesRequest { labels: frozen, ..v1::ListVolumesRequest::default() };
    loop {
        let page = adapter.daemon.list(request.clone()).await?;
        let live = adapter.daemon.attachments().await?;
        for volume in page.volumes {
            // If it is locked it is being frozen now.
            let Ok(_locked) = adapter.locks.lock(key(volume.id)) else { continue };
            let device = live.iter().find(|attachment| attachment.volume_id == volume.id);
            if let Some(device) = device.and_then(|found| Device::verify(found, volume.id).ok()) {
                let root = blocking(move || mounted_root(&device)).await?;
                let thawed = root.as_ref().map(thaw);
                tracing::warn!(
                    volume = volume.name,
                    ?thawed,
                    "thawing a file system that was left frozen"
                );
            }
            set_label(adapter, volume.id, labels::FROZEN, "").await?;
        }
        if page.next_page_token.is_empty() {
            return Ok(());
        }
        request.page_token = page.next_page_token;
    }
}
