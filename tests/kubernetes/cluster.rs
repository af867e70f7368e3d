//! The parts of Kubernetes that no node runs: store, API, controllers, scheduler; all on loopback in
//! the network of the namespace that scripts/kubernetes has made.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::kubectl::{Kubectl, PATIENCE};
use crate::process::{Process, Seen, until};

/// The address of the node, for the API and the kubelet.
pub(crate) const NODE_ADDRESS: &str = "10.88.0.1";
/// What pods are told to be the address of the API. It is on the loopback device, so that nothing
/// has to translate it.
const SERVICE_ADDRESS: &str = "10.96.0.1";
const ISSUER: &str = "https://kubernetes.default.svc";
/// Who may ask the API by a token of the name: user and groups.
const USERS: [(&str, &str, &str); 3] = [
    ("admin", "admin", "system:masters"),
    ("controllers", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
];

/// Where things are.
pub(crate) struct Places {
    /// Programs that scripts/kubernetes-build has made.
    pub(crate) kubernetes: PathBuf,
    /// Archives that scripts/kubernetes-images has made.
    pub(crate) images: PathBuf,
    /// What the cluster keeps while it runs.
    pub(crate) state: PathBuf,
    /// deploy/kubernetes.
    pub(crate) manifests: PathBuf,
    /// The group of processes in which the kubelet makes those of pods.
    pub(crate) cgroup: String,
}

impl Places {
    /// One of the programs.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.kubernetes.join("bin").join(name)
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.state.join("logs")
    }

    /// A file with the address of the API and a token.
    pub(crate) fn config(&self, name: &str, token: &str) -> Result<PathBuf> {
        let path = self.state.join(format!("{name}.kubeconfig"));
        let authority = self.state.join("api.crt");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: it\n\
             clusters: [{{name: it, cluster: {{server: 'https://{NODE_ADDRESS}', \
             certificate-authority: {}}}}}]\n\
             users: [{{name: it, user: {{token: {token}}}}}]\n\
             contexts: [{{name: it, context: {{cluster: it, user: it}}}}]\n",
            authority.display()
        );
        fs::write(&path, text)?;
        Ok(path)
    }
}

/// The control plane, while it runs.
pub(crate) struct Cluster {
    pub(crate) kubectl: Kubectl,
    processes: Vec<Process>,
}

impl Cluster {
    /// Starts everything. A node of each of the names may come, with the name as its token.
    pub(crate) fn start(places: &Places, nodes: &[&str]) -> Result<Self> {
        fs::create_dir_all(places.logs())?;
        keys(places)?;
        tokens(places, nodes)?;
        let admin = places.config("admin", "admin")?;
        let kubectl = Kubectl::new(&places.program("kubectl"), &admin);
        let mut cluster = Self { kubectl, processes: Vec::new() };
        cluster.store(places)?;
        cluster.api(places)?;
        cluster.controllers(places)?;
        cluster.snapshots(places, &admin)?;
        Ok(cluster)
    }

    fn run(&mut self, places: &Places, name: &str, arguments: &[String]) -> Result<()> {
        let mut command = Command::new(places.program(name));
        self.processes.push(Process::start(&places.logs(), name, command.args(arguments))?);
        Ok(())
    }

    /// The error of a part that has ended.
    pub(crate) fn alive(&mut self) -> Result<()> {
        self.processes.iter_mut().try_for_each(Process::alive)
    }

    fn store(&mut self, places: &Places) -> Result<()> {
        let data = places.state.join("etcd");
        self.run(places, "etcd", &[format!("--data-dir={}", data.display())])
    }

    fn api(&mut self, places: &Places) -> Result<()> {
        let file = |name: &str| places.state.join(name).display().to_string();
        self.run(
            places,
            "kube-apiserver",
            &[
                "--etcd-servers=http://127.0.0.1:2379".to_owned(),
                "--secure-port=443".to_owned(),
                format!("--advertise-address={NODE_ADDRESS}"),
                "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
                format!("--tls-cert-file={}", file("api.crt")),
                format!("--tls-private-key-file={}", file("api.key")),
                format!("--service-account-key-file={}", file("api.key")),
                format!("--service-account-signing-key-file={}", file("api.key")),
                format!("--service-account-issuer={ISSUER}"),
                format!("--token-auth-file={}", file("tokens")),
                "--authorization-mode=Node,RBAC".to_owned(),
                "--allow-privileged=true".to_owned(),
                "--kubelet-preferred-address-types=InternalIP".to_owned(),
            ],
        )?;
        until("the API", PATIENCE, || {
            self.alive()?;
            let answer = self.kubectl.output(&["get", "--raw", "/readyz"])?;
            let said = || String::from_utf8_lossy(&answer.stderr).into_owned();
            Ok(Seen::is(answer.status.success(), said))
        })
    }

    fn controllers(&mut self, places: &Places) -> Result<()> {
        let file = |name: &str| places.state.join(name).display().to_string();
        let config = |name: &str| -> Result<String> {
            Ok(format!("--kubeconfig={}", places.config(name, name)?.display()))
        };
        self.run(
            places,
            "kube-controller-manager",
            &[
                config("controllers")?,
                "--leader-elect=false".to_owned(),
                "--use-service-account-credentials=true".to_owned(),
                format!("--service-account-private-key-file={}", file("api.key")),
                format!("--root-ca-file={}", file("api.crt")),
                // Nodes that no kubelet speaks for stay ready.
                "--node-monitor-grace-period=24h".to_owned(),
            ],
        )?;
        let arguments = [config("scheduler")?, "--leader-elect=false".to_owned()];
        self.run(places, "kube-scheduler", &arguments)
    }

    /// What the cluster needs for snapshots, as deploy/kubernetes/driver.yaml says.
    fn snapshots(&mut self, places: &Places, admin: &Path) -> Result<()> {
        for entry in fs::read_dir(places.kubernetes.join("crd"))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).context("a name")?;
            if name.contains("snapshot.storage.k8s.io_") {
                self.kubectl.run(&["create", "-f", path.to_str().context("a path")?])?;
            }
        }
        let established = ["--for=condition=Established", "crd", "--all", "--timeout=60s"];
        self.kubectl.run(&[&["wait"], &established[..]].concat())?;
        let arguments = [
            format!("--kubeconfig={}", admin.display()),
            "--enable-distributed-snapshotting".to_owned(),
        ];
        self.run(places, "snapshot-controller", &arguments)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Nothing of it is kept. In good order the API would wait for all who watch it.
        for process in self.processes.drain(..).rev() {
            if let Err(error) = process.kill() {
                eprintln!("{error}");
            }
        }
    }
}

/// One key and its certificate for everything. It is its own authority.
fn keys(places: &Places) -> Result<()> {
    let file = |name: &str| places.state.join(name).display().to_string();
    let names =
        format!("subjectAltName=IP:{NODE_ADDRESS},IP:{SERVICE_ADDRESS},DNS:kubernetes.default.svc");
    let (key, certificate) = (file("api.key"), file("api.crt"));
    let words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=api"];
    let more = ["-addext", &names, "-keyout", &key, "-out", &certificate];
    let made = Command::new("openssl").args(words).args(more).output()?;
    ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

fn tokens(places: &Places, nodes: &[&str]) -> Result<()> {
    let mut text = String::new();
    for (token, user, groups) in USERS {
        writeln!(text, "{token},{user},{user},\"{groups}\"")?;
    }
    for node in nodes {
        writeln!(text, "{node},system:node:{node},{node},\"system:nodes\"")?;
    }
    Ok(fs::write(places.state.join("tokens"), text)?)
}
