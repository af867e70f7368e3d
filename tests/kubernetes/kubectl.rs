//! The client of the cluster: `kubectl`, as people use it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::process::{Seen, until};

/// Longest time for what a controller does of itself. kubelet looks at a pod that runs every minute
/// and a half.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// `kubectl` with the rights of an administrator.
#[derive(Clone)]
pub(crate) struct Kubectl {
    program: PathBuf,
    config: PathBuf,
}

impl Kubectl {
    /// The program, and the file that says where the cluster is.
    pub(crate) fn new(program: &Path, config: &Path) -> Self {
        Self { program: program.to_owned(), config: config.to_owned() }
    }

    /// A command.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--kubeconfig").arg(&self.config).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn output(&self, arguments: &[&str]) -> Result<Output> {
        self.command(arguments).output().context("kubectl does not start")
    }

    /// What a command prints that must succeed.
    pub(crate) fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.output(arguments)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {}: {said}", arguments.join(" "));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The answer of a command that prints JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.run(&[arguments, &["-o", "json"]].concat())?)?)
    }

    /// Applies objects.
    pub(crate) fn apply(&self, objects: &[Value]) -> Result<()> {
        let output = self.give(&["apply", "-f", "-"], objects)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl apply: {said}");
        Ok(())
    }

    /// Runs a command with objects for its input.
    fn give(&self, arguments: &[&str], objects: &[Value]) -> Result<Output> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("kubectl does not start")?;
        let mut input = child.stdin.take().context("a pipe")?;
        input.write_all(list.to_string().as_bytes())?;
        drop(input);
        Ok(child.wait_with_output()?)
    }

    /// The objects that a file describes.
    pub(crate) fn read(&self, file: &Path) -> Result<Vec<Value>> {
        let file = file.to_str().context("a text")?;
        let text = self.run(&["create", "--dry-run=client", "-o", "json", "-f", file])?;
        // One object after the other, or a list.
        let objects = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        let objects: Vec<Value> = objects.collect::<Result<_, _>>()?;
        let unpacked = objects.into_iter().flat_map(|object| match &object["items"] {
            Value::Array(items) => items.clone(),
            _ => vec![object],
        });
        Ok(unpacked.collect())
    }

    /// An object, if there is one of this name.
    pub(crate) fn get(&self, kind: &str, (namespace, name): Id<'_>) -> Result<Option<Value>> {
        let words = ["get", kind, name, "-n", namespace, "--ignore-not-found", "-o", "json"];
        let text = self.run(&words)?;
        if text.trim().is_empty() { Ok(None) } else { Ok(Some(serde_json::from_str(&text)?)) }
    }

    /// An object that is there.
    pub(crate) fn object(&self, kind: &str, id: Id<'_>) -> Result<Value> {
        self.get(kind, id)?.with_context(|| format!("no {kind} {}/{}", id.0, id.1))
    }

    /// Waits, by watching, until a field (`{.status.phase}`) of an object has a value.
    pub(crate) fn wait(
        &self,
        kind: &str,
        (namespace, name): Id<'_>,
        (field, value): (&str, &str),
    ) -> Result<()> {
        let object = format!("{kind}/{name}");
        let wish = format!("--for=jsonpath={field}={value}");
        let limit = format!("--timeout={}s", PATIENCE.as_secs());
        let waited = self.run(&["wait", &object, "-n", namespace, &wish, &limit]);
        waited.map(drop).with_context(|| {
            let events = self.events((namespace, name)).unwrap_or_default();
            format!("{kind} {namespace}/{name}: {field} is not {value}; events:\n{events:#?}")
        })
    }

    /// Waits until a claim is bound; its PersistentVolume.
    pub(crate) fn bound(&self, (namespace, name): Id<'_>) -> Result<Value> {
        self.wait("pvc", (namespace, name), ("{.status.phase}", "Bound"))?;
        let claim = self.object("pvc", (namespace, name))?;
        let volume = claim["spec"]["volumeName"].as_str().context("a bound claim has a volume")?;
        self.object("pv", ("", volume))
    }

    /// Deletes objects (`pvc/data`) and waits until they are gone.
    pub(crate) fn delete(&self, namespace: &str, objects: &[&str]) -> Result<()> {
        let limit = format!("--timeout={}s", PATIENCE.as_secs());
        let words = ["delete", "-n", namespace, "--wait=true", limit.as_str()];
        self.run(&[&words[..], objects].concat()).map(drop)
    }

    /// The warnings about an object, oldest first.
    pub(crate) fn events(&self, (namespace, name): Id<'_>) -> Result<Vec<String>> {
        let wish = format!("involvedObject.name={name}");
        let found = self.json(&["get", "events", "-n", namespace, "--field-selector", &wish])?;
        let items = found["items"].as_array().cloned().unwrap_or_default();
        let text = |event: &Value, key: &str| event[key].as_str().unwrap_or_default().to_owned();
        let shown = |event| format!("{}: {}", text(event, "reason"), text(event, "message"));
        Ok(items.iter().map(shown).collect())
    }

    /// Waits for an event about an object whose text contains all of `words`; that text.
    pub(crate) fn event(&self, id: Id<'_>, words: &[&str]) -> Result<String> {
        until(&format!("an event of {} with {words:?}", id.1), PATIENCE, || {
            let events = self.events(id)?;
            let mut fitting = events.iter().filter(|e| words.iter().all(|word| e.contains(word)));
            Ok(Seen::of(fitting.next_back().cloned(), || format!("{events:#?}")))
        })
    }

    /// Runs a shell's words in a pod; what they print.
    pub(crate) fn exec(&self, (namespace, pod): Id<'_>, words: &str) -> Result<String> {
        Ok(self.run(&["exec", "-n", namespace, pod, "--", "sh", "-c", words])?.trim().to_owned())
    }
}

/// Namespace and name of an object; of one that has no namespace, anything and a name.
pub(crate) type Id<'a> = (&'a str, &'a str);
