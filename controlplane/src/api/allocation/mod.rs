//! Addresses and node ports of Services: given out from memory, rebuilt at start from the Services that are stored.

mod addresses;
mod ports;

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;
use serde_json::Value;

use super::fields::{self, Fields};
use super::request::Target;
use super::status::{FieldError, Status};
use super::strategy::families::{self, Family, has_addresses, is_headless};
use super::{Api, object};
use crate::store::Range;

#[derive(Debug, Default)]
struct Taken {
    addresses: HashSet<IpAddr>,
    ports: HashSet<u16>,
}

/// What services have been given.
#[derive(Debug)]
pub struct ServiceAllocator {
    /// One or two, of different families; the first one's family is the cluster's primary one.
    ranges: Vec<IpNetwork>,
    taken: Arc<Mutex<Taken>>,
}

/// What one write took and what it gives back: kept when the write is stored, undone when it is dropped.
#[derive(Debug)]
pub struct Reservation {
    taken: Arc<Mutex<Taken>>,
    new: Claim,
    freed: Claim,
    kept: bool,
}

/// The addresses and ports that a service holds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Claim {
    addresses: BTreeSet<IpAddr>,
    ports: BTreeSet<u16>,
}

impl Claim {
    fn of(service: &Value) -> Self {
        let addresses = service
            .items("/spec/clusterIPs")
            .iter()
            .filter_map(Value::as_str);
        let addresses = addresses
            .chain([service.text("/spec/clusterIP")])
            .filter_map(|ip| ip.parse().ok());
        let mut ports: BTreeSet<u16> = service
            .items("/spec/ports")
            .iter()
            .filter_map(|port| u16::try_from(port.int("/nodePort")).ok())
            .collect();
        ports.extend(u16::try_from(service.int("/spec/healthCheckNodePort")).ok());
        ports.remove(&0);
        Self {
            addresses: addresses.collect(),
            ports,
        }
    }

    fn without(&self, other: &Self) -> Self {
        Self {
            addresses: &self.addresses - &other.addresses,
            ports: &self.ports - &other.ports,
        }
    }
}

impl Taken {
    fn free(&mut self, claim: &Claim) {
        self.addresses
            .retain(|address| !claim.addresses.contains(address));
        self.ports.retain(|port| !claim.ports.contains(port));
    }
}

impl Reservation {
    /// The write is stored: what it freed can be given to others.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let back = if self.kept { &self.freed } else { &self.new };
        lock(&self.taken).free(back);
    }
}

fn lock(taken: &Mutex<Taken>) -> MutexGuard<'_, Taken> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_service(target: &Target) -> bool {
    target.resource.group.is_empty() && target.resource.plural == "services"
}

impl ServiceAllocator {
    pub fn new(ranges: Vec<IpNetwork>) -> Self {
        Self {
            ranges,
            taken: Arc::default(),
        }
    }

    /// For writes that give nothing out.
    pub fn nothing(&self) -> Reservation {
        Reservation {
            taken: self.taken.clone(),
            new: Claim::default(),
            freed: Claim::default(),
            kept: false,
        }
    }

    /// Gives a service what it asks for or lacks. Objects of other kinds need nothing.
    pub fn reserve(
        &self,
        target: &Target,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<Reservation, Status> {
        let mut reservation = self.nothing();
        if !is_service(target) {
            return Ok(reservation);
        }
        let invalid =
            |object: &Value, errors| Status::invalid("", "Service", fields::name(object), errors);
        families::link(object, old);
        families::settle(object, old, &self.families())
            .map_err(|errors| invalid(object, errors))?;
        let held = old.map(Claim::of).unwrap_or_default();
        let mut errors = Vec::new();
        let mut taken = lock(&self.taken);
        let new = &mut reservation.new;
        self.addresses(object, old, &mut taken, new, &mut errors);
        ports::give(
            object,
            old,
            &held.ports,
            &mut taken.ports,
            &mut new.ports,
            &mut errors,
        );
        drop(taken);
        if !errors.is_empty() {
            return Err(invalid(object, errors));
        }
        reservation.freed = held.without(&Claim::of(object));
        Ok(reservation)
    }

    fn families(&self) -> Vec<Family> {
        let ranges = self.ranges.iter();
        ranges.map(|range| Family::of(range.network())).collect()
    }

    /// Gives a new service an address per family, and one that has got a second family the second.
    fn addresses(
        &self,
        service: &mut Value,
        old: Option<&Value>,
        taken: &mut Taken,
        new: &mut Claim,
        errors: &mut Vec<FieldError>,
    ) {
        if !has_addresses(service) || service.text("/spec/clusterIPs/0") == "None" {
            return;
        }
        let wanted = families::families(service);
        let first = match old.filter(|old| has_addresses(old)) {
            None => 0,
            Some(old) if is_headless(old) => return,
            Some(old) if old.items("/spec/ipFamilies").len() < wanted.len() => 1,
            Some(_) => return,
        };
        let mut addresses = service.items("/spec/clusterIPs").to_vec();
        for (at, family) in wanted.into_iter().enumerate().skip(first) {
            let Some(range) = self.range(family) else {
                continue;
            };
            let asked = addresses.get(at).and_then(Value::as_str).unwrap_or("");
            let given = match asked.parse::<IpAddr>() {
                Err(_) => addresses::pick(range, &taken.addresses)
                    .ok_or_else(|| "range is full".to_owned()),
                Ok(address) if !range.contains(address) => Err(format!(
                    "the provided IP is not in the valid range. The range of valid IPs is {range}"
                )),
                Ok(address) if taken.addresses.contains(&address) => {
                    Err("provided IP is already allocated".to_owned())
                }
                Ok(address) => Ok(address),
            };
            match given {
                Ok(address) => {
                    taken.addresses.insert(address);
                    new.addresses.insert(address);
                    // What was asked for keeps its spelling.
                    if addresses.len() == at {
                        addresses.push(address.to_string().into());
                    }
                }
                Err(why) => {
                    let why = format!("failed to allocate IP {asked}: {why}");
                    let field = "spec.clusterIPs";
                    errors.push(FieldError::invalid(field, addresses.clone(), why));
                    return;
                }
            }
        }
        if let Some(first) = addresses.first() {
            service.set("/spec/clusterIP", first.clone());
        }
        service.set("/spec/clusterIPs", addresses);
    }

    fn range(&self, family: Family) -> Option<&IpNetwork> {
        let of_family = |range: &&IpNetwork| Family::of(range.network()) == family;
        self.ranges.iter().find(of_family)
    }
}

impl Api {
    /// Takes note of all that stored services hold.
    pub(super) async fn repair_allocations(&self) -> Result<(), Status> {
        let Some(resource) = crate::registry::resource("", "v1", "services") else {
            return Ok(());
        };
        let page = self
            .store
            .list(Range::all(&object::prefix(resource, None)))
            .await?;
        let mut taken = lock(&self.services.taken);
        for record in &page.records {
            let service = object::decode(record, resource.kind, "v1")?;
            let claim = Claim::of(&service);
            for address in claim.addresses {
                if !taken.addresses.insert(address) {
                    tracing::warn!(%address, service = %record.key, "two services hold one address");
                }
            }
            taken.ports.extend(claim.ports);
        }
        Ok(())
    }
}

impl ServiceAllocator {
    /// Gives back what a deleted service held.
    pub fn release(&self, target: &Target, object: &Value) {
        if is_service(target) {
            lock(&self.taken).free(&Claim::of(object));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn target() -> Target {
        Target::parse("/api/v1/namespaces/default/services").expect("services")
    }

    fn allocator() -> ServiceAllocator {
        ServiceAllocator::new(vec!["10.96.0.0/24".parse().expect("a range")])
    }

    fn service(spec: Value) -> Value {
        json!({"metadata": {"name": "a"}, "spec": spec})
    }

    #[test]
    fn a_refused_write_gives_back_what_it_took_and_nothing_else() {
        let all = allocator();
        let mut first = service(
            json!({"type": "NodePort", "clusterIP": "10.96.0.7", "ports": [{"port": 80, "nodePort": 30001}]}),
        );
        all.reserve(&target(), &mut first, None)
            .expect("free")
            .keep();
        // A second one asks for a free address and the first one's port.
        let mut second = service(
            json!({"type": "NodePort", "clusterIP": "10.96.0.8", "ports": [{"port": 80, "nodePort": 30001}]}),
        );
        let refused = all
            .reserve(&target(), &mut second, None)
            .expect_err("the port is taken");
        assert!(
            refused
                .message
                .contains("provided port is already allocated"),
            "{}",
            refused.message
        );
        let mut third = service(json!({"clusterIP": "10.96.0.8", "ports": []}));
        all.reserve(&target(), &mut third, None)
            .expect("10.96.0.8 was given back")
            .keep();
        let mut fourth = service(json!({"clusterIP": "10.96.0.7", "ports": []}));
        assert!(
            all.reserve(&target(), &mut fourth, None).is_err(),
            "10.96.0.7 is still the first one's"
        );
    }

    #[test]
    fn an_update_frees_what_it_drops_once_it_is_stored() {
        let all = allocator();
        let mut old = service(json!({"type": "NodePort", "ports": [{"port": 80}]}));
        all.reserve(&target(), &mut old, None).expect("free").keep();
        let number = old["spec"]["ports"][0]["nodePort"]
            .as_u64()
            .expect("a node port");
        assert!((30000..=32767).contains(&number));
        let mut new = old.clone();
        new.set("/spec/type", "ClusterIP");
        new["spec"]["ports"][0].remove("/nodePort");
        drop(all.reserve(&target(), &mut new, Some(&old)).expect("fits"));
        let taken = |all: &ServiceAllocator| lock(&all.taken).ports.len();
        assert_eq!(taken(&all), 1, "not stored: nothing is freed");
        all.reserve(&target(), &mut new, Some(&old))
            .expect("fits")
            .keep();
        assert_eq!(taken(&all), 0);
        assert_eq!(lock(&all.taken).addresses.len(), 1);
    }

    #[test]
    fn a_small_range_is_given_out_to_its_last_address() {
        let all = ServiceAllocator::new(vec!["10.96.0.0/28".parse().expect("a range")]);
        let mut given = HashSet::new();
        for _ in 0..13 {
            let mut service = service(json!({"type": "ClusterIP"}));
            all.reserve(&target(), &mut service, None)
                .expect("room")
                .keep();
            given.insert(service.text("/spec/clusterIP").to_owned());
        }
        assert_eq!(given.len(), 13, ".2 to .14");
        assert!(
            all.reserve(&target(), &mut service(json!({"type": "ClusterIP"})), None)
                .is_err()
        );
    }

    #[test]
    fn a_second_address_comes_with_its_family_and_is_free_again_when_that_goes() {
        let ranges =
            ["10.96.0.0/24", "fd00:10:96::/112"].map(|range| range.parse().expect("a range"));
        let all = ServiceAllocator::new(ranges.to_vec());
        let mut one = service(json!({"type": "ClusterIP", "clusterIP": "10.96.0.9"}));
        all.reserve(&target(), &mut one, None).expect("free").keep();
        let mut two = one.clone();
        two.set("/spec/ipFamilyPolicy", "RequireDualStack");
        // Not stored: what was given out for it is free again.
        drop(
            all.reserve(&target(), &mut two.clone(), Some(&one))
                .expect("room"),
        );
        assert_eq!(lock(&all.taken).addresses.len(), 1);
        all.reserve(&target(), &mut two, Some(&one))
            .expect("room")
            .keep();
        let second = two.text("/spec/clusterIPs/1").to_owned();
        assert!(second.starts_with("fd00:10:96::"), "{second}");
        assert_eq!(lock(&all.taken).addresses.len(), 2);

        let mut other = service(json!({"type": "ClusterIP", "clusterIP": second}));
        let refused = all
            .reserve(&target(), &mut other.clone(), None)
            .expect_err("taken");
        assert!(
            refused.message.contains("provided IP is already allocated"),
            "{}",
            refused.message
        );
        let mut back = two.clone();
        back.set("/spec/ipFamilyPolicy", "SingleStack");
        all.reserve(&target(), &mut back, Some(&two))
            .expect("less")
            .keep();
        all.reserve(&target(), &mut other, None)
            .expect("free again")
            .keep();
        assert_eq!(back["spec"]["clusterIPs"], json!(["10.96.0.9"]));
        assert_eq!(other["spec"]["ipFamilies"], json!(["IPv6"]));
    }

    #[test]
    fn an_address_that_is_not_ones_own_is_not_freed_by_naming_it_in_an_update() {
        let all = allocator();
        let mut first = service(json!({"type": "ClusterIP", "clusterIP": "10.96.0.7"}));
        let mut second = service(json!({"type": "ClusterIP", "clusterIP": "10.96.0.8"}));
        all.reserve(&target(), &mut first, None)
            .expect("free")
            .keep();
        all.reserve(&target(), &mut second, None)
            .expect("free")
            .keep();
        let mut thief = second.clone();
        thief.set("/spec/clusterIP", "10.96.0.7");
        thief.set("/spec/clusterIPs", json!(["10.96.0.7"]));
        // Validation refuses it afterwards, and the reservation is dropped.
        drop(all.reserve(&target(), &mut thief, Some(&second)));
        assert!(
            lock(&all.taken)
                .addresses
                .contains(&IpAddr::from([10, 96, 0, 7]))
        );
    }

    #[test]
    fn local_balancers_get_a_health_port_and_one_number_serves_two_protocols() {
        let all = allocator();
        let mut service = service(
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local",
            "ports": [{"port": 53, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}, {"port": 80}]}),
        );
        all.reserve(&target(), &mut service, None)
            .expect("room")
            .keep();
        let port = |at: usize| service["spec"]["ports"][at]["nodePort"].as_u64();
        assert_eq!(port(0), port(1));
        assert_ne!(port(0), port(2));
        let check = service.int("/spec/healthCheckNodePort");
        assert!((30000..=32767).contains(&check), "{check}");
        assert_eq!(lock(&all.taken).ports.len(), 3);
        let mut open = service.clone();
        open.set("/spec/externalTrafficPolicy", "Cluster");
        all.reserve(&target(), &mut open, Some(&service))
            .expect("less")
            .keep();
        assert!(!open.has("/spec/healthCheckNodePort"));
        assert_eq!(lock(&all.taken).ports.len(), 2);
    }
}
