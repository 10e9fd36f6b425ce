//! The addresses that Services of type LoadBalancer may be given, as configured.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::Deserialize;

/// The whole configuration: the key `loadBalancer` of the ConfigMap `kube-system/keelway-config`, or a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pools {
    pub pools: Vec<Pool>,
    /// Whether Services without `spec.loadBalancerClass` are ours. Switched off beside a cloud's own controller.
    #[serde(default = "yes")]
    pub default_class: bool,
}

/// A named set of addresses.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pool {
    pub name: String,
    /// CIDRs and ranges `<first>-<last>`, of either family.
    pub addresses: Vec<Range>,
    /// Whether Services get addresses that do not ask for this pool.
    #[serde(default = "yes")]
    pub auto_assign: bool,
    /// Leave out addresses that end in .0 or .255: some old devices take them for broadcasts.
    #[serde(default)]
    pub avoid_edges: bool,
}

fn yes() -> bool {
    true
}

/// Addresses from the first to the last, both of them included and of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Range {
    first: IpAddr,
    last: IpAddr,
}

/// Why a configuration cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolsError {
    #[error("{0}")]
    Yaml(String),
    #[error(
        "{0:?} is neither a CIDR such as 192.0.2.0/28 nor a range such as 192.0.2.10-192.0.2.20"
    )]
    Range(String),
    #[error("{0}: the last address comes before the first, or is of another family")]
    Order(String),
    #[error(
        "{0}: addresses that are no machine's (unspecified, loopback, multicast or link-local)"
    )]
    Special(String),
    #[error("a pool has no name")]
    NoName,
    #[error("the pool {0:?} is there twice")]
    Twice(String),
    #[error("the pools {0:?} and {1:?} both have {2}")]
    Overlap(String, String, Range),
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn address(number: u128, ipv4: bool) -> IpAddr {
    match (ipv4, u32::try_from(number)) {
        (true, Ok(number)) => Ipv4Addr::from(number).into(),
        _ => Ipv6Addr::from(number).into(),
    }
}

impl FromStr for Range {
    type Err = PoolsError;

    fn from_str(text: &str) -> Result<Self, PoolsError> {
        let malformed = || PoolsError::Range(text.into());
        let range = match text.split_once('-') {
            Some((first, last)) => Self {
                first: first.trim().parse().map_err(|_| malformed())?,
                last: last.trim().parse().map_err(|_| malformed())?,
            },
            None => {
                let network: IpNetwork = text.trim().parse().map_err(|_| malformed())?;
                Self {
                    first: network.network(),
                    last: match network {
                        IpNetwork::V4(v4) => v4.broadcast().into(),
                        IpNetwork::V6(v6) => v6.broadcast().into(),
                    },
                }
            }
        };
        if range.first.is_ipv4() != range.last.is_ipv4() || number(range.first) > number(range.last)
        {
            return Err(PoolsError::Order(text.into()));
        }
        let special = |ip: IpAddr| {
            let link_local = match ip {
                IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
                IpAddr::V6(v6) => v6.is_unicast_link_local(),
            };
            ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || link_local
        };
        if special(range.first) || special(range.last) {
            return Err(PoolsError::Special(text.into()));
        }
        Ok(range)
    }
}

impl TryFrom<String> for Range {
    type Error = PoolsError;

    fn try_from(text: String) -> Result<Self, PoolsError> {
        text.parse()
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl Range {
    pub fn is_ipv4(&self) -> bool {
        self.first.is_ipv4()
    }

    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.is_ipv4()
            && (number(self.first)..=number(self.last)).contains(&number(ip))
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.is_ipv4() == other.is_ipv4()
            && number(self.first) <= number(other.last)
            && number(other.first) <= number(self.last)
    }

    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let ipv4 = self.is_ipv4();
        (number(self.first)..=number(self.last)).map(move |number| address(number, ipv4))
    }
}

impl Pool {
    fn allows(&self, ip: IpAddr) -> bool {
        let edge = |v4: Ipv4Addr| matches!(v4.octets()[3], 0 | 255);
        !self.avoid_edges || !matches!(ip, IpAddr::V4(v4) if edge(v4))
    }

    pub fn contains(&self, ip: IpAddr) -> bool {
        self.allows(ip) && self.addresses.iter().any(|range| range.contains(ip))
    }

    /// The pool's addresses of a family, in the order in which they are configured.
    pub fn candidates(&self, ipv4: bool) -> impl Iterator<Item = IpAddr> {
        let ranges = self
            .addresses
            .iter()
            .filter(move |range| range.is_ipv4() == ipv4);
        ranges
            .flat_map(|range| range.addresses())
            .filter(|ip| self.allows(*ip))
    }
}

impl Pools {
    /// Reads YAML, of which JSON is a part, and checks it.
    pub fn parse(yaml: &str) -> Result<Self, PoolsError> {
        let pools: Self =
            serde_saphyr::from_str(yaml).map_err(|error| PoolsError::Yaml(error.to_string()))?;
        for (i, pool) in pools.pools.iter().enumerate() {
            if pool.name.is_empty() {
                return Err(PoolsError::NoName);
            }
            for other in &pools.pools[..i] {
                if other.name == pool.name {
                    return Err(PoolsError::Twice(pool.name.clone()));
                }
                let both = |range: &&Range| other.addresses.iter().any(|one| one.overlaps(range));
                if let Some(range) = pool.addresses.iter().find(both) {
                    return Err(PoolsError::Overlap(
                        other.name.clone(),
                        pool.name.clone(),
                        *range,
                    ));
                }
            }
        }
        Ok(pools)
    }

    pub fn is_empty(&self) -> bool {
        self.pools.is_empty()
    }

    pub fn get(&self, name: &str) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.name == name)
    }

    /// The pool that an address belongs to.
    pub fn of(&self, ip: IpAddr) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.contains(ip))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pools(addresses: &str) -> Result<Pools, PoolsError> {
        Pools::parse(&format!(
            "pools: [{{name: a, addresses: [{addresses}], avoidEdges: true}}]"
        ))
    }

    #[test]
    fn cidrs_and_ranges_of_both_families_are_read() {
        let pools = pools("192.0.2.254/31, 198.51.100.1-198.51.100.2, 2001:db8::/127").unwrap();
        let pool = pools.get("a").unwrap();
        let v4: Vec<String> = pool.candidates(true).map(|ip| ip.to_string()).collect();
        assert_eq!(v4, ["192.0.2.254", "198.51.100.1", "198.51.100.2"]);
        let v6: Vec<String> = pool.candidates(false).map(|ip| ip.to_string()).collect();
        assert_eq!(v6, ["2001:db8::", "2001:db8::1"]);
        assert!(
            pools.of("192.0.2.255".parse().unwrap()).is_none(),
            "an edge"
        );
        assert!(pools.of("198.51.100.2".parse().unwrap()).is_some());
        assert!(pools.default_class && pool.auto_assign);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (addresses, said) in [
            ("192.0.2.0/33", "neither a CIDR"),
            ("x", "neither a CIDR"),
            ("192.0.2.9-192.0.2.1", "before the first"),
            ("192.0.2.1-2001:db8::1", "before the first"),
            ("127.0.0.0/8", "no machine's"),
            ("fe80::/64", "no machine's"),
        ] {
            let error = pools(addresses).unwrap_err().to_string();
            assert!(error.contains(said), "{addresses}: {error}");
        }
        for (yaml, said) in [
            (
                "pools: [{name: a, addresses: []}, {name: a, addresses: []}]",
                "twice",
            ),
            ("pools: [{name: '', addresses: []}]", "no name"),
            ("pools: [{name: a, addreses: []}]", "addreses"),
            (
                "pools: [{name: a, addresses: [10.0.0.0/24]}, {name: b, addresses: [10.0.0.7-10.0.1.1]}]",
                "both have",
            ),
        ] {
            let error = Pools::parse(yaml).unwrap_err().to_string();
            assert!(error.contains(said), "{yaml}: {error}");
        }
    }

    #[test]
    fn a_huge_range_costs_nothing() {
        let pools = pools("2001:db8::/32").unwrap();
        let first = pools.get("a").unwrap().candidates(false).nth(1);
        assert_eq!(first, "2001:db8::1".parse().ok());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,60}") {
            let _ = text.parse::<Range>();
            let _ = Pools::parse(&text);
        }
    }
}
