//! The manifests in deploy/kubernetes: each document is decoded strictly into the types of
//! Kubernetes' own API (tests/manifests, in Go), what they name exists, the sidecars may do what
//! they have to, and the programs and the real adapter take what is said to them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use pando_csi::proto::csi;
use pando_tests::csi::{block, mount_of, request};
use pando_tests::system::programs;
use pando_tests::tools::{output, present, text};
use pando_tests::{Csi, System};
use serde_json::Value;

/// Built by scripts/setup.
const DECODER: &str = "pando-manifests";
const DRIVER: &str = "csi.pando.dev";

/// What the sidecars have to be allowed: group, resource, verbs. From the `rbac.yaml` of each, at
/// the tags that are deployed; without what belongs to attaching, which this driver does not do.
const CLUSTER_WIDE: [(&str, &str, &str); 14] = [
    // external-provisioner v6.3.0
    ("", "persistentvolumes", "get list watch create patch delete"),
    ("", "persistentvolumeclaims", "get list watch update"),
    ("", "events", "list watch create update patch"),
    ("", "nodes", "get list watch"),
    ("storage.k8s.io", "storageclasses", "get list watch"),
    ("storage.k8s.io", "csinodes", "get list watch"),
    ("snapshot.storage.k8s.io", "volumesnapshots", "get list watch update"),
    // external-snapshotter v8.6.0
    ("snapshot.storage.k8s.io", "volumesnapshotclasses", "get list watch"),
    ("snapshot.storage.k8s.io", "volumesnapshotcontents", "get list watch update patch"),
    ("snapshot.storage.k8s.io", "volumesnapshotcontents/status", "update patch"),
    // external-resizer v2.2.1
    ("", "persistentvolumes", "get list watch patch"),
    ("", "persistentvolumeclaims/status", "patch"),
    ("", "pods", "get list watch"),
    ("storage.k8s.io", "volumeattributesclasses", "get list watch"),
];
/// The same in the namespace of the driver; the owner of the capacity objects is a DaemonSet.
const IN_NAMESPACE: [(&str, &str, &str); 4] = [
    ("storage.k8s.io", "csistoragecapacities", "get list watch create update patch delete"),
    ("", "pods", "get"),
    ("apps", "daemonsets", "get"),
    ("coordination.k8s.io", "leases", "get list watch create update delete"),
];
/// Images of the sidecars with the options of theirs that may be used.
const SIDECARS: [(&str, &str); 3] = [
    (
        "csi-provisioner:v6.3.0",
        "csi-address node-deployment strict-topology immediate-topology enable-capacity \
         capacity-ownerref-level kube-api-capacity-qps kube-api-capacity-burst \
         extra-create-metadata worker-threads timeout",
    ),
    ("csi-snapshotter:v8.6.0", "csi-address node-deployment timeout"),
    ("csi-resizer:v2.2.1", "csi-address leader-election timeout"),
];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes")
}

/// The files in a directory, in the order of their names.
fn files(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let yaml = paths.filter(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    let mut names: Vec<String> = yaml.map(|path| text(&path).to_owned()).collect();
    names.sort();
    names
}

/// All documents, strictly decoded. None if the decoder is not there.
fn documents() -> Option<Documents> {
    let paths = [files(&directory()), files(&directory().join("examples"))].concat();
    assert!(paths.len() >= 7, "{paths:?}");
    present(&[DECODER]).then(|| decoded(&paths))
}

/// The documents of some files.
fn decoded(paths: &[String]) -> Documents {
    let printed = output(DECODER, paths);
    let said = String::from_utf8_lossy(&printed.stderr);
    assert!(printed.status.success(), "{said}");
    Documents(serde_json::from_slice(&printed.stdout).expect("a list"))
}

struct Documents(Vec<Value>);

impl Documents {
    fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter(move |document| document["kind"] == kind)
    }

    /// Whether there is a document of this kind and name, and of this namespace if it has one.
    fn has(&self, kind: &str, namespace: &str, name: &str) -> bool {
        self.of(kind).any(|document| named(document) == (namespace, name))
    }

    /// The pods that the documents describe, each with its namespace.
    fn pods(&self) -> Vec<(&str, &Value)> {
        let alone = self.of("Pod").map(|pod| (named(pod).0, &pod["spec"]));
        let sets = ["DaemonSet", "StatefulSet"].into_iter().flat_map(|kind| self.of(kind));
        alone.chain(sets.map(|set| (named(set).0, &set["spec"]["template"]["spec"]))).collect()
    }

    /// Claims by namespace and name: class, bytes as Kubernetes writes them. Those that a
    /// StatefulSet makes for its first pod are among them.
    fn claims(&self) -> BTreeMap<(String, String), &Value> {
        let alone = self.of("PersistentVolumeClaim").map(|claim| {
            let (namespace, name) = named(claim);
            ((namespace.to_owned(), name.to_owned()), &claim["spec"])
        });
        let sets = self.of("StatefulSet").flat_map(|set| {
            let (namespace, name) = named(set);
            list(&set["spec"]["volumeClaimTemplates"]).iter().map(move |claim| {
                let name = format!("{}-{name}-0", word(&claim["metadata"]["name"]));
                ((namespace.to_owned(), name), &claim["spec"])
            })
        });
        alone.chain(sets).collect()
    }

    /// The rules of all roles of this kind.
    fn allows(&self, role: &str, (group, resource, verbs): (&str, &str, &str)) -> bool {
        let rules = self.of(role).flat_map(|role| list(&role["rules"]));
        let has = |rule: &Value, key: &str, value: &str| {
            list(&rule[key]).iter().any(|entry| entry == value)
        };
        let about =
            |rule: &&Value| has(rule, "apiGroups", group) && has(rule, "resources", resource);
        let rules: Vec<&Value> = rules.filter(about).collect();
        verbs.split(' ').all(|verb| rules.iter().any(|rule| has(rule, "verbs", verb)))
    }
}

/// Namespace (empty: none) and name of a document.
fn named(document: &Value) -> (&str, &str) {
    let metadata = &document["metadata"];
    (metadata["namespace"].as_str().unwrap_or_default(), word(&metadata["name"]))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// A map of texts; empty if the object has no such field.
fn map(value: &Value) -> BTreeMap<String, String> {
    let entries = value.as_object().into_iter().flatten();
    entries.map(|(key, value)| (key.clone(), word(value).to_owned())).collect()
}

fn gib(claim: &Value) -> u64 {
    let size = word(&claim["resources"]["requests"]["storage"]);
    let number = size.strip_suffix("Gi").and_then(|number| number.parse().ok());
    number.unwrap_or_else(|| panic!("{size}: examples are in Gi"))
}

#[test]
fn what_is_wrong_is_refused() {
    if !present(&[DECODER]) {
        return;
    }
    let good = "apiVersion: storage.k8s.io/v1\nkind: StorageClass\nprovisioner: x\n";
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("one.yaml");
    let decoded = |manifest: &str| {
        std::fs::write(&path, manifest).expect("a file");
        let printed = output(DECODER, &[text(&path)]);
        let said = String::from_utf8_lossy(&printed.stderr).into_owned();
        if printed.status.success() { Ok(printed.stdout) } else { Err(said) }
    };
    decoded(good).expect("a class");
    for (more, expected) in [
        ("allowVolumeExpansoin: true\n", "unknown field"),
        ("provisioner: other\n", "already set"),
        ("allowVolumeExpansion: perhaps\n", "bool"),
        ("parameters: {freeze: true}\n", "string"),
        ("---\napiVersion: apps/v2\nkind: DaemonSet\n", "no kind"),
        ("---\napiVersion: apps/v1\nkind: DemonSet\n", "no kind"),
        ("\t\n", "yaml"),
    ] {
        let said = decoded(&format!("{good}{more}")).expect_err(more);
        assert!(said.contains(expected), "{more}: {said}");
    }
}

#[test]
fn what_is_named_exists() {
    let Some(documents) = documents() else { return };
    let mut names = BTreeSet::new();
    for document in &documents.0 {
        let (namespace, name) = named(document);
        assert!(names.insert((word(&document["kind"]), namespace, name)), "{name} twice");
        let own = ["", "default"].contains(&namespace);
        assert!(own || documents.has("Namespace", "", namespace), "{name}: no {namespace}");
    }
    for (kind, key) in [
        ("StorageClass", "provisioner"),
        ("VolumeSnapshotClass", "driver"),
        ("VolumeGroupSnapshotClass", "driver"),
        ("VolumeAttributesClass", "driverName"),
    ] {
        assert!(documents.of(kind).count() > 0, "no {kind}");
        for class in documents.of(kind) {
            assert_eq!(class[key], DRIVER, "{class}");
        }
    }
    assert!(documents.has("CSIDriver", "", DRIVER));
    for class in documents.of("StorageClass") {
        assert_eq!(class["volumeBindingMode"], "WaitForFirstConsumer", "{class}");
        assert_eq!(class["allowVolumeExpansion"], true, "{class}");
    }
    for (namespace, pod) in documents.pods() {
        if let Some(account) = pod["serviceAccountName"].as_str() {
            assert!(documents.has("ServiceAccount", namespace, account), "{account}");
        }
        let volumes = list(&pod["volumes"]);
        for container in list(&pod["containers"]) {
            for mount in list(&container["volumeMounts"]) {
                let templates = documents.of("StatefulSet").flat_map(|set| {
                    list(&set["spec"]["volumeClaimTemplates"]).iter().map(|c| &c["metadata"])
                });
                let known = volumes.iter().chain(templates).any(|v| v["name"] == mount["name"]);
                assert!(known, "{mount}");
            }
            for secret in list(&container["env"]).iter().map(|e| &e["valueFrom"]["secretKeyRef"]) {
                let known = || documents.has("Secret", namespace, word(&secret["name"]));
                assert!(secret.is_null() || known(), "{secret}");
            }
        }
        for volume in volumes {
            if let Some(name) = volume["configMap"]["name"].as_str() {
                assert!(documents.has("ConfigMap", namespace, name), "{name}");
            }
        }
    }
    for set in ["DaemonSet", "StatefulSet"].into_iter().flat_map(|kind| documents.of(kind)) {
        let labels = &set["spec"]["template"]["metadata"]["labels"];
        assert_eq!(&set["spec"]["selector"]["matchLabels"], labels, "{set}");
    }
}

#[test]
fn claims_and_their_sources_fit() {
    let Some(documents) = documents() else { return };
    let claims = documents.claims();
    let mut clones = 0;
    for ((namespace, name), claim) in &claims {
        let class = word(&claim["storageClassName"]);
        assert!(documents.has("StorageClass", "", class), "{name}: no class {class}");
        let source = &claim["dataSource"];
        let Some(kind) = source["kind"].as_str() else { continue };
        clones += 1;
        let mut origin = word(&source["name"]);
        if kind == "VolumeSnapshot" {
            assert_eq!(source["apiGroup"], "snapshot.storage.k8s.io", "{name}");
            let mut all = documents.of("VolumeSnapshot");
            let found = all.find(|snapshot| named(snapshot) == (namespace, origin));
            let spec = &found.unwrap_or_else(|| panic!("{name}: no {origin}"))["spec"];
            let class = word(&spec["volumeSnapshotClassName"]);
            assert!(documents.has("VolumeSnapshotClass", "", class), "{name}: no {class}");
            origin = word(&spec["source"]["persistentVolumeClaimName"]);
        }
        let origin = claims.get(&(namespace.clone(), origin.to_owned()));
        let origin = origin.unwrap_or_else(|| panic!("{name}: its source is nowhere"));
        assert!(gib(claim) >= gib(origin), "{name} is smaller than its source");
    }
    assert!(clones >= 3, "examples of clones and restores");
    for (namespace, pod) in documents.pods() {
        for volume in list(&pod["volumes"]) {
            if let Some(claim) = volume["persistentVolumeClaim"]["claimName"].as_str() {
                let key = (namespace.to_owned(), claim.to_owned());
                assert!(claims.contains_key(&key), "{claim}");
            }
        }
    }
}

/// A claim has a file system once its first pod has it mounted. If it is applied together with a
/// clone of it, that is made before, and can never be mounted.
#[test]
fn a_claim_and_its_copy_are_not_applied_at_once() {
    if !present(&[DECODER]) {
        return;
    }
    for path in files(&directory().join("examples")) {
        let documents = decoded(std::slice::from_ref(&path));
        let claims = documents.claims();
        for ((namespace, name), claim) in &claims {
            let Some(source) = claim["dataSource"]["name"].as_str() else { continue };
            let of_snapshot = documents.of("VolumeSnapshot").find(|s| named(s).1 == source);
            let origin = of_snapshot.map_or(source, |snapshot| {
                word(&snapshot["spec"]["source"]["persistentVolumeClaimName"])
            });
            let together = claims.contains_key(&(namespace.clone(), origin.to_owned()));
            assert!(!together, "{path}: {name} is applied together with {origin}");
        }
    }
}

#[test]
fn the_sidecars_may_do_what_they_have_to() {
    let Some(documents) = documents() else { return };
    for rule in CLUSTER_WIDE {
        assert!(documents.allows("ClusterRole", rule), "{rule:?} is not allowed");
    }
    for rule in IN_NAMESPACE {
        assert!(documents.allows("Role", rule), "{rule:?} is not allowed");
    }
    for (binding, role) in [("ClusterRoleBinding", "ClusterRole"), ("RoleBinding", "Role")] {
        for binding in documents.of(binding) {
            let namespace = named(binding).0;
            assert_eq!(binding["roleRef"]["kind"], role);
            assert!(documents.has(role, namespace, word(&binding["roleRef"]["name"])));
            for subject in list(&binding["subjects"]) {
                let (place, name) = (word(&subject["namespace"]), word(&subject["name"]));
                assert!(documents.has(word(&subject["kind"]), place, name), "{subject}");
            }
        }
    }
}

/// Snapshotters that run one per node look only at contents with the label of their node, which the
/// snapshot-controller does not set on one that was made by hand.
#[test]
fn a_content_made_by_hand_is_of_a_node_and_of_the_adapter_there() {
    let Some(documents) = documents() else { return };
    let system = System::start("256MiB");
    let csi = Csi::start(&system);
    let get = |id: &str| {
        let request = csi::GetSnapshotRequest { snapshot_id: id.to_owned(), ..Default::default() };
        csi.answer(csi.controller().get_snapshot(request))
    };
    let volume = csi.create(request("one", 1 << 20, &block())).expect("a volume").volume_id;
    let mut contents = 0;
    for content in documents.of("VolumeSnapshotContent") {
        contents += 1;
        let (_, name) = named(content);
        let (spec, labels) = (&content["spec"], &content["metadata"]["labels"]);
        assert_eq!(spec["driver"], DRIVER);
        let reference = (word(&spec["volumeSnapshotRef"]["namespace"]), name);
        let mut all = documents.of("VolumeSnapshot");
        let bound = all.find(|snapshot| named(snapshot) == reference).expect("a snapshot");
        assert_eq!(bound["spec"]["source"]["volumeSnapshotContentName"], name);
        let handle = word(&spec["source"]["snapshotHandle"]);
        let node = word(&labels["snapshot.storage.kubernetes.io/managed-by"]);
        assert!(handle.starts_with(&format!("{node}.")), "{handle}: another node than {node}");
        // It has the form of a handle: the adapter of another node knows that it is not its own.
        let refused = get(handle).expect_err("a snapshot of another node");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");

        // The way to it: the same, with a node and a pool that are there.
        let cli = system.cli();
        cli.run(&["snapshot", "csi-vol-one", "csi-by-hand"]);
        let id = cli.json(&["volume", "show", "csi-by-hand"])["id"].to_string();
        let uuid = word(&cli.json(&["pool", "status"])["uuid"]).replace('-', "");
        let taken = get(&format!("node-1.{uuid}.{id}")).expect("a snapshot").snapshot;
        let taken = taken.expect("an answer has a snapshot");
        assert!(taken.ready_to_use && taken.source_volume_id == volume, "{taken:?}");
    }
    assert_eq!(contents, 1);
}

/// The mount of a container in which `path` is, and what it is mounted from.
fn mounted_at<'a>(pod: &'a Value, container: &'a Value, path: &str) -> (&'a str, &'a Value) {
    let mut mounts = list(&container["volumeMounts"]).iter();
    let inside = |mount: &&Value| Path::new(path).starts_with(word(&mount["mountPath"]));
    let mount = mounts.find(inside).unwrap_or_else(|| panic!("{path}: nothing is mounted there"));
    let mut volumes = list(&pod["volumes"]).iter();
    let volume = volumes.find(|volume| volume["name"] == mount["name"]).expect("a volume");
    (word(&mount["mountPath"]), volume)
}

#[test]
fn the_adapter_starts_with_what_is_said_to_it() {
    let Some(documents) = documents() else { return };
    let (namespace, pod) = documents.pods().into_iter().find(|(ns, _)| *ns == "pando").expect("it");
    let containers = list(&pod["containers"]);
    let adapter = containers.iter().find(|c| c["name"] == "pando-csi").expect("the adapter");
    let mut maps = documents.of("ConfigMap").filter(|map| named(map) == (namespace, "pando-csi"));
    let config = word(&maps.next().expect("a configuration")["data"]["pando-csi.toml"]);
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("pando-csi.toml");
    std::fs::write(&file, config).expect("a file");
    let arguments = list(&adapter["args"]).iter().map(|argument| {
        let argument = word(argument).replace("$(NODE_NAME)", "node-1");
        assert!(!argument.contains("$("), "{argument}: a variable that is not in env");
        argument.replace("/etc/pando/pando-csi.toml", text(&file))
    });
    let mut command = Command::new(programs().join("pando-csi"));
    let checked = command.args(arguments).arg("--check-config").output();
    let checked = checked.expect("pando-csi starts; `make test` builds it");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));

    // What the file says is where the pod has it.
    let parsed = pando_csi::config::Config::load(&file).expect("a configuration");
    let shown = |path: &Path| path.to_str().expect("text").to_owned();
    let (_, plugin) = mounted_at(pod, adapter, &shown(&parsed.endpoint));
    let inside = |path: &Path| path.file_name().map(|name| name.to_owned());
    let kubelet = parsed.kubelet_endpoint.expect("kubelet is on the host");
    assert_eq!(kubelet.parent(), plugin["hostPath"]["path"].as_str().map(Path::new));
    assert_eq!(inside(&kubelet), inside(&parsed.endpoint));
    let registration = shown(&parsed.registration_dir.expect("kubelet is told"));
    let (_, volume) = mounted_at(pod, adapter, &registration);
    assert_eq!(volume["hostPath"]["path"], "/var/lib/kubelet/plugins_registry");
    let (place, volume) = mounted_at(pod, adapter, &shown(&parsed.daemon_socket));
    assert_eq!(volume["hostPath"]["path"], place, "the daemon is on the host");
    let health = parsed.health_address.expect("health is asked for").port();
    assert_eq!(adapter["ports"][0]["containerPort"], health);
    // A pool that failed must not have its adapter, and all sidecars, restarted again and again.
    for (probe, path) in [("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
        let get = &adapter[probe]["httpGet"];
        assert_eq!((&get["path"], &get["port"]), (&path.into(), &adapter["ports"][0]["name"]));
    }
    assert_eq!(adapter["securityContext"]["privileged"], true);
    let mounts = list(&adapter["volumeMounts"]);
    let kubelet = mounts.iter().find(|mount| mount["mountPath"] == "/var/lib/kubelet");
    assert_eq!(kubelet.expect("pods")["mountPropagation"], "Bidirectional");
    let mut sidecars = 0;
    for sidecar in containers.iter().filter(|container| container["name"] != "pando-csi") {
        let image = word(&sidecar["image"]);
        let name = image.strip_prefix("registry.k8s.io/sig-storage/");
        let known = SIDECARS.iter().find(|(known, _)| Some(*known) == name);
        let (_, options) = known.unwrap_or_else(|| panic!("{image}: which options has it?"));
        let options: BTreeSet<&str> = options.split_whitespace().collect();
        for argument in list(&sidecar["args"]) {
            let option = word(argument).trim_start_matches('-').split('=').next();
            assert!(options.contains(option.unwrap_or_default()), "{image}: {argument}");
        }
        let address = format!("--csi-address={}", shown(&parsed.endpoint));
        assert!(list(&sidecar["args"]).iter().any(|argument| *argument == address), "{image}");
        mounted_at(pod, sidecar, &shown(&parsed.endpoint));
        sidecars += 1;
    }
    assert_eq!(sidecars, SIDECARS.len());
}

#[test]
fn the_adapter_takes_the_parameters_of_the_classes() {
    let Some(documents) = documents() else { return };
    let system = System::start("256GiB");
    let csi = Csi::start(&system);
    for (index, class) in documents.of("StorageClass").enumerate() {
        let kind = "csi.storage.k8s.io/fstype";
        let mut parameters = map(&class["parameters"]);
        // The provisioner keeps these keys, and puts this one into the capability.
        let fs_type = parameters.remove(kind).unwrap_or_default();
        let wanted = csi::CreateVolumeRequest {
            parameters,
            ..request(&format!("class-{index}"), 100 << 30, &mount_of(&fs_type))
        };
        csi.create(wanted).unwrap_or_else(|error| panic!("{class}: {error}"));
    }
    let id = csi.create(request("one", 1 << 20, &block())).expect("a volume").volume_id;
    for (index, class) in documents.of("VolumeSnapshotClass").enumerate() {
        let wanted = csi::CreateSnapshotRequest {
            source_volume_id: id.clone(),
            name: format!("snapshot-{index}"),
            parameters: map(&class["parameters"]),
            ..Default::default()
        };
        let taken = csi.answer(csi.controller().create_snapshot(wanted));
        taken.unwrap_or_else(|error| panic!("{class}: {error}"));
    }
    for class in documents.of("VolumeAttributesClass") {
        let wanted = csi::ControllerModifyVolumeRequest {
            volume_id: id.clone(),
            mutable_parameters: map(&class["parameters"]),
            ..Default::default()
        };
        let changed = csi.answer(csi.controller().controller_modify_volume(wanted));
        changed.unwrap_or_else(|error| panic!("{class}: {error}"));
    }
    let unknown = csi::CreateVolumeRequest {
        parameters: BTreeMap::from([("growthLimits".to_owned(), "1Gi".to_owned())]),
        ..request("unknown", 1 << 20, &block())
    };
    assert_eq!(csi.create(unknown).expect_err("a slip").code(), tonic::Code::InvalidArgument);
}
