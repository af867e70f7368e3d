//! A node with a pool: the daemon, and beside it, for nodes without a kubelet, the adapter and the
//! sidecars with the arguments and the rights that deploy/kubernetes/driver.yaml gives them.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use pando_tests::Cli;
use pando_tests::system::programs;
use serde_json::{Value, json};

use crate::cluster::Places;
use crate::kubectl::{Kubectl, PATIENCE};
use crate::process::{Process, Seen, until};

pub(crate) const DRIVER: &str = "csi.pando.dev";
/// Key of a node's label, and of a volume's place.
pub(crate) const TOPOLOGY: &str = "csi.pando.dev/node";
/// Where the manifests have everything of the driver.
pub(crate) const NAMESPACE: &str = "pando";

/// The daemon of a node, and its pool.
pub(crate) struct Storage {
    directory: PathBuf,
    socket: PathBuf,
    logs: PathBuf,
    node: String,
    daemon: Option<Process>,
}

impl Storage {
    /// Makes a pool of `size` in a sparse file, with the sockets below `run`, and starts the daemon.
    pub(crate) fn start(places: &Places, node: &str, run: &Path, size: &str) -> Result<Self> {
        let directory = places.state.join(node);
        fs::create_dir_all(&directory)?;
        // As the RuntimeDirectory of deploy/pandod.service.
        fs::DirBuilder::new().mode(0o700).recursive(true).create(run)?;
        let socket = run.join("pando.sock");
        let pool = directory.join("pool");
        let config = format!(
            "pool = '{}'\nsocket = '{}'\nnbd_dir = '{}'\ndevices_dir = '{}'\njournal_dir = '{}'\n",
            pool.display(),
            socket.display(),
            run.join("nbd").display(),
            run.join("devices").display(),
            run.join("journal").display(),
        );
        fs::write(directory.join("pandod.toml"), config)?;
        let mut storage =
            Self { directory, socket, logs: places.logs(), node: node.to_owned(), daemon: None };
        let pool = pool.to_str().context("a text")?;
        storage.cli().run(&["pool", "create", pool, "--size", size, "--allocate", "sparse"]);
        storage.spawn()?;
        let uuid = storage.cli().json(&["pool", "status"])["uuid"].as_str().map(str::to_owned);
        // For scripts/kubernetes, which takes away the devices of a daemon that was killed.
        let known = places.state.join("pools");
        let pools = fs::read_to_string(&known).unwrap_or_default();
        fs::write(known, format!("{pools}{}\n", uuid.context("a pool has an identity")?))?;
        Ok(storage)
    }

    /// Starts the daemon, in a mount namespace of its own as its unit does.
    pub(crate) fn spawn(&mut self) -> Result<()> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "slave"]).arg(programs().join("pandod"));
        command.arg("--config").arg(self.directory.join("pandod.toml"));
        let name = format!("pandod-{}", self.node);
        let mut daemon = Process::start(&self.logs, &name, &mut command)?;
        until("the daemon", PATIENCE, || {
            daemon.alive()?;
            let answer = self.cli().output(&["pool", "status"]);
            let said = || String::from_utf8_lossy(&answer.stderr).into_owned();
            Ok(Seen::is(answer.status.success(), said))
        })?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// SIGKILL to the daemon.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), Process::kill)
    }

    pub(crate) fn cli(&self) -> Cli {
        Cli::new(&programs(), &self.socket)
    }

    /// Volumes and snapshots in the pool.
    pub(crate) fn volumes(&self) -> Vec<Value> {
        let list = self.cli().json(&["volume", "list"]);
        list.as_array().cloned().unwrap_or_default()
    }

    /// The volume of the pool that a PersistentVolume is.
    pub(crate) fn volume(&self, volume: &Value) -> Result<Value> {
        let handle = volume["spec"]["csi"]["volumeHandle"].as_str().context("a handle")?;
        let number: u64 = handle.rsplit('.').next().unwrap_or_default().parse()?;
        let all = self.volumes();
        let found = all.iter().find(|volume| volume["id"] == number);
        found.cloned().with_context(|| format!("{handle} is not in the pool of {}", self.node))
    }
}

/// Adapter and sidecars as processes of the host, and what a kubelet would say about its node.
pub(crate) struct Beside {
    _processes: Vec<Process>,
}

impl Beside {
    /// Starts them for a node.
    pub(crate) fn start(places: &Places, kubectl: &Kubectl, storage: &Storage) -> Result<Self> {
        let node = &storage.node;
        let endpoint = storage.directory.join("csi.sock");
        let config = format!(
            "node_id = '{node}'\nendpoint = '{}'\ndaemon_socket = '{}'\ncontroller_expand = false\n",
            endpoint.display(),
            storage.socket.display()
        );
        let file = storage.directory.join("pando-csi.toml");
        fs::write(&file, config)?;
        let logs = places.logs();
        let mut adapter = Command::new(programs().join("pando-csi"));
        adapter.arg("--config").arg(file);
        let mut processes =
            vec![Process::start(&logs, &format!("pando-csi-{node}"), &mut adapter)?];
        until("the adapter", PATIENCE, || {
            Ok(Seen::is(endpoint.exists(), || "no socket yet".to_owned()))
        })?;
        let token = kubectl.run(&["create", "token", "pando-csi", "-n", NAMESPACE])?;
        let rights = places.config("pando-csi", token.trim())?;
        let set = kubectl.object("daemonset", (NAMESPACE, "pando-csi"))?;
        for (program, arguments) in sidecars(&set)? {
            let mut command = Command::new(places.program(&program));
            command.args(arguments.iter().filter_map(|given| outside(given)));
            command.arg(format!("--csi-address={}", endpoint.display()));
            command.arg(format!("--kubeconfig={}", rights.display()));
            command.env("NODE_NAME", node).env("NAMESPACE", NAMESPACE);
            processes.push(Process::start(&logs, &format!("{program}-{node}"), &mut command)?);
        }
        kubectl.apply(&[node_object(node), csi_node_object(node)])?;
        Ok(Self { _processes: processes })
    }
}

/// The sidecars of a DaemonSet: program and arguments.
fn sidecars(set: &Value) -> Result<Vec<(String, Vec<String>)>> {
    let containers = set["spec"]["template"]["spec"]["containers"].as_array();
    let containers = containers.context("containers")?;
    let programs = containers.iter().filter_map(|container| {
        let image = container["image"].as_str()?.rsplit('/').next()?;
        let program = image.split(':').next()?.to_owned();
        let arguments = container["args"].as_array()?.iter();
        let arguments = arguments.filter_map(|word| word.as_str().map(str::to_owned)).collect();
        (program != "pando-csi").then_some((program, arguments))
    });
    Ok(programs.collect())
}

/// An argument of a sidecar as it is outside of a pod: without an owner for objects of capacity,
/// and without others to elect among.
fn outside(given: &str) -> Option<&str> {
    match given {
        "--capacity-ownerref-level=1" => Some("--capacity-ownerref-level=-1"),
        "--leader-election=true" => None,
        socket if socket.starts_with("--csi-address=") => None,
        other => Some(other),
    }
}

fn node_object(node: &str) -> Value {
    let resources = json!({"cpu": "8", "memory": "16Gi", "pods": "100"});
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node,
            "labels": {"kubernetes.io/hostname": node, TOPOLOGY: node},
        },
        "status": {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [{"type": "Ready", "status": "True", "reason": "Test", "message": "-"}],
        },
    })
}

fn csi_node_object(node: &str) -> Value {
    let driver = json!({"name": DRIVER, "nodeID": node, "topologyKeys": [TOPOLOGY]});
    json!({
        "apiVersion": "storage.k8s.io/v1",
        "kind": "CSINode",
        "metadata": {"name": node},
        "spec": {"drivers": [driver]},
    })
}
