//! The zone: every name of the cluster and what it resolves to, kept in step with a snapshot.

mod node;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use cluster_model::{Dirty, Kind, ObjectKey, Snapshot};

use crate::bytemap::{ByteMap, Slot};
use crate::name::{Name, Relative, before, parent};
use crate::plan::{Naming, Owner, Record, Records, plan, plan_pod, undashed};
pub use node::{Node, Told};
use node::{Set, pack};

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

type Map<K, V> =
    im::GenericHashMap<K, V, foldhash::fast::RandomState, im::shared_ptr::DefaultSharedPtr>;

/// An immutable view of all records. A clone shares everything, so a new one is swapped in without a pause.
#[derive(Clone)]
pub struct Zone {
    settings: Arc<ZoneSettings>,
    /// By relative name for what is below the origins, by absolute name for reversed addresses: the closing root label tells
    /// them apart.
    nodes: ByteMap,
    /// By object: its number, and where the names are that it contributed to, to take them away again.
    planned: ByteMap,
    next_number: u32,
    /// The pods that each address belongs to; several where one has ended and its address has been given again.
    clients: Map<IpAddr, Arc<[ObjectKey]>>,
    addresses_of: Map<ObjectKey, Arc<[IpAddr]>>,
    /// Pods with a search path of their own, which nobody can follow for them.
    own_search: Map<ObjectKey, ()>,
    serial: u32,
    synced: bool,
    pods_synced: bool,
}

/// Who contributed records.
#[derive(Clone, Copy)]
enum Object<'a> {
    Zone,
    Service(&'a ObjectKey),
    Pod(&'a ObjectKey),
}

/// Between a namespace and a name, which neither of them has.
const SEPARATOR: u8 = b'/';

impl Object<'_> {
    /// A key for it, no other's.
    fn key(self) -> Vec<u8> {
        let (kind, key) = match self {
            Object::Zone => return Vec::new(),
            Object::Service(key) => (b'S', key),
            Object::Pod(key) => (b'P', key),
        };
        let (namespace, name) = (key.namespace.as_bytes(), key.name.as_bytes());
        [&[kind], namespace, &[SEPARATOR], name].concat()
    }

    /// What people call the object that has a key.
    fn title(key: &[u8]) -> String {
        let name = |key| String::from_utf8_lossy(key);
        match key.split_first() {
            None => "the zone itself".to_owned(),
            Some((b'S', key)) => format!("Service {}", name(key)),
            Some((_, key)) => format!("Pod {}", name(key)),
        }
    }
}

/// What is kept of an object that has records.
struct Planned {
    number: u32,
    slots: Vec<Slot>,
}

impl Planned {
    fn read(bytes: &[u8]) -> Option<Self> {
        let (number, slots) = bytes.split_first_chunk()?;
        let (slots, _) = slots.as_chunks::<{ Slot::BYTES }>();
        Some(Self {
            number: u32::from_le_bytes(*number),
            slots: slots.iter().copied().map(Slot::from_bytes).collect(),
        })
    }

    fn bytes(&self) -> Vec<u8> {
        let slots = self.slots.iter().flat_map(|slot| slot.to_bytes());
        self.number.to_le_bytes().into_iter().chain(slots).collect()
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
            nodes: ByteMap::default(),
            planned: ByteMap::default(),
            next_number: 0,
            clients: Map::default(),
            addresses_of: Map::default(),
            own_search: Map::default(),
            serial: 1,
            synced: false,
            pods_synced: false,
        };
        let longest = zone.settings.naming().origin_bytes_max;
        if let Ok(version) = Relative::origin().child("dns-version", longest) {
            let records = Records::from([(
                Owner::Cluster(version),
                vec![Record::Txt(SPECIFICATION.into())],
            )]);
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
            changed |= self.replace(Object::Service(key), records);
        }
        for key in &dirty.pods {
            self.update_client(snapshot, key);
        }
        if self.settings.pods == Pods::Verified {
            for key in &dirty.pods {
                let records = plan_pod(naming, snapshot, key);
                changed |= self.replace(Object::Pod(key), records);
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
        if pod.is_some_and(|pod| pod.own_search) {
            self.own_search.insert(key.clone(), ());
        } else {
            self.own_search.remove(key);
        }
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

    /// The namespace of the pod that has an address; `None` when no pod has it, more than one seems to, or its search path is its own.
    pub fn namespace_of(&self, address: IpAddr) -> Option<&Arc<str>> {
        match &**self.clients.get(&address.to_canonical())? {
            [pod] if !self.own_search.contains_key(pod) => Some(&pod.namespace),
            _ => None,
        }
    }

    fn replace(&mut self, by: Object<'_>, mut records: Records) -> bool {
        let key = by.key();
        let old = self.planned.get(&key).and_then(Planned::read);
        if old.is_none() && records.is_empty() {
            return false;
        }
        let number = old.as_ref().map_or(self.next_number, |old| old.number);
        if old.is_none() {
            // Four thousand million objects are more than any cluster ever has.
            self.next_number = self.next_number.wrapping_add(1);
        }
        let mut changed = false;
        let mut slots = Vec::with_capacity(records.len());
        let name_of = |owner: &Owner| match owner {
            Owner::Cluster(name) => name.shared().clone(),
            Owner::Reverse(name) => name.shared().clone(),
        };
        for (owner, records) in &mut records {
            let name = name_of(owner);
            // Sorted, so that what is stored does not depend on the order of arrival.
            records.sort_unstable();
            changed |= self.put(&name, number, &pack(records));
            slots.push(self.nodes.slot(&name));
        }
        slots.sort_unstable();
        for slot in old.iter().flat_map(|old| &old.slots) {
            // Where another name shares the place of one that has gone, names tell.
            if slots.binary_search(slot).is_ok() && self.nodes.at(*slot).count() == 1 {
                continue;
            }
            let had = self.nodes.at(*slot).filter(|(_, node)| {
                let mut sets = Node::read(node).sets();
                sets.any(|set| set.by == number)
            });
            let gone =
                had.filter(|(name, _)| !records.keys().any(|owner| *name_of(owner) == **name));
            let gone: Vec<Vec<u8>> = gone.map(|(name, _)| name.to_vec()).collect();
            for name in gone {
                self.take(&name, number);
                changed = true;
            }
        }
        if slots.is_empty() {
            self.planned.remove(&key);
        } else if changed {
            self.planned
                .insert(&key, &Planned { number, slots }.bytes());
        }
        changed
    }

    fn put(&mut self, name: &[u8], by: u32, packed: &[u8]) -> bool {
        let node = Node::read(self.nodes.get(name).unwrap_or_default());
        let new = Set { by, packed };
        if node.sets().any(|set| set == new) {
            return false;
        }
        let first = node.is_empty();
        let others = node.sets().filter(|set| set.by != by);
        let node = Node::write(node.below, others.chain([new]));
        self.nodes.insert(name, &node);
        if first {
            for above in above(name) {
                self.count_below(above, |below| below + 1);
            }
        }
        true
    }

    fn take(&mut self, name: &[u8], by: u32) {
        let Some(node) = self.nodes.get(name).map(Node::read) else {
            return;
        };
        let below = node.below;
        let left = Node::write(below, node.sets().filter(|set| set.by != by));
        let left_empty = Node::read(&left).is_empty();
        if below == 0 && left_empty {
            self.nodes.remove(name);
        } else {
            self.nodes.insert(name, &left);
        }
        if left_empty {
            for above in above(name) {
                self.count_below(above, |below| below.saturating_sub(1));
            }
        }
    }

    /// Counts the names below one, which comes with the first of them and goes with the last.
    fn count_below(&mut self, name: &[u8], count: impl Fn(u32) -> u32) {
        let Some(bytes) = self.nodes.get_mut(name) else {
            let node = Node::write(count(0), std::iter::empty());
            return self.nodes.insert(name, &node);
        };
        let below = count(Node::read(bytes).below);
        Node::set_below(bytes, below);
        if Node::read(bytes).is_unused() {
            self.nodes.remove(name);
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
    pub fn node(&self, place: &Place<'_>) -> Option<Node<'_>> {
        self.nodes.get(place.key).map(Node::read)
    }

    /// Who contributed each record of a node, for those who ask why.
    pub fn sources(&self, node: Node<'_>) -> Vec<(String, Record)> {
        let wanted: Vec<u32> = node.sets().map(|set| set.by).collect();
        let planned = self.planned.iter().filter_map(|(key, bytes)| {
            let number = Planned::read(bytes)?.number;
            wanted
                .contains(&number)
                .then(|| (number, Object::title(key)))
        });
        let titles: HashMap<u32, String> = planned.collect();
        let sets = node.sets().flat_map(move |set| {
            let by = titles.get(&set.by).cloned().unwrap_or_default();
            set.records().map(move |record| (by.clone(), record.into()))
        });
        sets.collect()
    }

    /// The key of each object by its number.
    fn objects(&self) -> HashMap<u32, &[u8]> {
        let planned = self.planned.iter();
        let numbers = planned.filter_map(|(key, bytes)| Some((Planned::read(bytes)?.number, key)));
        numbers.collect()
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
    pub fn find(&self, name: &Name) -> Option<Node<'_>> {
        self.place(name.wire()).and_then(|place| self.node(&place))
    }

    /// Whether a relative name has records.
    pub fn has(&self, relative: &[u8]) -> bool {
        self.nodes
            .get(relative)
            .is_some_and(|node| !Node::read(node).is_empty())
    }

    /// The addresses of a name below the origins, for the additional section.
    pub fn addresses(&self, name: &[u8]) -> impl Iterator<Item = IpAddr> {
        let node = self.nodes.get(name).map(Node::read);
        let records = node.into_iter().flat_map(Node::records);
        records.filter_map(|record| match record {
            Told::A(v4) => Some(IpAddr::V4(v4)),
            Told::Aaaa(v6) => Some(IpAddr::V6(v6)),
            _ => None,
        })
    }

    /// Every name with records below the origins, or of reversed addresses, in no particular order.
    pub fn owners(&self, reverse: bool) -> impl Iterator<Item = (&[u8], Node<'_>)> {
        let nodes = self
            .nodes
            .iter()
            .map(|(name, node)| (name, Node::read(node)));
        nodes.filter(move |(name, node)| (name.last() == Some(&0)) == reverse && !node.is_empty())
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
        let (mine, theirs) = (self.objects(), other.objects());
        let same = |(name, node): (&[u8], &[u8])| {
            let node = Node::read(node);
            other.nodes.get(name).map(Node::read).is_some_and(|twin| {
                let has = |set: Set<'_>| {
                    let mut others = twin.sets();
                    others.any(|other| {
                        mine.get(&set.by) == theirs.get(&other.by) && set.packed == other.packed
                    })
                };
                twin.below == node.below
                    && twin.sets().count() == node.sets().count()
                    && node.sets().all(has)
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
