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
            Op::RenewService { id } => {
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
