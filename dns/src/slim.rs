//! What DNS needs of an object: the rest is let go before it is kept, which is most of a cluster's memory.

use std::sync::Arc;

use cluster_model::{Endpoint, EndpointPort, EndpointSlice, Object};

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
        other => other,
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
        ports: slice.ports.iter().map(port).collect(),
        endpoints: slice.endpoints.iter().map(endpoint).collect(),
        refused: Vec::new(),
        last_change: None,
    }
}
