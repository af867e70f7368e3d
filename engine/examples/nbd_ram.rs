//! Offers a volume in memory over NBD, to measure the server by itself:
//!
//! ```text
//! cargo run --release --example nbd_ram -- /tmp/ram/disk.sock 256
//! fio --name=q --ioengine=nbd --uri='nbd+unix:///?socket=/tmp/ram/disk.sock' \
//!     --rw=randread --bs=4k --iodepth=32 --time_based --runtime=5
//! ```

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pando_engine::export::nbd::{NbdServer, ServerOptions};
use pando_engine::export::testing::{RamDisk, RamExports};
use pando_engine::runtime::executor::Executor;
use pando_engine::runtime::park::ThreadDriver;
use pando_engine::runtime::shard::{Shard, ShardOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = PathBuf::from(arguments.next().ok_or("usage: nbd_ram <socket> [MiB] [spin us]")?);
    let size_mib: u64 = arguments.next().as_deref().unwrap_or("256").parse()?;
    let spin_us: u64 = arguments.next().as_deref().unwrap_or("50").parse()?;
    let options = ShardOptions { spin: Duration::from_micros(spin_us) };
    let shard = Shard::start_with("nbd".to_owned(), options, || async {})?;
    let serving = shard.call(move || async move {
        let disk = RamDisk::new(size_mib << 20);
        let source = Arc::new(RamExports::new(vec![("ram".to_owned(), disk)]));
        NbdServer::listen_unix(&path, source, ServerOptions::default()).await
    });
    let server = Executor::new(ThreadDriver::new()).block_on(serving)??;
    shard.join()?;
    drop(server);
    Ok(())
}
