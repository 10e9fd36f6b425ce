//! Addresses and default routes as they come and go: what the kernel tells of its own accord.

use std::io;

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressScope;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;

use super::netlink::NetlinkError;
use super::route::is_default;

/// `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR`, `RTMGRP_IPV4_ROUTE` and `RTMGRP_IPV6_ROUTE` (rtnetlink(7)).
const GROUPS: u32 = 0x10 | 0x100 | 0x40 | 0x400;

/// Hears of the addresses of one network namespace, and of its default routes: both say which interfaces lead to other machines.
pub struct AddressNews {
    socket: Socket,
}

impl AddressNews {
    /// Of the calling thread's network namespace, from now on.
    pub fn open() -> Result<Self, NetlinkError> {
        let open = || -> io::Result<Self> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, GROUPS))?;
            Ok(Self { socket })
        };
        open().map_err(|source| NetlinkError::new("follow addresses", source))
    }

    /// Waits until an address that other machines can reach or a default route has come or gone, or may have.
    pub fn wait(&self) -> Result<(), NetlinkError> {
        loop {
            match self.socket.recv_from_full() {
                Ok((received, _)) if is_of_interest(&received) => return Ok(()),
                Ok(_) => {}
                // More has happened than the socket could hold.
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(NetlinkError::new("follow addresses", source)),
            }
        }
    }
}

/// Every pod's interface gets a link-local address, and each pod a route: that is no news. What cannot be read may be.
fn is_of_interest(mut messages: &[u8]) -> bool {
    while !messages.is_empty() {
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(messages) else {
            return true;
        };
        let is_news = match &message.payload {
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address),
            ) => !matches!(
                address.header.scope,
                AddressScope::Link | AddressScope::Host
            ),
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
            ) => is_default(route),
            _ => false,
        };
        if is_news {
            return true;
        }
        let length = (message.header.length as usize).next_multiple_of(4).max(4);
        messages = messages.get(length..).unwrap_or_default();
    }
    false
}
