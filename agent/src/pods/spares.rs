//! Pairs with their programs on, made while nobody waits.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::dataplane::PodHooks;
use crate::net::{Kernel, Netlink, NetlinkError, Spare, SpareNetwork};
use crate::node::NodeError;
use crate::worker::reason;

/// Pairs that lie ready: a burst of this many pods waits for nothing.
const READY: usize = 64;
/// Making a pair holds a lock of the kernel that pods in the making want too: it waits until no pod is, and so long after the last one,
const QUIET: Duration = Duration::from_millis(60);
/// but not for ever.
const QUIET_MAX: Duration = Duration::from_secs(2);
/// The pause after one that could not be made.
const RETRY: Duration = Duration::from_secs(5);

/// The pairs that lie ready, and the thread that makes them.
pub(super) struct Spares {
    shared: Arc<Shared>,
}

struct Shared {
    network: SpareNetwork,
    hooks: PodHooks,
    mtu: u32,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    ready: VecDeque<Spare>,
    /// Pods in the making.
    wired: usize,
    /// When a pod was last begun or ended.
    last: Instant,
    stop: bool,
}

/// What a thread needs that wires a pod.
#[derive(Clone)]
pub(super) struct Workshop(Arc<Shared>);

impl Spares {
    pub fn start(hooks: PodHooks, mtu: u32) -> Result<Self, NetlinkError> {
        let shared = Arc::new(Shared {
            network: SpareNetwork::open()?,
            hooks,
            mtu,
            state: Mutex::new(State {
                ready: VecDeque::new(),
                wired: 0,
                last: Instant::now(),
                stop: false,
            }),
            changed: Condvar::new(),
        });
        let keeping = Arc::clone(&shared);
        thread::Builder::new()
            .name("spares".into())
            .spawn(move || keeping.keep())
            .map_err(|source| NetlinkError::new("start a thread", source))?;
        Ok(Self { shared })
    }

    /// A pair that lies ready, if there is one.
    pub fn take(&self) -> Option<Spare> {
        let mut state = self.shared.state();
        state.last = Instant::now();
        state.wired += 1;
        let spare = state.ready.pop_front();
        self.shared.changed.notify_all();
        spare
    }

    /// The pod that [`Spares::take`] was for is made, or is not going to be.
    pub fn wired(&self) {
        let mut state = self.shared.state();
        state.last = Instant::now();
        state.wired = state.wired.saturating_sub(1);
        self.shared.changed.notify_all();
    }

    /// How many pairs lie ready, and how many there are to be.
    pub fn fill(&self) -> (usize, usize) {
        (self.shared.state().ready.len(), READY)
    }

    pub fn workshop(&self) -> Workshop {
        Workshop(Arc::clone(&self.shared))
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.changed.notify_all();
    }
}

impl Workshop {
    pub fn network(&self) -> &SpareNetwork {
        &self.0.network
    }

    pub fn hooks(&self) -> &PodHooks {
        &self.0.hooks
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self) {
        let mut number = 0;
        loop {
            if !self.wait_until_wanted() {
                return;
            }
            number += 1;
            match self.make(number) {
                Ok(spare) => self.state().ready.push_back(spare),
                Err(error) => {
                    tracing::warn!(error = reason(&error), "no pair of interfaces in advance");
                    let state = self.state();
                    // Woken early by the end or by somebody who takes one; the next attempt is the retry either way.
                    drop(
                        self.changed
                            .wait_timeout_while(state, RETRY, |state| !state.stop),
                    );
                }
            }
        }
    }

    /// Waits until a pair is wanted and nobody is in the way. `false`: never again.
    fn wait_until_wanted(&self) -> bool {
        let mut state = self.state();
        let mut wanted: Option<Instant> = None;
        loop {
            if state.stop {
                return false;
            }
            if state.ready.len() >= READY {
                wanted = None;
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let since = *wanted.get_or_insert_with(Instant::now);
            let bounded = QUIET_MAX.saturating_sub(since.elapsed());
            let left = if state.wired > 0 {
                bounded
            } else {
                QUIET.saturating_sub(state.last.elapsed()).min(bounded)
            };
            if left.is_zero() {
                return true;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
    }

    fn make(&self, number: u32) -> Result<Spare, NodeError> {
        let mut kernel = Kernel::new(Netlink::open()?);
        let spare = self.network.make(&mut kernel, number, self.mtu)?;
        if let Err(error) = self.hooks.attach(spare.host_index) {
            // It also goes with this process.
            let _ = kernel.delete_link(&spare.name);
            return Err(error.into());
        }
        Ok(spare)
    }
}
