//! The zone: every name of the cluster and what it resolves to, kept in step with a snapshot.

use std::net::IpAddr;
use std::sync::Arc;

use cluster_model::{Dirty, Kind, ObjectKey, Snapshot};

use crate::few::Few;
use crate::name::{Name, Relative, before, parent};
use crate::names::NameMap;
use crate::plan::{Naming, Owner, Record, Records, plan, plan_pod, undashed};

/// Version of the Kubernetes DNS specification that `dns-version.<domain>` names.
const SPECIFICATION: &[u8] = b"1.1.0";

/// What is told of pods by their address, as `10-0-0-1.<namespace>.pod.<domain>`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pods {
    /// Nothing: the names do not exist.
    #[default]
    Disabled,
    /// Whatever address the name spells, whether or not there is such a pod. kube-dns did so.
    Insecure,
    /// The address, if a pod of the namespace has it. Needs a watch on pods.
    Verified,
}

/// What a zone is made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneSettings {
    /// The domains of the cluster, the first of which PTR records name; never empty.
    pub origins: Vec<Name>,
    /// The zones of reversed addresses that are served.
    pub reverse: Vec<Name>,
    pub pods: Pods,
    pub endpoint_pod_names: bool,
}

impl ZoneSettings {
    /// One domain, and both trees of reversed addresses.
    pub fn of(origin: Name) -> Self {
        let tree = |name| Name::parse(name).expect("a constant name");
        Self {
            origins: vec![origin],
            reverse: vec![tree("in-addr.arpa"), tree("ip6.arpa")],
            pods: Pods::default(),
            endpoint_pod_names: false,
        }
    }

    fn naming(&self) -> Naming {
        Naming {
            origin_bytes_max: self
                .origins
                .iter()
                .map(|origin| origin.wire().len())
                .max()
                .unwrap_or_default(),
            endpoint_pod_names: self.endpoint_pod_names,
        }
    }
}

/// A node's name: see [`Zone::nodes`].
type Key = Arc<[u8]>;
type Map<K, V> =
    im::GenericHashMap<K, V, foldhash::fast::RandomState, im::shared_ptr::DefaultSharedPtr>;

/// An immutable view of all records. A clone shares everything, so a new one is swapped in without a pause.
#[derive(Clone)]
pub struct Zone {
    settings: Arc<ZoneSettings>,
    /// By relative name for what is below the origins, by absolute name for reversed addresses: the closing root label tells
    /// them apart.
    nodes: NameMap<Arc<Node>>,
    /// The names that each object contributed to, to take them away again.
    planned: Map<Arc<Object>, Arc<[Key]>>,
    /// The pods that each address belongs to; several where one has ended and its address has been given again.
    clients: Map<IpAddr, Arc<[ObjectKey]>>,
    addresses_of: Map<ObjectKey, Arc<[IpAddr]>>,
    serial: u32,
    synced: bool,
    pods_synced: bool,
}

/// Who contributed records.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Object {
    Zone,
    Service(ObjectKey),
    Pod(ObjectKey),
}

/// One name of the tree: with records, or only because there is something below it (RFC 8020).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    /// Names with records below this one.
    below: u32,
    /// Records by who contributed them: two Services may share an endpoint, and so a PTR name.
    sets: Few<Set>,
}

#[derive(Clone, Debug, PartialEq)]
struct Set {
    by: Arc<Object>,
    records: Few<Record>,
}

impl Node {
    /// The records of this name, each once.
    pub fn records(&self) -> impl Iterator<Item = &Record> + Clone {
        self.sets.iter().enumerate().flat_map(move |(i, set)| {
            let earlier = &self.sets[..i];
            set.records
                .iter()
                .filter(move |record| !earlier.iter().any(|set| set.records.contains(record)))
        })
    }

    /// Who contributed each record, for those who ask why.
    pub fn sources(&self) -> impl Iterator<Item = (String, &Record)> {
        self.sets.iter().flat_map(|set| {
            let by = match &*set.by {
                Object::Zone => "the zone itself".to_owned(),
                Object::Service(key) => format!("Service {key}"),
                Object::Pod(key) => format!("Pod {key}"),
            };
            set.records.iter().map(move |record| (by.clone(), record))
        })
    }

    /// Whether the name exists only because of what is below it.
    pub fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    fn is_unused(&self) -> bool {
        self.below == 0 && self.sets.is_empty()
    }
}

/// Where in the zone a name is.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The domain or reverse zone that the name belongs to.
    pub apex: &'a Name,
    /// What stands before the apex; empty for the apex itself.
    pub before: &'a [u8],
    pub reverse: bool,
    key: &'a [u8],
}

impl Zone {
    /// An empty zone, not yet synced: it does not know which names do not exist.
    pub fn new(settings: ZoneSettings) -> Self {
        let mut zone = Self {
            settings: Arc::new(settings),
            nodes: NameMap::default(),
            planned: Map::default(),
            clients: Map::default(),
            addresses_of: Map::default(),
            serial: 1,
            synced: false,
            pods_synced: false,
        };
        let longest = zone.settings.naming().origin_bytes_max;
        if let Ok(version) = Relative::origin().child("dns-version", longest) {
            let records =
                Records::from([(Owner::Cluster(version), vec![Record::Txt(SPECIFICATION)])]);
            zone.replace(Object::Zone, records);
        }
        zone
    }

    /// The zone of a whole snapshot.
    pub fn of(settings: ZoneSettings, snapshot: &Snapshot) -> Self {
        let mut zone = Self::new(settings);
        let mut dirty = Dirty::default();
        let services = snapshot.services().map(|service| service.key.clone());
        dirty.services.extend(services);
        dirty
            .pods
            .extend(snapshot.pods().map(|pod| pod.key.clone()));
        zone.update(snapshot, &dirty);
        zone
    }

    /// Plans the dirty objects again and takes over what changed. Costs what the change costs, not what the zone does.
    pub fn update(&mut self, snapshot: &Snapshot, dirty: &Dirty) {
        self.synced = snapshot.synced(Kind::Service) && snapshot.synced(Kind::EndpointSlice);
        self.pods_synced = self.settings.pods != Pods::Verified || snapshot.synced(Kind::Pod);
        let naming = self.settings.naming();
        let mut changed = false;
        for key in &dirty.services {
            let records = plan(naming, snapshot, key);
            changed |= self.replace(Object::Service(key.clone()), records);
        }
        for key in &dirty.pods {
            self.update_client(snapshot, key);
        }
        if self.settings.pods == Pods::Verified {
            for key in &dirty.pods {
                let records = plan_pod(naming, snapshot, key);
                changed |= self.replace(Object::Pod(key.clone()), records);
            }
        }
        if changed {
            self.serial = self.serial.wrapping_add(1);
        }
    }

    fn update_client(&mut self, snapshot: &Snapshot, key: &ObjectKey) {
        // Pods of the host's network share its address; those that have ended keep theirs in the API.
        let pod = snapshot
            .pod(key)
            .filter(|pod| !pod.host_network && !pod.ended);
        let new: Arc<[IpAddr]> = pod.map_or_else(|| Arc::from([]), |pod| pod.ips.clone().into());
        let old = self.addresses_of.get(key).cloned();
        if old.as_ref().is_some_and(|old| *old == new) {
            return;
        }
        for address in old.iter().flat_map(|old| old.iter()) {
            let left = self
                .clients
                .get(address)
                .into_iter()
                .flat_map(|keys| keys.iter());
            let left: Vec<ObjectKey> = left.filter(|other| *other != key).cloned().collect();
            if left.is_empty() {
                self.clients.remove(address);
            } else {
                self.clients.insert(*address, left.into());
            }
        }
        for address in new.iter() {
            let there = self
                .clients
                .get(address)
                .into_iter()
                .flat_map(|keys| keys.iter());
            let all: Vec<ObjectKey> = there.chain([key]).cloned().collect();
            self.clients.insert(*address, all.into());
        }
        if new.is_empty() {
            self.addresses_of.remove(key);
        } else {
            self.addresses_of.insert(key.clone(), new);
        }
    }

    /// The namespace of the pod that has an address; `None` when no pod has it, or more than one seems to.
    pub fn namespace_of(&self, address: IpAddr) -> Option<&Arc<str>> {
        match &**self.clients.get(&address.to_canonical())? {
            [pod] => Some(&pod.namespace),
            _ => None,
        }
    }

    fn replace(&mut self, by: Object, records: Records) -> bool {
        let (by, old) = match self.planned.get_key_value(&by) {
            Some((by, names)) => (by.clone(), names.clone()),
            None => (Arc::new(by), Arc::from([])),
        };
        let mut changed = false;
        let mut names = Vec::with_capacity(records.len());
        for (owner, mut records) in records {
            let shared = match &owner {
                Owner::Cluster(name) => name.shared(),
                Owner::Reverse(name) => name.shared(),
            };
            // Sorted, so that what is stored does not depend on the order of arrival.
            records.sort_unstable();
            let name = old.iter().find(|name| **name == *shared);
            // Records of a Service name each other: one allocation serves them all.
            let name = name.unwrap_or(shared).clone();
            changed |= self.put(&name, &by, records);
            names.push(name);
        }
        for name in old.iter().filter(|name| !names.contains(name)) {
            self.take(name, &by);
            changed = true;
        }
        if names.is_empty() {
            self.planned.remove(&by);
        } else if changed {
            self.planned.insert(by, names.into());
        }
        changed
    }

    fn put(&mut self, name: &Arc<[u8]>, by: &Arc<Object>, records: Vec<Record>) -> bool {
        let node = self.nodes.get(name);
        let set = node.and_then(|node| node.sets.iter().find(|set| set.by == *by));
        if set.is_some_and(|set| *set.records == *records) {
            return false;
        }
        let first = node.is_none_or(|node| node.sets.is_empty());
        let node = Arc::make_mut(self.nodes.get_or_insert(name, Arc::default));
        let mut sets = std::mem::take(&mut node.sets).into_vec();
        sets.retain(|set| set.by != *by);
        sets.push(Set {
            by: by.clone(),
            records: records.into(),
        });
        node.sets = sets.into();
        if first {
            for above in above(name) {
                let node = match self.nodes.get_mut(above) {
                    Some(node) => node,
                    None => self.nodes.get_or_insert(&above.into(), Arc::default),
                };
                Arc::make_mut(node).below += 1;
            }
        }
        true
    }

    fn take(&mut self, name: &[u8], by: &Object) {
        let Some(node) = self.nodes.get_mut(name) else {
            return;
        };
        let node = Arc::make_mut(node);
        let mut sets = std::mem::take(&mut node.sets).into_vec();
        sets.retain(|set| *set.by != *by);
        node.sets = sets.into();
        if !node.sets.is_empty() {
            return;
        }
        if node.is_unused() {
            self.nodes.remove(name);
        }
        for above in above(name) {
            let Some(node) = self.nodes.get_mut(above) else {
                continue;
            };
            let node = Arc::make_mut(node);
            node.below -= 1;
            if node.is_unused() {
                self.nodes.remove(above);
            }
        }
    }

    /// Where a name in lower-case wire format is in the zone; `None` for names of others.
    pub fn place<'a>(&'a self, wire: &'a [u8]) -> Option<Place<'a>> {
        let within = |apex: &'a Name, reverse| {
            before(wire, apex.wire()).map(|before| Place {
                apex,
                before,
                reverse,
                key: if reverse { wire } else { before },
            })
        };
        let origins = self.settings.origins.iter();
        let reverse = self.settings.reverse.iter();
        // Longest first where one domain is within another.
        origins
            .filter_map(|apex| within(apex, false))
            .chain(reverse.filter_map(|apex| within(apex, true)))
            .min_by_key(|place| place.before.len())
    }

    /// The node at a place; `None` when there is no such name.
    pub fn node(&self, place: &Place<'_>) -> Option<&Node> {
        self.nodes.get(place.key).map(Arc::as_ref)
    }

    /// The address of a pod that a place spells, where that is believed.
    pub fn pod(&self, place: &Place<'_>) -> PodName {
        const POD: &[u8] = b"\x03pod";
        if place.reverse || self.settings.pods != Pods::Insecure {
            return PodName::No;
        }
        let Some(inner) = before(place.before, POD) else {
            return PodName::No;
        };
        let Some((&length, rest)) = inner.split_first() else {
            return PodName::Parent;
        };
        let (label, rest) = rest.split_at(usize::from(length));
        match parent(rest) {
            // `<namespace>.pod`: any namespace may have pods.
            None => PodName::Parent,
            Some([]) => undashed(label).map_or(PodName::No, PodName::Address),
            Some(_) => PodName::No,
        }
    }

    /// Whether enough is known to deny the name at a place.
    pub fn may_deny(&self, place: &Place<'_>) -> bool {
        self.synced && (self.pods_synced || before(place.before, b"\x03pod").is_none())
    }

    /// The node of a name in text, absolute or not; for tests and those who ask why.
    pub fn find(&self, name: &Name) -> Option<&Node> {
        self.place(name.wire()).and_then(|place| self.node(&place))
    }

    /// Whether a relative name has records.
    pub fn has(&self, relative: &[u8]) -> bool {
        self.nodes
            .get(relative)
            .is_some_and(|node| !node.is_empty())
    }

    /// The addresses of a name below the origins, for the additional section.
    pub fn addresses(&self, name: &Relative) -> impl Iterator<Item = IpAddr> {
        self.nodes
            .get(name.wire())
            .into_iter()
            .flat_map(|node| node.records())
            .filter_map(|record| match record {
                Record::A(v4) => Some(IpAddr::V4(*v4)),
                Record::Aaaa(v6) => Some(IpAddr::V6(*v6)),
                _ => None,
            })
    }

    /// Every name with records below the origins, or of reversed addresses, in no particular order.
    pub fn owners(&self, reverse: bool) -> impl Iterator<Item = (&[u8], &Node)> {
        self.nodes
            .iter()
            .filter(move |(name, node)| (name.last() == Some(&0)) == reverse && !node.is_empty())
            .map(|(name, node)| (&**name, &**node))
    }

    pub fn settings(&self) -> &ZoneSettings {
        &self.settings
    }

    /// The domain that PTR records name.
    pub fn origin(&self) -> &Name {
        &self.settings.origins[0]
    }

    /// Serial of the SOA record: moves with every change.
    pub fn serial(&self) -> u32 {
        self.serial
    }

    /// Whether complete lists have arrived: before that, a missing name means nothing.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// Whether pods are known as far as the settings ask for it.
    pub fn pods_synced(&self) -> bool {
        self.pods_synced
    }

    /// Whether two zones answer alike, whatever their history.
    pub fn same_records(&self, other: &Self) -> bool {
        let same = |(name, node): (&Arc<[u8]>, &Arc<Node>)| {
            other.nodes.get(name).is_some_and(|twin| {
                twin.below == node.below
                    && twin.sets.len() == node.sets.len()
                    && node.sets.iter().all(|set| twin.sets.contains(set))
            })
        };
        self.nodes.len() == other.nodes.len() && self.nodes.iter().all(same)
    }
}

/// What a name below `pod.<domain>` is when addresses are believed unseen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodName {
    No,
    /// A name that pods are below.
    Parent,
    Address(IpAddr),
}

/// The names above one, in either form: up to the origin, or up to the first label below the root.
fn above(name: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::successors(parent(name), |name| parent(name)).take_while(|name| *name != b"\0")
}
