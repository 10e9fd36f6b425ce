//! Who gets which address: a pure function of all Services and the pools.
//!
//! All Services are planned together: an address is given once, and planned apart two could get the same. What a Service
//! has it keeps, as long as it may; then older Services come before younger ones.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use cluster_model::ObjectKey;
use cluster_model::api::api::core::v1::Service;

use super::pools::{Pool, Pools};

/// `spec.loadBalancerClass` of Services that are ours whatever else gives out addresses.
pub const CLASS: &str = "keelway.io/l2";
/// Addresses wished for, one of each family at most, separated by commas. Comes before the deprecated `spec.loadBalancerIP`.
pub const IPS_ANNOTATION: &str = "keelway.io/load-balancer-ips";
/// Pool wished for.
pub const POOL_ANNOTATION: &str = "keelway.io/load-balancer-pool";
/// Services with the same value may share an address, as long as they differ in ports.
pub const SHARING_ANNOTATION: &str = "keelway.io/allow-shared-ip";

/// What is to become of a Service's `status.loadBalancer`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is right, or none of our business.
    Leave,
    /// It gets these addresses.
    Give(Vec<IpAddr>),
    /// It has addresses of ours that it may not have any more.
    TakeBack,
    /// It gets none, for a reason that its owner should know; what it had is taken back.
    Refuse { reason: Refusal, had: bool },
}

/// Why a Service gets no address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refusal {
    #[error("the annotation {annotation} has {text:?}, which is not an IP address")]
    Malformed {
        annotation: &'static str,
        text: String,
    },
    #[error("there is no pool {0:?}")]
    NoPool(String),
    #[error("{address} is in no pool{}", .pool.as_ref().map(|pool| format!(" {pool:?}")).unwrap_or_default())]
    NotInPool {
        address: IpAddr,
        pool: Option<String>,
    },
    #[error("{0} is not of a family that the Service has")]
    Family(IpAddr),
    #[error("{address} belongs to Service {owner}")]
    Taken { address: IpAddr, owner: String },
    #[error("{}", exhausted(.pool.as_deref(), .family))]
    Exhausted {
        pool: Option<String>,
        family: &'static str,
    },
}

fn exhausted(pool: Option<&str>, family: &str) -> String {
    match pool {
        Some(pool) => format!("the pool {pool:?} has no free {family} address"),
        None => format!("no pool has a free {family} address"),
    }
}

/// A Service as far as its addresses go.
#[derive(Clone, Debug)]
struct Wish {
    key: ObjectKey,
    /// Families in the Service's order: true is IPv4.
    families: Vec<bool>,
    /// Whether it may do without one of its families (`PreferDualStack`).
    both_needed: bool,
    wished: Vec<IpAddr>,
    pool: Option<String>,
    sharing: Option<String>,
    local: bool,
    ports: BTreeSet<(String, i32)>,
    /// What its status says.
    has: Vec<IpAddr>,
}

/// Addresses given so far.
#[derive(Default)]
struct Given<'a> {
    owners: BTreeMap<IpAddr, Vec<&'a Wish>>,
}

impl<'a> Given<'a> {
    /// Who stands in the way of a Service's having an address.
    fn obstacle(&self, wish: &Wish, ip: IpAddr) -> Option<&'a Wish> {
        let owners = self.owners.get(&ip)?;
        let compatible = |owner: &&&Wish| {
            owner.key == wish.key
                || (owner.sharing.is_some()
                    && owner.sharing == wish.sharing
                    // With policy Local the address is announced where one Service's endpoints are, not the other's.
                    && !owner.local
                    && !wish.local
                    && owner.ports.is_disjoint(&wish.ports))
        };
        owners.iter().find(|owner| !compatible(owner)).copied()
    }

    fn give(&mut self, wish: &'a Wish, ip: IpAddr) {
        let owners = self.owners.entry(ip).or_default();
        if !owners.iter().any(|owner| owner.key == wish.key) {
            owners.push(wish);
        }
    }
}

/// Decides about every Service that has addresses or wants some.
pub fn plan<'a>(
    services: impl Iterator<Item = &'a Service>,
    pools: &Pools,
) -> BTreeMap<ObjectKey, Decision> {
    let mut decisions = BTreeMap::new();
    let mut wishes: Vec<(bool, Option<String>, Wish)> = Vec::new();
    for service in services {
        let Some(key) = key_of(service) else { continue };
        let has = addresses_of(service);
        let ours = has.iter().any(|ip| pools.of(*ip).is_some());
        if !wants(service, pools) {
            if ours && !is_foreign(service) {
                decisions.insert(key, Decision::TakeBack);
            }
            continue;
        }
        match wish(service, key.clone(), has) {
            Ok(wish) => {
                let created = service.metadata.creation_timestamp.as_ref();
                let created = created.map(|time| time.0.to_string());
                wishes.push((!ours, created, wish));
            }
            Err(reason) => {
                decisions.insert(key, Decision::Refuse { reason, had: ours });
            }
        }
    }
    wishes.sort_by(|a, b| (a.0, &a.1, &a.2.key).cmp(&(b.0, &b.1, &b.2.key)));
    let wishes: Vec<Wish> = wishes.into_iter().map(|(_, _, wish)| wish).collect();

    // What is held comes first, then what is wished by address: an automatic choice must not take it away.
    let mut given = Given::default();
    let mut kept: BTreeMap<&ObjectKey, Vec<IpAddr>> = BTreeMap::new();
    for wish in &wishes {
        let kept = kept.entry(&wish.key).or_default();
        for ip in &wish.has {
            if may_keep(wish, *ip, pools) && given.obstacle(wish, *ip).is_none() {
                given.give(wish, *ip);
                kept.push(*ip);
            }
        }
    }
    let (by_address, automatic): (Vec<&Wish>, Vec<&Wish>) =
        wishes.iter().partition(|wish| !wish.wished.is_empty());
    for wish in by_address.into_iter().chain(automatic) {
        let kept = kept.remove(&wish.key).unwrap_or_default();
        let had = wish.has.iter().any(|ip| pools.of(*ip).is_some());
        let decision = match choose(wish, &kept, &given, pools) {
            Ok(chosen) => {
                for ip in &chosen {
                    given.give(wish, *ip);
                }
                if chosen == wish.has {
                    Decision::Leave
                } else {
                    Decision::Give(chosen)
                }
            }
            Err(reason) => Decision::Refuse { reason, had },
        };
        decisions.insert(wish.key.clone(), decision);
    }
    decisions
}

fn key_of(service: &Service) -> Option<ObjectKey> {
    Some(ObjectKey::new(
        service.metadata.namespace.as_deref()?,
        service.metadata.name.as_deref()?,
    ))
}

/// The addresses that a Service's status has.
pub fn addresses_of(service: &Service) -> Vec<IpAddr> {
    let balancer = service
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref());
    ingress
        .unwrap_or_default()
        .iter()
        .filter_map(|one| one.ip.as_deref()?.parse().ok())
        .collect()
}

fn is_balancer(service: &Service) -> bool {
    let spec = service.spec.as_ref();
    spec.and_then(|spec| spec.type_.as_deref()) == Some("LoadBalancer")
}

/// Another controller's, by its class.
fn is_foreign(service: &Service) -> bool {
    let class = service
        .spec
        .as_ref()
        .and_then(|spec| spec.load_balancer_class.as_deref());
    is_balancer(service) && class.is_some_and(|class| class != CLASS)
}

fn wants(service: &Service, pools: &Pools) -> bool {
    let class = service
        .spec
        .as_ref()
        .and_then(|spec| spec.load_balancer_class.as_deref());
    let ours = match class {
        Some(class) => class == CLASS,
        None => pools.default_class,
    };
    is_balancer(service) && ours && service.metadata.deletion_timestamp.is_none()
}

fn wish(service: &Service, key: ObjectKey, has: Vec<IpAddr>) -> Result<Wish, Refusal> {
    let spec = service.spec.clone().unwrap_or_default();
    let annotation = |name: &str| {
        let annotations = service.metadata.annotations.as_ref()?;
        annotations.get(name).filter(|text| !text.is_empty())
    };
    let (field, text) = match annotation(IPS_ANNOTATION) {
        Some(text) => (IPS_ANNOTATION, Some(text.clone())),
        None => ("spec.loadBalancerIP", spec.load_balancer_ip),
    };
    let texts: Vec<String> = text
        .iter()
        .flat_map(|text| text.split(','))
        .map(|one| one.trim().to_owned())
        .filter(|one| !one.is_empty())
        .collect();
    let mut wished = Vec::new();
    for text in texts {
        let malformed = || Refusal::Malformed {
            annotation: field,
            text: text.clone(),
        };
        wished.push(text.parse().map_err(|_| malformed())?);
    }
    let families: Vec<bool> = spec
        .ip_families
        .iter()
        .flatten()
        .map(|family| family == "IPv4")
        .collect();
    Ok(Wish {
        key,
        families: if families.is_empty() {
            vec![true]
        } else {
            families
        },
        both_needed: spec.ip_family_policy.as_deref() == Some("RequireDualStack"),
        wished,
        pool: annotation(POOL_ANNOTATION).cloned(),
        sharing: annotation(SHARING_ANNOTATION).cloned(),
        local: spec.external_traffic_policy.as_deref() == Some("Local"),
        ports: spec
            .ports
            .iter()
            .flatten()
            .map(|port| (port.protocol.clone().unwrap_or("TCP".into()), port.port))
            .collect(),
        has,
    })
}

fn may_keep(wish: &Wish, ip: IpAddr, pools: &Pools) -> bool {
    let Some(pool) = pools.of(ip) else {
        return false;
    };
    let by_wish = wish.wished.is_empty() || wish.wished.contains(&ip);
    // A pool that is not for everybody any more leaves what it gave.
    let by_pool = wish.pool.as_ref().is_none_or(|name| *name == pool.name);
    by_wish && by_pool && wish.families.contains(&ip.is_ipv4())
}

fn choose(
    wish: &Wish,
    kept: &[IpAddr],
    given: &Given<'_>,
    pools: &Pools,
) -> Result<Vec<IpAddr>, Refusal> {
    let allowed: Vec<&Pool> = match &wish.pool {
        Some(name) => vec![
            pools
                .get(name)
                .ok_or_else(|| Refusal::NoPool(name.clone()))?,
        ],
        None => pools.pools.iter().filter(|pool| pool.auto_assign).collect(),
    };
    for ip in &wish.wished {
        if !wish.families.contains(&ip.is_ipv4()) {
            return Err(Refusal::Family(*ip));
        }
        let pool = pools.of(*ip);
        let named = wish.pool.as_ref();
        if pool.is_none_or(|pool| named.is_some_and(|name| *name != pool.name)) {
            return Err(Refusal::NotInPool {
                address: *ip,
                pool: wish.pool.clone(),
            });
        }
        if let Some(owner) = given.obstacle(wish, *ip) {
            return Err(Refusal::Taken {
                address: *ip,
                owner: owner.key.to_string(),
            });
        }
    }
    let (mut chosen, mut missing) = (Vec::new(), None);
    for family in &wish.families {
        let is_of = |ip: &&IpAddr| ip.is_ipv4() == *family;
        let found = kept
            .iter()
            .find(is_of)
            .or_else(|| wish.wished.iter().find(is_of))
            .copied()
            // Whoever names an address of one family wants that one alone.
            .or_else(|| {
                let mut free = allowed
                    .iter()
                    .filter(|_| wish.wished.is_empty())
                    .flat_map(|pool| pool.candidates(*family))
                    // An address is shared only by those who ask for it by name.
                    .filter(|ip| !given.owners.contains_key(ip));
                free.next()
            });
        match found {
            Some(ip) => chosen.push(ip),
            None if wish.wished.is_empty() => missing = Some(*family),
            None => {}
        }
    }
    match missing {
        Some(ipv4) if chosen.is_empty() || wish.both_needed => Err(Refusal::Exhausted {
            pool: wish.pool.clone(),
            family: if ipv4 { "IPv4" } else { "IPv6" },
        }),
        _ => Ok(chosen),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn pools() -> Pools {
        Pools::parse(
            "pools: [{name: a, addresses: [192.0.2.1-192.0.2.2, '2001:db8::1-2001:db8::2']}, \
             {name: vip, addresses: [198.51.100.7/32], autoAssign: false}]",
        )
        .unwrap()
    }

    fn service(name: &str, age: u8, changes: Value) -> Service {
        let mut object = json!({
            "metadata": {"namespace": "default", "name": name, "creationTimestamp": format!("2026-01-01T00:00:{age:02}Z")},
            "spec": {"type": "LoadBalancer", "ipFamilies": ["IPv4"], "ports": [{"port": 80}]},
        });
        merge(&mut object, changes);
        serde_json::from_value(object).unwrap()
    }

    fn merge(into: &mut Value, from: Value) {
        match (into, from) {
            (Value::Object(into), Value::Object(from)) => {
                for (key, value) in from {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
            (into, from) => *into = from,
        }
    }

    fn with_status(mut service: Service, ips: &[IpAddr]) -> Service {
        let ingress: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        let status = json!({"loadBalancer": {"ingress": ingress}});
        service.status = Some(serde_json::from_value(status).unwrap());
        service
    }

    fn decide(services: &[Service]) -> Vec<Decision> {
        let decisions = plan(services.iter(), &pools());
        services
            .iter()
            .map(|service| decisions.get(&key_of(service).unwrap()).cloned())
            .map(|decision| decision.unwrap_or(Decision::Leave))
            .collect()
    }

    fn give(ips: &[&str]) -> Decision {
        Decision::Give(ips.iter().map(|ip| ip.parse().unwrap()).collect())
    }

    fn refused(reason: &Decision) -> String {
        match reason {
            Decision::Refuse { reason, .. } => reason.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn older_services_come_first_and_an_empty_pool_is_said() {
        let all = [
            service("c", 3, json!({})),
            service("b", 1, json!({})),
            service("a", 2, json!({})),
        ];
        let decisions = decide(&all);
        assert_eq!(decisions[1..], [give(&["192.0.2.1"]), give(&["192.0.2.2"])]);
        assert_eq!(refused(&decisions[0]), "no pool has a free IPv4 address");
    }

    #[test]
    fn what_a_service_has_it_keeps_though_an_older_one_wants_it() {
        let has = with_status(service("b", 9, json!({})), &["192.0.2.1".parse().unwrap()]);
        let wants = json!({"metadata": {"annotations": {IPS_ANNOTATION: "192.0.2.1"}}});
        let decisions = decide(&[service("a", 1, wants), has]);
        assert_eq!(
            refused(&decisions[0]),
            "192.0.2.1 belongs to Service default/b"
        );
        assert_eq!(decisions[1], Decision::Leave);
    }

    #[test]
    fn wishes_are_met_before_automatic_choices() {
        let by_field = service("z", 9, json!({"spec": {"loadBalancerIP": "192.0.2.1"}}));
        let pool = json!({"metadata": {"annotations": {POOL_ANNOTATION: "vip"}}});
        let all = [service("a", 1, json!({})), by_field, service("p", 5, pool)];
        let wished = [
            give(&["192.0.2.2"]),
            give(&["192.0.2.1"]),
            give(&["198.51.100.7"]),
        ];
        assert_eq!(decide(&all), wished);
    }

    #[test]
    fn wishes_that_cannot_be_met_say_why() {
        for (annotations, said) in [
            (json!({IPS_ANNOTATION: "x"}), "not an IP address"),
            (
                json!({IPS_ANNOTATION: "203.0.113.1"}),
                "203.0.113.1 is in no pool",
            ),
            (json!({IPS_ANNOTATION: "2001:db8::1"}), "not of a family"),
            (
                json!({IPS_ANNOTATION: "192.0.2.1", POOL_ANNOTATION: "vip"}),
                "in no pool \"vip\"",
            ),
            (json!({POOL_ANNOTATION: "none"}), "no pool \"none\""),
        ] {
            let one = service("a", 1, json!({"metadata": {"annotations": annotations}}));
            let said_of_it = refused(&decide(&[one])[0]);
            assert!(said_of_it.contains(said), "{said_of_it}");
        }
    }

    #[test]
    fn addresses_are_taken_back_from_who_may_not_have_them() {
        let ip: IpAddr = "192.0.2.1".parse().unwrap();
        let changed = service("a", 1, json!({"spec": {"type": "ClusterIP"}}));
        let foreign = service(
            "b",
            1,
            json!({"spec": {"loadBalancerClass": "cloud.example/lb"}}),
        );
        let decisions = decide(&[with_status(changed, &[ip]), with_status(foreign, &[ip])]);
        assert_eq!(decisions, [Decision::TakeBack, Decision::Leave]);
        // An address that no pool has any more is replaced.
        let moved = with_status(
            service("a", 1, json!({})),
            &["203.0.113.9".parse().unwrap()],
        );
        assert_eq!(decide(&[moved]), [give(&["192.0.2.1"])]);
    }

    #[test]
    fn both_families_are_given_and_one_alone_where_that_will_do() {
        let dual = |name, policy| {
            let spec = json!({"spec": {"ipFamilies": ["IPv6", "IPv4"], "ipFamilyPolicy": policy}});
            service(name, 5, spec)
        };
        let all = [dual("a", "RequireDualStack")];
        assert_eq!(decide(&all), [give(&["2001:db8::1", "192.0.2.1"])]);
        let full = [service("x", 1, json!({})), service("y", 1, json!({}))];
        let prefer = [full.as_slice(), &[dual("a", "PreferDualStack")]].concat();
        assert_eq!(decide(&prefer)[2], give(&["2001:db8::1"]));
        let require = [full.as_slice(), &[dual("a", "RequireDualStack")]].concat();
        assert!(refused(&decide(&require)[2]).contains("IPv4"));
    }

    #[test]
    fn an_address_is_shared_by_those_who_agree_and_differ_in_ports() {
        let sharing = |name: &str, port: u16, policy: &str| {
            let annotations = json!({IPS_ANNOTATION: "192.0.2.1", SHARING_ANNOTATION: "k"});
            service(
                name,
                1,
                json!({
                    "metadata": {"annotations": annotations},
                    "spec": {"ports": [{"port": port}], "externalTrafficPolicy": policy},
                }),
            )
        };
        let two = decide(&[sharing("a", 80, "Cluster"), sharing("b", 443, "Cluster")]);
        assert_eq!(two, [give(&["192.0.2.1"]), give(&["192.0.2.1"])]);
        for other in [sharing("b", 80, "Cluster"), sharing("b", 443, "Local")] {
            let decisions = decide(&[sharing("a", 80, "Cluster"), other]);
            assert!(refused(&decisions[1]).contains("belongs to Service default/a"));
        }
    }

    #[test]
    fn classes_decide_whose_a_service_is() {
        let classed = service("a", 1, json!({"spec": {"loadBalancerClass": CLASS}}));
        let all = [classed, service("b", 2, json!({}))];
        let only_classed = Pools {
            default_class: false,
            ..pools()
        };
        let decisions = plan(all.iter(), &only_classed);
        assert_eq!(decisions.len(), 1);
    }

    proptest! {
        /// Whatever happens, no address has two owners that do not share, all come from pools, and a second look changes nothing.
        #[test]
        fn plans_are_sound_and_settle(specs in prop::collection::vec((0..3u8, 0..4u8, any::<bool>(), any::<bool>()), 0..8)) {
            let mut services: Vec<Service> = specs.iter().enumerate().map(|(i, (wish, port, share, local))| {
                let mut annotations = serde_json::Map::new();
                if *wish > 0 {
                    annotations.insert(IPS_ANNOTATION.into(), format!("192.0.2.{wish}").into());
                }
                if *share {
                    annotations.insert(SHARING_ANNOTATION.into(), "k".into());
                }
                service(&format!("s{i}"), i as u8, json!({
                    "metadata": {"annotations": annotations},
                    "spec": {"ports": [{"port": 80 + port}], "externalTrafficPolicy": if *local { "Local" } else { "Cluster" }},
                }))
            }).collect();
            let first = plan(services.iter(), &pools());
            for service in &mut services {
                if let Some(Decision::Give(ips)) = first.get(&key_of(service).unwrap()) {
                    *service = with_status(service.clone(), ips);
                }
            }
            let mut owners: BTreeMap<IpAddr, Vec<&Service>> = BTreeMap::new();
            for service in &services {
                for ip in addresses_of(service) {
                    prop_assert!(pools().of(ip).is_some());
                    owners.entry(ip).or_default().push(service);
                }
            }
            for sharers in owners.values().filter(|sharers| sharers.len() > 1) {
                let shares = |one: &&Service| one.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(SHARING_ANNOTATION));
                prop_assert!(sharers.iter().all(shares));
            }
            let second = plan(services.iter(), &pools());
            prop_assert!(second.values().all(|one| !matches!(one, Decision::Give(_) | Decision::TakeBack)), "{second:?}");
        }
    }
}
