//! Mistakes get answers that say what to do.

use crate::kubectl::WEB;
use crate::server::Server;

#[test]
fn mistakes_are_told_field_by_field() {
    let server = Server::start();
    let config_map =
        |rest: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: a}}\n{rest}");
    let cases = [
        (config_map("dat: {x: y}"), r#"unknown field "dat""#),
        (
            config_map("data: {x: 1}"),
            "cannot unmarshal number into Go struct field ConfigMap.data of type string",
        ),
        (
            config_map("data: {\"a b\": x}"),
            r#"data[a b]: Invalid value: "a b""#,
        ),
        (config_map("data: ["), "error converting YAML"),
        (
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: Upper}".to_owned(),
            "lowercase RFC 1123 subdomain",
        ),
        (
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, labels: {x: 'a b'}}".to_owned(),
            "metadata.labels: Invalid value",
        ),
        (
            "apiVersion: v1\nkind: Nothing\nmetadata: {name: a}".to_owned(),
            "no matches for kind \"Nothing\"",
        ),
        (
            WEB.replacen(
                "labels: {app: web}}\n    spec",
                "labels: {app: other}}\n    spec",
                1,
            ),
            "`selector` does not match template `labels`",
        ),
        (
            WEB.replace("replicas: 2", "replicas: -1"),
            "must be greater than or equal to 0",
        ),
        (
            WEB.replace("image: \"nginx:1.27\"", "image: \"\""),
            "spec.template.spec.containers[0].image: Required value",
        ),
        (
            WEB.replace("type: NodePort", "type: Nothing"),
            r#"spec.type: Unsupported value: "Nothing""#,
        ),
        (
            WEB.replace("port: 80, name", "port: 0, name"),
            "must be between 1 and 65535, inclusive",
        ),
        (
            WEB.replace("port: 80, name", "port: 80, nodePort: 80, name"),
            "not in the valid range",
        ),
        (
            WEB.replace("type: NodePort,", "type: ClusterIP, clusterIP: 192.0.2.1,"),
            "not in the valid range",
        ),
        (
            WEB.replace("name: web}\nspec", "name: web, namespace: nowhere}\nspec"),
            r#"namespaces "nowhere" not found"#,
        ),
    ];
    for (manifest, expected) in cases {
        let said = server.kubectl_fails("create --dry-run=server -f -", &manifest);
        assert!(
            said.contains(expected),
            "expected {expected:?} in:\n{said}\nof\n{manifest}"
        );
    }
}

#[test]
fn fixed_fields_stay() {
    let server = Server::start();
    server.kubectl_in("apply -f -", WEB);
    let said = server.kubectl_fails("apply -f -", &WEB.replace("app: web", "app: other"));
    assert!(said.contains("field is immutable"), "{said}");
    let said = server.kubectl_fails(r#"patch service web --type=merge -p {"spec":{"clusterIP":"10.96.77.77","clusterIPs":["10.96.77.77"]}}"#, "");
    assert!(said.contains("may not change once set"), "{said}");
    let said = server.kubectl_fails("delete namespace kube-system", "");
    assert!(said.contains("this namespace may not be deleted"), "{said}");
}

#[test]
fn strangers_are_refused_with_a_status() {
    let server = Server::start();
    let ca = server.path("ca.crt").display().to_string();
    let curl = |path: &str| {
        let output = std::process::Command::new("curl")
            .args([
                "--silent",
                "--show-error",
                "--cacert",
                &ca,
                &format!("{}{path}", server.url()),
            ])
            .output()
            .expect("curl");
        crate::server::text(&output.stdout)
    };
    for path in [
        "/api/v1/pods",
        "/apis",
        "/metrics",
        "/openapi/v3",
        "/nothing",
    ] {
        let said: serde_json::Value = serde_json::from_str(&curl(path)).expect("a Status");
        assert_eq!(
            (said["kind"].as_str(), said["code"].as_u64()),
            (Some("Status"), Some(401)),
            "{path}"
        );
    }
    assert_eq!(curl("/readyz"), "ok");
}

#[test]
fn unknown_paths_and_selectors_are_told_apart() {
    let server = Server::start();
    let said = server.kubectl_fails("get --raw /apis/nowhere/v1/things", "");
    assert!(
        said.contains("could not find the requested resource"),
        "{said}"
    );
    assert!(server.kubectl_fails("get pods -l", "a in").len() > 1);
    let said = server.kubectl_fails("get pods --field-selector spec.color=red", "");
    assert!(
        said.contains("field label not supported: spec.color"),
        "{said}"
    );
    let said = server.kubectl_fails("get pods --selector=a=b=c", "");
    assert!(
        said.contains("found '=', expected: ',' or 'end of string'"),
        "{said}"
    );
}
