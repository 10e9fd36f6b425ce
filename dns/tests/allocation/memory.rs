//! What a cluster and the answers of others take of memory, piece by piece.

use std::time::Instant;

use cluster_model::{Change, Dirty, Kind, Object, read_manifest};
use hickory_proto::rr::RecordType;
use keelway_dns::cache::{Cache, CacheRules, Key};
use keelway_dns::kept::Kept;
use keelway_dns::message::Reply;
use keelway_dns::name::Name;
use keelway_dns::query::Query;
use keelway_dns::zone::{Zone, ZoneSettings};

use super::{sys, wire};

/// Service `i` and its slice of five endpoints; a headless Service has a record for each.
fn objects(i: usize, headless: bool) -> Vec<Object> {
    let [_, b, c, d] = (i as u32).to_be_bytes();
    let address = match headless {
        true => "None".to_owned(),
        false => format!("10.{b}.{c}.{d}"),
    };
    let endpoints: Vec<String> = (0..5)
        .map(|j| format!(r#"{{"addresses":["11.{}.{c}.{d}"]}}"#, b * 5 + j))
        .collect();
    let manifest = format!(
        r#"[{{"kind":"Service","metadata":{{"name":"svc-{i}","namespace":"ns-{0}"}},
             "spec":{{"clusterIP":"{address}","clusterIPs":["{address}"],"ports":[{{"name":"http","port":80}}]}}}},
            {{"kind":"EndpointSlice","addressType":"IPv4","metadata":{{"name":"svc-{i}-abcde","namespace":"ns-{0}",
             "labels":{{"kubernetes.io/service-name":"svc-{i}"}}}},"ports":[{{"name":"http","port":8080}}],"endpoints":[{1}]}}]"#,
        i % 50,
        endpoints.join(",")
    );
    read_manifest(manifest.as_bytes()).expect("a manifest")
}

/// Bytes that each of some thousand Services takes, from what is known of it to its records, once the lists themselves are let go.
fn bytes_of_each(headless: bool) -> usize {
    // So many that what does not grow with them, some 200 kB, is little.
    const SERVICES: usize = 6000;
    let settings = ZoneSettings::of(Name::parse("cluster.local").expect("a name"));
    let before = sys::held();
    let (mut kept, mut zone) = (Kept::default(), Zone::new(settings));
    let all: Vec<Object> = (0..SERVICES).flat_map(|i| objects(i, headless)).collect();
    let mut dirty = Dirty::default();
    for kind in [Kind::Service, Kind::EndpointSlice] {
        let listed = all.iter().filter(|object| object.kind() == kind).cloned();
        kept.apply(&Change::Replace(kind, listed.collect()), &mut dirty);
    }
    kept.update(&mut zone, &dirty);
    drop((all, dirty));
    assert!(zone.synced());
    let each = (sys::held() - before) / SERVICES;
    drop((kept, zone));
    each
}

#[test]
fn a_service_and_its_endpoints_take_a_few_hundred_bytes() {
    let (with_address, headless) = (bytes_of_each(false), bytes_of_each(true));
    println!("{with_address} bytes with an address, {headless} headless");
    assert!(with_address < 700, "{with_address}");
    assert!(headless < 1600, "{headless}");
}

#[test]
fn an_outside_name_takes_half_a_kilobyte_at_most() {
    const NAMES: usize = 8000;
    let before = sys::held();
    let cache = Cache::new(CacheRules::default());
    for i in 0..NAMES {
        let asked = wire(&format!("u{i:08}.once.example.org."), RecordType::A);
        let mut reply = asked.clone();
        (reply[2], reply[3], reply[7]) = (0x81, 0x80, 1);
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4, 192, 0, 2, 1]);
        let query = Query::parse(&asked).expect("a query");
        let reply = Reply::read(&reply, query.question.len(), query.rtype).expect("an answer");
        cache.put(&Key::of(&query), reply, Instant::now());
    }
    assert_eq!(cache.entries(), [NAMES, 0]);
    let each = (sys::held() - before) / NAMES;
    println!("{each} bytes");
    assert!(each < 512, "{each}");
}
