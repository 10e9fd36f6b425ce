//! Packets whose sum hardware has told (CHECKSUM_COMPLETE): whatever a program makes of one, that has to be its sum. The kernel judges it.

use keelway_agent::dataplane::PacketProgram::{self, PodIngress, UplinkIngress};
use keelway_tests::{
    packets::{
        sctp_chunk::{INIT, INIT_ACK},
        tcp_flag::{ACK, SYN},
    },
    sandbox::is_root,
};

use crate::{A, family::Family, fresh::Fresh};

/// EINVAL: the kernel does not judge sums, before Linux 6.11.
const UNKNOWN_FLAG: i32 = 22;

#[test]
fn sums_that_hardware_has_told_are_those_of_what_is_left_of_packets() {
    if !is_root("told sums") {
        return;
    }
    let mut fresh = Fresh::open();
    for family in Family::ALL {
        fresh.begin(family, &family.backends(&["10.0.1.13:8080"], &[]));
        let (pod, service, there) = ("10.0.0.11:4000", "10.96.0.1:80", "10.0.1.13:8080");
        let datagram = family.udp(pod, service, b"odd");
        let translated = family.udp(pod, there, b"odd");
        let unknown = "10.96.0.1:81";
        let [echo, _] = family.echo_kinds();
        let steps: Vec<(&str, PacketProgram, Vec<u8>)> = vec![
            (
                "TCP to a Service",
                PodIngress,
                family.tcp(pod, service, SYN, b"odd"),
            ),
            (
                "and back",
                UplinkIngress,
                family.tcp(there, pod, SYN | ACK, b"odd"),
            ),
            ("UDP to a Service", PodIngress, datagram),
            ("and back", UplinkIngress, family.udp(there, pod, b"answer")),
            (
                "an error about it",
                UplinkIngress,
                family.port_unreachable(there, &translated),
            ),
            (
                "SCTP to a Service",
                PodIngress,
                family.sctp(pod, service, INIT, b"word"),
            ),
            (
                "and back",
                UplinkIngress,
                family.sctp(there, pod, INIT_ACK, b"word"),
            ),
            (
                "as the node",
                UplinkIngress,
                family.tcp("203.0.113.9:5000", "198.18.0.1:30080", SYN, b""),
            ),
            // As long as what refuses it.
            (
                "a refused opening",
                PodIngress,
                family.tcp(pod, unknown, SYN, b""),
            ),
            (
                "what is no Service's",
                PodIngress,
                family.icmp(pod, "10.0.1.13:0", echo, b"1234"),
            ),
        ];
        for (name, program, packet) in steps {
            if let Err(error) = fresh.dataplane.run_summed(program, &packet, A) {
                let source = std::error::Error::source(&error);
                let errno = source
                    .and_then(|source| source.downcast_ref::<std::io::Error>())
                    .and_then(std::io::Error::raw_os_error);
                if errno == Some(UNKNOWN_FLAG) {
                    println!("skipped: this kernel does not judge told sums");
                    return;
                }
                panic!("{family:?}: {name}: {error}: {errno:?}");
            }
        }
    }
}
