//! Which records a Service has: a pure function of the snapshot (Kubernetes DNS specification 1.1.0).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cluster_model::{Endpoint, Protocol, Service, ServiceKey, Snapshot};

use crate::name::{BadName, Name};

/// One record, without owner and TTL.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Record {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Cname(Name),
    Srv {
        weight: u16,
        port: u16,
        target: Name,
    },
    Ptr(Name),
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

/// The records that one Service contributes, by owner name.
pub type Records = BTreeMap<Name, Vec<Record>>;

/// Sum of the SRV weights of one name, as CoreDNS shares it out among targets.
const WEIGHT_TOTAL: usize = 100;

/// Plans the records of one Service; none when it does not exist. A Service whose names would not fit into DNS
/// (a domain of 200 bytes, say) has none either.
pub fn plan(origin: &Name, snapshot: &Snapshot, key: &ServiceKey) -> Records {
    let Some(service) = snapshot.service(key) else {
        return Records::new();
    };
    records(origin, snapshot, service).unwrap_or_default()
}

fn records(origin: &Name, snapshot: &Snapshot, service: &Service) -> Result<Records, BadName> {
    let base = origin
        .child("svc")?
        .child(&service.key.namespace)?
        .child(&service.key.name)?;
    if let Some(external) = &service.external_name {
        return Ok(Records::from([(
            base,
            vec![Record::Cname(Name::parse(external)?)],
        )]));
    }
    if service.headless {
        headless(&base, snapshot, service)
    } else {
        cluster_ip(&base, service)
    }
}

fn cluster_ip(base: &Name, service: &Service) -> Result<Records, BadName> {
    let mut records = Records::new();
    if service.cluster_ips.is_empty() {
        return Ok(records);
    }
    for address in &service.cluster_ips {
        records
            .entry(base.clone())
            .or_default()
            .push((*address).into());
        records
            .entry(Name::reverse(*address))
            .or_default()
            .push(Record::Ptr(base.clone()));
    }
    for port in service.ports.iter().filter(|port| !port.name.is_empty()) {
        let record = Record::Srv {
            weight: WEIGHT_TOTAL as u16,
            port: port.port,
            target: base.clone(),
        };
        records
            .entry(srv_name(base, &port.name, port.protocol)?)
            .or_default()
            .push(record);
    }
    Ok(records)
}

fn headless(base: &Name, snapshot: &Snapshot, service: &Service) -> Result<Records, BadName> {
    // Sets first: an address may stand in several slices while it moves from one to another.
    let mut addresses: BTreeMap<Name, BTreeSet<IpAddr>> = BTreeMap::new();
    let mut targets: BTreeMap<(Name, u16), BTreeSet<Name>> = BTreeMap::new();
    let mut reverse: BTreeMap<Name, BTreeSet<Name>> = BTreeMap::new();
    for slice in snapshot.slices(&service.key) {
        for endpoint in &slice.endpoints {
            if !endpoint.conditions.ready && !service.publish_not_ready {
                continue;
            }
            let own = base.child(&label(endpoint))?;
            addresses
                .entry(base.clone())
                .or_default()
                .insert(endpoint.address);
            addresses
                .entry(own.clone())
                .or_default()
                .insert(endpoint.address);
            reverse
                .entry(Name::reverse(endpoint.address))
                .or_default()
                .insert(own.clone());
            for port in slice.ports.iter().filter(|port| !port.name.is_empty()) {
                let name = srv_name(base, &port.name, port.protocol)?;
                targets
                    .entry((name, port.port))
                    .or_default()
                    .insert(own.clone());
            }
        }
    }
    let mut records = Records::new();
    for (name, addresses) in addresses {
        records.insert(name, addresses.into_iter().map(Record::from).collect());
    }
    for (name, owners) in reverse {
        records
            .entry(name)
            .or_default()
            .extend(owners.into_iter().map(Record::Ptr));
    }
    for ((name, port), targets) in targets {
        let weight = (WEIGHT_TOTAL / targets.len()).max(1) as u16;
        let srv = targets.into_iter().map(|target| Record::Srv {
            weight,
            port,
            target,
        });
        records.entry(name).or_default().extend(srv);
    }
    Ok(records)
}

/// The endpoint's hostname, else its address with dashes, which is a name that any implementation may choose.
fn label(endpoint: &Endpoint) -> String {
    match (&endpoint.hostname, endpoint.address) {
        (Some(hostname), _) => hostname.to_string(),
        (None, IpAddr::V4(v4)) => v4.to_string().replace('.', "-"),
        (None, IpAddr::V6(v6)) => v6.segments().map(|part| format!("{part:x}")).join("-"),
    }
}

fn srv_name(base: &Name, port: &str, protocol: Protocol) -> Result<Name, BadName> {
    base.child(&format!("_{}", protocol.to_string().to_ascii_lowercase()))?
        .child(&format!("_{port}"))
}
