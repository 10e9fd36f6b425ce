//! Addresses out of ranges.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnetwork::IpNetwork;
use rand::RngExt;

/// IPv6 ranges that are larger give out nothing, as upstream's.
const PREFIX_V6_MIN: u8 = 64;

/// A free address of one of the ranges. The low end of a range is left to those who ask for an address by name (KEP-3070), as long
/// as any range has another one; before that, the first range with room gives.
pub fn pick(ranges: &[IpNetwork], taken: &dyn Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let find = |range: &IpNetwork, band: RangeInclusive<u128>| {
        if band.is_empty() {
            return None;
        }
        let (first, last) = band.into_inner();
        let start = rand::rng().random_range(first..=last);
        (start..=last)
            .chain(first..start)
            .filter_map(|n| nth(range, n))
            .find(|address| !taken(*address))
    };
    let mut upper = ranges.iter().map(|range| find(range, bands(range).upper));
    let upper = upper.find_map(|found| found);
    let mut lower = ranges.iter().map(|range| find(range, bands(range).lower));
    upper.or_else(|| lower.find_map(|found| found))
}

/// Whether a range is small enough to give anything out.
pub fn gives(range: &IpNetwork) -> bool {
    range.is_ipv4() || range.prefix() >= PREFIX_V6_MIN
}

/// Whether a range has an address to give, by itself or when asked: all but the range's own and, of IPv4, that of broadcasts.
pub fn has(range: &IpNetwork, address: IpAddr) -> bool {
    let is_broadcast = address.is_ipv4() && address == range.broadcast();
    range.contains(address) && address != range.network() && !is_broadcast
}

/// Places of a range: those that are left to whoever asks for them, and the rest.
struct Bands {
    lower: RangeInclusive<u128>,
    upper: RangeInclusive<u128>,
}

fn bands(range: &IpNetwork) -> Bands {
    let (size, last) = match range {
        IpNetwork::V4(range) => {
            let size = 1_u128 << (32 - u32::from(range.prefix()));
            (size, size.saturating_sub(2))
        }
        IpNetwork::V6(_) if !gives(range) => (0, 0),
        IpNetwork::V6(range) => {
            let size = 1_u128 << (128 - u32::from(range.prefix()));
            (size, size - 1)
        }
    };
    let reserved = match size {
        0..=16 => 0,
        size => (size / 16).clamp(16, 256),
    };
    Bands {
        lower: 1..=reserved,
        upper: 1 + reserved..=last,
    }
}

fn nth(range: &IpNetwork, n: u128) -> Option<IpAddr> {
    Some(match range {
        IpNetwork::V4(range) => {
            let n = u32::try_from(n).ok()?;
            Ipv4Addr::from(u32::from(range.network()).checked_add(n)?).into()
        }
        IpNetwork::V6(range) => Ipv6Addr::from(u128::from(range.network()).checked_add(n)?).into(),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn ranges(ranges: &[&str]) -> Vec<IpNetwork> {
        let parsed = ranges.iter().map(|range| range.parse().expect("a range"));
        parsed.collect()
    }

    #[test]
    fn addresses_are_of_the_range_and_its_low_end_comes_last() {
        for (range, low) in [
            ("10.96.0.0/16", "10.96.1.1"),
            ("fd00:10:96::/112", "fd00:10:96::101"),
            ("fd00::/64", "fd00::101"),
        ] {
            let ranges = ranges(&[range]);
            let low: IpAddr = low.parse().expect("an address");
            let mut taken = HashSet::new();
            for _ in 0..200 {
                let address = pick(&ranges, &|a| taken.contains(&a)).expect("room");
                assert!(
                    ranges[0].contains(address) && address >= low,
                    "{address} of {range}"
                );
                assert!(taken.insert(address), "{address} was given twice");
            }
        }
    }

    #[test]
    fn a_small_range_ends() {
        for (range, count) in [
            ("10.96.0.0/28", 14),
            ("10.96.0.0/27", 30),
            ("10.96.0.0/30", 2),
            ("10.96.0.0/31", 0),
            ("10.96.0.0/32", 0),
            ("fd00::/124", 15),
            ("fd00::/127", 1),
            ("fd00::/128", 0),
            ("fd00::/63", 0),
        ] {
            let ranges = ranges(&[range]);
            let mut taken = HashSet::new();
            while let Some(address) = pick(&ranges, &|a| taken.contains(&a)) {
                assert!(has(&ranges[0], address), "{address} of {range}");
                taken.insert(address);
            }
            assert_eq!(taken.len(), count, "{range}");
        }
    }

    #[test]
    fn the_next_range_gives_when_the_upper_band_of_the_one_before_is_full() {
        let ranges = ranges(&["10.96.0.0/27", "203.0.113.0/27"]);
        let mut given = Vec::new();
        while let Some(address) = pick(&ranges, &|a| given.contains(&a)) {
            given.push(address);
        }
        let octets = |address: &IpAddr| match address {
            IpAddr::V4(address) => (address.octets()[0], address.octets()[3]),
            IpAddr::V6(_) => unreachable!("IPv4 ranges"),
        };
        // 14 of the upper band of each, then 16 of the lower one of each.
        let order: Vec<(u8, bool)> = given
            .iter()
            .map(octets)
            .map(|(first, last)| (first, last > 16))
            .collect();
        let of = |count: usize, first, upper| vec![(first, upper); count];
        let expected = [
            of(14, 10, true),
            of(14, 203, true),
            of(16, 10, false),
            of(16, 203, false),
        ];
        assert_eq!(order, expected.concat());
    }

    #[test]
    fn what_a_range_is_called_by_is_nobodys() {
        let [v4, v6] = ["203.0.113.0/24", "fd00::/120"].map(|range| ranges(&[range])[0]);
        for (range, address, is_in) in [
            (&v4, "203.0.113.0", false),
            (&v4, "203.0.113.1", true),
            (&v4, "203.0.113.254", true),
            (&v4, "203.0.113.255", false),
            (&v4, "203.0.114.1", false),
            (&v6, "fd00::", false),
            (&v6, "fd00::1", true),
            (&v6, "fd00::ff", true),
        ] {
            let parsed = address.parse().expect("an address");
            assert_eq!(has(range, parsed), is_in, "{address} of {range}");
        }
    }
}
