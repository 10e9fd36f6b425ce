//! A Service with as many endpoints as there is room for, through the loaded programs.

use std::collections::BTreeSet;

use dataplane_abi::limits::BACKENDS_PER_SERVICE;
use keelway_agent::dataplane::{PacketProgram::PodIngress, ServiceBackends, held};
use keelway_tests::sandbox::is_root;

use crate::{family::Family, fresh::Fresh, run, state};

/// Backends on another node, by numbers that their addresses end with.
fn backends(family: Family, numbers: std::ops::Range<u32>) -> ServiceBackends {
    let at = |number: u32| family.at(&format!("10.2.{}.{}:80", number >> 8, number & 255));
    ServiceBackends {
        active: numbers.map(at).collect(),
        ..ServiceBackends::default()
    }
}

#[test]
fn a_service_with_as_many_endpoints_as_it_can_have_leads_to_each_of_them() {
    if !is_root("a Service of very many endpoints") {
        return;
    }
    let mut fresh = Fresh::open();
    for family in Family::ALL {
        fresh.begin(family, &backends(family, 0..BACKENDS_PER_SERVICE));
        // Where the datagrams of a socket of a pod's go.
        let asks = |fresh: &Fresh, port: u32| {
            let datagram = family.udp(&format!("10.0.0.11:{port}"), "10.96.0.1:80", b"odd");
            let (_, out) = run(&fresh.dataplane, PodIngress, &datagram);
            let end = family.l4();
            u32::from(out[end - 2]) << 8 | u32::from(out[end - 1])
        };
        let ports = 4_000..5_000;
        let chosen: Vec<u32> = ports.clone().map(|port| asks(&fresh, port)).collect();
        // One of 32 parts is met by none of a thousand once in a million million times.
        let parts: BTreeSet<u32> = chosen.iter().map(|number| number >> 9).collect();
        assert_eq!(parts.len(), 32, "{family:?}");
        // One goes, and all others move up: who has one of them keeps it.
        let fewer = backends(family, 1..BACKENDS_PER_SERVICE);
        fresh.dataplane.apply(&state(family, &fewer)).unwrap();
        for (port, before) in ports.zip(chosen) {
            let now = asks(&fresh, port);
            assert_eq!(
                now == before,
                before != 0,
                "{family:?} {port}: {before}, {now}"
            );
        }
        // A thousand go at once: who has another keeps it.
        let ports = 5_000..6_000;
        let chosen: Vec<u32> = ports.clone().map(|port| asks(&fresh, port)).collect();
        let left = backends(family, 1_000..BACKENDS_PER_SERVICE);
        fresh.dataplane.apply(&state(family, &left)).unwrap();
        for (port, before) in ports.zip(chosen) {
            let now = asks(&fresh, port);
            assert!(
                now >= 1_000 && (now == before || before < 1_000),
                "{family:?} {port}: {before}, {now}"
            );
        }
        fresh.dataplane.apply(&state(family, &fewer)).unwrap();
        let state = held(&fresh.pin_root()).unwrap();
        let most = state.services.values().map(|one| one.active.len()).max();
        assert_eq!(most, Some(BACKENDS_PER_SERVICE as usize - 1));
    }
}
