//! Addresses as they come and go: what the kernel tells of its own accord.

use std::io;

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressScope;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;

use super::netlink::NetlinkError;

/// `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR` (rtnetlink(7)).
const ADDRESS_GROUPS: u32 = 0x10 | 0x100;

/// Hears of the addresses of one network namespace.
pub struct AddressNews {
    socket: Socket,
}

impl AddressNews {
    /// Of the calling thread's network namespace, from now on.
    pub fn open() -> Result<Self, NetlinkError> {
        let open = || -> io::Result<Self> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, ADDRESS_GROUPS))?;
            Ok(Self { socket })
        };
        open().map_err(|source| NetlinkError::new("follow addresses", source))
    }

    /// Waits until an address that other machines can reach has come or gone, or may have.
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

/// Every pod's interface gets a link-local address: that is no news. What cannot be read may be.
fn is_of_interest(mut messages: &[u8]) -> bool {
    while !messages.is_empty() {
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(messages) else {
            return true;
        };
        if let NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address),
        ) = &message.payload
            && !matches!(
                address.header.scope,
                AddressScope::Link | AddressScope::Host
            )
        {
            return true;
        }
        let length = (message.header.length as usize).next_multiple_of(4).max(4);
        messages = messages.get(length..).unwrap_or_default();
    }
    false
}
