//! What clients asked and were told, held against the order in which writes happened: is there one order of all operations that agrees
//! with every answer and with time (Herlihy and Wing, "Linearizability", 1990)?
//!
//! Writes have revisions, so their order is given, and the search that the general question needs is not. Every operation gets the
//! earliest position in that order which its answer allows and which is not before one that had been answered when it was asked; an
//! earlier position never makes a later operation impossible, so when this fails, every order fails.

use std::collections::{BTreeMap, BTreeSet, HashMap};

pub type Key = u16;
pub type Revision = u64;
/// Names a write: what was written holds it.
pub type Id = u64;
/// When no answer came.
pub const NEVER: u64 = u64::MAX;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    Read,
    List,
    Create(Id),
    /// Replaces what is at this revision.
    Update(Revision, Id),
    /// Deletes what is at this revision.
    Delete(Revision),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    Found(Revision, Id),
    Absent,
    Listed(Revision, Vec<(Key, Revision)>),
    Written(Revision),
    Deleted,
    Exists,
    Conflict,
    /// No answer, or one that does not say whether it happened.
    Unknown,
}

#[derive(Clone, Debug)]
pub struct Operation {
    pub key: Key,
    pub ask: Ask,
    pub said: Said,
    /// Nanoseconds of one clock.
    pub asked_ns: u64,
    pub answered_ns: u64,
}

/// A write that a watch has told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub revision: Revision,
    pub key: Key,
    /// None: it was deleted.
    pub id: Option<Id>,
}

/// What was watched while one process served: all writes after `from`, as far as the watch came. Then it was killed, and what was
/// found after it is `state`, at `until`.
#[derive(Clone, Debug, Default)]
pub struct Epoch {
    pub from: Revision,
    pub events: Vec<Event>,
    pub until: Revision,
    pub state: BTreeMap<Key, (Revision, Id)>,
}

/// What a key held from some position on. Where nobody saw the moment, it is one of several.
#[derive(Clone, Debug)]
struct Version {
    earliest: Revision,
    latest: Revision,
    /// Revision and name of what is there; None when nothing is.
    holds: Option<(Revision, Id)>,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub operations: usize,
    pub answered_writes: usize,
    pub unanswered_writes: usize,
    pub unanswered_that_happened: usize,
    pub revisions: usize,
}

/// Whether the history is linearizable; else one operation that no order has a place for.
pub fn check(operations: &[Operation], epochs: &[Epoch]) -> Result<Summary, String> {
    let mut order = Order::build(operations, epochs)?;
    order.check_conditions(operations)?;
    order.place(operations)
}

struct Order {
    versions: HashMap<Key, Vec<Version>>,
    /// Revision at which each write happened that is known to have.
    written: HashMap<Id, Revision>,
    /// Keys with writes of which nobody knows whether they happened, and when each was asked.
    doubtful: HashMap<Key, Vec<u64>>,
    summary: Summary,
}

impl Order {
    fn build(operations: &[Operation], epochs: &[Epoch]) -> Result<Self, String> {
        let mut asked: HashMap<Id, &Operation> = HashMap::new();
        for operation in operations {
            if let Ask::Create(id) | Ask::Update(_, id) = operation.ask {
                asked.insert(id, operation);
            }
        }
        let mut writes: BTreeMap<Revision, (Key, Id)> = BTreeMap::new();
        let mut answered: BTreeMap<Revision, (Key, Id)> = BTreeMap::new();
        for operation in operations {
            let (Ask::Create(id) | Ask::Update(_, id), Said::Written(revision)) =
                (&operation.ask, &operation.said)
            else {
                continue;
            };
            if let Some((_, other)) = answered.insert(*revision, (operation.key, *id)) {
                return Err(format!(
                    "revision {revision} was given to writes {other} and {id}"
                ));
            }
        }
        let mut gone: Vec<(Key, Revision, Revision)> = Vec::new();
        let (mut last, mut state) = (0, BTreeMap::<Key, (Revision, Id)>::new());
        for epoch in epochs {
            if epoch.from < last {
                return Err(format!(
                    "the store went back from revision {last} to {}",
                    epoch.from
                ));
            }
            last = epoch.from;
            for event in &epoch.events {
                if event.revision <= last {
                    return Err(format!("a watch told of {event:?} after revision {last}"));
                }
                last = event.revision;
                match event.id {
                    Some(id) => {
                        writes.insert(event.revision, (event.key, id));
                        state.insert(event.key, (event.revision, id));
                    }
                    None => {
                        if state.remove(&event.key).is_none() {
                            return Err(format!(
                                "a watch told of {event:?}, and nothing was there"
                            ));
                        }
                        gone.push((event.key, event.revision, event.revision));
                    }
                }
            }
            // What a watch that was open all the time has not told of was not written.
            for (revision, (key, id)) in answered.range(epoch.from + 1..=last) {
                if writes.get(revision) != Some(&(*key, *id)) {
                    return Err(format!(
                        "write {id} of {key}, answered with {revision}, was in no watch"
                    ));
                }
            }
            if epoch.until < last {
                return Err(format!(
                    "after revision {last} the newest is {}",
                    epoch.until
                ));
            }
            // The end of an epoch, which nobody watched: what was answered then, and what was found afterwards.
            let unseen = last + 1..epoch.until + 1;
            let mut found: BTreeMap<Revision, (Key, Id)> = answered
                .range(unseen.clone())
                .map(|(revision, write)| (*revision, *write))
                .collect();
            for (key, (revision, id)) in &epoch.state {
                if unseen.contains(revision) {
                    if found
                        .insert(*revision, (*key, *id))
                        .is_some_and(|other| other != (*key, *id))
                    {
                        return Err(format!("revision {revision} is of two writes"));
                    }
                } else if writes.get(revision) != Some(&(*key, *id)) {
                    return Err(format!(
                        "{key} is found at {revision}, which nobody saw written"
                    ));
                }
            }
            for (revision, (key, id)) in found {
                let creates = asked
                    .get(&id)
                    .is_some_and(|o| matches!(o.ask, Ask::Create(_)));
                if creates && let Some((before, _)) = state.get(&key) {
                    gone.push((key, (last + 1).max(before + 1), revision - 1));
                }
                writes.insert(revision, (key, id));
                state.insert(key, (revision, id));
            }
            for (key, (revision, id)) in state.clone() {
                match epoch.state.get(&key) {
                    Some(now) if *now == (revision, id) => {}
                    None => {
                        gone.push((key, (last + 1).max(revision + 1), epoch.until));
                        state.remove(&key);
                    }
                    Some(now) => {
                        return Err(format!(
                            "{key} was written as {id} at {revision}, and is {now:?} after that: the write is lost"
                        ));
                    }
                }
            }
            if let Some(key) = epoch.state.keys().find(|key| !state.contains_key(key)) {
                return Err(format!("{key} is there, and nobody wrote it"));
            }
            last = epoch.until;
        }
        if let Some((revision, (key, id))) = answered.range(last + 1..).next() {
            return Err(format!(
                "write {id} of {key}, answered with {revision}, is beyond the end, {last}"
            ));
        }
        for (revision, write) in &answered {
            if writes.get(revision) != Some(write) {
                return Err(format!("{write:?}, answered with {revision}, is lost"));
            }
        }
        let mut versions: HashMap<Key, Vec<Version>> = HashMap::new();
        let mut written = HashMap::new();
        for (revision, (key, id)) in &writes {
            let Some(operation) = asked.get(id).filter(|operation| operation.key == *key) else {
                return Err(format!(
                    "{key} was written as {id} at {revision}, which nobody asked for"
                ));
            };
            if let Some(other) = written.insert(*id, *revision) {
                return Err(format!(
                    "{:?} happened twice, at {other} and {revision}",
                    operation.ask
                ));
            }
            versions.entry(*key).or_default().push(Version {
                earliest: *revision,
                latest: *revision,
                holds: Some((*revision, *id)),
            });
        }
        for (key, earliest, latest) in gone {
            if latest < earliest {
                return Err(format!(
                    "{key} was deleted between {earliest} and {latest}, where there is no room"
                ));
            }
            versions.entry(key).or_default().push(Version {
                earliest,
                latest,
                holds: None,
            });
        }
        for of_key in versions.values_mut() {
            of_key.sort_by_key(|version| (version.latest, version.earliest));
        }
        let mut doubtful: HashMap<Key, Vec<u64>> = HashMap::new();
        let mut summary = Summary {
            operations: operations.len(),
            answered_writes: answered.len(),
            revisions: writes.len(),
            ..Summary::default()
        };
        for operation in operations.iter().filter(|o| o.said == Said::Unknown) {
            match operation.ask {
                Ask::Create(id) | Ask::Update(_, id) if written.contains_key(&id) => {
                    summary.unanswered_writes += 1;
                    summary.unanswered_that_happened += 1;
                }
                Ask::Create(_) | Ask::Update(..) | Ask::Delete(_) => {
                    summary.unanswered_writes += 1;
                    let of_key = doubtful.entry(operation.key).or_default();
                    of_key.push(operation.asked_ns);
                }
                Ask::Read | Ask::List => {}
            }
        }
        Ok(Self {
            versions,
            written,
            doubtful,
            summary,
        })
    }

    /// The version of a key before the one that begins at `revision`.
    fn before(&self, key: Key, revision: Revision) -> Option<(Revision, Id)> {
        let of_key = self.versions.get(&key)?;
        let at = of_key
            .iter()
            .position(|version| version.holds.is_some_and(|(own, _)| own == revision))?;
        of_key.get(at.checked_sub(1)?)?.holds
    }

    /// Every write that happened was allowed to by what was there before it.
    fn check_conditions(&self, operations: &[Operation]) -> Result<(), String> {
        for operation in operations {
            let (expected, id) = match operation.ask {
                Ask::Create(id) => (None, id),
                Ask::Update(revision, id) => (Some(revision), id),
                _ => continue,
            };
            let Some(revision) = self.written.get(&id) else {
                continue;
            };
            let before = self.before(operation.key, *revision).map(|(own, _)| own);
            if before != expected {
                return Err(format!(
                    "{operation:?} happened at {revision}, where {before:?} was there before it"
                ));
            }
        }
        let mut deleted: BTreeSet<(Key, Revision)> = BTreeSet::new();
        for operation in operations {
            if let (Ask::Delete(revision), Said::Deleted) = (&operation.ask, &operation.said)
                && !deleted.insert((operation.key, *revision))
            {
                return Err(format!("{operation:?}: it was deleted twice"));
            }
        }
        Ok(())
    }

    /// The first position from `floor` on at which a key may hold what `fits` says.
    fn first(
        &self,
        key: Key,
        floor: Revision,
        fits: impl Fn(Option<(Revision, Id)>) -> bool,
    ) -> Option<Revision> {
        let nothing = Version {
            earliest: 0,
            latest: 0,
            holds: None,
        };
        let known = self.versions.get(&key).map_or(&[][..], Vec::as_slice);
        let all = std::iter::once(&nothing).chain(known);
        let ends = known
            .iter()
            .map(|next| next.latest - 1)
            .chain([Revision::MAX]);
        all.zip(ends)
            .filter(|(version, end)| fits(version.holds) && *end >= floor)
            .map(|(version, _)| version.earliest.max(floor))
            .min()
    }

    /// Where a key was deleted that was at `revision`: from, and until.
    fn deletion(&self, key: Key, revision: Revision) -> Option<(Revision, Revision)> {
        let of_key = self.versions.get(&key)?;
        let at = of_key
            .iter()
            .position(|version| version.holds.is_some_and(|(own, _)| own == revision))?;
        let next = of_key.get(at + 1)?;
        next.holds.is_none().then_some((next.earliest, next.latest))
    }

    /// Gives every operation its place, in the order of the answers.
    fn place(&mut self, operations: &[Operation]) -> Result<Summary, String> {
        // At one and the same moment, what is asked comes first: it was not after the answer.
        let mut moments: Vec<(u64, bool, usize)> = Vec::with_capacity(operations.len() * 2);
        for (at, operation) in operations.iter().enumerate() {
            moments.push((operation.asked_ns, false, at));
            if operation.said != Said::Unknown {
                moments.push((operation.answered_ns, true, at));
            }
        }
        moments.sort_unstable();
        let mut floors = vec![0; operations.len()];
        let mut reached: Revision = 0;
        for (_, is_answer, at) in moments {
            let operation = &operations[at];
            if !is_answer {
                floors[at] = reached;
                if let Ask::Create(id) | Ask::Update(_, id) = operation.ask
                    && let Some(revision) = self.written.get(&id)
                    && *revision <= reached
                {
                    return Err(format!(
                        "{operation:?} happened at {revision}, and {reached} had been seen before it was asked"
                    ));
                }
                continue;
            }
            let place = self.of(operation, floors[at]);
            let place = place
                .ok_or_else(|| format!("{operation:?} has no place from {} on", floors[at]))?;
            reached = reached.max(place);
        }
        Ok(std::mem::take(&mut self.summary))
    }

    fn of(&self, operation: &Operation, floor: Revision) -> Option<Revision> {
        let key = operation.key;
        // A write that nobody knows of may be why another was refused, if it was asked before that was answered.
        let in_doubt = || {
            let asked = self.doubtful.get(&key).into_iter().flatten();
            let mut asked = asked.copied();
            asked
                .any(|asked_ns| asked_ns < operation.answered_ns)
                .then_some(floor)
        };
        match (&operation.ask, &operation.said) {
            (_, Said::Written(revision)) => (*revision > floor).then_some(*revision),
            (_, Said::Found(revision, id)) => {
                self.first(key, floor, |holds| holds == Some((*revision, *id)))
            }
            (_, Said::Listed(at, items)) => self.listed(*at, items, floor),
            (Ask::Delete(revision), Said::Deleted) => {
                let (earliest, latest) = self.deletion(key, *revision)?;
                (latest > floor).then_some(earliest.max(floor + 1))
            }
            (_, Said::Absent) => self
                .first(key, floor, |holds| holds.is_none())
                .or_else(in_doubt),
            (_, Said::Exists) => self
                .first(key, floor, |holds| holds.is_some())
                .or_else(in_doubt),
            (Ask::Update(revision, _) | Ask::Delete(revision), Said::Conflict) => {
                let other =
                    |holds: Option<(Revision, Id)>| holds.is_some_and(|(own, _)| own != *revision);
                self.first(key, floor, other).or_else(in_doubt)
            }
            _ => None,
        }
    }

    /// A list is of one revision: everything that is there then, and nothing else.
    fn listed(&self, at: Revision, items: &[(Key, Revision)], floor: Revision) -> Option<Revision> {
        if at < floor {
            return None;
        }
        let items: BTreeMap<Key, Revision> = items.iter().copied().collect();
        let keys: BTreeSet<Key> = self.versions.keys().chain(items.keys()).copied().collect();
        let right = keys.iter().all(|key| {
            let wanted = items.get(key);
            let found = self.first(*key, at, |holds| {
                holds.map(|(own, _)| own) == wanted.copied()
            });
            found == Some(at)
        });
        right.then_some(at)
    }
}

#[cfg(test)]
mod tests;
