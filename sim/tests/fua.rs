//! What is asked for with FUA is durable when it is acknowledged, whatever it is.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use pando_engine::device::{BlockDevice, ZeroFlags};
use pando_engine::disk::sim::{CutPlan, SimDisk, SimOptions};
use pando_engine::error::Result;
use pando_engine::runtime::Buf;
use pando_sim::model::Birth;
use pando_sim::run::perform;
use pando_sim::{Config, Op};

const BLOCKS: u32 = 8;

type Done = Pin<Box<dyn Future<Output = Result<()>>>>;

/// Writes a volume, flushes, asks for `change` and lets the power fail. What is read then?
fn after(change: impl FnOnce(Rc<dyn BlockDevice>) -> Done) -> Vec<u8> {
    let config = Config::default();
    let sim = SimDisk::from_image(config.formatted(), 1, SimOptions::default());
    let image = sim.run(async {
        let pool = config.open(&sim).await.expect("nothing fails here");
        let size_bytes = Some(u64::from(BLOCKS) * 4096);
        let birth = Birth { name: "v".into(), size_bytes, source: None, snapshot: false };
        perform(&pool, &Op::Create(vec![birth]), 0).await.expect("nothing fails here");
        let device = pool
            .device(pool.find("v").expect("nothing fails here").id)
            .expect("nothing fails here");
        device.write(0, BLOCKS * 4096, full_of(1), false).await.expect("nothing fails here");
        device.flush().await.expect("nothing fails here");
        change(device).await.expect("nothing fails here");
        sim.image_after_cut(CutPlan::KeepNone)
    });
    let sim = SimDisk::from_image(image.expect("nothing fails here"), 2, SimOptions::default());
    let read = sim.run(async {
        let pool = config.open(&sim).await.expect("nothing fails here");
        let device = pool
            .device(pool.find("v").expect("nothing fails here").id)
            .expect("nothing fails here");
        device.read(0, BLOCKS * 4096).await.expect("nothing fails here").bytes().to_vec()
    });
    read.expect("nothing fails here")
}

fn full_of(byte: u8) -> Buf {
    let mut buf = Buf::new(usize::try_from(BLOCKS).expect("nothing fails here"));
    buf.as_mut_bytes().fill(byte);
    buf
}

#[test]
fn a_write_is_durable() {
    let read =
        after(|d| Box::pin(async move { d.write(0, BLOCKS * 4096, full_of(2), true).await }));
    assert!(read.iter().all(|byte| *byte == 2));
}

#[test]
fn a_discard_is_durable() {
    let bytes = u64::from(BLOCKS) * 4096;
    let read = after(|d| Box::pin(async move { d.discard(0, bytes, true).await }));
    assert!(read.iter().all(|byte| *byte == 0));
}

#[test]
fn zeroes_are_durable() {
    let bytes = u64::from(BLOCKS) * 4096;
    for no_hole in [false, true] {
        let flags = ZeroFlags { fua: true, no_hole };
        let read = after(|d| Box::pin(async move { d.write_zeroes(0, bytes, flags).await }));
        assert!(read.iter().all(|byte| *byte == 0));
    }
}
