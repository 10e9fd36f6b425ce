//! What a configuration makes of names: hosts, rewritten names, domains with servers of their own.

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use keelway_dns::config::spec::{BlockSpec, RouteSpec, ServerSpec};
use keelway_dns::forward::ForwardRules;
use keelway_dns::hosts::Hosts;
use keelway_dns::rewrite::{Match, Rewrite};

use crate::support::*;

fn suffix(from: &str, to: &str) -> Rewrite {
    Rewrite {
        from: Match::Suffix(from.into()),
        to: to.into(),
        goes_on: false,
    }
}

#[tokio::test]
async fn a_rewritten_name_is_answered_under_the_name_that_was_asked_for() {
    let upstream = willing(60, [192, 0, 2, 7]).await;
    let mut spec = spec(&[upstream.address]);
    spec.blocks[0].rewrites = vec![
        suffix(".corp.example.", ".svc.cluster.local."),
        suffix(".old.example.", ".new.example."),
    ];
    let (_, server) = serve(spec, &cluster(0)).await;
    for (asked, expected) in [
        ("web.prod.corp.example.", "10.96.0.7"),
        ("www.old.example.", "192.0.2.7"),
    ] {
        let answer = udp(server, &query(asked, RecordType::A)).await;
        assert_eq!(data(&answer), [expected], "{asked}");
        assert_eq!(answer.answers[0].name.to_string(), asked);
    }
    let absent = udp(server, &query("absent.prod.corp.example.", RecordType::A)).await;
    assert_eq!(absent.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn hosts_come_first_and_others_after_them_where_they_may() {
    let upstream = willing(60, [192, 0, 2, 7]).await;
    let mut hosts = Hosts::new(60);
    hosts
        .add("192.0.2.9", &["printer.example"])
        .expect("an entry");
    hosts
        .add("2001:db8::9", &["printer.example"])
        .expect("an entry");
    hosts.fallthrough = vec![name(".")];
    let mut spec = spec(&[upstream.address]);
    spec.blocks[0].hosts = Some(hosts.clone());
    let (_, server) = serve(spec.clone(), &cluster(0)).await;
    let ask = |asked: &'static str, rtype| async move { udp(server, &query(asked, rtype)).await };
    let printer = ask("Printer.example.", RecordType::A).await;
    assert_eq!(
        (data(&printer), printer.answers[0].ttl),
        (vec!["192.0.2.9".into()], 60)
    );
    assert_eq!(
        data(&ask("printer.example.", RecordType::AAAA).await),
        ["2001:db8::9"]
    );
    assert_eq!(
        data(&ask("9.2.0.192.in-addr.arpa.", RecordType::PTR).await),
        ["printer.example."]
    );
    assert!(
        ask("printer.example.", RecordType::MX)
            .await
            .answers
            .is_empty()
    );
    assert_eq!(
        data(&ask("other.example.", RecordType::A).await),
        ["192.0.2.7"]
    );
    assert_eq!(data(&ask(WEB, RecordType::A).await), ["10.96.0.7"]);
    // Without a fall through there is nothing after them.
    hosts.fallthrough.clear();
    spec.blocks[0].hosts = Some(hosts);
    let (_, server) = serve(spec, &cluster(0)).await;
    let other = udp(server, &query("other.example.", RecordType::A)).await;
    assert_eq!(other.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn the_longest_domain_decides_who_is_asked() {
    let [everyone, corp, deep] = [
        willing(60, [1, 1, 1, 1]).await,
        willing(60, [2, 2, 2, 2]).await,
        willing(60, [3, 3, 3, 3]).await,
    ];
    let mut spec = spec(&[everyone.address]);
    let route = |zone: &str, server: &Upstream| RouteSpec {
        zone: name(zone),
        except: vec![name("public.corp.example")],
        servers: vec![ServerSpec {
            address: server.address,
            tls: None,
        }],
        rules: ForwardRules::default(),
    };
    spec.blocks[0].routes.push(route("corp.example", &corp));
    let mut block = BlockSpec::of(vec![name("deep.corp.example")]);
    block.routes.push(route(".", &deep));
    spec.blocks.push(block);
    let (_, server) = serve(spec, &cluster(0)).await;
    for (asked, expected) in [
        ("www.example.", "1.1.1.1"),
        ("www.corp.example.", "2.2.2.2"),
        ("www.xcorp.example.", "1.1.1.1"),
        ("www.public.corp.example.", "1.1.1.1"),
        ("www.deep.corp.example.", "3.3.3.3"),
    ] {
        assert_eq!(
            data(&udp(server, &query(asked, RecordType::A)).await),
            [expected],
            "{asked}"
        );
    }
}

#[tokio::test]
async fn reversed_addresses_of_the_cluster_are_ours_and_others_are_asked_for() {
    let upstream = Upstream::start(|query, _| {
        let target = hickory_proto::rr::Name::from_ascii("host.example.").expect("a name");
        let data = hickory_proto::rr::RData::PTR(hickory_proto::rr::rdata::PTR(target));
        let record =
            hickory_proto::rr::Record::from_rdata(query.queries[0].name().clone(), 60, data);
        at_once(&reply(query, ResponseCode::NoError, vec![record]))
    })
    .await;
    let (_, server) = serve(spec(&[upstream.address]), &cluster(0)).await;
    let ask = |asked: &'static str| async move {
        data(&udp(server, &query(asked, RecordType::PTR)).await)
    };
    assert_eq!(
        ask("7.0.96.10.in-addr.arpa.").await,
        ["web.prod.svc.cluster.local."]
    );
    assert_eq!(ask("1.2.0.192.in-addr.arpa.").await, ["host.example."]);
    // Between the root and ours, others may know more.
    assert_eq!(ask("0.96.10.in-addr.arpa.").await, ["host.example."]);
}
