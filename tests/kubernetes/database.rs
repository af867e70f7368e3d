//! The case for which Pando is there: the administrator of a database copies its volume while it
//! works, by writing objects of Kubernetes, and starts a second server on the copy.
//! The example of a database in deploy/kubernetes/examples as it is, but for the image.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::kubectl::{Id, PATIENCE};
use crate::node::{Node, grows_mounted};
use crate::objects::namespace;
use crate::process::{Process, Seen, until};
use crate::report::Report;

const NS: &str = "shop";
/// The server that works, and the one on its clone.
const SOURCE: Id<'_> = (NS, "postgres-0");
const WHAT_IF: Id<'_> = (NS, "what-if");
const ROLLED_BACK: Id<'_> = (NS, "rolled-back");
const CLAIM: &str = "data-postgres-0";
/// The image of the example.
const IMAGE: &str = "postgres:17";
/// pgbench's unit of size: 100,000 accounts each, some 15 MiB.
const SCALE: &str = "20";
/// Copies, one after the other; the last one stays.
const ROUNDS: usize = 3;
/// Transactions that must go on beside a copy.
const TRANSACTIONS: u64 = 200;

/// The example, and the load.
struct Database<'a> {
    node: &'a Node<'a>,
    objects: Vec<Value>,
    load: Option<Process>,
}

/// All cases of this part.
pub(crate) fn run(node: &Node<'_>, report: &mut Report) -> Result<()> {
    node.kubectl.apply(&[namespace(NS)])?;
    let mut objects = Vec::new();
    for file in ["database.yaml", "what-if.yaml", "way-back.yaml"] {
        objects.extend(node.kubectl.read(&node.places.manifests.join("examples").join(file))?);
    }
    let image = image(node)?;
    for object in &mut objects {
        for pod in ["/spec/containers/0/image", "/spec/template/spec/containers/0/image"] {
            if let Some(named) = object.pointer_mut(pod) {
                ensure!(*named == IMAGE, "{named}");
                *named = image.clone().into();
            }
        }
    }
    let mut database = Database { node, objects, load: None };
    report.case("database: it starts and works", || database.start())?;
    report.case("database: a second server on a clone of it", || database.clone_it())?;
    report.case("database: the two go their own ways", || database.apart())?;
    report.case("database: a way back from a migration", || database.roll_back())?;
    report.case("database: it grows", || database.grow())?;
    report.case("database: a clone goes, the source stays", || database.clone_goes())?;
    report.case("database: the source goes, a copy stays", || database.source_goes())?;
    drop(database);
    node.kubectl.run(&["delete", "namespace", NS, "--timeout=180s"])?;
    report.case("database: nothing is left", || node.empty())
}

/// The image with Debian's PostgreSQL.
fn image(node: &Node<'_>) -> Result<String> {
    for entry in std::fs::read_dir(&node.places.images)? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        if let Some(version) = name.strip_prefix("postgres:").and_then(|v| v.strip_suffix(".tar")) {
            return Ok(format!("postgres:{version}"));
        }
    }
    bail!("no image of PostgreSQL")
}

impl Database<'_> {
    /// The objects of the example of this kind and name.
    fn example(&self, wanted: &[(&str, &str)]) -> Result<Vec<Value>> {
        let found: Vec<Value> = self
            .objects
            .iter()
            .filter(|object| {
                wanted.iter().any(|(kind, name)| {
                    object["kind"] == *kind && object["metadata"]["name"] == *name
                })
            })
            .cloned()
            .collect();
        ensure!(found.len() == wanted.len(), "{wanted:?} are not in the example");
        Ok(found)
    }

    /// The answer of a server to a query.
    fn query(&self, pod: Id<'_>, query: &str) -> Result<String> {
        let words =
            format!("psql -h /run/postgresql -U postgres -XAtq -v ON_ERROR_STOP=1 -c \"{query}\"");
        self.node.kubectl.exec(pod, &words)
    }

    /// Waits until a server answers.
    fn answers(&self, pod: Id<'_>) -> Result<()> {
        until(&format!("an answer of {}", pod.1), PATIENCE, || {
            let answer = self.query(pod, "select 1");
            let log = || self.node.kubectl.run(&["logs", "-n", pod.0, pod.1, "--tail=20"]);
            Ok(Seen::is(answer.is_ok(), || format!("{answer:?} {:?}", log())))
        })
    }

    /// Committed transactions of pgbench.
    fn transactions(&self, pod: Id<'_>) -> Result<u64> {
        Ok(self.query(pod, "select count(*) from pgbench_history")?.parse()?)
    }

    /// Everything that PostgreSQL and pgbench can tell about the state of the data.
    fn verify(&self, pod: Id<'_>) -> Result<()> {
        self.query(pod, "create extension if not exists amcheck")?;
        let checked = self.query(
            pod,
            "select count(bt_index_check(c.oid, true)) from pg_class c \
             join pg_am a on a.oid = c.relam join pg_index i on i.indexrelid = c.oid \
             where a.amname = 'btree' and c.relkind = 'i' and i.indisready and i.indisvalid",
        )?;
        ensure!(checked.parse::<u64>()? > 100, "{checked} indexes");
        // A transaction adds the same to an account, a teller and a branch, and writes it down.
        let sums = self.query(
            pod,
            "select (select sum(abalance) from pgbench_accounts), \
             (select sum(tbalance) from pgbench_tellers), \
             (select sum(bbalance) from pgbench_branches), \
             (select sum(delta) from pgbench_history)",
        )?;
        let sums: Vec<&str> = sums.split('|').collect();
        ensure!(sums.len() == 4 && sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
        // Reads every page and compares its checksum.
        self.node.kubectl.exec(pod, "pg_dump -h /run/postgresql -U postgres -f /dev/null")?;
        Ok(())
    }

    /// The load is still there, and at work.
    fn works(&mut self) -> Result<()> {
        self.load.as_mut().context("a load")?.alive()?;
        let before = self.transactions(SOURCE)?;
        until("more transactions", PATIENCE, || {
            let now = self.transactions(SOURCE)?;
            Ok(Seen::is(now >= before + TRANSACTIONS, || format!("{before} and {now}")))
        })
    }

    fn start(&mut self) -> Result<String> {
        let wanted = [
            ("StorageClass", "pando-database"),
            ("StorageClass", "pando-what-if"),
            ("VolumeSnapshotClass", "pando-database"),
            ("Secret", "postgres"),
            ("Service", "postgres"),
            ("StatefulSet", "postgres"),
        ];
        self.node.kubectl.apply(&self.example(&wanted)?)?;
        let words = ["rollout", "status", "statefulset/postgres", "-n", NS, "--timeout=180s"];
        self.node.kubectl.run(&words)?;
        self.answers(SOURCE)?;
        let bench = format!("pgbench -h /run/postgresql -U postgres -i -q -s {SCALE} postgres");
        self.node.kubectl.exec(SOURCE, &bench)?;
        // As in a database that has worked for a while: a copy replays what was since.
        self.query(SOURCE, "checkpoint")?;
        self.load()?;
        self.works()?;
        let volume = self.node.storage.volume(&self.node.kubectl.bound((NS, CLAIM))?)?;
        Ok(format!("mapped {} MiB", volume["mapped_bytes"].as_u64().unwrap_or_default() >> 20))
    }

    /// Starts the load.
    fn load(&mut self) -> Result<()> {
        let bench = "pgbench -h /run/postgresql -U postgres -n -c 4 -j 2 -P 1 -T 3600 postgres";
        let words = ["exec", "-n", NS, SOURCE.1, "--", "sh", "-c", bench];
        let mut command = self.node.kubectl.command(&words);
        self.load = Some(Process::start(&self.node.places.logs(), "pgbench", &mut command)?);
        Ok(())
    }

    /// The way of a copy, timed: from the objects to the answers.
    fn copy(&mut self, objects: &[Value], pod: Id<'_>) -> Result<String> {
        let before = self.transactions(SOURCE)?;
        let since = Instant::now();
        self.node.kubectl.apply(objects)?;
        self.node.kubectl.bound(pod)?;
        let bound = since.elapsed();
        self.answers(pod)?;
        let answers = since.elapsed();
        let (copied, after) = (self.transactions(pod)?, self.transactions(SOURCE)?);
        ensure!((before..=after).contains(&copied), "{before} <= {copied} <= {after}");
        self.verify(pod)?;
        let log = self.node.kubectl.run(&["logs", "-n", pod.0, pod.1])?;
        ensure!(log.contains("automatic recovery in progress"), "no recovery:\n{log}");
        self.works()?;
        Ok(format!(
            "bound {} after it was applied, the server answers after {}; {copied} transactions \
             of {before} to {after}",
            seconds(bound),
            seconds(answers)
        ))
    }

    fn clone_it(&mut self) -> Result<String> {
        let wanted = [("PersistentVolumeClaim", "what-if"), ("Pod", "what-if")];
        let objects = self.example(&wanted)?;
        let mut seen = Vec::new();
        for round in 1..=ROUNDS {
            let timed = self.copy(&objects, WHAT_IF)?;
            let volume = self.node.storage.volume(&self.node.kubectl.bound(WHAT_IF)?)?;
            let kib = volume["own_bytes"].as_u64().unwrap_or(0) >> 10;
            seen.push(format!("{timed}; the clone takes {kib} KiB then"));
            if round < ROUNDS {
                self.node.kubectl.delete(NS, &["pod/what-if", "pvc/what-if"])?;
            }
        }
        Ok(format!("\n    {}", seen.join("\n    ")))
    }

    fn apart(&mut self) -> Result<String> {
        let at_clone = self.transactions(WHAT_IF)?;
        self.query(WHAT_IF, "create table only_here as select 1 as one")?;
        self.works()?;
        let there = self.query(SOURCE, "select to_regclass('only_here') is null")?;
        ensure!(there == "t", "what the clone has made is in the source");
        ensure!(self.transactions(WHAT_IF)? == at_clone, "the source reaches into its clone");
        Ok(format!(
            "{at_clone} transactions in the clone, {} in the source",
            self.transactions(SOURCE)?
        ))
    }

    fn roll_back(&mut self) -> Result<String> {
        let snapshot = (NS, "before-migration");
        let before = self.transactions(SOURCE)?;
        let since = Instant::now();
        self.node.kubectl.apply(&self.example(&[("VolumeSnapshot", snapshot.1)])?)?;
        self.node.kubectl.wait("volumesnapshot", snapshot, ("{.status.readyToUse}", "true"))?;
        let ready = since.elapsed();
        let at_most = self.transactions(SOURCE)?;
        self.query(SOURCE, "update pgbench_branches set filler = 'migrated'")?;
        let mut objects = self.example(&[("PersistentVolumeClaim", "rolled-back")])?;
        let mut pod = self.example(&[("Pod", "what-if")])?.remove(0);
        let text = pod.to_string().replace("\"what-if\"", "\"rolled-back\"");
        pod = serde_json::from_str(&text)?;
        objects.push(pod);
        self.node.kubectl.apply(&objects)?;
        self.answers(ROLLED_BACK)?;
        let restored = self.transactions(ROLLED_BACK)?;
        ensure!((before..=at_most).contains(&restored), "{before} <= {restored} <= {at_most}");
        let migrated = self.query(
            ROLLED_BACK,
            "select count(*) from pgbench_branches where filler = 'migrated'",
        )?;
        ensure!(migrated == "0", "{migrated} rows of after the snapshot");
        self.verify(ROLLED_BACK)?;
        self.works()?;
        Ok(format!("snapshot ready after {}", seconds(ready)))
    }

    fn grow(&mut self) -> Result<String> {
        let size = |text: String| -> Result<u64> { Ok(text.parse::<u64>()? >> 20) };
        let df = "df -k /var/lib/postgresql/data | awk 'END { print $2 }'";
        let before = size(self.node.kubectl.exec(SOURCE, df)?)?;
        self.node.ask((NS, CLAIM), "120Gi")?;
        let how = if grows_mounted() {
            self.node.grown((NS, CLAIM), "120Gi")?;
            "while it works"
        } else {
            self.node.not_grown((NS, CLAIM), "CAP_SYS_RESOURCE")?;
            self.load = None;
            let staged = self.node.staged()?;
            let scale = |replicas: &str| {
                self.node.kubectl.run(&["scale", "-n", NS, "statefulset/postgres", replicas])
            };
            scale("--replicas=0")?;
            self.node.unstaged(staged - 1)?;
            scale("--replicas=1")?;
            self.node.grown((NS, CLAIM), "120Gi")?;
            self.answers(SOURCE)?;
            self.load()?;
            "with a restart of the server, as this machine has no CAP_SYS_RESOURCE"
        };
        let after = size(self.node.kubectl.exec(SOURCE, df)?)?;
        ensure!(after > before * 11 / 10, "{before} and {after} GiB");
        self.works()?;
        Ok(format!("{before} to {after} GiB {how}"))
    }

    fn clone_goes(&mut self) -> Result<String> {
        self.node.kubectl.delete(NS, &["pod/what-if", "pvc/what-if"])?;
        self.works()?;
        self.verify(SOURCE)?;
        Ok(format!("{} transactions", self.transactions(SOURCE)?))
    }

    fn source_goes(&mut self) -> Result<String> {
        self.load = None;
        self.node.kubectl.delete(NS, &["volumesnapshot/before-migration"])?;
        self.node.kubectl.delete(NS, &["statefulset/postgres", "pod/postgres-0"])?;
        let volume = self.node.kubectl.bound((NS, CLAIM))?;
        self.node.kubectl.delete(NS, &[&format!("pvc/{CLAIM}")])?;
        until("the end of the volume", PATIENCE, || {
            let volume = self.node.storage.volume(&volume);
            Ok(Seen::is(volume.is_err(), || format!("{volume:?}")))
        })?;
        self.query(ROLLED_BACK, "vacuum full pgbench_accounts")?;
        self.verify(ROLLED_BACK)?;
        self.node.kubectl.delete(NS, &["pod/rolled-back", "pvc/rolled-back"])?;
        Ok("the restored copy was rewritten and verified without source and snapshot".to_owned())
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
