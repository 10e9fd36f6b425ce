//! Everything that can happen to the agent.

use std::collections::{BTreeSet, HashSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use cluster_model::ServiceKey;
use cluster_model::share::Offer;
use cluster_model::watch::Report as WatchReport;
use ipnetwork::IpNetwork;
use keelway_cni::Attachment;
use keelway_cni::protocol::{Request, Response};

use crate::balancer::Configured;
use crate::health::Complaint;
use crate::inspect::{ServiceItem, View};
use crate::net::Link;
use crate::node::NodeError;
use crate::report::Report;
use crate::share::Told;

/// Where the answer to a request goes. Whoever waits has given up when sending fails, and is not missed.
pub type Reply<T> = SyncSender<T>;

/// One thing that happened. The loop in [`crate::worker`] takes them in order, many at a time.
#[derive(Debug)]
pub enum Event {
    /// The cluster changed, or could not be watched; with the time at which this process learnt it. What changed at once is told at
    /// once, so that no plan is made of half of it.
    Cluster {
        reports: Vec<WatchReport>,
        seen: Instant,
    },
    /// A request came by the agent's socket, with the network namespace for an ADD or a CHECK.
    Request {
        request: Request,
        netns: Option<OwnedFd>,
        reply: Reply<Response>,
    },
    /// A pod's network has been made, or could not be.
    Wired {
        attachment: Attachment,
        made: Result<Link, NodeError>,
    },
    /// The interfaces of deleted pods have been removed, or could not be.
    Buried { outcome: Result<(), NodeError> },
    /// The sandboxes that the container runtimes have, by id, or why that is not known; none when there is no runtime to ask.
    Sandboxes(Result<Option<HashSet<String>>, String>),
    /// The kernel has verified the programs, or refused one.
    Verified,
    /// Probes have found that a way to another node is direct, or is not any more.
    PathsChanged,
    /// The node may have addresses or uplinks that it did not have before, or not those any more.
    AddressesChanged,
    /// Somebody asks how the agent is.
    Report { reply: Reply<Box<Report>> },
    /// An operator's question needs what the loop knows.
    View { reply: Reply<Box<View>> },
    /// An operator asks for Services; those that do not exist are left out.
    Services {
        keys: Vec<ServiceKey>,
        reply: Reply<Vec<ServiceItem>>,
    },
    /// A process of the node wants to be told of the cluster; nothing before all of it is known.
    Share { reply: Reply<Option<Told>> },
    /// A listener says of its own answers to questions for cluster names; `None` when it has gone.
    Offer { listener: u64, offer: Option<Offer> },
    /// The ranges of the cluster's ServiceCIDRs, all of them.
    ServiceRanges(Vec<IpNetwork>),
    /// The pools of load balancers' addresses, as they are configured now.
    Pools(Configured),
    /// The agents on the link, this one included, that can answer for load balancers' addresses.
    Live(BTreeSet<Arc<str>>),
    /// A health check's port cannot be had, or can again.
    HealthPort(Complaint),
    /// The API server refuses the credentials that this process began with, and they are others by now.
    CredentialsReplaced,
    /// The process shall end. What flows goes on flowing.
    Stop,
}
