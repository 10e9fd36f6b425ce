//! Names, as programs of pods resolve them: through their own resolvers, search paths, and TCP where an answer is large.

use std::collections::BTreeSet;
use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::process::eventually;

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

pub fn a_rollout_of_the_dns_loses_no_query(cluster: &Cluster) {
    let script = "for i in $(seq 2000); do dig +short +tries=1 +time=4 hello.default.svc.cluster.local || echo lost; \
                  [ -e /tmp/enough ] && break; done; echo end";
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
    let service = cluster.get(&["service", "hello"]);
    let address = service["spec"]["clusterIP"].as_str().expect("an address");
    let wrong: Vec<&String> = lines
        .iter()
        .filter(|line| *line != address && *line != "end")
        .collect();
    assert!(
        wrong.is_empty() && lines.len() > 50,
        "{} lines, of which wrong: {wrong:?}",
        lines.len()
    );
}
