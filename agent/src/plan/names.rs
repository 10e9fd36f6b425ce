//! Which names are answered at pods' interfaces, and who else would be asked: pure functions of the snapshot.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use cluster_model::share::Rules;
use cluster_model::{Protocol, ServiceKey, Snapshot};
use dataplane_abi::{FrontendKey, NameAddresses, NameKey, limits, name_key, proto};
use keelway_dns::name::{BadName, Name};
use keelway_dns::{Naming, Owner, Record, plan as plan_records, undashed};

const DNS_PORT: u16 = 53;

/// Names with their addresses, by the key that the program finds them by.
pub type Names = BTreeMap<NameKey, NameAddresses>;

/// How names are made and found.
#[derive(Clone, Debug)]
pub struct Domains {
    origins: Vec<Name>,
    naming: Naming,
    /// The key of keys.
    seed: [u64; 2],
}

impl Domains {
    pub fn new(rules: &Rules, seed: [u64; 2]) -> Result<Self, BadName> {
        let origins = rules.origins.iter().map(|origin| Name::parse(origin));
        let origins: Vec<Name> = origins.collect::<Result<_, _>>()?;
        let longest = origins.iter().map(|origin| origin.wire().len()).max();
        let naming = Naming {
            origin_bytes_max: longest.unwrap_or_default(),
            endpoint_pod_names: rules.endpoint_pod_names,
        };
        Ok(Self {
            origins,
            naming,
            seed,
        })
    }

    fn key(&self, name: &Name) -> NameKey {
        let wire = name.wire();
        let word = |i: usize| {
            let mut bytes = [0; 8];
            let rest = &wire[i * 8..];
            let taken = rest.len().min(8);
            bytes[..taken].copy_from_slice(&rest[..taken]);
            u64::from_le_bytes(bytes)
        };
        name_key(self.seed, wire.len(), word, |_| {})
    }
}

/// The names of one Service that can be answered from a few addresses. Aliases and those with many addresses are the server's, and so are
/// endpoints' that spell their address: there are as many as endpoints, and nobody asks for them who has not been answered by the server.
pub fn plan_names(domains: &Domains, snapshot: &Snapshot, key: &ServiceKey) -> Names {
    let mut names = Names::new();
    for (owner, mut records) in plan_records(domains.naming, snapshot, key) {
        let Owner::Cluster(relative) = owner else {
            continue;
        };
        let first = relative.wire().split_first();
        let first = first.and_then(|(length, rest)| rest.get(..usize::from(*length)));
        if first.is_some_and(|label| undashed(label).is_some()) {
            continue;
        }
        // In the order in which the server's zone keeps them.
        records.sort_unstable();
        let Some(addresses) = addresses(&records) else {
            continue;
        };
        for origin in &domains.origins {
            let name = relative.under(origin);
            let (Ok(name_bytes), Ok(before)) = (
                u8::try_from(name.wire().len()),
                u8::try_from(relative.wire().len()),
            ) else {
                continue;
            };
            let found = NameAddresses {
                name_bytes,
                before,
                ..addresses
            };
            let key = domains.key(&name);
            names.insert(key, found.under(&key));
        }
    }
    names
}

fn addresses(records: &[Record]) -> Option<NameAddresses> {
    let mut found = NameAddresses::NONE;
    for record in records {
        match record {
            Record::A(v4) => {
                *found.v4.get_mut(usize::from(found.v4_count))? = u32::from_ne_bytes(v4.octets());
                found.v4_count += 1;
            }
            Record::Aaaa(v6) => {
                *found.v6.get_mut(usize::from(found.v6_count))? = (*v6).into();
                found.v6_count += 1;
            }
            _ => return None,
        }
    }
    (found.v4_count + found.v6_count > 0).then_some(found)
}

/// Where questions for a DNS server are sent by way of one Service: the Service's addresses, and those of the server that sockets are given
/// in their place. None when it is not a Service of the server: another one may listen at the same address, on another port.
pub fn plan_servers(
    snapshot: &Snapshot,
    service: &ServiceKey,
    server: &[IpAddr],
) -> BTreeSet<FrontendKey> {
    let key = |ip: IpAddr| FrontendKey::new(ip.into(), DNS_PORT.to_be(), proto::UDP);
    let is_dns = |protocol, port| protocol == Protocol::Udp && port == DNS_PORT;
    let Some(object) = snapshot.service(service) else {
        return BTreeSet::new();
    };
    let mut servers = BTreeSet::new();
    // The Service's ports that lead to the server.
    let mut leading = BTreeSet::new();
    for slice in snapshot.slices(service) {
        let ports = slice.ports.iter();
        let ports = ports.filter(|port| is_dns(port.protocol, port.port));
        let names: Vec<_> = ports.map(|port| &port.name).collect();
        let own = slice.endpoints.iter().map(|endpoint| endpoint.address);
        for address in own.filter(|address| !names.is_empty() && server.contains(address)) {
            servers.insert(key(address));
            leading.extend(names.iter().copied());
        }
    }
    let mut ports = object.ports.iter();
    if ports.any(|port| is_dns(port.protocol, port.port) && leading.contains(&port.name)) {
        servers.extend(object.cluster_ips.iter().copied().map(key));
    }
    servers
}

/// What the map of names holds, and what it is yet to hold.
#[derive(Debug, Default)]
pub struct NameLedger {
    wished: HashMap<ServiceKey, Box<[NameKey]>>,
    count: usize,
    /// Changes that are not in the map yet.
    due: BTreeMap<NameKey, Option<NameAddresses>>,
    /// Services whose names found no room: the server's to answer.
    left_out: BTreeSet<ServiceKey>,
}

impl NameLedger {
    /// Takes over a Service's new names.
    pub fn set(&mut self, key: &ServiceKey, mut names: Names) {
        let old = self.wished.remove(key).unwrap_or_default();
        self.count -= old.len();
        if self.count + names.len() > limits::DNS_NAMES as usize {
            names.clear();
            self.left_out.insert(key.clone());
        } else {
            self.left_out.remove(key);
        }
        let gone = old.iter().filter(|name| !names.contains_key(name));
        self.due.extend(gone.map(|name| (*name, None)));
        if !names.is_empty() {
            self.count += names.len();
            self.wished
                .insert(key.clone(), names.keys().copied().collect());
        }
        let found = names.into_iter().map(|(name, found)| (name, Some(found)));
        self.due.extend(found);
    }

    /// Lets go of all names.
    pub fn clear(&mut self) {
        let gone = self.wished.drain().flat_map(|(_, names)| names);
        self.due.extend(gone.map(|name| (name, None)));
        self.left_out.clear();
        self.count = 0;
    }

    /// What is to be removed and what to be set.
    pub fn due(&self) -> (Vec<NameKey>, Vec<(NameKey, NameAddresses)>) {
        let gone = self.due.iter().filter(|(_, found)| found.is_none());
        let set = self.due.iter();
        let set = set.filter_map(|(name, found)| Some((*name, (*found)?)));
        (gone.map(|(name, _)| *name).collect(), set.collect())
    }

    /// Whether nothing is due.
    pub fn is_settled(&self) -> bool {
        self.due.is_empty()
    }

    /// All that was due is done.
    pub fn applied(&mut self) {
        self.due = BTreeMap::new();
    }

    /// Names that are answered.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Services for whose names there is no room.
    pub fn left_out(&self) -> usize {
        self.left_out.len()
    }
}

#[cfg(test)]
mod tests {
    use cluster_model::{Change, Dirty, read_manifest};

    use super::*;

    const SERVER: [u8; 4] = [198, 18, 0, 2];

    /// Addresses that questions for a Service are answered at, whose ports 53 and 54 lead to these of an endpoint at the server's address.
    fn servers(ports: [u16; 2]) -> Vec<String> {
        let manifest = format!(
            r#"[{{"kind":"Service","metadata":{{"name":"dns","namespace":"x"}},"spec":{{"clusterIP":"10.96.0.10","clusterIPs":["10.96.0.10"],
                "ports":[{{"name":"dns","port":53,"protocol":"UDP"}},{{"name":"other","port":54,"protocol":"UDP"}}]}}}},
            {{"kind":"EndpointSlice","addressType":"IPv4","metadata":{{"name":"dns-1","namespace":"x","labels":{{"kubernetes.io/service-name":"dns"}}}},
                "ports":[{{"name":"dns","port":{},"protocol":"UDP"}},{{"name":"other","port":{},"protocol":"UDP"}}],
                "endpoints":[{{"addresses":["198.18.0.2"],"conditions":{{"ready":true}}}}]}}]"#,
            ports[0], ports[1]
        );
        let mut snapshot = Snapshot::default();
        for object in read_manifest(manifest.as_bytes()).expect("a manifest") {
            snapshot.apply(Change::Upsert(object), &mut Dirty::default());
        }
        let found = plan_servers(&snapshot, &ServiceKey::new("x", "dns"), &[SERVER.into()]);
        let expected = |ip: [u8; 4]| {
            let ip = IpAddr::from(ip);
            FrontendKey::new(ip.into(), DNS_PORT.to_be(), proto::UDP)
        };
        let named = [("service", [10, 96, 0, 10]), ("server", SERVER)];
        let named = named
            .into_iter()
            .filter(|(_, ip)| found.contains(&expected(*ip)));
        let named: Vec<String> = named.map(|(name, _)| name.to_owned()).collect();
        assert_eq!(named.len(), found.len());
        named
    }

    #[test]
    fn another_server_at_the_same_address_is_not_spoken_for() {
        assert_eq!(servers([53, 5353]), ["service", "server"]);
        // On the host's network, both have the node's address.
        assert!(servers([5353, 5354]).is_empty());
        // The port by which names are asked for leads to the other one.
        assert_eq!(servers([5353, 53]), ["server"]);
    }
}
