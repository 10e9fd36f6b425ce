//! Turns: of all writes, only a few want a processor at a time, and reads never wait behind the others.
//!
//! A runtime runs what is ready in the order in which it became so. Writes become ready together, with the commit that they shared,
//! and each is many times the work of a read: one that came behind them would wait for all of them. So a write is not ready
//! before it is its turn, and gives its turn on whenever it waits for something, a disk above all.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

/// Turns gives out a fixed number of turns, first come, first served.
pub struct Turns {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    free: usize,
    /// The number of the next piece of work.
    next: u64,
    /// Who waits, in order.
    waiting: VecDeque<(u64, Waker)>,
    /// Whose turn it is, and who has not noticed yet.
    called: Vec<u64>,
}

impl State {
    /// A turn is over: who is called next.
    fn pass_on(&mut self) -> Option<Waker> {
        match self.waiting.pop_front() {
            Some((number, waker)) => {
                self.called.push(number);
                Some(waker)
            }
            None => {
                self.free += 1;
                None
            }
        }
    }
}

impl Turns {
    /// So many at a time: as many as there are threads that work.
    pub fn new(turns: usize) -> Self {
        let state = State {
            free: turns.max(1),
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does work in turn. From one wait of it to the next is one turn.
    pub async fn take<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let mut place = Place {
            turns: self,
            number: None,
            works: false,
        };
        poll_fn(|context| {
            ready!(place.poll_turn(context));
            let outcome = work.as_mut().poll(context);
            place.pass_on();
            outcome
        })
        .await
    }
}

/// The place of one piece of work. It is given up when the work is dropped, wherever it is then.
struct Place<'a> {
    turns: &'a Turns,
    /// While it waits for its turn.
    number: Option<u64>,
    works: bool,
}

impl Place<'_> {
    fn poll_turn(&mut self, context: &Context<'_>) -> Poll<()> {
        let mut state = self.turns.state();
        match self.number {
            None if state.free > 0 => state.free -= 1,
            None => {
                let number = state.next;
                state.next += 1;
                state.waiting.push_back((number, context.waker().clone()));
                self.number = Some(number);
                return Poll::Pending;
            }
            Some(number) => match state.called.iter().position(|called| *called == number) {
                Some(at) => {
                    state.called.swap_remove(at);
                }
                None => {
                    let mut waiting = state.waiting.iter_mut();
                    if let Some((_, waker)) = waiting.find(|(other, _)| *other == number) {
                        waker.clone_from(context.waker());
                    }
                    return Poll::Pending;
                }
            },
        }
        drop(state);
        (self.number, self.works) = (None, true);
        Poll::Ready(())
    }

    fn pass_on(&mut self) {
        self.works = false;
        let next = self.turns.state().pass_on();
        if let Some(next) = next {
            next.wake();
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.works {
            return self.pass_on();
        }
        let Some(number) = self.number else { return };
        let mut state = self.turns.state();
        state.waiting.retain(|(other, _)| *other != number);
        let called = state.called.iter().position(|called| *called == number);
        let next = called.and_then(|at| {
            state.called.swap_remove(at);
            state.pass_on()
        });
        drop(state);
        if let Some(next) = next {
            next.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::FutureExt;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn who_waits_holds_nobody_up() {
        let turns = Turns::new(1);
        let (go, wait) = oneshot::channel::<()>();
        let mut first = Box::pin(turns.take(wait));
        assert!(first.as_mut().now_or_never().is_none());
        assert!(turns.take(async {}).now_or_never().is_some());
        go.send(()).expect("it waits");
        first.await.expect("told to go on");
        assert_eq!(turns.state().free, 1);
    }

    #[tokio::test]
    async fn turns_go_in_order_and_past_who_has_gone_away() {
        let (turns, done) = (Turns::new(1), AtomicUsize::new(0));
        let work = || {
            Box::pin(turns.take(async {
                done.fetch_add(1, Ordering::Relaxed);
            }))
        };
        let mut works: Vec<_> = (0..4).map(|_| work()).collect();
        // The turn is taken while the others are asked.
        turns
            .take(poll_fn(|_| {
                for work in &mut works {
                    assert!(work.as_mut().now_or_never().is_none());
                }
                Poll::Ready(())
            }))
            .await;
        assert_eq!(done.load(Ordering::Relaxed), 0, "nobody had a turn");
        assert_eq!(turns.state().called, [0], "the first one is called");
        // Who was called goes away, and so does who waits in the middle.
        drop(works.remove(0));
        drop(works.remove(1));
        assert_eq!(turns.state().called, [1]);
        assert!(works[1].as_mut().now_or_never().is_none(), "not its turn");
        works.remove(0).await;
        assert_eq!(turns.state().called, [3]);
        works.remove(0).await;
        assert_eq!(done.load(Ordering::Relaxed), 2);
        let state = turns.state();
        assert_eq!((state.free, state.waiting.len()), (1, 0));
    }

    #[tokio::test]
    async fn work_that_panics_gives_its_turn_back() {
        let turns = Turns::new(1);
        let panics = turns.take(async { panic!("as it should") });
        let outcome = std::panic::AssertUnwindSafe(panics).catch_unwind().await;
        assert!(outcome.is_err());
        assert_eq!(turns.state().free, 1);
    }
}
