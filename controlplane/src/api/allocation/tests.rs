use std::collections::HashSet;

use bytes::Bytes;
use serde_json::json;

use super::held::SERVICES;
use super::ranges::RANGES;
use super::*;
use crate::api::object;
use crate::store::{Embedded, EmbeddedConfig, Expect, Range};

/// A store with the allocators of some API servers over it.
struct Stage {
    store: Embedded,
    servers: Vec<ServiceAllocator>,
    _folder: tempfile::TempDir,
}

fn target() -> Target {
    Target::parse("/api/v1/namespaces/default/services").expect("services")
}

async fn stage_of(servers: usize, cidrs: &[&str]) -> Stage {
    let ranges: Vec<IpNetwork> = cidrs
        .iter()
        .map(|range| range.parse().expect("a range"))
        .collect();
    let own = ranges[0].iter().nth(1);
    let folder = tempfile::tempdir().expect("a folder");
    let config = EmbeddedConfig::at(folder.path().join("state.redb"));
    let stage = Stage {
        store: Embedded::open(&config).expect("a store"),
        servers: (0..servers)
            .map(|_| ServiceAllocator::new(&ranges, own))
            .collect(),
        _folder: folder,
    };
    stage.cidr("kubernetes", json!({"cidrs": cidrs})).await;
    stage
}

async fn stage() -> Stage {
    stage_of(1, &["10.96.0.0/24"]).await
}

fn service(name: &str, spec: Value) -> Value {
    json!({"metadata": {"name": name, "namespace": "default"}, "spec": spec})
}

fn put(service: &Value, expect: Expect) -> Write {
    Write {
        key: format!("{SERVICES}default/{}", fields::name(service)),
        value: Some(object::encode(service.clone())),
        expect,
    }
}

impl Stage {
    async fn reserve(
        &self,
        server: usize,
        service: &mut Value,
        old: Option<&Value>,
    ) -> Result<Reservation, String> {
        self.servers[server]
            .reserve(&self.store, &target(), service, old)
            .await
            .map_err(|status| status.message)
    }

    async fn store(&self, service: &Value, reservation: &Reservation) -> Result<(), StoreError> {
        let write = put(service, Expect::Any);
        let written = self.store.commit(write, reservation.along(service)).await;
        written.map(drop)
    }

    /// Gives a service what it needs, and stores it.
    async fn give(&self, service: &mut Value, old: Option<&Value>) -> Result<(), String> {
        let reservation = self.reserve(0, service, old).await?;
        self.store(service, &reservation).await.expect("stored");
        Ok(())
    }

    /// Writes a ServiceCIDR.
    async fn cidr(&self, name: &str, spec: Value) {
        let object = json!({"metadata": {"name": name}, "spec": spec});
        self.put_cidr(name, object).await;
    }

    async fn put_cidr(&self, name: &str, object: Value) {
        let key = format!("{RANGES}{name}");
        let value = object::encode(object);
        let put = self.store.put(&key, value, Expect::Any).await;
        put.expect("a ServiceCIDR");
    }

    /// How many addresses and ports are given out.
    async fn given(&self) -> (usize, usize) {
        let keys = async |prefix| {
            let page = self.store.list(Range::all(prefix)).await.expect("a list");
            page.records.len()
        };
        let counts = (keys(ADDRESSES).await, keys(PORTS).await);
        let held = &self.servers[0].held;
        held.catch_up(&self.store).await.expect("caught up");
        assert_eq!(held.view().counts(), counts);
        counts
    }

    async fn delete(&self, service: &Value) {
        let write = Write {
            value: None,
            ..put(service, Expect::Any)
        };
        let record = self.store.get(&write.key).await.expect("a read");
        let along = freeing(&target(), &record.expect("it is there"));
        self.store.commit(write, along).await.expect("deleted");
    }
}

#[tokio::test]
async fn a_refused_write_gives_back_what_it_took_and_nothing_else() {
    let all = stage().await;
    let ported = |name, ip| {
        service(
            name,
            json!({"type": "NodePort", "clusterIP": ip, "ports": [{"port": 80, "nodePort": 30001}]}),
        )
    };
    let mut first = ported("first", "10.96.0.7");
    all.give(&mut first, None).await.expect("free");
    // A second one asks for a free address and the first one's port.
    let refused = all.give(&mut ported("second", "10.96.0.8"), None).await;
    let why = refused.expect_err("the port is taken");
    assert!(why.contains("provided port is already allocated"), "{why}");
    let mut third = service("third", json!({"clusterIP": "10.96.0.8", "ports": []}));
    all.give(&mut third, None).await.expect("10.96.0.8 is free");
    let mut fourth = service("fourth", json!({"clusterIP": "10.96.0.7", "ports": []}));
    let why = all.give(&mut fourth, None).await.expect_err("it is taken");
    assert!(why.contains("provided IP is already allocated"), "{why}");
    assert_eq!(all.given().await, (2, 1));
    all.delete(&first).await;
    assert_eq!(all.given().await, (1, 0));
    all.give(&mut fourth, None).await.expect("free again");
}

#[tokio::test]
async fn what_is_chosen_here_is_nobody_elses_while_it_is_written() {
    let all = stage().await;
    let asks = || service("a", json!({"clusterIP": "10.96.0.7", "ports": []}));
    let chosen = all.reserve(0, &mut asks(), None).await.expect("free");
    let why = all
        .reserve(0, &mut asks(), None)
        .await
        .expect_err("promised to another");
    assert!(why.contains("provided IP is already allocated"), "{why}");
    // Not stored: free again.
    drop(chosen);
    all.give(&mut asks(), None).await.expect("free");
}

#[tokio::test]
async fn two_servers_never_give_out_the_same() {
    let all = stage_of(2, &["10.96.0.0/24"]).await;
    let spec = json!({"type": "NodePort", "clusterIP": "10.96.0.7", "ports": [{"port": 80, "nodePort": 30001}]});
    let (mut one, mut two) = (service("one", spec.clone()), service("two", spec));
    // Both look before either has written.
    let first = all.reserve(0, &mut one, None).await.expect("free");
    let second = all.reserve(1, &mut two, None).await.expect("free");
    all.store(&one, &first).await.expect("stored");
    let lost = all.store(&two, &second).await.expect_err("lost the race");
    assert!(is_lost_race(&target(), &lost), "{lost}");
    drop(second);
    let why = all
        .reserve(1, &mut two, None)
        .await
        .expect_err("it sees that now");
    assert!(why.contains("already allocated"), "{why}");
    let key = format!("{SERVICES}default/two");
    let written = all.store.get(&key).await.expect("a read");
    assert_eq!(written, None, "nothing of the second was written");
    // What one frees the other one gives out.
    all.delete(&one).await;
    all.reserve(1, &mut two, None).await.expect("free again");
}

#[tokio::test]
async fn an_update_frees_what_it_drops_once_it_is_stored() {
    let all = stage().await;
    let mut old = service("a", json!({"type": "NodePort", "ports": [{"port": 80}]}));
    all.give(&mut old, None).await.expect("free");
    let number = old["spec"]["ports"][0]["nodePort"]
        .as_u64()
        .expect("a node port");
    assert!((30000..=32767).contains(&number));
    let mut new = old.clone();
    new.set("/spec/type", "ClusterIP");
    new["spec"]["ports"][0].remove("/nodePort");
    drop(all.reserve(0, &mut new, Some(&old)).await.expect("fits"));
    assert_eq!(all.given().await, (1, 1), "not stored: nothing is freed");
    all.give(&mut new, Some(&old)).await.expect("fits");
    assert_eq!(all.given().await, (1, 0));
}

#[tokio::test]
async fn a_small_range_is_given_out_to_its_last_address() {
    let all = stage_of(1, &["10.96.0.0/28"]).await;
    let mut given = HashSet::new();
    for at in 0..13 {
        let mut service = service(&format!("s{at}"), json!({"type": "ClusterIP"}));
        all.give(&mut service, None).await.expect("room");
        given.insert(service.text("/spec/clusterIP").to_owned());
    }
    assert_eq!(given.len(), 13, ".2 to .14");
    let mut more = service("more", json!({"type": "ClusterIP"}));
    let why = all.give(&mut more.clone(), None).await.expect_err("full");
    assert_eq!(
        why,
        r#"Internal error occurred: failed to allocate a serviceIP for Service "more": range is full"#
    );
    // The API's own is given to whoever asks for it alone.
    let mut own = service("kubernetes", json!({"clusterIP": "10.96.0.1"}));
    all.give(&mut own, None).await.expect("free");
    all.cidr("more", json!({"cidrs": ["203.0.113.0/30", "fd00::/112"]}))
        .await;
    all.give(&mut more, None).await.expect("room");
    let ip = more.text("/spec/clusterIP");
    assert!(ip.starts_with("203.0.113."), "{ip}");
}

#[tokio::test]
async fn an_address_may_be_of_any_range_that_is_ready() {
    let all = stage_of(2, &["10.96.0.0/24", "fd00:10:96::/112"]).await;
    let asks = |ip: &str| service(&format!("s{ip}"), json!({"clusterIP": ip, "ports": []}));
    let outside = "the provided IP (203.0.113.7) is not in the valid range. The range of valid IPs is 10.96.0.0/24";
    let why = all.give(&mut asks("203.0.113.7"), None).await;
    let why = why.expect_err("of no range");
    assert!(why.contains(outside), "{why}");
    let spec = json!({"cidrs": ["203.0.113.0/24", "2001:db8::/64"]});
    all.cidr("more", spec.clone()).await;
    for ip in ["203.0.113.7", "2001:db8::7"] {
        // Either server has heard of it.
        let taken = all.reserve(1, &mut asks(ip), None).await;
        drop(taken.expect("free"));
        all.give(&mut asks(ip), None).await.expect("free");
        let why = all.reserve(1, &mut asks(ip), None).await;
        let why = why.expect_err("taken");
        assert!(why.contains("provided IP is already allocated"), "{why}");
    }
    for (ip, what) in [
        ("203.0.113.0", "the range's own"),
        ("203.0.113.255", "for broadcasts"),
        ("2001:db8::", "the range's own"),
    ] {
        let why = all.give(&mut asks(ip), None).await.expect_err(what);
        assert!(why.contains("is not in the valid range"), "{why}");
    }
    let object = json!({"metadata": {"name": "more"}, "spec": spec, "status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    all.put_cidr("more", object).await;
    let why = all.reserve(1, &mut asks("203.0.113.8"), None).await;
    let why = why.expect_err("not ready");
    assert!(why.contains("is not in the valid range"), "{why}");
}

#[tokio::test]
async fn a_second_address_comes_with_its_family_and_is_free_again_when_that_goes() {
    let all = stage_of(1, &["10.96.0.0/24", "fd00:10:96::/112"]).await;
    let mut one = service(
        "one",
        json!({"type": "ClusterIP", "clusterIP": "10.96.0.9"}),
    );
    all.give(&mut one, None).await.expect("free");
    let mut two = one.clone();
    two.set("/spec/ipFamilyPolicy", "RequireDualStack");
    // Not stored: what was given out for it is free again.
    let tried = all.reserve(0, &mut two.clone(), Some(&one)).await;
    drop(tried.expect("room"));
    assert_eq!(all.given().await.0, 1);
    all.give(&mut two, Some(&one)).await.expect("room");
    let second = two.text("/spec/clusterIPs/1").to_owned();
    assert!(second.starts_with("fd00:10:96::"), "{second}");
    assert_eq!(all.given().await.0, 2);

    let mut other = service("other", json!({"type": "ClusterIP", "clusterIP": second}));
    let refused = all.give(&mut other.clone(), None).await;
    let why = refused.expect_err("taken");
    assert!(why.contains("provided IP is already allocated"), "{why}");
    let mut back = two.clone();
    back.set("/spec/ipFamilyPolicy", "SingleStack");
    all.give(&mut back, Some(&two)).await.expect("less");
    all.give(&mut other, None).await.expect("free again");
    assert_eq!(back["spec"]["clusterIPs"], json!(["10.96.0.9"]));
    assert_eq!(other["spec"]["ipFamilies"], json!(["IPv6"]));
}

#[tokio::test]
async fn an_address_that_is_not_ones_own_is_not_freed_by_naming_it_in_an_update() {
    let all = stage().await;
    let asks = |name, ip| service(name, json!({"type": "ClusterIP", "clusterIP": ip}));
    let mut first = asks("first", "10.96.0.7");
    let mut second = asks("second", "10.96.0.8");
    all.give(&mut first, None).await.expect("free");
    all.give(&mut second, None).await.expect("free");
    let mut thief = second.clone();
    thief.set("/spec/clusterIP", "10.96.0.7");
    thief.set("/spec/clusterIPs", json!(["10.96.0.7"]));
    // Validation refuses it afterwards, and the reservation is dropped.
    drop(all.reserve(0, &mut thief, Some(&second)).await);
    let mut late = asks("late", "10.96.0.7");
    assert!(all.give(&mut late, None).await.is_err());
}

#[tokio::test]
async fn local_balancers_get_a_health_port_and_one_number_serves_two_protocols() {
    let all = stage().await;
    let mut service = service(
        "a",
        json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local",
        "ports": [{"port": 53, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}, {"port": 80}]}),
    );
    all.give(&mut service, None).await.expect("room");
    let port = |at: usize| service["spec"]["ports"][at]["nodePort"].as_u64();
    assert_eq!(port(0), port(1));
    assert_ne!(port(0), port(2));
    let check = service.int("/spec/healthCheckNodePort");
    assert!((30000..=32767).contains(&check), "{check}");
    assert_eq!(all.given().await.1, 3);
    let mut open = service.clone();
    open.set("/spec/externalTrafficPolicy", "Cluster");
    open.remove("/spec/healthCheckNodePort");
    all.give(&mut open, Some(&service)).await.expect("less");
    assert_eq!(all.given().await.1, 2);
}

#[tokio::test]
async fn keys_and_services_that_do_not_belong_together_are_repaired() {
    let all = stage().await;
    let spec = json!({"type": "NodePort", "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"],
        "ports": [{"port": 80, "nodePort": 30001}]});
    // Written by a version without keys; of two that hold the same only one can be noted.
    for name in ["old", "same"] {
        let write = put(&service(name, spec.clone()), Expect::Absent);
        all.store.commit(write, Vec::new()).await.expect("written");
    }
    let mut mine = service("a", json!({"clusterIP": "10.96.0.9"}));
    all.give(&mut mine, None).await.expect("free");
    let put_raw = async |key: String, value: &str| {
        let value = Bytes::copy_from_slice(value.as_bytes());
        all.store.put(&key, value, Expect::Any).await.expect("put")
    };
    // Of Services that are gone; the last one is a user's own.
    let managed = r#"{"metadata":{"name":"10.96.0.20","labels":{"ipaddress.kubernetes.io/managed-by":"ipallocator.k8s.io"}}}"#;
    put_raw(format!("{ADDRESSES}10.96.0.20"), managed).await;
    put_raw(format!("{PORTS}30009"), r#"{"metadata":{"name":"30009"}}"#).await;
    let users = r#"{"metadata":{"name":"10.96.0.21"}}"#;
    put_raw(format!("{ADDRESSES}10.96.0.21"), users).await;
    for round in 0..2 {
        let repairs = repair::repair(&all.store).await.expect("repaired");
        let mut told: Vec<_> = repairs
            .iter()
            .map(|repair| (repair.about.text("/name"), repair.reason.as_str()))
            .collect();
        told.sort_unstable();
        // That two hold the same is told as long as it is so; the rest is mended.
        let lasting = [
            ("same", "ClusterIPAlreadyAllocated"),
            ("same", "PortAlreadyAllocated"),
        ];
        let mended = [
            ("10.96.0.20", "IPAddressNotAllocated"),
            ("30009", "PortNotAllocated"),
            ("old", "ClusterIPNotAllocated"),
            ("old", "PortNotAllocated"),
        ];
        let expected = match round {
            0 => [&mended[..], &lasting].concat(),
            _ => lasting.to_vec(),
        };
        assert_eq!(told, expected);
        assert_eq!(all.given().await, (3, 1), ".7, .9 and the user's .21");
    }
    let address = all.store.get(&format!("{ADDRESSES}10.96.0.7")).await;
    let address = address.expect("a read").expect("an IPAddress");
    let address: Value = serde_json::from_slice(&address.value).expect("JSON");
    let parent = json!({"resource": "services", "namespace": "default", "name": "old"});
    assert_eq!(address["spec"]["parentRef"], parent);
}

#[tokio::test]
async fn an_address_that_says_something_else_than_its_service_is_repaired() {
    let all = stage().await;
    let mut services = Vec::new();
    for (name, ip) in [
        ("foreign", "10.96.0.3"),
        ("gone", "10.96.0.4"),
        ("other", "10.96.0.5"),
        ("label", "10.96.0.6"),
        ("fine", "10.96.0.7"),
    ] {
        let mut service = service(name, json!({"clusterIP": ip}));
        all.give(&mut service, None).await.expect("free");
        services.push(service);
    }
    let outside = service("outside", json!({"clusterIP": "203.0.113.7"}));
    let write = put(&outside, Expect::Absent);
    all.store.commit(write, Vec::new()).await.expect("written");
    let edit = async |ip: &str, path: &str, value: Value| {
        let key = format!("{ADDRESSES}{ip}");
        let record = all.store.get(&key).await.expect("a read");
        let mut object: Value =
            serde_json::from_slice(&record.expect("an IPAddress").value).expect("JSON");
        object.set(path, value);
        let value = object::encode(object);
        all.store.put(&key, value, Expect::Any).await.expect("put");
    };
    edit("10.96.0.3", "/spec/parentRef/group", json!("example.com")).await;
    edit("10.96.0.4", "/spec/parentRef/name", json!("nobody")).await;
    edit("10.96.0.5", "/spec/parentRef/name", json!("fine")).await;
    edit("10.96.0.6", "/metadata/labels", json!({})).await;
    // One more, of a Service that has another address.
    let fine = all.store.get(&format!("{ADDRESSES}10.96.0.7")).await;
    let fine = fine.expect("a read").expect("an IPAddress").value;
    let more = format!("{ADDRESSES}10.96.0.8");
    all.store.put(&more, fine, Expect::Any).await.expect("put");
    for round in 0..2 {
        let repairs = repair::repair(&all.store).await.expect("repaired");
        let mut told: Vec<String> = repairs.into_iter().map(|one| one.message).collect();
        told.sort_unstable();
        let wrong = |name: &str, ip: &str| {
            format!(
                "the ClusterIP [IPv4]: {ip} for Service default/{name} has a wrong reference; repairing"
            )
        };
        let lasting = "Cluster IP [IPv4]: 203.0.113.7 is not within any configured Service CIDR; please recreate service";
        let mut expected = vec![lasting.to_owned()];
        if round == 0 {
            expected.push(
                "IPAddress: 10.96.0.8 for Service default/fine has a wrong reference; cleaning up"
                    .to_owned(),
            );
            expected.extend([
                wrong("foreign", "10.96.0.3"),
                wrong("gone", "10.96.0.4"),
                wrong("other", "10.96.0.5"),
                wrong("label", "10.96.0.6"),
            ]);
            expected[2..].sort_unstable();
        }
        assert_eq!(told, expected);
    }
    for service in &services {
        let key = format!("{ADDRESSES}{}", service.text("/spec/clusterIP"));
        let record = all.store.get(&key).await.expect("a read");
        let address: Value =
            serde_json::from_slice(&record.expect("an IPAddress").value).expect("JSON");
        assert_eq!(address["spec"]["parentRef"]["name"], fields::name(service));
        let labels = json!({"ipaddress.kubernetes.io/ip-family": "IPv4",
            "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io"});
        assert_eq!(address["metadata"]["labels"], labels);
    }
}
