//! Another authority takes the place of the cluster's, while the cluster runs and is asked.

use std::sync::atomic::{AtomicBool, Ordering};

use keelway_tests::cluster::client;
use keelway_tests::process::{Finished, eventually, run};
use keelway_tests::sandbox::is_root;

use crate::machine::{CHANGE_TIMEOUT, Cluster, Machine, UP_TIMEOUT, sandbox};

const STEP: [&str; 2] = ["certs", "rotate-ca"];
/// The second step waits until clients in pods have looked at their authorities, which takes them a minute.
const ISSUE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(150);

fn step(machine: &Machine, name: &str) -> Finished {
    machine.keelway(&[&STEP[..], &[name]].concat())
}

fn kubectl(kubeconfig: &str, arguments: &[&str]) -> Finished {
    let kubectl = client("kubectl");
    let base = [kubectl.as_str(), "--kubeconfig", kubeconfig];
    run(&[&base[..], arguments].concat(), &[], 60)
}

/// Holds that what the node and its control plane show is of the authority in a file, and of no other.
fn is_of(machine: &Machine, authority: &str) {
    let kubelet =
        ["client", "serving"].map(|name| format!("var/lib/kubelet/pki/kubelet-{name}.pem"));
    let own = ["apiserver.crt", "apiserver-kubelet-client.crt"];
    let own = own.map(|name| format!("credentials/{name}"));
    let all = kubelet.into_iter().chain(own);
    for path in all
        .map(|path| machine.node_file(&path))
        .filter(|path| path.exists())
    {
        let path = path.display().to_string();
        let verified = run(&["openssl", "verify", "-CAfile", authority, &path], &[], 20);
        assert!(verified.success, "{path}: {}", verified.stderr);
    }
}

#[test]
fn the_authority_is_rotated_while_the_cluster_runs() {
    if !is_root("the_authority_is_rotated_while_the_cluster_runs") {
        return;
    }
    let _sandbox = sandbox();
    let folder = tempfile::tempdir().expect("a folder");
    let [first, second] = [41, 42].map(|number| Machine::new(folder.path(), number));
    let (server, join) = first.begin("rotating", &["--schedulable"]);
    let cluster = Cluster { server: &first };
    let mut arguments = second.join(&join);
    arguments.push("--foreground");
    let node = second.keelway_running(&arguments);
    node.line_with("is node", UP_TIMEOUT);
    cluster.wait_ready(&second.name);
    cluster.apply_hello();
    cluster.wait_hello();
    let before = folder.path().join("before").display().to_string();
    let restarts = |cluster: &Cluster<'_>| {
        let pods = cluster.get(&["pods", "--all-namespaces"]);
        let pods = pods["items"].as_array().expect("a list").clone();
        let statuses = pods
            .iter()
            .flat_map(|pod| pod["status"]["containerStatuses"].as_array().cloned())
            .flatten();
        statuses
            .map(|status| status["restartCount"].as_u64().unwrap_or_default())
            .sum::<u64>()
    };

    // One after the other, and where the key is.
    assert!(
        step(&first, "issue")
            .refused()
            .contains("one authority only")
    );
    assert!(
        step(&second, "trust")
            .refused()
            .contains("on the control plane")
    );

    let authority = first.node_file("credentials/ca.crt");
    let read = || std::fs::read_to_string(&authority).expect("the authorities");
    let old = read();
    let done = AtomicBool::new(false);
    let asked = std::thread::scope(|scope| {
        // Whoever follows the administrator's kubeconfig is served by every request.
        let asking = scope.spawn(|| {
            let mut asked = 0;
            while !done.load(Ordering::Relaxed) {
                let answer = kubectl(&first.kubeconfig(), &["get", "nodes", "--output=name"]);
                assert!(answer.success, "after {asked}: {}", answer.stderr);
                asked += 1;
            }
            asked
        });
        let rotated = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            rotate(&first, &cluster, &old, &before);
        }));
        done.store(true, Ordering::Relaxed);
        let asked = asking.join();
        if let Err(panic) = rotated {
            std::panic::resume_unwind(panic);
        }
        asked.expect("every request is answered")
    });
    assert!(asked > 20, "{asked}");

    // The old one is nobody now: not for clients, and not in what anybody shows.
    let refused = kubectl(&before, &["get", "nodes"]);
    assert!(!refused.success, "{}", refused.stdout);
    let new = read();
    assert_eq!(new.matches("BEGIN").count(), 1);
    assert!(!old.contains(new.trim()) && !new.contains(old.trim()));
    for machine in [&first, &second] {
        is_of(machine, &authority.display().to_string());
    }
    assert_eq!(restarts(&cluster), 0, "nothing was started anew for that");
    let printed = first.keelway(&["token", "create"]).ok();
    assert!(!printed.contains(&join[join.len() - 1]), "another hash");

    // What starts again goes by the new one, though its machine has joined with the old one.
    drop(node);
    second.wait_ended();
    let node = second.keelway_running(&["start", "--foreground"]);
    drop(server);
    first.wait_ended();
    let server = first.keelway_running(&["start", "--foreground"]);
    eventually("pods on both machines answer again", CHANGE_TIMEOUT, || {
        let names = cluster.kubectl(&["get", "pods", "--output=name"]);
        let all = names.stdout.lines().filter(|name| name.contains("hello"));
        let mut all = all.map(|pod| cluster.kubectl(&["logs", "--tail=1", pod]));
        let failed = all.find(|ended| !ended.success);
        let failed = failed.map(|ended| ended.stderr);
        match (names.success, failed) {
            (true, None) => Ok(()),
            (_, failed) => Err(failed.unwrap_or(names.stderr)),
        }
    });
    let kubeconfig = first.kubeconfig();
    second.keelway(&["leave", "--kubeconfig", &kubeconfig]).ok();
    drop(node);
    first.keelway(&["leave", "--delete-cluster"]).ok();
    drop(server);
}

fn rotate(first: &Machine, cluster: &Cluster<'_>, old: &str, before: &str) {
    let authority = first.node_file("credentials/ca.crt");
    let read = || std::fs::read_to_string(&authority).expect("the authorities");
    let in_pod = || {
        let path = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
        cluster.kubectl(&["exec", "client", "--", "cat", path]).ok()
    };
    let says = step(first, "trust").ok();
    assert!(says.contains("the old one signs"), "{says}");
    let both = read();
    assert!(both.starts_with(old.trim()) && both.matches("BEGIN").count() == 3);
    eventually("pods have both", CHANGE_TIMEOUT, || {
        let has = in_pod();
        (has == both).then_some(()).ok_or(has)
    });
    // Of one who trusts both, and has what the old one signed.
    std::fs::copy(first.kubeconfig(), before).expect("a copy");
    // Again, it changes nothing.
    step(first, "trust").ok();
    assert_eq!(read(), both);
    assert!(step(first, "drop").refused().contains("still signs"));

    // Killed as soon as the new one signs, it is done again.
    let killed = first.keelway_running(&[&STEP[..], &["issue"]].concat());
    let next = first.node_file("credentials/ca-next.key");
    eventually("the new one signs", ISSUE_TIMEOUT, || {
        (!next.exists()).then_some(()).ok_or("not yet".to_owned())
    });
    drop(killed);
    let says = step(first, "issue").ok();
    assert!(says.contains("the new one signs"), "{says}");
    assert!(!read().starts_with(old.trim()));
    assert!(
        step(first, "trust")
            .refused()
            .contains("`rotate-ca drop` is next")
    );
    // Those who have not changed yet are served still.
    kubectl(before, &["get", "nodes"]).ok();
    let says = step(first, "drop").ok();
    assert!(says.contains("One authority is trusted"), "{says}");
    step(first, "drop").ok();
    eventually("pods have the new one alone", CHANGE_TIMEOUT, || {
        let has = in_pod();
        (has == read()).then_some(()).ok_or(has)
    });
}
