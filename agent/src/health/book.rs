//! Which ports health checks listen on, and what they say: planned per Service, diffed against what is open.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cluster_model::{ServiceKey, ServiceType, Snapshot, TrafficPolicy};

/// A Service's health check on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    pub port: u16,
    /// Ready endpoints on this node.
    pub local_endpoints: u32,
}

/// Plans the health check of one Service: only a LoadBalancer with `externalTrafficPolicy: Local` has one.
pub fn plan(snapshot: &Snapshot, key: &ServiceKey, node: &Arc<str>) -> Option<HealthCheck> {
    let service = snapshot.service(key)?;
    if service.service_type != ServiceType::LoadBalancer
        || service.external_traffic_policy != TrafficPolicy::Local
        || service.proxy_name.is_some()
        || service.headless
    {
        return None;
    }
    let port = service.health_check_node_port?;
    let mut local: BTreeSet<IpAddr> = BTreeSet::new();
    let slices = snapshot.slices(key).iter();
    for slice in slices.filter(|slice| !slice.headless) {
        let here = slice
            .endpoints
            .iter()
            .filter(|one| one.node_name.as_ref() == Some(node));
        // One that terminates is not ready, and balancers shall stop sending before it is gone (KEP-1669).
        local.extend(
            here.filter(|one| one.conditions.ready)
                .map(|one| one.address),
        );
    }
    // A pod of a dual-stack Service has an address in each family, and is one endpoint.
    let of_family = |ipv4| local.iter().filter(|ip| ip.is_ipv4() == ipv4).count();
    let count = of_family(true).max(of_family(false));
    Some(HealthCheck {
        port,
        local_endpoints: u32::try_from(count).unwrap_or(u32::MAX),
    })
}

/// A change of what listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthOp {
    /// Listen on a port for a Service, in place of whichever had it.
    Open {
        port: u16,
        service: ServiceKey,
        local_endpoints: u32,
    },
    /// Answer with another number.
    Set {
        port: u16,
        local_endpoints: u32,
    },
    Close {
        port: u16,
    },
}

/// The health checks of all Services. Two that want one port cannot both have it: the one whose name comes first does.
#[derive(Debug, Default)]
pub struct Book {
    wishes: BTreeMap<ServiceKey, HealthCheck>,
    claims: BTreeMap<u16, BTreeSet<ServiceKey>>,
    /// What the servers were last told.
    held: BTreeMap<u16, (ServiceKey, u32)>,
    touched: BTreeSet<u16>,
}

impl Book {
    /// Records what a Service wants.
    pub fn set(&mut self, key: &ServiceKey, wish: Option<HealthCheck>) {
        let old = match wish {
            Some(wish) => self.wishes.insert(key.clone(), wish),
            None => self.wishes.remove(key),
        };
        if old == wish {
            return;
        }
        if let Some(old) = old {
            self.touched.insert(old.port);
            if let Some(claims) = self.claims.get_mut(&old.port) {
                claims.remove(key);
                if claims.is_empty() {
                    self.claims.remove(&old.port);
                }
            }
        }
        if let Some(wish) = wish {
            self.touched.insert(wish.port);
            self.claims
                .entry(wish.port)
                .or_default()
                .insert(key.clone());
        }
    }

    /// The Service that has the port which this one wants, when it is another.
    pub fn refused(&self, key: &ServiceKey) -> Option<(u16, &ServiceKey)> {
        let port = self.wishes.get(key)?.port;
        let winner = self.claims.get(&port)?.first()?;
        (winner != key).then_some((port, winner))
    }

    /// The port on which a Service's health check is to answer.
    pub fn wish(&self, key: &ServiceKey) -> Option<HealthCheck> {
        self.wishes.get(key).copied()
    }

    /// What has to change since the last diff. What comes out counts as done: a port that cannot be had is tried again by the servers.
    pub fn diff(&mut self) -> Vec<HealthOp> {
        let mut ops = Vec::new();
        for port in std::mem::take(&mut self.touched) {
            let winner = self.claims.get(&port).and_then(BTreeSet::first);
            let wish = winner.and_then(|key| {
                let count = self.wishes.get(key)?.local_endpoints;
                Some((key.clone(), count))
            });
            match (self.held.get(&port), &wish) {
                (Some(held), Some(wish)) if held == wish => {}
                (Some((had, _)), Some((has, count))) if had == has => ops.push(HealthOp::Set {
                    port,
                    local_endpoints: *count,
                }),
                (_, Some((service, count))) => ops.push(HealthOp::Open {
                    port,
                    service: service.clone(),
                    local_endpoints: *count,
                }),
                (Some(_), None) => ops.push(HealthOp::Close { port }),
                (None, None) => {}
            }
            match wish {
                Some(wish) => self.held.insert(port, wish),
                None => self.held.remove(&port),
            };
        }
        ops
    }
}

#[cfg(test)]
mod tests {
    use cluster_model::{Change, Dirty, Kind, read_manifest};
    use serde_json::json;

    use super::*;

    fn snapshot(spec: serde_json::Value, endpoints: serde_json::Value) -> Snapshot {
        let manifest = json!({"items": [
            {"kind": "Service", "metadata": {"namespace": "default", "name": "web"}, "spec": spec},
            {"kind": "EndpointSlice", "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 80}],
             "metadata": {"namespace": "default", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}}},
        ]});
        let objects = read_manifest(manifest.to_string().as_bytes()).unwrap();
        let mut snapshot = Snapshot::default();
        let of = |kind| {
            objects
                .iter()
                .filter(move |object| object.kind() == kind)
                .cloned()
                .collect()
        };
        for kind in [Kind::Service, Kind::EndpointSlice] {
            snapshot.apply(Change::Replace(kind, of(kind)), &mut Dirty::default());
        }
        snapshot
    }

    fn key(name: &str) -> ServiceKey {
        ServiceKey::new("default", name)
    }

    fn local() -> serde_json::Value {
        json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "externalTrafficPolicy": "Local",
               "healthCheckNodePort": 30_100, "ports": [{"port": 80}]})
    }

    #[test]
    fn ready_endpoints_of_this_node_are_counted_once() {
        let endpoints = json!([
            {"addresses": ["10.0.0.1"], "nodeName": "here"},
            {"addresses": ["10.0.0.1"], "nodeName": "here"},
            {"addresses": ["10.0.0.2"], "nodeName": "here", "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["10.0.0.3"], "nodeName": "there"},
            {"addresses": ["10.0.0.4"]},
        ]);
        let check = plan(&snapshot(local(), endpoints), &key("web"), &"here".into());
        assert_eq!(
            check,
            Some(HealthCheck {
                port: 30_100,
                local_endpoints: 1
            })
        );
    }

    #[test]
    fn only_a_load_balancer_with_policy_local_has_one() {
        for (field, value) in [
            ("type", json!("NodePort")),
            ("externalTrafficPolicy", json!("Cluster")),
            ("healthCheckNodePort", json!(0)),
            ("clusterIP", json!("None")),
        ] {
            let mut spec = local();
            spec[field] = value;
            let check = plan(&snapshot(spec, json!([])), &key("web"), &"here".into());
            assert_eq!(check, None, "{field}");
        }
        let none = plan(&Snapshot::default(), &key("web"), &"here".into());
        assert_eq!(none, None);
    }

    fn check(port: u16, local_endpoints: u32) -> Option<HealthCheck> {
        Some(HealthCheck {
            port,
            local_endpoints,
        })
    }

    #[test]
    fn a_server_is_opened_told_and_closed() {
        let mut book = Book::default();
        book.set(&key("a"), check(1, 0));
        let open = HealthOp::Open {
            port: 1,
            service: key("a"),
            local_endpoints: 0,
        };
        assert_eq!(book.diff(), [open]);
        book.set(&key("a"), check(1, 0));
        assert_eq!(book.diff(), []);
        book.set(&key("a"), check(1, 2));
        let set = HealthOp::Set {
            port: 1,
            local_endpoints: 2,
        };
        assert_eq!(book.diff(), [set]);
        book.set(&key("a"), None);
        assert_eq!(book.diff(), [HealthOp::Close { port: 1 }]);
    }

    #[test]
    fn a_contested_port_is_the_first_names_and_falls_to_the_next() {
        let mut book = Book::default();
        book.set(&key("b"), check(1, 5));
        book.diff();
        book.set(&key("a"), check(1, 3));
        assert_eq!(book.refused(&key("b")), Some((1, &key("a"))));
        assert_eq!(book.refused(&key("a")), None);
        let open = |service, local_endpoints| HealthOp::Open {
            port: 1,
            service,
            local_endpoints,
        };
        assert_eq!(book.diff(), [open(key("a"), 3)]);
        book.set(&key("a"), check(2, 3));
        assert_eq!(book.refused(&key("b")), None);
        let moved = HealthOp::Open {
            port: 2,
            service: key("a"),
            local_endpoints: 3,
        };
        assert_eq!(book.diff(), [open(key("b"), 5), moved]);
    }
}
