//! Without a kubelet: what the controllers of Kubernetes and the sidecars make of claims, clones,
//! snapshots and their deletion, on two nodes that exist only as objects, each with a pool and a
//! daemon of its own. Pods are given a node and stay pending.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Places};
use crate::kubectl::{Id, Kubectl, PATIENCE};
use crate::objects::{Claim, Source, class, namespace, on_node, snapshot};
use crate::process::{Seen, until};
use crate::report::Report;
use crate::storage::{Beside, Storage, TOPOLOGY};

const NS: &str = "control";
pub(crate) const NODES: [&str; 2] = ["node-a", "node-b"];
const POOL: &str = "64GiB";
/// Clones that are timed.
const ROUNDS: usize = 11;

/// Two nodes and what asks of them.
struct Control<'a> {
    kubectl: &'a Kubectl,
    storage: Vec<Storage>,
}

/// All cases of this part.
pub(crate) fn run(places: &Places, cluster: &Cluster, report: &mut Report) -> Result<()> {
    let kubectl = &cluster.kubectl;
    kubectl.apply(&[namespace(NS)])?;
    let start = |node: &&str| Storage::start(places, node, &places.state.join(node), POOL);
    let storage: Vec<Storage> = NODES.iter().map(start).collect::<Result<_>>()?;
    let beside = storage.iter().map(|storage| Beside::start(places, kubectl, storage));
    let beside: Vec<Beside> = beside.collect::<Result<_>>()?;
    let control = Control { kubectl, storage };
    report.case("control: capacity of each node is published", || control.capacity())?;
    report.case("control: a claim becomes a volume of one node", || control.claim())?;
    report.case("control: a claim from a claim is a clone in the pool", || control.clone_of())?;
    report.case("control: a clone that is sent elsewhere says so", || control.astray())?;
    report.case("control: a clone that names a node needs no pod", || control.directed())?;
    report.case("control: a snapshot and a claim from it", || control.snapshot())?;
    report.case("control: deletion in every order", || control.orders())?;
    report.case("control: wrong requests are explained", || control.wrong())?;
    report.case("control: nothing is left", || control.empty())?;
    for node in NODES {
        kubectl.run(&["delete", &format!("node/{node}"), &format!("csinode/{node}")])?;
    }
    drop(beside);
    Ok(())
}

impl Control<'_> {
    fn claim_of<'a>(&self, name: &'a str) -> Claim<'a> {
        Claim::new(NS, name, "1Gi")
    }

    /// Makes a claim and a pod for it on the first node; its PersistentVolume.
    fn make(&self, claim: &Claim<'_>) -> Result<Value> {
        let pod = on_node(claim.pod(), (TOPOLOGY, NODES[0]), true);
        self.kubectl.apply(&[claim.object(), pod])?;
        self.kubectl.bound((NS, claim.name))
    }

    /// Deletes the pod of a claim, and the claim.
    fn delete(&self, name: &str) -> Result<()> {
        let pod = format!("pod/{name}");
        self.kubectl.run(&["delete", "-n", NS, &pod, "--force", "--grace-period=0"])?;
        self.kubectl.delete(NS, &[&format!("pvc/{name}")])
    }

    fn capacity(&self) -> Result<String> {
        let mut shown = Vec::new();
        for node in NODES {
            let all = || self.kubectl.json(&["get", "csistoragecapacities", "-A"]);
            let capacity = until("an object of capacity", PATIENCE, || {
                let objects = all()?;
                let mut items = objects["items"].as_array().into_iter().flatten();
                let found = items.find(|object| {
                    object["nodeTopology"]["matchLabels"][TOPOLOGY] == node
                        && object["storageClassName"] == "pando"
                        && object["capacity"].is_string()
                });
                Ok(Seen::of(found.cloned(), || objects.to_string()))
            })?;
            let text = capacity["capacity"].as_str().context("a text")?;
            shown.push(format!("{node} {text}"));
        }
        Ok(shown.join(", "))
    }

    fn claim(&self) -> Result<String> {
        let volume = self.make(&self.claim_of("data"))?;
        let in_pool = self.storage[0].volume(&volume)?;
        ensure!(in_pool["size_bytes"] == 1_u64 << 30, "{in_pool}");
        ensure!(in_pool["labels"]["csi.pando.dev/claim"] == "control/data", "{in_pool}");
        let place = &volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"];
        let terms = json!([{"matchExpressions": [
            {"key": TOPOLOGY, "operator": "In", "values": [NODES[0]]}
        ]}]);
        ensure!(*place == terms, "{place}");
        Ok(in_pool["name"].to_string())
    }

    fn clone_of(&self) -> Result<String> {
        let copy = self.claim_of("copy").from(Source::Claim("data"));
        let copy = Claim { size: "2Gi", ..copy };
        let since = Instant::now();
        let volume = self.make(&copy)?;
        let took = since.elapsed();
        let in_pool = self.storage[0].volume(&volume)?;
        let source = self.storage[0].volume(&self.kubectl.bound((NS, "data"))?)?;
        ensure!(in_pool["source_id"] == source["id"], "{in_pool}");
        ensure!(in_pool["size_bytes"] == 2_u64 << 30, "{in_pool}");
        ensure!(in_pool["own_bytes"] == 0, "{in_pool}");
        let claim = self.kubectl.object("pvc", (NS, "data"))?;
        let kept = claim["metadata"]["finalizers"].to_string();
        ensure!(kept.contains("cloning-protection"), "{kept}");
        Ok(format!("bound {:.1} s after it was applied", took.as_secs_f64()))
    }

    /// Deletes a source while a clone of it waits for its first pod: the sidecar holds it back
    /// until that clone is made or given up.
    fn delete_awaited(&self) -> Result<()> {
        self.kubectl.apply(&[self.claim_of("waiting").from(Source::Claim("data")).object()])?;
        let words = ["delete", "-n", NS, "pod/data", "--force", "--grace-period=0"];
        self.kubectl.run(&words)?;
        self.kubectl.run(&["delete", "-n", NS, "pvc/data", "--wait=false"])?;
        until("the claim to be held for its clone alone", PATIENCE, || {
            let claim = self.kubectl.object("pvc", (NS, "data"))?;
            let holds = &claim["metadata"]["finalizers"];
            let alone = *holds == json!(["provisioner.storage.kubernetes.io/cloning-protection"]);
            Ok(Seen::is(alone, || holds.to_string()))
        })?;
        self.kubectl.delete(NS, &["pvc/waiting"])?;
        self.gone("pvc", (NS, "data"))
    }

    fn gone(&self, kind: &str, id: Id<'_>) -> Result<()> {
        until(&format!("the end of {kind} {}", id.1), PATIENCE, || {
            let found = self.kubectl.get(kind, id)?;
            Ok(Seen::is(found.is_none(), || format!("{found:?}")))
        })
    }

    /// A pod that would rather run elsewhere than where the source of its clone is: the scheduler
    /// does not know, so the driver has to say it.
    fn astray(&self) -> Result<String> {
        let astray = self.claim_of("astray").from(Source::Claim("data"));
        let pod = on_node(astray.pod(), (TOPOLOGY, NODES[1]), false);
        self.kubectl.apply(&[astray.object(), pod])?;
        let event = self.kubectl.event((NS, "astray"), &["ProvisioningFailed", "another node"])?;
        self.delete("astray")?;
        Ok(event)
    }

    /// The same pod, and a claim that names the node of its source: the clone is made before there
    /// is a pod, and the pod goes to it.
    fn directed(&self) -> Result<String> {
        let directed = self.claim_of("directed").from(Source::Claim("data"));
        let mut claim = directed.object();
        claim["metadata"]["annotations"] = json!({"volume.kubernetes.io/selected-node": NODES[0]});
        let mut took = Vec::new();
        for round in 1..=ROUNDS {
            let since = Instant::now();
            self.kubectl.apply(std::slice::from_ref(&claim))?;
            let volume = self.kubectl.bound((NS, "directed"))?;
            took.push(since.elapsed());
            self.storage[0].volume(&volume)?;
            if round < ROUNDS {
                self.kubectl.delete(NS, &["pvc/directed"])?;
            }
        }
        self.kubectl.apply(&[on_node(directed.pod(), (TOPOLOGY, NODES[1]), false)])?;
        self.kubectl.wait("pod", (NS, "directed"), ("{.spec.nodeName}", NODES[0]))?;
        self.delete("directed")?;
        took.sort();
        let seconds = |at: usize| took[at].as_secs_f64();
        Ok(format!(
            "of {ROUNDS}, from applied to bound: {:.2} s at least, {:.2} s in the middle, {:.2} s at \
             most",
            seconds(0),
            seconds(ROUNDS / 2),
            seconds(ROUNDS - 1)
        ))
    }

    fn snapshot(&self) -> Result<String> {
        let since = Instant::now();
        self.kubectl.apply(&[snapshot((NS, "monday"), "data")])?;
        self.kubectl.wait("volumesnapshot", (NS, "monday"), ("{.status.readyToUse}", "true"))?;
        let ready = since.elapsed();
        let restored = self.claim_of("restored").from(Source::Snapshot("monday"));
        let volume = self.make(&restored)?;
        let in_pool = self.storage[0].volume(&volume)?;
        let snapshots: Vec<Value> = self.snapshots();
        ensure!(snapshots.len() == 1, "{snapshots:?}");
        ensure!(in_pool["source_id"] == snapshots[0]["id"], "{in_pool}");
        Ok(format!("ready after {:.1} s", ready.as_secs_f64()))
    }

    fn snapshots(&self) -> Vec<Value> {
        let all = self.storage.iter().flat_map(Storage::volumes);
        all.filter(|volume| volume["kind"] == "snapshot").collect()
    }

    /// Source, snapshot, clone and restored claim, in the orders in which others refuse.
    fn orders(&self) -> Result<String> {
        let names = || -> Vec<Value> {
            self.storage[0].volumes().iter().map(|volume| volume["id"].clone()).collect()
        };
        let count = |expected: usize| {
            until("the number of volumes", PATIENCE, || {
                let names = names();
                Ok(Seen::is(names.len() == expected, || format!("{names:?}, not {expected}")))
            })
        };
        // data, copy (a clone of it), monday (a snapshot of it), restored (from monday).
        count(4)?;
        self.delete_awaited()?;
        count(3)?;
        self.kubectl.delete(NS, &["volumesnapshot/monday"])?;
        count(2)?;
        let second = Claim { size: "2Gi", ..self.claim_of("second").from(Source::Claim("copy")) };
        self.make(&second)?;
        count(3)?;
        self.delete("second")?;
        count(2)?;
        self.delete("copy")?;
        self.delete("restored")?;
        count(0)?;
        Ok("source first, snapshot before what was made from it, clone first".to_owned())
    }

    /// Each mistake, and the event that its author sees.
    fn wrong(&self) -> Result<String> {
        let parameters = |key: &str, value: &str| json!({key: value});
        self.kubectl.apply(&[
            class("typo", &parameters("frieze", "true")),
            class("fast", &parameters("csi.storage.k8s.io/fstype", "zfs")),
        ])?;
        self.make(&Claim::new(NS, "large", "2Gi"))?;
        let claim = |name| self.claim_of(name);
        let smaller = claim("smaller").from(Source::Claim("large"));
        let mode = Claim { block: true, size: "2Gi", ..claim("mode").from(Source::Claim("large")) };
        let cases: [(Claim<'_>, &[&str]); 7] = [
            (Claim { class: "typo", ..claim("typo") }, &["frieze", "unknown"]),
            (Claim { class: "fast", ..claim("fast") }, &["zfs"]),
            (smaller, &["greater than or equal in size"]),
            (claim("orphan").from(Source::Claim("nobody")), &["nobody"]),
            (claim("torn").from(Source::Snapshot("never")), &["never"]),
            (mode, &["same volume mode"]),
            (Claim { access: "ReadWriteMany", ..claim("shared") }, &["MULTI_NODE_MULTI_WRITER"]),
        ];
        let mut seen = Vec::new();
        for (claim, words) in &cases {
            let pod = on_node(claim.pod(), (TOPOLOGY, NODES[0]), true);
            self.kubectl.apply(&[claim.object(), pod])?;
            let words = [&["ProvisioningFailed"][..], words].concat();
            seen.push(format!("{}: {}", claim.name, self.kubectl.event((NS, claim.name), &words)?));
        }
        for (claim, _) in &cases {
            self.delete(claim.name)?;
        }
        self.delete("large")?;
        self.kubectl.run(&["delete", "storageclass", "typo", "fast"])?;
        Ok(format!("\n    {}", seen.join("\n    ")))
    }

    fn empty(&self) -> Result<String> {
        until("the end of all volumes", Duration::from_secs(60), || {
            let pools: Vec<Value> = self.storage.iter().flat_map(Storage::volumes).collect();
            let objects = self.kubectl.run(&["get", "pv,volumesnapshotcontents", "-o", "name"])?;
            let state = || format!("{pools:?} {objects}");
            Ok(Seen::is(pools.is_empty() && objects.trim().is_empty(), state))
        })?;
        Ok("neither in the pools nor in the cluster".to_owned())
    }
}
