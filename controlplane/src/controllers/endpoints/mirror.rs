//! Slices that mirror Endpoints which a user keeps for a Service without a selector: proxies read slices only.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{EndpointAddress, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort};

use super::super::labels::Labels;
use super::super::object::{Key, Object};
use super::super::plan::{Controller, Keys, Plan, View};
use super::super::pods::controller_reference;
use super::super::snapshot::{Change, SERVICE_NAME_LABEL, Snapshot, service_of_slice};
use super::desired::Shape;
use super::reconcile::{self, Origin};
use super::{HEADLESS_LABEL, MANAGED_BY_LABEL, TRIGGER_TIME, is_staying, subsets};

const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP_LABEL: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Annotation of Endpoints that are somebody's lock, not endpoints.
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
pub const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Addresses of one subset that are mirrored: upstream's bound.
const ADDRESSES_MAX: usize = 1000;

pub const CONTROLLER: Controller = Controller {
    name: "endpointslice-mirroring",
    affected,
    plan,
};

fn affected(_: &Snapshot, change: &Change, keys: &mut Keys) {
    for state in change.states() {
        match state {
            Object::Endpoints(_) | Object::Service(_) => {
                keys.insert(Key::of(state.meta()));
            }
            Object::EndpointSlice(slice) => {
                let labels = slice.metadata.labels.as_ref();
                if labels
                    .and_then(|labels| labels.get(MANAGED_BY_LABEL))
                    .map(String::as_str)
                    == Some(MANAGER)
                {
                    keys.extend(service_of_slice(slice));
                }
            }
            _ => {}
        }
    }
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let endpoints = view.snapshot.endpoints.get(key);
    let service = view.snapshot.services.get(key);
    let mirrored = match (endpoints, service) {
        (Some(endpoints), Some(service)) if is_mirrored(endpoints, service) => Some(endpoints),
        _ => None,
    };
    let origin = Origin {
        service: key.clone(),
        manager: MANAGER,
        owner: mirrored
            .map(|endpoints| controller_reference(&**endpoints))
            .unwrap_or_default(),
        labels: mirrored.map(|found| labels(found, key)).unwrap_or_default(),
        annotations: Some(
            mirrored
                .and_then(|endpoints| endpoints.metadata.annotations.clone())
                .unwrap_or_default()
                .into_iter()
                .filter(|(name, _)| name != LAST_APPLIED && name != TRIGGER_TIME)
                .collect(),
        ),
        trigger_time: None,
        is_staying: mirrored.is_none_or(|found| is_staying(view.snapshot, &found.metadata)),
    };
    // Without anything to mirror there are no groups, and the slices that are left go.
    let groups = mirrored.map(|found| groups(found)).unwrap_or_default();
    reconcile::plan(view.snapshot, &origin, groups, &mut plan);
    plan
}

fn is_mirrored(endpoints: &Endpoints, service: &Service) -> bool {
    let meta = &endpoints.metadata;
    let label = |name: &str| meta.labels.as_ref().and_then(|labels| labels.get(name));
    let selects = service
        .spec
        .as_ref()
        .and_then(|spec| spec.selector.as_ref())
        .is_some_and(|selector| !selector.is_empty());
    !selects
        && label(SKIP_LABEL).map(String::as_str) != Some("true")
        && label(subsets::MANAGED_BY).map(String::as_str) != Some(subsets::MANAGER)
        && !meta
            .annotations
            .as_ref()
            .is_some_and(|annotations| annotations.contains_key(LEADER))
}

fn labels(endpoints: &Endpoints, service: &Key) -> Labels {
    let mut labels = endpoints.metadata.labels.clone().unwrap_or_default();
    labels.remove(HEADLESS_LABEL);
    labels.insert(SERVICE_NAME_LABEL.into(), service.name.to_string());
    labels.insert(MANAGED_BY_LABEL.into(), MANAGER.into());
    labels
}

fn groups(endpoints: &Endpoints) -> BTreeMap<Shape, Vec<Endpoint>> {
    let mut groups: BTreeMap<Shape, Vec<Endpoint>> = BTreeMap::new();
    for subset in endpoints.subsets.iter().flatten() {
        let ports: Vec<_> = subset
            .ports
            .iter()
            .flatten()
            .map(|port| EndpointPort {
                name: Some(port.name.clone().unwrap_or_default()),
                protocol: port.protocol.clone(),
                port: Some(port.port),
                app_protocol: port.app_protocol.clone(),
            })
            .collect();
        let ready = subset
            .addresses
            .iter()
            .flatten()
            .map(|address| (address, true));
        let not_ready = subset.not_ready_addresses.iter().flatten();
        let all = ready.chain(not_ready.map(|address| (address, false)));
        for (address, ready) in all.take(ADDRESSES_MAX) {
            let family = match address.ip.parse::<IpAddr>() {
                Ok(IpAddr::V4(_)) => "IPv4",
                Ok(IpAddr::V6(_)) => "IPv6",
                Err(_) => continue,
            };
            groups
                .entry(Shape::of_ports(family, &ports))
                .or_default()
                .push(endpoint(address, ready));
        }
    }
    groups
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            ..Default::default()
        }),
        hostname: address.hostname.clone(),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Default::default()
    }
}
