//! The adapter's configuration: one TOML file, which flags override. Unknown keys are refused.
//! `deploy/pando-csi.toml` shows every key.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use pando_proto::parse_size;
use serde::{Deserialize, Deserializer, de};

/// Default name of the driver.
pub const DEFAULT_DRIVER: &str = "csi.pando.dev";
/// Maximum length of a configuration file in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Maximum length of the name of a node in bytes: Kubernetes writes it into a label value, which
/// has this limit.
const NODE_BYTES_MAX: usize = 63;
/// Maximum length of the name of a driver in bytes, by the CSI specification.
const DRIVER_BYTES_MAX: usize = 63;
/// Highest value of `overcommit`.
const OVERCOMMIT_MAX: u64 = 1000;

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Socket of the driver. By the CSI specification its name ends in `.sock`.
    pub endpoint: PathBuf,
    /// Socket of the daemon.
    pub daemon_socket: PathBuf,
    /// Name of this node, as Kubernetes knows it. Required.
    pub node_id: String,
    /// Name of the driver, as a StorageClass names it.
    pub driver_name: String,
    /// Directory in which kubelet looks for drivers. `None`: the adapter does not register itself.
    pub registration_dir: Option<PathBuf>,
    /// Where kubelet finds `endpoint`, if it has another path in kubelet's mount namespace.
    pub kubelet_endpoint: Option<PathBuf>,
    /// Address of the HTTP endpoints `/healthz` (this process) and `/readyz` (the pool). `None`:
    /// they are not served.
    pub health_address: Option<SocketAddr>,
    /// Whether the controller grows volumes. If not, NodeExpandVolume does it alone: for clusters
    /// whose resizer reaches the adapter of one node only.
    pub controller_expand: bool,
    /// Bytes of volumes that may be created for each available byte of the pool.
    pub overcommit: u64,
    /// Size of a volume whose request names no size.
    #[serde(deserialize_with = "size", rename = "default_size")]
    pub default_size_bytes: u64,
    /// Logs.
    pub log: Log,
}

/// Logs: to stderr, one line for each change of state and each failed call.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,pando_csi=debug`.
    pub level: String,
    /// Format of a line.
    pub format: LogFormat,
}

/// Format of the lines of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Text }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            endpoint: PathBuf::from("/run/pando/csi.sock"),
            daemon_socket: PathBuf::from("/run/pando/pando.sock"),
            node_id: String::new(),
            driver_name: DEFAULT_DRIVER.to_owned(),
            registration_dir: None,
            kubelet_endpoint: None,
            health_address: None,
            controller_expand: true,
            overcommit: 10,
            default_size_bytes: 1 << 30,
            log: Log::default(),
        }
    }
}

/// A size with a unit, such as `"1GiB"`, or a number of bytes.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<u64, D::Error> {
    let value = toml::Value::deserialize(deserializer)?;
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    parse_size(&text).map_err(de::Error::custom)
}

impl Config {
    /// Reads the file at `path`. [`Config::validate`] checks the values.
    ///
    /// # Errors
    /// It cannot be read, or is not a configuration.
    pub fn load(path: &Path) -> Result<Self> {
        let shown = path.display();
        let length = std::fs::metadata(path).with_context(|| format!("configuration {shown}"))?;
        ensure!(
            length.len() <= FILE_BYTES_MAX,
            "configuration {shown} is larger than {FILE_BYTES_MAX} bytes"
        );
        let text =
            std::fs::read_to_string(path).with_context(|| format!("configuration {shown}"))?;
        toml::from_str(&text).with_context(|| format!("configuration {shown}"))
    }

    /// Checks the values.
    ///
    /// # Errors
    /// The first invalid value, with its key.
    pub fn validate(&self) -> Result<()> {
        let name = &self.driver_name;
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        let edge = |c: char| c.is_ascii_alphabetic();
        if name.len() < 2
            || name.len() > DRIVER_BYTES_MAX
            || !name.chars().all(inner)
            || !(name.starts_with(edge) && name.ends_with(edge))
        {
            bail!(
                "driver_name = {name:?}: 2 to {DRIVER_BYTES_MAX} of A-Z a-z 0-9 - . _, the first \
                 and the last a letter"
            );
        }
        let node = &self.node_id;
        let edge = |c: char| c.is_ascii_alphanumeric();
        if node.len() > NODE_BYTES_MAX
            || !node.chars().all(inner)
            || !(node.starts_with(edge) && node.ends_with(edge))
        {
            bail!(
                "node_id = {node:?}: set it to the node's name, 1 to {NODE_BYTES_MAX} of A-Z a-z \
                 0-9 - . _, the first and the last a letter or a digit"
            );
        }
        ensure!(
            self.endpoint.extension().is_some_and(|extension| extension == "sock"),
            "endpoint = {:?}: the name of a CSI socket ends in .sock",
            self.endpoint
        );
        ensure!(
            (1..=OVERCOMMIT_MAX).contains(&self.overcommit),
            "overcommit = {}: 1 to {OVERCOMMIT_MAX}",
            self.overcommit
        );
        ensure!(
            crate::validate::SIZES.contains(&self.default_size_bytes)
                && self.default_size_bytes.is_multiple_of(crate::validate::SIZE_UNIT),
            "default_size = {}: 4 KiB to 64 TiB, a multiple of 512",
            self.default_size_bytes
        );
        crate::server::filter(&self.log.level)?;
        Ok(())
    }

    /// The socket on which kubelet asks for the name and endpoint of the driver.
    #[must_use]
    pub fn registration_socket(&self) -> Option<PathBuf> {
        let directory = self.registration_dir.as_ref()?;
        Some(directory.join(format!("{}-reg.sock", self.driver_name)))
    }

    /// Key of the topology: each node is a segment.
    #[must_use]
    pub fn topology_key(&self) -> String {
        format!("{}/node", self.driver_name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Config> {
        let config: Config = toml::from_str(text)?;
        config.validate()?;
        Ok(config)
    }

    #[test]
    fn only_the_node_is_required() {
        let config = parsed("node_id = 'node-1'").unwrap();
        assert_eq!(config, Config { node_id: "node-1".to_owned(), ..Config::default() });
        assert_eq!(config.topology_key(), "csi.pando.dev/node");
        assert!(parsed("").unwrap_err().to_string().contains("node_id"));
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        let config = parsed("node_id = 'n'\ndefault_size = '10G'").unwrap();
        assert_eq!(config.default_size_bytes, 10 << 30);
    }

    #[test]
    fn the_example_has_every_key() {
        let text = include_str!("../../deploy/pando-csi.toml");
        let config = parsed(text).unwrap();
        assert_eq!(config, Config { node_id: config.node_id.clone(), ..Config::default() });
        let all: String = text
            .lines()
            .filter(|line| !line.starts_with("# "))
            .map(|line| line.strip_prefix('#').unwrap_or(line).to_owned() + "\n")
            .collect();
        let config = parsed(&all).unwrap();
        let socket = "/var/lib/kubelet/plugins_registry/csi.pando.dev-reg.sock";
        assert_eq!(config.registration_socket(), Some(PathBuf::from(socket)));
        assert_eq!(config.health_address, Some("127.0.0.1:9809".parse().unwrap()));
    }

    #[test]
    fn mistakes_are_refused_and_named() {
        let refusal = |line: &str| parsed(&format!("node_id = 'n'\n{line}")).unwrap_err();
        let cases = [
            ("endpiont = '/x.sock'", "endpiont"),
            ("endpoint = '/run/csi'", ".sock"),
            ("driver_name = 'pando1'", "letter"),
            ("driver_name = '9pando'", "letter"),
            ("overcommit = 0", "1 to 1000"),
            ("default_size = '1000'", "multiple of 512"),
            ("default_size = 'lots'", "powers of 1024"),
            ("[log]\nlevle = 'info'", "levle"),
            ("[log]\nlevel = 'loud'", "\"loud\" is not a level; write error, warn, info"),
            ("[log]\nlevel = 'pando_csi=loud'", "write error, warn, info"),
        ];
        for (line, expected) in cases {
            let text = format!("{:#}", refusal(line));
            assert!(text.contains(expected), "{line}: {text}");
        }
        let long = format!("node_id = '{}'", "n".repeat(64));
        assert!(parsed(&long).unwrap_err().to_string().contains("1 to 63"));
        assert!(parsed("node_id = 'a/b'").is_err());
    }
}
