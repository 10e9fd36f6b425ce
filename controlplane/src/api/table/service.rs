//! How Services and their endpoints print.

use serde_json::Value;

use super::{Printer, column, created, name, or_none, pairs, wide};
use crate::api::fields::Fields;

/// How many endpoints or ports are spelt out before "+ N more...".
const SPELT_OUT_MAX: usize = 3;

pub(super) static SERVICE: Printer = Printer {
    columns: &[
        column("Name"),
        column("Type"),
        column("Cluster-IP"),
        column("External-IP"),
        column("Port(s)"),
        column("Age"),
        wide("Selector"),
    ],
    cells: |service| {
        let cluster_ip = service
            .items("/spec/clusterIPs")
            .first()
            .and_then(Value::as_str);
        vec![
            name(service),
            service.text("/spec/type").into(),
            or_none(cluster_ip.unwrap_or(service.text("/spec/clusterIP"))).into(),
            external_ip(service).into(),
            ports(service).into(),
            created(service),
            pairs(service.object("/spec/selector")).into(),
        ]
    },
};

fn external_ip(service: &Value) -> String {
    let mut addresses: Vec<&str> = Vec::new();
    match service.text("/spec/type") {
        "ExternalName" => return service.text("/spec/externalName").to_owned(),
        "LoadBalancer" => {
            let given = service.items("/status/loadBalancer/ingress").iter();
            addresses.extend(given.map(|i| {
                if i.has("/ip") {
                    i.text("/ip")
                } else {
                    i.text("/hostname")
                }
            }));
            addresses.extend(
                service
                    .items("/spec/externalIPs")
                    .iter()
                    .filter_map(Value::as_str),
            );
            if addresses.is_empty() {
                return "<pending>".to_owned();
            }
        }
        _ => addresses.extend(
            service
                .items("/spec/externalIPs")
                .iter()
                .filter_map(Value::as_str),
        ),
    }
    or_none(&addresses.join(","))
}

fn ports(service: &Value) -> String {
    let ports: Vec<String> = service
        .items("/spec/ports")
        .iter()
        .map(|port| match port.int("/nodePort") {
            0 => format!("{}/{}", port.int("/port"), port.text("/protocol")),
            node_port => format!(
                "{}:{node_port}/{}",
                port.int("/port"),
                port.text("/protocol")
            ),
        })
        .collect();
    or_none(&ports.join(","))
}

pub(super) static ENDPOINTS: Printer = Printer {
    columns: &[column("Name"), column("Endpoints"), column("Age")],
    cells: |endpoints| {
        let mut all = Vec::new();
        for subset in endpoints.items("/subsets") {
            for address in subset.items("/addresses") {
                let ip = address.text("/ip");
                if subset.items("/ports").is_empty() {
                    all.push(ip.to_owned());
                }
                all.extend(
                    subset
                        .items("/ports")
                        .iter()
                        .map(|port| format!("{ip}:{}", port.int("/port"))),
                );
            }
        }
        vec![
            name(endpoints),
            shortened(all, "<none>").into(),
            created(endpoints),
        ]
    },
};

pub(super) static ENDPOINT_SLICE: Printer = Printer {
    columns: &[
        column("Name"),
        column("AddressType"),
        column("Ports"),
        column("Endpoints"),
        column("Age"),
    ],
    cells: |slice| {
        let port = |port: &Value| match (port.text("/name"), port.int("/port")) {
            (_, 0) => "*".to_owned(),
            (_, number) => number.to_string(),
        };
        let addresses = slice
            .items("/endpoints")
            .iter()
            .flat_map(|e| e.items("/addresses"))
            .filter_map(Value::as_str);
        vec![
            name(slice),
            slice.text("/addressType").into(),
            shortened(slice.items("/ports").iter().map(port).collect(), "<unset>").into(),
            shortened(addresses.map(str::to_owned).collect(), "<unset>").into(),
            created(slice),
        ]
    },
};

fn shortened(mut items: Vec<String>, when_empty: &str) -> String {
    if items.is_empty() {
        return when_empty.to_owned();
    }
    let more = items.len().saturating_sub(SPELT_OUT_MAX);
    items.truncate(SPELT_OUT_MAX);
    let list = items.join(",");
    if more > 0 {
        format!("{list} + {more} more...")
    } else {
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_service_prints_addresses_and_node_ports() {
        let service = json!({"metadata": {"name": "web"}, "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.9",
            "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}});
        let cells = (SERVICE.cells)(&service);
        assert_eq!(
            cells[1..5],
            [
                "LoadBalancer",
                "10.96.0.9",
                "<pending>",
                "80:30080/TCP,53/UDP"
            ]
            .map(Value::from)
        );
    }

    #[test]
    fn long_endpoint_lists_are_cut() {
        let endpoints: Vec<Value> = (1..6)
            .map(|n| json!({"addresses": [format!("10.0.0.{n}")]}))
            .collect();
        let cells = (ENDPOINT_SLICE.cells)(&json!({"endpoints": endpoints, "addressType": "IPv4"}));
        assert_eq!(cells[2], "<unset>");
        assert_eq!(cells[3], "10.0.0.1,10.0.0.2,10.0.0.3 + 2 more...");
    }
}
