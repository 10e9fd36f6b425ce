//! Drops that are known when the programs carry out what the hooks said: who listens is told of them as of all others.

use dataplane_abi::{Hook, Plain as _, Reason, Wanted};
use keelway_agent::dataplane::{
    EventRing,
    PacketProgram::{PodIngress, ServiceIngress, UplinkIngress},
};
use keelway_tests::sandbox::{Sandbox, ip, is_root};

use crate::{family::Family, hex, opened, rows::DROP, run, state};

#[test]
fn a_packet_without_a_way_is_told_as_it_came() {
    if !is_root("packets without a way") {
        return;
    }
    for family in Family::ALL {
        let sandbox = Sandbox::enter().unwrap();
        let mut dataplane = opened(&sandbox, true);
        let range = family.range("198.51.100.0/24");
        ip(&format!("route add unreachable {range}")).unwrap();
        let backends = family.backends(&["198.51.100.9:8080"], &[]);
        dataplane.apply(&state(family, &backends)).unwrap();
        let mut ring = EventRing::open(&sandbox.pin_root()).unwrap();
        ring.want(Wanted::new(None));
        // A pod that leaves as the node, a client outside and a process of the node: all of them translated by then.
        for (program, hook, from, to) in [
            (
                PodIngress,
                Hook::PodIngress,
                "10.0.0.11:4000",
                "198.51.100.1:53",
            ),
            (
                UplinkIngress,
                Hook::UplinkIngress,
                "203.0.113.9:5000",
                "198.18.0.1:30080",
            ),
            (
                ServiceIngress,
                Hook::ServiceIngress,
                "198.18.0.1:5000",
                "10.96.0.1:80",
            ),
        ] {
            let sent = family.udp(
                from,
                to,
                b"as long as what a socket sends, and longer than what is told of it",
            );
            assert_eq!(run(&dataplane, program, &sent).0, DROP, "{family:?}");
            let event = ring.take().expect("an event");
            assert_eq!(
                (event.reason, event.hook, event.len as usize),
                (Reason::NoRoute as u32, hook as u32, sent.len())
            );
            let told = &event.data.as_bytes()[..event.captured as usize];
            assert_eq!(hex(told), hex(&sent[..told.len()]), "{family:?}");
            assert!(ring.take().is_none());
        }
    }
}
