//! The check itself: what agrees with an order passes, and every way to be wrong is found.

use super::*;

fn op(key: Key, ask: Ask, said: Said, asked_ns: u64, answered_ns: u64) -> Operation {
    Operation {
        key,
        ask,
        said,
        asked_ns,
        answered_ns,
    }
}

fn put(revision: Revision, id: Id) -> Event {
    Event {
        revision,
        key: 1,
        id: Some(id),
    }
}

fn epoch(from: Revision, events: Vec<Event>, until: Revision, at: Option<(Revision, Id)>) -> Epoch {
    let state = at.map(|at| (1, at)).into_iter().collect();
    Epoch {
        from,
        events,
        until,
        state,
    }
}

fn created() -> Operation {
    op(1, Ask::Create(100), Said::Written(5), 0, 10)
}

fn updated() -> Operation {
    op(1, Ask::Update(5, 101), Said::Written(7), 20, 30)
}

fn both() -> Vec<Epoch> {
    vec![epoch(4, vec![put(5, 100), put(7, 101)], 8, Some((7, 101)))]
}

#[test]
fn answers_that_agree_with_an_order_pass() {
    let operations = [
        created(),
        updated(),
        // Beside the write: either answer is right.
        op(1, Ask::Read, Said::Found(5, 100), 15, 25),
        op(1, Ask::Read, Said::Found(7, 101), 21, 26),
        op(1, Ask::Update(5, 102), Said::Conflict, 31, 40),
        op(1, Ask::Create(103), Said::Exists, 31, 40),
        op(1, Ask::List, Said::Listed(8, vec![(1, 7)]), 31, 40),
        op(1, Ask::Read, Said::Unknown, 31, NEVER),
    ];
    let summary = check(&operations, &both()).unwrap();
    assert_eq!((summary.answered_writes, summary.revisions), (2, 2));
}

#[track_caller]
fn fails(operations: &[Operation], epochs: &[Epoch], says: &str) {
    let error = check(operations, epochs).unwrap_err();
    assert!(error.contains(says), "{error}");
}

#[test]
fn every_way_to_be_wrong_is_found() {
    // A read that is older than one before it, and one that is older than an answered write.
    let stale = op(1, Ask::Read, Said::Found(5, 100), 31, 40);
    fails(&[created(), updated(), stale], &both(), "has no place");
    let first = op(1, Ask::Read, Said::Found(7, 101), 21, 22);
    let second = op(1, Ask::Read, Said::Found(5, 100), 23, 24);
    fails(
        &[created(), updated(), first, second],
        &both(),
        "has no place",
    );
    let absent = op(1, Ask::Read, Said::Absent, 31, 40);
    fails(&[created(), updated(), absent], &both(), "has no place");
    let list = op(1, Ask::List, Said::Listed(6, vec![(1, 5)]), 31, 40);
    fails(&[created(), updated(), list], &both(), "has no place");
    let list = op(1, Ask::List, Said::Listed(8, vec![(1, 5)]), 31, 40);
    fails(&[created(), updated(), list], &both(), "has no place");
    // An answered write that is gone, one that was in no watch, one that was in it twice.
    let lost = vec![epoch(4, vec![put(5, 100)], 8, Some((5, 100)))];
    fails(&[created(), updated()], &lost, "lost");
    let unwatched = vec![epoch(4, vec![put(5, 100), put(9, 102)], 9, Some((9, 102)))];
    let later = op(1, Ask::Update(7, 102), Said::Written(9), 31, 40);
    fails(&[created(), updated(), later], &unwatched, "in no watch");
    let twice = vec![epoch(4, vec![put(5, 100), put(5, 100)], 8, Some((5, 100)))];
    fails(&[created()], &twice, "a watch told of");
    // A revision that is given again, and a store that steps back.
    let again = op(2, Ask::Create(200), Said::Written(5), 11, 12);
    fails(&[created(), again], &both(), "was given to");
    let back = vec![
        epoch(4, vec![put(5, 100)], 5, Some((5, 100))),
        epoch(3, vec![], 3, None),
    ];
    fails(&[created()], &back, "went back");
    // Two updates of the same revision, and a write that nobody asked for.
    let both_of_five = op(1, Ask::Update(5, 102), Said::Written(8), 20, 30);
    let log = vec![epoch(
        4,
        vec![put(5, 100), put(7, 101), put(8, 102)],
        8,
        Some((8, 102)),
    )];
    fails(
        &[created(), updated(), both_of_five],
        &log,
        "was there before it",
    );
    let phantom = vec![epoch(4, vec![put(5, 100), put(7, 999)], 8, Some((7, 999)))];
    fails(&[created()], &phantom, "nobody asked for");
}

#[test]
fn what_nobody_watched_is_known_by_answers_and_by_what_is_left() {
    // Killed after 5 was watched: 7 was answered, and is found.
    let tail = vec![epoch(4, vec![put(5, 100)], 8, Some((7, 101)))];
    assert!(check(&[created(), updated()], &tail).is_ok());
    // A delete was answered, and the moment is not known.
    let deleted = op(1, Ask::Delete(5), Said::Deleted, 20, 30);
    let gone = vec![epoch(4, vec![put(5, 100)], 8, None)];
    let absent = op(1, Ask::Read, Said::Absent, 31, 40);
    assert!(check(&[created(), deleted.clone(), absent], &gone).is_ok());
    // It is not undone afterwards.
    let still = vec![epoch(4, vec![put(5, 100)], 8, Some((5, 100)))];
    fails(&[created(), deleted], &still, "has no place");
    // A write without an answer may have happened, and if so for good.
    let unknown = op(1, Ask::Update(5, 101), Said::Unknown, 20, NEVER);
    let read = op(1, Ask::Read, Said::Found(7, 101), 31, 40);
    let back = op(1, Ask::Read, Said::Found(5, 100), 41, 50);
    let happened = check(&[created(), unknown.clone(), read.clone()], &tail).unwrap();
    assert_eq!(happened.unanswered_that_happened, 1);
    fails(
        &[created(), unknown.clone(), read, back],
        &tail,
        "has no place",
    );
    assert!(check(&[created(), unknown], &still).is_ok());
}
