//! Node ports that a process of the node listens on too. As with kube-proxy the Service has such a port, and the process is hidden from
//! clients outside and in pods; unlike there, somebody is told.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use cluster_model::ServiceKey;

use crate::dataplane::{Frontend, Protocol};
use crate::plan::{Ledger, ServicePlan};

/// A port of the node, in one address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodePort {
    pub protocol: Protocol,
    pub port: u16,
    pub ipv4: bool,
}

/// The kernel's lists of sockets, with the protocol of each, and whether its addresses are IPv4.
const LISTS: [(&str, Protocol, bool); 4] = [
    ("tcp", Protocol::Tcp, true),
    ("tcp6", Protocol::Tcp, false),
    ("udp", Protocol::Udp, true),
    ("udp6", Protocol::Udp, false),
];
/// State of a TCP socket that listens, and of a UDP socket that is not connected.
const LISTENING: &str = "0A";
const UNCONNECTED: &str = "07";

/// Ports that somebody listens on in the network namespace that `proc_net` (`/proc/self/net`) shows.
pub fn listeners(proc_net: &Path) -> io::Result<BTreeSet<NodePort>> {
    let mut found = BTreeSet::new();
    for (name, protocol, ipv4) in LISTS {
        let file = match File::open(proc_net.join(name)) {
            Ok(file) => file,
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !ipv4 => continue,
            Err(error) => return Err(error),
        };
        for line in BufReader::new(file).lines().skip(1) {
            let line = line?;
            let Some((address, port, state)) = socket(&line) else {
                continue;
            };
            match (protocol, state) {
                (Protocol::Tcp, LISTENING) | (Protocol::Udp, UNCONNECTED) => {}
                // Those that listen come first; a busy node has very many of the others.
                (Protocol::Tcp, _) => break,
                _ => continue,
            }
            let (v4, v6) = reach(address);
            let heard = [(true, v4), (false, v6)];
            found.extend(
                heard
                    .into_iter()
                    .filter(|(_, hears)| *hears)
                    .map(|(ipv4, _)| NodePort {
                        protocol,
                        port,
                        ipv4,
                    }),
            );
        }
    }
    Ok(found)
}

/// In which families a socket at this address hears: one at `::` hears both, unless it was told not to, which the list does not say.
fn reach(address: IpAddr) -> (bool, bool) {
    match address {
        IpAddr::V4(_) => (true, false),
        IpAddr::V6(v6) if v6.is_unspecified() => (true, true),
        IpAddr::V6(v6) => (v6.to_ipv4_mapped().is_some(), v6.to_ipv4_mapped().is_none()),
    }
}

/// Local address, port and state of a line.
fn socket(line: &str) -> Option<(IpAddr, u16, &str)> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (address, port) = words.next()?.split_once(':')?;
    let state = words.nth(1)?;
    // Words of 32 bits as the machine holds them.
    let mut bytes = [0; 16];
    if !address.is_ascii() || !matches!(address.len(), 8 | 32) {
        return None;
    }
    for (at, place) in (0..address.len()).step_by(8).zip(bytes.chunks_exact_mut(4)) {
        let word = u32::from_str_radix(&address[at..at + 8], 16).ok()?;
        place.copy_from_slice(&word.to_ne_bytes());
    }
    let address = match address.len() {
        8 => IpAddr::from(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
        _ => IpAddr::from(Ipv6Addr::from(bytes)),
    };
    Some((address, u16::from_str_radix(port, 16).ok()?, state))
}

/// The node ports of all Services, and which of them are a process's too.
#[derive(Debug, Default)]
pub struct NodePorts {
    wished: BTreeMap<ServiceKey, BTreeSet<NodePort>>,
    shared: BTreeMap<ServiceKey, BTreeSet<NodePort>>,
    /// Something is wished that has not been looked for yet.
    due: bool,
}

impl NodePorts {
    /// Takes the ports of a Service from its plan.
    pub fn replan(&mut self, key: &ServiceKey, plan: &ServicePlan) {
        let ports: BTreeSet<NodePort> = plan
            .frontends
            .keys()
            .filter(|frontend| frontend.addr.is_unspecified())
            .map(|frontend| NodePort {
                protocol: frontend.protocol,
                port: frontend.port,
                ipv4: frontend.addr.is_ipv4(),
            })
            .collect();
        if ports.is_empty() {
            self.wished.remove(key);
            self.shared.remove(key);
        } else if self.wished.get(key) != Some(&ports) {
            self.wished.insert(key.clone(), ports);
            self.due = true;
        }
    }

    /// Whether there is anything to look for; `again` looks also for what has been looked for.
    pub fn take_due(&mut self, again: bool) -> bool {
        std::mem::take(&mut self.due) || (again && !self.wished.is_empty())
    }

    /// Compares with who listens. Gives what was not shared before: the Service that has the port, and the port.
    pub fn compare(
        &mut self,
        listeners: &BTreeSet<NodePort>,
        ledger: &Ledger,
    ) -> Vec<(ServiceKey, NodePort)> {
        let mut new = Vec::new();
        let before = std::mem::take(&mut self.shared);
        for (key, ports) in &self.wished {
            let has = |port: &&NodePort| {
                let frontend = Frontend {
                    addr: match port.ipv4 {
                        true => Ipv4Addr::UNSPECIFIED.into(),
                        false => Ipv6Addr::UNSPECIFIED.into(),
                    },
                    port: port.port,
                    protocol: port.protocol,
                };
                ledger.winner(&frontend) == Some(key)
            };
            let shared: BTreeSet<NodePort> =
                ports.intersection(listeners).filter(has).copied().collect();
            let known = before.get(key);
            new.extend(
                shared
                    .iter()
                    .filter(|port| known.is_none_or(|known| !known.contains(port)))
                    .map(|port| (key.clone(), *port)),
            );
            if !shared.is_empty() {
                self.shared.insert(key.clone(), shared);
            }
        }
        new
    }

    /// What is shared of a Service's ports, in words; each port once, whatever the families.
    pub fn shared_of(&self, key: &ServiceKey) -> Vec<String> {
        let ports = self.shared.get(key).into_iter().flatten();
        let ports: BTreeSet<(Protocol, u16)> =
            ports.map(|port| (port.protocol, port.port)).collect();
        ports
            .into_iter()
            .map(|(protocol, port)| words(protocol, port))
            .collect()
    }

    /// How many ports are shared.
    pub fn count(&self) -> usize {
        self.shared
            .keys()
            .map(|key| self.shared_of(key).len())
            .sum()
    }
}

fn words(protocol: Protocol, port: u16) -> String {
    format!(
        "a process of this node listens on {protocol} node port {port} too, and is hidden by the Service"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:7530 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:7531 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 0100007F:7532 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
";
    const TCP6: &str = "  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:7533 00000000000000000000000000000000:0000 0A 00000000:00000000
   1: 0000000000000000FFFF00000100007F:7534 00000000000000000000000000000000:0000 0A 00000000:00000000
   2: 00000000000000000000000001000000:7535 00000000000000000000000000000000:0000 0A 00000000:00000000
";
    const UDP: &str = "  sl  local_address rem_address   st
  10: 0100007F:7536 0100007F:0035 01 00000000:00000000
  11: 00000000:7537 00000000:0000 07 00000000:00000000
garbage
  12: zz:7538 00000000:0000 07
";

    fn listed() -> BTreeSet<NodePort> {
        let dir = tempfile::tempdir().unwrap();
        // Another byte order would print other words.
        if cfg!(target_endian = "little") {
            for (name, text) in [("tcp", TCP), ("tcp6", TCP6), ("udp", UDP)] {
                std::fs::write(dir.path().join(name), text).unwrap();
            }
        }
        listeners(dir.path()).unwrap()
    }

    #[test]
    fn sockets_that_listen_are_found_in_the_families_that_they_hear() {
        let found: Vec<(u16, bool)> = listed().iter().map(|port| (port.port, port.ipv4)).collect();
        let wished = [
            (0x7530, true),
            (0x7531, true),
            (0x7533, false),
            (0x7533, true),
            (0x7534, true),
            (0x7535, false),
            (0x7537, true),
        ];
        assert_eq!(found, wished);
    }
}
