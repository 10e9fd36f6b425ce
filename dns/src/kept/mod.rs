//! What is kept of the cluster. Nobody needs Services and slices once their records are made, until they change: they are a few bytes each.

mod packed;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use cluster_model::share::{pack_service, pack_slice, unpack_service, unpack_slice};
use cluster_model::{
    Change, Dirty, EndpointSlice, Kind, Object, Service, ServiceKey, SliceKey, Snapshot,
};
use foldhash::fast::RandomState;

use crate::zone::{Zone, ZoneSettings};
use packed::{PackedService, PackedSlice};

/// The cluster: Services and slices as bytes, all else in a snapshot. Nothing of what is told is kept itself: it lies between what came with
/// it and is let go at once, and would hold all of that memory. What is kept is written anew, here, where nothing else is.
#[derive(Default)]
pub struct Kept {
    /// Without Services and slices.
    snapshot: Snapshot,
    namespaces: HashMap<Arc<str>, Namespace, RandomState>,
}

#[derive(Default)]
struct Namespace {
    services: HashSet<PackedService, RandomState>,
    /// Those that belong to a Service.
    slices: HashSet<PackedSlice, RandomState>,
}

/// Services that are unpacked at a time.
const AT_A_TIME: usize = 256;

/// Whether the slices of a Service have nothing to say.
fn has_address(service: &Service) -> bool {
    !service.cluster_ips.is_empty() && !service.headless
}

impl Namespace {
    /// Whether records depend on the slices of a Service.
    fn follows_slices(&self, key: &ServiceKey) -> bool {
        let packed = self.services.get(&*key.name);
        let service = packed.and_then(|packed| unpack_service(key.clone(), packed.service()?));
        service.is_some_and(|service| !has_address(&service))
    }

    /// Writes a Service anew. One that is missing and has no slices is not kept.
    fn put(&mut self, name: &str, service: Option<&[u8]>, slices: &[&str]) {
        if service.is_none() && slices.is_empty() {
            self.services.remove(name);
        } else {
            let packed = PackedService::new(name, service, slices.iter().copied());
            self.services.replace(packed);
        }
    }

    /// Puts another Service, or none, in place of one. True when it is different.
    fn set_service(&mut self, name: &str, new: Option<&[u8]>) -> bool {
        let Some(old) = self.services.take(name) else {
            self.put(name, new, &[]);
            return new.is_some();
        };
        let changed = old.service() != new;
        if changed {
            self.put(name, new, &old.slices().collect::<Vec<_>>());
        } else {
            self.services.insert(old);
        }
        changed
    }

    /// Has a Service know one of its slices, or forget it.
    fn link(&mut self, service: &str, slice: &str, linked: bool) {
        let old = self.services.take(service);
        let slices = old.iter().flat_map(PackedService::slices);
        let mut slices: Vec<&str> = slices.filter(|other| *other != slice).collect();
        if linked {
            slices.push(slice);
        }
        let packed = old.as_ref().and_then(PackedService::service);
        self.put(service, packed, &slices);
    }

    fn is_empty(&self) -> bool {
        self.services.is_empty() && self.slices.is_empty()
    }
}

impl Kept {
    /// The number of Services.
    pub fn services(&self) -> usize {
        let packed = |namespace: &Namespace| {
            let there = namespace.services.iter();
            there.filter(|packed| packed.service().is_some()).count()
        };
        self.namespaces.values().map(packed).sum()
    }

    /// Applies a change and adds to `dirty` what has to be planned again, by [`Kept::update`].
    pub fn apply(&mut self, change: &Change, dirty: &mut Dirty) {
        match change {
            Change::Upsert(Object::Service(service)) => {
                self.set_service(&service.key, Some(service), dirty);
            }
            Change::Upsert(Object::EndpointSlice(slice)) => {
                self.set_slice(&slice.key, Some(slice), dirty);
            }
            Change::Remove(gone) if gone.kind == Kind::Service => {
                self.set_service(&gone.key, None, dirty);
            }
            Change::Remove(gone) if gone.kind == Kind::EndpointSlice => {
                self.set_slice(&gone.key, None, dirty);
            }
            Change::Replace(kind @ (Kind::Service | Kind::EndpointSlice), objects) => {
                self.replace(*kind, objects, dirty);
            }
            other => self.snapshot.apply(other.clone(), dirty),
        }
    }

    /// The namespace of that name, made where there is none, and its own name.
    fn namespace(&mut self, name: &str) -> (Arc<str>, &mut Namespace) {
        let own = match self.namespaces.get_key_value(name) {
            Some((own, _)) => own.clone(),
            None => Arc::from(name),
        };
        let namespace = self.namespaces.entry(own.clone()).or_default();
        (own, namespace)
    }

    fn forget_if_empty(&mut self, namespace: &str) {
        if self
            .namespaces
            .get(namespace)
            .is_some_and(Namespace::is_empty)
        {
            self.namespaces.remove(namespace);
        }
    }

    fn set_service(&mut self, key: &ServiceKey, service: Option<&Service>, dirty: &mut Dirty) {
        let packed = service.map(pack_service);
        let (own, namespace) = self.namespace(&key.namespace);
        if namespace.set_service(&key.name, packed.as_deref()) {
            dirty.services.insert(ServiceKey::new(own, &*key.name));
        }
        self.forget_if_empty(&key.namespace);
    }

    fn set_slice(&mut self, key: &SliceKey, slice: Option<&EndpointSlice>, dirty: &mut Dirty) {
        let (own, namespace) = self.namespace(&key.namespace);
        let service = |name: &str| ServiceKey::new(own.clone(), name);
        let new = slice.and_then(|slice| {
            let service = slice.service.as_ref()?;
            Some(PackedSlice::new(
                &key.name,
                &service.name,
                &pack_slice(slice),
            ))
        });
        let old = namespace.slices.take(&*key.name);
        let was_of = old.as_ref().map(|old| service(old.parts().0));
        let is_of = new.as_ref().map(|new| service(new.parts().0));
        if was_of != is_of {
            for (of, linked) in [(&was_of, false), (&is_of, true)] {
                if let Some(of) = of {
                    namespace.link(&of.name, &key.name, linked);
                }
            }
        }
        let differs = old.as_ref().map(PackedSlice::parts) != new.as_ref().map(PackedSlice::parts);
        namespace.slices.extend(new);
        if differs {
            for of in was_of.into_iter().chain(is_of) {
                if namespace.follows_slices(&of) {
                    dirty.services.insert(of);
                }
            }
        }
        self.forget_if_empty(&key.namespace);
    }

    fn replace(&mut self, kind: Kind, objects: &[Object], dirty: &mut Dirty) {
        let listed = objects.iter().filter_map(|object| match object {
            Object::Service(service) => Some(&service.key),
            Object::EndpointSlice(slice) => Some(&slice.key),
            Object::Node(_) | Object::Pod(_) => None,
        });
        let listed: HashSet<(&str, &str), RandomState> =
            listed.map(|key| (&*key.namespace, &*key.name)).collect();
        let gone = |(own, namespace): (&Arc<str>, &Namespace)| {
            let names: Vec<&str> = match kind {
                Kind::Service => namespace.services.iter().map(PackedService::name).collect(),
                _ => namespace.slices.iter().map(PackedSlice::name).collect(),
            };
            let gone = names
                .into_iter()
                .filter(|name| !listed.contains(&(&**own, *name)));
            gone.map(|name| ServiceKey::new(own.clone(), name))
                .collect::<Vec<_>>()
        };
        let gone: Vec<ServiceKey> = self.namespaces.iter().flat_map(gone).collect();
        for key in gone {
            match kind {
                Kind::Service => self.set_service(&key, None, dirty),
                _ => self.set_slice(&key, None, dirty),
            }
        }
        for object in objects {
            match object {
                Object::Service(service) => self.set_service(&service.key, Some(service), dirty),
                Object::EndpointSlice(slice) => self.set_slice(&slice.key, Some(slice), dirty),
                Object::Node(_) | Object::Pod(_) => {}
            }
        }
        // That a list has come is known of these kinds too.
        self.snapshot
            .apply(Change::Replace(kind, Vec::new()), dirty);
    }

    /// Brings a zone to the state of what is dirty.
    pub fn update(&self, zone: &mut Zone, dirty: &Dirty) {
        let mut part = Dirty {
            services: BTreeSet::new(),
            ..dirty.clone()
        };
        let mut keys = dirty.services.iter();
        loop {
            part.services = keys.by_ref().take(AT_A_TIME).cloned().collect();
            let mut snapshot = self.snapshot.clone();
            for key in &part.services {
                self.unpack(key, &mut snapshot);
            }
            zone.update(&snapshot, &part);
            if part.services.len() < AT_A_TIME {
                return;
            }
            part.pods.clear();
        }
    }

    /// A zone of everything, with other settings.
    pub fn zone(&self, settings: ZoneSettings) -> Zone {
        let of = |(own, namespace): (&Arc<str>, &Namespace)| {
            let names = namespace.services.iter().map(PackedService::name);
            let keys = names.map(|name| ServiceKey::new(own.clone(), name));
            keys.collect::<Vec<_>>()
        };
        let everything = Dirty {
            services: self.namespaces.iter().flat_map(of).collect(),
            pods: self.snapshot.pods().map(|pod| pod.key.clone()).collect(),
            ..Dirty::default()
        };
        let mut zone = Zone::new(settings);
        self.update(&mut zone, &everything);
        zone
    }

    /// Puts a Service, and what of its slices has something to say, into a snapshot.
    fn unpack(&self, key: &ServiceKey, snapshot: &mut Snapshot) {
        let Some(namespace) = self.namespaces.get(&key.namespace) else {
            return;
        };
        let packed = namespace.services.get(&*key.name);
        let service = packed.and_then(|packed| unpack_service(key.clone(), packed.service()?));
        let (Some(packed), Some(service)) = (packed, service) else {
            return;
        };
        let mut put = |object| snapshot.apply(Change::Upsert(object), &mut Dirty::default());
        if !has_address(&service) {
            let slices = packed
                .slices()
                .filter_map(|name| namespace.slices.get(name));
            for slice in slices {
                let slice_key = SliceKey::new(key.namespace.clone(), slice.name());
                if let Some(slice) = unpack_slice(slice_key, key, slice.parts().1) {
                    put(Object::EndpointSlice(Arc::new(slice)));
                }
            }
        }
        put(Object::Service(Arc::new(service)));
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
                // Nothing is left behind of what is gone.
                let texts = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
                let linked = kept.namespaces.values().flat_map(|n| &n.services).flat_map(PackedService::slices);
                let slices = kept.namespaces.values().flat_map(|n| &n.slices).map(PackedSlice::name);
                prop_assert_eq!(texts(linked.collect()), texts(slices.collect()));
            }
            prop_assert!(kept.zone(settings.clone()).same_records(&zone));
        }
    }
}
