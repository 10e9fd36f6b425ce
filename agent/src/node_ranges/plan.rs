//! Which node gets which range.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

/// A range of the whole cluster's pods, and how long the prefixes are that it is cut into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterRange {
    range: IpNetwork,
    node_prefix: u8,
}

/// Why a range cannot be cut so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterRangeError {
    #[error("{0}: has bits set after its prefix")]
    Bits(IpNetwork),
    #[error(
        "{range}: cannot be cut into ranges of /{node_prefix}, which must be longer than its own prefix, and at most /{max}"
    )]
    Prefix {
        range: IpNetwork,
        node_prefix: u8,
        max: u8,
    },
    #[error("{0} and {1}: one range of each family is all that a node can have")]
    Family(IpNetwork, IpNetwork),
}

/// More nodes than a cluster can have: a search in a range ends there.
const NODES_MAX: u128 = 1 << 16;
/// Longest prefixes of nodes' ranges: a node with fewer addresses is a mistake.
const PREFIX_MAX_V4: u8 = 29;
const PREFIX_MAX_V6: u8 = 120;

impl ClusterRange {
    pub fn new(range: IpNetwork, node_prefix: u8) -> Result<Self, ClusterRangeError> {
        let max = if range.is_ipv4() {
            PREFIX_MAX_V4
        } else {
            PREFIX_MAX_V6
        };
        if range.ip() != range.network() {
            return Err(ClusterRangeError::Bits(range));
        }
        if node_prefix <= range.prefix() || node_prefix > max {
            return Err(ClusterRangeError::Prefix {
                range,
                node_prefix,
                max,
            });
        }
        Ok(Self { range, node_prefix })
    }

    /// Checks that there is one of each family at most.
    pub fn one_of_each(ranges: &[Self]) -> Result<(), ClusterRangeError> {
        for (at, one) in ranges.iter().enumerate() {
            let same = |other: &&Self| other.range.is_ipv4() == one.range.is_ipv4();
            if let Some(other) = ranges[..at].iter().find(same) {
                return Err(ClusterRangeError::Family(other.range, one.range));
            }
        }
        Ok(())
    }

    fn size_bits(&self) -> u8 {
        let width = if self.range.is_ipv4() { 32 } else { 128 };
        width - self.node_prefix
    }

    fn count(&self) -> u128 {
        1_u128
            .checked_shl(u32::from(self.node_prefix - self.range.prefix()))
            .unwrap_or(u128::MAX)
    }

    fn nth(&self, number: u128) -> Option<IpNetwork> {
        let first = bits(self.range.network()) + (number << self.size_bits());
        match self.range {
            IpNetwork::V4(_) => {
                let ip = Ipv4Addr::from(u32::try_from(first).ok()?);
                Ipv4Network::new(ip, self.node_prefix)
                    .ok()
                    .map(IpNetwork::from)
            }
            IpNetwork::V6(_) => Ipv6Network::new(Ipv6Addr::from(first), self.node_prefix)
                .ok()
                .map(IpNetwork::from),
        }
    }
}

impl fmt::Display for ClusterRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in ranges of /{}", self.range, self.node_prefix)
    }
}

/// What is to be written: a node, and its ranges, one of each family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    pub node: String,
    pub ranges: Vec<IpNetwork>,
}

/// A cluster range has nothing left for a node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no range of pods is left for node {node}: {range} are all in use")]
pub struct Exhausted {
    pub node: String,
    pub range: ClusterRange,
}

/// Gives every node without a range the first of each cluster range that overlaps nobody's. Nodes that have some keep them, whoever gave
/// them. Nodes are served by name, so that two that decide at once decide alike.
pub fn plan(
    nodes: &BTreeMap<String, Vec<IpNetwork>>,
    ranges: &[ClusterRange],
) -> (Vec<Assignment>, Option<Exhausted>) {
    let mut taken = Taken::of(nodes.values().flatten().copied());
    let mut assignments = Vec::new();
    for (node, _) in nodes.iter().filter(|(_, had)| had.is_empty()) {
        let found: Vec<Option<IpNetwork>> = ranges
            .iter()
            .enumerate()
            .map(|(at, range)| taken.first_free(at, range))
            .collect();
        if let Some(at) = found.iter().position(Option::is_none) {
            let exhausted = Exhausted {
                node: node.clone(),
                range: ranges[at],
            };
            return (assignments, Some(exhausted));
        }
        let found: Vec<IpNetwork> = found.into_iter().flatten().collect();
        found.iter().for_each(|range| taken.insert(*range));
        assignments.push(Assignment {
            node: node.clone(),
            ranges: found,
        });
    }
    (assignments, None)
}

/// The ranges that nodes have, as spans of each family that do not overlap: first addresses with last ones.
struct Taken {
    spans: [BTreeMap<u128, u128>; 2],
    /// Where the search goes on in each cluster range: what is before it is taken.
    next: BTreeMap<usize, u128>,
}

impl Taken {
    fn of(ranges: impl Iterator<Item = IpNetwork>) -> Self {
        let mut taken = Self {
            spans: Default::default(),
            next: BTreeMap::new(),
        };
        ranges.for_each(|range| taken.insert(range));
        taken
    }

    fn insert(&mut self, range: IpNetwork) {
        let (mut first, mut last) = (bits(range.network()), bits(range.broadcast()));
        let spans = &mut self.spans[usize::from(range.is_ipv6())];
        // Others may have given ranges that overlap: they become one span.
        while let Some((begin, end)) = overlap(spans, first, last) {
            spans.remove(&begin);
            first = first.min(begin);
            last = last.max(end);
        }
        spans.insert(first, last);
    }

    fn first_free(&mut self, at: usize, range: &ClusterRange) -> Option<IpNetwork> {
        let spans = &self.spans[usize::from(range.range.is_ipv6())];
        let begin = self.next.get(&at).copied().unwrap_or(0);
        let end = range.count().min(NODES_MAX);
        let number = (begin..end).find(|number| {
            range.nth(*number).is_some_and(|one| {
                overlap(spans, bits(one.network()), bits(one.broadcast())).is_none()
            })
        })?;
        self.next.insert(at, number + 1);
        range.nth(number)
    }
}

fn overlap(spans: &BTreeMap<u128, u128>, first: u128, last: u128) -> Option<(u128, u128)> {
    let (begin, end) = spans.range(..=last).next_back()?;
    (*end >= first).then_some((*begin, *end))
}

fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(text: &str, node_prefix: u8) -> ClusterRange {
        ClusterRange::new(text.parse().expect("a range"), node_prefix).expect("a good one")
    }

    fn nodes(all: &[(&str, &[&str])]) -> BTreeMap<String, Vec<IpNetwork>> {
        let parse = |ranges: &[&str]| ranges.iter().map(|one| one.parse().expect("one")).collect();
        all.iter()
            .map(|(name, ranges)| ((*name).to_owned(), parse(ranges)))
            .collect()
    }

    #[test]
    fn nodes_without_a_range_get_the_first_free_one_of_each_family() {
        let there = nodes(&[
            ("a", &[]),
            ("b", &["10.0.0.0/24", "fd00::/64"]),
            // Somebody gave it half of the second.
            ("c", &["10.0.1.128/25"]),
            ("d", &[]),
        ]);
        let (assignments, exhausted) =
            plan(&there, &[range("10.0.0.0/16", 24), range("fd00::/48", 64)]);
        assert_eq!(exhausted, None);
        let written: Vec<String> = assignments
            .iter()
            .map(|one| {
                format!(
                    "{} {:?}",
                    one.node,
                    one.ranges
                        .iter()
                        .map(ToString::to_string)
                        .collect::<Vec<_>>()
                )
            })
            .collect();
        assert_eq!(
            written,
            [
                r#"a ["10.0.2.0/24", "fd00:0:0:1::/64"]"#,
                r#"d ["10.0.3.0/24", "fd00:0:0:2::/64"]"#
            ]
        );
    }

    #[test]
    fn a_range_that_is_used_up_is_said_and_what_could_be_given_is() {
        let there = nodes(&[("a", &[]), ("b", &[]), ("c", &[])]);
        let (assignments, exhausted) = plan(&there, &[range("10.0.0.0/23", 24)]);
        assert_eq!(assignments.len(), 2);
        assert_eq!(
            exhausted.expect("c is left").to_string(),
            "no range of pods is left for node c: 10.0.0.0/23 in ranges of /24 are all in use"
        );
    }

    #[test]
    fn ranges_that_cannot_be_cut_are_refused() {
        let refused = |text: &str, prefix| {
            ClusterRange::new(text.parse().expect("a range"), prefix)
                .expect_err("refused")
                .to_string()
        };
        assert!(refused("10.0.0.1/16", 24).contains("bits set"));
        assert!(refused("10.0.0.0/24", 24).contains("longer than its own"));
        assert!(refused("10.0.0.0/24", 31).contains("at most /29"));
        assert!(refused("fd00::/64", 121).contains("at most /120"));
        let twice = [range("10.0.0.0/16", 24), range("10.1.0.0/16", 24)];
        assert!(ClusterRange::one_of_each(&twice).is_err());
        assert!(ClusterRange::one_of_each(&twice[..1]).is_ok());
    }

    proptest! {
        #[test]
        fn no_two_nodes_share_an_address(
            had in proptest::collection::vec((0_u32..64, 20_u8..28), 0..20),
            new in 0_usize..40,
        ) {
            let mut there = BTreeMap::new();
            // What others gave may overlap itself, but nothing that is given here overlaps anything.
            for (number, (block, prefix)) in had.iter().enumerate() {
                let ip = Ipv4Addr::from(0x0a00_0000 + block * 64);
                let range = Ipv4Network::new(ip, *prefix).expect("a prefix");
                let range = Ipv4Network::new(range.network(), *prefix).expect("a prefix");
                there.insert(format!("had-{number}"), vec![IpNetwork::from(range)]);
            }
            for number in 0..new {
                there.insert(format!("new-{number}"), Vec::new());
            }
            let (assignments, exhausted) = plan(&there, &[range("10.0.0.0/20", 26)]);
            prop_assert!(exhausted.is_some() || assignments.len() == new);
            let mut all: Vec<IpNetwork> = there.values().flatten().copied().collect();
            for one in &assignments {
                for range in &one.ranges {
                    prop_assert!(all.iter().all(|other| !other.contains(range.network()) && !range.contains(other.network())));
                    all.push(*range);
                }
            }
        }
    }

    #[test]
    fn five_thousand_nodes_are_planned_at_once() {
        let there: BTreeMap<String, Vec<IpNetwork>> = (0..5000)
            .map(|number| (format!("node-{number}"), Vec::new()))
            .collect();
        let (assignments, exhausted) =
            plan(&there, &[range("10.0.0.0/8", 24), range("fd00::/40", 64)]);
        assert_eq!((assignments.len(), exhausted), (5000, None));
    }
}
