//! The node on which pods run: a pool and its daemon, a kubelet, and the DaemonSet of the manifests.

use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::Value;

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

    /// Grows a claim, and waits until the claim says so.
    pub(crate) fn grow(&self, (namespace, claim): Id<'_>, size: &str) -> Result<()> {
        let patch =
            format!("{{\"spec\":{{\"resources\":{{\"requests\":{{\"storage\":\"{size}\"}}}}}}}}");
        self.kubectl.run(&["patch", "pvc", claim, "-n", namespace, "-p", &patch])?;
        self.kubectl.wait("pvc", (namespace, claim), ("{.status.capacity.storage}", size))
    }

    /// The pool, the cluster and the machine without a volume.
    pub(crate) fn empty(&self) -> Result<String> {
        until("the end of all volumes", PATIENCE, || {
            let pool = self.storage.volumes();
            let objects = self.kubectl.run(&["get", "pv,volumesnapshotcontents", "-o", "name"])?;
            let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
            let mounts: Vec<&str> =
                mounts.lines().filter(|line| line.contains("kubernetes.io~csi")).collect();
            let left = (pool.is_empty(), objects.trim().is_empty(), mounts.is_empty());
            let state = || format!("{pool:?} {objects} {mounts:?}");
            Ok(Seen::is(left == (true, true, true), state))
        })?;
        Ok("no volume in the pool, no object, no mount".to_owned())
    }
}
