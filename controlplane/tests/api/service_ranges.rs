//! ServiceCIDRs and the IPAddresses out of them, by kubectl, with the controllers at work.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::Server;

/// Several times as long as servers hear of a deletion before a range is gone (10 s).
const PATIENCE: Duration = Duration::from_secs(60);

fn cluster() -> Server {
    Server::start_with("api,controllers")
}

fn range(name: &str, cidrs: &[&str]) -> String {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name},
        "spec": {"cidrs": cidrs}})
    .to_string()
}

fn service(name: &str, ip: Option<&str>) -> String {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]}})
    .to_string()
}

/// Makes a ServiceCIDR and waits until it is ready.
fn make(server: &Server, name: &str, cidrs: &[&str]) {
    server.kubectl_in("create -f -", &range(name, cidrs));
    let ready = format!("wait servicecidr/{name} --for=condition=Ready --timeout=30s");
    server.kubectl(&ready);
}

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn is_there(server: &Server, what: &[&str]) -> bool {
    let output = server.kubectl_with(&[&["get"], what].concat(), "");
    output.status.success()
}

fn ready(range: &Value) -> &Value {
    let conditions = range["status"]["conditions"].as_array();
    let conditions = conditions.expect("conditions");
    assert_eq!(conditions.len(), 1, "{range}");
    &conditions[0]
}

#[test]
fn a_range_gives_addresses_and_goes_when_its_last_one_is_free() {
    let server = cluster();
    eventually("the cluster's own range is held", || {
        let own = server.object("servicecidr kubernetes");
        own["metadata"]["finalizers"] == json!(["networking.k8s.io/service-cidr-finalizer"])
            && ready(&own)["message"] == "Kubernetes Service CIDR is ready"
    });
    make(&server, "more", &["203.0.113.0/28"]);
    let table = server.kubectl("get servicecidr more");
    let words: Vec<&str> = table.split_whitespace().collect();
    assert_eq!(
        words[..5],
        ["NAME", "CIDRS", "AGE", "more", "203.0.113.0/28"]
    );

    server.kubectl_in("create -f -", &service("web", Some("203.0.113.7")));
    let table = server.kubectl("get ipaddress 203.0.113.7");
    let words: Vec<&str> = table.split_whitespace().collect();
    let row = ["NAME", "PARENTREF", "203.0.113.7", "services/default/web"];
    assert_eq!(words, row);
    let address = server.object("ipaddress 203.0.113.7");
    let labels = json!({"ipaddress.kubernetes.io/ip-family": "IPv4",
        "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io"});
    assert_eq!(address["metadata"]["labels"], labels);
    let parent = json!({"resource": "services", "namespace": "default", "name": "web"});
    assert_eq!(address["spec"]["parentRef"], parent);
    let why = server.kubectl_fails("create -f -", &service("again", Some("203.0.113.7")));
    assert!(why.contains("provided IP is already allocated"), "{why}");

    server.kubectl("delete servicecidr more --wait=false");
    server.kubectl("wait servicecidr/more --for=condition=Ready=false --timeout=30s");
    let going = server.object("servicecidr more");
    assert_eq!(ready(&going)["reason"], "Terminating");
    let why = "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR";
    assert_eq!(ready(&going)["message"], why);
    let why = server.kubectl_fails("create -f -", &service("late", Some("203.0.113.8")));
    let outside = "the provided IP (203.0.113.8) is not in the valid range. The range of valid IPs is 10.96.0.0/16";
    assert!(why.contains(outside), "{why}");

    server.kubectl("delete service web");
    assert!(!is_there(&server, &["ipaddress", "203.0.113.7"]));
    server.kubectl("wait servicecidr/more --for=delete --timeout=60s");
}

#[test]
fn another_range_takes_over_addresses_and_the_clusters_own_comes_back() {
    let server = cluster();
    let uid = |server: &Server| server.object("servicecidr kubernetes")["metadata"]["uid"].clone();
    let before = uid(&server);
    eventually("the cluster's own range is held", || {
        server.object("servicecidr kubernetes")["metadata"]["finalizers"].is_array()
    });
    server.kubectl("delete servicecidr kubernetes --wait=false");
    server.kubectl("wait servicecidr/kubernetes --for=condition=Ready=false --timeout=30s");
    // No range gives addresses now.
    let why = server.kubectl_fails("create -f -", &service("none", None));
    assert!(why.contains("range is full"), "{why}");
    make(&server, "whole", &["10.96.0.0/12"]);
    server.kubectl_in("create -f -", &service("some", None));
    eventually("the range is gone, and made again", || {
        let output = server.kubectl_with(&["get", "servicecidr", "kubernetes", "-o", "json"], "");
        let found: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        found.is_object() && found["metadata"]["uid"] != before
    });
    server.kubectl("wait servicecidr/kubernetes --for=condition=Ready --timeout=30s");
}

#[test]
fn what_is_full_says_so_until_there_is_another_range() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let state = format!("--data-dir={}", dir.path().display());
    let flags = vec![state, "--service-cidr=10.96.0.0/28".to_owned()];
    let server = Server::start_flagged("api,controllers", flags);
    let all: Vec<String> = (0..13).map(|at| service(&format!("s{at}"), None)).collect();
    server.kubectl_in("create -f -", &all.join("\n"));
    let why = server.kubectl_fails("create -f -", &service("more", None));
    let full = r#"failed to allocate a serviceIP for Service "more": range is full"#;
    assert!(why.contains(full), "{why}");
    make(&server, "more", &["203.0.113.0/24"]);
    server.kubectl_in("create -f -", &service("more", None));
    let more = server.object("service more");
    let ip = more["spec"]["clusterIP"].as_str().expect("an address");
    assert!(ip.starts_with("203.0.113."), "{ip}");
    let addresses = server.object("ipaddresses");
    let addresses = addresses["items"].as_array().expect("a list");
    assert_eq!(addresses.len(), 15, "13 and two more");
}

#[test]
fn an_address_that_is_taken_away_from_its_service_comes_back() {
    let server = cluster();
    server.kubectl_in("create -f -", &service("web", Some("10.96.7.7")));
    server.kubectl("delete ipaddress 10.96.7.7");
    eventually("it is back", || {
        is_there(&server, &["ipaddress", "10.96.7.7"])
    });
    eventually("it is told", || {
        let events = server.object("events --field-selector reason=ClusterIPNotAllocated");
        events["items"][0]["message"] == "Cluster IP [IPv4]: 10.96.7.7 is not allocated; repairing"
    });
    // It goes with its Service for good.
    server.kubectl("delete service web");
    assert!(!is_there(&server, &["ipaddress", "10.96.7.7"]));
    // One that has nothing to do with Services is its owner's, and no Service's.
    let mine = json!({"apiVersion": "networking.k8s.io/v1", "kind": "IPAddress", "metadata": {"name": "10.96.7.8"},
        "spec": {"parentRef": {"group": "example.com", "resource": "things", "name": "a"}}});
    server.kubectl_in("create -f -", &mine.to_string());
    let why = server.kubectl_fails("create -f -", &service("web", Some("10.96.7.8")));
    assert!(why.contains("provided IP is already allocated"), "{why}");
    let patch = r#"{"spec":{"parentRef":{"name":"b"}}}"#;
    let output = server.kubectl_with(
        &[
            "patch",
            "ipaddress",
            "10.96.7.8",
            "--type=merge",
            "-p",
            patch,
        ],
        "",
    );
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(why.contains("field is immutable"), "{why}");
}

#[test]
fn a_server_that_is_told_other_ranges_says_so_or_gains_a_family() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let state = format!("--data-dir={}", dir.path().display());
    let flags = |cidrs: &str| vec![state.clone(), format!("--service-cidr={cidrs}")];
    let mut server = Server::start_flagged("api", flags("10.96.0.0/16"));
    server.kill();
    server.relaunch_on(flags("10.97.0.0/16"));
    let events = server.object("events --field-selector involvedObject.kind=ServiceCIDR");
    let event = &events["items"][0];
    assert_eq!(event["reason"], "KubernetesDefaultServiceCIDRInconsistent");
    assert_eq!(event["type"], "Warning");
    let cidrs = |server: &Server| server.object("servicecidr kubernetes")["spec"]["cidrs"].clone();
    assert_eq!(cidrs(&server), json!(["10.96.0.0/16"]));
    server.kubectl_in("create -f -", &service("web", None));
    let web = server.object("service web");
    let ip = web["spec"]["clusterIP"].as_str().expect("an address");
    assert!(ip.starts_with("10.96."), "of the range that is there: {ip}");
    server.kill();
    server.relaunch_on(flags("10.96.0.0/16,fd00:10:96::/112"));
    assert_eq!(cidrs(&server), json!(["10.96.0.0/16", "fd00:10:96::/112"]));
    let both = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "both"},
        "spec": {"ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80}]}});
    server.kubectl_in("create -f -", &both.to_string());
    let both = server.object("service both");
    let ip = both["spec"]["clusterIPs"][1]
        .as_str()
        .expect("a second address");
    assert!(ip.starts_with("fd00:10:96::"), "{ip}");
}
