/// What a counter counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// Something happened that is no fault.
    Event,
    /// A packet was thrown away.
    Drop,
    /// A packet was answered with a TCP reset or an ICMP error.
    Reject,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $class:ident;)*) => {
        /// Why a packet (or a socket call) took its way: the index of a counter, with a name for people and metrics.
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// Every reason, in the order of the counters.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)*];

            /// Name in metrics and messages.
            pub const fn name(self) -> &'static str {
                match self { $(Reason::$variant => $name,)* }
            }

            pub const fn class(self) -> Class {
                match self { $(Reason::$variant => Class::$class,)* }
            }
        }
    };
}

reasons! {
    /// A socket was given a backend (connect or sendmsg).
    SocketTranslated = "socket_translated", Event;
    /// A socket asked for a service port without backends.
    SocketNoBackend = "socket_no_backend", Reject;
    /// A packet from a client was translated to a backend.
    ServiceTranslated = "service_translated", Event;
    /// A packet from a backend was translated back.
    ReplyTranslated = "reply_translated", Event;
    /// An ICMP error about a translated packet was translated with what it quotes.
    IcmpTranslated = "icmp_translated", Event;
    /// A packet went to a local pod's namespace without the host's stack.
    Delivered = "delivered", Event;
    /// A client's packet went to its backend's node as it came, for the client to be answered directly.
    Dispatched = "dispatched", Event;
    /// A packet left again by the uplink's driver, before the host's stack saw it.
    SentEarly = "sent_early", Event;
    /// A packet was left to the host's stack.
    Passed = "passed", Event;
    /// A flow was entered in the unreplied table.
    FlowCreated = "flow_created", Event;
    /// A flow was moved to the replied table.
    FlowReplied = "flow_replied", Event;
    /// The replied table is full: the flow stays where it can be evicted.
    FlowTableFull = "flow_table_full", Event;
    /// A flow got another source port, its own being taken by a flow to the same backend.
    FlowPortChanged = "flow_port_changed", Event;
    /// A packet that asks no Service was given another source port, its own being one of a Service's flow.
    PortTranslated = "port_translated", Event;
    /// A packet was given the node's address as source, for its answer to come back here.
    SourceNat = "source_nat", Event;
    /// A pod's packet left the cluster with the node's address as source.
    Masqueraded = "masqueraded", Event;
    /// A client was led to the backend that it had before, as its Service asks.
    AffinityKept = "affinity_kept", Event;
    /// A terminating backend was used, none being active.
    TerminatingUsed = "terminating_used", Event;
    /// Headers are cut short or contradict themselves.
    Malformed = "malformed", Drop;
    /// A pod sent from an address that is not its own.
    SourceAddress = "source_address", Drop;
    /// A later fragment came without its first, which alone has ports.
    FragmentUnknown = "fragment_unknown", Drop;
    /// A client gave up an opening that met a connection of its own: the reset would have ended that one.
    ResetHeld = "reset_held", Drop;
    /// Every source port tried for a flow was taken.
    FlowPortsExhausted = "flow_ports_exhausted", Drop;
    /// The unreplied table refused a flow.
    FlowRefused = "flow_refused", Drop;
    /// A service's backends changed twice while they were read, or its frontend was replaced as it was looked up.
    ServiceTorn = "service_torn", Drop;
    /// The address is in the Service range, but is no Service's.
    UnknownServiceAddress = "unknown_service_address", Drop;
    /// A protocol that Services do not speak was sent to a Service address.
    ServiceProtocol = "service_protocol", Drop;
    /// A client outside the ranges that the Service lets in.
    SourceRange = "source_range", Drop;
    /// The Service has backends, none of them on this node, and its traffic policy is Local: as kube-proxy, no answer.
    NoLocalBackend = "no_local_backend", Drop;
    /// The host has no route or neighbour to the backend.
    NoRoute = "no_route", Drop;
    /// The node has no address of the family that a packet needs as its source.
    NoNodeAddress = "no_node_address", Drop;
    /// A packet could not be rewritten.
    RewriteFailed = "rewrite_failed", Drop;
    /// The service port has no backend.
    NoBackend = "no_backend", Reject;
    /// The address is a Service's, the port is none of its ports.
    NoSuchPort = "no_such_port", Reject;
    /// A packet is longer than its way takes: its sender is told how long one may be.
    TooBig = "too_big", Reject;
}

impl Reason {
    /// Number of counters.
    pub const COUNT: u32 = Self::ALL.len() as u32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_numbered_in_order_and_named_once() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert!(
                Reason::ALL[..index]
                    .iter()
                    .all(|other| other.name() != reason.name()),
                "{}",
                reason.name()
            );
        }
    }
}
