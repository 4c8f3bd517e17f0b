//! Workers for one call. Threads live as long as the call (a pool that outlives it does not survive
//! a fork), claim numbered pieces of work in order, and stop at the first failure. The calling
//! thread does no work: it watches for signals and reports progress.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Error, Result};

/// How often the calling thread looks at signals and progress.
const TICK: Duration = Duration::from_millis(50);

/// Asks workers to stop.
#[derive(Default)]
pub struct Stop(AtomicBool);

impl Stop {
    /// An error once the work has been called off; to be asked about every tile.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }

    /// Calls the work off.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The first failure, by position in the work, so that the same input gives the same message
/// whatever the number of threads; a real failure goes before an interruption it caused.
#[derive(Default)]
struct Failure(Mutex<Option<(usize, Error)>>);

impl Failure {
    fn record(&self, position: usize, error: Error) {
        let mut slot = lock(&self.0);
        let earlier = match slot.as_ref() {
            None => true,
            Some((_, Error::Interrupted)) => true,
            Some((known, _)) => position < *known && !matches!(error, Error::Interrupted),
        };
        if earlier {
            *slot = Some((position, error));
        }
    }
}

/// Locks, whether or not a thread panicked while it held the lock: the failure is reported anyway.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Carries out `work` for every position below `count` on `threads` threads, each with its own
/// state made by `init`. Positions are claimed in ascending order. `tick` runs on the calling
/// thread about twenty times a second; an error from it stops the work, and so does setting `stop`.
pub fn run<S>(
    threads: usize,
    count: usize,
    stop: &Stop,
    init: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize, &Stop) -> Result<()> + Sync,
    tick: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failure = Failure::default();
    let threads = threads.clamp(1, count.max(1));
    let active = Mutex::new(threads);
    let finished = Condvar::new();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let worker = || {
                    let mut state = init();
                    while stop.check().is_ok() {
                        let position = next.fetch_add(1, Ordering::Relaxed);
                        if position >= count {
                            break;
                        }
                        if let Err(error) = work(&mut state, position, stop) {
                            failure.record(position, error);
                            stop.set();
                        }
                    }
                };
                if catch_unwind(AssertUnwindSafe(worker)).is_err() {
                    failure.record(0, Error::Internal(String::from("a worker panicked")));
                    stop.set();
                }
                *lock(&active) -= 1;
                finished.notify_all();
            });
        }
        let mut running = lock(&active);
        while *running > 0 {
            let waited = finished.wait_timeout(running, TICK);
            running = waited.unwrap_or_else(PoisonError::into_inner).0;
            if *running > 0 {
                drop(running);
                if let Err(error) = tick() {
                    failure.record(0, error);
                    stop.set();
                }
                running = lock(&active);
            }
        }
    });
    let outcome = lock(&failure.0).take();
    match outcome {
        Some((_, error)) => Err(error),
        None => stop.check(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_is_worked_once_and_the_earliest_failure_wins() {
        let seen = Mutex::new(vec![0; 1000]);
        run(
            4,
            1000,
            &Stop::default(),
            || (),
            |(), position, _| {
                lock(&seen)[position] += 1;
                Ok(())
            },
            &mut || Ok(()),
        )
        .unwrap();
        assert!(lock(&seen).iter().all(|count| *count == 1));
        let failing = |(): &mut (), position: usize, _: &Stop| match position {
            7.. => Err(Error::config(format!("{position}"))),
            _ => Ok(()),
        };
        for threads in [1, 2, 8] {
            let error = run(
                threads,
                50,
                &Stop::default(),
                || (),
                failing,
                &mut || Ok(()),
            )
            .unwrap_err();
            assert_eq!(error.to_string(), "7");
        }
    }

    #[test]
    fn a_tick_can_stop_the_work_and_a_panic_is_an_error() {
        let endless = |(): &mut (), _: usize, stop: &Stop| loop {
            stop.check()?;
            std::thread::sleep(Duration::from_millis(1));
        };
        let stopped = run(2, 10, &Stop::default(), || (), endless, &mut || {
            Err(Error::Interrupted)
        });
        assert!(matches!(stopped, Err(Error::Interrupted)));
        let panicked = run(
            2,
            10,
            &Stop::default(),
            || (),
            |(), _, _| panic!("boom"),
            &mut || Ok(()),
        );
        assert!(matches!(panicked, Err(Error::Internal(_))));
    }
}
