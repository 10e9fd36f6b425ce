//! Which records a Service or a Pod has: pure functions of the snapshot (Kubernetes DNS specification 1.1.0).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cluster_model::{Endpoint, ObjectKey, Protocol, Service, ServiceKey, Snapshot};

use crate::name::{BadName, LABEL_BYTES_MAX, Name, Relative};

/// One record, without owner and TTL. Names of the cluster are relative: they end in the origin that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Record {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    /// The alias of an ExternalName Service.
    Cname(Name),
    Srv {
        weight: u16,
        port: u16,
        target: Relative,
    },
    Ptr(Relative),
    /// One character string.
    Txt(Vec<u8>),
}

impl From<IpAddr> for Record {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Record::A(v4),
            IpAddr::V6(v6) => Record::Aaaa(v6),
        }
    }
}

/// The name of a node of the zone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// Below every origin of the cluster.
    Cluster(Relative),
    /// In the tree of reversed addresses.
    Reverse(Name),
}

/// The records that one object contributes, by owner name.
pub type Records = BTreeMap<Owner, Vec<Record>>;

/// What of the records an operator can choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Naming {
    /// Bytes of the longest origin on the wire: names that would not fit below it have no records.
    pub origin_bytes_max: usize,
    /// Endpoints without a hostname are called by their pod's name rather than by their address.
    pub endpoint_pod_names: bool,
}

/// Sum of the SRV weights of one name, as CoreDNS shares it out among targets.
const WEIGHT_TOTAL: usize = 100;

/// Plans the records of one Service; none when it does not exist. What can't be a name in DNS (a hostname of 70 bytes,
/// a domain of 200) is left out, and nothing else is.
pub fn plan(naming: Naming, snapshot: &Snapshot, key: &ServiceKey) -> Records {
    let Some(service) = snapshot.service(key) else {
        return Records::new();
    };
    let below = |base: &Relative, label: &str| base.child(label, naming.origin_bytes_max);
    let base = below(&Relative::origin(), "svc")
        .and_then(|svc| below(&svc, &key.namespace))
        .and_then(|namespace| below(&namespace, &key.name));
    let Ok(base) = base else {
        return Records::new();
    };
    let planned = Planned {
        naming,
        base,
        records: Records::new(),
    };
    if let Some(external) = &service.external_name {
        planned.external(external)
    } else if service.headless {
        planned.headless(snapshot, service)
    } else {
        planned.cluster_ip(service)
    }
}

/// Plans the records of one Pod: its addresses with dashes, in its namespace. CoreDNS calls this mode "verified".
pub fn plan_pod(naming: Naming, snapshot: &Snapshot, key: &ObjectKey) -> Records {
    let mut records = Records::new();
    let Some(pod) = snapshot.pod(key).filter(|pod| !pod.ended) else {
        return records;
    };
    let namespace = Relative::origin()
        .child("pod", naming.origin_bytes_max)
        .and_then(|pods| pods.child(&key.namespace, naming.origin_bytes_max));
    let Ok(namespace) = namespace else {
        return records;
    };
    for address in &pod.ips {
        if let Ok(name) = namespace.child(&dashed(*address), naming.origin_bytes_max) {
            records.insert(Owner::Cluster(name), vec![(*address).into()]);
        }
    }
    records
}

struct Planned {
    naming: Naming,
    base: Relative,
    records: Records,
}

impl Planned {
    fn external(mut self, target: &str) -> Records {
        if let Ok(target) = Name::parse(target) {
            self.add(Owner::Cluster(self.base.clone()), Record::Cname(target));
        }
        self.records
    }

    fn cluster_ip(mut self, service: &Service) -> Records {
        if service.cluster_ips.is_empty() {
            return self.records;
        }
        let base = self.base.clone();
        for address in &service.cluster_ips {
            self.add(Owner::Cluster(base.clone()), (*address).into());
            self.add(
                Owner::Reverse(Name::reverse(*address)),
                Record::Ptr(base.clone()),
            );
        }
        for port in service.ports.iter().filter(|port| !port.name.is_empty()) {
            let record = Record::Srv {
                weight: WEIGHT_TOTAL as u16,
                port: port.port,
                target: base.clone(),
            };
            if let Ok(name) = self.srv_name(&port.name, port.protocol) {
                self.add(Owner::Cluster(name), record);
            }
        }
        self.records
    }

    fn headless(mut self, snapshot: &Snapshot, service: &Service) -> Records {
        // Sets first: an address may stand in several slices while it moves from one to another.
        let mut addresses: BTreeMap<Relative, BTreeSet<IpAddr>> = BTreeMap::new();
        let mut targets: BTreeMap<(Relative, u16), BTreeSet<Relative>> = BTreeMap::new();
        let mut reverse: BTreeMap<Name, BTreeSet<Relative>> = BTreeMap::new();
        for slice in snapshot.slices(&service.key) {
            for endpoint in &slice.endpoints {
                if !endpoint.conditions.ready && !service.publish_not_ready {
                    continue;
                }
                let all = addresses.entry(self.base.clone()).or_default();
                all.insert(endpoint.address);
                let Ok(own) = self.endpoint_name(endpoint) else {
                    continue;
                };
                let one = addresses.entry(own.clone()).or_default();
                one.insert(endpoint.address);
                let names = reverse.entry(Name::reverse(endpoint.address)).or_default();
                names.insert(own.clone());
                for port in slice.ports.iter().filter(|port| !port.name.is_empty()) {
                    if let Ok(name) = self.srv_name(&port.name, port.protocol) {
                        let names = targets.entry((name, port.port)).or_default();
                        names.insert(own.clone());
                    }
                }
            }
        }
        for (name, addresses) in addresses {
            let addresses = addresses.into_iter().map(Record::from).collect();
            self.records.insert(Owner::Cluster(name), addresses);
        }
        for (name, owners) in reverse {
            let owners = owners.into_iter().map(Record::Ptr).collect();
            self.records.insert(Owner::Reverse(name), owners);
        }
        for ((name, port), targets) in targets {
            let weight = (WEIGHT_TOTAL / targets.len()).max(1) as u16;
            for target in targets {
                let record = Record::Srv {
                    weight,
                    port,
                    target,
                };
                self.add(Owner::Cluster(name.clone()), record);
            }
        }
        self.records
    }

    fn add(&mut self, owner: Owner, record: Record) {
        let records = self.records.entry(owner).or_default();
        if !records.contains(&record) {
            records.push(record);
        }
    }

    fn srv_name(&self, port: &str, protocol: Protocol) -> Result<Relative, BadName> {
        let longest = self.naming.origin_bytes_max;
        let protocol = format!("_{}", protocol.to_string().to_ascii_lowercase());
        let parent = self.base.child(&protocol, longest)?;
        parent.child(&format!("_{port}"), longest)
    }

    /// The endpoint's hostname, else its address with dashes: a name that any implementation may choose.
    fn endpoint_name(&self, endpoint: &Endpoint) -> Result<Relative, BadName> {
        let label = match (&endpoint.hostname, &endpoint.target) {
            (Some(hostname), _) => hostname.to_string(),
            // A pod may be called what is no label; then its address is.
            (None, Some(target))
                if self.naming.endpoint_pod_names
                    && &*target.kind == "Pod"
                    && target.key.name.len() <= LABEL_BYTES_MAX
                    && !target.key.name.contains('.') =>
            {
                target.key.name.to_string()
            }
            _ => dashed(endpoint.address),
        };
        self.base.child(&label, self.naming.origin_bytes_max)
    }
}

/// An address as one label: dots or colons as dashes. IPv6 is written in full, since a label can't begin with a dash.
fn dashed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string().replace('.', "-"),
        IpAddr::V6(v6) => v6.segments().map(|part| format!("{part:x}")).join("-"),
    }
}

/// The address that a label with dashes stands for.
pub fn undashed(label: &[u8]) -> Option<IpAddr> {
    let spelt = |separator| {
        let mut text = [0; LABEL_BYTES_MAX];
        let text = text.get_mut(..label.len())?;
        for (to, from) in text.iter_mut().zip(label) {
            *to = if *from == b'-' { separator } else { *from };
        }
        std::str::from_utf8(text).ok()?.parse::<IpAddr>().ok()
    };
    spelt(b'.').or_else(|| spelt(b':'))
}
