//! One thread on one interface: hears beats and questions, beats, answers and announces.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};

use super::beats::{BEAT_EVERY, Beats};
use super::frame::{
    self, Beat, ETHERTYPE_ARP, ETHERTYPE_BEAT, ETHERTYPE_IPV6, Mac, solicited_node,
};
use super::sys::packet_socket;
use crate::event::Event;

/// The longest sleep: within this, what the event loop wishes is done.
const TURN_MS: u16 = 25;
/// When an address is announced again after it was taken over: the first announcement may be lost, as a switch may still learn.
const REPEATS: [Duration; 3] = [
    Duration::from_millis(200),
    Duration::from_millis(600),
    Duration::from_secs(2),
];
/// Frames taken in one turn, so that a flood of them does not keep beats from being sent.
const TURN_FRAMES_MAX: usize = 256;

/// The link and who is on it.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    pub ifindex: u32,
    pub mac: Mac,
    pub node: Arc<str>,
    /// One of the node's addresses, by which others know it.
    pub address: IpAddr,
}

/// What the event loop wishes.
enum Command {
    Known(BTreeMap<Arc<str>, Vec<IpAddr>>),
    Announce(BTreeSet<IpAddr>),
}

/// The thread, from outside. It ends with this value, and tells the others on the link that it does.
pub struct Announcer {
    commands: Option<Sender<Command>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Announcer {
    /// Begins to live on the link. Who else lives there goes to the event loop whenever it changes.
    pub fn start(config: LinkConfig, events: Sender<Event>) -> io::Result<Self> {
        let socket = |ethertype| packet_socket(config.ifindex, ethertype);
        let link = Link {
            arp: socket(ETHERTYPE_ARP)?,
            neighbours: socket(ETHERTYPE_IPV6)?,
            beats_socket: socket(ETHERTYPE_BEAT)?,
            groups: UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).ok(),
            beats: Beats::new(config.node.clone(), Instant::now()),
            announced: BTreeSet::new(),
            repeats: Vec::new(),
            live: None,
            config,
            events,
        };
        let (commands, inbox) = channel();
        let thread = thread::Builder::new()
            .name("announce".into())
            .spawn(move || link.run(&inbox))?;
        Ok(Self {
            commands: Some(commands),
            thread: Some(thread),
        })
    }

    /// The cluster's Nodes with their addresses: signs of life of others are not heard.
    pub fn know(&self, nodes: BTreeMap<Arc<str>, Vec<IpAddr>>) {
        self.tell(Command::Known(nodes));
    }

    /// Answers for these addresses from now on, and for no others.
    pub fn announce(&self, addresses: BTreeSet<IpAddr>) {
        self.tell(Command::Announce(addresses));
    }

    fn tell(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // The thread ends only with this value.
            let _ = commands.send(command);
        }
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // It has panicked when this fails, and has said so.
            let _ = thread.join();
        }
    }
}

struct Link {
    config: LinkConfig,
    events: Sender<Event>,
    arp: OwnedFd,
    neighbours: OwnedFd,
    beats_socket: OwnedFd,
    /// Holds memberships of the groups by which neighbours ask; absent where there is no IPv6.
    groups: Option<UdpSocket>,
    beats: Beats,
    announced: BTreeSet<IpAddr>,
    /// Announcements to come.
    repeats: Vec<(Instant, IpAddr)>,
    /// Who lived when the event loop was last told.
    live: Option<BTreeSet<Arc<str>>>,
}

impl Link {
    fn run(mut self, commands: &Receiver<Command>) {
        let mut beat_due = Instant::now();
        loop {
            loop {
                match commands.try_recv() {
                    Ok(Command::Known(known)) => self.beats.set_known(known),
                    Ok(Command::Announce(addresses)) => self.announce(addresses),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return self.beat(true),
                }
            }
            self.wait();
            self.hear_beats();
            self.answer_questions();
            let now = Instant::now();
            if now >= beat_due {
                self.beat(false);
                beat_due = now + BEAT_EVERY;
            }
            let live = self.beats.live(now);
            if live.is_some() && live != self.live {
                self.live.clone_from(&live);
                // Links that were apart may each have had a node that answered.
                let announced = self.announced.clone();
                announced
                    .into_iter()
                    .for_each(|address| self.repeat(address, now));
                if self
                    .events
                    .send(Event::Live(live.unwrap_or_default()))
                    .is_err()
                {
                    return self.beat(true);
                }
            }
            let due: Vec<IpAddr> = self
                .repeats
                .extract_if(.., |(when, _)| *when <= now)
                .map(|(_, address)| address)
                .collect();
            for address in due {
                if self.announced.contains(&address) {
                    self.send(&frame::announcement(address, self.config.mac));
                }
            }
        }
    }

    fn wait(&self) {
        let sockets = [&self.arp, &self.neighbours, &self.beats_socket];
        let mut wanted = sockets.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        // A signal is as good as a timeout.
        let _ = poll(&mut wanted, PollTimeout::from(TURN_MS));
    }

    fn beat(&self, leaving: bool) {
        let beat = Beat {
            node: self.config.node.to_string(),
            address: self.config.address,
            leaving,
        };
        self.send(&beat.frame(self.config.mac));
    }

    /// Any of the sockets sends any frame. A link that is down loses it, as it loses all others.
    fn send(&self, frame: &[u8]) {
        if let Err(error) = send(self.beats_socket.as_raw_fd(), frame, MsgFlags::empty()) {
            tracing::debug!(%error, "announce: a frame was not sent");
        }
    }

    fn hear_beats(&mut self) {
        let now = Instant::now();
        for frame in frames(&self.beats_socket) {
            if let Some(beat) = Beat::read(&frame) {
                self.beats.hear(&beat, now);
            }
        }
    }

    fn answer_questions(&self) {
        for socket in [&self.arp, &self.neighbours] {
            for frame in frames(socket) {
                let asked = frame::question(&frame)
                    .filter(|question| self.announced.contains(&question.wanted))
                    // What this node itself announces comes back from no one; another that does is answered.
                    .filter(|question| question.asker_mac != self.config.mac);
                if let Some(reply) =
                    asked.and_then(|question| frame::answer(&question, self.config.mac))
                {
                    self.send(&reply);
                }
            }
        }
    }

    fn announce(&mut self, addresses: BTreeSet<IpAddr>) {
        let now = Instant::now();
        let before = std::mem::replace(&mut self.announced, addresses);
        for gone in before.difference(&self.announced) {
            tracing::info!(address = %gone, "another node answers for this address, or none");
        }
        let (had, wished) = (groups(&before), groups(&self.announced));
        for left in had.difference(&wished) {
            self.group(left, false);
        }
        for joined in wished.difference(&had) {
            self.group(joined, true);
        }
        let new: Vec<IpAddr> = self.announced.difference(&before).copied().collect();
        for new in new {
            tracing::info!(address = %new, "this node answers for this address");
            self.send(&frame::announcement(new, self.config.mac));
            self.repeat(new, now);
        }
    }

    fn repeat(&mut self, address: IpAddr, now: Instant) {
        self.repeats
            .extend(REPEATS.iter().map(|after| (now + *after, address)));
    }

    /// Joins or leaves a group in which IPv6 addresses are asked for.
    fn group(&self, group: &Ipv6Addr, join: bool) {
        let Some(groups) = &self.groups else {
            return;
        };
        let outcome = match join {
            true => groups.join_multicast_v6(group, self.config.ifindex),
            false => groups.leave_multicast_v6(group, self.config.ifindex),
        };
        if let Err(error) = outcome {
            tracing::debug!(%group, %error, "announce: membership");
        }
    }
}

/// The groups in which IPv6 addresses are asked for: several may have one.
fn groups(addresses: &BTreeSet<IpAddr>) -> BTreeSet<Ipv6Addr> {
    let groups = addresses.iter().filter_map(|address| match address {
        IpAddr::V6(v6) => Some(solicited_node(*v6)),
        IpAddr::V4(_) => None,
    });
    groups.collect()
}

/// Frames that are there now.
fn frames(socket: &OwnedFd) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut buffer = [0; 2048];
    while frames.len() < TURN_FRAMES_MAX {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(len) => frames.push(buffer[..len.min(buffer.len())].to_vec()),
            Err(_) => break,
        }
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_are_asked_for_in_one_group_share_its_membership() {
        let all = [
            "2001:db8::1:2",
            "2001:db8:1::1:2",
            "2001:db8::3",
            "192.0.2.1",
        ];
        let all: BTreeSet<IpAddr> = all.iter().map(|ip| ip.parse().unwrap()).collect();
        let fewer = all.iter().skip(1).copied().collect();
        assert_eq!(groups(&all).len(), 2);
        let gone: BTreeSet<_> = groups(&all).difference(&groups(&fewer)).copied().collect();
        assert!(
            gone.len() <= 1 && !gone.contains(&solicited_node("2001:db8::1:2".parse().unwrap()))
        );
    }
}
