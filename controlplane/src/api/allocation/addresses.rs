//! Addresses out of a range.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use rand::RngExt;

/// A free address of the range. The low end is left to those who ask for an address by name (KEP-3070), until nothing else
/// is left. The first address is the API server's own; the last of an IPv4 range is for broadcasts.
pub fn pick(range: &IpNetwork, taken: &dyn Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let nth = |n: u128| match range {
        IpNetwork::V4(range) => {
            let n = u32::try_from(n).ok()?;
            Some(Ipv4Addr::from(u32::from(range.network()).checked_add(n)?).into())
        }
        IpNetwork::V6(range) => {
            Some(Ipv6Addr::from(u128::from(range.network()).checked_add(n)?).into())
        }
    };
    let size = size(range);
    let last = match range {
        IpNetwork::V4(_) => size.saturating_sub(1),
        IpNetwork::V6(_) => size,
    };
    let reserved = (size / 16).clamp(16, 256).min(size / 2).max(2);
    let find = |from: u128, to: u128| {
        if from >= to {
            return None;
        }
        let start = rand::rng().random_range(from..to);
        (start..to)
            .chain(from..start)
            .filter_map(nth)
            .find(|address| !taken(*address))
    };
    find(reserved, last).or_else(|| find(2, reserved.min(last)))
}

/// How many addresses are given out of a range; more than 2^64 are never looked at.
fn size(range: &IpNetwork) -> u128 {
    match range {
        IpNetwork::V4(range) => 1 << (32 - u32::from(range.prefix())),
        IpNetwork::V6(range) => 1 << (128 - u32::from(range.prefix())).min(64),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn addresses_are_of_the_range_and_its_low_end_comes_last() {
        for (range, low) in [
            ("10.96.0.0/16", "10.96.1.0"),
            ("fd00:10:96::/112", "fd00:10:96::100"),
            ("fd00::/64", "fd00::100"),
        ] {
            let range: IpNetwork = range.parse().expect("a range");
            let low: IpAddr = low.parse().expect("an address");
            let mut taken = HashSet::new();
            for _ in 0..200 {
                let address = pick(&range, &|a| taken.contains(&a)).expect("room");
                assert!(
                    range.contains(address) && address >= low,
                    "{address} of {range}"
                );
                assert!(taken.insert(address), "{address} was given twice");
            }
        }
    }

    #[test]
    fn a_small_range_ends() {
        for (range, count) in [("10.96.0.0/28", 13), ("fd00::/124", 14)] {
            let range: IpNetwork = range.parse().expect("a range");
            let mut taken = HashSet::new();
            while let Some(address) = pick(&range, &|a| taken.contains(&a)) {
                taken.insert(address);
            }
            assert_eq!(taken.len(), count, "{range}: from .2 on");
        }
    }
}
