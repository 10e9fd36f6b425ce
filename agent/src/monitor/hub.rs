//! One reader of the ring, many listeners.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use dataplane_abi::{Class, PacketEvent, Reason, Wanted};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::dataplane::{self, EventRing};

/// Events that wait for one listener; beyond them it loses some.
const QUEUE: usize = 4096;
/// How long the reader sleeps at most: within this it sees that nobody listens any more.
const TURN_MS: u16 = 200;

/// What a listener hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    Event(PacketEvent),
    /// So many more events were lost, by the ring or by the listener's own queue.
    Lost(u64),
    /// All is well and quiet.
    Nothing,
}

/// A listener's end. Dropping it ends the listening.
pub struct Subscription {
    pub heard: Receiver<Heard>,
}

struct Listener {
    sender: SyncSender<Heard>,
    /// Of new flows none, or one in 2^n.
    flows: Option<u32>,
    /// New flows so far, of those that the ring brought.
    seen: u64,
    lost: u64,
}

/// Who listens. Cheap to clone: all are the same.
#[derive(Clone)]
pub struct Hub {
    pin_root: PathBuf,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    listeners: Vec<Listener>,
    reading: bool,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let listeners = self.state().listeners.len();
        f.debug_struct("Hub")
            .field("listeners", &listeners)
            .finish_non_exhaustive()
    }
}

impl State {
    /// What the programs shall tell for all listeners to hear what they want.
    fn wanted(&self) -> Wanted {
        if self.listeners.is_empty() {
            return Wanted::default();
        }
        Wanted::new(self.power())
    }

    fn power(&self) -> Option<u32> {
        self.listeners.iter().filter_map(|one| one.flows).min()
    }

    fn tell(&mut self, event: PacketEvent) {
        let is_flow = Reason::ALL
            .get(event.reason as usize)
            .is_some_and(|reason| reason.class() == Class::Event);
        let power = self.power().unwrap_or(0);
        self.listeners.retain_mut(|listener| {
            if is_flow {
                let Some(flows) = listener.flows else {
                    return true;
                };
                // The ring brings as many as the most curious wants.
                listener.seen += 1;
                if listener.seen & ((1 << flows.saturating_sub(power).min(63)) - 1) != 0 {
                    return true;
                }
            }
            listener.send(Heard::Event(event)).is_continue()
        });
    }

    fn lose(&mut self, count: u64) {
        for listener in &mut self.listeners {
            listener.lost += count;
        }
    }
}

impl Listener {
    fn send(&mut self, heard: Heard) -> ControlFlow<()> {
        if self.lost > 0 {
            match self.sender.try_send(Heard::Lost(self.lost)) {
                Ok(()) => self.lost = 0,
                Err(TrySendError::Full(_)) => {
                    self.lost += 1;
                    return ControlFlow::Continue(());
                }
                Err(TrySendError::Disconnected(_)) => return ControlFlow::Break(()),
            }
        }
        match self.sender.try_send(heard) {
            Ok(()) => ControlFlow::Continue(()),
            Err(TrySendError::Full(_)) => {
                self.lost += 1;
                ControlFlow::Continue(())
            }
            Err(TrySendError::Disconnected(_)) => ControlFlow::Break(()),
        }
    }
}

impl Hub {
    /// Nobody listens yet.
    pub fn new(pin_root: &Path) -> Self {
        Self {
            pin_root: pin_root.into(),
            state: Arc::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Listeners are added and removed whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to listen: to drops and rejects, and to one in 2^`flows` new flows.
    pub fn subscribe(&self, flows: Option<u32>) -> Result<Subscription, dataplane::Error> {
        let (sender, heard) = sync_channel(QUEUE);
        let mut state = self.state();
        state.listeners.push(Listener {
            sender,
            flows,
            seen: 0,
            lost: 0,
        });
        if !state.reading {
            let mut ring = match EventRing::open(&self.pin_root) {
                Ok(ring) => ring,
                Err(error) => {
                    state.listeners.clear();
                    return Err(error);
                }
            };
            // What nobody was there to hear.
            while ring.take().is_some() {}
            ring.want(state.wanted());
            let shared = self.state.clone();
            let reading = thread::Builder::new()
                .name("monitor".into())
                .spawn(move || read(&shared, ring));
            if let Err(source) = reading {
                state.listeners.clear();
                return Err(dataplane::Error::Thread(source));
            }
            state.reading = true;
        }
        Ok(Subscription { heard })
    }
}

/// Reads until nobody listens.
fn read(shared: &Mutex<State>, mut ring: EventRing) {
    let mut lost_before = ring.lost();
    loop {
        {
            let mut events = [PollFd::new(ring.fd(), PollFlags::POLLIN)];
            // A signal is as good as a timeout.
            let _ = poll(&mut events, PollTimeout::from(TURN_MS));
        }
        let mut state = shared.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = ring.lost();
        state.lose(lost.saturating_sub(lost_before));
        lost_before = lost;
        while let Some(event) = ring.take() {
            state.tell(event);
        }
        // Whoever left shows when something is sent to it; a full queue is one that is there.
        state.listeners.retain(|listener| {
            !matches!(
                listener.sender.try_send(Heard::Nothing),
                Err(TrySendError::Disconnected(_))
            )
        });
        ring.want(state.wanted());
        if state.listeners.is_empty() {
            state.reading = false;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(reason: Reason) -> PacketEvent {
        PacketEvent {
            time_ns: 0,
            reason: reason as u32,
            hook: 0,
            ifindex: 0,
            len: 0,
            captured: 0,
            pad: 0,
            data: [0; dataplane_abi::CAPTURE_LEN / 8],
        }
    }

    fn listener(flows: Option<u32>, room: usize) -> (Listener, Receiver<Heard>) {
        let (sender, heard) = sync_channel(room);
        let listener = Listener {
            sender,
            flows,
            seen: 0,
            lost: 0,
        };
        (listener, heard)
    }

    #[test]
    fn each_hears_its_own_share_of_flows_and_every_drop() {
        let ((all, hears_all), (few, hears_few), (none, hears_none)) = (
            listener(Some(0), 100),
            listener(Some(3), 100),
            listener(None, 100),
        );
        let mut state = State {
            listeners: vec![all, few, none],
            reading: true,
        };
        assert_eq!(state.wanted(), Wanted::new(Some(0)));
        for _ in 0..16 {
            state.tell(event(Reason::FlowCreated));
        }
        state.tell(event(Reason::Malformed));
        let counts = [hears_all, hears_few, hears_none].map(|heard| heard.try_iter().count());
        assert_eq!(counts, [17, 3, 1]);
        state.tell(event(Reason::Malformed));
        assert!(state.listeners.is_empty(), "all have left");
        assert_eq!(state.wanted(), Wanted::default());
    }

    #[test]
    fn a_slow_listener_is_told_how_much_it_lost() {
        let (slow, heard) = listener(None, 2);
        let mut state = State {
            listeners: vec![slow],
            reading: true,
        };
        for _ in 0..5 {
            state.tell(event(Reason::Malformed));
        }
        state.lose(10);
        assert_eq!(heard.try_iter().count(), 2);
        state.tell(event(Reason::Malformed));
        let told: Vec<Heard> = heard.try_iter().collect();
        assert_eq!(
            told,
            [Heard::Lost(13), Heard::Event(event(Reason::Malformed))]
        );
    }
}
