//! Pods on volumes: deploy/kubernetes as it is, on a kubelet and containers.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::kubectl::{Kubectl, PATIENCE};
use crate::node::{NODE, Node, grows_mounted};
use crate::objects::{Claim, DEVICE, MOUNT, Source, namespace, snapshot};
use crate::process::{Seen, until};
use crate::report::Report;
use crate::storage::NAMESPACE;

const NS: &str = "pods";

/// All cases of this part.
pub(crate) fn run(node: &mut Node<'_>, report: &mut Report) -> Result<()> {
    node.kubectl.apply(&[namespace(NS)])?;
    report.case("pods: the example of a clone", || example(node))?;
    report.case("pods: a frozen xfs and its clone", || frozen(node))?;
    report.case("pods: a raw device and its clone", || raw(node))?;
    report.case("pods: a snapshot is a way back", || way_back(node))?;
    report.case("pods: a claim grows while it is used", || grows(node))?;
    report.case("pods: an ext4 grows", || grows_ext4(node))?;
    report.case("pods: limits change while a claim is used", || modify(node))?;
    report.case("pods: a clone of what was never used runs", || unused(node))?;
    report.case("pods: adapter and kubelet come again", || come_again(node))?;
    report.case("pods: the daemon is killed, pods are restarted", || killed(node))?;
    node.kubectl.run(&["delete", "namespace", NS, "--timeout=180s"])?;
    report.case("pods: nothing is left", || node.empty())
}

fn df(kubectl: &Kubectl, pod: &str) -> Result<u64> {
    let text = kubectl.exec((NS, pod), &format!("df -k {MOUNT} | awk 'END {{ print $2 }}'"))?;
    text.parse().with_context(|| format!("df says {text:?}"))
}

fn sum(kubectl: &Kubectl, pod: &str, path: &str) -> Result<String> {
    kubectl.exec((NS, pod), &format!("md5sum <{path}"))
}

/// Fills a file, or the begin of a device, with random bytes.
fn fill(kubectl: &Kubectl, pod: &str, path: &str) -> Result<String> {
    let words = format!("dd if=/dev/urandom of={path} bs=1M count=8 conv=notrunc 2>/dev/null");
    kubectl.exec((NS, pod), &words)?;
    sum(kubectl, pod, path)
}

/// app.yaml and clone.yaml of deploy/kubernetes/examples, as they are.
fn example(node: &Node<'_>) -> Result<String> {
    let kubectl = node.kubectl;
    let place = node.places.manifests.join("examples").display().to_string();
    let (app, clone) = (format!("{place}/app.yaml"), format!("{place}/clone.yaml"));
    kubectl.run(&["apply", "-n", NS, "-f", &app])?;
    let ready = ["wait", "-n", NS, "--for=condition=Ready", "pod/app", "--timeout=120s"];
    kubectl.run(&ready)?;
    kubectl.run(&["apply", "-n", NS, "-f", &clone])?;
    node.running((NS, "app-on-clone"))?;
    let started = kubectl.exec((NS, "app"), "cat /data/started")?;
    ensure!(kubectl.exec((NS, "app-on-clone"), "cat /data/started")? == started, "{started}");
    let (source, copy) = (df(kubectl, "app")?, df(kubectl, "app-on-clone")?);
    ensure!(copy > source * 19 / 10, "{source} and {copy} KiB");
    kubectl.run(&["delete", "-n", NS, "-f", &app, "-f", &clone, "--timeout=120s"])?;
    Ok(format!("{source} and {copy} KiB"))
}

/// What was written and not synced is in a clone of a frozen file system.
fn frozen(node: &Node<'_>) -> Result<String> {
    let kubectl = node.kubectl;
    let source = Claim { class: "pando-frozen", ..Claim::new(NS, "xfs", "1Gi") };
    node.up(&[source.object(), source.pod()], (NS, "xfs"))?;
    let file = format!("{MOUNT}/file");
    let written = fill(kubectl, "xfs", &file)?;
    let copy = Claim { name: "xfs-copy", ..source }.from(Source::Claim("xfs"));
    let since = Instant::now();
    node.up(&[copy.object(), copy.pod()], (NS, "xfs-copy"))?;
    let took = since.elapsed();
    ensure!(sum(kubectl, "xfs-copy", &file)? == written, "the file of the clone differs");
    kubectl.exec((NS, "xfs-copy"), &format!("rm {file}; sync"))?;
    ensure!(sum(kubectl, "xfs", &file)? == written, "the source has changed");
    kubectl.delete(NS, &["pod/xfs", "pvc/xfs"])?;
    kubectl.exec((NS, "xfs-copy"), &format!("echo more >{file}; sync"))?;
    kubectl.delete(NS, &["pod/xfs-copy", "pvc/xfs-copy"])?;
    Ok(format!("the pod on the clone runs {:.1} s after it was applied", took.as_secs_f64()))
}

fn raw(node: &Node<'_>) -> Result<String> {
    let kubectl = node.kubectl;
    let source = Claim { block: true, ..Claim::new(NS, "raw", "64Mi") };
    node.up(&[source.object(), source.pod()], (NS, "raw"))?;
    let written = fill(kubectl, "raw", DEVICE)?;
    // Nothing is frozen: what was not synced is not in a copy.
    kubectl.exec((NS, "raw"), "sync")?;
    let copy = Claim { name: "raw-copy", size: "96Mi", ..source }.from(Source::Claim("raw"));
    node.up(&[copy.object(), copy.pod()], (NS, "raw-copy"))?;
    let begin = format!("dd if={DEVICE} bs=1M count=64 2>/dev/null | md5sum");
    let copied = kubectl.exec((NS, "raw-copy"), &begin)?;
    ensure!(copied == written, "{written} and {copied}");
    fill(kubectl, "raw-copy", DEVICE)?;
    ensure!(sum(kubectl, "raw", DEVICE)? == written, "the source has changed");
    node.ask((NS, "raw"), "128Mi")?;
    node.grown((NS, "raw"), "128Mi")?;
    let size = kubectl.exec((NS, "raw"), &format!("blockdev --getsize64 {DEVICE}"))?;
    ensure!(size == (128_u64 << 20).to_string(), "{size}");
    kubectl.delete(NS, &["pod/raw", "pvc/raw", "pod/raw-copy", "pvc/raw-copy"])?;
    Ok("8 MiB compared, the source grown to 128 MiB in use".to_owned())
}

fn way_back(node: &Node<'_>) -> Result<String> {
    let kubectl = node.kubectl;
    let claim = Claim::new(NS, "work", "1Gi");
    node.up(&[claim.object(), claim.pod()], (NS, "work"))?;
    let file = format!("{MOUNT}/file");
    let before = fill(kubectl, "work", &file)?;
    kubectl.exec((NS, "work"), "sync")?;
    kubectl.apply(&[snapshot((NS, "before"), "work")])?;
    kubectl.wait("volumesnapshot", (NS, "before"), ("{.status.readyToUse}", "true"))?;
    fill(kubectl, "work", &file)?;
    let back = Claim { name: "back", size: "2Gi", ..claim }.from(Source::Snapshot("before"));
    node.up(&[back.object(), back.pod()], (NS, "back"))?;
    ensure!(sum(kubectl, "back", &file)? == before, "not what was there");
    ensure!(df(kubectl, "back")? > 19 << 16, "{} KiB", df(kubectl, "back")?);
    kubectl.delete(NS, &["volumesnapshot/before"])?;
    kubectl.delete(NS, &["pod/work", "pvc/work"])?;
    ensure!(sum(kubectl, "back", &file)? == before, "not what was there");
    kubectl.delete(NS, &["pod/back", "pvc/back"])?;
    Ok("restored larger; snapshot and source are gone before it".to_owned())
}

fn grows(node: &Node<'_>) -> Result<String> {
    let kubectl = node.kubectl;
    let claim = Claim { class: "pando-frozen", ..Claim::new(NS, "grows", "1Gi") };
    node.up(&[claim.object(), claim.pod()], (NS, "grows"))?;
    let before = df(kubectl, "grows")?;
    let since = Instant::now();
    node.ask((NS, "grows"), "3Gi")?;
    node.grown((NS, "grows"), "3Gi")?;
    let (took, after) = (since.elapsed(), df(kubectl, "grows")?);
    ensure!(after > before * 28 / 10, "{before} and {after} KiB");
    Ok(format!("xfs, {before} to {after} KiB in {:.1} s", took.as_secs_f64()))
}

/// An ext4 grows while it is mounted where processes may have the right to it, else when it is
/// staged again.
fn grows_ext4(node: &Node<'_>) -> Result<String> {
    let kubectl = node.kubectl;
    let claim = Claim::new(NS, "ext4", "1Gi");
    node.up(&[claim.object(), claim.pod()], (NS, "ext4"))?;
    let before = df(kubectl, "ext4")?;
    node.ask((NS, "ext4"), "3Gi")?;
    let how = if grows_mounted() {
        "while it is mounted".to_owned()
    } else {
        let reason = node.not_grown((NS, "ext4"), "CAP_SYS_RESOURCE")?;
        let staged = node.staged()?;
        kubectl.delete(NS, &["pod/ext4"])?;
        node.unstaged(staged - 1)?;
        node.up(&[claim.pod()], (NS, "ext4"))?;
        format!("when it is staged again, {reason}")
    };
    node.grown((NS, "ext4"), "3Gi")?;
    let after = df(kubectl, "ext4")?;
    ensure!(after > before * 28 / 10, "{before} and {after} KiB");
    kubectl.delete(NS, &["pod/ext4", "pvc/ext4"])?;
    Ok(format!("{before} to {after} KiB {how}"))
}

fn modify(node: &Node<'_>) -> Result<String> {
    let patch = "{\"spec\":{\"volumeAttributesClassName\":\"pando-modest\"}}";
    node.kubectl.run(&["patch", "pvc", "grows", "-n", NS, "-p", patch])?;
    let field = "{.status.currentVolumeAttributesClassName}";
    node.kubectl.wait("pvc", (NS, "grows"), (field, "pando-modest"))?;
    let volume = node.storage.volume(&node.kubectl.bound((NS, "grows"))?)?;
    ensure!(volume["iops_limit"] == 2000, "{volume}");
    node.kubectl.delete(NS, &["pod/grows", "pvc/grows"])?;
    Ok(format!("iops_limit {}", volume["iops_limit"]))
}

/// A clone of a claim whose pod has not started yet, as in one chart of both: the pod of the clone
/// starts, whether its source was formatted in time or not.
fn unused(node: &Node<'_>) -> Result<String> {
    let source = Claim::new(NS, "unused", "1Gi");
    let mut nowhere = source.pod();
    // It is given a node, and never starts there.
    nowhere["spec"]["containers"][0]["image"] = json!("nobody.test/nothing:1");
    node.kubectl.apply(&[source.object(), nowhere])?;
    node.kubectl.bound((NS, "unused"))?;
    let copy = Claim { name: "unused-copy", ..source }.from(Source::Claim("unused"));
    node.up(&[copy.object(), copy.pod()], (NS, "unused-copy"))?;
    node.kubectl.delete(NS, &["pod/unused", "pod/unused-copy"])?;
    node.kubectl.delete(NS, &["pvc/unused", "pvc/unused-copy"])?;
    Ok("the pod of the clone runs".to_owned())
}

fn come_again(node: &mut Node<'_>) -> Result<String> {
    let claim = Claim::new(NS, "steady", "1Gi");
    node.up(&[claim.object(), claim.pod()], (NS, "steady"))?;
    let file = format!("{MOUNT}/file");
    let written = fill(node.kubectl, "steady", &file)?;
    let words = ["delete", "pod", "-n", NAMESPACE, "-l", "app=pando-csi", "--wait=true"];
    node.kubectl.run(&words)?;
    node.rollout()?;
    ensure!(sum(node.kubectl, "steady", &file)? == written, "the file differs");
    node.kubelet.restart(node.places)?;
    let copy = Claim { name: "steady-copy", ..claim }.from(Source::Claim("steady"));
    node.up(&[copy.object(), copy.pod()], (NS, "steady-copy"))?;
    node.kubectl.delete(NS, &["pod/steady-copy", "pvc/steady-copy"])?;
    Ok("a pod goes on over both, and is cloned afterwards".to_owned())
}

/// A loop device does not survive its daemon; the pod that is made anew has what was synced.
fn killed(node: &mut Node<'_>) -> Result<String> {
    let file = format!("{MOUNT}/file");
    let claim = Claim::new(NS, "steady", "1Gi");
    node.kubectl.exec((NS, "steady"), "sync")?;
    let written = sum(node.kubectl, "steady", &file)?;
    node.storage.kill()?;
    node.storage.spawn()?;
    let since = Instant::now();
    node.kubectl.delete(NS, &["pod/steady"])?;
    node.up(&[claim.pod()], (NS, "steady"))?;
    let took = since.elapsed();
    ensure!(sum(node.kubectl, "steady", &file)? == written, "the file differs");
    node.kubectl.delete(NS, &["pod/steady", "pvc/steady"])?;
    let ready = until("a node without warnings", PATIENCE, || {
        let node = node.kubectl.object("node", ("", NODE))?;
        let unready: Vec<&Value> = node["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|condition| condition["type"] == "Ready" && condition["status"] != "True")
            .collect();
        Ok(Seen::is(unready.is_empty(), || format!("{unready:?}")))
    });
    ready?;
    Ok(format!("the pod is back {:.1} s after it was deleted", took.as_secs_f64()))
}
