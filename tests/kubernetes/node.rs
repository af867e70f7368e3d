//! The node on which pods run: a pool and its daemon, a kubelet, and the DaemonSet of the manifests.

use std::path::Path;

use anyhow::{Result, ensure};
use rustix::thread::{CapabilitySet, capabilities};
use serde_json::{Value, json};

use crate::cluster::Places;
use crate::kubectl::{Id, Kubectl, PATIENCE};
use crate::kubelet::Kubelet;
use crate::process::{Seen, until};
use crate::report::Report;
use crate::storage::{DRIVER, NAMESPACE, Storage, TOPOLOGY};

pub(crate) const NODE: &str = "node-1";
/// Where the manifests and deploy/pandod.service have the sockets of the daemon.
const RUN: &str = "/run/pando";
/// Large enough for the promises of deploy/kubernetes/examples; the file is sparse.
const POOL: &str = "512GiB";

/// The node.
pub(crate) struct Node<'a> {
    pub(crate) places: &'a Places,
    pub(crate) kubectl: &'a Kubectl,
    pub(crate) storage: Storage,
    pub(crate) kubelet: Kubelet,
}

impl<'a> Node<'a> {
    /// Starts it, and lets the DaemonSet come.
    pub(crate) fn start(
        places: &'a Places,
        kubectl: &'a Kubectl,
        report: &mut Report,
    ) -> Result<Self> {
        let storage = Storage::start(places, NODE, Path::new(RUN), POOL)?;
        let kubelet = Kubelet::start(places, kubectl, NODE)?;
        let node = Self { places, kubectl, storage, kubelet };
        report.case("node: the DaemonSet of the manifests runs and registers", || node.deploy())?;
        Ok(node)
    }

    fn deploy(&self) -> Result<String> {
        self.kubectl.run(&["label", "node", NODE, "pando.dev/pool=true"])?;
        self.rollout()?;
        let known = until("the driver on the node", PATIENCE, || {
            let object = self.kubectl.get("csinode", ("", NODE))?.unwrap_or_default();
            let mut drivers = object["spec"]["drivers"].as_array().into_iter().flatten();
            let found = drivers.find(|driver| driver["name"] == DRIVER).cloned();
            Ok(Seen::of(found, || object.to_string()))
        })?;
        let node = self.kubectl.object("node", ("", NODE))?;
        ensure!(node["metadata"]["labels"][TOPOLOGY] == NODE, "{}", node["metadata"]);
        Ok(known.to_string())
    }

    /// Waits until adapter and sidecars run.
    pub(crate) fn rollout(&self) -> Result<()> {
        let words = ["rollout", "status", "ds/pando-csi", "-n", NAMESPACE, "--timeout=120s"];
        self.kubectl.run(&words).map(drop)
    }

    /// Waits until a pod runs.
    pub(crate) fn running(&self, id: Id<'_>) -> Result<()> {
        self.kubectl.wait("pod", id, ("{.status.phase}", "Running"))
    }

    /// Makes objects, and waits until a pod of them runs.
    pub(crate) fn up(&self, objects: &[Value], pod: Id<'_>) -> Result<()> {
        self.kubectl.apply(objects)?;
        self.running(pod)
    }

    /// Asks for more space.
    pub(crate) fn ask(&self, (namespace, claim): Id<'_>, size: &str) -> Result<()> {
        let patch = json!({"spec": {"resources": {"requests": {"storage": size}}}}).to_string();
        self.kubectl.run(&["patch", "pvc", claim, "-n", namespace, "-p", &patch]).map(drop)
    }

    /// Waits until a claim has it. The kubelet looks at a pod that runs every minute or two.
    pub(crate) fn grown(&self, claim: Id<'_>, size: &str) -> Result<()> {
        self.kubectl.wait("pvc", claim, ("{.status.capacity.storage}", size))
    }

    /// Waits until a claim says why its node cannot make it larger.
    pub(crate) fn not_grown(&self, claim: Id<'_>, word: &str) -> Result<String> {
        until("the reason in the claim", PATIENCE, || {
            let conditions = self.kubectl.object("pvc", claim)?["status"]["conditions"].take();
            let mut messages = conditions.as_array().into_iter().flatten();
            let found = messages.find_map(|condition| {
                let message = condition["message"].as_str()?;
                message.contains(word).then(|| format!("{}: {message}", condition["type"]))
            });
            Ok(Seen::of(found, || conditions.to_string()))
        })
    }

    /// How many volumes are staged. A pod that comes before the volume of its predecessor is not
    /// staged any more finds it as it was.
    pub(crate) fn staged(&self) -> Result<usize> {
        Ok(mounts()?.iter().filter(|line| line.contains("/globalmount ")).count())
    }

    /// Waits until no more than so many are.
    pub(crate) fn unstaged(&self, left: usize) -> Result<()> {
        until("the end of a staging", PATIENCE, || {
            let staged = self.staged()?;
            Ok(Seen::is(staged <= left, || format!("{staged} and not {left}")))
        })
    }

    /// The pool, the cluster and the machine without a volume.
    pub(crate) fn empty(&self) -> Result<String> {
        until("the end of all volumes", PATIENCE, || {
            let pool = self.storage.volumes();
            let objects = self.kubectl.run(&["get", "pv,volumesnapshotcontents", "-o", "name"])?;
            let mounts = mounts()?;
            let left = (pool.is_empty(), objects.trim().is_empty(), mounts.is_empty());
            let state = || format!("{pool:?} {objects} {mounts:?}");
            Ok(Seen::is(left == (true, true, true), state))
        })?;
        Ok("no volume in the pool, no object, no mount".to_owned())
    }
}

/// The mounts of volumes.
fn mounts() -> Result<Vec<String>> {
    let all = std::fs::read_to_string("/proc/self/mountinfo")?;
    let of_volume = |line: &&str| line.contains("/kubernetes.io~csi/") || line.contains(DRIVER);
    Ok(all.lines().filter(of_volume).map(str::to_owned).collect())
}

/// Whether the kernel lets an ext4 grow while it is mounted; some machines take that right even
/// from root.
pub(crate) fn grows_mounted() -> bool {
    let own = capabilities(None);
    own.is_ok_and(|own| own.effective.contains(CapabilitySet::SYS_RESOURCE))
}
