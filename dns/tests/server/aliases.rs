//! Names that are aliases: what they lead to is answered as it would be if it were asked for.

use cluster_model::{Change, Dirty, Kind, Snapshot, read_manifest};
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use hickory_proto::rr::rdata::opt::EdnsOption;
use keelway_dns::hosts::Hosts;
use keelway_dns::zone::Pods;
use std::time::Duration;

use crate::support::*;

/// ExternalName Services of namespace prod, each with its target.
fn aliases(targets: &[(&str, &str)]) -> String {
    let service = |(name, target): &(&str, &str)| {
        format!(
            r#"{{"kind":"Service","metadata":{{"name":"{name}","namespace":"prod"}},
                "spec":{{"type":"ExternalName","externalName":"{target}"}}}}"#
        )
    };
    let all: Vec<String> = targets.iter().map(service).collect();
    format!("[{}]", all.join(","))
}

const POD: &str = "10-0-0-1.test.pod.cluster.local.";
const BOX: &str = "box.cluster.local.";

fn targets() -> String {
    aliases(&[
        ("pod", POD),
        ("box", BOX),
        ("none", "none.test.svc.cluster.local"),
    ])
}

fn alias(name: &str) -> hickory_proto::op::Message {
    query(&format!("{name}.prod.svc.cluster.local."), RecordType::A)
}

#[tokio::test]
async fn an_alias_to_the_address_of_a_pod_is_answered_where_the_address_is() {
    let mut spec = spec(&[]);
    spec.zone.pods = Pods::Insecure;
    let (_, server) = serve(spec, &snapshot(&targets())).await;
    assert_eq!(
        data(&udp(server, &query(POD, RecordType::A)).await),
        ["10.0.0.1"]
    );
    let answer = udp(server, &alias("pod")).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert_eq!(data(&answer), [POD, "10.0.0.1"]);
    assert!(answer.metadata.authoritative);
    // What is nowhere is denied, with the SOA that says for how long.
    let none = udp(server, &alias("none")).await;
    assert_eq!(none.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!((none.answers.len(), none.authorities.len()), (1, 1));
    assert!(none.metadata.authoritative);
}

#[tokio::test]
async fn an_alias_to_a_name_that_hosts_or_others_know_is_answered_by_them() {
    let upstream = willing(60, [192, 0, 2, 7]).await;
    let mut plain = spec(&[upstream.address]);
    let mut hosts = Hosts::new(60);
    hosts.add("192.0.2.9", &[BOX]).expect("an entry");
    hosts.fallthrough = vec![name(".")];
    let mut with_hosts = plain.clone();
    with_hosts.blocks[0].hosts = Some(hosts);
    let (_, server) = serve(with_hosts, &snapshot(&targets())).await;
    assert_eq!(data(&udp(server, &alias("box")).await), ["192.0.2.9", BOX]);
    let cluster = plain.blocks[0].cluster.as_mut().expect("a cluster");
    cluster.fallthrough.push(name("cluster.local"));
    let (_, server) = serve(plain, &snapshot(&targets())).await;
    assert_eq!(data(&udp(server, &alias("box")).await), ["192.0.2.7", BOX]);
}

#[tokio::test]
async fn an_alias_that_leads_back_is_told_once() {
    let targets = aliases(&[
        ("itself", "itself.prod.svc.cluster.local"),
        ("there", "back.prod.svc.cluster.local"),
        ("back", "there.prod.svc.cluster.local"),
    ]);
    // Hosts that may know where an alias leads have it followed step by step.
    let mut stepwise = spec(&[]);
    let mut hosts = Hosts::new(60);
    hosts.add("192.0.2.9", &[BOX]).expect("an entry");
    hosts.fallthrough = vec![name(".")];
    stepwise.blocks[0].hosts = Some(hosts);
    for spec in [spec(&[]), stepwise] {
        let (_, server) = serve(spec, &snapshot(&targets)).await;
        for (asked, records) in [("itself", 1), ("there", 2)] {
            let answer = udp(server, &alias(asked)).await;
            assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
            assert_eq!(answer.answers.len(), records, "{answer}");
        }
    }
}

#[tokio::test]
async fn what_a_client_says_beside_its_question_is_the_same_to_an_alias_and_to_an_address() {
    let upstream = willing(60, [192, 0, 2, 7]).await;
    let (_, server) = serve(spec(&[upstream.address]), &cluster(0)).await;
    for asked in [WEB, "out.prod.svc.cluster.local."] {
        let mut message = edns(asked, RecordType::A, 1232);
        // The network of a client, of a family that there is not (RFC 7871).
        let subnet = EdnsOption::Unknown(8, vec![0, 9, 0, 0]);
        let opt = message.edns.as_mut().expect("EDNS");
        opt.options_mut().insert(subnet);
        let answer = udp(server, &message).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert!(!answer.answers.is_empty() && answer.edns.is_some());
    }
}

#[tokio::test]
async fn an_alias_to_a_pod_is_not_denied_before_pods_are_known() {
    let mut snapshot = Snapshot::default();
    let mut dirty = Dirty::default();
    for kind in [Kind::Service, Kind::EndpointSlice] {
        snapshot.apply(Change::Replace(kind, Vec::new()), &mut dirty);
    }
    for object in read_manifest(targets().as_bytes()).expect("a manifest") {
        snapshot.apply(Change::Upsert(object), &mut dirty);
    }
    let mut spec = spec(&[]);
    spec.zone.pods = Pods::Verified;
    let (_, server) = serve(spec, &snapshot).await;
    let answer = udp(server, &alias("pod")).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    let other = udp(server, &alias("none")).await;
    assert_eq!(other.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn the_target_of_an_alias_is_told_for_as_long_as_the_cache_has_it() {
    let upstream = willing(300, [192, 0, 2, 7]).await;
    let mut spec = spec(&[upstream.address]);
    let cache = spec.blocks[0].cache.as_mut().expect("a cache");
    cache.success.ttl_max = Duration::from_secs(30);
    let (_, server) = serve(spec, &cluster(0)).await;
    for _ in 0..2 {
        let answer = udp(server, &query("out.prod.svc.cluster.local.", RecordType::A)).await;
        let ttls: Vec<u32> = answer.answers.iter().map(|record| record.ttl).collect();
        assert_eq!(ttls[0], 5, "the alias is the cluster's");
        assert!((29..=30).contains(&ttls[1]), "{ttls:?}");
    }
    assert_eq!(upstream.asked(), 1);
}

#[tokio::test]
async fn that_there_is_more_is_said_through_an_alias_too() {
    // Truncated, and no TCP to ask again by.
    let cut = Upstream::start(|query, is_tcp| {
        if is_tcp {
            return vec![(Duration::ZERO, vec![0; 4])];
        }
        let records = vec![address(query, 60, [10, 1, 0, 1])];
        let mut message = reply(query, ResponseCode::NoError, records);
        message.metadata.truncation = true;
        at_once(&message)
    })
    .await;
    let (_, server) = serve(spec(&[cut.address]), &cluster(0)).await;
    let asked = query("out.prod.svc.cluster.local.", RecordType::A);
    let answer = udp(server, &asked).await;
    assert!(answer.metadata.truncation);
    assert_eq!(data(&answer), ["10.1.0.1", "www.example.org."]);
}
