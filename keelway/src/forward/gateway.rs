//! Where the cluster's default routes end, in the control plane's network namespace: the kernel there takes every connection
//! and datagram for the outside as its own (TPROXY), and hands it to sockets of this process. So the pods' side of a connection
//! is the kernel's TCP, with all that belongs to it, and no packet is looked at here.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};

use ipnetwork::IpNetwork;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, listen, setsockopt,
    socket, sockopt,
};
use tokio::sync::oneshot;

use crate::network::{self, BRIDGE, NetworkError};

/// The program that writes the rules; a package of that name has it.
pub const NFT: &str = "nft";
/// The kernel hands connections to sockets of this port.
const PORT: u16 = 3129;
/// Marks what is for the outside, in the control plane's network namespace alone.
const MARK: u32 = 0x6b65;
/// A table of routes of that namespace, for what has the mark.
const TABLE: u32 = 107;
/// Addresses that mean nothing outside the link or host they are used on; the ranges that underlays are made of; multicast.
const NEVER_OUTSIDE: [&str; 10] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/3",
    "::/96",
    "::ffff:0:0/96",
    "2001:2::/48",
    "fe80::/10",
    "ff00::/8",
];

#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("cannot {action}: {source}")]
    System {
        action: &'static str,
        source: io::Error,
    },
    #[error("{NFT} refuses the rules for --egress (does the kernel have CONFIG_NFT_TPROXY?): {0}")]
    Rules(String),
}

fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> GatewayError {
    move |source| GatewayError::System {
        action,
        source: source.into(),
    }
}

/// The sockets that the cluster's connections and datagrams arrive at.
#[derive(Debug)]
pub struct Gateway {
    pub connections: Vec<TcpListener>,
    pub datagrams: Vec<UdpSocket>,
    families: BTreeSet<Family>,
    inside: Vec<IpNetwork>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn of(address: IpAddr) -> Self {
        if address.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        }
    }

    fn any(self) -> SocketAddr {
        match self {
            Family::V4 => (Ipv4Addr::UNSPECIFIED, PORT).into(),
            Family::V6 => (Ipv6Addr::UNSPECIFIED, PORT).into(),
        }
    }
}

/// A wish for a socket in the gateway's network: from which address, to whom, and where the answer goes.
type Wish = (
    SocketAddr,
    SocketAddr,
    oneshot::Sender<io::Result<UdpSocket>>,
);

/// A gateway whose thread stays in the cluster's network, and makes sockets there.
#[derive(Debug)]
pub struct Staying {
    pub gateway: Gateway,
    wishes: Sender<Wish>,
}

impl Gateway {
    /// Sets up rules, routes and sockets in the network namespace of the caller. `inside` are the cluster's own ranges; the
    /// families of addresses are theirs.
    ///
    /// # Errors
    /// Names what the kernel lacks, or refused.
    pub fn open(inside: &[IpNetwork]) -> Result<Self, GatewayError> {
        let families: BTreeSet<Family> = inside.iter().map(|r| Family::of(r.ip())).collect();
        let fixed = NEVER_OUTSIDE.iter().filter_map(|range| range.parse().ok());
        let inside: Vec<IpNetwork> = fixed.chain(inside.iter().copied()).collect();
        pass_bridges_by()?;
        load(&rules(&inside))?;
        network::deliver_marked(MARK, TABLE, families.contains(&Family::V6))?;
        let (mut connections, mut datagrams) = (Vec::new(), Vec::new());
        for family in &families {
            connections.push(listener(*family).map_err(system("listen for connections"))?);
            datagrams.push(receiver(*family).map_err(system("listen for datagrams"))?);
        }
        Ok(Gateway {
            connections,
            datagrams,
            families,
            inside,
        })
    }

    /// Whether an address is one of the outside, and of a family that the cluster has.
    pub fn is_outside(&self, address: IpAddr) -> bool {
        self.families.contains(&Family::of(address))
            && !self.inside.iter().any(|range| range.contains(address))
    }

    /// Leaves a thread behind in the network namespace that the caller is about to leave.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn stay(self) -> Result<Staying, GatewayError> {
        let (wishes, wished) = channel();
        std::thread::Builder::new()
            .name("gateway".to_owned())
            .spawn(move || grant(&wished))
            .map_err(system("start a thread"))?;
        Ok(Staying {
            gateway: self,
            wishes,
        })
    }
}

impl Staying {
    /// A socket by which `pod` gets datagrams that come from `outside`, and which gets what it sends there from now on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn answering(&self, outside: SocketAddr, pod: SocketAddr) -> io::Result<UdpSocket> {
        let (sender, made) = oneshot::channel();
        let gone = |_| io::Error::other("the gateway's thread has ended");
        self.wishes
            .send((outside, pod, sender))
            .map_err(|_| gone(()))?;
        made.await.map_err(|_| gone(()))?
    }
}

fn grant(wishes: &Receiver<Wish>) {
    while let Ok((outside, pod, answer)) = wishes.recv() {
        // Whoever wished may not wait any more.
        let _ = answer.send(answering(outside, pod));
    }
}

fn listener(family: Family) -> io::Result<TcpListener> {
    let fd = transparent(family, SockType::Stream)?;
    bind(fd.as_raw_fd(), &storage(family.any()))?;
    listen(&fd, Backlog::MAXCONN)?;
    Ok(fd.into())
}

fn receiver(family: Family) -> io::Result<UdpSocket> {
    let fd = transparent(family, SockType::Datagram)?;
    match family {
        Family::V4 => setsockopt(&fd, sockopt::Ipv4OrigDstAddr, &true)?,
        Family::V6 => setsockopt(&fd, sockopt::Ipv6OrigDstAddr, &true)?,
    }
    bind(fd.as_raw_fd(), &storage(family.any()))?;
    Ok(fd.into())
}

/// Until it is connected, no datagram arrives at it: the kernel hands those of unknown flows to the receiver's port alone.
fn answering(outside: SocketAddr, pod: SocketAddr) -> io::Result<UdpSocket> {
    let fd = transparent(Family::of(outside.ip()), SockType::Datagram)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    let raw = fd.as_raw_fd();
    bind(raw, &storage(outside))?;
    connect(raw, &storage(pod))?;
    Ok(fd.into())
}

/// A socket that may have addresses which are not this namespace's.
fn transparent(family: Family, kind: SockType) -> io::Result<OwnedFd> {
    let domain = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(domain, kind, flags, None)?;
    if family == Family::V6 {
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    setsockopt(&fd, sockopt::IpTransparent, &true)?;
    Ok(fd)
}

fn storage(address: SocketAddr) -> SockaddrStorage {
    address.into()
}

/// What the kernel is to take: everything from the bridge that is for no range of `inside`.
fn rules(inside: &[IpNetwork]) -> String {
    let list = |family: Family| {
        let ranges = inside.iter().filter(|r| Family::of(r.ip()) == family);
        let ranges: Vec<String> = ranges.map(ToString::to_string).collect();
        ranges.join(", ")
    };
    // A table that an earlier forwarder left is replaced as a whole.
    format!(
        "table inet keelway-egress\n\
         delete table inet keelway-egress\n\
         table inet keelway-egress {{\n\
           set inside4 {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {} }} }}\n\
           set inside6 {{ type ipv6_addr; flags interval; auto-merge; elements = {{ {} }} }}\n\
           chain out {{\n\
             type filter hook prerouting priority mangle; policy accept;\n\
             iifname != \"{BRIDGE}\" return\n\
             ip daddr @inside4 return\n\
             ip6 daddr @inside6 return\n\
             meta l4proto {{ tcp, udp }} tproxy to :{PORT} meta mark set {MARK:#x} accept\n\
           }}\n\
         }}\n",
        list(Family::V4),
        list(Family::V6)
    )
}

/// Where br_netfilter is loaded, bridged packets meet these rules while they are in the bridge, and lose the socket that they were
/// given when they leave it for the stack. Both files are of this network namespace.
fn pass_bridges_by() -> Result<(), GatewayError> {
    for name in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
        match fs::write(Path::new("/proc/sys/net/bridge").join(name), "0") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(system("keep the packet filter out of bridges")(error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn load(rules: &str) -> Result<(), GatewayError> {
    let mut nft = Command::new(NFT)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(system("run nft"))?;
    if let Some(mut input) = nft.stdin.take() {
        input
            .write_all(rules.as_bytes())
            .map_err(system("hand rules to nft"))?;
    }
    let ended = nft.wait_with_output().map_err(system("wait for nft"))?;
    if ended.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ended.stderr).trim().to_owned();
    Err(GatewayError::Rules(said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_for_the_outside_leaves() {
        let range = |text: &str| text.parse::<IpNetwork>().expect("a range");
        let fixed = NEVER_OUTSIDE.map(range);
        let own = [range("10.244.0.0/16"), range("10.96.0.0/16")];
        let gateway = Gateway {
            connections: Vec::new(),
            datagrams: Vec::new(),
            families: [Family::V4].into(),
            inside: [&fixed[..], &own[..]].concat(),
        };
        for (address, expected) in [
            ("192.0.2.1", true),
            ("198.51.100.53", true),
            ("10.0.0.1", true),
            ("10.244.3.4", false),
            ("10.96.0.10", false),
            ("198.19.255.2", false),
            ("127.0.0.1", false),
            ("169.254.169.254", false),
            ("224.0.0.251", false),
            ("255.255.255.255", false),
            ("0.0.0.0", false),
            // The cluster has no IPv6.
            ("2001:db8::1", false),
        ] {
            let address = address.parse().expect("an address");
            assert_eq!(gateway.is_outside(address), expected, "{address}");
        }
        for address in [
            "::1",
            "::ffff:127.0.0.1",
            "fe80::1",
            "ff02::1",
            "2001:2:0:5::b",
        ] {
            let address: IpAddr = address.parse().expect("an address");
            let covered = fixed.iter().any(|range| range.contains(address));
            assert!(covered, "{address}");
        }
    }
}
