//! What a write depends on besides its own object: quotas, limits, default classes, runtime classes.

use serde_json::json;

use crate::server::Server;

/// A server on which pods can be made: their ServiceAccount is there.
fn started() -> Server {
    let server = Server::start();
    server.kubectl("create serviceaccount default");
    server
}

fn pod(name: &str, spec: &str) -> String {
    format!("---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{{spec}}}}}")
}

const PLAIN: &str = "containers: [{name: c, image: i}]";

#[test]
fn a_quota_holds_whoever_asks_at_the_same_time() {
    let server = started();
    server.kubectl("create quota few --hard=pods=3,configmaps=2,services.nodeports=1");
    std::thread::scope(|scope| {
        for at in 0..6 {
            let server = &server;
            scope.spawn(move || {
                let words = ["create", "-f", "-"];
                let _ = server.kubectl_with(&words, &pod(&format!("p{at}"), PLAIN));
            });
        }
    });
    let pods = server.kubectl("get pods -o name");
    assert_eq!(pods.lines().count(), 3, "{pods}");
    let said = server.kubectl_fails("create -f -", &pod("more", PLAIN));
    assert!(
        said.contains(
            r#"pods "more" is forbidden: exceeded quota: few, requested: pods=1, used: pods=3, limited: pods=3"#
        ),
        "{said}"
    );
    let quota = server.object("quota few");
    assert_eq!(quota["status"]["used"]["pods"], "3");
    assert_eq!(quota["status"]["hard"], quota["spec"]["hard"]);
    // A dry run counts nothing, and a change that asks for no more passes.
    server.kubectl("create configmap a --dry-run=server");
    server.kubectl("create configmap a");
    server.kubectl("create configmap b");
    server.kubectl("label configmap a x=y");
    server.kubectl_fails("create configmap c", "");
    server.kubectl("create service nodeport web --tcp=80");
    let said = server.kubectl_fails("create service nodeport other --tcp=80", "");
    assert!(said.contains("limited: services.nodeports=1"), "{said}");
    let said = server.kubectl_fails("create quota wrong --hard=apples=1", "");
    assert!(
        said.contains("must be a standard resource for quota"),
        "{said}"
    );
}

#[test]
fn limits_are_filled_in_and_held() {
    let server = started();
    let range = "---\n{apiVersion: v1, kind: LimitRange, metadata: {name: l}, spec: {limits: [\
         {type: Container, default: {cpu: 500m}, defaultRequest: {cpu: 250m}, max: {cpu: '1'}},\
         {type: PersistentVolumeClaim, max: {storage: 1Gi}}]}}";
    server.kubectl_in("create -f -", range);
    server.kubectl_in("create -f -", &pod("silent", PLAIN));
    let silent = server.object("pod silent");
    assert_eq!(
        silent["spec"]["containers"][0]["resources"],
        json!({"requests": {"cpu": "250m"}, "limits": {"cpu": "500m"}})
    );
    assert_eq!(silent["status"]["qosClass"], "Burstable");
    let greedy = "containers: [{name: c, image: i, resources: {limits: {cpu: '2'}}}]";
    let said = server.kubectl_fails("create -f -", &pod("greedy", greedy));
    assert!(
        said.contains("maximum cpu usage per Container is 1, but limit is 2"),
        "{said}"
    );
    let claim = "---\n{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: big}, spec: {\
         accessModes: [ReadWriteOnce], resources: {requests: {storage: 2Gi}}}}";
    let said = server.kubectl_fails("create -f -", claim);
    assert!(
        said.contains("maximum storage usage per PersistentVolumeClaim is 1Gi, but request is 2Gi"),
        "{said}"
    );
}

#[test]
fn classes_are_filled_in() {
    let server = started();
    let class = "---\n{apiVersion: storage.k8s.io/v1, kind: StorageClass, provisioner: example.com/x, metadata: {name: standard, \
         annotations: {storageclass.kubernetes.io/is-default-class: 'true'}}}";
    server.kubectl_in("create -f -", class);
    let claim = "---\n{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: c}, spec: {\
         accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}}";
    server.kubectl_in("create -f -", claim);
    let claim = server.object("pvc c");
    assert_eq!(claim["spec"]["storageClassName"], "standard");
    assert_eq!(claim["status"]["phase"], "Pending");
    let runtime = "---\n{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {name: heavy}, handler: heavy, \
         overhead: {podFixed: {cpu: 100m}}, scheduling: {nodeSelector: {heavy: 'yes'}}}";
    server.kubectl_in("create -f -", runtime);
    let spec = format!("runtimeClassName: heavy, {PLAIN}");
    server.kubectl_in("create -f -", &pod("h", &spec));
    let heavy = server.object("pod h");
    assert_eq!(heavy["spec"]["overhead"]["cpu"], "100m");
    assert_eq!(heavy["spec"]["nodeSelector"]["heavy"], "yes");
    let spec = format!("runtimeClassName: nothing, {PLAIN}");
    let said = server.kubectl_fails("create -f -", &pod("homeless", &spec));
    assert!(
        said.contains(r#"RuntimeClass "nothing" not found"#),
        "{said}"
    );
    server.kubectl_in(
        "create -f -",
        "---\n{apiVersion: v1, kind: Node, metadata: {name: node-a}}",
    );
    let node = server.object("node node-a");
    assert_eq!(
        node["spec"]["taints"][0]["key"],
        "node.kubernetes.io/not-ready"
    );
}

#[test]
fn a_namespace_that_is_restricted_takes_careful_pods_only() {
    let server = started();
    server.kubectl("create namespace strict");
    server.kubectl("create serviceaccount default -n strict");
    server.kubectl("label namespace strict pod-security.kubernetes.io/enforce=restricted");
    let words = ["create", "-n", "strict", "-f", "-"];
    let refused = server.kubectl_with(&words, &pod("plain", PLAIN));
    let said = crate::server::text(&refused.stderr);
    assert!(
        said.contains(r#"pods "plain" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false"#),
        "{said}"
    );
    let careful = "securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}, containers: [{name: c, image: i, \
         securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}}]";
    let taken = server.kubectl_with(&words, &pod("careful", careful));
    assert!(
        taken.status.success(),
        "{}",
        crate::server::text(&taken.stderr)
    );
}

#[test]
fn what_would_break_a_level_is_told_and_done() {
    let server = started();
    let told = |words: &[&str], input: &str| {
        let output = server.kubectl_with(words, input);
        let said = crate::server::text(&output.stderr);
        assert!(output.status.success(), "{said}");
        said
    };
    let label = |label: &str| told(&["label", "namespace", "default", "--overwrite", label], "");
    assert_eq!(label("pod-security.kubernetes.io/warn=restricted"), "");
    let words = ["create", "-f", "-"];
    let said = told(
        &words,
        &pod(
            "plain",
            "hostNetwork: true, containers: [{name: c, image: i}]",
        ),
    );
    assert!(
        said.contains(r#"Warning: would violate PodSecurity "restricted:latest": host namespaces (hostNetwork=true)"#),
        "{said}"
    );
    // What makes pods is warned of too, and never refused.
    let said = told(&words, crate::kubectl::WEB);
    assert_eq!(
        said.matches("would violate PodSecurity").count(),
        1,
        "{said}"
    );
    let said = label("pod-security.kubernetes.io/enforce=baseline");
    for line in [
        r#"Warning: existing pods in namespace "default" violate the new PodSecurity enforce level "baseline:latest""#,
        "Warning: plain: host namespaces",
    ] {
        assert!(said.contains(line), "{said}");
    }
    let refused = server.kubectl_fails(
        "label namespace default --overwrite pod-security.kubernetes.io/enforce=strict",
        "",
    );
    assert!(
        refused.contains("must be one of privileged, baseline, restricted"),
        "{refused}"
    );
    // Other things that are seldom meant.
    let twice = "---\n{apiVersion: v1, kind: Pod, metadata: {name: twice}, spec: {containers: [{name: c, image: i, \
                 env: [{name: A, value: one}, {name: A, value: two}]}]}}";
    let said = told(&words, twice);
    assert!(
        said.contains(r#"Warning: spec.containers[0].env[1]: hides previous definition of "A""#),
        "{said}"
    );
    let secret = "---\n{apiVersion: v1, kind: Secret, type: kubernetes.io/tls, metadata: {name: tls}, stringData: \
                  {tls.crt: x, tls.key: x}}";
    let said = told(&words, secret);
    let why = "Warning: tls: failed to find any PEM data in certificate input";
    assert!(said.contains(why), "{said}");
    let driver = "---\n{apiVersion: storage.k8s.io/v1, kind: CSIDriver, metadata: {name: d.example.com}, spec: \
                  {tokenRequests: [{audience: a}]}}";
    let said = told(&words, driver);
    let why = "Warning: spec.serviceAccountTokenInSecrets is unset";
    assert!(said.contains(why), "{said}");
}
