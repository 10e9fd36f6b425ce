//! Answering on the link for addresses of load balancers.
//!
//! Every agent that has pools tells the others on its link that it lives ([`frame::Beat`], four times a second), and each computes from who
//! lives, by itself and with the same outcome, which node answers for which address ([`Book`]). No API server is asked, so a dead node
//! is replaced within [`beats::DEAD_AFTER`]. Nodes that do not hear each other are on different links, where each needs a node of its own.
//!
//! Answers come from the agent by packet sockets ([`link`]), not from eBPF: they are few, and a node whose agent does not run must fall
//! silent, since another one takes its place.

mod beats;
mod book;
mod frame;
mod link;
mod sys;

pub use book::{Book, winner};
pub use link::{Announcer, LinkConfig};

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use cluster_model::{ServiceKey, Snapshot};

use crate::balancer::Pools;
use crate::event::Event;
use crate::net::Uplink;
use crate::report::Report;

/// The pause before a link that could not be joined is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// What the event loop keeps of all this.
pub struct Announcements {
    node: Arc<str>,
    events: Sender<Event>,
    pools: Arc<Pools>,
    book: Book,
    live: BTreeSet<Arc<str>>,
    announcer: Option<Announcer>,
    announced: BTreeSet<IpAddr>,
    /// Something changed since addresses were last chosen, since Nodes were last told.
    stale: bool,
    nodes_stale: bool,
    failed_at: Option<Instant>,
}

impl Announcements {
    pub fn new(node: &str, events: Sender<Event>) -> Self {
        Self {
            node: node.into(),
            events,
            pools: Arc::default(),
            book: Book::default(),
            live: BTreeSet::new(),
            announcer: None,
            announced: BTreeSet::new(),
            stale: false,
            nodes_stale: true,
            failed_at: None,
        }
    }

    pub fn set_pools(&mut self, pools: Arc<Pools>) {
        self.pools = pools;
        self.stale = true;
    }

    pub fn set_live(&mut self, live: BTreeSet<Arc<str>>) {
        self.live = live;
        self.stale = true;
    }

    pub fn replan(&mut self, snapshot: &Snapshot, key: &ServiceKey) {
        self.book.replan(snapshot, key);
        self.stale = true;
    }

    pub fn nodes_changed(&mut self) {
        self.nodes_stale = true;
    }

    /// Joins the link once there are pools, leaves it when there are none, and answers for what is this node's.
    pub fn settle(&mut self, uplink: &Uplink, snapshot: &Snapshot) -> io::Result<()> {
        if self.pools.is_empty() {
            self.announcer = None;
            self.announced.clear();
            self.live.clear();
            return Ok(());
        }
        if self.announcer.is_none() {
            if self.failed_at.is_some_and(|when| when.elapsed() < RETRY) {
                return Err(io::Error::other(
                    "the link cannot be joined; it is tried again",
                ));
            }
            self.failed_at = Some(Instant::now());
            let mac = uplink
                .link
                .mac
                .ok_or_else(|| io::Error::other(format!("{} is no Ethernet", uplink.link.name)))?;
            let address = *uplink.addresses.first().ok_or_else(|| {
                io::Error::other(format!("{} has no address of the node", uplink.link.name))
            })?;
            let config = LinkConfig {
                ifindex: uplink.link.index,
                mac,
                node: self.node.clone(),
                address,
            };
            self.announcer = Some(Announcer::start(config, self.events.clone())?);
            self.failed_at = None;
            (self.stale, self.nodes_stale) = (true, true);
        }
        let Some(announcer) = &self.announcer else {
            return Ok(());
        };
        if std::mem::take(&mut self.nodes_stale) {
            let known: BTreeMap<_, _> = snapshot
                .nodes()
                .map(|node| (node.name.clone(), node.internal_ips.clone()))
                .collect();
            announcer.know(known);
        }
        if std::mem::take(&mut self.stale) {
            let wished = self.book.wished(&self.pools, &self.live, &self.node);
            if wished != self.announced {
                self.announced.clone_from(&wished);
                announcer.announce(wished);
            }
        }
        Ok(())
    }

    pub fn fill(&self, report: &mut Report) {
        report.announced = self.announced.iter().copied().collect();
        report.link_nodes = self.live.iter().map(ToString::to_string).collect();
    }
}
