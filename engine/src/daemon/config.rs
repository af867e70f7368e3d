//! The daemon's configuration: one TOML file, unknown keys refused, everything but the pool has a
//! default. `deploy/pandod.toml` shows all of it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use serde::{Deserialize, Deserializer, de};

use crate::error::{Error, Result};

/// Where the daemon listens if nothing else is said.
pub const DEFAULT_SOCKET: &str = "/run/pando/pando.sock";
/// Where the sockets of exports are made if nothing else is said.
pub const DEFAULT_NBD_DIR: &str = "/run/pando/nbd";
/// Where records of block devices are kept if nothing else is said.
pub const DEFAULT_DEVICES_DIR: &str = "/run/pando/devices";
/// Where the memory of the journal is if nothing else is said.
pub const DEFAULT_JOURNAL_DIR: &str = "/run/pando/journal";
/// Bytes of a configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Shards, at most: more threads than this do not make one device faster.
const SHARDS_MAX: usize = 64;
/// Least memory for the cache: enough for the nodes that one operation touches, many times over.
const CACHE_BYTES_MIN: u64 = 4 << 20;
/// Longest time that a shard may spin.
const SPIN_US_MAX: u64 = 10_000;

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// File or block device of the pool.
    pub pool: PathBuf,
    /// Socket of the API.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Users, besides root and the daemon's own, that may use the API.
    #[serde(default)]
    pub allowed_uids: Vec<u32>,
    /// Directory of the sockets of NBD exports.
    #[serde(default = "default_nbd_dir")]
    pub nbd_dir: PathBuf,
    /// Offer every volume by its name on the socket `all.sock` in `nbd_dir`.
    #[serde(default)]
    pub export_all: bool,
    /// Directory of the records of block devices, with a directory for each pool in it. It shall
    /// not survive the machine's restart, as the devices do not.
    #[serde(default = "default_devices_dir")]
    pub devices_dir: PathBuf,
    /// Directory of the file that holds the newest records until they are flushed: in memory
    /// (tmpfs), and kept when the daemon's process or container dies, so that unflushed writes are.
    #[serde(default = "default_journal_dir")]
    pub journal_dir: PathBuf,
    /// Memory for map nodes and tables.
    #[serde(default = "default_cache", deserialize_with = "size", rename = "cache")]
    pub cache_bytes: u64,
    /// Threads that serve volumes; 0 is one for each processor, at most 4.
    #[serde(default)]
    pub shards: usize,
    /// Microseconds that a shard looks for work before it sleeps.
    #[serde(default = "default_spin_us")]
    pub spin_us: u64,
    /// Tell the device which blocks are free.
    #[serde(default = "yes")]
    pub discard: bool,
    /// Block devices.
    #[serde(default)]
    pub devices: Devices,
    /// Logs.
    #[serde(default)]
    pub log: Log,
    /// Metrics; off if absent.
    pub metrics: Option<Metrics>,
    /// NBD over TCP with TLS; off if absent.
    pub nbd_tls: Option<NbdTls>,
}

/// Block devices of this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Devices {
    /// What makes them.
    pub kind: DeviceChoice,
}

/// What makes a volume a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// What a request asks for; if it does not, the first of the others that works.
    #[default]
    Auto,
    /// Only ublk.
    Ublk,
    /// Only the kernel's NBD client.
    Nbd,
    /// Only loop devices.
    Loop,
}

/// Logs: to stderr, one line for each change of state.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,pando_engine=debug`.
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Text }
    }
}

/// How lines of the log look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Metrics for Prometheus.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Where `/metrics` is served.
    pub listen: MetricsAddress,
}

/// Where metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// `127.0.0.1:9753`
    Tcp(SocketAddr),
    /// `unix:/run/pando/metrics.sock`
    Unix(PathBuf),
}

impl<'de> Deserialize<'de> for MetricsAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            de::Error::custom(format!(
                "{text:?} is neither ADDRESS:PORT, as 127.0.0.1:9753, nor unix:PATH"
            ))
        })
    }
}

/// NBD over TCP: always with TLS, always with a certificate of the client.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NbdTls {
    /// Address and port; NBD's own port is 10809.
    pub listen: SocketAddr,
    /// PEM file with the certificate of this server, then those between it and its authority.
    pub certificate: PathBuf,
    /// PEM file with the key of the certificate.
    pub key: PathBuf,
    /// PEM file with the authorities whose clients are served.
    pub client_ca: PathBuf,
}

fn default_socket() -> PathBuf {
    PathBuf::from(DEFAULT_SOCKET)
}

fn default_nbd_dir() -> PathBuf {
    PathBuf::from(DEFAULT_NBD_DIR)
}

fn default_devices_dir() -> PathBuf {
    PathBuf::from(DEFAULT_DEVICES_DIR)
}

fn default_journal_dir() -> PathBuf {
    PathBuf::from(DEFAULT_JOURNAL_DIR)
}

const fn default_cache() -> u64 {
    256 << 20
}

const fn default_spin_us() -> u64 {
    100
}

const fn yes() -> bool {
    true
}

/// A size as people write it: `"256MiB"`.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<u64, D::Error> {
    ByteSize::deserialize(deserializer).map(|size| size.as_u64())
}

impl Config {
    /// Defaults for the pool at `pool`.
    #[must_use]
    pub fn for_pool(pool: PathBuf) -> Self {
        Self {
            pool,
            socket: default_socket(),
            allowed_uids: Vec::new(),
            nbd_dir: default_nbd_dir(),
            export_all: false,
            devices_dir: default_devices_dir(),
            journal_dir: default_journal_dir(),
            cache_bytes: default_cache(),
            shards: 0,
            spin_us: default_spin_us(),
            discard: true,
            devices: Devices::default(),
            log: Log::default(),
            metrics: None,
            nbd_tls: None,
        }
    }

    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// `Io` when it cannot be read, `Invalid` when it does not say a valid configuration.
    pub fn load(path: &Path) -> Result<Self> {
        let shown = path.display();
        let failed = |error| Error::io(format!("configuration {shown}"), error);
        if std::fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
            return Err(Error::invalid(format!(
                "configuration {shown} is larger than {FILE_BYTES_MAX} bytes"
            )));
        }
        let text = std::fs::read_to_string(path).map_err(failed)?;
        Self::parse(&text).map_err(|error| error.context(format!("configuration {shown}")))
    }

    /// Reads and checks `text`.
    ///
    /// # Errors
    /// `Invalid`, with the line and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self> {
        let config: Self =
            toml::from_str(text).map_err(|error| Error::invalid(error.to_string()))?;
        config.validate()?;
        Ok(config)
    }

    /// Checks what the types do not say.
    ///
    /// # Errors
    /// `Invalid`, naming the key.
    pub fn validate(&self) -> Result<()> {
        if self.shards > SHARDS_MAX {
            return Err(Error::invalid(format!(
                "shards = {}: at most {SHARDS_MAX}, or 0 for one of each processor",
                self.shards
            )));
        }
        if self.cache_bytes < CACHE_BYTES_MIN {
            return Err(Error::invalid(format!(
                "cache = {} bytes: at least {}",
                self.cache_bytes,
                ByteSize(CACHE_BYTES_MIN).display().iec()
            )));
        }
        if self.spin_us > SPIN_US_MAX {
            return Err(Error::invalid(format!(
                "spin_us = {}: at most {SPIN_US_MAX}",
                self.spin_us
            )));
        }
        if self.nbd_dir == self.socket.parent().unwrap_or(Path::new("")) {
            return Err(Error::invalid(format!(
                "nbd_dir = {:?}: the sockets of exports need a directory of their own",
                self.nbd_dir
            )));
        }
        Ok(())
    }

    /// Threads to start.
    #[must_use]
    pub fn shard_count(&self) -> usize {
        if self.shards > 0 {
            return self.shards;
        }
        std::thread::available_parallelism().map_or(1, |count| count.get().min(4))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn defaults_need_only_a_pool() {
        let config = Config::parse("pool = '/srv/pool'").unwrap();
        assert_eq!(config, Config::for_pool(PathBuf::from("/srv/pool")));
        assert!(config.shard_count() >= 1);
    }

    #[test]
    fn the_example_says_everything() {
        let text = include_str!("../../../deploy/pandod.toml");
        let config = Config::parse(text).unwrap();
        // What is commented out is an example; what is not, is the default.
        assert_eq!(
            config,
            Config { pool: config.pool.clone(), ..Config::for_pool(PathBuf::new()) }
        );
        let all: String = text
            .lines()
            .filter(|line| !line.starts_with("# "))
            .map(|line| line.strip_prefix('#').unwrap_or(line).to_owned() + "\n")
            .collect();
        let config = Config::parse(&all).unwrap();
        let metrics = config.metrics.unwrap().listen;
        assert_eq!(metrics, MetricsAddress::Tcp("127.0.0.1:9753".parse().unwrap()));
        assert_eq!(config.nbd_tls.unwrap().listen.port(), 10809);
    }

    fn refusal(text: &str) -> String {
        let error = Config::parse(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.to_string()
    }

    #[test]
    fn mistakes_are_refused_and_named() {
        assert!(refusal("").contains("pool"));
        assert!(refusal("pool = '/p'\nsokcet = '/s'").contains("sokcet"));
        assert!(refusal("pool = '/p'\n[log]\nlevle = 'info'").contains("levle"));
        assert!(refusal("pool = '/p'\n[devices]\nkind = 'scsi'").contains("`ublk`"));
        assert!(refusal("pool = '/p'\ncache = '1KiB'").contains("at least 4.0 MiB"));
        assert!(refusal("pool = '/p'\ncache = 'much'").contains("cache"));
        assert!(refusal("pool = '/p'\nshards = 65").contains("at most 64"));
        assert!(refusal("pool = '/p'\n[metrics]\nlisten = 'here'").contains("unix:PATH"));
        assert!(refusal("pool = '/p'\nnbd_dir = '/run/pando'").contains("directory of their own"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Path::new("/nonexistent/pandod.toml")).unwrap_err();
        assert!(error.to_string().starts_with("configuration /nonexistent/pandod.toml: "));
    }
}
