//! Names of others: what happens when those others are dead, slow, lying or cut short; and what is remembered of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::*;
use hickory_proto::op::{Edns, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType, rdata};
use keelway_dns::cache::CacheRules;
use keelway_dns::config::spec::AutopathSpec;

const WWW: &str = "www.example.org.";

fn a() -> hickory_proto::op::Message {
    query(WWW, RecordType::A)
}

#[tokio::test]
async fn a_dead_upstream_is_passed_over_and_then_not_asked_first() {
    let dead = silent().await;
    let alive = willing(0, [192, 0, 2, 7]).await;
    let (_, server) = serve(spec(&[dead.address, alive.address]), &cluster(0)).await;
    for _ in 0..3 {
        assert_eq!(data(&udp(server, &a()).await), ["192.0.2.7"]);
    }
    let before = dead.asked();
    for _ in 0..20 {
        assert_eq!(data(&udp(server, &a()).await), ["192.0.2.7"]);
    }
    assert_eq!(dead.asked(), before, "it counts as down");
}

#[tokio::test]
async fn an_upstream_that_comes_back_is_asked_again() {
    let well = Arc::new(AtomicBool::new(false));
    let works = well.clone();
    let first = Upstream::start(move |query, _| match works.load(Ordering::SeqCst) {
        true => at_once(&reply(
            query,
            ResponseCode::NoError,
            vec![address(query, 0, [1, 1, 1, 1])],
        )),
        false => Vec::new(),
    })
    .await;
    let second = willing(0, [2, 2, 2, 2]).await;
    let (_, server) = serve(spec(&[first.address, second.address]), &cluster(0)).await;
    for _ in 0..3 {
        assert_eq!(data(&udp(server, &a()).await), ["2.2.2.2"]);
    }
    well.store(true, Ordering::SeqCst);
    let end = Instant::now() + Duration::from_secs(30);
    while data(&udp(server, &a()).await) != ["1.1.1.1"] {
        assert!(
            Instant::now() < end,
            "the health check has not found it well"
        );
    }
}

#[tokio::test]
async fn a_slow_upstream_has_another_one_asked_beside_it() {
    let slow = Upstream::start(|query, _| {
        let message = reply(
            query,
            ResponseCode::NoError,
            vec![address(query, 0, [1, 1, 1, 1])],
        );
        vec![(Duration::from_secs(2), message.to_vec().expect("an answer"))]
    })
    .await;
    let fast = willing(0, [2, 2, 2, 2]).await;
    let (_, server) = serve(spec(&[slow.address, fast.address]), &cluster(0)).await;
    assert_eq!(data(&udp(server, &a()).await), ["2.2.2.2"]);
    // Alone, it is waited for.
    let (_, server) = serve(spec(&[slow.address]), &cluster(0)).await;
    assert_eq!(data(&udp(server, &a()).await), ["1.1.1.1"]);
}

#[tokio::test]
async fn when_every_upstream_fails_the_client_hears_so() {
    let dead = silent().await;
    let (_, server) = serve(spec(&[dead.address]), &cluster(0)).await;
    let answer = udp(server, &a()).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    // Names of the cluster do not care.
    assert_eq!(
        data(&udp(server, &query(WEB, RecordType::A)).await),
        ["10.96.0.7"]
    );
    let answer = udp(server, &query("out.prod.svc.cluster.local.", RecordType::A)).await;
    assert_eq!(
        answer.metadata.response_code,
        ResponseCode::ServFail,
        "no half of an alias"
    );
}

#[tokio::test]
async fn a_lying_answer_is_not_believed() {
    // The wrong id, another question, no answer at all, and only then the truth.
    let liar = Upstream::start(|query, is_tcp| {
        let lie = |change: &dyn Fn(&mut hickory_proto::op::Message)| {
            let mut message = reply(
                query,
                ResponseCode::NoError,
                vec![address(query, 60, [6, 6, 6, 6])],
            );
            change(&mut message);
            (Duration::ZERO, message.to_vec().expect("an answer"))
        };
        let truth = lie(&|message| message.answers = vec![address(query, 60, [192, 0, 2, 7])]);
        if is_tcp {
            return vec![truth];
        }
        vec![
            lie(&|message| message.metadata.id = message.metadata.id.wrapping_add(1)),
            lie(&|message| {
                message.queries[0].set_name(Name::from_ascii("evil.example.org.").expect("a name"));
            }),
            lie(&|message| message.metadata.message_type = hickory_proto::op::MessageType::Query),
            (Duration::ZERO, vec![0xff; 7]),
            truth,
        ]
    })
    .await;
    let (_, server) = serve(spec(&[liar.address]), &cluster(0)).await;
    assert_eq!(data(&udp(server, &a()).await), ["192.0.2.7"]);
}

#[tokio::test]
async fn an_answer_whose_spelling_changed_is_confirmed_by_tcp() {
    // A server that writes every name in lower case: it can't be told from a forger by UDP.
    let lower = Upstream::start(|query, is_tcp| {
        let ip = if is_tcp { [192, 0, 2, 7] } else { [6, 6, 6, 6] };
        let mut message = reply(query, ResponseCode::NoError, vec![address(query, 0, ip)]);
        let name = message.queries[0].name().to_lowercase();
        message.queries[0].set_name(name);
        at_once(&message)
    })
    .await;
    let (_, server) = serve(spec(&[lower.address]), &cluster(0)).await;
    let name = "a-name-with-many-letters.example.org.";
    for _ in 0..3 {
        assert_eq!(
            data(&udp(server, &query(name, RecordType::A)).await),
            ["192.0.2.7"]
        );
    }
    // Confirmed often enough, the server is asked in its own way, and UDP is believed again.
    assert_eq!(
        data(&udp(server, &query(name, RecordType::A)).await),
        ["6.6.6.6"]
    );
}

#[tokio::test]
async fn a_truncated_answer_is_asked_for_by_tcp_and_kept_whole() {
    let large = Upstream::start(|query, is_tcp| {
        let count = if is_tcp { 200 } else { 3 };
        let records = (0..count)
            .map(|i| address(query, 60, [10, 1, 0, i]))
            .collect();
        let mut message = reply(query, ResponseCode::NoError, records);
        message.metadata.truncation = !is_tcp;
        at_once(&message)
    })
    .await;
    let (_, server) = serve(spec(&[large.address]), &cluster(0)).await;
    let cut = udp(server, &a()).await;
    assert!(cut.metadata.truncation && cut.to_vec().expect("wire").len() <= 512);
    assert!(
        !cut.answers.is_empty(),
        "resolvers without TCP take what there is"
    );
    let whole = tcp(server, &[a()]).await;
    assert_eq!(whole[0].answers.len(), 200);
    assert_eq!(
        large.asked(),
        2,
        "once by UDP, once by TCP; then it is in the cache"
    );
}

#[tokio::test]
async fn a_truncated_answer_is_passed_on_when_tcp_is_closed() {
    // No TCP: the listener is there, but says nothing useful.
    let cut = Upstream::start(|query, is_tcp| {
        if is_tcp {
            return vec![(Duration::ZERO, vec![0; 4])];
        }
        let mut message = reply(
            query,
            ResponseCode::NoError,
            vec![address(query, 60, [10, 1, 0, 1])],
        );
        message.metadata.truncation = true;
        at_once(&message)
    })
    .await;
    let (_, server) = serve(spec(&[cut.address]), &cluster(0)).await;
    let answer = udp(server, &a()).await;
    assert!(answer.metadata.truncation);
    assert_eq!(data(&answer), ["10.1.0.1"]);
}

#[tokio::test]
async fn an_upstream_without_edns_is_asked_without() {
    let old = Upstream::start(|query, _| match query.edns {
        Some(_) => at_once(&reply(query, ResponseCode::FormErr, Vec::new())),
        None => at_once(&reply(
            query,
            ResponseCode::NoError,
            vec![address(query, 0, [192, 0, 2, 7])],
        )),
    })
    .await;
    let (_, server) = serve(spec(&[old.address]), &cluster(0)).await;
    assert_eq!(data(&udp(server, &a()).await), ["192.0.2.7"]);
    let before = old.asked();
    assert_eq!(data(&udp(server, &a()).await), ["192.0.2.7"]);
    assert_eq!(old.asked(), before + 1, "it is remembered");
}

#[tokio::test]
async fn a_failure_of_one_upstream_is_not_the_last_word() {
    let failing =
        Upstream::start(|query, _| at_once(&reply(query, ResponseCode::ServFail, Vec::new())))
            .await;
    let good = willing(60, [192, 0, 2, 7]).await;
    let (_, server) = serve(spec(&[failing.address, good.address]), &cluster(0)).await;
    assert_eq!(data(&udp(server, &a()).await), ["192.0.2.7"]);
}

#[tokio::test]
async fn many_clients_of_one_name_cost_one_question() {
    let slow = Upstream::start(|query, _| {
        let message = reply(
            query,
            ResponseCode::NoError,
            vec![address(query, 60, [192, 0, 2, 7])],
        );
        vec![(
            Duration::from_millis(200),
            message.to_vec().expect("an answer"),
        )]
    })
    .await;
    let (_, server) = serve(spec(&[slow.address]), &cluster(0)).await;
    let clients = (0..50).map(|_| tokio::spawn(async move { data(&udp(server, &a()).await) }));
    for client in clients.collect::<Vec<_>>() {
        assert_eq!(client.await.expect("a client"), ["192.0.2.7"]);
    }
    assert_eq!(slow.asked(), 1);
}

#[tokio::test]
async fn above_its_share_a_clients_queries_are_refused_and_below_it_served() {
    let slow = Upstream::start(|query, _| {
        let message = reply(
            query,
            ResponseCode::NoError,
            vec![address(query, 60, [192, 0, 2, 7])],
        );
        vec![(Duration::from_secs(3), message.to_vec().expect("an answer"))]
    })
    .await;
    let mut spec = spec(&[slow.address]);
    // A client may have as many as are free: five, with five free beside them.
    spec.blocks[0].routes[0].rules.concurrent_max = 10;
    let (_, server) = serve(spec, &cluster(0)).await;
    let ask = |i: usize| {
        tokio::spawn(async move {
            let asked = query(&format!("n{i}.example.org."), RecordType::A);
            udp(server, &asked).await.metadata.response_code
        })
    };
    let mut codes = Vec::new();
    for client in (0..20).map(ask).collect::<Vec<_>>() {
        codes.push(client.await.expect("a client"));
    }
    let count = |code| codes.iter().filter(|other| **other == code).count();
    assert_eq!(
        (count(ResponseCode::NoError), count(ResponseCode::Refused)),
        (5, 15),
        "{codes:?}"
    );
}

#[tokio::test]
async fn answers_are_kept_for_their_ttl_which_is_told_as_it_runs_out() {
    let upstream = willing(2, [192, 0, 2, 7]).await;
    let mut spec = spec(&[upstream.address]);
    spec.blocks[0].cache = Some(CacheRules {
        prefetch_hits: 0,
        stale: Duration::ZERO,
        ..CacheRules::default()
    });
    let (_, server) = serve(spec, &cluster(0)).await;
    let first = udp(server, &a()).await;
    assert_eq!(first.answers[0].ttl, 2);
    // The client's own spelling, whoever asked first.
    let again = udp(server, &query("WWW.example.ORG.", RecordType::A)).await;
    assert!(again.answers[0].ttl <= 2);
    assert_eq!(upstream.asked(), 1);
    let end = Instant::now() + Duration::from_secs(30);
    while upstream.asked() == 1 {
        assert!(Instant::now() < end, "it is kept for ever");
        assert!(udp(server, &a()).await.answers[0].ttl <= 2);
    }
}

#[tokio::test]
async fn denials_are_kept_for_the_time_their_soa_says_and_without_one_not_at_all() {
    let upstream = Upstream::start(|query, _| {
        let mut message = reply(query, ResponseCode::NXDomain, Vec::new());
        if query.queries[0]
            .name()
            .to_lowercase()
            .to_string()
            .starts_with("kept")
        {
            // The smaller of its TTL and its minimum (RFC 2308, 5).
            message.authorities = vec![soa(600, 30)];
        }
        at_once(&message)
    })
    .await;
    let (_, server) = serve(spec(&[upstream.address]), &cluster(0)).await;
    for _ in 0..2 {
        let answer = udp(server, &query("kept.example.org.", RecordType::A)).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    }
    assert_eq!(upstream.asked(), 1);
    for _ in 0..2 {
        let answer = udp(server, &query("other.example.org.", RecordType::A)).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    }
    assert_eq!(upstream.asked(), 3);
}

#[tokio::test]
async fn stale_answers_are_served_while_upstreams_are_away_or_fail() {
    let state = Arc::new(AtomicUsize::new(0));
    let now = state.clone();
    let upstream = Upstream::start(move |query, _| match now.load(Ordering::SeqCst) {
        0 => at_once(&reply(
            query,
            ResponseCode::NoError,
            vec![address(query, 1, [192, 0, 2, 7])],
        )),
        // A failure that is told must not take the place of what is known (deckhouse 14836).
        1 => at_once(&reply(query, ResponseCode::ServFail, Vec::new())),
        2 => Vec::new(),
        _ => at_once(&reply(
            query,
            ResponseCode::NoError,
            vec![address(query, 1, [192, 0, 2, 8])],
        )),
    })
    .await;
    let mut spec = spec(&[upstream.address]);
    spec.blocks[0].cache = Some(CacheRules {
        prefetch_hits: 0,
        servfail: Duration::from_secs(5),
        ..CacheRules::default()
    });
    let (_, server) = serve(spec, &cluster(0)).await;
    assert_eq!(data(&udp(server, &a()).await), ["192.0.2.7"]);
    state.store(1, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for _ in 0..3 {
        let answer = udp(server, &a()).await;
        assert_eq!(
            data(&answer),
            ["192.0.2.7"],
            "{:?}",
            answer.metadata.response_code
        );
        assert_eq!(answer.answers[0].ttl, 30, "RFC 8767, 4");
    }
    state.store(2, Ordering::SeqCst);
    let before = upstream.asked();
    assert_eq!(data(&udp(server, &a()).await), ["192.0.2.7"]);
    assert_eq!(
        upstream.asked(),
        before,
        "a failed renewal is not tried with every query"
    );
}

#[tokio::test]
async fn what_is_asked_for_often_is_renewed_before_it_ends() {
    let upstream = willing(2, [192, 0, 2, 7]).await;
    let mut spec = spec(&[upstream.address]);
    spec.blocks[0].cache = Some(CacheRules {
        prefetch_hits: 2,
        prefetch_percent: 90,
        stale: Duration::ZERO,
        ..CacheRules::default()
    });
    let (_, server) = serve(spec, &cluster(0)).await;
    // No client ever waits for more than the cache, although the TTL runs out several times.
    udp(server, &a()).await;
    let end = Instant::now() + Duration::from_secs(30);
    while upstream.asked() < 3 {
        assert!(Instant::now() < end, "it is not renewed");
        assert!(
            udp(server, &a()).await.answers[0].ttl > 0,
            "an answer at its end"
        );
    }
}

#[tokio::test]
async fn dnssec_records_pass_and_the_bits_with_them() {
    let upstream = Upstream::start(|query, _| {
        let signed = query
            .edns
            .as_ref()
            .is_some_and(|edns| edns.flags().dnssec_ok);
        let mut records = vec![address(query, 60, [192, 0, 2, 7])];
        if signed {
            let data = rdata::NULL::with(b"a signature, for all that this server knows".to_vec());
            let unknown = RData::Unknown {
                code: RecordType::Unknown(65_300),
                rdata: data,
            };
            records.push(Record::from_rdata(
                query.queries[0].name().clone(),
                60,
                unknown,
            ));
        }
        let mut message = reply(query, ResponseCode::NoError, records);
        message.metadata.authentic_data = true;
        at_once(&message)
    })
    .await;
    let (_, server) = serve(spec(&[upstream.address]), &cluster(0)).await;
    let plain = udp(server, &a()).await;
    assert_eq!(
        (plain.answers.len(), plain.metadata.authentic_data),
        (1, false)
    );
    let mut asked = edns(WWW, RecordType::A, 1232);
    let mut opt = Edns::new();
    opt.set_dnssec_ok(true).set_max_payload(1232);
    asked.edns = Some(opt);
    let signed = udp(server, &asked).await;
    assert_eq!(
        (signed.answers.len(), signed.metadata.authentic_data),
        (2, true)
    );
    assert!(signed.edns.is_some_and(|edns| edns.flags().dnssec_ok));
    let mut unchecked = a();
    unchecked.metadata.checking_disabled = true;
    assert!(udp(server, &unchecked).await.metadata.checking_disabled);
    assert_eq!(upstream.asked(), 3, "each is a question of its own");
}

#[tokio::test]
async fn an_alias_out_of_the_cluster_is_completed() {
    let upstream = willing(60, [192, 0, 2, 7]).await;
    let (_, server) = serve(spec(&[upstream.address]), &cluster(0)).await;
    let out = "out.prod.svc.cluster.local.";
    let answer = udp(server, &query(out, RecordType::A)).await;
    assert_eq!(data(&answer), ["192.0.2.7", "www.example.org."]);
    assert_eq!(answer.answers[0].name.to_string(), out);
    // Long chains do not fit into 512 bytes: then it is said (CoreDNS 4684).
    let large = Upstream::start(|query, _| {
        let records = (0..60).map(|i| address(query, 60, [10, 1, 0, i])).collect();
        at_once(&reply(query, ResponseCode::NoError, records))
    })
    .await;
    let (_, server) = serve(spec(&[large.address]), &cluster(0)).await;
    let cut = udp(server, &query(out, RecordType::A)).await;
    assert!(cut.metadata.truncation && cut.to_vec().expect("wire").len() <= 512);
}

#[tokio::test]
async fn a_server_that_leads_back_here_is_found_out_and_left_alone() {
    let free = std::net::UdpSocket::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .expect("a port");
    let metrics = keelway_dns::metrics::Metrics::default();
    let settings =
        keelway_dns::settings::Settings::build(spec(&[free]), &metrics, None).expect("settings");
    let shared = keelway_dns::server::Shared::new(settings, metrics);
    shared.serve(keelway_dns::zone::Zone::of(spec(&[]).zone, &cluster(0)));
    let server = keelway_dns::server::start(&shared, free, 1)
        .await
        .expect("that port");
    assert_eq!(server, free, "it forwards to itself");
    let end = Instant::now() + Duration::from_secs(30);
    let mut number = 0;
    loop {
        number += 1;
        let asked = query(&format!("n{number}.example.org."), RecordType::A);
        if udp(server, &asked).await.metadata.response_code == ResponseCode::Refused {
            break;
        }
        assert!(Instant::now() < end, "the loop goes on");
    }
}

#[tokio::test]
async fn the_search_path_is_followed_only_where_that_is_right() {
    let upstream = Upstream::start(|query, _| {
        let name = query.queries[0].name().to_lowercase().to_string();
        let records = match (name.as_str(), query.queries[0].query_type()) {
            // In the domain that the pods' path has after the cluster's, and at the root as well.
            ("git.dev.corp.example.", RecordType::A) => vec![address(query, 60, [10, 9, 9, 9])],
            ("git.dev.", RecordType::A) => vec![address(query, 60, [192, 0, 2, 66])],
            (WWW, RecordType::A) => vec![address(query, 60, [192, 0, 2, 7])],
            (WWW, _) => Vec::new(),
            _ => {
                return at_once(&{
                    let mut message = reply(query, ResponseCode::NXDomain, Vec::new());
                    message.authorities = vec![soa(60, 60)];
                    message
                });
            }
        };
        let mut message = reply(query, ResponseCode::NoError, records);
        if message.answers.is_empty() {
            message.authorities = vec![soa(60, 60)];
        }
        at_once(&message)
    })
    .await;
    let mut spec = spec(&[upstream.address]);
    spec.blocks[0].autopath = Some(AutopathSpec {
        zones: Vec::new(),
        search: vec![name("corp.example")],
    });
    // The fixture's pod of namespace prod has 127.0.0.1: that is who asks here.
    let (_, server) = serve(spec, &cluster(0)).await;
    let first = "www.example.org.prod.svc.cluster.local.";
    let answer = udp(server, &query(first, RecordType::A)).await;
    assert_eq!(data(&answer), ["192.0.2.7", "www.example.org."]);
    assert_eq!(answer.answers[0].name.to_string(), first);
    let git = "git.dev.prod.svc.cluster.local.";
    let answer = udp(server, &query(git, RecordType::A)).await;
    assert_eq!(
        data(&answer),
        ["10.9.9.9", "git.dev.corp.example."],
        "as the pod's own resolver would have found"
    );
    // The other family has no data, which is not "no such name".
    let v6 = udp(server, &query(first, RecordType::AAAA)).await;
    assert_eq!(v6.metadata.response_code, ResponseCode::NoError);
    // Another namespace than the pod's, one label, and what is nowhere: the plain no.
    for name in [
        "www.example.org.test.svc.cluster.local.",
        "www.prod.svc.cluster.local.",
        "absent.example.org.prod.svc.cluster.local.",
    ] {
        let answer = udp(server, &query(name, RecordType::A)).await;
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::NXDomain,
            "{name}"
        );
    }
}
