//! Kubernetes' own scheduler and controllers on this API server alone, as the users that its default roles are for.
//!
//! `KEELWAY_UPSTREAM_DIR` names a folder with kube-scheduler and kube-controller-manager (v1.36).

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use crate::server::Server;

const FOLDER: &str = "KEELWAY_UPSTREAM_DIR";
/// What none of them may say: each is an API that is not as it is expected.
const COMPLAINTS: [&str; 8] = [
    "is forbidden",
    "could not find the requested resource",
    "no matches for kind",
    "failed to list",
    "Failed to watch",
    "unable to decode",
    "panic",
    "Unauthorized",
];

/// A controller that a distribution adds to its build, without the role that it brings along elsewhere.
const ADDED: &str = "service-ca-cert-publisher";

const NODE: &str = "
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {kubernetes.io/hostname: n1}}
status:
  capacity: {cpu: '4', memory: 8Gi, pods: '110'}
  allocatable: {cpu: '4', memory: 8Gi, pods: '110'}
  conditions: [{type: Ready, status: 'True', reason: KubeletReady}]
";

const STORED: &str = "
apiVersion: v1
kind: PersistentVolume
metadata: {name: disk}
spec: {capacity: {storage: 1Gi}, accessModes: [ReadWriteOnce], hostPath: {path: /srv}, storageClassName: ''}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec: {accessModes: [ReadWriteOnce], storageClassName: '', resources: {requests: {storage: 1Gi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: user}
spec:
  containers: [{name: c, image: i}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
";

/// One of their programs, which ends with the test, and what it says.
struct Program {
    child: Child,
    said: Arc<Mutex<Vec<String>>>,
}

impl Program {
    fn start(folder: &Path, name: &str, flags: &[String]) -> Self {
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(folder.join(name))
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("setpriv starts it");
        let log = BufReader::new(child.stderr.take().expect("its log"));
        let said = Arc::new(Mutex::new(Vec::new()));
        let heard = said.clone();
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                heard.lock().expect("its lines").push(line);
            }
        });
        Self { child, said }
    }

    /// Ends it, with what it has complained of.
    fn complaints(mut self) -> Vec<String> {
        assert!(
            matches!(self.child.try_wait(), Ok(None)),
            "it still runs: {:?}",
            self.said.lock().expect("its lines").last()
        );
        let _ = self.child.kill();
        let said = self.said.lock().expect("its lines");
        let complains = |line: &&String| {
            COMPLAINTS.iter().any(|words| line.contains(words)) && !line.contains(ADDED)
        };
        said.iter().filter(complains).cloned().collect()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have been ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn upstreams_scheduler_and_controllers_find_the_api_they_expect() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        println!(
            "skipped: {FOLDER} names no folder with kube-scheduler and kube-controller-manager"
        );
        return;
    };
    let folder = Path::new(&folder);
    let server = Server::start();
    let file = |name: &str| server.path(name).display().to_string();
    let common = |user: &str| {
        let kubeconfig = file(&format!("{user}.kubeconfig"));
        vec![
            format!("--kubeconfig={kubeconfig}"),
            "--secure-port=0".to_owned(),
        ]
    };
    let scheduler = Program::start(folder, "kube-scheduler", &common("scheduler"));
    let mut flags = common("controller-manager");
    flags.extend([
        format!("--service-account-private-key-file={}", file("sa.key")),
        format!("--root-ca-file={}", file("ca.crt")),
        "--use-service-account-credentials".to_owned(),
        // Nobody renews the node's Lease here.
        "--node-monitor-grace-period=10m".to_owned(),
    ]);
    let controllers = Program::start(folder, "kube-controller-manager", &flags);

    let wait = |what: &str, condition: &str| {
        server.kubectl(&format!("wait {what} --for={condition} --timeout=28s"));
    };
    server.kubectl_in("create -f -", NODE);
    wait("serviceaccount/default", "create");
    wait("configmap/kube-root-ca.crt", "create");

    // Scheduled, served and rolled out.
    server.kubectl("create deployment web --image=i --replicas=2");
    server.kubectl("expose deployment web --port=80");
    wait("deployment/web", "jsonpath={.status.replicas}=2");
    wait("pod -l app=web", "condition=PodScheduled");
    let pods = server.kubectl("get pods -l app=web -o name");
    for (number, pod) in pods.lines().enumerate() {
        let address = format!("10.9.8.{number}");
        let status = format!(
            r#"{{"status":{{"phase":"Running","podIP":"{address}","podIPs":[{{"ip":"{address}"}}],"conditions":[{{"type":"Ready","status":"True"}}]}}}}"#
        );
        let patch = ["patch", pod, "--subresource=status", "-p", &status];
        let patched = server.kubectl_with(&patch, "");
        assert!(patched.status.success(), "{patched:?}");
    }
    server.kubectl("rollout status deployment/web --timeout=28s");
    wait("endpoints/web", "jsonpath={.subsets[0].addresses[1].ip}");
    let slices = server.kubectl(
        "get endpointslices -l kubernetes.io/service-name=web -o jsonpath={.items[*].endpoints[*].addresses[0]}",
    );
    assert_eq!(slices.split_whitespace().count(), 2, "{slices}");

    // Bound, and protected while in use.
    server.kubectl_in("create -f -", STORED);
    wait("pvc/data", "jsonpath={.status.phase}=Bound");
    wait("pod/user", "condition=PodScheduled");
    server.kubectl("delete pvc data --wait=false");
    server.kubectl("delete pv disk --wait=false");
    server.kubectl("create quota few --hard=configmaps=9");
    wait("quota/few", "jsonpath={.status.used.configmaps}=1");
    let kept = server.object("pvc data");
    assert_eq!(
        kept["metadata"]["finalizers"][0],
        "kubernetes.io/pvc-protection"
    );
    server.kubectl("delete pod user --force --grace-period=0");
    wait("pvc/data", "delete");
    wait("pv/disk", "delete");

    // What an owner or a namespace takes along.
    server.kubectl("create namespace shop");
    server.kubectl("create configmap box -n shop");
    server.kubectl("delete namespace shop --timeout=28s");
    server.kubectl("delete deployment web --cascade=foreground --wait=false");
    for pod in pods.lines() {
        wait(pod, "jsonpath={.metadata.deletionTimestamp}");
        server.kubectl(&format!("delete {pod} --force --grace-period=0"));
    }
    wait("deployment/web", "delete");

    for program in [scheduler, controllers] {
        let complaints = program.complaints();
        assert!(complaints.is_empty(), "{complaints:#?}");
    }
}
