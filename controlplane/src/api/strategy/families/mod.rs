//! The address families of a Service: `ipFamilyPolicy`, `ipFamilies` and `clusterIPs` depend on each other and on the families
//! that the cluster has (KEP-563).

use std::net::IpAddr;

use serde_json::{Value, json};

use super::Errors;
use super::place::Place;
use crate::api::fields::Fields;
use crate::api::status::FieldError;

const SINGLE: &str = "SingleStack";
const PREFER: &str = "PreferDualStack";
const REQUIRE: &str = "RequireDualStack";
const HEADLESS: &str = "None";

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() {
            Self::V4
        } else {
            Self::V6
        }
    }

    /// The family of a name of the API.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "IPv4" => Some(Self::V4),
            "IPv6" => Some(Self::V6),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::V4 => Self::V6,
            Self::V6 => Self::V4,
        }
    }
}

/// Whether the type of a service comes with addresses, if only with none (headless).
pub fn has_addresses(service: &Value) -> bool {
    service.text("/spec/type") != "ExternalName"
}

/// Whether a service is without an address of its own by choice.
pub fn is_headless(service: &Value) -> bool {
    service.text("/spec/clusterIP") == HEADLESS
}

/// The families of a service, in order.
pub fn families(service: &Value) -> Vec<Family> {
    let names = service.items("/spec/ipFamilies").iter();
    names
        .filter_map(|name| Family::named(name.as_str()?))
        .collect()
}

/// Brings `clusterIP` and `clusterIPs` together: clients that know only the first, or none, keep the rest.
pub fn link(service: &mut Value, old: Option<&Value>) {
    let Some(old) = old else {
        let only = service.text("/spec/clusterIP").to_owned();
        if !only.is_empty() && service.items("/spec/clusterIPs").is_empty() {
            service.set("/spec/clusterIPs", json!([only]));
        }
        return;
    };
    let before = old.text("/spec/clusterIP");
    let all_before = old.items("/spec/clusterIPs");
    if has_addresses(service) && has_addresses(old) {
        if service.text("/spec/clusterIP").is_empty() && !before.is_empty() {
            service.set("/spec/clusterIP", before);
        }
        if service.items("/spec/clusterIPs").is_empty() && !all_before.is_empty() {
            service.set("/spec/clusterIPs", json!(all_before));
        }
    }
    let now = service.text("/spec/clusterIP").to_owned();
    if now != before && service.items("/spec/clusterIPs") == all_before {
        if now.is_empty() {
            service.remove("/spec/clusterIPs");
        } else {
            service.set("/spec/clusterIPs", json!([now]));
        }
    }
}

/// Takes the addresses from a service that has become an ExternalName, as far as the client only carried them along.
pub fn drop_for_external_name(service: &mut Value, old: &Value) {
    if has_addresses(service) || !has_addresses(old) {
        return;
    }
    let same = |field: &str| service.pointer(field) == old.pointer(field);
    let addresses = same("/spec/clusterIP") && same("/spec/clusterIPs");
    for (field, drops) in [
        ("/spec/clusterIP", addresses),
        ("/spec/clusterIPs", addresses),
        ("/spec/ipFamilies", same("/spec/ipFamilies")),
        ("/spec/ipFamilyPolicy", same("/spec/ipFamilyPolicy")),
        (
            "/spec/internalTrafficPolicy",
            same("/spec/internalTrafficPolicy"),
        ),
    ] {
        if drops {
            service.remove(field);
        }
    }
}

/// Fills in the policy and the families of a service, in a cluster that has the given families, the primary one first.
/// Addresses are given out afterwards, one per family.
///
/// # Errors
/// What of the three fields contradicts the others, or the cluster.
pub fn settle(service: &mut Value, old: Option<&Value>, cluster: &[Family]) -> Result<(), Errors> {
    if !has_addresses(service) || old.is_some_and(|old| keeps_preference(service, old)) {
        return Ok(());
    }
    let free_form = is_headless(service)
        && service
            .object("/spec/selector")
            .is_none_or(serde_json::Map::is_empty);
    if !service.has("/spec/ipFamilyPolicy") {
        let before = old.map_or("", |old| old.text("/spec/ipFamilyPolicy"));
        let policy = match before {
            "" if free_form => REQUIRE,
            "" => SINGLE,
            before => before,
        };
        service.set("/spec/ipFamilyPolicy", policy);
    }
    let mut errors = Errors::new();
    validate(service, &mut errors);
    if !errors.is_empty() {
        return Err(errors);
    }
    let wrong_policy = |service: &Value, why: &str| {
        let policy = service["spec"]["ipFamilyPolicy"].clone();
        FieldError::invalid("spec.ipFamilyPolicy", policy, why)
    };
    let policy = service.text("/spec/ipFamilyPolicy").to_owned();
    let mut addresses = service.items("/spec/clusterIPs").to_vec();
    let mut wanted = families(service);
    if let Some(old) = old {
        let (old_addresses, old_families) = (old.items("/spec/clusterIPs"), families(old));
        if policy == SINGLE {
            // The policy alone says enough: the second address and family go.
            if addresses == old_addresses {
                addresses.truncate(1);
            }
            if wanted == old_families {
                wanted.truncate(1);
            }
        } else {
            let reduced = |now: usize, before: usize| now != 0 && now < before;
            if reduced(addresses.len(), old_addresses.len()) {
                let why = "must be 'SingleStack' to release the secondary cluster IP";
                errors.push(wrong_policy(service, why));
            }
            if reduced(wanted.len(), old_families.len()) {
                let why = "must be 'SingleStack' to release the secondary IP family";
                errors.push(wrong_policy(service, why));
            }
        }
    }
    if policy == SINGLE {
        for (count, what) in [
            (addresses.len(), "cluster IPs"),
            (wanted.len(), "IP families"),
        ] {
            if count == 2 {
                let why = format!(
                    "must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified"
                );
                errors.push(wrong_policy(service, &why));
            }
        }
    }
    for (at, address) in addresses.iter().enumerate().skip(wanted.len()) {
        // "None" is no address, and checked to be alone.
        let Some(address) = address.as_str().and_then(|ip| ip.parse().ok()) else {
            break;
        };
        let family = Family::of(address);
        if cluster.contains(&family) {
            wanted.push(family);
        } else {
            let why = format!("{} is not configured on this cluster", family.name());
            let field = format!("spec.clusterIPs[{at}]");
            errors.push(FieldError::invalid(field, addresses.clone(), why));
        }
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    if !free_form {
        if policy == REQUIRE && cluster.len() < 2 {
            let why = "this cluster is not configured for dual-stack services";
            errors.push(wrong_policy(service, why));
        }
        for (at, family) in wanted.iter().enumerate() {
            if !cluster.contains(family) {
                let field = format!("spec.ipFamilies[{at}]");
                let why = "not configured on this cluster";
                errors.push(FieldError::invalid(field, family.name(), why));
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
    }
    if wanted.is_empty() {
        wanted.extend(cluster.first());
    }
    // Nobody knows what addresses a headless Service without a selector will be given: any cluster takes both.
    if policy != SINGLE && wanted.len() == 1 && (free_form || cluster.len() == 2) {
        wanted.push(wanted[0].other());
    }
    let names: Vec<&str> = wanted.iter().map(|family| family.name()).collect();
    service.set("/spec/ipFamilies", json!(names));
    if !addresses.is_empty() {
        service.set("/spec/clusterIPs", addresses);
    }
    Ok(())
}

/// Whether a service preferred both families before and is left as it was: then a cluster that has gained or lost a family
/// since changes nothing.
fn keeps_preference(service: &Value, old: &Value) -> bool {
    let same = |field| service.pointer(field) == old.pointer(field);
    let prefers = |service: &Value| service.text("/spec/ipFamilyPolicy") == PREFER;
    prefers(service)
        && prefers(old)
        && ["/spec/type", "/spec/clusterIPs", "/spec/ipFamilies"]
            .into_iter()
            .all(same)
}

/// Checks the three fields against each other.
pub fn validate(service: &Value, errors: &mut Errors) {
    if !has_addresses(service) {
        return;
    }
    let spec = Place::root(service).field("spec");
    let (first, all) = (spec.field("clusterIP"), spec.field("clusterIPs"));
    let families = spec.field("ipFamilies");
    match all.items().next() {
        None if !first.is_empty() => all.missing("", errors),
        Some(_) if first.is_empty() => {
            all.invalid("must be empty when `clusterIP` is not specified", errors);
        }
        Some(of_all) if of_all.text() != first.text() => {
            all.invalid("first value must match `clusterIP`", errors);
        }
        _ => {}
    }
    let mut seen: Vec<&str> = Vec::new();
    for family in families.items() {
        family.require_one_of(&["IPv4", "IPv6"], errors);
        if seen.contains(&family.text()) {
            family.duplicate(errors);
        }
        seen.push(family.text());
    }
    spec.field("ipFamilyPolicy")
        .one_of(&[PREFER, REQUIRE, SINGLE], errors);
    let before = errors.len();
    let mut parsed: Vec<IpAddr> = Vec::new();
    for (at, address) in all.items().enumerate() {
        if at == 0 && address.text() == HEADLESS {
            if all.len() > 1 {
                all.invalid("'None' must be the first and only value", errors);
            }
            continue;
        }
        match address.text().parse() {
            Ok(ip) => parsed.push(ip),
            Err(_) => address.address(errors),
        }
    }
    let well_formed = errors.len() == before;
    if all.len() > 2 {
        all.invalid("may only hold up to 2 values", errors);
    }
    if !well_formed {
        // What comes now would only say it again in other words.
        return;
    }
    let has = |family: Family| parsed.iter().any(|ip| Family::of(*ip) == family);
    if parsed.len() > 1 && !(has(Family::V4) && has(Family::V6)) {
        all.invalid("may specify no more than one IP for each IP family", errors);
    }
    for (at, (address, family)) in all.items().zip(families.items()).enumerate() {
        let Ok(ip) = address.text().parse::<IpAddr>() else {
            continue;
        };
        if Family::named(family.text()).is_some_and(|family| family != Family::of(ip)) {
            let why = format!(
                "expected an {} value as indicated by `ipFamilies[{at}]`",
                family.text()
            );
            address.invalid(why, errors);
        }
    }
}

/// Checks what may change: a second address and family may come, and go by the policy SingleStack; the first ones stay.
pub fn validate_update(service: &Value, old: &Value, errors: &mut Errors) {
    if !has_addresses(service) || !has_addresses(old) {
        return;
    }
    let (now_headless, was_headless) = (is_headless(service), is_headless(old));
    let spec = Place::root(service).field("spec");
    let single = spec.field("ipFamilyPolicy").text() == SINGLE;
    if !(now_headless && was_headless) {
        let steps = Steps {
            field: "clusterIPs",
            unset: "primary clusterIP can not be unset",
            released: "must be set to 'SingleStack' when releasing the secondary clusterIP",
        };
        steps.check(&spec, old, single, errors);
    }
    if !now_headless && !was_headless {
        let steps = Steps {
            field: "ipFamilies",
            unset: "primary ipFamily can not be unset",
            released: "must be set to 'SingleStack' when releasing the secondary ipFamily",
        };
        steps.check(&spec, old, single, errors);
    }
}

/// What is said of wrong steps from one to two addresses or families, and back.
struct Steps {
    field: &'static str,
    unset: &'static str,
    released: &'static str,
}

impl Steps {
    fn check(&self, spec: &Place<'_>, old: &Value, single: bool, errors: &mut Errors) {
        let list = spec.field(self.field);
        let old = Place::root(old).field("spec").field(self.field);
        let now: Vec<&str> = list.items().map(|item| item.text()).collect();
        let before: Vec<&str> = old.items().map(|item| item.text()).collect();
        let wrong = |at: usize, why: &str| {
            let field = format!("{}[{at}]", list.path());
            FieldError::invalid(field, list.value().clone(), why)
        };
        if now.is_empty() && !before.is_empty() {
            errors.push(wrong(0, self.unset));
        }
        for (at, _) in now
            .iter()
            .zip(&before)
            .enumerate()
            .filter(|(_, (now, before))| now != before)
        {
            errors.push(wrong(at, "may not change once set"));
        }
        if now.len() == 1 && before.len() == 2 && !single {
            spec.field("ipFamilyPolicy").invalid(self.released, errors);
        }
    }
}

#[cfg(test)]
mod tests;
