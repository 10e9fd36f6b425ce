//! Any sequence of changes against planning from nothing.

use super::*;

fn any_service() -> impl Strategy<Value = Object> {
    let ports = prop::collection::btree_set(0usize..4, 0..3).prop_map(|set| {
        let all = [
            ("http", Protocol::Tcp, 80),
            ("web", Protocol::Tcp, 80),
            ("dns", Protocol::Udp, 53),
            ("s", Protocol::Sctp, 9),
        ];
        let mut ports: Vec<ServicePort> = set
            .into_iter()
            .map(|i| service_port(all[i].0, all[i].1, all[i].2))
            .collect();
        // The API refuses the same port and protocol twice.
        ports.dedup_by_key(|port| (port.protocol, port.port));
        ports
    });
    let exposed = (
        prop::sample::select(vec![
            ServiceType::ClusterIp,
            ServiceType::NodePort,
            ServiceType::LoadBalancer,
        ]),
        prop::sample::select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]),
        prop::sample::select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]),
        prop::sample::subsequence(vec![1u8, 2], 0..2),
        prop::sample::subsequence(vec!["203.0.113.0/24", "10.0.0.0/8"], 0..2),
        prop::option::of(1u32..3),
    );
    let distribution = prop::sample::select(vec![
        TrafficDistribution::Any,
        TrafficDistribution::SameNode,
        TrafficDistribution::SameZone,
    ]);
    (
        prop::sample::select(vec!["a", "b", "web"]),
        1u8..4,
        ports,
        distribution,
        any::<bool>(),
        exposed,
    )
        .prop_map(
            |(name, ip, mut ports, traffic_distribution, headless, exposed)| {
                let (service_type, internal, external, addresses, ranges, affinity_timeout_s) =
                    exposed;
                let address = |last: &u8| [192, 0, 2, *last].into();
                for port in &mut ports {
                    port.node_port = Some(30_000 + port.port);
                }
                let base = Service {
                    service_type,
                    internal_traffic_policy: internal,
                    external_traffic_policy: external,
                    external_ips: addresses.iter().map(address).collect(),
                    load_balancer_ips: addresses.iter().rev().take(1).map(address).collect(),
                    load_balancer_source_ranges: ranges
                        .iter()
                        .map(|range| range.parse().unwrap())
                        .collect(),
                    affinity_timeout_s,
                    ..service(name, ip)
                };
                let cluster_ips = if headless {
                    vec![]
                } else {
                    base.cluster_ips.clone()
                };
                Object::Service(Arc::new(Service {
                    ports,
                    traffic_distribution,
                    headless,
                    cluster_ips,
                    ..base
                }))
            },
        )
}

fn any_slice() -> impl Strategy<Value = Object> {
    let node = prop::sample::select(vec![("node-1", "a"), ("node-2", "a"), ("node-3", "b")]);
    let condition = prop::sample::select(vec![READY, TERMINATING, NOT_READY]);
    let one = (1u8..6, node, condition, any::<bool>()).prop_map(
        |(ip, (node, zone), conditions, hinted)| Endpoint {
            for_zones: hinted.then(|| zone.into()).into_iter().collect(),
            ..endpoint(ip, node, zone, conditions)
        },
    );
    (
        prop::sample::select(vec!["s1", "s2", "s3"]),
        prop::sample::select(vec!["a", "b", "web"]),
        prop::collection::vec(one, 0..4),
    )
        .prop_map(|(name, service, endpoints)| {
            Object::EndpointSlice(Arc::new(slice(name, service, endpoints)))
        })
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => any_service().prop_map(Change::Upsert),
        4 => any_slice().prop_map(Change::Upsert),
        1 => any_service().prop_map(|object| Change::Remove(object.reference())),
        1 => any_slice().prop_map(|object| Change::Remove(object.reference())),
    ]
}

proptest! {
    /// Planning dirty keys only, batch by batch and across restarts of the agent, ends where planning everything from
    /// nothing ends.
    #[test]
    fn incremental_equals_full(batches in prop::collection::vec((prop::collection::vec(any_change(), 1..5), 0u8..8), 1..10)) {
        let (mut snapshot, mut state) = (Snapshot::default(), State::default());
        let mut ledger = Ledger::adopt(State::default());
        for (changes, dice) in batches {
            let mut dirty = Dirty::default();
            for change in changes {
                snapshot.apply(change, &mut dirty);
            }
            if dice == 0 {
                // The agent is killed, and a new one plans everything.
                state = full(&snapshot, state);
                ledger = Ledger::adopt(state.clone());
                for service in snapshot.services() {
                    ledger.set(&service.key, plan(&snapshot, &service.key, &here()));
                }
                prop_assert_eq!(ledger.diff().ops, vec![]);
                continue;
            }
            for key in &dirty.services {
                let wish = plan(&snapshot, key, &here());
                check(&wish).map_err(|violation| TestCaseError::fail(violation.to_string()))?;
                ledger.set(key, wish);
            }
            let batch = ledger.diff();
            apply(&mut state, &batch);
            ledger.applied(&batch);
            prop_assert_eq!(&ledger.held().frontends, &state.frontends);
            prop_assert_eq!(ledger.diff().ops, vec![]);
        }
        prop_assert_eq!(visible(&state), visible(&full(&snapshot, State::default())));
        let leads = state.frontends.values();
        prop_assert!(leads.clone().all(|lead| lead.internal.0 != 0 && lead.external.0 != 0));
        // Nothing is left of what no frontend leads to.
        let used: BTreeSet<ServiceId> = leads.flat_map(|lead| [lead.internal, lead.external]).collect();
        prop_assert_eq!(used, state.services.keys().copied().collect::<BTreeSet<_>>());
        prop_assert!(state.sources.keys().all(|id| state.services.contains_key(id)));
    }
}
