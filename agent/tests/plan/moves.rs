//! What comes of frontends that move from one Service to another, and of what is known before the cluster is.

use super::*;

/// A Service that is reached by its own address and this one.
fn reached(name: &str, ip: u8, external: &[u8]) -> Service {
    let addresses = external.iter().map(|last| [192, 0, 2, *last].into());
    Service {
        external_ips: addresses.collect(),
        ..service(name, ip)
    }
}

/// The ids that a turn renews, where the Services become these.
fn renewed(ledger: &mut Ledger, state: &mut State, services: Vec<Service>) -> Vec<ServiceId> {
    let cluster = snapshot(services, vec![]);
    let known: Vec<ServiceKey> = ledger.services().cloned().collect();
    let now = cluster.services().map(|service| service.key.clone());
    for key in known.into_iter().chain(now) {
        ledger.set(&key, plan(&cluster, &key, &here()));
    }
    let batch = ledger.diff();
    apply(state, &batch);
    ledger.applied(&batch);
    let last = batch
        .ops
        .iter()
        .rposition(|op| matches!(op, Op::SetFrontend { .. } | Op::RemoveFrontend { .. }));
    let renewals = batch
        .ops
        .iter()
        .enumerate()
        .filter_map(|(at, op)| match op {
            Op::RenewService { id, .. } => {
                assert!(Some(at) > last, "before what it is for");
                Some(*id)
            }
            _ => None,
        });
    renewals.collect()
}

#[test]
fn a_service_that_loses_an_address_and_goes_on_is_renewed() {
    let (mut ledger, mut state) = (Ledger::adopt(State::default()), State::default());
    let mut turn = |services: Vec<Service>| renewed(&mut ledger, &mut state, services);
    assert_eq!(turn(vec![reached("a", 1, &[7]), reached("b", 2, &[])]), []);
    assert_eq!(turn(vec![reached("a", 1, &[7]), reached("b", 2, &[8])]), []);
    let a = ServiceId(1);
    // To another Service, to nobody, and to nobody with the Service itself.
    assert_eq!(
        turn(vec![reached("a", 1, &[]), reached("b", 2, &[7, 8])]),
        [a]
    );
    assert_eq!(
        turn(vec![reached("a", 1, &[]), reached("b", 2, &[7])]).len(),
        1
    );
    assert_eq!(turn(vec![reached("a", 1, &[])]), []);
    // With another policy clients outside are led elsewhere, and those here are not.
    let exposed = |policy| Service {
        external_traffic_policy: policy,
        ..reached("a", 1, &[7])
    };
    assert_eq!(turn(vec![exposed(TrafficPolicy::Cluster)]), []);
    assert_eq!(turn(vec![exposed(TrafficPolicy::Local)]), [a]);
}

/// A Service with a node port, or with an address of a node and the same port.
fn at_node(name: &str, ip: u8, every: bool, external: &[u8]) -> Service {
    Service {
        service_type: ServiceType::NodePort,
        ports: vec![ServicePort {
            node_port: every.then_some(30080),
            ..service_port("http", Protocol::Tcp, 30080)
        }],
        ..reached(name, ip, external)
    }
}

#[test]
fn a_frontend_of_an_address_renews_what_it_shadows_at_all_of_them() {
    let (mut ledger, mut state) = (Ledger::adopt(State::default()), State::default());
    let mut turn = |services: Vec<Service>| renewed(&mut ledger, &mut state, services);
    let every = || at_node("a", 1, true, &[]);
    assert_eq!(turn(vec![every()]), []);
    let a = ServiceId(1);
    assert_eq!(turn(vec![every(), at_node("b", 2, false, &[7])]), [a]);
    // One more that it shadows for itself changes nothing; one that goes has what it shadowed asked again.
    let both = vec![at_node("a", 1, true, &[8]), at_node("b", 2, false, &[7])];
    assert_eq!(turn(both), []);
    let b = at_node("b", 2, false, &[]);
    assert_eq!(turn(vec![at_node("a", 1, true, &[8]), b]).len(), 1);
}

#[test]
fn what_waits_for_room_is_not_renewed_before_it_is_there() {
    let (mut ledger, mut state) = (Ledger::adopt(State::default()), State::default());
    let mut turn = |services: Vec<Service>, has_room: bool| {
        let cluster = snapshot(services, vec![]);
        for service in cluster.services() {
            ledger.set(&service.key, plan(&cluster, &service.key, &here()));
        }
        let batch = ledger.diff();
        if has_room {
            apply(&mut state, &batch);
            ledger.applied(&batch);
        } else {
            ledger.park();
        }
        batch
    };
    let every = at_node("a", 1, true, &[]);
    turn(vec![every.clone()], false);
    // It would shadow the frontend that is not there, of a service port that is not there.
    let batch = turn(vec![every, at_node("b", 2, false, &[7])], true);
    let renews = |op: &Op| matches!(op, Op::RenewService { .. });
    assert!(!batch.ops.is_empty() && !batch.ops.iter().any(renews));
}

/// Which service ports have clients by now that are to look where they are led, after each operation of a batch.
fn owe(owed: &mut BTreeSet<ServiceId>, state: &State, op: &Op) {
    let lead = |frontend: &dataplane::Frontend| {
        let led = state.frontends.get(frontend);
        led.or_else(|| state.frontends.get(&frontend.on_every_address()))
    };
    match op {
        Op::SetFrontend { frontend, lead: to } => {
            let had = lead(frontend)
                .map(|had| [(had.internal, to.internal), (had.external, to.external)]);
            let left = had.into_iter().flatten().filter(|(had, to)| had != to);
            owed.extend(left.map(|(had, _)| had));
        }
        Op::RemoveFrontend { frontend } => {
            let had = state.frontends.get(frontend).expect("was there");
            owed.extend([had.internal, had.external]);
        }
        Op::RenewService { id, .. } | Op::RemoveService { id } => {
            owed.remove(id);
        }
        _ => {}
    }
}

proptest! {
    #[test]
    fn whoever_was_led_elsewhere_looks_again_whatever_fails_on_the_way(
        // Of each turn: who has which addresses, how much of its batch comes into the maps, and whether it waits for room then.
        turns in prop::collection::vec((0u8..4, 0u8..4, any::<bool>(), 0usize..12, any::<bool>()), 1..8),
    ) {
        let (mut ledger, mut state) = (Ledger::adopt(State::default()), State::default());
        let mut owed = BTreeSet::new();
        let mut apply_some = |ledger: &mut Ledger, state: &mut State, count: usize, parks: bool| {
            let batch = ledger.diff();
            for op in batch.ops.iter().take(count) {
                owe(&mut owed, state, op);
                let one = Batch { ops: vec![op.clone()], refusals: vec![] };
                apply(state, &one);
            }
            if count >= batch.ops.len() {
                ledger.applied(&batch);
            } else {
                ledger.hold(state.clone());
                if parks {
                    ledger.park();
                }
            }
            owed.clone()
        };
        for (a, b, every, count, parks) in turns {
            let external = |bits: u8| -> Vec<u8> {
                [7u8, 8].into_iter().zip([1, 2]).filter(|(_, bit)| bits & bit != 0).map(|(ip, _)| ip).collect()
            };
            let services = vec![at_node("a", 1, every, &external(a)), at_node("b", 2, false, &external(b))];
            let cluster = snapshot(services, vec![]);
            for service in cluster.services() {
                ledger.set(&service.key, plan(&cluster, &service.key, &here()));
            }
            apply_some(&mut ledger, &mut state, count, parks);
        }
        ledger.resume();
        let still = apply_some(&mut ledger, &mut state, usize::MAX, false);
        prop_assert_eq!(still, BTreeSet::new());
    }
}

fn mapping(host_port: u16) -> keelway_cni::PortMapping {
    keelway_cni::PortMapping {
        host_port,
        container_port: 80,
        protocol: keelway_cni::PortProtocol::Tcp,
        host_ip: None,
    }
}

#[test]
fn ports_of_pods_are_there_before_services_are_known_and_take_nothing_of_theirs() {
    // What an earlier agent left: a Service with a node port.
    let web = Service {
        service_type: ServiceType::NodePort,
        ports: vec![ServicePort {
            node_port: Some(30080),
            ..service_port("http", Protocol::Tcp, 80)
        }],
        ..service("web", 1)
    };
    let slices = vec![slice(
        "web-1",
        "web",
        vec![endpoint(1, "node-1", "a", READY)],
    )];
    let cluster = snapshot(vec![web], slices);
    let mut state = full(&cluster, State::default());
    let mut ledger = Ledger::waiting(state.clone());
    let pod = |host_port| plan_host_ports("kw1", &[[10, 244, 0, 9].into()], &[mapping(host_port)]);
    let key = host_ports_key("kw1");
    assert!(!ledger.is_free_for(&pod(30080)));
    let turn = |ledger: &mut Ledger, state: &mut State| {
        let batch = ledger.diff();
        apply(state, &batch);
        ledger.applied(&batch);
    };
    let left = state.clone();
    for host_port in [8080, 8081] {
        assert!(ledger.is_free_for(&pod(host_port)));
        ledger.set(&key, pod(host_port));
        turn(&mut ledger, &mut state);
        let own = |frontend: &&dataplane::Frontend| !left.frontends.contains_key(*frontend);
        let ports: Vec<u16> = state
            .frontends
            .keys()
            .filter(own)
            .map(|one| one.port)
            .collect();
        assert_eq!(ports, [host_port]);
        assert!(
            left.frontends
                .iter()
                .all(|(at, lead)| state.frontends.get(at) == Some(lead))
        );
        assert!(
            left.services
                .iter()
                .all(|(id, had)| state.services.get(id) == Some(had))
        );
    }
    // The next agent finds what is this pod's, and the port goes with the pod.
    let mut next = Ledger::waiting(state.clone());
    assert!(next.is_free_for(&pod(8081)));
    next.set(&key, pod(8081));
    assert_eq!(next.diff().ops, []);
    next.set(&key, Default::default());
    turn(&mut next, &mut state);
    assert_eq!(state, left);
    // What nobody wants goes once all are known.
    next.judge_all();
    turn(&mut next, &mut state);
    assert!(state.services.is_empty() && state.frontends.is_empty() && state.vips.is_empty());
}
