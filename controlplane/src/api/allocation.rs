//! Addresses and node ports of Services: given out from memory, rebuilt at start from the Services that are stored.

use std::collections::{BTreeSet, HashSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnetwork::Ipv4Network;
use rand::RngExt;
use serde_json::{Value, json};

use super::fields::{self, Fields};
use super::request::Target;
use super::status::{FieldError, Status};
use super::{Api, config, object, strategy};
use crate::store::Range;

#[derive(Debug, Default)]
struct Taken {
    addresses: HashSet<Ipv4Addr>,
    ports: HashSet<u16>,
}

/// What services have been given.
#[derive(Debug)]
pub struct ServiceAllocator {
    network: Ipv4Network,
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
    addresses: BTreeSet<Ipv4Addr>,
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
    pub fn new(network: Ipv4Network) -> Self {
        Self {
            network,
            taken: Arc::default(),
        }
    }

    /// Gives a service what it asks for or lacks. Objects of other kinds need nothing.
    pub fn reserve(
        &self,
        target: &Target,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<Reservation, Status> {
        let mut reservation = Reservation {
            taken: self.taken.clone(),
            new: Claim::default(),
            freed: Claim::default(),
            kept: false,
        };
        if !is_service(target) {
            return Ok(reservation);
        }
        let mut errors = Vec::new();
        let held = old.map(Claim::of).unwrap_or_default();
        let mut taken = lock(&self.taken);
        self.address(object, &held, &mut taken, &mut errors);
        node_ports(object, &held, &mut taken, &mut errors);
        let claim = Claim::of(object);
        reservation.new = claim.without(&held);
        reservation.freed = held.without(&claim);
        drop(taken);
        if errors.is_empty() {
            return Ok(reservation);
        }
        // What could not be had belongs to others and must not be freed with the rest.
        let refused: Vec<String> = errors
            .iter()
            .map(|error: &(FieldError, String)| error.1.clone())
            .collect();
        reservation
            .new
            .addresses
            .retain(|address| !refused.contains(&address.to_string()));
        reservation
            .new
            .ports
            .retain(|port| !refused.contains(&port.to_string()));
        let errors = errors.into_iter().map(|(error, _)| error).collect();
        Err(Status::invalid("", "Service", fields::name(object), errors))
    }

    fn address(
        &self,
        service: &mut Value,
        held: &Claim,
        taken: &mut Taken,
        errors: &mut Vec<(FieldError, String)>,
    ) {
        if service.text("/spec/type") == "ExternalName" {
            return;
        }
        let first = service
            .items("/spec/clusterIPs")
            .first()
            .and_then(Value::as_str)
            .unwrap_or("")
            .to_owned();
        let asked = match service.text("/spec/clusterIP") {
            "" => first.clone(),
            asked => asked.to_owned(),
        };
        if !first.is_empty() && first != asked {
            let given = service["spec"]["clusterIPs"].clone();
            errors.push((
                FieldError::invalid(
                    "spec.clusterIPs",
                    given,
                    "first value must match `clusterIP`",
                ),
                asked,
            ));
            return;
        }
        let chosen = match asked.as_str() {
            "None" => "None".to_owned(),
            "" => match self.pick(taken) {
                Some(address) => {
                    taken.addresses.insert(address);
                    address.to_string()
                }
                None => {
                    let why = "failed to allocate an IP: the range of service addresses is full";
                    errors.push((
                        FieldError::invalid("spec.clusterIPs", Value::Null, why),
                        String::new(),
                    ));
                    return;
                }
            },
            text => {
                let refuse = |why: String| {
                    (
                        FieldError::invalid("spec.clusterIPs", json!([text]), why),
                        text.to_owned(),
                    )
                };
                match text.parse::<Ipv4Addr>() {
                    Err(_) => {
                        let why = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
                        errors.push((
                            FieldError::invalid("spec.clusterIPs[0]", text, why),
                            asked.clone(),
                        ));
                    }
                    Ok(address) if !self.network.contains(address) => {
                        let why = format!(
                            "failed to allocate IP {address}: the provided IP is not in the valid range. The range of valid IPs is {}",
                            self.network
                        );
                        errors.push(refuse(why));
                    }
                    Ok(address) => {
                        if !held.addresses.contains(&address) && !taken.addresses.insert(address) {
                            errors.push(refuse(format!(
                                "failed to allocate IP {address}: provided IP is already allocated"
                            )));
                        }
                    }
                }
                asked.clone()
            }
        };
        service.set("/spec/clusterIP", chosen.as_str());
        service.set("/spec/clusterIPs", json!([chosen]));
    }

    /// A free address. The low end of the range is left to those who ask for an address by name (KEP-3070).
    fn pick(&self, taken: &Taken) -> Option<Ipv4Addr> {
        let size = self.network.size();
        let reserved = (size / 16).clamp(16, 256).min(size / 2).max(2);
        let last = size.saturating_sub(1);
        let find = |from: u32, to: u32| {
            if from >= to {
                return None;
            }
            let start = rand::rng().random_range(from..to);
            let nth = |n: u32| {
                self.network
                    .nth(n)
                    .filter(|address| !taken.addresses.contains(address))
            };
            (start..to).chain(from..start).find_map(nth)
        };
        find(reserved, last).or_else(|| find(2, reserved.min(last)))
    }
}

fn node_ports(
    service: &mut Value,
    held: &Claim,
    taken: &mut Taken,
    errors: &mut Vec<(FieldError, String)>,
) {
    let wanted = strategy::wants_node_ports(service);
    // The same number may serve two protocols of one service.
    let mut own: Vec<u16> = Vec::new();
    for (at, port) in service.items_mut("/spec/ports").iter_mut().enumerate() {
        let field = format!("spec.ports[{at}].nodePort");
        match port.int("/nodePort") {
            0 if !wanted => {}
            0 => {
                let range = config::NODE_PORTS;
                let start = rand::rng().random_range(range.clone());
                let free = (start..=*range.end())
                    .chain(*range.start()..start)
                    .find(|port| !taken.ports.contains(port));
                match free {
                    Some(number) => {
                        taken.ports.insert(number);
                        own.push(number);
                        port.set("/nodePort", number);
                    }
                    None => errors.push((
                        FieldError::invalid(field, 0, "range is full"),
                        String::new(),
                    )),
                }
            }
            asked => match u16::try_from(asked)
                .ok()
                .filter(|asked| config::NODE_PORTS.contains(asked))
            {
                None => {
                    let (first, last) = (config::NODE_PORTS.start(), config::NODE_PORTS.end());
                    let why = format!(
                        "provided port is not in the valid range. The range of valid ports is {first}-{last}"
                    );
                    errors.push((FieldError::invalid(field, asked, why), asked.to_string()));
                }
                Some(number) => {
                    if !held.ports.contains(&number)
                        && !own.contains(&number)
                        && !taken.ports.insert(number)
                    {
                        errors.push((
                            FieldError::invalid(field, asked, "provided port is already allocated"),
                            asked.to_string(),
                        ));
                    }
                    own.push(number);
                }
            },
        }
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
        // The API's own address belongs to nobody else, even before its service exists.
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
    use super::*;

    fn target() -> Target {
        Target::parse("/api/v1/namespaces/default/services").expect("services")
    }

    fn allocator() -> ServiceAllocator {
        ServiceAllocator::new("10.96.0.0/24".parse().expect("a range"))
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
        let all = ServiceAllocator::new("10.96.0.0/28".parse().expect("a range"));
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
}
