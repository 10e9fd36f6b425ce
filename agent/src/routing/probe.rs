//! Questions and answers between nodes, from and to addresses of their pod ranges.
//!
//! A datagram is 16 bytes: a mark that says whether it is a question or an answer, and the question's number. Who answers a question that
//! it was not asked does not know the number.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt::BindToDevice};

use super::paths::{Answer, Path, Paths, Question, Settings};
use crate::event::Event;
use crate::plan::{PathKey, Probed};

/// The port that nodes ask each other on.
const PORT: u16 = 6107;
const QUESTION: [u8; 8] = *b"keelway?";
const ANSWER: [u8; 8] = *b"keelway!";
/// Longest sleep: ways that are to be followed from now on are seen by then.
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// The thread that asks and answers, and what it has found out.
pub(super) struct Prober {
    shared: Arc<Shared>,
}

struct Shared {
    began: Instant,
    paths: Mutex<Paths>,
    events: Sender<Event>,
    /// The interface by which other nodes are reached, once that is known.
    uplink: Mutex<Option<String>>,
}

impl Prober {
    pub fn new(events: Sender<Event>) -> Self {
        let seed = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as u64);
        let seed = seed ^ (u64::from(std::process::id()) << 48);
        Self {
            shared: Arc::new(Shared {
                began: Instant::now(),
                paths: Mutex::new(Paths::new(Settings::default(), seed)),
                events,
                uplink: Mutex::new(None),
            }),
        }
    }

    /// Takes the ways that there are now; begins to ask with the first.
    pub fn follow(&self, probed: &BTreeMap<PathKey, Probed>, uplink: &str) {
        self.shared.paths().follow(probed, self.shared.now());
        let mut known = self
            .shared
            .uplink
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if known.replace(uplink.to_owned()).is_some() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let probing = thread::Builder::new()
            .name("probe".into())
            .spawn(move || shared.run());
        if let Err(error) = probing {
            tracing::error!(%error, "no thread for probes");
            *known = None;
        }
    }

    pub fn proven(&self) -> BTreeSet<PathKey> {
        self.shared.paths().proven()
    }

    pub fn measured(&self) -> BTreeMap<PathKey, Path> {
        self.shared.paths().get().clone()
    }
}

impl Shared {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn paths(&self) -> MutexGuard<'_, Paths> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut sockets: HashMap<IpAddr, UdpSocket> = HashMap::new();
        loop {
            let (questions, mut changed) = self.paths().ask(self.now());
            for question in questions {
                self.send(&mut sockets, question);
            }
            let due = self.paths().due().map_or(PAUSE_MAX, |due| {
                due.saturating_sub(self.now()).min(PAUSE_MAX)
            });
            changed |= self.listen(&sockets, due);
            if changed && self.events.send(Event::PathsChanged).is_err() {
                return;
            }
        }
    }

    /// Takes what comes until `pause` is over or something has come.
    fn listen(&self, sockets: &HashMap<IpAddr, UdpSocket>, pause: Duration) -> bool {
        let mut waits: Vec<PollFd<'_>> = sockets
            .values()
            .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN))
            .collect();
        let timeout = PollTimeout::try_from(pause + Duration::from_millis(1));
        // Interrupted or not: what has come is read.
        let _ = poll(&mut waits, timeout.unwrap_or(PollTimeout::ZERO));
        let mut changed = false;
        for socket in sockets.values() {
            let mut bytes = [0; 17];
            while let Ok((16, from)) = socket.recv_from(&mut bytes) {
                let (mark, number) = bytes[..16].split_at(8);
                let Ok(number) = <[u8; 8]>::try_from(number) else {
                    continue;
                };
                if mark == QUESTION {
                    let mut answer = [0; 16];
                    answer[..8].copy_from_slice(&ANSWER);
                    answer[8..].copy_from_slice(&number);
                    // A lost answer is a missing one; whoever asked asks again.
                    let _ = socket.send_to(&answer, from);
                } else if mark == ANSWER {
                    let answer = Answer {
                        from: from.ip(),
                        number: u64::from_be_bytes(number),
                    };
                    changed |= self.paths().answered(answer, self.now());
                }
            }
        }
        changed
    }

    fn send(&self, sockets: &mut HashMap<IpAddr, UdpSocket>, question: Question) {
        let socket = match sockets.entry(question.from) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(empty) => match self.open(&question) {
                Ok(socket) => empty.insert(socket),
                Err(error) => {
                    // The answer will be missing, and the next question tries again.
                    tracing::debug!(from = %question.from, %error, "no socket for probes");
                    return;
                }
            },
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&QUESTION);
        bytes[8..].copy_from_slice(&question.number.to_be_bytes());
        // No route is no answer.
        let _ = socket.send_to(&bytes, SocketAddr::new(question.to, PORT));
    }

    fn open(&self, question: &Question) -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind(SocketAddr::new(question.from, PORT))?;
        socket.set_nonblocking(true)?;
        if question.direct {
            // What goes or comes by another interface, as the overlay's, is no proof.
            let uplink = self.uplink.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(name) = uplink.as_deref() {
                setsockopt(&socket, BindToDevice, &OsString::from(name))?;
            }
        }
        Ok(socket)
    }
}
