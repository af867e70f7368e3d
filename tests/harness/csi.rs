//! The CSI adapter beside a daemon, and its caller: what kubelet and the sidecars would ask for.
//! Requests wait for their answers; whoever wants several at once uses the clients.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pando_csi::proto::csi;
use pando_csi::proto::csi::controller_client::ControllerClient;
use pando_csi::proto::csi::node_client::NodeClient;
use pando_csi::proto::csi::volume_capability::access_mode::Mode;
use pando_csi::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use pando_csi::proto::csi::volume_content_source::{SnapshotSource, Type as Source, VolumeSource};
use rustix::mount::{UnmountFlags, unmount};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::System;
use crate::system::programs;

/// Longest time for a start.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between looks at something that takes its time.
const PAUSE: Duration = Duration::from_millis(5);
/// Name of the node.
pub const NODE: &str = "node-1";
/// Turns at unmounting what a failed test left: mounts can lie on mounts.
const TURNS: usize = 4;

/// Whether volumes can be mounted here; if not, the caller returns.
///
/// # Panics
/// With CI=true, where nothing may be left out.
#[must_use]
pub fn can_mount() -> bool {
    let root = rustix::process::geteuid().is_root();
    let devices = ["/dev/fuse", "/dev/loop-control"];
    let missing: Vec<&str> = devices.into_iter().filter(|path| !Path::new(path).exists()).collect();
    if root && missing.is_empty() {
        return true;
    }
    let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!ci, "mounting needs root and {devices:?}; root: {root}, missing: {missing:?}");
    eprintln!("left out: mounting needs root and {devices:?}; root: {root}, missing: {missing:?}");
    false
}

/// An adapter that runs, and a connection to it.
pub struct Csi {
    child: Option<Child>,
    directory: PathBuf,
    arguments: Vec<String>,
    runtime: Runtime,
    channel: Channel,
}

impl Csi {
    /// Starts an adapter for the daemon of `system`.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn start(system: &System) -> Self {
        Self::with(system, &[])
    }

    /// The same with more arguments.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn with(system: &System, more: &[&str]) -> Self {
        Self::on(system, NODE, more)
    }

    /// The same for a node of another name.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn on(system: &System, node: &str, more: &[&str]) -> Self {
        let directory = system.path().to_owned();
        let text = |name: &str| directory.join(name).to_str().expect("a text").to_owned();
        let (endpoint, daemon) = (text("csi.sock"), text("pando.sock"));
        let given = ["--endpoint", &endpoint, "--daemon-socket", &daemon, "--node-id", node];
        let arguments = given.iter().chain(more).map(ToString::to_string).collect();
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build().expect("a runtime");
        let address = Endpoint::from_shared(format!("unix:{endpoint}")).expect("an address");
        let channel = runtime.block_on(async { address.connect_lazy() });
        let mut csi = Self { child: None, directory, arguments, runtime, channel };
        csi.spawn();
        csi
    }

    /// Starts the adapter, which does not run, and waits until it answers.
    ///
    /// # Panics
    /// It does not start.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "one adapter at a time");
        let path = self.directory.join("csi.log");
        let log = std::fs::File::options().append(true).create(true).open(path).expect("a log");
        let mut command = Command::new(programs().join("pando-csi"));
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().expect("pando-csi starts; `make test` builds it"));
        let since = Instant::now();
        let socket = self.directory.join("csi.sock");
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("a child"));
            assert!(ended.is_none(), "pando-csi ends with {ended:?}:\n{}", self.log());
            assert!(since.elapsed() < PATIENCE, "pando-csi is not ready:\n{}", self.log());
            std::thread::sleep(PAUSE);
        }
    }

    /// Process id of the adapter.
    ///
    /// # Panics
    /// None runs.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("an adapter runs").id()
    }

    /// SIGKILL, now.
    ///
    /// # Panics
    /// None runs.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("an adapter runs");
        child.kill().expect("a child can be killed");
        child.wait().expect("a child ends");
    }

    /// What the adapter has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("csi.log")).unwrap_or_default()
    }

    /// Waits for something that calls the adapter.
    pub fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Starts something that calls the adapter.
    pub fn begin<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.runtime.spawn(work)
    }

    /// Waits for an answer.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn answer<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        self.wait(call).map(Response::into_inner)
    }

    /// A connection to it, for clients of its other services.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A client of the service Node.
    #[must_use]
    pub fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    /// A client of the service Controller.
    #[must_use]
    pub fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    /// Makes a volume.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn create(&self, request: csi::CreateVolumeRequest) -> Result<csi::Volume, Status> {
        let answer = self.answer(self.controller().create_volume(request))?;
        Ok(answer.volume.expect("an answer has a volume"))
    }

    /// Deletes a volume.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn delete(&self, volume_id: &str) -> Result<(), Status> {
        let volume_id = volume_id.to_owned();
        let request = csi::DeleteVolumeRequest { volume_id, ..Default::default() };
        self.answer(self.controller().delete_volume(request)).map(drop)
    }

    /// What can be given now, for a class with these parameters.
    ///
    /// # Panics
    /// It is refused.
    #[must_use]
    pub fn capacity(&self, parameters: &[(&str, &str)]) -> csi::GetCapacityResponse {
        let parameters = parameters.iter().map(|(key, value)| (key.to_string(), value.to_string()));
        let request =
            csi::GetCapacityRequest { parameters: parameters.collect(), ..Default::default() };
        self.answer(self.controller().get_capacity(request)).expect("an answer")
    }

    /// Stages a volume.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn stage(
        &self,
        volume_id: &str,
        path: &Path,
        capability: &csi::VolumeCapability,
    ) -> Result<(), Status> {
        let request = csi::NodeStageVolumeRequest {
            volume_id: volume_id.to_owned(),
            staging_target_path: shown(path),
            volume_capability: Some(capability.clone()),
            ..Default::default()
        };
        self.answer(self.node().node_stage_volume(request)).map(drop)
    }

    /// Ends the staging of a volume.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn unstage(&self, volume_id: &str, path: &Path) -> Result<(), Status> {
        let request = csi::NodeUnstageVolumeRequest {
            volume_id: volume_id.to_owned(),
            staging_target_path: shown(path),
        };
        self.answer(self.node().node_unstage_volume(request)).map(drop)
    }

    /// Publishes a volume.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn publish(
        &self,
        volume_id: &str,
        (staging, target): (&Path, &Path),
        capability: &csi::VolumeCapability,
        readonly: bool,
    ) -> Result<(), Status> {
        let request = csi::NodePublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            staging_target_path: shown(staging),
            target_path: shown(target),
            volume_capability: Some(capability.clone()),
            readonly,
            ..Default::default()
        };
        self.answer(self.node().node_publish_volume(request)).map(drop)
    }

    /// Ends the publishing of a volume.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn unpublish(&self, volume_id: &str, target: &Path) -> Result<(), Status> {
        let request = csi::NodeUnpublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            target_path: shown(target),
        };
        self.answer(self.node().node_unpublish_volume(request)).map(drop)
    }

    /// Space of a volume at a path.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn stats(&self, volume_id: &str, path: &Path) -> Result<Vec<csi::VolumeUsage>, Status> {
        let request = csi::NodeGetVolumeStatsRequest {
            volume_id: volume_id.to_owned(),
            volume_path: shown(path),
            ..Default::default()
        };
        self.answer(self.node().node_get_volume_stats(request)).map(|answer| answer.usage)
    }

    /// Grows a volume, and what is at the path.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn expand(&self, volume_id: &str, path: &Path, bytes: i64) -> Result<i64, Status> {
        let range = csi::CapacityRange { required_bytes: bytes, limit_bytes: 0 };
        let request = csi::ControllerExpandVolumeRequest {
            volume_id: volume_id.to_owned(),
            capacity_range: Some(range),
            ..Default::default()
        };
        self.answer(self.controller().controller_expand_volume(request))?;
        self.expand_node(volume_id, path, bytes)
    }

    /// Grows what is at the path to the size of the volume.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn expand_node(&self, volume_id: &str, path: &Path, bytes: i64) -> Result<i64, Status> {
        let range = csi::CapacityRange { required_bytes: bytes, limit_bytes: 0 };
        let request = csi::NodeExpandVolumeRequest {
            volume_id: volume_id.to_owned(),
            volume_path: shown(path),
            capacity_range: Some(range),
            ..Default::default()
        };
        self.answer(self.node().node_expand_volume(request)).map(|answer| answer.capacity_bytes)
    }
}

impl Drop for Csi {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap_or_default();
            child.wait().map(|_| ()).unwrap_or_default();
        }
        // What a test that failed has left mounted; its devices go with the daemon.
        for _ in 0..TURNS {
            for point in mounted_below(&self.directory) {
                let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
                unmount(point, flags).unwrap_or_default();
            }
        }
        if std::thread::panicking() {
            eprintln!("log of pando-csi:\n{}", self.log());
        }
    }
}

/// The places below a directory where something is mounted, the last ones first.
#[must_use]
pub fn mounted_below(directory: &Path) -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = text.lines().filter_map(|line| line.split(' ').nth(4).map(PathBuf::from));
    // The daemon's own mounts are its own affair.
    let devices = directory.join("devices");
    let mut below: Vec<PathBuf> = points
        .filter(|point| point.starts_with(directory) && !point.starts_with(&devices))
        .collect();
    below.reverse();
    below
}

fn shown(path: &Path) -> String {
    path.to_str().expect("paths of tests are text").to_owned()
}

/// A file system, written by one node.
#[must_use]
pub fn mount_of(fs_type: &str) -> csi::VolumeCapability {
    mount_with(fs_type, &[], Mode::SingleNodeWriter)
}

/// A file system with mount flags.
#[must_use]
pub fn mount_with(fs_type: &str, flags: &[&str], mode: Mode) -> csi::VolumeCapability {
    let mount = MountVolume {
        fs_type: fs_type.to_owned(),
        mount_flags: flags.iter().map(ToString::to_string).collect(),
        volume_mount_group: String::new(),
    };
    csi::VolumeCapability {
        access_type: Some(AccessType::Mount(mount)),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

/// A raw device.
#[must_use]
pub fn block() -> csi::VolumeCapability {
    csi::VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
    }
}

/// A request for an empty volume that is to be a loop device.
#[must_use]
pub fn request(
    name: &str,
    bytes: i64,
    capability: &csi::VolumeCapability,
) -> csi::CreateVolumeRequest {
    request_of("loop", name, bytes, capability)
}

/// A request for an empty volume that is to be a device of this kind.
#[must_use]
pub fn request_of(
    device: &str,
    name: &str,
    bytes: i64,
    capability: &csi::VolumeCapability,
) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(csi::CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
        volume_capabilities: vec![capability.clone()],
        parameters: BTreeMap::from([("deviceKind".to_owned(), device.to_owned())]),
        ..Default::default()
    }
}

/// What a clone of a volume is made from.
#[must_use]
pub fn from_volume(volume_id: &str) -> Option<csi::VolumeContentSource> {
    let source = VolumeSource { volume_id: volume_id.to_owned() };
    Some(csi::VolumeContentSource { r#type: Some(Source::Volume(source)) })
}

/// What a volume restored from a snapshot is made from.
#[must_use]
pub fn from_snapshot(snapshot_id: &str) -> Option<csi::VolumeContentSource> {
    let source = SnapshotSource { snapshot_id: snapshot_id.to_owned() };
    Some(csi::VolumeContentSource { r#type: Some(Source::Snapshot(source)) })
}

/// A volume that is staged and published, or was.
pub struct Mounted<'a> {
    csi: &'a Csi,
    /// Its id.
    pub id: String,
    /// Where it is staged.
    pub staging: PathBuf,
    /// Where it is published.
    pub target: PathBuf,
}

impl<'a> Mounted<'a> {
    /// The places of a volume, below the directory of the test; nothing is mounted yet.
    ///
    /// # Panics
    /// The directories cannot be made.
    #[must_use]
    pub fn places(csi: &'a Csi, id: &str, name: &str) -> Self {
        let directory = csi.directory.join("kubelet").join(name);
        let (staging, target) = (directory.join("globalmount"), directory.join("mount"));
        std::fs::create_dir_all(&staging).expect("a directory");
        Self { csi, id: id.to_owned(), staging, target }
    }

    /// Stages and publishes a volume.
    ///
    /// # Panics
    /// It is refused.
    #[must_use]
    pub fn up(csi: &'a Csi, id: &str, name: &str, capability: &csi::VolumeCapability) -> Self {
        let mounted = Self::places(csi, id, name);
        csi.stage(id, &mounted.staging, capability).expect("the volume is staged");
        mounted.publish(capability).expect("the volume is published");
        mounted
    }

    /// Publishes it for writing.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn publish(&self, capability: &csi::VolumeCapability) -> Result<(), Status> {
        self.csi.publish(&self.id, (&self.staging, &self.target), capability, false)
    }

    /// Grows it on the node alone, naming all that kubelet names.
    ///
    /// # Errors
    /// What the adapter says.
    pub fn expand(
        &self,
        path: &Path,
        bytes: i64,
        capability: &csi::VolumeCapability,
    ) -> Result<i64, Status> {
        let range = csi::CapacityRange { required_bytes: bytes, limit_bytes: 0 };
        let request = csi::NodeExpandVolumeRequest {
            volume_id: self.id.clone(),
            volume_path: shown(path),
            capacity_range: Some(range),
            staging_target_path: shown(&self.staging),
            volume_capability: Some(capability.clone()),
            ..Default::default()
        };
        let answer = self.csi.answer(self.csi.node().node_expand_volume(request))?;
        Ok(answer.capacity_bytes)
    }

    /// Ends publishing and staging.
    ///
    /// # Panics
    /// It is refused, or the target is still there.
    pub fn down(self) {
        self.csi.unpublish(&self.id, &self.target).expect("the volume is unpublished");
        assert!(!self.target.exists(), "the target is removed");
        self.csi.unstage(&self.id, &self.staging).expect("the volume is unstaged");
    }

    /// The device that is mounted at the target.
    ///
    /// # Panics
    /// None is.
    #[must_use]
    pub fn device(&self) -> String {
        let arguments = ["-n", "-o", "SOURCE", "--mountpoint", crate::tools::text(&self.target)];
        crate::tools::run("findmnt", &arguments).trim().to_owned()
    }
}
