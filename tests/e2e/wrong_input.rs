//! Mistakes: each gets a clear answer, and nothing is half made.

use std::os::unix::fs::PermissionsExt;

use keelway_tests::cluster::{Cluster, keelway};
use keelway_tests::process::{run, run_with_input};
use serde_json::Value;

pub fn an_unknown_field_is_refused_by_name(cluster: &Cluster) {
    let manifest = "---\n{apiVersion: v1, kind: Service, metadata: {name: wrong}, spec: {selectr: {app: hello}, ports: [{port: 80}]}}";
    let refused = cluster
        .kubectl_with_input(&["apply", "-f", "-"], manifest)
        .refused();
    assert!(
        refused.contains("unknown field \"spec.selectr\""),
        "{refused}"
    );
    assert!(
        cluster
            .kubectl(&["get", "service", "wrong"])
            .refused()
            .contains("not found")
    );
}

pub fn a_selector_that_misses_its_template_is_refused(cluster: &Cluster) {
    let manifest = "---\n{apiVersion: apps/v1, kind: Deployment, metadata: {name: wrong}, spec: {selector: {matchLabels: {app: a}}, \
                    template: {metadata: {labels: {app: b}}, spec: {containers: [{name: c, image: i}]}}}}";
    let refused = cluster
        .kubectl_with_input(&["apply", "-f", "-"], manifest)
        .refused();
    assert!(
        refused.contains("selector") && refused.contains("does not match"),
        "{refused}"
    );
    assert!(
        cluster
            .kubectl(&["get", "deployment", "wrong"])
            .refused()
            .contains("not found")
    );
    let refused = cluster
        .kubectl(&["get", "pods", "--selector", "a in b"])
        .refused();
    assert!(refused.contains("selector"), "{refused}");
}

pub fn a_second_up_of_the_same_name_is_refused(cluster: &Cluster) {
    let nodes = cluster.workers();
    let refused = cluster.up(&[]).refused();
    assert!(
        refused.contains(&cluster.name) && refused.contains("already"),
        "{refused}"
    );
    assert_eq!(
        cluster.workers(),
        nodes,
        "the running cluster is left alone"
    );
}

pub fn up_without_root_is_refused_and_makes_nothing(_: &Cluster) {
    let folder = tempfile::tempdir().expect("there is room for a temporary folder");
    // The user nobody may not be able to enter the folder that the binary was built in.
    let program = folder.path().join("keelway");
    std::fs::copy(keelway(), &program).expect("the binary can be copied");
    for path in [folder.path(), &program] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
            .expect("they are ours");
    }
    let program = program.display().to_string();
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        &program,
        "up",
        "--name",
        "nobodys",
    ];
    let refused = run(&nobody, &[], 30).refused();
    assert!(refused.contains("root"), "{refused}");
    let status = run(&[&program, "status", "--name", "nobodys"], &[], 30).refused();
    assert!(status.contains("not up"), "{status}");
}

pub fn a_broken_cni_call_gets_an_error_of_the_specification(cluster: &Cluster) {
    let (_, pid) = cluster
        .workers()
        .into_iter()
        .next()
        .expect("there are workers");
    let pid = pid.to_string();
    let call = |command: &str, namespace: &str, input: &str| {
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "e2e-broken"),
            ("CNI_NETNS", namespace),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
        ];
        let enter = [
            "nsenter",
            "--target",
            &pid,
            "--mount",
            "--net",
            "/opt/cni/bin/keelway-cni",
        ];
        run_with_input(&enter, &variables, 30, input)
    };
    let error_of = |finished: keelway_tests::process::Finished| -> Value {
        assert!(!finished.success, "{finished}");
        serde_json::from_str(&finished.stdout)
            .unwrap_or_else(|_| panic!("errors are JSON on standard output: {finished}"))
    };
    let network = r#"{"cniVersion": "1.0.0", "name": "keelway", "type": "keelway-cni"}"#;

    let broken = error_of(call("ADD", "/run/netns/none", "{ this is not JSON"));
    assert_eq!(broken["code"], 6, "{broken}");
    let missing = error_of(call(
        "ADD",
        "/run/netns/there-is-no-such-namespace",
        network,
    ));
    assert!(
        missing["msg"]
            .as_str()
            .is_some_and(|text| text.contains("there-is-no-such-namespace")),
        "{missing}"
    );
    let unknown = error_of(call("FROBNICATE", "/run/netns/none", network));
    assert_eq!(unknown["code"], 4, "{unknown}");
    // What was never made is deleted with success, as often as one likes.
    assert!(call("DEL", "/run/netns/there-is-no-such-namespace", network).success);
}
