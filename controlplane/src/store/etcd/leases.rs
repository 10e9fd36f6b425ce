//! Leases of etcd, for keys that are deleted by themselves. Keys that end at about the same time share one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::Client;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::{Members, StoreError};

/// etcd gives no lease that is shorter than its elections.
const TTL_S_MIN: u64 = 2;

/// A lease of etcd.
pub(super) struct Lease {
    pub id: i64,
    /// It was granted just now.
    pub fresh: bool,
}

pub(super) struct Leases {
    members: Arc<Members>,
    /// What ends are counted from: a clock that nobody sets, as etcd's own for leases.
    began: Instant,
    /// By when they end, in seconds.
    granted: Mutex<BTreeMap<u64, i64>>,
}

impl Leases {
    pub fn new(members: Arc<Members>) -> Self {
        Self {
            members,
            began: Instant::now(),
            granted: Mutex::default(),
        }
    }

    /// A lease that ends a lifetime from now, rounded up by 1/64 of it.
    pub async fn lasting(&self, lifetime: Duration) -> Result<Lease, StoreError> {
        let now = self.began.elapsed().as_secs();
        let ends = end(now, lifetime);
        let mut granted = self.granted.lock().await;
        *granted = granted.split_off(&(now + 1));
        if let Some(id) = granted.get(&ends) {
            return Ok(Lease {
                id: *id,
                fresh: false,
            });
        }
        let ttl = i64::try_from(ends - now).unwrap_or(i64::MAX);
        let grant = |client: Client| async move { client.lease_client().grant(ttl, None).await };
        let id = self.members.ask_any("lease", grant).await?.id();
        granted.insert(ends, id);
        Ok(Lease { id, fresh: true })
    }

    /// Gives out a lease no more, which etcd does not have any more.
    pub async fn forget(&self, lease: i64) {
        let mut granted = self.granted.lock().await;
        granted.retain(|_, id| *id != lease);
    }
}

/// Whether a write failed because etcd does not have its lease.
pub(super) fn is_gone(error: &StoreError) -> bool {
    matches!(error, StoreError::Unavailable { reason, .. } if reason.contains("lease not found"))
}

fn end(now: u64, lifetime: Duration) -> u64 {
    let lifetime = lifetime.as_secs_f64().ceil() as u64;
    let lifetime = lifetime.max(TTL_S_MIN);
    let step = (lifetime / 64).max(1);
    // The second that has begun is not counted.
    (now + 1 + lifetime).div_ceil(step) * step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_end_together_and_never_early() {
        let hour = Duration::from_secs(3600);
        assert_eq!(end(7170, hour), end(7200, hour), "within 56 seconds");
        assert!((0..200).all(|now| (1..=57).contains(&(end(now, hour) - now - 3600))));
        assert_eq!(end(100, Duration::from_millis(60)), 103);
        assert_eq!(end(100, Duration::from_millis(2500)), 104);
    }
}
