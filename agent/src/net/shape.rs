//! Limits of what a pod sends and gets: a token bucket (tbf) on each end of its veth pair, for what leaves by it.
//!
//! Both queue rather than drop, so a sender is slowed down by its own queue. That of the pod's side is in the pod's namespace: a pod that
//! may change its own interfaces (CAP_NET_ADMIN) can lift it.

use std::collections::BTreeSet;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

use keelway_cni::Bandwidth;

use super::netlink::Step;
use super::{Kernel, NetlinkError};

/// The queueing discipline's name.
const TBF: &str = "tbf";
/// Attributes of its options (linux/pkt_sched.h).
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// Rates count bytes as Ethernet has them (linux/pkt_sched.h); without it the kernel wants a table to tell by.
const LINKLAYER_ETHERNET: u8 = 1;
/// What may wait is what passes in so many milliseconds, beside the burst.
const LATENCY_MS: u64 = 25;
/// A burst that nobody stated is what passes in so many milliseconds.
const BURST_MS: u64 = 50;
/// In packets of the interface's MTU: a smaller burst would let none pass, or one at a time.
const BURST_PACKETS_MIN: u64 = 4;
/// Runtimes that know no burst state this many bits or more (containerd: the largest number of 32 bits).
const BURST_UNKNOWN_BITS: u64 = u32::MAX as u64;

/// A limit of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes per second.
    pub rate: u64,
    /// Bytes that may pass at once.
    pub burst: u32,
    /// Bytes that may wait; what is beyond is lost.
    pub limit: u32,
}

impl Shape {
    /// A limit by rate and burst in bits; none without a rate.
    fn of(rate_bits: u64, burst_bits: u64, mtu: u32) -> Option<Self> {
        let rate = rate_bits / 8;
        if rate == 0 {
            return None;
        }
        let passes_in = |milliseconds: u64| rate.saturating_mul(milliseconds) / 1000;
        let burst = match burst_bits {
            0 | BURST_UNKNOWN_BITS.. => passes_in(BURST_MS),
            bits => bits / 8,
        };
        let burst = burst.max(BURST_PACKETS_MIN * u64::from(mtu));
        let limit = burst.saturating_add(passes_in(LATENCY_MS));
        let narrow = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        Some(Self {
            rate,
            burst: narrow(burst),
            limit: narrow(limit),
        })
    }
}

/// What a pod may get and send; without limits for most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of what goes to the pod: on the host's side.
    pub ingress: Option<Shape>,
    /// Of what the pod sends: on its own side.
    pub egress: Option<Shape>,
}

impl Limits {
    pub fn of(bandwidth: Option<Bandwidth>, mtu: u32) -> Self {
        let wish = bandwidth.unwrap_or_default();
        Self {
            ingress: Shape::of(wish.ingress_rate, wish.ingress_burst, mtu),
            egress: Shape::of(wish.egress_rate, wish.egress_burst, mtu),
        }
    }
}

/// Limits what leaves by an interface.
pub(super) fn limit(index: u32, shape: &Shape) -> Step {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle::ROOT;
    message.attributes = vec![
        TcAttribute::Kind(TBF.into()),
        TcAttribute::Options(options(shape)),
    ];
    Step {
        operation: format!("limit interface {index} to {} bytes/s ({TBF})", shape.rate),
        message: RouteNetlinkMessage::NewQueueDiscipline(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
    }
}

fn options(shape: &Shape) -> Vec<TcOption> {
    let rate = u32::try_from(shape.rate);
    let other = |kind: u16, value: Vec<u8>| TcOption::Other(DefaultNla::new(kind, value));
    let mut options = vec![other(
        TCA_TBF_PARMS,
        parameters(rate.unwrap_or(u32::MAX), shape.limit),
    )];
    if rate.is_err() {
        options.push(other(TCA_TBF_RATE64, shape.rate.to_ne_bytes().to_vec()));
    }
    options.push(other(TCA_TBF_BURST, shape.burst.to_ne_bytes().to_vec()));
    options
}

/// `struct tc_tbf_qopt`: the rate, no peak rate, the limit, and no buffer or MTU, which [`TCA_TBF_BURST`] stands for.
fn parameters(rate: u32, limit: u32) -> Vec<u8> {
    // cell_log, linklayer, overhead, cell_align, mpu, rate.
    let mut bytes = vec![0, LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
    bytes.extend(rate.to_ne_bytes());
    bytes.extend([0; 12]);
    bytes.extend(limit.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes
}

impl Kernel {
    /// The interfaces of the namespace on which something is limited.
    pub fn limited_links(&mut self) -> Result<BTreeSet<u32>, NetlinkError> {
        self.links_with(TBF)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_let_packets_pass_and_are_bounded_where_nobody_stated_one() {
        const MTU: u32 = 1450;
        for (rate, burst, expected) in [
            (0, 0, None),
            // 10 Mbit/s.
            (10_000_000, 0, Some((1_250_000, 62_500))),
            (10_000_000, u64::from(u32::MAX), Some((1_250_000, 62_500))),
            (10_000_000, 800_000, Some((1_250_000, 100_000))),
            // A burst below a few packets.
            (10_000_000, 8, Some((1_250_000, 5800))),
            (8, 0, Some((1, 5800))),
            // 100 Gbit/s.
            (100_000_000_000, 0, Some((12_500_000_000, 625_000_000))),
        ] {
            let shape = Shape::of(rate, burst, MTU);
            let got = shape.map(|shape| (shape.rate, shape.burst));
            assert_eq!(got, expected, "{rate} {burst}");
            assert!(shape.is_none_or(|shape| shape.limit >= shape.burst));
        }
    }

    #[test]
    fn options_are_of_the_kernels_size() {
        assert_eq!(parameters(1, 2).len(), 36);
        let wide = Shape {
            rate: 12_500_000_000,
            burst: 1,
            limit: 1,
        };
        assert_eq!(options(&wide).len(), 3);
    }
}
