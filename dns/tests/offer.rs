//! Which configurations let the agent of the node answer in the server's place, and by what rules.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use cluster_model::share::{Offer, Rules};
use keelway_dns::config::read_spec;
use keelway_dns::config::spec::Spec;
use keelway_dns::offer::{offer, rules};

fn spec(corefile: &str) -> Spec {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("Corefile");
    let hosts = folder.path().join("hosts");
    std::fs::write(&hosts, "192.0.2.1 node-1.example.org\n").expect("written");
    let corefile = corefile.replace("FILE", &hosts.display().to_string());
    std::fs::write(&file, corefile).expect("written");
    read_spec(&file).expect("a Corefile")
}

/// The configuration that kubeadm gives to CoreDNS.
const KUBEADM: &str = ".:53 {
    errors
    health {
       lameduck 5s
    }
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
       pods insecure
       fallthrough in-addr.arpa ip6.arpa
       ttl 30
    }
    prometheus :9153
    forward . 192.0.2.53
    cache 30 {
       disable success cluster.local
       disable denial cluster.local
    }
    loop
    reload
    loadbalance
}";

#[test]
fn a_plain_configuration_is_answered_by_its_own_rules() {
    let expected = Rules {
        origins: vec!["cluster.local.".into()],
        ttl_s: 30,
        udp_bytes_max: 1232,
        recursion: true,
        endpoint_pod_names: false,
    };
    assert_eq!(rules(&spec(KUBEADM)), Some(expected.clone()));
    let corefile = ".:53 {
        kubernetes cluster.local corp.example {
            ttl 5
            endpoint_pod_names
        }
        bufsize 512
    }";
    let expected = Rules {
        origins: vec!["cluster.local.".into(), "corp.example.".into()],
        ttl_s: 5,
        udp_bytes_max: 512,
        recursion: false,
        endpoint_pod_names: true,
    };
    assert_eq!(rules(&spec(corefile)), Some(expected));
}

#[test]
fn whatever_else_may_decide_about_a_name_of_the_cluster_is_the_servers_alone() {
    let with =
        |line: &str| KUBEADM.replacen("    errors\n", &format!("    errors\n    {line}\n"), 1);
    let k3s = "hosts {\n 192.0.2.1 node-1\n fallthrough\n }";
    for (corefile, answered) in [
        (
            with("rewrite name web.example web.prod.svc.cluster.local"),
            false,
        ),
        (
            with("rewrite stop name suffix .a.example .svc.cluster.local"),
            false,
        ),
        (with("log"), false),
        (with("log {\n class error\n }"), false),
        (with("autopath @kubernetes"), true),
        (with("transfer {\n to *\n }"), true),
        (with(k3s), true),
        (with("hosts {\n 192.0.2.1 node-1\n }"), false),
        (
            with("hosts {\n 192.0.2.1 node-1\n fallthrough example.org\n }"),
            false,
        ),
        (with("hosts FILE example.org"), true),
        (with("hosts FILE prod.svc.cluster.local"), false),
        (
            with("hosts {\n 192.0.2.1 web.prod.svc.cluster.local\n fallthrough\n }"),
            false,
        ),
        (with("forward prod.svc.cluster.local 192.0.2.1"), true),
        (
            format!("{KUBEADM}\nexample.org:53 {{\n forward . 192.0.2.1\n }}"),
            true,
        ),
        (
            format!("{KUBEADM}\nprod.svc.cluster.local:53 {{\n forward . 192.0.2.1\n }}"),
            false,
        ),
        (
            format!("{KUBEADM}\ncluster.local:53 {{\n forward . 192.0.2.1\n }}"),
            false,
        ),
        (
            KUBEADM.replace(
                "kubernetes cluster.local",
                "kubernetes cluster.local x.cluster.local",
            ),
            false,
        ),
        (".:53 {\n forward . 192.0.2.1\n }".to_owned(), false),
    ] {
        assert_eq!(rules(&spec(&corefile)).is_some(), answered, "{corefile}");
    }
}

#[test]
fn a_server_speaks_for_where_it_is_asked() {
    let plain = spec(KUBEADM);
    let own: [IpAddr; 2] = [[10, 244, 1, 2].into(), [0xfd00, 0, 0, 0, 0, 0, 0, 2].into()];
    let said = |serves: SocketAddr| match offer(&plain, serves, &own) {
        Offer::Answer { addresses, .. } => addresses,
        Offer::Refuse => Vec::new(),
    };
    assert_eq!(said((Ipv4Addr::UNSPECIFIED, 53).into()), own);
    assert_eq!(
        said(([10, 0, 0, 1], 53).into()),
        [IpAddr::from([10, 0, 0, 1])]
    );
    assert!(
        said((Ipv4Addr::UNSPECIFIED, 1053).into()).is_empty(),
        "another port"
    );
    assert_eq!(
        offer(&plain, (Ipv4Addr::UNSPECIFIED, 53).into(), &[]),
        Offer::Refuse
    );
}
