//! The cluster that every subject is given: the same addresses, the same Services, whoever serves them.

use std::net::Ipv4Addr;

use keelway_tests::sandbox::Network;

use crate::load::Metric;

/// Services that are measured: one that leads to the server beside the client, one to the server on the other node.
pub const MEASURED: usize = 2;
pub const SERVICE_RANGE: &str = "10.96.0.0/12";
pub const POD_RANGE: &str = "10.244.0.0/16";
const FIRST_SERVICE: u32 = u32::from_be_bytes([10, 96, 0, 100]);
/// Where the endpoints are of Services that nobody asks.
const FIRST_ENDPOINT: u32 = u32::from_be_bytes([10, 128, 0, 1]);
const FIRST_NODE_PORT: u16 = 30_000;

/// A pod without containers: a namespace with an address.
pub struct Pod {
    pub network: Network,
    pub address: Ipv4Addr,
}

/// A Service with one endpoint.
pub struct Service {
    pub address: Ipv4Addr,
    pub ports: Vec<Port>,
    pub endpoint: Ipv4Addr,
    /// The node that the endpoint is on.
    pub node: &'static str,
}

/// A port that is the same at the Service and at its endpoint.
pub struct Port {
    pub number: u16,
    pub protocol: &'static str,
    pub node_port: Option<u16>,
}

/// So many Services: the measured ones first, with a port per metric; then those that only take up room, with one port.
pub fn services(count: usize, servers: [Ipv4Addr; MEASURED]) -> Vec<Service> {
    (0..count)
        .map(|index| {
            let measured = servers.get(index).copied();
            Service {
                address: service_address(index),
                ports: match measured {
                    Some(_) => Metric::ALL
                        .into_iter()
                        .map(|metric| Port {
                            number: metric.port(),
                            protocol: metric.protocol(),
                            node_port: Some(node_port(index, metric)),
                        })
                        .collect(),
                    None => vec![Port {
                        number: 80,
                        protocol: "TCP",
                        node_port: None,
                    }],
                },
                endpoint: measured
                    .unwrap_or_else(|| Ipv4Addr::from_bits(FIRST_ENDPOINT + index as u32)),
                node: if index == 0 { "node-1" } else { "node-2" },
            }
        })
        .collect()
}

pub fn service_address(index: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(FIRST_SERVICE + index as u32)
}

/// The nodes' port that leads to the server of a measured Service.
pub const fn node_port(service: usize, metric: Metric) -> u16 {
    FIRST_NODE_PORT + 100 * service as u16 + metric.port() - Metric::RoundTrip.port()
}

pub fn node_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, 0, 10 + number)
}
