//! Slices of Services that have an address: no record is made of them, unless their Service becomes headless one day. Until then
//! they are kept as a few bytes, since they are most of a cluster's endpoints.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use cluster_model::{
    Change, Conditions, Endpoint, EndpointPort, EndpointSlice, Kind, Object, ObjectKey, ObjectRef,
    Protocol, Service, ServiceKey, SliceKey, Snapshot, TargetRef,
};

/// What is kept apart from the snapshot.
#[derive(Default)]
pub struct Parked {
    slices: HashMap<ServiceKey, Vec<Packed>>,
    services: HashMap<SliceKey, ServiceKey>,
}

/// A slice as a few bytes, with its key.
type Packed = (SliceKey, Box<[u8]>);

/// Whether the slices of a Service have nothing to say.
fn has_address(service: &Service) -> bool {
    !service.cluster_ips.is_empty() && !service.headless
}

impl Parked {
    /// The changes to make to the snapshot for one that has arrived.
    pub fn sort(&mut self, change: Change, snapshot: &Snapshot) -> Vec<Change> {
        match change {
            Change::Upsert(Object::EndpointSlice(slice)) => match self.take_in(slice, snapshot) {
                Ok(slice) => vec![Change::Upsert(Object::EndpointSlice(slice))],
                Err(parked) => vec![Change::Remove(parked)],
            },
            Change::Upsert(Object::Service(service)) => {
                let mut changes = vec![Change::Upsert(Object::Service(service.clone()))];
                changes.extend(self.settle(&service, snapshot));
                changes
            }
            Change::Replace(Kind::EndpointSlice, objects) => {
                *self = Self::default();
                let kept = objects.into_iter().filter_map(|object| match object {
                    Object::EndpointSlice(slice) => self.take_in(slice, snapshot).ok(),
                    _ => None,
                });
                let kept = kept.map(Object::EndpointSlice).collect();
                vec![Change::Replace(Kind::EndpointSlice, kept)]
            }
            Change::Replace(Kind::Service, objects) => {
                let mut moved = Vec::new();
                for object in &objects {
                    if let Object::Service(service) = object {
                        moved.extend(self.settle(service, snapshot));
                    }
                }
                let mut changes = vec![Change::Replace(Kind::Service, objects)];
                changes.extend(moved);
                changes
            }
            Change::Remove(reference) => {
                if reference.kind == Kind::EndpointSlice {
                    self.forget(&reference.key);
                }
                vec![Change::Remove(reference)]
            }
            other => vec![other],
        }
    }

    /// Parks a slice, or gives it back when it may have something to say.
    fn take_in(
        &mut self,
        slice: Arc<EndpointSlice>,
        snapshot: &Snapshot,
    ) -> Result<Arc<EndpointSlice>, ObjectRef> {
        self.forget(&slice.key);
        let service = slice.service.as_ref().and_then(|key| snapshot.service(key));
        match service {
            Some(service) if has_address(service) => {
                let key = slice.key.clone();
                self.park(&service.key, &slice);
                Err(ObjectRef {
                    kind: Kind::EndpointSlice,
                    key,
                })
            }
            _ => Ok(slice),
        }
    }

    /// What a Service's new state makes of its slices: parked ones come back, or those in the snapshot are parked.
    fn settle(&mut self, service: &Service, snapshot: &Snapshot) -> Vec<Change> {
        if has_address(service) {
            let slices = snapshot.slices(&service.key).iter();
            let slices = slices.map(|slice| {
                self.park(&service.key, slice);
                let key = slice.key.clone();
                Change::Remove(ObjectRef {
                    kind: Kind::EndpointSlice,
                    key,
                })
            });
            return slices.collect();
        }
        let back = self.slices.remove(&service.key).unwrap_or_default();
        let unpark = |(key, packed): Packed| {
            self.services.remove(&key);
            let slice = unpack(key, &service.key, &packed);
            Change::Upsert(Object::EndpointSlice(Arc::new(slice)))
        };
        back.into_iter().map(unpark).collect()
    }

    fn park(&mut self, service: &ServiceKey, slice: &EndpointSlice) {
        self.services.insert(slice.key.clone(), service.clone());
        let slices = self.slices.entry(service.clone()).or_default();
        slices.push((slice.key.clone(), pack(slice)));
    }

    fn forget(&mut self, key: &SliceKey) {
        let Some(service) = self.services.remove(key) else {
            return;
        };
        if let Some(slices) = self.slices.get_mut(&service) {
            slices.retain(|(other, _)| other != key);
            if slices.is_empty() {
                self.slices.remove(&service);
            }
        }
    }
}

const V6: u8 = 1;
const READY: u8 = 2;
const SERVING: u8 = 4;
const TERMINATING: u8 = 8;
const HOSTNAME: u8 = 16;
const POD: u8 = 32;

fn put_text(out: &mut Vec<u8>, text: &str) {
    // Names of the API have 253 bytes at most; a longer one could be no label anyway.
    let bytes = &text.as_bytes()[..text.len().min(255)];
    out.push(bytes.len() as u8);
    out.extend_from_slice(bytes);
}

fn pack(slice: &EndpointSlice) -> Box<[u8]> {
    let mut out = vec![slice.ports.len().min(255) as u8];
    for port in slice.ports.iter().take(255) {
        put_text(&mut out, &port.name);
        out.push(port.protocol.number());
        out.extend(port.port.to_le_bytes());
    }
    for endpoint in &slice.endpoints {
        let Conditions {
            ready,
            serving,
            terminating,
        } = endpoint.conditions;
        let flag = |set, bit| if set { bit } else { 0 };
        out.push(
            flag(endpoint.address.is_ipv6(), V6)
                | flag(ready, READY)
                | flag(serving, SERVING)
                | flag(terminating, TERMINATING)
                | flag(endpoint.hostname.is_some(), HOSTNAME)
                | flag(endpoint.target.is_some(), POD),
        );
        match endpoint.address {
            IpAddr::V4(v4) => out.extend(v4.octets()),
            IpAddr::V6(v6) => out.extend(v6.octets()),
        }
        if let Some(hostname) = &endpoint.hostname {
            put_text(&mut out, hostname);
        }
        if let Some(target) = &endpoint.target {
            put_text(&mut out, &target.kind);
            put_text(&mut out, &target.key.name);
        }
    }
    out.into()
}

/// Reads what `pack` has written.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().unwrap_or([0; N])
    }

    fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    fn text(&mut self) -> Arc<str> {
        let length = self.byte();
        String::from_utf8_lossy(self.bytes(usize::from(length))).into()
    }
}

fn unpack(key: SliceKey, service: &ServiceKey, packed: &[u8]) -> EndpointSlice {
    let mut reader = Reader(packed);
    let count = reader.byte();
    let ports = (0..count)
        .map(|_| EndpointPort {
            name: reader.text(),
            protocol: match reader.byte() {
                17 => Protocol::Udp,
                132 => Protocol::Sctp,
                _ => Protocol::Tcp,
            },
            port: u16::from_le_bytes(reader.array()),
            app_protocol: None,
        })
        .collect();
    let mut endpoints = Vec::new();
    while !reader.0.is_empty() {
        let flags = reader.byte();
        let address = if flags & V6 == 0 {
            IpAddr::from(reader.array::<4>())
        } else {
            IpAddr::from(reader.array::<16>())
        };
        let hostname = (flags & HOSTNAME != 0).then(|| reader.text());
        let target = (flags & POD != 0).then(|| TargetRef {
            kind: reader.text(),
            key: ObjectKey {
                namespace: key.namespace.clone(),
                name: reader.text(),
            },
        });
        endpoints.push(Endpoint {
            address,
            conditions: Conditions {
                ready: flags & READY != 0,
                serving: flags & SERVING != 0,
                terminating: flags & TERMINATING != 0,
            },
            node_name: None,
            zone: None,
            hostname,
            target,
            for_zones: Vec::new(),
            for_nodes: Vec::new(),
        });
    }
    EndpointSlice {
        key,
        service: Some(service.clone()),
        ports,
        endpoints,
        refused: Vec::new(),
        last_change: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster_model::{Dirty, read_manifest};

    fn service(spec: &str) -> Object {
        let text = format!(
            r#"{{"kind":"Service","metadata":{{"name":"s","namespace":"n"}},"spec":{spec}}}"#
        );
        read_manifest(text.as_bytes()).expect("a Service").remove(0)
    }

    const ADDRESS: &str = r#"{"clusterIP":"10.96.0.1","clusterIPs":["10.96.0.1"]}"#;
    const HEADLESS: &str = r#"{"clusterIP":"None","clusterIPs":["None"]}"#;

    fn slice() -> Object {
        let text = r#"{"kind":"EndpointSlice","addressType":"IPv6","metadata":{"name":"e","namespace":"n",
            "labels":{"kubernetes.io/service-name":"s"}},"ports":[{"name":"a","port":53,"protocol":"UDP"},{"port":80}],
            "endpoints":[{"addresses":["fd00::1"],"hostname":"h","conditions":{"ready":false,"serving":true,"terminating":true}},
              {"addresses":["fd00::2"],"targetRef":{"kind":"Pod","namespace":"n","name":"p"}}]}"#;
        read_manifest(text.as_bytes()).expect("a slice").remove(0)
    }

    fn apply(parked: &mut Parked, snapshot: &mut Snapshot, change: Change) {
        for change in parked.sort(change, snapshot) {
            snapshot.apply(change, &mut Dirty::default());
        }
    }

    #[test]
    fn a_slice_is_away_while_its_service_has_an_address_and_comes_back_whole() {
        let key = ServiceKey::new("n", "s");
        let orders: [[Object; 2]; 2] = [[service(ADDRESS), slice()], [slice(), service(ADDRESS)]];
        for objects in orders {
            let (mut parked, mut snapshot) = (Parked::default(), Snapshot::default());
            for object in objects {
                apply(&mut parked, &mut snapshot, Change::Upsert(object));
            }
            assert!(snapshot.slices(&key).is_empty());
            apply(
                &mut parked,
                &mut snapshot,
                Change::Upsert(service(HEADLESS)),
            );
            let Object::EndpointSlice(expected) = slice() else {
                panic!("a slice")
            };
            assert_eq!(snapshot.slices(&key), [expected]);
            assert!(parked.services.is_empty() && parked.slices.is_empty());
            // And away again, by lists of both kinds.
            let list = Change::Replace(Kind::Service, vec![service(ADDRESS)]);
            apply(&mut parked, &mut snapshot, list);
            assert!(snapshot.slices(&key).is_empty());
            let list = Change::Replace(Kind::EndpointSlice, vec![slice()]);
            apply(&mut parked, &mut snapshot, list);
            assert!(snapshot.slices(&key).is_empty() && parked.services.len() == 1);
            let list = Change::Replace(Kind::EndpointSlice, Vec::new());
            apply(&mut parked, &mut snapshot, list);
            apply(
                &mut parked,
                &mut snapshot,
                Change::Upsert(service(HEADLESS)),
            );
            assert!(
                snapshot.slices(&key).is_empty(),
                "what is gone does not come back"
            );
        }
    }
}
