//! Who lives on the link. Pure: time is given.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::frame::Beat;

/// Between two signs of life.
pub const BEAT_EVERY: Duration = Duration::from_millis(250);
/// A node that has been silent for so long is dead: three beats may be lost.
pub const DEAD_AFTER: Duration = Duration::from_millis(1000);
/// Nodes that are remembered: more than a link has; beyond them whoever writes beats is up to no good.
const NODES_MAX: usize = 10_000;

/// The nodes that have been heard.
#[derive(Debug)]
pub struct Beats {
    own: Arc<str>,
    /// What was said before this is not known: nobody is declared dead, and nothing announced, until others had time to be heard.
    listening_since: Instant,
    heard: BTreeMap<Arc<str>, Instant>,
    /// The addresses of each Node of the cluster, by which strangers are told apart.
    known: BTreeMap<Arc<str>, Vec<IpAddr>>,
}

impl Beats {
    pub fn new(own: Arc<str>, now: Instant) -> Self {
        Self {
            own,
            listening_since: now,
            heard: BTreeMap::new(),
            known: BTreeMap::new(),
        }
    }

    /// The cluster's Nodes with their addresses.
    pub fn set_known(&mut self, known: BTreeMap<Arc<str>, Vec<IpAddr>>) {
        self.heard.retain(|node, _| known.contains_key(node));
        self.known = known;
    }

    /// Somebody gave a sign of life.
    pub fn hear(&mut self, beat: &Beat, now: Instant) {
        let node: Arc<str> = beat.node.as_str().into();
        let is_ours = self
            .known
            .get(&node)
            .is_some_and(|addresses| addresses.contains(&beat.address));
        if !is_ours || node == self.own {
            return;
        }
        if beat.leaving {
            self.heard.remove(&node);
        } else if self.heard.len() < NODES_MAX || self.heard.contains_key(&node) {
            self.heard.insert(node, now);
        }
    }

    /// Who lives, this node included; None until others had time to be heard.
    pub fn live(&mut self, now: Instant) -> Option<BTreeSet<Arc<str>>> {
        if now.saturating_duration_since(self.listening_since) < DEAD_AFTER {
            return None;
        }
        self.heard
            .retain(|_, last| now.saturating_duration_since(*last) < DEAD_AFTER);
        let others = self.heard.keys().cloned();
        Some(others.chain([self.own.clone()]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(node: &str, last: u8) -> Beat {
        Beat {
            node: node.into(),
            address: [198, 18, 0, last].into(),
            leaving: false,
        }
    }

    fn names(live: Option<BTreeSet<Arc<str>>>) -> Vec<String> {
        let live = live.expect("others had time");
        live.iter().map(ToString::to_string).collect()
    }

    fn beats(now: Instant) -> Beats {
        let mut beats = Beats::new("a".into(), now);
        let known = [("a", 1), ("b", 2), ("c", 3)];
        beats.set_known(
            known
                .into_iter()
                .map(|(node, last)| (node.into(), vec![[198, 18, 0, last].into()]))
                .collect(),
        );
        beats
    }

    #[test]
    fn who_is_silent_is_dead_after_a_second_and_lives_again_with_its_next_beat() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut beats = beats(start);
        assert_eq!(
            beats.live(at(999)),
            None,
            "others may not have been heard yet"
        );
        beats.hear(&beat("b", 2), at(900));
        beats.hear(&beat("c", 3), at(1500));
        assert_eq!(names(beats.live(at(1800))), ["a", "b", "c"]);
        assert_eq!(names(beats.live(at(1900))), ["a", "c"]);
        beats.hear(&beat("b", 2), at(2000));
        assert_eq!(names(beats.live(at(2000))), ["a", "b", "c"]);
    }

    #[test]
    fn who_leaves_is_gone_at_once_and_strangers_are_not_heard() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut beats = beats(start);
        beats.hear(&beat("b", 2), at(1500));
        // Another cluster's node of the same name, and one that is no Node.
        beats.hear(&beat("c", 99), at(1500));
        beats.hear(&beat("d", 4), at(1500));
        assert_eq!(names(beats.live(at(1500))), ["a", "b"]);
        let leaving = Beat {
            leaving: true,
            ..beat("b", 2)
        };
        beats.hear(&leaving, at(1500));
        assert_eq!(names(beats.live(at(1500))), ["a"]);
    }
}
