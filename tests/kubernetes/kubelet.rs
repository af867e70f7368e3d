//! A node that runs pods: containerd with runc and the bridge of scripts/kubernetes, and a kubelet.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::cluster::{NODE_ADDRESS, Places};
use crate::kubectl::{Kubectl, PATIENCE};
use crate::process::{Process, Seen, until};

const RUNTIME_SOCKET: &str = "/run/containerd/containerd.sock";
/// The image of the process that holds the namespaces of a pod.
const PAUSE_IMAGE: &str = "pando.test/pause:1";

/// Runtime and kubelet.
pub(crate) struct Kubelet {
    node: String,
    tools: PathBuf,
    runtime: Process,
    kubelet: Option<Process>,
}

impl Kubelet {
    /// Starts them and waits until the node is ready.
    pub(crate) fn start(places: &Places, kubectl: &Kubectl, node: &str) -> Result<Self> {
        let tools = places.kubernetes.join("containers/usr");
        let runtime = runtime(places, &tools)?;
        let kubelet = Some(kubelet(places, &tools, node)?);
        let mut started = Self { node: node.to_owned(), tools, runtime, kubelet };
        until("a node that is ready", PATIENCE, || {
            started.alive()?;
            let node = kubectl.get("node", ("", node))?.unwrap_or_default();
            let conditions = node["status"]["conditions"].as_array();
            let mut ready = conditions.into_iter().flatten().filter(|c| c["type"] == "Ready");
            let state = || node["status"]["conditions"].to_string();
            Ok(Seen::is(ready.any(|condition| condition["status"] == "True"), state))
        })?;
        Ok(started)
    }

    /// The error of a part that has ended.
    pub(crate) fn alive(&mut self) -> Result<()> {
        self.runtime.alive()?;
        self.kubelet.as_mut().map_or(Ok(()), Process::alive)
    }

    /// The kubelet is killed, and comes again.
    pub(crate) fn restart(&mut self, places: &Places) -> Result<()> {
        if let Some(old) = self.kubelet.take() {
            old.kill()?;
        }
        self.kubelet = Some(kubelet(places, &self.tools, &self.node)?);
        Ok(())
    }
}

fn with_tools(command: &mut Command, tools: &Path) {
    let path = std::env::var("PATH").unwrap_or_default();
    let (programs, more) = (tools.join("bin"), tools.join("sbin"));
    command.env("PATH", format!("{}:{}:{path}", programs.display(), more.display()));
}

fn runtime(places: &Places, tools: &Path) -> Result<Process> {
    let networks = places.state.join("networks");
    fs::create_dir_all(&networks)?;
    let addresses = json!([[{"subnet": "10.88.0.0/24", "rangeStart": "10.88.0.10"}]]);
    let network = json!({
        "cniVersion": "0.4.0",
        "name": "pando",
        "plugins": [{
            "type": "bridge",
            "bridge": "pando0",
            "isGateway": true,
            "ipam": {
                "type": "host-local",
                "ranges": addresses,
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": "/run/cni",
            },
        }],
    });
    fs::write(networks.join("pando.conflist"), network.to_string())?;
    let config = format!(
        "version = 2\n\
         root = '{root}'\nstate = '/run/containerd'\n\
         [grpc]\naddress = '{RUNTIME_SOCKET}'\n\
         [plugins.'io.containerd.grpc.v1.cri']\n\
         sandbox_image = '{PAUSE_IMAGE}'\n\
         restrict_oom_score_adj = true\n\
         [plugins.'io.containerd.grpc.v1.cri'.cni]\n\
         bin_dir = '{plugins}'\nconf_dir = '{networks}'\n",
        root = places.state.join("containerd").display(),
        plugins = tools.join("lib/cni").display(),
        networks = networks.display(),
    );
    let file = places.state.join("containerd.toml");
    fs::write(&file, config)?;
    let mut command = Command::new(tools.join("bin/containerd"));
    with_tools(command.arg("--config").arg(file), tools);
    let mut process = Process::start(&places.logs(), "containerd", &mut command)?;
    let ctr = |words: &[&str]| {
        let mut command = Command::new(tools.join("bin/ctr"));
        command.args(["--address", RUNTIME_SOCKET, "--namespace", "k8s.io"]).args(words).output()
    };
    until("the runtime of containers", PATIENCE, || {
        process.alive()?;
        let answer = ctr(&["version"])?;
        let said = || String::from_utf8_lossy(&answer.stderr).into_owned();
        Ok(Seen::is(answer.status.success(), said))
    })?;
    for archive in fs::read_dir(&places.images)? {
        let archive = archive?.path();
        let name = archive.to_str().context("a text")?;
        let imported = ctr(&["images", "import", name])?;
        let said = String::from_utf8_lossy(&imported.stderr);
        ensure!(imported.status.success(), "{name}: {said}");
    }
    Ok(process)
}

fn kubelet(places: &Places, tools: &Path, node: &str) -> Result<Process> {
    let none = json!({"memory.available": "1Mi", "nodefs.available": "0%",
        "nodefs.inodesFree": "0%", "imagefs.available": "0%"});
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        // Nobody outside of the namespace of the network can ask.
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": places.cgroup,
        "containerRuntimeEndpoint": format!("unix://{RUNTIME_SOCKET}"),
        "enforceNodeAllocatable": [],
        "evictionHard": none,
        // Machines with the first version of control groups will do.
        "failCgroupV1": false,
        "failSwapOn": false,
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "makeIPTablesUtilChains": false,
        "oomScoreAdj": 0,
        "volumePluginDir": places.state.join("volume-plugins"),
    });
    let file = places.state.join("kubelet.json");
    fs::write(&file, config.to_string())?;
    let rights = places.config(node, node)?;
    let mut command = Command::new(places.program("kubelet"));
    command.arg("--config").arg(file).arg("--kubeconfig").arg(rights);
    command.args([&format!("--hostname-override={node}"), &format!("--node-ip={NODE_ADDRESS}")]);
    with_tools(&mut command, tools);
    Process::start(&places.logs(), "kubelet", &mut command)
}
