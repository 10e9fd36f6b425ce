//! What DNS needs of an object: the rest is let go before it is kept, which is most of a cluster's memory.

use std::sync::Arc;

use cluster_model::{Endpoint, EndpointPort, EndpointSlice, Object, Service, ServicePort};

/// An object without what no record is made of: nodes, zones and hints of endpoints.
pub fn slim(object: Object) -> Object {
    slim_but(object, false)
}

/// As [`slim`], with the pods that endpoints may be called by.
pub fn slim_with_pods(object: Object) -> Object {
    slim_but(object, true)
}

fn slim_but(object: Object, pods: bool) -> Object {
    match object {
        Object::EndpointSlice(slice) => Object::EndpointSlice(Arc::new(slim_slice(&slice, pods))),
        Object::Service(service) => Object::Service(Arc::new(slim_service(&service))),
        other => other,
    }
}

/// Without what balances: node ports, policies, other addresses.
fn slim_service(service: &Service) -> Service {
    let port = |port: &ServicePort| ServicePort {
        node_port: None,
        app_protocol: None,
        ..port.clone()
    };
    Service {
        service_type: service.service_type,
        cluster_ips: service.cluster_ips.clone(),
        headless: service.headless,
        external_name: service.external_name.clone(),
        ports: service.ports.iter().map(port).collect(),
        publish_not_ready: service.publish_not_ready,
        ..Service::named(service.key.clone())
    }
}

fn slim_slice(slice: &EndpointSlice, pods: bool) -> EndpointSlice {
    let endpoint = |endpoint: &Endpoint| Endpoint {
        address: endpoint.address,
        conditions: endpoint.conditions,
        node_name: None,
        zone: None,
        hostname: endpoint.hostname.clone(),
        target: endpoint.target.clone().filter(|_| pods),
        for_zones: Vec::new(),
        for_nodes: Vec::new(),
    };
    let port = |port: &EndpointPort| EndpointPort {
        app_protocol: None,
        ..port.clone()
    };
    EndpointSlice {
        key: slice.key.clone(),
        service: slice.service.clone(),
        headless: false,
        ports: slice.ports.iter().map(port).collect(),
        endpoints: slice.endpoints.iter().map(endpoint).collect(),
        refused: Vec::new(),
        last_change: None,
    }
}
