//! Test support and end-to-end suites.
#![forbid(unsafe_code)]

pub mod agents;
pub mod audit;
pub mod cluster;
pub mod dice;
pub mod fabric;
pub mod lists;
pub mod machine;
pub mod nodes;
pub mod process;
pub mod request_loop;
pub mod requests;
pub mod sandbox;
#[cfg(target_arch = "x86_64")]
pub mod steps;
pub mod topology;

/// Builders of packets whose checksums are right.
pub mod packets {
    pub use dataplane_ebpf::{
        memory::{checksums_are_right, icmp, sctp, tcp, udp},
        packet::{sctp_chunk, tcp_flag},
    };
}
