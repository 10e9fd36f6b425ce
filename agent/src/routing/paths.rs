//! What probes have found out of each way: pure, driven by a clock that the caller has.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use crate::addresses::Reserved;
use crate::plan::{PathKey, Probed};

/// How often is asked, and when an answer counts as missing.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// While it is not known whether a way is direct, at first.
    pub eager: Duration,
    /// So many eager questions.
    pub eager_count: u32,
    /// From then on, and once it is known.
    pub steady: Duration,
    /// Longest wait for an answer.
    pub patience: Duration,
    /// So many missing answers in a row, and a direct way is not one any more.
    pub missing_max: u32,
    /// Questions per second to all nodes together at most, in the long run.
    pub rate_max: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            eager: Duration::from_millis(250),
            eager_count: 40,
            steady: Duration::from_secs(5),
            patience: Duration::from_millis(1000),
            missing_max: 3,
            rate_max: 200,
        }
    }
}

/// A question to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    pub from: IpAddr,
    pub to: IpAddr,
    pub number: u64,
    /// It must not go by the overlay.
    pub direct: bool,
}

/// An answer that came, or did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub from: IpAddr,
    pub number: u64,
}

/// What is known of one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    here: Reserved,
    there: Reserved,
    direct: Option<IpAddr>,
    /// Pod addresses have passed both ways without the overlay.
    pub proven: bool,
    /// Round trip by the way in use.
    pub latency_us: Option<u64>,
    /// By the way in use.
    pub unanswered: u32,
    missing: u32,
    asked: u32,
    next: Duration,
}

/// All ways. Times are since a moment of the caller's choice.
#[derive(Debug, Default)]
pub struct Paths {
    settings: Settings,
    paths: BTreeMap<PathKey, Path>,
    /// Questions without an answer yet, by their number: which way, when, and whether it was a probe of the direct way.
    open: BTreeMap<u64, (PathKey, Duration, bool)>,
    number: u64,
}

impl Paths {
    /// `seed` makes the numbers of questions unlike those of anyone else.
    pub fn new(settings: Settings, seed: u64) -> Self {
        Self {
            settings,
            number: seed,
            ..Self::default()
        }
    }

    pub fn get(&self) -> &BTreeMap<PathKey, Path> {
        &self.paths
    }

    pub fn proven(&self) -> BTreeSet<PathKey> {
        let proven = self.paths.iter().filter(|(_, path)| path.proven);
        proven.map(|(key, _)| key.clone()).collect()
    }

    /// Takes the ways that there are now. What is known of one that stays as it was is kept; one whose addresses changed begins anew.
    pub fn follow(&mut self, probed: &BTreeMap<PathKey, Probed>, now: Duration) {
        self.paths.retain(|key, path| {
            probed.get(key).is_some_and(|probed| {
                (probed.here, probed.there, probed.node) == (path.here, path.there, path.direct)
            })
        });
        for (key, probed) in probed {
            self.paths.entry(key.clone()).or_insert(Path {
                here: probed.here,
                there: probed.there,
                direct: probed.node,
                proven: false,
                latency_us: None,
                unanswered: 0,
                missing: 0,
                asked: 0,
                next: now,
            });
        }
        let paths = &self.paths;
        self.open.retain(|_, (key, ..)| paths.contains_key(key));
    }

    /// When something is due next.
    pub fn due(&self) -> Option<Duration> {
        let next = self.paths.values().map(|path| path.next);
        let patience = self.settings.patience;
        next.chain(self.open.values().map(|(_, sent, _)| *sent + patience))
            .min()
    }

    /// The questions that are due. Answers that are missing by now count; `true` when a way is not direct any more.
    pub fn ask(&mut self, now: Duration) -> (Vec<Question>, bool) {
        let changed = self.count_missing(now);
        let settings = self.settings;
        // Two questions each time; so many nodes are asked less often that the rate holds.
        let spread = Duration::from_secs_f64(
            (2 * self.paths.len()) as f64 / f64::from(settings.rate_max.max(1)),
        );
        let mut questions = Vec::new();
        for (key, path) in &mut self.paths {
            if path.next > now {
                continue;
            }
            let eager = !path.proven && path.direct.is_some() && path.asked < settings.eager_count;
            let pause = if eager {
                settings.eager
            } else {
                settings.steady
            };
            path.next = now + pause.max(spread);
            path.asked = path.asked.saturating_add(1);
            let ways = [
                (path.here.host, path.there.host, false),
                (path.here.probe, path.there.probe, true),
            ];
            let count = if path.direct.is_some() { 2 } else { 1 };
            for (from, to, probe) in ways.into_iter().take(count) {
                self.number = self.number.wrapping_add(0x9e37_79b9_7f4a_7c15);
                self.open.insert(self.number, (key.clone(), now, probe));
                questions.push(Question {
                    from,
                    to,
                    number: self.number,
                    direct: probe,
                });
            }
        }
        (questions, changed)
    }

    fn count_missing(&mut self, now: Duration) -> bool {
        let (patience, missing_max) = (self.settings.patience, self.settings.missing_max);
        let late: Vec<u64> = self
            .open
            .iter()
            .filter(|(_, (_, sent, _))| *sent + patience <= now)
            .map(|(number, _)| *number)
            .collect();
        let mut changed = false;
        for number in late {
            let Some((key, _, probe)) = self.open.remove(&number) else {
                continue;
            };
            let Some(path) = self.paths.get_mut(&key) else {
                continue;
            };
            if probe {
                path.missing = path.missing.saturating_add(1);
                if path.proven && path.missing >= missing_max {
                    path.proven = false;
                    path.asked = 0;
                    path.next = now;
                    changed = true;
                }
                if path.missing < missing_max && path.proven {
                    // Doubt is settled soon.
                    path.next = path.next.min(now);
                }
            } else {
                path.unanswered = path.unanswered.saturating_add(1);
                path.latency_us = None;
            }
        }
        changed
    }

    /// An answer came: `true` when a way has turned out to be direct by it.
    pub fn answered(&mut self, answer: Answer, now: Duration) -> bool {
        let Some((key, sent, probe)) = self.open.get(&answer.number).cloned() else {
            return false;
        };
        let Some(path) = self.paths.get_mut(&key) else {
            return false;
        };
        // Who was not asked cannot answer.
        let asked = if probe {
            path.there.probe
        } else {
            path.there.host
        };
        if answer.from != asked {
            return false;
        }
        self.open.remove(&answer.number);
        if probe {
            path.missing = 0;
            !std::mem::replace(&mut path.proven, true)
        } else {
            path.unanswered = 0;
            path.latency_us = Some(
                now.saturating_sub(sent)
                    .as_micros()
                    .try_into()
                    .unwrap_or(u64::MAX),
            );
            false
        }
    }
}
