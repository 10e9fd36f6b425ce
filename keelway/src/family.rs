//! Which addresses a cluster has: of IPv4, of IPv6, or of both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::Deserialize;

/// The ranges of one family, the same in every cluster: none is ever seen outside its namespaces.
struct Ranges {
    pods: IpNetwork,
    services: IpNetwork,
    /// `default/kubernetes`, the first address of the Service range.
    api_service: IpAddr,
    cluster_dns: IpAddr,
}

const V4: Ranges = Ranges {
    pods: IpNetwork::V4(Ipv4Network::new_checked(Ipv4Addr::new(10, 244, 0, 0), 16).unwrap()),
    services: IpNetwork::V4(Ipv4Network::new_checked(Ipv4Addr::new(10, 96, 0, 0), 16).unwrap()),
    api_service: IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)),
    cluster_dns: IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)),
};

/// Of the unique local addresses (RFC 4193), as other development clusters have them.
const V6: Ranges = Ranges {
    pods: IpNetwork::V6(Ipv6Network::new_checked(ula(0x244, 0), 56).unwrap()),
    services: IpNetwork::V6(Ipv6Network::new_checked(ula(0x96, 0), 112).unwrap()),
    api_service: IpAddr::V6(ula(0x96, 1)),
    cluster_dns: IpAddr::V6(ula(0x96, 10)),
};

const fn ula(range: u16, last: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, range, 0, 0, 0, 0, last)
}

/// The families of a cluster's nodes, pods and Services (`--ip-family`). Of two, IPv4 is the primary one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpFamily {
    #[default]
    Ipv4,
    Ipv6,
    Dual,
}

impl IpFamily {
    fn ranges(self) -> &'static [Ranges] {
        match self {
            IpFamily::Ipv4 => &[V4],
            IpFamily::Ipv6 => &[V6],
            IpFamily::Dual => &[V4, V6],
        }
    }

    /// That of a node's addresses.
    pub fn of(addresses: &[IpAddr]) -> Self {
        let has = |v4| addresses.iter().any(|address| address.is_ipv4() == v4);
        match (has(true), has(false)) {
            (true, true) => IpFamily::Dual,
            (false, true) => IpFamily::Ipv6,
            _ => IpFamily::Ipv4,
        }
    }

    pub fn has_v4(self) -> bool {
        self != IpFamily::Ipv6
    }

    pub fn has_v6(self) -> bool {
        self != IpFamily::Ipv4
    }

    /// Of a node's address in each family, those that a cluster like this has, the primary one first.
    pub fn choose(self, v4: Ipv4Addr, v6: Ipv6Addr) -> Vec<IpAddr> {
        let v4 = self.has_v4().then_some(IpAddr::V4(v4));
        v4.into_iter()
            .chain(self.has_v6().then_some(IpAddr::V6(v6)))
            .collect()
    }

    /// The ranges that nodes' ranges of pod addresses are cut from.
    pub fn pods(self) -> Vec<IpNetwork> {
        self.ranges().iter().map(|ranges| ranges.pods).collect()
    }

    /// The ranges of Service addresses.
    pub fn services(self) -> Vec<IpNetwork> {
        self.ranges().iter().map(|ranges| ranges.services).collect()
    }

    /// The first address of each range of Service addresses: that of `default/kubernetes`, if it has one there.
    pub fn api_services(self) -> Vec<IpAddr> {
        let ranges = self.ranges().iter();
        ranges.map(|ranges| ranges.api_service).collect()
    }

    /// The address of the cluster DNS, in the primary family.
    pub fn cluster_dns(self) -> IpAddr {
        let primary = if self.has_v4() { V4 } else { V6 };
        primary.cluster_dns
    }
}

/// A flag's value that lists ranges or addresses.
pub fn list<T: ToString>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    items.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_its_ranges_and_of_two_ipv4_comes_first() {
        assert_eq!(
            list(&IpFamily::Dual.services()),
            "10.96.0.0/16,fd00:10:96::/112"
        );
        assert_eq!(list(&IpFamily::Ipv4.pods()), "10.244.0.0/16");
        assert_eq!(list(&IpFamily::Ipv6.pods()), "fd00:10:244::/56");
        assert_eq!(IpFamily::Dual.cluster_dns().to_string(), "10.96.0.10");
        assert_eq!(IpFamily::Ipv6.cluster_dns().to_string(), "fd00:10:96::a");
        for family in [IpFamily::Ipv4, IpFamily::Ipv6, IpFamily::Dual] {
            let services = family.services();
            for address in family.api_services() {
                assert!(
                    services
                        .iter()
                        .any(|range| range.iter().nth(1) == Some(address))
                );
            }
        }
    }
}
