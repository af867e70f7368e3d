//! The way from a wake-up to a poll, where it is short in every order that there is: an executor that
//! sleeps while somebody has woken one of its tasks sleeps for ever, which shuttle reports.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use pando_engine::runtime::executor::{Executor, end_of_turn, spawn_local};
use pando_engine::runtime::park::ThreadDriver;
use pando_engine::runtime::sync::thread;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use crate::explore::{exhaust, explore, is_long};

/// One thread wakes another, which is about to sleep, sleeps, or has not begun.
#[test]
fn one_wake_up() {
    exhaust("wake::one_wake_up", || {
        let (send, receive) = oneshot::channel();
        let waker = thread::spawn(move || send.send(7).expect("somebody waits"));
        let got = Executor::new(ThreadDriver::new()).block_on(receive);
        assert_eq!(got, Ok(7));
        waker.join().expect("a thread");
    });
}

/// Something that becomes true, and who waits for it.
#[derive(Default)]
struct Gate {
    open: u32,
    waiting: Option<Waker>,
}

/// A task is woken twice, while it is polled as well: it sees what each wake-up was about.
#[test]
fn wake_ups_during_a_poll() {
    let race = || {
        let gate = Arc::new(Mutex::new(Gate::default()));
        let opener = Arc::clone(&gate);
        let opener = thread::spawn(move || {
            for _ in 0..2 {
                let waiting = {
                    let mut gate = opener.lock();
                    gate.open += 1;
                    gate.waiting.clone()
                };
                if let Some(waiting) = waiting {
                    waiting.wake();
                }
            }
        });
        Executor::new(ThreadDriver::new()).block_on(poll_fn(|context| {
            let mut gate = gate.lock();
            gate.waiting = Some(context.waker().clone());
            if gate.open == 2 { Poll::Ready(()) } else { Poll::Pending }
        }));
        opener.join().expect("a thread");
    };
    explore("wake::wake_ups_during_a_poll", race);
    // Two million.
    if is_long() {
        exhaust("wake::wake_ups_during_a_poll", race);
    }
}

/// Two threads wake two tasks of one executor.
#[test]
fn two_wakers() {
    explore("wake::two_wakers", || {
        let (first, one) = oneshot::channel();
        let (second, two) = oneshot::channel();
        let wakers = [first, second]
            .map(|send| thread::spawn(move || send.send(()).expect("somebody waits")));
        Executor::new(ThreadDriver::new()).block_on(async {
            let seen = Rc::new(RefCell::new(0));
            let (done, all_done) = oneshot::channel();
            let count = Rc::clone(&seen);
            spawn_local(async move {
                one.await.expect("it comes");
                *count.borrow_mut() += 1;
                done.send(()).ok();
            });
            two.await.expect("it comes");
            all_done.await.expect("it comes");
            assert_eq!(*seen.borrow(), 1);
        });
        wakers.into_iter().for_each(|waker| waker.join().expect("a thread"));
    });
}

/// Two executors wake each other, one step after the other.
#[test]
fn to_and_fro() {
    explore("wake::to_and_fro", || {
        let (to, fro) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (there, back) = (Arc::clone(&to), Arc::clone(&fro));
        let other = thread::spawn(move || {
            Executor::new(ThreadDriver::new()).block_on(async {
                there.notified().await;
                back.notify_one();
            });
        });
        Executor::new(ThreadDriver::new()).block_on(async {
            end_of_turn().await;
            to.notify_one();
            fro.notified().await;
        });
        other.join().expect("a thread");
    });
}
