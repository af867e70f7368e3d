//! Does batches, on a real daemon.

use std::collections::BTreeMap;
use std::io;

use super::model::{BLOCK, Batch, Request, Stamp, Stream, What, Work};
use crate::nbd::{FUA, command};
use crate::{Nbd, System};

/// Connections to a volume: what is flushed on one holds for all.
const CONNECTIONS: usize = 2;

/// Who does them.
pub struct Performer<'a> {
    system: &'a System,
    /// By the name of the volume.
    connections: BTreeMap<String, Vec<Nbd>>,
    turn: usize,
}

impl<'a> Performer<'a> {
    /// With the daemon of `system`.
    #[must_use]
    pub const fn new(system: &'a System) -> Self {
        Self { system, connections: BTreeMap::new(), turn: 0 }
    }

    /// Does batches as they come, until it fails or `goes_on` says no; tells `durable` of each one
    /// up to which everything is durable.
    ///
    /// # Errors
    /// The first request that is not acknowledged.
    pub fn run(
        &mut self,
        stream: &mut Stream,
        mut goes_on: impl FnMut(u32) -> bool,
        mut durable: impl FnMut(u32),
    ) -> io::Result<()> {
        while goes_on(stream.number) {
            let origins = stream.model.volumes.iter().map(|(name, v)| (name.clone(), v.origin));
            let origins: BTreeMap<String, u32> = origins.collect();
            let batch = stream.advance();
            self.perform(&batch, &origins)?;
            if batch.makes_durable() {
                durable(batch.number);
            }
        }
        Ok(())
    }

    /// Does a batch and waits until all of it is acknowledged.
    fn perform(&mut self, batch: &Batch, origins: &BTreeMap<String, u32>) -> io::Result<()> {
        let refused = |what: String| io::Error::other(what);
        match &batch.work {
            Work::Blocks(requests, fua) => self.blocks(batch.number, requests, *fua, origins),
            Work::Flush => {
                let name = origins.keys().nth(self.turn % origins.len()).expect("volumes");
                self.turn += 1;
                let connection = self.connection(name)?;
                let answer = connection.try_simple(command::FLUSH, (0, 0))?;
                answer.map_err(|errno| refused(format!("flush: errno {errno}")))
            }
            Work::Create { name, source } => {
                let size = format!("{}", super::model::BLOCKS * u64::try_from(BLOCK).expect("few"));
                let words: Vec<&str> = match source {
                    None => vec!["volume", "create", name, "--size", &size],
                    Some((source, true)) => vec!["volume", "snapshot", source, name],
                    Some((source, false)) => vec!["volume", "clone", source, name],
                };
                self.command(&words)
            }
            Work::Delete(name) => {
                if self.connections.remove(name).is_some() {
                    self.command(&["volume", "serve", "--stop", name])?;
                }
                self.command(&["volume", "delete", name])
            }
        }
    }

    fn command(&self, words: &[&str]) -> io::Result<()> {
        let output = self.system.cli().output(words);
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(io::Error::other(format!("pando {}: {said}", words.join(" "))))
    }

    /// One of the connections to a volume, in turn.
    fn connection(&mut self, name: &str) -> io::Result<&mut Nbd> {
        if !self.connections.contains_key(name) {
            let served = self.system.cli().output(&["--output", "json", "volume", "serve", name]);
            let answer: serde_json::Value = serde_json::from_slice(&served.stdout)?;
            let path = answer["path"].as_str().ok_or(io::ErrorKind::NotFound)?;
            let open = |_| Nbd::open(std::path::Path::new(path), name);
            let opened: io::Result<Vec<Nbd>> = (0..CONNECTIONS).map(open).collect();
            self.connections.insert(name.to_owned(), opened?);
        }
        self.turn += 1;
        let turn = self.turn % CONNECTIONS;
        Ok(&mut self.connections.get_mut(name).expect("it was made")[turn])
    }

    /// Sends all requests, and then waits for all answers.
    fn blocks(
        &mut self,
        number: u32,
        requests: &[Request],
        fua: bool,
        origins: &BTreeMap<String, u32>,
    ) -> io::Result<()> {
        let mut sent: BTreeMap<String, [u64; CONNECTIONS]> = BTreeMap::new();
        for (cookie, request) in (0_u64..).zip(requests) {
            let (code, payload) = match request.what {
                What::Write => {
                    let stamp = Stamp { batch: number, origin: origins[&request.volume] };
                    let blocks = request.first..request.first + request.count;
                    (command::WRITE, blocks.flat_map(|lba| stamp.block(lba)).collect())
                }
                What::Zeroes => (command::WRITE_ZEROES, Vec::new()),
                What::Trim => (command::TRIM, Vec::new()),
            };
            let unit = u64::try_from(BLOCK).expect("few");
            let length = u32::try_from(request.count * unit).expect("short");
            let range = (request.first * unit, length);
            let flags = if fua { FUA } else { 0 };
            self.connection(&request.volume)?.send((code, flags), cookie, range, &payload)?;
            sent.entry(request.volume.clone()).or_default()[self.turn % CONNECTIONS] += 1;
        }
        for (name, counts) in sent {
            let connections = self.connections.get_mut(&name).expect("it was sent to");
            for (connection, count) in connections.iter_mut().zip(counts) {
                for _ in 0..count {
                    let (_, answer) = connection.receive()?;
                    answer.map_err(|errno| {
                        io::Error::other(format!("a request of batch {number}: errno {errno}"))
                    })?;
                }
            }
        }
        Ok(())
    }
}
