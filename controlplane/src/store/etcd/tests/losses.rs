//! Three members, of which one at a time is killed or stands still, the leader among them.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Instant;

use super::*;

const MEMBERS: usize = 3;
/// Writes between two blows.
const WRITES: usize = 40;

pub fn start() -> Vec<process::Etcd> {
    let peers: Vec<u16> = (0..MEMBERS).map(|_| process::free_port()).collect();
    let cluster: Vec<String> = peers
        .iter()
        .enumerate()
        .map(|(i, port)| format!("m{i}=http://127.0.0.1:{port}"))
        .collect();
    let cluster = cluster.join(",");
    let mut members: Vec<process::Etcd> = peers
        .iter()
        .enumerate()
        .map(|(i, port)| process::Etcd::member(&format!("m{i}"), *port, &cluster, "http", &[]))
        .collect();
    for member in &mut members {
        assert!(member.wait_ready(), "every member starts");
    }
    members
}

/// Stops a member where it is, or lets it go on.
pub fn pause(member: &process::Etcd, paused: bool) {
    let signal = if paused { "-STOP" } else { "-CONT" };
    let sent = Command::new("kill")
        .args([signal, &member.child.id().to_string()])
        .status();
    assert!(sent.is_ok_and(|status| status.success()));
}

/// Writes until so many writes were answered; those that failed may have happened or not.
pub async fn write(store: &Etcd, next: &mut usize, answered: &mut Vec<(usize, Revision)>) {
    let end = Instant::now() + Duration::from_secs(60);
    let goal = answered.len() + WRITES;
    while answered.len() < goal {
        assert!(Instant::now() < end, "enough of etcd serves");
        let i = *next;
        *next += 1;
        match store.put(&pod(i), value(i), Expect::Absent).await {
            Ok(record) => answered.push((i, record.revision)),
            Err(StoreError::Unavailable { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Holds what was answered, in order of revision, against what a watch tells from before the first of it, and both against a list.
pub async fn check(store: &Etcd, mut watch: Box<dyn WatchStream>, answered: &[(usize, Revision)]) {
    let last = *answered.last().expect("writes were answered");
    let seen = told_until(last.1, &mut *watch).await;
    assert!(
        seen.windows(2).all(|w| w[0].1 < w[1].1),
        "in order, and once"
    );
    let told: BTreeSet<_> = seen.iter().cloned().collect();
    for (i, revision) in answered {
        assert!(told.contains(&(pod(*i), *revision)), "{i} at {revision}");
    }
    // What the watch told of is all there is, failed writes that happened included.
    let page = store.list(Range::all("/core/pods/")).await.unwrap();
    let listed: BTreeSet<_> = page
        .records
        .iter()
        .map(|r| (r.key.to_string(), r.revision))
        .collect();
    let told_by_then: BTreeSet<_> = told.into_iter().filter(|(_, r)| *r <= last.1).collect();
    let listed_by_then: BTreeSet<_> = listed.into_iter().filter(|(_, r)| *r <= last.1).collect();
    assert_eq!(told_by_then, listed_by_then);
}

#[tokio::test]
async fn any_member_may_be_lost_and_no_answered_write_is() {
    let mut members = start();
    let config = EtcdConfig::at(members.iter().map(|m| m.endpoint().to_owned()).collect());
    let store = Etcd::connect(&config).await.unwrap();
    let watch = store.watch("/core/pods/", store.revision()).await.unwrap();
    let (mut next, mut answered) = (0, Vec::new());
    write(&store, &mut next, &mut answered).await;
    for victim in &mut members {
        victim.kill();
        write(&store, &mut next, &mut answered).await;
        victim.restart();
        pause(victim, true);
        write(&store, &mut next, &mut answered).await;
        pause(victim, false);
        write(&store, &mut next, &mut answered).await;
    }
    check(&store, watch, &answered).await;
}
