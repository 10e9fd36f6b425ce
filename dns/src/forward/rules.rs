//! How upstreams are asked, as a configuration says it.

use std::time::Duration;

use crate::name::Name;

/// In which order upstreams are asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    Random,
    RoundRobin,
    /// As configured: the others are for when the first is away.
    Sequential,
}

/// How upstream servers are asked.
#[derive(Clone, Debug, PartialEq)]
pub struct ForwardRules {
    pub order: Order,
    /// Queries in flight; what comes above is refused. One client has no more of them than are free.
    pub concurrent_max: usize,
    /// Failures in a row after which an upstream counts as down, 0 for never.
    pub failures_max: u32,
    /// Pause between health checks of an upstream that has failed.
    pub check_every: Duration,
    /// What is asked for then, and whether recursion is desired.
    pub check_name: Name,
    pub check_recursive: bool,
    /// Always ask by TCP.
    pub tcp_only: bool,
    /// How long all attempts together may take: less than clients wait, so that they hear of a failure.
    pub patience: Duration,
}

impl Default for ForwardRules {
    fn default() -> Self {
        Self {
            order: Order::default(),
            concurrent_max: 1000,
            failures_max: 2,
            check_every: Duration::from_millis(500),
            check_name: Name::root(),
            check_recursive: true,
            tcp_only: false,
            patience: Duration::from_millis(4500),
        }
    }
}
