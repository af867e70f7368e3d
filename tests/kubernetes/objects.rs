//! The objects that users write.

use serde_json::{Value, json};

/// An image with a shell.
pub(crate) const SHELL_IMAGE: &str = "busybox:1.36";
/// Where a pod has its volume, as a file system.
pub(crate) const MOUNT: &str = "/data";
/// Where it has its volume as a device.
pub(crate) const DEVICE: &str = "/dev/volume";

pub(crate) fn namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
}

/// What a claim is made from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    Nothing,
    Claim(&'a str),
    Snapshot(&'a str),
}

/// A claim.
#[derive(Clone, Copy)]
pub(crate) struct Claim<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) class: &'a str,
    /// As Kubernetes writes it.
    pub(crate) size: &'a str,
    pub(crate) source: Source<'a>,
    /// Whether it is a raw device.
    pub(crate) block: bool,
    pub(crate) access: &'a str,
}

impl<'a> Claim<'a> {
    /// One with a file system for one node, of the class `pando`.
    pub(crate) const fn new(namespace: &'a str, name: &'a str, size: &'a str) -> Self {
        let source = Source::Nothing;
        Self {
            namespace,
            name,
            class: "pando",
            size,
            source,
            block: false,
            access: "ReadWriteOnce",
        }
    }

    pub(crate) const fn from(self, source: Source<'a>) -> Self {
        Self { source, ..self }
    }

    pub(crate) fn object(&self) -> Value {
        let mut claim = json!({
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": {
                "storageClassName": self.class,
                "accessModes": [self.access],
                "volumeMode": if self.block { "Block" } else { "Filesystem" },
                "resources": {"requests": {"storage": self.size}},
            },
        });
        let source = match self.source {
            Source::Nothing => return claim,
            Source::Claim(name) => json!({"kind": "PersistentVolumeClaim", "name": name}),
            Source::Snapshot(name) => json!({
                "apiGroup": "snapshot.storage.k8s.io",
                "kind": "VolumeSnapshot",
                "name": name,
            }),
        };
        claim["spec"]["dataSource"] = source;
        claim
    }

    /// A pod of the name of the claim that uses it, and does nothing.
    pub(crate) fn pod(&self) -> Value {
        let mut container = json!({
            "name": "main",
            "image": SHELL_IMAGE,
            "command": ["sleep", "infinity"],
        });
        if self.block {
            container["volumeDevices"] = json!([{"name": "data", "devicePath": DEVICE}]);
        } else {
            container["volumeMounts"] = json!([{"name": "data", "mountPath": MOUNT}]);
        }
        let volume = json!({"name": "data", "persistentVolumeClaim": {"claimName": self.name}});
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": {
                "containers": [container],
                "volumes": [volume],
                "terminationGracePeriodSeconds": 0,
            },
        })
    }
}

/// The same pod, on the node whose label `key` has this value: required, or only preferred.
pub(crate) fn on_node(mut pod: Value, (key, node): (&str, &str), required: bool) -> Value {
    let expression = json!({"key": key, "operator": "In", "values": [node]});
    let term = json!({"matchExpressions": [expression]});
    let affinity = if required {
        json!({"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}})
    } else {
        let weighed = json!([{"weight": 100, "preference": term}]);
        json!({"preferredDuringSchedulingIgnoredDuringExecution": weighed})
    };
    pod["spec"]["affinity"] = json!({"nodeAffinity": affinity});
    pod
}

pub(crate) fn snapshot((namespace, name): (&str, &str), claim: &str) -> Value {
    json!({
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshot",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "volumeSnapshotClassName": "pando",
            "source": {"persistentVolumeClaimName": claim},
        },
    })
}

pub(crate) fn class(name: &str, parameters: &Value) -> Value {
    json!({
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": crate::storage::DRIVER,
        "volumeBindingMode": "WaitForFirstConsumer",
        "parameters": parameters,
    })
}
