//! Requests to the kernel and their answers.
//!
//! Wiring a pod is a dozen requests in a row, each answered in microseconds: a plain blocking socket does that with the
//! fewest system calls, and requests that do not depend on each other's answers travel together. netlink-packet-route has the
//! messages.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sched::{CloneFlags, setns};

/// A request that failed, by what it was to do.
#[derive(Debug, thiserror::Error)]
#[error("{operation}: {source}")]
pub struct NetlinkError {
    pub operation: String,
    pub source: io::Error,
}

impl NetlinkError {
    pub(crate) fn new(operation: impl Into<String>, source: io::Error) -> Self {
        Self {
            operation: operation.into(),
            source,
        }
    }

    /// The kernel's error number.
    pub fn errno(&self) -> Option<nix::errno::Errno> {
        self.source.raw_os_error().map(nix::errno::Errno::from_raw)
    }
}

/// A request that can travel with others.
#[derive(Debug)]
pub(crate) struct Step {
    pub operation: String,
    pub message: RouteNetlinkMessage,
    /// More flags of the request.
    pub flags: u16,
}

/// A route netlink socket of one network namespace.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// How often a dump is begun again that a change interrupted.
const DUMP_ATTEMPTS: usize = 5;

impl Netlink {
    /// A socket of the calling thread's network namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        let open = || -> io::Result<Self> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_ext_ack(true)?;
            // Filters of dumps are honoured rather than ignored.
            socket.set_netlink_get_strict_chk(true)?;
            Ok(Self {
                socket,
                sequence: 0,
            })
        };
        open().map_err(|source| NetlinkError::new("open a netlink socket", source))
    }

    /// A socket of another network namespace. A socket stays with the namespace that it was made in, so the calling thread enters it for a
    /// moment only: a thread of its own costs more than everything else that is done to a pod.
    pub fn open_in(netns: BorrowedFd<'_>) -> Result<Self, NetlinkError> {
        let failed = |source| NetlinkError::new("enter the network namespace", source);
        let home = File::open("/proc/thread-self/ns/net").map_err(failed)?;
        let enter = |to: BorrowedFd<'_>| {
            setns(to, CloneFlags::CLONE_NEWNET).map_err(|errno| failed(errno.into()))
        };
        enter(netns)?;
        let opened = Self::open();
        // The way back to where this thread came from is open; if it were not, nothing of the thread's work could go on.
        enter(home.as_fd())?;
        opened
    }

    /// Sends requests in one go, and waits until the kernel has done all of them. It goes on behind one that fails; the first that
    /// failed is the error.
    pub(crate) fn run(&mut self, steps: Vec<Step>) -> Result<(), NetlinkError> {
        let (first, count) = (self.sequence.wrapping_add(1), steps.len() as u32);
        let mut bytes = Vec::with_capacity(steps.len() * 96);
        let mut operations = Vec::with_capacity(steps.len());
        for (position, step) in steps.into_iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            let mut header = NetlinkHeader::default();
            // Errors are told in any case, and in order: the answer to the last one ends the wait.
            let ack = if position as u32 + 1 == count {
                NLM_F_ACK
            } else {
                0
            };
            header.flags = NLM_F_REQUEST | ack | step.flags;
            header.sequence_number = self.sequence;
            let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(step.message));
            packet.finalize();
            let begin = bytes.len();
            bytes.resize(begin + packet.buffer_len().next_multiple_of(4), 0);
            packet.serialize(&mut bytes[begin..]);
            operations.push(step.operation);
        }
        if operations.is_empty() {
            return Ok(());
        }
        let last = self.sequence;
        let mut failed: Option<NetlinkError> = None;
        let exchange = |source| NetlinkError::new(operations.join(", "), source);
        self.socket.send(&bytes, 0).map_err(exchange)?;
        loop {
            let (received, _) = self.socket.recv_from_full().map_err(exchange)?;
            let mut rest = &received[..];
            while !rest.is_empty() {
                let answer =
                    NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(|error| {
                        exchange(io::Error::new(
                            io::ErrorKind::InvalidData,
                            error.to_string(),
                        ))
                    })?;
                let length = (answer.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(length..).unwrap_or_default();
                let position = answer.header.sequence_number.wrapping_sub(first);
                let NetlinkPayload::Error(error) = answer.payload else {
                    continue;
                };
                if position >= count {
                    continue;
                }
                if error.code.is_some() && failed.is_none() {
                    let operation = operations[position as usize].clone();
                    failed = Some(NetlinkError::new(operation, error.to_io()));
                }
                if answer.header.sequence_number == last {
                    return failed.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// Sends a request and waits for its acknowledgement.
    pub fn request(
        &mut self,
        operation: impl FnOnce() -> String,
        message: impl Into<RouteNetlinkMessage>,
        flags: u16,
    ) -> Result<(), NetlinkError> {
        self.exchange(message.into(), NLM_F_REQUEST | NLM_F_ACK | flags)
            .map(drop)
            .map_err(|source| NetlinkError::new(operation(), source))
    }

    /// Asks for one object.
    pub fn get(
        &mut self,
        operation: impl FnOnce() -> String,
        message: impl Into<RouteNetlinkMessage>,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        self.exchange(message.into(), NLM_F_REQUEST | NLM_F_ACK)
            .map(|(answers, _)| answers)
            .map_err(|source| NetlinkError::new(operation(), source))
    }

    /// Asks for all objects of a kind.
    pub fn dump(
        &mut self,
        operation: impl Fn() -> String,
        message: impl Into<RouteNetlinkMessage>,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let message = message.into();
        for _ in 0..DUMP_ATTEMPTS {
            let (answers, interrupted) = self
                .exchange(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)
                .map_err(|source| NetlinkError::new(operation(), source))?;
            if !interrupted {
                return Ok(answers);
            }
        }
        Err(NetlinkError::new(
            operation(),
            io::Error::other("the table changes faster than it can be read"),
        ))
    }

    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let (mut answers, mut interrupted) = (Vec::new(), false);
        loop {
            let (received, _) = self.socket.recv_from_full()?;
            let mut rest = &received[..];
            while !rest.is_empty() {
                let answer =
                    NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(|error| {
                        io::Error::new(io::ErrorKind::InvalidData, error.to_string())
                    })?;
                // A message's length is padded to four bytes; one of length 0 would never end.
                let length = (answer.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(length..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok((answers, interrupted)),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Error(_) => return Ok((answers, interrupted)),
                    NetlinkPayload::Overrun(_) => {
                        return Err(io::Error::other("the kernel's answer overran"));
                    }
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }
}
