//! Watches of a share of a bucket, by what they ask for: who watches the pods of one node is not woken for those of another, and
//! looks at none of them.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use tokio::sync::watch;

use super::super::{PODS, Record, Revision, Share, StoreError};
use super::history::Event;
use crate::codec::scan::Raw;

/// A share's number. When two shares have the same their watches are told of both: they are told of at least their own.
pub(super) type Id = u64;

/// Gives shares their numbers, which nobody outside can foresee.
#[derive(Clone, Default)]
pub(super) struct Ids(RandomState);

impl Ids {
    /// None for everything.
    pub fn of(&self, share: Share<'_>) -> Option<Id> {
        (share != Share::All).then(|| self.0.hash_one(share))
    }

    /// The shares that a write is of: by its key and, before and after, by its value.
    pub fn of_event(&self, event: &Event) -> EventIds {
        let mut ids = EventIds::default();
        let key = &*event.record.key;
        ids.add(self.of(Share::Key(key)));
        ids.add(self.of(Share::Name(name_of(key))));
        if key.starts_with(PODS) {
            for record in [Some(&event.record), event.previous.as_ref()] {
                let node = record.map(node_of);
                ids.add(node.and_then(|node| self.of(Share::Node(&node))));
            }
        }
        ids
    }
}

fn name_of(key: &str) -> &str {
    key.rsplit_once('/').map_or(key, |(_, name)| name)
}

/// Empty for a pod that is on none.
fn node_of(pod: &Record) -> std::borrow::Cow<'_, str> {
    let node = Raw::new(&pod.value).at(["spec", "nodeName"]);
    node.and_then(Raw::text).unwrap_or_default()
}

/// The numbers of one write's shares, each once.
#[derive(Clone, Copy, Default)]
pub(super) struct EventIds([Option<Id>; 4]);

impl EventIds {
    fn add(&mut self, id: Option<Id>) {
        if !self.0.contains(&id)
            && let Some(free) = self.0.iter_mut().find(|kept| kept.is_none())
        {
            *free = id;
        }
    }

    fn iter(&self) -> impl Iterator<Item = Id> {
        self.0.into_iter().flatten()
    }

    pub fn contains(&self, id: Id) -> bool {
        self.0.contains(&Some(id))
    }
}

/// The shares of a bucket that are watched.
#[derive(Default)]
pub(super) struct Watched(HashMap<Id, Topic>);

/// Topic is one share that is watched, with those events of its bucket's history that are of it.
struct Topic {
    events: VecDeque<Arc<Event>>,
    /// Everything after this revision is still here.
    complete: Revision,
    watches: usize,
    changed: watch::Sender<()>,
}

impl Watched {
    /// Takes an event into the topics that it is of. Call `wake` for it once it is visible.
    pub fn append(&mut self, event: &Arc<Event>, ids: EventIds) {
        if self.0.is_empty() {
            return;
        }
        for id in ids.iter() {
            if let Some(topic) = self.0.get_mut(&id) {
                topic.events.push_back(event.clone());
            }
        }
    }

    /// Lets go of what the bucket's history does not have any more: the oldest event and what has its revision.
    pub fn trim(&mut self, old: Revision, ids: EventIds) {
        if self.0.is_empty() {
            return;
        }
        for id in ids.iter() {
            if let Some(topic) = self.0.get_mut(&id) {
                topic.trim(old);
            }
        }
    }

    /// Drops every event, and wakes who waits.
    pub fn forget(&mut self, origin: Revision) {
        for topic in self.0.values_mut() {
            topic.events = VecDeque::new();
            topic.complete = origin;
            topic.changed.send_replace(());
        }
    }

    pub fn wake(&self, ids: EventIds) {
        if self.0.is_empty() {
            return;
        }
        for id in ids.iter() {
            if let Some(topic) = self.0.get(&id) {
                topic.changed.send_replace(());
            }
        }
    }

    /// What wakes one more watch of a share. `since` gives its events after a revision, in order, from the bucket's history.
    pub fn subscribe<'a, I: Iterator<Item = &'a Arc<Event>>>(
        &mut self,
        id: Id,
        from: Revision,
        since: impl FnOnce() -> I,
    ) -> watch::Receiver<()> {
        let topic = self.0.entry(id).or_insert_with(|| Topic {
            events: VecDeque::new(),
            complete: Revision(u64::MAX),
            watches: 0,
            changed: watch::Sender::new(()),
        });
        if from < topic.complete {
            topic.events = since().cloned().collect();
            topic.complete = from;
        }
        topic.watches += 1;
        topic.changed.subscribe()
    }

    /// One watch of a share less.
    pub fn leave(&mut self, id: Id) {
        if let Some(topic) = self.0.get_mut(&id) {
            topic.watches -= 1;
            if topic.watches == 0 {
                self.0.remove(&id);
            }
        }
    }

    pub fn watches(&self, id: Id) -> usize {
        self.0.get(&id).map_or(0, |topic| topic.watches)
    }

    /// The events of a share after a revision; none of one that nobody watches.
    pub fn after(
        &self,
        id: Id,
        revision: Revision,
    ) -> Result<impl Iterator<Item = &Arc<Event>>, StoreError> {
        let topic = self.0.get(&id);
        if let Some(topic) = topic
            && revision < topic.complete
        {
            return Err(StoreError::Compacted {
                wanted: revision,
                oldest: topic.complete,
            });
        }
        let events = topic.map(|topic| topic.after(revision));
        Ok(events.into_iter().flatten())
    }
}

impl Topic {
    fn after(&self, revision: Revision) -> impl Iterator<Item = &Arc<Event>> {
        let start = self
            .events
            .partition_point(|event| event.record.revision <= revision);
        self.events.range(start..)
    }

    fn trim(&mut self, old: Revision) {
        while self
            .events
            .front()
            .is_some_and(|event| event.record.revision <= old)
        {
            self.events.pop_front();
        }
        self.complete = self.complete.max(old);
        // What all topics have room for together is to stay near to what the history holds.
        if self.events.len() < self.events.capacity() / 4 {
            self.events.shrink_to(self.events.len() * 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll, Wake, Waker};

    use bytes::Bytes;
    use futures::FutureExt;
    use proptest::prelude::*;

    use super::super::{Bounds, Replica};
    use super::*;
    use crate::store::{Change, StoreError, WatchEvent, WatchStream};

    fn bounded(events_max: usize) -> Replica {
        let bounds = Bounds {
            events_max,
            ..Bounds::default()
        };
        Replica::new(Default::default(), Revision(1), bounds)
    }

    fn pod(node: &str) -> String {
        format!(r#"{{"metadata":{{"labels":{{"spec":"n"}}}},"spec":{{"nodeName":"{node}"}}}}"#)
    }

    impl Replica {
        /// Writes or deletes at one revision, as both stores do.
        fn change(&self, changes: &[(&str, Option<&str>)]) {
            let (mut records, revision) = self.newest();
            let revision = Revision(revision.0 + 1);
            let mut events = Vec::new();
            for (key, value) in changes {
                let previous = records.get(*key).cloned();
                let value = value.map(|value| Bytes::copy_from_slice(value.as_bytes()));
                let (change, value) = match (value, &previous) {
                    (Some(value), _) => (Change::Put, value),
                    (None, Some(previous)) => (Change::Delete, previous.value.clone()),
                    (None, None) => continue,
                };
                let record = Record {
                    key: (*key).into(),
                    value,
                    revision,
                    created: revision,
                };
                let event = Event {
                    change,
                    record,
                    previous,
                };
                event.apply(&mut records);
                events.push(Arc::new(event));
            }
            self.publish(records, revision, &events);
        }

        /// How many shares are watched, and how many events are held for them.
        fn held(&self) -> (usize, usize) {
            let state = self.read();
            let watched = state.history.watched();
            let topics = watched.flat_map(|watched| watched.0.values());
            topics.fold((0, 0), |(shares, events), topic| {
                (shares + 1, events + topic.events.len())
            })
        }
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_watch_of_a_share_is_woken_by_what_is_of_it_and_by_nothing_else() {
        let replica = bounded(100);
        replica.change(&[
            ("/core/pods/a/own", Some(&pod("n"))),
            ("/core/nodes/n", Some("{}")),
        ]);
        for (share, prefix, others, own) in [
            (
                Share::Node("n"),
                "/core/pods/",
                vec![
                    ("/core/pods/a/x", "m"),
                    ("/core/pods/b/x", "nn"),
                    ("/core/nodes/n", "n"),
                ],
                "/core/pods/a/own",
            ),
            (
                Share::Key("/core/nodes/n"),
                "/core/nodes/n",
                vec![("/core/nodes/n1", "n"), ("/core/pods/a/n", "m")],
                "/core/nodes/n",
            ),
            (
                Share::Name("own"),
                "/core/pods/",
                vec![("/core/pods/a/owner", "n"), ("/core/nodes/own", "")],
                "/core/pods/b/own",
            ),
        ] {
            let from = replica.revision();
            let mut watch = replica.watch(prefix, share, from).unwrap();
            let wakes = Arc::new(Wakes::default());
            let waker: Waker = Arc::clone(&wakes).into();
            let mut next = watch.next();
            let context = &mut Context::from_waker(&waker);
            assert!(next.as_mut().poll(context).is_pending());
            for (key, node) in others {
                replica.change(&[(key, Some(&pod(node)))]);
                replica.change(&[(key, None)]);
            }
            assert_eq!(wakes.0.load(Ordering::Relaxed), 0, "{share:?}");
            replica.change(&[(own, Some(&pod("n")))]);
            assert_eq!(wakes.0.load(Ordering::Relaxed), 1, "{share:?}");
            let Poll::Ready(Ok(events)) = next.as_mut().poll(context) else {
                panic!("{share:?} has an event")
            };
            assert_eq!(events.len(), 1, "{share:?}");
            assert_eq!(&*events[0].record.key, own);
            drop(next);
            assert_eq!(watch.progress(), replica.revision());
        }
    }

    #[test]
    fn a_watch_that_others_leave_alone_does_not_fall_behind() {
        let replica = bounded(4);
        replica.change(&[("/core/pods/a/own", Some(&pod("n")))]);
        let from = replica.revision();
        let watch = |from| replica.watch("/core/pods/", Share::Node("n"), from);
        let (mut quiet, mut all) = (
            watch(from).unwrap(),
            replica.watch("/core/pods/", Share::All, from).unwrap(),
        );
        for _ in 0..9 {
            replica.change(&[("/core/pods/a/other", Some(&pod("m")))]);
        }
        assert!(matches!(
            all.next().now_or_never(),
            Some(Err(StoreError::Compacted { .. }))
        ));
        assert!(
            quiet.next().now_or_never().is_none(),
            "nothing of it was trimmed"
        );
        assert_eq!(quiet.progress(), replica.revision());
        assert!(
            watch(from).is_err(),
            "who comes with an old revision lists again"
        );
        replica.change(&[("/core/pods/a/own", None)]);
        for _ in 0..3 {
            replica.change(&[("/core/pods/a/other", Some(&pod("m")))]);
        }
        let events = quiet.next().now_or_never().expect("it left").unwrap();
        assert_eq!(events[0].change, Change::Delete);
        for _ in 0..2 {
            replica.change(&[("/core/pods/a/own", Some(&pod("n")))]);
            for _ in 0..4 {
                replica.change(&[("/core/pods/a/other", Some(&pod("m")))]);
            }
        }
        assert!(
            matches!(
                quiet.next().now_or_never(),
                Some(Err(StoreError::Compacted { .. }))
            ),
            "its own was trimmed"
        );
        let (records, revision) = replica.newest();
        let mut quiet = watch(revision).unwrap();
        replica.replace(records, Revision(revision.0 + 1));
        assert!(
            matches!(
                quiet.next().now_or_never(),
                Some(Err(StoreError::Compacted { .. }))
            ),
            "nobody knows what happened"
        );
    }

    #[test]
    fn what_is_held_for_shares_is_bounded_and_goes_with_their_watches() {
        let replica = bounded(8);
        let from = replica.revision();
        let nodes: Vec<String> = (0..50).map(|n| format!("n-{n}")).collect();
        let watch = |node: &str| {
            replica
                .watch("/core/pods/", Share::Node(node), from)
                .unwrap()
        };
        let mut watches: Vec<_> = nodes
            .iter()
            .flat_map(|node| [watch(node), watch(node)])
            .collect();
        for node in nodes.iter().cycle().take(200) {
            replica.change(&[("/core/pods/a/p", Some(&pod(node)))]);
        }
        // Each is of the node that the pod left, too.
        assert_eq!(replica.held(), (50, 16));
        watches.truncate(1);
        assert_eq!(replica.held().0, 1);
        drop(watches);
        assert_eq!(replica.held(), (0, 0));
    }

    /// All that a watch has to tell.
    fn told(watch: &mut dyn WatchStream) -> Result<Vec<Arc<WatchEvent>>, StoreError> {
        let mut told = Vec::new();
        while let Some(events) = watch.next().now_or_never() {
            told.extend(events?);
        }
        Ok(told)
    }

    const NODES: [&str; 3] = ["", "n", "m"];
    const NAMES: [&str; 3] = ["x", "xx", "y"];

    #[derive(Clone, Debug)]
    enum Step {
        /// Pods by namespace and name, on one of the nodes or deleted.
        Change(Vec<(usize, Option<usize>)>),
        /// A watch of a share, from so many revisions ago.
        Watch(usize, u64),
        Read(usize),
        End(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let change = (0..6_usize, prop::option::weighted(0.8, 0..NODES.len()));
        let step = prop_oneof![
            6 => prop::collection::vec(change, 1..3).prop_map(Step::Change),
            2 => (0..9_usize, 0..6_u64).prop_map(|(share, ago)| Step::Watch(share, ago)),
            3 => any::<usize>().prop_map(Step::Read),
            1 => any::<usize>().prop_map(Step::End),
        ];
        prop::collection::vec(step, 1..60)
    }

    proptest! {
        /// Beside each watch of a share goes one of everything, of a replica that forgets nothing, which is looked through.
        #[test]
        fn a_share_is_told_as_who_looks_at_everything_would_find_it(steps in steps(), events_max in 2_usize..12) {
            let (indexed, plain) = (bounded(events_max), bounded(1 << 20));
            let keys: Vec<String> = ["a", "b"].iter().flat_map(|namespace| NAMES.map(|name| format!("/core/pods/{namespace}/{name}"))).collect();
            let shares: Vec<(Share<'_>, &str)> = NODES.iter().map(|node| (Share::Node(node), "/core/pods/"))
                .chain([(Share::Node("n"), "/core/pods/a/"), (Share::Key(&keys[0]), &*keys[0]), (Share::Key(&keys[5]), &*keys[5])])
                .chain(NAMES.iter().map(|name| (Share::Name(name), "/core/pods/"))).collect();
            let is_of = |share: Share<'_>, event: &WatchEvent| match share {
                Share::All => true,
                Share::Key(key) => *event.record.key == *key,
                Share::Name(name) => event.record.key.ends_with(&format!("/{name}")),
                Share::Node(node) => [Some(&event.record), event.previous.as_ref()].into_iter().flatten().any(|record| record.value == pod(node)),
            };
            let mut watches = Vec::new();
            for step in steps {
                match step {
                    Step::Change(changes) => {
                        let pods = NODES.map(pod);
                        let mut changes: Vec<_> = changes.into_iter().map(|(at, node)| (&*keys[at], node.map(|node| &*pods[node]))).collect();
                        changes.sort();
                        changes.dedup_by_key(|(key, _)| *key);
                        indexed.change(&changes);
                        plain.change(&changes);
                    }
                    Step::Watch(at, ago) => {
                        let (share, prefix) = shares[at];
                        let from = Revision((indexed.revision().0.saturating_sub(ago)).max(1));
                        let all = plain.watch("/core/pods/", Share::All, from).unwrap();
                        match (indexed.watch(prefix, share, from), indexed.watch(prefix, Share::All, from)) {
                            (Ok(one), Ok(_)) => watches.push((share, prefix, one, all)),
                            (Err(StoreError::Compacted { .. }), Err(StoreError::Compacted { .. })) => {}
                            (one, all) => panic!("{:?} {:?}", one.err(), all.err()),
                        }
                    }
                    Step::Read(at) if !watches.is_empty() => {
                        let at = at % watches.len();
                        let (share, prefix, one, all) = &mut watches[at];
                        let mut of_it = told(&mut **all).unwrap();
                        of_it.retain(|event| is_of(*share, event));
                        match told(&mut **one) {
                            Ok(told) => {
                                of_it.retain(|event| event.record.key.starts_with(*prefix));
                                prop_assert_eq!(format!("{told:?}"), format!("{of_it:?}"));
                                prop_assert_eq!(one.progress(), indexed.revision());
                            }
                            // Something of it was trimmed before it was read.
                            Err(StoreError::Compacted { .. }) => {
                                prop_assert!(!of_it.is_empty());
                                watches.swap_remove(at);
                            }
                            Err(error) => panic!("{error}"),
                        }
                    }
                    Step::End(at) if !watches.is_empty() => drop(watches.swap_remove(at % watches.len())),
                    Step::Read(_) | Step::End(_) => {}
                }
                let alive: std::collections::HashSet<_> = watches.iter().map(|(share, ..)| *share).collect();
                let (held, events) = indexed.held();
                prop_assert_eq!(held, alive.len());
                prop_assert!(events <= 4 * events_max);
            }
        }
    }
}
