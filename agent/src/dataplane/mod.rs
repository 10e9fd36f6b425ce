//! The data plane as the agent sees it: eBPF programs and pinned maps behind a few calls.
//!
//! [`Dataplane::open`] loads the programs, adopts the maps that an earlier agent pinned, and updates the links it left in
//! place, so that a restart drops no packet. [`Dataplane::state`] reads back what the maps hold; the agent diffs its plan
//! against that and hands the difference to [`Dataplane::apply`].

mod op;

pub use op::{Frontend, LocalPod, Op, Protocol, ServiceBackends, ServiceId, State};

use std::path::PathBuf;

/// How the data plane is set up; validated before it gets here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Directory on a bpffs for this node's pins, `/sys/fs/bpf/keelway` by default. Maps and links lie in its
    /// subdirectory `v<ABI_VERSION>`.
    pub pin_root: PathBuf,
    /// Translate at the socket (cgroup hooks).
    pub socket_lb: bool,
    /// Translate packets (tc hooks).
    pub packet_lb: bool,
    /// The pair of interfaces through which the host's own traffic to Services is routed, when there is one.
    pub service_veth: Option<ServiceVeth>,
}

/// Interface indexes of the service veth pair, both ends in the host's network namespace. The agent makes the pair:
///
/// - both ends have the MAC address [`dataplane_abi::HOST_VETH_MAC`] and are up;
/// - the Service ranges are routed to `outer` by a gateway with a permanent neighbour entry (MAC: HOST_VETH_MAC) and the node's address as
///   preferred source: `ip route add 10.96.0.0/16 via 169.254.77.1 dev <outer> onlink src <node address>`;
/// - so is [`dataplane_abi::HAIRPIN_V4`]/32.
///
/// Programs run where packets come out of `inner`; what they answer enters the host again through `outer`, whose
/// routes make it a legitimate source for Service addresses (no rp_filter or accept_local setting is needed).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServiceVeth {
    pub outer: u32,
    pub inner: u32,
}

// Next (same names):
// Dataplane::open(&Config) -> Result<Dataplane, Error>
// state(&self) -> Result<State, Error>; apply(&mut self, &[Op]) -> Result<Applied, Error>
// attach_cgroup(&mut self, &Path), attach_pod(&mut self, ifindex: u32), detach_pod(&mut self, ifindex), attach_uplink(&mut self, ifindex),
// attach_service_veth(&mut self) -> Result<(), Error>; attached_pods(&self) -> Result<Vec<u32>, Error>
// counters(&self) -> Result<Counters, Error> with (Reason, u64) rows; collect_flows(&mut self) -> Result<Collected, Error>, to be called every 10 s
