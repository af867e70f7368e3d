//! The body of the fuzz target `control_api` (f15): requests of `pando.v1` over the daemon's own
//! socket, including the streams of export and import, and configuration files. A model of the
//! volumes and their content predicts each answer. Every error must have a kind that the request
//! gives a reason for, and a message of one line.
//!
//! ```text
//! 8 bytes per request: call, name, other, size (2), flags, label, more
//! ```
//! The daemon is real, with its threads and a pool in a file. It is started once per thread; each
//! input begins with an empty pool.

mod calls;
mod streams;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use pando_engine::daemon;
use pando_engine::daemon::config::Config;
use pando_engine::disk::{Allocate, PoolFile};
use pando_engine::limits::{LABEL_BYTES_MAX, LABELS_MAX, NAME_BYTES_MAX, VOLUME_BYTES_MAX};
use pando_engine::pool::{FormatOptions, Pool};
use pando_engine::runtime::shard::Shard;
use pando_proto::v1;
use pando_proto::v1::pando_client::PandoClient;
use pando_proto::v1::volume_ref::By;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use crate::Reached;
use calls::Calls;

/// What the corpus must reach.
pub(crate) const REACHES: &[&str] = &[
    "clones",
    "configurations",
    "created",
    "deletions",
    "differences",
    "groups",
    "lists",
    "modified",
    "read",
    "refused",
    "requests",
    "written",
];
/// Requests per input.
const REQUESTS_MAX: usize = 16;
const REQUEST_BYTES: usize = 8;
const POOL_BYTES: u64 = 64 << 20;
/// Longest range that is written and read; volumes can be larger.
const CONTENT_MAX: u64 = 256 << 10;
const SECTOR: u64 = 512;

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

struct World {
    runtime: Runtime,
    client: PandoClient<Channel>,
}

/// Runs one input.
///
/// # Panics
/// If an answer differs from what the model predicts.
pub fn run(bytes: &[u8]) {
    body(bytes, &mut Reached::default());
}

/// Runs one input and counts what it reaches.
pub(crate) fn body(bytes: &[u8], reached: &mut Reached) {
    WORLD.with_borrow_mut(|world| {
        let world = world.get_or_insert_with(World::new);
        let client = world.client.clone();
        world.runtime.block_on(async {
            let mut calls = Calls { client, volumes: BTreeMap::new(), reached };
            calls.empty().await;
            for raw in bytes.chunks_exact(REQUEST_BYTES).take(REQUESTS_MAX) {
                let raw: [u8; REQUEST_BYTES] = raw.try_into().expect("the length of a request");
                calls.reached.note("requests");
                calls.call(Raw::of(raw)).await;
            }
            calls.compare_all().await;
        });
    });
}

impl World {
    /// Starts the daemon, which ends with the process. Its files are removed as soon as it has
    /// opened them.
    fn new() -> Self {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build().expect("a runtime");
        let home = crate::scratch_dir();
        let mut config = Config::for_pool(home.path().join("pool"));
        config.run_dir = Some(home.path().join("run"));
        config.cache_bytes = 8 << 20;
        config.shards = 1;
        config.spin_us = 0;
        let client = runtime.block_on(async {
            format(&config).await;
            let socket = config.paths().expect("a run directory is named").socket;
            let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()));
            let endpoint = endpoint.expect("a socket");
            let serving = async move { daemon::serve(&config, std::future::pending()).await };
            let daemon = tokio::spawn(serving);
            loop {
                if let Ok(channel) = endpoint.connect().await {
                    let mut client = PandoClient::new(channel);
                    // The socket exists first; once the daemon answers it has opened the rest.
                    let answer = client.pool_status(v1::PoolStatusRequest {}).await;
                    answer.expect("the daemon answers");
                    return client;
                }
                assert!(!daemon.is_finished(), "the daemon has ended: {:?}", daemon.await);
                tokio::task::yield_now().await;
            }
        });
        home.close().expect("the files of the daemon can be removed");
        Self { runtime, client }
    }
}

async fn format(config: &Config) {
    let file = PoolFile::create(&config.pool, POOL_BYTES, Allocate::Sparse).expect("a file");
    let file = Arc::new(file);
    let options = FormatOptions {
        size_bytes: POOL_BYTES,
        journal_bytes: Some(1 << 20),
        force: false,
        uuid: [7; 16],
    };
    let shard = Shard::start("format".to_owned(), || async {}).expect("a thread");
    let formatted = shard.call(move || async move { Pool::format(&file.disk(), &options).await });
    formatted.await.and_then(|done| done).expect("an empty file");
    shard.stop();
    shard.join().expect("it was stopped");
}

/// The bytes of one request.
#[derive(Clone, Copy, Debug)]
struct Raw {
    call: u8,
    name: u8,
    other: u8,
    size: [u8; 2],
    flags: u8,
    label: u8,
    more: u8,
}

impl Raw {
    const fn of([call, name, other, s0, s1, flags, label, more]: [u8; REQUEST_BYTES]) -> Self {
        Self { call, name, other, size: [s0, s1], flags, label, more }
    }

    fn size(self) -> Option<u64> {
        match self.size[0] {
            0..=0x9F => Some(u64::from(1 + self.size[0] % 64) * 8 * SECTOR),
            0xA0..=0xBF => Some(u64::from(self.size[1]) * SECTOR),
            0xC0..=0xC7 => Some(u64::from(self.size[1]) * 100),
            0xC8..=0xCF => Some(VOLUME_BYTES_MAX + u64::from(self.size[1] % 2) * SECTOR),
            0xD0..=0xD7 => Some(u64::MAX - u64::from(self.size[1])),
            0xD8..=0xDF => Some(u64::from(self.size[1]) << 40),
            _ => None,
        }
    }

    fn labels(self) -> BTreeMap<String, String> {
        let one = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        match self.label {
            0x80..=0x9F => one("app", "db"),
            0xA0..=0xA7 => one("app", ""),
            0xA8..=0xAF => one("", "value"),
            0xB0..=0xB7 => one("k", &"v".repeat(LABEL_BYTES_MAX - 1)),
            0xB8..=0xBF => one("k", &"v".repeat(LABEL_BYTES_MAX)),
            0xC0..=0xC7 => (0..LABELS_MAX).map(|n| (n.to_string(), "x".into())).collect(),
            0xC8..=0xCF => (0..=LABELS_MAX).map(|n| (n.to_string(), "x".into())).collect(),
            0xD0..=0xD7 => one("\n\0", "\u{1b}[2J"),
            _ => BTreeMap::new(),
        }
    }

    /// No limits, or limits so high that they delay nothing.
    fn limits(self) -> (u64, u64) {
        if self.flags & 0x80 == 0 { (0, 0) } else { (u64::MAX - 7, 1 << 50) }
    }
}

fn name(number: u8) -> String {
    match number {
        0xF0 => String::new(),
        0xF1 => "n".repeat(NAME_BYTES_MAX),
        0xF2 => "n".repeat(NAME_BYTES_MAX + 1),
        0xF3 => "../../etc".into(),
        0xF4 => ".hidden".into(),
        0xF5 => "a\nb".into(),
        0xF6 => "\u{e4}".into(),
        0xF7 => "-rf".into(),
        number => format!("v{}", number % 6),
    }
}

fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.chars().all(good)
        && !name.starts_with(['-', '.'])
}

fn are_labels(labels: &BTreeMap<String, String>) -> bool {
    let fit = |(k, v): (&String, &String)| !k.is_empty() && k.len() + v.len() <= LABEL_BYTES_MAX;
    labels.len() <= LABELS_MAX && labels.iter().all(fit)
}

fn is_size(size: u64) -> bool {
    size.is_multiple_of(SECTOR) && (4096..=VOLUME_BYTES_MAX).contains(&size)
}

fn named(name: &str) -> Option<v1::VolumeRef> {
    Some(v1::VolumeRef { by: Some(By::Name(name.to_owned())) })
}

/// A volume in the model.
#[derive(Clone, Debug)]
struct ModelVolume {
    id: u64,
    size: u64,
    snapshot: bool,
    read_only: bool,
    source: Option<u64>,
    labels: BTreeMap<String, String>,
    /// The byte that fills a sector; other sectors are zeros.
    sectors: BTreeMap<u64, u8>,
}

/// The kinds of errors that a request may fail with. If there are none it must succeed.
#[derive(Debug, Default)]
struct AllowedErrors(Vec<&'static str>);

impl AllowedErrors {
    fn allow_if(&mut self, condition: bool, kind: &'static str) {
        if condition {
            self.0.push(kind);
        }
    }
}
