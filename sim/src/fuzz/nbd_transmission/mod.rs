//! f12: two clients of one export, each behind a handshake of its own, on real sockets: requests of
//! any sort, in rounds; payloads that are cut off, streams that are out of step. The device answers in
//! any order, and may have a sector that fails. Every request that is whole gets one reply, whose form
//! and error are worked out here from the protocol's document; data is what may be there after all that
//! was answered; and the device has been asked for exactly what was allowed.
//!
//! ```text
//! size, read-only and order (2), limits (1), structured replies (1), then rounds of requests, 8 bytes
//! each: command, flags, place, length, more, cookie, form, connection and end of the round
//! ```

mod near;
mod request;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::{join, join3};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::{Input, Reached};
use crate::model::stamp_of;
use near::{Near, Replies, Said};
use pando_engine::device::{BlockDevice, MappedRun, ReadData, ZeroFlags};
use pando_engine::disk::sim::Rng;
use pando_engine::error::{Error, ErrorKind, Result};
use pando_engine::export::nbd::Limits;
use pando_engine::export::nbd::connection::{Entry, serve};
use pando_engine::export::nbd::handshake::Tls;
use pando_engine::export::testing::{RamCounters, RamDisk};
use pando_engine::export::{Export, ExportSource};
use pando_engine::runtime::executor::{Executor, end_of_turn};
use pando_engine::runtime::reactor::ReactorDriver;
use pando_engine::runtime::{Buf, LocalFuture};
use pando_engine::units::to_usize;
use request::Request;

/// What the corpus must come to.
pub(super) const REACHES: &[&str] =
    &["broken streams", "data", "extents", "failed", "refused", "replies", "structured", "written"];
const ROUNDS_MAX: usize = 6;
/// Requests of one round.
const REQUESTS_MAX: usize = 10;
const SECTOR: u64 = 512;
/// Ways in which the device fails (an errno of the host, or a kind of error), and the error of the
/// protocol for each.
const FAILURES: [(std::result::Result<i32, ErrorKind>, u32); 8] = [
    (Ok(libc::EIO), 5),
    (Ok(libc::ENOMEM), 12),
    (Ok(libc::EDQUOT), 28),
    (Ok(libc::ENODEV), 5),
    (Err(ErrorKind::NoSpace), 28),
    (Err(ErrorKind::Checksum), 5),
    (Err(ErrorKind::Poisoned), 5),
    (Err(ErrorKind::Shutdown), 108),
];

thread_local! {
    /// A ring is made once a thread, and for good.
    static EXECUTOR: RefCell<&'static mut Executor<ReactorDriver>> = {
        let driver = ReactorDriver::new().expect("this kernel has io_uring");
        RefCell::new(Box::leak(Box::new(Executor::new(driver))))
    };
}

/// How the export is.
#[derive(Clone, Copy)]
struct Setting {
    size: u64,
    read_only: bool,
    structured: [bool; 2],
    /// A sector that fails, and how: a place in [`FAILURES`].
    bad: Option<(u64, usize)>,
}

impl Setting {
    /// The failure that a request for these bytes meets.
    fn failure(&self, offset: u64, len: u64) -> Option<usize> {
        let (sector, how) = self.bad?;
        let end = offset.saturating_add(len).div_ceil(SECTOR);
        (offset / SECTOR..end).contains(&sector).then_some(how)
    }
}

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    let size = (8 + u64::from(input.byte()) % 120) * SECTOR;
    let how = input.byte();
    let limits = Limits { requests: 1 + to_usize(input.below(16)), bytes: 4096 << input.below(8) };
    let forms = input.byte();
    let structured = [forms & 3 != 0, forms & 12 != 0];
    let failure = usize::from(how >> 4) % FAILURES.len();
    let bad = (how & 8 != 0).then_some((u64::from(how) % (size / SECTOR), failure));
    let setting = Setting { size, read_only: how & 0xF0 == 0xF0, structured, bad };
    let disk = RamDisk::new(size);
    disk.set_read_only(setting.read_only);
    let calls = Arc::new(AtomicU64::new(u64::from(how) << 8));
    let source = Slow { disk: disk.clone(), setting, turns: u64::from(how % 8), calls };
    let mut clients = Clients::new(setting, reached);
    EXECUTOR.with_borrow_mut(|executor| {
        let pairs = [(); 2].map(|()| pair());
        let [(a, near_a), (b, near_b)] = pairs;
        let serve = |socket| serve(socket, &source, Entry::Fresh(Tls::Refused), limits);
        executor.block_on(async {
            let work = clients.work(&mut input, [near_a, near_b]);
            drop(join3(Box::pin(serve(a)), Box::pin(serve(b)), Box::pin(work)).await);
        });
    });
    assert_eq!(disk.counters(), clients.asked, "what the device was asked for");
    let content = disk.content();
    clients.compare(&content);
    if structured.contains(&true) {
        reached.note("structured");
    }
}

fn pair() -> (Arc<OwnedFd>, Arc<OwnedFd>) {
    let sort = SocketType::STREAM;
    let pair = socketpair(AddressFamily::UNIX, sort, SocketFlags::CLOEXEC, None);
    let (far, near) = pair.expect("a pair of sockets");
    (Arc::new(far), Arc::new(near))
}

/// A volume in memory that answers in any order.
#[derive(Clone)]
struct Slow {
    disk: RamDisk,
    setting: Setting,
    turns: u64,
    calls: Arc<AtomicU64>,
}

impl Slow {
    async fn wait(&self) {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        for _ in 0..Rng::new(call).below(self.turns + 1) {
            end_of_turn().await;
        }
    }

    /// Waits, and fails for what reaches the bad sector.
    async fn reach(&self, offset: u64, len: u64) -> Result<()> {
        self.wait().await;
        match self.setting.failure(offset, len).map(|how| FAILURES[how].0) {
            None => Ok(()),
            Some(Ok(errno)) => Err(Error::io("bad sector", io::Error::from_raw_os_error(errno))),
            Some(Err(kind)) => Err(Error::new(kind, "bad sector")),
        }
    }
}

impl ExportSource for Slow {
    fn list(&self) -> Vec<String> {
        vec!["disk".into()]
    }

    fn open<'a>(&'a self, name: &'a str) -> LocalFuture<'a, Result<Export>> {
        let (name, description) = (name.to_owned(), String::new());
        let device = Rc::new(self.clone());
        Box::pin(std::future::ready(Ok(Export { name, description, device })))
    }
}

impl BlockDevice for Slow {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn read_only(&self) -> bool {
        self.disk.read_only()
    }

    fn read(&self, offset: u64, len: u32) -> LocalFuture<'_, Result<ReadData>> {
        Box::pin(async move {
            self.reach(offset, len.into()).await?;
            self.disk.read(offset, len).await
        })
    }

    fn write(&self, offset: u64, len: u32, buf: Buf, fua: bool) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.reach(offset, len.into()).await?;
            self.disk.write(offset, len, buf, fua).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.reach(offset, len).await?;
            self.disk.write_zeroes(offset, len, flags).await
        })
    }

    fn discard(&self, offset: u64, len: u64, fua: bool) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.reach(offset, len).await?;
            self.disk.discard(offset, len, fua).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.wait().await;
            self.disk.flush().await
        })
    }

    fn mapped_runs(
        &self,
        offset: u64,
        len: u64,
        max_runs: usize,
    ) -> LocalFuture<'_, Result<Vec<MappedRun>>> {
        Box::pin(async move {
            self.reach(offset, len).await?;
            self.disk.mapped_runs(offset, len, max_runs).await
        })
    }
}

/// Both clients, and what they know.
struct Clients<'a> {
    setting: Setting,
    /// What each sector may hold.
    sectors: Vec<BTreeSet<u64>>,
    /// What the device has been asked for.
    asked: RamCounters,
    reached: &'a mut Reached,
}

impl<'a> Clients<'a> {
    fn new(setting: Setting, reached: &'a mut Reached) -> Self {
        let sectors = vec![BTreeSet::from([0]); to_usize(setting.size / SECTOR)];
        Self { setting, sectors, asked: RamCounters::default(), reached }
    }

    async fn work(&mut self, input: &mut Input<'_>, sockets: [Arc<OwnedFd>; 2]) {
        let structured = self.setting.structured;
        let [a, b] = sockets;
        let mut near = [Near::new(a, structured[0]), Near::new(b, structured[1])];
        for near in &mut near {
            near.handshake(self.setting.size).await;
        }
        let mut number = 0;
        for _ in 0..ROUNDS_MAX {
            let mut requests: [Vec<Request>; 2] = [vec![], vec![]];
            for _ in 0..REQUESTS_MAX {
                if input.is_empty() {
                    break;
                }
                number += 1;
                let (request, to, last) = Request::of(input, self.setting.size, number);
                let broken = requests[to].last().is_some_and(|last| last.breaks);
                if !near[to].over && !broken {
                    requests[to].push(request);
                }
                if last {
                    break;
                }
            }
            self.round(&mut near, &requests).await;
        }
        for near in &mut near {
            near.end().await;
        }
    }

    /// Sends requests on both connections, and takes their replies.
    async fn round(&mut self, near: &mut [Near; 2], requests: &[Vec<Request>; 2]) {
        let setting = self.setting;
        let [a, b] = near;
        let (one, two) = join(a.ask(&requests[0], &setting), b.ask(&requests[1], &setting)).await;
        let both = [(one, &requests[0]), (two, &requests[1])];
        let mut may = self.sectors.clone();
        let mut changed: BTreeMap<usize, BTreeSet<u64>> = BTreeMap::new();
        for request in both.iter().flat_map(|(replies, requests)| done(replies, requests)) {
            self.count(request);
            let Some((sectors, stamp)) = request.change() else { continue };
            for sector in sectors {
                may[to_usize(sector)].insert(stamp);
                changed.entry(to_usize(sector)).or_default().insert(stamp);
            }
        }
        for (replies, requests) in &both {
            for request in requests.iter().filter(|request| !request.breaks) {
                self.judge(request, &replies[&request.cookie], &may);
            }
            if requests.iter().any(|request| request.breaks) {
                self.reached.note("broken streams");
            }
        }
        for (sector, stamps) in changed {
            self.sectors[sector] = stamps;
        }
    }

    /// A request that was carried out.
    fn count(&mut self, request: &Request) {
        let asked = &mut self.asked;
        if request.len == 0 && request.command != 3 {
            return; // Nothing to do.
        }
        match request.command {
            0 => asked.reads += 1,
            1 => asked.writes += 1,
            4 => asked.discards += 1,
            6 => asked.zeroes += 1,
            _ => {}
        }
        let durable = request.command == 3 || (request.command != 0 && request.flags & 1 == 1);
        asked.flushes += u64::from(durable && request.command != 7);
    }

    fn judge(&mut self, request: &Request, said: &Said, may: &[BTreeSet<u64>]) {
        self.reached.note("replies");
        match said {
            // Nothing but a failure of the device is told as EIO.
            Said::Error(5) => self.reached.note("failed"),
            Said::Error(_) => self.reached.note("refused"),
            Said::Done if request.command == 1 => self.reached.note("written"),
            Said::Done => {}
            Said::Data(data) => {
                assert_eq!(data.len(), to_usize(request.len.into()), "{request:?}");
                for (sector, bytes) in (request.offset / SECTOR..).zip(data.chunks_exact(512)) {
                    let stamp = stamp_of(bytes, sector);
                    let right = stamp.is_some_and(|stamp| may[to_usize(sector)].contains(&stamp));
                    assert!(
                        right,
                        "sector {sector} holds {stamp:?}, not of {:?}",
                        may[to_usize(sector)]
                    );
                }
                self.reached.note("data");
            }
            Said::Extents(extents) => {
                self.reached.note("extents");
                let mut at = request.offset;
                assert!(!extents.is_empty());
                assert!(request.flags & 8 == 0 || extents.len() == 1, "one was asked for");
                for (len, state) in extents {
                    assert!(*len > 0 && (*state == 0 || *state == 3), "{extents:?}");
                    let sectors = at / SECTOR..(at + len) / SECTOR;
                    at += len;
                    assert!(at <= request.offset + u64::from(request.len), "beyond the request");
                    let zeros = |sector| may[to_usize(sector)].contains(&0);
                    assert!(*state == 0 || sectors.into_iter().all(zeros), "no hole: {extents:?}");
                }
                let merged = extents.windows(2).all(|two| two[0].1 != two[1].1);
                assert!(merged, "neighbours of one kind are one: {extents:?}");
            }
        }
    }

    /// In the end the device holds what it may hold.
    fn compare(&self, content: &[u8]) {
        for (sector, bytes) in (0..).zip(content.chunks_exact(512)) {
            let stamp = stamp_of(bytes, sector);
            let may = &self.sectors[to_usize(sector)];
            let right = stamp.is_some_and(|stamp| may.contains(&stamp));
            assert!(right, "sector {sector} holds {stamp:?}, not of {may:?}");
        }
    }
}

/// The requests that were carried out.
fn done<'r>(replies: &'r Replies, requests: &'r [Request]) -> impl Iterator<Item = &'r Request> {
    let fine = |request: &&Request| {
        replies.get(&request.cookie).is_some_and(|said| !matches!(said, Said::Error(_)))
    };
    requests.iter().filter(fine)
}
