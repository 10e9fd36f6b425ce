use crate::{SocketPeer, layout::plain};

/// Bytes of a packet that an event carries: Ethernet, an IPv6 header and TCP with a few options.
pub const CAPTURE_LEN: usize = 96;

/// A packet of which something is to be told, as it was when the reason was counted: before it was rewritten.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PacketEvent {
    /// Nanoseconds of the monotonic clock.
    pub time_ns: u64,
    /// A [`crate::Reason`], as its number.
    pub reason: u32,
    /// [`Hook`], as its number.
    pub hook: u32,
    /// Interface that the hook is at.
    pub ifindex: u32,
    /// Length of the packet, Ethernet header included.
    pub len: u32,
    /// Valid bytes of `data`.
    pub captured: u32,
    pub pad: u32,
    /// The packet's beginning.
    pub data: [u64; CAPTURE_LEN / 8],
}
plain!(PacketEvent, 128, { time_ns: 0, reason: 8, hook: 12, ifindex: 16, len: 20, captured: 24, pad: 28, data: 32 });

/// What `data` holds of a call that was translated at the socket ([`Hook::Socket`]), where there is no packet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketEvent {
    pub peer: SocketPeer,
    /// Process that made the call, in the machine's own numbers.
    pub pid: u32,
    /// IP protocol number.
    pub proto: u32,
    /// Name of the thread that made it, padded with zeros.
    pub comm: [u8; 16],
}
plain!(SocketEvent, 72, { peer: 0, pid: 48, proto: 52, comm: 56 });

const _: () = assert!(size_of::<SocketEvent>() <= CAPTURE_LEN);

/// Where a packet was looked at.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    PodIngress,
    PodEgress,
    UplinkIngress,
    ServiceIngress,
    /// connect or sendmsg: `data` is a [`SocketEvent`].
    Socket,
    /// The uplink's driver, before the stack.
    UplinkEarly,
    UplinkEgress,
}

impl Hook {
    pub const ALL: [Hook; 7] = [
        Hook::PodIngress,
        Hook::PodEgress,
        Hook::UplinkIngress,
        Hook::ServiceIngress,
        Hook::Socket,
        Hook::UplinkEarly,
        Hook::UplinkEgress,
    ];

    /// Name of the program.
    pub const fn name(self) -> &'static str {
        match self {
            Hook::PodIngress => "pod_ingress",
            Hook::PodEgress => "pod_egress",
            Hook::UplinkIngress => "uplink_ingress",
            Hook::ServiceIngress => "service_ingress",
            Hook::Socket => "socket",
            Hook::UplinkEarly => "uplink_early",
            Hook::UplinkEgress => "uplink_egress",
        }
    }
}

/// Word of the MONITOR map that says what is to be told.
pub const MONITOR_WANTED: u32 = 0;
/// Word of the MONITOR map that counts events for which the ring had no room. Not exact: two CPUs may count as one.
pub const MONITOR_LOST: u32 = 1;
pub const MONITOR_WORDS: u32 = 2;

/// What is to be told: the word [`MONITOR_WANTED`]. Zero, as long as nobody listens, is nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Wanted(pub u64);

impl Wanted {
    const LISTENING: u64 = 1;
    const FLOWS: u64 = 2;

    /// Drops and rejects; of new flows none, or one in 2^n (n at most 31).
    pub const fn new(flows_one_in_2_to: Option<u32>) -> Self {
        match flows_one_in_2_to {
            None => Self(Self::LISTENING),
            Some(power) => {
                let power = if power > 31 { 31 } else { power };
                let mask = (1u64 << power) - 1;
                Self(Self::LISTENING | Self::FLOWS | mask << 32)
            }
        }
    }

    #[inline(always)]
    pub const fn drops(self) -> bool {
        self.0 & Self::LISTENING != 0
    }

    /// Whether a new flow is to be told, by a random number.
    #[inline(always)]
    pub const fn flow(self, random: u32) -> bool {
        self.0 & Self::FLOWS != 0 && random & (self.0 >> 32) as u32 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_wanted_while_nobody_listens() {
        assert!(!Wanted::default().drops() && !Wanted::default().flow(0));
    }

    #[test]
    fn flows_are_sampled_by_powers_of_two() {
        let told = |wanted: Wanted| (0..64).filter(|random| wanted.flow(*random)).count();
        assert_eq!(told(Wanted::new(None)), 0);
        assert_eq!(told(Wanted::new(Some(0))), 64);
        assert_eq!(told(Wanted::new(Some(3))), 8);
        assert_eq!(told(Wanted::new(Some(99))), 1);
        assert!(Wanted::new(None).drops() && Wanted::new(Some(5)).drops());
    }

    #[test]
    fn hooks_are_numbered_in_order() {
        for (index, hook) in Hook::ALL.into_iter().enumerate() {
            assert_eq!(hook as usize, index);
        }
    }
}
