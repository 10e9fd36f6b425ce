//! What is done when more comes to a socket than can be read: the kernel then drops whatever comes last, of everyone. Whoever sends most of
//! it is found, and most of what that client sends is kept from the queue for a second, so that the others are heard.

use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Batches that were full one after another before the socket is asked whether it dropped anything.
const FULL: u32 = 16;
/// Queries that are looked at to find who sends most.
const SAMPLE: usize = 1024;
/// Clients that are told apart among them.
const CLIENTS: usize = 64;
/// How long a client is held back, and how long it is remembered that it was.
const HELD: Duration = Duration::from_secs(1);
const REMEMBERED: Duration = Duration::from_secs(5);
/// How long ago another client may have asked: one that hears nothing tries again only after seconds.
const ACCOMPANIED: Duration = Duration::from_secs(15);
/// One of so many of its queries is let through at first, and of how many at the most.
const FIRST: u32 = 4;
const MOST: u32 = 256;

/// What the socket shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Let one of so many queries of this client through.
    Hold(IpAddr, u32),
    /// Let everyone through.
    Release,
}

/// What one thread has seen of its socket.
#[derive(Default)]
pub struct Crowd {
    full: u32,
    dropped: u32,
    sample: Option<Sample>,
    held: Option<(IpAddr, u32, Instant)>,
    holding: bool,
    /// The last client, and the last one before it that was another.
    last: Option<IpAddr>,
    other: Option<(IpAddr, Instant)>,
}

#[derive(Default)]
struct Sample {
    seen: usize,
    clients: Vec<(IpAddr, usize)>,
}

impl Crowd {
    /// Whether it is time to ask how many datagrams the socket has dropped since it was made, after a batch.
    pub fn wants_drops(&mut self, full: bool) -> bool {
        self.full = if full { self.full + 1 } else { 0 };
        self.full >= FULL && self.sample.is_none()
    }

    #[cfg(test)]
    fn is_looking(&self) -> bool {
        self.sample.is_some()
    }

    /// Takes note of the drops. Returns how many are new.
    pub fn drops(&mut self, dropped: u32) -> u32 {
        self.full = 0;
        let new = dropped.wrapping_sub(std::mem::replace(&mut self.dropped, dropped));
        if new > 0 {
            self.sample = Some(Sample::default());
        }
        new
    }

    /// Takes note of a client that asks. Returns an order once enough has been seen of a crowd.
    pub fn saw(&mut self, client: IpAddr, now: Instant) -> Option<Order> {
        if self.last != Some(client) {
            self.other = self.last.replace(client).map(|other| (other, now));
        }
        let sample = self.sample.as_mut()?;
        sample.seen += 1;
        let all = &mut sample.clients;
        if let Some((_, count)) = all.iter_mut().find(|(other, _)| *other == client) {
            *count += 1;
        } else if all.len() < CLIENTS {
            all.push((client, 1));
        }
        if sample.seen < SAMPLE {
            return None;
        }
        let sample = self.sample.take()?;
        let (most, count) = sample
            .clients
            .iter()
            .copied()
            .max_by_key(|(_, count)| *count)?;
        let other = |(client, at): (IpAddr, Instant)| client != most && now < at + ACCOMPANIED;
        let alone = sample.clients.len() < 2 && !self.other.is_some_and(other);
        // A client that is alone takes nothing from anyone; and where nobody stands out, everyone has to share.
        if alone || count * 2 < sample.seen {
            return None;
        }
        let again = self
            .held
            .filter(|(client, _, until)| *client == most && now < *until + REMEMBERED);
        let share = again.map_or(FIRST, |(_, share, _)| (share * 4).min(MOST));
        self.held = Some((most, share, now + HELD));
        self.holding = true;
        Some(Order::Hold(most, share))
    }

    /// The order to let go, when it is time.
    pub fn release(&mut self, now: Instant) -> Option<Order> {
        let over = self.holding && self.held.is_none_or(|(_, _, until)| now >= until);
        over.then(|| {
            self.holding = false;
            Order::Release
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOG: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    fn other(i: usize) -> IpAddr {
        IpAddr::from([10, 0, 1, i as u8])
    }

    fn crowded(crowd: &mut Crowd, dropped: u32) {
        let asked = (0..FULL).filter(|_| crowd.wants_drops(true)).count();
        assert_eq!(asked, 1);
        assert!(crowd.drops(dropped) > 0 && crowd.is_looking());
    }

    fn look(crowd: &mut Crowd, client: impl Fn(usize) -> IpAddr, now: Instant) -> Option<Order> {
        (0..SAMPLE).find_map(|i| crowd.saw(client(i), now))
    }

    #[test]
    fn who_sends_most_is_held_back_for_a_second_and_more_so_when_it_goes_on() {
        let mut crowd = Crowd::default();
        let now = Instant::now();
        let mostly = |i: usize| {
            if i.is_multiple_of(10) {
                other(i % 7)
            } else {
                HOG
            }
        };
        crowded(&mut crowd, 5);
        assert_eq!(look(&mut crowd, mostly, now), Some(Order::Hold(HOG, FIRST)));
        assert_eq!(crowd.release(now), None);
        crowded(&mut crowd, 9);
        let later = now + Duration::from_millis(500);
        assert_eq!(
            look(&mut crowd, mostly, later),
            Some(Order::Hold(HOG, FIRST * 4))
        );
        assert_eq!(crowd.release(now + HELD), None);
        assert_eq!(crowd.release(later + HELD), Some(Order::Release));
        assert_eq!(crowd.release(later + HELD), None);
        crowded(&mut crowd, 10);
        let much_later = now + HELD * 60;
        assert_eq!(
            look(&mut crowd, mostly, much_later),
            Some(Order::Hold(HOG, FIRST))
        );
    }

    #[test]
    fn a_client_whose_queries_are_lost_counts_as_company_for_a_while() {
        let mut crowd = Crowd::default();
        let now = Instant::now();
        assert_eq!(crowd.saw(other(1), now), None);
        assert_eq!(crowd.saw(HOG, now), None);
        crowded(&mut crowd, 1);
        let held = look(&mut crowd, |_| HOG, now + Duration::from_secs(5));
        assert_eq!(held, Some(Order::Hold(HOG, FIRST)));
        crowded(&mut crowd, 2);
        assert_eq!(look(&mut crowd, |_| HOG, now + ACCOMPANIED), None);
    }

    #[test]
    fn nobody_is_held_back_who_is_alone_or_one_of_many_or_where_nothing_is_lost() {
        let mut crowd = Crowd::default();
        let now = Instant::now();
        crowded(&mut crowd, 1);
        assert_eq!(look(&mut crowd, |_| HOG, now), None);
        crowded(&mut crowd, 2);
        assert_eq!(look(&mut crowd, |i| other(i % 200), now), None);
        assert!((0..100).all(|i| !crowd.wants_drops(i % 15 != 0)));
        assert!((0..FULL).any(|_| crowd.wants_drops(true)));
        assert_eq!(crowd.drops(2), 0);
        assert!(!crowd.is_looking());
    }
}
