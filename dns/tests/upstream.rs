//! Whatever an upstream server sends: nothing panics, no answer is longer than its client takes, and what is whole comes through whole.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use hickory_proto::op::{Edns, Message, MessageType, Query as Asked, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType, rdata};
use keelway_dns::answer::{Policy, Transport, Verdict};
use keelway_dns::cache::Entry;
use keelway_dns::message::{Reply, belongs};
use keelway_dns::query::Query;
use proptest::prelude::*;
use proptest::sample::Index;

const NAME: &str = "www.example.org.";
const UDP_BYTES_MAX: usize = 1232;
const HEADER_BYTES: usize = 12;

fn name(text: &str) -> Name {
    Name::from_ascii(text).expect("a name")
}

fn query(edns: Option<u16>) -> Message {
    let mut message = Message::query();
    message.metadata.id = 7;
    message.add_query(Asked::query(name(NAME), RecordType::A));
    if let Some(bytes) = edns {
        let mut edns = Edns::new();
        edns.set_max_payload(bytes);
        message.set_edns(edns);
    }
    message
}

fn record() -> impl Strategy<Value = Record> {
    let owner = prop_oneof![3 => Just(NAME), 1 => Just("org."), 1 => Just("ns.example.com.")];
    let target = || prop_oneof![Just("a.example.org."), Just("b.c.example.com."), Just(".")];
    let data = prop_oneof![
        4 => any::<u32>().prop_map(|bits| RData::A(rdata::A(Ipv4Addr::from_bits(bits)))),
        2 => any::<u128>().prop_map(|bits| RData::AAAA(rdata::AAAA(Ipv6Addr::from_bits(bits)))),
        2 => target().prop_map(|target| RData::CNAME(rdata::CNAME(name(target)))),
        1 => target().prop_map(|target| RData::NS(rdata::NS(name(target)))),
        1 => "[a-z]{0,200}".prop_map(|text| RData::TXT(rdata::TXT::new(vec![text]))),
        1 => any::<u32>().prop_map(|ttl| RData::SOA(rdata::SOA::new(name("ns.org."), name("x.org."), 1, 2, 3, 4, ttl))),
    ];
    (owner, any::<u32>(), data)
        .prop_map(|(owner, ttl, data)| Record::from_rdata(name(owner), ttl & i32::MAX as u32, data))
}

/// A message of a server that keeps the rules.
fn message() -> impl Strategy<Value = Message> {
    let some = |most: usize| proptest::collection::vec(record(), 0..most);
    let code = prop_oneof![
        4 => Just(ResponseCode::NoError),
        2 => Just(ResponseCode::NXDomain),
        1 => Just(ResponseCode::ServFail),
    ];
    (some(20), some(4), some(4), code, any::<[bool; 3]>()).prop_map(
        |(answers, authorities, additionals, code, [edns, truncated, authentic])| {
            let mut message = query(edns.then_some(4096));
            message.metadata.message_type = MessageType::Response;
            message.metadata.response_code = code;
            message.metadata.truncation = truncated;
            message.metadata.authentic_data = authentic;
            message.answers = answers;
            message.authorities = authorities;
            message.additionals = additionals;
            message
        },
    )
}

/// The answer that a client gets, where there is one.
fn served(wire: &[u8], client: &[u8], transport: Transport, turn: usize) -> Option<Vec<u8>> {
    let asked = Query::parse(client).expect("a query");
    let question = asked.question;
    // As what comes from a socket is looked at first.
    let _ = belongs(wire, asked.id, question);
    let reply = Reply::read(wire, question.len(), asked.rtype).ok()?;
    let _ = reply.to_message(question, |ttl| ttl);
    let now = Instant::now();
    let mut out = vec![0; usize::from(u16::MAX)];
    let entry = Entry::fleeting(reply, now);
    match entry.compose(&asked, &Policy::default(), transport, now, turn, &mut out) {
        Verdict::Reply { bytes, .. } => {
            out.truncate(bytes);
            Some(out)
        }
        _ => None,
    }
}

fn wire(message: &Message) -> Vec<u8> {
    message.to_vec().expect("a message")
}

fn texts(records: &[Record]) -> BTreeSet<String> {
    records.iter().map(ToString::to_string).collect()
}

fn check_size(reply: &[u8], client: &[u8], most: usize) -> Result<(), TestCaseError> {
    prop_assert!(
        (HEADER_BYTES..=most).contains(&reply.len()),
        "{} bytes",
        reply.len()
    );
    prop_assert_eq!(&reply[..2], &client[..2]);
    prop_assert!(reply[2] & 0x80 != 0);
    let question = HEADER_BYTES..wire(&query(None)).len();
    prop_assert_eq!(&reply[question.clone()], &client[question]);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn what_is_whole_comes_through_whole(message in message(), turn in any::<usize>(), edns in prop::option::of(any::<u16>())) {
        let (upstream, client) = (wire(&message), wire(&query(edns)));
        let by_tcp = served(&upstream, &client, Transport::Tcp, turn).expect("an answer");
        let told = Message::from_vec(&by_tcp).expect("a readable answer");
        prop_assert_eq!(told.metadata.response_code, message.metadata.response_code);
        prop_assert_eq!(told.metadata.truncation, message.metadata.truncation);
        prop_assert_eq!(texts(&told.answers), texts(&message.answers));
        prop_assert_eq!(texts(&told.authorities), texts(&message.authorities));
        prop_assert_eq!(texts(&told.additionals), texts(&message.additionals));
        prop_assert_eq!(told.edns.is_some(), edns.is_some());
        let most = usize::from(edns.unwrap_or(512)).clamp(512, UDP_BYTES_MAX);
        let by_udp = served(&upstream, &client, Transport::Udp, turn).expect("an answer");
        check_size(&by_udp, &client, most)?;
        let told = Message::from_vec(&by_udp).expect("a readable answer");
        prop_assert!(texts(&told.answers).is_subset(&texts(&message.answers)));
        prop_assert!(told.metadata.truncation || texts(&told.answers) == texts(&message.answers));
    }

    #[test]
    fn what_is_broken_is_refused_or_within_bounds(
        message in message(),
        changes in proptest::collection::vec((any::<Index>(), any::<u8>()), 0..6),
        cut in prop::option::of(any::<Index>()),
        edns in prop::option::of(any::<u16>()),
    ) {
        let client = wire(&query(edns));
        let mut upstream = wire(&message);
        for (at, byte) in changes {
            let at = at.index(upstream.len());
            upstream[at] = byte;
        }
        if let Some(cut) = cut {
            upstream.truncate(cut.index(upstream.len()));
        }
        let most = usize::from(edns.unwrap_or(512)).clamp(512, UDP_BYTES_MAX);
        for (transport, most) in [(Transport::Udp, most), (Transport::Tcp, usize::from(u16::MAX))] {
            if let Some(reply) = served(&upstream, &client, transport, 3) {
                check_size(&reply, &client, most)?;
            }
        }
    }

    #[test]
    fn noise_is_no_answer_or_within_bounds(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let client = wire(&query(None));
        if let Some(reply) = served(&bytes, &client, Transport::Udp, 1) {
            check_size(&reply, &client, 512)?;
        }
    }
}
