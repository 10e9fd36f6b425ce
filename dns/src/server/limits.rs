//! What one client may have at once, and all together: a client that asks for much is refused before others feel it.

use std::net::IpAddr;
use std::sync::Arc;

use crate::shares::{Place, Shares};

/// Queries that wait for others, of everyone and of one client.
const SLOW_MAX: usize = 4096;
const SLOW_EACH: usize = 1024;
/// Connections, of everyone and of one client.
const CONNECTIONS_MAX: usize = 1024;
const CONNECTIONS_EACH: usize = 128;

/// Transfers of the zone: each keeps the zone of its beginning.
const TRANSFERS_MAX: usize = 8;

/// Counts of what is going on.
pub(super) struct Limits {
    transfers: Arc<Shares>,
    slow: Arc<Shares>,
    connections: Arc<Shares>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            transfers: Shares::new(TRANSFERS_MAX, TRANSFERS_MAX),
            slow: Shares::new(SLOW_MAX, SLOW_EACH),
            connections: Shares::new(CONNECTIONS_MAX, CONNECTIONS_EACH),
        }
    }
}

impl Limits {
    /// A place for a query that waits for others.
    pub fn slow(&self, client: IpAddr) -> Option<Place> {
        self.slow.take(client)
    }

    /// A place for a connection.
    pub fn connection(&self, client: IpAddr) -> Option<Place> {
        self.connections.take(client)
    }

    /// A place for a transfer.
    pub fn transfer(&self, peer: IpAddr) -> Option<Place> {
        self.transfers.take(peer)
    }

    pub fn connections(&self) -> usize {
        self.connections.taken()
    }

    pub fn slow_queries(&self) -> usize {
        self.slow.taken()
    }
}
