//! ServiceCIDRs: the ranges that addresses are given out of.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::Value;

use super::addresses;
use crate::api::fields::Fields;
use crate::api::service_range::DEFAULT;
use crate::api::strategy::families::Family;

/// Where ServiceCIDRs are kept.
pub const RANGES: &str = "/networking.k8s.io/servicecidrs/";

/// One ServiceCIDR.
#[derive(Debug, Default)]
struct Cidrs {
    ranges: Vec<IpNetwork>,
    /// Whether addresses are given out of it: whoever has not said that it is not ready may be yet to say anything.
    gives: bool,
}

/// All ServiceCIDRs, by name.
#[derive(Debug, Default)]
pub struct Ranges(BTreeMap<String, Cidrs>);

impl Ranges {
    pub fn set(&mut self, name: &str, value: Option<&[u8]>) {
        let object = value.and_then(|value| serde_json::from_slice::<Value>(value).ok());
        match object {
            Some(object) => self.0.insert(name.to_owned(), Cidrs::of(&object)),
            None => self.0.remove(name),
        };
    }

    /// The ranges of a family that give addresses out, the cluster's own ones first.
    pub fn giving(&self, family: Family) -> Vec<IpNetwork> {
        let own = self.0.get(DEFAULT).into_iter();
        let others = self.0.iter().filter(|(name, _)| *name != DEFAULT);
        let all = own.chain(others.map(|(_, cidrs)| cidrs));
        let mut giving: Vec<IpNetwork> = Vec::new();
        for range in all.filter(|cidrs| cidrs.gives).flat_map(|c| &c.ranges) {
            let is_of_family = Family::of(range.network()) == family;
            if is_of_family && addresses::gives(range) && !giving.contains(range) {
                giving.push(*range);
            }
        }
        giving
    }

    /// Whether an address is in any of them, whatever becomes of it.
    pub fn has(&self, address: IpAddr) -> bool {
        let mut all = self.0.values().flat_map(|cidrs| &cidrs.ranges);
        all.any(|range| addresses::has(range, address))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Cidrs {
    fn of(object: &Value) -> Self {
        let cidrs = object.items("/spec/cidrs").iter();
        let conditions = object.items("/status/conditions");
        let ready = conditions.iter().find(|one| one.text("/type") == "Ready");
        let is_ready = ready.is_none_or(|ready| ready.text("/status") == "True");
        Self {
            ranges: cidrs
                .filter_map(|cidr| cidr.as_str()?.parse().ok())
                .collect(),
            gives: is_ready && !object.has("/metadata/deletionTimestamp"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_range_gives_while_it_is_ready_and_not_to_go() {
        let mut ranges = Ranges::default();
        let mut set = |name: &str, object: Value| {
            ranges.set(name, Some(object.to_string().as_bytes()));
            let giving = ranges.giving(Family::V4);
            giving.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let object = |cidr: &str, ready: &str| {
            json!({"spec": {"cidrs": [cidr, "fd00::/112"]},
                "status": {"conditions": [{"type": "Ready", "status": ready}]}})
        };
        let mut own = object("10.96.0.0/16", "True");
        set("a", json!({"spec": {"cidrs": ["203.0.113.0/24"]}}));
        assert_eq!(
            set("kubernetes", own.clone()),
            ["10.96.0.0/16", "203.0.113.0/24"],
            "one of which nothing is said yet gives"
        );
        assert_eq!(
            set("a", object("203.0.113.0/24", "False")),
            ["10.96.0.0/16"]
        );
        own.set("/metadata/deletionTimestamp", "2026-01-01T00:00:00Z");
        assert_eq!(set("kubernetes", own), Vec::<String>::new());
        // Of two that name one range, either is enough.
        assert_eq!(set("b", object("10.96.0.0/16", "True")), ["10.96.0.0/16"]);
        assert!(ranges.has("203.0.113.7".parse().expect("an address")));
        ranges.set("a", None);
        assert!(!ranges.has("203.0.113.7".parse().expect("an address")));
    }
}
