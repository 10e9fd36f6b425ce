//! What is left of a history that was longer than what is kept of it, and what is said of the rest.

use super::*;

/// Of one write. So many of them are more than any bucket's history holds.
const LARGE_BYTES: usize = 1 << 20;
const LARGE_WRITES: usize = 20;
const NODES: &str = "/core/nodes/";

/// Writes one key so often that the beginning of its bucket's history goes: its last record.
async fn outgrow(store: &impl Store) -> Record {
    let mut last = None;
    for i in 0..LARGE_WRITES {
        let value = Bytes::from(vec![b'0' + i as u8; LARGE_BYTES]);
        last = Some(store.put(&key("large"), value, Expect::Any).await.unwrap());
    }
    last.expect("written more than once")
}

/// Where the history begins, as the refusal of an earlier revision says.
fn oldest<T>(refused: Result<T, StoreError>, asked: Revision) -> Revision {
    match refused.err().expect("it is forgotten") {
        StoreError::Compacted { wanted, oldest } if wanted == asked => oldest,
        error => panic!("{asked} was asked for: {error}"),
    }
}

fn at(revision: Revision) -> Range<'static> {
    Range {
        at: Some(revision),
        ..Range::all(PREFIX)
    }
}

pub async fn what_is_compacted_is_refused_and_what_is_left_is_whole(store: impl Store) {
    let first = put(&store, "a", "1").await.revision;
    put(&store, "b", "1").await;
    let node = store.put("/core/nodes/n", Bytes::from_static(b"n"), Expect::Any);
    let node = node.await.unwrap().revision;
    let mut behind = store.watch(PREFIX, first).await.unwrap();
    let mut ahead = store.watch(PREFIX, node).await.unwrap();
    let page = Range {
        limit: Some(1),
        ..Range::all(PREFIX)
    };
    let page = store.list(page).await.unwrap();
    let last_key = page.records[0].key.clone();
    let last = outgrow(&store).await;

    let begins = oldest(store.list(at(first)).await, first);
    assert!(node < begins && begins < last.revision, "{begins}");
    let just_before = Revision(begins.0 - 1);
    for asked in [first, node, just_before] {
        assert_eq!(oldest(store.list(at(asked)).await, asked), begins);
        assert_eq!(oldest(store.watch(PREFIX, asked).await, asked), begins);
        // A part of everything is forgotten.
        assert_eq!(oldest(store.watch("/", asked).await, asked), begins);
    }
    // A list that goes on does so at its revision or not at all.
    let rest = Range {
        after: Some(&last_key),
        ..at(page.revision)
    };
    assert_eq!(oldest(store.list(rest).await, page.revision), begins);
    let anew = Range { at: None, ..rest };
    let anew = store.list(anew).await.unwrap();
    assert_eq!(anew.revision, last.revision);
    let keys: Vec<&str> = anew
        .records
        .iter()
        .map(|r| &r.key[PREFIX.len()..])
        .collect();
    assert_eq!(keys, ["default/b", "default/large"]);
    // Watches that have not been read since end, and stay so.
    for (watch, stood) in [(&mut behind, first), (&mut ahead, node)] {
        assert_eq!(oldest(watch.next().await, stood), begins);
        assert_eq!(watch.progress(), stood);
        assert_eq!(oldest(watch.next().await, stood), begins);
    }

    // From where it begins it is whole.
    let page = store.list(at(begins)).await.unwrap();
    let large = page.records.last().expect("the large one");
    assert_eq!((page.records.len(), large.revision), (3, begins));
    let mut watch = store.watch(PREFIX, begins).await.unwrap();
    let mut previous = large.clone();
    while previous.revision < last.revision {
        for event in next(&mut watch).await {
            assert_eq!(event.record.revision.0, previous.revision.0 + 1);
            assert_eq!(event.previous.as_ref(), Some(&previous));
            previous = event.record.clone();
        }
    }
    assert_eq!(previous, last);
    // What was written to other buckets is not forgotten for it.
    let mut nodes = store.watch(NODES, first).await.unwrap();
    assert_eq!(next(&mut nodes).await[0].record.revision, node);
    let before = Range {
        at: Some(first),
        ..Range::all(NODES)
    };
    assert!(store.list(before).await.unwrap().records.is_empty());
}
