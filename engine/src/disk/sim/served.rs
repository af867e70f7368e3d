//! A simulated disk for several threads: one thread is the device, the others sleep while they
//! wait.
//!
//! ```text
//!  shard: Disk::write, sync, ...  --> in flight --(device: one at random)--> wake the task, unpark
//!         SimDriver::park: sleeps                  nothing in flight: sleeps
//! ```
//! The device works whenever its thread runs, so an I/O can complete at any moment of any shard. A
//! power failure wakes all threads, and every executor stops.

use super::SimDisk;
use crate::runtime::sync::{Parker, Unparker};

/// The threads that may sleep.
#[derive(Default)]
pub(super) struct Served {
    on: bool,
    /// The thread of the device, once it runs.
    device: Option<Unparker>,
    /// All threads with a driver.
    shards: Vec<Unparker>,
}

impl Served {
    pub(super) const fn is_on(&self) -> bool {
        self.on
    }

    pub(super) fn add_shard(&mut self, shard: Unparker) {
        self.shards.push(shard);
    }

    /// Whether I/O was requested or a task waits for a moment.
    pub(super) fn something_to_do(&self) {
        if let Some(device) = &self.device {
            device.unpark();
        }
    }

    pub(super) fn power_failed(&self) {
        if self.on {
            self.something_to_do();
            self.shards.iter().for_each(Unparker::unpark);
        }
    }
}

impl SimDisk {
    /// From now on the thread that calls [`Self::serve`] completes the I/O; drivers only sleep.
    pub fn begin_service(&self) {
        self.state.lock().served.on = true;
    }

    /// From now on drivers complete the I/O themselves again. Call it when only one thread is left
    /// and no other one has anything under way.
    pub fn end_service(&self) {
        let mut state = self.state.lock();
        state.served.on = false;
        state.served.something_to_do();
    }

    /// Works as the device until [`Self::end_service`] is called or the power fails.
    pub fn serve(&self) {
        let parker = Parker::new();
        loop {
            let woken = {
                let mut state = self.state.lock();
                if state.halted || !state.served.on {
                    state.served.device = None;
                    return;
                }
                // Registered before it sleeps: a thread with work for the device unparks it from
                // now on.
                state.served.device.get_or_insert_with(|| parker.unparker());
                state.go_on()
            };
            match woken {
                Some(woken) => woken.into_iter().for_each(std::task::Waker::wake),
                None => parker.park(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::disk::sim::{CutPlan, SimDisk, SimOptions};
    use crate::runtime::Buf;
    use crate::runtime::executor::Executor;
    use crate::runtime::sync::thread;
    use crate::units::BlockNo;

    /// Writes and syncs on a thread of its own; returns how many rounds completed.
    fn writer(sim: &SimDisk, at: u64, rounds: u64) -> thread::JoinHandle<Option<u64>> {
        let sim = sim.clone();
        thread::spawn(move || {
            Executor::new(sim.driver()).run(async {
                let disk = sim.disk();
                for round in 1..=rounds {
                    let mut buf = Buf::new(1);
                    buf.as_mut_bytes().fill(u8::try_from(round % 250).unwrap());
                    disk.write(BlockNo::new(at), vec![buf]).await.unwrap();
                    disk.sync().await.unwrap();
                }
                rounds
            })
        })
    }

    #[test]
    fn threads_share_a_disk() {
        let sim = SimDisk::new(1, 16, SimOptions::default());
        sim.begin_service();
        let device = sim.clone();
        let device = thread::spawn(move || device.serve());
        let writers: Vec<_> = (0..3).map(|at| writer(&sim, at, 200)).collect();
        for writer in writers {
            assert_eq!(writer.join().unwrap(), Some(200));
        }
        sim.end_service();
        device.join().unwrap();
        let left = sim.image_after_cut(CutPlan::KeepNone);
        for at in 0..3 {
            assert_eq!(left.blocks().block(BlockNo::new(at))[0], 200);
        }
        // Without a device thread, a thread completes its I/O itself.
        let more = sim.run(async { sim.disk().sync().await });
        assert!(more.is_some_and(|synced| synced.is_ok()));
    }

    #[test]
    fn everybody_stops_when_the_power_fails() {
        let sim = SimDisk::new(1, 16, SimOptions::default());
        sim.set_cut_at(100);
        sim.begin_service();
        let device = sim.clone();
        let device = thread::spawn(move || device.serve());
        let writers: Vec<_> = (0..3).map(|at| writer(&sim, at, 1000)).collect();
        for writer in writers {
            assert_eq!(writer.join().unwrap(), None);
        }
        device.join().unwrap();
        assert!(sim.is_cut());
    }
}
