//! Clients of others beside our own: fio, nbdcopy and qemu-io write into volumes of their own, and
//! they say what was acknowledged to them: fio in its log of latencies, which has the place of each
//! write that completed; nbdcopy by its exit code; qemu-io line by line.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};

use pando_engine::units::{to_u64, to_usize};
use pando_tests::noise::Noise;
use pando_tests::tools::{output, text};

pub(crate) const TOOLS: [Tool; 3] = [Tool::Fio, Tool::Nbdcopy, Tool::QemuIo];
/// Programs that take part.
pub(crate) const PROGRAMS: [&str; 4] = ["fio", "nbdcopy", "qemu-io", "timeout"];
pub(crate) const BYTES: u64 = 8 << 20;
const BLOCK: u64 = 4096;
/// What qemu-io writes at once.
const CHUNK_BLOCKS: u64 = 16;
/// Longest time that a client may take to see that the daemon is gone.
const PATIENCE: &str = "60";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    Fio,
    Nbdcopy,
    QemuIo,
}

impl Tool {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Fio => "fio",
            Self::Nbdcopy => "nbdcopy",
            Self::QemuIo => "qemu-io",
        }
    }
}

/// What a block was told to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zeros,
    /// Its own place and a number, over and over.
    Placed(u32),
    /// One byte, over and over.
    Byte(u8),
}

impl Content {
    fn fills(self, place: u64, found: &[u8]) -> bool {
        match self {
            Self::Zeros => found.iter().all(|byte| *byte == 0),
            Self::Byte(byte) => found.iter().all(|other| *other == byte),
            Self::Placed(number) => {
                let part = placed(place, number);
                found.chunks_exact(part.len()).all(|other| other == part)
            }
        }
    }
}

/// What fio makes of the pattern `%o"12345678"`.
fn placed(place: u64, number: u32) -> Vec<u8> {
    let digits = format!("{number:08}");
    [&place.to_le_bytes()[..], digits.as_bytes()].concat()
}

/// A block: what is acknowledged, and what was under way after it.
#[derive(Clone, Debug)]
struct Block {
    acknowledged: Content,
    under_way: BTreeSet<u32>,
}

/// The volume of a client, and what the client says of it.
pub(crate) struct Foreign {
    pub(crate) tool: Tool,
    directory: PathBuf,
    uri: String,
    blocks: Vec<Block>,
    /// The number of the next thing that is written.
    number: u32,
    /// Blocks whose write was acknowledged.
    pub(crate) acknowledged: u64,
}

impl Foreign {
    /// A volume that is called as the tool, behind the socket that offers all.
    pub(crate) fn new(tool: Tool, directory: &Path, socket: &Path) -> Self {
        let block = Block { acknowledged: Content::Zeros, under_way: BTreeSet::new() };
        Self {
            tool,
            directory: directory.to_owned(),
            uri: format!("nbd+unix:///{}?socket={}", tool.name(), socket.display()),
            blocks: vec![block; to_usize(BYTES / BLOCK)],
            number: 0,
            acknowledged: 0,
        }
    }

    /// Lets the client write until the daemon is gone.
    pub(crate) fn run(&mut self, stop: &AtomicBool) -> Result<(), String> {
        loop {
            self.number += 1;
            let alive = match self.tool {
                Tool::Fio => self.fio()?,
                Tool::Nbdcopy => self.nbdcopy()?,
                Tool::QemuIo => self.qemu_io()?,
            };
            if !alive || stop.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
    }

    /// What this run of the client writes into a block.
    fn content(&self, number: u32) -> Content {
        match self.tool {
            Tool::Fio | Tool::Nbdcopy => Content::Placed(number),
            // Never the zeros of the beginning.
            Tool::QemuIo => Content::Byte(u8::try_from(1 + number % 255).expect("a byte")),
        }
    }

    fn begin(&mut self) {
        for block in &mut self.blocks {
            block.under_way.insert(self.number);
        }
    }

    fn acknowledge(&mut self, first: u64, count: u64) {
        let content = self.content(self.number);
        for block in &mut self.blocks[to_usize(first)..to_usize(first + count)] {
            block.acknowledged = content;
            block.under_way.clear();
            self.acknowledged += 1;
        }
    }

    fn fio(&mut self) -> Result<bool, String> {
        self.begin();
        let log = self.directory.join("fio");
        let latency = self.directory.join("fio_clat.1.log");
        if let Err(error) = fs::remove_file(&latency)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(format!("{}: {error}", latency.display()));
        }
        let all = [
            "--name=hammer".to_owned(),
            "--ioengine=nbd".to_owned(),
            format!("--uri={}", self.uri),
            "--rw=randwrite".to_owned(),
            format!("--randseed={}", self.number),
            "--bs=4k".to_owned(),
            format!("--size={BYTES}"),
            "--time_based=1".to_owned(),
            "--runtime=30".to_owned(),
            "--iodepth=16".to_owned(),
            "--fsync=500".to_owned(),
            "--verify=pattern".to_owned(),
            format!("--verify_pattern=%o\"{:08}\"", self.number),
            "--do_verify=0".to_owned(),
            "--verify_state_save=0".to_owned(),
            format!("--write_lat_log={}", text(&log)),
            "--log_offset=1".to_owned(),
        ];
        let done = self.client("fio", &all)?;
        // Who was killed while it connected has written nothing.
        let log = fs::read_to_string(&latency).unwrap_or_default();
        let places: BTreeSet<u64> = log.lines().filter_map(completed).collect();
        for place in places {
            self.acknowledge(place / BLOCK, 1);
        }
        Ok(done.status.success())
    }

    fn nbdcopy(&mut self) -> Result<bool, String> {
        self.begin();
        let source = self.directory.join("nbdcopy.image");
        let places = (0..BYTES).step_by(4096);
        let bytes: Vec<u8> =
            places.flat_map(|place| placed(place, self.number).repeat(256)).collect();
        fs::write(&source, bytes).map_err(|error| format!("{}: {error}", source.display()))?;
        let all = ["--connections=2".to_owned(), text(&source).to_owned(), self.uri.clone()];
        let done = self.client("nbdcopy", &all)?;
        if done.status.success() {
            self.acknowledge(0, BYTES / BLOCK);
        }
        Ok(done.status.success())
    }

    fn qemu_io(&mut self) -> Result<bool, String> {
        self.begin();
        let Content::Byte(byte) = self.content(self.number) else { unreachable!("a byte") };
        let mut all: Vec<String> =
            ["-f", "raw", "-t", "writeback"].map(str::to_owned).into_iter().collect();
        let chunks = BYTES / BLOCK / CHUNK_BLOCKS;
        let odd = Noise::new(u64::from(self.number)).below(chunks) | 1;
        // An odd step visits all chunks, of which there is a power of two.
        let order = (0..chunks).map(|turn| turn * odd % chunks);
        for chunk in order {
            let len = CHUNK_BLOCKS * BLOCK;
            all.extend(["-c".to_owned(), format!("write -P {byte} {} {len}", chunk * len)]);
        }
        all.push(self.uri.clone());
        let done = self.client("qemu-io", &all)?;
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        let mut count = 0;
        for line in said.lines() {
            if let Some((length, place)) = wrote(line) {
                self.acknowledge(place / BLOCK, length / BLOCK);
                count += 1;
            }
        }
        Ok(count == chunks)
    }

    fn client(&self, program: &str, arguments: &[String]) -> Result<Output, String> {
        let mut all = vec![PATIENCE.to_owned(), program.to_owned()];
        all.extend_from_slice(arguments);
        let done = output("timeout", &all);
        match done.status.code() {
            Some(124) => Err(format!("{program} does not see that the daemon is gone")),
            _ => Ok(done),
        }
    }

    /// Compares what is found with what the client was told; then nothing is under way any more.
    pub(crate) fn verify(&mut self, found: &[u8]) -> Result<(), String> {
        let name = self.tool.name();
        let blocks = self.blocks.iter().zip(found.chunks_exact(to_usize(BLOCK)));
        let mut contents = Vec::with_capacity(self.blocks.len());
        for (index, (block, bytes)) in blocks.enumerate() {
            let under_way = block.under_way.iter().map(|number| self.content(*number));
            let mut possible = std::iter::once(block.acknowledged).chain(under_way);
            let place = to_u64(index) * BLOCK;
            let Some(content) = possible.find(|content| content.fills(place, bytes)) else {
                return Err(format!(
                    "volume of {name}, block {index}: found {:02x?}.., expected {block:?}",
                    &bytes[..32]
                ));
            };
            contents.push(content);
        }
        for (block, content) in self.blocks.iter_mut().zip(contents) {
            *block = Block { acknowledged: content, under_way: BTreeSet::new() };
        }
        Ok(())
    }
}

/// The place in a line of fio's log of latencies: `time, value, direction, length, place, ..`.
fn completed(line: &str) -> Option<u64> {
    line.split(',').nth(4)?.trim().parse().ok()
}

/// Length and place of `wrote 65536/65536 bytes at offset 1048576`.
fn wrote(line: &str) -> Option<(u64, u64)> {
    let (lengths, place) = line.strip_prefix("wrote ")?.split_once(" bytes at offset ")?;
    let (done, asked) = lengths.split_once('/')?;
    let length: u64 = done.parse().ok()?;
    (done == asked).then_some((length, place.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_clients_say_is_read() {
        assert_eq!(completed("7, 7308159, 1, 4096, 503808, 0"), Some(503_808));
        assert_eq!(wrote("wrote 65536/65536 bytes at offset 1048576"), Some((65_536, 1 << 20)));
        assert_eq!(wrote("wrote 4096/65536 bytes at offset 1048576"), None);
        assert_eq!(wrote("write failed: Input/output error"), None);
    }

    #[test]
    fn a_block_holds_what_was_acknowledged_or_came_later() {
        let mut foreign = Foreign::new(Tool::Fio, Path::new("/"), Path::new("/"));
        let image = |number: u32| -> Vec<u8> {
            let places = (0..BYTES).step_by(4096);
            places.flat_map(|place| placed(place, number).repeat(256)).collect()
        };
        foreign.number = 1;
        foreign.begin();
        foreign.acknowledge(0, BYTES / BLOCK);
        foreign.number = 2;
        foreign.begin();
        let mut found = image(1);
        found[8192..12288].copy_from_slice(&image(2)[8192..12288]);
        foreign.verify(&found).expect("old or new");
        let said = foreign.verify(&image(1)).expect_err("block 2 is older than it was");
        assert!(said.contains("block 2: found"), "{said}");
        found[4096..8192].fill(0);
        foreign.verify(&found).expect_err("block 1 is lost");
        let mut torn = image(1);
        torn[8192..12288].copy_from_slice(&image(2)[8192..12288]);
        torn[100] ^= 1;
        foreign.verify(&torn).expect_err("block 0 is torn");
    }
}
