//! How much longer than its questions a client's answers may be: a server that anyone can have send long answers to a forged address is a
//! weapon. What is beyond that is answered as truncated, so that whoever really asked comes again by TCP, where nobody can pretend.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

/// Bytes per second by default: a thousand full answers of a headless Service, or seven thousand with a chain of aliases.
pub const BYTES_S: u32 = 1 << 20;
/// What may come at once, in seconds of the rate.
const BURST_S: u32 = 4;
/// A network (/24, /56) may have what so many clients may: forged addresses tend to be neighbours.
const CLIENTS_OF_NETWORK: u32 = 16;
/// Answers up to so many times the question are nobody's weapon.
const FREE_TIMES: usize = 2;

/// Places of the tables, and those that one client may be at.
const PLACES: usize = 4096;
const WAYS: usize = 4;

/// What each client and each network may still have. The tables have a fixed size; the least recently limited make room.
pub struct Rates {
    hasher: RandomState,
    begun: Instant,
    clients: Buckets,
    networks: Buckets,
}

struct Buckets {
    rate_s: u64,
    places: Box<[Bucket]>,
}

#[derive(Clone, Copy, Default)]
struct Bucket {
    key: u64,
    bytes: u32,
    at_ms: u32,
}

impl Rates {
    /// Limits to so many bytes per second and client; `None` where there is no limit.
    pub fn new(bytes_s: u32) -> Option<Self> {
        let buckets = |rate_s: u32| Buckets {
            rate_s: rate_s.into(),
            places: vec![Bucket::default(); PLACES].into(),
        };
        (bytes_s > 0).then(|| Self {
            hasher: RandomState::new(),
            begun: Instant::now(),
            clients: buckets(bytes_s),
            networks: buckets(bytes_s.saturating_mul(CLIENTS_OF_NETWORK)),
        })
    }

    /// Whether an answer may be sent to a client as it is.
    pub fn may(&mut self, client: IpAddr, question: usize, answer: usize, now: Instant) -> bool {
        let more = answer.saturating_sub(question * FREE_TIMES);
        // Nobody can forge what comes by the loopback.
        if more == 0 || client.is_loopback() {
            return true;
        }
        let now_ms = now.saturating_duration_since(self.begun).as_millis() as u32;
        let client = client.to_canonical();
        // Both pay only when both can.
        let keys = [client, network(client)].map(|address| self.hasher.hash_one(address) | 1);
        let own = self.clients.find(keys[0], now_ms);
        let all = self.networks.find(keys[1], now_ms);
        let (own, all) = (
            &mut self.clients.places[own],
            &mut self.networks.places[all],
        );
        let more = more as u32;
        let may = own.bytes >= more && all.bytes >= more;
        if may {
            own.bytes -= more;
            all.bytes -= more;
        }
        may
    }
}

fn network(client: IpAddr) -> IpAddr {
    match client {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() & !0xff).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 72 << 72).into(),
    }
}

impl Buckets {
    /// The place of a key, filled up to now. Who has none takes that of whoever has most left: nothing is forgotten with it.
    fn find(&mut self, key: u64, now_ms: u32) -> usize {
        let burst = (self.rate_s * u64::from(BURST_S)).min(u64::from(u32::MAX)) as u32;
        let first = (key >> 32) as usize % (PLACES / WAYS) * WAYS;
        let mut fullest = first;
        for at in first..first + WAYS {
            let place = &mut self.places[at];
            let since_ms = u64::from(now_ms.wrapping_sub(place.at_ms));
            let more = since_ms * self.rate_s / 1000;
            if place.key == 0 {
                place.bytes = burst;
            } else if more > 0 {
                place.bytes = u64::from(place.bytes)
                    .saturating_add(more)
                    .min(burst.into()) as u32;
                place.at_ms = now_ms;
            }
            if place.key == key {
                return at;
            }
            if self.places[at].bytes > self.places[fullest].bytes {
                fullest = at;
            }
        }
        self.places[fullest] = Bucket {
            key,
            bytes: burst,
            at_ms: now_ms,
        };
        fullest
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ASKED: usize = 50;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// Answers of 1050 bytes that a client gets in full.
    fn full(rates: &mut Rates, client: &str, asked: usize, now: Instant) -> usize {
        let client = ip(client);
        (0..asked)
            .filter(|_| rates.may(client, ASKED, 1000 + FREE_TIMES * ASKED, now))
            .count()
    }

    #[test]
    fn a_client_gets_its_burst_and_then_its_rate_and_others_do_not_feel_it() {
        let mut rates = Rates::new(100_000).expect("a limit");
        let start = Instant::now();
        assert_eq!(full(&mut rates, "10.0.0.1", 1000, start), 400);
        assert_eq!(
            full(&mut rates, "10.0.0.1", 1000, start + Duration::from_secs(1)),
            100
        );
        assert_eq!(
            full(&mut rates, "10.0.0.2", 10, start + Duration::from_secs(1)),
            10
        );
        assert_eq!(
            full(
                &mut rates,
                "10.0.0.1",
                1000,
                start + Duration::from_secs(3600)
            ),
            400
        );
    }

    #[test]
    fn short_answers_and_the_loopback_are_free() {
        let mut rates = Rates::new(1000).expect("a limit");
        let now = Instant::now();
        assert!((0..100_000).all(|_| rates.may(ip("10.0.0.1"), ASKED, FREE_TIMES * ASKED, now)));
        assert_eq!(full(&mut rates, "127.0.0.1", 1000, now), 1000);
        assert_eq!(full(&mut rates, "::1", 1000, now), 1000);
        assert!(Rates::new(0).is_none());
    }

    #[test]
    fn a_network_of_forged_addresses_is_limited_as_one() {
        let mut rates = Rates::new(100_000).expect("a limit");
        let now = Instant::now();
        let all: usize = (0..256)
            .map(|i| full(&mut rates, &format!("10.0.0.{i}"), 400, now))
            .sum();
        assert_eq!(all, 400 * CLIENTS_OF_NETWORK as usize);
        let v6: usize = (0..256)
            .map(|i| full(&mut rates, &format!("fd00:0:0:{i:x}::1"), 400, now))
            .sum();
        assert_eq!(v6, 400 * CLIENTS_OF_NETWORK as usize);
    }

    #[test]
    fn a_hundred_thousand_addresses_do_not_make_anyone_forget_who_is_limited() {
        let mut rates = Rates::new(100_000).expect("a limit");
        let now = Instant::now();
        assert_eq!(full(&mut rates, "10.0.0.1", 1000, now), 400);
        for i in 0..100_000_u32 {
            let address = Ipv4Addr::from_bits(0x0b00_0000 + i * 256);
            full(&mut rates, &address.to_string(), 1, now);
        }
        assert_eq!(full(&mut rates, "10.0.0.1", 1000, now), 0);
        assert_eq!(rates.clients.places.len(), PLACES);
    }
}
