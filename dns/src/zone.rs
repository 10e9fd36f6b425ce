//! The zone: every name of the cluster and what it resolves to, kept in step with a snapshot.

use std::net::IpAddr;
use std::sync::Arc;

use cluster_model::{Dirty, Kind, ServiceKey, Snapshot};
use im::HashMap;

use crate::name::{Name, parent};
use crate::plan::{Record, Records, plan};

/// Version of the Kubernetes DNS specification that `dns-version.<domain>` names.
const SPECIFICATION: &[u8] = b"1.1.0";

/// An immutable view of all records. A clone shares everything, so a new one is swapped in without a pause.
#[derive(Clone, Debug)]
pub struct Zone {
    origin: Name,
    nodes: HashMap<Name, Arc<Node>>,
    /// What each Service contributed, to take away again.
    planned: HashMap<ServiceKey, Arc<Records>>,
    serial: u32,
    synced: bool,
}

/// One name of the tree: with records, or only because there is something below it (RFC 8020).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    /// Names with records below this one.
    below: usize,
    /// Records by who contributed them: two Services may share an endpoint, and so a PTR name.
    sets: Vec<(ServiceKey, Vec<Record>)>,
}

impl Node {
    pub fn records(&self) -> impl Iterator<Item = &Record> + Clone {
        self.sets.iter().flat_map(|(_, records)| records)
    }

    fn is_unused(&self) -> bool {
        self.below == 0 && self.sets.is_empty()
    }
}

impl Zone {
    /// An empty zone, not yet synced: it does not know which names do not exist.
    pub fn new(origin: Name) -> Self {
        let mut zone = Self {
            origin: origin.clone(),
            nodes: HashMap::new(),
            planned: HashMap::new(),
            serial: 1,
            synced: false,
        };
        if let Ok(version) = origin.child("dns-version") {
            let owner = ServiceKey::new("", "");
            zone.add(&version, &owner, vec![Record::Txt(SPECIFICATION.to_vec())]);
        }
        zone
    }

    /// The zone of a whole snapshot.
    pub fn of(origin: Name, snapshot: &Snapshot) -> Self {
        let mut zone = Self::new(origin);
        let mut dirty = Dirty::default();
        dirty
            .services
            .extend(snapshot.services().map(|service| service.key.clone()));
        zone.update(snapshot, &dirty);
        zone
    }

    /// Plans the dirty Services again and takes over what changed. Costs what the change costs, not what the zone does.
    pub fn update(&mut self, snapshot: &Snapshot, dirty: &Dirty) {
        self.synced = snapshot.synced(Kind::Service) && snapshot.synced(Kind::EndpointSlice);
        let mut changed = false;
        for key in &dirty.services {
            changed |= self.replace(key, plan(&self.origin, snapshot, key));
        }
        if changed {
            self.serial = self.serial.wrapping_add(1);
        }
    }

    fn replace(&mut self, key: &ServiceKey, records: Records) -> bool {
        let old = self.planned.get(key).cloned().unwrap_or_default();
        if *old == records {
            return false;
        }
        for name in old.keys().filter(|name| !records.contains_key(*name)) {
            self.take(name, key);
        }
        for (name, records) in records
            .iter()
            .filter(|(name, records)| old.get(*name) != Some(records))
        {
            self.add(name, key, records.clone());
        }
        if records.is_empty() {
            self.planned.remove(key);
        } else {
            self.planned.insert(key.clone(), Arc::new(records));
        }
        true
    }

    fn add(&mut self, name: &Name, owner: &ServiceKey, records: Vec<Record>) {
        let node = Arc::make_mut(self.nodes.entry(name.clone()).or_default());
        let first = node.sets.is_empty();
        match node.sets.iter_mut().find(|(other, _)| other == owner) {
            Some((_, set)) => *set = records,
            None => node.sets.push((owner.clone(), records)),
        }
        if first {
            for above in name
                .and_ancestors()
                .skip(1)
                .take_while(|above| above.len() > 1)
            {
                let node = self.nodes.entry(Name::from_wire(above)).or_default();
                Arc::make_mut(node).below += 1;
            }
        }
    }

    fn take(&mut self, name: &Name, owner: &ServiceKey) {
        let Some(node) = self.nodes.get_mut(name) else {
            return;
        };
        let node = Arc::make_mut(node);
        node.sets.retain(|(other, _)| other != owner);
        if !node.sets.is_empty() {
            return;
        }
        if node.is_unused() {
            self.nodes.remove(name);
        }
        for above in name
            .and_ancestors()
            .skip(1)
            .take_while(|above| above.len() > 1)
        {
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

    /// The node of a name in lower-case wire format; `None` when there is no such name.
    pub fn find(&self, wire: &[u8]) -> Option<&Node> {
        self.nodes.get(wire).map(Arc::as_ref)
    }

    /// The addresses of a name, for the additional section.
    pub fn addresses(&self, name: &Name) -> impl Iterator<Item = IpAddr> {
        self.find(name.wire())
            .into_iter()
            .flat_map(Node::records)
            .filter_map(|record| match record {
                Record::A(v4) => Some(IpAddr::V4(*v4)),
                Record::Aaaa(v6) => Some(IpAddr::V6(*v6)),
                _ => None,
            })
    }

    pub fn origin(&self) -> &Name {
        &self.origin
    }

    /// Whether a name in lower-case wire format is the origin or below it.
    pub fn contains(&self, wire: &[u8]) -> bool {
        std::iter::successors(Some(wire), |name| parent(name))
            .any(|name| name == self.origin.wire())
    }

    /// Serial of the SOA record: moves with every change.
    pub fn serial(&self) -> u32 {
        self.serial
    }

    /// Whether complete lists have arrived: before that, a missing name means nothing.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// Whether two zones answer alike, whatever their history.
    pub fn same_records(&self, other: &Self) -> bool {
        let same = |(name, node): (&Name, &Arc<Node>)| {
            other.nodes.get(name).is_some_and(|twin| {
                twin.below == node.below
                    && twin.sets.len() == node.sets.len()
                    && node.sets.iter().all(|set| twin.sets.contains(set))
            })
        };
        self.nodes.len() == other.nodes.len() && self.nodes.iter().all(same)
    }
}
