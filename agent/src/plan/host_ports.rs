//! Ports of the node that lead to a pod, as runtimes ask for them (`hostPort` in a Pod's spec).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use cluster_model::ServiceKey;
use keelway_cni::{PortMapping, PortProtocol};

use super::{Policy, PortKey, PortPlan, Route, ServicePlan};
use crate::dataplane::{Frontend, Protocol, ServiceBackends};

/// The namespace of these plans, which no object of the API can have.
const NAMESPACE: &str = "host-ports/";

/// The key of the plan for a pod, by the host's side of its veth.
pub fn host_ports_key(host_interface: &str) -> ServiceKey {
    ServiceKey::new(NAMESPACE, host_interface)
}

/// Plans the ports of one pod. They lead to it alone, from everywhere, and the client's address is kept.
pub fn plan_host_ports(
    host_interface: &str,
    addresses: &[IpAddr],
    mappings: &[PortMapping],
) -> ServicePlan {
    let mut plan = ServicePlan::default();
    for (number, mapping) in mappings.iter().enumerate() {
        for address in addresses {
            let ipv4 = address.is_ipv4();
            if mapping.host_ip.is_some_and(|ip| ip.is_ipv4() != ipv4) {
                continue;
            }
            let every: IpAddr = if ipv4 {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            };
            let key = PortKey {
                service: host_ports_key(host_interface),
                port: number.to_string().into(),
                ipv4,
                policy: Policy::Local,
            };
            let frontend = Frontend {
                addr: mapping.host_ip.unwrap_or(every),
                port: mapping.host_port,
                protocol: match mapping.protocol {
                    PortProtocol::Tcp => Protocol::Tcp,
                    PortProtocol::Udp => Protocol::Udp,
                    PortProtocol::Sctp => Protocol::Sctp,
                },
            };
            let route = Route {
                internal: key.clone(),
                external: key.clone(),
                guarded: false,
            };
            plan.frontends.insert(frontend, route);
            let backends = ServiceBackends {
                active: vec![SocketAddr::new(*address, mapping.container_port)],
                ..ServiceBackends::default()
            };
            let port = PortPlan {
                backends,
                ..PortPlan::default()
            };
            plan.ports.insert(key, port);
        }
    }
    plan
}

/// Whether two mappings want the same port of the node.
pub fn collide(a: &PortMapping, b: &PortMapping) -> bool {
    let same_address = match (a.host_ip, b.host_ip) {
        (Some(a), Some(b)) => a == b,
        _ => true,
    };
    a.host_port == b.host_port && a.protocol == b.protocol && same_address
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::check;

    fn mapping(host_port: u16, host_ip: Option<&str>) -> PortMapping {
        PortMapping {
            host_port,
            container_port: 80,
            protocol: PortProtocol::Tcp,
            host_ip: host_ip.map(|text| text.parse().expect("an address")),
        }
    }

    #[test]
    fn every_address_of_a_pod_has_its_ports_and_the_plan_is_sound() {
        let addresses = ["10.244.1.3", "fd00::3"].map(|text| text.parse().expect("an address"));
        let mappings = [mapping(8080, None), mapping(8443, Some("198.18.0.1"))];
        let plan = plan_host_ports("kw0123456789ab", &addresses, &mappings);
        assert_eq!((plan.frontends.len(), plan.ports.len()), (3, 3));
        check(&plan).expect("sound");
        assert_eq!(
            plan_host_ports("kw0123456789ab", &addresses, &[]),
            ServicePlan::default()
        );
    }

    #[test]
    fn mappings_collide_on_one_address_or_on_all() {
        let all = mapping(80, None);
        let (one, other) = (
            mapping(80, Some("198.18.0.1")),
            mapping(80, Some("198.18.0.2")),
        );
        assert!(collide(&all, &one) && collide(&one, &one) && !collide(&one, &other));
        assert!(!collide(&all, &mapping(81, None)));
        let udp = PortMapping {
            protocol: PortProtocol::Udp,
            ..all.clone()
        };
        assert!(!collide(&all, &udp));
    }
}
