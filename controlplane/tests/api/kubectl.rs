//! What people type.

use crate::server::Server;
use serde_json::Value;

pub const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: c, image: "nginx:1.27", ports: [{containerPort: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, name: http}]}
"#;

#[test]
fn a_fresh_cluster_has_its_first_objects() {
    let server = Server::start();
    let namespaces = server.kubectl("get namespaces -o name");
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        assert!(
            namespaces.contains(&format!("namespace/{name}\n")),
            "{namespaces}"
        );
    }
    let service = server.object("service kubernetes");
    assert_eq!(service["spec"]["clusterIP"], "10.96.0.1");
    let slice = server.object("endpointslice kubernetes");
    assert_eq!(slice["endpoints"][0]["addresses"][0], "127.0.0.1");
    assert_eq!(
        slice["metadata"]["labels"]["kubernetes.io/service-name"],
        "kubernetes"
    );
    assert!(
        server
            .kubectl("get priorityclass")
            .contains("system-node-critical")
    );
    assert!(server.kubectl("cluster-info").contains(&server.url()));
    assert!(server.kubectl("version").contains("Server Version: v1.36"));
    let resources = server.kubectl("api-resources");
    for line in [
        "deployments",
        "endpointslices",
        "leases",
        "clusterrolebindings",
    ] {
        assert!(resources.contains(line), "{resources}");
    }
    assert!(
        server
            .kubectl("explain deployment.spec.strategy")
            .contains("rollingUpdate")
    );
    assert_eq!(server.kubectl("get --raw /readyz"), "ok");
}

#[test]
fn objects_are_created_printed_changed_and_deleted() {
    let server = Server::start();
    // kubectl sends these two as protobuf.
    server.kubectl("create configmap settings --from-literal=color=blue");
    server.kubectl("create namespace extra");
    assert!(
        server
            .kubectl("get configmap")
            .lines()
            .any(|line| line.starts_with("settings   1 "))
    );
    server.kubectl("label configmap settings tier=one");
    server.kubectl("annotate configmap settings note=hello");
    assert!(
        server
            .kubectl("get configmap -l tier=one -o name")
            .contains("configmap/settings")
    );
    assert_eq!(server.kubectl("get configmap -l tier=two -o name"), "");
    server.kubectl("label configmap settings tier-");
    let before = server.object("configmap settings");
    assert_eq!(before["metadata"]["labels"], Value::Null);
    assert_eq!(before["metadata"]["annotations"]["note"], "hello");
    // A write that changes nothing leaves the object as it was.
    server.kubectl("annotate configmap settings note=hello --overwrite");
    assert_eq!(server.object("configmap settings"), before);
    server.kubectl("delete configmap settings");
    assert!(
        server
            .kubectl_fails("get configmap settings", "")
            .contains(r#"configmaps "settings" not found"#)
    );
}

#[test]
fn apply_creates_then_changes_only_what_differs() {
    let server = Server::start();
    let said = server.kubectl_in("apply -f -", WEB);
    assert!(
        said.contains("deployment.apps/web created") && said.contains("service/web created"),
        "{said}"
    );
    let said = server.kubectl_in("apply -f -", WEB);
    assert!(
        said.contains("deployment.apps/web unchanged") && said.contains("service/web unchanged"),
        "{said}"
    );
    let deployment = server.object("deployment web");
    assert_eq!(deployment["metadata"]["generation"], 1);
    assert_eq!(
        deployment["spec"]["template"]["spec"]["containers"][0]["imagePullPolicy"],
        "IfNotPresent"
    );
    let address = server.object("service web")["spec"]["clusterIP"].clone();
    let said = server.kubectl_in(
        "apply -f -",
        &WEB.replace("1.27", "1.28")
            .replace("port: 80, name", "port: 81, name"),
    );
    assert!(
        said.contains("deployment.apps/web configured") && said.contains("service/web configured"),
        "{said}"
    );
    assert_eq!(server.object("deployment web")["metadata"]["generation"], 2);
    assert_eq!(
        server.object("service web")["spec"]["clusterIP"],
        address,
        "an update keeps the address"
    );
    server.kubectl("scale deployment web --replicas 5");
    assert_eq!(server.object("deployment web")["spec"]["replicas"], 5);
    let wide = server.kubectl("get deployment web -o wide");
    assert!(
        wide.contains("CONTAINERS") && wide.contains("nginx:1.28") && wide.contains("app=web"),
        "{wide}"
    );
    assert!(
        server
            .kubectl("describe deployment web")
            .contains("5 desired")
    );
    assert!(server.kubectl("describe service web").contains("NodePort:"));
    server.kubectl_in("delete -f -", WEB);
    assert!(!server.kubectl("get all").contains("web"));
}

#[test]
fn server_side_apply_tells_who_owns_a_field() {
    let server = Server::start();
    server.kubectl_in("apply --server-side -f -", WEB);
    let other = WEB.replace("replicas: 2", "replicas: 9");
    let refused = server.kubectl_fails("apply --server-side --field-manager=other -f -", &other);
    assert!(
        refused.contains(".spec.replicas") && refused.contains("conflict"),
        "{refused}"
    );
    assert_eq!(server.object("deployment web")["spec"]["replicas"], 2);
    server.kubectl_in(
        "apply --server-side --field-manager=other --force-conflicts -f -",
        &other,
    );
    let deployment = server.object("deployment web");
    assert_eq!(deployment["spec"]["replicas"], 9);
    let managers = deployment["metadata"]["managedFields"]
        .as_array()
        .expect("managers");
    assert!(
        managers
            .iter()
            .any(|entry| entry["manager"] == "other" && entry["operation"] == "Apply")
    );
}

#[test]
fn a_pod_gets_its_account_its_token_and_its_tolerations() {
    let server = Server::start();
    let refused = server.kubectl_fails("run one --image=nginx", "");
    assert!(
        refused.contains("serviceaccount \"default\" not found"),
        "{refused}"
    );
    server.kubectl("create serviceaccount default");
    server.kubectl("run one --image=nginx");
    let pod = server.object("pod one");
    assert_eq!(pod["status"]["phase"], "Pending");
    assert_eq!(pod["spec"]["serviceAccountName"], "default");
    assert_eq!(pod["spec"]["tolerations"].as_array().map(Vec::len), Some(2));
    assert_eq!(pod["spec"]["priority"], 0);
    let mount = &pod["spec"]["containers"][0]["volumeMounts"][0];
    assert_eq!(
        mount["mountPath"],
        "/var/run/secrets/kubernetes.io/serviceaccount"
    );
    assert_eq!(mount["name"], pod["spec"]["volumes"][0]["name"]);
    assert!(
        server
            .kubectl("get pods")
            .lines()
            .any(|line| line.starts_with("one    0/1     Pending"))
    );
    // It runs nowhere, so it is gone at once.
    server.kubectl("delete pod one --wait=false");
    assert_eq!(server.kubectl("get pods -o name"), "");
}

#[test]
fn a_pod_on_a_node_waits_for_its_grace_period() {
    let server = Server::start();
    server.kubectl("create serviceaccount default");
    let pod = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "placed"},
        "spec": {"nodeName": "n1", "terminationGracePeriodSeconds": 7, "containers": [{"name": "c", "image": "i"}]}}"#;
    server.kubectl_in("create -f -", pod);
    server.kubectl("delete pod placed --wait=false");
    let pod = server.object("pod placed");
    assert_eq!(pod["metadata"]["deletionGracePeriodSeconds"], 7);
    assert!(pod["metadata"]["deletionTimestamp"].is_string());
    assert!(server.kubectl("get pod placed").contains("Terminating"));
    server.kubectl("delete pod placed --grace-period=0 --force");
    assert_eq!(server.kubectl("get pods -o name"), "");
}

#[test]
fn tokens_of_service_accounts_open_the_door_until_the_account_is_gone() {
    let server = Server::start();
    server.kubectl("create serviceaccount robot");
    let token = server.kubectl("create token robot --duration=20m");
    let whoami = |token: &str| {
        // Without the client certificate, so that only the token speaks.
        let ca = server.path("ca.crt").display().to_string();
        let program = std::env::var("KUBECTL").unwrap_or("kubectl".to_owned());
        let arguments = [
            "--kubeconfig=/dev/null",
            "--server",
            &server.url(),
            "--certificate-authority",
            &ca,
            "--token",
            token.trim(),
        ];
        std::process::Command::new(program)
            .args(arguments)
            .args(["auth", "whoami"])
            .output()
            .expect("kubectl")
    };
    let said = crate::server::text(&whoami(&token).stdout);
    assert!(
        said.contains("system:serviceaccount:default:robot")
            && said.contains("system:serviceaccounts"),
        "{said}"
    );
    assert!(!whoami("nonsense").status.success());
    server.kubectl("delete serviceaccount robot");
    assert!(!whoami(&token).status.success(), "the account is gone");
}

#[test]
fn finalizers_hold_an_object_until_they_are_taken_away() {
    let server = Server::start();
    let object = r#"{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "held", "finalizers": ["example.com/hold"]}}"#;
    server.kubectl_in("create -f -", object);
    server.kubectl("delete configmap held --wait=false");
    assert!(server.object("configmap held")["metadata"]["deletionTimestamp"].is_string());
    let patch = r#"--patch={"metadata":{"finalizers":null}}"#;
    server.kubectl(&format!("patch configmap held --type=merge {patch}"));
    assert_eq!(server.kubectl("get configmap -o name"), "");
}

#[test]
fn a_dry_run_changes_nothing() {
    let server = Server::start();
    assert!(
        server
            .kubectl_in("apply --dry-run=server -f -", WEB)
            .contains("created (server dry run)")
    );
    assert_eq!(server.kubectl("get deployment -o name"), "");
    server.kubectl("create configmap kept");
    server.kubectl("delete configmap kept --dry-run=server");
    assert_eq!(server.kubectl("get configmap -o name"), "configmap/kept\n");
    // The refused node port of a dry run is free again.
    let service = WEB
        .split("---")
        .nth(1)
        .expect("the service")
        .replace("name: http}", "name: http, nodePort: 30123}");
    server.kubectl_in("apply --dry-run=server -f -", &service);
    server.kubectl_in("apply -f -", &service);
}

#[test]
fn both_groups_show_the_same_events() {
    let server = Server::start();
    let event = r#"{"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e", "namespace": "default"},
        "eventTime": "2026-01-02T03:04:05.000006Z", "reason": "Tested", "note": "all is well", "type": "Normal", "action": "Test",
        "reportingController": "tests", "reportingInstance": "one", "regarding": {"kind": "Pod", "name": "p", "namespace": "default"}}"#;
    server.kubectl_in("create -f -", event);
    let old = server.object("events.v1. e");
    assert_eq!(old["message"], "all is well");
    assert_eq!(old["involvedObject"]["name"], "p");
    let new = server.object("events.v1.events.k8s.io e");
    assert_eq!(new["note"], "all is well");
    assert_eq!(new["apiVersion"], "events.k8s.io/v1");
    assert!(
        server
            .kubectl("get events --field-selector involvedObject.name=p")
            .contains("all is well")
    );
}
