//! A shard: a thread with a ring and an executor, and a mailbox in which other threads put work.
//!
//! ```text
//!   any thread --- call / spawn ---> mailbox --> tasks on the shard's thread --> its io_uring
//!              <-- oneshot reply --------------------'
//! ```
//!
//! A piece of work is a closure that creates the future on the shard's thread, so futures need not
//! be `Send`. A shard stops on request or when its last handle is dropped. It drops the tasks that
//! are not done by then and waits for their I/O.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::task::Poll;
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, ErrorKind, Result};
use crate::runtime::executor::{Executor, spawn_local};
use crate::runtime::reactor::ReactorDriver;
use crate::runtime::sync::Mutex;

/// Capacity of a mailbox; senders wait while it is full.
const MAILBOX_MAX: usize = 1024;
/// Pieces of work taken from the mailbox before the tasks get a turn.
const WORK_PER_TURN: usize = 64;

/// A piece of work: creates its task on the shard's thread.
type Work = Box<dyn FnOnce() + Send>;

/// Options of a shard.
#[derive(Clone, Copy, Debug)]
pub struct ShardOptions {
    /// How long the thread spins for work before it sleeps, as long as spinning pays. Zero disables
    /// it.
    pub spin: Duration,
}

impl Default for ShardOptions {
    fn default() -> Self {
        Self { spin: Duration::from_micros(100) }
    }
}

/// Starts shards.
pub struct Shard;

impl Shard {
    /// Starts a thread called `name` with a ring of its own. `init` creates its first task.
    ///
    /// # Errors
    /// `Unsupported` if there is no io_uring, `Io` if no thread can be created.
    pub fn start<F, Fut>(name: String, init: F) -> Result<ShardHandle>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        Self::start_with(name, ShardOptions::default(), init)
    }

    /// As [`Self::start`], with options.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with<F, Fut>(name: String, options: ShardOptions, init: F) -> Result<ShardHandle>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        let (mailbox, inbox) = mpsc::channel(MAILBOX_MAX);
        let (stop, stopped) = oneshot::channel();
        let (started, outcome) = sync_channel(1);
        let thread = thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                let driver = match ReactorDriver::new() {
                    Ok(driver) => driver,
                    Err(error) => {
                        let _ignored = started.send(Err(error));
                        return;
                    }
                };
                let _ignored = started.send(Ok(()));
                let mut executor = Executor::with_spin(driver, options.spin);
                executor.block_on(async move {
                    spawn_local(init());
                    serve(inbox, stopped).await;
                });
            })
            .map_err(|e| Error::io(format!("start of the thread of shard {name}"), e))?;
        match outcome.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error.context(format_args!("shard {name}"))),
            Err(_) => return Err(gone(&name)),
        }
        let id = thread.thread().id();
        let inner = Inner {
            name,
            id,
            mailbox,
            stop: Mutex::new(Some(stop)),
            thread: Mutex::new(Some(thread)),
        };
        Ok(ShardHandle { inner: Arc::new(inner) })
    }
}

/// Takes work from the mailbox until all handles are dropped or the shard is stopped.
async fn serve(mut inbox: mpsc::Receiver<Work>, mut stopped: oneshot::Receiver<()>) {
    let mut work = Vec::with_capacity(WORK_PER_TURN);
    loop {
        let taken = poll_fn(|context| {
            // A dropped sender means that all handles are gone; then the mailbox is closed too.
            if let Poll::Ready(Ok(())) = Pin::new(&mut stopped).poll(context) {
                return Poll::Ready(0);
            }
            inbox.poll_recv_many(context, &mut work, WORK_PER_TURN)
        });
        if taken.await == 0 {
            return;
        }
        for start in work.drain(..) {
            start();
        }
    }
}

fn gone(name: &str) -> Error {
    Error::new(ErrorKind::Shutdown, format!("shard {name} has stopped"))
}

struct Inner {
    name: String,
    id: ThreadId,
    mailbox: mpsc::Sender<Work>,
    stop: Mutex<Option<oneshot::Sender<()>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A handle of a running shard, for any thread and any runtime.
#[derive(Clone)]
pub struct ShardHandle {
    inner: Arc<Inner>,
}

impl ShardHandle {
    /// The name of the shard's thread.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Runs the future that `work` creates as a task of the shard, without waiting for it.
    ///
    /// # Errors
    /// `Shutdown` if the shard has stopped, `Busy` if its mailbox is full.
    pub fn spawn<F, Fut>(&self, work: F) -> Result<()>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        let start: Work = Box::new(move || spawn_local(work()));
        self.inner.mailbox.try_send(start).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => Error::new(
                ErrorKind::Busy,
                format!("shard {} has {MAILBOX_MAX} pieces of work waiting", self.inner.name),
            ),
            mpsc::error::TrySendError::Closed(_) => gone(&self.inner.name),
        })
    }

    /// Runs the future that `work` creates on the shard and returns its result. Can be awaited on
    /// any runtime; waits while the mailbox is full. Once the shard has the work, the work runs to
    /// its end, even if this future is dropped.
    ///
    /// # Errors
    /// `Shutdown` if the shard stops before the work is done.
    pub fn call<R, F, Fut>(
        &self,
        work: F,
    ) -> impl Future<Output = Result<R>> + Send + 'static + use<R, F, Fut>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = R> + 'static,
        R: Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let start: Work = Box::new(move || {
            spawn_local(async move {
                // The caller may have given up; the work must be done anyway.
                let _ignored = reply.send(work().await);
            });
        });
        let inner = Arc::clone(&self.inner);
        async move {
            inner.mailbox.send(start).await.map_err(|_| gone(&inner.name))?;
            answer.await.map_err(|_| gone(&inner.name))
        }
    }

    /// Stops the shard; returns at once. Tasks that are not done are dropped.
    pub fn stop(&self) {
        if let Some(stop) = self.inner.stop.lock().take() {
            // If the receiver is gone, the shard has stopped already.
            let _ignored = stop.send(());
        }
    }

    /// Waits until the shard's thread has ended. This blocks, so call it neither in a task of a
    /// runtime nor on the shard itself. The first caller waits, others return at once.
    ///
    /// # Errors
    /// `Busy` on the shard's own thread, `Shutdown` if the thread panicked.
    pub fn join(&self) -> Result<()> {
        let name = &self.inner.name;
        if thread::current().id() == self.inner.id {
            return Err(Error::new(ErrorKind::Busy, format!("shard {name} cannot join itself")));
        }
        let Some(thread) = self.inner.thread.lock().take() else { return Ok(()) };
        thread
            .join()
            .map_err(|_| Error::new(ErrorKind::Shutdown, format!("shard {name} has panicked")))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;
    use crate::runtime::executor::end_of_turn;
    use crate::runtime::park::ThreadDriver;
    use crate::runtime::reactor;

    fn here<F: Future>(future: F) -> F::Output {
        Executor::new(ThreadDriver::new()).block_on(future)
    }

    #[test]
    fn calls_run_on_the_shard_and_answer_elsewhere() {
        let shard = Shard::start("s0".to_owned(), || async {}).unwrap();
        let answer = here(shard.call(|| async {
            // The task may hold values that are not `Send`.
            let state = Rc::new(Cell::new(1));
            reactor::sleep(Duration::from_millis(1)).await;
            state.set(state.get() + 41);
            (state.get(), thread::current().name().map(str::to_owned))
        }));
        assert_eq!(answer.unwrap(), (42, Some("s0".to_owned())));
        shard.stop();
        shard.join().unwrap();
        let refused = here(shard.call(|| async {})).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Shutdown);
        assert_eq!(shard.spawn(|| async {}).unwrap_err().kind(), ErrorKind::Shutdown);
    }

    #[test]
    fn stopping_drops_what_is_not_done() {
        let shard = Shard::start("s1".to_owned(), || async {}).unwrap();
        let waiting = shard.call(std::future::pending::<()>);
        let stop = shard.clone();
        let result = here(async move {
            spawn_local(async move { stop.stop() });
            end_of_turn().await;
            waiting.await
        });
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Shutdown);
        shard.join().unwrap();
    }

    #[test]
    fn ends_when_nobody_has_a_handle() {
        let (ended, end) = std::sync::mpsc::channel::<()>();
        let shard = Shard::start("s2".to_owned(), move || async move {
            let _ended = ended;
            std::future::pending::<()>().await;
        });
        drop(shard.unwrap());
        assert!(end.recv().is_err(), "the first task was dropped with the shard");
    }

    #[test]
    fn a_shard_does_not_join_itself() {
        let shard = Shard::start("s3".to_owned(), || async {}).unwrap();
        let own = shard.clone();
        let result = here(shard.call(move || async move { own.join() })).unwrap();
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Busy);
    }
}
