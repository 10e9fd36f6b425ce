//! Which interfaces lead to other machines: clients outside come by any of them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::net::{Interface, InterfaceKind, Link};

/// What a machine's network is seen to be.
#[derive(Clone, Debug, Default)]
pub struct Surveyed {
    pub interfaces: Vec<Interface>,
    /// Every address, with the index of its interface and its prefix length.
    pub addresses: Vec<(u32, IpAddr, u8)>,
    /// Interfaces by which default routes lead.
    pub defaults: BTreeSet<u32>,
}

/// The uplinks: first the interface that has the node's address, `first`, then by index those that are `named`, or without names those by
/// which a default route leads or that have an address that other machines can reach. `is_apart` says of a name that it is no way to
/// other machines: ours, or another network plugin's.
///
/// An address on a bridge is one for its containers, and counts only when the Node says that it is the `node`'s. One on a veth does when
/// others are on its link: some plugins give their gateway's address to the host's side of every pod's, by itself.
pub fn plan_uplinks(
    surveyed: &Surveyed,
    first: &Link,
    node: &[IpAddr],
    named: &[String],
    is_apart: impl Fn(&str) -> bool,
) -> Vec<Link> {
    let leads_out = |one: &&Interface| {
        let link = &one.link;
        if one.kind == InterfaceKind::Inner || link.index == first.index {
            return false;
        }
        if !named.is_empty() {
            return named.contains(&link.name);
        }
        if one.is_port || is_apart(&link.name) {
            return false;
        }
        let counts = |(_, ip, prefix): &&(u32, IpAddr, u8)| match one.kind {
            _ if !is_reachable(*ip) => false,
            InterfaceKind::Outer => true,
            InterfaceKind::Veth => *prefix < if ip.is_ipv4() { 32 } else { 128 },
            InterfaceKind::Bridge => node.contains(ip),
            InterfaceKind::Inner => false,
        };
        let mut own = surveyed.addresses.iter();
        surveyed.defaults.contains(&link.index)
            || own.any(|address| address.0 == link.index && counts(&address))
    };
    let others = surveyed.interfaces.iter().filter(leads_out);
    let mut others: Vec<Link> = others.map(|one| one.link.clone()).collect();
    others.sort_by_key(|link| link.index);
    [vec![first.clone()], others].concat()
}

/// Of those that are named, the ones that are not among the uplinks, in words.
pub fn missing_uplinks(uplinks: &[Link], named: &[String]) -> Vec<String> {
    let is_missing = |name: &&String| !uplinks.iter().any(|link| link.name == **name);
    let missing = named.iter().filter(is_missing);
    let words = |name| format!("--uplink {name}: there is no Ethernet interface of this name");
    missing.map(words).collect()
}

/// Whether other machines may reach an address.
pub fn is_reachable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(index: u32, name: &str, kind: InterfaceKind) -> Interface {
        let link = Link {
            index,
            name: name.into(),
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            up: true,
        };
        Interface {
            link,
            kind,
            is_port: false,
        }
    }

    /// A machine with an interface of each kind, and its addresses.
    fn machine(addresses: &[(u32, &str, u8)], defaults: &[u32]) -> Surveyed {
        use InterfaceKind::{Bridge, Inner, Outer, Veth};
        let mut interfaces = vec![
            interface(1, "lo", Inner),
            interface(2, "eth0", Outer),
            interface(3, "eth1", Outer),
            interface(4, "eth2", Outer),
            interface(5, "veth7", Veth),
            interface(6, "docker0", Bridge),
            interface(7, "vxlan7", Inner),
            interface(8, "keelway-svc", Veth),
        ];
        // A port of a bond, say.
        interfaces[3].is_port = true;
        let address = |(index, ip, prefix): &(u32, &str, u8)| {
            (*index, ip.parse().expect("an address"), *prefix)
        };
        Surveyed {
            interfaces,
            addresses: addresses.iter().map(address).collect(),
            defaults: defaults.iter().copied().collect(),
        }
    }

    fn uplinks(surveyed: &Surveyed, named: &[&str]) -> String {
        let node = ["198.18.0.1".parse().expect("an address")];
        let named: Vec<String> = named.iter().map(ToString::to_string).collect();
        let first = &surveyed.interfaces[1].link;
        let is_apart = |name: &str| name == "keelway-svc";
        let uplinks = plan_uplinks(surveyed, first, &node, &named, is_apart);
        let names: Vec<&str> = uplinks.iter().map(|link| link.name.as_str()).collect();
        names.join(" ")
    }

    #[test]
    fn interfaces_with_an_address_or_a_default_route_are_uplinks() {
        for (addresses, defaults, wished) in [
            (&[][..], &[][..], "eth0"),
            (&[(3, "198.19.0.1", 24)], &[], "eth0 eth1"),
            (&[(3, "2001:db8::1", 64)], &[], "eth0 eth1"),
            // As clouds give them.
            (&[(3, "203.0.113.9", 32)], &[], "eth0 eth1"),
            // Without an address of its own.
            (&[], &[2, 3], "eth0 eth1"),
            (&[(3, "169.254.7.1", 16), (3, "fe80::1", 64)], &[], "eth0"),
            // Its packets come by what it is a port of.
            (&[(4, "198.19.1.1", 24)], &[4], "eth0"),
            // Of another plugin's pod, and of whoever plays a machine.
            (&[(5, "10.0.0.1", 32), (5, "fd00::1", 128)], &[], "eth0"),
            (&[(5, "198.19.2.1", 24)], &[], "eth0 veth7"),
            // Of containers, of the node, and out of the machine by a port.
            (&[(6, "172.17.0.1", 16)], &[], "eth0"),
            (&[(6, "198.18.0.1", 24)], &[], "eth0 docker0"),
            (&[(6, "172.17.0.1", 16)], &[6], "eth0 docker0"),
            // Loopback, an overlay, our own.
            (
                &[
                    (1, "203.0.113.7", 32),
                    (7, "10.9.0.1", 24),
                    (8, "10.9.1.1", 24),
                ],
                &[7],
                "eth0",
            ),
        ] {
            let surveyed = machine(addresses, defaults);
            assert_eq!(
                uplinks(&surveyed, &[]),
                wished,
                "{addresses:?} {defaults:?}"
            );
        }
    }

    #[test]
    fn those_that_are_named_are_the_others_and_the_nodes_own_is_always_one() {
        let surveyed = machine(&[(3, "198.19.0.1", 24)], &[3]);
        for (named, wished, missing) in [
            (&["eth1"][..], "eth0 eth1", 0),
            (&["docker0", "eth0"], "eth0 docker0", 0),
            (&["eth9"], "eth0", 1),
            // It has no Ethernet header, or leads nowhere.
            (&["lo", "veth7"], "eth0 veth7", 1),
        ] {
            assert_eq!(uplinks(&surveyed, named), wished);
            let named: Vec<String> = named.iter().map(ToString::to_string).collect();
            let first = &surveyed.interfaces[1].link;
            let there = plan_uplinks(&surveyed, first, &[], &named, |_| false);
            assert_eq!(missing_uplinks(&there, &named).len(), missing);
        }
    }
}
