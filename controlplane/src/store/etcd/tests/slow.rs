//! One etcd that stands still, and one whose disk is slow.

use std::process::{Child, Command, Stdio};

use futures::future::join_all;
use tokio::time::Instant;

use super::losses::{check, pause, write};
use super::*;

#[tokio::test]
async fn while_etcd_stands_still_nothing_is_answered_and_nothing_is_lost() {
    let (store, server) = fresh().await;
    let watch = store.watch("/core/pods/", store.revision()).await.unwrap();
    let (mut next, mut answered) = (0, Vec::new());
    write(&store, &mut next, &mut answered).await;
    pause(&server.process, true);
    let writes = (next..next + 20).map(|i| {
        let store = &store;
        async move { store.put(&pod(i), value(i), Expect::Absent).await }
    });
    next += 20;
    let (writes, read) = tokio::join!(join_all(writes), store.get("/core/pods/default/0"));
    for refused in writes {
        let refused = refused.expect_err("it stands still");
        assert!(
            matches!(refused, StoreError::Unavailable { .. }),
            "{refused}"
        );
    }
    assert!(read.is_err(), "nobody can tell whether it is the newest");
    pause(&server.process, false);
    write(&store, &mut next, &mut answered).await;
    check(&store, watch, &answered).await;
}

/// Slow makes each of a process's syncs take so much longer, until it is dropped.
struct Slow(Child);

impl Slow {
    async fn make(process: &process::Etcd, by: Duration) -> Self {
        let (pid, delay) = (process.child.id(), by.as_micros());
        let delay = format!("inject=fsync,fdatasync:delay_enter={delay}");
        let slow = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "strace", "-qq", "-f"])
            .args(["-o", "/dev/null", "-e", "trace=fsync,fdatasync"])
            .args(["-e", &delay, "-p", &pid.to_string()])
            .stdin(Stdio::null())
            .spawn()
            .expect("setpriv and strace are installed: `cargo xtask setup` sees to it");
        let begun = Instant::now();
        while !is_traced(pid) {
            assert!(begun.elapsed() < PATIENCE, "strace follows etcd");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Self(slow)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // At this signal it lets go of the process, and does not end it.
        let pid = self.0.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status();
        if !sent.is_ok_and(|status| status.success()) {
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

/// Whether each thread of a process is followed.
fn is_traced(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
    threads.flatten().all(|thread| {
        let status = std::fs::read_to_string(thread.path().join("status"));
        // One that is gone by now needs none.
        status.map_or(true, |status| !status.contains("TracerPid:\t0\n"))
    })
}

#[tokio::test]
async fn a_slow_disk_of_etcd_delays_writes_and_loses_none() {
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: needs root");
        return;
    }
    let (store, server) = fresh().await;
    let watch = store.watch("/core/pods/", store.revision()).await.unwrap();
    let (mut next, mut answered) = (0, Vec::new());
    write(&store, &mut next, &mut answered).await;
    let slow = Slow::make(&server.process, Duration::from_millis(100)).await;
    let writes = (next..next + 100).map(|i| {
        let store = &store;
        async move { (i, store.put(&pod(i), value(i), Expect::Absent).await) }
    });
    next += 100;
    for (i, outcome) in join_all(writes).await {
        answered.push((i, outcome.expect("late, and answered").revision));
    }
    drop(slow);
    // One that is too slow for any answer.
    let slow = Slow::make(&server.process, PATIENCE * 2).await;
    let refused = store.put(&pod(next), value(next), Expect::Absent).await;
    next += 1;
    assert!(
        matches!(refused, Err(StoreError::Unavailable { .. })),
        "{refused:?}"
    );
    drop(slow);
    write(&store, &mut next, &mut answered).await;
    answered.sort_by_key(|(_, revision)| *revision);
    check(&store, watch, &answered).await;
}
