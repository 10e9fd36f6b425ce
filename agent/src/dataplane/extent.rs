//! Where service ports' backends lie in BACKENDS: a buddy allocator of cells, which lets freed extents rest before it gives them out again.

use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, Instant},
};

/// How long an extent rests after its service left it. A program that still reads it started before that, and programs run for
/// microseconds; the rest is for a CPU that was held up by its hypervisor.
pub const GRACE: Duration = Duration::from_secs(1);
/// How long one rests at least when nothing else is free: a Service of many thousand endpoints that changes all the time leaves more
/// behind in a second than there is room for.
pub const LEAST_GRACE: Duration = Duration::from_millis(20);

/// A run of `1 << order` cells, aligned to its size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Extent {
    pub start: u32,
    pub order: u8,
}

impl Extent {
    /// The order of an extent for this many backends and a header.
    pub fn order_for(backends: u32) -> u8 {
        (backends + 1).next_power_of_two().trailing_zeros() as u8
    }

    /// The first cell after it.
    pub fn end(self) -> u32 {
        self.start + (1 << self.order)
    }

    fn buddy(self) -> Extent {
        Extent {
            start: self.start ^ 1 << self.order,
            ..self
        }
    }

    fn contains(self, other: Extent) -> bool {
        other.order <= self.order && other.start >> self.order == self.start >> self.order
    }
}

/// Free and resting cells of `1 << order` in all.
#[derive(Debug)]
pub struct Extents {
    /// Free extents by order.
    free: Vec<BTreeSet<u32>>,
    /// Since when, oldest first.
    resting: VecDeque<(Instant, Extent)>,
}

impl Extents {
    /// All of `1 << order` cells free but the first, which is never given out: an index of 0 means nothing.
    pub fn new(order: u8) -> Self {
        let mut free = vec![BTreeSet::new(); order as usize + 1];
        free[order as usize].insert(0);
        let mut extents = Self {
            free,
            resting: VecDeque::new(),
        };
        extents.reserve(Extent { start: 0, order: 0 });
        extents
    }

    /// A free extent of the order, the lowest of the smallest that will do.
    pub fn allocate(&mut self, order: u8, now: Instant) -> Option<Extent> {
        while self.release_oldest(GRACE, now) {}
        loop {
            if let Some(extent) = self.take(order) {
                return Some(extent);
            }
            if !self.release_oldest(LEAST_GRACE, now) {
                return None;
            }
        }
    }

    /// Frees the extent that has rested longest, if that is long enough.
    fn release_oldest(&mut self, grace: Duration, now: Instant) -> bool {
        let rested = self
            .resting
            .pop_front_if(|(since, _)| now.saturating_duration_since(*since) >= grace);
        let is_rested = rested.is_some();
        if let Some((_, extent)) = rested {
            self.release(extent);
        }
        is_rested
    }

    fn take(&mut self, order: u8) -> Option<Extent> {
        let found = (order as usize..self.free.len()).find(|at| !self.free[*at].is_empty())?;
        let extent = Extent {
            start: *self.free[found].first()?,
            order: found as u8,
        };
        self.free[found].remove(&extent.start);
        Some(self.split(
            extent,
            Extent {
                start: extent.start,
                order,
            },
        ))
    }

    /// Takes an extent that is in use already. False when some of it is taken.
    pub fn reserve(&mut self, wanted: Extent) -> bool {
        for order in wanted.order as usize..self.free.len() {
            let around = Extent {
                start: wanted.start >> order << order,
                order: order as u8,
            };
            if self.free[order].remove(&around.start) {
                self.split(around, wanted);
                return true;
            }
        }
        false
    }

    /// Cuts `whole` down to `wanted`, which lies in it, and frees the rest.
    fn split(&mut self, mut whole: Extent, wanted: Extent) -> Extent {
        while whole.order > wanted.order {
            let lower = Extent {
                start: whole.start,
                order: whole.order - 1,
            };
            whole = if lower.contains(wanted) {
                lower
            } else {
                lower.buddy()
            };
            self.free[whole.order as usize].insert(whole.buddy().start);
        }
        whole
    }

    /// Lets an extent that nothing refers to any more rest, then be free.
    pub fn retire(&mut self, extent: Extent, now: Instant) {
        self.resting.push_back((now, extent));
    }

    fn release(&mut self, mut extent: Extent) {
        while (extent.order as usize) < self.free.len() - 1
            && self.free[extent.order as usize].remove(&extent.buddy().start)
        {
            extent = Extent {
                start: extent.start & extent.buddy().start,
                order: extent.order + 1,
            };
        }
        self.free[extent.order as usize].insert(extent.start);
    }

    /// Cells that are free or resting.
    pub fn available(&self) -> u32 {
        let free: usize = self
            .free
            .iter()
            .enumerate()
            .map(|(order, starts)| starts.len() << order)
            .sum();
        let resting: u32 = self
            .resting
            .iter()
            .map(|(_, extent)| 1 << extent.order)
            .sum();
        free as u32 + resting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_has_room_for_its_header_and_backends() {
        for (backends, order) in [
            (0, 0),
            (1, 1),
            (2, 2),
            (3, 2),
            (4, 3),
            (7, 3),
            (8, 4),
            (4095, 12),
            (16_383, 14),
        ] {
            assert_eq!(Extent::order_for(backends), order, "{backends} backends");
        }
    }

    #[test]
    fn extents_in_use_never_overlap_and_none_is_the_first_cell() {
        let (mut extents, now) = (Extents::new(6), Instant::now());
        let mut used = BTreeSet::new();
        for order in [0, 3, 1, 2, 0, 4, 0, 3] {
            let extent = extents.allocate(order, now).unwrap();
            for cell in extent.start..extent.end() {
                assert!(cell != 0 && used.insert(cell), "cell {cell} twice");
            }
        }
        assert!(extents.allocate(6, now).is_none());
    }

    #[test]
    fn a_retired_extent_rests_before_it_is_used_again_and_merges_with_its_neighbours() {
        let (mut extents, now) = (Extents::new(4), Instant::now());
        let whole = extents.allocate(3, now).unwrap();
        let halves = [2, 2].map(|order| extents.allocate(order, now));
        assert!(
            halves[1].is_none(),
            "cells 1 to 7 have one aligned run of four"
        );
        extents.retire(whole, now);
        extents.retire(halves[0].unwrap(), now);
        assert!(extents.allocate(3, now + LEAST_GRACE / 2).is_none());
        assert_eq!(extents.allocate(3, now + GRACE), Some(whole));
    }

    #[test]
    fn where_nothing_else_is_free_what_rests_is_used_again_sooner_and_the_oldest_first() {
        let (mut extents, mut now) = (Extents::new(4), Instant::now());
        let mut used = extents.allocate(2, now).unwrap();
        for _ in 0..100 {
            now += LEAST_GRACE;
            let next = extents.allocate(2, now).unwrap();
            extents.retire(used, now);
            used = next;
        }
        // One of order 2 is in use, of which there are three: there is another, as long as nothing has to rest for all of the time.
        let (oldest, newest) = (extents.allocate(2, now).unwrap(), extents.allocate(2, now));
        assert!(newest.is_none(), "what has just begun to rest");
        extents.retire(oldest, now);
        assert!(extents.allocate(2, now + LEAST_GRACE).is_some());
    }

    #[test]
    fn everything_given_back_is_there_again() {
        let (mut extents, mut now) = (Extents::new(8), Instant::now());
        let all = extents.available();
        for _ in 0..20 {
            let taken: Vec<Extent> = [3, 0, 5, 1, 2]
                .iter()
                .map(|order| extents.allocate(*order, now).unwrap())
                .collect();
            taken
                .into_iter()
                .for_each(|extent| extents.retire(extent, now));
            now += GRACE;
        }
        assert_eq!(extents.available(), all);
        assert!(extents.allocate(7, now).is_some());
    }

    #[test]
    fn what_is_in_use_can_be_reserved_once() {
        let mut extents = Extents::new(6);
        assert!(extents.reserve(Extent {
            start: 16,
            order: 3
        }));
        assert!(!extents.reserve(Extent {
            start: 16,
            order: 3
        }));
        assert!(!extents.reserve(Extent {
            start: 20,
            order: 1
        }));
        assert!(extents.reserve(Extent {
            start: 24,
            order: 3
        }));
        assert!(!extents.reserve(Extent { start: 0, order: 0 }));
    }
}
