#![cfg_attr(not(any(test, feature = "memory")), no_std)]
#![forbid(unsafe_code)]
//! Packet and socket logic of the data plane. It compiles for the kernel, where the binary beside it gives it maps and
//! packets, and for the host, where its tests give it vectors.
//!
//! - [`packet`]: reading headers; [`checksum`], [`crc32c`]: what changing them does to sums
//! - [`translate`]: rewriting a packet's addresses and ports; [`icmp`]: the same for an ICMP error and what it quotes;
//!   [`reject`]: turning a packet into a reset or an ICMP error; [`too_big`]: into the one that says how long a packet may be
//! - [`tables`]: the maps, as a trait; [`balance`]: choosing a backend; [`flow`]: conntrack
//! - [`early`]: what an uplink does with a packet before the stack does, where there is XDP
//! - [`trace`]: what datagrams leave behind, so that a port used directly and through a Service is told apart
//! - [`dns`]: answers to questions for cluster names
//! - [`hook`]: what each tc hook does with a packet; [`follow`]: what the packet is to Services; [`socket`]: what each cgroup hook
//!   does with a call

pub mod balance;
pub mod checksum;
pub mod crc32c;
pub mod dns;
pub mod early;
pub mod flow;
pub mod follow;
pub mod hook;
pub mod icmp;
pub mod packet;
pub mod reject;
pub mod socket;
pub mod tables;
pub mod too_big;
pub mod trace;
pub mod translate;

#[cfg(any(test, feature = "memory"))]
pub mod memory;
