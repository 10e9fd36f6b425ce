//! What the books keep: ids that stay, what goes, and what there is no room for.

use super::*;

#[test]
fn a_service_that_changes_its_type_keeps_the_ids_of_what_stays() {
    let mut ledger = Ledger::adopt(State::default());
    let mut state = State::default();
    let mut turn = |service: Service| {
        let key = service.key.clone();
        let cluster = snapshot(vec![service], vec![slice("web-1", "web", near_and_far())]);
        ledger.set(&key, plan(&cluster, &key, &here()));
        let batch = ledger.diff();
        apply(&mut state, &batch);
        ledger.applied(&batch);
        state.clone()
    };
    let local = Service {
        external_traffic_policy: TrafficPolicy::Local,
        ..balanced()
    };
    let first = turn(service("web", 1));
    let second = turn(local.clone());
    let third = turn(Service {
        service_type: ServiceType::NodePort,
        ..local
    });
    let last = turn(service("web", 1));
    assert_eq!((second.services.len(), second.frontends.len()), (2, 4));
    assert_eq!((third.services.len(), third.sources.len()), (2, 0));
    assert!(second.services.keys().eq(third.services.keys()));
    assert_eq!(first, last);
}

#[test]
fn a_new_agent_keeps_the_ids_that_it_finds_and_changes_nothing() {
    let cluster = snapshot(
        vec![service("a", 1), service("web", 2), service("c", 3)],
        vec![slice(
            "web-1",
            "web",
            vec![endpoint(1, "node-1", "a", READY)],
        )],
    );
    let state = full(&cluster, State::default());
    assert_eq!(state.services.len(), 3);
    assert_eq!(full(&cluster, state.clone()), state);

    let mut ledger = Ledger::adopt(state.clone());
    for service in cluster.services() {
        ledger.set(&service.key, plan(&cluster, &service.key, &here()));
    }
    assert_eq!(ledger.diff().ops, []);
}

#[test]
fn ids_of_another_versions_maps_stay_with_those_they_were_of() {
    let cluster = |names: &[(&str, u8)]| {
        let services = names.iter().map(|(name, ip)| service(name, *ip));
        snapshot(services.collect(), vec![])
    };
    // Made one after the other, so that the order of their ids is not that of their names.
    let before = cluster(&[("web", 2)]);
    let theirs = full(
        &cluster(&[("web", 2), ("a", 1)]),
        full(&before, State::default()),
    );
    let now = cluster(&[("a", 1), ("newcomer", 3), ("web", 2)]);
    let mut ledger = Ledger::adopt(State::default());
    ledger.inherit(theirs.frontends.clone());
    let mut ours = State::default();
    for service in now.services() {
        ledger.set(&service.key, plan(&now, &service.key, &here()));
        let batch = ledger.diff();
        apply(&mut ours, &batch);
        ledger.applied(&batch);
    }
    for (frontend, lead) in &theirs.frontends {
        assert_eq!(ours.frontends.get(frontend), Some(lead), "{frontend}");
    }
    assert_eq!(ours.services.len(), 3);
    // Later they are as free as others.
    ledger.inherit(Default::default());
    for service in now.services() {
        ledger.set(&service.key, Default::default());
    }
    apply(&mut ours, &ledger.diff());
    assert_eq!(ours, State::default());
}

#[test]
fn what_nobody_wants_any_more_is_pruned_after_a_restart() {
    let before = full(
        &snapshot(vec![service("gone", 1), service("web", 2)], vec![]),
        State::default(),
    );
    let after = full(&snapshot(vec![service("web", 2)], vec![]), before.clone());
    assert_eq!(
        (
            after.services.len(),
            after.frontends.len(),
            after.vips.len()
        ),
        (1, 1, 1)
    );
    let kept = after.services.keys().next().unwrap();
    assert!(
        before.services.contains_key(kept),
        "the survivor keeps its id"
    );
}

#[test]
fn a_frontend_that_two_services_want_belongs_to_the_first_by_name() {
    let mut ledger = Ledger::adopt(State::default());
    let cluster = snapshot(vec![service("a", 7), service("b", 7)], vec![]);
    let (a, b) = (
        ObjectKey::new("default", "a"),
        ObjectKey::new("default", "b"),
    );
    ledger.set(&b, plan(&cluster, &b, &here()));
    ledger.set(&a, plan(&cluster, &a, &here()));
    let batch = ledger.diff();
    let mut state = State::default();
    apply(&mut state, &batch);
    ledger.applied(&batch);
    let id_of = |ledger: &Ledger, key| ledger.service(key).unwrap().1[0].1;
    let lead_to = |id| Some(Lead::to(id));
    let held = |state: &State| state.frontends.values().next().copied();
    assert_eq!(held(&state), lead_to(id_of(&ledger, &a)));
    assert!(matches!(batch.refusals[..], [Refusal::Contested { .. }]));
    ledger.set(&a, Default::default());
    apply(&mut state, &ledger.diff());
    assert_eq!(held(&state), lead_to(id_of(&ledger, &b)));
}

#[test]
fn a_failed_batch_is_made_good_from_what_the_maps_hold() {
    let cluster = snapshot(vec![service("a", 1), service("b", 2)], vec![]);
    let mut ledger = Ledger::adopt(State::default());
    for service in cluster.services() {
        ledger.set(&service.key, plan(&cluster, &service.key, &here()));
    }
    let whole = ledger.diff();
    let mut state = State::default();
    apply(
        &mut state,
        &Batch {
            ops: whole.ops[..3].to_vec(),
            refusals: vec![],
        },
    );
    ledger.hold(state.clone());
    apply(&mut state, &ledger.diff());
    assert_eq!(visible(&state), visible(&full(&cluster, State::default())));
}

#[test]
fn what_there_is_no_room_for_waits_and_nobody_waits_for_it() {
    let cluster = snapshot(
        vec![service("big", 1), service("a", 2), service("b", 3)],
        vec![],
    );
    let planned = |ledger: &mut Ledger, name| {
        let key = ObjectKey::new("default", name);
        ledger.set(&key, plan(&cluster, &key, &here()));
    };
    let (mut ledger, mut state) = (Ledger::adopt(State::default()), State::default());
    planned(&mut ledger, "big");
    planned(&mut ledger, "a");
    // All but one thing finds room.
    let mut fits = ledger.diff();
    let left = fits.ops.pop().unwrap();
    apply(&mut state, &fits);
    ledger.hold(state.clone());
    ledger.park();
    assert!(ledger.is_short_of_room());
    planned(&mut ledger, "b");
    let next = ledger.diff();
    assert!(
        !next.ops.is_empty() && !next.ops.contains(&left),
        "{next:?}"
    );
    apply(&mut state, &next);
    ledger.applied(&next);
    assert!(ledger.is_short_of_room());
    ledger.resume();
    let last = ledger.diff();
    assert_eq!(last.ops, [left]);
    apply(&mut state, &last);
    ledger.applied(&last);
    assert!(!ledger.is_short_of_room());
    assert_eq!(visible(&state), visible(&full(&cluster, State::default())));
}

#[test]
fn a_service_for_which_no_id_is_left_gets_one_when_there_is() {
    // What nobody wants any more goes with the batch in which the newcomer finds nothing.
    let held = State {
        services: (1..limits::SERVICES)
            .map(|id| (ServiceId(id), ServiceBackends::default()))
            .collect(),
        ..State::default()
    };
    let (mut ledger, key) = (Ledger::adopt(held), ObjectKey::new("default", "web"));
    let cluster = snapshot(vec![service("web", 1), service("b", 2)], vec![]);
    ledger.set(&key, plan(&cluster, &key, &here()));
    let batch = ledger.diff();
    assert!(matches!(batch.refusals[..], [Refusal::NoId(_)]));
    ledger.applied(&batch);
    assert!(ledger.is_short_of_room());
    ledger.resume();
    let batch = ledger.diff();
    assert_eq!(batch.refusals, []);
    assert!(!ledger.is_short_of_room());
    assert_eq!(ledger.service(&key).unwrap().1.len(), 1);
}
