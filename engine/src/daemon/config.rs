//! The daemon's configuration: one TOML file, unknown keys refused, everything but the pool has a
//! default. `deploy/pandod.toml` shows all of it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use pando_proto::{parse_size, run_dir, socket_in};
use serde::{Deserialize, Deserializer, de};
use toml::Value;

use crate::daemon::log;
use crate::error::{Error, Result};

/// The configuration that is read if neither it nor a pool is named.
pub const DEFAULT_FILE: &str = "/etc/pando/pandod.toml";
/// Bytes of a configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Shards, at most: more threads than this do not make one device faster.
const SHARDS_MAX: i64 = 64;
/// Least memory for the cache: enough for the nodes that one operation touches, many times over.
const CACHE_BYTES_MIN: u64 = 4 << 20;
/// Longest time that a shard may spin.
const SPIN_US_MAX: i64 = 10_000;
/// Bytes of the path of a unix socket: those of `sun_path` without the zero at its end.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// The longest name of a socket in `nbd_dir`: that of the highest volume id.
const EXPORT_SOCKET_LONGEST: &str = "18446744073709551615.sock";

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// File or block device of the pool.
    pub pool: PathBuf,
    /// Directory of what exists while the daemon runs: `socket`, `nbd_dir`, `devices_dir` and
    /// `journal_dir` are in it unless they are set. Absent: that of the user,
    /// [`pando_proto::run_dir`].
    pub run_dir: Option<PathBuf>,
    /// Socket of the API.
    pub socket: Option<PathBuf>,
    /// Users, besides root and the daemon's own, that may use the API.
    #[serde(default, deserialize_with = "uids")]
    pub allowed_uids: Vec<u32>,
    /// Directory of the sockets of NBD exports.
    pub nbd_dir: Option<PathBuf>,
    /// Offer every volume by its name on the socket `all.sock` in `nbd_dir`.
    #[serde(default)]
    pub export_all: bool,
    /// Directory of the records of block devices, with a directory for each pool in it. It shall
    /// not survive the machine's restart, as the devices do not.
    pub devices_dir: Option<PathBuf>,
    /// Directory of the file that holds the newest records until they are flushed: in memory
    /// (tmpfs), and kept when the daemon's process or container dies, so that unflushed writes are.
    pub journal_dir: Option<PathBuf>,
    /// Memory for map nodes and tables.
    #[serde(default = "default_cache", deserialize_with = "cache", rename = "cache")]
    pub cache_bytes: u64,
    /// Threads that serve volumes; 0 is one for each processor, at most 4.
    #[serde(default, deserialize_with = "up_to::<SHARDS_MAX, _, _>")]
    pub shards: usize,
    /// Microseconds that a shard looks for work before it sleeps.
    #[serde(default = "default_spin_us", deserialize_with = "up_to::<SPIN_US_MAX, _, _>")]
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
                "{text:?} is neither ADDRESS:PORT, such as 127.0.0.1:9753, nor unix:PATH"
            ))
        })
    }
}

/// NBD over TCP: always with TLS, always with a certificate of the client.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NbdTls {
    /// Address and port; NBD's own port is 10809.
    #[serde(deserialize_with = "address")]
    pub listen: SocketAddr,
    /// PEM file with the certificate of this server, then those between it and its authority.
    pub certificate: PathBuf,
    /// PEM file with the key of the certificate.
    pub key: PathBuf,
    /// PEM file with the authorities whose clients are served.
    pub client_ca: PathBuf,
}

/// Where the daemon's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Socket of the API.
    pub socket: PathBuf,
    /// Directory of the sockets of NBD exports.
    pub nbd_dir: PathBuf,
    /// Directory of the records of block devices.
    pub devices_dir: PathBuf,
    /// Directory of the memory of the journal.
    pub journal_dir: PathBuf,
}

impl Paths {
    /// Checks what the kernel requires of sockets.
    fn check(&self) -> Result<()> {
        if self.nbd_dir == self.socket.parent().unwrap_or(Path::new("")) {
            return Err(Error::invalid(format!(
                "nbd_dir = {:?}: the sockets of exports need a directory of their own, and socket \
                 is in this one",
                self.nbd_dir
            )));
        }
        check_socket("socket", &self.socket, &self.socket)?;
        check_socket("nbd_dir", &self.nbd_dir, &self.nbd_dir.join(EXPORT_SOCKET_LONGEST))
    }
}

/// Checks that a socket can have the path `socket`, which follows from the value of `key`.
fn check_socket(key: &str, value: &Path, socket: &Path) -> Result<()> {
    let excess = socket.as_os_str().len().saturating_sub(SOCKET_PATH_BYTES_MAX);
    if excess == 0 {
        return Ok(());
    }
    let bytes = value.as_os_str().len();
    Err(Error::invalid(format!(
        "{key} = {value:?}: {bytes} bytes; the kernel limits the path of a socket to \
         {SOCKET_PATH_BYTES_MAX} bytes, so this may have at most {}",
        bytes.saturating_sub(excess)
    )))
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

/// A whole number from 0 to `MAX`.
fn up_to<'de, const MAX: i64, T, D>(deserializer: D) -> std::result::Result<T, D::Error>
where
    T: TryFrom<i64>,
    D: Deserializer<'de>,
{
    let value = Value::deserialize(deserializer)?;
    let number = value.as_integer().filter(|number| (0..=MAX).contains(number));
    number
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| de::Error::custom(format!("{value} is not a whole number from 0 to {MAX}")))
}

/// User ids.
fn uids<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<u32>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let uids = value.as_array().and_then(|values| values.iter().map(uid).collect());
    let required = "is not a list of user ids, such as [1000, 1001]";
    uids.ok_or_else(|| de::Error::custom(format!("{value} {required}")))
}

fn uid(value: &Value) -> Option<u32> {
    value.as_integer().and_then(|number| u32::try_from(number).ok())
}

/// Memory for the cache: a size as people write it, `"256MiB"`, or a number of bytes.
fn cache<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<u64, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let bytes = parse_size(&text).map_err(de::Error::custom)?;
    if bytes < CACHE_BYTES_MIN {
        let least = CACHE_BYTES_MIN >> 20;
        return Err(de::Error::custom(format!("{value} is too small; at least {least}MiB")));
    }
    Ok(bytes)
}

/// An address with a port.
fn address<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| {
        de::Error::custom(format!("{text:?} is not ADDRESS:PORT, such as 0.0.0.0:10809"))
    })
}

impl Config {
    /// Defaults for the pool at `pool`.
    #[must_use]
    pub fn for_pool(pool: PathBuf) -> Self {
        Self {
            pool,
            run_dir: None,
            socket: None,
            allowed_uids: Vec::new(),
            nbd_dir: None,
            export_all: false,
            devices_dir: None,
            journal_dir: None,
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

    /// Reads the file at `path`.
    ///
    /// # Errors
    /// `Io` when it cannot be read, `Invalid` as [`Self::parse`].
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

    /// Reads `text`. [`Self::validate`] checks what does not follow from one key alone.
    ///
    /// # Errors
    /// `Invalid`, with the line and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|error| Error::invalid(error.to_string()))
    }

    /// Checks what [`Self::parse`] does not: paths, and the level of the log.
    ///
    /// # Errors
    /// `Invalid`, with the key, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let given = [
            ("pool", Some(&self.pool)),
            ("run_dir", self.run_dir.as_ref()),
            ("socket", self.socket.as_ref()),
            ("nbd_dir", self.nbd_dir.as_ref()),
            ("devices_dir", self.devices_dir.as_ref()),
            ("journal_dir", self.journal_dir.as_ref()),
        ];
        for (key, path) in given {
            if path.is_some_and(|path| path.as_os_str().is_empty()) {
                return Err(Error::invalid(format!("{key} = \"\": a path is required")));
            }
        }
        if let Some(Metrics { listen: MetricsAddress::Unix(path) }) = &self.metrics {
            check_socket("metrics.listen", path, path)?;
        }
        log::check_level(&self.log.level)?;
        self.paths()?.check()
    }

    /// Where the daemon's files are: as configured, else in the run directory.
    ///
    /// # Errors
    /// `Invalid`: a run directory is needed, none is configured, and the user has none.
    pub fn paths(&self) -> Result<Paths> {
        let below = |given: &Option<PathBuf>, place: &dyn Fn(&Path) -> PathBuf| match given {
            Some(given) => Ok(given.clone()),
            None => self.run_dir.clone().map_or_else(run_dir, Ok).map(|run_dir| place(&run_dir)),
        };
        let find = || {
            Ok(Paths {
                socket: below(&self.socket, &socket_in)?,
                nbd_dir: below(&self.nbd_dir, &|run_dir| run_dir.join("nbd"))?,
                devices_dir: below(&self.devices_dir, &|run_dir| run_dir.join("devices"))?,
                journal_dir: below(&self.journal_dir, &|run_dir| run_dir.join("journal"))?,
            })
        };
        find().map_err(|missing: String| {
            Error::invalid(format!("{missing}; name one with --run-dir, or with the key run_dir"))
        })
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
        config.validate().unwrap();
        let follows =
            Config { run_dir: config.run_dir.clone(), ..Config::for_pool(PathBuf::new()) };
        assert_eq!(config.paths().unwrap(), follows.paths().unwrap());
        let metrics = config.metrics.unwrap().listen;
        assert_eq!(metrics, MetricsAddress::Tcp("127.0.0.1:9753".parse().unwrap()));
        assert_eq!(config.nbd_tls.unwrap().listen.port(), 10809);
    }

    #[test]
    fn paths_follow_from_the_run_directory_unless_they_are_set() {
        let text = "pool = '/p'\nrun_dir = '/r'\njournal_dir = '/dev/shm/j'";
        let paths = Config::parse(text).unwrap().paths().unwrap();
        let expected = Paths {
            socket: "/r/pando.sock".into(),
            nbd_dir: "/r/nbd".into(),
            devices_dir: "/r/devices".into(),
            journal_dir: "/dev/shm/j".into(),
        };
        assert_eq!(paths, expected);
    }

    fn refusal(text: &str) -> String {
        let checked = Config::parse(text).and_then(|config| config.validate());
        let error = checked.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{text}");
        error.to_string()
    }

    #[test]
    fn unknown_and_missing_keys_are_named() {
        assert!(refusal("").contains("pool"));
        assert!(refusal("pool = '/p'\nsokcet = '/s'").contains("sokcet"));
        assert!(refusal("pool = '/p'\n[log]\nlevle = 'info'").contains("levle"));
        assert!(refusal("pool = '/p'\n[metrics]").contains("listen"));
    }

    /// A line of configuration, and what must be in the message beside its key and its value.
    const BAD_VALUES: [(&str, &str); 28] = [
        ("pool = 5", "path string"),
        ("pool = ''", "a path is required"),
        ("run_dir = ''", "a path is required"),
        ("socket = ''", "a path is required"),
        ("nbd_dir = ''", "a path is required"),
        ("nbd_dir = '/r'", "a directory of their own"),
        ("devices_dir = ''", "a path is required"),
        ("journal_dir = ''", "a path is required"),
        ("journal_dir = true", "path string"),
        ("allowed_uids = 'me'", "a list of user ids, such as [1000, 1001]"),
        ("allowed_uids = [-1]", "a list of user ids"),
        ("export_all = 'yes'", "a boolean"),
        ("cache = 'lots'", "powers of 1024"),
        ("cache = -1", "powers of 1024"),
        ("cache = true", "powers of 1024"),
        ("cache = '1KiB'", "at least 4MiB"),
        ("shards = 65", "a whole number from 0 to 64"),
        ("shards = 'all'", "a whole number from 0 to 64"),
        ("spin_us = -1", "a whole number from 0 to 10000"),
        ("discard = 1", "a boolean"),
        ("devices.kind = 'scsi'", "expected one of `auto`, `ublk`, `nbd`, `loop`"),
        ("log.level = 'loud'", "error, warn, info, debug, trace"),
        ("log.level = 'info,loud'", "error, warn, info, debug, trace"),
        ("log.level = 'pando_engine=loud'", "error, warn, info, debug, trace"),
        ("log.level = ''", "error, warn, info, debug, trace"),
        ("log.format = 'xml'", "expected `text` or `json`"),
        ("metrics.listen = 'here'", "neither ADDRESS:PORT, such as 127.0.0.1:9753, nor unix:PATH"),
        ("nbd_tls = {listen = ':nbd', certificate = '', key = '', client_ca = ''}", "ADDRESS:PORT"),
    ];

    #[test]
    fn a_bad_value_is_refused_with_its_key_and_what_is_allowed() {
        for (line, allowed) in BAD_VALUES {
            let pool = if line.starts_with("pool") { "" } else { "pool = '/p'\n" };
            let run_dir = if line.starts_with("run_dir") { "" } else { "run_dir = '/r'\n" };
            let message = refusal(&format!("{pool}{run_dir}{line}"));
            let (key, value) = line.split_once(" = ").unwrap();
            let value = value.trim_matches('\'');
            for part in [key, value, allowed] {
                assert!(message.contains(part), "{line}: {part:?} is missing: {message}");
            }
        }
    }

    #[test]
    fn paths_of_sockets_have_a_limit() {
        let config = |socket: usize, nbd_dir: usize| {
            let path = |bytes: usize| Some(PathBuf::from(format!("/{}", "x".repeat(bytes - 1))));
            let mut config = Config::for_pool("/p".into());
            config.run_dir = path(10);
            (config.socket, config.nbd_dir) = (path(socket), path(nbd_dir));
            config
        };
        config(107, 81).validate().unwrap();
        let long = |config: Config| config.validate().unwrap_err().to_string();
        assert!(long(config(108, 81)).starts_with("socket = "));
        assert!(long(config(108, 81)).contains("at most 107"));
        assert!(long(config(107, 82)).starts_with("nbd_dir = "));
        assert!(long(config(107, 82)).contains("at most 81"));
        let metrics = format!("[metrics]\nlisten = 'unix:/{}'", "x".repeat(107));
        assert!(refusal(&format!("pool = '/p'\n{metrics}")).contains("metrics.listen = "));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Path::new("/nonexistent/pandod.toml")).unwrap_err();
        assert!(error.to_string().starts_with("configuration /nonexistent/pandod.toml: "));
    }
}
