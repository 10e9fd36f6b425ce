//! What is kept of others' answers, for how long, and what TTLs are told of it: at moments of a test's choosing.

use std::time::{Duration, Instant};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name as ProtoName, RData, Record, RecordType, rdata};
use keelway_dns::cache::{Cache, CacheRules, Found, Key};
use keelway_dns::message::Reply;
use keelway_dns::name::Name;

const WWW: &str = "www.example.org.";

fn proto(text: &str) -> ProtoName {
    ProtoName::from_ascii(text).expect("a name")
}

fn key(text: &str) -> Key {
    let name = Name::parse(text).expect("a name");
    Key::new(name.wire(), RecordType::A.into(), false, false)
}

/// The question section about an address of a name.
fn question(text: &str) -> Vec<u8> {
    let mut question = Name::parse(text).expect("a name").wire().to_vec();
    question.extend(u16::from(RecordType::A).to_be_bytes());
    question.extend(1_u16.to_be_bytes());
    question
}

fn reply(text: &str, code: ResponseCode, answers: Vec<Record>, soa: Option<[u32; 2]>) -> Reply {
    let mut message = Message::new(7, MessageType::Response, OpCode::Query);
    message.metadata.response_code = code;
    message.add_query(Query::query(proto(text), RecordType::A));
    message.answers = answers;
    if let Some([ttl, minimum]) = soa {
        let zone = proto("example.org.");
        let data = rdata::SOA::new(zone.clone(), zone.clone(), 1, 1, 1, 1, minimum);
        message.authorities = vec![Record::from_rdata(zone, ttl, RData::SOA(data))];
    }
    let wire = message.to_vec().expect("a message");
    Reply::read(&wire, question(text).len(), RecordType::A.into()).expect("an answer")
}

fn data(text: &str, ttl: u32) -> Reply {
    let address = RData::A(rdata::A([192, 0, 2, 7].into()));
    let record = Record::from_rdata(proto(text), ttl, address);
    reply(text, ResponseCode::NoError, vec![record], None)
}

fn denial(text: &str, soa: [u32; 2]) -> Reply {
    reply(text, ResponseCode::NXDomain, Vec::new(), Some(soa))
}

/// The TTLs that are told of a name so long after it was put there.
fn told(cache: &Cache, name: &str, later: Instant) -> Option<Vec<u32>> {
    let (Found::Fresh { entry, .. } | Found::Stale(entry)) = cache.get(&key(name), later) else {
        return None;
    };
    let message = entry.message(&question(name), later).expect("a message");
    let records = message.answers.iter().chain(&message.authorities);
    Some(records.map(|record| record.ttl).collect())
}

#[test]
fn ttls_run_out_with_the_entry_also_in_what_is_put_together_of_several() {
    let now = Instant::now();
    let at = |seconds| now + Duration::from_secs(seconds);
    let cache = Cache::new(CacheRules::default());
    cache.put(&key(WWW), data(WWW, 300), now);
    assert_eq!(told(&cache, WWW, at(150)), Some(vec![150]));
    assert_eq!(told(&cache, WWW, at(299)), Some(vec![1]));
    assert_eq!(told(&cache, WWW, at(301)), Some(vec![30]), "stale");
    let mut rules = CacheRules::default();
    rules.success.ttl_max = Duration::from_secs(30);
    let cache = Cache::new(rules);
    cache.put(&key(WWW), data(WWW, 300), now);
    assert_eq!(
        told(&cache, WWW, now),
        Some(vec![30]),
        "the operator's bound"
    );
}

#[test]
fn a_denial_is_told_for_no_longer_than_it_is_kept() {
    let now = Instant::now();
    let cache = Cache::new(CacheRules::default());
    cache.put(&key(WWW), denial(WWW, [600, 30]), now);
    for age in [0, 15, 29] {
        let later = now + Duration::from_secs(age);
        // Whoever keeps it takes the smaller of this and the minimum, which is 30.
        assert_eq!(told(&cache, WWW, later), Some(vec![30 - age as u32]));
    }
}

#[test]
fn what_is_not_to_be_kept_is_not() {
    let mut rules = CacheRules::default();
    let zone = |text| vec![Name::parse(text).expect("a name")];
    rules.success.except = zone("live.example");
    rules.denial.except = zone("soon.example");
    let now = Instant::now();
    let cache = Cache::new(rules.clone());
    for (name, kept) in [
        ("www.live.example.", [false, true]),
        ("www.soon.example.", [true, false]),
        ("www.alive.example.", [true, true]),
    ] {
        cache.put(&key(name), data(name, 60), now);
        assert_eq!(told(&cache, name, now).is_some(), kept[0], "data of {name}");
        cache.put(&key(name), denial(name, [60, 60]), now);
        let denied = matches!(
            cache.get(&key(name), now),
            Found::Fresh { entry, .. } if entry.rcode() == keelway_dns::answer::Rcode::NxDomain
        );
        assert_eq!(denied, kept[1], "denial of {name}");
    }
    rules.zones = zone("example.org");
    let cache = Cache::new(rules);
    cache.put(&key(WWW), data(WWW, 60), now);
    cache.put(&key("www.example."), data("www.example.", 60), now);
    assert!(told(&cache, WWW, now).is_some() && told(&cache, "www.example.", now).is_none());
}

#[test]
fn of_all_who_ask_near_the_end_one_renews() {
    let now = Instant::now();
    let cache = Cache::new(CacheRules::default());
    let entry = cache.put(&key(WWW), data(WWW, 100), now);
    let renewals = |age: u64| {
        let later = now + Duration::from_secs(age);
        let hits = (0..1000).map(|_| cache.get(&key(WWW), later));
        let told = hits.filter(|found| matches!(found, Found::Fresh { renew: true, .. }));
        told.count()
    };
    assert_eq!(renewals(50), 0);
    assert_eq!(renewals(95), 1);
    assert_eq!(renewals(96), 0, "it is under way");
    entry.renewal_failed(now + Duration::from_secs(95));
    assert_eq!(renewals(98), 0, "it has just failed");
    cache.put(&key(WWW), data(WWW, 1000), now);
    assert_eq!(renewals(950), 1, "the next one");
}

#[test]
fn an_answer_that_may_not_be_kept_ends_what_was_known() {
    let now = Instant::now();
    let mut rules = CacheRules::default();
    (rules.success.ttl_min, rules.stale) = (Duration::ZERO, Duration::from_secs(3600));
    let cache = Cache::new(rules);
    cache.put(&key(WWW), data(WWW, 60), now);
    let stale = now + Duration::from_secs(100);
    assert!(told(&cache, WWW, stale).is_some());
    cache.put(&key(WWW), data(WWW, 0), stale);
    assert_eq!(told(&cache, WWW, stale), None);
}

#[test]
fn a_failure_is_found_once_the_data_beside_it_may_not_be_served_any_more() {
    let now = Instant::now();
    let at = |seconds| now + Duration::from_secs(seconds);
    let cache = Cache::new(CacheRules {
        stale: Duration::from_secs(100),
        ..CacheRules::default()
    });
    cache.put(&key(WWW), data(WWW, 60), now);
    let failure = || reply(WWW, ResponseCode::ServFail, Vec::new(), None);
    for (failed_at, is_failure) in [(90, false), (170, true)] {
        cache.put(&key(WWW), failure(), at(failed_at));
        let later = at(failed_at + 1);
        let seen = cache.peek(&key(WWW), later).expect("something is kept");
        assert!(cache.may_serve(&seen, later), "after {failed_at} s");
        assert_eq!(seen.is_failure(), is_failure, "after {failed_at} s");
    }
}
