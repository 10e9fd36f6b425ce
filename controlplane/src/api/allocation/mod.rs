//! Addresses and node ports of Services. Each that is given out is a key of its own in the store, written in one step with the
//! Service that holds it and gone with it: so no two API servers give out the same one, and none is lost.

mod addresses;
mod held;
mod ports;
mod ranges;
mod repair;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;
use serde_json::Value;

use super::authority::Followed;
use super::fields::{self, Fields};
use super::request::Target;
use super::status::{FieldError, Status};
use super::strategy::families::{self, Family, has_addresses, is_headless};
use crate::store::{Record, Store, StoreError, Write};
pub use held::MANAGED_BY;
use held::{ADDRESSES, Claim, Held, PORTS};
use ranges::Ranges;

/// What Services have been given, and are about to be.
pub struct ServiceAllocator {
    /// Of the cluster, the primary one first. Addresses are of any ServiceCIDR that is ready.
    families: Vec<Family>,
    /// That of `default/kubernetes`, which nobody gets by chance while that is away.
    own: Option<IpAddr>,
    held: Followed<Held>,
    /// What writes take that are under way here: chosen, and not in the store yet.
    pending: Arc<Mutex<Claim>>,
}

/// What one write takes and what it gives back. While it is there, no other write here takes the same.
#[derive(Debug)]
pub struct Reservation {
    pending: Arc<Mutex<Claim>>,
    new: Claim,
    freed: Claim,
}

impl Reservation {
    /// The writes that go with that of the Service.
    pub fn along(&self, service: &Value) -> Vec<Write> {
        if self.new.is_empty() && self.freed.is_empty() {
            return Vec::new();
        }
        let (namespace, name) = (fields::namespace(service), fields::name(service));
        let mut along = self.new.taking(namespace, name);
        along.extend(self.freed.freeing());
        along
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut pending = lock(&self.pending);
        *pending = pending.without(&self.new);
    }
}

/// Whether a write failed because another server has given out the same address or port meanwhile.
pub fn is_lost_race(target: &Target, error: &StoreError) -> bool {
    let StoreError::Exists { key, .. } = error else {
        return false;
    };
    is_service(target) && (key.starts_with(ADDRESSES) || key.starts_with(PORTS))
}

fn lock(pending: &Mutex<Claim>) -> MutexGuard<'_, Claim> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn is_service(target: &Target) -> bool {
    target.resource.group.is_empty() && target.resource.plural == "services"
}

/// The writes that go with the deletion of an object: what it held is free again.
pub fn freeing(target: &Target, record: &Record) -> Vec<Write> {
    if !is_service(target) {
        return Vec::new();
    }
    let held = serde_json::from_slice(&record.value).map(|service| Claim::of(&service));
    held.unwrap_or_default().freeing()
}

impl ServiceAllocator {
    /// For a cluster whose own ranges are one, or one of each family, the primary one first.
    pub fn new(ranges: &[IpNetwork], own: Option<IpAddr>) -> Self {
        let families = ranges.iter().map(|range| Family::of(range.network()));
        Self {
            families: families.collect(),
            own,
            held: Followed::default(),
            pending: Arc::default(),
        }
    }

    /// For writes that give nothing out.
    pub fn nothing(&self) -> Reservation {
        Reservation {
            pending: self.pending.clone(),
            new: Claim::default(),
            freed: Claim::default(),
        }
    }

    /// Gives a service what it asks for or lacks. Objects of other kinds need nothing.
    pub async fn reserve(
        &self,
        store: &dyn Store,
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
        families::settle(object, old, &self.families).map_err(|errors| invalid(object, errors))?;
        self.held.catch_up(store).await?;
        let before = old.map(Claim::of).unwrap_or_default();
        let (mut new, mut errors) = (Claim::default(), Vec::new());
        let mut pending = lock(&self.pending);
        {
            let held = self.held.view();
            let taken =
                |address: IpAddr| held.has_address(address) || pending.addresses.contains(&address);
            let mut desk = Desk {
                ranges: &held.ranges,
                own: self.own,
                taken: &taken,
                new: &mut new,
            };
            desk.give(object, old, &mut errors)?;
            let taken = |port: u16| held.has_port(port) || pending.ports.contains(&port);
            let mut book = ports::Book {
                held: &before.ports,
                taken: &taken,
                new: &mut new.ports,
            };
            ports::give(object, old, &mut book, &mut errors);
        }
        if !errors.is_empty() {
            drop(pending);
            return Err(invalid(object, errors));
        }
        pending.addresses.extend(&new.addresses);
        pending.ports.extend(&new.ports);
        drop(pending);
        reservation.new = new;
        reservation.freed = before.without(&Claim::of(object));
        Ok(reservation)
    }
}

/// Where one service gets its addresses.
struct Desk<'a> {
    ranges: &'a Ranges,
    own: Option<IpAddr>,
    taken: &'a dyn Fn(IpAddr) -> bool,
    new: &'a mut Claim,
}

impl Desk<'_> {
    /// Gives a new service an address per family, and one that has got a second family the second.
    fn give(
        &mut self,
        service: &mut Value,
        old: Option<&Value>,
        errors: &mut Vec<FieldError>,
    ) -> Result<(), Status> {
        if !has_addresses(service) || service.text("/spec/clusterIPs/0") == "None" {
            return Ok(());
        }
        let wanted = families::families(service);
        let first = match old.filter(|old| has_addresses(old)) {
            None => 0,
            Some(old) if is_headless(old) => return Ok(()),
            Some(old) if old.items("/spec/ipFamilies").len() < wanted.len() => 1,
            Some(_) => return Ok(()),
        };
        let mut addresses = service.items("/spec/clusterIPs").to_vec();
        for (at, family) in wanted.into_iter().enumerate().skip(first) {
            let asked = addresses.get(at).and_then(Value::as_str).unwrap_or("");
            let given = match asked.parse::<IpAddr>() {
                Err(_) => Ok(self.any(family, fields::name(service))?),
                Ok(address) => self.this(family, address),
            };
            match given {
                Ok(address) => {
                    self.new.addresses.insert(address);
                    // What was asked for keeps its spelling.
                    if addresses.len() == at {
                        addresses.push(address.to_string().into());
                    }
                }
                Err(why) => {
                    let why = format!("failed to allocate IP {asked}: {why}");
                    let field = "spec.clusterIPs";
                    errors.push(FieldError::invalid(field, addresses.clone(), why));
                    return Ok(());
                }
            }
        }
        if let Some(first) = addresses.first() {
            service.set("/spec/clusterIP", first.clone());
        }
        service.set("/spec/clusterIPs", addresses);
        Ok(())
    }

    /// A free address of a family.
    fn any(&self, family: Family, service: &str) -> Result<IpAddr, Status> {
        let taken = |address| Some(address) == self.own || (self.taken)(address);
        addresses::pick(&self.ranges.giving(family), &taken).ok_or_else(|| {
            Status::internal(format!(
                "failed to allocate a serviceIP for Service {service:?}: range is full"
            ))
        })
    }

    /// The address that is asked for.
    fn this(&self, family: Family, asked: IpAddr) -> Result<IpAddr, String> {
        let giving = self.ranges.giving(family);
        if !giving.iter().any(|range| addresses::has(range, asked)) {
            let giving: Vec<String> = giving.iter().map(ToString::to_string).collect();
            return Err(format!(
                "the provided IP ({asked}) is not in the valid range. The range of valid IPs is {}",
                giving.join(", ")
            ));
        }
        match (self.taken)(asked) {
            true => Err("provided IP is already allocated".to_owned()),
            false => Ok(asked),
        }
    }
}
