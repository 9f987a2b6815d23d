//! Runs the daemon's future on the thread that waits for I/O, so that an event wakes one thread.
//!
//! Where threads block on futures with async-io, they and a thread of its own take turns at waiting
//! for I/O, and while a node has little to do it is always that thread's: it sees the event, wakes
//! the thread that has the tasks, and so again for each step of a call. Here nobody blocks: that
//! thread has the I/O for itself, and the tasks are polled where it wakes them.
//!
//! A wake from any other thread goes through an event descriptor, for it may come from under a
//! lock that a task takes.

use std::any::Any;
use std::fs::File;
use std::io::{self, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::{Context, Poll, Wake, Waker};

use rustix::event::{EventfdFlags, eventfd};
use smol::Async;

/// As async-io 2 names its thread.
const WAITS_FOR_IO: &str = "async-io";

type Ended<T> = Result<T, Box<dyn Any + Send>>;

struct Drive<T> {
    /// `None` once it has ended.
    future: Mutex<Option<Pin<Box<dyn Future<Output = T> + Send>>>>,
    /// It is to be polled once more.
    woken: AtomicBool,
    /// It is being polled, and whoever does that looks at `woken` afterwards.
    polled: AtomicBool,
    nudge: Async<File>,
    /// Whether what is written to `nudge` will be noticed.
    armed: AtomicBool,
    ended: mpsc::SyncSender<Ended<T>>,
}

/// Woken by what other threads write. Only who waits for I/O calls it, and holds nothing then.
struct Nudged<T>(Arc<Drive<T>>);

/// Until `future` has ended. What it panics with goes on here.
pub fn on_io_thread<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> io::Result<T> {
    let (ended, end) = mpsc::sync_channel(1);
    let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
    let drive = Arc::new(Drive {
        future: Mutex::new(Some(Box::pin(future))),
        woken: AtomicBool::new(true),
        polled: AtomicBool::new(false),
        nudge: Async::new(File::from(eventfd(0, flags)?))?,
        armed: AtomicBool::new(false),
        ended,
    });
    drive.arm();
    drive.nudge();
    match end.recv() {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(panic)) => resume_unwind(panic),
        Err(_) => Err(io::Error::other("the thread that waits for I/O has ended")),
    }
}

impl<T: Send + 'static> Drive<T> {
    fn nudge(&self) {
        let _ = self.nudge.get_ref().write(&1_u64.to_ne_bytes()); // full it is readable too
    }

    fn arm(self: &Arc<Self>) {
        if self.armed.load(Ordering::SeqCst) {
            return;
        }
        let waker = Waker::from(Arc::new(Nudged(self.clone())));
        let mut context = Context::from_waker(&waker);
        let armed = loop {
            match self.nudge.poll_readable(&mut context) {
                Poll::Ready(Ok(())) => {
                    let _ = self.nudge.get_ref().read(&mut [0; 8]); // nothing there: it was noticed twice
                }
                Poll::Ready(Err(_)) => break false,
                Poll::Pending => break true,
            }
        };
        self.armed.store(armed, Ordering::SeqCst);
    }

    /// Polls it once. One that was woken meanwhile comes again behind the I/O that there is by then: a
    /// future that is never idle must not keep timers and sockets from their turn.
    fn run(self: &Arc<Self>) {
        if self.polled.swap(true, Ordering::SeqCst) {
            return;
        }
        self.arm();
        if self.woken.swap(false, Ordering::SeqCst) {
            self.poll();
        }
        self.polled.store(false, Ordering::SeqCst);
        // Who woke it while it was polled has not nudged.
        if self.woken.load(Ordering::SeqCst) {
            self.arm();
            self.nudge();
        }
    }

    fn poll(self: &Arc<Self>) {
        let waker = Waker::from(self.clone());
        let mut future = self.future.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(running) = future.as_mut() else { return };
        let ended = match catch_unwind(AssertUnwindSafe(|| {
            running.as_mut().poll(&mut Context::from_waker(&waker))
        })) {
            Ok(Poll::Pending) => return,
            Ok(Poll::Ready(value)) => Ok(value),
            Err(panic) => Err(panic),
        };
        *future = None;
        let _ = self.ended.try_send(ended);
    }
}

impl<T: Send + 'static> Wake for Drive<T> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let woken = self.woken.swap(true, Ordering::SeqCst);
        if self.polled.load(Ordering::SeqCst) {
            return;
        }
        if std::thread::current().name() == Some(WAITS_FOR_IO) {
            self.run();
        } else if !woken {
            self.nudge();
        }
    }
}

impl<T: Send + 'static> Wake for Nudged<T> {
    fn wake(self: Arc<Self>) {
        self.0.armed.store(false, Ordering::SeqCst);
        self.0.woken.store(true, Ordering::SeqCst);
        self.0.run();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smol::Timer;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    #[test]
    fn future_that_is_never_idle_lets_timers_come() {
        let busy = async {
            loop {
                smol::future::yield_now().await;
            }
        };
        let late = async {
            Timer::after(Duration::from_millis(5)).await;
        };

        on_io_thread(smol::future::or(busy, late)).expect("it ends");
    }

    fn this_thread() -> Option<String> {
        std::thread::current().name().map(str::to_owned)
    }

    #[test]
    fn wakes_of_other_threads_are_none_of_them_lost() {
        let executor = Arc::new(smol::Executor::new());
        let answered = Arc::new(AtomicUsize::new(0));
        let (ask, asked) = smol::channel::bounded::<smol::channel::Sender<()>>(1);
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let asked = asked.clone();
                std::thread::spawn(move || {
                    while let Ok(answer) = asked.recv_blocking() {
                        let _ = answer.send_blocking(());
                    }
                })
            })
            .collect();
        drop(asked);

        let asking = {
            let (executor, answered) = (executor.clone(), answered.clone());
            let one = move |n: u64| {
                let (ask, answered) = (ask.clone(), answered.clone());
                async move {
                    for round in 0..500 {
                        let (reply, answer) = smol::channel::bounded(1);
                        ask.send(reply).await.expect("somebody answers");
                        answer.recv().await.expect("an answer");
                        answered.fetch_add(1, Ordering::SeqCst);
                        if (round + n).is_multiple_of(50) {
                            Timer::after(Duration::from_micros(300)).await;
                        }
                    }
                }
            };
            async move {
                let tasks: Vec<_> = (0..8).map(|n| executor.spawn(one(n))).collect();
                executor
                    .run(async {
                        for task in tasks {
                            task.await;
                        }
                    })
                    .await;
            }
        };
        on_io_thread(asking).expect("it runs");

        assert_eq!(answered.load(Ordering::SeqCst), 8 * 500);
        threads.into_iter().for_each(|thread| thread.join().expect("it ends"));
    }

    #[test]
    fn panic_goes_on_where_the_end_is_awaited() {
        let fails = async {
            Timer::after(Duration::from_millis(1)).await;
            panic!("here");
        };

        let caught = catch_unwind(AssertUnwindSafe(|| on_io_thread::<()>(fails)));

        assert_eq!(caught.expect_err("it panics").downcast_ref::<&str>(), Some(&"here"));
        assert_eq!(on_io_thread(async { 7 }).expect("the thread goes on"), 7);
        assert_ne!(this_thread().as_deref(), Some(WAITS_FOR_IO));
    }
}
