//! Who gets which address.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnetwork::IpNetwork;
use keelway_cni::{Attachment, Bandwidth, Mac, PortMapping};

use super::{Allocation, host_interface};

/// How long an address rests before it is given again: longer than other nodes take to forget who had it.
pub const REST: Duration = Duration::from_secs(5);
/// Addresses of a range that are looked at in search of a free one. More than a node can have pods: an IPv6 range has more
/// addresses than can be counted.
const SEARCH_MAX: u128 = 1 << 16;
/// Addresses at the beginning of each node's first range of a family that are the node's own, not a pod's.
const RESERVED: u128 = 2;
/// Ranges smaller than this are given to pods whole.
const RESERVED_OF_MIN: u128 = 6;

/// The node's own addresses in its pod range, of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reserved {
    /// Source of what the host sends to other nodes' pods through the overlay, so that answers come back the same way.
    pub host: IpAddr,
    /// Both ends of the probes that find out whether pod addresses pass between nodes.
    pub probe: IpAddr,
}

impl Reserved {
    /// Those of a range; every node can tell every other's.
    pub fn of(range: IpNetwork) -> Option<Self> {
        let span = Span::of(range);
        if span.len() < RESERVED_OF_MIN {
            return None;
        }
        Some(Self {
            host: span.address(span.first),
            probe: span.address(span.first + 1),
        })
    }
}

/// What an attachment shall get.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ask {
    pub attachment: Attachment,
    pub network: Option<String>,
    pub pod: Option<String>,
    /// Addresses that it must have, at most one of each family.
    pub addresses: Vec<IpAddr>,
    pub mac: Option<Mac>,
    pub port_mappings: Vec<PortMapping>,
    pub bandwidth: Option<Bandwidth>,
}

/// How full the ranges of one family are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    pub ipv4: bool,
    pub capacity: u64,
    pub used: u64,
    /// Free again within [`REST`].
    pub resting: u64,
}

impl fmt::Display for Fill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.ipv4 { "IPv4" } else { "IPv6" };
        write!(
            f,
            "{} of {} {family} addresses in use",
            self.used, self.capacity
        )?;
        if self.resting > 0 {
            write!(
                f,
                ", {} resting for up to {} s",
                self.resting,
                REST.as_secs()
            )?;
        }
        Ok(())
    }
}

/// Why no address could be given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    #[error("this node has no pod range yet (Node.spec.podCIDRs is empty)")]
    NoRange,
    #[error("no pod address of this node is free: {0}")]
    Exhausted(Fill),
    #[error("{0} is asked for and is in none of this node's pod ranges: {1}")]
    Outside(IpAddr, String),
    #[error("{0} is asked for and belongs to {1}")]
    Taken(IpAddr, String),
    #[error("{0} is asked for and was another pod's until a moment ago; it can be had within {rest} s", rest = REST.as_secs())]
    Resting(IpAddr),
}

/// The addresses of this node's pod ranges, and who has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    ranges: Vec<IpNetwork>,
    by_interface: BTreeMap<String, Allocation>,
    by_address: HashMap<IpAddr, String>,
    /// Interfaces whose pods are deleted for their runtime, and which are not gone yet, with their addresses.
    dying: BTreeMap<String, Vec<IpAddr>>,
    resting: BTreeMap<IpAddr, u64>,
    /// Addresses of the node itself within its ranges.
    reserved: BTreeSet<IpAddr>,
    /// The search goes on after the last address given of a family, so that an address rests as long as possible.
    last: BTreeMap<bool, IpAddr>,
}

impl Pool {
    /// A pool as it was written down. Says what contradicts itself.
    pub(super) fn restore(
        allocations: Vec<Allocation>,
        dying: BTreeMap<String, Vec<IpAddr>>,
        resting: BTreeMap<IpAddr, u64>,
        last: Vec<IpAddr>,
    ) -> Result<Self, String> {
        let mut pool = Self {
            dying,
            resting,
            last: last.into_iter().map(|ip| (ip.is_ipv4(), ip)).collect(),
            ..Self::default()
        };
        for allocation in allocations {
            if allocation.addresses.is_empty() {
                return Err(format!("{} has no address", allocation.host_interface));
            }
            if pool.by_interface.contains_key(&allocation.host_interface) {
                return Err(format!(
                    "interface {} is there twice",
                    allocation.host_interface
                ));
            }
            let twice = |ip: &&IpAddr| pool.by_address.contains_key(*ip);
            if let Some(address) = allocation.addresses.iter().find(twice) {
                return Err(format!("address {address} is there twice"));
            }
            pool.insert(allocation);
        }
        Ok(pool)
    }

    pub(super) fn dying(&self) -> &BTreeMap<String, Vec<IpAddr>> {
        &self.dying
    }

    pub(super) fn resting(&self) -> &BTreeMap<IpAddr, u64> {
        &self.resting
    }

    pub(super) fn last(&self) -> Vec<IpAddr> {
        self.last.values().copied().collect()
    }

    /// Sets the ranges that addresses are taken from. Addresses given from other ranges stay with their pods.
    pub fn set_ranges(&mut self, ranges: Vec<IpNetwork>) {
        self.reserved = [true, false]
            .into_iter()
            .filter_map(|ipv4| ranges.iter().find(|range| range.is_ipv4() == ipv4))
            .filter_map(|range| Reserved::of(*range))
            .flat_map(|own| [own.host, own.probe])
            .collect();
        self.ranges = ranges;
    }

    pub fn ranges(&self) -> &[IpNetwork] {
        &self.ranges
    }

    /// How full each family is that the node has a range of.
    pub fn fill(&self, now: u64) -> Vec<Fill> {
        [true, false]
            .into_iter()
            .filter(|ipv4| self.ranges.iter().any(|range| range.is_ipv4() == *ipv4))
            .map(|ipv4| self.fill_of(ipv4, now))
            .collect()
    }

    fn fill_of(&self, ipv4: bool, now: u64) -> Fill {
        let ranges = self.ranges.iter().filter(|range| range.is_ipv4() == ipv4);
        let all: u128 = ranges
            .map(|range| Span::of(*range).len())
            .fold(0, u128::saturating_add);
        let own = self
            .reserved
            .iter()
            .filter(|ip| ip.is_ipv4() == ipv4)
            .count();
        let resting = self
            .resting
            .iter()
            .filter(|(_, since)| is_resting(**since, now));
        let dying = self.dying.values().flatten();
        Fill {
            ipv4,
            capacity: u64::try_from(all)
                .unwrap_or(u64::MAX)
                .saturating_sub(own as u64),
            used: self
                .by_address
                .keys()
                .filter(|ip| ip.is_ipv4() == ipv4)
                .count() as u64,
            resting: resting
                .map(|(ip, _)| ip)
                .chain(dying)
                .filter(|ip| ip.is_ipv4() == ipv4)
                .count() as u64,
        }
    }

    pub fn get(&self, host_interface: &str) -> Option<&Allocation> {
        self.by_interface.get(host_interface)
    }

    /// Whether the interface's pod is deleted and the interface is not gone yet.
    pub fn is_dying(&self, host_interface: &str) -> bool {
        self.dying.contains_key(host_interface)
    }

    /// Interfaces that wait to be removed.
    pub fn dying_interfaces(&self) -> impl Iterator<Item = &str> {
        self.dying.keys().map(String::as_str)
    }

    /// All allocations, ordered by interface.
    pub fn allocations(&self) -> impl Iterator<Item = &Allocation> {
        self.by_interface.values()
    }

    /// Gives addresses to an attachment: those that it has, else one of each family that is free. `now` is in seconds since 1970.
    pub fn allocate(&mut self, ask: &Ask, now: u64) -> Result<Allocation, PoolError> {
        let host_interface = host_interface(&ask.attachment);
        if self.ranges.is_empty() {
            return Err(PoolError::NoRange);
        }
        self.resting.retain(|_, since| is_resting(*since, now));
        let had = self.by_interface.get(&host_interface);
        let addresses = match had {
            // Repeated, and content with what it has.
            Some(had) if ask.addresses.iter().all(|ip| had.addresses.contains(ip)) => {
                had.addresses.clone()
            }
            _ => self.choose(ask, &host_interface, now)?,
        };
        self.forget(&host_interface);
        for ip in &addresses {
            if !ask.addresses.contains(ip) {
                self.last.insert(ip.is_ipv4(), *ip);
            }
        }
        let allocation = Allocation {
            addresses,
            host_interface,
            attachment: Some(ask.attachment.clone()),
            network: ask.network.clone(),
            pod: ask.pod.clone(),
            mac: ask.mac,
            port_mappings: ask.port_mappings.clone(),
            bandwidth: ask.bandwidth,
        };
        self.insert(allocation.clone());
        Ok(allocation)
    }

    /// Takes addresses back whose interface never came to be: nobody has seen them.
    pub fn release(&mut self, host_interface: &str) -> Option<Allocation> {
        self.forget(host_interface)
    }

    /// The pod is deleted for its runtime. Its addresses are nobody's, and rest from when [`Pool::buried`] says that the interface is
    /// gone. Returns what it had.
    pub fn bury(&mut self, host_interface: &str) -> Option<Allocation> {
        let gone = self.forget(host_interface);
        let addresses = gone.as_ref().map(|gone| gone.addresses.clone());
        self.dying
            .entry(host_interface.into())
            .or_default()
            .extend(addresses.unwrap_or_default());
        gone
    }

    /// The interface of a deleted pod is gone.
    pub fn buried(&mut self, host_interface: &str, now: u64) -> bool {
        let Some(addresses) = self.dying.remove(host_interface) else {
            return false;
        };
        self.resting
            .extend(addresses.into_iter().map(|ip| (ip, now)));
        true
    }

    /// Takes in what is found on the node: an interface with addresses that no allocation names. Refused when one of them is
    /// another's.
    pub fn adopt(&mut self, host_interface: &str, addresses: &[IpAddr], mac: Option<Mac>) -> bool {
        if addresses.is_empty()
            || self.by_interface.contains_key(host_interface)
            || addresses.iter().any(|ip| self.by_address.contains_key(ip))
        {
            return false;
        }
        let mut allocation = Allocation {
            addresses: addresses.to_vec(),
            host_interface: host_interface.into(),
            attachment: None,
            network: None,
            pod: None,
            mac: None,
            port_mappings: Vec::new(),
            bandwidth: None,
        };
        allocation.addresses.sort();
        allocation.mac = mac.filter(|Mac(bytes)| *bytes != allocation.mac());
        self.insert(allocation);
        true
    }

    fn insert(&mut self, allocation: Allocation) {
        for ip in &allocation.addresses {
            self.resting.remove(ip);
            self.by_address
                .insert(*ip, allocation.host_interface.clone());
        }
        self.by_interface
            .insert(allocation.host_interface.clone(), allocation);
    }

    fn forget(&mut self, host_interface: &str) -> Option<Allocation> {
        let allocation = self.by_interface.remove(host_interface)?;
        for ip in &allocation.addresses {
            self.by_address.remove(ip);
        }
        Some(allocation)
    }

    fn choose(&self, ask: &Ask, host_interface: &str, now: u64) -> Result<Vec<IpAddr>, PoolError> {
        for ip in &ask.addresses {
            if !self
                .ranges
                .iter()
                .any(|range| Span::of(*range).contains(*ip))
            {
                let ranges: Vec<String> = self.ranges.iter().map(ToString::to_string).collect();
                return Err(PoolError::Outside(*ip, ranges.join(", ")));
            }
            if self.reserved.contains(ip) {
                return Err(PoolError::Taken(*ip, "the node itself".into()));
            }
            if let Some(owner) = self
                .by_address
                .get(ip)
                .filter(|owner| *owner != host_interface)
            {
                let pod = self.get(owner).and_then(|one| one.pod.clone());
                return Err(PoolError::Taken(*ip, pod.unwrap_or_else(|| owner.clone())));
            }
            if self.rests(*ip, now) {
                return Err(PoolError::Resting(*ip));
            }
        }
        let mut chosen = Vec::new();
        for ipv4 in [true, false] {
            if let Some(ip) = ask.addresses.iter().find(|ip| ip.is_ipv4() == ipv4) {
                chosen.push(*ip);
            } else if self.ranges.iter().any(|range| range.is_ipv4() == ipv4) {
                chosen.push(self.free_address(ipv4, now)?);
            }
        }
        Ok(chosen)
    }

    fn rests(&self, ip: IpAddr, now: u64) -> bool {
        self.resting
            .get(&ip)
            .is_some_and(|since| is_resting(*since, now))
            || self.dying.values().flatten().any(|dying| *dying == ip)
    }

    /// A free address of a family: from after the last one given to the end of its range, through the others, and around to where it
    /// began.
    fn free_address(&self, ipv4: bool, now: u64) -> Result<IpAddr, PoolError> {
        let spans: Vec<Span> = self
            .ranges
            .iter()
            .filter(|range| range.is_ipv4() == ipv4)
            .map(|range| Span::of(*range))
            .collect();
        let last = self.last.get(&ipv4).copied();
        let start = spans
            .iter()
            .position(|span| last.is_some_and(|last| span.contains(last)))
            .unwrap_or(0);
        let Some(first_span) = spans.get(start) else {
            return Err(PoolError::NoRange);
        };
        let dying: BTreeSet<&IpAddr> = self.dying.values().flatten().collect();
        let after = last.filter(|last| first_span.contains(*last)).map(bits);
        let head = first_span.search(
            after.map_or(first_span.first, |last| last + 1),
            first_span.last,
        );
        let others = spans[start + 1..]
            .iter()
            .chain(&spans[..start])
            .flat_map(|span| span.search(span.first, span.last));
        let tail = first_span.search(first_span.first, after.unwrap_or(first_span.first));
        head.chain(others)
            .chain(tail)
            .find(|ip| {
                !self.by_address.contains_key(ip)
                    && !self.reserved.contains(ip)
                    && !dying.contains(ip)
                    && !self
                        .resting
                        .get(ip)
                        .is_some_and(|since| is_resting(*since, now))
            })
            .ok_or_else(|| PoolError::Exhausted(self.fill_of(ipv4, now)))
    }
}

/// A clock that went back must not keep an address for years.
fn is_resting(since: u64, now: u64) -> bool {
    now.checked_sub(since)
        .is_some_and(|age| age < REST.as_secs())
}

/// First and last address of a range that pods can have, as numbers.
#[derive(Clone, Copy)]
struct Span {
    ipv4: bool,
    first: u128,
    last: u128,
}

impl Span {
    /// Not an IPv4 range's first and last, which some hosts take for its network and broadcast address, nor an IPv6 range's first,
    /// which is every router's.
    fn of(range: IpNetwork) -> Self {
        let (first, last) = (bits(range.network()), bits(range.broadcast()));
        let inner = match range {
            IpNetwork::V4(v4) if v4.prefix() < 31 => (first + 1, last - 1),
            IpNetwork::V6(v6) if v6.prefix() < 127 => (first + 1, last),
            _ => (first, last),
        };
        Self {
            ipv4: range.is_ipv4(),
            first: inner.0,
            last: inner.1,
        }
    }

    fn len(&self) -> u128 {
        (self.last - self.first).saturating_add(1)
    }

    fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.ipv4 && (self.first..=self.last).contains(&bits(ip))
    }

    fn address(&self, bits: u128) -> IpAddr {
        if self.ipv4 {
            Ipv4Addr::from(u32::try_from(bits).unwrap_or(u32::MAX)).into()
        } else {
            Ipv6Addr::from(bits).into()
        }
    }

    fn search(self, from: u128, to: u128) -> impl Iterator<Item = IpAddr> {
        let to = to.min(from.saturating_add(SEARCH_MAX + RESERVED));
        (from..=to).map(move |bits| self.address(bits))
    }
}

fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}
