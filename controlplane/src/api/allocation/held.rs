//! What Services hold, as the store has it: the Services themselves, and a key for each address and port that is given out.
//!
//! The key of an address is that of its IPAddress object, as in Kubernetes; ports have one that only we know.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use bytes::Bytes;
use serde_json::{Value, json};

use super::super::authority::View;
use super::super::fields::{self, Fields};
use super::super::object;
use super::ranges::{RANGES, Ranges};
use crate::store::{Expect, Write};

pub const SERVICES: &str = "/core/services/";
pub const ADDRESSES: &str = "/networking.k8s.io/ipaddresses/";
pub const PORTS: &str = "/keelway/nodeports/";
/// Of IPAddresses that are made and taken away with a Service, as upstream labels them.
pub const MANAGED_BY: (&str, &str) = ("ipaddress.kubernetes.io/managed-by", "ipallocator.k8s.io");

/// Of an IPAddress, with the family's name.
pub const FAMILY_LABEL: &str = "ipaddress.kubernetes.io/ip-family";

/// The addresses and ports that a Service holds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Claim {
    pub addresses: BTreeSet<IpAddr>,
    pub ports: BTreeSet<u16>,
}

impl Claim {
    pub fn of(service: &Value) -> Self {
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

    /// Of a key below one of the prefixes, with its value.
    fn stored(prefix: &str, key: &str, value: &[u8]) -> Self {
        match prefix {
            ADDRESSES => Self {
                addresses: key.parse().into_iter().collect(),
                ..Self::default()
            },
            PORTS => Self {
                ports: key.parse().into_iter().collect(),
                ..Self::default()
            },
            _ => serde_json::from_slice(value)
                .map(|service| Self::of(&service))
                .unwrap_or_default(),
        }
    }

    pub fn without(&self, other: &Self) -> Self {
        Self {
            addresses: &self.addresses - &other.addresses,
            ports: &self.ports - &other.ports,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.ports.is_empty()
    }

    fn keys(&self) -> impl Iterator<Item = String> {
        let addresses = self.addresses.iter().map(|a| format!("{ADDRESSES}{a}"));
        addresses.chain(self.ports.iter().map(|p| format!("{PORTS}{p}")))
    }

    /// The writes that take all of it for a Service, where nobody has any of it.
    pub fn taking(&self, namespace: &str, name: &str) -> Vec<Write> {
        let parent = json!({"resource": "services", "namespace": namespace, "name": name});
        let address = |address: &IpAddr| {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            let (label, value) = MANAGED_BY;
            let object = json!({"metadata": {
                    "name": address.to_string(),
                    "uid": uuid::Uuid::new_v4().to_string(),
                    "generation": 1,
                    "creationTimestamp": fields::now(),
                    "labels": {FAMILY_LABEL: family, label: value}},
                "spec": {"parentRef": parent}});
            (format!("{ADDRESSES}{address}"), object::encode(object))
        };
        let port = |port: &u16| {
            let object = json!({"metadata": {"name": port.to_string()}, "of": parent});
            (format!("{PORTS}{port}"), object::encode(object))
        };
        let addresses = self.addresses.iter().map(address);
        let all = addresses.chain(self.ports.iter().map(port));
        all.map(|(key, value): (String, Bytes)| Write {
            key,
            value: Some(value),
            expect: Expect::Absent,
        })
        .collect()
    }

    /// The writes that give all of it back.
    pub fn freeing(&self) -> Vec<Write> {
        let free = |key| Write {
            key,
            value: None,
            expect: Expect::Any,
        };
        self.keys().map(free).collect()
    }
}

/// Held is what is given out, by how many keys each address and port is, and of what ranges.
#[derive(Debug, Default)]
pub struct Held {
    pub ranges: Ranges,
    addresses: HashMap<IpAddr, u32>,
    ports: HashMap<u16, u32>,
    holders: HashMap<String, Claim>,
}

impl Held {
    pub fn has_address(&self, address: IpAddr) -> bool {
        self.addresses.contains_key(&address)
    }

    pub fn has_port(&self, port: u16) -> bool {
        self.ports.contains_key(&port)
    }

    #[cfg(test)]
    pub fn counts(&self) -> (usize, usize) {
        (self.addresses.len(), self.ports.len())
    }
}

impl View for Held {
    const PREFIXES: &'static [&'static str] = &[SERVICES, ADDRESSES, PORTS, RANGES];

    fn take(&mut self, prefix: &'static str, key: &str, value: Option<&[u8]>) {
        if prefix == RANGES {
            return self.ranges.set(key, value);
        }
        let new = value.map(|value| Claim::stored(prefix, key, value));
        let new = new.unwrap_or_default();
        for address in &new.addresses {
            *self.addresses.entry(*address).or_default() += 1;
        }
        for port in &new.ports {
            *self.ports.entry(*port).or_default() += 1;
        }
        let holder = format!("{prefix}{key}");
        let old = match new.is_empty() {
            true => self.holders.remove(&holder),
            false => self.holders.insert(holder, new),
        };
        let old = old.unwrap_or_default();
        for address in old.addresses {
            drop_one(&mut self.addresses, address);
        }
        for port in old.ports {
            drop_one(&mut self.ports, port);
        }
    }
}

fn drop_one<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, key: K) {
    if let Some(count) = counts.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&key);
        }
    }
}
