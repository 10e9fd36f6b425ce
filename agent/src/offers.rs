//! What the DNS servers of this node have said of their answers: whether, and by what rules, others may answer in their place.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use cluster_model::share::{Offer, Rules};

/// For how long a server that has gone is spoken for: longer than it takes to be back, so that names are answered meanwhile.
const GRACE: Duration = Duration::from_secs(60);

/// By what, and in whose place, questions may be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    pub rules: Rules,
    /// The servers' own addresses, each once and in order.
    pub addresses: Vec<IpAddr>,
}

/// What each server has said. Part of the event loop's state.
#[derive(Debug, Default)]
pub struct Offers {
    said: BTreeMap<u64, Offer>,
    /// What the last one that left had said, and when it did.
    last: Option<(Offer, Instant)>,
}

impl Offers {
    /// A server says something, in place of what it has said before.
    pub fn say(&mut self, server: u64, offer: Offer) {
        self.said.insert(server, offer);
        self.last = None;
    }

    /// A server has gone.
    pub fn leave(&mut self, server: u64, now: Instant) {
        if let Some(offer) = self.said.remove(&server) {
            self.last = Some((offer, now));
        }
    }

    /// What holds now: servers that do not agree are not spoken for, since a Service may lead to each of them.
    pub fn terms(&self, now: Instant) -> Option<Terms> {
        let last = self
            .last
            .iter()
            .filter(|(_, left)| self.said.is_empty() && now.duration_since(*left) < GRACE)
            .map(|(offer, _)| offer);
        let mut agreed: Option<Terms> = None;
        for offer in self.said.values().chain(last) {
            let Offer::Answer { rules, addresses } = offer else {
                return None;
            };
            match &mut agreed {
                None => {
                    agreed = Some(Terms {
                        rules: rules.clone(),
                        addresses: addresses.clone(),
                    });
                }
                Some(terms) if terms.rules == *rules => terms.addresses.extend(addresses),
                Some(_) => return None,
            }
        }
        let mut terms = agreed?;
        terms.addresses.sort_unstable();
        terms.addresses.dedup();
        Some(terms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(ttl_s: u32, last: u8) -> Offer {
        Offer::Answer {
            rules: Rules {
                origins: vec!["cluster.local.".into()],
                ttl_s,
                udp_bytes_max: 1232,
                recursion: true,
                endpoint_pod_names: false,
            },
            addresses: vec![[10, 0, 0, last].into()],
        }
    }

    fn addresses(offers: &Offers, now: Instant) -> Option<Vec<IpAddr>> {
        offers.terms(now).map(|terms| terms.addresses)
    }

    #[test]
    fn servers_are_spoken_for_while_they_agree() {
        let (mut offers, now) = (Offers::default(), Instant::now());
        assert_eq!(offers.terms(now), None);
        offers.say(1, offer(5, 2));
        offers.say(2, offer(5, 1));
        let both = vec![[10, 0, 0, 1].into(), [10, 0, 0, 2].into()];
        assert_eq!(addresses(&offers, now), Some(both.clone()));
        offers.say(3, offer(6, 3));
        assert_eq!(offers.terms(now), None, "another time to live");
        offers.say(3, Offer::Refuse);
        assert_eq!(offers.terms(now), None, "one refuses");
        offers.leave(3, now);
        assert_eq!(addresses(&offers, now), Some(both));
    }

    #[test]
    fn a_server_that_has_gone_is_spoken_for_until_it_is_back_or_is_not() {
        let (mut offers, now) = (Offers::default(), Instant::now());
        offers.say(1, offer(5, 1));
        offers.leave(1, now);
        assert!(offers.terms(now + GRACE / 2).is_some());
        assert_eq!(offers.terms(now + GRACE), None);
        offers.say(2, Offer::Refuse);
        assert_eq!(
            offers.terms(now),
            None,
            "it is back, and has changed its mind"
        );
        offers.leave(2, now);
        assert_eq!(offers.terms(now), None);
        // One that never said anything leaves nothing.
        offers.say(4, offer(5, 4));
        offers.leave(3, now);
        assert!(offers.terms(now).is_some());
    }
}
