//! Watches of a share of what is written.

use super::*;

const PODS: &str = "/core/pods/";

async fn pod(store: &impl Store, name: &str, node: &str) -> Revision {
    let value = format!(r#"{{"metadata":{{"name":"{name}"}},"spec":{{"nodeName":"{node}"}}}}"#);
    let put = store.put(name, value.into(), Expect::Any).await;
    put.expect("written").revision
}

pub async fn a_watch_of_a_share_is_told_all_of_it_and_progresses_with_the_rest(store: impl Store) {
    let from = store.revision();
    let (own, other) = ("/core/pods/a/own", "/core/pods/b/other");
    let mut on_node = store
        .watch_share(PODS, Share::Node("n"), from)
        .await
        .unwrap();
    let mut named = store
        .watch_share(PODS, Share::Name("own"), from)
        .await
        .unwrap();
    let mut of_key = store.watch_share(own, Share::Key(own), from).await.unwrap();
    let mut expected = Vec::new();
    for (key, node, of_node) in [
        (own, "m", false),
        (other, "n", true),
        (own, "n", true),
        (other, "m", true),
        (other, "m", false),
        (own, "m", true),
    ] {
        expected.push((key, of_node, pod(&store, key, node).await));
    }
    let deleted = store.delete(own, Expect::Any).await.unwrap().revision;
    expected.push((own, false, deleted));
    let last = pod(&store, other, "n").await;
    expected.push((other, true, last));
    let revisions = |wanted: &dyn Fn(&str, bool) -> bool| -> Vec<Revision> {
        let of_it = expected.iter().filter(|(key, on, _)| wanted(key, *on));
        of_it.map(|(_, _, revision)| *revision).collect()
    };
    for (watch, share, wanted) in [
        (&mut on_node, Share::Node("n"), revisions(&|_, on| on)),
        (
            &mut named,
            Share::Name("own"),
            revisions(&|key, _| key == own),
        ),
        (
            &mut of_key,
            Share::Key(own),
            revisions(&|key, _| key == own),
        ),
    ] {
        let mut told = Vec::new();
        while told.last() != wanted.last() {
            // A store that cannot look into values tells of others, too.
            let events = next(watch).await.into_iter();
            let of_it = events.filter(|event| wanted.contains(&event.record.revision));
            told.extend(of_it.map(|event| event.record.revision));
        }
        assert_eq!(told, wanted, "{share:?}");
        let mut progress = watch.progress();
        while progress < last {
            next(watch).await;
            progress = watch.progress();
        }
        assert_eq!(progress, last, "{share:?}");
    }
}
