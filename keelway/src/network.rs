//! The underlay of a cluster: a bridge in the control plane's network namespace, and a veth pair to each worker.
//!
//! Nothing is made in the network namespace of the caller.

use std::fs::File;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use futures::TryStreamExt;
use ipnetwork::{IpNetwork, Ipv6Network};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth};
use netlink_packet_route::route::{RouteScope, RouteType};
use netlink_packet_route::rule::RuleAction;
use nix::sched::{CloneFlags, setns};
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};

use crate::family::IpFamily;

/// The bridge in the control plane's node; it also holds that node's address.
pub const BRIDGE: &str = "underlay";
/// The interface of a worker.
const UPLINK: &str = "eth0";
/// Clusters that can be up at one time: 198.18.0.0/15 (RFC 2544, for benchmarks) has this many /24 networks.
pub const SUBNETS: u16 = 512;
const PREFIX_V4: u8 = 24;
/// 2001:2::/48 (RFC 5180, for benchmarks as well) has a /64 network for each of them.
const PREFIX_V6: u8 = 64;

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("cannot {action}: {source}")]
    Netlink {
        action: String,
        source: rtnetlink::Error,
    },
    #[error("cannot {action}: {source}")]
    System { action: String, source: io::Error },
}

fn netlink(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::Netlink {
        action: action.into(),
        source,
    }
}

fn system(action: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::System {
        action: action.into(),
        source,
    }
}

/// One of the [`SUBNETS`] networks that underlays are made of, in either family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet(pub u16);

impl Subnet {
    fn host(self, family: IpFamily, last: u8) -> Vec<IpAddr> {
        let [high, low] = self.0.to_be_bytes();
        family.choose(
            Ipv4Addr::new(198, 18 + high, low, last),
            Ipv6Addr::new(0x2001, 2, 0, self.0, 0, 0, 0, last.into()),
        )
    }

    /// Addresses of the control plane's node, the primary family's first.
    pub fn control_plane(self, family: IpFamily) -> Vec<IpAddr> {
        self.one_control_plane(family, 1)
    }

    /// Addresses of one of several control planes, counted from 1.
    pub fn one_control_plane(self, family: IpFamily, number: u8) -> Vec<IpAddr> {
        self.host(family, 1 + number)
    }

    /// Addresses of worker `number`, counted from 1.
    pub fn worker(self, family: IpFamily, number: u8) -> Vec<IpAddr> {
        self.host(family, 10 + number)
    }
}

/// Brings up the loopback interface of the caller's network namespace.
///
/// # Errors
/// When netlink refuses.
pub fn loopback_up() -> Result<(), NetworkError> {
    block_on(|handle| async move {
        let lo = index(&handle, "lo").await?;
        up(&handle, lo, "lo").await
    })
}

/// The nodes to connect: each by the number of its PID 1, and its addresses.
#[derive(Debug, Clone)]
pub struct Underlay {
    /// Whether workers send what is for the outside to the control plane's node.
    pub egress: bool,
    /// The ranges of pod addresses. The control plane reaches pods (its own clients among them) over the underlay.
    pub pods: Vec<IpNetwork>,
    /// The node that holds the bridge: the control plane's. With several control planes, one that has no address.
    pub control_plane: (u32, Vec<IpAddr>),
    /// Several control planes, which reach pods as the one does.
    pub control_planes: Vec<(u32, Vec<IpAddr>)>,
    pub workers: Vec<(u32, Vec<IpAddr>)>,
}

/// Makes the bridge and the veth pairs, and gives every node its addresses.
///
/// # Errors
/// Names the interface that could not be made. What was made before goes with its namespaces.
pub fn connect(underlay: &Underlay) -> Result<(), NetworkError> {
    let bridge_namespace = namespace_of(underlay.control_plane.0)?;
    let gateways = underlay
        .control_planes
        .first()
        .unwrap_or(&underlay.control_plane);
    let mut workers = Vec::new();
    for (prefix, nodes, of_pods) in [
        ("cp", &underlay.control_planes, &underlay.pods[..]),
        ("node", &underlay.workers, &[]),
    ] {
        for (number, (pid, addresses)) in (1_u8..).zip(nodes) {
            let end = End {
                port: format!("{prefix}-{number}"),
                namespace: namespace_of(*pid)?,
                addresses,
                of_pods,
            };
            workers.push(end);
        }
    }
    std::thread::scope(|scope| {
        let bridge = scope.spawn(|| {
            enter(&bridge_namespace)?;
            let workers = &workers;
            block_on(|handle| async move { make_bridge(&handle, underlay, workers).await })
        });
        bridge.join().unwrap_or_else(|_| {
            Err(system("make the bridge")(io::Error::other(
                "the thread panicked",
            )))
        })?;
        let uplinks: Vec<_> = workers
            .iter()
            .map(|end| {
                let leaves = underlay.egress && end.of_pods.is_empty();
                let gateways = if leaves { &gateways.1[..] } else { &[] };
                scope.spawn(move || end.set_up(gateways))
            })
            .collect();
        for uplink in uplinks {
            uplink.join().unwrap_or_else(|_| {
                Err(system("set up an uplink")(io::Error::other(
                    "the thread panicked",
                )))
            })?;
        }
        Ok(())
    })
}

/// A node's end of its link to the bridge.
struct End<'a> {
    /// The name of the bridge's end.
    port: String,
    namespace: File,
    addresses: &'a [IpAddr],
    /// Ranges of pods that it reaches over this link.
    of_pods: &'a [IpNetwork],
}

impl End<'_> {
    /// Moves the calling thread into the node's namespace, and makes its interface ready.
    fn set_up(&self, gateways: &[IpAddr]) -> Result<(), NetworkError> {
        enter(&self.namespace)?;
        block_on(|handle| async move {
            let uplink = index(&handle, UPLINK).await?;
            add_addresses(&handle, uplink, self.addresses).await?;
            answer_for_pods()?;
            tell_of_addresses()?;
            take_the_links_address()?;
            up(&handle, uplink, UPLINK).await?;
            reach_pods(&handle, uplink, self.of_pods).await?;
            leave_by(&handle, uplink, gateways).await
        })
    }
}

/// Connects one more control plane to the bridge, which is in the namespace of the process `switch`: one that takes the place of the
/// `number`th, counted from 1.
///
/// # Errors
/// As [`connect`].
pub fn attach(
    switch: u32,
    number: u8,
    (pid, addresses): (u32, &[IpAddr]),
    pods: &[IpNetwork],
) -> Result<(), NetworkError> {
    let bridge_namespace = namespace_of(switch)?;
    let end = End {
        port: format!("cp-{number}"),
        namespace: namespace_of(pid)?,
        addresses,
        of_pods: pods,
    };
    let panicked = || system("connect a control plane")(io::Error::other("the thread panicked"));
    std::thread::scope(|scope| {
        let port = scope.spawn(|| {
            enter(&bridge_namespace)?;
            let end = &end;
            block_on(|handle| async move {
                // The kernel takes the one of before away some time after its namespace has ended.
                if let Ok(old) = index(&handle, &end.port).await {
                    let gone = handle.link().del(old).execute().await;
                    if let Err(error) = gone
                        && index(&handle, &end.port).await.is_ok()
                    {
                        return Err(netlink(format!("remove {}", end.port))(error));
                    }
                }
                let bridge = index(&handle, BRIDGE).await?;
                plug(&handle, bridge, end).await
            })
        });
        port.join().unwrap_or_else(|_| Err(panicked()))?;
        let uplink = scope.spawn(|| end.set_up(&[]));
        uplink.join().unwrap_or_else(|_| Err(panicked()))
    })
}

/// Which node has which pods is not known here, and changes; each worker answers for its own (see `answer_for_pods`).
async fn reach_pods(handle: &Handle, link: u32, ranges: &[IpNetwork]) -> Result<(), NetworkError> {
    for range in ranges {
        let IpNetwork::V4(range) = range else {
            continue;
        };
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(range.network(), range.prefix())
            .output_interface(link)
            .scope(RouteScope::Link)
            .build();
        let added = handle.route().add(route).execute().await;
        added.map_err(netlink(format!("add a route to {range}")))?;
    }
    Ok(())
}

async fn make_bridge(
    handle: &Handle,
    underlay: &Underlay,
    ends: &[End<'_>],
) -> Result<(), NetworkError> {
    let made = handle
        .link()
        .add(LinkBridge::new(BRIDGE).up().build())
        .execute()
        .await;
    made.map_err(netlink(format!("make bridge {BRIDGE}")))?;
    let bridge = index(handle, BRIDGE).await?;
    add_addresses(handle, bridge, &underlay.control_plane.1).await?;
    if underlay.control_planes.is_empty() {
        reach_pods(handle, bridge, &underlay.pods).await?;
    }
    for end in ends {
        plug(handle, bridge, end).await?;
    }
    Ok(())
}

/// Makes the pair of interfaces between the bridge and a node.
async fn plug(handle: &Handle, bridge: u32, end: &End<'_>) -> Result<(), NetworkError> {
    // The far end is made in the node's namespace at once, so its name cannot meet another one here.
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(UPLINK.to_owned())
        .setns_by_fd(end.namespace.as_raw_fd())
        .build();
    let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(end.port.clone())
        .controller(bridge)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .up()
        .build();
    let made = handle.link().add(pair).execute().await;
    made.map_err(netlink(format!("make the veth pair of {}", end.port)))
}

/// Adds default routes by gateways on the link.
async fn leave_by(handle: &Handle, link: u32, gateways: &[IpAddr]) -> Result<(), NetworkError> {
    for gateway in gateways {
        let route = match gateway {
            IpAddr::V4(gateway) => RouteMessageBuilder::<Ipv4Addr>::new()
                .gateway(*gateway)
                .output_interface(link)
                .build(),
            IpAddr::V6(gateway) => RouteMessageBuilder::<Ipv6Addr>::new()
                .gateway(*gateway)
                .output_interface(link)
                .build(),
        };
        let added = handle.route().add(route).execute().await;
        added.map_err(netlink(format!("add the default route by {gateway}")))?;
    }
    Ok(())
}

/// Lets the worker whose network namespace the calling thread is in answer on its uplink when the control plane asks who
/// has a pod's address. It does so for addresses that it would forward to another interface: its own pods'.
fn answer_for_pods() -> Result<(), NetworkError> {
    for (path, value) in [
        ("conf/eth0/proxy_arp", "1"),
        ("neigh/eth0/proxy_delay", "0"),
    ] {
        // /proc/sys/net shows the network namespace of the thread that opens a file in it.
        let path = format!("/proc/sys/net/ipv4/{path}");
        std::fs::write(&path, value).map_err(system(format!("set {path} of a node")))?;
    }
    Ok(())
}

/// Lets the node tell its neighbours of its addresses when its uplink comes up: they may remember the interface of one that had them before.
fn tell_of_addresses() -> Result<(), NetworkError> {
    for (path, needed) in [
        ("ipv4/conf/eth0/arp_notify", true),
        ("ipv6/conf/eth0/ndisc_notify", false),
    ] {
        let path = format!("/proc/sys/net/{path}");
        match std::fs::write(&path, "1") {
            // A machine without IPv6 has no such setting.
            Err(error) if !needed && error.kind() == io::ErrorKind::NotFound => {}
            written => written.map_err(system(format!("set {path} of a node")))?,
        }
    }
    Ok(())
}

/// Lets the node use its uplink's link-local address as soon as it has one. Nobody else has it, and while the kernel asks around it looks
/// for no neighbour on behalf of what the node forwards: pods of one node would not reach those of another for a second or two.
fn take_the_links_address() -> Result<(), NetworkError> {
    let path = "/proc/sys/net/ipv6/conf/eth0/accept_dad";
    match std::fs::write(path, "0") {
        // A machine without IPv6 has no such setting.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written.map_err(system(format!("set {path} of a node"))),
    }
}

async fn index(handle: &Handle, name: &str) -> Result<u32, NetworkError> {
    let action = || format!("find interface {name}");
    let link = handle
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_next()
        .await
        .map_err(netlink(action()))?;
    link.map(|link| link.header.index)
        .ok_or_else(|| system(action())(io::ErrorKind::NotFound.into()))
}

async fn add_addresses(
    handle: &Handle,
    link: u32,
    addresses: &[IpAddr],
) -> Result<(), NetworkError> {
    for address in addresses {
        let prefix = if address.is_ipv4() {
            PREFIX_V4
        } else {
            PREFIX_V6
        };
        let mut add = handle.address().add(link, *address, prefix);
        if address.is_ipv6() {
            // Nobody else has it, and nothing may use it for a second while the kernel asks around.
            let flags = AddressFlags::Nodad;
            add.message_mut().header.flags = AddressHeaderFlags::Nodad;
            let attributes = &mut add.message_mut().attributes;
            attributes.push(AddressAttribute::Flags(flags));
        }
        let added = add.execute().await;
        added.map_err(netlink(format!("add address {address}/{prefix}")))?;
    }
    Ok(())
}

/// Delivers to the caller's network namespace, as if it were its own, every packet that has this mark, by a table of routes that
/// nothing else uses. Doing it again changes nothing.
///
/// # Errors
/// When netlink refuses.
pub fn deliver_marked(mark: u32, table: u32, with_v6: bool) -> Result<(), NetworkError> {
    block_on(|handle| async move {
        let lo = index(&handle, "lo").await?;
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new()
            .table_id(table)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .output_interface(lo)
            .build();
        let mut routes = vec![v4];
        if with_v6 {
            let v6 = RouteMessageBuilder::<Ipv6Addr>::new()
                .table_id(table)
                .kind(RouteType::Local)
                .output_interface(lo)
                .build();
            routes.push(v6);
        }
        for route in routes {
            let added = handle.route().add(route).replace().execute().await;
            added.map_err(netlink(format!("add a route to table {table}")))?;
        }
        let rule = || {
            let rule = handle.rule().add().fw_mark(mark).table_id(table);
            rule.action(RuleAction::ToTable)
        };
        let mut outcomes = vec![rule().v4().execute().await];
        if with_v6 {
            outcomes.push(rule().v6().execute().await);
        }
        for outcome in outcomes {
            match outcome {
                Err(rtnetlink::Error::NetlinkError(refusal))
                    if refusal.raw_code() == -libc::EEXIST => {}
                other => other.map_err(netlink(format!("add a rule for mark {mark:#x}")))?,
            }
        }
        Ok(())
    })
}

/// A node's range of pod addresses, and the node's address to reach it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodRoute {
    pub range: Ipv6Network,
    pub node: Ipv6Addr,
}

/// Gives the control plane's node, by the number of its PID 1, routes to pods' IPv6 addresses. With IPv4 workers answer for
/// whatever they forward ([`answer_for_pods`]); neighbour discovery has no such setting, only a list of addresses.
///
/// # Errors
/// Names the range whose route could not be made.
pub fn route_pods(control_plane: u32, routes: &[PodRoute]) -> Result<(), NetworkError> {
    let namespace = namespace_of(control_plane)?;
    std::thread::scope(|scope| {
        let add = || {
            enter(&namespace)?;
            block_on(|handle| async move {
                for PodRoute { range, node } in routes {
                    let route = RouteMessageBuilder::<Ipv6Addr>::new()
                        .destination_prefix(range.network(), range.prefix())
                        .gateway(*node)
                        .build();
                    let added = handle.route().add(route).replace().execute().await;
                    added.map_err(netlink(format!("add a route to {range} by {node}")))?;
                }
                Ok(())
            })
        };
        scope.spawn(add).join().unwrap_or_else(|_| {
            Err(system("add routes to pods")(io::Error::other(
                "the thread panicked",
            )))
        })
    })
}

async fn up(handle: &Handle, link: u32, name: &str) -> Result<(), NetworkError> {
    let set = handle
        .link()
        .set(LinkUnspec::new_with_index(link).up().build())
        .execute()
        .await;
    set.map_err(netlink(format!("bring up {name}")))
}

fn namespace_of(pid: u32) -> Result<File, NetworkError> {
    let path = format!("/proc/{pid}/ns/net");
    File::open(&path).map_err(system(format!("open {path}")))
}

/// Moves the calling thread into a network namespace. Only threads that end soon do that.
fn enter(namespace: &File) -> Result<(), NetworkError> {
    setns(namespace, CloneFlags::CLONE_NEWNET)
        .map_err(|error| system("enter a node's network namespace")(error.into()))
}

/// Runs `task` with a netlink socket of the calling thread's network namespace, on this thread alone.
fn block_on<T, F>(task: impl FnOnce(Handle) -> F) -> Result<T, NetworkError>
where
    F: Future<Output = Result<T, NetworkError>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(system("start a runtime"))?;
    runtime.block_on(async {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(system("open a netlink socket"))?;
        let connection = tokio::spawn(connection);
        let outcome = task(handle).await;
        connection.abort();
        outcome
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family;

    #[test]
    fn subnets_are_cut_from_the_benchmark_ranges() {
        for (subnet, worker, expected) in [
            (0, 1, "198.18.0.11,2001:2::b"),
            (255, 2, "198.18.255.12,2001:2:0:ff::c"),
            (256, 1, "198.19.0.11,2001:2:0:100::b"),
            (SUBNETS - 1, 1, "198.19.255.11,2001:2:0:1ff::b"),
        ] {
            let addresses = Subnet(subnet).worker(IpFamily::Dual, worker);
            assert_eq!(family::list(&addresses), expected);
        }
        assert_eq!(
            family::list(&Subnet(0).control_plane(IpFamily::Ipv6)),
            "2001:2::2"
        );
    }
}
