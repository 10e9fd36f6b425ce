//! Clusters of IPv6, and of both address families, used by kubectl and from pods. Each is small and short-lived: what does not
//! depend on the family is the end-to-end suite's.

use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::process;
use serde_json::Value;

const CHANGE_TIMEOUT: Duration = Duration::from_secs(20);

/// A cluster of one node with the example in it; None, with a word about it, where none can be had.
fn cluster(family: &str) -> Option<Cluster> {
    let name = format!("{family}-{}", std::process::id());
    let cluster = Cluster::own(&name, &["--nodes", "1", "--ip-family", family])?;
    cluster.run_example();
    Some(cluster)
}

/// Waits until something is so.
#[track_caller]
fn eventually(what: &str, limit: Duration, mut is_so: impl FnMut() -> bool) {
    process::eventually(what, limit, || {
        is_so().then_some(()).ok_or_else(|| "not yet".to_owned())
    });
}

/// The texts of a list, or of one field of its items.
fn texts(list: &Value, field: Option<&str>) -> Vec<String> {
    let items = list.as_array().into_iter().flatten();
    items
        .map(|item| field.map_or(item, |field| &item[field]))
        .map(|text| text.as_str().unwrap_or_default().to_owned())
        .collect()
}

fn families(addresses: &[String]) -> Vec<&'static str> {
    let family = |address: &String| match address.parse() {
        Ok(std::net::IpAddr::V4(_)) => "IPv4",
        Ok(std::net::IpAddr::V6(_)) => "IPv6",
        Err(_) => "none",
    };
    addresses.iter().map(family).collect()
}

/// Checks that nodes, pods and what pods are told of both have these families, in this order.
fn check_addresses(cluster: &Cluster, expected: &[&str]) {
    let node = &cluster.get(&["nodes"])["items"][0];
    let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
    let internal: Vec<String> = addresses
        .filter(|address| address["type"] == "InternalIP")
        .map(|address| address["address"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(families(&internal), expected, "{internal:?}");
    let ranges = texts(&node["spec"]["podCIDRs"], None);
    let networks: Vec<String> = ranges
        .iter()
        .map(|range| range.split('/').next().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(families(&networks), expected, "{ranges:?}");

    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: told}, spec: {restartPolicy: Never, containers: [{name: main, \
        image: localhost/keelway/client:0.1.0, command: [sh, -c, 'echo $PODS $HOSTS'], env: [\
        {name: PODS, valueFrom: {fieldRef: {fieldPath: status.podIPs}}}, \
        {name: HOSTS, valueFrom: {fieldRef: {fieldPath: status.hostIPs}}}]}]}}";
    cluster.kubectl_with_input(&["apply", "-f", "-"], pod).ok();
    let done = [
        "wait",
        "--for=jsonpath={.status.phase}=Succeeded",
        "pod/told",
        "--timeout=60s",
    ];
    cluster.kubectl(&done).ok();
    let status = &cluster.get(&["pod", "told"])["status"];
    let own = texts(&status["podIPs"], Some("ip"));
    let hosts = texts(&status["hostIPs"], Some("ip"));
    assert_eq!(families(&own), expected, "{own:?}");
    assert_eq!(hosts, internal);
    assert_eq!(status["podIP"], own[0]);
    let told = cluster.kubectl(&["logs", "told"]).ok();
    assert_eq!(
        told.trim(),
        format!("{} {}", own.join(","), hosts.join(","))
    );
}

/// The addresses of a Service.
fn addresses(cluster: &Cluster, service: &str) -> Vec<String> {
    let service = cluster.get(&["service", service]);
    texts(&service["spec"]["clusterIPs"], None)
}

/// An address as part of a URL.
fn in_url(address: &str) -> String {
    if address.contains(':') {
        format!("[{address}]")
    } else {
        address.to_owned()
    }
}

/// Checks that hello answers the client pod by TCP and UDP, at every one of its addresses, and by its name.
fn check_hello(cluster: &Cluster) {
    let addresses = addresses(cluster, "hello");
    let mut urls: Vec<String> = addresses.iter().map(|address| in_url(address)).collect();
    urls.push("hello".to_owned());
    for url in urls {
        let script = format!("for i in 1 2 3 4 5; do wget -T 5 -qO- http://{url}/ || exit 1; done");
        let answers = cluster.in_client(&script).ok();
        assert_eq!(answers.matches("pod=hello-").count(), 5, "{url}: {answers}");
    }
    for address in addresses {
        let script = format!("echo hi | nc -u -w 5 -W 1 {address} 80");
        let answer = cluster.in_client(&script).ok();
        assert!(answer.contains("pod=hello-"), "{address}: {answer}");
    }
}

/// What the cluster DNS says of hello, by record type.
fn names(cluster: &Cluster, kind: &str) -> Vec<String> {
    let script = format!("dig +search +short hello {kind}");
    let answer = cluster.in_client(&script).ok();
    answer.lines().map(str::to_owned).collect()
}

fn slices(cluster: &Cluster) -> Vec<String> {
    let list = ["endpointslices", "-l", "kubernetes.io/service-name=hello"];
    let mut families = texts(&cluster.get(&list)["items"], Some("addressType"));
    families.sort();
    families
}

fn policy(cluster: &Cluster, service: &str, policy: &str) -> String {
    let patch = format!(r#"{{"spec":{{"ipFamilyPolicy":"{policy}"}}}}"#);
    let finished = cluster.kubectl(&["patch", "service", service, "-p", &patch]);
    format!("{}{}", finished.stdout, finished.stderr)
}

#[test]
fn a_cluster_of_both_families_gives_each_service_those_it_asks_for() {
    let Some(cluster) = cluster("dual") else {
        return;
    };
    check_addresses(&cluster, &["IPv4", "IPv6"]);
    assert_eq!(families(&addresses(&cluster, "kubernetes")), ["IPv4"]);
    let ranges = cluster.get(&["servicecidr", "kubernetes"]);
    let ranges = texts(&ranges["spec"]["cidrs"], None);
    assert_eq!(ranges, ["10.96.0.0/16", "fd00:10:96::/112"]);

    // One family until two are asked for.
    let first = addresses(&cluster, "hello");
    assert_eq!(families(&first), ["IPv4"]);
    assert_eq!(slices(&cluster), ["IPv4"]);
    policy(&cluster, "hello", "RequireDualStack");
    let both = addresses(&cluster, "hello");
    assert_eq!(families(&both), ["IPv4", "IPv6"]);
    assert_eq!(both[0], first[0]);
    eventually("slices of both families", CHANGE_TIMEOUT, || {
        slices(&cluster) == ["IPv4", "IPv6"]
    });
    eventually("an AAAA record", CHANGE_TIMEOUT, || {
        names(&cluster, "AAAA") == both[1..]
    });
    assert_eq!(names(&cluster, "A"), both[..1]);
    eventually("an answer at the second address", CHANGE_TIMEOUT, || {
        let url = in_url(&both[1]);
        let script = format!("wget -T 2 -qO- http://{url}/");
        cluster.in_client(&script).success
    });
    check_hello(&cluster);

    // The second address is held as long as the Service has it, and free afterwards.
    let other = format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: other}}, spec: {{clusterIP: '{}', ports: [{{port: 80}}]}}}}",
        both[1]
    );
    let refused = cluster.kubectl_with_input(&["apply", "-f", "-"], &other);
    assert!(
        refused.stderr.contains("provided IP is already allocated"),
        "{refused}"
    );
    policy(&cluster, "hello", "SingleStack");
    assert_eq!(addresses(&cluster, "hello"), first);
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &other)
        .ok();
    eventually(
        "the second family's slices are gone",
        CHANGE_TIMEOUT,
        || slices(&cluster) == ["IPv4"],
    );
    check_hello(&cluster);

    // The API server reaches pods of either family; a Service of IPv6 alone is one like any other.
    let six = "{apiVersion: v1, kind: Service, metadata: {name: six}, spec: {selector: {app: hello}, ipFamilies: [IPv6], \
        ports: [{port: 80, targetPort: http}]}}";
    cluster.kubectl_with_input(&["apply", "-f", "-"], six).ok();
    assert_eq!(families(&addresses(&cluster, "six")), ["IPv6"]);
    let path = "/api/v1/namespaces/default/services/six/proxy/";
    eventually("the API server's proxy answers", CHANGE_TIMEOUT, || {
        let answer = cluster.kubectl(&["get", "--raw", path]);
        answer.success && answer.stdout.contains("pod=hello-")
    });
}

#[test]
fn an_ipv6_cluster_needs_no_ipv4() {
    let Some(cluster) = cluster("ipv6") else {
        return;
    };
    check_addresses(&cluster, &["IPv6"]);
    assert_eq!(families(&addresses(&cluster, "kubernetes")), ["IPv6"]);
    assert_eq!(families(&addresses(&cluster, "hello")), ["IPv6"]);
    assert_eq!(names(&cluster, "AAAA"), addresses(&cluster, "hello"));
    assert_eq!(names(&cluster, "A"), Vec::<String>::new());
    check_hello(&cluster);
    // The API by its own Service, from a pod.
    let api = &addresses(&cluster, "kubernetes")[0];
    let script = format!("nc -w 5 {api} 443 < /dev/null");
    cluster.in_client(&script).ok();
    let refused = policy(&cluster, "hello", "RequireDualStack");
    let why = "this cluster is not configured for dual-stack services";
    assert!(refused.contains(why), "{refused}");
    policy(&cluster, "hello", "PreferDualStack");
    assert_eq!(families(&addresses(&cluster, "hello")), ["IPv6"]);
    let logs = cluster.kubectl(&["logs", "deploy/hello"]).ok();
    assert!(logs.contains("serves HTTP"), "{logs}");
}
