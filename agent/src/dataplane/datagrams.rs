//! Datagram sockets that were connected to a backend at the socket, and ending that.
//!
//! What pods send passes a packet hook, and so does what the host sends to addresses that it routes into the service veth: there a
//! datagram leaves a backend that is gone. By the node's ports, external and balanced addresses the host's packets pass none, and a
//! connected socket would send to that backend for ever. The socket hook notes which socket was given what; the kernel ends the
//! connection of one when it is asked to (SOCK_DESTROY, Linux 4.9), and calls of the socket's owner fail with
//! EDESTADDRREQ and ECONNABORTED.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    path::Path,
};

use dataplane_abi::{SocketPeer, map, proto};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR};
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};

use super::{Error, sys};
use crate::net::answer::{HEADER_LEN, messages};

/// Numbers of include/uapi/linux/{sock_diag,inet_diag}.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Connected, which for datagrams is TCP's word for it.
const ESTABLISHED: u32 = 1 << 1;

/// What a socket is told by: four bytes of its family and state, and its id, which ends with its cookie.
const ID_AT: usize = 4;
const ID_LEN: usize = 48;
const DESTINATION_PORT_AT: usize = 2;
const DESTINATION_AT: usize = 20;
const COOKIE_AT: usize = 40;

/// What a datagram socket was given for what it was connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectedDatagram {
    /// What its owner asked for.
    pub frontend: SocketAddr,
    pub backend: SocketAddr,
}

impl From<&SocketPeer> for ConnectedDatagram {
    fn from(peer: &SocketPeer) -> Self {
        let at = |addr, port| SocketAddr::new(IpAddr::from(addr), u16::from_be(port));
        Self {
            frontend: at(peer.frontend, peer.frontend_port),
            backend: at(peer.backend, peer.backend_port),
        }
    }
}

/// A socket of the kernel's list.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    family: u8,
    /// The kernel's name of the socket: both ends, the interface, and its cookie, which no other socket has.
    id: [u8; ID_LEN],
    destination: SocketAddr,
    cookie: u64,
}

/// Ends the connections of those of the calling thread's network namespace that have what shall not be `kept`, by what is noted in the
/// map that is pinned in `dir`; gives how many. The sockets are listed only when there may be such.
pub(super) fn end(dir: &Path, kept: impl Fn(&ConnectedDatagram) -> bool) -> Result<usize, Error> {
    let failed = |action| {
        move |source| Error::Map {
            action,
            map: map::DATAGRAMS,
            source,
        }
    };
    let noted = sys::open_pinned(&dir.join(map::DATAGRAMS)).map_err(failed("open"))?;
    let all = sys::entries::<u64, SocketPeer>(noted.as_fd()).map_err(failed("read"))?;
    let all = all.iter().map(|(cookie, peer)| (*cookie, peer.into()));
    let stale: HashMap<u64, ConnectedDatagram> = all.filter(|(_, given)| !kept(given)).collect();
    if stale.is_empty() {
        return Ok(0);
    }
    let mut sockets = connected(libc::AF_INET as u8)?;
    sockets.extend(connected(libc::AF_INET6 as u8)?);
    // One that was connected to something else since has that.
    sockets.retain(|socket| {
        let given = stale.get(&socket.cookie);
        given.is_some_and(|given| given.backend == socket.destination)
    });
    // Before the sockets' owners hear of it: what they are given then is noted under the same cookies.
    let cookies: Vec<u64> = stale.into_keys().collect();
    sys::delete_batch(noted.as_fd(), &cookies).map_err(failed("delete from"))?;
    for socket in &sockets {
        destroy(socket)?;
    }
    Ok(sockets.len())
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Sockets { action, source }
}

/// The connected datagram sockets of a family.
fn connected(family: u8) -> Result<Vec<Listed>, Error> {
    let request = request(family, ESTABLISHED, &[0; ID_LEN]);
    let answers = exchange(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request).map_err(failed("list"))?;
    Ok(answers.iter().filter_map(|answer| read(answer)).collect())
}

/// Ends a socket's connection; one that is gone needs nothing.
fn destroy(socket: &Listed) -> Result<(), Error> {
    let request = request(socket.family, u32::MAX, &socket.id);
    match exchange(SOCK_DESTROY, NLM_F_ACK, &request) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(error) => Err(failed("end the connections of")(error)),
        Ok(_) => Ok(()),
    }
}

/// An `inet_diag_req_v2`.
fn request(family: u8, states: u32, id: &[u8; ID_LEN]) -> Vec<u8> {
    let mut request = vec![family, proto::UDP, 0, 0];
    request.extend(states.to_ne_bytes());
    request.extend(id);
    request
}

/// Sends a request, and gives the messages that answer it.
fn exchange(kind: u16, flags: u16, request: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&NetlinkAddr::new(0, 0))?;
    let len = (HEADER_LEN + request.len()) as u32;
    let mut message = Vec::from(len.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(request);
    socket.send(&message, 0)?;
    let mut answers = Vec::new();
    loop {
        let (received, _from) = socket.recv_from_full()?;
        for answer in messages(&received) {
            match answer.kind {
                NLMSG_DONE => return Ok(answers),
                NLMSG_ERROR => {
                    return match answer.error() {
                        0 => Ok(answers),
                        code => Err(io::Error::from_raw_os_error(code)),
                    };
                }
                _ => answers.push(answer.body.to_vec()),
            }
        }
    }
}

/// A socket out of an `inet_diag_msg`.
fn read(message: &[u8]) -> Option<Listed> {
    let family = *message.first()?;
    let id: [u8; ID_LEN] = *message.get(ID_AT..)?.first_chunk()?;
    let port = u16::from_be_bytes(*id.get(DESTINATION_PORT_AT..)?.first_chunk()?);
    let octets: [u8; 16] = *id.get(DESTINATION_AT..)?.first_chunk()?;
    let address = match i32::from(family) {
        libc::AF_INET => IpAddr::from(*octets.first_chunk::<4>()?),
        _ => IpAddr::from(octets).to_canonical(),
    };
    // Two words, the lower one first.
    let cookie = u64::from_le_bytes(*id.get(COOKIE_AT..)?.first_chunk()?);
    Some(Listed {
        family,
        id,
        destination: SocketAddr::new(address, port),
        cookie,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(family: i32, destination: &[u8], port: u16, cookie: u64) -> Vec<u8> {
        let mut message = vec![0; ID_AT + ID_LEN + 20];
        message[0] = family as u8;
        let id = &mut message[ID_AT..];
        id[DESTINATION_PORT_AT..][..2].copy_from_slice(&port.to_be_bytes());
        id[DESTINATION_AT..][..destination.len()].copy_from_slice(destination);
        id[COOKIE_AT..][..8].copy_from_slice(&cookie.to_le_bytes());
        message
    }

    #[test]
    fn a_socket_is_told_with_its_destination_and_its_cookie() {
        let told = read(&message(libc::AF_INET, &[10, 244, 1, 11], 5353, 7)).unwrap();
        let wanted = ("10.244.1.11:5353".parse().unwrap(), 7);
        assert_eq!((told.destination, told.cookie), wanted);
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 244, 1, 11];
        let told = read(&message(libc::AF_INET6, &mapped, 5353, 7)).unwrap();
        assert_eq!((told.destination, told.cookie), wanted);
    }

    proptest! {
        #[test]
        fn bytes_of_any_kind_are_read_or_left(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            for answer in messages(&bytes) {
                let _either = read(answer.body);
            }
            let _either = read(&bytes);
        }
    }
}
