//! What is kept of the cluster. Services that have an address, and their slices, are most of it, and nobody needs them once their records
//! are made: until they change, or become headless, they are a few bytes each.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use cluster_model::share::{pack_service, pack_slice, unpack_service, unpack_slice};
use cluster_model::{
    Change, Dirty, EndpointSlice, Kind, Object, ObjectRef, Service, ServiceKey, SliceKey, Snapshot,
};

use crate::zone::{Zone, ZoneSettings};

/// The cluster, in a snapshot and beside it. Nothing of what is told is kept itself: it lies between what came with it and is let go at once,
/// and would hold all of that memory. What is kept is written anew, here, where nothing else is.
#[derive(Default)]
pub struct Kept {
    snapshot: Snapshot,
    /// Services that have an address, out of the snapshot.
    services: HashMap<ServiceKey, Box<[u8]>>,
    /// Their slices, with the name of the Service: it is in their own namespace.
    slices: HashMap<SliceKey, (Arc<str>, Box<[u8]>)>,
    /// One text for all of its Services.
    namespaces: HashSet<Arc<str>>,
}

/// Services that are unpacked at a time.
const AT_A_TIME: usize = 256;

/// Whether the slices of a Service have nothing to say.
fn has_address(service: &Service) -> bool {
    !service.cluster_ips.is_empty() && !service.headless
}

/// A slice, written anew.
fn own_slice(slice: &EndpointSlice) -> Object {
    let own = slice.service.as_ref().and_then(|service| {
        let key = SliceKey::new(&*slice.key.namespace, &*slice.key.name);
        let service = ServiceKey::new(&*service.namespace, &*service.name);
        unpack_slice(key, &service, &pack_slice(slice))
    });
    Object::EndpointSlice(Arc::new(own.unwrap_or_else(|| slice.clone())))
}

impl Kept {
    /// The number of Services.
    pub fn services(&self) -> usize {
        self.snapshot.count(Kind::Service) + self.services.len()
    }

    /// Applies a change and adds to `dirty` what has to be planned again, by [`Kept::update`].
    pub fn apply(&mut self, change: &Change, dirty: &mut Dirty) {
        match change {
            Change::Upsert(Object::Service(service)) => self.upsert_service(service, dirty),
            Change::Upsert(Object::EndpointSlice(slice)) => self.upsert_slice(slice, dirty),
            Change::Remove(gone) if gone.kind == Kind::Service => {
                if self.services.remove(&gone.key).is_some() {
                    dirty.services.insert(gone.key.clone());
                    self.unpark(dirty);
                }
                self.snapshot.apply(change.clone(), dirty);
            }
            Change::Remove(gone) if gone.kind == Kind::EndpointSlice => {
                self.slices.remove(&gone.key);
                self.snapshot.apply(change.clone(), dirty);
            }
            Change::Replace(Kind::Service, objects) => self.replace_services(objects, dirty),
            Change::Replace(Kind::EndpointSlice, objects) => {
                self.slices.clear();
                let mut told = Vec::new();
                for object in objects {
                    if let Object::EndpointSlice(slice) = object
                        && !self.park(slice)
                    {
                        told.push(own_slice(slice));
                    }
                }
                self.snapshot
                    .apply(Change::Replace(Kind::EndpointSlice, told), dirty);
            }
            other => self.snapshot.apply(other.clone(), dirty),
        }
    }

    fn upsert_service(&mut self, service: &Service, dirty: &mut Dirty) {
        let packed = pack_service(service);
        if !has_address(service) {
            if self.services.remove(&service.key).is_some() {
                // Its slices have something to say from now on.
                self.unpark(dirty);
            }
            let own = unpack_service(self.own(&service.key), &packed);
            let own = own.unwrap_or_else(|| service.clone());
            let change = Change::Upsert(Object::Service(Arc::new(own)));
            self.snapshot.apply(change, dirty);
            return;
        }
        let known = self.services.get(&service.key);
        if known.is_some_and(|known| *known == packed) {
            return;
        }
        let key = self.own(&service.key);
        let slices = self.snapshot.slices(&key).to_vec();
        self.services.insert(key.clone(), packed);
        for slice in slices {
            self.park(&slice);
            let gone = ObjectRef {
                kind: Kind::EndpointSlice,
                key: slice.key.clone(),
            };
            self.snapshot.apply(Change::Remove(gone), dirty);
        }
        // Planned from its bytes: a whole list of Services is let go before their records take its place.
        self.drop_from_snapshot(&key);
        dirty.services.insert(key);
    }

    /// The texts of a key, written anew unless they are here already.
    fn own(&mut self, key: &ServiceKey) -> ServiceKey {
        if let Some((known, _)) = self.services.get_key_value(key) {
            return known.clone();
        }
        let namespace = match self.namespaces.get(&*key.namespace) {
            Some(known) => known.clone(),
            None => {
                let own: Arc<str> = Arc::from(&*key.namespace);
                self.namespaces.insert(own.clone());
                own
            }
        };
        ServiceKey::new(namespace, &*key.name)
    }

    fn upsert_slice(&mut self, slice: &EndpointSlice, dirty: &mut Dirty) {
        self.slices.remove(&slice.key);
        let change = if self.park(slice) {
            Change::Remove(ObjectRef {
                kind: Kind::EndpointSlice,
                key: slice.key.clone(),
            })
        } else {
            Change::Upsert(own_slice(slice))
        };
        self.snapshot.apply(change, dirty);
    }

    /// Packs a slice of a Service that has an address. False for any other, which belongs into the snapshot.
    fn park(&mut self, slice: &EndpointSlice) -> bool {
        let Some((service, _)) = slice
            .service
            .as_ref()
            .and_then(|service| self.services.get_key_value(service))
        else {
            return false;
        };
        // The Service's own texts, which are there anyway.
        let key = SliceKey {
            namespace: service.namespace.clone(),
            name: Arc::from(&*slice.key.name),
        };
        let packed = (service.name.clone(), pack_slice(slice));
        self.slices.insert(key, packed);
        true
    }

    /// Puts the slices of Services that have no address any more into the snapshot: such a Service may come back as a headless one.
    fn unpark(&mut self, dirty: &mut Dirty) {
        let services = &self.services;
        let own = self.slices.extract_if(|slice, (name, _)| {
            let service = ServiceKey {
                namespace: slice.namespace.clone(),
                name: name.clone(),
            };
            !services.contains_key(&service)
        });
        for (slice, (name, packed)) in own {
            let service = ServiceKey {
                namespace: slice.namespace.clone(),
                name,
            };
            if let Some(slice) = unpack_slice(slice, &service, &packed) {
                let back = Object::EndpointSlice(Arc::new(slice));
                self.snapshot.apply(Change::Upsert(back), dirty);
            }
        }
    }

    fn replace_services(&mut self, objects: &[Object], dirty: &mut Dirty) {
        let listed: HashSet<ServiceKey> = objects
            .iter()
            .map(|object| object.reference().key)
            .collect();
        self.services.retain(|key, _| {
            let stays = listed.contains(key);
            if !stays {
                dirty.services.insert(key.clone());
            }
            stays
        });
        self.unpark(dirty);
        // What the snapshot has and the list has not goes; the rest comes one by one.
        let (rest, kept): (Vec<&Object>, Vec<&Object>) = objects.iter().partition(|object| {
            let key = object.reference().key;
            self.snapshot.service(&key).is_none() || !matches!(object, Object::Service(_))
        });
        let stay = kept.iter().copied().cloned().collect();
        self.snapshot
            .apply(Change::Replace(Kind::Service, stay), dirty);
        for object in rest.into_iter().chain(kept) {
            if let Object::Service(service) = object {
                self.upsert_service(service, dirty);
            }
        }
    }

    /// Brings a zone to the state of what is dirty.
    pub fn update(&mut self, zone: &mut Zone, dirty: &Dirty) {
        let mut part = Dirty {
            services: BTreeSet::new(),
            ..dirty.clone()
        };
        let mut keys = dirty.services.iter();
        loop {
            part.services = keys.by_ref().take(AT_A_TIME).cloned().collect();
            for key in &part.services {
                self.unpack_into_snapshot(key);
            }
            zone.update(&self.snapshot, &part);
            for key in &part.services {
                if self.services.contains_key(key) {
                    self.drop_from_snapshot(key);
                }
            }
            if keys.len() == 0 {
                return;
            }
            part.pods.clear();
        }
    }

    /// A zone of everything, with other settings.
    pub fn zone(&mut self, settings: ZoneSettings) -> Zone {
        let packed: Vec<ServiceKey> = self.services.keys().cloned().collect();
        for key in &packed {
            self.unpack_into_snapshot(key);
        }
        let zone = Zone::of(settings, &self.snapshot);
        for key in &packed {
            self.drop_from_snapshot(key);
        }
        zone
    }

    fn unpack_into_snapshot(&mut self, key: &ServiceKey) {
        let packed = self.services.get_key_value(key);
        // The key that is kept, not an equal one.
        let service = packed.and_then(|(key, packed)| unpack_service(key.clone(), packed));
        if let Some(service) = service {
            let service = Object::Service(Arc::new(service));
            self.snapshot
                .apply(Change::Upsert(service), &mut Dirty::default());
        }
    }

    fn drop_from_snapshot(&mut self, key: &ServiceKey) {
        let gone = ObjectRef {
            kind: Kind::Service,
            key: key.clone(),
        };
        self.snapshot
            .apply(Change::Remove(gone), &mut Dirty::default());
    }
}

#[cfg(test)]
mod tests {
    use cluster_model::read_manifest;
    use proptest::prelude::*;

    use super::*;
    use crate::name::Name;

    fn objects(text: &str) -> Vec<Object> {
        read_manifest(text.as_bytes()).expect("objects")
    }

    /// One of three Services in one of five states.
    fn service(name: usize, state: usize) -> Object {
        let spec = match state {
            0 => {
                r#"{"clusterIP":"10.96.0.1","clusterIPs":["10.96.0.1"],"ports":[{"name":"a","port":1}]}"#
            }
            1 => r#"{"clusterIP":"10.96.0.2","clusterIPs":["10.96.0.2","fd00::2"]}"#,
            2 => r#"{"clusterIP":"None","clusterIPs":["None"]}"#,
            3 => r#"{"type":"ExternalName","externalName":"a.example"}"#,
            _ => "{}",
        };
        let text = format!(
            r#"{{"kind":"Service","metadata":{{"name":"s{name}","namespace":"n"}},"spec":{spec}}}"#
        );
        objects(&text).remove(0)
    }

    /// One of four slices of one of the Services, or of one that never is.
    fn slice(name: usize, of: usize, address: u8) -> Object {
        let text = format!(
            r#"{{"kind":"EndpointSlice","addressType":"IPv4","metadata":{{"name":"e{name}","namespace":"n",
                "labels":{{"kubernetes.io/service-name":"s{of}"}}}},"ports":[{{"name":"a","port":7}}],
                "endpoints":[{{"addresses":["10.0.0.{address}"],"hostname":"h"}},{{"addresses":["10.0.1.{address}"]}}]}}"#
        );
        objects(&text).remove(0)
    }

    fn change() -> impl Strategy<Value = Change> {
        let services = || (0_usize..3, 0_usize..5).prop_map(|(name, state)| service(name, state));
        let slices =
            || (0_usize..4, 0_usize..4, 1_u8..5).prop_map(|(name, of, at)| slice(name, of, at));
        let listed = |objects: Vec<Object>| {
            let mut seen = HashSet::new();
            let all = objects.into_iter();
            all.filter(|object| seen.insert(object.reference().key))
                .collect::<Vec<_>>()
        };
        prop_oneof![
            4 => services().prop_map(Change::Upsert),
            4 => slices().prop_map(Change::Upsert),
            1 => services().prop_map(|object| Change::Remove(object.reference())),
            1 => slices().prop_map(|object| Change::Remove(object.reference())),
            1 => proptest::collection::vec(services(), 0..4)
                .prop_map(move |all| Change::Replace(Kind::Service, listed(all))),
            1 => proptest::collection::vec(slices(), 0..6)
                .prop_map(move |all| Change::Replace(Kind::EndpointSlice, listed(all))),
        ]
    }

    proptest! {
        #[test]
        fn a_zone_of_what_is_kept_is_that_of_the_whole_cluster(
            batches in proptest::collection::vec(proptest::collection::vec(change(), 1..4), 1..30)
        ) {
            let settings = ZoneSettings::of(Name::parse("cluster.local").expect("a name"));
            let (mut kept, mut whole) = (Kept::default(), Snapshot::default());
            let mut zone = Zone::new(settings.clone());
            for batch in batches {
                let mut dirty = Dirty::default();
                for change in batch {
                    whole.apply(change.clone(), &mut Dirty::default());
                    kept.apply(&change, &mut dirty);
                }
                kept.update(&mut zone, &dirty);
                let expected = Zone::of(settings.clone(), &whole);
                prop_assert!(zone.same_records(&expected));
                prop_assert_eq!(zone.synced(), expected.synced());
                prop_assert_eq!(kept.services(), whole.count(Kind::Service));
                let packed = whole.services().filter(|service| has_address(service)).count();
                prop_assert_eq!(kept.services.len(), packed);
            }
            prop_assert!(kept.zone(settings.clone()).same_records(&zone));
        }
    }
}
