//! ICMP echoes of pods that leave the cluster as their node, from sockets that only ICMP's own messages reach: answers, and errors about
//! them, in both families.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
};

use dataplane_abi::Reason;
use keelway_tests::{
    nodes::{Nodes, PER_PACKET},
    requests::TIMEOUT,
    sandbox::{Sandbox, ip, is_root},
};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket,
        sockopt::{Ipv4RecvErr, Ipv6RecvErr},
    },
};

/// What a socket for echoes hears after a question to a destination: the type of the message, or the error.
fn ping(to: &str) -> Result<u8, Errno> {
    let to = SocketAddr::new(to.parse().unwrap(), 0);
    let (family, protocol, request) = if to.is_ipv4() {
        (AddressFamily::Inet, SockProtocol::Icmp, 8)
    } else {
        (AddressFamily::Inet6, SockProtocol::IcmpV6, 128)
    };
    let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?;
    if to.is_ipv4() {
        setsockopt(&fd, Ipv4RecvErr, &true)?;
    } else {
        setsockopt(&fd, Ipv6RecvErr, &true)?;
    }
    let of = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or_default());
    let socket = UdpSocket::from(fd);
    socket.set_read_timeout(Some(TIMEOUT)).map_err(of)?;
    socket.connect(to).map_err(of)?;
    // Type, code, a sum and an identifier that the kernel fills in, a number, and what is echoed.
    let message = [&[request, 0, 0, 0, 0, 0, 0, 1][..], b"an odd number"].concat();
    socket.send(&message).map_err(of)?;
    let mut buffer = [0; 256];
    let len = socket.recv(&mut buffer).map_err(of)?;
    assert_eq!(buffer[8..len], message[8..], "{to}");
    Ok(buffer[0])
}

#[test]
fn echoes_leave_as_the_node_and_their_answers_and_errors_come_back() {
    if !is_root("echoes") {
        return;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, PER_PACKET).unwrap();
    let [first, second] = &mut nodes.nodes;
    let cluster = ["10.244.0.0/16", "fd00:244::/32", "fe80::/10"];
    first.masquerade(&cluster).unwrap();
    // Behind the other node there is nothing, which it says.
    first.host.run(|| {
        ip("route add 192.0.2.0/24 via 198.18.0.2").unwrap();
        ip("-6 route add 2001:db8::/32 via fd00:18::2").unwrap();
    });
    second.host.run(|| {
        ip("route add unreachable 192.0.2.0/24").unwrap();
        ip("-6 route add unreachable 2001:db8::/32").unwrap();
    });
    let pod = first.pods["a"].network.try_clone().unwrap();
    pod.run(|| fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap());
    for (there, answer) in [
        ("198.18.0.2", Ok(0)),
        ("fd00:18::2", Ok(129)),
        ("192.0.2.1", Err(Errno::EHOSTUNREACH)),
        ("2001:db8::1", Err(Errno::ENETUNREACH)),
    ] {
        assert_eq!(pod.run(|| ping(there)), answer, "{there}");
    }
    let counters = first.dataplane().counters().unwrap();
    let count = |wanted| {
        let found = counters.iter().find(|(reason, _)| *reason == wanted);
        found.map(|(_, count)| *count).unwrap_or_default()
    };
    assert_eq!(count(Reason::Masqueraded), 4);
    assert_eq!(count(Reason::ReplyTranslated), 2);
    assert_eq!(count(Reason::IcmpTranslated), 2);
}
