//! What DNS needs of an object: the rest is let go before it is kept, which is most of a cluster's memory.

use std::sync::Arc;

use cluster_model::{Change, Endpoint, EndpointPort, EndpointSlice, Object};

/// A change without what no record is made of: nodes, zones and hints of endpoints.
pub fn slim(change: Change) -> Change {
    match change {
        Change::Upsert(object) => Change::Upsert(slim_object(object)),
        Change::Replace(kind, objects) => {
            Change::Replace(kind, objects.into_iter().map(slim_object).collect())
        }
        Change::Remove(reference) => Change::Remove(reference),
    }
}

fn slim_object(object: Object) -> Object {
    match object {
        Object::EndpointSlice(slice) => Object::EndpointSlice(Arc::new(slim_slice(&slice))),
        other => other,
    }
}

fn slim_slice(slice: &EndpointSlice) -> EndpointSlice {
    let endpoint = |endpoint: &Endpoint| Endpoint {
        address: endpoint.address,
        conditions: endpoint.conditions,
        node_name: None,
        zone: None,
        hostname: endpoint.hostname.clone(),
        // Endpoints may be called by their pods.
        target: endpoint.target.clone(),
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
    }
}
