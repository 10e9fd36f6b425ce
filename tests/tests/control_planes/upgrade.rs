//! Control planes that are replaced by another build while clients work: none of them is refused, and nothing of theirs is lost.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use keelway_tests::cluster::{Cluster, program};
use keelway_tests::machine::processes;
use keelway_tests::process::{Running, eventually};
use kube::api::{Api, ListParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Config, ResourceExt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::{REQUEST, control_planes, works};

const CLIENTS: usize = 8;
/// How long after a request that was not answered it is sent again.
const RETRY: Duration = Duration::from_millis(100);
pub const UPGRADE_SECONDS_MAX: Duration = Duration::from_secs(150);

/// What one client did.
#[derive(Default)]
struct Done {
    made: BTreeSet<String>,
    again: usize,
    slowest: Duration,
}

async fn client(kubeconfig: &Path) -> Client {
    let read = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
    let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
    let mut config = config.expect("a kubeconfig");
    // Else it sends requests again by itself, and hides that the first one was answered with 503.
    config.default_retry = false;
    Client::try_from(config).expect("a client")
}

/// Creates and reads until it is told to stop. A request that gets no answer is sent again; one that is refused, or is not answered in time,
/// is a failure.
async fn work(maps: Api<ConfigMap>, number: usize, stop: watch::Receiver<bool>) -> Done {
    let mut done = Done::default();
    while !*stop.borrow() {
        let name = format!("upgrade-{number}-{}", done.made.len());
        let map = json!({"metadata": {"name": name}, "data": {"of": number.to_string()}});
        let map: ConfigMap = serde_json::from_value(map).expect("a ConfigMap");
        for reads in [false, true] {
            let (began, mut tries) = (Instant::now(), 0);
            loop {
                let outcome = match reads {
                    true => maps.get(&name).await,
                    false => maps.create(&PostParams::default(), &map).await,
                };
                match outcome {
                    Ok(_) => break,
                    // The answer of an earlier try was lost.
                    Err(kube::Error::Api(status)) if tries > 0 && status.code == 409 => break,
                    Err(kube::Error::Api(status)) if ![429, 503, 504].contains(&status.code) => {
                        panic!("{name}: {status:?}")
                    }
                    Err(error) => assert!(began.elapsed() < REQUEST, "{name}: {error}"),
                }
                tries += 1;
                done.again += 1;
                tokio::time::sleep(RETRY).await;
            }
            done.slowest = done.slowest.max(began.elapsed());
        }
        done.made.insert(name);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    done
}

/// Follows what is made until a last one is.
async fn follow(maps: Api<ConfigMap>) -> BTreeSet<String> {
    let mut changes = std::pin::pin!(watcher(maps, watcher::Config::default()).default_backoff());
    let mut seen = BTreeSet::new();
    while !seen.contains("upgrade-last") {
        // What is said of a connection that ended is not the end of the watch.
        match changes.try_next().await {
            Ok(Some(watcher::Event::Apply(map) | watcher::Event::InitApply(map))) => {
                seen.insert(map.name_any());
            }
            Ok(Some(_)) | Err(_) => {}
            Ok(None) => break,
        }
    }
    seen
}

/// A build that differs from the one that runs: the same programs, as other files.
pub fn another_build() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["keelway", "keelway-controlplane", "keelway-kubelet"] {
        let to = folder.path().join(name);
        std::fs::copy(program(name), to).expect("there is room");
    }
    folder
}

/// The file that a control plane runs, by its node's PID 1.
fn runs(pid: i64) -> u64 {
    let path = format!("/proc/{pid}/root/opt/keelway/bin/keelway-controlplane");
    std::fs::metadata(path).expect("it runs").ino()
}

fn upgrading(cluster: &Cluster, build: &Path) -> Running {
    upgrading_with(cluster, build, &["--only", "control-planes"])
}

/// `keelway upgrade` by a build, with flags of the test's. It is killed with the test.
pub fn upgrading_with(cluster: &Cluster, build: &Path, flags: &[&str]) -> Running {
    let keelway = build.join("keelway").display().to_string();
    let folder = build.display().to_string();
    let command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        &keelway,
        "upgrade",
        "--name",
        &cluster.name,
        "--bin-dir",
        &folder,
    ];
    Running::start(&[&command, flags].concat(), &[])
}

/// What is written down of the nodes of a cluster.
pub fn written(cluster: &Cluster) -> Vec<Value> {
    let text = std::fs::read(cluster.folder().join("cluster.json")).expect("the cluster is known");
    let state: Value = serde_json::from_slice(&text).expect("replaced as a whole");
    state["nodes"].as_array().expect("nodes").clone()
}

/// What is written down of a control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Control {
    pid: i64,
    unsettled: bool,
}

fn controls(cluster: &Cluster) -> Vec<Control> {
    let nodes = written(cluster).into_iter();
    let mine = nodes.filter(|node| node["controlPlane"] == true && node["name"] != "switch");
    mine.map(|node| Control {
        pid: node["init"]["pid"].as_i64().expect("it was started"),
        unsettled: node["unsettled"] == true,
    })
    .collect()
}

/// How many nodes `keelway status` calls unsettled.
fn told_unsettled(cluster: &Cluster) -> usize {
    let status = cluster.status();
    let nodes = status["nodes"].as_array().expect("nodes").iter();
    let unsettled = nodes.filter(|node| node["unsettled"] == true).count();
    assert!(unsettled == 0 || status["healthy"] == false, "{status}");
    unsettled
}

/// An upgrade that is killed once it has come as far as `there` says of how it was before, and is now.
fn cut_off(cluster: &Cluster, build: &Path, there: impl Fn(&[Control], &[Control]) -> bool) {
    let before = controls(cluster);
    let upgrade = upgrading(cluster, build);
    eventually("the upgrade has come there", UPGRADE_SECONDS_MAX, || {
        let now = controls(cluster);
        let there = there(&before, &now);
        there.then_some(()).ok_or(format!("{now:?}"))
    });
    drop(upgrade);
}

/// Whether a signal was sent to a process and has not reached it.
fn is_pending(pid: i64, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mut lines = status.lines();
    let sent = lines.find_map(|line| line.strip_prefix("ShdPnd:"));
    let sent = u64::from_str_radix(sent.unwrap_or_default().trim(), 16).unwrap_or_default();
    sent & 1 << (signal as u64 - 1) != 0
}

/// An upgrade that is killed, and the next one, which finds the PID 1 that the first one started: stopped, so that it ends only when that one
/// has seen it.
fn lingers(cluster: &Cluster, build: &Path) {
    let before = controls(cluster);
    let upgrade = upgrading(cluster, build);
    let pid = eventually("the first one is started", UPGRADE_SECONDS_MAX, || {
        let now = controls(cluster)[0].pid;
        let is_new = now != before[0].pid;
        is_new.then_some(now).ok_or("it is not".to_owned())
    });
    let pid_1 = Pid::from_raw(i32::try_from(pid).expect("a pid"));
    // Its programs are in place, so that by those it is of this build.
    eventually("its file systems are made", UPGRADE_SECONDS_MAX, || {
        let program = format!("/proc/{pid}/root/opt/keelway/bin/keelway-controlplane");
        std::fs::metadata(program).map_err(|error| error.to_string())
    });
    kill(pid_1, Signal::SIGSTOP).expect("stopped");
    drop(upgrade);
    let next = upgrading(cluster, build);
    eventually("the next one sees to its end", UPGRADE_SECONDS_MAX, || {
        let told = is_pending(pid, Signal::SIGTERM);
        told.then_some(()).ok_or_else(|| "it is let be".to_owned())
    });
    drop(next);
    kill(pid_1, Signal::SIGCONT).expect("it goes on, to its end");
}

fn pids(cluster: &Cluster) -> Vec<Option<i64>> {
    let all = control_planes(cluster);
    all.iter().map(|(_, node)| node["pid"].as_i64()).collect()
}

#[test]
fn control_planes_are_replaced_by_another_build_while_clients_work() {
    let name = format!("upgrade-{}", std::process::id());
    let arguments = ["--nodes", "1", "--control-planes", "3", "--store", "etcd"];
    let Some(cluster) = Cluster::own(&name, &arguments) else {
        return;
    };
    cluster.run_example();
    let runtime = Runtime::new().expect("a runtime");
    let maps =
        runtime.block_on(async { Api::default_namespaced(client(cluster.kubeconfig()).await) });
    let (stop, stopped) = watch::channel(false);
    let watching = runtime.spawn(follow(maps.clone()));
    let mut working = JoinSet::new();
    for number in 0..CLIENTS {
        let own = runtime.block_on(client(cluster.kubeconfig()));
        let work = work(Api::default_namespaced(own), number, stopped.clone());
        working.spawn_on(work, runtime.handle());
    }

    let before = pids(&cluster);
    let build = another_build();
    let inode = std::fs::metadata(build.path().join("keelway-controlplane"))
        .expect("a file")
        .ino();
    let said = upgrading_with(&cluster, build.path(), &[])
        .finish(UPGRADE_SECONDS_MAX)
        .concat();
    let all = "3 of 3 control planes and 1 of 1 workers";
    assert!(said.contains(all), "{said}");
    let after = pids(&cluster);
    for (before, after) in before.iter().zip(&after) {
        assert!(before != after, "{before:?} was not replaced");
        assert_eq!(runs(after.expect("it runs")), inode);
    }
    // Those of this build stay.
    let said = upgrading(&cluster, build.path())
        .finish(UPGRADE_SECONDS_MAX)
        .concat();
    assert!(said.contains("0 of 3"), "{said}");
    assert_eq!(pids(&cluster), after);

    // Wherever one is killed, the next one goes on from there: before its first control plane has ended, while the new one begins and once
    // it runs, with its PID 1 still there as the next one looks, and when it has come to the second control plane.
    let third = another_build();
    cut_off(&cluster, third.path(), |_, now| now[0].unsettled);
    let is_new = |before: &[Control], now: &[Control]| now[0].pid != before[0].pid;
    cut_off(&cluster, third.path(), is_new);
    cut_off(&cluster, third.path(), |before, now| {
        let group = format!("{}/control-plane", cluster.name);
        is_new(before, now) && !processes(&group, "etcd").is_empty()
    });
    lingers(&cluster, third.path());
    cut_off(&cluster, third.path(), |_, now| {
        !now[0].unsettled && now[1].unsettled
    });
    assert_eq!(told_unsettled(&cluster), 1);
    let said = upgrading(&cluster, third.path())
        .finish(UPGRADE_SECONDS_MAX)
        .concat();
    assert!(said.contains("2 of 3 control planes"), "{said}");
    let inode = std::fs::metadata(third.path().join("keelway-controlplane"))
        .expect("a file")
        .ino();
    for pid in pids(&cluster) {
        assert_eq!(runs(pid.expect("it runs")), inode);
    }
    assert!(controls(&cluster).iter().all(|control| !control.unsettled));
    assert_eq!(told_unsettled(&cluster), 0);

    stop.send_replace(true);
    let (mut made, mut again, mut slowest) = (BTreeSet::new(), 0, Duration::ZERO);
    while let Some(done) = runtime.block_on(working.join_next()) {
        let done = done.expect("no request failed");
        again += done.again;
        slowest = slowest.max(done.slowest);
        made.extend(done.made);
    }
    println!(
        "{} requests, {again} sent again, the slowest {slowest:?}",
        made.len() * 2
    );
    assert!(made.len() > CLIENTS * 10, "they worked");
    let last = json!({"metadata": {"name": "upgrade-last"}});
    let last: ConfigMap = serde_json::from_value(last).expect("a ConfigMap");
    let (there, seen) = runtime.block_on(async {
        maps.create(&PostParams::default(), &last)
            .await
            .expect("made");
        let there = maps.list(&ListParams::default()).await.expect("listed");
        let there: BTreeSet<String> = there.iter().map(ResourceExt::name_any).collect();
        let seen = tokio::time::timeout(REQUEST, watching).await;
        (
            there,
            seen.expect("the watch saw the last one")
                .expect("it did not panic"),
        )
    });
    assert!(made.is_subset(&there), "an answered write is not there");
    assert!(made.is_subset(&seen), "the watch missed one");
    works(&cluster, 4);
}

/// With a member of etcd down, the other two are what the cluster lives by.
#[test]
fn no_control_plane_is_taken_while_the_etcd_of_another_one_fails() {
    let name = format!("spare-{}", std::process::id());
    let arguments = ["--nodes", "1", "--control-planes", "3", "--store", "etcd"];
    let Some(cluster) = Cluster::own(&name, &arguments) else {
        return;
    };
    // Its data are out of its reach: it ends as often as PID 1 starts it. Its API server goes on by the other members.
    let node = cluster.folder().join("control-plane-2");
    let (data, away) = (node.join("var/lib/etcd"), node.join("var/lib/away"));
    std::fs::rename(&data, &away).expect("moved");
    std::fs::write(&data, "").expect("written");
    for etcd in processes(&format!("{name}/control-plane-2"), "etcd") {
        kill(Pid::from_raw(etcd.pid), Signal::SIGKILL).expect("killed");
    }
    eventually("it has failed again and again", REQUEST, || {
        let text = std::fs::read_to_string(node.join("services.json")).unwrap_or_default();
        let services: Value = serde_json::from_str(&text).unwrap_or_default();
        let mut services = services.as_array().into_iter().flatten();
        let etcd = services.find(|service| service["name"] == "etcd");
        let fails = etcd.is_some_and(|etcd| etcd["restarts"].as_i64() > Some(2));
        fails.then_some(()).ok_or(text)
    });

    let before = pids(&cluster);
    let build = another_build();
    let keelway = build.path().join("keelway").display().to_string();
    let folder = build.path().display().to_string();
    let command = [
        keelway.as_str(),
        "upgrade",
        "--name",
        &name,
        "--bin-dir",
        &folder,
    ];
    let only = ["--only", "control-planes"];
    let refused = cluster.run(&[&command[..], &only].concat(), &[]).refused();
    assert!(
        refused.contains("node control-plane-2: etcd has failed"),
        "{refused}"
    );
    let now = pids(&cluster);
    assert_eq!((now[0], now[2]), (before[0], before[2]), "{refused}");
    cluster.kubectl(&["create", "configmap", "answered"]).ok();

    std::fs::remove_file(&data).expect("removed");
    std::fs::rename(&away, &data).expect("moved back");
    let said = upgrading(&cluster, build.path())
        .finish(UPGRADE_SECONDS_MAX)
        .concat();
    assert!(said.contains("3 of 3 control planes"), "{said}");
    cluster.kubectl(&["get", "configmap", "answered"]).ok();
}

#[test]
fn a_cluster_of_one_control_plane_is_not_upgraded_under_its_users() {
    let name = format!("single-{}", std::process::id());
    let Some(cluster) = Cluster::own(&name, &["--nodes", "1"]) else {
        return;
    };
    let upgrade = |name: &str| {
        let keelway = program("keelway").display().to_string();
        cluster.run(&[&keelway, "upgrade", "--name", name], &[])
    };
    let refused = upgrade(&name).refused();
    assert!(refused.contains("has one control plane"), "{refused}");
    assert!(refused.contains("upgrade --only workers"), "{refused}");
    let refused = upgrade("nobody").refused();
    assert!(refused.contains("is not up"), "{refused}");
    let again = cluster.up(&[]).refused();
    assert!(again.contains("keelway upgrade --name"), "{again}");
    assert!(cluster.kubectl(&["get", "nodes"]).success);
}
