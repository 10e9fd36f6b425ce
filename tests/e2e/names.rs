//! Names, as programs of pods resolve them: through their own resolvers, search paths, and TCP where an answer is large.

use std::collections::BTreeSet;
use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::machine::processes;
use keelway_tests::process::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::services::on_node;

/// A pod with the C library and the programs of its node: getent asks as nearly every program does.
const GLIBC: &str = "---
apiVersion: v1
kind: Pod
metadata: {name: glibc}
spec:
  terminationGracePeriodSeconds: 0
  containers:
    - name: glibc
      image: localhost/keelway/client:VERSION
      command: [sleep, '3600']
      volumeMounts:
        - {name: usr, mountPath: /usr, readOnly: true}
        - {name: lib, mountPath: /lib, readOnly: true}
        - {name: lib64, mountPath: /lib64, readOnly: true}
  volumes:
    - {name: usr, hostPath: {path: /usr}}
    - {name: lib, hostPath: {path: /usr/lib}}
    - {name: lib64, hostPath: {path: /usr/lib64}}
";

fn make_glibc_pod(cluster: &Cluster) {
    let manifest = GLIBC.replace("VERSION", env!("CARGO_PKG_VERSION"));
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &manifest)
        .ok();
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Ready",
            "pod/glibc",
            "--timeout=60s",
        ])
        .ok();
}

fn in_glibc(cluster: &Cluster, script: &str) -> keelway_tests::process::Finished {
    cluster.kubectl(&["exec", "glibc", "--", "sh", "-c", script])
}

pub fn every_resolver_finds_services_by_every_spelling(cluster: &Cluster) {
    make_glibc_pod(cluster);
    let service = cluster.get(&["service", "hello"]);
    let address = service["spec"]["clusterIP"]
        .as_str()
        .expect("an address")
        .to_owned();
    for name in [
        "hello",
        "hello.default",
        "hello.default.svc",
        "hello.default.svc.cluster.local",
        "HELLO.default",
    ] {
        let found = in_glibc(cluster, &format!("/usr/bin/getent ahostsv4 {name}")).ok();
        assert!(
            found.lines().all(|line| line.starts_with(&address)),
            "{name}: {found}"
        );
    }
    in_glibc(cluster, "/usr/bin/getent ahostsv4 absent.default").refused();
    let reverse = in_glibc(cluster, &format!("/usr/bin/getent hosts {address}")).ok();
    assert!(
        reverse.contains("hello.default.svc.cluster.local"),
        "{reverse}"
    );
    // busybox has a resolver of its own for this applet.
    let found = cluster
        .in_client("busybox nslookup hello.default.svc.cluster.local")
        .ok();
    assert!(found.contains(&address), "{found}");
    let answer = cluster.in_client("dig +short +search hello.default").ok();
    assert_eq!(answer.trim(), address);
}

pub fn busybox_programs_go_through_the_search_path(cluster: &Cluster) {
    let address = address_of_hello(cluster);
    // The applet's own resolver asks for every name of the path, and tells which there are.
    let told = cluster.in_client("busybox nslookup hello 2>&1; true").ok();
    assert!(told.contains(&address), "{told}");
    assert!(told.contains("hello.default.svc.cluster.local"), "{told}");
    let absent = cluster.in_client("busybox nslookup absent.default 2>&1; true");
    assert!(!absent.ok().contains(&address));
}

const ENDPOINTS: usize = 1000;

pub fn a_headless_name_of_a_thousand_endpoints_is_resolved_whole(cluster: &Cluster) {
    make_glibc_pod(cluster);
    let mut manifest = String::from(
        "---\n{apiVersion: v1, kind: Service, metadata: {name: many}, spec: {clusterIP: None, ports: [{name: x, port: 80}]}}\n",
    );
    for slice in 0..ENDPOINTS / 100 {
        let endpoints: Vec<String> = (0..100)
            .map(|i| {
                format!(
                    "{{addresses: ['198.19.{slice}.{}'], conditions: {{ready: true}}}}",
                    i + 1
                )
            })
            .collect();
        manifest += &format!(
            "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {{name: many-{slice}, \
             labels: {{kubernetes.io/service-name: many}}}}, ports: [{{name: x, port: 80}}], endpoints: [{}]}}\n",
            endpoints.join(", ")
        );
    }
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &manifest)
        .ok();
    let name = "many.default.svc.cluster.local";
    eventually("every endpoint by TCP", Duration::from_secs(20), || {
        let answer = cluster.in_client(&format!("dig +short {name}")).ok();
        let different: BTreeSet<&str> = answer.lines().collect();
        if different.len() == ENDPOINTS {
            Ok(())
        } else {
            Err(format!("{} endpoints", different.len()))
        }
    });
    let cut = cluster
        .in_client(&format!("dig +noedns +ignore {name}"))
        .ok();
    assert!(
        cut.contains(" tc"),
        "512 bytes do not hold a thousand: {cut}"
    );
    let found = in_glibc(
        cluster,
        &format!("/usr/bin/getent ahostsv4 {name} | grep -c STREAM"),
    )
    .ok();
    assert_eq!(
        found.trim(),
        ENDPOINTS.to_string(),
        "glibc comes back by TCP"
    );
    cluster.kubectl(&["delete", "service", "many"]).ok();
    cluster
        .kubectl(&[
            "delete",
            "endpointslices",
            "-l",
            "kubernetes.io/service-name=many",
        ])
        .ok();
}

/// Another name of `hello`: only servers tell where an alias leads, names with addresses are answered at pods' interfaces.
const ALIAS: &str = "---
apiVersion: v1
kind: Service
metadata: {name: alias}
spec: {type: ExternalName, externalName: hello.default.svc.cluster.local}
";

pub fn address_of_hello(cluster: &Cluster) -> String {
    let service = cluster.get(&["service", "hello"]);
    let address = service["spec"]["clusterIP"].as_str().expect("an address");
    address.to_owned()
}

/// Where packets pass conntrack, one of two questions that leave a socket at once is lost now and then, and the program waits five seconds.
pub fn two_questions_at_once_from_one_socket_are_both_answered(cluster: &Cluster) {
    make_glibc_pod(cluster);
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], ALIAS)
        .ok();
    let address = address_of_hello(cluster);
    eventually("the alias", Duration::from_secs(20), || {
        match in_glibc(
            cluster,
            "/usr/bin/getent ahostsv4 alias.default.svc.cluster.local",
        ) {
            found if found.stdout.contains(&address) => Ok(()),
            other => Err(other.to_string()),
        }
    });
    // One attempt: a packet that is lost is a lookup that fails, not one that is slow.
    let script = "export RES_OPTIONS=attempts:1; for i in $(seq 200); do for name in hello alias; do \
                  /usr/bin/getent ahosts $name.default.svc.cluster.local > /dev/null || echo lost $name; done; done; echo end";
    let lines = in_glibc(cluster, script).ok();
    assert_eq!(lines.trim(), "end");
    for (node, pid) in cluster.workers() {
        let count = on_node(
            pid,
            "cat /proc/sys/net/netfilter/nf_conntrack_count 2>/dev/null || echo 0",
        )
        .ok();
        assert_eq!(count.trim(), "0", "{node} keeps track of connections");
    }
    cluster.kubectl(&["delete", "service", "alias"]).ok();
}

pub fn while_a_nodes_own_server_is_away_another_one_answers_its_pods(cluster: &Cluster) {
    let client = cluster.get(&["pod", "client"]);
    let node = client["spec"]["nodeName"].as_str().expect("a node");
    let own = format!("spec.nodeName={node}");
    let status = || {
        let pods = cluster.get(&[
            "pods",
            "--namespace=kube-system",
            "--selector=k8s-app=kube-dns",
            "--field-selector",
            &own,
        ]);
        pods["items"][0]["status"]["containerStatuses"][0].clone()
    };
    let is_held_off = || status()["state"]["waiting"]["reason"] == "CrashLoopBackOff";
    let address = address_of_hello(cluster);
    let forward = "dig +short +tries=1 +time=2 hello.default.svc.cluster.local";
    // Reversed names are always a server's to answer.
    let reverse = format!("dig +short +tries=1 +time=2 -x {address}");
    let name = "hello.default.svc.cluster.local.";
    eventually("a server that stays away", Duration::from_secs(60), || {
        for server in processes(&format!("{}/{node}", cluster.name), "keelway-dns") {
            // It may be gone already.
            let _ = kill(Pid::from_raw(server.pid), Signal::SIGKILL);
        }
        // Names of Services are answered at the pod's interface meanwhile.
        assert_eq!(cluster.in_client(forward).ok().trim(), address);
        if is_held_off() {
            Ok(())
        } else {
            Err(status().to_string())
        }
    });
    eventually("another server", Duration::from_secs(5), || {
        match cluster.in_client(&reverse).stdout {
            found if found.trim() == name => Ok(()),
            other => Err(other),
        }
    });
    let script =
        format!("for i in $(seq 100); do {reverse} || echo lost; {forward} || echo lost; done");
    let found = cluster.in_client(&script).ok();
    let right = |line: &&str| *line == name || *line == address;
    assert_eq!(found.lines().filter(right).count(), 200, "{found}");
    assert!(is_held_off(), "its own server was back: {}", status());
    eventually(
        "the server to be back",
        Duration::from_secs(60),
        || match status() {
            status if status["ready"] == true => Ok(()),
            status => Err(status.to_string()),
        },
    );
}

/// The server as a Deployment, without the agent's socket: it watches the API server by itself.
const DEPLOYMENT: &str = "---
apiVersion: apps/v1
kind: Deployment
metadata: {name: plain-dns, namespace: kube-system}
spec:
  replicas: 2
  selector: {matchLabels: {app: plain-dns}}
  template:
    metadata: {labels: {app: plain-dns}}
    spec:
      serviceAccountName: keelway-dns
      dnsPolicy: Default
      terminationGracePeriodSeconds: 0
      containers:
        - name: dns
          image: localhost/keelway/dns:VERSION
          imagePullPolicy: IfNotPresent
          args: [serve, --lameduck=0]
          readinessProbe: {httpGet: {path: /readyz, port: 8181}, periodSeconds: 1}
";

pub fn a_plain_deployment_of_the_dns_works_too(cluster: &Cluster) {
    let manifest = DEPLOYMENT.replace("VERSION", env!("CARGO_PKG_VERSION"));
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &manifest)
        .ok();
    let deployment = ["--namespace=kube-system", "deployment/plain-dns"];
    cluster
        .kubectl(&[
            "rollout",
            "status",
            deployment[0],
            deployment[1],
            "--timeout=60s",
        ])
        .ok();
    let pods = cluster.get(&["pods", deployment[0], "--selector=app=plain-dns"]);
    let address = address_of_hello(cluster);
    let servers = pods["items"].as_array().expect("a list");
    assert_eq!(servers.len(), 2);
    for server in servers {
        let at = server["status"]["podIP"].as_str().expect("an address");
        let ask = |what: &str| cluster.in_client(&format!("dig +short @{at} {what}")).ok();
        assert_eq!(ask("hello.default.svc.cluster.local").trim(), address);
        assert_eq!(
            ask(&format!("-x {address}")).trim(),
            "hello.default.svc.cluster.local."
        );
    }
    cluster
        .kubectl(&["delete", deployment[0], deployment[1]])
        .ok();
}

pub fn a_rollout_of_the_dns_loses_no_query(cluster: &Cluster) {
    let address = address_of_hello(cluster);
    // One is answered at the pod's interface, the other by a server.
    let ask = "dig +short +tries=1 +time=4";
    let script = format!(
        "for i in $(seq 2000); do {ask} hello.default.svc.cluster.local || echo lost; {ask} -x {address} || echo lost; \
         [ -e /tmp/enough ] && break; done; echo end"
    );
    let line = cluster.kubectl_line(&format!("exec client -- sh -c '{script}'"));
    let asking = keelway_tests::process::Running::start(&["sh", "-c", &line], &[]);
    cluster
        .kubectl(&[
            "-n",
            "kube-system",
            "rollout",
            "restart",
            "daemonset/keelway-dns",
        ])
        .ok();
    cluster
        .kubectl(&[
            "-n",
            "kube-system",
            "rollout",
            "status",
            "daemonset/keelway-dns",
            "--timeout=120s",
        ])
        .ok();
    cluster.in_client("touch /tmp/enough").ok();
    let lines = asking.finish(Duration::from_secs(60));
    cluster.in_client("rm /tmp/enough").ok();
    let wrong: Vec<&String> = lines
        .iter()
        .filter(|line| {
            **line != address && *line != "hello.default.svc.cluster.local." && *line != "end"
        })
        .collect();
    assert!(
        wrong.is_empty() && lines.len() > 50,
        "{} lines, of which wrong: {wrong:?}",
        lines.len()
    );
}
